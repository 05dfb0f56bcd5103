"""tokenizer.py and tok_train.py: merges equal to a slow obvious trainer, round trips, rendering and
masks, damaged and hostile files, bad settings, interruption."""
import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken

import common
import pipeline
import tok_train
import tokenizer as tok
from conftest import BYTES, REPO, ends, environment, script

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "other", "cats", "sang;", "thinking,",
         "singing", "rings", "12", "345", "don't", "it's\n"]
CHARS = [chr(c) for c in range(0x110000) if not 0xd800 <= c < 0xe000]
EDGES = list(" \n\r\t\v\f\0\x1c\x85\xa0\u2028\u3000") + [
    "  ", "\n\n", " \n", "\n ", "\r\n", "'s", "'Ll", "ſ", "ab", "A", "1", "٣", ".", "…", "é",
    "漢", "😀", "\u0301", "_", "<|bos|>"]

OTHER_LANGUAGES = """Die Katze schläft auf dem warmen Dach. Il fait beau ce matin au bord de la mer.
Вчера мы долго гуляли у реки. Το βιβλίο είναι πάνω στο τραπέζι. 我们明天早上一起去市场买菜。"""

def random_text(rng, length=40):
    return "".join(rng.choice(EDGES if rng.random() < 0.9 else CHARS) for _ in range(length))

def slow_bpe(words, n_tokens):
    """The obvious trainer: count all pairs, merge the most frequent (then the smallest), begin
    again."""
    tokens = [bytes([i]) for i in range(256)]
    words = [(list(word.encode()), n) for word, n in words.items()]
    while len(tokens) < n_tokens:
        pairs = Counter()
        for ids, n in words:
            for pair in pairwise(ids):
                pairs[pair] += n
        if not pairs:
            break
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        assert tokens[a] + tokens[b] not in tokens
        tokens.append(tokens[a] + tokens[b])
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == (a, b):
                    ids[i:i + 2] = [len(tokens) - 1]
                i += 1
    return {token: i for i, token in enumerate(tokens)}

@pytest.fixture(scope="module")
def trained():
    text = (REPO / "tokenizer.py").read_text() + (REPO / "tok_train.py").read_text()
    text += OTHER_LANGUAGES
    return tok.Tokenizer(tok_train.train_bpe(tok_train.count_words([text]), 1200))

# ---- training

def test_cutting_first_gives_the_words_of_the_plain_pattern():
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(20_000)]
    texts += ["", " ", "a", (REPO / "tok_train.py").read_text()]
    for text in texts:
        plain = Counter(regex.findall(tok.PATTERN, text))
        assert sum(map(len, plain.elements())) == len(text)
        assert tok_train.count_words([text]) == plain, repr(text)
    pieces = Counter(p for text in texts for p in regex.findall(tok.PATTERN, text))
    assert tok_train.count_words(texts) == pieces

def test_white_space_is_what_the_pattern_takes_for_it():
    assert sorted(tok_train.OTHER_SPACES + " ") == [c for c in CHARS if regex.match(r"\s", c)]

def test_numbers_by_two_digits_and_contractions():
    assert regex.findall(tok.PATTERN, "In 12345 it's  fine.\n\nNo") == [
        "In", " ", "12", "34", "5", " it", "'s", " ", " fine", ".\n\n", "No"]

def test_merges_by_hand():
    ranks = tok_train.train_bpe({"abc": 2, "ab": 1, "dd": 2}, 300)
    # counts 3, then 2 and 2: (d, d) = (100, 100) before (256, 99)
    assert list(ranks)[256:] == [b"ab", b"dd", b"abc"]
    # aaaaa -> [aa][aa]a, where (256, 97) goes before (256, 256) -> [aa][aaa] -> [aaaaa]
    assert list(tok_train.train_bpe({"aaaaa": 1}, 300))[256:] == [b"aa", b"aaa", b"aaaaa"]

def test_merges_equal_the_slow_trainer_on_text():
    text = (REPO / "common.py").read_text()[:12_000]
    text += " ".join(WORDS * 3) + OTHER_LANGUAGES
    words = tok_train.count_words([text])
    assert list(tok_train.train_bpe(words, 700)) == list(slow_bpe(words, 700))

