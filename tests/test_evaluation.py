"""evaluation.py: pieces that are kept, an evaluation that dies or is stopped; intervals
against Wilson's by hand."""
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import common
import evaluation
import lock
import pipeline
import status
from conftest import REPO, alone, environment, exit_code, script

SCRIPT = """
import os, signal, sys
from pathlib import Path
from run import Run
run = Run.start("chat_eval")
import evaluation
settings = {"device": "cpu", "dtype": sys.argv[2], "threads": 1, "time_limit": None}
measured = evaluation.open_or_exit(run, Path(sys.argv[1]), {"weights": "w"}, settings)
print("kept", measured.pieces)
if "a" not in measured.pieces:
    measured.keep("a", [True, False])
if sys.argv[3] == "raise":
    raise ValueError("the reason why")
if sys.argv[3] == "wait":
    print("waits", flush=True)
    sys.stdin.read()
if sys.argv[3] == "stop":
    os.kill(os.getpid(), signal.SIGTERM)
    measured.keep("b", None)
measured.keep("b", 2)
measured.exit_done(results=measured.pieces)
"""

def test_a_damaged_result_is_measured_again(state):
    path = state / "report/chat_sft_d4.json"
    path.parent.mkdir(parents=True)
    for content in ('{"inputs": {"weigh', "[]", "null"):
        path.write_text(content)
        out = script(state, "-c", SCRIPT, path, "float32", "finish")
        assert out.returncode == 0 and "done already" not in out.stdout, out.stderr
        assert json.loads(path.read_text())["results"] == {"a": [True, False], "b": 2}

def test_of_two_at_once_the_second_is_refused_and_the_first_goes_on(state):
    path = state / "report/chat_sft_d4.json"
    command = [sys.executable, "-c", SCRIPT, path, "float32", "wait"]
    first = subprocess.Popen(command, cwd=REPO, env=environment(state), stdin=-1, stdout=-1,
                             text=True)
    while (line := first.stdout.readline()) != "waits\n":
        assert line, "it has ended"
    before = path.with_suffix(".partial.jsonl").read_bytes()
    folder = pipeline.lock_of_result(path)  # where the launcher looks, too
    assert lock.living_holder(folder)["pid"] == first.pid
    assert status.describe_eval(path, state / "none")[0] == "running"
    second = script(state, "-c", SCRIPT, path, "float32", "finish")
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"{path} is being written by process {first.pid} on " in second.stderr
    assert path.with_suffix(".partial.jsonl").read_bytes() == before
    first.communicate("")
    assert first.returncode == 0 and lock.living_holder(folder) is None
    assert json.loads(path.read_text())["results"] == {"a": [True, False], "b": 2}

def test_one_that_has_lost_its_lock_writes_nothing_any_more(tmp_path, capsys):
    run = alone()
    evaluation.hold(run, tmp_path / "x.json")
    run.partial = tmp_path / "x.partial.jsonl"
    measured = evaluation.Evaluation(run, tmp_path / "x.json", {}, None, {}, 0.0)
    measured.keep("a", 1)
    before = run.partial.read_bytes()
    run.lock.path.write_text('{"token": "of another"}')
    assert exit_code(measured.keep, "b", 2) == exit_code(measured.exit_done) == 1
    run.close(1, "lost it")
    assert run.partial.read_bytes() == before and not (tmp_path / "x.json").exists()
    assert f"lost the lock of {tmp_path}/.x to another process" in capsys.readouterr().err

