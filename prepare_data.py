"""
Phase 0: brings everything that a later phase reads into the state folder, and opens all of it.
After it nothing needs the internet. What the phases read is taken from their own settings.

    python prepare_data.py --data=toy                        # generates the toy world: no download
    python prepare_data.py --data=fineweb_edu --depth=20     # downloads; run it again to continue
    python prepare_data.py --data=../my/folder               # your own text; tasks are downloaded
    python prepare_data.py --data=fineweb_edu --check=True   # only looks: exit 0 if all is there

A task is also read from a .jsonl, .jsonl.gz or .parquet file of your own that you put (or link)
into task_data/. Settings of one phase are taken too: --sft.mixture=gsm8k,arc_easy
"""
from run import Run

run = Run.start("prepare_data")

import contextlib
import functools
import json
import math
import zipfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import common
import configurator
import download
import pipeline
import records
import tasks as task_list
import texts

data = "toy"                 # toy, fineweb_edu, climbmix, or a folder of texts
seed = 1337                  # of the toy world
size = 1.0                   # of the toy world: how much text, relative
# ---- settings below may change at every resume
check = False                # only look, write nothing
depth = 20                   # fineweb_edu, climbmix: text for a model of this depth
shards = -1                  # how many shards of it (and the one held out); -1: what it needs
tokens_per_param = -1.0      # the horizon, as base_train.py takes it; -1: its default
target_flops = -1.0          # likewise
num_steps = -1               # likewise
total_batch_size = -1        # likewise
phases = []                  # what is required is what these read, e.g. tok,base; empty: all
mixture = []                 # what mid and sft learn from; empty: as they declare it
held_out = []                # what they are measured on; empty: as they declare it
tasks = []                   # what the chat models are measured on; empty: as chat_eval.py has it
task = ""                    # what rl practises; empty: as chat_rl.py declares it
extra_conversations = ""     # your own conversations for mid and sft
core_items = -1              # 0: no CORE
workers = 8                  # files downloaded at once
start_over = False           # put the old data aside and make it again
settings = configurator.configure(globals(), of_phases=True)

# settings of the phases that name tasks, and which splits of them are read
READS = {
    "mixture": ["train"],
    "extra_conversations": ["train"],
    "held_out": ["test"],
    "tasks": ["test"],
    "task": ["train", "test"],
}
SHARD_TOKENS = 50_000_000  # 250 million characters, nearly 5 a token
LARGE = 500_000_000        # bytes of a file that a check does not read to its end

common.check(0.001 <= size <= 1000, f"--size must be 0.001 to 1000, not {size}")
common.check(workers >= 1, f"--workers must be at least 1, not {workers}")
readers = [phase.name for phase in pipeline.PHASES if phase.name not in ("data", "report")]
unknown = {*phases} - {*readers, "data", "report"}
common.check(not unknown, f"--phases: there is no phase {', '.join(unknown)}; there are "
             f"{', '.join(readers)}")
phases = [name for name in readers if name in phases] or readers
directory, root = pipeline.base_data_dir(data), pipeline.data_root(data)
again = run.command.replace(" --check=True", "")

# -------------------------------------------------------------------------------------------------
# what the phases read

def setting_of(name, key):
    """A setting of the phase `name`, as it was given to this script, or its default; None where it
    has no such setting."""
    usual = configurator.defaults(pipeline.find_phase(name).script).get(key)
    if usual is None:
        return None
    given = settings.of_phases.get(f"{name}.{key}")
    if given is not None:
        return configurator.convert(key, given, usual)
    return settings[key] if settings[key] not in ([], "", -1) else usual

def needed():
    """-> {what: phases that read it}; what is "text", "CORE", the stem of a task's files, or the
    Path of a file of the user's own conversations."""
    found = {}
    for name in phases:
        if name in ("tok", "base", "base-eval"):
            found.setdefault("text", []).append(name)
        if setting_of(name, "core_items"):
            found["CORE"] = [name]
        for key, splits in READS.items():
            value = setting_of(name, key) or []
            specs = value if isinstance(value, list) else [value]
            for spec, split in product(specs, splits):
                task = task_list.parse(spec)[0]
                what = task_list.TASKS.get(task, {split: Path(task)}).get(split)
                common.check(what, f"the task {task} has no {split} split ({name} reads it)")
                found.setdefault(what, []).append(name)
    return found

def shards_needed():
    """How many training shards the horizon of the base model needs (see training.horizon), a little
    more rather than less; without importing torch."""
    keys = ("tokens_per_param", "target_flops", "num_steps", "total_batch_size")
    per_param, flops, steps, batch = [setting_of("base", key) for key in keys]
    width = 128 * math.ceil(depth / 2)
    parameters = depth * 12 * width ** 2 + 32768 * width  # of matrices and head
    tokens = per_param * parameters
    if flops > 0:
        tokens = flops / (6 * parameters)
    if steps != -1:
        tokens = steps * (2 ** 19 if batch == -1 else batch)
    return math.ceil(tokens / SHARD_TOKENS) + 1

