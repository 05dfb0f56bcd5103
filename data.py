"""
From folders of text to the batch of step s, which is a pure function of (data, seed, s).

    files       a data set is a folder of .parquet, .jsonl, .jsonl.gz or .txt files
    stores      each file is tokenised once into memory-mapped arrays: tokens, document lengths, (for chats) a loss mask
    plan        which pieces of which documents stand in which row: made by best-fit packing
    batch       rows of the plan in an order drawn anew for each epoch

Tokens are stored without <|bos|>; each piece gets one in front when its row is put together, so every row, and every
document in it, starts with <|bos|>.
"""
import bisect
import functools
import gzip
import hashlib
import json
import os
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np

import common

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
VAL_SHARD = {"fineweb_edu": "shard_01822.parquet", "climbmix": "shard_06542.parquet"}  # fixed by name: the last of all shards
HOLD_OUT = 20   # of a data set in a single file every 20th document is held out

# ---------------------------------------------------------------------------------------------------------------------
# files and documents

def text_files(data):
    """The files of a data set that are not empty, sorted by name; exits with 2 where there is none."""
    folder = common.base_data_dir(data)
    command = None if common.is_folder_data(data) else f"python prepare_data.py --data={data}"
    common.check(folder.is_dir(), f"{folder} is a file: --data takes the folder that holds it" if folder.is_file() else f"the data folder {folder} does not exist", command)
    files = sorted(p for p in folder.iterdir() if p.name.endswith(ENDINGS) and not p.name.startswith(".") and p.stat().st_size > 0)
    common.check(files, f"the data folder {folder} holds no text: it has no file of {', '.join(ENDINGS)} that is not empty", command)
    return files

def dataset_files(data, names=None):
    """
    names: of the training files to take, where a run has begun with these; None: all
    -> (train files, validation files), lists of Path sorted by name. The validation file is the last by name (of known
    data sets a fixed name). A single file is in both lists: HOLD_OUT splits its documents.
    Exits with 2: missing or empty folder, a parquet file that does not open or has no string column `text`.
    """
    files = text_files(data)
    for path in files:
        if path.name.endswith(".parquet") and (why := parquet_problem(path, ["text"])):
            common.fail(why)
    if data in VAL_SHARD:
        val = [p for p in files if p.name == VAL_SHARD[data]]
        common.check(val, f"the validation shard {VAL_SHARD[data]} is missing in {files[0].parent}", f"python prepare_data.py --data={data}")
        train = [p for p in files if p not in val]
    else:
        train, val = files[:-1] or files, files[-1:]
    return [p for p in train if names is None or p.name in names] or train, val

def parquet_problem(path, columns):
    """None, or why the parquet file cannot be read: looks at its footer, which has to name these columns of text."""
    import pyarrow
    import pyarrow.parquet
    try:
        parquet = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as e:
        return f"{path} is no readable parquet file: {str(e).splitlines()[0][:120]}"
    absent = [c for c in columns if c not in parquet.schema_arrow.names]
    if absent:
        return f"{path} has no column `{absent[0]}` (it has {', '.join(parquet.schema_arrow.names)})"
    kinds = {c: str(parquet.schema_arrow.field(c).type) for c in columns}  # a dictionary of strings is one, too
    return next((f"{path}: its column `{c}` is no text but {kind}" for c, kind in kinds.items() if not kind.startswith(("string", "large_string", "dictionary<values=string"))), None)

def read_lines(path):
    """The lines of a .jsonl or .jsonl.gz file that are not blank, as (number, bytes). A damaged file is a ValueError."""
    number = 0
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path} is damaged behind line {number}: {e}") from e

def refused(convert, x):
    """convert(x) -> (its value, None), or (None, why it refused)"""
    try:
        return convert(x), None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
        return None, f"{type(e).__name__}: {str(e)[:80]}"

def too_many(broken, total):
    return broken > 5 and broken > total / 100

def sound(path, numbered, convert):
    """
    convert(x) for each (number, x). What convert refuses is reported as path:number and left out; more than 1 % of that
    (and more than 5) end the run with 2, as does a damaged file.
    """
    broken, total = 0, 0
    try:
        for total, (number, x) in enumerate(numbered, 1):
            value, why = refused(convert, x)
            if why is None:
                yield value
                continue
            broken += 1
            if broken <= 20:
                common.print0(f"{path}:{number}: left out, broken ({why})")
            if broken >= 100 and too_many(broken, total):
                break
    except ValueError as e:
        common.fail(f"{e}; remove it and prepare the data again")
    common.check(not too_many(broken, total), f"{path} has {broken} broken lines or rows among {total}; the first ones are named above")
    if broken > 20:
        common.print0(f"{path}: {broken} broken lines or rows were left out in all")

