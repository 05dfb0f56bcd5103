"""execution.py, sandbox.py: the calculator takes arithmetic and nothing else; hostile programs fail
and harm nothing."""
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import execution
from execution import SANDBOX, calculate, run_python, sandbox_available

REPO = Path(SANDBOX).parent

@pytest.mark.parametrize("expression,value", [
    ("1+1", "2"), ("(1+2)*3", "9"), ("7/2", "3.5"), ("8/2", "4"), ("1,000/4", "250"), ("-3+5", "2"),
    ("2**10", "1024"), ("7//2", "3"), ("7%4", "3"), ("'hello'.count('l')", "2"),
    ('"a,b,c".count(",")', "2"), ("0.1+0.2", "0.3"), (" 3 * 4 ", "12"), ("1/10000000", "0"),
    ("-1/10000000", "0"), ("2.0000001+1", "3"), ("1,234,567+1", "1234568"), ("-2**2", "-4"),
    (".5*8", "4")])
def test_what_the_calculator_computes(expression, value):
    assert calculate(expression) == value

@pytest.mark.parametrize("expression", [
    "", "x", "1+", "open('/etc/passwd')", "__import__('os')", "9**9**9", "2**100000", "10**60",
    "(1).__class__", "'a'*1000000000", "[1]*9", "1 if 1 else 2", "'a'.upper()", "'a'.count",
    "'a'.count('b', 0)", "'a'.count(sub='b')", "1/0", "1e308*10", "lambda: 1", "1;2",
    "(" * 90 + ")" * 90, "1+" * 5000 + "1", "True+1", "(-8)**0.5", "'x'.__class__.count('x')",
    "f'{1}'.count('1')", "1\n2", "\0", "nan", "0**-1", "1,2", "1,23+4", "9**9**9**9",
    "(9**9)**(9**9)", "'a'*10**9", "'a'.count('a')*10**16", "[].__class__", "'a'.count(b'a')",
    "'a'.join('b')", "~1", "1<<1000000", "1j", "...", "'\ud800'.count(x)", "9" * 199, "not 1",
    "1<2", "(x:=1)", "'a' 'b'.count", "*1", "{}", "`1`"])
def test_what_it_refuses(expression):
    t0 = time.time()
    assert calculate(expression) is None
    assert time.time() - t0 < 5.0

needs_sandbox = pytest.mark.skipif(not sandbox_available()[0],
                                   reason=f"no namespaces here: {sandbox_available()[1]}")

@needs_sandbox
def test_right_and_wrong_programs():
    assert run_python("assert sum([1, 2]) == 3") == (True, "passed")
    imports = "import math, json, collections\nassert math.sqrt(4) == 2"
    assert run_python(imports) == (True, "passed")
    assert run_python("assert 1 == 2") == (False, "failed")
    assert run_python("def f(:") == (False, "failed")

