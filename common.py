"""
Small things that every file may need: errors, printing, files, random numbers. Only the standard
library is imported here, so that a script can check its inputs in milliseconds.
"""
import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  (every script imports this file before newer syntax)
    print(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}: bash "
          "speedrun.sh makes .venv with one; then .venv/bin/python", file=sys.stderr)
    raise SystemExit(2)

# -------------------------------------------------------------------------------------------------
# names of files and standard streams: the same on disk whatever the locale, and nothing ends
# because of what a terminal cannot show, or of who no longer reads

def take_names_as_utf8():
    """Where Python would read names of files as something else (LC_ALL=C with PYTHONUTF8=0, a
    latin-1 locale) it is started again in its UTF-8 mode: else a run that was begun elsewhere would
    find other names in its record."""
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.ignore_environment:
        return
    if sys.stdout:
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

class Output(io.FileIO):
    """Standard output or error as a raw file. What cannot be written is dropped: who has read it
    may have gone (`python status.py | head`), the disk of a log may be full."""
    reader_gone = False
    failed = False

    def write(self, part):
        try:
            return super().write(part) or len(part)
        except BrokenPipeError:
            self.reader_gone = True
        except OSError as e:
            if self.fileno() == 1 and not self.failed:
                print(f"warning: standard output cannot be written ({e.strerror}): what it loses "
                      "is not said again", file=sys.stderr)
            self.failed = True
        return len(part)

def set_up_streams():
    """For every script, as each imports this file. A character that standard output or error lack
    is shown as an escape (\\u4f60), a byte of standard input that is no text is read as U+FFFD."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # a test's, or set up already
        if stream is None:
            os.open(os.devnull, os.O_RDWR)  # it was closed: no file may get its number
        encoding = getattr(stream, "encoding", "utf-8")
        if name == "stdin":
            sys.stdin = open(number, encoding=encoding, errors="replace", closefd=False)  # noqa: SIM115
            continue
        buffer = io.BufferedWriter(Output(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, "backslashreplace",
                                            line_buffering=True))

def reader_is_gone():
    """Whether who has read standard output has gone."""
    return getattr(getattr(sys.stdout.buffer, "raw", None), "reader_gone", False)

take_names_as_utf8()
set_up_streams()

# -------------------------------------------------------------------------------------------------
# errors: where nobody catches a Failure the process ends with one line and its exit code

def one_line(text):
    """A text as one line, with escapes for what cannot be shown: names of files may hold anything.
    """
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)

class Failure(Exception):
    """
    What a person can fix, as one line: what, where, what to do. Libraries raise it; uncaught it is
    printed as `error: ...` without a traceback and ends the process with its code:
    2 nothing was started, 75 all is saved and the same command goes on, 1 anything else.
    """
    def __init__(self, message, code=2, next_command=None):
        self.message = one_line(message)
        self.code = code
        self.next_command = next_command
        self.facts = {}  # for the launcher
        self.of_rank_0 = False  # raised there, and on all other ranks too: see Ranks.on_rank0
        super().__init__(self.message, code, next_command)

    def __str__(self):
        return self.message + (f"; run: {self.next_command}" if self.next_command else "")

def fail(message, code=2, next_command=None):
    raise Failure(message, code, next_command)

def check(condition, message, next_command=None):
    if not condition:
        raise Failure(message, 2, next_command)

def rank_world():
    """(rank, local_rank, world) as torchrun sets them; (0, 0, 1) without torchrun."""
    return tuple(int(os.environ.get(name, usual)) for name, usual in
                 (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

def local_world_size():
    """How many of the ranks are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

def print0(*args):
    if rank_world()[0] == 0:
        print(*args, flush=True)

def leave_outcome(code, reason, next_command=None, **facts):
    """
    Leaves how this process ends where the launcher finds it, in the file $NANOCHAT_OUTCOME:
    torchrun turns every exit code into 1. The first rank's word counts: the others die of it.
    -> False where it could not be written; the exit code has to do then
    """
    path = os.environ.get("NANOCHAT_OUTCOME")
    if not path:
        return True
    try:
        with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as f:
            json.dump({"code": code, "reason": reason, "next": next_command, **facts}, f)
    except OSError:
        return False
    return True

