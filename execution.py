"""
Running what a model writes: the calculator of the conversations, and whole Python programs
(HumanEval) in a sandbox.

    calculate("12*3")                   # -> "36"
    calculate("'lantern'.count('n')")   # -> "2"
    run_python("assert 1 + 1 == 2")     # -> (True, "passed")
"""
import ast
import contextlib
import functools
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings

# -----------------------------------------------------------------------------
# the calculator: we walk the syntax tree, and Python never evaluates anything

LARGEST = 10 ** 15  # of any number on the way, so that nothing takes long


def power(base, exponent):
    if not (abs(exponent) <= 64 and abs(base) <= 1e6):
        raise ValueError("too large a power")
    return base ** exponent


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
}


def calculate(expression):
    """The value of an arithmetic expression (+ - * / // % ** and brackets) or of 'text'.count('x'),
    as text; None where the expression is anything else, too long, or has no value.
    examples: "(1+2)*3" -> "9";  "7/2" -> "3.5";  "1,000/4" -> "250";  "'hello'.count('l')" -> "2";
    "open('x')" -> None"""
    if len(expression) > 200:
        return None
    if "'" not in expression and '"' not in expression:
        expression = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", expression)  # 1,000 -> 1000
    try:
        with warnings.catch_warnings(action="ignore"):  # of strange literals
            value = walk(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError):
        return None
    if isinstance(value, int):
        return str(value)
    digits = f"{value:.6f}".rstrip("0").rstrip(".")
    return "0" if digits == "-0" else digits


def walk(node):
    """The value of a node of the syntax tree, an int or a float; ValueError for one not allowed."""
    match node:
        case ast.Constant(number) if type(number) in (int, float):  # a bool is an int too
            value = number
        case ast.UnaryOp(ast.USub(), operand):
            value = -walk(operand)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](walk(left), walk(right))
        case ast.Call(ast.Attribute(ast.Constant(str(text)), "count"), [ast.Constant(str(x))], []):
            value = text.count(x)
        case _:
            raise ValueError("not allowed")
    if isinstance(value, complex) or not abs(value) <= LARGEST:  # not <= also catches nan
        raise ValueError("too large")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# the sandbox

