"""
SIGKILL at any instant of base, mid, SFT and RL, and the same command again: the final files are bit
for bit those of a run that nobody disturbed (CPU, one rank, float32). The instants are found by
watching the files that the phase writes, so that some kills land in the middle of a save; that they
landed is asserted. SIGTERM ends with 75 and everything saved.
"""
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import common
import gpt
import optim
import pipeline
import training
from conftest import REPO, alone, environment, exit_code, script
from records import load_record

COMMON = ["--data=toy", "--dtype=float32", "--threads=1", "--device=cpu",
          "--save_minutes=0.0", "--eval_every=5", "--device_batch_size=4"]  # saves after every step
BASE = ["--depth=1", "--max_seq_len=128", "--total_batch_size=1024", "--num_steps=12",
        "--eval_tokens=4000", "--sample_every=0", "--warmup_ratio=0.5", "--compile=False"]
CHAT = ["--mixture=smoltalk:60,gsm8k:60,spellingbee:60", "--max_steps=12", "--eval_tokens=4000",
        "--compile=False"]
RL = ["--num_steps=8", "--problems_per_step=2", "--samples=4", "--max_new_tokens=12",
      "--eval_problems=4", "--eval_samples=2", "--matrix_lr=0.1"]
PHASES = {"base": ["base_train.py", *COMMON, *BASE], "mid": ["mid_train.py", *COMMON, *CHAT],
          "sft": ["chat_sft.py", *COMMON, *CHAT], "rl": ["chat_rl.py", *COMMON, *RL]}

def directory(state, name):
    return state / "toy" / pipeline.find_phase(name).state.format(tag="d1")

def weights(folder, step):
    """{name: [size, sha256]} of a checkpoint's weights and optimizer"""
    listed = checkpoint.files(folder, step)
    return {name: facts for name, facts in listed.items() if not name.startswith("meta")}

def metrics(folder):
    """All lines, but what the clock says."""
    lines = common.read_json_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "clock"} for line in lines]

def result(state, name):
    """What has to be equal: weights and optimizer of the only checkpoint, and all metrics."""
    folder = directory(state, name)
    step, = checkpoint.steps(folder)
    return weights(folder, step), metrics(folder)

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """All phases without a disturbance; the state folder."""
    state = tmp_path_factory.mktemp("straight")
    for command in (["prepare_data.py", "--data=toy", "--size=0.02"],
                    ["tok_train.py", "--data=toy", "--vocab_size=512"], *PHASES.values()):
        out = script(state, *command)
        assert out.returncode == 0, out.stdout + out.stderr
    return state

