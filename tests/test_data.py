"""texts.py and data.py: files, packing, batches that are a function of (data, seed, step), and what
happens to bad input."""
import errno
import functools
import gzip
import json
import os
import re
import subprocess
from itertools import pairwise

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import common
import conversations
import corpus
import data
import pipeline
import texts
import tokenizer as tok
from conftest import BYTES, alone, ends

def some_texts(n, seed=0):
    generator = np.random.default_rng(seed)

    def text():
        letters = generator.integers(0, 26, generator.integers(1, 80))
        return "".join(chr(97 + letter) for letter in letters)
    return [text() for _ in range(n)]

def write(folder, name, documents):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        table = pyarrow.table({"text": documents})
        pyarrow.parquet.write_table(table, folder / name, row_group_size=16)
    elif name.endswith(".txt"):
        (folder / name).write_text("\n\n".join(documents))
    else:
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
        (folder / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)

def tokenize(folder):
    files = corpus.dataset_files(str(folder))
    return data.tokenize_files(alone(), str(folder), files, "train", BYTES)

# ---- texts

@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".jsonl.gz"])
def test_every_kind_of_file_is_read_and_the_last_by_name_is_validation(state, tmp_path, ending):
    for i in range(3):
        write(tmp_path / "d", f"f{i}{ending}", some_texts(30, i))
    folder = str(tmp_path / "d")
    assert list(corpus.iter_texts(folder)) == some_texts(30, 0) + some_texts(30, 1)
    assert list(corpus.iter_texts(folder, "val")) == some_texts(30, 2)

@pytest.mark.parametrize("data_set", corpus.VAL_SHARD)
def test_the_validation_shard_of_a_known_data_set_is_fixed_by_name(state, data_set):
    folder, val = pipeline.base_data_dir(data_set), corpus.VAL_SHARD[data_set]
    first, held_out, later = (some_texts(30, i) for i in range(3))
    write(folder, "shard_00000.parquet", first)
    write(folder, val, held_out)
    assert list(corpus.iter_texts(data_set, "val")) == held_out
    assert list(corpus.iter_texts(data_set)) == first
    # another shard, even behind it by name, goes to training
    write(folder, "shard_99999.parquet", later)
    assert list(corpus.iter_texts(data_set, "val")) == held_out
    assert list(corpus.iter_texts(data_set)) == first + later
    (folder / val).unlink()
    with ends() as stopped:
        corpus.dataset_files(data_set)
    assert stopped.code == 2

def test_a_single_text_file_is_split_by_documents(state, tmp_path):
    write(tmp_path / "d", "book.txt", ["word " * 500] * 100)
    train = list(corpus.iter_texts(str(tmp_path / "d"), "train"))
    val = list(corpus.iter_texts(str(tmp_path / "d"), "val"))
    assert len(train) + len(val) == 25 and len(val) == 1
    assert all(len(text) < 13_000 for text in train)

