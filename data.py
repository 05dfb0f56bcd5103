"""
From folders of text to the batch of step s, which is a pure function of (data, seed, s).

    texts       the documents of the files (corpus.py, texts.py)
    stores      files are tokenised once into memory-mapped arrays: tokens, document lengths,
                (for chats) a loss mask
    plan        which pieces of which documents stand in which row: made by best-fit packing
    batch       rows of the plan in an order drawn anew for each epoch

Tokens are stored without <|bos|>; each piece gets one in front when its row is put together, so
every row, and every document in it, starts with <|bos|>.
"""
import bisect
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import socket
import tempfile
from array import array
from collections import Counter, namedtuple
from itertools import chain, islice

import numpy as np

import common
import conversations
import pipeline
import texts

# -------------------------------------------------------------------------------------------------
# stores

# tokens: memmap [n] uint16 or uint32; mask: memmap [n] uint8 or None; lengths: int64 [documents]
Store = namedtuple("Store", "tokens mask lengths facts")

def open_store(prefix, source):
    """The Store at `prefix`, or None where there is none, or it is damaged or of another source."""
    facts = common.read_json(f"{prefix}.json")
    if facts.get("source") != source:
        return None
    arrays = {"mask": None}
    try:
        for name in facts["arrays"]:
            path = f"{prefix}.{name}.npy"
            if not os.path.isfile(path):  # to open a FIFO would take for ever
                return None
            arrays[name] = np.load(path, mmap_mode="r")
        return Store(**arrays, facts=facts)
    except Exception:  # noqa: BLE001  (a damaged header is read as Python: it may raise anything)
        return None

def stamps(prefix, names):
    """The texts.stamp of each array of a store."""
    return [texts.stamp(f"{prefix}.{name}.npy") for name in names]

def is_whole(store, prefix):
    """Whether a store holds what was once written. Its checksum says so; files that nobody has
    touched since are taken as they are: those of a d20 have 20 GB, read at every start else."""
    facts = store.facts
    if facts.get("stamps") == stamps(prefix, facts["arrays"]):
        return True
    digest = hashlib.sha256()
    for name in facts["arrays"]:
        digest.update(getattr(store, name))
    counted = [facts.get("tokens"), facts.get("documents")]
    return digest.hexdigest() == facts.get("sha256") and \
        counted == [store.tokens.size, store.lengths.size]

def write_store(run, prefix, source, documents, vocab_size, more):
    """Writes a store where there is none of this source yet, the arrays first, the facts last.
    Failure with code 75 where the run is asked to stop, before anything is visible: this one is
    tokenised again, the others stay; with 1 where it cannot be written."""
    there = open_store(prefix, source)
    now = stamps(prefix, there.facts["arrays"]) if there is not None else None
    if there is not None and is_whole(there, prefix):
        if there.facts.get("stamps") != now:  # copied, say: the next start need not read all of it
            with contextlib.suppress(OSError):  # somebody else's folder
                common.atomic_write(f"{prefix}.json", json.dumps({**there.facts, "stamps": now}))
        return
    with common.writing(prefix, code=2):  # known before minutes are spent
        prefix.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=prefix.parent).close()
    common.print0(f"tokenizing {prefix.name}")
    show = common.progress("documents tokenized")
    tokens = array("H" if vocab_size <= 2 ** 16 else "I")
    lengths = array("q")
    masks = array("B")
    for ids, mask in documents:
        if why := run.stop_reason():
            common.fail(f"{why} while tokenizing; files tokenized before are kept, run the same "
                        "command again", code=75)
        tokens.extend(ids)
        lengths.append(len(ids))
        masks.extend(mask)
        show(len(lengths))
    arrays = {"tokens": tokens, "lengths": lengths}
    if masks:
        arrays["mask"] = masks
    digest = hashlib.sha256()
    with common.writing(prefix):
        for name, values in arrays.items():
            digest.update(values)
            content = io.BytesIO()
            np.save(content, np.asarray(values))
            common.atomic_write(f"{prefix}.{name}.npy", content.getbuffer())
        facts = {"source": source, "arrays": list(arrays), "tokens": len(tokens),
                 "documents": len(lengths), "sha256": digest.hexdigest(),
                 "stamps": stamps(prefix, arrays), **(more or {})}
        common.atomic_write(f"{prefix}.json", json.dumps(facts))

