"""
Phase 1: the tokenizer. Trains a byte-level BPE on the training texts of a data set; one process, all cores.

    python tok_train.py --data=toy --vocab_size=4096
    python tok_train.py --data=fineweb_edu

Needs the data (prepare_data.py). Writes ranks.txt and tokenizer.json into tokenizer/ at its very end, so a run that was
interrupted has left nothing and the same command starts again; it takes seconds to minutes.

How: texts are split into words (tokenizer.PATTERN) and equal words counted, in parallel. Then, until the vocabulary is
full, the pair of neighbouring tokens that occurs most often becomes a new token; among equally frequent pairs the one
with the smaller ids goes first. A pair whose bytes are a token already is passed over, so that no token exists twice.
"""
import common
common.install_stop_handlers()

import hashlib
import heapq
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import regex

import configurator
import data as dataset
import phase
import tokenizer as tok

data = "fineweb_edu"         # toy, fineweb_edu, climbmix, or a folder of .parquet, .jsonl(.gz) or .txt files
vocab_size = 32768           # tokens, the 256 bytes and the 9 special tokens among them
max_chars = 2_000_000_000    # characters of text read, from the start of the training split
doc_cap = 10_000             # characters of a document that count, so that no long one dominates
# ---- settings below may change at every resume
workers = 0                  # processes that count words; 0: one for each core
time_limit = None            # minutes until it stops; None: no limit (under Slurm the job's)
start_over = False           # put the old tokenizer aside and train a new one
settings = configurator.configure(globals()) if __name__ == "__main__" else None

CHUNK_CHARS = int(os.environ.get('CC','4_000_000'))     # characters that one worker counts at a time
MAX_WORDS = 5_000_000        # different words held (2 GB); beyond that the rarest are dropped, see `prune`
OTHER_SPACES = "".join(map(chr, (*range(9, 14), 0x85, 0xa0, 0x1680, *range(0x2000, 0x200b), 0x2028, 0x2029, 0x202f, 0x205f,
                                 0x3000)))  # what the pattern takes as white space, without " "
LINE_START = re.compile(r"\n(?=\S)")
split = regex.compile(tok.PATTERN).findall

# ---------------------------------------------------------------------------------------------------------------------
# words and their counts

def cut(text):
    """
    Cuts a text into segments with str methods alone, so that splitting the segments by tokenizer.PATTERN gives the same
    pieces as splitting the whole: then each different segment goes through the slow pattern only once.
    example: "One day,  a cat\\nsat" -> ["One", " day,", "  a", " cat\\n", "sat"]
    Why it holds: the pattern has no piece in which a space follows anything but white space, and none in which anything
    but white space follows a line break. So a piece always ends (1) before a space after a character that is no white
    space, (2) after a line break before a character that is no white space. Only there is cut. And no piece looks past
    such a place: its one look-ahead asks behind white space, whether more white space comes, and at (1) there is none
    to ask behind; at (2) the piece up to the line break is found before that question.
    """
    if "\0" in text:
        return [text]  # \0 marks the cuts
    text = text.replace(" ", "\0 ").replace(" \0", " ")  # before each space, but not between two
    for space in OTHER_SPACES:
        if space in text:
            text = text.replace(space + "\0", space)     # nor between other white space and a space
    return LINE_START.sub("\n\0", text).split("\0")

def count_words(texts):
    """list of str -> {word: how often}, as tokenizer.PATTERN splits the texts"""
    segments, words = Counter(), {}
    for text in texts:
        segments.update(cut(text))
    segments.pop("", None)
    get = words.get
    for segment, n in segments.items():
        for word in split(segment):
            words[word] = get(word, 0) + n
    return words

def chunks(texts, max_chars, doc_cap):
    """Texts cut to doc_cap characters, in lists of about CHUNK_CHARS characters, max_chars (and a document) in all."""
    chunk, size, total = [], 0, 0
    for text in texts:
        text = text[:doc_cap]
        try:
            text.encode()
        except UnicodeEncodeError:  # surrogates: as the tokenizer takes them
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        chunk.append(text)
        size += len(text)
        total += len(text)
        if size >= CHUNK_CHARS or total >= max_chars:
            yield chunk
            chunk, size = [], 0
        if total >= max_chars:
            return
    if chunk:
        yield chunk