ATTACKS = {
    "exit 0 early": "import os\nos._exit(0)",
    "sys.exit 0": "import sys\nsys.exit(0)",
    "raise SystemExit": "raise SystemExit(0)",
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(1000)",
    "endless output": "while True: print('x' * 10000)",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(10 ** 7))",
    "fork bomb": "import os\nwhile True: os.fork()",
    "threads without end": """
import threading, time
while True: threading.Thread(target=time.sleep, args=(1000,)).start()""",
    "prints the marker": "print('passed')\nimport os\nos.write(1, b'passed')\nos._exit(0)",
    "writes the marker into every file": """
import os
for fd in range(64):
    try: os.write(fd, b'passed')
    except OSError: pass
os._exit(0)""",
    "patches os._exit": """
import os
os._exit = lambda code: None
os.write = lambda *a: None
assert False""",
    "patches builtins": """
import builtins
builtins.AssertionError = KeyError
builtins.BaseException = KeyError
assert 1 == 2""",
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\nassert False",
    "kills the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nassert False",
    "kills process 1": "import os, signal\nos.kill(1, signal.SIGKILL)\nos._exit(0)",
    "recursion without end": "def f(): f()\nf()",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "a file of 1 GB": "open('big', 'wb').write(b'x' * 2 ** 30)\nassert False",
    "looks for the marker in the frames": """
import sys, os
f, seen = sys._getframe(), []
while f:
    seen += [*f.f_globals.items(), *f.f_locals.items()]
    f = f.f_back
for k, v in seen:
    for data in (str(v).encode() + b'\\n', b'passed'):
        for fd in range(64):
            try: os.write(fd, data)
            except OSError: pass
os._exit(0)""",
    "reads every environment": """
import os
found = [str(os.environ)]
for p in range(1, 30):
    try: found.append(open(f'/proc/{p}/environ').read())
    except OSError: pass
assert any('HOME' in f or 'USER' in f for f in found)""",
    "opens sockets": """
import socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
    for address in ('192.0.2.1', '1.1.1.1'):
        s = socket.socket(socket.AF_INET, kind)
        s.settimeout(1)
        try: s.connect((address, 53)); reached = True
        except OSError: pass
reached""",
    "leaves a child behind": "import os, time\nif os.fork() == 0: time.sleep(1000)\nos._exit(0)",
}

HONEST = "def f(x): return x + 1\n"
CHECK = """
def f(x): pass
def check(candidate):
    assert candidate(1) == 2 and f(2) == 3
    assert candidate(candidate(5)) == 7
"""
CROSSING = """
import collections
Point = collections.namedtuple('Point', 'x y')
def f(k):
    return {'a': collections.Counter('aab'), 'b': Point(1, 'x\\n'), 'c': {1, 2}, 'd': set(),
            'e': None, 'f': [True, 2.5, b'z']}[k]
"""
CHECK_CROSSING = """
def check(c):
    assert c('a') == {'a': 2, 'b': 1} and c('b') == (1, 'x\\n') and c('c') == {1, 2}
    assert c('d') == set() and c('e') is None and c('f') == [True, 2.5, b'z']
    try: c('nothing')
    except KeyError: return
    assert False
"""

@needs_sandbox
def test_a_function_is_judged_by_tests_in_another_process():
    assert run_python(HONEST, test=CHECK, entry_point="f") == (True, "passed")
    assert run_python("def f(x): return x", test=CHECK, entry_point="f") == (False, "failed")
    assert run_python("f = 3", test=CHECK, entry_point="f") == (False, "failed")
    assert run_python(CROSSING, test=CHECK_CROSSING, entry_point="f") == (True, "passed")

NO_LITERALS = """
import collections, decimal, fractions, math
def f(kind, *args):
    inf, nan = float('inf'), float('nan')
    if kind == 'same': return args[0]
    return {'inf': inf, 'list': [1, -inf, {'a': (inf, [nan])}], 'complex': complex(-inf, nan),
            'nan': nan, 'keys': {inf: 1}, 'word': 'inf nan(1)', 'set': {-inf, 2.5},
            'frozen': frozenset({frozenset(), inf}), 'half': fractions.Fraction(1, 2),
            'decimal': [decimal.Decimal('0.1'), decimal.Decimal('Infinity')], 'range': range(3),
            'deque': collections.deque([1, inf]), 'bytes': bytearray(b'x')}[kind]
"""
CHECK_NO_LITERALS = """
import collections, fractions, math
from decimal import Decimal
def check(c):
    inf = math.inf
    assert c('inf') == inf and math.isnan(c('nan')) and c('word') == 'inf nan(1)'
    one, least, rest = c('list')
    assert (one, least, rest['a'][0]) == (1, -inf, inf) and math.isnan(rest['a'][1][0])
    assert c('complex').real == -inf and math.isnan(c('complex').imag)
    assert c('keys') == {inf: 1} and c('set') == {-inf, 2.5}
    assert c('frozen') == {frozenset(), inf} and c('half') == 0.5
    assert c('decimal') == [Decimal('0.1'), Decimal('Infinity')]
    assert list(c('range')) == [0, 1, 2] and c('deque') == collections.deque([1, inf])
    assert c('bytes') == b'x'
    for value in (inf, [-inf], (inf, complex(0, -inf)), {frozenset({1}): fractions.Fraction(1, 3)}):
        assert c('same', value) == value
    assert math.isnan(c('same', [math.nan])[0]) and c('inf') != -inf and c('nan') != c('nan')
"""

