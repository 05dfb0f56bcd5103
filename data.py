"""
From folders of text to the batch of step s, which is a pure function of (data, seed, s).

    texts       the documents of the files (texts.py)
    stores      each file is tokenised once into memory-mapped arrays: tokens, document lengths,
                (for chats) a loss mask
    plan        which pieces of which documents stand in which row: made by best-fit packing
    batch       rows of the plan in an order drawn anew for each epoch

Tokens are stored without <|bos|>; each piece gets one in front when its row is put together, so
every row, and every document in it, starts with <|bos|>.
"""
import bisect
import functools
import hashlib
import json
import os
from collections import namedtuple
from itertools import islice
from pathlib import Path

import numpy as np

import common
import pipeline
import texts

# -------------------------------------------------------------------------------------------------
# stores

# tokens: memmap [n] uint16 or uint32; mask: memmap [n] uint8 or None; lengths: int64 [documents]
Store = namedtuple("Store", "tokens mask lengths facts")

def open_store(prefix, source=None):
    """The Store at `prefix`, or None where there is none, or it is damaged or of another source."""
    facts = common.read_json(f"{prefix}.json")
    if not facts or (source is not None and facts["source"] != source):
        return None

    def array(name):
        if name not in facts["arrays"]:
            return None
        return np.load(f"{prefix}.{name}.npy", mmap_mode="r")
    try:
        store = Store(array("tokens"), array("mask"), array("lengths"), facts)
    except (OSError, ValueError):
        return None
    whole = store.tokens.size == facts["tokens"] and store.lengths.size == facts["documents"]
    return store if whole else None

def write_store(prefix, batches, source, vocab_size, more=dict, stop_reason=lambda: None):
    """
    Writes a store from `batches`: lists of (ids, mask or None). Arrays first, facts last; more() ->
    further facts. Failure with code 75 where stop_reason() says something, before anything is
    visible: this file is tokenised again, the others stay.
    """
    tokens, masks, lengths = [], [], []
    dtype = np.uint16 if vocab_size <= 2 ** 16 else np.uint32
    for batch in batches:
        if why := stop_reason():
            common.fail(f"{why} while tokenising; what was tokenised before is kept, run the same "
                        "command again", code=75)
        for ids, mask in batch:
            tokens.append(np.asarray(ids, dtype))
            lengths.append(len(ids))
            if mask is not None:
                masks.append(np.asarray(mask, np.uint8))
    arrays = {"tokens": np.concatenate(tokens) if tokens else np.zeros(0, dtype),
              "lengths": np.asarray(lengths, np.int64)}
    if masks:
        arrays["mask"] = np.concatenate(masks)
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(array.tobytes())
    for name, array in arrays.items():
        temporary = Path(f"{prefix}.{name}.npy.tmp{os.getpid()}")
        with open(temporary, "wb") as f:
            np.save(f, array)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, f"{prefix}.{name}.npy")
    facts = {"source": source, "arrays": list(arrays), "tokens": int(arrays["tokens"].size),
             "documents": len(lengths), "sha256": digest.hexdigest(), **more()}
    common.atomic_write(f"{prefix}.json", json.dumps(facts))

def in_batches(items, size=1024):
    """example: ("abcde", 2) -> ["a", "b"], ["c", "d"], ["e"]"""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch

def tokenize_files(run, data, split, tokenizer, names=None):
    """Tokenises the files of a split that are not tokenised yet (on rank 0). -> list of Store
    names: of the training files to take, where a run has begun with these; None: all. Collective.
    """
    train, val = texts.dataset_files(data, names)
    folder = pipeline.token_dir(data) / tokenizer.fingerprint
    alone = train == val

    def tokenize(path, prefix, source):
        if open_store(prefix, source) is None:
            folder.mkdir(parents=True, exist_ok=True)
            common.print0(f"tokenising {path.name} ({source['bytes'] / 1e6:.1f} MB)")
            batches = ([(ids, None) for ids in tokenizer.encode_batch(batch, common.cores())]
                       for batch in in_batches(texts.documents(path, split, alone)))
            write_store(prefix, batches, source, tokenizer.vocab_size,
                        stop_reason=run.stop_reason)

    stores = []
    for path in train if split == "train" else val:
        prefix, stat = folder / f"{split}_{path.name}", path.stat()
        source = {"name": path.name, "bytes": stat.st_size, "mtime": stat.st_mtime_ns,
                  "alone": alone}
        run.ranks.on_rank0(tokenize, path, prefix, source)
        stores.append(open_store(prefix, source))
    common.check(sum(s.facts["tokens"] for s in stores), f"the {split} split of {data} holds no "
                 "text")
    return stores

def tokenize_conversations(run, name, data, items, tokenizer, max_tokens):
    """
    Renders and tokenises conversations once (on rank 0), each cut to `max_tokens`.
    items() -> list of {"messages": ...}; name identifies them (a hash of what they were made from).
    -> Store, whose facts["cut"] counts the conversations that were longer. Collective.
    """
    prefix = pipeline.token_dir(data) / tokenizer.fingerprint / f"chat_{name}_{max_tokens}"

    def tokenize():
        if open_store(prefix, name) is not None:
            return
        prefix.parent.mkdir(parents=True, exist_ok=True)
        cut = 0

        def rendered(batch):
            nonlocal cut
            for item in batch:
                ids, mask = tokenizer.render_conversation(item)
                cut += len(ids) > max_tokens
                yield ids[1:max_tokens], mask[1:max_tokens]  # without <|bos|>: the row puts it back
        batches = (list(rendered(batch)) for batch in in_batches(items()))
        write_store(prefix, batches, name, tokenizer.vocab_size, lambda: {"cut": cut},
                    run.stop_reason)

    run.ranks.on_rank0(tokenize)
    return open_store(prefix, name)