def make_store(run, data, tokenizer, name, source, documents, more=None):
    """The Store of documents: (ids, mask; [] where all counts) each. They are only looked at, on
    rank 0, where it is not there yet. more: facts, which may be filled meanwhile. Collective."""
    prefix = pipeline.token_dir(data) / tokenizer.fingerprint / name
    run.ranks.on_rank0(write_store, run, prefix, source, documents, tokenizer.vocab_size,
                       more)
    store = open_store(prefix, source)
    common.check(store is not None, f"{prefix}.json cannot be read on {socket.gethostname()}, "
                 "though rank 0 has just seen or written it: is NANOCHAT_BASE_DIR a folder that "
                 "all nodes share?")
    return store

def tokenize_files(run, data, files, split, tokenizer):
    """Tokenises the files of a split that are not tokenised yet. files: the same on all ranks, as
    corpus.dataset_files has them. -> list of Store. Collective."""
    def encoded(group):
        documents = chain.from_iterable(texts.documents(files[split][name], split, both)
                                        for name, _, _, both in group)
        while batch := list(islice(documents, 1024)):
            for ids in tokenizer.encode_batch(batch, common.cores()):
                yield ids, []

    shared = files["train"].keys() & files["val"].keys()
    # rank 0's, for all: a copy of the texts on another node may have been written at another time
    stamps_of = run.ranks.on_rank0(lambda: list(map(texts.stamp, files[split].values())))
    facts = [[name, *of_file, name in shared] for name, of_file in zip(files[split], stamps_of)]
    one_each = files["old"] or not pipeline.is_folder_data(data)
    stores = []
    for group in gathered(facts, 0 if one_each else GATHER):
        name, source = store_of(group, one_each)
        stores.append(make_store(run, data, tokenizer, f"{split}_{name}", source, encoded(group)))
    return stores

GATHER = 20_000_000  # bytes of files to a store: thousands of small ones would be too many stores

def gathered(facts, least):
    """Facts of files, as store_of takes them -> yields lists of them: files of at least so many
    bytes together, in their order."""
    group = []
    size = 0
    for file in facts:
        group.append(file)
        size += file[1]
        if size >= least:
            yield group
            group = []
            size = 0
    if group:
        yield group

def store_of(group, one_each):
    """Facts of files, [name, bytes, time of writing in ns, whether both splits have it] each
    -> (name of their store, what it is made of). one_each: as it was when each file had a store of
    its own."""
    name, size, mtime, shared = group[0]
    if one_each:
        return name, {"name": name, "bytes": size, "mtime": mtime, "alone": shared}
    which = repr([(file, both) for file, _, _, both in group])
    digest = hashlib.sha256(which.encode()).hexdigest()[:8]
    plain = re.sub(r"[^\w.-]", "_", name)[-40:]  # of any name one that every file system takes
    return f"{plain}-{digest}", {"files": group, "documents": 2}

def tokenize_conversations(run, name, data, items, tokenizer, max_tokens):
    """
    Renders and tokenises conversations once, each cut to `max_tokens`; those that teach nothing are
    left out. items() -> list of {"messages": ...}; name identifies them (a hash of what they were
    made from). -> Store, whose facts["counts"] says how many are cut or left out, see
    conversations.render. Collective.
    """
    counts = {}

    def rendered():
        for item in items():
            if found := conversations.render(item, tokenizer, max_tokens, counts):
                ids, mask = found
                yield ids[1:], mask[1:]  # without <|bos|>: the row puts it back
    return make_store(run, data, tokenizer, f"chat_{name}_{max_tokens}", name, rendered(),
                      {"counts": counts})