def start(state, command):
    return subprocess.Popen([sys.executable, *command], cwd=REPO, env=environment(state),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def kill_when(state, command, condition, signum=signal.SIGKILL):
    """Starts the command and sends the signal at the first moment at which condition() is true.
    -> (exit code, output)"""
    process = start(state, command)
    deadline = time.time() + 120
    while process.poll() is None and not condition():
        assert time.time() < deadline, "the instant never came"
    process.send_signal(signum)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out

@pytest.mark.parametrize("name", list(PHASES))
def test_a_killed_run_ends_bit_for_bit_as_an_undisturbed_one(straight, tmp_path, name):
    state = tmp_path / "state"
    shutil.copytree(straight, state)
    for later in list(PHASES)[list(PHASES).index(name):]:
        shutil.rmtree(directory(state, later))
    folder = directory(state, name)

    def saving():
        return any(folder.glob(".model_*.tmp*")) or any(folder.glob(".optim_*.tmp*"))

    def reached(step):
        return lambda: checkpoint.steps(folder)[:1] >= [step]

    def saving_from(step):
        return lambda: reached(step)() and saving()

    in_a_save = 0
    for instant in ((folder / "phase.json").exists, reached(2), saving_from(3), reached(5),
                    saving_from(6)):
        code, out = kill_when(state, PHASES[name], instant)
        assert code == -signal.SIGKILL, f"a kill did not land: {out}"
        in_a_save += saving()
        assert load_record(folder)["status"] == "running"
    assert in_a_save >= 1, "no kill landed in the middle of a save"
    starts = len(load_record(folder)["starts"])

    def begun_and_reached_7():  # on a busy machine step 7 may be there from the kill before
        return len(load_record(folder)["starts"]) > starts and reached(7)()
    code, out = kill_when(state, PHASES[name], begun_and_reached_7, signal.SIGTERM)
    assert code == 75 and "run the same command again" in out, out
    assert load_record(folder)["status"] == "interrupted"

    out = script(state, *PHASES[name])
    assert out.returncode == 0, out.stdout + out.stderr
    assert "continuing at step" in out.stdout and "; saving took " in out.stdout
    assert result(state, name) == result(straight, name)
    steps = [line["step"] for line in metrics(folder) if line["kind"] == "train"]
    assert steps == list(range(8 if name == "rl" else 12))
    assert not list(folder.glob(".*tmp*")), "temporary files are swept"

    again = script(state, *PHASES[name], timeout=60)
    assert again.returncode == 0 and "done already" in again.stdout

def test_a_changed_setting_or_input_refuses_and_starting_over_keeps_the_old(straight, tmp_path):
    state = tmp_path / "state"
    shutil.copytree(straight, state)
    before = result(state, "base")
    out = script(state, *PHASES["base"], "--num_steps=13")
    assert out.returncode == 2 and "num_steps was 12, now 13" in out.stderr
    assert "--start_over=True" in out.stderr and out.stderr.count("\n") == 1
    assert result(state, "base") == before
    out = script(state, *PHASES["base"], "--num_steps=2", "--start_over=True")
    assert out.returncode == 0, out.stderr
    old, = (state / "toy/base_checkpoints").glob("d1.old-*")
    assert (old / "phase.json").exists()
    out = script(state, *PHASES["mid"])  # its parent is another one now
    assert out.returncode == 2 and "another base model" in out.stderr

def test_starting_over_once_more_with_another_tokenizer_reads_all_that_is_there(state, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b"):
        (texts / f"{name}.txt").write_text(f"The {name} of all texts is short. " * 200)
    tokenizer = ["tok_train.py", f"--data={texts}"]
    base = ["base_train.py", f"--data={texts}", *COMMON[1:], *BASE, "--total_batch_size=256",
            "--num_steps=2", "--start_over=True"]
    for command in ([*tokenizer, "--vocab_size=280"], base):
        out = script(state, *command)
        assert out.returncode == 0, out.stderr
    (texts / "c.txt").write_text("And this one came later. " * 200)
    again = script(state, *base)
    assert again.returncode == 0 and "done already" in again.stdout, "it takes effect once"
    out = script(state, *tokenizer, "--vocab_size=270", "--start_over=True")
    assert out.returncode == 0, out.stderr
    out = script(state, *base)
    assert out.returncode == 0, out.stderr
    folder = pipeline.state_path("base", str(texts), "d1")
    assert {*load_record(folder)["texts"]} == {"a.txt", "b.txt", "c.txt"}
    assert len(list(folder.parent.glob("d1.old-*"))) == 1

def test_a_damaged_checkpoint_is_passed_over_and_a_second_run_is_refused(straight, tmp_path):
    state = tmp_path / "state"
    shutil.copytree(straight, state)
    folder = directory(state, "base")
    shutil.rmtree(folder)
    command = [*PHASES["base"], "--keep=3"]
    kill_when(state, command, (folder / checkpoint.manifest_name(6)).exists)
    newest = max(folder.glob("model_*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)

    process = start(state, command)
    said = ""
    while process.poll() is None and "the last attempt (" not in said:
        said += process.stdout.readline()
    second = script(state, *command)
    assert second.returncode == 2 and f"process {process.pid}" in second.stderr, second.stderr
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "does not match its checksum" in said, said + out
    assert weights(folder, 12) == weights(directory(straight, "base"), 12)

@pytest.mark.parametrize("name", ["base", "sft"])
def test_the_rows_that_a_device_holds_at_once_change_nothing(straight, tmp_path, name):
    state = tmp_path / "state"
    shutil.copytree(straight, state)
    shutil.rmtree(directory(state, name))
    out = script(state, *PHASES[name], "--device_batch_size=1")
    assert out.returncode == 0, out.stdout + out.stderr
    before, now = metrics(directory(straight, name)), metrics(directory(state, name))
    for key in ("loss", "val_bpb"):
        expected = [line[key] for line in before if key in line]
        assert [line[key] for line in now if key in line] == pytest.approx(expected, rel=1e-4)

@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_resumed_run_holds_no_file_of_the_checkpoint_open(tmp_path, capsys):
    """A file that is mapped into memory keeps its room on the disk after it is removed."""
    def made(seed):
        model = gpt.GPT(gpt.GPTConfig(16, 64, 1, 1, 1, 16))
        model.init_weights(seed)
        rates = {"matrix_lr": 0.02, "embedding_lr": 0.2, "unembedding_lr": 0.004, "scalar_lr": 0.5}
        return model, optim.make_optimizer(model, rates, 1.0, 0.0, torch.float32)

    run = alone()
    run.directory = tmp_path
    model, optimizer = made(0)
    assert training.resume(run, model, optimizer) == (0, 0.0)
    meta = {"num_steps": 9, "seconds": 1.5}
    checkpoint.save(tmp_path, 7, model.state_dict(), optimizer.state_dict(), meta)
    run.saved_step = 7  # as open_or_exit has found it
    again, its_optimizer = made(1)
    assert training.resume(run, again, its_optimizer) == (7, 1.5)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()

    states = optimizer.state_dict()
    states.pop(next(iter(states)))
    for strange in ({}, states):  # of a version with other parameters
        checkpoint.save(tmp_path, 7, model.state_dict(), strange, meta)
        assert exit_code(training.resume, run, *made(1)) == 2
        said = capsys.readouterr().err
        assert "optimizer's state of step 7" in said and said.count("\n") == 1
