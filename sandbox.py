"""
The inside of the sandbox: judges one Python program that a model wrote. Only execution.py starts it

    unshare ... python -I -S sandbox.py '{"timeout": 5.0, ...}'    # its keys: execution.supervise

and sends '["the program", "its test"]' to its standard input. It answers on its standard output:
"passed", "failed", "timeout" or "too much memory". What is wrong with the sandbox itself goes to
standard error, without a verdict. Three processes take part:

    supervisor   this one, process 1 of the namespaces. It alone holds the pipe of the verdict, and
                 looks at the checker's exit status, the clock and the memory.
    program      a fork that executes the code, says that it came to its end, and answers calls of
                 one of its functions. All it has open is a socket to the checker.
    checker      a fork that executes the test. The function under test is a stub there: it sends
                 the arguments to the program and gets a literal back.

So a program cannot forge a verdict. It cannot write one. It cannot see a test, which is read after
the program's fork. It cannot patch what judges it, nor return an object that equals everything. And
it can neither trace nor read the two others: it is another user (where we are root), or has no
capabilities while they have some.

Why the supervisor does not run the test itself: an answer may keep a test inside one C call for
hours (3 ** answer), or may use up the memory of its process. No thread and no signal handler of
that process would then look at the clock or at the memory of the program's children.
"""
import ast
import builtins
import contextlib
import ctypes
import importlib
import json
import os
import resource
import secrets
import signal
import socket
import sys
import time
import types

# Imported before rights are dropped: nobody may not be allowed to read where Python is installed.
FOR_PROGRAMS = ["bisect", "collections", "copy", "datetime", "fractions", "functools", "hashlib",
                "heapq", "itertools", "math", "operator", "random", "re", "shutil", "statistics",
                "string", "threading", "typing"]

PROGRAM_USER, CHECKER_USER = 65534, 65533
LONGEST_ANSWER = 1 << 20  # bytes

libc = ctypes.CDLL(None)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096  # <sys/mount.h>
MS_RELATIME = 1 << 21
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38  # <sys/prctl.h>
CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>

def main():
    settings = types.SimpleNamespace(**json.loads(sys.argv[1]))
    for name in FOR_PROGRAMS:
        importlib.import_module(name)
    if settings.namespaces:
        close_disks()
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    token = secrets.token_hex(16)
    for_program, for_checker = socket.socketpair()
    program = fork(settings, PROGRAM_USER, for_program, run_program, token)
    code, test = json.load(sys.stdin)  # not before that fork, whose memory must hold no test
    checker = fork(settings, CHECKER_USER, for_checker, run_checker, token, code, test)
    verdict = watch(settings, checker)
    if not settings.namespaces:
        for pid in (program, checker):
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
    os.write(1, verdict)
    os._exit(0)  # the end of process 1 ends everything that the program started

def close_disks():
    """Makes every file system read-only, and puts 16 MB in memory over the working folder."""
    # A remount has to repeat the flags that a mount has. In statvfs they have the same bits, but
    # for relatime.
    repeated = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME
    with open("/proc/self/mountinfo") as f:
        mounts = f.read().splitlines()
    for line in mounts:
        place = line.split()[4].encode().decode("unicode_escape").encode("latin-1")  # \040: a space
        try:
            flags = os.statvfs(place).f_flag
        except OSError:
            continue  # what we do not reach the program does not reach either
        new_flags = MS_REMOUNT | MS_BIND | MS_RDONLY | flags & repeated
        if flags & os.ST_RELATIME:
            new_flags |= MS_RELATIME
        failed = libc.mount(None, place, None, new_flags, None)
        if failed and not os.statvfs(place).f_flag & os.ST_RDONLY:
            sys.exit(f"{os.fsdecode(place)} cannot be made read-only")
    folder, options = os.getcwd().encode(), b"size=16m,nr_inodes=1000,mode=777"
    if libc.mount(b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, options):
        sys.exit("the working folder cannot be put into memory")
    os.chdir(folder)

def fork(settings, user, channel, work, *args):
    """Calls work(settings, channel, *args) in a new process without rights. -> its process id"""
    leave = os._exit  # the program may replace the one in os
    pid = os.fork()
    if pid == 0:
        try:
            confine(settings, user, channel.fileno())
            work(settings, channel, *args)
        except BaseException:
            leave(1)
        leave(0)
    channel.close()  # or the other end would not notice that this process is gone
    return pid

