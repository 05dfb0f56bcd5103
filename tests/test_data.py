"""corpus.py, texts.py and data.py: files, documents, packing, batches that are a function of (data,
seed, step), and what happens to bad input."""
import errno
import functools
import gzip
import json
import os
import re
import subprocess
from itertools import pairwise
from types import SimpleNamespace

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
from conftest import BYTES, alone, ends, script

def test_cores_are_those_that_a_container_may_use(tmp_path, monkeypatch):
    share = tmp_path / "cpu.max"
    monkeypatch.setattr(common, "CPU_SHARE", str(share))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert common.cores() == 64, "no container"
    for text, cores in (("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1),
                        ("9900000 100000", 64)):
        share.write_text(text)
        assert common.cores() == cores

def all_texts(folder, split="train"):
    return list(corpus.iter_texts(corpus.dataset_files(folder), split))

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
    assert all_texts(folder) == some_texts(30, 0) + some_texts(30, 1)
    assert all_texts(folder, "val") == some_texts(30, 2)

@pytest.mark.parametrize("data_set", corpus.VAL_SHARD)
def test_the_validation_shard_of_a_known_data_set_is_fixed_by_name(state, data_set):
    folder, val = pipeline.base_data_dir(data_set), corpus.VAL_SHARD[data_set]
    first, held_out, later = (some_texts(30, i) for i in range(3))
    write(folder, "shard_00000.parquet", first)
    write(folder, val, held_out)
    assert all_texts(data_set, "val") == held_out
    assert all_texts(data_set) == first
    # another shard, even behind it by name, goes to training
    write(folder, "shard_99999.parquet", later)
    assert all_texts(data_set, "val") == held_out
    assert all_texts(data_set) == first + later
    (folder / val).unlink()
    with ends() as stopped:
        corpus.dataset_files(data_set)
    assert stopped.code == 2

def test_a_single_text_file_is_split_by_documents(state, tmp_path):
    write(tmp_path / "d", "book.txt", ["word " * 500] * 100)
    train = all_texts(str(tmp_path / "d"), "train")
    val = all_texts(str(tmp_path / "d"), "val")
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

def test_a_broken_line_is_one_of_many_where_lines_end_as_on_old_macs(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\r".join([b"a good line"] * 2000 + [b"broken \xff\xfe\x00"]))
    assert texts.text_problem(path) is None
    text = "".join(texts.read_documents(path))
    assert text.count("a good line") == 2000 and "broken" not in text

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32",
                                      "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_text_and_says_the_encoding(tmp_path, name, encoding, newline):
    content = WORDS
    if "json" in name:
        content = (json.dumps({"text": WORDS}, ensure_ascii=False) + "\n\n") * 2
    content = content.replace("\n", newline).encode(encoding)
    if encoding.endswith("-be"):
        content = "\ufeff".encode(encoding) + content
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert texts.text_problem(path) is None
    assert list(texts.read_documents(path)) == [WORDS] * (2 if "json" in name else 1)
    said = {"utf-8-sig": "UTF-8"}.get(encoding, encoding.upper().removesuffix("-BE"))
    assert f", {said}, Latin" in texts.facts_of(path)

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

def test_a_book_with_a_few_accents_is_read_but_for_their_lines_and_the_command_is_said(
        tmp_path, capsys):
    path = tmp_path / "a.txt"
    book = "".join(f"A line of {i}, and {'a café' if i % 20_000 == 19_999 else 'no more'}.\n"
                   for i in range(60_000))
    path.write_bytes(book.encode("latin-1"))
    assert len("".join(texts.read_documents(path)).split("\n")) == 59_998
    out = capsys.readouterr().out
    assert out.count(" skipped: not UTF-8 at its byte ") == 3 and out.count("\n") == 4
    subprocess.run(["bash", "-c", re.search("run: (iconv .*)", out)[1]], check=True)
    assert path.read_text() == book

@pytest.mark.parametrize("content", [
    gzip.compress(bytes(range(256)) * 30 + np.random.default_rng(0).bytes(9000)),
    "Все счастливые семьи.\n".encode() * 500 + b"\xff\xfe caf\xe9\n" * 20],
    ids=["no text", "UTF-8 with broken lines"])
def test_no_command_is_said_where_no_encoding_mends_it(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert texts.text_problem(tmp_path / "a.txt").endswith("): fix or remove them")

IN_WORDS = {
    "cp1252": "Où était l'élève? Müde saß er auf der Brücke.\n",
    "cp1251": "Все счастливые семьи похожи друг на друга.\n",
    "koi8-r": "Все счастливые семьи похожи друг на друга.\n",
    "gb18030": "我们在这里说的是中国的历史，他们不知道这个地方有多大。\n",
    "cp932": "これは日本語の文章です。私は昨日、東京に行きました。\n",
    "euc-kr": "이것은 한국어 문장입니다. 나는 어제 서울에 갔다.\n",
    "utf-16-le": "Plain English, but without a mark.\n",
    "utf-16-be": "Без метки в начале.\n",
}

@pytest.mark.parametrize("encoding", IN_WORDS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a' b.txt.gz", "a b.jsonl.gz"])
def test_another_encoding_is_broken_and_the_command_that_is_said_mends_it(tmp_path, name, encoding):
    content = IN_WORDS[encoding] * 60
    if "json" in name:
        content = (json.dumps({"text": IN_WORDS[encoding]}, ensure_ascii=False) + "\n") * 60
    content = content.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    why = texts.text_problem(path)
    assert why.startswith(str(path)) and why.isprintable()
    assert "first: line 1, " in why
    assert "not UTF-8 at its byte " in why or "a NUL byte" in why
    subprocess.run(["bash", "-c", re.search("run: (iconv .*|zcat .*)", why)[1]], check=True)
    assert texts.text_problem(path) is None and [*tmp_path.iterdir()] == [path]
    assert "".join(texts.read_documents(path)) == IN_WORDS[encoding] * 60

def parquet_of(path, contents):
    """Rows of bytes that call themselves text"""
    column = pyarrow.array(contents, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=16)

@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("text, says", [
    ("caf\udce9", "not UTF-8 at its byte "),
    ("n\0u\0l\0", "a NUL "),
    ("na\ufffdve fa\ufffdade d\ufffdj\ufffd", "characters are U+FFFD or control"),
    ("\x1b[1mred\x1b[0m \x07", "characters are U+FFFD or control"),
    ("one page says \ufffd", None)])
def test_what_was_wrongly_decoded_is_broken_in_every_kind_of_file(tmp_path, capsys, name, text,
                                                                 says):
    path = tmp_path / name

    def fill(wrong):
        contents = [f"row {i}, which is fine" for i in range(700)]
        contents[300:300] = [text] * wrong
        if name == "a.parquet":
            return parquet_of(path, [one.encode(errors="surrogateescape") for one in contents])
        if name == "a.jsonl":
            contents = [json.dumps({"text": one}, ensure_ascii="\udce9" not in one)
                        for one in contents]
        path.write_bytes("".join(one + "\n" for one in contents).encode(errors="surrogateescape"))
    fill(2)
    read = "\n".join(texts.read_documents(path))
    assert read.count("which is fine") == 700 and (text in read) == (says is None)
    said = capsys.readouterr().out
    if says is None:
        fill(700)
        assert said == "" and texts.text_problem(path) is None
        assert " % replacement or control characters" in texts.facts_of(path)
        return
    assert f"{path}:301 skipped: " in said and f"{path}:302 skipped: " in said and says in said
    assert texts.text_problem(path) is None
    fill(30)
    with ends() as stopped:
        list(texts.read_documents(path))
    assert stopped.code == 2 and "30 of 730 " in capsys.readouterr().err
    assert "30 of " in texts.text_problem(path)

def test_half_a_pair_is_one_broken_line_of_utf_16_and_no_traceback_in_json(state, tmp_path, capsys):
    path = tmp_path / "a.txt"
    lines = [f"line {i}\n".encode("utf-16-le") for i in range(600)]
    path.write_bytes(b"\xff\xfe" + b"".join([*lines[:9], b"\x00\xd8a\0\n\0", *lines[9:]]))
    assert "".join(texts.read_documents(path)) == "".join(f"line {i}\n" for i in range(600))
    assert f"{path}:10 skipped: not UTF-8" in capsys.readouterr().out
    path = tmp_path / "d/a.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "half a pair: \\ud800 and a whole one: \\ud83d\\ude00"}\n' * 30)
    store, = tokenize(path.parent)
    assert "half a pair: \ufffd and a whole one: \U0001f600" in BYTES.decode(store.tokens.tolist())

@pytest.mark.parametrize("lines", [1, 3])
def test_a_small_file_that_is_all_broken_is_not_left_out_in_silence(tmp_path, lines):
    (tmp_path / "a.txt").write_bytes("Все счастливые семьи.\n".encode("cp1251") * lines)
    with ends() as stopped:
        list(texts.read_documents(tmp_path / "a.txt"))
    assert stopped.code == 2

def test_facts_of_a_large_file_are_those_of_its_beginning(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("Война и мир, Lev\n" * 5000 + "это конец\n" * 900)
    assert texts.facts_of(path) == ("10 documents, 94,000 characters, median 9,996, UTF-8, "
                                    "Cyrillic and Latin")
    monkeypatch.setattr(texts, "LOOKED_AT", 30_000)
    assert texts.facts_of(path).startswith("its beginning has 4 documents, 39,984 characters")

# ---- what a document is

def plain(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    return list(texts.read_documents(tmp_path / "a.txt"))

def test_paragraphs_are_gathered_as_they_were(tmp_path):
    """The runs that began before documents were bounded go on with the same ones."""
    generator = np.random.default_rng(3)
    paragraphs = ["".join(f"{line * 'word '}\n" for line in generator.integers(1, 30, n))
                  for n in generator.integers(1, 60, 300)]
    blanks = ["\n" * n for n in generator.choice([1, 1, 1, 2, 3], 300)]
    gathered, size, expected = [], 0, []
    for paragraph in "".join(map("".join, zip(paragraphs, blanks))).split("\n\n"):
        gathered.append(paragraph)
        size += len(paragraph)
        if size >= 10_000:
            expected.append("\n\n".join(gathered))
            gathered, size = [], 0
    found = plain(tmp_path, "".join(map("".join, zip(paragraphs, blanks))))
    assert found[:-1] == expected and len(expected) > 20

@pytest.mark.parametrize("content", [
    "One sentence on each line.\n" * 4000,
    "One paragraph on each line. " * 2000 + "\n" + "x" * 50_000 + "\n" + "Short.\n" * 3000,
    "No line ends here, ever. " * 4000,
    "字" * 100_000,
    "A paragraph.\n\n" + "A long one, of many lines.\n" * 4000 + "\n \t\nAnother.\n" * 800])
def test_documents_are_bounded_and_hold_all_of_the_text(tmp_path, content):
    found = plain(tmp_path, content)
    assert max(map(len, found)) <= 10_500, "the tokenizer reads no more of a document"
    assert len(found) <= len(content) / 8_000
    assert "".join("".join(found).split()) == "".join(content.split())
    if "\n\n" not in content:
        assert "".join(found) == content, "nothing is lost, nothing is put between"

def test_a_line_of_blanks_ends_a_paragraph_and_stays_as_it_is(tmp_path):
    page = "word " * 1200
    first, second = plain(tmp_path, f"{page}\n \n{page}\n\t \n{page}\nend")
    assert first == f"{page}\n \n{page}" and second == f"{page}\nend"

@pytest.mark.parametrize("n", [1, 2, 3, 19, 20, 21, 60])
def test_of_a_single_file_something_is_held_out_however_few_its_documents(tmp_path, state, n):
    documents = [f"number {i} " + "of them " * 20 for i in range(n)]
    write(tmp_path / "d", "a.jsonl", documents)
    train, val = (all_texts(str(tmp_path / "d"), split) for split in ("train", "val"))
    held_out = sum(map(len, val)) / sum(map(len, documents))
    assert 0.015 < held_out < 0.2 and sorted("".join(train + val)) == sorted("".join(documents))
    if n < 20:
        assert "".join(train + val) == "".join(documents), "the end of the text"
    else:
        assert val == documents[19::20]

def test_what_is_held_out_of_a_text_with_a_short_end_is_a_tenth_of_it(tmp_path, state):
    documents = ["of them " * 200] * 5 + ["the end."]
    write(tmp_path / "d", "a.jsonl", documents)
    train, val = (all_texts(str(tmp_path / "d"), split) for split in ("train", "val"))
    assert "".join(train + val) == "".join(documents) and len(val) == 2
    assert 800 < sum(map(len, val)) < 820 and val[0].startswith("them of")

def stores_of(folder, row):
    files = corpus.dataset_files(str(folder))
    train, val = (data.tokenize_files(alone(), str(folder), files, split, BYTES)
                  for split in ("train", "val"))
    data.check_enough(str(folder), train, val, row)
    plans = [data.text_plan(stores, row, BYTES.bos) for stores in (train, val)]
    assert min(map(data.n_rows, plans)) >= 1
    return plans

@pytest.mark.parametrize("sizes", [[2], [0.4, 0.4, 1.2], [1.2, 0.8], [0.01] * 200, [0.3, 1.7]])
def test_text_that_fills_two_rows_is_enough(state, tmp_path, sizes, capsys):
    row = 1000
    for i, size in enumerate(sizes):
        write(tmp_path / "d", f"{i:03}.txt", [("word " * 1000)[:int(size * row) + 1]])
    _, val = stores_of(tmp_path / "d", row)
    tokens, counted = data.read_rows(val, [0])
    assert counted.sum() > 5 and "word" in BYTES.decode(tokens[0, 1:5].tolist())
    with ends() as stopped:
        stores_of(tmp_path / "d", 3 * row)
    err = capsys.readouterr().err
    assert stopped.code == 2 and re.search(r"too little text: the training split of \S*/d has "
                                           r"[\d,]+ tokens and needs 3,000: add text, or ", err)

def test_thousands_of_small_files_are_few_stores(state, tmp_path):
    for i in range(700):
        write(tmp_path / "d", f"{i}.txt", [f"page {i}"])
    train, val = stores_of(tmp_path / "d", 100)
    assert len(train.stores) == len(val.stores) == 1
    assert train.stores[0].lengths.size + val.stores[0].lengths.size == 700

# ---- folders as people have them

def test_one_line_says_what_is_not_read_and_sub_folders_are(state, tmp_path, monkeypatch):
    folder = tmp_path / "d"
    for name in ("a.txt", "one/a.txt", "one/two/x y.jsonl", "one/.hidden/b.txt", "one/.c.txt",
                 "b.txt/inside.txt"):
        path = folder / name
        write(path.parent, path.name, some_texts(30))
    (folder / "one/z.txt.gz").write_bytes(gzip.compress(b"packed text\n"))
    (folder / "empty.txt").touch()
    (folder / "c.jsonl").symlink_to("nowhere")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "one/up").symlink_to(folder)
    os.mkfifo(folder / "d.jsonl")
    (folder / "e.md").write_text("not for training")
    data_set = str(folder)
    assert list(corpus.text_files(data_set)[0]) == ["a.txt", "one/a.txt", "one/two/x y.jsonl",
                                                    "one/z.txt.gz"]
    assert corpus.dataset_files(data_set)["not_read"] == (
        "not read: 8 (b.txt (a folder), c.jsonl (a link to nothing), d.jsonl (no regular file), "
        "e.md, empty.txt (empty), loop.txt (a link to nothing), one/.c.txt (hidden), one/up (a "
        "folder)); "
        "read are .parquet, .jsonl, .jsonl.gz, .txt, .txt.gz")
    for i in range(50):
        (folder / f"{i}.pdf").touch()
    said = corpus.dataset_files(data_set)["not_read"]
    assert "not read: 58 (" in said and "49 more" in said
    assert "packed text" in "".join(all_texts(data_set))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder / "one"))
    assert len(corpus.text_files(data_set)[0]) == 1, "the state folder holds no text of the user's"
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "link/one"))
    assert len(corpus.text_files(data_set)[0]) == 1, "nor where it is reached by a link"

def test_a_file_that_may_not_be_read_is_named(state, tmp_path, monkeypatch, capsys):
    write(tmp_path / "d", "a.txt", some_texts(30))
    write(tmp_path / "d", "b.txt", some_texts(30))

    def refused(path, mode):
        if path.name == "b.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, mode)
    monkeypatch.setattr(corpus, "open", refused, raising=False)  # root may read all
    with ends() as stopped:
        corpus.dataset_files(str(tmp_path / "d"))
    err = capsys.readouterr().err
    assert stopped.code == 2 and f"{tmp_path}/d/b.txt cannot be read (Permission denied)" in err

@pytest.mark.parametrize("name", ["a b.txt", "a'b\".txt", "\udcff\udcfe.txt", "a\nb.txt",
                                  "\U0001f600.jsonl", "字" * 80 + ".txt", "-n.txt", "a\u3000b.txt",
                                  "%s{0}.txt"])
def test_any_name_of_a_file_works_and_can_be_printed(state, tmp_path, name):
    write(tmp_path / "d", name, some_texts(200))
    write(tmp_path / "d", "0.txt", some_texts(200))
    files = corpus.dataset_files(str(tmp_path / "d"))
    line = corpus.held_out_in_words(files)
    assert line.isprintable() and line.encode()
    record = json.loads(json.dumps(corpus.facts_to_record(files)))
    assert corpus.dataset_files(str(tmp_path / "d"), record) == files
    stores_of(tmp_path / "d", 100)

@pytest.mark.parametrize("sizes, val", [
    ({"a": 500, "b": 600, "readme": 9}, "a"),
    ({"a": 500, "b": 500, "readme": 9}, "b"),
    ({"notes": 3, "one": 300, "train": 4000, "two": 300}, "two"),
    ({"test": 100, "train": 900}, "test"),
    ({"train": 900, "val": 100}, "val"),
    ({"book": 9000, "readme": 9}, "part of book"),
    ({"book": 9000}, "part of book"),
    ({f"{i:04}": 10 for i in range(1000)}, "0950, 0951, 0952 and 47 more")])
def test_a_fair_share_is_held_out_and_named(state, tmp_path, sizes, val):
    (tmp_path / "d").mkdir()
    for name, size in sizes.items():
        (tmp_path / "d" / f"{name}.txt").write_text("x" * size)
    files = corpus.dataset_files(str(tmp_path / "d"))
    said = corpus.held_out_in_words(files).replace(".txt", "")
    assert said == f"held out for validation: {val}"
    shared = files["train"].keys() & files["val"].keys()
    assert {*files["train"], *files["val"]} == {f"{name}.txt" for name in sizes}
    assert len(shared) == ("part" in val)

@pytest.mark.parametrize("there", [["a.txt"], ["a.txt", "b.txt"], ["a.txt", "b.txt", "readme.txt"]])
def test_what_is_held_out_stays_with_the_run_whatever_is_added(
        state, tmp_path, there, capsys, monkeypatch):
    folder = tmp_path / "d"
    for name in there:
        write(folder, name, some_texts(9 if "readme" in name else 900))
    begun = corpus.dataset_files(str(folder))
    record = corpus.facts_to_record(begun)
    common.atomic_write(pipeline.tokenizer_dir(folder) / "phase.json", json.dumps(record))
    record |= {"phase": "base_train", "inputs": {"data": "old"}}
    for name in ("0.txt", "a0.txt", "sub/x.txt", "zz.jsonl"):
        path = folder / name
        write(path.parent, path.name, some_texts(900, 1))
    assert corpus.dataset_files(str(folder), record) == begun
    corpus.check_same(record, corpus.facts_to_record(begun))
    other = corpus.dataset_files(str(folder), {})
    assert other["val"] == begun["val"], "a new run holds out what the tokenizer has not seen"
    assert {*begun["train"]} < {*other["train"]} and len(other["train"]) == len(begun["train"]) + 4
    # the same size, but not the same
    (folder / "a.txt").write_bytes((folder / "a.txt").read_bytes()[::-1])
    now = corpus.facts_to_record(corpus.dataset_files(str(folder), record))
    corpus.check_same(record, now)
    corpus.check_same(record, now, "old")  # the same texts in spite of it
    with ends() as stopped:
        corpus.check_same(record, now, "new")
    err = capsys.readouterr().err
    assert stopped.code == 2 and "other texts: a.txt has changed; " in err
    assert "to resume it, or --start_over=True to" in err
    monkeypatch.setenv("NANOCHAT_OUTCOME", "of speedrun.sh")
    (folder / "a.txt").rename(folder / "c.txt")
    now = corpus.facts_to_record(corpus.dataset_files(str(folder), record))
    with ends() as stopped:
        corpus.check_same(record, now)
    err = capsys.readouterr().err
    assert stopped.code == 2 and "a.txt is gone" in err and "-- --base.start_over=True to" in err

def test_a_half_done_run_keeps_what_is_held_out_and_names_what_has_changed(state, tmp_path):
    folder = tmp_path / "d"
    for name in ("a.txt", "b.txt", "readme.txt"):
        write(folder, name, some_texts(9 if "readme" in name else 900))
    tok.save_tokenizer(pipeline.tokenizer_dir(folder), {bytes([i]): i for i in range(256)})
    command = ["base_train.py", f"--data={folder}", "--depth=1", "--max_seq_len=64",
               "--num_steps=2", "--total_batch_size=128", "--device_batch_size=2",
               "--compile=False", "--eval_tokens=256"]
    out = script(state, *command, "--time_limit=0")
    assert out.returncode == 75 and "held out for validation: b.txt\n" in out.stdout, out.stderr
    for name in ("0.txt", "z.txt", "sub/x.txt"):
        path = folder / name
        write(path.parent, path.name, some_texts(900, 1))
    write(folder, "a.txt", some_texts(900, 2))
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    out = script(state, *command)
    assert out.returncode == 2 and "other texts: a.txt has changed; put" in out.stderr, out.stderr
    assert {path: path.read_bytes() for path in state.rglob("*") if path.is_file()} == before
    write(folder, "a.txt", some_texts(900))
    next(state.rglob("d1/phase.json")).unlink()  # the checkpoint says it too
    out = script(state, *command)
    assert out.returncode == 0 and "held out for validation: b.txt\n" in out.stdout, out.stderr

def test_a_rank_whose_texts_were_copied_later_reads_rank_0s_stores(state, tmp_path, capsys):
    write(tmp_path / "d", "a.txt", some_texts(300))
    write(tmp_path / "d", "b.txt", some_texts(30))
    files = corpus.dataset_files(str(tmp_path / "d"))
    first, said = alone(), []

    def computed(function, *args):
        said.append(function(*args))
        return said[-1]
    first.ranks = SimpleNamespace(on_rank0=computed)
    stores = data.tokenize_files(first, str(tmp_path / "d"), files, "train", BYTES)
    os.utime(tmp_path / "d/a.txt", (1, 1))

    def other():
        answers = iter(said)
        run = SimpleNamespace(ranks=SimpleNamespace(on_rank0=lambda *asked: next(answers)))
        return data.tokenize_files(run, str(tmp_path / "d"), files, "train", BYTES)
    assert data.fingerprint(other()) == data.fingerprint(stores)
    for facts in pipeline.token_dir(str(tmp_path / "d")).rglob("train*.json"):
        facts.unlink()
    with ends() as end:
        other()  # its state folder is on a disk of its own
    assert end.code == 2 and "a folder that all nodes share?" in capsys.readouterr().err

def test_an_old_run_goes_on_with_its_own_stores(state, tmp_path):
    """Whose record says nothing of what is held out, and whose documents were other ones."""
    folder = tmp_path / "d"
    for name in ("a.txt", "b.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"a sentence of {name}\n" * 4000)
    old = {"train_files": ["a.txt"]}
    made = {}
    for split, path in ("train", folder / "a.txt"), ("val", folder / "b.txt"):
        source = {"name": path.name, "bytes": path.stat().st_size,
                  "mtime": path.stat().st_mtime_ns, "alone": False}
        made[split] = data.make_store(alone(), str(folder), BYTES, f"{split}_{path.name}", source,
                                      [(BYTES.encode(path.read_text()), [])])
    write(folder, "a0.txt", some_texts(30))
    write(folder / "sub", "z.txt", some_texts(30))
    assert corpus.dataset_files(str(folder))["old"] is False
    stores_of(folder, 100)  # a new run beside it
    files = corpus.dataset_files(str(folder), old)
    assert corpus.facts_to_record(files) == old, "it stays an old one"
    for split, store in made.items():
        found, = data.tokenize_files(alone(), str(folder), files, split, BYTES)
        assert found.facts == store.facts and found.lengths.size == 1

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
        ids, mask = BYTES.render_conversation(item)
        documents.append((ids[1:40], mask[1:40]))
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

def test_a_store_that_was_copied_is_read_once_and_then_known(state, monkeypatch):
    documents = [([1, 2, 3], []), ([4, 5], [])]

    def make():
        return data.make_store(alone(), "toy", BYTES, "x", "x", documents)
    make()
    path, = pipeline.token_dir("toy").rglob("x.tokens.npy")
    os.utime(path, (1, 1))
    with monkeypatch.context() as patch:
        def read_only(path, content):
            raise OSError(errno.EROFS, "Read-only file system")
        patch.setattr(data.common, "atomic_write", read_only)
        assert make().tokens.tolist() == [1, 2, 3, 4, 5], "it is used as it is"
    hashed = []
    real = data.hashlib.sha256
    monkeypatch.setattr(data.hashlib, "sha256", lambda *a: hashed.append(1) or real(*a))
    assert make().tokens.tolist() == [1, 2, 3, 4, 5]
    first = len(hashed)
    make()
    assert first > len(hashed) - first, "its times are those of the first start now"

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
    store.write_bytes(b"")
    assert again() == (before, 1)
    store.write_bytes(store.read_bytes().replace(b"}", b"(", 1))  # its header is Python
    assert again() == (before, 1)
    content = bytearray(store.read_bytes())
    content[-4] ^= 1  # nor is one in which a bit has flipped trained on
    store.write_bytes(content)
    assert again() == (before, 1) and again() == (before, 0)
    facts = next(tokens.rglob("*0.jsonl-*.json"))
    facts.unlink()
    os.mkfifo(facts)  # to open it would take for ever
    assert common.read_json(facts) == {} == dict(common.read_json_lines(facts))
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
