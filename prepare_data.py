"""
Phase 0: makes or downloads everything that a later phase reads, and checks that it can be read.
After it nothing needs the internet. What the phases read is taken from their own settings.

    python prepare_data.py --data=toy                        # generates the toy world: no download
    python prepare_data.py --data=fineweb_edu --depth=20     # downloads; run it again to continue
    python prepare_data.py --data=../my/folder               # your own text; tasks are downloaded
    python prepare_data.py --data=fineweb_edu --check=True   # only looks: exit 0 if all is there

A task is also read from a .jsonl, .jsonl.gz or .parquet file of your own that you put (or link)
into task_data/. Settings of later phases that say what they read are taken, too, of all or of one:
--mixture=gsm8k --sft.mixture=gsm8k,arc_easy --num_steps=2000
Nothing that is there is ever written over: a file in the way is renamed.
"""
from run import Run

run = Run.start("prepare_data")

import contextlib
import functools
import json
import math
import os
import shutil
import zipfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import checkpoint
import common
import configurator
import conversations
import corpus
import download
import models
import pipeline
import records
import tasks
import texts
import tokenizer as tok

data = "toy"                 # toy, fineweb_edu, climbmix, or a folder of texts
seed = 1337                  # seed of the toy world
size = 1.0                   # how much text the toy world has, as a multiple of the usual
# ---- settings below may change at every resume
check = False                # only check what is there, write nothing
depth = 20                   # fineweb_edu, climbmix: download text enough for this depth
shards = -1                  # how many shards of training text; -1: as many as base_train.py needs
phases = []                  # only what these phases read, e.g. tok,base; empty: all phases
start_over = False           # put the old data aside and make or download it again
settings = configurator.configure(globals(), of_phases=True)

# settings of the phases that name tasks, and which splits of them are read
READS = {
    "mixture": ["train"],
    "extra_conversations": ["train"],
    "held_out": ["test"],
    "tasks": ["test"],
    "task": ["train", "test"],
}
# what phases read besides the user's conversations: how its files are called in the state folder
PLACES = {stem: f"task_data/{stem}." for stem in tasks.TASK_OF}
PLACES |= {"text": "base_data/", "CORE": "eval_bundle/"}

readers = [phase.name for phase in pipeline.PHASES if phase.name not in ("data", "report")]
unknown = {*phases} - {phase.name for phase in pipeline.PHASES}
common.check(not unknown, f"--phases: there is no phase {', '.join(unknown)}; there are "
             f"{', '.join(readers)}")
configurator.check_arguments([f"--{name}={value}" for name, value in settings.of_phases.items()])
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
    of_phases = settings.of_phases
    given = of_phases.get(f"{name}.{key}", of_phases.get(key))
    return usual if given is None else configurator.convert(key, given, usual)

def needed():
    """-> {what: phases that read it}; what is "text", "CORE", the stem of a task's files, or the
    path of a file of the user's own conversations."""
    found = {}
    for name in phases:
        read = []
        if name in ("tok", "base", "base-eval"):
            read.append("text")
        if setting_of(name, "core_items"):
            read.append("CORE")
        for key, splits in READS.items():
            value = setting_of(name, key) or []
            specs = value if isinstance(value, list) else [value]
            for spec, split in product(specs, splits):
                read.append(tasks.stem_of(tasks.parse(spec)[0], split))
        for what in dict.fromkeys(read):
            found.setdefault(what, []).append(name)
    return found

def shards_needed():
    """How many training shards the horizon of the base model needs (see training.horizon), a little
    more rather than less; without importing torch."""
    keys = ("tokens_per_param", "target_flops", "num_steps", "total_batch_size")
    per_param, flops, steps, batch = [setting_of("base", key) for key in keys]
    width = 128 * math.ceil(depth * setting_of("base", "aspect_ratio") / 128)
    # of matrices and head
    parameters = depth * 12 * width ** 2 + setting_of("tok", "vocab_size") * width
    tokens = per_param * parameters
    if flops > 0:
        tokens = flops / (6 * parameters)
    if steps != -1:
        tokens = steps * (2 ** 19 if batch == -1 else batch)
    return math.ceil(tokens / corpus.SHARD_TOKENS) + 1

@dataclass
class File:
    what: str         # as in needed()
    path: Path
    url: str = ""     # where it comes from, "here" where it is made; "": the user's own
    size: int = 0     # bytes, roughly
    wrong: str | None = None
    said: str = ""    # of a user's conversations: what they teach

def text_files():
    if pipeline.is_folder_data(data):
        return [File("text", path) for path in corpus.text_files(data)[0].values()]
    address, name, many, about = download.ADDRESSES[data]
    wanted = min(many - 1, shards if shards != -1 else shards_needed())
    # a damaged one that nobody asked for would stop a phase too
    there = [int(path.stem[6:]) for path in directory.glob("shard_?????.parquet")]
    return [File("text", directory / name.format(i), address.format(i), about)
            for i in sorted({*range(wanted), many - 1, *there})]