@pytest.mark.parametrize("alphabet", ["ab", "aaab", "abcde", "aé漢"])
def test_merges_equal_the_slow_trainer_to_the_last_pair(alphabet):
    rng = random.Random(alphabet)
    for _ in range(60):
        words = {"".join(rng.choices(alphabet, k=rng.randint(1, 14))): rng.randint(1, 4)
                 for _ in range(rng.randint(1, 12))}
        assert list(tok_train.train_bpe(words, 400)) == list(slow_bpe(words, 400)), words

def test_workers_and_chunks_change_nothing(monkeypatch):
    rng = random.Random(3)
    texts = [random_text(rng, 300) for _ in range(300)]
    whole = tok_train.count_all(iter(texts), 10 ** 9, 200, 1)
    monkeypatch.setattr(tok_train, "CHUNK_CHARS", 5_000)
    assert tok_train.count_all(iter(texts), 10 ** 9, 200, 2) == whole
    assert whole[0] == Counter(p for text in texts for p in regex.findall(tok.PATTERN, text[:200]))
    words, chars = tok_train.count_all(iter(texts), 1000, 200, 1)
    assert 1000 <= chars <= 1200 == chars + 1200 - sum(n * len(word) for word, n in words.items())

def test_rare_words_are_dropped_first():
    words = {"a": 5, "b": 1, "c": 2, "d": 1, "e": 2, "f": 9}
    assert tok_train.prune(words, 8) == {"a": 5, "c": 2, "e": 2, "f": 9}
    assert tok_train.prune(words, 7) == {"a": 5, "f": 9}

# ---- encoding

def test_every_character_and_random_strings_round_trip(trained):
    for i in range(0, len(CHARS), 5000):
        text = "".join(CHARS[i:i + 5000])
        assert trained.decode(trained.encode(text)) == text
    rng = random.Random(4)
    texts = [random_text(rng) for _ in range(5000)]
    batch = trained.encode_batch(texts)
    for text, ids in zip(texts, batch):
        assert ids == trained.encode(text) and trained.decode(ids) == text
        assert max(ids) < trained.bos, "text gave a special token"
        assert trained.decode_bytes(ids) == text.encode()
        assert trained.token_bytes()[ids].sum() == len(text.encode())
    assert trained.token_bytes()[trained.bos:].sum() == 0 and trained.encode("") == []

def test_surrogates_become_characters(trained):
    assert trained.decode(trained.encode("a\ud800b")) == "a\ufffdb"
    assert trained.decode(trained.encode("\ud83d\ude00")) == "😀"
    assert tok_train.count_all(["\ud83d\ude00 \udc00"], 100, 100, 1)[0] == {"😀": 1, " \ufffd": 1}

def test_a_million_blanks(trained):
    for text in (" " * 10 ** 6 + "a", "\t \n" * 300_000, "x" * 10 ** 6):
        assert trained.decode(trained.encode(text)) == text

def test_a_character_cut_in_half_is_no_error(trained):
    assert trained.decode("é".encode()[:1]) == "\ufffd"

def test_merges_are_what_tiktoken_does_with_them():
    tokenizer = tok.Tokenizer(tok_train.train_bpe({"abc": 2, "ab": 1, "dd": 2}, 300))
    assert tokenizer.encode("abcabdd") == [258, 256, 257]
    assert tokenizer.vocab_size == 259 + 9 and tokenizer.bos == 259
    assert tokenizer.special("<|output_end|>") == 267

# ---- conversations

CHAT = {"messages": [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "u<|assistant_start|>"},
    {"role": "assistant", "content": [
        {"type": "text", "text": "t"}, {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"}, {"type": "text", "text": "v"}]},
    {"role": "user", "content": "w"},
    {"role": "assistant", "content": "x"}]}

def test_rendering_by_hand():
    bos, us, ue, as_, ae, ps, pe, os_, oe = range(256, 265)
    ids, mask = BYTES.render_conversation(CHAT)
    # the name of a special token in a message is ordinary text
    user = list(b"S\n\nu<|assistant_start|>")
    assert ids == [bos, us, *user, ue, as_, *b"t", ps, *b"1+1", pe, os_, *b"2", oe, *b"v", ae,
                   us, *b"w", ue, as_, *b"x", ae]
    assert mask == [0] * (len(user) + 3) + [0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    assert BYTES.render_for_completion(CHAT) == ids[:-2]
    asked = {"messages": CHAT["messages"][:2]}
    assert BYTES.render_for_completion(asked) == [bos, us, *user, ue, as_]

def test_a_system_message_before_a_user_who_says_nothing_is_not_taught():
    def says(*messages):
        roles = ("system", "user", "assistant")
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, messages)]}
    ids, mask = BYTES.render_conversation(says("S", [], "x"))
    assert (ids, mask) == BYTES.render_conversation(says("S", "", "x"))
    assert [token for token, taught in zip(ids, mask) if taught] == [*b"x", ids[-1]]

