"""What a training does when memory is out, gradients are not finite or the loss explodes, and what
--try_out=True says before it begins. The faults are put into the model by a few lines in front of
the script."""
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import common
import gpt
import training
from conftest import REPO, alone, environment, script, without_reader
from records import load_record

BASE = ["--data=toy", "--depth=1", "--max_seq_len=64", "--total_batch_size=512", "--threads=1",
        "--device_batch_size=8", "--device=cpu", "--dtype=float32", "--compile=False",
        "--eval_tokens=2000", "--eval_every=0", "--sample_every=0", "--save_minutes=0.0"]
CHAT = ["--data=toy", "--tag=d1", "--device=cpu", "--dtype=float32", "--threads=1",
        "--eval_every=0"]
FINETUNE = [*CHAT, "--mixture=gsm8k:100", "--held_out=smoltalk:20", "--total_batch_size=512",
            "--device_batch_size=8", "--eval_tokens=500", "--compile=False"]
RL = [*CHAT, "--num_steps=9", "--max_new_tokens=16", "--problems_per_step=2", "--samples=4",
      "--eval_problems=4", "--eval_samples=2", "--rollout_rows=8"]
FAULT = """
import os, runpy, sys
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

def faulty(state, name, args, fault, more="", env=None):
    """Runs the script with a model whose forward(loss, rows, number of the call) is `fault`, an
    expression."""
    code = (f"{FAULT}\nfault = lambda loss, rows, call: {fault}\n{more}\n"
            f"sys.argv = {[name, *args]!r}\nrunpy.run_path({name!r}, run_name='__main__')")
    return script(state, "-c", code, timeout=120, env=env)

@pytest.fixture
def folder(prepared):
    for name in ("base_checkpoints", "mid_checkpoints", "try_out_d1"):
        shutil.rmtree(prepared / "toy" / name, ignore_errors=True)
    return prepared / "toy/base_checkpoints/d1"

# ---- trying out

def tried_out(out):
    """Asserts that --try_out=True has printed what it found."""
    found = re.search(r"trial run: first step [\d.]+ s, then [\d.]+ s a step, "
                      r"measurement [\d.]+ s; checkpoint [\d,]+ MB, written in [\d.]+ s, "
                      r"read in [\d.]+ s", out.stdout)
    assert out.returncode == 0 and found, out.stdout + out.stderr

def test_every_phase_tries_out_its_first_steps_before_there_is_a_model(prepared, folder, tmp_path):
    outcome = tmp_path / "outcome"

    def left():
        found = json.loads(outcome.read_text())
        outcome.unlink()
        return found
    env = {"NANOCHAT_OUTCOME": str(outcome)}
    out = script(prepared, "base_train.py", *BASE, "--num_steps=50", "--try_out=True", env=env)
    tried_out(out)
    facts = left()
    assert facts["code"] == 0 and facts["num_steps"] == 50 and facts["evals"] == 1
    assert facts["bytes"] > 1_000_000 and facts["keep"] == 1 and facts["seconds"] > 0
    assert "512 tokens a step (set by --total_batch_size) = 8 rows of 64 tokens = " in out.stdout
    assert "1 micro-batches of 8 on each of 1 ranks" in out.stdout and not folder.exists()
    assert not list((prepared / "toy/tokens").glob("*/train_*.json")), "random tokens will do"

    out = script(prepared, "mid_train.py", *FINETUNE, "--try_out=True", env=env)
    tried_out(out)
    steps = int(re.search(r"training: (\d+) steps of \d+ of the", out.stdout)[1])
    assert left()["num_steps"] == steps and steps > 10, "the real number of its steps"
    tried_out(script(prepared, "chat_sft.py", *FINETUNE, "--try_out=True"))
    out = script(prepared, "chat_rl.py", *RL, "--try_out=True", env=env)
    tried_out(out)
    assert left()["eval_seconds"] > 0
    out = script(prepared, "chat_eval.py", "--data=toy", "--tag=d1", "--source=mid", "--rows=8",
                 "--max_new_tokens=16", "--threads=1", "--try_out=True")
    assert out.returncode == 0 and "tried out: 8 answers at once" in out.stdout, out.stderr
    assert {p.name for p in (prepared / "toy").iterdir()} >= {"try_out_d1", "tokens"}
    assert not any((prepared / "toy" / f"{name}_checkpoints").exists()
                   for name in ("base", "mid", "chatsft", "chatrl"))

def test_it_leaves_the_run_that_is_there_alone(prepared, folder):
    assert script(prepared, "base_train.py", *BASE, "--num_steps=3").returncode == 0
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    tried_out(script(prepared, "base_train.py", *BASE, "--num_steps=7", "--try_out=True"))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before

def test_out_of_memory_says_what_to_try_to_the_launcher_too(prepared, folder, tmp_path):
    outcome = tmp_path / "outcome"
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=2", "--try_out=True"],
                 "out_of_memory(rows, 4) or loss", env={"NANOCHAT_OUTCOME": str(outcome)})
    assert out.returncode == 1 and out.stderr.count("\n") == 1
    assert "ran out of memory in base_train" in out.stderr and "--device_batch_size=4" in out.stderr
    assert json.loads(outcome.read_text())["retry_with"] == ["--device_batch_size=4"]
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=2", "--device_batch_size=4"],
                 "out_of_memory(rows, 4) or loss")
    assert out.returncode == 0 and "2 micro-batches of 4 on each of 1 ranks" in out.stdout
    assert "2 steps of 512 tokens" in out.stdout, "the batch of a step stays"

def test_one_rank_looks_once_for_files_and_record(prepared, folder, tmp_path):
    (tmp_path / "faulty.py").write_text(f"""