def counts_of(store):
    """What tokenize_conversations has counted, of all together -> Counter. Of a store of an earlier
    version what can be told from it: there what teaches nothing was not left out."""
    facts = store.facts
    if "counts" in facts:
        return conversations.total(facts["counts"])
    taught = np.maximum.reduceat(store.mask, np.cumsum(store.lengths) - store.lengths)
    none = int((taught == 0).sum())
    return Counter({"conversations": facts["documents"], "cut": facts["cut"],
                    conversations.NO_TOKEN: none})

def check_lessons(entries, store, length):
    """Failure where the conversations of a mixture teach nothing in rows of `length` tokens, or
    those of a user's own file in it. entries: the mixture, see tasks.parse"""
    of = {name: count for name, count in store.facts.get("counts", {}).items() if "." in name}
    of[f"--mixture={','.join(entries)}"] = counts_of(store)
    for name, count in of.items():
        common.check(conversations.teaches(count), f"there is nothing to learn in {name}: "
                     f"{conversations.in_words(count, length)}; what is learned are answers of the "
                     "assistant, as far as they fit into a row")

def fingerprint(stores):
    """Identifies tokenised data: 16 hex digits."""
    digests = " ".join(store.facts["sha256"] for store in stores)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]

# -------------------------------------------------------------------------------------------------
# rows

# row r consists of pieces first[r]:first[r + 1]; a piece (store, start, length) is bos and
# tokens[start:start + length] of a store; length: tokens per row
Plan = namedtuple("Plan", "stores bos length first pieces")

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
    upcoming = ((length, -document, 0) for document, length in enumerate(lengths) if length)
    buffer = []  # sorted list of (length, -document, start)
    rows = []
    row = []
    room = row_length
    while True:
        for piece in islice(upcoming, BUFFER - len(buffer)):
            bisect.insort(buffer, piece)
        if not buffer:
            break
        # how many there are with length + bos <= room; of the longest the earliest document is last
        fit = bisect.bisect_right(buffer, (room - 1, 1, 0))
        if fit or split:
            length, document, start = buffer.pop(max(fit - 1, 0))
            used = min(length, room - 1)
            if used < length:
                bisect.insort(buffer, (length - used, document, start + used))
            row.append((-document, start, used))
            room -= used + 1
        if room < 2 or not (fit or split):
            rows.append(row)
            row = []
            room = row_length
    if row and not split:
        rows.append(row)
    return rows

def make_plan(stores, row_length, bos, split=True):
    """Packs each store by itself (so that a further shard changes nothing in the others) into rows
    of row_length tokens. -> Plan"""
    first = [0]
    pieces = [np.zeros((0, 3), np.int64)]
    for number, store in enumerate(stores):
        starts = np.cumsum(store.lengths) - store.lengths
        rows = pack(store.lengths.tolist(), row_length, split)
        for row in rows:
            first.append(first[-1] + len(row))
        packed = np.array([piece for row in rows for piece in row], np.int64).reshape(-1, 3)
        packed[:, 1] += starts[packed[:, 0]]  # from the store's first token on
        packed[:, 0] = number
        pieces.append(packed)
    pieces = np.concatenate(pieces)
    return Plan(stores, bos, row_length, first, pieces)

def n_rows(plan):
    return len(plan.first) - 1

def n_tokens(stores):
    """The tokens of texts, with the bos of each document."""
    return sum(store.tokens.size + store.lengths.size for store in stores)

def text_plan(stores, row_length, bos):
    """The Plan of texts; of fewer than fill a row, one that is padded: enough to measure on."""
    full = any(n_tokens([store]) >= row_length for store in stores)
    return make_plan(stores, row_length, bos, split=full)