# Runs inside the namespaces, as their process 1. The program never shares a process with what judges it:
#   the program   (a fork) executes the code that a model wrote and answers calls of one function; it holds two pipes, nothing else
#   the checker   (a fork) executes the tests; the function it tests is a stub that sends arguments over and gets literals back
#   process 1     alone holds the pipe for the verdict, and looks at the checker's exit status, the clock and the memory
# So the program cannot write a verdict, see a test, patch the checker, or return an object that claims to equal everything.
# It can neither trace nor read the two others: it has another user (we are root) or no capabilities while they have some.
# Modules are imported before the rights are dropped, since nobody may not be allowed to read where Python is installed.
SUPERVISOR = r'''
import ast, builtins, contextlib, os, resource, secrets, signal, sys, time
import ctypes, socket, bisect, collections, copy, datetime, fractions, functools, hashlib, heapq, itertools, json, math, operator, random, re, shutil, statistics, string, threading, typing
verdict, timeout, memory, root, namespaces, entry = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True", sys.argv[5] == "True", sys.argv[6]
libc = ctypes.CDLL(None, use_errno=True)

def receive(n=None):  # n bytes, or a whole part of what the parent sends; nothing is read ahead, so that the program's fork holds no test
    if n is None: return receive(int.from_bytes(receive(8), "big"))
    got = b""
    while len(got) < n: got += os.read(0, n - len(got)) or os._exit(1)
    return got

def close_disks():  # every file system read-only; 16 MB in memory over the working folder
    # MS_REMOUNT | MS_BIND | MS_RDONLY with the flags a mount has (noatime and nodiratime are the same bits in both; relatime is not)
    for line in open("/proc/self/mountinfo").read().splitlines():
        place = line.split()[4].encode().decode("unicode_escape").encode("latin-1")
        try: flags = os.statvfs(place).f_flag
        except OSError: continue  # what we do not reach the program does not either
        kept = flags & (2 | 4 | 8 | 1024 | 2048) | (1 << 21 if flags & 4096 else 0)
        if libc.mount(None, place, None, 32 | 4096 | 1 | kept, None) and not os.statvfs(place).f_flag & 1:
            os.write(verdict, b"not run: a file system cannot be made read-only"); os._exit(1)
    here = os.getcwd().encode()
    if libc.mount(b"tmpfs", here, b"tmpfs", 2 | 4, b"size=16m,nr_inodes=1000,mode=777"):
        os.write(verdict, b"not run: no file system in memory"); os._exit(1)
    os.chdir(here)

def confine(keep, user):
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2): os.dup2(null, fd)
    for fd in map(int, os.listdir("/proc/self/fd")):  # the verdict's pipe among them
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError): os.close(fd)  # the listing's own is gone already
    limits = {"CPU": int(timeout) + 1, "AS": memory, "FSIZE": 1 << 20, "NOFILE": 64, "CORE": 0, "NPROC": 64}
    for name, value in limits.items(): resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no setuid program helps, and no exec brings capabilities back
    if root:
        os.setgroups([]); os.setgid(user); os.setuid(user)
    elif user == 65534 and libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):
        os._exit(1)  # one user only: the program gives up what rights it has inside the namespace, the checker keeps them
    libc.prctl(4, 0, 0, 0, 0)   # PR_SET_DUMPABLE: its /proc is closed to others of the same user
    os.environ.clear()

def plain(x):  # what may cross: literals; subclasses (Counter, defaultdict, namedtuple, ...) as what they derive from
    if isinstance(x, dict): return {plain(k): plain(v) for k, v in x.items()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(x, kind): return kind(map(plain, x)) if kind is not frozenset else set(map(plain, x))
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(x, kind): return kind(x)
    return None if x is None else (_ for _ in ()).throw(TypeError("no literal"))

def program(code, requests, replies, token):
    names, parse, write, exit = {"__name__": "__main__"}, ast.literal_eval, os.write, os._exit
    def send(text):
        data = text.encode() + b"\n"
        while data: data = data[write(replies, data):]
    try:
        exec(compile(code, "program", "exec"), names)
        if entry and not callable(names.get(entry)): exit(1)
        send(token)  # it came to its end
        for line in requests:
            args, keywords = parse(line)
            try: send("=" + repr(plain(names[entry](*args, **keywords))))
            except Exception as e: send("!" + type(e).__name__)
    except BaseException: exit(1)
    exit(0)

def checker(test, requests, replies, token):
    def candidate(*args, **keywords):
        requests.write((repr((args, keywords)) + "\n").encode()); requests.flush()
        reply = replies.readline(1 << 20).decode()
        if reply[:1] == "!":
            kind = getattr(builtins, reply[1:-1], None)
            raise kind() if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError()
        if reply[:1] != "=" or reply[-1:] != "\n": os._exit(1)  # the program is gone; no test may catch this
        return ast.literal_eval(reply[1:])
    if replies.readline(100).decode().strip() != token: os._exit(1)
    if entry:
        names = {"__name__": "__main__"}
        exec(compile(test, "test", "exec"), names)
        names[entry] = candidate
        names["check"](candidate)

if namespaces: close_disks()
libc.prctl(4, 0, 0, 0, 0)
code, token = receive(), secrets.token_hex(16)
(asked, ask), (answers, answer) = os.pipe(), os.pipe()
pid_program = os.fork()
if pid_program == 0:
    confine((asked, answer), 65534)
    program(code, os.fdopen(asked, "r"), answer, token)
os.close(asked); os.close(answer)
test = receive().decode(errors="replace")
pid_checker = os.fork()
if pid_checker == 0:
    try:
        confine((ask, answers), 65533)
        checker(test, os.fdopen(ask, "wb"), os.fdopen(answers, "rb"), token)
    except BaseException: os._exit(1)
    os._exit(0)
os.close(ask); os.close(answers)

def resident():  # bytes held by all processes of the namespace: the limits hold for each process alone
    total = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError): total += int(open(f"/proc/{name}/statm").read().split()[1]) * resource.getpagesize()
    return total
deadline, result, look = time.monotonic() + timeout, b"timeout", 0
while result == b"timeout" and time.monotonic() < deadline:
    done, status = os.waitpid(pid_checker, os.WNOHANG)
    look += 1
    if done: result = b"passed" if status == 0 else b"failed"
    elif namespaces and look % 10 == 0 and resident() > 2 * memory: result = b"too much memory"
    else: time.sleep(0.005)
os.write(verdict, result)
if not namespaces:
    for pid in (pid_program, pid_checker):
        with contextlib.suppress(OSError): os.killpg(pid, signal.SIGKILL)
os._exit(0)   # process 1 of the namespace ends, and with it everything that the program started
'''

