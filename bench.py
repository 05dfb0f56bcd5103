"""
Measures how fast this machine trains, answers, evaluates and starts, and what it learns in some
minutes. Prints one table, with the goals beside.

    python bench.py                                       # all sections but learning
    python bench.py --quick=True                          # under three minutes on two cores
    python bench.py --sections=training,decoding --out=before.jsonl
    python bench.py --sections=training,decoding --beside=before.jsonl    # with ratios to that
    python bench.py --sections=learning --minutes=5 --data=my/texts --held_out=my/texts/last.jsonl

The sections:
    machine    memory bandwidth; the rate of matrix products, at the training's shapes and large
    training   steps of the reference model (depth 4, vocabulary 8,192, rows of 512), compiled; what
               they spend their time on; the first step, with its compilation
    decoding   tokens a second behind a prompt of 107, weights of 8 bits too; weights read a second
    core       the items of CORE's bundle on a random model; hours for all of them, from that
    start      each script's --help; status.py; base_train.py to its first step, which it takes
               after a validation of 4,096 tokens
    memory     peaks of a training step and of decoding, beside what memory.py predicts
    learning   trains by a recipe, once a seed, and measures bits per byte (see LEADERBOARD.md)

Every part runs in a process of its own, in a temporary folder: nothing of yours is read but the
bundle, the data and the held-out file, and nothing written but --out and --state. Other programs
that run meanwhile count: the load of the machine is printed first. Another program can be put
beside by a file of lines {"name": ..., "value": ..., "unit": ...}, as --out writes them.
"""
import common
import configurator
import corpus
import pipeline
import records

sections = ["machine", "training", "decoding",  # what is measured: some of
            "core", "start", "memory"]          # these, or learning
quick = False                # less often, no d20, no cold start, 2 items of each CORE task
device = "auto"              # device to compute on: auto, cuda, mps, cpu
dtype = "auto"               # compute dtype: auto (the faster), bfloat16, float32, float16
threads = 0                  # CPU threads; 0: all cores
compile = "auto"             # whether to use torch.compile: auto, True or False
device_batch_size = 8        # rows of 512 that a training step takes at once
bundle = ""                  # CORE's bundle; empty: that of the state folder
out = ""                     # file to write the figures to, a JSON line each
beside = ""                  # such a file of another run: a column of ratios, this / that
# learning
recipe = "config/five_minutes.py"  # settings of base_train.py, as seen from the repository
minutes = 5.0                # what the recipe's training time is held against
num_steps = -1               # steps of training; -1: as the recipe has it
seeds = "1,2,3"              # one training each
data = ""                    # folder of texts to train on
held_out = ""                # file of texts: bits per byte of its first 500 documents
vocab_size = 8192            # of the tokenizer that is trained first
state = ""                   # folder to keep the trainings in, to go on there; empty: a temporary
settings = configurator.configure(globals()) if __name__ == "__main__" else None

import contextlib
import functools
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

# -------------------------------------------------------------------------------------------------
# figures and their table

WORDS = {"": "", True: "ok", False: "MISSED"}  # for whether a goal is met

class Figures(list):
    """Dicts {"name", "value", "unit", "goal", "met"}, printed as they come."""

    def add(self, name, value, unit, at_most=None, at_least=None):
        """A figure, with its goal where it has one."""
        goal, met = "", ""
        if at_most is not None:
            goal, met = f"at most {number(at_most)}", value <= at_most
        if at_least is not None:
            goal, met = f"at least {number(at_least)}", value >= at_least
        self.append({"name": name, "value": value, "unit": unit, "goal": goal, "met": met})
        said = f" (goal: {goal}; {WORDS[met]})" if goal else ""
        print(f"  {name}: {number(value)} {unit}{said}", flush=True)

def number(value):
    """Four digits that count.  examples: 1.90314 -> "1.903", 2300.4 -> "2,300", 0 -> "0" """
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    places = 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, places)}f}"

def table(figures, other):
    """The lines of a Markdown table. other: {name: value} of another run, for a column of ratios.
    """
    yield "| figure | measured | " + ("ratio | " if other else "") + "goal | |"
    yield "|---|---|" + ("---|" if other else "") + "---|---|"
    for figure in figures:
        ratio = ""
        if other:
            before = other.get(figure["name"])
            ratio = f"{figure['value'] / before:.2f} | " if before else "- | "
        yield (f"| {figure['name']} | {number(figure['value'])} {figure['unit']} | {ratio}"
               f"{figure['goal'] or '-'} | {WORDS[figure['met']]} |")

