"""
Phase 0: brings everything that a later phase reads into the state folder, and opens all of it. After it nothing needs
the internet. What the phases read is taken from their own settings.

    python prepare_data.py --data=toy                        # generates the toy world: no download
    python prepare_data.py --data=fineweb_edu --depth=20     # downloads what a d20 needs; run it again to continue
    python prepare_data.py --data=../my/folder               # your own text; the tasks of the chat phases are downloaded
    python prepare_data.py --data=fineweb_edu --check=True   # only looks: exit 0 if all is there and whole, 2 if not

A task is also read from a .jsonl, .jsonl.gz or .parquet file of your own that you put (or link) into task_data/.
"""
import common
common.install_stop_handlers()

import contextlib
import json
import math
import re
import shlex
import sys
import zipfile
from collections import namedtuple

import configurator
import data as dataset
import download
import phase
import tasks as task_list

data = "toy"                 # toy, fineweb_edu, climbmix, or a folder of .parquet, .jsonl(.gz) or .txt files
seed = 1337                  # of the toy world
size = 1.0                   # of the toy world: how much text, relative
# ---- settings below may change at every resume
check = False                # only look, write nothing
depth = 20                   # fineweb_edu, climbmix: there must be text for a model of this depth
shards = -1                  # how many shards of it (and the validation shard); -1: as many as the horizon needs
tokens_per_param = -1.0      # the horizon, as base_train.py takes it; -1: its default
target_flops = -1.0          # likewise
num_steps = -1               # likewise
total_batch_size = -1        # likewise
phases = []                  # what is required is what these read, e.g. tok,base; empty: all
mixture = []                 # what mid and sft learn from; empty: as they declare it
held_out = []                # what they are measured on; empty: as they declare it
tasks = []                   # what the chat models are measured on; empty: as chat_eval.py declares it
task = ""                    # what rl practises; empty: as chat_rl.py declares it
extra_conversations = ""     # your own conversations for mid and sft
core_items = -1              # 0: no CORE
workers = 8                  # files downloaded at once
start_over = False           # put the old data aside and make it again
command, alone = "python prepare_data.py " + shlex.join(a for a in sys.argv[1:] if not a.startswith("--check")), [
    a for a in sys.argv[1:] if re.match(r"--[a-z-]+\.\w+=", a)]  # settings of one phase, as speedrun.sh takes them: --sft.mixture=...
sys.argv[1:] = [a for a in sys.argv[1:] if a not in alone]
settings = configurator.configure(globals())

SCRIPTS = {name: configurator.PHASES[name] for name in ("tok", "base", "base-eval", "mid", "sft", "rl", "mid-eval", "sft-eval", "rl-eval")}  # that read something
READS = {"mixture": ["train"], "extra_conversations": ["train"], "held_out": ["test"], "tasks": ["test"], "task": ["train", "test"]}  # setting: splits
NOT_READ = ["mmlu_dev", "mmlu_validation", "arc_easy_validation", "arc_challenge_validation"]  # by no phase; come with the others
SHARD_TOKENS = 50_000_000  # 250 million characters, nearly 5 a token
WHOLE = 500_000_000        # a folder of more bytes than this is not read to its end by a check