# -------------------------------------------------------------------------------------------------
# what is wrong with a file: None, or words

def text_problem(path):
    """Of parquet the footer is read, of a large .jsonl the first lines."""
    if path.suffix == ".parquet":
        return texts.parquet_problem(path)
    if path.suffix == ".txt":
        return None
    enough = None if path.stat().st_size < LARGE else 10_000
    return texts.problem(path, texts.read_lines(path), texts.text_of, enough)

def word_of(line):
    if len(line) > 100:
        raise ValueError("no word")
    return task_list.word_of(line)

def task_problem(name, path):
    """Of parquet the footer and the first rows are read, of other files everything."""
    if name in ("spellingbee", "simplespelling"):
        return texts.problem(path, texts.read_lines(path), word_of)
    enough = 100 if path.suffix == ".parquet" else None
    convert = functools.partial(task_list.convert, name)
    return texts.problem(path, texts.read_rows(path), convert, enough)

def bundle_problem(path):
    """path: the folder of the CORE bundle, or the .zip that it comes in"""
    try:
        if path.is_dir():
            import core_eval  # it imports torch
            missing = core_eval.read_bundle(path)[1]
            return f"{path} has no items of {', '.join(missing)}" if missing else None
        with zipfile.ZipFile(path) as bundle:
            damaged = bundle.testzip()  # reads all of it
            return f"{damaged} in {path} is damaged" if damaged else None
    except (common.Failure, OSError, ValueError, zipfile.BadZipFile) as e:
        return f"{path}: {e}"

def toy_problem(written, path):
    same = [path.stat().st_size, common.sha256_file(path)] == written
    return None if same else f"{path} is not as it was written"

# -------------------------------------------------------------------------------------------------
# what has to be there

@dataclass
class File:
    what: str        # its name in the table
    path: Path
    needs: list      # phases that read it
    problem: object  # problem(path) -> None or what is wrong with it
    url: str | None  # where it comes from, "here" where it is made; None: the user puts it right
    size: int = 0    # bytes, roughly
    wrong: str | None = None

def text_files(needs):
    if pipeline.is_folder_data(data):
        return [File("text", path, needs, text_problem, None) for path in texts.text_files(data)]
    address, many, about = download.ADDRESSES[data]
    wanted = min(many - 1, shards if shards != -1 else shards_needed())
    # a damaged one that nobody asked for would stop a phase too
    there = [int(path.stem[6:]) for path in directory.glob("shard_?????.parquet")]
    return [File("text", directory / f"shard_{i:05d}.parquet", needs, text_problem,
                 address.format(i), about) for i in sorted({*range(wanted), many - 1, *there})]

def task_files(stem, needs):
    """The files of a split of a task: the ones that are there, which may be the user's own, or
    those to come."""
    address, many, about = download.ADDRESSES.get(stem, ("", 1, 0))
    ending = address.rpartition(".")[2] or "jsonl"
    urls = {}
    for i in range(many):
        part = f"-{i:05d}-of-{many:05d}" if many > 1 else ""
        urls[pipeline.task_dir(data) / f"{stem}{part}.{ending}"] = address.format(i) or None
    paths = task_list.located(stem, data)
    if stem == "identity_train" and not paths:
        urls = dict.fromkeys(urls, "here")
    problem = functools.partial(task_problem, task_list.TASK_OF[stem])
    return [File(stem, path, needs, problem, urls.get(path), about) for path in paths or urls]

def toy_files(needs):
    """The files of the toy world, as they were written."""
    written = records.find_record(directory, settings).get("files")
    if not written:
        return [File("toy world", directory, phases, lambda path: f"{path} was never filled",
                     "here")]
    files = []
    for name, stated in written.items():
        top, stem = name.split("/")[0], Path(name).name.split(".")[0]
        what = {"base_data": "text", "eval_bundle": "CORE"}.get(top, stem)
        problem = functools.partial(toy_problem, stated)
        files.append(File(what, root / name, needs.get(what, []), problem, "here"))
    return files

def required_files():
    """-> list of File: everything that the phases read"""
    needs = needed()
    files = toy_files(needs) if data == "toy" else []
    for what, names in needs.items():
        if isinstance(what, Path):
            problem = functools.partial(task_problem, str(what))
            files.append(File("conversations", what, names, problem, None))
        elif data == "toy":
            continue
        elif what == "text":
            files += text_files(names)
        elif what == "CORE":
            url, _, about = download.ADDRESSES["eval_bundle"]
            folder = pipeline.eval_bundle_dir(data)
            if folder.is_symlink():
                url = None  # never unpacked over the user's own
            files.append(File("CORE", folder, names, bundle_problem, url, about))
        else:
            files += task_files(what, names)
    return files