def read_figures(path):
    """{name: value} of a file that --out has written. Failure where it is none."""
    common.check(os.path.isfile(path), f"there is no --beside={path}")
    lines = common.read_json_lines(path)
    common.check(lines and all({"name", "value"} <= line.keys() for line in lines),
                 f"--beside={path} holds no figures: --out writes such a file")
    return {line["name"]: line["value"] for line in lines}

# -------------------------------------------------------------------------------------------------
# processes of their own

@functools.cache  # what one section has measured another need not
def in_child(function, *args):
    """The function of this name in measure.py, run in a fresh process -> what it returns. Failure
    (code 1) where the process is killed."""
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, spawn) as pool:
            return pool.submit(call, function, *args).result()
    except BrokenProcessPool:
        common.fail(f"the process that measured {function} was killed: out of memory?", code=1)

def call(function, *args):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says that it was Ctrl-C
    common.end_with_parent()
    os.environ["KINETO_LOG_LEVEL"] = "99"  # else the profiler prints lines of its own
    import measure  # and torch, which takes seconds
    return getattr(measure, function)(*args)

# -------------------------------------------------------------------------------------------------
# machine

def cpu_in_words():
    """example: "AMD EPYC, 2 cores, avx2 avx512f avx512_bf16" """
    said = ""
    with contextlib.suppress(OSError):
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in said]
    return f"{records.machine()['CPU']}, {common.cores()} cores, {' '.join(flags)}"

def machine(figures, computing, work):
    found = in_child("machine", computing)
    print(f"  {found['words']}", flush=True)
    figures.add("memory read", found["bandwidth"] / 1e9, "GB/s")
    for name, (at_shapes, large) in found["rates"].items():
        figures.add(f"products of a d4's step, {name}", at_shapes / 1e9, "GFLOP/s")
        figures.add(f"product of 2,048 x 2,048, {name}", large / 1e9, "GFLOP/s")

# -------------------------------------------------------------------------------------------------
# training

def training_run(computing):
    return in_child("training", computing, device_batch_size, 3 if quick else 12)

def training(figures, computing, work):
    found = training_run(computing)
    speeds = in_child("machine", computing)
    print(f"  {speeds['words']}", flush=True)
    for tokens, parts in found["steps"].items():
        speed = tokens / sum(parts.values())
        figures.add(f"training, {tokens:,} tokens a step", speed, "tokens/s")
    rate = found["flops"] * speed
    goal = 60 if speeds["computed in"] != "float32" else None
    figures.add("training", rate / 1e9, "GFLOP/s")
    at_shapes, large = speeds["rates"][speeds["computed in"]]
    figures.add("training, of the products' rate", 100 * rate / at_shapes, "%", at_least=goal)
    figures.add("training, of a large product's rate", 100 * rate / large, "%")
    tokens, parts = min(found["steps"].items())
    whole = sum(parts.values())
    inside = {what: share * parts["passes"] for what, share in found["within"].items()}
    inside["fused kernels and the rest"] = parts["passes"] - sum(inside.values())
    inside.update(optimizer=parts["optimizer"], data=parts["data"])
    for what, seconds in inside.items():
        figures.add(f"{what}, of a step of {tokens:,} tokens", 100 * seconds / whole, "%")
    figures.add("first step, cold compilation", found["first"], "s", at_most=40)
    if not quick:
        again = in_child("training", computing, device_batch_size, 0)
        figures.add("first step, warm compilation", again["first"], "s")

# -------------------------------------------------------------------------------------------------
# decoding

def decoding_runs(computing):
    """(depth, what was measured) of each"""
    for depth in (4, 12) if quick else (4, 12, 20):
        yield depth, in_child("decoding", computing, depth, 24 if quick else 64)

def decoding(figures, computing, work):
    speeds = in_child("machine", computing)
    print(f"  {speeds['words']}", flush=True)
    for depth, found in decoding_runs(computing):
        for rows in (1, 16):
            figures.add(f"decoding d{depth}, batch {rows}", rows / found[rows], "tokens/s")
        figures.add(f"batch 16 over batch 1, d{depth}", 16 * found[1] / found[16], "times",
                    at_least=10)
        for rows, seconds in found["int8"].items():
            figures.add(f"decoding d{depth}, int8, batch {rows}", rows / seconds, "tokens/s")
        reading = found["weights"] / found[1]
        figures.add(f"weights read, d{depth}, batch 1", reading / 1e9, "GB/s")
        # the caches of some machines hold all of a d4
        figures.add(f"decoding's time over memory's, d{depth}, batch 1",
                    speeds["bandwidth"] / reading, "times", at_most=None if depth == 4 else 1.3)