@needs_sandbox
def test_right_answers_that_are_no_literals_count():
    right = run_python(NO_LITERALS, test=CHECK_NO_LITERALS, entry_point="f")
    assert right == (True, "passed")
    largest = "def f(x): return max(x, default=float('-inf'))"
    for answer, verdict in (("-inf", True), ("inf", False), ("0", False)):
        test = f"def check(f): assert f([]) == float({answer!r})"
        assert run_python(largest, test=test, entry_point="f")[0] is verdict

# programs that know how they are judged: each claims to pass without solving anything
FORGERIES = {
    "equals everything": """
class E(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def f(x): return E()""",
    "a repr that says more": """
class E:
    def __repr__(self): return '2'
def f(x): return E()""",
    "an object with any attribute": """
class E:
    def __getattr__(self, name): return lambda *a: True
def f(x): return E()""",
    # the word that it looks for is joined, or it would find itself
    "looks for the tests in memory": """
import gc, sys
def f(x):
    word = 'candidate'.join(['', '(1)'])
    if any(word in str(o)[:2000] for o in gc.get_objects()): return x + 1
    fr = sys._getframe().f_back
    while fr:
        for values in (fr.f_globals.values(), fr.f_locals.values()):
            if any(word in str(v) for v in values): return x + 1
        fr = fr.f_back
    return None""",
    "reads the other processes": """
import os
def f(x):
    for p in range(1, 30):
        if p != os.getpid():
            try: open(f'/proc/{p}/mem', 'rb'); return x + 1
            except OSError: pass
    return None""",
    "opens the pipes of the other processes": """
import os
def f(x):
    for p in range(1, 30):
        if p != os.getpid():
            for n in range(64):
                try: fd = os.open(f'/proc/{p}/fd/{n}', os.O_WRONLY)
                except OSError: continue
                os.write(fd, b'passed')
    return None""",
    "traces the other processes": """
import ctypes, os
libc = ctypes.CDLL(None)
def f(x):
    for p in range(1, 30):
        if p != os.getpid() and libc.ptrace(16, p, 0, 0) == 0:
            return x + 1
    return None""",
    "copies what the other processes hold": """
import ctypes, os
libc = ctypes.CDLL(None)
class Part(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
def f(x):
    mine = ctypes.create_string_buffer(8)
    here, there = Part(ctypes.addressof(mine), 8), Part(id(os), 8)
    for p in range(1, 30):
        if p != os.getpid():
            parts = ctypes.byref(here), 1, ctypes.byref(there), 1, 0
            if libc.process_vm_readv(p, *parts) > 0: return x + 1
            pidfd = libc.syscall(434, p, 0)
            if any(libc.syscall(438, pidfd, fd, 0) >= 0 for fd in range(20)): return x + 1
    return None""",
    "answers before it is asked": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'(None, None)\\n' + b'(None, 2)\\n' * 50)
    except OSError: pass
def f(x): return 2""",
    "raises what would end the checker": """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b"('SystemExit', None)\\n")
        except OSError: pass""",
    "kills its process group": "import os\ndef f(x): os.killpg(0, 9)",
    "stops the others and waits": """
import os, time
def f(x):
    for p in (1, os.getppid(), os.getpid() + 1):
        try: os.kill(p, 19)
        except OSError: pass
    time.sleep(100)""",
    "kills the checker": """