def problem(path, numbered, convert, enough=None):
    """None, or why sound() would end the run; looks at all, or until `enough` are good."""
    broken, good = [], 0
    try:
        for number, x in numbered:
            why = refused(convert, x)[1]
            good, broken = (good + 1, broken) if why is None else (good, broken + [f"{path}:{number} ({why})"])
            if good == enough or len(broken) >= 100 and too_many(len(broken), good + len(broken)):
                break
    except ValueError as e:
        return str(e)
    if too_many(len(broken), good + len(broken)) or not good:
        return f"{len(broken)} of {good + len(broken)} lines or rows are broken, the first: {broken[0]}" if broken else f"{path} holds no rows"

def text_of(line):
    text = json.loads(line)["text"]
    if not isinstance(text, str):
        raise TypeError("text is no string")
    return text

def read_documents(path):
    """All documents of one file, in order, as str. A jsonl line is {"text": ...}; of a .txt file paragraphs (split at
    blank lines) are gathered into documents of about 10,000 characters. Of broken lines see `sound`."""
    name = path.name
    if name.endswith(".parquet"):
        import pyarrow.parquet
        parquet = pyarrow.parquet.ParquetFile(path)
        for group in range(parquet.num_row_groups):
            try:
                texts = parquet.read_row_group(group, columns=["text"]).column("text").to_pylist()
            except Exception as e:  # pyarrow raises many kinds for a damaged page
                common.fail(f"{path} is damaged in row group {group}: {str(e).splitlines()[0][:120]}; remove it and prepare the data again")
            yield from (t for t in texts if t)
    elif name.endswith(".txt"):
        gathered, size = [], 0
        for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            gathered.append(paragraph)
            size += len(paragraph)
            if size >= 10_000:
                yield "\n\n".join(gathered)
                gathered, size = [], 0
        if "".join(gathered).strip():
            yield "\n\n".join(gathered)
    else:
        yield from (t for t in sound(path, read_lines(path), text_of) if t)

def documents(path, split, alone):
    """The documents of `path` that belong to `split`; alone: the file is the whole data set, so HOLD_OUT decides."""
    for i, text in enumerate(read_documents(path)):
        if not alone or (i % HOLD_OUT == HOLD_OUT - 1) == (split == "val"):
            yield text

def iter_texts(data, split="train", names=None):
    """All documents of a split, file by file. names: as dataset_files has it"""
    train, val = dataset_files(data, names)
    for path in train if split == "train" else val:
        yield from documents(path, split, train == val)

# ---------------------------------------------------------------------------------------------------------------------
# stores

Store = namedtuple("Store", "tokens mask lengths facts")  # memmap [n] uint16|uint32, memmap [n] uint8 or None, int64 [documents], dict

def open_store(prefix, source=None):
    """The Store at `prefix`, or None where there is none or it was made from another source (or is damaged)."""
    facts = common.read_json(f"{prefix}.json")
    if not facts or (source is not None and facts["source"] != source):
        return None
    try:
        arrays = [np.load(f"{prefix}.{name}.npy", mmap_mode="r") if name in facts["arrays"] else None for name in ("tokens", "mask", "lengths")]
    except (OSError, ValueError):
        return None
    if arrays[0].size != facts["tokens"] or arrays[2].size != facts["documents"]:
        return None
    return Store(*arrays, facts)

def write_store(prefix, pieces, source, vocab_size, more=dict):
    """
    Writes a store from `pieces`, an iterator of batches: lists of (ids, mask or None). Arrays first, facts last; more() -> further facts.
    A stop request ends the process with 75 before anything is visible: this file is tokenised again, the others stay.
    """
    tokens, masks, lengths = [], [], []
    dtype = np.uint16 if vocab_size <= 2 ** 16 else np.uint32
    for batch in pieces:
        if (why := common.stop_requested()):
            common.fail(f"{why} while tokenising; what was tokenised before is kept, run the same command again", code=75)
        for ids, mask in batch:
            tokens.append(np.asarray(ids, dtype))
            lengths.append(len(ids))
            if mask is not None:
                masks.append(np.asarray(mask, np.uint8))
    arrays = {"tokens": np.concatenate(tokens) if tokens else np.zeros(0, dtype), "lengths": np.asarray(lengths, np.int64)}
    if masks:
        arrays["mask"] = np.concatenate(masks)
    digest = hashlib.sha256(arrays["tokens"].tobytes())
    digest.update(arrays["lengths"].tobytes() + (arrays["mask"].tobytes() if masks else b""))
    for name, array in arrays.items():
        temporary = Path(f"{prefix}.{name}.npy.tmp{os.getpid()}")
        with open(temporary, "wb") as f:
            np.save(f, array)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, f"{prefix}.{name}.npy")
    facts = {"source": source, "arrays": list(arrays), "tokens": int(arrays["tokens"].size), "documents": len(lengths),
             "sha256": digest.hexdigest(), **more()}
    common.atomic_write(f"{prefix}.json", json.dumps(facts))

