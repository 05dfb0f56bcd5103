"""
The inside of the sandbox: judges one Python program that a model wrote. Only execution.py starts it

    unshare ... python -I -S sandbox.py '{"timeout": 5.0, ...}'

and sends '["the program", "its test"]' to its standard input. It answers on its standard output:
"passed", "failed", "timeout" or "too much memory". What is wrong with the sandbox itself goes to
standard error, without a verdict. Three processes take part:

    supervisor   this one, process 1 of the namespaces. It alone holds the pipe of the verdict, and
                 looks at the checker's exit status, the clock and the memory.
    program      a fork that executes the code and answers calls of its function. All it has open is
                 a socket to the checker.
    checker      a fork that executes the test. The function under test is a stub there: it sends
                 the arguments to the program and gets a literal back.

So a program cannot forge a verdict. It cannot write one. It cannot see a test, which is read after
the program's fork. It cannot patch what judges it, nor return an object that equals everything. And
it can neither trace nor read the two others: they are not dumpable, and it has no capabilities.

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
import signal
import socket
import sys
import time
import types

# Imported before rights are dropped: nobody may not be allowed to read where Python is installed.
FOR_PROGRAMS = ["bisect", "collections", "copy", "datetime", "fractions", "functools", "hashlib",
                "heapq", "itertools", "math", "operator", "random", "re", "shutil", "statistics",
                "string", "threading", "typing"]

NOBODY = 65534
MEMORY = 512 << 20  # bytes of each process; of all together twice as many

libc = ctypes.CDLL(None)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # <sys/mount.h>
MS_REMOUNT, MS_BIND = 32, 4096
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 36, 38  # <sys/prctl.h>
CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>

settings = types.SimpleNamespace(**json.loads(sys.argv[1]))  # see execution.supervise

def main():
    for name in FOR_PROGRAMS:
        importlib.import_module(name)
    if settings.namespaces:
        close_disks()
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for_program, for_checker = socket.socketpair()
    program = fork(for_program, run_program)
    code, test = json.load(sys.stdin)  # not before that fork, whose memory must hold no test
    checker = fork(for_checker, run_checker, code, test)
    os.write(1, watch(checker))
    if not settings.namespaces:  # with them our end, process 1's, ends all the others
        end_descendants(program)

def close_disks():
    """Makes every file system read-only, and puts 16 MB in memory over the working folder."""
    # one by one: mount_setattr, which takes all at once, is missing in the Linux of many a cluster
    with open("/proc/self/mountinfo") as f:
        mounts = f.read().splitlines()
    for line in mounts:
        place = line.split()[4].encode().decode("unicode_escape").encode("latin-1")  # \040: a space
        try:
            flags = os.statvfs(place).f_flag
        except OSError:
            continue  # what we do not reach the program does not reach either
        # a remount has to repeat these flags, which have the same bits in statvfs
        flags &= MS_NOSUID | MS_NODEV | MS_NOEXEC
        libc.mount(None, place, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags, None)
        if not os.statvfs(place).f_flag & MS_RDONLY:
            sys.exit(f"{os.fsdecode(place)} cannot be made read-only")
    folder = os.getcwd().encode()
    options = b"size=16m,nr_inodes=1000,mode=777"
    if libc.mount(b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, options):
        sys.exit("the working folder cannot be put into memory")
    os.chdir(folder)

def fork(channel, work, *args):
    """Calls work(channel, *args) in a new process without rights. -> its process id"""
    pid = os.fork()
    if pid == 0:
        try:
            confine(channel.fileno())
            work(channel, *args)
            os._exit(0)
        finally:
            os._exit(1)
    channel.close()  # or the other end would not notice that this process is gone
    return pid

def confine(channel):
    """Takes from this process every open file but `channel` (a file descriptor), and its rights."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # 1 is the pipe of the verdict
        os.dup2(null, fd)
    os.closerange(3, channel)
    os.closerange(channel + 1, 1024)
    os.setpgid(0, 0)  # a group of its own, see end_descendants
    limits = {"CPU": int(settings.timeout) + 1, "AS": MEMORY, "FSIZE": 1 << 20, "NPROC": 64}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    # no setuid program helps, and no exec brings capabilities back
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if settings.become_nobody:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()):
        os._exit(1)
    # Closes /proc/PID to others of the same user. Again, for setuid may have reset it.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)

def run_program(channel):
    """Answers the checker: executes the code that it sends, then calls its function.
    Line by line: "'def add(a, b): ...'" -> "(None, None)";  "((1, 2), {})" -> "(None, 3)";
    "((1, 'x'), {})" -> "('TypeError', None)" """
    names = {"__name__": "__main__"}
    for line in channel.makefile("r", encoding="utf-8"):
        request = ast.literal_eval(line)
        answer = None, None
        try:
            if isinstance(request, str):
                exec(compile(request, "program", "exec"), names)
            else:
                args, keywords = request
                answer = None, plain(names[settings.entry_point](*args, **keywords))
        except Exception as error:
            answer = type(error).__name__, None
        channel.sendall(f"{answer!r}\n".encode())

def plain(value):
    """The value as literals alone: an instance of a subclass becomes what its class derives from.
    examples: Counter("aab") -> {"a": 2, "b": 1};  Point(1, 2) -> (1, 2)"""
    if isinstance(value, dict):
        return {plain(key): plain(x) for key, x in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(plain, value))
    return value  # what is no literal the checker does not take

def run_checker(channel, code, test):
    """Sends the program its code, and calls check(candidate) of the test. Raises where it fails."""
    answers = channel.makefile("r", encoding="utf-8")

    def ask(request):
        try:
            channel.sendall(f"{request!r}\n".encode())
            error, value = ast.literal_eval(answers.readline())
        except BaseException:
            os._exit(1)  # the program is gone or answers nonsense; no test may catch this
        if error is not None:
            raise getattr(builtins, error, RuntimeError)  # no exception: a TypeError
        return value

    def candidate(*args, **keywords):
        """Stands for the program's function."""
        return ask((args, keywords))

    ask(code)
    if test:
        names = {"__name__": "__main__"}
        exec(compile(test, "test", "exec"), names)
        names[settings.entry_point] = candidate
        names["check"](candidate)

def watch(checker):
    """Waits until the checker ends, the time is over or the memory is used up. -> the verdict"""
    deadline = time.monotonic() + settings.timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(checker, os.WNOHANG)
        if ended:
            return b"passed" if status == 0 else b"failed"
        if settings.namespaces and resident_bytes() > 2 * MEMORY:
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

def end_descendants(program):
    """Kills all that the program (a process id) has started: first its group, at once, for it may
    fork faster than one can kill; then, one by one, what has left the group. That has become this
    process's child, as the subreaper's, when its parent died, so no child left is nobody left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            with open("/proc/thread-self/children") as f:
                children = f.read().split()
            for pid in children:
                os.kill(int(pid), signal.SIGKILL)
            os.waitpid(-1, 0)

if __name__ == "__main__":
    main()
