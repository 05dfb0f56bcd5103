"""
Real jobs on the Slurm of start.sh, started by tests/slurm.sh: every fault is asserted to have
happened (Slurm's accounting, the log), and that the same command goes on after it to the same end.
"""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
FOLDER = Path(os.environ.get("SLURM_TEST_FOLDER", "/tmp/speedrun-slurm"))
# of base and rl together in the long job, which has about 75 s for them in each of its attempts
SECONDS = int(os.environ.get("SLURM_TEST_SECONDS", "450"))
SMALL = ["--size=0.02", "--vocab_size=512", "--max_seq_len=128", "--total_batch_size=1024",
         "--max_items=20", "--core_items=8", "--compile=False", "--dtype=float32", "--threads=1",
         "--device=cpu", "--save_minutes=0.02", "--eval_every=0", "--sample_every=0",
         "--eval_tokens=4000", "--eval_problems=8", "--eval_samples=2", "--problems_per_step=2",
         "--samples=4", "--max_new_tokens=16"]
QUICK = [*SMALL, "--num_steps=60", "--max_steps=10"]
BASE = ["--depth=1", "--only=base", "--skip-trial", "--", *SMALL, "--num_steps=300"]

def run(*command, **more):
    return subprocess.run([str(c) for c in command], **{"cwd": REPO, **more}, capture_output=True,
                          text=True, timeout=120, check=False)

def wait_for(what, condition, seconds):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, f"after {seconds} s still not: {what}"
        time.sleep(0.5)
    return found

