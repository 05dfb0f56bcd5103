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
import json
import math
import re
import shlex
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import common
import configurator
import download
import pipeline
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
READS = {"mixture": ["train"], "extra_conversations": ["train"], "held_out": ["test"],
         "tasks": ["test"], "task": ["train", "test"]}
# read by no phase; they come with the others
NOT_READ = ["mmlu_dev", "mmlu_validation", "arc_easy_validation", "arc_challenge_validation"]
SHARD_TOKENS = 50_000_000  # 250 million characters, nearly 5 a token
WHOLE = 500_000_000        # a folder of more bytes than this is not read to its end by a check

common.check(0.001 <= size <= 1000, f"--size must be 0.001 to 1000, not {size}")
common.check(1 <= depth <= 100 and workers >= 1 and shards >= -1, "--depth must be 1 to 100, "
             "--workers at least 1, --shards at least 0 (or -1)")
readers = [p.name for p in pipeline.PHASES if p.name not in ("data", "report")]
unknown = [name for name in phases if name not in ("data", "report", *readers)]
common.check(not unknown, f"--phases: there is no phase {', '.join(unknown)}; there are "
             f"{', '.join(readers)}")
phases = [name for name in readers if name in phases] or readers
directory, root = pipeline.base_data_dir(data), pipeline.data_root(data)
again = "python prepare_data.py " + shlex.join(
    a for a in sys.argv[1:] if not a.startswith("--check"))

# -------------------------------------------------------------------------------------------------
# what has to be there

# what: its name in the table; needs: the phases that read it; problem(path) -> None or what is
# wrong with it; url: where it comes from, or None; size: bytes, roughly
File = namedtuple("File", "what path needs problem url size")

def setting_of(name, key):
    """A setting of the phase `name`, as it was given to this script, or its default."""
    usual = configurator.defaults(pipeline.find_phase(name).script)[key]
    given = settings.of_phases.get(f"{name}.{key}")
    if given is not None:
        return configurator.convert(key, given, usual)
    return settings[key] if settings.get(key) not in ([], "", -1, -1.0, None) else usual

def task_splits():
    """-> {(task, split): [phases that read it]}"""
    found = {}
    for name in phases:
        declared = configurator.defaults(pipeline.find_phase(name).script)
        for key in [key for key in READS if key in declared]:
            value = setting_of(name, key)
            for spec in value if isinstance(value, list) else filter(None, [value]):
                for split in READS[key]:
                    found.setdefault((task_list.parse(spec)[0], split), []).append(name)
    return found

def shards_needed():
    """How many training shards the horizon of the base model needs (see training.horizon), a little
    more rather than less; without importing torch."""
    width = 128 * math.ceil(depth / 2)
    parameters = depth * 12 * width ** 2 + 32768 * width  # of matrices and head
    tokens = setting_of("base", "tokens_per_param") * parameters
    if setting_of("base", "target_flops") > 0:
        tokens = setting_of("base", "target_flops") / (6 * parameters)
    if setting_of("base", "num_steps") != -1:
        batch = setting_of("base", "total_batch_size")
        tokens = setting_of("base", "num_steps") * (2 ** 19 if batch == -1 else batch)
    return math.ceil(tokens / SHARD_TOKENS) + 1

def text_problem(path):
    if path.name.endswith(".parquet"):
        import pyarrow.parquet
        why = texts.parquet_problem(path, "text")
        empty = why is None and not pyarrow.parquet.read_metadata(path).num_rows
        return f"{path} holds no rows" if empty else why
    if path.name.endswith(".txt"):
        return None
    total = sum(p.stat().st_size for p in directory.iterdir() if p.is_file())
    return texts.problem(path, texts.read_lines(path), texts.text_of,
                         None if total <= WHOLE else 10_000)

def text_files():
    """The texts: shards of a known data set, or the user's own files."""
    needs = [name for name in phases if name in ("tok", "base", "base-eval")]
    if not needs:
        return []
    if pipeline.is_folder_data(data):
        return [File("text", path, needs, text_problem, None, 0) for path in texts.text_files(data)]
    address, many, about = download.ADDRESSES[data]
    wanted = min(many - 1, shards if shards != -1 else shards_needed())
    numbers = {*range(wanted), many - 1}
    # a damaged one that nobody asked for would stop a phase too
    numbers |= {int(path.stem[6:]) for path in directory.glob("shard_?????.parquet")}
    return [File("text", directory / f"shard_{i:05d}.parquet", needs, text_problem,
                 address.format(i), about) for i in sorted(numbers)]

def word_of(line):
    if len(line) > 100:
        raise ValueError("no word")
    return task_list.word_of(line)

def task_problem(path, name):
    """Of parquet the footer and the first rows are read, of other files everything."""
    if name in ("spellingbee", "simplespelling"):
        return texts.problem(path, texts.read_lines(path), word_of)
    enough = 100 if path.name.endswith(".parquet") else None
    return texts.problem(path, task_list.rows_of(path),
                         lambda row: task_list.convert(name, row), enough)