def random_store(vocab_size, length, documents=64):
    """A Store of random documents of `length` tokens, for trying out shapes and times."""
    tokens = common.rng(0).integers(vocab_size, size=documents * length)
    return Store(tokens, None, np.full(documents, length), {"tokens": tokens.size})

def file_names(stores):
    """The names of the files that stores were made from; [] of random ones."""
    return [store.facts["source"]["name"] for store in stores if "source" in store.facts]

def fingerprint(stores):
    """Identifies tokenised data: 16 hex digits."""
    digests = " ".join(store.facts.get("sha256", "random") for store in stores)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]

# -------------------------------------------------------------------------------------------------
# rows

# row r consists of pieces first[r]:first[r + 1]; a piece is bos + tokens[start:start + length] of a
# store; length: tokens per row
Plan = namedtuple("Plan", "stores bos length first piece_store piece_start piece_length")

BUFFER = 1000  # documents looked at for a fit

def pack(lengths, row_length, split):
    """
    Best-fit packing: a row takes, again and again, the longest document of the next BUFFER that
    still fits whole. Where none fits: split=True cuts the shortest so that the row is full and its
    rest stays in the buffer (nothing is lost but the last row, if it isn't full); split=False
    closes the row, which is padded (chats: nothing is cut).
    in: document lengths (without bos; for split=False all < row_length), tokens per row
    out: list of rows, each a list of (document, start, length)
    example: pack([5, 3], 6, True) -> [[(0, 0, 5)]] and the 3 tokens of the second fill no row
    example: pack([2, 2], 6, False) -> [[(0, 0, 2), (1, 0, 2)]]
    """
    buffer = []  # sorted list of (length, -document, start)
    rows, row, room, upcoming = [], [], row_length, 0
    while True:
        while len(buffer) < BUFFER and upcoming < len(lengths):
            if lengths[upcoming]:
                bisect.insort(buffer, (int(lengths[upcoming]), -upcoming, 0))
            upcoming += 1
        if not buffer:
            break
        # the longest with length + bos <= room, of those the earliest document
        fit = bisect.bisect_right(buffer, (room - 1, 1, 0))
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
    """Packs each store by itself (so that a further shard changes nothing in the others) into rows
    of row_length tokens. -> Plan"""
    first, pieces = [0], []
    for number, store in enumerate(stores):
        starts = np.concatenate([[0], np.cumsum(store.lengths)])
        for row in pack(store.lengths.tolist(), row_length, split):
            pieces += [(number, int(starts[document]) + start, length)
                       for document, start, length in row]
            first.append(len(pieces))
    columns = np.array(pieces, np.int64).reshape(-1, 3).T
    return Plan(stores, bos, row_length, np.array(first, np.int64), *columns)

def n_rows(plan):
    return len(plan.first) - 1

def fills_a_row(stores, row_length):
    """Whether the documents of any store, each with its bos, fill a row."""
    return any(s.tokens.size + s.lengths.size >= row_length for s in stores)

def cropped(plan):
    """The share of the tokens that stand in no row."""
    return 1 - float(plan.piece_length.sum()) / max(1, sum(s.tokens.size for s in plan.stores))

def read_rows(plan, numbers):
    """Rows by number -> (tokens [n, length] int64, counted [n, length] uint8: 1 where a token may
    be trained on)"""
    tokens = np.full((len(numbers), plan.length), plan.bos, np.int64)
    counted = np.zeros((len(numbers), plan.length), np.uint8)
    for i, r in enumerate(numbers):
        at = 0
        for p in range(plan.first[r], plan.first[r + 1]):
            store, start = plan.stores[plan.piece_store[p]], plan.piece_start[p]
            here = slice(at + 1, at + 1 + plan.piece_length[p])
            there = slice(start, start + plan.piece_length[p])
            tokens[i, here] = store.tokens[there]
            if store.mask is None:
                counted[i, at] = 1  # that a document ends is learned too
                counted[i, here] = 1
            else:
                counted[i, here] = store.mask[there]
            at = here.stop
    return tokens, counted

@functools.lru_cache(maxsize=2)
def epoch_order(rows, seed, epoch):
    return common.rng(seed, 1, epoch).permutation(rows)

def batch_rows(rows, seed, step, total_rows):
    """Row numbers of the batch of `step`: the total_rows next ones in the order of the epoch they
    fall into."""
    places = np.arange(step * total_rows, (step + 1) * total_rows)
    return [int(epoch_order(rows, seed, int(p // rows))[p % rows]) for p in places]

def batch(plan, seed, step, total_rows, micro_rows, rank=0, world=1):
    """
    The micro-batches of `step` on this rank: yields (x, y) int64 arrays [micro_rows, length - 1],
    y = -1 where not counted. Whatever the ranks and micro_rows, the same total_rows rows are used
    in the same order.
    """
    numbers = batch_rows(n_rows(plan), seed, step, total_rows)
    for start in range(rank * micro_rows, total_rows, world * micro_rows):
        tokens, counted = read_rows(plan, numbers[start:start + micro_rows])
        yield tokens[:, :-1], np.where(counted[:, 1:] == 1, tokens[:, 1:], -1)

def fit_micro_rows(total_rows, device_rows, world):
    """The largest number of rows a device can take at once that divides the batch evenly. Failure
    where none does.  example: (256, 48, 8) -> 32"""
    fitting = [w for w in range(world, 0, -1) if total_rows % w == 0]
    common.check(fitting[0] == world, f"a batch of {total_rows} rows cannot be dealt to {world} "
                 f"ranks: use {' or '.join(map(str, fitting))} ranks")
    each = total_rows // world
    return max(d for d in range(1, min(device_rows, each) + 1) if each % d == 0)
