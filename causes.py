"""
Why something has died, from what it has left behind: the reason in its record or in the launcher's
note, its job in Slurm's books, the end of the job's log. Only reads; status.py shows it.
"""
import re
from collections import deque
from typing import NamedTuple

import slurm

class Cause(NamedTuple):
    kind: str       # a word or two, for status.py --json=True: "host memory"
    sentence: str   # what has happened
    mend: str       # what to do about it
    shown_by: list  # the lines that show it, three at most

AGAIN = "nothing is wrong: the same command goes on"
ROWS = "fewer rows at once (-- --device_batch_size=...)"
ELSEWHERE = "put the state elsewhere (NANOCHAT_BASE_DIR in site.env)"

class Sign(NamedTuple):
    kind: str
    words: str     # a regular expression: of a line that shows it
    sentence: str
    mend: str

# The first that is found counts: what can follow from another one stands behind it.
SIGNS = [
    Sign("gpu memory", r"(CUDA|HIP|MPS backend).{0,40}out of memory",
         "the GPU's memory was full", f"give {ROWS}: the result is the same to rounding"),
    Sign("host memory", r"oom[-_ ]?kill|OUT_OF_ME|[Oo]ut of memory|not enough memory|MemoryError|"
         r"([Cc]annot|can't) allocate memory",
         "the machine's memory was full", f"give {ROWS}, or more memory (sbatch --mem=...)"),
    Sign("quota", r"[Dd]isk quota exceeded",
         "the disk quota was used up", f"free some of it, or {ELSEWHERE}"),
    Sign("disk", r"No space left on device|need(ed)? [\d.]+ GB|GB are needed|disk is full|"
         r"\(inodes\) may be made",
         "the disk was full", f"free some space (or inodes: df -i), or {ELSEWHERE}"),
    Sign("read-only", r"Read-only file system|Permission denied|Operation not permitted",
         "a folder could not be written or read", f"make it writable, or {ELSEWHERE}"),
    Sign("not finite", r"not? finite|has exploded|(loss|norm) nan\b",
         "its numbers were no longer finite",
         "go back to a checkpoint before it (--rewind, as the line says), or lower the rate"),
    Sign("another rank",
         r"another rank died|one of its processes has died|DistBackendError|NCCL|\bgloo\b",
         "another of its processes died first", "that one's lines in the log say why"),
    Sign("no network", r"[Nn]etwork is unreachable|[Nn]ame or service not known|[Nn]ame resolution|"
         r"NANOCHAT_OFFLINE|Connection(Error| refused| reset)|could not (be )?download|timed out",
         "the network could not be reached",
         "download where there is internet (bash speedrun.sh ... --only=data), then go on"),
    Sign("another writer", r"lost the lock|is being written by|another process",
         "another process wrote in the same folder", "wait for that one, or stop it"),
    Sign("other inputs", "started with other settings or inputs",
         "it was started with other settings or inputs",
         "give the same ones, or start it over as the line says"),
    Sign("damaged", r"checksum|(?<!missing or )damaged|cut short|\bis whole\b|cannot be read",
         "a file is damaged", "the line says which, and what to do"),
    Sign("missing data", r"\bmissing\b|[Tt]here is no\b|No such file or directory",
         "something that it needs was not there", "bring it: the line says what is missing"),
    Sign("no progress", "got nothing done",
         "attempt after attempt got nothing done", "see why in the log; longer jobs may do"),
    Sign("job", "need as many CPUs|GPUs were asked for twice|cannot be seen from|torch .* can use",
         "the job was not given what it needs", "submit it with what the line says"),
    Sign("preempted", "PREEMPT", "Slurm has given its place to another job", AGAIN),
    Sign("node lost", "NODE_FAIL|[Nn]ode failure|NODE FAILURE|BOOT_FAIL",
         "Slurm has lost a node", AGAIN),
    Sign("time limit", r"TIMEOUT|DUE TO TIME LIMIT|\bdeadline\b|time limit",
         "its time was over", AGAIN),
    Sign("cancelled", "CANCELLED", "somebody has cancelled the job", AGAIN),
    Sign("killed", r"SIGKILL|\|0:9\|",
         "it was killed at once (SIGKILL): often because the machine's memory was full, else by "
         "somebody or something that ends processes",
         f"the same command goes on; if it happens again give {ROWS}"),
    Sign("crash", "SIG(SEGV|BUS|ABRT|ILL|FPE)",
         "it crashed inside a library or the driver",
         "the same command goes on; if it happens again look at the driver and the packages"),
    Sign("signal", r"signal SIG\w+|Ctrl-C|\ba signal came\b", "a signal has stopped it", AGAIN),
    Sign("traceback", r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b",
         "a fault in a program ended it",
         "the line says which; the traceback above it in the log or terminal says where"),
]
# what Slurm may know more about
VAGUE = ("killed", "signal", "another rank", "crash", "traceback")

def cause_of(lines):
    """lines: what was left behind -> Cause, None where none of them says a thing that is known"""
    for sign in SIGNS:
        shown_by = [line.strip()[:300] for line in lines if re.search(sign.words, line)]
        if shown_by:
            return Cause(sign.kind, sign.sentence, sign.mend, list(dict.fromkeys(shown_by))[:3])
    return None

def of_death(reasons, job=None, log=None):
    """reasons: what the dead have said themselves, or the launcher of them. job: its name, log: the
    path of its log, where it was Slurm's. -> Cause; kind "unknown" where nothing says why"""
    found = cause_of(reasons)
    if job and (found is None or found.kind in VAGUE):
        of_slurm = cause_of(end_of_job(job)) or cause_of(errors_in(log))
        if of_slurm and of_slurm.kind not in VAGUE:
            return of_slurm
        found = found or of_slurm
    said = "its own line is all that is known" if reasons else "it has said nothing"
    return found or Cause("unknown", said, "look at the end of its log or terminal", reasons[:3])

# -------------------------------------------------------------------------------------------------
# evidence

def end_of_job(job):
    """How Slurm's books say that a job and its steps have ended, a line each; [] without Slurm."""
    lines = slurm.lines_of("sacct", "-n", "-P", "-D", "-j", job,
                           "-o", "JobID,State,ExitCode,Elapsed,Timelimit,NodeList")
    begins = [0, *(i for i, line in enumerate(lines) if "." not in line.split("|")[0])]
    over = [f"sacct: {line}" for line in lines[begins[-1]:]  # of the last attempt, with its steps
            # a step is cancelled because its job has ended, of whatever
            if not re.search(r"RUNNING|PENDING|COMPLETED|REQUEUED|^[^|]*\.[^|]*\|CANCELLED", line)]
    if not over:  # sites without accounting: the controller knows it for some minutes
        over = [f"scontrol: JobState={facts.get('JobState')} Reason={facts.get('Reason')}"
                for facts in slurm.show_jobs(job)[0]]
    return over[-4:]

def last_lines(path, most=200):
    """The last lines of a text file; [] where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return [line.rstrip("\n") for line in deque(f, most)]
    except (OSError, TypeError, ValueError):
        return []

def errors_in(log):
    """The lines of a job's log that speak of an error, the last first, of its last attempt."""
    lines = last_lines(log)
    head = r"job \S+, attempt \d+ of it"  # see slurm.describe_job
    begins = [0, *(i for i, line in enumerate(lines) if re.match(head, line))]
    signs, guesses = r"^error: |^\w*Error\b|slurmstepd|srun: ", "probably because|last attempt was"
    return [line for line in reversed(lines[begins[-1]:])
            if re.search(signs, line) and not re.search(guesses, line)]
