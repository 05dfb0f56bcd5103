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

import hashlib
import heapq
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, pairwise

import regex

import common
import configurator
import pipeline
import records
import texts as user_texts
import tokenizer as tok

data = "fineweb_edu"         # toy, fineweb_edu, climbmix, or a folder of texts
vocab_size = 32768           # tokens, the 256 bytes and the 9 special tokens among them
max_chars = 2_000_000_000    # characters of text read, from the start of the training split
doc_cap = 10_000             # characters of a document that count, so that no long one dominates
# ---- settings below may change at every resume
workers = 0                  # processes that count words; 0: one for each core
time_limit = None            # minutes until it stops; None: the Slurm job's, if any
start_over = False           # put the old tokenizer aside and train a new one
settings = configurator.configure(globals()) if __name__ == "__main__" else None

CHUNK_CHARS = 16_000_000     # characters that one worker counts at a time
MAX_WORDS = 5_000_000        # different words held (2 GB); beyond it the rarest go, see `prune`
split = regex.compile(tok.PATTERN).findall

def watch(what, total):
    """-> a function of how much of the total is done: whether to go on. It shows progress and time
    left every ten seconds."""
    began = said = time.time()

    def going(done):
        nonlocal said
        if time.time() - said > 10:
            said = time.time()
            left = common.duration((said - began) * (total / done - 1))
            common.print0(f"{done:,} of {total:,} {what}, {left} left")
        return run.stop_reason() is None
    return going

# -------------------------------------------------------------------------------------------------
# words and their counts

def count_words(texts):
    """list of str -> {word: how often}, as tokenizer.PATTERN splits the texts"""
    words = Counter()
    for text in texts:
        words.update(split(text))
    return words

def chunks(texts, max_chars, doc_cap):
    """Texts cut to doc_cap characters, in lists of about CHUNK_CHARS characters, max_chars (and a
    document) in all."""
    chunk, size, total = [], 0, 0
    for text in texts:
        text = tok.without_surrogates(text[:doc_cap])
        chunk.append(text)
        size += len(text)
        total += len(text)
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
        if total >= max_chars:
            break
    yield chunk

def quiet_worker():
    """A worker leaves signals to the main process, which lets it finish its chunk, and ends when
    that one has died."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()

def count_in_parallel(chunks, workers):
    """map(count_words, chunks) by worker processes: in order, at most workers + 1 waiting in
    memory."""
    context = multiprocessing.get_context("spawn")
    waiting = deque()
    with ProcessPoolExecutor(workers, context, quiet_worker) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(count_words, chunk))
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

def count_all(texts, max_chars, doc_cap, workers, going=lambda done: True):
    """iterator of str -> ({word: how often}, characters read); ends early when not `going`"""
    words = Counter()
    chars = 0
    parts = chunks(texts, max_chars, doc_cap)
    counted = count_in_parallel(parts, workers) if workers > 1 else map(count_words, parts)
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

def pairs(word):
    """example: "abca" -> "ab", "bc", "ca" """
    return map("".join, pairwise(word))

def train_bpe(words, n_tokens, going=lambda done: True):
    """
    {word: how often} -> {token bytes: id}: the 256 bytes, then merges in the order they were made,
    n_tokens in all or fewer where nothing is left to merge. Ends early, with what it has, when not
    `going`.

    A word is kept as a string with a character chr(id) for each of its tokens, so a merge is
    str.replace, and pairs sort by their ids. Each pair has one entry in the heap. It gets it when
    its younger token is made and afterwards only loses occurrences, so an entry is at most out of
    date upwards: the top one is taken if its count still holds, else put back with the right one.
    """
    spelled = [word.encode().decode("latin-1") for word in words]
    times = list(words.values())
    counts = defaultdict(int)   # {pair: how often it occurs}
    where = defaultdict(list)   # {pair: numbers of the words that it has occurred in}
    for i, word in enumerate(spelled):
        for pair in pairs(word):
            counts[pair] += times[i]
            where[pair].append(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    while heap and len(tokens) < n_tokens:
        negative, pair = heapq.heappop(heap)
        count = counts[pair]
        if count != -negative:
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        token = chr(len(tokens))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        made = set()
        for i in set(where.pop(pair)):
            before = spelled[i]
            after = spelled[i] = before.replace(pair, token)
            if before == after:
                continue  # an earlier merge has taken the pair apart there
            for old in pairs(before):
                counts[old] -= times[i]
            for new in pairs(after):
                counts[new] += times[i]
                if token in new:
                    where[new].append(i)
                    made.add(new)
        for new in made:
            heapq.heappush(heap, (-counts[new], new))
        if not going(len(tokens)):
            break
    return {token: i for i, token in enumerate(tokens)}

# -------------------------------------------------------------------------------------------------

def main():
    smallest = 256 + len(tok.SPECIAL_TOKENS) + 1
    common.check(smallest <= vocab_size <= 1_000_000,
                 f"--vocab_size must be {smallest} to 1000000, not {vocab_size}")
    common.check(max_chars >= 1 and doc_cap >= 1 and workers >= 0,
                 "--max_chars and --doc_cap must be at least 1, --workers at least 0")
    common.check(run.ranks.world == 1,
                 "the tokenizer is trained by one process: start it without torchrun")
    directory = pipeline.tokenizer_dir(data)
    record = records.find_record(directory, settings)
    # files that were added since it began do not stop a run
    begun_with = record.get("train_files")
    files = user_texts.dataset_files(data, begun_with)["train"]
    common.check(any(user_texts.iter_texts(data)),
                 f"no file of the data set {data} holds a document")
    there = any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.pkl"))
    common.check(record or start_over or not there,
                 f"{directory} holds a tokenizer that was not trained here; models may depend on "
                 "it (--start_over=True puts it aside and trains a new one)")
    sizes = repr([(path.name, path.stat().st_size) for path in files])
    inputs = {"data": hashlib.sha256(sizes.encode()).hexdigest()[:16]}
    run.open_or_exit(directory, settings, inputs, lambda: tok.damage(directory))
    run.update_record(train_files=[path.name for path in files])
    run.set_deadline(time_limit)

    total = min(max_chars, sum(path.stat().st_size for path in files))
    # no more workers than chunks; text may be packed to a quarter
    at_once = min(workers or common.cores(), math.ceil(4 * total / CHUNK_CHARS))
    words, chars = count_all(user_texts.iter_texts(data, names=begun_with), max_chars, doc_cap,
                             at_once, watch("characters at most", max_chars))
    common.print0(f"{chars:,} characters, {len(words):,} different words")
    n_tokens = vocab_size - len(tok.SPECIAL_TOKENS)
    ranks = train_bpe(words, n_tokens, watch("tokens", n_tokens))
    if stop := run.stop_reason():
        run.exit_interrupted(f"{stop}; a tokenizer is trained in one go, this start has left "
                             "nothing")
    run.check_lock()
    tokenizer = tok.save_tokenizer(directory, ranks)
    if tokenizer.vocab_size < vocab_size:
        common.print0(f"the text has nothing left to merge: {tokenizer.vocab_size:,} tokens "
                      f"instead of {vocab_size:,}")
    prose = "".join(islice(user_texts.iter_texts(data, "val"), 200))[:200_000]
    ids = tokenizer.encode(prose)
    ratio = round(len(tokenizer.decode_bytes(ids)) / max(1, len(ids)), 3)
    common.print0(f"tokenizer of {tokenizer.vocab_size:,} tokens in {directory}; {ratio:.2f} bytes "
                  "per token of validation text")
    run.exit_done(vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint,
                  bytes_per_token={"validation text": ratio})

if __name__ == "__main__":
    main()
