"""
Random settings, most of them bad, for every script that has some. Each must be refused with code 2
and one line, or be accepted with values that make sense; either way nothing is written.

    python tests/fuzz_settings.py --cases=500 --seed=1

A case is a fork of this process that runs the script as Python would, in an empty state folder; if
its settings are accepted it comes to the import of torch, or finds that data or a model is missing.
"""
import json
import math
import os
import random
import re
import runpy
import sys
import tempfile
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import common
import configurator
import pipeline
from chaos import read_flags

SCRIPTS = sorted(p.name for p in REPO.glob("*.py") if re.search(
    r"^settings = configurator\.configure\(", p.read_text(), re.MULTILINE))
VALUES = [
    "", "-1", "-7", "0", "0.0", "-0.0", "1", "3", "1.5", "-5.5", "1e999", "nan", "inf", "-inf",
    "9" * 20, "9" * 400, "9" * 5000, "1e-400", "0x10", "1_000", "1__0", "٣", "１２", "None", "True",
    "()", "[]", "{}", "{[]:1}", "[1, 2]", "['a', 3]", "[['a']]", "b'x'", "1j", "-" * 1000,
    "(" * 300, "'", "\\", "1if 2else 3", "cuda", "toy", "base", "gsm8k", "nosuch", "gsm8k*2",
    "gsm8k*0", "gsm8k:0", "smoltalk*99999999999", "gsm8k:" + "9" * 5000, "a\nb", "a b", "é", "😀",
    "\udcff", "..", ".", "-", "../../../x", "/tmp/x", "~nobodyatall/x", "d4.old-1", ".old-",
    "x" * 101, "x" * 300, "/" + "x" * 300, "wide-2.5_b", "a,b", ",", "*", "facts.jsonl*3"]
WORDS = [
    "", "-", "--", "---", "depth=4", "--depth", "--=1", "--sft.depth=4", "--nosuch=1", "-x",
    "--.=1", "absent.py", "folder.py", "--" + "x" * 5000 + "=1", "--\udcff=1", "--a\nb=1"]
FILES = [
    b"depth = ", b"x = '\xff'", b"\0", b"raise KeyError(1)", b"import sys\nsys.exit()", b"1 / 0",
    b"import nosuch", b"nosuch = 3", b"seed = 10 ** 5000", b"seed = float('nan')", b"def f(: 1",
    b"data = '\\0'", b"tag = '\\udcff'", b"mixture = [[1]]", b"seed = 7", b"data = 3", b"",
    b"\xef\xbb\xbfseed = 1", b"seed = -1", b"device = 'cuda'", b"matrix_lr = float('inf')",
    b"def f(): f()\nf()"]

class TorchIsFarEnough:
    """Ends a case where it would import torch, which takes seconds: its settings were accepted."""
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            common.fail("this case has come far enough")

def draw_value(rng, name):
    """A value for a setting: any, or one at a border of its range."""
    if name in configurator.RANGES and rng.random() < 0.25:
        low, high = configurator.RANGES[name]
        return str(rng.choice([low, high, low - 1, high + 1, -low, low / 2]))
    if name in configurator.CHOICES and rng.random() < 0.25:
        return rng.choice(configurator.CHOICES[name])
    return rng.choice(VALUES)

def draw(rng, folder):
    """-> (script, its words); a settings file among them is written into `folder`"""
    script = rng.choice([*SCRIPTS, "launch.py", "launch.py"])
    known = list(configurator.defaults(script)) if script != "launch.py" else []
    words = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if script == "launch.py":
            phase = rng.choice(pipeline.PHASES)
            name = rng.choice(list(configurator.defaults(phase.script)))
            prefix = rng.choice(["", f"{phase.name}."])
            words.append(f"--{prefix}{name}={draw_value(rng, name)}")
        elif (kind := rng.random()) < 0.7:
            name = rng.choice(known)
            words.append(f"--{name}={draw_value(rng, name)}")
        elif kind < 0.85:
            words.append(rng.choice(WORDS))
        else:
            path = folder / f"case{len(words)}.py"
            path.write_bytes(rng.choice(FILES))
            words.append(path.name)
    if script == "prepare_data.py":
        words.append("--check=True")  # else it makes what it does not find
    if script == "bench.py":
        words.append("--sections=learning")  # else it measures for minutes; this one lacks a file
    if script == "launch.py":
        flag = rng.choice(["", "", "", "--nproc=", "--only=", "--from=", "--skip-", "--"])
        flags = [flag + rng.choice(VALUES)] if flag else []
        listed = []
        for phase in pipeline.PHASES:
            listed += ["--run", phase.name, phase.script]
        depth = rng.choice([*["4"] * 60, *VALUES])
        words = ["toy", depth, *listed, "--given", "--dry-run", *flags, "--", *words]
    return script, words

