"""
Running what a model writes: the calculator of the conversations, and whole Python programs
(HumanEval) in a sandbox.

    calculate("12*3")                   # -> "36"
    calculate("'lantern'.count('n')")   # -> "2"
    run_python("assert 1 + 1 == 2")     # -> (True, "passed")
"""
import ast
import functools
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

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
    return f"{value:z.6f}".rstrip("0").rstrip(".")  # z: no -0

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

# -----------------------------------------------------------------------------
# the sandbox: this process only starts it; what happens inside is in sandbox.py

SANDBOX = str(Path(__file__).with_name("sandbox.py"))
NAMESPACES = ["--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc"]

def run_python(code, timeout=5.0, unsafe=False, test="", entry_point=""):
    """Runs a Python program. -> (True, "passed") if it came to its end without an exception, else
    (False, why).
    With `test`, Python code that defines check(candidate), the verdict is whether
    check(`entry_point` of the program) raises nothing; it runs in a process of its own, and only
    literals cross. Without `test` the program itself says that it came to its end, so code written
    against this very harness could say so too early.
    It runs in namespaces of its own (processes, network, mounts, users), as nobody when we are
    root, with limits on time, memory, file size and processes, without our environment. Of the disk
    it sees Python's standard library, read-only, and an empty folder in memory. Where the system
    refuses namespaces it is not run, unless `unsafe`: then only the limits and the empty
    environment protect us."""
    available, why = sandbox_available()
    if not available and not unsafe:
        return False, f"not run: no sandbox here ({why})"
    verdict = supervise(code, test, entry_point, timeout, available)
    return verdict == "passed", verdict

def sandbox_available():
    """(True, "") if this system lets us make the sandbox, else (False, why)."""
    return tried(namespaces=True)

def can_run(unsafe):
    """(True, "") if programs can be run here, in the sandbox or, if `unsafe`, without it; else
    (False, why)."""
    available, why = sandbox_available()
    if available:
        return True, ""
    if not unsafe:
        return False, f"there is no sandbox here ({why}); --unsafe_exec=True runs them without"
    able, why_not = tried(namespaces=False)
    return able, "" if able else f"there is no sandbox here ({why}), and without it: {why_not}"

@functools.cache
def tried(namespaces):
    """Runs a right answer, to know whether any would be judged right. -> (True, "") or (False, why)
    """
    if namespaces and sys.platform != "linux":
        return False, f"{sys.platform} has no namespaces"
    if namespaces and not shutil.which("unshare"):
        return False, "there is no unshare program"
    verdict = supervise("def f(): return 1", "def check(f): assert f() == 1", "f", 20.0, namespaces)
    if verdict == "passed":
        return True, ""
    return False, verdict

def supervise(code, test, entry_point, timeout, namespaces):
    """Starts sandbox.py and feeds it. -> its verdict, or "the sandbox died: ..." without one"""
    become_nobody = can_become_nobody()
    settings = {"timeout": timeout, "namespaces": namespaces, "become_nobody": become_nobody,
                "entry_point": entry_point}
    command = [sys.executable, "-I", "-S", SANDBOX, json.dumps(settings)]
    if namespaces:
        users = [] if become_nobody else ["--user", "--map-root-user"]
        command = [shutil.which("unshare"), *users, *NAMESPACES, *command]
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)
        try:
            done = subprocess.run(command, input=json.dumps([code, test]), capture_output=True,
                                  check=False, text=True, errors="replace", cwd=folder,
                                  timeout=timeout + 5,
                                  env={"PATH": "/usr/bin:/bin"}, start_new_session=True)
        except subprocess.TimeoutExpired:  # it has killed unshare, and --kill-child all the others
            return "the sandbox died: it did not end in time"
    if done.stdout:
        return done.stdout
    said = done.stderr.strip().split("\n")
    # the last line of a traceback; unshare's first, behind which it explains how it is called
    return f"the sandbox died: {said[0] if said[0].startswith('unshare') else said[-1]}"

def can_become_nobody():
    """Whether we are root with the user id of nobody, 65534: root of a namespace or of a container
    may have its own alone."""
    if os.geteuid() != 0:
        return False
    uid_map = Path("/proc/self/uid_map")
    if not uid_map.exists():  # no Linux
        return True
    return sum(map(int, uid_map.read_text("utf-8").split()[2::3])) > 65534
