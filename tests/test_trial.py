"""trial.py, and what ends a training run: no memory, no finite gradient, a loss that explodes. The faults are put into the model by a few lines in front of the script."""
import json
import math

import pytest
import torch

import checkpoint
import common
from conftest import script

TINY = ["--max_seq_len=64", "--total_batch_size=512", "--device_batch_size=8", "--vocab_size=512", "--device=cpu", "--dtype=float32", "--threads=1"]
TRIAL = ["--data=toy", "--depth=1", *TINY, "--rollout_rows=8", "--rows=8", "--max_new_tokens=16", "--problems_per_step=2"]
BASE = ["--data=toy", "--depth=1", "--max_seq_len=64", "--total_batch_size=512", "--device_batch_size=8", "--device=cpu", "--dtype=float32", "--threads=1", "--compile=False",
        "--eval_tokens=2000", "--eval_every=0", "--sample_every=0", "--save_minutes=0.0"]
FAULT = """
import runpy, sys
sys.path.insert(0, ".")
import torch, gpt, training, checkpoint
real, calls = gpt.GPT.forward, [0]
def forward(self, idx, *args, **kwargs):
    calls[0] += 1
    return fault(real(self, idx, *args, **kwargs), len(idx), calls[0])
gpt.GPT.forward = forward
def out_of_memory(rows, limit):
    if rows > limit:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
"""


def faulty(state, name, args, fault, more=""):
    """Runs the script with a model whose forward(loss, rows, number of the call) is `fault`, an expression."""
    code = f"{FAULT}\nfault = lambda loss, rows, call: {fault}\n{more}\nsys.argv = {[name, *args]!r}\nrunpy.run_path({name!r}, run_name='__main__')"
    return script(state, "-c", code, timeout=120)


@pytest.fixture
def folder(prepared):
    import shutil
    shutil.rmtree(prepared / "toy/base_checkpoints", ignore_errors=True)
    (prepared / "toy/trial_d1.json").unlink(missing_ok=True)
    return prepared / "toy/base_checkpoints/d1"


def found(state):
    return json.loads((state / "toy/trial_d1.json").read_text())


def test_every_phase_is_tried_from_nothing_and_nothing_stays_behind(tmp_path):
    out = script(tmp_path, "trial.py", *TRIAL)
    assert out.returncode == 0, out.stderr
    for stage, shape in (("base", "8 rows of 64 tokens"), ("mid", "8 rows of 64 tokens"), ("sft", "8 rows of 64 tokens"), ("rl", "8 rows of 80 tokens, 8 answers")):
        assert f"trial: {stage}: {shape}" in out.stdout, out.stdout
    assert "evaluation: 8 answers of up to 16 tokens at once" in out.stdout and "read in" in out.stdout and "all phases left take about" in out.stdout
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["trial_d1.json"]
    assert found(tmp_path)["trying"] is None and found(tmp_path)["found"]["rl rollout_rows"] == [8, 8]


def test_its_shapes_are_those_of_the_command_that_speedrun_prints(tmp_path):
    out = script(tmp_path, "trial.py", "--data=toy", "--depth=1", "--phases=base", "--device_batch_size=2", "--threads=1")
    assert "base: 2 rows of 256 tokens" in out.stdout and "1,000 steps" in out.stdout, out.stdout + out.stderr
    out = script(tmp_path, "trial.py", "--data=toy", "--device_batch_sise=2")
    assert out.returncode == 2 and "--device_batch_size" in out.stderr


def test_out_of_memory_is_named_and_half_is_tried_and_then_used_with_the_same_batch(prepared, folder):
    out = faulty(prepared, "trial.py", TRIAL, "out_of_memory(rows, 4) or loss")
    assert out.returncode == 0 and "base runs out of memory at --device_batch_size=8; try --device_batch_size=4" in out.stdout, out.stdout + out.stderr
    assert found(prepared)["found"]["base device_batch_size"] == [8, 4] and "base: 4 rows" in out.stdout
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=2"], "out_of_memory(rows, 4) or loss")
    assert out.returncode == 0 and "--device_batch_size=4 instead of 8" in out.stdout and "2 x 4 rows a rank" in out.stdout and "2 steps of 512 tokens" in out.stdout, out.stderr


