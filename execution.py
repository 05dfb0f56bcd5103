"""
Running what a model writes: the calculator of the conversations, and whole Python programs (HumanEval) in a sandbox.

    calculate("12*3")                   # -> "36"
    calculate("'lantern'.count('n')")   # -> "2"
    run_python("assert 1 + 1 == 2")     # -> (True, "passed")
"""
import ast
import functools
import operator
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time

# ---------------------------------------------------------------------------------------------------------------------
# the calculator: the syntax tree is walked with a list of what is allowed; nothing is ever evaluated by Python

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
LARGEST = 10 ** 15  # of any number on the way, so that nothing takes long

def calculate(expression):
    """
    The value of an arithmetic expression (+ - * / // % ** and brackets) or of 'text'.count('x'), as text; None where the
    expression is anything else, too long, or has no value.
    examples: "(1+2)*3" -> "9";  "7/2" -> "3.5";  "1,000/4" -> "250";  "'hello'.count('l')" -> "2";  "open('x')" -> None
    """
    if len(expression) > 200:
        return None
    if "'" not in expression and '"' not in expression:
        expression = expression.replace(",", "")
    try:
        value = walk(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.6f}".rstrip("0")
    return str(value)

def walk(node):
    """The value of a node of the syntax tree, an int or a float; ValueError for a node that is not allowed."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -walk(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](walk(node.left), walk(node.right))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, power = walk(node.left), walk(node.right)
        if not (abs(power) <= 64 and abs(base) <= 1e6):
            raise ValueError("too large a power")
        value = base ** power
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "count" and len(node.args) == 1 \
            and not node.keywords and all(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in (node.func.value, node.args[0])):
        value = node.func.value.value.count(node.args[0].value)
    else:
        raise ValueError("not allowed")
    if isinstance(value, complex) or not abs(value) <= LARGEST:  # not <= also catches nan
        raise ValueError("too large")
    return value

# ---------------------------------------------------------------------------------------------------------------------
# the sandbox

# What runs the program inside the sandbox. It is the first process of its own process namespace and alone holds the pipe for
# the verdict; the program runs in a fork of it, in its own session, with limits. "passed" needs the exit status 0 and a
# secret that is written behind the program's last line, so a program that exits early with 0 has not passed. (The secret
# lies in the memory of the program: code that is written against this very harness could find it.)
# Modules are imported before the rights are dropped, since nobody may not be allowed to read where Python is installed.
SUPERVISOR = r'''
import os, resource, signal, sys, time
import ctypes, socket, bisect, collections, copy, datetime, fractions, functools, hashlib, heapq, itertools, json, math, operator, random, re, shutil, statistics, string, threading, typing
verdict, timeout, memory, user = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
code, secret = sys.stdin.buffer.read().split(b"\0", 1)
end_read, end_write = os.pipe()
pid = os.fork()
if pid == 0:
    os.setsid()
    os.close(verdict); os.close(end_read)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2): os.dup2(null, fd)
    limits = {"CPU": int(timeout) + 1, "AS": memory, "FSIZE": 1 << 20, "NOFILE": 64, "CORE": 0, "NPROC": 64}
    for name, value in limits.items(): resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    if user:
        os.setgroups([]); os.setgid(user); os.setuid(user)
    os.environ.clear()
    ctypes.CDLL(None).prctl(4, 0)   # PR_SET_DUMPABLE: nobody of the same user may trace or read this process
    exit, write, fd = os._exit, os.write, end_write
    program = compile(code, "program", "exec")
    del code
    names = {"__name__": "__main__"}
    def run(program, names): exec(program, names)
    try:
        run(program, names)
        write(fd, secret)
    except BaseException:
        exit(1)
    exit(0)
os.close(end_write)
deadline, status = time.time() + timeout, None
while time.time() < deadline:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done: break
    time.sleep(0.005)
else:
    status = None
os.set_blocking(end_read, False)
try: said = os.read(end_read, 64)
except BlockingIOError: said = b""
result = b"timeout" if status is None else b"passed" if status == 0 and said == secret else b"failed"
os.write(verdict, result)
os._exit(0)   # process 1 of the namespace ends, and with it everything that the program started
'''

NAMESPACES = ["--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--mount-proc"]

@functools.lru_cache(maxsize=1)
def sandbox_available():
    """(True, "") if this system lets us make the namespaces, else (False, why)."""
    if not shutil.which("unshare"):
        return False, "there is no unshare program"
    as_root = os.geteuid() == 0
    trial = subprocess.run(["unshare", *(n for n in NAMESPACES if not (as_root and n in ("--user", "--map-root-user"))), "true"], capture_output=True, text=True)
    return trial.returncode == 0, trial.stderr.strip()[:200]

def run_python(code, timeout=5.0, memory_mb=512, unsafe=False):
    """
    Runs a Python program. -> (True, "passed") if it came to its end without an exception, else (False, why).
    It runs in namespaces of its own (processes, network, mounts, users), as nobody when we are root, with limits on time,
    memory, file size and processes, in an empty folder, without our environment. Where the system refuses namespaces it
    is not run, unless `unsafe`: then only the limits, the session and the empty environment protect this machine.
    """
    available, why = sandbox_available()
    if not available and not unsafe:
        return False, f"not run: no sandbox here ({why})"
    as_root = os.geteuid() == 0
    secret = secrets.token_hex(16).encode()
    read, write = os.pipe()
    folder = tempfile.mkdtemp(prefix="sandbox-")
    command = [sys.executable, "-I", "-S", "-c", SUPERVISOR, str(write), str(timeout), str(memory_mb << 20), "65534" if as_root else "0"]
    if available:
        command = ["unshare", *(n for n in NAMESPACES if not (as_root and n in ("--user", "--map-root-user"))), *command]
    os.chmod(folder, 0o777)
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
                                   env={"PATH": "/usr/bin:/bin"}, pass_fds=[write], start_new_session=True)
        os.close(write)
        write = None
        try:
            process.communicate(code.encode(errors="replace").replace(b"\0", b"") + b"\0" + secret, timeout=timeout + 5)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            pass
        os.set_blocking(read, False)
        try:
            verdict = os.read(read, 64).decode()
        except BlockingIOError:
            verdict = ""
        return verdict == "passed", verdict or "the sandbox died"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError, UnboundLocalError):
            pass
        process.wait()
        os.close(read)
        if write is not None:
            os.close(write)
        shutil.rmtree(folder, ignore_errors=True)