def quiet_worker():
    """A worker leaves signals to the main process, which lets it finish its chunk, and ends when that process has died."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()

def in_order(function, items, workers):
    """map(function, items) by worker processes: results in order, at most workers + 1 items waiting in memory."""
    if workers <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), quiet_worker) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

def prune(words, most):
    """Drops words seen once, then those seen twice, ... until at most half of `most` are left. The table is merged chunk
    by chunk in the order of the text, so what is dropped does not depend on the number of workers."""
    least = 1
    while len(words) > most // 2:
        least += 1
        words = {word: n for word, n in words.items() if n >= least}
    return words

def count_all(texts, max_chars, doc_cap, workers, say=common.print0):
    """iterator of str -> ({word: how often}, characters read)"""
    words, chars, t0, said = {}, 0, time.time(), time.time()
    sizes = deque()
    def measured():
        for chunk in chunks(texts, max_chars, doc_cap):
            sizes.append(sum(map(len, chunk)))
            yield chunk
    for part in in_order(count_words, measured(), workers):
        for word, n in part.items():
            words[word] = words.get(word, 0) + n
        if len(words) > MAX_WORDS:
            words = prune(words, MAX_WORDS)
            say(f"dropped the rarest words: {len(words):,} are left")
        chars += sizes.popleft()
        if common.stop_requested():
            break
        if time.time() - said > 10:
            said = time.time()
            say(f"counted {chars / 1e6:,.0f} M characters of at most {max_chars / 1e6:,.0f} M, {len(words):,} words, "
                f"at most {common.clock((said - t0) / chars * (max_chars - chars))} left")
    return words, chars

# ---------------------------------------------------------------------------------------------------------------------
# merges

BITS = 20  # a pair (a, b) of token ids is the number a << BITS | b, so pairs sort by a, then by b

def train_bpe(words, n_tokens, say=common.print0):
    """
    {word: how often} -> {token bytes: id}: the 256 bytes, then merges in the order they were made, n_tokens in all or
    fewer where nothing is left to merge. Stops early, with what it has, when a stop is requested.

    All words lie in one array of ids, -1 between them. A merge turns the left id into the new token and the right one
    into -2; `left` and `right` link what is alive. Each pair has one entry in the heap: (-count, pair, positions).
    A pair gets its positions when its younger token is made and afterwards only loses some, so its count in the heap is
    at most out of date upwards: the top entry is counted again, and merged if nothing has changed, else put back.
    """
    encoded = [word.encode() for word in words]
    ids = np.frombuffer(b"\xff" + b"\xff".join(encoded) + b"\xff", dtype=np.uint8).astype(np.int32)
    ids[ids == 255] = -1  # UTF-8 has no byte 255
    right = np.arange(1, len(ids) + 1, dtype=np.int32)
    left = np.arange(-1, len(ids) - 1, dtype=np.int32)
    right[-1] = left[0] = 0  # the outermost -1 link to a -1
    weight = np.zeros(len(ids), dtype=np.int64)  # how often the word at a position occurs
    weight[1:] = np.repeat(np.fromiter(words.values(), np.int64), np.fromiter(map(len, encoded), np.int64) + 1)
    del encoded

    def entries(first, second, positions):
        """Heap entries of the pairs (first[i], second[i]) that stand at positions[i]; ascending for each pair"""
        pairs = first.astype(np.int64) << BITS | second
        order = np.argsort(pairs, kind="stable")
        pairs, positions = pairs[order], positions[order]
        starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
        counts = np.add.reduceat(weight[positions], starts)
        ends = np.append(starts[1:], len(pairs))
        return zip((-counts).tolist(), pairs[starts].tolist(), starts.tolist(), ends.tolist(), [positions] * len(starts))

    tokens = [bytes([i]) for i in range(256)]
    known = set(tokens)
    at = np.flatnonzero((ids[:-1] >= 0) & (ids[1:] >= 0)).astype(np.int32)
    heap = list(entries(ids[at], ids[at + 1], at)) if len(at) else []
    heapq.heapify(heap)
    t0 = said = time.time()
    while heap and len(tokens) < n_tokens:
        negative, pair, start, end, positions = heap[0]
        a, b = pair >> BITS, pair & (1 << BITS) - 1
        at = positions[start:end]
        at = at[ids[at] == a]
        at = at[ids[right[at]] == b]
        count = int(weight[at].sum())
        if count != -negative and count > 0:
            heapq.heapreplace(heap, (-count, pair, 0, len(at), at))
            continue
        heapq.heappop(heap)
        if count == 0 or tokens[a] + tokens[b] in known:
            continue
        new = len(tokens)
        tokens.append(tokens[a] + tokens[b])
        known.add(tokens[new])
        if a == b:  # in a run like aaaaa take the 1st, 3rd, ... pair, from the left
            run_starts = np.flatnonzero(np.concatenate([[True], right[at[:-1]] != at[1:]]))
            run_start = np.repeat(run_starts, np.diff(np.append(run_starts, len(at))))
            at = at[(np.arange(len(at)) - run_start) % 2 == 0]
        gone = right[at]
        ids[at], ids[gone] = new, -2
        right[at] = right[gone]
        left[right[at]] = at
        before, after = ids[left[at]], ids[right[at]]
        has_before = (before >= 0) & (before != new)  # (new, new) is found from its left side
        has_after = after >= 0
        if has_before.any() or has_after.any():
            news = np.full(len(at), new, dtype=np.int32)
            for entry in entries(np.concatenate([before[has_before], news[has_after]]),
                                 np.concatenate([news[has_before], after[has_after]]),
                                 np.concatenate([left[at[has_before]], at[has_after]])):
                heapq.heappush(heap, entry)
        if new % 64 == 0:
            if common.stop_requested():
                break
            if time.time() - said > 10:
                said = time.time()
                ahead = (said - t0) / (new - 255) * (n_tokens - new)
                say(f"token {new:,} of {n_tokens:,}: {tokens[new]!r}, {common.clock(ahead)} left")
    return {token: i for i, token in enumerate(tokens)}

# ---------------------------------------------------------------------------------------------------------------------

OTHER_LANGUAGES = ("Die Katze schläft auf dem warmen Dach. Il fait beau ce matin au bord de la mer. "
                   "Вчера мы долго гуляли у реки. Το βιβλίο είναι πάνω στο τραπέζι. 我们明天早上一起去市场买菜。")

def compression(tokenizer, prose):
    """{kind of text: bytes per token}"""
    kinds = {"validation text": prose, "Python code": (common.REPO / "gpt.py").read_text(encoding="utf-8"),
             "numbers": " ".join(str(i * i) for i in range(1000)), "five other languages": OTHER_LANGUAGES}
    return {kind: round(len(text.encode(errors="replace")) / max(1, len(tokenizer.encode(text))), 3)
            for kind, text in kinds.items()}

def damage(directory):
    """None if a whole tokenizer is in `directory`, else what is wrong with it."""
    try:
        tok.read_tokenizer(directory)
    except (OSError, ValueError, KeyError, TypeError) as e:
        return str(e)

def main():
    smallest = 256 + len(tok.SPECIAL_TOKENS) + 1
    common.check(smallest <= vocab_size < 1 << BITS, f"--vocab_size must be {smallest} to {(1 << BITS) - 1}, not {vocab_size}")
    common.check(max_chars >= 1, f"--max_chars must be at least 1, not {max_chars}")
    common.check(doc_cap >= 1, f"--doc_cap must be at least 1, not {doc_cap}")
    common.check(workers >= 0, f"--workers must be at least 0, not {workers}")
    common.check(common.rank_world()[2] == 1, "the tokenizer is trained by one process: start it without torchrun",
                 next_command="python " + " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]))
    files, val_files = dataset.dataset_files(data)
    common.check(next(dataset.iter_texts(data), None) is not None, f"no file of the data set {data} holds a document")
    directory = common.tokenizer_dir(data)
    if not start_over and phase.read(directory) is None and any(
            (directory / name).exists() for name in ("tokenizer.json", "tokenizer.pkl")):
        common.fail(f"{directory} holds a tokenizer that was not trained here; models may depend on it "
                    "(--start_over=True puts it aside and trains a new one)")
    names = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    phase.begin(directory, "tok_train", settings, {"data": hashlib.sha256(names.encode()).hexdigest()[:16]},
                lambda: damage(directory), start_over)
    common.set_deadline(time_limit)

    t0 = time.time()
    texts = dataset.iter_texts(data)
    size = min(max_chars, sum(path.stat().st_size for path in files))  # at most; less than a chunk needs no workers
    n_workers = (workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())))
    words, chars = count_all(texts, max_chars, doc_cap, n_workers if size > CHUNK_CHARS // 4 else 1)
    t1 = time.time()
    common.print0(f"{chars:,} characters, {len(words):,} different words, counted in {t1 - t0:.1f} s")
    ranks = train_bpe(words, vocab_size - len(tok.SPECIAL_TOKENS))
    if reason := common.stop_requested():
        phase.interrupted(directory, f"{reason}; a tokenizer is trained in one go, nothing is kept of this start")
    t2 = time.time()
    common.print0(f"{len(ranks) - 256:,} merges in {t2 - t1:.1f} s")
    phase.must_hold(directory)
    tokenizer = tok.save_tokenizer(directory, ranks)
    if tokenizer.vocab_size < vocab_size:
        common.print0(f"the text has nothing left to merge: {tokenizer.vocab_size:,} tokens instead of {vocab_size:,}")
    prose = "".join(text for text, _ in zip(dataset.iter_texts(data, "val"), range(200)))[:200_000]
    ratios = compression(tokenizer, prose)
    for kind, ratio in ratios.items():
        common.print0(f"{kind:<22} {ratio:.2f} bytes per token")
    common.print0(f"tokenizer of {tokenizer.vocab_size:,} tokens in {directory}, {t2 - t0:.1f} s")
    phase.done(directory, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint, characters=chars,
               words=len(words), bytes_per_token=ratios, clock={"count_s": t1 - t0, "merge_s": t2 - t1})

if __name__ == "__main__":
    main()
