"""The same run on 1, 2 and 4 ranks, changed in between too; a rank that is killed."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint
import common
import data as dataset
from conftest import REPO, ends, environment, script, wait_for

BASE = ["base_train.py", "--data=toy", "--depth=1", "--max_seq_len=64", "--total_batch_size=512", "--device_batch_size=8", "--device=cpu", "--dtype=float32", "--threads=1",
        "--compile=False", "--eval_tokens=2000", "--eval_every=0", "--sample_every=0", "--num_steps=50"]


def torchrun(state, ranks, *args, restarts=0):
    """The process of torchrun (of Python, for one rank); its output goes to a file beside the state: .log"""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", f"--max_restarts={restarts}"] if ranks > 1 else []
    with open(f"{state}.log", "w") as f:
        return subprocess.Popen([sys.executable, *launcher, *args], cwd=REPO, stdout=f, stderr=subprocess.STDOUT,
                                env={**environment(state), "OMP_NUM_THREADS": "1"})


def losses(folder):
    lines = common.read_json_lines(folder / "metrics.jsonl")
    assert [m["step"] for m in lines if m["kind"] == "train"] == list(range(50)), "each step once"
    return [m["loss"] for m in lines if m["kind"] == "train"]


def worker(process, rank):
    """The process id of a rank of torchrun."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes().replace(b"LOCAL_RANK", b"L").replace(b"GROUP_RANK", b"G").replace(b"ROLE_RANK", b"R"):
            return int(pid)


def test_a_batch_that_cannot_be_dealt_says_what_would_fit(capsys):
    with ends() as stopped:
        dataset.fit_micro_rows(8, 4, 3)
    said = capsys.readouterr().err
    assert stopped.code == 2 and "8 rows cannot be dealt to 3 ranks" in said and "2 or 1 ranks" in said


def test_1_2_and_4_ranks_and_a_run_that_changes_between_them(prepared):
    folder = lambda tag: prepared / "toy/base_checkpoints" / tag
    for ranks in (1, 2, 4):
        process = torchrun(prepared, ranks, *BASE, f"--tag=on{ranks}")
        assert process.wait(200) == 0, Path(f"{prepared}.log").read_text()[-3000:]
    one, two, four = (losses(folder(f"on{ranks}")) for ranks in (1, 2, 4))
    assert max(abs(a - b) for a, b in zip(one, two)) < 1e-4 and max(abs(a - b) for a, b in zip(one, four)) < 1e-4
    assert one[-1] < one[0] - 0.5, "it must have learned something for the comparison to mean anything"

    changed = [0]
    for ranks in (1, 2, 4):
        process = torchrun(prepared, ranks, *BASE, "--tag=moved", "--save_minutes=0.0")
        wait_for(lambda: checkpoint.steps(folder("moved"))[:1] > [changed[-1] + 3], process)
        os.kill(process.pid if ranks == 1 else worker(process, ranks - 1), signal.SIGTERM)  # one rank is asked, all stop
        assert process.wait(100) == (75 if ranks == 1 else 0)
        record = json.loads((folder("moved") / "phase.json").read_text())
        assert record["status"] == "interrupted" and record["code"] == 75
        changed.append(checkpoint.newest(folder("moved")))
    assert 0 < changed[1] < changed[2] < changed[3] < 50, changed
    assert torchrun(prepared, 1, *BASE, "--tag=moved").wait(100) == 0
    moved = losses(folder("moved"))
    assert abs(moved[-1] - one[-1]) < 1e-3 and max(abs(a - b) for a, b in zip(one, moved)) < 1e-3


def test_a_killed_rank_ends_the_job_and_the_same_command_continues(prepared):
    folder = prepared / "toy/base_checkpoints/d1"
    def killed(rank, after, **more):
        process = torchrun(prepared, 2, *BASE, "--save_minutes=0.0", **more)
        wait_for(lambda: checkpoint.steps(folder)[:1] > [after], process)
        os.kill(worker(process, rank), signal.SIGKILL)
        return process
    assert killed(1, 4).wait(60) != 0, "it does not hang"
    record = json.loads((folder / "phase.json").read_text())
    assert record["status"] == "failed" and "another rank died" in record["reason"], record
    first = checkpoint.newest(folder)
    assert 4 < first < 50

    assert killed(0, first + 4).wait(60) != 0  # rank 0 keeps the record: nobody is left to write why
    assert f"continuing at step {first} of 50" in Path(f"{prepared}.log").read_text()
    assert "died without a word" in script(prepared, "status.py", "--data=toy").stdout
    second = checkpoint.newest(folder)
    assert first + 4 < second < 50

    assert killed(1, second + 4, restarts=1).wait(150) == 0, Path(f"{prepared}.log").read_text()[-3000:]  # torchrun starts them again
    assert Path(f"{prepared}.log").read_text().count("continuing at step") == 2
    losses(folder)


def test_workers_that_torchrun_starts_again_do_not_meet_the_addresses_of_the_dead(tmp_path):
    (tmp_path / "late.py").write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPO)!r})
import common
life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if life == 1 and rank == 1:
    open("{tmp_path}/first", "w").close()
while life == 1 and rank == 0 and not os.path.exists("{tmp_path}/first"):
    time.sleep(0.01)
if life == 1 and rank == 0:
    time.sleep(2)  # rank 1 looks first: what it finds is what the first life left
common.init_distributed()
if life == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdout.write("life %d ranks %s\\n" % (life, common.gather(rank)))  # one write: two ranks write into one file
common.leave()
""")
    process = torchrun(tmp_path, 2, str(tmp_path / "late.py"), restarts=1)
    said = lambda: Path(f"{tmp_path}.log").read_text()
    assert process.wait(100) == 0, said()[-3000:]
    assert said().count("life 1 ranks [0, 1]") == 2, said()
