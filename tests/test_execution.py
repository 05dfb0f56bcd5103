"""execution.py: the calculator takes arithmetic and nothing else; hostile programs fail and harm nothing."""
import contextlib
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

from execution import calculate, run_python, sandbox_available

@pytest.mark.parametrize("expression,value", [
    ("1+1", "2"), ("(1+2)*3", "9"), ("7/2", "3.5"), ("8/2", "4"), ("1,000/4", "250"), ("-3+5", "2"), ("2**10", "1024"), ("7//2", "3"), ("7%4", "3"),
    ("'hello'.count('l')", "2"), ('"a,b,c".count(",")', "2"), ("0.1+0.2", "0.3"), (" 3 * 4 ", "12"),
    ("1/10000000", "0"), ("-1/10000000", "0"), ("2.0000001+1", "3"), ("1,234,567+1", "1234568"), ("-2**2", "-4"), (".5*8", "4")])
def test_what_the_calculator_computes(expression, value):
    assert calculate(expression) == value

@pytest.mark.parametrize("expression", [
    "", "x", "1+", "open('/etc/passwd')", "__import__('os')", "9**9**9", "2**100000", "10**60", "(1).__class__", "'a'*1000000000", "[1]*9", "1 if 1 else 2",
    "'a'.upper()", "'a'.count", "'a'.count('b', 0)", "'a'.count(sub='b')", "1/0", "1e308*10", "lambda: 1", "1;2", "(" * 90 + ")" * 90, "1+" * 5000 + "1", "True+1",
    "(-8)**0.5", "'x'.__class__.count('x')", "f'{1}'.count('1')", "1\n2", "\0", "nan", "0**-1",
    "1,2", "1,23+4", "9**9**9**9", "(9**9)**(9**9)", "'a'*10**9", "'a'.count('a')*10**16", "[].__class__", "'a'.count(b'a')", "'a'.join('b')", "~1", "1<<1000000",
    "1j", "...", "'\ud800'.count(x)", "9" * 199, "not 1", "1<2", "(x:=1)", "'a' 'b'.count", "*1", "{}", "`1`"])
def test_what_it_refuses(expression):
    t0 = time.time()
    assert calculate(expression) is None
    assert time.time() - t0 < 5.0

needs_sandbox = pytest.mark.skipif(not sandbox_available()[0], reason=f"no namespaces here: {sandbox_available()[1]}")

@needs_sandbox
def test_right_and_wrong_programs():
    assert run_python("assert sum([1, 2]) == 3") == (True, "passed")
    assert run_python("import math, json, collections\nassert math.sqrt(4) == 2") == (True, "passed")
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
    "threads without end": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
    "prints the marker": "print('passed')\nimport os\nos.write(1, b'passed')\nos._exit(0)",
    "writes the marker into every file": "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'passed')\n  except OSError: pass\nos._exit(0)",
    "patches os._exit": "import os\nos._exit = lambda code: None\nos.write = lambda *a: None\nassert False",
    "patches builtins": "import builtins\nbuiltins.AssertionError = KeyError\nbuiltins.BaseException = KeyError\nassert 1 == 2",
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\nassert False",
    "kills the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nassert False",
    "kills process 1": "import os, signal\nos.kill(1, signal.SIGKILL)\nos._exit(0)",
    "recursion without end": "def f(): f()\nf()",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "a file of 1 GB": "open('big', 'wb').write(b'x' * 2 ** 30)\nassert False",
    "looks for the marker in the frames": "import sys, os\nf, seen = sys._getframe(), []\nwhile f:\n  seen += [*f.f_globals.items(), *f.f_locals.items()]\n  f = f.f_back\n"
        "for k, v in seen:\n  for data in (str(v).encode() + b'\\n', b'passed'):\n    for fd in range(3, 64):\n      try: os.write(fd, data)\n      except OSError: pass\nos._exit(0)",
    "reads every environment": "import os\nfound = [str(os.environ)]\nfor p in os.listdir('/proc'):\n  try: found.append(open(f'/proc/{p}/environ').read())\n  except OSError: pass\n"
        "assert any('HOME' in f or 'USER' in f for f in found)",
    "opens sockets": "import socket\nfor kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):\n  for address in ('192.0.2.1', '1.1.1.1'):\n    s = socket.socket(socket.AF_INET, kind)\n    s.settimeout(1)\n"
        "    try: s.connect((address, 53)); reached = True\n    except OSError: pass\nreached",
    "leaves a child behind": "import os, time\nif os.fork() == 0: time.sleep(1000)\nos._exit(0)",
}

HONEST = "def f(x): return x + 1\n"
CHECK = "def f(x): pass\ndef check(candidate):\n    assert candidate(1) == 2 and f(2) == 3\n    assert candidate(candidate(5)) == 7\n"