import os, runpy, sys
sys.path.insert(0, ".")
import corpus, records
def said(name, function):
    def wrapped(*args):
        print(name, "on rank", os.environ["RANK"], flush=True)
        return function(*args)
    return wrapped
records.find_record = said("record", records.find_record)
corpus.dataset_files = said("files", corpus.dataset_files)
sys.argv = {["base_train.py", *BASE, "--num_steps=2"]!r}
runpy.run_path("base_train.py", run_name="__main__")""")
    out = script(prepared, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                 tmp_path / "faulty.py", timeout=200)
    assert out.returncode == 0, out.stderr
    assert "on rank 1" not in out.stdout and out.stdout.count("files on rank 0") == 1, out.stdout

def test_out_of_memory_on_the_second_of_two_ranks_is_the_outcome(prepared, folder, tmp_path):
    fault = 'out_of_memory(rows, 2 if os.environ["RANK"] == "1" else 99) or loss'
    args = ["base_train.py", *BASE, "--num_steps=4"]
    (tmp_path / "faulty.py").write_text(
        f"{FAULT}\nfault = lambda loss, rows, call: {fault}\nsys.argv = {args!r}\n"
        "runpy.run_path('base_train.py', run_name='__main__')")
    outcome = tmp_path / "outcome"
    out = script(prepared, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                 tmp_path / "faulty.py", timeout=200, env={"NANOCHAT_OUTCOME": str(outcome)})
    assert out.returncode != 0 and "error: rank 1: ran out of memory in base_train" in out.stderr
    # of the 8 rows of a step each rank took 4 at once
    assert json.loads(outcome.read_text())["retry_with"] == ["--device_batch_size=2"]

def test_a_try_out_that_is_asked_to_stop_does(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=9", "--try_out=True"],
                 "os.kill(os.getpid(), signal.SIGTERM) or loss", "import signal")
    assert out.returncode == 75 and "signal SIGTERM" in out.stdout and "tried" not in out.stdout

# ---- training

def test_a_command_without_a_tag_goes_on_with_what_it_has_begun(prepared, folder):
    command = [word for word in FINETUNE if not word.startswith("--tag")]
    base = ["base_train.py", *BASE, "--num_steps=1"]
    mid = folder.parents[1] / "mid_checkpoints"
    assert script(prepared, *base, "--tag=a").returncode == 0
    out = faulty(prepared, "mid_train.py", [*command, "--save_minutes=9"],
                 "(call == 4 and os.kill(os.getpid(), signal.SIGTERM)) or loss", "import signal")
    assert out.returncode == 75 and load_record(mid / "a")["status"] == "interrupted", out.stderr
    assert load_record(mid / "a")["next"].endswith("--save_minutes=9 --tag=a")

    assert script(prepared, *base, "--tag=b").returncode == 0
    again = script(prepared, "mid_train.py", *command, "--save_minutes=9")
    assert again.returncode == 0 and load_record(mid / "a")["status"] == "done", again.stderr
    assert [path.name for path in mid.iterdir()] == ["a"]
    another = script(prepared, "mid_train.py", *command, "--save_minutes=9")
    assert another.returncode == 0 and (mid / "b").exists(), "none is half done: the newest"

def test_other_settings_are_refused_before_their_conversations_are_tokenized(prepared, folder):
    assert script(prepared, "base_train.py", *BASE, "--num_steps=1").returncode == 0
    assert script(prepared, "mid_train.py", *FINETUNE, "--max_steps=1").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    out = script(prepared, "mid_train.py", *FINETUNE, "--max_steps=1", "--mixture=gsm8k:90")
    assert out.returncode == 2 and "now ['gsm8k:90']" in out.stderr
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before

def test_out_of_memory_in_training_names_what_to_try_and_the_save_goes_on(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=6"],
                 "out_of_memory(call, 4) or loss")
    assert out.returncode == 1 and "ran out of memory in base_train" in out.stderr, out.stderr
    assert "--device_batch_size=4" in out.stderr and "Traceback" not in out.stderr
    record = load_record(folder)
    assert record["status"] == "failed" and "--device_batch_size=4" in record["reason"]
    assert checkpoint.newest(folder) >= 2
    again = script(prepared, "base_train.py", *BASE, "--num_steps=6", "--device_batch_size=4")
    assert again.returncode == 0

def test_a_terminal_ends_no_training(prepared, folder):
    lacking = "import tokenizer\ntokenizer.Tokenizer.decode = lambda self, ids: '\\u4f60\\udcff'"
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=2"], "loss", lacking,
                 env={"PYTHONIOENCODING": "latin-1:strict", "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert out.returncode == 0 and "sample: 'The\\u4f60\\udcff'" in out.stdout, out.stderr
    shutil.rmtree(folder)
    out = without_reader("base_train.py", *BASE, "--num_steps=2", env=environment(prepared))
    assert out.returncode == 0 and out.stderr == "", "printing is not worth a run"
    assert load_record(folder)["status"] == "done" and checkpoint.newest(folder) == 2

MEASURED = """
import signal, run
real_begin = run.Run.begin_loop
def begin_loop(*args):
    real_begin(*args)
    facts = dict(line.split(":") for line in open("/proc/self/status"))
    print("before", *(facts[name].split()[0] for name in ("VmRSS", "VmHWM")), flush=True)
