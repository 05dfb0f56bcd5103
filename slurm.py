"""
What Slurm is asked and told: when this job ends, whether an attempt of a job is over, what happens
when one has ended. A job is started again and again (requeued) until all is done; each start is an
attempt. Every command is a function, so that tests put their own in its place.

    python slurm.py NPROC PATH     on each node before a job's work: packages, GPUs, a shared folder
"""
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import common
import pipeline

SBATCH = pipeline.REPO / "slurm_speedrun.sbatch"

# -------------------------------------------------------------------------------------------------
# asking

def ask(*command):
    """-> what a command of Slurm's answers, a CompletedProcess; None where it cannot be run"""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return None

def attempt():
    """The number of this attempt of the job, 0 for the first."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or "0")

def job_name():
    """This job as Slurm's commands take it, or None outside of one. An element of an array is
    called by its place: the last one has the number of the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")

def end_time():
    """When this job ends, in seconds since the epoch, or None. Slurm 22.05 (Debian 12) sets no
    SLURM_JOB_END_TIME, so squeue or scontrol is asked."""
    if os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(os.environ["SLURM_JOB_END_TIME"])
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    for command in (["squeue", "-h", "-j", job, "-o", "EndTime=%e"],
                    ["scontrol", "show", "job", "-o", job]):
        answer = ask(*command)
        found = re.search(r"\bEndTime=(\S+)", answer.stdout if answer else "")
        with contextlib.suppress(ValueError, TypeError):
            return time.mktime(time.strptime(found and found[1], "%Y-%m-%dT%H:%M:%S"))
    return None

def show_jobs(job):
    """-> (facts of each job that scontrol shows for this name, dicts; all that it has said)"""
    answer = ask("scontrol", "show", "job", "-o", job)
    if answer is None:
        return [], ""
    lines = [dict(word.split("=", 1) for word in line.split() if "=" in word)
             for line in answer.stdout.splitlines()]
    return [facts for facts in lines if "JobId" in facts], answer.stdout + answer.stderr

def attempt_over(job, restart):
    """Whether the attempt number `restart` of `job` has ended; None where nobody can say."""
    shown, said = show_jobs(job)
    if not shown:
        return True if "Invalid job id" in said else None
    for facts in shown:  # for an array's last element all its elements are shown
        if facts["JobId"] == job:
            living = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
            return facts.get("Restarts") != restart or facts.get("JobState") not in living
    return None

def given_up(shown=None):
    """Whether Slurm has started another attempt of this job: where it has lost a node, the batch
    script there lives on, and must start nothing more in the nodes of the next attempt.
    shown: what show_jobs has said of it, if it was asked just now"""
    shown = show_jobs(job_name())[0] if shown is None else shown
    return bool(shown) and shown[0].get("Restarts", str(attempt())) != str(attempt())

def time_limit():
    """This job's limit as sbatch takes it, "" where nobody can say.  example: "12:00:00" """
    answer = ask("squeue", "-h", "-j", job_name(), "-o", "%l")
    return answer.stdout.strip() if answer else ""

def nodes():
    """The names of this job's nodes."""
    return ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).stdout.split()

def sbatch_command(flags):
    """What to type to submit this job again: sbatch's own flags where they differ from the
    directives in the file, then speedrun.sh's."""
    usual = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SBATCH.read_text(), re.MULTILINE))
    actual = {"nodes": os.environ.get("SLURM_JOB_NUM_NODES"),
              "gpus-per-node": os.environ.get("SLURM_GPUS_PER_NODE"),
              "cpus-per-task": os.environ.get("SLURM_CPUS_PER_TASK"),
              "mem": os.environ.get("SLURM_MEM_PER_NODE"),
              "time": time_limit()}
    own = [f"--{k}={v}" for k, v in actual.items() if v and v != usual[k]]
    return ["sbatch", *own, SBATCH.name, *flags]