common.check(0.001 <= size <= 1000, f"--size must be 0.001 to 1000, not {size}")
common.check(1 <= depth <= 100 and workers >= 1 and shards >= -1, "--depth must be 1 to 100, --workers at least 1, --shards at least 0 (or -1)")
unknown = [p for p in phases if p not in configurator.PHASES]
common.check(not unknown, f"--phases: there is no phase {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
phases = [p for p in phases if p in SCRIPTS] or list(SCRIPTS)
directory, root = common.base_data_dir(data), common.data_root(data)

# ---------------------------------------------------------------------------------------------------------------------
# what has to be there

File = namedtuple("File", "what path needs opens url size")
# path: where; needs: the phases that read it; opens(path) -> None or what is wrong; url: where it comes from, or None; size: roughly

def given(name, key, usual):
    """A setting of the phase `name` alone, where this script was given it, else `usual`."""
    values = [a.split("=", 1)[1] for a in alone if a.startswith(f"--{name}.{key}=")]
    return configurator.convert(key, values[-1], usual) if values else usual

def declared(name):
    """The settings of a phase that say what it reads: its own, where this script was not given others."""
    usual = configurator.defaults(common.REPO / SCRIPTS[name])
    return {k: given(name, k, settings[k] or value) for k, value in usual.items() if k in READS}

def task_splits():
    """-> {(task, split): [phases that read it]}"""
    found = {}
    for name in phases:
        for setting, value in declared(name).items():
            for spec in (value if isinstance(value, list) else [value]) if value else []:
                for split in READS[setting]:
                    readers = found.setdefault((task_list.parse(spec)[0], split), [])
                    readers += [name] if name not in readers else []
    return found

def shards_needed():
    """How many training shards the horizon of the base model needs (see base_train.py), a little more rather than less."""
    base = configurator.defaults(common.REPO / "base_train.py")
    per_param, flops, steps, batch = (given("base", k, settings[k] if settings[k] != -1 else base[k]) for k in ("tokens_per_param", "target_flops", "num_steps", "total_batch_size"))
    width = 128 * math.ceil(depth / 2)
    parameters = depth * 12 * width ** 2 + 32768 * width  # of matrices and head, without importing torch
    tokens = steps * (batch if batch != -1 else 2 ** 19) if steps != -1 else flops / (6 * parameters) if flops > 0 else per_param * parameters
    return math.ceil(tokens / SHARD_TOKENS) + 1

def text_problem(path):
    if path.name.endswith(".parquet"):
        import pyarrow.parquet
        return dataset.parquet_problem(path, ["text"]) or (None if pyarrow.parquet.read_metadata(path).num_rows else f"{path} holds no rows")
    if path.name.endswith(".txt"):
        return None
    return dataset.problem(path, dataset.read_lines(path), dataset.text_of, None if total_bytes <= WHOLE else 10_000)

def word_of(line):
    task_list.word_of(line)
    if len(line) > 100:
        raise ValueError("no word")

def task_problem(name):
    """-> opens(path) for the files of a task: of parquet the footer and the first rows, of the others everything"""
    if name in ("spellingbee", "simplespelling"):
        return lambda path: dataset.problem(path, dataset.read_lines(path), word_of)
    return lambda path: dataset.problem(path, task_list.rows_of(path), lambda row: task_list.convert(name, row), 100 if path.name.endswith(".parquet") else None)

def bundle_problem(folder):
    """None, or what the folder of the CORE bundle (or the .zip that it comes in) lacks."""
    try:
        if folder.name.endswith(".zip"):
            with zipfile.ZipFile(folder) as bundle:
                damaged = bundle.testzip()  # reads all of it
                return f"{damaged} is damaged" if damaged else None if "eval_bundle/core.yaml" in bundle.namelist() else "no CORE bundle"
        uris = re.findall(r"^\W*dataset_uri: *['\"]?([^'\"\s]+)", (folder / "core.yaml").read_text(encoding="utf-8"), re.MULTILINE)
        for path in [folder / "eval_meta_data.csv", *(folder / "eval_data" / uri for uri in uris)]:
            if not path.is_file():
                return f"{path} is missing"
            broken = (f"{path}:{number} ({why})" for number, line in dataset.read_lines(path) if path.suffix == ".jsonl" and (why := dataset.refused(json.loads, line)[1]))
            if why := next(broken, None) or (None if path.stat().st_size else f"{path} is empty"):
                return why  # not a line may be broken: the scores would be of other items
        return None if uris else f"{folder / 'core.yaml'} names no tasks"
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        return f"{folder}: {e}"

def same(length, digest):
    return lambda path: None if path.stat().st_size == length and common.sha256_file(path) == digest else f"{path} is not as it was written"

def files():
    """-> list of File: everything that the phases read"""
    global total_bytes
    readers, found = task_splits(), []
    needs = lambda *names: [p for p in phases if p in names]
    task_file = lambda stem: [p for (name, split), names in readers.items() for p in names if task_list.TASKS.get(name, {}).get(split) == stem]
    if data == "toy":
        for name, (length, digest) in (phase.read(directory) or {}).get("files", {}).items():
            top, stem = name.split("/")[0], name.split("/")[-1].split(".")[0]
            found.append(File({"task_data": stem, "eval_bundle": "CORE"}.get(top, "text"), root / name,
                              {"task_data": task_file(stem), "eval_bundle": needs("base-eval")}.get(top, needs("tok", "base", "base-eval")), same(length, digest), None, 0))
        found = found or [File("toy world", directory / "shard_00000.parquet", phases, lambda path: f"{directory} was never filled", None, 0)]
        return found + [f for (name, _), needed_by in readers.items() if name not in task_list.TASKS for f in task_files(name, name, needed_by)]
    text, names = needs("tok", "base", "base-eval"), {}
    if data in dataset.VAL_SHARD:
        address, many, about = download.ADDRESSES[data]
        wanted = [*range(min(many - 1, shards if shards != -1 else shards_needed())), many - 1]
        names = {f"shard_{i:05d}.parquet": address.format(i) for i in wanted}
        paths = {directory / name for name in names} | set(directory.glob("shard_?????.parquet"))  # a damaged one that nobody needs would stop a phase too
    else:
        paths, about = dataset.text_files(data), 0
    total_bytes = sum(p.stat().st_size for p in paths if p.exists())
    found += [File("text", p, text, text_problem, names.get(p.name) or (address.format(int(p.stem[6:])) if names else None), about) for p in sorted(paths) if text]
    for (name, split), needed_by in readers.items():
        stem = task_list.TASKS.get(name, {}).get(split)
        common.check(stem or name not in task_list.TASKS, f"the task {name} has no {split} split ({', '.join(needed_by)} reads it)")
        found += task_files(stem or name, name, needed_by)
    if data in dataset.VAL_SHARD and readers:
        found += [f for stem in NOT_READ for f in task_files(stem, stem.rsplit("_", 1)[0], [])]
    if "base-eval" in phases and given("base-eval", "core_items", core_items):
        url, _, about = download.ADDRESSES["eval_bundle"]
        folder = common.eval_bundle_dir(data)
        found.append(File("CORE", folder, ["base-eval"], bundle_problem, None if folder.is_symlink() else url, about))  # never unpacked over the user's own
    readers = {f.path: [p for g in found if g.path == f.path for p in g.needs] for f in found}  # two tasks may share a file
    return list({f.path: f._replace(needs=readers[f.path]) for f in found}.values())

def task_files(stem, name, needed_by):
    folder, opens = common.task_dir(data), task_problem(name)
    if name not in task_list.TASKS:
        return [File("conversations", common.Path(name), needed_by, opens, None, 0)]
    address, many, about = download.ADDRESSES.get(stem, (None, 1, 0))
    ending = address.rsplit(".", 1)[1] if address else "jsonl"
    targets = {folder / f"{stem}{f'-{i:05d}-of-{many:05d}' if many > 1 else ''}.{ending}": address and address.format(i) for i in range(many)}
    return [File(stem, path, needed_by, opens, targets.get(path), about) for path in task_list.located(stem, data) or targets]

def look():
    """Opens everything, prints the table. -> list of (File, what is wrong)"""
    everything = [(f, f"{f.path} is missing" if not f.path.exists() else f.opens(f.path)) for f in files()]
    common.print0(f"{'':<9}{'what':<26}{'files':>12}{'MB':>12}   {'read by':<30} what to do")
    for what in dict.fromkeys(f.what for f, _ in everything):
        part = [(f, why) for f, why in everything if f.what == what]
        bad = [(f, why) for f, why in part if why]
        state = "have" if not bad else "missing" if all(not f.path.exists() for f, _ in bad) else "damaged"
        count = sum(p.stat().st_size for f, why in part if not why for p in ([f.path] if f.path.is_file() else f.path.rglob("*")) if p.is_file())
        needed_by = " ".join(p for p in phases if any(p in f.needs for f, _ in part)) or "-"
        how = ""
        if bad:
            how = command if data == "toy" or (what == "identity_train" and state == "missing") or all(f.url for f, _ in bad) else "put it right"
            if what in task_list.STEMS and data != "toy":
                how += f", or link or copy your own to {common.task_dir(data) / what}{'.txt' if what == 'words_alpha' else '.jsonl'}, or take it out of the settings"
        common.print0(f"{state:<9}{what:<26}{f'{len(part) - len(bad)} of {len(part)}':>12}{count / 1e6:>12,.1f}   {needed_by:<30} {how}".rstrip())
        for f, why in [(f, why) for f, why in bad if state == "damaged"][:5]:
            common.print0(f"{'':9}{why}")
    return [(f, why) for f, why in everything if why]

# ---------------------------------------------------------------------------------------------------------------------
# identity: what the model knows about itself

def identity_conversations(n=1000):
    """n conversations of one to three turns about the model itself, always the same: jsonl."""
    asset = common.REPO / "assets" / "identity.json"
    texts = json.loads(asset.read_text(encoding="utf-8"))
    def pick(draw, options):
        return options[draw.integers(len(options))]
    lines = []
    for i in range(n):
        draw, messages = common.rng(21, i), []
        for place in draw.permutation(len(texts["topics"]))[:1 + draw.integers(3)]:
            topic = texts["topics"][place]
            opening = pick(draw, texts["openings"]) if not messages else ""
            question = opening + pick(draw, topic["questions"])
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": pick(draw, topic["answers"])})
        lines.append(json.dumps({"messages": messages}) + "\n")
    return "".join(lines)

# ---------------------------------------------------------------------------------------------------------------------

if check:
    bad = [f for f, _ in look() if f.needs]  # what no phase reads is only shown
    common.check(not bad, f"{len(bad)} of the files that the phases read are missing or damaged", command)
    common.outcome(0, "done")
    raise SystemExit(0)

own = [f"{f.path} is missing" if not f.path.exists() else f.opens(f.path) for f in files() if f.what == "conversations"]
common.check(not any(own), f"your own conversations have to be put right by hand: {next(filter(None, own), '')}")
if not common.is_folder_data(data):
    settings.defining = settings.defining if data == "toy" else {"data": data}
    phase.begin(directory, "prepare_data", settings, {}, lambda: next((why for _, why in look()), None), start_over)
if data == "toy":
    import toy_world
    counts = toy_world.generate(root, seed, size)
    made = [p for folder in (directory, common.task_dir(data), common.eval_bundle_dir(data)) for p in sorted(folder.rglob("*"))
            if p.is_file() and not p.name.startswith(".") and p.name not in ("phase.json", "lock.json")]
    phase.done(directory, counts=counts, files={str(p.relative_to(root)): [p.stat().st_size, common.sha256_file(p)] for p in made})
    common.print0("the toy world: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))
    raise SystemExit(0)

bad = look()
if ours := [f for f, _ in bad if f.what == "identity_train" and not f.path.exists()]:  # a damaged one may be the user's own
    common.atomic_write(common.task_dir(data) / "identity_train.jsonl", identity_conversations())
    bad = [(f, why) for f, why in bad if f not in ours]
ours = [why for f, why in bad if not f.url]
common.check(not ours, f"{len(ours)} files have to be put right by hand, see the table; the first: {ours[0] if ours else ''}")
zipped = common.eval_bundle_dir(data).with_suffix(".zip")
jobs = [(f.url, zipped if f.what == "CORE" else f.path, f.opens, f.size) for f, _ in bad]
tokens = SHARD_TOKENS * sum(f.what == "text" for f, _ in bad)  # of two bytes each
download.fetch_all(jobs, command, common.stop_requested, workers, also=2 * tokens)
if any(f.what == "CORE" for f, _ in bad):
    with contextlib.suppress(FileNotFoundError), zipfile.ZipFile(zipped) as bundle:  # gone: another process has unpacked it
        for name in bundle.namelist():
            inside = name.removeprefix("eval_bundle/")
            if inside != name and inside and not name.endswith("/") and ".." not in inside:
                common.atomic_write(common.eval_bundle_dir(data) / inside, bundle.read(name))
    zipped.unlink(missing_ok=True)
bad = look() if jobs else []
common.check(not bad, f"{len(bad)} files are still missing or damaged: {bad[0][1] if bad else ''}", command)
if common.is_folder_data(data):
    train, val = dataset.dataset_files(data)
    common.print0(f"data: {len(train)} files to train on and {len(val)} to validate on in {directory}")
    common.outcome(0, "done")
else:
    phase.done(directory)