import os
def f(x):
    for p in range(2, 30):
        if p != os.getpid():
            try: os.kill(p, 9)
            except OSError: pass
    os._exit(0)""",
    "answers with what is no literal": """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'=__import__("os")._exit(0)\\n' * 3)
        except OSError: pass""",
    "answers with a call": """
import os
def f(x):
    for fd in range(3, 64):
        for said in (b'(None, exit(0))', b'(None, set.__class__(2))', b'(None, range)'):
            try: os.write(fd, said + b'\\n')
            except OSError: pass
    os._exit(0)""",
    "answers without end": """
import os
def f(x):
    for fd in range(3, 64):
        try:
            while True: os.write(fd, b'=' + b'9' * 60000)
        except OSError: pass""",
    "a deep answer": """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'=' + b'[' * 50000 + b'\\n')
        except OSError: pass""",
    "patches what the tests use": """
import builtins, ast
builtins.repr = lambda x: '2'
builtins.AssertionError = KeyError
ast.literal_eval = lambda s: 2
def f(x): raise SystemExit(0)""",
    "raises what tests might expect": "def f(x): raise StopIteration",
    "exits when called": "import os\ndef f(x): os._exit(0)",
    "never answers": "def f(x):\n    while True: pass",
    "makes a namespace of its own": """
import ctypes
def f(x):
    libc = ctypes.CDLL(None)
    if libc.unshare(0x20000) == 0 or libc.mount(b'none', b'/', None, 32 | 4096, None) == 0:
        return x + 1
    return None""",
    "memory bomb of many processes": """
import os, time
def f(x):
    for _ in range(20):
        if os.fork() == 0:
            b = bytearray(300 << 20)
            for i in range(0, len(b), 4096): b[i] = 1
            time.sleep(100)
    time.sleep(100)""",
}

@needs_sandbox
@pytest.mark.parametrize("name", FORGERIES)
def test_no_program_can_forge_the_verdict(name):
    t0 = time.time()
    ok, why = run_python(FORGERIES[name], timeout=2.0, test=CHECK, entry_point="f")
    assert not ok, why
    assert time.time() - t0 < 30
    assert run_python(HONEST, test=CHECK, entry_point="f") == (True, "passed")

STALL = """
def f(x): return 9 ** 1000
"""
HOARD = """
import os, time
for _ in range(20):
    if os.fork() == 0:
        b = bytearray(300 << 20)
        for i in range(0, len(b), 4096): b[i] = 1
        time.sleep(100)