def task_files(stem):
    """The files of a split of a task: the ones that are there, or those to come."""
    address, name, many, about = download.ADDRESSES.get(stem, ("", f"{stem}.jsonl", 1, 0))
    files = {}
    for i in range(many):
        path = pipeline.task_dir(data) / name.format(i)
        files[path] = File(stem, path, address.format(i), about)
    found = tasks.located(stem, data)
    if found and address == "here":
        files = {}  # one of the user's own is not replaced by what is made here
    return [files.get(path, File(stem, path)) for path in found or files]

def files_of(what):
    """-> list of File"""
    if what not in PLACES:
        return [File(what, Path(os.path.expanduser(what)))]
    if data == "toy":
        made = [name for name in written if name.startswith(PLACES[what])]
        return [File(what, root / name, "here") for name in made or [PLACES[what]]]
    if what == "text":
        return text_files()
    if what == "CORE":
        url, _, _, about = download.ADDRESSES["eval_bundle"]
        return [File("CORE", pipeline.eval_bundle_dir(data), url, about)]
    return task_files(what)

# -------------------------------------------------------------------------------------------------
# what is wrong with it

def facts_of(path):
    return [path.stat().st_size, common.sha256_file(path)]

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

def problem(what, path):
    """None, or what is wrong with a file, in words. Of parquet only the footer and the first rows
    are read."""
    if not path.exists():
        return f"{path} is missing"
    if data == "toy" and what in PLACES:
        stated = written.get(str(path.relative_to(root)))
        if stated and stated == facts_of(path):
            return None
        return f"{path} does not match its checksum"
    if what == "text":
        return texts.text_problem(path)
    if what == "CORE":
        return bundle_problem(path)
    convert = functools.partial(tasks.convert, tasks.TASK_OF.get(what, what))
    enough = 100 if path.suffix == ".parquet" else None
    return texts.problem(path, tasks.read_rows(path), convert, enough)

@functools.cache
def lessons(path):
    """What a user's conversations teach -> (whether anything, in words). What is cut is counted
    where there is a tokenizer, for rows of the newest base model, or of one to come."""
    tokenizer = None
    with contextlib.suppress(*tok.DAMAGE):
        tokenizer = tok.read_tokenizer(pipeline.tokenizer_dir(data))
    length = setting_of("base", "max_seq_len")
    for model in models.trained(data, "base")[-1:]:
        state = pipeline.state_path("base", data, model.tag)
        meta = checkpoint.load_meta(state, max(checkpoint.steps(state), default=0))
        length = meta.get("model", {}).get("sequence_len", length)
    counts = {}
    for item in tasks.load(str(path), "train", data):
        conversations.render(item, tokenizer, length + 1, counts)
    count = conversations.total(counts)
    return conversations.teaches(count), conversations.in_words(count, length)

def look():
    """Opens everything that the phases read. -> list of File, those of them that are wrong"""
    files = [file for what in needs for file in files_of(what)]
    for file in files:
        if file.path.is_symlink():
            file.url = ""  # the user's own
        file.wrong = problem(file.what, file.path)
        if file.what not in PLACES and not file.wrong:
            useful, file.said = lessons(file.path)
            if not useful:
                file.wrong = f"there is nothing to learn in {file.path}: {file.said}"
    return files, [file for file in files if file.wrong]

def in_words(bad):
    """example: "3 files (smoltalk_train.jsonl, ...), see the table" """
    names = ", ".join(common.one_line(file.path.name) for file in bad[:3])
    return f"{len(bad)} files ({names}{', ...' * (len(bad) > 3)}), see the table"

def show(files):
    """Prints the table, what is damaged, and how to do without a download."""
    common.print0(f"{'':<9}{'what':<26}{'found':>12}   used by phase")
    for what, phases in needs.items():
        rows = [file for file in files if file.what == what]
        wrong = [file for file in rows if file.wrong]
        damaged = [file.wrong for file in wrong if file.path.exists()]
        state = "missing" if wrong else "ok"
        if damaged:
            state = "damaged"
        there = f"{len(rows) - len(wrong)} of {len(rows)}"
        common.print0(f"{state:<9}{Path(what).name:<26}{there:>12}   {' '.join(phases)}")
        for why in damaged[:5] or [file.said for file in rows if file.said]:
            common.print0(f"{'':9}{common.one_line(why)}")
    if data != "toy" and any(file.wrong and file.what in tasks.TASK_OF for file in files):
        common.print0(f"A task is also read from a file of your own, {pipeline.task_dir(data)}/"
                      "NAME.jsonl, with NAME as in the table; one that you take out of the "
                      "settings (--mixture, --held_out, --tasks) is not needed.")

# -------------------------------------------------------------------------------------------------
# what is made here