def run_case(script, words, folder):
    """-> (exit code, stderr, what configurator.read has accepted: a list of dicts, or None)"""
    accepted = folder.with_name("accepted")
    accepted.unlink(missing_ok=True)
    with open(folder.with_name("out"), "wb") as out, open(folder.with_name("err"), "w+b") as err:
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os.chdir(folder)
                os._exit(as_script(script, words, accepted))
            finally:
                os._exit(99)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        err.seek(0)
        said = err.read().decode(errors="replace")
    return code, said, common.read_json_lines(accepted) or None

def as_script(script, words, accepted):
    """In the fork: `python script words` -> exit code"""
    sys.stdout = open(1, "w", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = [str(REPO / script), *words]
    sys.meta_path.insert(0, TorchIsFarEnough())
    os.environ["NANOCHAT_BASE_DIR"] = str(accepted.with_name("state"))
    sys.excepthook = common.end_process
    read = configurator.read

    def noted(*args, **more):
        settings = read(*args, **more)
        with open(accepted, "a") as f:
            f.write(json.dumps(settings) + "\n")
        return settings
    configurator.read = noted
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
    except BaseException:  # noqa: BLE001
        try:
            sys.excepthook(*sys.exc_info())
            code = 1
        except SystemExit as e:
            code = e.code
    sys.stdout.flush()
    sys.stderr.flush()
    return code

def makes_sense(settings):
    """Whether accepted settings do, by rules that do not come from the table of ranges."""
    for name, value in settings.items():
        if isinstance(value, (int, float)) and not math.isfinite(value):
            return False
        most = 1e30 if name == "target_flops" else 2 ** 63
        if isinstance(value, (int, float)) and not -1 <= value <= most:
            return False
        if name.endswith("_lr") and not 0 <= value <= 1000:
            return False
        share = name.endswith(("_ratio", "_fraction"))
        share = share and name not in ("lr_fraction", "aspect_ratio")
        if share and not 0 <= value <= 1:
            return False
        if name == "tag" and not re.fullmatch(r"|[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", value):
            return False
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and "\0" in text for text in texts):
            return False
        if isinstance(value, list) and not all(isinstance(text, str) for text in value):
            return False
    return True

def fuzz(cases, seed):
    """-> ({script: Counter of accepted, refused, wrong}, what was wrong: a list of texts)"""
    rng = random.Random(seed)
    done = (0, "")
    table, wrong = {name: Counter() for name in [*SCRIPTS, "launch.py"]}, []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "cwd"
        (folder / "folder.py").mkdir(parents=True)
        for number in range(cases):
            script, words = draw(rng, folder)
            before = sorted(folder.rglob("*"))
            code, said, accepted = run_case(script, words, folder)
            clean = sorted(folder.rglob("*")) == before and not (folder.parent / "state").exists()
            one_line = code == 2 and said.startswith("error: ") and said.count("\n") == 1
            outcome = "wrong"
            if clean and one_line and (accepted is None or script == "launch.py"):
                outcome = "refused"
            elif clean and accepted and (one_line or (code, said) == done):
                outcome = "accepted" if all(map(makes_sense, accepted)) else "wrong"
            table[script][outcome] += 1
            if outcome == "wrong":
                wrong.append(f"case {number}: {script} {str(words[-4:])[:200]}: ended with {code}, "
                             f"accepted {str(accepted)[:200]}: {said[-300:]}")
    return table, wrong

def main():
    given = read_flags(cases="500", seed="1")
    table, wrong = fuzz(int(given["cases"]), int(given["seed"]))
    print(f"| {'script':<16} | accepted | refused | wrong |\n|---|---|---|---|")
    total = Counter()
    for script, counts in table.items():
        total += counts
        print(f"| {script:<16} | {counts['accepted']} | {counts['refused']} | {counts['wrong']} |")
    print(f"| {'all':<16} | {total['accepted']} | {total['refused']} | {total['wrong']} |")
    print("\n".join(wrong))
    return 1 if wrong else 0

if __name__ == "__main__":
    sys.exit(main())