def check_enough(data, train, val, row_length):
    """Failure where there is no row to train on, or nothing to measure on."""
    for split, stores, needed in ("training", train, row_length), ("validation", val, 1):
        most = max([n_tokens([store]) for store in stores], default=0)
        common.check(most >= needed, f"too little text: the {split} split of {data} has "
                     f"{most:,} tokens and needs {needed:,}: add text"
                     + (", or give a smaller --max_seq_len" if split == "training" else ""))

def rows_to_measure(plan, tokens):
    """How many rows, the first ones, are measured: as many as hold so many tokens, at least one
    where there is one."""
    return min(n_rows(plan), max(1, tokens // (plan.length - 1)))

def check_measurable(entries, store, plan, tokens, tokenizer):
    """Failure where in the rows to measure, for so many tokens, no text is counted. entries: what
    is held out, see tasks.parse"""
    token_bytes = tokenizer.token_bytes()
    rows = (read_rows(plan, [r]) for r in range(rows_to_measure(plan, tokens)))
    common.check(any((token_bytes[row] * counted).any() for row, counted in rows),
                 f"there is nothing to measure in --held_out={','.join(entries)}: "
                 f"{conversations.in_words(counts_of(store), plan.length - 1)}")

def read_rows(plan, numbers):
    """Rows by number -> (tokens [n, length] int64, counted [n, length] uint8: 1 where a token may
    be trained on)"""
    tokens = np.full((len(numbers), plan.length), plan.bos, np.int64)
    counted = np.zeros((len(numbers), plan.length), np.uint8)
    for i, r in enumerate(numbers):
        at = 0
        pieces = plan.pieces[plan.first[r]:plan.first[r + 1]]
        for number, start, length in pieces.tolist():
            store = plan.stores[number]
            end = at + 1 + length
            tokens[i, at + 1:end] = store.tokens[start:start + length]
            if store.mask is None:
                counted[i, at:end] = 1  # with bos: that a document ends is learned too
            else:
                counted[i, at + 1:end] = store.mask[start:start + length]
            at = end
    return tokens, counted

@functools.lru_cache(maxsize=2)
def epoch_order(rows, seed, epoch):
    return common.rng(seed, 1, epoch).permutation(rows)

def batch_rows(rows, seed, step, total_rows):
    """Row numbers of the batch of `step`: the total_rows next ones in the order of the epoch they
    fall into."""
    places = range(step * total_rows, (step + 1) * total_rows)
    return [int(epoch_order(rows, seed, place // rows)[place % rows]) for place in places]

def batch(plan, seed, step, total_rows, micro_rows, rank=0, world=1):
    """
    The micro-batches of `step` on this rank: yields (x, y) int64 arrays [micro_rows, length - 1],
    y = -1 where not counted. Whatever the ranks and micro_rows, the same total_rows rows are used
    in the same order.
    """
    numbers = batch_rows(n_rows(plan), seed, step, total_rows)
    for start in range(rank * micro_rows, total_rows, world * micro_rows):
        tokens, counted = read_rows(plan, numbers[start:start + micro_rows])
        y = np.where(counted[:, 1:], tokens[:, 1:], -1)
        yield tokens[:, :-1], y

def check_shared(total_rows, world):
    """Failure where the ranks cannot share a batch evenly. total_rows: -1 where the batch will be
    derived (training.horizon), which gives a power of two."""
    said = f"a batch of {total_rows} rows"
    if total_rows == -1:
        total_rows, said = 2 ** 30, "a batch of as many rows as a power of two"
    fitting = [str(n) for n in range(world, 0, -1) if total_rows % n == 0]
    common.check(total_rows % world == 0, f"{said} cannot be divided by {world} ranks: use "
                 f"{' or '.join(fitting)} ranks in all (nodes times --nproc)")

def fit_micro_rows(total_rows, device_rows, world):
    """The largest number of rows a device can take at once that divides the batch evenly. Failure
    where none does.  example: (256, 48, 8) -> 32"""
    check_shared(total_rows, world)
    each = total_rows // world
    return max(d for d in range(1, min(device_rows, each) + 1) if each % d == 0)
