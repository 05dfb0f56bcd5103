"""
The files of a data set: which of a folder are read, and which of them are held out. What stands in
them: texts.py. A data set is a folder of .parquet, .jsonl and .txt files, the last two also with
.gz; of a user's own folder its sub-folders are read too.
"""
import stat

import common
import pipeline
import texts
from texts import HOLD_OUT, parquet_problem, prepare_command, shown

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
# the validation split of the known data sets, fixed by name: the last of all their shards
VAL_SHARD = {"fineweb_edu": "shard_01822.parquet", "climbmix": "shard_06542.parquet"}

def listed(names, most):
    """example: (["a", "b", "c"], 2) -> "a, b and 1 more" """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

def walk(folder, inner, above=()):
    """Yields all that is in a folder, and in its sub-folders if `inner`, but what begins with a dot
    and the state folder. above: the real paths of the folders that it lies in."""
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path == pipeline.base_dir():
            continue
        opened = inner and not path.name.endswith(ENDINGS) and path.is_dir()
        if opened and path.resolve() not in above:  # a link may lead back
            yield from walk(path, inner, above)
        else:
            yield path

def why_not_read(path):
    """None for a text file, else why it is none: "" where its name says so."""
    try:
        status = path.stat()
    except PermissionError:
        raise
    except OSError:
        return "a link to nothing"
    if stat.S_ISDIR(status.st_mode):
        return "a folder"
    if not stat.S_ISREG(status.st_mode):
        return "no regular file"  # to open a pipe would wait for ever
    if not path.name.endswith(ENDINGS):
        return ""
    return None if status.st_size else "empty"

def look_for_files(data):
    """-> (the text files, {what is not read: why}), sorted by name; of a user's own folder with
    those in its sub-folders. Failure (code 2) where one cannot be opened."""
    root = pipeline.base_data_dir(data)
    files = []
    others = {}
    try:
        for path in walk(root, pipeline.is_folder_data(data)):
            why = why_not_read(path)
            if why is not None:
                others[name_of(path, data)] = why
                continue
            open(path, "rb").close()
            files.append(path)
    except OSError as e:
        common.fail(f"{shown(e.filename)} cannot be read ({e.strerror}): make it readable or move "
                    "it elsewhere")
    files.sort(key=lambda path: name_of(path, data))
    return files, others

def not_read(data):
    """What of a user's own folder is not read, in one line; "" where all is."""
    others = look_for_files(data)[1] if pipeline.is_folder_data(data) else {}
    names = [f"{shown(name)} ({why})" if why else shown(name)
             for name, why in sorted(others.items())]
    if not names:
        return ""
    return f"not read: {len(names):,} ({listed(names, 9)}); read are {', '.join(ENDINGS)}"

def text_files(data):
    """The files of a data set that are not empty, sorted by name. Failure where there is none."""
    folder = pipeline.base_data_dir(data)
    where = shown(folder)
    command = None if pipeline.is_folder_data(data) else prepare_command(data)
    common.check(folder.exists() or command, f"{where} does not exist: --data takes toy, "
                 "fineweb_edu, climbmix or a folder of texts")
    common.check(folder.exists(), f"the data folder {where} does not exist", command)
    common.check(folder.is_dir(), f"{where} is a file: --data takes the folder that holds it")
    files, _ = look_for_files(data)
    common.check(files, f"the data folder {where} holds no text: it has no file of "
                 f"{', '.join(ENDINGS)} that is not empty {not_read(data)}", command)
    return files

def name_of(path, data):
    """A file's name in its data set.  example: ("/my/texts/a/b.txt", "/my/texts") -> "a/b.txt" """
    return path.relative_to(pipeline.base_data_dir(data)).as_posix()

def facts_to_record(files, data):
    """What a run keeps of the files that it was begun with, for its record: see dataset_files."""
    names = {split: [name_of(path, data) for path in files[split]] for split in ("train", "val")}
    seen = {}
    for path in {*files["train"], *files["val"]}:
        status = path.stat()
        seen[name_of(path, data)] = [status.st_size, status.st_mtime_ns]
    return {"train_files": names["train"], "val_files": names["val"], "texts": seen}

