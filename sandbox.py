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

All that a program sees of the disk is Python's standard library, /dev/null and a folder in memory.
So no file, pipe or socket of the host can be reached by its path, whoever has started the sandbox.

Why the supervisor does not run the test itself: an answer may keep a test inside one C call for
hours (3 ** answer), or may use up the memory of its process. No thread and no signal handler of
that process would then look at the clock or at the memory of the program's children.
"""
import ast
import builtins
import collections
import contextlib
import ctypes
import decimal
import fractions
import importlib
import json
import math
import os
import resource
import signal
import socket
import sys
import time
import types

# Imported before: a program sees the modules of Python, but no shared library that they may need.
FOR_PROGRAMS = ["bisect", "collections", "copy", "datetime", "fractions", "functools", "hashlib",
                "heapq", "itertools", "math", "operator", "random", "re", "shutil", "statistics",
                "string", "threading", "typing"]

NOBODY = 65534
MEMORY = 512 << 20  # bytes of each process; of all together twice as many

libc = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # <sys/mount.h>
MS_REMOUNT, MS_BIND, MNT_DETACH = 32, 4096, 2
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 36, 38  # <sys/prctl.h>
CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>
KEYCTL = {"x86_64": 250, "aarch64": 219}  # number of the system call, <asm/unistd.h>
KEYCTL_JOIN_SESSION_KEYRING = 1  # <linux/keyctl.h>
NOT_CONFINED = 3  # exit code of a process that could not give up its rights

settings = types.SimpleNamespace(**json.loads(sys.argv[1]))  # see execution.supervise

def main():
    for name in FOR_PROGRAMS:
        importlib.import_module(name)
    if settings.namespaces:
        leave_the_disk()
        leave_the_keys()
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for_program, for_checker = socket.socketpair()
    program = fork(for_program, run_program)
    code, test = json.load(sys.stdin)  # not before that fork, whose memory must hold no test
    checker = fork(for_checker, run_checker, code, test)
    os.write(1, watch(checker))
    if not settings.namespaces:  # with them our end, process 1's, ends all the others
        end_descendants(program)

def prctl(option, value):
    """prctl(2), which Linux alone has."""
    if hasattr(libc, "prctl"):
        libc.prctl(option, value, 0, 0, 0)

def mount(source, place, kind, flags, options=""):
    """mount(2); ends the process with the reason where it is refused."""
    if libc.mount(source.encode(), os.fsencode(place), kind.encode(), flags, options.encode()):
        sys.exit(f"cannot mount {kind or source} on {place}: {os.strerror(ctypes.get_errno())}")

def leave_the_disk():
    """Puts a new root, in memory, in the place of the old one, which nobody here can reach then:
    /proc of these namespaces, for resident_bytes(), and /view, the root of the two others."""
    if os.getpid() != 1:
        sys.exit("started outside of namespaces, where this would be done to the whole system")
    root = os.getcwd()
    safe = MS_NOSUID | MS_NODEV
    mount("tmpfs", root, "tmpfs", safe, "size=1m,nr_inodes=1000,mode=755")
    for folder in ("proc", "view", "view/sandbox"):
        os.mkdir(f"{root}/{folder}")
    for path in (*sys.path, os.devnull):  # without site, sys.path is the standard library
        show(path, f"{root}/view{path}")
    mount("proc", f"{root}/proc", "proc", safe | MS_NOEXEC | MS_RDONLY)
    mount("tmpfs", f"{root}/view/sandbox", "tmpfs", safe | MS_NOEXEC,
          "size=16m,nr_inodes=1000,mode=777")
    mount("", root, "", MS_REMOUNT | MS_BIND | MS_RDONLY | safe)
    os.chdir(root)
    if libc.pivot_root(b".", b".") or libc.umount2(b".", MNT_DETACH):  # see pivot_root(2)
        sys.exit(f"cannot leave the disk: {os.strerror(ctypes.get_errno())}")
    os.chdir("/")

def leave_the_keys():
    """Changes to an empty session keyring: the user's may hold tickets and passwords."""
    number = KEYCTL.get(os.uname().machine)
    if number:
        libc.syscall(number, KEYCTL_JOIN_SESSION_KEYRING, None)