def task_files(name, split, needs, stem=None):
    """The files of a split of a task, or of a .jsonl file of the user's own conversations."""
    def problem(path):
        return task_problem(path, name)
    if name not in task_list.TASKS:
        return [File("conversations", Path(name), needs, problem, None, 0)]
    stem = stem or task_list.TASKS[name].get(split)
    common.check(stem, f"the task {name} has no {split} split ({', '.join(needs)} reads it)")
    address, many, about = download.ADDRESSES.get(stem, ("", 1, 0))
    ending = address.rpartition(".")[2] or "jsonl"
    urls = {}
    for i in range(many):
        part = f"-{i:05d}-of-{many:05d}" if many > 1 else ""
        path = pipeline.task_dir(data) / f"{stem}{part}.{ending}"
        urls[path] = address.format(i) or None
    return [File(stem, path, needs, problem, urls.get(path), about)
            for path in task_list.located(stem, data) or urls]

def bundle_problem(folder):
    """None, or what the folder of the CORE bundle (or the .zip that it comes in) lacks."""
    try:
        if folder.name.endswith(".zip"):
            with zipfile.ZipFile(folder) as bundle:
                damaged = bundle.testzip()  # reads all of it
                if damaged:
                    return f"{damaged} is damaged"
                whole = "eval_bundle/core.yaml" in bundle.namelist()
                return None if whole else f"{folder} is no CORE bundle"
        named = (folder / "core.yaml").read_text(encoding="utf-8")
        uris = re.findall(r"^\W*dataset_uri: *['\"]?([^'\"\s]+)", named, re.MULTILINE)
        for path in [folder / "eval_meta_data.csv", *(folder / "eval_data" / uri for uri in uris)]:
            if not path.is_file() or not path.stat().st_size:
                return f"{path} is missing or empty"
            if path.suffix == ".jsonl":
                for number, line in texts.read_lines(path):
                    try:  # not one may be broken: the scores would be of other items
                        json.loads(line)
                    except ValueError as e:
                        return f"{path}:{number} ({e})"
        return None if uris else f"{folder / 'core.yaml'} names no tasks"
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        return f"{folder}: {e}"

def toy_files():
    """The files of the toy world, as they were written; and the user's own conversations."""
    needs = {"base_data": [p for p in phases if p in ("tok", "base", "base-eval")],
             "eval_bundle": [p for p in phases if p == "base-eval"]}
    splits = task_splits()
    found = []
    for name, (length, digest) in run.find_record(directory, settings).get("files", {}).items():
        def problem(path, length=length, digest=digest):
            same = path.stat().st_size == length and common.sha256_file(path) == digest
            return None if same else f"{path} is not as it was written"
        top, stem = name.split("/")[0], name.split("/")[-1].split(".")[0]
        reading = [p for (task, split), names in splits.items() for p in names
                   if task_list.TASKS.get(task, {}).get(split) == stem]
        what = {"base_data": "text", "eval_bundle": "CORE"}.get(top, stem)
        found.append(File(what, root / name, needs.get(top, reading), problem, None, 0))
    if not found:
        found = [File("toy world", directory / "shard_00000.parquet", phases,
                      lambda path: f"{directory} was never filled", None, 0)]
    for (name, split), names in splits.items():
        if name not in task_list.TASKS:
            found += task_files(name, split, names)
    return found

def required_files():
    """-> list of File: everything that the phases read"""
    if data == "toy":
        return toy_files()
    found, splits = text_files(), task_splits()
    for (name, split), needs in splits.items():
        found += task_files(name, split, needs)
    if data in texts.VAL_SHARD and splits:
        for stem in NOT_READ:
            found += task_files(stem.rpartition("_")[0], None, [], stem)
    if "base-eval" in phases and setting_of("base-eval", "core_items"):
        url, _, about = download.ADDRESSES["eval_bundle"]
        folder = pipeline.eval_bundle_dir(data)
        if folder.is_symlink():
            url = None  # never unpacked over the user's own
        found.append(File("CORE", folder, ["base-eval"], bundle_problem, url, about))
    by_path = {}
    for file in found:  # two tasks may share a file
        needs = [*by_path[file.path].needs, *file.needs] if file.path in by_path else file.needs
        by_path[file.path] = file._replace(needs=needs)
    return list(by_path.values())

# -------------------------------------------------------------------------------------------------
# looking

def problem_of(file):
    """None, or what is wrong with a File."""
    return file.problem(file.path) if file.path.exists() else f"{file.path} is missing"