@needs_sandbox
def test_a_function_is_judged_by_tests_in_another_process():
    assert run_python(HONEST, test=CHECK, entry_point="f") == (True, "passed")
    assert run_python("def f(x): return x", test=CHECK, entry_point="f") == (False, "failed")
    assert run_python("f = 3", test=CHECK, entry_point="f") == (False, "failed")
    crossing = "import collections\nPoint = collections.namedtuple('Point', 'x y')\ndef f(k):\n  return {'a': collections.Counter('aab'), 'b': Point(1, 'x\\n'), 'c': {1, 2}, 'd': set(), 'e': None, 'f': [True, 2.5, b'z']}[k]\n"
    judged = "def check(c):\n assert c('a') == {'a': 2, 'b': 1} and c('b') == (1, 'x\\n') and c('c') == {1, 2} and c('d') == set() and c('e') is None and c('f') == [True, 2.5, b'z']\n" \
             " try: c('nothing')\n except KeyError: return\n assert False\n"
    assert run_python(crossing, test=judged, entry_point="f") == (True, "passed")

# programs that know how they are judged: each claims to pass without solving anything
FORGERIES = {
    "equals everything": "class E(int):\n  def __eq__(self, other): return True\n  def __ne__(self, other): return False\ndef f(x): return E()",
    "a repr that says more": "class E:\n  def __repr__(self): return '2'\ndef f(x): return E()",
    "an object with any attribute": "class E:\n  def __getattr__(self, name): return lambda *a: True\ndef f(x): return E()",
    "looks for the tests in memory": "import gc, sys\ndef f(x):\n  seen = [o for o in gc.get_objects() if 'candidate' + '(1)' in str(o)[:2000]]\n  fr = sys._getframe()\n  while fr:\n"
        "    if any('candidate' + '(1)' in str(v) for v in fr.f_globals.values()): return x + 1\n    fr = fr.f_back\n  return x + 1 if seen else None",
    "reads the other processes": "import os, re\ndef f(x):\n  for p in os.listdir('/proc'):\n    if p.isdigit() and int(p) != os.getpid():\n      try:\n        open(f'/proc/{p}/mem', 'rb'); return x + 1\n"
        "      except OSError: pass\n  return None",
    "opens the pipes of the other processes": "import os\ndef f(x):\n  for p in os.listdir('/proc'):\n    if p.isdigit() and int(p) != os.getpid():\n      for n in range(64):\n        try: fd = os.open(f'/proc/{p}/fd/{n}', os.O_WRONLY)\n"
        "        except OSError: continue\n        os.write(fd, b'passed')\n  return None",
    "traces the other processes": "import ctypes, os\nlibc = ctypes.CDLL(None)\ndef f(x):\n  for p in os.listdir('/proc'):\n    if p.isdigit() and int(p) != os.getpid() and libc.ptrace(16, int(p), 0, 0) == 0: return x + 1\n  return None",
    "stops the others and waits": "import os, time\ndef f(x):\n  for p in (1, os.getppid(), os.getpid() + 1):\n    try: os.kill(p, 19)\n    except OSError: pass\n  time.sleep(100)",
    "kills the checker": "import os\ndef f(x):\n  for p in range(2, 30):\n    if p != os.getpid():\n      try: os.kill(p, 9)\n      except OSError: pass\n  os._exit(0)",
    "answers with what is no literal": "import os\ndef f(x):\n  for fd in range(3, 64):\n    try: os.write(fd, b'=__import__(\"os\")._exit(0)\\n' * 3)\n    except OSError: pass",
    "answers without end": "import os\ndef f(x):\n  for fd in range(3, 64):\n    try:\n      while True: os.write(fd, b'=' + b'9' * 60000)\n    except OSError: pass",
    "a deep answer": "import os\ndef f(x):\n  for fd in range(3, 64):\n    try: os.write(fd, b'=' + b'[' * 50000 + b'\\n')\n    except OSError: pass",
    "patches what the tests use": "import builtins, ast\nbuiltins.repr = lambda x: '2'\nbuiltins.AssertionError = KeyError\nast.literal_eval = lambda s: 2\ndef f(x): raise SystemExit(0)",
    "raises what tests might expect": "def f(x): raise StopIteration",
    "exits when called": "import os\ndef f(x): os._exit(0)",
    "never answers": "def f(x):\n  while True: pass",
    "makes a namespace of its own": "import ctypes\ndef f(x):\n  libc = ctypes.CDLL(None)\n  return x + 1 if libc.unshare(0x20000) == 0 or libc.mount(b'none', b'/', None, 32 | 4096, None) == 0 else None",
    "memory bomb of many processes": "import os, time\ndef f(x):\n  for _ in range(20):\n    if os.fork() == 0:\n      b = bytearray(300 << 20)\n      for i in range(0, len(b), 4096): b[i] = 1\n      time.sleep(100)\n  time.sleep(100)",
}

@needs_sandbox
@pytest.mark.parametrize("name", FORGERIES)
def test_no_program_can_forge_the_verdict(name):
    t0 = time.time()
    ok, why = run_python(FORGERIES[name], timeout=2.0, test=CHECK, entry_point="f")
    assert not ok, why
    assert time.time() - t0 < 30
    assert run_python(HONEST, test=CHECK, entry_point="f") == (True, "passed")