def test_broken_lines_are_named_and_many_of_them_end_the_run(state, tmp_path, capsys):
    write(tmp_path / "d", "a.jsonl", some_texts(2000))
    path = tmp_path / "d/a.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:5], "{broken", '{"no": 1}', *lines[5:]]))
    assert len(list(texts.read_documents(path))) == 2000
    out = capsys.readouterr().out
    assert "a.jsonl:6 " in out and "a.jsonl:7 " in out
    path.write_text("\n".join(["{broken"] * 20))
    with ends() as stopped:
        list(texts.read_documents(path))
    assert stopped.code == 2

WORDS = "Zoë isn't naïve — \u4f60\u597d\n\n\na second paragraph\nof two lines\n"

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_text_and_says_that_it_is_utf_16(tmp_path, name, encoding, newline):
    content = WORDS
    if name != "a.txt":
        content = (json.dumps({"text": WORDS}, ensure_ascii=False) + "\n\n") * 2
    content = content.replace("\n", newline).encode(encoding)
    if encoding == "utf-16-be":
        content = b"\xfe\xff" + content
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert texts.text_problem(path) is None
    assert list(texts.read_documents(path)) == [WORDS] * (1 if name == "a.txt" else 2)

def test_lines_that_are_no_text_are_left_out_and_many_end_the_run_with_the_command_that_helps(
        tmp_path, capsys):
    good = [f"line {i}, which is fine\n" for i in range(600)]
    path = tmp_path / "a book.txt"
    path.write_bytes("".join(good[:300]).encode() + b"caf\xe9\n" + b"n\0u\0l\0\n"
                     + "".join(good[300:]).encode())
    assert "".join(texts.read_documents(path)) == "".join(good), "nothing stands in their place"
    said = capsys.readouterr().out
    assert f"{path}:301 skipped: not UTF-8" in said and f"{path}:302 " in said
    assert texts.text_problem(path) is None
    path.write_bytes("".join(good).replace("fine", "naïve").encode("cp1252"))
    with ends() as stopped:
        list(texts.read_documents(path))
    err = capsys.readouterr().err
    assert stopped.code == 2 and f"{path}: 600 of 600 lines" in err and "first: line 1," in err
    assert texts.text_problem(path) in err
    subprocess.run(["bash", "-c", re.search("run: (iconv .*)", err)[1]], check=True)
    assert "".join(texts.read_documents(path)) == "".join(good).replace("fine", "naïve")
    # UTF-16 without a mark, and what is no text at all
    for content in ("".join(good).encode("utf-16-le"), b"\xff\xfe" * 900 + b"\n", bytes(9000)):
        path.write_bytes(content)
        assert texts.text_problem(path), content[:20]

def test_what_is_no_file_is_not_read(state, tmp_path):
    folder = tmp_path / "d"
    write(folder, "a.txt", some_texts(30))
    (folder / "b.txt").mkdir()
    (folder / "c.jsonl").symlink_to("nowhere")
    os.mkfifo(folder / "d.jsonl")
    assert [path.name for path in corpus.text_files(str(folder))] == ["a.txt"]

def test_a_parquet_file_damaged_in_its_middle_is_one_line_that_says_what_to_do(tmp_path, capsys):
    numbers = [np.random.default_rng(i).integers(0, 10 ** 9, 90) for i in range(200)]
    write(tmp_path, "a.parquet", [str(some) for some in numbers])
    path = tmp_path / "a.parquet"
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle:middle + 400] = bytes(400)
    path.write_bytes(damaged)
    assert texts.parquet_problem(path) is None, "its footer is whole"
    with ends() as stopped:
        list(texts.read_documents(path))
    err = capsys.readouterr().err
    assert stopped.code == 2 and err.count("\n") == 1
    assert "damaged in row group" in err and "prepare the data again" in err

@pytest.mark.parametrize("name,content,says", [
    ("another", None, "does not exist"),
    ("d", b"x", "is a file: --data takes the folder"),
    ("d", None, "holds no text"),
    ("d/a.txt", b"", "holds no text"),
    ("d/a.parquet", b"PAR1 nothing of the kind PAR1", "no readable parquet"),
    ("d/a.parquet", {"words": ["x"]}, "no column `text`"),
    ("d/a.parquet", {"text": [5]}, "`text` is no text but int64")])
def test_a_bad_data_folder_is_one_line_and_exit_code_2(state, tmp_path, capsys, name, content,
                                                       says):
    """content: None for a folder, bytes of a file, columns of a parquet file"""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pyarrow.parquet.write_table(pyarrow.table(content), path)
    with ends() as stopped:
        corpus.dataset_files(str(tmp_path / "d"))
    err = capsys.readouterr().err
    assert stopped.code == 2 and says in err and err.count("\n") == 1

# ---- packing

def test_packing_loses_nothing_but_the_end():
    lengths = np.random.default_rng(1).integers(1, 300, 2000).tolist()
    rows = data.pack(lengths, 64, split=True)
    assert all(sum(length + 1 for _, _, length in row) in (63, 64) for row in rows)
    seen = {}
    for row in rows:
        for document, start, length in row:
            seen.setdefault(document, []).append((start, start + length))
    for spans in seen.values():  # the pieces follow one another without gap or overlap
        spans.sort()
        assert spans[0][0] == 0
        assert all(end == start for (_, end), (start, _) in pairwise(spans))
    assert sum(lengths) - sum(spans[-1][1] for spans in seen.values()) < 64
    assert data.pack([5, 3], 6, split=True) == [[(0, 0, 5)]], "the end, which fills no row"

def test_packing_chats_cuts_none():
    lengths = np.random.default_rng(1).integers(1, 64, 2000).tolist()
    rows = data.pack(lengths, 64, split=False)
    whole = [(document, 0, length) for document, length in enumerate(lengths)]
    assert sorted(piece for row in rows for piece in row) == whole
    assert all(sum(length + 1 for _, _, length in row) <= 64 for row in rows)
    assert sum(lengths) / (64 * len(rows)) > 0.95
    last = [(2, 0, 2)]  # not full
    assert data.pack([2, 2, 2], 6, split=False) == [[(0, 0, 2), (1, 0, 2)], last]