"""
CHECK_POWER = "def check(candidate): assert 3 ** candidate(2) == 81\n"

@needs_sandbox
def test_an_answer_that_stalls_the_test_stalls_neither_the_clock_nor_the_look_at_the_memory():
    assert run_python("def f(x): return 4", test=CHECK_POWER, entry_point="f") == (True, "passed")
    timeout = run_python(STALL, timeout=1.0, test=CHECK_POWER, entry_point="f")
    assert timeout == (False, "timeout")
    memory = run_python(STALL + HOARD, timeout=20.0, test=CHECK_POWER, entry_point="f")
    assert memory == (False, "too much memory")

@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail_where_tests_judge(name):
    assert not run_python(ATTACKS[name], timeout=2.0, test=CHECK, entry_point="f")[0]

@needs_sandbox
def test_disks_are_read_only_but_for_a_small_folder_in_memory(tmp_path):
    os.chmod(tmp_path, 0o777)  # open to everyone, nobody included
    mine, new = tmp_path / "mine", tmp_path / "new"
    mine.write_text("x")
    os.chmod(mine, 0o666)
    for path in (new, mine, "/tmp/new-file-of-a-sandbox", "/dev/shm/new-file-of-a-sandbox"):
        assert not run_python(f"open({str(path)!r}, 'w').write('y')")[0]
        assert not Path("/tmp/new-file-of-a-sandbox").exists()
    assert not run_python(f"import os\nos.remove({str(mine)!r})")[0]
    assert mine.read_text() == "x" and not new.exists()
    assert run_python("open('here', 'w').write('y')\nassert open('here').read() == 'y'")[0]
    too_much = "for i in range(40): open(f'f{i}', 'wb').write(b'x' * 1000000)"
    assert not run_python(too_much)[0]  # more than the folder holds

def other_python():
    """A Python that a user who is not root can start, behind what becomes that user, or None."""
    # env: setpriv itself still has the rights of root when it looks for a program
    setpriv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env"]
    for python in (sys.executable, "/usr/bin/python3", "/usr/bin/python3.11"):
        command = [*setpriv, python]
        new = "import sys; assert sys.version_info >= (3, 11)"
        with contextlib.suppress(OSError):
            if not subprocess.run([*command, "-c", new], stderr=-3, check=False).returncode:
                return command
    return None

@pytest.fixture
def users_folder():
    """A folder that an ordinary user may enter and owns, with the files of the sandbox in it."""
    folder = Path(tempfile.mkdtemp())
    for path in ("execution.py", "sandbox.py", "tests/ways_out.py"):
        shutil.copy(REPO / path, folder)
    (folder / "home").mkdir()
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)

def as_ordinary_user(folder, *args):
    """Runs Python in `folder` as an ordinary user; skips where there is none who gets namespaces.
    -> CompletedProcess"""
    python = [sys.executable] if os.geteuid() else other_python()
    if python is None:
        pytest.skip("an ordinary user cannot start Python here")
    asked = [*python, "-c", "import execution; print(*execution.sandbox_available())"]
    start = functools.partial(subprocess.run, capture_output=True, text=True, cwd=folder,
                              env={"PATH": os.environ["PATH"]})
    answer = start(asked, check=True)
    if answer.stdout.startswith("False"):
        assert "unshare" in answer.stdout or "mount" in answer.stdout, answer
        pytest.skip(f"an ordinary user gets no namespaces here: {answer.stdout.strip()}")
    return start([*python, *args], check=False)

@needs_sandbox
@pytest.mark.parametrize("user", ["root", "root of one id", "ordinary"])
def test_there_is_no_way_out_whoever_has_started_it(users_folder, user):
    args = ["ways_out.py", str(users_folder / "home")]
    if user == "ordinary":
        done = as_ordinary_user(users_folder, *args)
    else:
        if os.geteuid():
            pytest.skip("only root is root")
        one_id = ["unshare", "--map-root-user"] if user == "root of one id" else []
        if one_id and subprocess.run([*one_id, "true"], check=False).returncode:
            pytest.skip("no user namespaces here")
        if one_id:
            shutil.chown(users_folder / "home", 0, 0)
        done = subprocess.run([*one_id, sys.executable, *args], capture_output=True, text=True,
                              cwd=users_folder, check=False)
    assert done.stdout, done.stderr
    assert json.loads(done.stdout) == {"refused without": [], "lead out": [], "view": True}

AS_ORDINARY_USER = """
import json, sys
from execution import *
forgeries, attacks, honest, check, precious = json.load(open('given.json'))
for name, code in forgeries.items():
    assert not run_python(code, 2.0, test=check, entry_point='f')[0], name
for name, code in attacks.items():
    assert not run_python(code, 2.0)[0], name
run_python(f'import shutil\\nshutil.rmtree({precious!r})')
assert open(precious + '/file').read() == 'x'
assert run_python(honest, test=check, entry_point='f')[0]
print('held')
"""

def test_the_same_for_an_ordinary_user(users_folder):
    """The attacks again as a user with one id only, who owns what is attacked."""
    precious = users_folder / "home"
    (precious / "file").write_text("x")
    given = [FORGERIES, ATTACKS, HONEST, CHECK, str(precious)]
    (users_folder / "given.json").write_text(json.dumps(given))
    done = as_ordinary_user(users_folder, "-c", AS_ORDINARY_USER)
    assert done.stdout.strip() == "held", done.stderr

# a Mac, as far as sandbox.py can see: neither prctl nor capset, no /proc, limits that are refused
MAC = """
import builtins, ctypes, os, resource, runpy, sys
sys.platform = 'darwin'
ctypes.CDLL = lambda *args, **more: object()
real_open, real_limit, real_kill = open, resource.setrlimit, os.killpg
def on_disk(path, *args, **more):
    if str(path).startswith('/proc'): raise FileNotFoundError(2, 'No such file', path)
    return real_open(path, *args, **more)
