"""
The record and the lock of a phase. Each phase directory (base_checkpoints/d4, tokenizer, ...) holds

    phase.json   what was run: settings, inputs, status (running, interrupted, failed, done), why, what to run next
    lock.json    who writes here now: host, boot id, process, Slurm job and restart count; its mtime is the heartbeat

    resumed = phase.begin(directory, "base_train", settings, inputs, verify)   # exits 0 if done, 2 if it must not run
    ...
    phase.done(directory, {"step": 400})       or      phase.interrupted(directory, "signal SIGTERM, saved at step 210")
"""
import contextlib
import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import common
import configurator

HEARTBEAT = 20.0     # seconds between touches of the lock
MISSED = 30          # a holder on another host is dead after so many missed heartbeats
_held = {}           # directory -> our token in its lock
writer = None        # the thread that saves under a lock of ours (checkpoint.py): the lock is given back after it has ended

# ---------------------------------------------------------------------------------------------------------------------
# the lock

def boot_id():
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""

def memory_kills():
    """How many processes this host's memory guard has killed since it was started; None where it does not say."""
    with contextlib.suppress(OSError):
        for line in open("/proc/vmstat"):
            if line.startswith("oom_kill "):
                return int(line.split()[1])

def killed_since(then):
    """Whether this host's memory guard has killed a process since `then` was noted: {"boot": boot_id(), "kills": memory_kills(), ...}"""
    return then.get("kills") is not None and then["boot"] == boot_id() and (memory_kills() or 0) > then["kills"]