class Job:
    """A submitted job: its number, its log, and what Slurm says of each of its attempts."""
    def __init__(self, state, *words, folder=REPO, log=True):
        """words: sbatch's flags, the file, speedrun.sh's flags; log=False: it goes where the file
        says"""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_JOB", "NANOCHAT_"))}
        own = {"NANOCHAT_BASE_DIR": str(state), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.state, self.logs = state, state.parent / "logs"
        self.logs.mkdir(exist_ok=True)
        output = [f"--output={self.logs}/%j.log"] if log else []
        out = run("sbatch", "--parsable", *output, *words, env=kept | own, cwd=folder)
        assert out.returncode == 0, out.stderr
        self.id = out.stdout.strip()

    def log(self, name=None):
        path = self.logs / f"{name or self.id}.log"
        return path.read_text() if path.exists() else ""

    def attempts(self):
        """["PREEMPTED", "RUNNING"]: one word for each, "CANCELLED by 0" as CANCELLED"""
        said = run("sacct", "-D", "-X", "-n", "-P", "-j", self.id, "-o", "State").stdout
        return [line.split()[0] for line in said.splitlines() if line.strip()]

    def show(self, key):
        said = run("scontrol", "show", "job", "-o", self.id).stdout
        return next(iter(re.findall(rf"\b{key}=(\S+)", said)), "")

    def wait_for(self, what, condition, seconds=180):
        try:
            return wait_for(what, condition, seconds)
        except AssertionError:
            print(self.log()[-6000:])
            raise

    def end(self):
        """Its last state, once Slurm's accounting knows it, too; "" before."""
        state = self.show("JobState")
        over = state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return state if over and self.attempts()[-1:] == [state] else ""

    def ended(self, seconds=180):
        return self.wait_for("the end of the job", self.end, seconds)

def step(state):
    """The newest saved step of base, -1 for none"""
    saved = (state / "toy/base_checkpoints/d1").glob("manifest_*.json")
    return max((int(p.stem.split("_")[1]) for p in saved), default=-1)

def a_later_step(job, number=1):
    """Waits for a save of base in its attempt of that number"""
    job.wait_for(f"attempt {number}", lambda: f"attempt {number} of it" in job.log())
    before = step(job.state)  # no earlier attempt saves any more
    job.wait_for(f"a save after step {before}", lambda: step(job.state) > before)

def processes(script, *environment):
    """Numbers of the processes of a script that have these words in their environment"""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            theirs = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = any(word.endswith(script.encode()) for word in command[:4])
        if ours and {word.encode() for word in environment} <= {*theirs}:
            found.append((int(folder.name), theirs))
    return found

def rank_processes(state):
    """Numbers of the processes that train with this state folder"""
    found = processes("base_train.py", f"NANOCHAT_BASE_DIR={state}")
    return [pid for pid, words in found if any(word.startswith(b"RANK=") for word in words)]

def batch_process(job):
    """The number of the launcher, which has taken the place of the batch script"""
    (pid, _), = processes("launch.py", f"SLURM_JOB_ID={job.id}")
    return pid

def kill_node(node):
    """SIGKILL for the slurmd of a node and its step daemons; the processes of the job live on"""
    daemons = [int((FOLDER / f"run/slurmd.{node}.pid").read_text())]
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            files = [os.readlink(fd) for fd in (comm.parent / "fd").iterdir()]
            theirs = any(name.endswith(f"slurmd.{node}.log") for name in files)
            if comm.read_text().strip() == "slurmstepd" and theirs:
                daemons.append(int(comm.parent.name))
        except OSError:
            continue
    assert len(daemons) > 1, "no step ran there"
    for pid in daemons:
        os.kill(pid, signal.SIGKILL)

def trained(state, folder):
    """The lines of metrics.jsonl of the training steps."""
    lines = (state / f"toy/{folder}/d1/metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]

def steps(state, folder):
    return [line["step"] for line in trained(state, folder)]

@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    state = tmp_path_factory.mktemp("prepared") / "state"
    for command in (["prepare_data.py", "--data=toy", "--depth=1", "--size=0.02"],
                    ["tok_train.py", "--data=toy", "--vocab_size=512"]):
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(state)}
        out = run(sys.executable, *command, env=environment)
        assert out.returncode == 0, out.stderr
    return state

# -------------------------------------------------------------------------------------------------

def test_a_job_whose_data_is_missing_fails_in_its_first_minute(state):
    job = Job(state, "--gpus-per-node=1", "slurm_speedrun.sbatch", "--data=fineweb_edu",
              "--depth=4")
    assert job.ended(100) == "FAILED" and job.show("ExitCode") == "2:0"
    minutes, seconds = map(int, job.show("RunTime").split(":")[1:])
    assert minutes == 0, f"after {minutes}:{seconds:02d}"
    log = job.log()
    assert "error: " in log and "prepare_data.py --data=fineweb_edu" in log, log
    assert "GPUs per node: 1" in log and "commit: " in log, log

def test_habits_of_other_sites(state, prepared):
    """From another folder, without one for logs; two tasks a node; nothing of the environment but
    what is named; with what a site may ask for; in a container that knows no Slurm. It goes on
    without requeueing, as its successor."""
    shutil.copytree(prepared, state)
    elsewhere = state.parent / "else where"
    elsewhere.mkdir()
    container = state.parent / "container.sh"
    container.write_text(
        f'mount --bind /bin/false "$(command -v scontrol)"\nPATH={REPO}/.venv/bin:$PATH\n'
        f'echo "$@" >> {container}.log\nexec "$@"\n')
    given = ["--gpus-per-node=1", "--cpus-per-task=2", "--exclude=n2", "--job-name=my run",
             "--nice=7", "--comment=for the thesis", "--mail-type=NONE", "--time=00:07:00"]
    environment = (f"NANOCHAT_BASE_DIR={state},GLOO_SOCKET_IFNAME=lo,OMP_NUM_THREADS=1,"
                   f"NANOCHAT_CONTAINER=unshare --mount bash {container}")
    given.append(f"--export={environment}")
    job = Job(state, "--ntasks-per-node=2", "--no-requeue", *given,
              REPO / "slurm_speedrun.sbatch", *BASE, "--time_limit=0", folder=elsewhere, log=False)
    assert job.ended(120) == "FAILED"
    log = (elsewhere / f"speedrun-{job.id}.log").read_text()
    found = re.search(r"job (\d+) is submitted and goes on when this one has ended", log)
    assert found and log.count("=== base:") == 1 and "saved at step" in log, log
    assert " base_train.py --data=toy" in Path(f"{container}.log").read_text()
    successor = run("scontrol", "show", "job", "-o", found[1]).stdout
    for fact in ("JobName=my run", "ExcNodeList=n2", "CPUs/Task=2", "TresPerNode=gres:gpu:1",
                 "TimeLimit=00:07:00", "Requeue=0", f"StdOut={elsewhere}/speedrun-{found[1]}.log"):
        assert fact in successor, successor
    assert run("scancel", found[1]).returncode == 0

    out = run("bash", "speedrun.sh", "--status", "--data=toy",
              env={**os.environ, "NANOCHAT_BASE_DIR": str(state)}).stdout
    assert "why: its time was over" in out and "| deadline: " in out, out
    words = shlex.split(out.strip().rsplit("next: ", 1)[1])
    assert {*given} - {"--mail-type=NONE"} <= {*words}, "the command to go on with, whole"
    assert not any(word.startswith("--output") for word in words), "the log is where it was"
    there = words.index(str(REPO / "slurm_speedrun.sbatch"))
    asked = run("sbatch", "--test-only", *words[1:there + 1])
    assert asked.returncode == 0, asked.stderr

def test_what_cannot_work_says_so_in_its_first_minute(state, prepared):
    shutil.copytree(prepared, state)
    for flags, said in [
        (["--gpus-per-node=4"], "4 processes a node need as many CPUs at least"),
        (["--gres=gpu:1", "--cpus-per-task=8"], "GPUs were asked for twice"),
    ]:
        job = Job(state, *flags, "slurm_speedrun.sbatch", *BASE)
        assert job.ended(100) == "FAILED" and job.show("ExitCode") == "2:0", job.log()
        assert said in job.log() and "=== base" not in job.log(), job.log()

def test_a_rehearsal(state):
    job = Job(state, "--nodes=2", "--gpus-per-node=1", "--time=10", "slurm_speedrun.sbatch",
              "--rehearse")
    assert job.ended(300) == "COMPLETED", job.log()
    assert job.attempts() == ["REQUEUED", "COMPLETED"]
    log = job.log()
    assert log.endswith("your site: works\n") and "MISSING" not in log, log
    for part in ("a time limit: saved", "SIGKILL after step", "equal, bit for bit",
                 "the job's end is known", "the job has gone on by itself"):
        assert part in log, log
    assert not list(state.glob("rehearsal-*"))

def test_the_line_of_the_readme(state):
    lines = (REPO / "README.md").read_text().splitlines()
    line = next(s for s in lines if s.startswith("    sbatch") and "--data" not in s)
    job = Job(state, *line.split()[1:], "--depth=1", "--", *QUICK)
    assert job.ended(400) == "COMPLETED" and "all done" in job.log(), job.log()[-3000:]
    assert (state / "toy/report/report.md").exists()

def why(state):
    """What status.py says of the death of a training."""
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(state)}
    out = run("bash", "speedrun.sh", "--status", "--data=toy", "--json=True", env=environment)
    causes = [phase["cause"] for found in json.loads(out.stdout)["sets"] for one in found["runs"]
              for phase in one["phases"] if phase["cause"]]
    return causes[0]["sentence"] if causes else out.stdout

