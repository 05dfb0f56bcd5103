"""
Kills the small pipeline at random instants, again and again, each time starting the same command
anew; when it has come to its end everything that it made must equal, bit for bit, what a run that
nobody disturbed has made. Rounds from nothing to the end follow each other until enough kills have
landed.

    python tests/chaos.py --kills=200 --seed=1   a line for each attempt, and a table of the kills;
                                                 exit code 1 at the first difference
    tests/test_chaos.py                          a handful of them
"""
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FLAGS = ["--depth=1", "--nproc=1", "--skip-trial"]
SETTINGS = ["--size=0.02", "--vocab_size=512", "--max_seq_len=128", "--total_batch_size=1024",
            "--num_steps=30", "--max_steps=30", "--eval_every=10", "--max_items=20",
            "--core_items=8", "--compile=False", "--dtype=float32", "--threads=1", "--device=cpu",
            "--device_batch_size=8", "--eval_tokens=4000", "--eval_problems=8", "--eval_samples=2",
            "--problems_per_step=2", "--samples=8", "--max_new_tokens=16", "--save_minutes=0.01"]
STAGES = ("base_checkpoints", "mid_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints")
INSTANTS = {"at any moment": 5, "during a save": 2, "tokenising": 1, "evaluating": 2,
            "between phases": 2}  # and how often, relatively
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 300  # seconds without an end of the script after a kill: it hangs

# ---- what has to be equal

def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()

def without_clock(x):
    if not isinstance(x, dict):
        return x
    return {k: without_clock(v) for k, v in x.items() if k not in ("clock", "seconds")}

def result(state):
    """Data, tokenizer, weights and optimizer of every phase, metrics, evaluations, the report's
    tables. -> {name: value}"""
    root, found = state / "toy", {}
    for pattern in ("base_data/*.parquet", "task_data/*", "tokenizer/*.txt"):
        found |= {str(path.relative_to(root)): sha(path) for path in root.glob(pattern)}
    for folder in [root / stage / "d1" for stage in STAGES]:
        if folder.exists():
            stage = folder.parent.name
            manifest, = folder.glob("manifest_*.json")
            for name in json.loads(manifest.read_text())["files"]:
                if not name.startswith("meta"):
                    found[f"{stage}/{name}"] = sha(folder / name)
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            found[f"{stage}/metrics"] = [without_clock(json.loads(line)) for line in lines]
    for path in root.glob("report/*.json"):
        found[path.name] = without_clock(json.loads(path.read_text()))
    report = (root / "report/report.md").read_text()
    sections = report.split("\n## ")  # the others speak of times and of what deaths have cost
    found["report"] = [line for section in sections for line in section.split("\n")
                       if section.startswith(("Scores", "Ten prompts")) and line.startswith("|")]
    return found

# ---- one attempt

