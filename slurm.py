"""
What Slurm is asked and told: when this job ends, whether an attempt of a job is over, what happens
when one has ended. A job is started again and again (requeued) until all is done; each start is an
attempt. Every command is a function, so that tests put their own in its place.

    python slurm.py NPROC PATH     on each node before a job's work: GPUs, a shared folder
"""
import contextlib
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
from records import source_version

SBATCH = pipeline.REPO / "slurm_speedrun.sbatch"

# -------------------------------------------------------------------------------------------------
# asking

def ask(*command, **more):
    """-> what a command of Slurm's answers, a CompletedProcess; None where it cannot be run"""
    more.setdefault("env", {**os.environ, "SLURM_TIME_FORMAT": "standard"})  # else as users like it
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, errors="replace",
                              timeout=30, check=False, **more)
    return None

def lines_of(*command):
    """The lines that a command of Slurm's prints; [] where it fails."""
    answer = ask(*command)
    lines = answer.stdout.splitlines() if answer and answer.returncode == 0 else []
    return [line.strip() for line in lines if line.strip()]

def attempt():
    """The number of this attempt of the job, 0 for the first."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or "0")

def job_name():
    """This job as Slurm's commands take it, or None outside of one. An element of an array is
    called by its place: the last one has the number of the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")

def show_jobs(job):
    """-> (facts of each job that scontrol shows for this name, dicts; all that it has answered)"""
    answer = ask("scontrol", "show", "job", "-o", job)
    if answer is None:
        return [], ""
    # a value, such as a path, may hold spaces: the next word with a capital and a = ends it
    lines = [dict(word.split("=", 1) for word in re.split(r" +(?=[A-Z][\w/:]*=)", line.strip())
                  if "=" in word) for line in answer.stdout.splitlines()]
    return [facts for facts in lines if "JobId" in facts], answer.stdout + answer.stderr

def show_this_job():
    """What scontrol shows of this job, a dict; {} where it does not answer, or outside of one."""
    shown = show_jobs(job_name())[0] if job_name() else []
    return shown[0] if shown else {}

