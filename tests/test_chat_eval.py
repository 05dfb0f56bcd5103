"""chat_eval.py: what is kept is not measured again, two ranks measure what one does, and HumanEval
without a sandbox."""
import json
import re
import shutil

import pytest

import common
import execution
import pipeline
import tokenizer as tok
from conftest import random_model, save_model, script

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ARGS = ["chat_eval.py", "--data=toy", "--source=base", "--max_new_tokens=4", "--threads=1",
        "--dtype=float32"]

@pytest.fixture
def ready(prepared, monkeypatch):
    """The prepared state with a random base model d2 -> run(*args) of chat_eval.py, its result"""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(prepared))
    tokenizer = tok.load_tokenizer("toy")
    if not pipeline.state_path("base", "toy", "d2").exists():
        model = random_model(256, tokenizer.vocab_size, 2, 2, 1, 64)
        save_model("base", "toy", "d2", model, tokenizer)
    path = pipeline.report_dir("toy") / "chat_base_d2.json"
    path.unlink(missing_ok=True)
    path.with_suffix(".partial.jsonl").unlink(missing_ok=True)

    def run(*more, launcher=(), env=None):
        return script(prepared, *launcher, *ARGS, *more, env=env)
    return run, path

def outcomes(path):
    results = json.loads(path.read_text())["results"]
    return {name: result["outcomes"] for name, result in results.items()}

def test_what_is_kept_is_not_measured_again_and_two_ranks_measure_what_one_does(ready):
    run, path = ready
    args = ["--tasks=arc_easy,gsm8k,spellingbee", "--max_items=300"]
    out = run(*args)
    assert out.returncode == 0, out.stdout + out.stderr
    result, whole = json.loads(path.read_text()), outcomes(path)
    assert set(whole) == {"arc_easy", "gsm8k", "spellingbee", "facts"}
    assert 0 < result["results"]["arc_easy"]["accuracy"] < 1
    assert result["chatcore"] is None
    assert result["missing"] == ["arc_challenge", "mmlu", "humaneval"]
    assert "done already" in run(*args).stdout

    path.unlink()
    out = run(*args, "--time_limit=0")
    assert out.returncode == 75 and "parts measured and kept: 0" in out.stdout
    assert not path.exists()
    # what it might have measured: all wrong, so that it can be told from the right
    wrong = [not right for right in whole["arc_easy"][:64]]
    with open(path.with_suffix(".partial.jsonl"), "a") as f:
        f.write(json.dumps({"piece": "arc_easy 0 to 64", "value": wrong, "seconds": 1.0}) + "\n")
    out = run(*args)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "parts measured already: 1" in out.stdout
    assert outcomes(path) == {**whole, "arc_easy": wrong + whole["arc_easy"][64:]}

    path.unlink()
    out = run(*args, "--time_limit=0", launcher=TORCHRUN)
    assert "parts measured and kept: 0" in out.stdout and not path.exists()
    last = common.read_json_lines(path.with_suffix(".partial.jsonl"))[-1]
    assert last["code"] == 75 and "deadline" in last["reason"]
    out = run(*args, launcher=TORCHRUN)
    assert out.returncode == 0 and outcomes(path) == whole, out.stdout + out.stderr

def test_a_part_of_the_public_test_sets_is_called_a_part(ready, tmp_path):
    """Of any data set that is not the toy world; its files of tasks have the form of the public
    ones."""
    run, _ = ready
    own = str(tmp_path)
    toys = tok.load_tokenizer("toy")
    tok.save_tokenizer(pipeline.tokenizer_dir(own), toys.ranks)
    there = pipeline.state_path("base", own, "d2")
    shutil.copytree(pipeline.state_path("base", "toy", "d2"), there)
    pipeline.task_dir(own).symlink_to(pipeline.task_dir("toy"))
    out = run(f"--data={own}", "--max_items=2", "--unsafe_exec=True")
    assert out.returncode == 0 and "ARC-Easy, 2 of 2,376 " in out.stdout, out.stdout + out.stderr
    assert re.search(r"^ChatCORE in part -?0\.\d{4}$", out.stdout, re.MULTILINE), out.stdout

def test_what_has_no_right_answers_is_no_task_to_measure(ready):
    run, _ = ready
    for name in ("smoltalk", "mmlu_aux", "arc_esay"):
        out = run(f"--tasks=gsm8k,{name}")
        assert out.returncode == 2 and f"--tasks={name}: the tasks with" in out.stderr, out.stderr
        assert out.stderr.count("\n") == 1 and "arc_easy" in out.stderr

def test_a_task_whose_items_lack_answers_ends_it_before_the_first_is_measured(ready):
    run, path = ready
    broken = pipeline.task_dir("toy") / "gsm8k_test.jsonl"
    whole = broken.read_bytes()
    broken.write_text('{"question": "1+1?", "answer": "two"}\n' * 9)
    for more in ([], ["--try_out=True"]):
        out = run("--tasks=arc_easy,gsm8k", "--max_items=3", *more)
        assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
        assert "gsm8k_test.jsonl: 9 of 9 lines are broken" in out.stderr
        assert "its answer has no number, expected one as in #### 12" in out.stderr
        assert not path.exists() and not path.with_suffix(".partial.jsonl").exists()
    broken.write_bytes(whole)

def test_without_a_sandbox_humaneval_is_left_out_unless_asked_for_and_measured_where_there_is_one(
        ready):
    run, path = ready
    args, bare = ["--tasks=humaneval,spellingbee", "--max_items=3"], {"PATH": "/nonexistent"}
    out = run(*args, env=bare)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "HumanEval is left out, since" in out.stdout and "--unsafe_exec=True" in out.stdout
    assert "humaneval" in json.loads(path.read_text())["missing"]
    assert "done already" in run(*args, env=bare).stdout
    out = run(*args, "--unsafe_exec=True", env=bare)
    assert out.returncode == 0, out.stdout + out.stderr
    result = json.loads(path.read_text())["results"]["humaneval"]
    assert result["n"] == 3, "asked for, it is measured"
    if execution.sandbox_available()[0]:
        args = ["--tasks=humaneval", "--max_items=2"]
        run(*args, env=bare)
        assert run(*args).returncode == 0
        assert "humaneval" in json.loads(path.read_text())["results"]