def look():
    """Opens everything, prints the table. -> list of (File, what is wrong)"""
    judged = [(file, problem_of(file)) for file in required_files()]
    common.print0(f"{'':<9}{'what':<26}{'files':>12}{'MB':>12}   {'read by':<30} what to do")
    for what in dict.fromkeys(file.what for file, _ in judged):
        part = [(file, why) for file, why in judged if file.what == what]
        bad = [(file, why) for file, why in part if why]
        state = "have"
        if bad:
            state = "damaged" if any(file.path.exists() for file, _ in bad) else "missing"
        good = [file.path for file, why in part if not why]
        inside = [path for top in good for path in (top.rglob("*") if top.is_dir() else [top])]
        megabytes = sum(path.stat().st_size for path in inside if path.is_file()) / 1e6
        needs = [name for name in phases if any(name in file.needs for file, _ in part)]
        common.print0(f"{state:<9}{what:<26}{f'{len(good)} of {len(part)}':>12}{megabytes:>12,.1f}"
                      f"   {' '.join(needs) or '-':<30} {what_to_do(what, state, bad)}".rstrip())
        for file, why in bad[:5] if state == "damaged" else []:
            common.print0(f"{'':9}{why}")
    return [(file, why) for file, why in judged if why]

def what_to_do(what, state, bad):
    """What the table says about files that are not whole."""
    if not bad:
        return ""
    ours = data == "toy" or (what == "identity_train" and state == "missing")
    how = again if ours or all(file.url for file, _ in bad) else "put it right"
    if what in task_list.STEMS and data != "toy":
        ending = ".txt" if what == "words_alpha" else ".jsonl"
        how += (f", or link or copy your own to {pipeline.task_dir(data) / what}{ending}, or take "
                "it out of the settings")
    return how

# -------------------------------------------------------------------------------------------------
# identity: what the model knows about itself

def identity_conversations(n=1000):
    """n conversations of one to three turns about the model itself, always the same: jsonl."""
    assets = json.loads((pipeline.REPO / "assets" / "identity.json").read_text(encoding="utf-8"))
    topics, openings = assets["topics"], assets["openings"]
    lines = []
    for i in range(n):
        draw, messages = common.rng(21, i), []
        for topic in draw.permutation(len(topics))[:1 + draw.integers(3)]:
            ask, say = topics[topic]["questions"], topics[topic]["answers"]
            opening = "" if messages else openings[draw.integers(len(openings))]
            question = opening + ask[draw.integers(len(ask))]
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": say[draw.integers(len(say))]})
        lines.append(json.dumps({"messages": messages}) + "\n")
    return "".join(lines)

# -------------------------------------------------------------------------------------------------
# only looking, or making and bringing what is not there

def generate_toy_world():
    import toy_world
    counts = toy_world.generate(root, seed, size)
    folders = (directory, pipeline.task_dir(data), pipeline.eval_bundle_dir(data))
    made = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()
            and not path.name.startswith(".") and path.name not in ("phase.json", "lock.json")]
    files = {str(p.relative_to(root)): [p.stat().st_size, common.sha256_file(p)] for p in made}
    common.print0("the toy world: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))
    run.exit_done(counts=counts, files=files)

def unpack_bundle(zipped):
    with contextlib.suppress(FileNotFoundError), zipfile.ZipFile(zipped) as bundle:
        # gone: another process has unpacked it
        for name in bundle.namelist():
            inside = name.removeprefix("eval_bundle/")
            if inside != name and inside and not name.endswith("/") and ".." not in inside:
                common.atomic_write(pipeline.eval_bundle_dir(data) / inside, bundle.read(name))
    zipped.unlink(missing_ok=True)

if check:
    bad = [file for file, _ in look() if file.needs]  # what no phase reads is only shown
    common.check(not bad, f"{len(bad)} of the files that the phases read are missing or damaged",
                 again)
    run.leave(0, "done")

own = [problem_of(file) for file in required_files() if file.what == "conversations"]
wrong = next(filter(None, own), None)
common.check(not wrong, f"your own conversations have to be put right by hand: {wrong}")
if not pipeline.is_folder_data(data):
    if data != "toy":
        settings.defining = {"data": data}
    run.open_or_exit(directory, settings, {}, lambda: next((why for _, why in look()), None))
if data == "toy":
    generate_toy_world()

bad = look()
if any(f.what == "identity_train" and not f.path.exists() for f, _ in bad):
    path = pipeline.task_dir(data) / "identity_train.jsonl"
    common.atomic_write(path, identity_conversations())
    bad = [(file, why) for file, why in bad if file.path != path]
by_hand = [why for file, why in bad if not file.url]
common.check(not by_hand, f"{len(by_hand)} files have to be put right by hand, see the table; the "
             f"first: {by_hand[0] if by_hand else ''}")
zipped = pipeline.eval_bundle_dir(data).with_suffix(".zip")
jobs = [(file.url, zipped if file.what == "CORE" else file.path, file.problem, file.size)
        for file, _ in bad]
shard_count = sum(file.what == "text" for file, _ in bad)
download.fetch_all(jobs, again, run.stop_reason, workers,
                   also=2 * SHARD_TOKENS * shard_count)  # its tokens, two bytes each
if any(file.what == "CORE" for file, _ in bad):
    unpack_bundle(zipped)
bad = look() if jobs else []
common.check(not bad, f"{len(bad)} files are still missing or damaged: {bad[0][1] if bad else ''}",
             again)
if pipeline.is_folder_data(data):
    train, val = texts.dataset_files(data)
    common.print0(f"data: {len(train)} files to train on and {len(val)} to validate on in "
                  f"{directory}")
run.exit_done()