# -------------------------------------------------------------------------------------------------
# core

def core(figures, computing, work):
    folder = bundle or pipeline.eval_bundle_dir("fineweb_edu")
    if not (Path(folder) / "core.yaml").is_file():
        print(f"  left out: CORE's bundle is not in {folder} (--bundle=FOLDER)")
        return
    found = in_child("core", computing, str(folder), 2 if quick else 12)
    seconds, items, _ = map(sum, zip(*found.values()))
    whole = sum(took / n * of for took, n, of in found.values())
    figures.add(f"CORE on a d4, {items} items of {len(found)} tasks", seconds, "s")
    figures.add("CORE on a d4", items / seconds, "items/s")
    figures.add("CORE on a d4, all items, from that", whole / 3600, "hours", at_most=2)

# -------------------------------------------------------------------------------------------------
# start

def in_folder(folder, cache=None):
    """The environment of a script whose state, and what it compiles (or in `cache`), is there."""
    ours = ("NANOCHAT_", "TORCHINDUCTOR_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return {**kept, "NANOCHAT_BASE_DIR": str(folder),
            "TORCHINDUCTOR_CACHE_DIR": str(cache or folder / "compiled")}

def as_words(computing):
    """example: (("device", "cpu"), ("threads", 0)) -> ["--device=cpu", "--threads=0"]"""
    return [f"--{key}={value}" for key, value in computing]