def show_uncaught(kind, value, trace, alone=False):
    """Prints an exception that nobody has caught -> it as a Failure. alone: other ranks may know
    nothing of it."""
    rank, local_rank, _ = rank_world()
    if not isinstance(value, Failure):
        sys.__excepthook__(kind, value, trace)
        first_line = str(value).split("\n")[0][:200]  # a compiler's has thousands
        value = Failure(f"{kind.__name__}: {first_line}", code=1)
    word = "stopped" if value.code == 75 else "error"
    if rank == 0 or (local_rank == 0 and value.code == 2):  # bad input is the same on all ranks
        print(f"{word}: {value}", file=sys.stderr, flush=True)
    elif value.code == 1 or (value.code == 2 and alone):
        print(f"error: rank {rank}: {value}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    return value

def explained(error, name, settings, stop):
    """The exception, or what it stands for as a Failure: memory is out, in the words of CUDA, MPS
    or the host (code 1, with what to try instead); or the compiler was killed by the signal that
    has also asked this run to stop, as Ctrl-C comes to both (75). stop: why, or None."""
    text = str(error)
    if stop and "Inductor" in type(error).__name__:
        return Failure(f"{stop} while compiling; run the same command again", code=75)
    signs = ("out of memory", "not enough memory", "allocate memory")
    if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
        return error
    fewer = [f"--{key}={settings[key] // 2}"
             for key in ("device_batch_size", "rollout_rows", "rows") if settings.get(key, 1) > 1]
    advice = "a smaller model needs less"
    if fewer:
        advice = (f"run the same command with {' '.join(fewer)}: the result stays the same to "
                  "rounding, and what is saved goes on")
    failure = Failure(f"ran out of memory in {name} ({text[:150]}); {advice}", code=1)
    failure.facts["retry_with"] = fewer  # the launcher does so once
    return failure

def stop_signals():
    """Those that ask a process to save and stop. SIGHUP comes where its terminal is closed, unless
    nohup, or its launcher, has it ignored."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    return tuple(n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)

def end_with_parent():
    """From here on the death of the process that has started this one is a SIGTERM to it: it saves
    and stops instead of running on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

def end_process(kind, value, trace):
    # Python takes the exit code from a hook that raises it
    raise SystemExit(show_uncaught(kind, value, trace).code)

sys.excepthook = end_process

# -------------------------------------------------------------------------------------------------
# randomness, files, numbers as text

def rng(seed, *keys):
    """The one source of randomness: a numpy Generator that is a pure function of (seed, keys), all
    whole numbers >= 0.  example: rng(1, 7).integers(10) is the same number on every machine,
    whatever was drawn before."""
    import numpy as np
    return np.random.default_rng([int(seed), *(int(k) for k in keys)])

def fsync_dir(directory):
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

def flock(file, how):
    """Locks an open file in the kernel -> True; False where another process has it; None where the
    file system has no such locks, as some clusters'."""
    try:
        fcntl.flock(file, how)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None

def remove_abandoned(path):
    """Removes the temporary files that deaths in the middle of writing `path` have left. Who still
    writes one holds it locked in the kernel, which frees it when a process dies."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        with contextlib.suppress(OSError), open(temporary, "r+b") as f:
            if flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB):
                temporary.unlink()

@contextlib.contextmanager
def writing(path, code=1):
    """with writing(path): ... -> an OSError there is a Failure that says what to do"""
    try:
        yield
    except OSError as e:
        advice = "check the path and $NANOCHAT_BASE_DIR"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space and run the same command again"
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = ("make it writable, or copy it and set $NANOCHAT_BASE_DIR to the copy, and "
                      "run the same command again")
        fail(f"could not write to {path}: {e}; what is saved is untouched: {advice}", code)

def atomic_write(path, content):
    """Writes text or bytes to `path` so that a reader, or a death of this process, sees the old
    file or the new one. OSError where it cannot be written; the old one then stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        with open(temporary, "wb") as f:
            flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if isinstance(content, str):  # a file's name may hold what is no UTF-8
                content = content.encode(errors="backslashreplace")
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)

def aside_name(path):
    """A name for what is put aside, beside `path`, that nothing has.
    example: base_checkpoints/d4 -> base_checkpoints/d4.old-20261128-120000"""
    name = f"{path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"
    found, number = path.with_name(name), 1
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{name}-{number}")
    return found

def content_of(path):
    """The bytes of a regular file; FileNotFoundError where there is none: to open a FIFO, which may
    lie there as well, would take for ever."""
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    return Path(path).read_bytes()

def read_json(path):
    """The JSON object in `path`, a dict; {} where there is no file or no object in it."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(content_of(path))
        if isinstance(found, dict):
            return found
    return {}

def read_json_lines(path):
    """All whole lines (dicts) of a file like metrics.jsonl; one torn by a death is left out."""
    records = []
    with contextlib.suppress(OSError):
        for line in content_of(path).decode(errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]

def sha256_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

CPU_SHARE = "/sys/fs/cgroup/cpu.max"  # of a container: microseconds that it may use, and of which

def cores():
    """How many CPU cores this process may use: those it may run on, fewer where its container has a
    share of them (cgroup v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max 100000": no limit
        share, period = map(int, Path(CPU_SHARE).read_text("utf-8").split())
        count = min(count, max(1, share // period))
    return count

def duration(seconds):
    """examples: 42 -> "42s", 750 -> "12m30s", 9000 -> "2h30m" """
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"

def progress(what, total=None, every=10.0):
    """-> show(done): prints how much of the total is done and the time left, once in `every`
    seconds. total=None: it is not known, nor is the time left."""
    began = said = time.monotonic()

    def show(done):
        nonlocal said
        now = time.monotonic()
        if done == 0 or now - said < every:
            return
        said = now
        if total is None:
            print0(f"  {done:,} {what}")
            return
        left = max(0.0, (now - began) * (total - done) / done)
        print0(f"  {done:,} of {total:,} {what}, about {duration(left)} left")
    return show
