"""The same run on 1, 2 and 4 ranks, changed in between too; a rank that is killed."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint
import common
import data as dataset
from conftest import REPO, ends, environment, script, wait_for
from records import load_record

BASE = ["base_train.py", "--data=toy", "--depth=1", "--max_seq_len=64", "--total_batch_size=512",
        "--device_batch_size=8", "--device=cpu", "--dtype=float32", "--threads=1",
        "--compile=False", "--eval_tokens=2000", "--eval_every=0", "--sample_every=0",
        "--num_steps=50"]

def torchrun(state, ranks, *args, restarts=0, **env):
    """The process of torchrun (of Python, for one rank); its output goes to a file, see said()."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                f"--max_restarts={restarts}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), *map(str, args)]
    with open(f"{state}.log", "w") as f:
        return subprocess.Popen(command, cwd=REPO, stdout=f, stderr=subprocess.STDOUT,
                                env={**environment(state), "OMP_NUM_THREADS": "1", **env})

def said(state):
    return Path(f"{state}.log").read_text()

def losses(folder):
    lines = common.read_json_lines(folder / "metrics.jsonl")
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(50)), "each step once"
    return [line["loss"] for line in trained]

def worker(process, rank):
    """The process id of a rank of torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    of_rank = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return next(int(pid) for pid, words in of_rank.items() if f"RANK={rank}".encode() in words)

def test_a_batch_that_cannot_be_dealt_says_what_would_fit(capsys):
    with ends() as stopped:
        dataset.fit_micro_rows(8, 4, 3)
    says = capsys.readouterr().err
    assert stopped.code == 2 and "8 rows cannot be divided by 3 ranks" in says
    assert "2 or 1 ranks" in says
    with ends() as stopped:
        dataset.check_shared(-1, 6)  # a batch that is still to be derived
    assert stopped.code == 2 and "use 4 or 2 or 1 ranks in all" in capsys.readouterr().err
    dataset.check_shared(-1, 8)

def test_ranks_that_cannot_share_a_batch_cost_no_run_and_one_that_is_done_is_done(prepared):
    command = [*BASE[:-1], "--num_steps=2", "--tag=shared"]
    assert torchrun(prepared, 1, *command).wait(100) == 0, said(prepared)[-3000:]
    assert torchrun(prepared, 3, *command, "--start_over=True").wait(100) != 0
    assert "a batch of 8 rows cannot be divided by 3 ranks" in said(prepared)
    assert not list((prepared / "toy/base_checkpoints").glob("shared.old-*"))
    assert torchrun(prepared, 3, *command).wait(100) == 0 and "done already" in said(prepared)

def test_1_2_and_4_ranks_and_a_run_that_changes_between_them(prepared):
    runs = prepared / "toy/base_checkpoints"
    for ranks in (1, 2, 4):
        process = torchrun(prepared, ranks, *BASE, f"--tag=on{ranks}")
        assert process.wait(200) == 0, said(prepared)[-3000:]
    one = losses(runs / "on1")
    assert losses(runs / "on2") == pytest.approx(one, rel=0, abs=1e-4)
    assert losses(runs / "on4") == pytest.approx(one, rel=0, abs=1e-4)
    assert one[-1] < one[0] - 0.5, "it has learned something, so the comparison means something"

    folder, changed = runs / "moved", [0]

    def moved_on():
        return checkpoint.steps(folder)[:1] > [changed[-1] + 3]

    for ranks in (1, 2, 4):
        process = torchrun(prepared, ranks, *BASE, "--tag=moved", "--save_minutes=0.0")
        wait_for(moved_on, process)
        asked = process.pid if ranks == 1 else worker(process, ranks - 1)
        os.kill(asked, signal.SIGTERM)  # one rank is asked, all stop
        assert process.wait(100) == (75 if ranks == 1 else 0)
        record = load_record(folder)
        assert record["status"] == "interrupted" and record["code"] == 75
        changed.append(checkpoint.newest(folder))
    assert 0 < changed[1] < changed[2] < changed[3] < 50, changed
    assert torchrun(prepared, 1, *BASE, "--tag=moved").wait(100) == 0
    assert losses(folder) == pytest.approx(one, rel=0, abs=1e-3)

def test_a_killed_rank_ends_the_job_and_the_same_command_continues(prepared):
    folder = prepared / "toy/base_checkpoints/d1"

    def killed(rank, after, **more):
        process = torchrun(prepared, 2, *BASE, "--save_minutes=0.0", **more)
        wait_for(lambda: checkpoint.steps(folder)[:1] > [after], process)
        os.kill(worker(process, rank), signal.SIGKILL)
        return process

    assert killed(1, 4).wait(60) != 0, "it does not hang"
    record = load_record(folder)
    assert record["status"] == "failed" and "another rank died" in record["reason"], record
    first = checkpoint.newest(folder)
    assert 4 < first < 50

    assert killed(0, first + 4).wait(60) != 0  # rank 0 keeps the record: nobody is left to say why
    assert f"continuing at step {first} of 50" in said(prepared)
    assert "died without a word" in script(prepared, "status.py", "--data=toy").stdout
    second = checkpoint.newest(folder)
    assert first + 4 < second < 50

    # torchrun starts them again
    assert killed(1, second + 4, restarts=1).wait(150) == 0, said(prepared)[-3000:]
    assert said(prepared).count("continuing at step") == 2
    losses(folder)

def test_a_signal_to_one_rank_stops_all_and_is_what_the_record_names(prepared):
    folder = prepared / "toy/base_checkpoints/one_asked"
    process = torchrun(prepared, 2, *BASE[:-1], "--num_steps=100000", "--tag=one_asked")
    wait_for(lambda: common.read_json_lines(folder / "metrics.jsonl"), process, 100)
    os.kill(worker(process, 1), signal.SIGTERM)
    process.wait(100)
    record = load_record(folder)
    assert record["status"] == "interrupted" and record["code"] == 75, said(prepared)[-3000:]
    assert record["reason"].startswith("signal SIGTERM: saved at step"), record["reason"]

def test_ctrl_c_saves_and_what_is_refused_then_ends_in_order(prepared, tmp_path):
    folder = prepared / "toy/base_checkpoints/broken"
    command = [*BASE, "--tag=broken", "--save_minutes=0.0"]
    process = torchrun(prepared, 2, *command)
    wait_for(lambda: checkpoint.steps(folder)[:1] > [3], process)
    process.send_signal(signal.SIGINT)  # the workers are in sessions of their own
    process.wait(100)
    record = load_record(folder)
    assert record["status"] == "interrupted", said(prepared)[-3000:]
    assert f"signal SIGINT: saved at step {checkpoint.newest(folder)} of 50" in record["reason"]

    for _ in range(2):  # gloo's threads abort a process only now and then
        assert torchrun(prepared, 2, *command, "--seed=5").wait(100) == 1
        assert "seed was 1337, now 5" in said(prepared) and "SIGABRT" not in said(prepared)
        assert said(prepared).count("exitcode  : 2") == 2, said(prepared)[-3000:]
    outcome = tmp_path / "outcome"
    refused = torchrun(prepared, 2, *command, "--seed=5", NANOCHAT_OUTCOME=str(outcome))
    assert refused.wait(100) == 0 and common.read_json(outcome)["code"] == 2
    assert "Traceback" not in said(prepared), "the launcher knows, so torchrun need not explain"

ABORTS = f"""
import atexit, os, sys
sys.path.insert(0, {str(REPO)!r})
from run import Run
run = Run.start("test")
run.ranks.join()
atexit.register(os.abort)
print("joined")
if sys.argv[1] == "0":
    run.leave(0, "done")