@pytest.mark.parametrize("messages, said", [
    ([], "without a user's message"),
    ([{"role": "assistant", "content": "x"}], "take turns"),
    ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "take turns"),
    ([{"role": "user", "content": None}], "neither text"),
    ([{"role": "user", "content": [{"type": "python", "text": "1"}]}], "neither text"),
    ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "take turns")])
def test_broken_conversations_are_named(messages, said):
    with pytest.raises(ValueError, match=said):
        BYTES.render_conversation({"messages": messages})

# ---- files

def test_saved_and_loaded_is_the_same(trained, tmp_path):
    tok.save_tokenizer(tmp_path, trained.ranks)
    loaded = tok.read_tokenizer(tmp_path)
    assert loaded.ranks == trained.ranks and loaded.vocab_size == trained.vocab_size
    assert loaded.fingerprint == trained.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ranks.txt", "tokenizer.json"]
    from tiktoken.load import load_tiktoken_bpe  # the authority for the format
    assert load_tiktoken_bpe(str(tmp_path / "ranks.txt")) == trained.ranks

def damage_bytes(path):
    lines = (path / "ranks.txt").read_bytes().splitlines(keepends=True)
    (path / "ranks.txt").write_bytes(b"".join(lines[:100] + lines[101:]))

def rewrite(path, old, new):
    settings = (path / "tokenizer.json").read_text()
    assert old in settings
    (path / "tokenizer.json").write_text(settings.replace(old, new))

@pytest.mark.parametrize("harm", [
    damage_bytes,
    lambda path: (path / "ranks.txt").unlink(),
    lambda path: (path / "tokenizer.json").write_text("{"),
    lambda path: (path / "tokenizer.json").write_text("[]"),
    lambda path: rewrite(path, "<|bos|>", "<|BOS|>"),
    lambda path: rewrite(path, "{1,2}", "s1,2}"),  # a bit that leaves a pattern
    lambda path: rewrite(path, '"special_tokens": {', '"special_tokens": ["a"], "more": {'),
    lambda path: rewrite(path, '"pattern": ', '"pattern": 5, "more": '),
    lambda path: rewrite(path, '"<|bos|>": ', '"<|bos|>": "a", "more": '),
    lambda path: (path / "tokenizer.json").unlink()])
def test_damaged_or_missing_says_so(trained, state, capsys, harm):
    where = pipeline.tokenizer_dir("toy")
    tok.save_tokenizer(where, trained.ranks)
    (where / "phase.json").write_text(json.dumps({"fingerprint": trained.fingerprint}))
    assert tok.load_tokenizer("toy").fingerprint == trained.fingerprint
    harm(where)
    with ends() as e:
        tok.load_tokenizer("toy")
    said = capsys.readouterr().err
    assert e.code == 2 and str(where) in said and said.count("\n") == 1
    assert "run: python tok_train.py --data=toy config/toy_tok.py" in said
    assert "is damaged (" in said
    for path in where.iterdir():
        path.unlink()
    with ends():
        tok.load_tokenizer("toy")
    assert f"there is no tokenizer in {where}; run" in capsys.readouterr().err