run.Run.begin_loop = begin_loop
training.print_samples = lambda *args: None
"""

@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_resumed_run_needs_as_much_memory_as_a_fresh_one(prepared, folder):
    """A copy of the weights that was forgotten would be 46 MB, one of the optimizer 51 MB, of 380
    where the loop begins. What a step needs on top changes by 40 MB from run to run."""
    args = [*BASE, "--depth=6", "--tag=d1", "--total_batch_size=256", "--device_batch_size=4",
            "--num_steps=2", "--save_minutes=60"]
    found = []
    for fault in ("os.kill(os.getpid(), signal.SIGTERM) or loss", "loss"):
        # what is freed is given back at once, so that memory in use is what is measured
        out = faulty(prepared, "base_train.py", args, fault, MEASURED, env={
            "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"})
        assert out.returncode in (0, 75), out.stderr
        found += re.findall(r"^before (\d+) (\d+)$", out.stdout, re.MULTILINE)
    assert "continuing at step 1 of 2" in out.stdout
    (fresh, _), (resumed, peak) = found
    assert int(resumed) == pytest.approx(int(fresh), rel=0.03)
    assert int(peak) < int(fresh) + 97_000, "KB: of each at most one copy while it loads"

def finite(state):
    return all(torch.isfinite(tensor).all() for tensor in state.values() if torch.is_tensor(tensor))

def test_a_step_without_a_finite_gradient_is_skipped(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=6"],
                 "loss * math.nan if call == 4 else loss", "import math")
    assert out.returncode == 0 and "this step was skipped (1 in a row)" in out.stdout, out.stderr
    model, state, _ = checkpoint.load(folder, 6)
    assert finite(model) and all(map(finite, state.values()))
    assert {s["step"] for s in state.values()} == {5}

def test_in_float16_an_overflow_halves_the_scale_which_a_resumed_run_keeps(prepared, folder):
    """The last step overflows too: the run is done without it."""
    args = [*BASE, "--dtype=float16", "--num_steps=8"]
    at_steps = "loss * (1e30 if call in {} else 1.0)"  # finite, and its gradient is not
    out = faulty(prepared, "base_train.py", args, at_steps.format((3, 8)))
    assert out.returncode == 0, out.stdout + out.stderr
    for scale in ("32,768", "16,384"):
        assert f"skipped (1 in a row); loss scale {scale} from here on" in out.stdout
    straight = checkpoint.files(folder, 8)
    _, state, _ = checkpoint.load(folder, 8)
    assert {(s["step"], s["loss_scale"]) for s in state.values()} == {(6, 2 ** 14)}
    shutil.rmtree(folder)
    stop = "os.kill(os.getpid(), 15) if call == 5 else None"
    out = faulty(prepared, "base_train.py", args, f"({at_steps.format((3,))}, {stop})[0]")
    assert out.returncode == 75 and checkpoint.newest(folder) == 5, out.stdout + out.stderr
    out = faulty(prepared, "base_train.py", args, at_steps.format((3,)))
    assert out.returncode == 0 and "loss scale 16,384" in out.stdout, out.stdout + out.stderr
    resumed = checkpoint.files(folder, 8)
    for name in checkpoint.names(8)[:2]:
        assert resumed[name] == straight[name]

def test_where_float16_gives_no_number_float32_is_proposed(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--dtype=float16", "--num_steps=6"],
                 "loss * math.nan if call == 6 else loss", "import math")
    assert out.returncode == 1 and "or compute in float32 (--dtype=float32)" in out.stderr

def test_too_many_such_steps_end_the_phase_and_name_the_last_good_checkpoint(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=60", "--max_skipped=3"],
                 "loss * math.nan if call >= 6 else loss", "import math")
    assert out.returncode == 1 and f"in {folder}" in out.stderr, out.stderr
    assert "the last steps had no finite gradient (4 in a row)" in out.stderr
    assert "that of step 5 " in out.stderr, "the weights may be what is wrong: nothing is saved"
    assert checkpoint.newest(folder) == 5
    model, state, _ = checkpoint.load(folder, 5)
    assert finite(model) and next(iter(state.values()))["step"] == 5

def test_a_model_that_gives_no_number_in_the_end_is_not_done(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=6"],
                 "loss * math.nan if call >= 6 else loss", "import math")
    assert out.returncode == 1 and "no finite gradient (1 in a row)" in out.stderr
    assert load_record(folder)["status"] == "failed" and checkpoint.newest(folder) == 5

def test_a_loss_that_explodes_ends_the_phase_and_spares_the_good_checkpoint(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=60"],
                 "loss * 3 if call > 12 else loss", "training.EXPLODED = 8")
    assert out.returncode == 1 and "the loss has exploded" in out.stderr, out.stdout + out.stderr
    assert "not saving checkpoints until it falls" in out.stdout
    step = checkpoint.newest(folder)
    assert f"that of step {step} " in out.stderr and 1 <= step <= 12
    lines = common.read_json_lines(folder / "metrics.jsonl")
    assert max(line["step"] for line in lines) >= 18, "it must have gone on for a while"

def test_a_loss_that_jumps_for_a_few_steps_only_does_not(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=30"],
                 "loss * 3 if 10 < call < 15 else loss", "training.EXPLODED = 8")
    assert out.returncode == 0 and "far above its level" in out.stdout
    assert checkpoint.newest(folder) == 30

def test_the_same_command_again_knows_the_level_that_an_explosion_has_left(prepared, folder):
    args = [*BASE, "--num_steps=30", "--save_minutes=60"]
    stopped = faulty(prepared, "base_train.py", args, "call == 12 and run_stops() or loss",
                     "import signal\ndef run_stops(): os.kill(os.getpid(), signal.SIGTERM)")
    assert stopped.returncode == 75 and checkpoint.newest(folder) == 12, stopped.stderr
    for _ in range(2):
        out = faulty(prepared, "base_train.py", args, "loss * 3", "training.EXPLODED = 8")
        assert out.returncode == 1 and "the loss has exploded" in out.stderr, out.stdout
        assert "that of step 12 " in out.stderr and checkpoint.newest(folder) == 12

def test_a_loss_that_has_exploded_in_the_last_steps_is_not_done(prepared, folder):
    out = faulty(prepared, "base_train.py", [*BASE, "--num_steps=40"],
                 "loss * 3 if call > 26 else loss")
    assert out.returncode == 1 and "for 14 steps in a row" in out.stderr, out.stdout + out.stderr
    assert "that of step 26 " in out.stderr and checkpoint.newest(folder) == 26
    assert load_record(folder)["status"] == "failed"

POISON = """
import data
real_batch, number = data.batch, [0]
def batch(plan, seed, step, *args):
    number[0] = step
    return real_batch(plan, seed, step, *args)
