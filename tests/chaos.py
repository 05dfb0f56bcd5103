"""
Kills the small pipeline at random instants, again and again, each time starting the same command anew; when it has come to its
end everything that it made must equal, bit for bit, what a run that nobody disturbed has made. Rounds from nothing to the end
follow each other until enough kills have landed.

    python tests/chaos.py --kills=200 --seed=1      prints a line for each kill and a table; exit code 1 at the first difference
    tests/test_chaos.py                             a handful of them
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
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
COMMAND = ["bash", "speedrun.sh", "--depth=1", "--nproc=1", "--", "--size=0.02", "--vocab_size=512", "--max_seq_len=128", "--total_batch_size=1024",
           "--num_steps=30", "--max_steps=30", "--eval_every=10", "--max_items=20", "--core_items=8", "--compile=False", "--dtype=float32", "--threads=1",
           "--device=cpu", "--device_batch_size=8", "--eval_tokens=4000", "--eval_problems=8", "--eval_samples=2", "--problems_per_step=2", "--samples=8",
           "--max_new_tokens=16", "--save_minutes=0.01"]
STAGES = ("base_checkpoints", "mid_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints")
INSTANTS = {"at any moment": 5, "during a save": 2, "tokenising": 1, "evaluating": 2, "between phases": 2}  # and how often, relatively
PATIENCE = 300  # seconds without an end of the script after a kill: it hangs


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def without_clock(x):
    return {k: without_clock(v) for k, v in x.items() if k not in ("clock", "seconds")} if isinstance(x, dict) else x


def result(state):
    """What has to be equal: data, tokenizer, the weights and the optimizer of every phase, metrics, evaluations, the report's tables. -> {name: value}"""
    root, found = Path(state) / "toy", {}
    for path in [*root.glob("base_data/*.parquet"), *root.glob("task_data/*"), *root.glob("tokenizer/*.txt")]:
        found[str(path.relative_to(root))] = sha(path)
    for stage in (s for s in STAGES if (root / s / "d1").exists()):
        manifest, = (root / stage / "d1").glob("manifest_*.json")
        for name in json.loads(manifest.read_text())["files"]:
            if not name.startswith("meta"):
                found[f"{stage}/{name}"] = sha(root / stage / "d1" / name)
        found[f"{stage}/metrics"] = [without_clock(json.loads(line)) for line in (root / stage / "d1/metrics.jsonl").read_text().splitlines()]
    for path in root.glob("report/*.json"):
        found[path.name] = without_clock(json.loads(path.read_text()))
    report = (root / "report/report.md").read_text()
    found["report"] = [line for line in report[report.index("## Scores"):].split("\n") if line.startswith("|")]
    return found


def start(state, log):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "NANOCHAT_"))}
    with open(log, "w") as f:
        return subprocess.Popen(COMMAND, cwd=REPO, env={**environment, "NANOCHAT_BASE_DIR": str(state)}, stdin=subprocess.DEVNULL,
                                stdout=f, stderr=subprocess.STDOUT, start_new_session=True)


def phases_begun(log):
    return [line.split()[1].rstrip(":") for line in log.read_text(errors="replace").splitlines() if line.startswith("=== ")]


def works(log):
    """Whether the phase that was begun last has said more than that it is done already."""
    said = log.read_text(errors="replace").split("=== ")[-1].splitlines()[1:]
    return any(line and "done already" not in line and not line.startswith("the toy world") for line in said)