@pytest.fixture
def pickled(trained, state):
    """nanochat's tokenizer where that of the toy world would be, with a pattern of its own."""
    where = pipeline.tokenizer_dir("toy")
    where.mkdir(parents=True)
    pattern = tok.PATTERN.replace("1,2", "1,3")
    encoding = tiktoken.Encoding("rustbpe", pat_str=pattern, mergeable_ranks=trained.ranks,
                                 special_tokens=trained.special_tokens)
    (where / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return where

def adopts(state):
    """Whether adopt.py has converted a tokenizer there."""
    out = script(state, "adopt.py", "--data=toy")
    assert out.returncode == 0, out.stderr
    return "adopted nanochat's tokenizer" in out.stdout

def test_a_nanochat_pickle_is_converted_once(trained, pickled, state):
    assert adopts(state) and not adopts(state)
    first = tok.load_tokenizer("toy")
    (pickled / "tokenizer.pkl").unlink()
    again = tok.load_tokenizer("toy")
    assert first.fingerprint == again.fingerprint
    assert again.pattern == tok.PATTERN.replace("1,2", "1,3") != tok.PATTERN
    assert again.ranks == trained.ranks and again.special_tokens == trained.special_tokens

def test_a_damaged_one_is_converted_again_by_the_command_that_is_named(pickled, state, capsys):
    assert adopts(state)
    damage_bytes(pickled)
    with ends():
        tok.load_tokenizer("toy")
    assert "run: python adopt.py --data=toy" in capsys.readouterr().err
    assert adopts(state) and tok.damage(pickled) is None

# ---- the phase

@pytest.fixture
def folder(tmp_path):
    """A data set of two files, the last of them for validation."""
    path = tmp_path / "books"
    path.mkdir()
    rng = random.Random(5)
    for name, n in (("a.jsonl.gz", 300), ("b.jsonl.gz", 20)):
        with gzip.open(path / name, "wt") as f:
            for _ in range(n):
                f.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=60))}) + "\n")
    return path

def test_the_phase_trains_is_done_and_refuses_a_change(state, folder):
    args = ["tok_train.py", f"--data={folder}", "--vocab_size=300"]
    out = script(state, *args)
    assert out.returncode == 0, out.stderr
    assert "bytes per token" in out.stdout
    where = next(state.glob("books-*/tokenizer"))
    assert tok.read_tokenizer(where).vocab_size == 300
    before = (where / "ranks.txt").stat().st_mtime_ns
    out = script(state, *args)
    assert out.returncode == 0 and "done already" in out.stdout
    assert (where / "ranks.txt").stat().st_mtime_ns == before
    out = script(state, *args[:-1], "--vocab_size=330")
    assert out.returncode == 2 and "vocab_size was 300, now 330" in out.stderr
    (where / "ranks.txt").write_text("rubbish")  # no longer verifies: trained again
    out = script(state, *args)
    assert out.returncode == 0 and "is damaged (ranks.txt" in out.stdout
    assert tok.read_tokenizer(where).vocab_size == 300
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' + b"{broken\n" * 600))
    out = script(state, *args, "--start_over=True")
    assert out.returncode == 2 and "600 of 601 lines" in out.stderr
    assert tok.damage(where) is None, "a start that is refused leaves the old tokenizer in place"

def test_starting_over_once_more_reads_what_is_there_now(state, folder):
    args = ["tok_train.py", f"--data={folder}", "--vocab_size=300", "--start_over=True"]
    assert script(state, *args).returncode == 0
    where = next(state.glob("books-*/tokenizer"))
    record = common.read_json(where / "phase.json")
    (folder / "c.txt").write_text("more " * 400)
    out = script(state, *args)
    assert out.returncode == 0 and "done already" in out.stdout, "added files stop nothing"
    whole = (folder / "a.jsonl.gz").read_bytes()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' + b"{broken\n" * 600))
    out = script(state, *args)
    assert out.returncode == 2 and "600 of 601 lines" in out.stderr
    assert common.read_json(where / "phase.json") == record, "nothing was put aside for it"
    (folder / "a.jsonl.gz").write_bytes(whole + gzip.compress(b'{"text": "one more"}\n'))
    out = script(state, *args)
    assert out.returncode == 0 and "damaged" not in out.stdout, out.stdout
    assert "c.txt" in common.read_json(where / "phase.json")["texts"]
    assert len(list(where.parent.glob("tokenizer.old-*"))) == 1

def test_a_text_with_nothing_left_to_merge_gives_fewer_tokens(state, folder):
    out = script(state, "tok_train.py", f"--data={folder}", "--vocab_size=5000")
    n = tok.load_tokenizer(folder).vocab_size
    assert out.returncode == 0 and n < 5000 and f"the vocabulary has {n}" in out.stdout