def test_a_result_that_cannot_be_written_leaves_the_one_before_in_its_place(
        tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.json"
    path.write_text('{"inputs": 1}')
    run = alone()
    run.partial = tmp_path / "x.partial.jsonl"
    run.partial.write_text('{"piece": "a", "value": 1, "seconds": 1.0}\n')
    measured = evaluation.Evaluation(run, path, {"inputs": 2}, None, {}, 0.0)

    def full(fd):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert exit_code(measured.exit_done) == 1
    assert "No space left" in capsys.readouterr().err
    assert path.read_text() == '{"inputs": 1}' and run.partial.exists()
    assert exit_code(measured.exit_done) == 0 and common.read_json(path)["inputs"] == 2
    assert not run.partial.exists() and len(list(tmp_path.glob("x.json.old-*"))) == 1

def test_a_death_is_named_and_a_stop_continues_and_another_dtype_is_measured_anew(state):
    path = state / "report/chat_sft_d4.json"
    partial = path.with_suffix(".partial.jsonl")

    def run(dtype, what):
        out = script(state, "-c", SCRIPT, path, dtype, what)
        return out.returncode, out.stdout
    code, out = run("float32", "raise")
    word, words = status.describe_eval(path, state / "none")
    assert code == 1 and "kept {}" in out
    assert word == "failed" and words.endswith("ago: ValueError: the reason why")
    code, out = run("auto", "stop")
    word, words = status.describe_eval(path, state / "none")
    assert code == 75 and "kept {'a': [True, False]}" in out
    assert word == "half" and "signal SIGTERM; parts measured and kept: 1" in words
    with open(partial, "a") as f:
        f.write('{"piece": "b"}\n')  # damaged
        f.write('{"piece": "b", "val')  # as a death in the middle of a line leaves it
    code, out = run("auto", "finish")
    assert code == 0 and "kept {'a': [True, False]}" in out
    assert status.describe_eval(path, state / "none")[0] == "done"
    result = json.loads(path.read_text())
    assert {"command", "commit", "difference", "machine"} <= result.keys(), "where it comes from"
    assert result["results"] == {"a": [True, False], "b": 2}
    assert result["chosen"]["dtype"] == "float32", "what the first start chose"
    assert not partial.exists()

    for dtype in ("auto", "float32"):
        assert "done already" in run(dtype, "finish")[1]
    code, out = run("bfloat16", "raise")
    assert code == 1 and "kept {}" in out
    code, out = run("float32", "stop")
    assert code == 0 and "done already" in out, "the result of before is there still"
    assert status.describe_eval(path, state / "none")[0] == "done", "what failed was another"
    code, out = run("bfloat16", "stop")
    assert code == 75
    path.unlink()
    code, out = run("float32", "finish")
    assert code == 0 and "settings or inputs: dtype" in out and "kept {}" in out

def test_nothing_measured_is_lost_where_another_evaluation_takes_its_place(state, capsys):
    path = state / "report/chat_sft_d4.json"

    def measure(items, until=3):
        run = alone()
        settings = {"device": "cpu", "dtype": "float32", "threads": 1, "time_limit": None}
        measured = evaluation.open_or_exit(run, path, {"items": items}, settings)
        for piece in range(until):
            if piece not in measured.pieces:
                measured.keep(piece, items)
        run.stop = "signal SIGTERM"
        measured.keep(0, None) if until < 3 else measured.exit_done(results={"n": items})

    assert exit_code(measure, 100) == 0
    assert exit_code(measure, 5) == 0, "a quick look"
    aside, = path.parent.glob(f"{path.name}.old-*")
    assert common.read_json(aside)["inputs"] == {"items": 100}
    assert common.read_json(path)["results"] == {"n": 5}
    said = capsys.readouterr().out
    assert "is kept in" in said and "measuring anew" in said and "another items" in said

    assert exit_code(measure, 300, until=2) == 75
    assert exit_code(measure, 5) == 0 and "done already" in capsys.readouterr().out
    assert exit_code(measure, 300, until=1) == 75
    assert "parts measured already: 2" in capsys.readouterr().out, "it was put aside"
    assert exit_code(measure, 7, until=1) == 75, "another one in between"
    assert exit_code(measure, 300) == 0
    assert "parts measured already: 2" in capsys.readouterr().out
    assert status.describe_eval(path, state / "none")[0] == "done"

def test_a_result_of_weights_that_are_gone_is_not_shown_as_current(state):
    path, folder = state / "report/chat_sft_d4.json", state / "chatsft_checkpoints/d4"
    common.atomic_write(path, json.dumps({"inputs": {"weights": "x"}, "results": {}}))
    assert status.describe_eval(path, folder)[0] == "done"
    folder.mkdir(parents=True)
    assert status.describe_eval(path, folder)[0] == "stale"

def test_progress_is_of_what_is_left_to_measure(monkeypatch, capsys):
    monkeypatch.setattr(common, "progress", functools.partial(common.progress, every=0.0))
    measured = evaluation.Evaluation(alone(), None, {}, None, {"task 0 to 64": [True] * 64}, 0.0)
    assert measured.outcomes("task", [1] * 200, lambda part: [True] * len(part)) == [True] * 200
    said = capsys.readouterr().out
    assert "  64 of 136 items of task, about" in said and said.count("\n") == 2

def test_a_disk_that_is_full_while_it_measures_is_one_line_and_the_reason_is_whole(
        tmp_path, capsys):
    run = alone()
    run.partial = Path("/dev/full")
    measured = evaluation.Evaluation(run, tmp_path / "x.json", {}, None, {}, 0.0)
    assert exit_code(measured.keep, "a", 1) == 1
    said = capsys.readouterr().err
    assert "No space left" in said and said.count("\n") == 1
    run.partial = tmp_path / "x.partial.jsonl"
    run.partial.write_text('{"piece": "a", "va')
    run.close(1, "full")
    assert common.read_json_lines(run.partial) == [{"code": 1, "reason": "full"}]

@pytest.mark.parametrize("right,n,low,high", [
    (5, 10, 0.237, 0.763), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (560, 1000, 0.529, 0.590)])
def test_intervals_as_in_wilsons_tables(right, n, low, high):
    r = evaluation.score([True] * right + [False] * (n - right), 0.25)
    assert (r["low"], r["high"]) == pytest.approx((low, high), abs=1e-3) and r["n"] == n
    assert r["centred"] == pytest.approx((right / n - 0.25) / 0.75)
