"""
Real jobs on the Slurm of start.sh, started by tests/slurm.sh: every fault is asserted to have happened (Slurm's accounting, the log), and
that the same command goes on after it to the same end.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
FOLDER = Path(os.environ.get("SLURM_TEST_FOLDER", "/tmp/speedrun-slurm"))
SECONDS = int(os.environ.get("SLURM_TEST_SECONDS", 450))  # of base and rl together in the long job, which has about 75 s for them in each of its runs
SMALL = ["--size=0.02", "--vocab_size=512", "--max_seq_len=128", "--total_batch_size=1024", "--max_items=20", "--core_items=8", "--compile=False", "--dtype=float32", "--threads=1",
         "--device=cpu", "--save_minutes=0.02", "--eval_every=0", "--sample_every=0", "--eval_tokens=4000", "--eval_problems=8", "--eval_samples=2", "--problems_per_step=2", "--samples=4", "--max_new_tokens=16"]
QUICK = [*SMALL, "--num_steps=60", "--max_steps=10"]


def run(*command, **more):
    return subprocess.run([str(c) for c in command], cwd=REPO, capture_output=True, text=True, timeout=120, **more)

def wait_for(what, condition, seconds):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, f"after {seconds} s still not: {what}"
        time.sleep(0.5)
    return found

class Job:
    """A submitted job: its number, its log, and what Slurm says of each of its runs."""
    def __init__(self, state, *words, environment=None):
        """words: sbatch's flags, the file, speedrun.sh's flags"""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_JOB", "NANOCHAT_"))} | {"NANOCHAT_BASE_DIR": str(state), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.state, self.logs = state, state.parent / "logs"
        self.logs.mkdir(exist_ok=True)
        out = run("sbatch", "--parsable", f"--output={self.logs}/%j.log", *words, env=environment)
        assert out.returncode == 0, out.stderr
        self.id = out.stdout.strip()
    def log(self):
        path = self.logs / f"{self.id}.log"
        return path.read_text() if path.exists() else ""
    def runs(self):
        """["PREEMPTED", "RUNNING"]: one word for each of its runs, "CANCELLED by 0" as CANCELLED"""
        return [line.split()[0] for line in run("sacct", "-D", "-X", "-n", "-P", "-j", self.id, "-o", "State").stdout.splitlines() if line.strip()]
    def show(self, key):
        return next(iter(re.findall(rf"\b{key}=(\S+)", run("scontrol", "show", "job", "-o", self.id).stdout)), "")
    def wait_for(self, what, condition, seconds=180):
        try:
            return wait_for(what, condition, seconds)
        except AssertionError:
            print(self.log()[-6000:])
            raise
    def ended(self, seconds=180):
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait_for("the end of the job", lambda: (s := self.show("JobState")) in over and (r := self.runs()) and r[-1] == s and s, seconds)

def step(state):
    """The newest saved step of base, -1 for none"""
    return max((int(p.stem.split("_")[1]) for p in (state / "toy/base_checkpoints/d1").glob("manifest_*.json")), default=-1)

def a_later_step(job, number=1):
    """Waits for a save of base in its run of that number"""
    job.wait_for(f"run {number}", lambda: f"run {number} of it" in job.log())
    before = step(job.state)  # no earlier run saves any more
    job.wait_for(f"a save after step {before}", lambda: step(job.state) > before)

def rank_processes(state):
    """Numbers of the processes that train with this state folder"""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes().split(b"\0"), (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(c.endswith(b"base_train.py") for c in command[:4]) and f"NANOCHAT_BASE_DIR={state}".encode() in environment and any(e.startswith(b"RANK=") for e in environment):
            found.append(int(folder.name))
    return found

def kill_node(node):
    """SIGKILL for the slurmd of a node and its step daemons; the processes of the job live on"""
    daemons = [int((FOLDER / f"run/slurmd.{node}.pid").read_text())]
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == "slurmstepd" and any(os.readlink(fd).endswith(f"slurmd.{node}.log") for fd in (comm.parent / "fd").iterdir()):
                daemons.append(int(comm.parent.name))
        except OSError:
            continue
    assert len(daemons) > 1, "no step ran there"
    for pid in daemons:
        os.kill(pid, signal.SIGKILL)

def metrics_steps(state, folder):
    return [m["step"] for m in map(json.loads, (state / f"toy/{folder}/d1/metrics.jsonl").read_text().splitlines()) if m["kind"] == "train"]


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    state = tmp_path_factory.mktemp("prepared") / "state"
    for command in (["prepare_data.py", "--data=toy", "--depth=1", "--size=0.02"], ["tok_train.py", "--data=toy", "--vocab_size=512"]):
        out = run(sys.executable, *command, env={**os.environ, "NANOCHAT_BASE_DIR": str(state)})
        assert out.returncode == 0, out.stderr
    return state


# ---------------------------------------------------------------------------------------------------------------------

def test_a_job_whose_data_is_missing_fails_in_its_first_minute(state):
    job = Job(state, "--gpus-per-node=1", "slurm_speedrun.sbatch", "--data=fineweb_edu", "--depth=4")
    assert job.ended(100) == "FAILED" and job.show("ExitCode") == "2:0"
    minutes, seconds = map(int, job.show("RunTime").split(":")[1:])
    assert minutes == 0, f"after {minutes}:{seconds:02d}"
    assert "error: " in job.log() and "prepare_data.py --data=fineweb_edu" in job.log(), job.log()
    assert "GPUs per node: 1" in job.log() and "commit: " in job.log()


def test_the_line_of_the_readme(state):
    line = next(line for line in (REPO / "README.md").read_text().splitlines() if line.startswith("    sbatch") and "--data" not in line).split()
    job = Job(state, *line[1:], "--depth=1", "--", *QUICK)
    assert job.ended(400) == "COMPLETED" and "all done" in job.log(), job.log()[-3000:]
    assert (state / "toy/report/report.md").exists()


def test_deaths_of_a_rank_of_the_batch_script_and_by_scancel(state, prepared):
    shutil.copytree(prepared, state)
    submit = lambda: Job(state, "--nodes=2", "--gpus-per-node=1", "--time=5", "slurm_speedrun.sbatch", "--depth=1", "--only=base", "--skip-trial", "--", *SMALL, "--num_steps=300")
    job = submit()
    a_later_step(job)
    killed = time.time()
    os.kill(rank_processes(state)[0], signal.SIGKILL)
    assert job.ended(120) == "FAILED" and time.time() - killed < 60 and "SIGKILL" in job.log() and "base failed" in job.log(), job.log()[-3000:]

    job = submit()
    a_later_step(job)
    batch = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if b"slurm_script" in p.read_bytes() and f"job{int(job.id):05d}".encode() in p.read_bytes()]
    os.kill(batch[0], signal.SIGKILL)
    assert job.ended(120) == "FAILED" and job.show("ExitCode") == "0:9"
    wait_for("the end of its processes", lambda: not rank_processes(state), 90)

    job = submit()
    a_later_step(job)
    assert run("scancel", job.id).returncode == 0
    assert job.ended(120) == "CANCELLED" and job.runs() == ["CANCELLED"] and "saved at step" in job.log(), job.log()[-3000:]

    job = submit()
    assert job.ended(200) == "COMPLETED" and "continuing at step" in job.log()
    assert metrics_steps(state, "base_checkpoints") == list(range(300))


def test_an_array_where_requeueing_is_not_permitted(state, prepared):
    shutil.copytree(prepared, state)
    job = Job(state, "--no-requeue", "--array=1-3%1", "--gpus-per-node=1", "--time=5", f"--output={state.parent}/logs/%a.log", "slurm_speedrun.sbatch", "--depth=1", "--only=base", "--skip-trial", "--", *SMALL, "--num_steps=300")
    log = lambda element: (job.logs / f"{element}.log").read_text() if (job.logs / f"{element}.log").exists() else ""
    job.wait_for("a save", lambda: step(state) > 0)
    run("scancel", "--batch", "--signal=USR1", f"{job.id}_1")
    states = lambda: dict(line.split("|")[:2] for line in run("sacct", "-X", "-n", "-P", "-j", job.id, "-o", "JobID,State").stdout.splitlines())
    wait_for("the end of the array", lambda: set(states().values()) <= {"FAILED", "COMPLETED"} and len(states()) == 3, 300)
    assert states() == {f"{job.id}_1": "FAILED", f"{job.id}_2": "COMPLETED", f"{job.id}_3": "COMPLETED"}
    assert "the next element of the array goes on" in log(1) and "continuing at step" in log(2) and "done already" in log(3)


def test_three_runs_in_a_row_without_progress_are_the_last(state, prepared):
    shutil.copytree(prepared, state)
    job = Job(state, "--gpus-per-node=1", "--time=5", "slurm_speedrun.sbatch", "--depth=1", "--only=base", "--skip-trial", "--", *QUICK, "--time_limit=0.0")
    job.wait_for("the guard", lambda: "3 runs in a row got nothing done" in job.log(), 400)
    assert job.ended(100) == "FAILED" and job.runs() == ["REQUEUED"] * 3 + ["FAILED"]


def steps_of(seconds, state, prepared):
    """How many steps of base and of rl take so many seconds on this machine: measured, as machines differ by ten times and the limits do not"""
    shutil.copytree(prepared, state)
    out = run("bash", "speedrun.sh", "--depth=1", "--nproc=2", "--only=base", "--skip-trial", "--", *SMALL, "--num_steps=60", env={**os.environ, "NANOCHAT_BASE_DIR": str(state), "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stdout + out.stderr
    clock = [json.loads(line)["clock"]["seconds"] for line in (state / "toy/base_checkpoints/d1/metrics.jsonl").read_text().splitlines() if '"train"' in line]
    base = sorted(clock[i + 9] - clock[i - 1] for i in range(10, 60, 10))[2] / 10
    return round(seconds / (1.3 * base))  # a step of rl takes a third of it, or less

def test_the_whole_pipeline_unattended_through_limits_preemption_requeue_and_a_lost_node(state, prepared):
    """Two nodes, a rank on each, two minutes a run."""
    steps, more_steps = steps_of(SECONDS, state.with_name("pace"), prepared), 150
    job = Job(state, "--nodes=2", "--gpus-per-node=1", "--time=2", "--signal=B:USR1@1", "slurm_speedrun.sbatch", "--depth=1", "--", *SMALL, f"--num_steps={steps}", f"--max_steps={more_steps}")
    a_later_step(job)
    assert run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--time=1", "--wrap", "sleep 1").returncode == 0
    job.wait_for("the preemption", lambda: "PREEMPTED" in job.runs())

    a_later_step(job, 2)
    assert run("scontrol", "requeue", job.id).returncode == 0
    job.wait_for("the requeue from outside", lambda: job.runs()[1:2] == ["REQUEUED"])

    a_later_step(job, 3)
    old = rank_processes(state)
    assert len(old) == 2
    kill_node("n1")  # the one that the batch script runs on
    assert rank_processes(state), "the old run is alive, and may still write"
    job.wait_for("the loss of the node", lambda: "NODE_FAIL" in job.runs(), 120)
    assert subprocess.run(["bash", "tests/slurm/start.sh"], cwd=REPO).returncode == 0
    a_later_step(job, 4)

    assert job.ended(2400) == "COMPLETED", job.log()[-5000:]
    log, runs = job.log(), job.runs()
    limits = sum("requeued: job" in part and ("deadline" in part or "signal SIGUSR1" in part) for part in re.split(r"\nstate: ", log))  # one part for each run
    print(f"{steps} steps; runs: {runs}; stopped by their limits: {limits}")
    assert limits >= 4, f"{limits} limits came in {steps} steps: this machine has become faster than it was when measured? SLURM_TEST_SECONDS={2 * SECONDS} asks for more"
    assert runs.count("REQUEUED") >= 5 and runs.count("PREEMPTED") == 1 and runs.count("NODE_FAIL") == 1 and "TIMEOUT" not in runs
    assert "it will stop at" in log and "all done" in log
    for folder, n in [("base_checkpoints", steps), ("mid_checkpoints", more_steps), ("chatsft_checkpoints", more_steps), ("chatrl_checkpoints", steps)]:
        assert metrics_steps(state, folder) == list(range(n)), f"{folder}: a step is missing or there twice"
    assert "Never ran" not in (state / "toy/report/report.md").read_text()