def limit(which, values):
    if which == resource.RLIMIT_AS: raise ValueError('current limit exceeds maximum limit')
    real_limit(which, values)
builtins.open, resource.setrlimit = on_disk, limit
del os.setgroups
runpy.run_path(SANDBOX, run_name='__main__')
"""

def on_a_mac(monkeypatch, folder, wrong=""):
    monkeypatch.setattr(execution.sys, "platform", "darwin")
    mac = folder / "mac.py"
    mac.write_text(MAC.replace("SANDBOX", repr(SANDBOX)).replace("del os.setgroups", wrong))
    monkeypatch.setattr(execution, "SANDBOX", str(mac))
    execution.tried.cache_clear()

def test_without_prctl_and_proc_programs_run_where_that_is_asked_for(monkeypatch, tmp_path):
    on_a_mac(monkeypatch, tmp_path)
    assert execution.can_run(unsafe=True) == (True, "")
    able, why = execution.can_run(unsafe=False)
    assert not able and why.startswith("there is no sandbox here (darwin has no namespaces); --un")
    assert run_python(HONEST, test=CHECK, entry_point="f", unsafe=True) == (True, "passed")
    wrong = run_python("def f(x): return x", test=CHECK, entry_point="f", unsafe=True)
    assert wrong == (False, "failed")
    endless = run_python("while True: pass", timeout=1.0, unsafe=True)
    assert endless == (False, "timeout")
    execution.tried.cache_clear()

def test_where_no_answer_could_be_judged_right_none_is_judged(monkeypatch, tmp_path):
    on_a_mac(monkeypatch, tmp_path, "del os.setpgid")
    able, why = execution.can_run(unsafe=True)
    assert not able
    assert why.endswith("and without it: the sandbox died: module 'os' has no attribute 'setpgid'")
    execution.tried.cache_clear()

REFUSED = "echo 'unshare: unshare failed: Operation not permitted' >&2; exit 1"
TOO_OLD = """echo "unshare: unrecognized option '--kill-child'" >&2
echo "Try 'unshare --help' for more information." >&2; exit 1"""
NO_MOUNTS = f"""exec {shutil.which('unshare')} {' '.join(execution.NAMESPACES)} --map-root-user \\
setpriv --bounding-set=-sys_admin "${{@: -5}}" """

@pytest.mark.parametrize("unshare,why", [
    (REFUSED, "the sandbox died: unshare: unshare failed: Operation not permitted"),
    (TOO_OLD, "the sandbox died: unshare: unrecognized option '--kill-child'"),
    pytest.param(NO_MOUNTS, "the sandbox died: cannot mount tmpfs on /", marks=needs_sandbox),
    (None, "there is no unshare program")])
def test_why_there_is_no_sandbox_is_true(monkeypatch, tmp_path, unshare, why):
    if unshare:
        (tmp_path / "unshare").write_text(f"#!/bin/bash\n{unshare}\n")
        (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    execution.tried.cache_clear()
    available, said = sandbox_available()
    execution.tried.cache_clear()
    assert not available and said.startswith(why), said

AS_ROOT_WITH_ONE_ID = """
import json
from execution import *
forgeries, honest, check, home = json.load(open(0))
forged = [name for name, code in forgeries.items() if 'bomb' not in name
          and run_python(code, 1.0, test=check, entry_point='f')[0]]