data.batch = batch
training.EXPLODED = 8
"""

def test_a_run_goes_back_to_before_it_exploded_and_skips_what_made_it(prepared, folder, tmp_path):
    def train(fault="loss * 3 if 10 <= number[0] < 20 else loss", *more, kill=0):
        stop = f"call == {kill} and os.kill(os.getpid(), 9) or "
        return faulty(prepared, "base_train.py", [*BASE, "--num_steps=26", *more],
                      (stop if kill else "") + f"({fault})", POISON)

    def result():
        lines = common.read_json_lines(folder / "metrics.jsonl")
        metrics = [{k: v for k, v in line.items() if k != "clock"} for line in lines]
        step, = checkpoint.steps(folder)
        files = checkpoint.files(folder, step)
        return files["model_000026.pt"], files["optim_000026.pt"], metrics

    exploded = train()
    assert exploded.returncode == 1 and "--rewind=10 goes back to step 10" in exploded.stderr
    command = exploded.stderr.strip().rpartition("; run: ")[2]
    assert "skips the batches up to step 18;" in exploded.stderr
    assert command.startswith("python base_train.py ") and command.endswith(" --rewind=10")
    assert load_record(folder)["next"] == command
    shutil.copytree(folder, tmp_path / "exploded")

    assert train("loss * 3 if 10 <= number[0] < 18 else loss", "--rewind=10").returncode == 0
    assert load_record(folder)["skipped"] == [[10, 8]]
    expected = result()
    assert [line["step"] for line in expected[2] if line["kind"] == "train"] == [*range(26)]

    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "exploded", folder)
    killed = train("loss", "--rewind=10", kill=8)
    assert killed.returncode == -9 and "going back from step 18 to step 10" in killed.stdout
    assert 10 < checkpoint.newest(folder) < 18
    (folder / "phase.json").unlink()  # the checkpoint knows it, too
    again = train("loss", "--rewind=10")
    assert again.returncode == 0 and "going back" not in again.stdout, "not a second time"
    assert result() == expected

@pytest.mark.parametrize("name", ["base_train", "mid_train", "chat_sft", "chat_rl"])
def test_every_training_takes_the_batch_that_rewinds_have_left(name):
    text = (REPO / f"{name}.py").read_text()
    assert "number = training.batch_number(run, step)" in text
    assert "seed, number, " in text and "seed, step, " not in text

@pytest.mark.parametrize("fault,code", [("loss * math.nan", 1), ("loss * 9 ** call", 0)])
def test_a_trial_without_gradients_ends_in_a_line_and_judges_no_loss(prepared, folder, fault, code):
    args = [*BASE, "--num_steps=60", "--save_minutes=60", "--try_out=True"]
    out = faulty(prepared, "base_train.py", args, fault, "import math")
    if code:
        assert out.returncode == 1 and out.stderr.count("\n") == 1, out.stderr
        assert "the last steps had no finite gradient (4 in a row)" in out.stderr
    else:
        tried_out(out)

def test_the_batch_is_said_in_words():
    model = gpt.GPT(gpt.GPTConfig(64, 300, 1, 1, 1, 64))
    flops = 1e7 * model.flops_per_token()
    for steps, given, expected in ((-1, -1, "chosen as for 10.0M tokens of training"),
                                   (9, -1, "chosen as for 1,600.0M tokens of training"),
                                   (9, 512, "set by --total_batch_size")):
        rows, why, _, _ = training.horizon(model, steps, flops, 12.0, given)
        assert why == expected
    assert training.batch_in_words(why, rows, 64, 4, 1) == (
        "512 tokens a step (set by --total_batch_size) = 8 rows of 64 tokens = "
        "2 micro-batches of 4 on each of 1 ranks")

def test_a_run_says_once_when_validation_turned_up_resumed_or_not(tmp_path, capsys):
    measured = [4.0, 3.0, 3.01, 2.9, 2.95, 2.91, 2.95, 3.1, 3.2, 2.8, 3.0, 3.0]
    for resumed_at in (0, 3, 7, 9):
        run = alone()
        run.directory = tmp_path / str(resumed_at)
        run.directory.mkdir()
        run.metrics = open(run.directory / "metrics.jsonl", "a", 1, "utf-8")  # noqa: SIM115
        for step, value in enumerate(measured):
            if step < resumed_at:  # as an earlier attempt has left it
                run.log(kind="val", step=step, val_bpb=value)
            else:
                training.log_measured(run, step, value)
        said = capsys.readouterr().out
        assert said.count("\n") == (resumed_at <= 7), said
        if said:
            assert "best at step 3 with 2.9000 bits per byte and is 3.1000 now" in said

def test_an_easy_first_batch_sets_no_level(capsys):
    run = alone()
    run.clock = SimpleNamespace(num_steps=100)
    guard = training.LossGuard(run, SimpleNamespace(), max_skipped=10)
    for step, loss in enumerate([0.01, *[3.0] * 60]):
        guard.check_or_exit(step, loss, 1.0)
        assert not guard.in_trouble()
    guard.check_or_exit(61, 9.0, 1.0)
    assert guard.in_trouble() and "above its level of 3" in capsys.readouterr().out