def look():
    """Opens everything, prints the table. -> the Files with which something is wrong"""
    files = required_files()
    for file in files:
        there = file.path.exists()
        file.wrong = file.problem(file.path) if there else f"{file.path} is missing"
    common.print0(f"{'':<9}{'what':<26}{'files':>12}{'MB':>12}   {'read by':<30} what to do")
    for what in dict.fromkeys(file.what for file in files):
        show(what, [file for file in files if file.what == what])
    return [file for file in files if file.wrong]

def show(what, files):
    """Prints a line of the table, and what is damaged."""
    bad = [file for file in files if file.wrong]
    damaged = [file.wrong for file in bad if file.path.exists()]
    state, to_do = "have", ""
    if bad:
        state = "damaged" if damaged else "missing"
        to_do = again if all(file.url for file in bad) else "put it right"
        if what in task_list.TASK_OF and data != "toy":
            to_do += (f", or link or copy your own to {pipeline.task_dir(data) / what}.jsonl, or "
                      "take it out of the settings")
    good = [file.path for file in files if not file.wrong]
    size = sum(path.stat().st_size for top in good for path in (top, *top.rglob("*")))
    needs = " ".join(dict.fromkeys(files[0].needs))
    there = f"{len(good)} of {len(files)}"
    common.print0(f"{state:<9}{what:<26}{there:>12}{size / 1e6:>12,.1f}   {needs:<30} {to_do}")
    for why in damaged[:5]:
        common.print0(f"{'':9}{why}")

# -------------------------------------------------------------------------------------------------
# what is made here

def identity_conversations():
    """1,000 conversations of one to three turns about the model itself, always the same: jsonl."""
    assets = json.loads((pipeline.REPO / "assets" / "identity.json").read_text(encoding="utf-8"))
    topics, openings = assets["topics"], assets["openings"]
    lines = []
    for i in range(1000):
        draw = common.rng(21, i)
        messages = []
        for number in draw.permutation(len(topics))[:1 + draw.integers(3)]:
            topic = topics[number]
            opening = "" if messages else draw.choice(openings)
            question = opening + draw.choice(topic["questions"])
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": draw.choice(topic["answers"])})
        lines.append(json.dumps({"messages": messages}) + "\n")
    return "".join(lines)

def generate_toy_world():
    import toy_world
    counts = toy_world.generate(root, seed, size)
    made = [*directory.glob("shard_*"), *pipeline.task_dir(data).glob("[!.]*"),
            *pipeline.eval_bundle_dir(data).rglob("[!.]*.*")]
    files = {str(path.relative_to(root)): [path.stat().st_size, common.sha256_file(path)]
             for path in sorted(made)}
    common.print0("the toy world: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))
    run.exit_done(counts=counts, files=files)

def unpack_bundle(zipped):
    """File by file, so that a death leaves none that looks whole and is not."""
    with contextlib.suppress(FileNotFoundError), zipfile.ZipFile(zipped) as bundle:
        # gone: another process has unpacked it
        for name in bundle.namelist():
            if name.startswith("eval_bundle/") and ".." not in name and name[-1] != "/":
                common.atomic_write(zipped.parent / name, bundle.read(name))
    zipped.unlink(missing_ok=True)

# -------------------------------------------------------------------------------------------------
# only looking, or making and bringing what is not there

bad = look()
if check:
    bad = [file for file in bad if file.needs]  # what no phase reads is only shown
    common.check(not bad, f"{len(bad)} of the files that the phases read are missing or damaged",
                 again)
    run.leave(0, "done")
by_hand = [file.wrong for file in bad if not file.url]
common.check(not by_hand, f"{len(by_hand)} files have to be put right by hand, see the table: "
             f"{'; '.join(by_hand[:3])}")

if not pipeline.is_folder_data(data):
    if data != "toy":
        settings.defining = {"data": data}
    run.open_or_exit(directory, settings, {}, lambda: next((file.wrong for file in bad), None))
if data == "toy":
    generate_toy_world()
if start_over:
    bad = look()  # the old data was put aside

for file in bad:
    if file.url == "here":
        common.atomic_write(file.path, identity_conversations())
bad = [file for file in bad if file.url != "here"]
if bad:
    zipped = pipeline.eval_bundle_dir(data).with_suffix(".zip")
    jobs = [(file.url, zipped if file.what == "CORE" else file.path, file.problem, file.size)
            for file in bad]
    tokens = SHARD_TOKENS * sum(file.what == "text" for file in bad)  # of two bytes
    download.fetch_all(jobs, again, run.stop_reason, workers, also=2 * tokens)
    if zipped.exists():
        unpack_bundle(zipped)
    bad = look()
    common.check(not bad, f"{len(bad)} files are still missing or damaged, see the table", again)
if pipeline.is_folder_data(data):
    files = texts.dataset_files(data)
    common.print0(f"data: {len(files['train'])} files to train on and {len(files['val'])} to "
                  f"validate on in {directory}")
run.exit_done()
