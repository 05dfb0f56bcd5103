"""chat_eval.py: what is kept is not measured again, two ranks measure what one does, and HumanEval without a sandbox."""
import json
import re
import shutil

import pytest

import checkpoint
import common
import pipeline
import execution
import phase
import tokenizer as tok
from conftest import random_model, script


@pytest.fixture
def ready(prepared, monkeypatch):
    """The prepared state with a random base model d2 -> run(*args) of chat_eval.py, result()"""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(prepared))
    tokenizer = tok.load_tokenizer(pipeline.tokenizer_dir("toy"))
    directory = pipeline.state_path("base", "toy", "d2")
    if not directory.exists():
        directory.mkdir(parents=True)
        model = random_model(256, tokenizer.vocab_size, 2, 2, 1, 64)
        phase.take_lock(directory)
        checkpoint.save(directory, 7, model.state_dict(), {}, {"model": {**vars(model.config)}, "tokenizer": tokenizer.fingerprint, "loss": None})
        phase.release(directory)
    path = pipeline.state_path("base-eval", "toy", "d2")
    path.unlink(missing_ok=True)
    args = ["chat_eval.py", "--data=toy", "--source=base", "--max_new_tokens=4", "--threads=1", "--dtype=float32"]
    run = lambda *more, launcher=(), env=None: script(prepared, *launcher, *args, *more, env=env)
    return run, path


def test_what_is_kept_is_not_measured_again_and_two_ranks_measure_what_one_does(ready):
    run, path = ready
    args = ["--tasks=arc_easy,gsm8k,spellingbee", "--max_items=300"]
    out = run(*args)
    assert out.returncode == 0 and "  arc_easy: 256 of 300 items, about" in out.stdout, out.stdout + out.stderr
    whole = json.loads(path.read_text())
    outcomes = lambda result: {name: r["outcomes"] for name, r in result["results"].items()}
    assert set(outcomes(whole)) == {"arc_easy", "gsm8k", "spellingbee", "facts"} and 0 < whole["results"]["arc_easy"]["accuracy"] < 1
    assert whole["chatcore"] is None and whole["missing"] == ["arc_challenge", "mmlu", "humaneval"]
    assert "done already" in run(*args).stdout

    path.unlink()
    out = run(*args, "--time_limit=0")
    assert out.returncode == 75 and "the 0 pieces measured so far are kept" in out.stdout and not path.exists()
    with open(path.with_suffix(".partial.jsonl"), "a") as f:  # what it might have measured: all wrong, so that it can be told from the right
        f.write(json.dumps({"piece": "arc_easy 0", "value": [not ok for ok in outcomes(whole)["arc_easy"][:256]], "seconds": 1.0}) + "\n")
    out = run(*args)
    assert out.returncode == 0 and "1 pieces are there already" in out.stdout, out.stdout + out.stderr
    expected = outcomes(whole)
    expected["arc_easy"] = [not ok for ok in expected["arc_easy"][:256]] + expected["arc_easy"][256:]
    assert outcomes(json.loads(path.read_text())) == expected

    path.unlink()
    out = run(*args, launcher=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])
    assert out.returncode == 0 and outcomes(json.loads(path.read_text())) == outcomes(whole), out.stdout + out.stderr


def test_a_part_of_the_public_test_sets_is_called_a_part(ready, prepared, tmp_path):
    run, _ = ready
    own = str(tmp_path)  # any data set that is not the toy world; its files of tasks have the form of the public ones
    tok.save_tokenizer(pipeline.tokenizer_dir(own), tok.load_tokenizer(pipeline.tokenizer_dir("toy")).ranks)
    shutil.copytree(pipeline.state_path("base", "toy", "d2"), pipeline.state_path("base", own, "d2"))
    pipeline.task_dir(own).symlink_to(pipeline.task_dir("toy"))
    out = run(f"--data={own}", "--max_items=2", "--unsafe_exec=True")
    assert out.returncode == 0 and "2 items of 2,376" in out.stdout and re.search(r"^ChatCORE in part -?0\.\d{4}$", out.stdout, re.MULTILINE), out.stdout + out.stderr


def test_without_a_sandbox_humaneval_is_left_out_unless_asked_for_and_measured_where_there_is_one(ready):
    run, path = ready
    args, bare = ["--tasks=humaneval,spellingbee", "--max_items=3"], {"PATH": "/nonexistent"}
    out = run(*args, env=bare)
    assert out.returncode == 0 and "HumanEval is left out" in out.stdout and "--unsafe_exec=True" in out.stdout, out.stdout + out.stderr
    assert "humaneval" in json.loads(path.read_text())["missing"] and "done already" in run(*args, env=bare).stdout
    out = run(*args, "--unsafe_exec=True", env=bare)
    assert out.returncode == 0 and json.loads(path.read_text())["results"]["humaneval"]["n"] == 3, "asked for, it is measured"
    if execution.sandbox_available()[0]:
        run("--tasks=humaneval", "--max_items=2", env=bare)
        assert run("--tasks=humaneval", "--max_items=2").returncode == 0 and "humaneval" in json.loads(path.read_text())["results"]
