"""data.py: files, packing, batches that are a function of (data, seed, step), and what happens to bad input."""
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conftest import ends

import common
import pipeline
import data
import tokenizer as tok

BYTES = tok.Tokenizer({bytes([i]): i for i in range(256)})


def texts(n, seed=0):
    generator = np.random.default_rng(seed)
    return ["".join(chr(97 + c) for c in generator.integers(0, 26, generator.integers(1, 80))) for _ in range(n)]


def write(folder, name, documents):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / name, row_group_size=16)
    elif name.endswith(".txt"):
        (folder / name).write_text("\n\n".join(documents))
    else:
        (gzip.open if name.endswith(".gz") else open)(folder / name, "wt").write("".join(json.dumps({"text": t}) + "\n" for t in documents))


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".jsonl.gz"])
def test_every_kind_of_file_is_read_and_the_last_by_name_is_validation(state, tmp_path, ending):
    for i in range(3):
        write(tmp_path / "d", f"f{i}{ending}", texts(30, i))
    assert list(data.iter_texts(str(tmp_path / "d"))) == texts(30, 0) + texts(30, 1)
    assert list(data.iter_texts(str(tmp_path / "d"), "val")) == texts(30, 2)


def test_the_validation_shard_of_a_known_data_set_is_fixed_by_name(state):
    for data_set, val in data.VAL_SHARD.items():
        folder = pipeline.base_data_dir(data_set)
        for i, name in enumerate(("shard_00000.parquet", val)):
            write(folder, name, texts(30, i))
        assert list(data.iter_texts(data_set, "val")) == texts(30, 1) and list(data.iter_texts(data_set)) == texts(30, 0)
        write(folder, "shard_99999.parquet", texts(30, 2))  # another shard, even behind it by name, goes to training
        assert list(data.iter_texts(data_set, "val")) == texts(30, 1) and list(data.iter_texts(data_set)) == texts(30, 0) + texts(30, 2)
        (folder / val).unlink()
        with ends() as stopped:
            data.dataset_files(data_set)
        assert stopped.code == 2


def test_a_single_text_file_is_split_by_documents(state, tmp_path):
    write(tmp_path / "d", "book.txt", ["word " * 500] * 100)
    train, val = (list(data.iter_texts(str(tmp_path / "d"), split)) for split in ("train", "val"))
    assert len(train) + len(val) == 25 and len(val) == 1 and all(len(t) < 13_000 for t in train)


def test_packing_loses_nothing_but_the_end(tmp_path):
    lengths = np.random.default_rng(1).integers(1, 300, 2000).tolist()
    rows = data.pack(lengths, 64, split=True)
    assert all(sum(length + 1 for _, _, length in row) in (63, 64) for row in rows)
    seen = {}
    for row in rows:
        for document, start, length in row:
            seen.setdefault(document, []).append((start, start + length))
    for document, spans in seen.items():  # the pieces of a document follow one another without gap or overlap
        spans.sort()
        assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    assert sum(lengths) - sum(b - a for spans in seen.values() for a, b in spans) < 64


def test_packing_chats_cuts_none(tmp_path):
    lengths = np.random.default_rng(1).integers(1, 64, 2000).tolist()
    rows = data.pack(lengths, 64, split=False)
    assert sorted((d, 0, lengths[d]) for d in range(2000)) == sorted(piece for row in rows for piece in row)
    assert all(sum(length + 1 for _, _, length in row) <= 64 for row in rows)
    assert sum(lengths) / (64 * len(rows)) > 0.95


def test_rows_hold_the_text_and_start_with_bos(state, tmp_path):
    documents = texts(200)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "d", name, documents)
    stores = data.tokenize_files(str(tmp_path / "d"), "train", BYTES, say=lambda *a: None)
    plan = data.make_plan(stores, 33, BYTES.bos)
    tokens, counted = data.read_rows(plan, range(data.n_rows(plan)))
    assert (tokens[:, 0] == BYTES.bos).all() and tokens.shape[1] == 33
    pieces = [p for row in tokens for p in bytes(np.where(row == BYTES.bos, 10, row).astype(np.uint8)).decode().split("\n") if p]
    assert sum(len(p) for p in pieces) > 0.97 * sum(map(len, documents))
    assert all(any(p in d for d in documents) for p in pieces)


def test_chat_rows_count_the_mask_and_pad(state):
    items = [{"messages": [{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "answer"}]} for n in (3, 9, 100)]
    store, = data.tokenize_conversations("x", "toy", lambda: items, BYTES, 40)
    assert store.facts["cut"] == 1 and store.facts["documents"] == 3
    plan = data.make_plan([store], 40, BYTES.bos, split=False)
    tokens, counted = data.read_rows(plan, range(data.n_rows(plan)))
    assert counted.sum() == 2 * (len("answer") + 1), "the third was cut before its answer began"
    everything = data.make_plan([store._replace(mask=None)], 40, BYTES.bos, split=False)
    tokens, counted = data.read_rows(everything, range(data.n_rows(everything)))
    assert counted.sum() == sum(min(n + 11, 40) for n in (3, 9, 100)), "all but the padding"


def plan_of(state, tmp_path):
    write(tmp_path / "d", "a.jsonl", texts(400))
    write(tmp_path / "d", "b.jsonl", texts(20, 1))
    return data.make_plan(data.tokenize_files(str(tmp_path / "d"), "train", BYTES, say=lambda *a: None), 33, BYTES.bos)