@dataclass
class Attempt:
    state: Path
    log: Path
    process: subprocess.Popen
    shots: list = field(default_factory=list)  # (signal, target, instant, phase)

    def begun(self):
        """The phases that were begun."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.split()[1].rstrip(":") for line in lines if line.startswith("=== ")]

    def works(self):
        """Whether the last of them has said more than that it is done already."""
        said = self.log.read_text(errors="replace").split("=== ")[-1].splitlines()[1:]
        return any(line and "done already" not in line and not line.startswith("the toy world")
                   for line in said)

    def runs(self):
        return self.process.poll() is None

    def phase(self):
        """The process of the phase that runs, or None; status.py is none."""
        pid = self.process.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for child in reversed(children):
                words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                if "--data=toy" in words and not {"status.py", "launch.py"} & {*words}:
                    return int(child)
        except OSError:
            pass
        return None

    def harmless(self):
        """Whether it has ended as it may after what was done to it: killed (137 or -9), asked to
        stop (75), or done. 1 says that an evaluation was killed; a script that has just been
        started has no handlers yet."""
        code = self.process.returncode
        if not self.shots:
            return code == 0
        name, target, _, phase = self.shots[-1]
        if phase == "the start" and target == "script":
            return code in (75, -signal.Signals[name])
        killed = any(shot[:2] == ("SIGKILL", "phase") for shot in self.shots)
        return code in (0, 75, 137, -signal.SIGKILL) or (killed and code == 1)

def start(state, log, flags=()):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "NANOCHAT_"))}
    command = ["bash", "speedrun.sh", *FLAGS, *flags, "--", *SETTINGS]
    with open(log, "w") as f:
        process = subprocess.Popen(command, cwd=REPO, env={**kept, "NANOCHAT_BASE_DIR": str(state)},
                                   stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    return Attempt(state, log, process)

def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False

def instant_came(instant, attempt, now, delay, phases_before, due):
    """Whether the instant drawn is now; `due` remembers when an evaluation was first seen."""
    root = attempt.state / "toy"
    if instant == "at any moment":
        return now > delay
    if instant == "during a save":
        return now > delay / 2 and any(any((root / s).glob("d1/.*_0*.tmp*")) for s in STAGES)
    if instant == "tokenising":
        said = attempt.log.read_text(errors="replace")
        return any(root.glob("tokens/*/*.tmp*")) or "tokenizing" in said
    begun = attempt.begun()
    if instant == "between phases":
        return len(begun) > phases_before
    if begun and begun[-1].endswith("-eval"):
        due.setdefault("at", now + delay / 3)  # somewhere within it
    return now > due.get("at", 1e9)

def shoot(attempt, draw, span):
    """Sends a signal drawn to a target drawn at an instant drawn; not where it ends before that."""
    instant, = draw.choices(list(INSTANTS), INSTANTS.values())
    signum = draw.choice(SIGNALS)
    at_work = draw.random() < 0.75  # mostly the clock starts when there is something to do
    at_phase = draw.random() < 0.5
    delay, due = draw.uniform(0.0, span), {}
    before = len(attempt.begun()) + draw.randint(0, 2)
    while at_work and attempt.runs() and not attempt.works():
        time.sleep(0.005)
    t0 = time.time()
    target = None
    while attempt.runs():
        now = time.time() - t0
        if now > 2 * span:
            instant = "at any moment"
        target = attempt.phase() if at_phase else attempt.process.pid
        if target and instant_came(instant, attempt, now, delay, before, due):
            break
        time.sleep(0.005)
    phase = (attempt.begun() or ["the start"])[-1]
    if attempt.runs() and alive(target):
        os.kill(target, signum)
        attempt.shots.append((signum.name, "phase" if at_phase else "script", instant, phase))
        wait_for_effect(attempt)

def wait_for_effect(attempt):
    """Until the attempt has ended; or, where the phase was at its end already, the next begins."""
    deadline, phases = time.time() + PATIENCE, len(attempt.begun())
    while attempt.runs() and len(attempt.begun()) == phases:
        assert time.time() < deadline, f"HANGS after {attempt.shots[-1]}; log: {attempt.log}"
        time.sleep(0.01)

# ---- many of them

def chaos(kills, seed, folder, flags=(), say=print):
    """Runs rounds until `kills` have landed -> Counter of what landed. AssertionError where the
    result of a round differs from that of the straight run."""
    folder, draw = Path(folder), random.Random(seed)
    t0 = time.time()
    undisturbed = start(folder / "straight", folder / "straight.log", flags)
    code = undisturbed.process.wait()
    assert code == 0, undisturbed.log.read_text()[-3000:]
    straight, span = result(undisturbed.state), 0.15 * (time.time() - t0)
    say(f"the straight run took {time.time() - t0:.0f} s and made {len(straight)} things to "
        "compare")
    table, rounds, attempts = collections.Counter(), 0, 0
    while table.total() < kills:
        rounds += 1
        state, before, code = folder / f"round{rounds}", table.total(), None
        while code != 0:
            attempts += 1
            attempt = start(state, folder / f"attempt{attempts:04d}.log", flags)
            disturbed = table.total() < kills
            while disturbed and attempt.runs():
                shoot(attempt, draw, span)
            code = attempt.process.wait(PATIENCE)
            assert attempt.harmless(), (f"exit code {code} after {attempt.shots}, see "
                                        f"{attempt.log}:\n{attempt.log.read_text()[-2000:]}")
            if disturbed and attempt.shots:
                table[attempt.shots[-1]] += code != 0  # the one that has ended it
                signum, target, instant, phase = attempt.shots[-1]
                outcome = "landed" if code else "missed"
                say(f"{table.total():4d} of {kills} | attempt {attempts} | {signum} to the "
                    f"{target} {instant} in {phase} | {outcome}, exit code {code}")
        made = result(state)
        for name in sorted({*straight, *made}):
            assert straight.get(name) == made.get(name), (
                f"round {rounds}: {name} differs: {straight.get(name)} and {made.get(name)}; see "
                f"{folder}")
        say(f"round {rounds}: {table.total() - before} kills, and everything equals the straight "
            "run")
        shutil.rmtree(state)
    say(f"{kills} kills landed in {rounds} rounds and {attempts} attempts, "
        f"{time.time() - t0:.0f} s")
    return table

def rows(table):
    """A table: signal and target by instant."""
    lines = [" " * 18 + "".join(f"{instant:>18}" for instant in INSTANTS)]
    for signum, target in sorted({shot[:2] for shot in table}):
        counts = [sum(n for shot, n in table.items() if shot[:3] == (signum, target, instant))
                  for instant in INSTANTS]
        lines.append(f"{signum} to {target}".ljust(18) + "".join(f"{n:>18}" for n in counts))
    return "\n".join(lines)

def read_flags(**given):
    """The flags of this script of the tests, by name, with what the command line gives instead;
    ends the process where it gives something else."""
    usage = " ".join(f"[--{name}={value or '...'}]" for name, value in given.items())
    for arg in sys.argv[1:]:
        name, _, value = arg.removeprefix("--").partition("=")
        if name not in given or not value:
            script = os.path.basename(sys.argv[0])
            sys.exit(f"error: cannot read {arg!r}: python tests/{script} {usage}")
        given[name] = value
    return given

def main():
    given = read_flags(kills="20", seed="1", folder="")
    folder = Path(given["folder"] or tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(rows(chaos(int(given["kills"]), int(given["seed"]), folder)))

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main()