def test_bad_input_is_one_line_and_leaves_nothing(state, folder, tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "x.parquet").write_bytes(b"PAR1 this is none")
    second = tmp_path / "second"
    second.mkdir()
    (second / "a.txt").write_text("good " * 100)
    (second / "b.txt").write_bytes("größer".encode("cp1252"))
    blank = tmp_path / "blank"
    blank.mkdir()
    (blank / "x.jsonl").write_text('{"text": ""}\n')
    for args, said in ((["--vocab_size=265", f"--data={folder}"], "vocab_size must be 266"),
                       (["--vocab_size=2000000", f"--data={folder}"], "vocab_size must be"),
                       (["--doc_cap=0", f"--data={folder}"], "doc_cap"),
                       (["--vocab_sise=300"], "vocab_size"),
                       (["--vocab_size=many"], "whole number"),
                       ([f"--data={tmp_path}/nowhere"], "nowhere"),
                       ([f"--data={empty}"], "empty"),
                       ([f"--data={blank}"], "blank"),
                       ([f"--data={broken}"], "x.parquet"),
                       ([f"--data={second}"], "b.txt: 1 of 1 lines are broken")):
        out = script(state, "tok_train.py", *args)
        assert out.returncode == 2 and said in out.stderr, (args, out.stderr)
        assert out.stderr.count("\n") == 1, (args, out.stderr)
        assert not state.exists(), args

def test_anothers_tokenizer_is_not_overwritten(state, folder):
    where = pipeline.tokenizer_dir(folder)
    tok.save_tokenizer(where, {bytes([i]): i for i in range(256)})
    out = script(state, "tok_train.py", f"--data={folder}", "--vocab_size=300")
    assert out.returncode == 2 and "--start_over=True" in out.stderr
    assert tok.read_tokenizer(where).vocab_size == 265
    out = script(state, "tok_train.py", f"--data={folder}", "--vocab_size=300", "--start_over=True")
    assert out.returncode == 0 and tok.read_tokenizer(where).vocab_size == 300

def test_more_data_does_not_make_a_finished_tokenizer_another(state, folder):
    command = ["tok_train.py", f"--data={folder}", "--vocab_size=300"]
    assert script(state, *command).returncode == 0
    (folder / "sub").mkdir()
    for name in ("a-more.txt", "0.txt", "zz.txt", "sub/b.txt"):
        (folder / name).write_text("text that came later")
    (folder / "notes.md").write_text("no text")
    out = script(state, *command)
    assert out.returncode == 0 and "done already" in out.stdout, out.stderr
    assert "not read: 1 (notes.md); read are" in out.stdout
    (folder / "a.jsonl.gz").write_bytes((folder / "b.jsonl.gz").read_bytes())
    out = script(state, *command)
    assert out.returncode == 2 and "other texts: a.jsonl.gz has changed;" in out.stderr

@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A data set that takes seconds."""
    big = tmp_path_factory.mktemp("big")
    rng = random.Random(6)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 12)))
                  for _ in range(100_000)]
    for name in ("a.jsonl", "b.jsonl"):
        texts = [" ".join(rng.choices(vocabulary, k=1000)) for _ in range(1200)]
        (big / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return big

def children(pid):
    """Process ids of the processes that this one has started"""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

def start_counting(state, big):
    """-> tok_train.py, and its group of processes, when the first worker has just been started"""
    command = [sys.executable, "tok_train.py", f"--data={big}", "--vocab_size=60000", "--workers=2"]
    process = subprocess.Popen(command, cwd=REPO, env=environment(state), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    while len(children(process.pid)) < 2:  # Python's resource tracker is one of them
        assert process.poll() is None, "it finished before the signal"
    return process

def test_a_signal_to_the_whole_group_meets_workers_that_have_just_started(state, big):
    process = start_counting(state, big)
    os.killpg(process.pid, signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "run the same command again" in out, out

def test_a_worker_that_is_killed_is_named(state, big):
    process = start_counting(state, big)
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "smaller --workers" in out, out
    assert "BrokenProcessPool" not in out

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_interrupted_leaves_no_tokenizer_and_runs_again(state, big, number, code):
    command = [sys.executable, "tok_train.py", f"--data={big}", "--vocab_size=60000"]
    process = subprocess.Popen(command, cwd=REPO, env=environment(state), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while "different words" not in process.stdout.readline():  # it is past counting, in the merges
        assert process.poll() is None, "it finished before the signal"
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == code, rest
    where = pipeline.tokenizer_dir(big)
    assert not (where / "tokenizer.json").exists() and not (where / "ranks.txt").exists()
    if code == 75:
        assert "run the same command again" in rest
        assert json.loads((where / "phase.json").read_text())["status"] == "interrupted"
    out = script(state, "tok_train.py", f"--data={big}", "--vocab_size=60000",
                 "--time_limit=0.0001")
    assert out.returncode == 75 and "time limit" in out.stdout