@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail_where_tests_judge(name):
    assert not run_python(ATTACKS[name], timeout=2.0, test=CHECK, entry_point="f")[0]

@needs_sandbox
def test_disks_are_read_only_but_for_a_small_folder_in_memory(tmp_path):
    os.chmod(tmp_path, 0o777)  # open to everyone, nobody included
    (tmp_path / "mine").write_text("x")
    os.chmod(tmp_path / "mine", 0o666)
    for path in (tmp_path / "new", tmp_path / "mine", "/tmp/new-file-of-a-sandbox", "/dev/shm/new-file-of-a-sandbox"):
        assert not run_python(f"open({str(path)!r}, 'w').write('y')")[0] and not Path("/tmp/new-file-of-a-sandbox").exists()
    assert not run_python(f"import os\nos.remove({str(tmp_path / 'mine')!r})")[0]
    assert (tmp_path / "mine").read_text() == "x" and not (tmp_path / "new").exists()
    assert run_python("open('here', 'w').write('y')\nassert open('here').read() == 'y'")[0]
    assert not run_python("for i in range(40): open(f'f{i}', 'wb').write(b'x' * 1000000)")[0]  # more than the folder holds

@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_same_for_an_ordinary_user():
    """The attacks again as a user with one id only, who owns what is attacked."""
    setpriv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    folder = Path(tempfile.mkdtemp())
    precious, script = folder / "home" / "precious", folder / "all.py"
    precious.parent.mkdir()
    precious.write_text("x")
    shutil.copy(Path(__file__).parent.parent / "execution.py", folder)
    removes = f"import shutil\nshutil.rmtree({str(precious.parent)!r})"
    script.write_text("import sys\nfrom execution import *\nif not sandbox_available()[0]:\n  print(sandbox_available()[1]); sys.exit(3)\n"
                      f"for name, code in {FORGERIES!r}.items():\n  assert not run_python(code, 2.0, test={CHECK!r}, entry_point='f')[0], name\n"
                      f"for name, code in {ATTACKS!r}.items():\n  assert not run_python(code, 2.0)[0], name\n"
                      f"run_python({removes!r})\nassert open({str(precious)!r}).read() == 'x'\n"
                      f"assert run_python({HONEST!r}, test={CHECK!r}, entry_point='f')[0]\nprint('held')\n")
    for path in (folder, precious.parent, precious, script, folder / "execution.py"):
        os.chown(path, 65534, 65534)
    python = next((p for p in (sys.executable, "/usr/bin/python3", "/usr/bin/python3.11") if subprocess.run(
        [*setpriv, "sh", "-c", f"{p} -c 'import sys; assert sys.version_info >= (3, 11)'"], capture_output=True).returncode == 0), None)
    if python is None:
        pytest.skip("an ordinary user cannot start Python here")
    done = subprocess.run([*setpriv, python, str(script)], capture_output=True, text=True, cwd=folder, env={"PATH": os.environ["PATH"]})
    shutil.rmtree(folder)
    if done.returncode == 3:
        pytest.skip(f"an ordinary user gets no namespaces here: {done.stdout.strip()}")
    assert done.stdout.strip() == "held", done.stderr

@needs_sandbox
def test_root_with_a_single_user_id_has_a_sandbox_too(tmp_path):
    """As in a container without root: it cannot become nobody, and gets a user namespace of its own."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("x")
    removes, kills = f"import shutil\nshutil.rmtree({str(home)!r})", "import os\nos.kill(-1, 9)"
    code = (f"from execution import *\nprint(sandbox_available(), run_python({HONEST!r}, test={CHECK!r}, entry_point='f')[0],\n"
            f"  [name for name, code in {FORGERIES!r}.items() if 'bomb' not in name and run_python(code, 1.0, test={CHECK!r}, entry_point='f')[0]],\n"
            f"  run_python({removes!r})[0], run_python({kills!r})[0])")
    out = subprocess.run(["unshare", "-rn", sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
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
    assert run_python(f"import shutil\nshutil.rmtree({str(tmp_path)!r})\nassert False")[0] is False
    assert (tmp_path / "precious").read_text() == "x"
    assert run_python("import os\nassert 'SECRET_TOKEN' not in os.environ and not os.environ.get('HOME')")[0]
    assert run_python("data = open('/proc/1/environ').read()\nassert 'hunter2' in data")[0] is False
    assert run_python(f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)")[0] is False
    with pytest.raises(TimeoutError):
        server.accept()
    assert run_python(f"import os\nos.kill({os.getpid()}, {int(signal.SIGTERM)})")[0] is False

@needs_sandbox
def test_nothing_is_left_behind():
    before = set(os.listdir("/tmp"))
    run_python("open('x', 'w').write('y')\nimport os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(77.5)\n")
    assert not [p for p in set(os.listdir("/tmp")) - before if p.startswith("sandbox-")]
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            commands.append(path.read_bytes())
    assert not any(b"SUPERVISOR" in c or b"end_read, end_write" in c for c in commands)