def test_deaths_of_a_rank_of_the_batch_script_and_by_scancel(state, prepared):
    shutil.copytree(prepared, state)

    def submit():
        return Job(state, "--nodes=2", "--gpus-per-node=1", "--time=5", "slurm_speedrun.sbatch",
                   *BASE)
    job = submit()
    a_later_step(job)
    killed = time.time()
    os.kill(rank_processes(state)[0], signal.SIGKILL)
    assert job.ended(120) == "FAILED" and time.time() - killed < 60, job.log()[-3000:]
    assert "SIGKILL" in job.log() and "base failed" in job.log(), job.log()[-3000:]
    assert why(state) == "another of its processes died first"

    job = submit()
    a_later_step(job)
    os.kill(batch_process(job), signal.SIGKILL)
    assert job.ended(120) == "FAILED" and job.show("ExitCode") == "0:9"
    wait_for("the end of its processes", lambda: not rank_processes(state), 90)
    assert why(state).startswith("it was killed at once (SIGKILL)")

    job = submit()
    a_later_step(job)
    assert run("scancel", job.id).returncode == 0
    assert job.ended(120) == "CANCELLED" and job.attempts() == ["CANCELLED"]
    assert "saved at step" in job.log(), job.log()[-3000:]
    assert why(state) == "somebody has cancelled the job"

    job = submit()
    assert job.ended(200) == "COMPLETED" and "continuing at step" in job.log()
    assert steps(state, "base_checkpoints") == list(range(300))