def test_out_of_memory_on_one_of_two_ranks_halves_both(prepared, folder, tmp_path):
    fault = 'out_of_memory(rows, 4 if os.environ["RANK"] == "1" else 99) or loss'
    (tmp_path / "faulty.py").write_text(f"import os\n{FAULT}\nfault = lambda loss, rows, call: {fault}\nsys.argv = {['trial.py', *TRIAL, '--phases=base', '--total_batch_size=1024']!r}\nrunpy.run_path('trial.py', run_name='__main__')")
    out = script(prepared, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "faulty.py"), timeout=200)
    assert out.returncode == 0 and "base runs out of memory at --device_batch_size=8" in out.stdout, out.stdout + out.stderr
    assert found(prepared)["found"]["base device_batch_size"] == [8, 4]


def test_what_was_found_is_of_one_model_and_the_evaluation_uses_it_too(prepared, folder):
    assert script(prepared, "base_train.py", *BASE, "--num_steps=1").returncode == 0
    common.atomic_write(prepared / "toy/trial_d1.json", json.dumps({"machine": "1 x cpu", "found": {"eval rows": [8, 4], "base device_batch_size": [8, 4]}}))
    out = script(prepared, "chat_eval.py", "--data=toy", "--source=base", "--tasks=arc_easy", "--max_items=4", "--rows=8", "--threads=1")
    assert out.returncode == 0 and "eval: --rows=4 instead of 8" in out.stdout, out.stdout + out.stderr
    out = script(prepared, "base_train.py", *BASE, "--num_steps=1", "--tag=wide")
    assert out.returncode == 0 and "instead of" not in out.stdout, "another model's"


def test_an_easy_first_batch_sets_no_level(monkeypatch, capsys):
    import training
    monkeypatch.setattr(training, "_clock", {})
    for loss in [0.01, *[3.0] * 60]:
        training.watch(loss, "somewhere")
        assert not training.exploding()
    training.watch(9.0, "somewhere")
    assert training.exploding() and "above its level of 3" in capsys.readouterr().out


def test_what_does_not_fit_at_half_either_ends_with_2(prepared, folder):
    out = faulty(prepared, "trial.py", TRIAL, "out_of_memory(rows, 2) or loss")
    assert out.returncode == 2 and "base does not fit" in out.stderr and "--device_batch_size=2" in out.stderr and out.stderr.count("\n") == 1
    assert not (prepared / "toy/trial_d1").exists()


@pytest.mark.parametrize("kills,rows", [(6, 4), (7, 8)])
def test_a_trial_that_was_killed_is_named(prepared, folder, kills, rows):
    first = script(prepared, "trial.py", *TRIAL, "--phases=base")
    assert first.returncode == 0
    import phase
    record = {**found(prepared), "trying": {"name": "base device_batch_size", "n": 8, "boot": phase.boot_id(), "kills": kills}}
    common.atomic_write(prepared / "toy/trial_d1.json", json.dumps(record))
    out = faulty(prepared, "trial.py", [*TRIAL, "--phases=base"], "loss", "import phase; phase.memory_kills = lambda: 7")
    assert ("by this host's memory guard: trying 4" if rows == 4 else "trying it again") in out.stdout and f"base: {rows} rows" in out.stdout, out.stdout + out.stderr


def test_too_little_disk_is_said_before_it_is_needed(prepared, folder):
    out = faulty(prepared, "trial.py", [*TRIAL, "--phases=base"], "loss", "checkpoint.free_bytes = lambda folder: 1000")
    assert out.returncode == 2 and "make room" in out.stderr and not (prepared / "toy/trial_d1").exists()
    out = faulty(prepared, "trial.py", [*TRIAL, "--phases=base"], "loss", "checkpoint.free_files = lambda folder: 3")
    assert out.returncode == 2 and "7 files free" in out.stderr and "and 8 files: make room" in out.stderr and out.stderr.count("\n") == 1, out.stderr


