"""
The lock of a folder: one process writes there. lock.json says who (host, boot, process, Slurm job
and attempt); its file is locked in the kernel (flock) for as long as that process lives, and its
mtime is the heartbeat for those who cannot see that: other hosts, file systems without flock. The
number of a process is only a name: in another container it means another process.

    lock = take_lock(directory)   # Failure (code 2) where a living process has it
    lock.mine()                   # looked at before every rename: an old process may have woken up
    lock.release()
"""
import contextlib
import fcntl
import glob
import json
import os
import shlex
import signal
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import common
import slurm

HEARTBEAT = 20.0      # seconds between touches of lock.json
PATIENCE = 600.0      # a holder on another host counts as dead after so long without one,
PATIENCE_HERE = 60.0  # one on this machine whose file system knows no flock after so long

@dataclass
class Lock:
    path: Path      # lock.json
    token: str      # ours in it
    file: object    # open, since closing it would give the kernel's lock back
    lost: bool = False  # another process has taken it over

    def mine(self):
        """Looks at the file: False where another process has taken the lock over."""
        found = common.read_json(self.path)
        if not found:  # a network file system may fail to read it once
            time.sleep(1.0)
            found = common.read_json(self.path)
        self.lost = found.get("token") != self.token
        return not self.lost

    def beat(self):
        while not self.file.closed:
            with contextlib.suppress(OSError):
                if self.mine():  # else it may be that it could not be read just now
                    now = time.time()  # not the file server's, which may have another clock
                    os.utime(self.path, (now, now))
            time.sleep(HEARTBEAT)

    def release(self):
        if self.mine():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.file.close()

def read_holder(path):
    """What lock.json says of who has it; a damaged one may lack anything."""
    return {"host": "another host", "pid": "?", "restart": "", **common.read_json(path)}

def boot_id():
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    return ""

def held_in_kernel(path):
    """Whether a living process that this kernel can see, or asks the file server about, has it;
    None where it does not say."""
    with contextlib.suppress(OSError), open(path, "rb") as f:
        free = common.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None if free is None else not free
    return None

def is_here(holder):
    """Whether it was taken under this machine's kernel: in another container, too, whose host has a
    name of its own, another one whenever it is started again."""
    boot = boot_id()
    named_alike = holder["host"] == socket.gethostname()
    return holder.get("boot") == boot and (boot != "" or named_alike)

def seen_by_kernel(path, holder):
    """Whether this machine's kernel would have the lock if its holder lived: it was taken here, on
    the file system that `path` is on here (the same one, mounted twice, may count as two)."""
    disk = Path(path).stat().st_dev
    return is_here(holder) and holder.get("kernel") and holder.get("disk", disk) == disk

def holds_open(pid, path):
    """Whether the process that has this number here has the file open."""
    with contextlib.suppress(OSError):  # there is none, or it is another user's, or no /proc
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samefile(fd, path):
                    return True
    return False

def is_earlier_attempt(holder):
    """Whether it is an earlier attempt of this very Slurm job, which is over whatever its processes
    do: those of a node that Slurm has lost run on, until they look at their lock."""
    job = holder.get("job")
    return bool(job) and job == os.environ.get("SLURM_JOB_ID") and \
        holder.get("restart") != str(slurm.attempt())

def living_holder(directory, now=time.time):
    """Who writes in `directory`, as lock.json says, or None where nobody does, or a dead process.
    Only looks."""
    path = Path(directory) / "lock.json"
    holder = read_holder(path)
    if is_earlier_attempt(holder):
        return None
    held = held_in_kernel(path)
    if held:
        return holder
    if "token" not in holder:
        return None
    with contextlib.suppress(OSError):  # it may have been given back just now
        if held is False and seen_by_kernel(path, holder):
            return None  # it frees the lock when a process dies
        if holder.get("job") and slurm.attempt_over(holder["job"], holder["restart"]):
            return None
        silence = now() - path.stat().st_mtime
        return holder if silence < (PATIENCE_HERE if is_here(holder) else PATIENCE) else None
    return None

def holder_name(holder):
    """example: "process 4711 on node3 (Slurm job 99)" """
    job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
    return f"process {holder['pid']} on {holder['host']}{job}"

def check_free(directory, what=None):
    """Failure (code 2) with the holder's name where a living process writes in `directory`. what:
    the name of that, if it is not the folder's."""
    if holder := living_holder(directory):
        path = Path(directory) / "lock.json"
        advice = "wait for it or stop it where it was started"
        if holds_open(holder["pid"], path):
            advice = f"wait for it or stop it first (kill {holder['pid']})"
        elif not is_here(holder):
            advice = (f"wait for it or stop it first (only if {holder['host']} is gone for good: "
                      f"remove {path})")
        common.fail(f"{what or directory} is being written by {holder_name(holder)}; {advice}")

def end_stray(path, holder):
    """Ends a process of an earlier attempt that runs on here: it would go on computing, and hold
    the GPU's memory. Never another one that has the same number here. -> what became of the holder
    """
    if not (is_earlier_attempt(holder) and is_here(holder) and held_in_kernel(path)):
        return "is gone"
    if not holds_open(holder["pid"], path):
        return "is over, though a process of it still runs, out of reach, until it sees that"
    with contextlib.suppress(OSError):
        os.kill(holder["pid"], signal.SIGKILL)
    return "still ran though Slurm had ended it, and was killed"

def take_lock(directory, what=None):
    """-> the Lock of `directory`, over from a dead holder if need be. Failure with code 2 and the
    holder's name where it lives (what: as in check_free); OSError where the folder cannot be
    written."""
    path = Path(directory) / "lock.json"
    with open(path.with_name(".lock-guard"), "wb") as guard:
        # two that start at once look and take one after the other
        common.flock(guard, fcntl.LOCK_EX)
        check_free(path.parent, what)
        holder = read_holder(path)
        if "token" in holder:
            fate = end_stray(path, holder)
            common.print0(f"the last attempt ({holder_name(holder)}) {fate}: resuming")
        common.remove_abandoned(path)
        token = uuid.uuid4().hex
        temporary = path.with_name(f".lock.json.tmp-{token}")
        # open as long as the lock is held
        file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115
        in_kernel = common.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        json.dump({"token": token, "host": socket.gethostname(), "boot": boot_id(),
                   "pid": os.getpid(), "kernel": bool(in_kernel),
                   "disk": os.fstat(file.fileno()).st_dev,
                   "job": os.environ.get("SLURM_JOB_ID"), "restart": str(slurm.attempt())}, file)
        file.flush()
        os.replace(temporary, path)  # the file at that path is locked from its first moment on
    lock = Lock(path, token, file)
    threading.Thread(target=lock.beat, daemon=True).start()
    return lock

def put_aside(directory, what="starting over; the old state"):
    """Renames a folder, with the date. Failure (code 2) where somebody writes in it. what: as it is
    called in the line that says so."""
    check_free(directory)
    aside = common.aside_name(directory)
    directory.rename(aside)
    common.print0(f"{what} is kept in {aside}")
    copies = sorted(directory.parent.glob(f"{glob.escape(directory.name)}.old-[0-9]*-[0-9]*"))
    sizes = [path.lstat().st_size for copy in copies for path in copy.rglob("*")]
    common.print0(f"copies put aside so far: {len(copies)}, {sum(sizes) / 1e6:,.1f} MB; once you "
                  f"need none of them: {shlex.join(['rm', '-r', *map(str, copies)])}")