def run_script(env, *words, until=None):
    """Runs `python WORDS` in silence -> seconds until it ends, or begins a line with `until`; it is
    killed then. Failure (code 1) with its last line."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=pipeline.REPO, env=env, text=True,
                               errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        last = ""
        for line in process.stdout:
            if until and line.startswith(until):
                return time.perf_counter() - began
            last = line.strip() or last
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if until or code != 0:
        common.fail(f"{words[0]} ended with {code}: {last}", code=1)
    return time.perf_counter() - began

def write_texts(folder):
    """Two files of random words, of which the second is held out."""
    folder.mkdir()
    drawn = common.rng(0, 2)
    letters = [chr(97 + i) for i in range(26)]
    words = ["".join(drawn.choice(letters, size=2 + i % 9)) for i in range(5000)]
    for name, documents in (("a.jsonl", 500), ("b.jsonl", 50)):
        texts = [" ".join(drawn.choice(words, size=300)) for _ in range(documents)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / name).write_text("".join(lines), encoding="utf-8")

def start(figures, computing, work):
    goals = {"cold": 40, "warm": 15}
    env = in_folder(work / "state", work / "compiled" if quick else None)
    if quick and "training" in sections:
        del goals["cold"]  # what the training above has compiled is there
    configures = "\nsettings = configurator.configure("
    scripts = sorted(path.name for path in pipeline.REPO.glob("*.py")
                     if configures in path.read_text(encoding="utf-8"))
    times = {}
    for script in scripts:
        times[script] = min(run_script(env, script, "--help") for _ in range(1 if quick else 3))
    slowest = max(times, key=times.get)
    print(f"  the slowest of {len(scripts)} scripts is {slowest}")
    figures.add("--help of the slowest script", times[slowest], "s", at_most=0.3)
    write_texts(work / "texts")
    where = f"--data={work / 'texts'}"
    run_script(env, "tok_train.py", where, "--vocab_size=8192")
    shape = ["--depth=4", "--max_seq_len=512", "--total_batch_size=4096", "--num_steps=10",
             f"--device_batch_size={device_batch_size}", "--eval_tokens=4096"]
    for how, goal in goals.items():
        seconds = run_script(env, "base_train.py", where, f"--tag={how}", *shape,
                             *as_words(computing), until="step 1/")
        figures.add(f"base_train.py to its first step, {how}", seconds, "s", at_most=goal)
    seconds = min(run_script(env, "status.py") for _ in range(3))
    figures.add("status.py", seconds, "s", at_most=1)

# -------------------------------------------------------------------------------------------------
# memory

def memory(figures, computing, work):
    runs = [(f"training, {device_batch_size} rows at once", training_run(computing))]
    runs += [(f"decoding d{depth}", found) for depth, found in decoding_runs(computing)]
    for name, found in runs:
        figures.add(f"peak of {name}", found["peak"] / 1e6, "MB")
        figures.add(f"tensors of {name}", found["allocated"] / 1e6, "MB")
        off = 100 * abs(found["predicted"] / found["allocated"] - 1)
        figures.add(f"memory.py's formula for {name}, off by", off, "%", at_most=10)

# -------------------------------------------------------------------------------------------------
# learning

def learning(figures, computing, work):
    root = Path(state).expanduser().resolve() if state else work / "learning"
    env = in_folder(root)
    os.environ["NANOCHAT_BASE_DIR"] = str(root)
    run_script(env, "tok_train.py", f"--data={data}", f"--vocab_size={vocab_size}")
    commit, changed = records.source_version()
    print(f"  {' '.join(sys.argv)}\n  commit {commit}{' and changes' if changed else ''}")
    results = []
    for seed in seeds.split(","):
        tag = f"{Path(recipe).stem}-{seed}"
        words = ["base_train.py", *as_words(computing), recipe, f"--data={data}",
                 f"--seed={seed}", f"--tag={tag}"]
        if num_steps != -1:
            words.append(f"--num_steps={num_steps}")
        code = subprocess.run([sys.executable, *words], cwd=pipeline.REPO, env=env,
                              check=False).returncode
        if code != 0:
            common.fail(f"base_train.py ended with {code}: above is why; with --state the same "
                        "command goes on", code=1)
        directory = pipeline.state_path("base", data, tag)
        record = common.read_json(directory / "phase.json")
        lines = [line for line in common.read_json_lines(directory / "metrics.jsonl")
                 if line.get("kind") == "train"]
        seconds = [line["clock"]["seconds"] for line in lines]
        bpb, samples = in_child("learned", computing, data, tag, held_out)
        results.append(bpb)
        figures.add(f"seed {seed}, bits per byte", bpb, "bits/byte")
        figures.add(f"seed {seed}, training", (seconds[-1] - seconds[0]) / 60, "minutes",
                    at_most=minutes)
        figures.add(f"seed {seed}, first step, which compiles", seconds[0], "s")
        figures.add(f"seed {seed}, steps", len(lines), "steps")
        figures.add(f"seed {seed}, tokens", record["tokens"] / 1e6, "million")
        for sample in samples:
            print(f"  sample: {sample!r}")
    figures.add(f"bits per byte, mean of {len(results)}", statistics.mean(results), "bits/byte")
    figures.add("bits per byte, largest less smallest", max(results) - min(results), "bits/byte")

# -------------------------------------------------------------------------------------------------

SECTIONS = {"machine": machine, "training": training, "decoding": decoding, "core": core,
            "start": start, "memory": memory, "learning": learning}

def check_settings():
    """Failure (code 2) before anything is measured."""
    for name in sections:
        common.check(name in SECTIONS, f"--sections takes {', '.join(SECTIONS)}, not {name!r}")
    writable = os.access(os.path.dirname(out) or ".", os.W_OK) and not os.path.isdir(out)
    common.check(not out or writable, f"--out={out} cannot be written")
    if "learning" not in sections:
        return
    whole = all(seed.isdecimal() for seed in seeds.split(","))
    common.check(whole, f"--seeds takes whole numbers, as in 1,2,3, not {seeds!r}")
    with pipeline.naming(f"--state={state}"):
        Path(state).expanduser().resolve()
    common.check(data, "learning needs --data=FOLDER of texts")
    common.check(os.path.isfile(held_out), "learning needs --held_out=FILE, a file of texts that "
                 f"is not trained on: there is no {held_out!r}")
    common.check(os.path.isfile(pipeline.REPO / recipe), f"there is no --recipe={recipe}")
    trained_on = corpus.dataset_files(data)["train"].values()
    common.check(Path(held_out).resolve() not in [path.resolve() for path in trained_on],
                 f"--held_out={held_out} would be trained on: take a file that is not in --data, "
                 "or the one held out for validation")

def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing outlives it
    other = read_figures(beside) if beside else {}
    check_settings()
    computing = tuple((key, settings[key]) for key in ("device", "dtype", "threads", "compile"))
    figures = Figures()
    print(f"{cpu_in_words()}; load {os.getloadavg()[0]:.1f}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "compiled")
        for name, measure_section in SECTIONS.items():
            if name in sections:
                print(f"{name} ({common.duration(time.monotonic() - began)} so far)", flush=True)
                measure_section(figures, computing, work)
    print("\n" + "\n".join(table(figures, other)))
    if out:
        lines = [json.dumps(figure) + "\n" for figure in figures]
        with common.writing(out):
            common.atomic_write(out, "".join(lines))

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        common.fail("interrupted: no table and no --out", code=130)
