"""
The files of a data set: which of a folder are read, and which of them are held out. What stands in
them: texts.py. A data set is a folder of .parquet, .jsonl and .txt files, the last two also with
.gz; of a user's own folder its sub-folders are read too.
"""
import stat

import common
import pipeline
import texts

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
# the validation split of the known data sets, fixed by name: the last of all their shards
VAL_SHARD = {"fineweb_edu": "shard_01822.parquet", "climbmix": "shard_06542.parquet"}
SHARD_TOKENS = 50_000_000  # of theirs: 250 million characters, nearly 5 a token

def listed(names, most):
    """example: (["a", "b", "c"], 2) -> "a, b and 1 more" """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(common.one_line, names[:most])) + more

def walk(folder, inner, above=()):
    """Yields all that is in a folder, and in its sub-folders if `inner`, but the state folder and
    what begins with a dot and has no name of texts. above: the real paths of the folders that it
    lies in."""
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        named = path.name.endswith(ENDINGS)
        if path.name.startswith(".") and not named:
            continue
        if path.is_dir() and path.resolve() == pipeline.base_dir().resolve():
            continue
        opened = inner and not named and path.is_dir()
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
    if path.name.startswith("."):
        return "hidden"
    if not path.name.endswith(ENDINGS):
        return ""
    return None if status.st_size else "empty"

def look_for_files(data):
    """-> (the text files, {name: Path} sorted by name, what is not read: "name (why)" each). Those
    in sub-folders are called as "a/b.txt". Failure (code 2) where one cannot be opened."""
    root = pipeline.base_data_dir(data)
    files = {}
    others = []
    try:
        for path in walk(root, pipeline.is_folder_data(data)):
            name = path.relative_to(root).as_posix()
            why = why_not_read(path)
            if why is None:
                open(path, "rb").close()
                files[name] = path
            else:
                others.append(f"{name} ({why})" if why else name)
    except OSError as e:
        common.fail(f"{e.filename} cannot be read ({e.strerror}): make it readable or move "
                    "it elsewhere")
    return dict(sorted(files.items())), sorted(others)

def text_files(data):
    """-> (the files of a data set, {name: Path} sorted by name, what of a user's own folder is not
    read, in one line). Failure where there is no file."""
    folder = pipeline.base_data_dir(data)
    own = pipeline.is_folder_data(data)
    command = None if own else texts.prepare_command(data)
    common.check(folder.exists(), f"the data folder {folder} does not exist (--data takes toy, "
                 "fineweb_edu, climbmix or a folder of texts)", command)
    common.check(folder.is_dir(), f"{folder} is a file: --data takes the folder that holds it")
    files, others = look_for_files(data)
    endings = ", ".join(ENDINGS)
    said = ""
    if own and others:
        said = f"not read: {len(others):,} ({listed(others, 9)}); read are {endings}"
    common.check(files, f"the data folder {folder} holds no text: it has no file of {endings} that "
                 f"is not empty; {said}".rstrip("; "), command)
    return files, said

def facts_to_record(files):
    """What a run keeps of the files that it was begun with, for its record: see dataset_files. An
    old run stays one."""
    train = list(files["train"])
    if files["old"]:
        return {"train_files": train}
    seen = {name: texts.stamp(path) for name, path in {**files["train"], **files["val"]}.items()}
    return {"train_files": train, "val_files": list(files["val"]), "texts": seen}

def dataset_files(data, begun=None):
    """
    begun: the record of the run that goes on (see facts_to_record); a new one holds out what its
    tokenizer has not seen
    -> {"train": files, "val": files}, each {name: Path} sorted by name; a file in both is split by
    its documents. "old": whether the run was begun when nothing said what is held out; "not_read":
    what of a user's own folder is not, in one line. Failure where the folder is missing or empty,
    or a parquet file does not open or has no string column `text`.
    """
    begun = begun or {}
    files, said = text_files(data)
    for path in files.values():
        if path.suffix == ".parquet":
            why = texts.parquet_problem(path)
            common.check(why is None, why)
    trained = begun.get("train_files")
    if trained and "val_files" not in begun and pipeline.is_folder_data(data):
        return {**last_held_out(files, trained), "old": True, "not_read": said}
    before = begun if trained else common.read_json(pipeline.tokenizer_dir(data) / "phase.json")
    val = [name for name in before.get("val_files", []) if name in files]
    train = [name for name in trained or () if name in files] or list(files)
    shared = {*val} & {*before.get("train_files", [])}
    if not val or not {*train} - {*val} | shared:
        val, shared = held_out_of(data, {name: path.stat().st_size for name, path in files.items()})
    return {"train": {name: files[name] for name in train if name in shared or name not in val},
            "val": {name: files[name] for name in val}, "old": False, "not_read": said}

def held_out_of(data, sizes):
    """
    sizes: {name: bytes}, sorted by name -> (the names of the files held out, those of them that are
    split by documents). The last by name that holds a fair share, 1 % to a half of all: neither a
    readme nor most of the text. Without one the largest is split, or many small ones are held out.
    """
    names = list(sizes)
    total = sum(sizes.values())
    if shard := VAL_SHARD.get(data):
        common.check(shard in names, f"the validation shard {shard} is missing in "
                     f"{pipeline.base_data_dir(data)}", texts.prepare_command(data))
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
    while texts.HOLD_OUT * sum(sizes[name] for name in val) < total:
        val.insert(0, names.pop())
    return val, set()

def last_held_out(files, trained):
    """The files of a run that was begun when the last file by name was held out."""
    names = [name for name in files if "/" not in name and not name.endswith(".txt.gz")]
    train = names[:-1] or names
    train = [name for name in train if name in trained] or train
    return {"train": {name: files[name] for name in train},
            "val": {name: files[name] for name in names[-1:]}}

def held_out_in_words(files):
    """example: "held out for validation: b.txt" """
    part = "part of " if files["val"].keys() & files["train"].keys() else ""
    return f"held out for validation: {part}{listed(list(files['val']), 3)}"

def check_same(begun, now, fingerprint=None):
    """Failure (code 2) that names the files where a run was begun with other texts. begun: its
    record; now: facts_to_record; fingerprint: of the data, None where it is not known yet: then
    files count as changed only if their size is another"""
    before = begun.get("texts", {})
    if not before or begun["inputs"].get("data") == fingerprint:
        return
    now = now["texts"]
    compared = 1 if fingerprint is None else 2  # of texts.stamp
    other = []
    for name in sorted({*before, *now}):
        if name not in now:
            other.append(f"{name} is gone")
        elif name not in before:
            other.append(f"{name} is new")
        elif before[name][:compared] != now[name][:compared]:
            other.append(f"{name} has changed")
    common.check(not other, f"{begun.get('phase')} was started with other texts: "
                 f"{listed(other, 5)}; put the old ones back to resume it, or "
                 f"{pipeline.starting_over(begun.get('phase'))} to put it aside and start anew")

def iter_texts(files, split):
    """All documents of a split, file by file. files: as dataset_files has them"""
    shared = files["train"].keys() & files["val"].keys()
    for name, path in files[split].items():
        yield from texts.documents(path, split, name in shared)