def identity_conversations():
    """1,000 conversations of one to three turns about the model itself, always the same: jsonl."""
    assets = json.loads((pipeline.REPO / "assets" / "identity.json").read_text(encoding="utf-8"))
    topics, openings = assets["topics"], assets["openings"]
    lines = []
    for i in range(1000):
        draw = common.rng(21, i)
        turns = []
        for number in draw.permutation(len(topics))[:1 + draw.integers(3)]:
            topic = topics[number]
            opening = "" if turns else draw.choice(openings)
            question = opening + draw.choice(topic["questions"])
            turns.append((question, draw.choice(topic["answers"])))
        lines.append(json.dumps(tasks.conversation(turns)) + "\n")
    return "".join(lines)

def make_toy_world():
    """Makes it in a folder of its own first: what stands at its places may be the user's own.
    -> {"counts": {what: how many}, "files": {name: size and checksum}}"""
    import toy_world
    new = root / ".new"
    shutil.rmtree(new, ignore_errors=True)  # what a death has left is no part of it
    common.print0("generating the toy world")
    counts = toy_world.generate(new, seed, size)
    files = {}
    for made in sorted(new.rglob("[!.]*.*")):
        name = str(made.relative_to(new))
        files[name] = facts_of(made)
        path = root / name
        if not path.exists() or facts_of(path) != files[name]:
            download.make_room(path)
            common.atomic_write(path, made.read_bytes())
    shutil.rmtree(new)
    return {"counts": counts, "files": files}

def unpack_bundle(zipped):
    """Writes what is missing, file by file; what is there may be the user's own. Nothing is done
    where there is no such file: another process may have unpacked it."""
    with contextlib.suppress(FileNotFoundError), zipfile.ZipFile(zipped) as bundle:
        for name in bundle.namelist():
            if not name.startswith("eval_bundle/") or ".." in name or name.endswith("/"):
                continue
            path, content = zipped.parent / name, bundle.read(name)
            if not path.exists():
                common.atomic_write(path, content)
            elif path.read_bytes() != content:
                common.print0(f"left alone, since it may be your own: {path} (rename it, and the "
                              "next start brings CORE's)")
    zipped.unlink(missing_ok=True)

def bring(files):
    """Makes or downloads files."""
    for file in files:
        if file.url == "here":
            common.atomic_write(file.path, identity_conversations())
    zipped = pipeline.eval_bundle_dir(data).with_name(".eval_bundle.zip")
    jobs = [(file.url, zipped if file.what == "CORE" else file.path,
             functools.partial(problem, file.what), file.size)
            for file in files if file.url != "here"]
    if jobs:
        tokens = corpus.SHARD_TOKENS * sum(file.what == "text" for file in files)  # of two bytes
        download.fetch_all(jobs, again, run.stop_reason, also=2 * tokens)
    unpack_bundle(zipped)

# -------------------------------------------------------------------------------------------------
# only looking, or making and bringing what is not there

needs = needed()
written = records.find_record(directory, settings).get("files", {})  # of the toy world, as made
files, bad = look()
by_hand = [file.wrong for file in bad if not file.url]
if check or by_hand:
    show(files)
if check and pipeline.is_folder_data(data):
    for file in files:
        if file.what == "text" and not file.wrong:
            name = common.one_line(file.path.relative_to(directory))
            common.print0(f"{name}: {texts.facts_of(file.path)}")
common.check(not by_hand, "fix these files by hand, then run the same command again: "
             f"{'; '.join(by_hand[:3])}")
if pipeline.is_folder_data(data):
    split = corpus.dataset_files(data)
    common.print0(f"{len(split['train'])} files for training in {common.one_line(directory)}; "
                  f"{corpus.held_out_in_words(split)}")
    if split["not_read"]:
        common.print0(split["not_read"])
    if others := pipeline.namesakes(data):
        newest = max(others, key=lambda path: path.stat().st_mtime)
        common.print0(f"note: the state of these texts will be in {common.one_line(root)}; "
                      f"{common.one_line(newest)} is that of another folder of this name: if it is "
                      "the same one, reached by another path, give that path to go on there")
if check:
    common.check(not bad, f"missing or damaged: {in_words(bad)}", again)
    run.leave(0, "done")

if not pipeline.is_folder_data(data):
    if data != "toy":
        settings.defining = {"data": data}
        if start_over and not records.find_record(directory, settings):
            # before the old data is put aside
            download.check_online([file.path for file in files_of("text")], again)
    run.open_or_exit(directory, settings, {}, lambda: bad[0].wrong if bad else None)
if start_over:
    files, bad = look()  # the old data was put aside
facts = {}
with common.writing(pipeline.base_dir()):
    if data == "toy":
        facts = make_toy_world()
        written = facts["files"]
    elif bad:
        show(files)
        bring(bad)
files, bad = look()
show(files)
common.check(not bad, f"still missing or damaged: {in_words(bad)}", again)
run.exit_done(**facts)