def show(path, place):
    """Makes a file or folder of the disk visible at `place`, read-only."""
    if os.path.exists(place) or not os.path.exists(path):
        return  # it lies in a folder that is shown already; or the zip file, which few Pythons have
    os.makedirs(os.path.dirname(place), exist_ok=True)
    flags = MS_NOSUID
    if os.path.isdir(path):
        os.mkdir(place)
        flags |= MS_NODEV
    else:
        open(place, "xb").close()
    mount(path, place, "", MS_BIND)
    # a remount has to repeat the flags of that disk, which have the same bits in statvfs
    flags |= os.statvfs(place).f_flag & (MS_NODEV | MS_NOEXEC)
    mount("", place, "", MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
    for packages in (f"{place}/site-packages", f"{place}/dist-packages"):
        if os.path.exists(packages):
            mount("tmpfs", packages, "tmpfs", MS_RDONLY, "size=4k")

def fork(channel, work, *args):
    """Calls work(channel, *args) in a new process without rights. -> its process id"""
    pid = os.fork()
    if pid == 0:
        code = NOT_CONFINED
        try:
            confine(channel.fileno())
            code = 1
            work(channel, *args)
            code = 0
        except Exception as error:  # of confine(): what comes later has no standard error
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    channel.close()  # or the other end would not notice that this process is gone
    return pid

def confine(channel):
    """Takes from this process every open file but `channel` (a file descriptor), and its rights.
    OSError where it cannot. Without namespaces it does what the system can."""
    if settings.namespaces:
        os.chroot("/view")  # where nobody can make a namespace of users to get new rights in
        os.chdir("/sandbox")
    os.setpgid(0, 0)  # a group of its own, see end_descendants
    limits = {"CPU": int(settings.timeout) + 1, "AS": MEMORY, "FSIZE": 1 << 20, "NPROC": 64}
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (AttributeError, ValueError, OSError):  # macOS knows, but refuses, some
            if settings.namespaces:
                raise
    # no setuid program helps, and no exec brings capabilities back
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if settings.become_nobody:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if hasattr(libc, "capset"):
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        if libc.capset(header, (ctypes.c_uint32 * 6)()):
            raise OSError(f"cannot drop capabilities: {os.strerror(ctypes.get_errno())}")
    # Closes /proc/PID to others of the same user. Again, for setuid may have reset it.
    prctl(PR_SET_DUMPABLE, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # 1 is the pipe of the verdict
        os.dup2(null, fd)
    os.closerange(3, channel)
    os.closerange(channel + 1, 1024)

def run_program(channel):
    """Answers the checker: executes the code that it sends, then calls its function.
    Line by line: "'def add(a, b): ...'" -> "(None, None)";  "((1, 2), {})" -> "(None, 3)";
    "((1, 'x'), {})" -> "('TypeError', None)" """
    names = {"__name__": "__main__"}
    for line in channel.makefile("r", encoding="utf-8"):
        request = read(line)
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
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(map(plain, value))
    return value  # what read() does not know the checker does not take

# what has a repr that is no literal
NUMBERS = {"inf": math.inf, "nan": math.nan, "infj": complex(0, math.inf),
           "nanj": complex(0, math.nan)}
KINDS = {"set": set, "frozenset": frozenset, "bytearray": bytearray, "range": range,
         "deque": collections.deque, "Fraction": fractions.Fraction, "Decimal": decimal.Decimal}

class ToLiterals(ast.NodeTransformer):
    """Puts the values in the place of the names above. Another name is a KeyError."""
    def visit_Name(self, node):
        return ast.Constant(NUMBERS[node.id])

    def visit_Call(self, node):
        args = [ast.literal_eval(self.visit(arg)) for arg in node.args]
        return ast.Constant(KINDS[node.func.id](*args))

def read(line):
    """A line with the repr of a value -> the value, made of these kinds alone; nothing is executed.
    examples: "[1, -inf]" -> [1, -inf];  "Fraction(1, 2)" -> Fraction(1, 2);  "open('x')" -> an
    exception"""
    return ast.literal_eval(ToLiterals().visit(ast.parse(line, mode="eval")))

def run_checker(channel, code, test):
    """Sends the program its code, and calls check(candidate) of the test. Raises where it fails."""
    answers = channel.makefile("r", encoding="utf-8")

    def ask(request):
        try:
            channel.sendall(f"{request!r}\n".encode())
            error, value = read(answers.readline())
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
            if os.waitstatus_to_exitcode(status) == NOT_CONFINED:
                return b""
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
        with contextlib.suppress(OSError), open(f"/proc/{name}/statm", "rb") as f:
            pages += int(f.read().split()[1])
    return pages * resource.getpagesize()

def end_descendants(program):
    """Kills all that the program (a process id) has started: first its group, at once, for it may
    fork faster than one can kill; then, one by one, what has left the group. That has become this
    process's child, as the subreaper's, when its parent died, so no child left is nobody left."""
    with contextlib.suppress(OSError):
        os.killpg(program, signal.SIGKILL)
    with contextlib.suppress(OSError):  # none is left; or there is no such list, as on macOS
        while True:
            with open("/proc/thread-self/children", "rb") as f:
                children = f.read().split()
            for pid in children:
                os.kill(int(pid), signal.SIGKILL)
            os.waitpid(-1, 0)

if __name__ == "__main__":
    main()