def in_batches(iterator, size=1024):
    batch = []
    for item in iterator:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

def tokenize_files(data, split, tokenizer, names=None, say=common.print0):
    """Tokenises the files of a split that are not tokenised yet (on rank 0). -> list of Store
    names: of the training files to take, where a run has begun with these; None: all"""
    train, val = dataset_files(data, names)
    folder = common.token_dir(data) / tokenizer.fingerprint
    stores = []
    for path in train if split == "train" else val:
        prefix = folder / f"{split}_{path.name}"
        stat = path.stat()
        source = {"name": path.name, "bytes": stat.st_size, "mtime": stat.st_mtime_ns, "alone": train == val}

        def make():
            if open_store(prefix, source) is None:
                folder.mkdir(parents=True, exist_ok=True)
                say(f"tokenising {path.name} ({stat.st_size / 1e6:.1f} MB)")
                texts = documents(path, split, train == val)
                write_store(prefix, ([(ids, None) for ids in tokenizer.encode_batch(batch, common.cores())] for batch in in_batches(texts)),
                            source, tokenizer.vocab_size)
        common.on_rank0(make)
        stores.append(open_store(prefix, source))
    if sum(s.facts["tokens"] for s in stores) == 0:
        common.fail(f"the {split} split of {data} holds no text")
    return stores

def tokenize_conversations(name, data, items, tokenizer, max_tokens):
    """
    Renders and tokenises conversations once (on rank 0), each cut to `max_tokens`.
    items() -> list of {"messages": ...}; name identifies them (a hash of what they were made from). -> [Store]
    facts["cut"] of the store counts the conversations that were longer than a row.
    """
    prefix = common.token_dir(data) / tokenizer.fingerprint / f"chat_{name}_{max_tokens}"

    def make():
        if open_store(prefix, name) is None:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            cut = 0
            def rendered(batch):
                nonlocal cut
                for item in batch:
                    ids, mask = tokenizer.render_conversation(item)
                    cut += len(ids) > max_tokens
                    yield ids[1:max_tokens], mask[1:max_tokens]  # without <|bos|>: the row puts it back
            write_store(prefix, (list(rendered(batch)) for batch in in_batches(items())), name, tokenizer.vocab_size, lambda: {"cut": cut})
    common.on_rank0(make)
    return [open_store(prefix, name)]

def fingerprint(stores):
    """Identifies tokenised data: 16 hex digits."""
    return hashlib.sha256(" ".join(s.facts["sha256"] for s in stores).encode()).hexdigest()[:16]

# ---------------------------------------------------------------------------------------------------------------------
# rows

Plan = namedtuple("Plan", "stores bos length first piece_store piece_start piece_length")
# row r consists of pieces first[r]:first[r + 1]; a piece is bos + tokens[start:start + length] of a store; length: tokens per row

BUFFER = 1000  # documents looked at for a fit

def pack(lengths, row_length, split):
    """
    Best-fit packing: a row takes, again and again, the longest document of the next BUFFER that still fits whole.
    Where none fits: split=True cuts the shortest so that the row is full and its rest stays in the buffer (nothing is
    lost but the last row, if it isn't full); split=False closes the row, which is padded (chats: nothing is cut).
    in: document lengths (without bos; for split=False all < row_length), tokens per row
    out: list of rows, each a list of (document, start, length)
    example: pack([5, 3], 6, True) -> [[(0, 0, 5)]] and the 3 tokens of the second do not fill a row;  pack([2, 2], 6, False) -> [[(0, 0, 2), (1, 0, 2)]]
    """
    buffer, rows, row, room, upcoming = [], [], [], row_length, 0  # buffer: sorted list of (length, -document, start)
    while True:
        while len(buffer) < BUFFER and upcoming < len(lengths):
            if lengths[upcoming]:
                bisect.insort(buffer, (int(lengths[upcoming]), -upcoming, 0))
            upcoming += 1
        if not buffer:
            break
        fit = bisect.bisect_right(buffer, (room - 1, 1, 0))  # longest with length + bos <= room, the earliest document of those
        if fit:
            length, document, start = buffer.pop(fit - 1)
        elif split:
            length, document, start = buffer.pop(0)
            bisect.insort(buffer, (length - (room - 1), document, start + room - 1))
            length = room - 1
        if fit or split:
            row.append((-document, start, length))
            room -= length + 1
        if room < 2 or not (fit or split):
            rows.append(row)
            row, room = [], row_length
    if row and not split:
        rows.append(row)
    return rows