def confine(settings, user, channel):
    """Takes from this process every open file but `channel` (a file descriptor), and its rights."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # 1 is the pipe of the verdict
        os.dup2(null, fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != channel:
            with contextlib.suppress(OSError):  # that of the listing is closed already
                os.close(fd)
    limits = {"CPU": int(settings.timeout) + 1, "AS": settings.memory, "FSIZE": 1 << 20,
              "NOFILE": 64, "CORE": 0, "NPROC": 64}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    # no setuid program helps, and no exec brings capabilities back
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if settings.become_nobody:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    elif user == PROGRAM_USER:
        # One user id for all. The program gives up its capabilities in the namespace; the checker
        # keeps them, and is out of the program's reach by that.
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        if libc.capset(header, (ctypes.c_uint32 * 6)()):
            os._exit(1)
    # Closes /proc/PID to others of the same user. Again, for setuid may have reset it.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)

def run_program(settings, channel, token):
    """Executes the code that the checker sends, says so with `token`, then answers calls.
    Line by line: "'def add(a, b): ...'" -> token;  "((1, 2), {})" -> "(None, 3)";
    "((1, 'x'), {})" -> "('TypeError', None)" """
    names, entry_point = {"__name__": "__main__"}, settings.entry_point
    requests = channel.makefile("r", encoding="utf-8")
    exec(compile(ast.literal_eval(requests.readline()), "program", "exec"), names)
    if entry_point and not callable(names.get(entry_point)):
        raise TypeError(f"{entry_point} is no function")
    channel.sendall(f"{token}\n".encode())
    for line in requests:
        args, keywords = ast.literal_eval(line)
        try:
            answer = None, plain(names[entry_point](*args, **keywords))
        except Exception as error:
            answer = type(error).__name__, None
        channel.sendall(f"{answer!r}\n".encode())

def plain(value):
    """The value as literals alone: an instance of a subclass becomes what its class derives from.
    examples: Counter("aab") -> {"a": 2, "b": 1};  Point(1, 2) -> (1, 2);  object() -> TypeError"""
    if value is None:
        return None
    if isinstance(value, dict):
        return {plain(key): plain(x) for key, x in value.items()}
    if isinstance(value, (set, frozenset)):  # no literal makes a frozenset
        return set(map(plain, value))
    for kind in (list, tuple):
        if isinstance(value, kind):
            return kind(map(plain, value))
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError("no literal")

def run_checker(settings, channel, token, code, test):
    """Sends the program its code, and calls check(candidate) of the test. Raises where it fails."""
    answers = channel.makefile("rb")

    def candidate(*args, **keywords):
        """Stands for the program's function."""
        try:
            channel.sendall(f"{(args, keywords)!r}\n".encode())
            error, value = ast.literal_eval(answers.readline(LONGEST_ANSWER).decode())
        except BaseException:
            os._exit(1)  # the program is gone or answers nonsense; no test may catch this
        if error is not None:
            raise exception_named(error)
        return value

    channel.sendall(f"{code!r}\n".encode())
    if answers.readline(100).decode().strip() != token:
        raise RuntimeError("the program did not come to its end")
    if settings.entry_point:
        names = {"__name__": "__main__"}
        exec(compile(test, "test", "exec"), names)
        names[settings.entry_point] = candidate
        names["check"](candidate)

def exception_named(name):
    """examples: "KeyError" -> KeyError();  "MyError", "print", "SystemExit" -> RuntimeError()"""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        return kind()
    return RuntimeError()

def watch(settings, checker):
    """Waits until the checker ends, the time is over or the memory is used up. -> the verdict"""
    deadline = time.monotonic() + settings.timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(checker, os.WNOHANG)
        if ended:
            return b"passed" if status == 0 else b"failed"
        if settings.namespaces and resident_bytes() > 2 * settings.memory:
            return b"too much memory"
        time.sleep(0.005)
    return b"timeout"

def resident_bytes():
    """What all processes of the namespace hold together; RLIMIT_AS holds for each of them alone."""
    pages = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        # it may have just ended
        with contextlib.suppress(OSError), open(f"/proc/{name}/statm") as f:
            pages += int(f.read().split()[1])
    return pages * resource.getpagesize()

if __name__ == "__main__":
    main()