NAMESPACES = ["--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--mount-proc"]

@functools.lru_cache(maxsize=1)
def sandbox_available():
    """(True, "") if this system lets us make the sandbox (a program is run in it to know), else (False, why)."""
    if not shutil.which("unshare"):
        return False, "there is no unshare program"
    trial = subprocess.run(["unshare", *user_namespace(), *NAMESPACES, "true"], capture_output=True, text=True)
    if trial.returncode != 0:
        return False, trial.stderr.strip()[:200]
    said = supervise("", "", "", 20.0, 512, namespaces=True)
    return said == "passed", "" if said == "passed" else said

def can_become_nobody():
    """Whether we are root with more than one user id: root of a namespace or container may have its own alone."""
    try:
        with open("/proc/self/uid_map") as f:
            return os.geteuid() == 0 and any(int(first) <= 65533 and 65534 < int(first) + int(n) for first, _, n in map(str.split, f))
    except OSError:
        return False

def user_namespace():
    return [] if can_become_nobody() else ["--user", "--map-root-user"]

def run_python(code, timeout=5.0, memory_mb=512, unsafe=False, test="", entry_point=""):
    """Runs a Python program. -> (True, "passed") if it came to its end without an exception, else (False, why).
    With `test`, Python code that defines check(candidate), the verdict is whether check(`entry_point` of the program) raises
    nothing; it runs in a process of its own, and only literals cross. Without `test` the program itself says that it came
    to its end, so code written against this very harness could say so too early.
    It runs in namespaces of its own (processes, network, mounts, users), as nobody when we are root, with limits on time,
    memory, file size and processes, all disks read-only, in an empty folder in memory, without our environment. Where the
    system refuses namespaces it is not run, unless `unsafe`: then only the limits and the empty environment protect us."""
    available, why = sandbox_available()
    if not available and not unsafe:
        return False, f"not run: no sandbox here ({why})"
    said = supervise(code, test, entry_point, timeout, memory_mb, available)
    return said == "passed", said

def supervise(code, test, entry_point, timeout, memory_mb, namespaces):
    """Starts the supervisor, feeds it, and returns its verdict as text ("the sandbox died" where it gave none)."""
    (read, write), folder = os.pipe(), tempfile.mkdtemp(prefix="sandbox-")
    os.chmod(folder, 0o777)
    command = [sys.executable, "-I", "-S", "-c", SUPERVISOR, str(write), str(timeout), str(memory_mb << 20),
               str(can_become_nobody()), str(namespaces), entry_point]
    if namespaces:
        command = ["unshare", *user_namespace(), *NAMESPACES, *command]
    parts = [part.encode(errors="replace") for part in (code, test)]
    process = None
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
                                   env={"PATH": "/usr/bin:/bin"}, pass_fds=[write], start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            process.communicate(b"".join(len(part).to_bytes(8, "big") + part for part in parts), timeout=timeout + 5)
        os.set_blocking(read, False)
        try:
            return os.read(read, 64).decode() or "the sandbox died"
        except BlockingIOError:
            return "the sandbox died"
    finally:
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(read)
        os.close(write)
        shutil.rmtree(folder, ignore_errors=True)