def test_out_of_memory_in_training_names_what_to_try_and_the_save_goes_on(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=6"], "out_of_memory(call, 4) or loss")
    assert out.returncode == 1 and "ran out of memory in base" in out.stderr and "--device_batch_size=4" in out.stderr and "Traceback" not in out.stderr, out.stderr
    record = json.loads((folder / "phase.json").read_text())
    assert record["status"] == "failed" and "--device_batch_size=4" in record["reason"] and checkpoint.newest(folder) >= 2
    assert script(prepared, "base_train.py", *BASE, "--num_steps=6", "--device_batch_size=4").returncode == 0


def test_a_step_without_a_finite_gradient_is_skipped(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=6"], "loss * math.nan if call == 4 else loss", "import math")
    assert out.returncode == 0 and "this step was skipped (1 in a row)" in out.stdout, out.stdout + out.stderr
    model, state, meta = checkpoint.load(folder, 6)
    assert all(torch.isfinite(t).all() for t in model.values()) and {s["step"] for s in state.values()} == {5} and meta["skipped"] == 0
    assert all(torch.isfinite(t).all() for s in state.values() for t in s.values() if torch.is_tensor(t))


def test_too_many_such_steps_in_a_row_end_the_phase_and_name_the_last_good_checkpoint(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=60", "--max_skipped=3"], "loss * math.nan if call >= 6 else loss", "import math")
    assert out.returncode == 1 and "4 steps in a row had no finite gradient" in out.stderr and f"in {folder}" in out.stderr, out.stderr
    step = checkpoint.newest(folder)
    assert f"that of step {step} " in out.stderr and step >= 4
    model, state, _ = checkpoint.load(folder, step)
    assert all(torch.isfinite(t).all() for t in model.values()) and next(iter(state.values()))["step"] <= 5


def test_a_loss_that_explodes_ends_the_phase_and_does_not_overwrite_the_good_checkpoint(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=60"], "loss * 3 if call > 12 else loss", "training.EXPLODED = 8")
    assert out.returncode == 1 and "the loss has exploded" in out.stderr and "nothing is saved meanwhile" in out.stdout, out.stdout + out.stderr
    step = checkpoint.newest(folder)
    assert f"that of step {step} " in out.stderr and 1 <= step <= 12, "what was saved before it exploded"
    lines = common.read_metrics(folder / "metrics.jsonl")
    assert max(r["step"] for r in lines) >= 18, "it must have gone on for a while"


def test_a_loss_that_jumps_for_a_few_steps_only_does_not(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=30"], "loss * 3 if 10 < call < 15 else loss", "training.EXPLODED = 8")
    assert out.returncode == 0 and "far above its level" in out.stdout and checkpoint.newest(folder) == 30


def test_a_trial_that_is_asked_to_stop_does(prepared, folder):
    out = faulty(prepared, "trial.py", TRIAL, "os.kill(os.getpid(), signal.SIGTERM) or loss", "import os, signal")
    assert out.returncode == 75 and "signal SIGTERM" in out.stderr and "trial: sft" not in out.stdout and not (prepared / "toy/trial_d1").exists(), out.stdout + out.stderr


def test_a_signal_that_ends_what_the_trial_asks_is_no_failure(tmp_path):
    (tmp_path / "bash").write_text("#!/bin/sh\nkill -TERM $PPID\nkill -TERM $$\n")
    (tmp_path / "bash").chmod(0o755)
    out = script(tmp_path / "state", "-c", f"import os, runpy, sys; sys.path.insert(0, '.'); os.environ['PATH'] = {str(tmp_path)!r}; sys.argv = ['trial.py']; runpy.run_path('trial.py')")
    assert out.returncode == 75 and "stopped before anything was tried" in out.stderr, out.stderr