def end_time():
    """When this job ends, in seconds since the epoch, or None. Slurm 22.05 (Debian 12) sets no
    SLURM_JOB_END_TIME, so scontrol is asked."""
    if os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(os.environ["SLURM_JOB_END_TIME"])
    with contextlib.suppress(ValueError):  # "Unknown"
        return time.mktime(time.strptime(show_this_job().get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
    return None

def attempt_over(job, restart):
    """Whether the attempt number `restart` of `job` has ended; None where nobody can say."""
    if os.environ.get("NANOCHAT_JOB_OVER") == f"{job} {restart}":
        return True  # the launcher has asked
    shown, answer = show_jobs(job)
    if not shown:
        return True if "Invalid job id" in answer else None
    for facts in shown:  # for an array's last element all its elements are shown
        if facts["JobId"] == job:
            living = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
            return facts.get("Restarts") != restart or facts.get("JobState") not in living
    return None

def given_up():
    """Whether Slurm has started another attempt of this job: where it has lost a node, the batch
    script there lives on, and must start nothing more in the nodes of the next attempt."""
    return show_this_job().get("Restarts", str(attempt())) != str(attempt())

def nodes():
    """The names of this job's nodes."""
    return lines_of("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"])

# sbatch's flags as this job has got them: where its environment has them, where scontrol shows them
IN_ENVIRONMENT = {"job-name": "JOB_NAME", "partition": "JOB_PARTITION", "account": "JOB_ACCOUNT",
                  "qos": "JOB_QOS", "nodes": "JOB_NUM_NODES", "gpus-per-node": "GPUS_PER_NODE",
                  "ntasks-per-node": "NTASKS_PER_NODE", "cpus-per-task": "CPUS_PER_TASK",
                  "cpus-per-gpu": "CPUS_PER_GPU", "mem": "MEM_PER_NODE",
                  "mem-per-cpu": "MEM_PER_CPU", "mem-per-gpu": "MEM_PER_GPU",
                  "export": "EXPORT_ENV"}
SHOWN = {"time": "TimeLimit", "constraint": "Features", "exclude": "ExcNodeList",
         "nodelist": "ReqNodeList", "reservation": "Reservation", "licenses": "Licenses",
         "mail-user": "MailUser", "mail-type": "MailType", "nice": "Nice", "comment": "Comment"}

def directives():
    """sbatch's flags in the file.  example: {"nodes": "1", "time": "12:00:00", ...}"""
    text = SBATCH.read_text("utf-8")
    return dict(re.findall(r"^#SBATCH --([\w-]+)[= ](\S+)", text, re.MULTILINE))

def sbatch_command(flags, array=True):
    """What to type to submit this job again: sbatch's own flags where they differ from the
    directives in the file, then speedrun.sh's. array: as an array, if it is an element of one."""
    facts, usual = show_this_job(), {"nice": "0", **directives()}
    given = {flag: os.environ.get(f"SLURM_{name}") for flag, name in IN_ENVIRONMENT.items()}
    given |= {flag: facts.get(name) for flag, name in SHOWN.items()}
    usual_log = Path(usual.get("output", "")).name.replace("%j", os.environ.get("SLURM_JOB_ID", ""))
    if usual_log and Path(facts.get("StdOut", usual_log)).name != usual_log:
        given["output"] = facts["StdOut"]
    asked = [flag for flag in ("mem", "mem-per-cpu", "mem-per-gpu") if given[flag]]
    if facts.get("MinMemoryNode") == "0" and not asked and "MemPerTres" not in facts:
        given["mem"] = "0"  # all of a node's, of which the environment says nothing
    first, last = (os.environ.get(f"SLURM_ARRAY_TASK_{end}") for end in ("MIN", "MAX"))
    if array and first:
        at_once = facts.get("ArrayTaskThrottle", "1")
        given["array"] = f"{first}-{last}%{at_once}"
    nothing = (None, "", "(null)", "N/A", "None")
    site = {name for name in os.environ if name.startswith("SBATCH_")}  # beats a directive
    own = [f"--{k}={v}" for k, v in given.items() if v not in nothing and
           (v != usual.get(k) or site & {f"SBATCH_{k.upper().replace('-', '_')}",
                                         f"SBATCH_{k.upper()}LIMIT"})]
    own += ["--no-requeue"] * (facts.get("Requeue") == "0")
    own += ["--exclusive"] * (facts.get("OverSubscribe") == "NO")
    in_repository = os.environ.get("SLURM_SUBMIT_DIR", str(pipeline.REPO)) == str(pipeline.REPO)
    return ["sbatch", *own, SBATCH.name if in_repository else str(SBATCH), *flags]

def describe_job(flags):
    """The first lines of a job's log."""
    commit, difference = source_version()
    changed = " with uncommitted changes" if difference else ""
    limit, gpus = show_this_job().get("TimeLimit"), os.environ.get("SLURM_GPUS_ON_NODE")
    return (f"job {job_name()}, attempt {attempt() + 1} of it, {time.strftime('%F %T')}\n"
            f"limit {limit or 'unknown'}, flags: {shlex.join(flags) or 'none'}\n"
            f"nodes: {os.environ['SLURM_JOB_NODELIST']}, GPUs per node: {gpus or 0}\n"
            f"state: {pipeline.base_dir()}\n"
            f"commit: {commit}{changed}")

# -------------------------------------------------------------------------------------------------
# when an attempt has ended

NOTHING_TO_TYPE = "nothing needs to be typed"

def after_attempt(code, terminated, flags, sleep=time.sleep):
    """
    What happens when an attempt of this job has ended: where it is saved and not done the job is
    put back into the queue, or its successor submitted, as far as $NANOCHAT_GO_ON allows. code: its
    exit code; terminated: it got SIGTERM, as by scancel or a preemption; flags: speedrun.sh's.
    -> (what to say, requeued)
    """
    again = shlex.join(sbatch_command(flags))
    allowed = os.environ.get("NANOCHAT_GO_ON", "requeue,submit").split(",")
    job, facts = job_name(), show_this_job()
    if not facts:  # the controller may be busy for a moment
        sleep(10)
        facts = show_this_job()
    if given_up():
        return f"Slurm has put job {job} back into the queue itself: {NOTHING_TO_TYPE}", False
    if code != 75:
        return ("the job has failed and is not started again: fix what the lines above name, "
                f"then type: {again}"), False
    # while this script lives the job is COMPLETING, whoever has ended it
    ended = terminated and facts.get("Reason") != "TimeLimit" and not preempted(facts)
    if not ended and "requeue" in allowed:
        answer = ask("scontrol", "requeue", job)
        if answer and answer.returncode == 0:
            return (f"requeued: job {job} goes on by itself in its attempt {attempt() + 2}: "
                    f"{NOTHING_TO_TYPE}"), True
    if waits := elements_that_wait():
        return (f"everything is saved, and element {waits[0]} of the array goes on: "
                f"{NOTHING_TO_TYPE}"), False
    if ended:
        state = facts.get("JobState", "unknown")
        return (f"somebody, or Slurm, has ended this job (state {state}); everything is saved; "
                f"to go on, type: {again}"), False
    successor = submit_successor(flags, job) if "submit" in allowed else None
    if successor:
        return (f"requeueing is not permitted here; job {successor} is submitted and goes on when "
                f"this one has ended: {NOTHING_TO_TYPE}"), False
    return ("everything is saved, but neither requeueing nor submitting from a job is permitted "
            f"here; to go on, type: {again}"), False

def preempted(facts):
    """Whether this job, of which scontrol shows these facts, gives way to another one. One that was
    suspended for that, and has gone on since, still shows when."""
    suspended = facts.get("SecsPreSuspend", "0") != "0"
    return facts.get("PreemptTime", "None") != "None" and not suspended

def elements_that_wait():
    """The numbers of the elements of this job's array that are still to come, as texts."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if not array:
        return []
    waiting = lines_of("squeue", "-h", "-r", "-t", "PENDING", "-j", array, "-o", "%K")
    return [number for number in waiting if number != os.environ["SLURM_ARRAY_TASK_ID"]]

def submit_successor(flags, job):
    """Submits a job that begins when this one has ended. -> its number, None where it may not"""
    sbatch, *rest = sbatch_command(flags, array=False)
    # the successor is a job of its own, and no element of an array
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("SLURM_ARRAY", "SLURM_RESTART"))}
    rest = [word for word in rest if word != "--no-requeue"]
    folder = os.environ.get("SLURM_SUBMIT_DIR")  # where this one was submitted, and its log is
    answer = ask(sbatch, "--parsable", "--no-requeue", f"--dependency=afterany:{job}", *rest,
                 env=environment, cwd=folder)
    return answer.stdout.strip() if answer and answer.returncode == 0 else None

# -------------------------------------------------------------------------------------------------
# the guard against attempts that get nowhere

KILLED = "killed"  # how an attempt has ended that was preempted, cancelled or lost its node
MOST_STOPPED, MOST_KILLED = 3, 10  # attempts in a row without progress, of each kind

def progress(data, tag):
    """What changes when something got done: checkpoints, finished phases, pieces of tokens and of
    evaluations. -> a sorted list of texts"""
    marks, files = [], [*pipeline.token_dir(data).rglob("*"),
                        *pipeline.report_dir(data).glob("*.json*")]
    for phase in pipeline.PHASES[:-1]:  # all but the report
        folder = pipeline.state_path(phase.name, data, tag)
        if common.read_json(folder / "phase.json").get("status") == "done":
            marks.append(f"{folder} done")
        if phase.name != "data":
            files += folder.glob("manifest_*.json")
        elif not pipeline.is_folder_data(data):
            files += folder.glob("*")
    for path in files:
        if path.is_file() and not path.name.startswith(".") and path.stem not in ("phase", "lock"):
            marks.append(f"{path} {path.stat().st_size}")
    return sorted(marks)

def guard(data, tag, ended=None):
    """Called when an attempt begins (None) and when it has ended (its exit code or KILLED): a
    Failure (code 1) where too many in a row got nothing done. Their ends are kept in a file."""
    if given_up():
        return  # the file is the next attempt's
    path = pipeline.data_root(data) / f"slurm_{tag}.json"
    if ended not in (None, 75, KILLED):
        path.unlink(missing_ok=True)
        return
    old, marks = common.read_json(path), progress(data, tag)
    same = old.get("marks") == marks
    ends = old.get("ends", []) if same else []
    if same and ended:
        ends = [*ends[:-1], ended]
    if ends.count(75) >= MOST_STOPPED or ends.count(KILLED) >= MOST_KILLED:
        path.unlink()  # whoever starts it again after looking gets as many tries
        common.fail(f"{len(ends)} attempts in a row got nothing done, so this one is the last: see "
                    "why in the log above (is the time limit shorter than the start and one "
                    "save?)", code=1)
    if ended is None:
        ends = [*ends, KILLED]  # until it says how it has ended
    with contextlib.suppress(OSError):  # a full disk: what ended well goes on, uncounted
        common.atomic_write(path, json.dumps({"marks": marks, "ends": ends}))

# -------------------------------------------------------------------------------------------------
# on each node

def cpus_per_node():
    """How many CPUs this job has on each of its nodes, on the one with the fewest.
    example: SLURM_JOB_CPUS_PER_NODE=64(x2),32 -> 32"""
    numbers = re.findall(r"(\d+)(?:\(x\d+\))?", os.environ.get("SLURM_JOB_CPUS_PER_NODE", "1"))
    return min(map(int, numbers))

def check_job(nproc):
    """Failure (code 2) where what was asked of Slurm cannot work for nproc processes a node."""
    twice = re.findall(r"gres.gpu(?=[:=,]|$)\S*?(?=,|$)", show_this_job().get("TresPerNode", ""))
    common.check(len(twice) < 2, f"GPUs were asked for twice ({', '.join(twice)}): "
                 f"{SBATCH.name} has a --gpus-per-node of its own, which gives way to that flag "
                 "alone, not to --gres", "sbatch --gpus-per-node=...")
    cpus = cpus_per_node()
    common.check(cpus >= nproc, f"{nproc} processes a node need as many CPUs at least, and this "
                 f"job has {cpus}: give sbatch --cpus-per-task=64, or as many as a node has, or "
                 "--exclusive")
    end = end_time()
    common.check(end is None or end > time.time(), "this job's end is in the past, so nothing "
                 "would run: is SLURM_JOB_END_TIME of another job, or this node's clock wrong?")

def check_node(nproc, shared):
    """A node's GPUs, and that it sees the state folder of the first node (`shared`, a path in it).
    Failure with code 2 where it cannot work."""
    node = platform.node()
    common.check(Path(shared).exists(), f"the first node's state folder {pipeline.base_dir()} "
                 f"cannot be seen from {node}: set NANOCHAT_BASE_DIR in site.env to a folder that "
                 "all nodes share")
    gpus = "no GPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        import torch
        count = torch.cuda.device_count()
        common.check(count >= nproc, f"{nproc} processes were asked for and torch "
                     f"{torch.__version__} can use {count} GPUs on {node}: give --nproc or "
                     "--gpus-per-node, or look at its driver", "nvidia-smi")
        gpus = f"{count} x {torch.cuda.get_device_name()}"
    if os.environ.get("SLURM_NODEID", "0") == "0":
        print(f"node check: Python {platform.python_version()}, {gpus}, {nproc} processes a node",
              flush=True)

if __name__ == "__main__":
    common.check(len(sys.argv) == 3, "slurm.py is not started by hand, but by a job",
                 "sbatch slurm_speedrun.sbatch")
    check_node(int(sys.argv[1]), sys.argv[2])
