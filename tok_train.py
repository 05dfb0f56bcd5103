"""
Phase 1: the tokenizer. Trains a byte-level BPE on the training texts of a data set; one process,
all cores.

    python tok_train.py config/toy_tok.py
    python tok_train.py --data=fineweb_edu

Needs the data (prepare_data.py). Writes ranks.txt and tokenizer.json into tokenizer/ at its very
end, so a run that was interrupted has left nothing and the same command starts again; it takes
seconds to minutes.

How: texts are split into words (tokenizer.PATTERN) and equal words counted, in parallel. Then,
until the vocabulary is full, the pair of neighbouring tokens that occurs most often becomes a new
token; among equally frequent pairs the one with the smaller ids goes first. No token comes twice:
pieces of the same bytes always go through the same merges.
"""
from run import Run

if __name__ == "__main__":  # its workers import this file too
    run = Run.start("tok_train")

import functools
import hashlib
import heapq
import math
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

import numpy as np
import regex

import common
import configurator
import corpus
import pipeline
import records
import tokenizer as tok
from texts import text_problem

data = "fineweb_edu"         # toy, fineweb_edu, climbmix, or a folder of texts
vocab_size = 32768           # tokens in the vocabulary, with the 256 bytes and 9 special tokens
max_chars = 2_000_000_000    # characters read at most, from the start of the training split
digits = 2                   # digits of a number in one token: 2, or 1, as llama.cpp knows it
doc_cap = 10_000             # characters read of each document at most: no long one dominates
# ---- settings below may change at every resume
workers = 0                  # processes that count words; 0: one for each core
time_limit = None            # minutes until it stops; None: the Slurm job's, if any
start_over = False           # put the old tokenizer aside and train a new one
settings = configurator.configure(globals()) if __name__ == "__main__" else None

CHUNK_CHARS = 16_000_000     # characters that one worker counts at a time
MAX_WORDS = 5_000_000        # different words held (2 GB); beyond it the rarest go, see `prune`
# all that the pattern takes for white space, but the space
OTHER_SPACES = "".join(regex.findall(r"[^\S ]", "".join(map(chr, range(0x10000)))))
LINE_START = re.compile(r"\n(?=\S)")

@functools.cache
def splitters(digits):
    """-> two functions text -> list of pieces: of any text; of ASCII, the same and twice as fast"""
    pattern = tok.pattern_of(digits)
    of_ascii = pattern.replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9")
    return regex.compile(pattern).findall, re.compile(of_ascii, re.ASCII).findall

def watch(what, total):
    """-> a function of how much of the total is done: shows it, -> whether to go on"""
    show = common.progress(what, total)

    def going(done):
        show(done)
        return run.going()
    return going

# -------------------------------------------------------------------------------------------------
# words and their counts

def cut(text):
    """
    Cuts a text into segments, fast, such that splitting the segments by tokenizer.PATTERN gives the
    same pieces as splitting the whole: so each different segment goes through the slow pattern only
    once.  example: "One day,  a cat\\nsat" -> ["One", " day,", "  a", " cat\\n", "sat"]
    Why it holds: no piece has a space behind a character that is no white space, or such a
    character behind a line break. So pieces always end (1) between non-white and a space, (2)
    between a line break and non-white, and only there is cut. The one look-ahead does not see past
    a cut: it asks behind white space, of which there is none at (1), and at (2) the piece that ends
    with the line break is found before it is asked.
    """
    if "\0" in text:
        return [text]  # \0 marks the cuts
    text = text.replace(" ", "\0 ").replace(" \0", " ")  # before each space not behind another
    for space in OTHER_SPACES:
        if space in text:
            text = text.replace(space + "\0", space)  # nor between other white space and a space
    return LINE_START.sub("\n\0", text).split("\0")

def count_words(texts, digits=2):
    """list of str -> {word: how often}, as tokenizer.pattern_of(digits) splits the texts"""
    split, split_ascii = splitters(digits)
    segments, words = Counter(), {}
    for text in texts:
        segments.update(cut(text))
    for segment, n in segments.items():
        for word in split_ascii(segment) if segment.isascii() else split(segment):
            words[word] = words.get(word, 0) + n
    return words

def chunks(texts, max_chars, doc_cap):
    """Texts cut to doc_cap characters, in lists of about CHUNK_CHARS characters, max_chars (and a
    document) in all."""
    chunk, size = [], 0
    for text in texts:
        # a pair of surrogates becomes its character, a lone one U+FFFD, as tiktoken has it
        text = text[:doc_cap].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        chunk.append(text)
        size += len(text)
        max_chars -= len(text)
        if max_chars <= 0:
            break
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    yield chunk