def make_plan(stores, row_length, bos, split=True):
    """Packs each store by itself (so that a further shard changes nothing in the others) into rows of row_length tokens. -> Plan"""
    first, pieces = [0], []
    for number, store in enumerate(stores):
        starts = np.concatenate([[0], np.cumsum(store.lengths)])
        for row in pack(store.lengths.tolist(), row_length, split):
            pieces.extend((number, int(starts[document]) + start, length) for document, start, length in row)
            first.append(len(pieces))
    columns = np.array(pieces, np.int64).reshape(-1, 3).T
    return Plan(stores, bos, row_length, np.array(first, np.int64), *columns)

def n_rows(plan):
    return len(plan.first) - 1

def cropped(plan):
    """The share of the tokens that stand in no row."""
    return 1 - float(plan.piece_length.sum()) / max(1, sum(s.tokens.size for s in plan.stores))

def read_rows(plan, numbers):
    """Rows by number -> (tokens [n, length] int64, counted [n, length] uint8: 1 where a token may be trained on)"""
    tokens = np.full((len(numbers), plan.length), plan.bos, np.int64)
    counted = np.zeros((len(numbers), plan.length), np.uint8)
    for i, r in enumerate(numbers):
        at = 0
        for p in range(plan.first[r], plan.first[r + 1]):
            store, start, length = plan.stores[plan.piece_store[p]], plan.piece_start[p], plan.piece_length[p]
            tokens[i, at + 1:at + 1 + length] = store.tokens[start:start + length]
            counted[i, at + 1:at + 1 + length] = 1 if store.mask is None else store.mask[start:start + length]
            if store.mask is None:
                counted[i, at] = 1  # that a document ends is learned too
            at += 1 + length
    return tokens, counted

@functools.lru_cache(maxsize=2)
def epoch_order(rows, seed, epoch):
    return common.rng(seed, 1, epoch).permutation(rows)

def batch_rows(rows, seed, step, total_rows):
    """Row numbers of the batch of `step`: the total_rows next ones in the order of the epoch they fall into."""
    places = np.arange(step * total_rows, (step + 1) * total_rows)
    return [int(epoch_order(rows, seed, int(p // rows))[p % rows]) for p in places]

def batch(plan, seed, step, total_rows, micro_rows, rank=0, world=1):
    """
    The micro-batches of `step` on this rank: yields (x, y) int64 arrays [micro_rows, length - 1], y = -1 where not counted.
    Whatever the ranks and micro_rows, the same total_rows rows are used in the same order.
    """
    numbers = batch_rows(n_rows(plan), seed, step, total_rows)
    for start in range(rank * micro_rows, total_rows, world * micro_rows):
        tokens, counted = read_rows(plan, numbers[start:start + micro_rows])
        yield tokens[:, :-1], np.where(counted[:, 1:] == 1, tokens[:, 1:], -1)

def counted_targets(plan, seed, step, total_rows):
    """How many targets of the whole batch of `step` are trained on: the same number on every rank."""
    numbers = batch_rows(n_rows(plan), seed, step, total_rows)
    return int(read_rows(plan, numbers)[1][:, 1:].sum())

def fit_micro_rows(total_rows, device_rows, world):
    """The largest number of rows a device can take at once that divides the batch evenly; exits with 2 where none does.
    example: (256, 48, 8) -> 32"""
    if total_rows % world:
        common.fail(f"a batch of {total_rows} rows cannot be dealt to {world} ranks: use {' or '.join(str(w) for w in range(world, 0, -1) if total_rows % w == 0)} ranks")
    each = total_rows // world
    return max(d for d in range(1, min(device_rows, each) + 1) if each % d == 0)