def process_start(pid):
    """When process `pid` started, in clock ticks since boot: tells a process from a later one of the same number. "" if there is
    none, or a zombie: where process 1 does not reap, as in many containers, a killed process stays one for good."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()  # from the state on; the name before may hold anything
        return "" if fields[0] in "ZX" else fields[19]
    return ""

def slurm_life_over(job, restart):
    """Whether Slurm says that the run number `restart` of `job` has ended; None where it cannot be asked."""
    try:
        asked = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    if asked.returncode:
        return True if "Invalid job id" in asked.stdout + asked.stderr else None
    for line in asked.stdout.split("\n"):  # of an array's last element all elements are shown
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if facts.get("JobId") == job:
            return facts.get("Restarts") != restart or facts.get("JobState") not in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
    return None

def holder_alive(lock, mtime, now=None, this_host=None):
    """Whether the holder written in `lock` still lives. An earlier run of this very Slurm job does not, whatever its processes say (those of a
    node that Slurm lost run on: `must_hold` stops them). Same host: its process is looked up. Other host: Slurm is asked whether that run
    of the job is over; else it is dead after MISSED heartbeats."""
    job, restart = lock.get("job"), lock.get("restart")
    if job and job == os.environ.get("SLURM_JOB_ID") and restart != os.environ.get("SLURM_RESTART_COUNT", "0"):
        return False
    if lock["host"] == (this_host or socket.gethostname()):
        if lock["boot"] != boot_id():
            return False
        if Path("/proc/self/stat").exists():
            return process_start(lock["pid"]) == lock["start"] != ""
        try:
            os.kill(lock["pid"], 0)
            return True
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
    if job and slurm_life_over(job, restart):
        return False
    return (now or time.time()) - mtime < HEARTBEAT * MISSED

def take_lock(directory):
    """Takes the lock of `directory`, over from a dead holder if need be; exits with 2 and the holder's name if it lives."""
    path = directory / "lock.json"
    with open(directory / ".lock-guard", "w") as guard:
        with contextlib.suppress(OSError):  # some cluster file systems have no flock: of two that take the lock the first stops at its first write
            fcntl.flock(guard, fcntl.LOCK_EX)  # two starters look and take one after the other
        patience = time.time() + (30 if "NANOCHAT_OUTCOME" in os.environ else 0)  # the phase of a speedrun.sh that was killed is saving
        while (lock := common.read_json(path)) and holder_alive(lock, path.stat().st_mtime) and time.time() < patience:
            time.sleep(0.5)
        if lock and holder_alive(lock, path.stat().st_mtime):
            common.fail(f"{directory} is being written by process {lock['pid']} on {lock['host']}"
                        + (f" (Slurm job {lock['job']})" if lock.get("job") else "") + "; wait for it or stop it")
        if lock:
            stray = lock["host"] == socket.gethostname() and lock["boot"] == boot_id() and process_start(lock["pid"]) == lock["start"] != ""
            if stray:  # of a node that Slurm gave up: it would go on computing, and hold the GPU's memory
                with contextlib.suppress(OSError):
                    os.kill(lock["pid"], signal.SIGKILL)
            common.print0(f"taking over the lock of process {lock['pid']} on {lock['host']}, " + ("a run that Slurm has ended: killed" if stray else "which is dead"))
        common.lock_hook = lambda: must_hold(directory)
        _held[str(directory)] = uuid.uuid4().hex
        common.atomic_write(path, json.dumps({
            "token": _held[str(directory)], "host": socket.gethostname(), "boot": boot_id(), "pid": os.getpid(),
            "start": process_start(os.getpid()), "job": os.environ.get("SLURM_JOB_ID"),
            "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}))

    def beat():
        while str(directory) in _held and still_mine(directory):
            with contextlib.suppress(OSError):
                os.utime(path)
            time.sleep(HEARTBEAT)
    threading.Thread(target=beat, daemon=True).start()

def still_mine(directory):
    """False where another process has taken the lock over (or nobody here ever took it)."""
    lock = common.read_json(Path(directory) / "lock.json")
    return bool(lock) and lock.get("token") == _held.get(str(directory))

def must_hold(directory):
    """Ends an old life that has woken up: it must not write over the new one."""
    if not still_mine(directory):
        os.environ.pop("NANOCHAT_OUTCOME", None)
        common.outcome_hook = common.lock_hook = None  # the record is no longer ours either
        common.fail(f"lost the lock of {directory} to another process; stopping without writing", code=1)

def release(directory):
    if writer:
        writer.join()
    if still_mine(directory):
        with contextlib.suppress(OSError):
            (Path(directory) / "lock.json").unlink()
    common.lock_hook = None
    _held.pop(str(directory), None)

# ---------------------------------------------------------------------------------------------------------------------
# the record

def read(directory):
    """The record of a phase directory; None where there is none, or a damaged one."""
    record = common.read_json(Path(directory) / "phase.json")
    return record if isinstance(record, dict) and {"status", "settings", "inputs", "free"} <= record.keys() else None

def recovered(directory):
    """What the newest checkpoint says of its record (checkpoint.write puts it there), for a directory that has lost phase.json; {} without one"""
    for path in sorted(Path(directory).glob("meta_*.json"), reverse=True):
        if kept := (common.read_json(path) or {}).get("record"):
            return {**kept, "free": {}, "status": "running"}
    return {}

def source_version():
    """(commit, hash of the uncommitted difference) of this repository; ("unknown", "") outside git."""
    import hashlib
    def git(*args):
        return subprocess.run(["git", "-C", str(common.REPO), *args], capture_output=True, timeout=20).stdout
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        difference = git("diff", "HEAD")
        return git("rev-parse", "HEAD").decode().strip() or "unknown", hashlib.sha256(difference).hexdigest()[:16] if difference else ""
    return "unknown", ""

def differences(old, new):
    """["depth: 4 -> 6", ...] for two dicts"""
    keys = list(dict.fromkeys([*old, *new]))
    return [f"{k}: {old.get(k, '(absent)')} -> {new.get(k, '(absent)')}" for k in keys if old.get(k) != new.get(k)]

def earlier(directory, settings, start_over=False):
    """The record that a start in `directory` goes on from, {} where it begins anew. --start_over=True holds for one beginning: the same
    command given again goes on with the half-done run that it began, and inside speedrun.sh leaves a done one alone."""
    if not start_over:  # nanochat's model, if there is one: the first save would sweep it away
        import checkpoint
        if (read(directory) or checkpoint.adopt(directory) or {}).get("adopted"):
            common.fail(f"{directory} holds a model made by nanochat: --start_over=True puts it aside and trains anew; without, later phases go on from it (speedrun.sh --from)")
    old = read(directory) or recovered(directory)
    for kept in (settings.defining, old.get("settings", {})):
        if "tag" in kept:
            kept["tag"] = directory.name  # an empty one stands for it
        if kept.get("data"):
            kept["data"] = configurator.whole_path(kept["data"])
    begun_so = old.get("free", {}).get("start_over") and old["settings"] == settings.defining and (old["status"] != "done" or "NANOCHAT_OUTCOME" in os.environ)
    return old if begun_so or not start_over else {}

def begin(directory, name, settings, inputs, verify, start_over=False):
    """
    Opens the phase `name` in `directory`: takes the lock, compares settings and inputs with what was recorded.
    in: settings (configurator.Settings), inputs {"tokenizer": fingerprint, ...}, verify() -> None if the artefact is whole, else why not
    out: the earlier record (a dict) when the phase is half done, {} when it starts anew
    exits: 0 when it is done; 2 when settings or inputs differ, or another process writes here.
    Called on rank 0 (common.on_rank0).
    """
    directory = Path(directory)
    command = "python " + shlex.join([os.path.basename(sys.argv[0]), *(a for a in sys.argv[1:] if not a.replace("-", "_").startswith("__start_over="))])
    old = earlier(directory, settings, start_over)
    if start_over and old.get("inputs") != inputs:
        old = {}
    if old and read(directory) is None:
        common.print0(f"{directory / 'phase.json'} is gone or damaged: settings and inputs are compared with what the newest checkpoint says of them")
    if old.get("status") == "running" and killed_since(old):
        common.print0(f"{name}: the last start died without a word, and this host's memory guard has killed a process since: probably that one; fewer rows at once (--device_batch_size) need less memory")
    if start_over and not old and directory.exists():
        common.only_asked()
        if (lock := common.read_json(directory / "lock.json")) and holder_alive(lock, (directory / "lock.json").stat().st_mtime):
            common.fail(f"{directory} is being written by process {lock['pid']} on {lock['host']}; stop it first")
        aside = directory.with_name(f"{directory.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        directory.rename(aside)
        common.print0(f"starting over; the old state is kept in {aside}")
    if old:
        changed = differences(old["settings"], settings.defining) + differences(old["inputs"], inputs)
        if changed:
            common.fail(f"{name} was started with other settings or inputs in {directory}: " + ", ".join(changed)
                        + " (--start_over=True keeps the old state aside and starts again)")
        if old["status"] == "done" and verify() is None:
            common.print0(f"{name}: done already ({directory})")
            common.outcome(0, "done already")
            sys.exit(0)
        common.only_asked()
        for line in differences(old["free"] or settings.free, settings.free):
            common.print0(f"{name}: setting changed since the last start: {line}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        take_lock(directory)
    except OSError as e:
        common.fail(f"cannot write in {directory}: {e}; make it writable, or make room")
    commit, difference = source_version()
    if old and (commit, difference) != (old.get("commit"), old.get("difference")):
        common.print0(f"{name}: the source changed since the last start ({old.get('commit', '?')[:8]} -> {commit[:8]})")
    record = {**old, "phase": name, "status": "running", "reason": "", "next": command, "settings": settings.defining,
              "free": settings.free, "inputs": inputs, "host": socket.gethostname(), "pid": os.getpid(),
              "boot": boot_id(), "kills": memory_kills(), "job": os.environ.get("SLURM_JOB_ID"), "commit": commit, "difference": difference,
              "starts": old.get("starts", []) + [time.time()], "updated": time.time()}
    write(directory, record)
    common.outcome_hook = lambda code, reason, following: close(directory, code, reason, following or command)
    def died(kind, value, trace):
        sys.__excepthook__(kind, value, trace)
        lost = common.rank_world()[2] > 1 and ("DistBackendError" in kind.__name__ or "onnection" in str(value))
        common.outcome(1, f"another rank died or cannot be reached ({str(value)[-150:]})" if lost else f"{kind.__name__}: {value}", command)
    sys.excepthook = died
    return old

def write(directory, record):
    common.atomic_write(Path(directory) / "phase.json", json.dumps(record, indent=1))

def note(directory, **facts):
    """Adds facts (for instance what a start-up probe chose) to the record."""
    if common.rank_world()[0] == 0:
        write(directory, {**read(directory), **facts})

def close(directory, code, reason, next_command):
    if still_mine(directory):
        status = {0: "done", 75: "interrupted"}.get(code, "failed")
        write(directory, {**read(directory), "status": status, "code": code, "reason": reason,
                          "next": None if code == 0 else next_command, "updated": time.time()})
        release(directory)

def done(directory, **facts):
    """Marks the phase as done, with facts for the report."""
    note(directory, **facts)
    common.outcome(0, "done")

def interrupted(directory, reason):
    """Marks the phase as saved and stopped, and ends the process: code 75, under torchrun 0."""
    common.outcome(75, reason)
    common.print0(f"stopped: {reason}; run the same command again")
    common.leave(75)