import common
common.fail("stopped", 75)
"""

@pytest.mark.parametrize("code", [0, 75])
def test_what_aborts_the_end_of_the_interpreter_is_no_failure_of_a_rank(tmp_path, code):
    """As gloo's threads do it now and then."""
    (tmp_path / "aborts.py").write_text(ABORTS)
    process = torchrun(tmp_path, 2, tmp_path / "aborts.py", code)
    assert process.wait(100) == 0, said(tmp_path)[-3000:]
    assert said(tmp_path).count("joined") == 2, "what was printed is not lost"

REFUSES = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
from run import Run
run = Run.start("test")
run.ranks.join()
import common
if sys.argv[1] == "alone" and run.ranks.rank == 1:
    common.fail("what it sees is not there")
if sys.argv[1] == "all":
    run.ranks.on_rank0(common.fail, "not there")
run.ranks.gather(1)
run.leave(75, "stopped")
"""

@pytest.mark.parametrize("what,written,exit_code,outcome_code", [
    ("alone", True, 1, 2), ("all", False, 1, None),
    ("stop", True, 0, 75), ("stop", False, 1, None)])
def test_the_launcher_knows_why_or_the_exit_code_says_that_something_is_wrong(
        tmp_path, what, written, exit_code, outcome_code):
    (tmp_path / "refuses.py").write_text(REFUSES)
    outcome = tmp_path / ("outcome" if written else "no folder/outcome")
    process = torchrun(tmp_path, 2, tmp_path / "refuses.py", what, NANOCHAT_OUTCOME=str(outcome))
    assert process.wait(100) == exit_code, said(tmp_path)[-3000:]
    assert common.read_json(outcome).get("code") == outcome_code
    if what == "alone":
        assert "error: rank 1: what it sees is not there" in said(tmp_path)

LATE = f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPO)!r})
import common
from ranks import Ranks

ranks = Ranks(*common.rank_world())
attempt, first = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), sys.argv[1]
if attempt == 1 and ranks.rank == 1:
    open(first, "w").close()
if attempt == 1 and ranks.rank == 0:
    while not os.path.exists(first):
        time.sleep(0.01)
    time.sleep(2)  # rank 1 looks first: what it could find is what the first attempt left
ranks.join()
if attempt == 0 and ranks.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
met = ranks.gather(ranks.rank)
sys.stdout.write("attempt %d: ranks %s\\n" % (attempt, met))  # one write: both go to one file
ranks.leave()
"""

def test_workers_that_torchrun_starts_again_do_not_meet_the_addresses_of_the_dead(tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    process = torchrun(tmp_path, 2, tmp_path / "late.py", tmp_path / "first", restarts=1)
    assert process.wait(100) == 0, said(tmp_path)[-3000:]
    assert said(tmp_path).count("attempt 1: ranks [0, 1]") == 2, said(tmp_path)