def describe_job(flags):
    """The first lines of a job's log."""
    git = ask("git", "-C", str(pipeline.REPO), "describe", "--always", "--dirty", "--abbrev=40")
    lines = [f"job {job_name()}, attempt {attempt() + 1} of it, {time.strftime('%F %T')}",
             f"limit {time_limit() or 'unknown'}, flags: {shlex.join(flags) or 'none'}",
             f"nodes: {os.environ['SLURM_JOB_NODELIST']}, GPUs per node: "
             + os.environ.get("SLURM_GPUS_ON_NODE", "0"),
             f"state: {pipeline.base_dir()}",
             f"commit: {git.stdout.strip() if git else 'unknown'}"]
    return "\n".join(lines)

# -------------------------------------------------------------------------------------------------
# when an attempt has ended

NOTHING_TO_TYPE = "nothing needs to be typed"

def after_attempt(code, told_to_end, flags):
    """
    What happens when an attempt of this job has ended: where it is saved and not done the job is
    put back into the queue, or its successor submitted. code: its exit code; told_to_end: it got
    SIGTERM, as by scancel or a preemption; flags: speedrun.sh's. -> (what to say, requeued)
    """
    again = shlex.join(sbatch_command(flags))
    job = job_name()
    shown, _ = show_jobs(job)
    facts = shown[0] if shown else {}
    if given_up(shown):
        return f"Slurm has put job {job} back into the queue itself: {NOTHING_TO_TYPE}", False
    if code != 75:
        return ("the job has failed and is not started again: mend what the lines above say, "
                f"then type: {again}"), False
    state = facts.get("JobState", "")
    if told_to_end and state not in ("", "TIMEOUT", "PREEMPTED"):
        return (f"somebody, or Slurm, has ended this job ({state}); everything is saved; "
                f"to go on, type: {again}"), False
    answer = ask("scontrol", "requeue", job)
    if answer and answer.returncode == 0:
        return (f"requeued: job {job} goes on by itself in its attempt {attempt() + 2}: "
                f"{NOTHING_TO_TYPE}"), True
    if os.environ.get("SLURM_ARRAY_TASK_ID") != os.environ.get("SLURM_ARRAY_TASK_MAX"):
        return (f"requeueing is not permitted here; the next element of the array goes on: "
                f"{NOTHING_TO_TYPE}"), False
    if successor := submit_successor(again, job):
        return (f"requeueing is not permitted here; job {successor} is submitted and goes on when "
                f"this one has ended: {NOTHING_TO_TYPE}"), False
    return ("everything is saved, but neither requeueing nor submitting from a job is permitted "
            f"here; to go on, type: {again}"), False

def submit_successor(again, job):
    """Submits a job that begins when this one has ended. -> its number, None where it may not"""
    sbatch, *rest = shlex.split(again)
    options = ["--parsable", f"--dependency=afterany:{job}", "--no-requeue"]
    for flag, name in (("job-name", "SLURM_JOB_NAME"), ("partition", "SLURM_JOB_PARTITION"),
                       ("account", "SLURM_JOB_ACCOUNT"), ("qos", "SLURM_JOB_QOS")):
        if os.environ.get(name):
            options.append(f"--{flag}={os.environ[name]}")
    # the successor is a job of its own, and no element of an array
    unset = [name for name in os.environ if name.startswith("SLURM_ARRAY")]
    drop = [word for name in [*unset, "SLURM_RESTART_COUNT"] for word in ("-u", name)]
    answer = ask("env", *drop, sbatch, *options, *rest)
    return answer.stdout.strip() if answer and answer.returncode == 0 else None

# -------------------------------------------------------------------------------------------------
# the guard against attempts that get nowhere

OWN_ENDS, KILLED = 3, 10  # attempts in a row without progress: ended by themselves, by others
TOLD = 143                # their exit code instead of 75 where they were told to end by SIGTERM