def test_the_batch_of_a_step_is_the_same_tokens_in_the_same_order_for_any_ranks(state, tmp_path):
    plan = plan_of(state, tmp_path)
    for step in (0, 3, 40):
        whole = np.concatenate([x for x, y in data.batch(plan, 7, step, 16, 16)])
        for world, micro in ((1, 4), (2, 2), (2, 8), (4, 1), (4, 4)):
            parts = [list(data.batch(plan, 7, step, 16, micro, rank, world)) for rank in range(world)]
            dealt = np.concatenate([parts[r][m][0] for m in range(len(parts[0])) for r in range(world)])
            assert (dealt == whole).all()
        assert not (whole == np.concatenate([x for x, y in data.batch(plan, 8, step, 16, 16)])).all(), "another seed, another order"


def test_running_out_of_data_is_a_new_epoch_in_another_order(state, tmp_path):
    plan = plan_of(state, tmp_path)
    n = data.n_rows(plan)
    assert 0 < data.cropped(plan) * plan.stores[0].tokens.size < 33, "less than the last row"
    numbers = [r for step in range(3 * n // 8 + 1) for r in data.batch_rows(n, 1, step, 8)]
    for epoch in range(3):
        assert sorted(numbers[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert numbers[:n] != numbers[n:2 * n]


def test_tokenising_uses_all_cores(state, tmp_path, monkeypatch):
    """The other ranks wait for it: two threads would take 20 minutes of eight GPUs for a d20."""
    write(tmp_path / "d", "a.jsonl", texts(30))
    used, encode_batch = [], tok.Tokenizer.encode_batch
    monkeypatch.setattr(common, "cores", lambda: 7)
    monkeypatch.setattr(tok.Tokenizer, "encode_batch", lambda self, batch, threads=2: (used.append(threads), encode_batch(self, batch, threads))[1])
    data.tokenize_files(str(tmp_path / "d"), "train", BYTES, say=lambda *a: None)
    assert used == [7]


def test_tokenising_continues_where_it_was_and_notices_a_changed_file(state, tmp_path):
    for i in range(3):
        write(tmp_path / "d", f"{i}.jsonl", texts(30, i))
    said = []
    tokenize = lambda: data.fingerprint(data.tokenize_files(str(tmp_path / "d"), "train", BYTES, say=said.append))
    before = tokenize()
    assert len(said) == 2 and tokenize() == before and len(said) == 2
    next(pipeline.token_dir(str(tmp_path / "d")).rglob("*1.jsonl.json")).unlink()  # as if it died before the second was done
    assert tokenize() == before and len(said) == 3
    store = next(pipeline.token_dir(str(tmp_path / "d")).rglob("*0.jsonl.tokens.npy"))
    store.write_bytes(store.read_bytes()[:-8])  # a store that is not whole is made again
    assert tokenize() == before and len(said) == 4
    write(tmp_path / "d", "0.jsonl", texts(30, 9))
    assert tokenize() != before and len(said) == 5


def test_broken_lines_are_named_and_many_of_them_end_the_run(state, tmp_path, capsys):
    write(tmp_path / "d", "a.jsonl", texts(2000))
    path = tmp_path / "d" / "a.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:5] + ["{broken", '{"no": 1}'] + lines[5:]))
    assert len(list(data.read_documents(path))) == 2000
    out = capsys.readouterr().out
    assert "a.jsonl:6:" in out and "a.jsonl:7:" in out
    path.write_text("\n".join(["{broken"] * 20))
    with ends() as stopped:
        list(data.read_documents(path))
    assert stopped.code == 2


def test_a_parquet_file_damaged_in_its_middle_is_one_line_that_says_what_to_do(state, tmp_path, capsys):
    write(tmp_path / "d", "a.parquet", [str(np.random.default_rng(i).integers(0, 10 ** 9, 90)) for i in range(200)])
    path = tmp_path / "d" / "a.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2] + bytes(400) + whole[len(whole) // 2 + 400:])
    assert data.parquet_problem(path, ["text"]) is None, "its footer is whole"
    with ends() as stopped:
        list(data.read_documents(path))
    err = capsys.readouterr().err
    assert stopped.code == 2 and "damaged in row group" in err and "prepare the data again" in err and err.count("\n") == 1


@pytest.mark.parametrize("make,says", [
    (lambda d: None, "does not exist"),
    (lambda d: d.write_text("x"), "is a file: --data takes the folder"),
    (lambda d: d.mkdir(), "holds no text"),
    (lambda d: (d.mkdir(), (d / "a.txt").write_text("")), "holds no text"),
    (lambda d: (d.mkdir(), (d / "a.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")), "no readable parquet"),
    (lambda d: (d.mkdir(), pyarrow.parquet.write_table(pyarrow.table({"words": ["x"]}), d / "a.parquet")), "no column `text`"),
    (lambda d: (d.mkdir(), pyarrow.parquet.write_table(pyarrow.table({"text": [5]}), d / "a.parquet")), "`text` is no text but int64")])
def test_a_bad_data_folder_is_one_line_and_exit_code_2(state, tmp_path, capsys, make, says):
    make(tmp_path / "d")
    with ends() as stopped:
        data.dataset_files(str(tmp_path / "d"))
    err = capsys.readouterr().err
    assert stopped.code == 2 and says in err and err.count("\n") == 1


def test_micro_batches_fit():
    assert data.fit_micro_rows(256, 48, 8) == 32 and data.fit_micro_rows(12, 5, 1) == 4 and data.fit_micro_rows(7, 3, 1) == 1
    with ends():
        data.fit_micro_rows(10, 4, 4)