def quiet_worker():
    """A worker leaves signals to the main process, which lets it finish its chunk, and ends when
    that one has died."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    for number in common.stop_signals():
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()

def count_in_parallel(chunks, workers, digits):
    """map(count_words, chunks) by worker processes: in order, at most workers + 1 waiting in
    memory."""
    spawn = multiprocessing.get_context("spawn")
    waiting = deque()
    with ProcessPoolExecutor(workers, spawn, quiet_worker) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(count_words, chunk, digits))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()

def prune(words, most):
    """Drops words seen once, then those seen twice, ... until at most half of `most` are left.
    Chunks are merged in the order of the text, so what is dropped does not depend on the number of
    workers."""
    least = 1
    while len(words) > most // 2:
        least += 1
        words = Counter({word: n for word, n in words.items() if n >= least})
    return words

def count_all(texts, max_chars, doc_cap, workers, going=lambda done: True, digits=2):
    """iterator of str -> ({word: how often}, characters read); ends early when not `going`"""
    words = Counter()
    chars = 0
    parts = chunks(texts, max_chars, doc_cap)
    counted = (count_words(part, digits) for part in parts)
    if workers > 1:
        counted = count_in_parallel(parts, workers, digits)
    for part in counted:
        words.update(part)
        chars += sum(n * len(word) for word, n in part.items())
        if len(words) > MAX_WORDS:
            words = prune(words, MAX_WORDS)
            common.print0(f"dropped the rarest words: {len(words):,} are left")
        if not going(chars):
            break
    return words, chars

# -------------------------------------------------------------------------------------------------
# merges

BITS = 20  # a pair (a, b) of token ids is the number a << BITS | b, so pairs sort by a, then by b

def train_bpe(words, n_tokens, going=lambda done: True):
    """
    {word: how often} -> {token bytes: id}: the 256 bytes, then merges in the order they were made,
    n_tokens in all or fewer where nothing is left to merge. Ends early, with what it has, when not
    `going`.

    All words lie in one array, a -1 around each: a token's id stands at its first and at its last
    byte. So `size`, the bytes of each token, leads from a token to the next and to the one before.
    A merge writes its new id over the pair's first and last byte, and -2 where the second token
    began. Each pair has one entry in the heap: (-count, pair, positions). A pair gets its positions
    when its younger token is made and afterwards only loses some, so its count in the heap is at
    most out of date upwards: the top entry is counted again, and merged if nothing has changed,
    else put back.
    """
    encoded = [b"\xff" + word.encode() for word in words]  # UTF-8 has no byte 255
    ids = np.frombuffer(b"".join(encoded) + b"\xff", dtype=np.uint8).astype(np.int32)
    ids[ids == 255] = -1
    # how often the word at a position occurs
    weight = np.repeat(list(words.values()), [len(word) for word in encoded])
    tokens = [bytes([i]) for i in range(256)]
    size = np.ones(n_tokens + 1, dtype=np.int32)  # size[-1] is that of the -1 around a word

    def entries(positions):
        """Heap entries of the pairs that begin at these positions (ascending for each pair)"""
        first = ids[positions].astype(np.int64)
        pairs = first << BITS | ids[positions + size[first]]
        positions = positions[pairs >= 0]  # with a -1 it is none
        pairs = pairs[pairs >= 0]
        order = np.argsort(pairs, kind="stable")
        pairs, starts = np.unique(pairs[order], return_index=True)
        positions = positions[order]
        counts = np.add.reduceat(weight[positions], starts)
        groups = np.split(positions, starts[1:])
        return zip((-counts).tolist(), pairs.tolist(), groups)

    heap = list(entries(np.arange(len(ids) - 1)))
    heapq.heapify(heap)
    while heap and len(tokens) < n_tokens:
        negative, pair, at = heapq.heappop(heap)
        a, b = pair >> BITS, pair & (1 << BITS) - 1
        at = at[(ids[at] == a) & (ids[at + size[a]] == b)]
        count = int(weight[at].sum())
        if count != -negative:
            if count > 0:
                heapq.heappush(heap, (-count, pair, at))
            continue
        new = len(tokens)
        tokens.append(tokens[a] + tokens[b])
        size[new] = len(tokens[new])
        if a == b:  # in a run like aaaaa take the 1st, 3rd, ... pair, from the left
            taken, end = [], 0
            for position in at.tolist():
                if position >= end:
                    taken.append(position)
                    end = position + size[new]
            at = np.array(taken)
        ids[at + size[a]] = -2
        ids[at] = ids[at + size[new] - 1] = new
        before = at - size[ids[at - 1]]
        before = before[ids[before] != new]  # (new, new) begins at one of `at`
        for entry in entries(np.concatenate([before, at])):
            heapq.heappush(heap, entry)
        if new % 64 == 0 and not going(new):
            break
    return {token: i for i, token in enumerate(tokens)}

# -------------------------------------------------------------------------------------------------

def exit_if_stopped():
    if stop := run.stop_reason():
        run.exit_interrupted(f"{stop}; nothing of the tokenizer is kept, it is trained in one go")

def main():
    """Ends the process."""
    common.check(run.ranks.world == 1,
                 "the tokenizer is trained by one process: start it without torchrun")
    directory = pipeline.tokenizer_dir(data)
    damage = functools.partial(tok.damage, directory)
    begun = records.find_record(directory, settings, damage=damage)
    # Files added since it began do not stop a run. But one that starts over a second time, since
    # its texts have changed, takes all that are there.
    for record in (begun, {}):
        splits = corpus.dataset_files(data, record)
        sizes = [(name, path.stat().st_size) for name, path in splits["train"].items()]
        inputs = {"data": hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]}
        if not start_over or record.get("inputs", inputs) == inputs:
            break
    if splits["not_read"]:
        common.print0(splits["not_read"])
    if record.get("status") != "done":  # before anything on disk changes
        for path in {**splits["train"], **splits["val"]}.values():
            # as far as prepare_data.py does, where a broken file would cost the old tokenizer
            why = text_problem(path, None if start_over else 1000)
            common.check(why is None, why)
    common.check(any(corpus.iter_texts(splits, "train")),
                 f"no file of the data set {data} holds a document")
    there = any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.pkl"))
    common.check(record or start_over or not there,
                 f"{directory} holds a tokenizer that was not trained here; models may depend on "
                 f"it ({pipeline.starting_over('tok')} puts it aside and trains a new one)")
    known_files = corpus.facts_to_record(splits)
    if not start_over:
        corpus.check_same(record, known_files, inputs["data"])
    run.open_or_exit(directory, settings, inputs, damage)
    if record.get("status") == "done":
        common.print0(f"the tokenizer in {directory} is damaged ({damage()}): training it again")
    run.update_record(**known_files)
    run.set_deadline(time_limit)

    common.print0(f"training a tokenizer of {vocab_size:,} tokens on the texts of {data}")
    most_chars = min(max_chars, 4 * sum(size for _, size in sizes))  # of packed text
    at_once = min(workers or common.cores(), math.ceil(most_chars / CHUNK_CHARS))
    texts = corpus.iter_texts(splits, "train")
    try:
        words, chars = count_all(texts, max_chars, doc_cap, at_once,
                                 watch("characters at most", most_chars), digits)
    except BrokenProcessPool:
        exit_if_stopped()  # a signal to the whole group meets workers that cannot ignore it yet
        common.fail("a process that counts words was killed, probably since memory ran short: "
                    "try a smaller --workers", code=1)
    exit_if_stopped()
    common.print0(f"{chars:,} characters, {len(words):,} different words")
    n_tokens = vocab_size - len(tok.SPECIAL_TOKENS)
    ranks = train_bpe(words, n_tokens, watch("tokens", n_tokens))
    exit_if_stopped()
    run.check_lock()
    tokenizer = tok.save_tokenizer(directory, ranks, tok.pattern_of(digits))
    if tokenizer.vocab_size < vocab_size:
        common.print0(f"warning: the text is too small for {vocab_size:,} tokens; the vocabulary "
                      f"has {tokenizer.vocab_size:,}")
    prose = "".join(islice(corpus.iter_texts(splits, "val"), 200))[:200_000]
    ids = tokenizer.encode(prose)
    ratio = round(len(tokenizer.decode_bytes(ids)) / max(1, len(ids)), 3)
    common.print0(f"tokenizer of {tokenizer.vocab_size:,} tokens in {directory}; {ratio:.2f} bytes "
                  "per token of validation text")
    run.exit_done(vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint,
                  bytes_per_token={"validation text": ratio})

if __name__ == "__main__":
    main()