print(sandbox_available(), run_python(honest, test=check, entry_point='f')[0], forged,
      run_python(f'import shutil\\nshutil.rmtree({home!r})')[0],
      run_python('import os\\nos.kill(-1, 9)')[0])
"""

@needs_sandbox
def test_root_with_a_single_user_id_has_a_sandbox_too(tmp_path):
    """As in a container without root: it cannot become nobody, and gets a user namespace."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("x")
    out = subprocess.run(["unshare", "-rn", sys.executable, "-c", AS_ROOT_WITH_ONE_ID],
                         input=json.dumps([FORGERIES, HONEST, CHECK, str(home)]),
                         capture_output=True, text=True, cwd=REPO, check=False)
    assert out.stdout.strip() == "(True, '') True [] False False", out.stdout + out.stderr
    assert (home / "precious").read_text() == "x"

@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail_and_the_evaluator_goes_on(name):
    t0 = time.time()
    ok, why = run_python(ATTACKS[name], timeout=2.0)
    assert not ok, why
    assert time.time() - t0 < 30
    assert run_python("assert True") == (True, "passed")

@needs_sandbox
def test_the_home_folder_the_environment_and_the_network_are_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    (tmp_path / "precious").write_text("x")
    os.chmod(tmp_path, 0o755)
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    connects = f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
    assert not run_python(f"import shutil\nshutil.rmtree({str(tmp_path)!r})\nassert False")[0]
    assert (tmp_path / "precious").read_text() == "x"
    assert run_python("import os\nassert 'SECRET_TOKEN' not in os.environ\n"
                      "assert not os.environ.get('HOME')")[0]
    assert not run_python("data = open('/proc/1/environ').read()\nassert 'hunter2' in data")[0]
    assert not run_python(f"import socket\n{connects}")[0]
    with pytest.raises(TimeoutError):
        server.accept()
    assert not run_python(f"import os\nos.kill({os.getpid()}, {int(signal.SIGTERM)})")[0]

def running(word):
    """Whether a process has this word in its command line"""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if word in path.read_text():
                return True
    return False

@pytest.fixture
def sandbox_file(tmp_path_factory, monkeypatch):
    """A copy that only this test runs, since others may be at work on this machine -> its path"""
    path = shutil.copy(SANDBOX, tmp_path_factory.mktemp("own"))
    monkeypatch.setattr(execution, "SANDBOX", str(path))
    return str(path)

@needs_sandbox
def test_nothing_is_left_behind(sandbox_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_python("open('x', 'w').write('y')\nimport os, time\n"
                      "if os.fork() == 0:\n    os.setsid()\n    time.sleep(77.5)\n")[0]
    assert not list(tmp_path.iterdir())
    assert not running(sandbox_file)

DAEMON = """
import os, time
here, there = os.pipe()  # exec closes it
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        if os.path.exists('/bin/sleep'):
            os.execv('/bin/sleep', ['sleep', '98765.4321'])
        os.close(there)  # there are no programs in a sandbox
        time.sleep(98765)
    os._exit(0)
os.close(there)
os.read(here, 1)  # until sleep runs
"""

@pytest.mark.parametrize("namespaces", [False, pytest.param(True, marks=needs_sandbox)])
def test_a_daemon_of_the_program_does_not_outlive_it(sandbox_file, monkeypatch, namespaces):
    if not namespaces:
        monkeypatch.setattr(execution, "sandbox_available", lambda: (False, "refused"))
        assert run_python(DAEMON) == (False, "not run: no sandbox here (refused)")
    assert run_python(DAEMON, unsafe=True) == (True, "passed")
    assert not running("98765.4321") and not running(sandbox_file)

BOMB = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""

def test_a_fork_bomb_does_not_outlive_it_without_namespaces_either(sandbox_file, monkeypatch):
    monkeypatch.setattr(execution, "sandbox_available", lambda: (False, "refused"))
    assert run_python(BOMB, timeout=1.0, unsafe=True) == (False, "timeout")
    assert not running(sandbox_file)