def test_an_array_where_requeueing_is_not_permitted(state, prepared):
    shutil.copytree(prepared, state)
    job = Job(state, "--no-requeue", "--array=1-3%1", "--gpus-per-node=1", "--time=5",
              f"--output={state.parent}/logs/%a.log", "slurm_speedrun.sbatch", *BASE)
    job.wait_for("a save", lambda: step(state) > 0)
    run("scancel", "--batch", "--signal=USR1", f"{job.id}_1")

    def states():
        said = run("sacct", "-X", "-n", "-P", "-j", job.id, "-o", "JobID,State").stdout
        return dict(line.split("|")[:2] for line in said.splitlines())

    def over():
        return len(states()) == 3 and {*states().values()} <= {"FAILED", "COMPLETED"}
    wait_for("the end of the array", over, 300)
    assert states() == {f"{job.id}_1": "FAILED", f"{job.id}_2": "COMPLETED",
                        f"{job.id}_3": "COMPLETED"}
    assert "element 2 of the array goes on" in job.log(1)
    assert "continuing at step" in job.log(2) and "done already" in job.log(3)

def test_three_attempts_in_a_row_without_progress_are_the_last(state, prepared):
    shutil.copytree(prepared, state)
    job = Job(state, "--gpus-per-node=1", "--time=5", "slurm_speedrun.sbatch", *BASE,
              "--time_limit=0.0")
    said = "3 attempts in a row got nothing done"
    job.wait_for("the guard", lambda: said in job.log(), 400)
    assert job.ended(100) == "FAILED" and job.attempts() == ["REQUEUED"] * 3 + ["FAILED"]

def steps_of(seconds, state, prepared):
    """How many steps of base and of rl take so many seconds on this machine: measured, as machines
    differ by ten times and the limits do not"""
    shutil.copytree(prepared, state)
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(state), "OMP_NUM_THREADS": "1"}
    out = run("bash", "speedrun.sh", "--nproc=2", *BASE, "--num_steps=60", env=environment)
    assert out.returncode == 0, out.stdout + out.stderr
    clock = [line["clock"]["seconds"] for line in trained(state, "base_checkpoints")]
    base = sorted(clock[i + 9] - clock[i - 1] for i in range(10, 60, 10))[2] / 10
    return round(seconds / (1.3 * base))  # a step of rl takes a third of it, or less

def test_the_whole_pipeline_unattended_through_limits_preemption_requeue_and_a_lost_node(
        state, prepared):
    """Two nodes, a rank on each, two minutes an attempt."""
    many, few = steps_of(SECONDS, state.with_name("pace"), prepared), 150
    job = Job(state, "--nodes=2", "--gpus-per-node=1", "--time=2", "--signal=B:USR1@1",
              "slurm_speedrun.sbatch", "--depth=1", "--", *SMALL, f"--num_steps={many}",
              f"--max_steps={few}")
    a_later_step(job)
    urgent = run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
                 "--time=1", "--wrap", "sleep 1")
    assert urgent.returncode == 0
    job.wait_for("the preemption", lambda: "PREEMPTED" in job.attempts())

    a_later_step(job, 2)
    assert run("scontrol", "requeue", job.id).returncode == 0
    job.wait_for("the requeue from outside", lambda: job.attempts()[1:2] == ["REQUEUED"])

    a_later_step(job, 3)
    assert len(rank_processes(state)) == 2
    kill_node("n1")  # the one that the launcher runs on
    assert rank_processes(state), "the old attempt is alive, and may still write"
    job.wait_for("the loss of the node", lambda: "NODE_FAIL" in job.attempts(), 120)
    again = subprocess.run(["bash", "tests/slurm/start.sh"], cwd=REPO, check=False)
    assert again.returncode == 0
    a_later_step(job, 4)

    assert job.ended(2400) == "COMPLETED", job.log()[-5000:]
    log, attempts = job.log(), job.attempts()
    limits = sum("requeued: job" in part and ("time limit" in part or "signal SIGUSR1" in part)
                 for part in re.split(r"\nstate: ", log))  # one part for each attempt
    print(f"{many} steps; attempts: {attempts}; stopped by their limits: {limits}")
    assert limits >= 4, (f"{limits} limits came in {many} steps: is this machine faster now than "
                         f"when it was measured? SLURM_TEST_SECONDS={2 * SECONDS} asks for more")
    assert attempts.count("REQUEUED") >= 5 and "TIMEOUT" not in attempts, attempts
    assert attempts.count("PREEMPTED") == 1 and attempts.count("NODE_FAIL") == 1, attempts
    assert "it will stop with everything saved" in log and "all done" in log
    for folder, n in [("base_checkpoints", many), ("mid_checkpoints", few),
                      ("chatsft_checkpoints", few), ("chatrl_checkpoints", many)]:
        assert steps(state, folder) == list(range(n)), f"{folder}: a step is missing or there twice"
    assert "Never ran" not in (state / "toy/report/report.md").read_text()