def progress(data, tag):
    """What changes when something got done: checkpoints, finished phases, pieces of tokens and of
    evaluations. -> a sorted list of texts"""
    root, marks = pipeline.data_root(data), []
    phases = [p for p in pipeline.PHASES if p.kind != "evaluation" and p.name != "report"]
    for folder in [pipeline.state_path(p.name, data, tag) for p in phases]:
        if (common.read_json(folder / "phase.json") or {}).get("status") == "done":
            marks.append(f"{folder} done")
        marks += [f"{p.name} in {folder}" for p in folder.glob("manifest_*.json")]
    files = [*pipeline.token_dir(data).rglob("*"), *pipeline.report_dir(data).glob("*.json*")]
    if root in pipeline.base_data_dir(data).parents:  # it is not the user's own folder
        files += pipeline.base_data_dir(data).glob("*")
    for path in files:
        if path.is_file() and not path.name.startswith(".") and path.stem not in ("phase", "lock"):
            marks.append(f"{path.relative_to(root)} {path.stat().st_size}")
    return sorted(marks)

def count_without_progress(path, marks, ended):
    """-> (how many attempts in a row got nothing done and ended by themselves, how many were ended
    from outside: preempted, or with their node). ended: the exit code of this attempt, -1 where it
    begins. `path` keeps both, the marks, and whether the last attempt has said how it ended."""
    old = common.read_json(path) or {}
    same = old.get("marks") == marks
    runs = old["runs"] if same else 0
    killed = old.get("killed", 0) if same else 0
    if same and ended == 75:
        runs += 1
    if same and (ended == TOLD or (ended == -1 and old.get("open", True))):
        killed += 1
    common.atomic_write(path, json.dumps(
        {"runs": runs, "killed": killed, "marks": marks, "open": ended == -1}))
    return runs, killed

def guard(data, tag, ended=-1):
    """Called when an attempt begins and when it has ended: a Failure (code 1) where it is the last
    of too many that got nothing done."""
    path = pipeline.data_root(data) / f"slurm_{tag}.json"
    if ended not in (-1, 75, TOLD):
        path.unlink(missing_ok=True)
        return
    runs, killed = count_without_progress(path, progress(data, tag), ended)
    if runs >= OWN_ENDS or killed >= KILLED:
        path.unlink()  # whoever starts it again after looking gets as many tries
        common.fail(f"{runs + killed} attempts in a row got nothing done, so this one is the last: "
                    "see why in the log above (is the time limit shorter than the start and one "
                    "save?)", code=1)

# -------------------------------------------------------------------------------------------------
# on each node

def check_packages():
    for line in (pipeline.REPO / "requirements.txt").read_text().split():
        name, wanted = line.split("==")
        try:
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        common.check(found == wanted, f"{name} {wanted} is required and {found} is installed; "
                     "on the login node", "bash speedrun.sh --only=setup")

def check_node(nproc, shared):
    """A node's packages and GPUs, and that it sees the state folder of the first node (`shared`, a
    path in it). Failure with code 2 where it cannot work."""
    check_packages()
    node = platform.node()
    common.check(Path(shared).exists(), f"the first node's state folder {pipeline.base_dir()} "
                 f"cannot be seen from {node}: set NANOCHAT_BASE_DIR in site.env to a folder that "
                 "all nodes share")
    gpus = "no GPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        import torch
        count = torch.cuda.device_count()
        common.check(torch.cuda.is_available(), f"torch {torch.__version__} cannot use the GPUs "
                     f"{os.environ['CUDA_VISIBLE_DEVICES']} of {node}: look at its driver",
                     "nvidia-smi")
        common.check(count >= nproc, f"{nproc} processes were asked for and {node} has {count} "
                     "GPUs: give --nproc or --gpus-per-node")
        gpus = f"{count} x {torch.cuda.get_device_name()}"
    if os.environ.get("SLURM_NODEID", "0") == "0":
        torch_version = importlib.metadata.version("torch")
        print(f"node check: Python {platform.python_version()}, torch {torch_version}, {gpus}, "
              f"{nproc} processes a node", flush=True)

if __name__ == "__main__":
    check_node(int(sys.argv[1]), sys.argv[2])