def test_rows_hold_the_text_and_start_with_bos(state, tmp_path):
    documents = some_texts(200)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "d", name, documents)
    plan = data.make_plan(tokenize(tmp_path / "d"), 33, BYTES.bos)
    tokens, _ = data.read_rows(plan, range(data.n_rows(plan)))
    assert (tokens[:, 0] == BYTES.bos).all() and tokens.shape[1] == 33
    pieces = []
    for row in tokens:
        text = np.where(row == BYTES.bos, ord("\n"), row).astype(np.uint8).tobytes().decode()
        pieces += text.split()
    assert sum(map(len, pieces)) > 0.97 * sum(map(len, documents))
    assert all(any(piece in document for document in documents) for piece in pieces)

def test_chat_rows_count_the_mask_and_pad(state):
    lengths = (3, 9, 100)
    answer = {"role": "assistant", "content": "answer"}
    items = [{"messages": [{"role": "user", "content": "q" * n}, answer]} for n in lengths]
    store = data.tokenize_conversations(alone(), "x", "toy", lambda: items, BYTES, 40)
    counts = data.counts_of(store)
    assert counts["cut"] == 1 and counts["conversations"] == 3 and store.facts["documents"] == 2
    plan = data.make_plan([store], 40, BYTES.bos, split=False)
    _, counted = data.read_rows(plan, range(data.n_rows(plan)))
    assert counted.sum() == 2 * (len("answer") + 1), "the third's answer is behind the cut"
    plan = data.make_plan([store._replace(mask=None)], 40, BYTES.bos, split=False)
    _, counted = data.read_rows(plan, range(data.n_rows(plan)))
    assert counted.sum() == sum(n + 11 for n in lengths[:2]), "all but the padding"

def test_a_store_of_an_earlier_version_is_used_as_it_is(state):
    """It has no counts, and what teaches nothing is in it."""
    answer = {"role": "assistant", "content": "answer"}
    items = [{"messages": [{"role": "user", "content": "q" * n}, answer]} for n in (3, 99, 5, 99)]
    documents = []
    for item in items:
        ids, mask = BYTES.render_conversation(item, 40)
        documents.append((ids[1:], mask[1:]))
    data.make_store(alone(), "toy", BYTES, "chat_x_40", "x", documents, {"cut": 2})
    store = data.tokenize_conversations(alone(), "x", "toy", None, BYTES, 40)
    assert store.facts["documents"] == 4 and data.n_rows(data.make_plan([store], 40, 0, False)) == 3
    assert conversations.in_words(data.counts_of(store), 39) == (
        "4 conversations; 2 longer than a row of 39 tokens and cut; 2 teach nothing: 2 without a "
        "token to train on")
    data.check_lessons(["x"], store, 39)
    with pytest.raises(common.Failure, match="there is nothing to learn in --mixture=x"):
        data.check_lessons(["x"], store._replace(mask=np.zeros_like(store.mask)), 39)
    plan = data.make_plan([store], 40, BYTES.bos, split=False)
    rows = [int(data.read_rows(plan, [r])[1].sum()) for r in range(data.n_rows(plan))]
    assert sorted(rows) == [0, 0, 14]
    data.check_measurable(["x"], store, plan, 10_000, BYTES)
    with pytest.raises(common.Failure, match="there is nothing to measure in --held_out=x"):
        data.check_measurable(["x"], store, plan, 39 * (rows + [9]).index(14), BYTES)

# ---- batches

@pytest.fixture
def plan(state, tmp_path):
    write(tmp_path / "d", "a.jsonl", some_texts(400))
    write(tmp_path / "d", "b.jsonl", some_texts(20, 1))
    return data.make_plan(tokenize(tmp_path / "d"), 33, BYTES.bos)

@pytest.mark.parametrize("step", [0, 3, 40])
def test_the_batch_of_a_step_is_the_same_tokens_in_the_same_order_for_any_ranks(plan, step):
    def all_rows(seed):
        return np.concatenate([x for x, y in data.batch(plan, seed, step, 16, 16)])
    for world, micro in ((1, 4), (2, 2), (2, 8), (4, 1), (4, 4)):
        parts = [list(data.batch(plan, 7, step, 16, micro, rank, world)) for rank in range(world)]
        turns = zip(*parts, strict=True)
        dealt = np.concatenate([x for turn in turns for x, y in turn])
        assert (dealt == all_rows(7)).all()
    assert not (all_rows(7) == all_rows(8)).all(), "another seed, another order"