def phase_of(pid):
    """The process of the phase that the script `pid` is running, or None. Its small questions to Python are no phases."""
    try:
        for child in reversed(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            if "--data=toy" in (words := Path(f"/proc/{child}/cmdline").read_text().split("\0")) and "status.py" not in words:
                return int(child)
    except OSError:
        pass


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def instant_came(instant, root, log, now, delay, phases_before, due):
    """Whether the instant drawn is now; `due` remembers when an evaluation was first seen."""
    if instant == "at any moment":
        return now > delay
    if instant == "during a save":
        return now > delay / 2 and any(any((root / s).glob("d1/.*.tmp*")) for s in STAGES)
    if instant == "tokenising":
        return any(root.glob("tokens/*/*.tmp*")) or "tokenising" in log.read_text(errors="replace")
    begun = phases_begun(log)
    if instant == "between phases":
        return len(begun) > phases_before
    if begun and begun[-1].endswith("-eval"):
        due.setdefault("at", now + delay / 3)  # somewhere within it
    return now > due.get("at", 1e9)


def life(state, log, draw, span):
    """Starts the command and sends signals at instants drawn until one has ended it, or it has come to its end. -> (what was done, whether it landed, exit code)"""
    root, process, what = Path(state) / "toy", start(state, log), None
    while process.poll() is None:
        instant, signum = draw.choices(list(INSTANTS), INSTANTS.values())[0], draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
        draw_work = draw.random() < 0.75  # mostly the clock starts when there is something to do
        at_phase, delay, due, before = draw.random() < 0.5, draw.uniform(0.0, span), {}, len(phases_begun(log)) + draw.randint(0, 2)
        while draw_work and process.poll() is None and not works(log):
            time.sleep(0.005)
        t0 = time.time()
        while process.poll() is None:
            now = time.time() - t0
            instant = instant if now < 2 * span else "at any moment"
            target = phase_of(process.pid) if at_phase else process.pid
            if target and instant_came(instant, root, log, now, delay, before, due):
                break
            time.sleep(0.005)
        at = (phases_begun(log) or ["the start"])[-1]
        if process.poll() is not None or not alive(target):
            continue
        os.kill(target, signum)
        what = (signum.name, "phase" if at_phase else "script", instant, at)
        deadline = time.time() + PATIENCE
        phases = len(phases_begun(log))
        while process.poll() is None and len(phases_begun(log)) == phases:  # where the phase was at its end already, the next one begins
            if time.time() > deadline:
                raise SystemExit(f"HANGS after {signum.name} {instant} in {at}; log: {log}")
            time.sleep(0.01)
    return what or ("nothing", "", "", ""), what is not None and process.returncode != 0, process.returncode


def chaos(kills, seed, folder, say=print):
    """Runs rounds until `kills` have landed -> Counter of what landed; AssertionError where a round's result differs from the straight run's"""
    folder, draw = Path(folder), random.Random(seed)
    t0 = time.time()
    code = start(folder / "straight", folder / "straight.log").wait()
    assert code == 0, (folder / "straight.log").read_text()[-3000:]
    straight, span = result(folder / "straight"), 0.15 * (time.time() - t0)
    say(f"the straight run took {time.time() - t0:.0f} s and made {len(straight)} things to compare")
    table, number, lives = collections.Counter(), 0, 0
    while sum(table.values()) < kills:
        number += 1
        state, begun, code = folder / f"round{number}", sum(table.values()), None
        while code != 0:
            lives += 1
            log = folder / f"life{lives:04d}.log"
            if sum(table.values()) < kills:
                what, landed, code = life(state, log, draw, span)
                table[what] += landed
                say(f"{sum(table.values()):4d} of {kills} | life {lives} | {what[0]} to the {what[1]} {what[2]} in {what[3]} | "
                    f"{'landed' if landed else 'missed'}, exit code {code}")
                wrong = code not in (0, 75, 137, -signal.SIGKILL) and what[3] != "the start"  # a script that has just been started has no trap yet
            else:
                what, code = ("nothing", "", "", ""), start(state, log).wait(PATIENCE)
                wrong = code != 0 and code != 75
            # killed: 137 or -9; asked to stop: 75; anything else is an error that the kill has brought about
            assert not wrong or (what[0] == "SIGKILL" and what[1] == "phase"), f"exit code {code}, see {log}:\n" + log.read_text()[-2000:]
        made = result(state)
        for name in sorted(set(straight) | set(made)):
            assert straight.get(name) == made.get(name), f"round {number}: {name} differs: {straight.get(name)} and {made.get(name)}; see {folder}"
        say(f"round {number}: {sum(table.values()) - begun} kills, and everything equals the straight run")
        shutil.rmtree(state)
    assert sum(table.values()) == kills
    say(f"{kills} kills landed in {number} rounds and {lives} lives, {time.time() - t0:.0f} s")
    return table


def rows(table):
    """A table: signal and target by instant."""
    lines = [f"{'':<18}" + "".join(f"{i:>18}" for i in INSTANTS)]
    for key in sorted({k[:2] for k in table}):
        lines.append(f"{' to the '.join(key):<18}"[:24].ljust(18) + "".join(f"{sum(n for k, n in table.items() if k[:3] == (*key, i)):>18}" for i in INSTANTS))
    return "\n".join(lines)


if __name__ == "__main__":
    given = {"kills": 20, "seed": 1, "folder": ""}
    for arg in sys.argv[1:]:
        name, _, value = arg.removeprefix("--").partition("=")
        if name not in given or not value:
            sys.exit(f"error: cannot read {arg!r}: python tests/chaos.py [--kills=20] [--seed=1] [--folder=...]")
        given[name] = value
    place = given["folder"] or tempfile.mkdtemp(prefix="chaos-")
    Path(place).mkdir(parents=True, exist_ok=True)
    print(rows(chaos(int(given["kills"]), int(given["seed"]), place, lambda line: print(line, flush=True))))