def dataset_files(data, begun=None):
    """
    begun: the record of the run that goes on (see facts_to_record); a new one holds out what its
    tokenizer has not seen
    -> {"train": files, "val": files}, lists of Path sorted by name; documents() splits a file that
    is in both. "old": whether the run was begun when nothing said what is held out. Failure where
    the folder is missing or empty, or a parquet file does not open or has no string column `text`.
    """
    begun = begun or {}
    files = text_files(data)
    for path in files:
        if path.suffix == ".parquet":
            why = parquet_problem(path)
            common.check(why is None, why)
    trained = begun.get("train_files")
    if trained and "val_files" not in begun and pipeline.is_folder_data(data):
        return {**last_held_out(data, files, trained), "old": True}
    named = {name_of(path, data): path for path in files}
    before = begun if trained else common.read_json(pipeline.tokenizer_dir(data) / "phase.json")
    val = [name for name in before.get("val_files", []) if name in named]
    train = [name for name in trained or () if name in named] or list(named)
    shared = {*val} & {*before.get("train_files", [])}
    if not val or not {*train} - {*val} | shared:
        val, shared = held_out_of(data, {name: path.stat().st_size for name, path in named.items()})
    train = [name for name in train if name in shared or name not in val]
    return {"train": [named[name] for name in train], "val": [named[name] for name in val],
            "old": False}

def held_out_of(data, sizes):
    """
    sizes: {name: bytes}, sorted by name -> (the names of the files held out, those of them that are
    split by documents). The last by name that holds a fair share, 1 % to a half of all: neither a
    readme nor most of the text. Without one the largest is split, or many small ones are held out.
    """
    names = list(sizes)
    total = sum(sizes.values())
    if data in VAL_SHARD:
        shard = VAL_SHARD[data]
        common.check(shard in names, f"the validation shard {shard} is missing in "
                     f"{pipeline.base_data_dir(data)}", prepare_command(data))
        return [shard], set()
    if data == "toy" and len(names) > 1:
        return names[-1:], set()
    fair = [name for name in names if total <= 100 * sizes[name] <= 50 * total]
    if fair:
        return fair[-1:], set()
    largest = max(names, key=sizes.get)
    if 2 * sizes[largest] > total:
        return [largest], {largest}
    val = []
    while HOLD_OUT * sum(sizes[name] for name in val) < total:
        val.insert(0, names.pop())
    return val, set()

def last_held_out(data, files, trained):
    """The files of a run that was begun when the last file by name was held out."""
    top = [path for path in files if not path.name.endswith(".txt.gz")
           and path.parent == pipeline.base_data_dir(data)]
    train = top[:-1] or top
    return {"train": [path for path in train if path.name in trained] or train, "val": top[-1:]}

def held_out_in_words(files, data):
    """example: "held out for validation: b.txt" """
    names = [shown(name_of(path, data)) for path in files["val"]]
    part = "part of " if files["val"][0] in files["train"] else ""
    return f"held out for validation: {part}{listed(names, 3)}"

def check_same(begun, now, fingerprint):
    """Failure (code 2) that names the files where a run was begun with other texts. begun: its
    record; now: facts_to_record; fingerprint: of the data"""
    before = begun.get("texts")
    if not before or begun["inputs"].get("data") == fingerprint:
        return
    other = []
    for name in sorted({*before, *now["texts"]}):
        if name not in now["texts"]:
            other.append(f"{shown(name)} is gone")
        elif name not in before:
            other.append(f"{shown(name)} is new")
        elif before[name] != now["texts"][name]:
            other.append(f"{shown(name)} has changed")
    common.check(not other, f"{begun.get('phase')} was started with other texts: "
                 f"{listed(other, 5)}; put the old ones back to resume it, or --start_over=True to "
                 "put it aside and start anew")

def parts_of(files, split):
    """The files of a split of dataset_files, as documents() takes them."""
    both = {*files["train"]} & {*files["val"]}
    return [(path, path in both) for path in files[split]]

def iter_texts(data, split="train", begun=None):
    """All documents of a split, file by file. begun: as dataset_files has it"""
    yield from texts.documents(parts_of(dataset_files(data, begun), split), split)