def test_running_out_of_data_is_a_new_epoch_in_another_order(plan):
    n = data.n_rows(plan)
    left_out = plan.stores[0].tokens.size - plan.pieces[:, 2].sum()
    assert 0 < left_out < 33, "less than the last row"
    numbers = [r for step in range(3 * n // 8 + 1) for r in data.batch_rows(n, 1, step, 8)]
    for epoch in range(3):
        assert sorted(numbers[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert numbers[:n] != numbers[n:2 * n]

def test_micro_batches_fit():
    assert data.fit_micro_rows(256, 48, 8) == 32
    assert data.fit_micro_rows(12, 5, 1) == 4
    assert data.fit_micro_rows(7, 3, 1) == 1
    with ends() as stopped:
        data.fit_micro_rows(10, 4, 4)
    assert stopped.code == 2

# ---- tokenising

def test_tokenising_uses_all_cores(state, tmp_path, monkeypatch):
    """The other ranks wait for it: two threads would take 20 minutes of eight GPUs for a d20."""
    write(tmp_path / "d", "a.jsonl", some_texts(30))
    used, encode_batch = [], tok.Tokenizer.encode_batch

    def counted(self, batch, threads=2):
        used.append(threads)
        return encode_batch(self, batch, threads)
    monkeypatch.setattr(common, "cores", lambda: 7)
    monkeypatch.setattr(tok.Tokenizer, "encode_batch", counted)
    tokenize(tmp_path / "d")
    assert used == [7]

def test_a_full_disk_is_one_line(state, tmp_path, monkeypatch, capsys):
    write(tmp_path / "d", "a.jsonl", some_texts(30))

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(common, "atomic_write", full)
    with ends() as stopped:
        tokenize(tmp_path / "d")
    err = capsys.readouterr().err
    assert stopped.code == 1 and "No space left" in err and err.count("\n") == 1

def test_tokenising_continues_where_it_was_and_notices_a_changed_file(state, tmp_path, capsys,
                                                                      monkeypatch):
    folder = tmp_path / "d"
    monkeypatch.setattr(data, "GATHER", 1)
    for i in range(3):
        write(folder, f"{i}.jsonl", some_texts(30, i))

    def again():
        """-> (fingerprint, how many files were tokenised)"""
        found = data.fingerprint(tokenize(folder))
        return found, capsys.readouterr().out.count("tokenizing ")
    before, count = again()
    assert count == 2 and again() == (before, 0)
    tokens = pipeline.token_dir(str(folder))
    next(tokens.rglob("*1.jsonl-*.json")).unlink()  # as if it died before the second was done
    assert again() == (before, 1)
    store = next(tokens.rglob("*0.jsonl-*.tokens.npy"))
    store.write_bytes(store.read_bytes()[:-8])  # a store that is not whole is made again
    assert again() == (before, 1)
    write(folder, "0.jsonl", some_texts(30, 9))
    after, count = again()
    assert after != before and count == 1

def test_a_death_in_the_middle_of_a_store_leaves_nothing_for_good(state, tmp_path, monkeypatch):
    write(tmp_path / "d", "a.jsonl", some_texts(30))
    real = os.replace

    def dies(source, target):
        if str(target).endswith(".tokens.npy"):
            (tmp_path / "half").write_bytes(source.read_bytes())
            raise KeyboardInterrupt
        real(source, target)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", dies)
        tokenize(tmp_path / "d")
    path, = pipeline.token_dir(str(tmp_path / "d")).iterdir()
    tokenize(tmp_path / "d")
    store, = path.glob("*.tokens.npy")
    left = path / f".{store.name}.tmp-77-1"
    (tmp_path / "half").rename(left)  # as a process that is killed cannot remove it
    store.unlink()
    tokenize(tmp_path / "d")
    assert not list(path.glob(".*.tmp-*")) and len(list(path.iterdir())) > 2

def test_progress_is_shown_inside_a_file(state, tmp_path, monkeypatch, capsys):
    write(tmp_path / "d", "a.jsonl", some_texts(30))
    monkeypatch.setattr(common, "progress", functools.partial(common.progress, every=0.0))
    tokenize(tmp_path / "d")
    assert "\n  7 documents tokenized\n" in capsys.readouterr().out
