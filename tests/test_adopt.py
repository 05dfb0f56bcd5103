"""A folder that nanochat has left: adopt.py makes its model and tokenizer usable, later phases go
on from it, and nothing that would overwrite it starts."""
import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import tiktoken
import torch

import adopt
import checkpoint
import gpt
import models
import pipeline
import tokenizer as tok
from conftest import (
    BYTES,
    REPO,
    SHARED,
    alone,
    ends,
    environment,
    exit_code,
    needs_nanochat,
    script,
)
from records import load_record
from test_data import write
from test_run import save, settings, start

CONFIG = {"sequence_len": 64, "vocab_size": BYTES.vocab_size, "n_layer": 1, "n_head": 1,
          "n_kv_head": 1, "n_embd": 128}
TINY = ["--max_seq_len=64", "--total_batch_size=512", "--device_batch_size=8", "--num_steps=2",
        "--eval_tokens=500", "--device=cpu", "--compile=False", "--dtype=float32", "--depth=1"]

@pytest.fixture
def left(state):
    """Its base model of step 20 and an older one, of a compiled model as it saved them in 2025."""
    folder = state / "base_checkpoints/d1"
    folder.mkdir(parents=True)
    model = gpt.GPT(gpt.GPTConfig(**CONFIG, arch="nanochat_2025"))
    model.init_weights(1)
    weights = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    for step in (10, 20):
        torch.save(weights, folder / f"model_{step:06d}.pt")
        meta = {"step": step, "model_config": CONFIG, "val_bpb": 1.5}
        (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    tok.save_tokenizer(state / "tokenizer", {bytes([i]): i for i in range(256)})
    return folder

def contents(folder):
    theirs = [p for p in folder.iterdir() if p.name.startswith(("model", "meta"))]
    return {p.name: p.read_bytes() for p in theirs}

def adopt_it(state):
    out = script(state, "adopt.py")
    assert out.returncode == 0, out.stderr
    return out.stdout

def test_reading_never_adopts_but_names_the_command_that_does(left, capsys):
    before = sorted(p.name for p in left.iterdir())
    assert exit_code(models.find_model, "base", "fineweb_edu") == 2
    said = capsys.readouterr().err
    assert "nanochat has made" in said and "run: python adopt.py --data=fineweb_edu" in said
    out = script(left.parents[1], "chat_cli.py")
    assert out.returncode == 2 and "run: python adopt.py --data=fineweb_edu" in out.stderr
    assert sorted(p.name for p in left.iterdir()) == before

def test_it_is_loaded_marked_and_whole_and_stays_byte_for_byte(left):
    before = contents(left)
    assert "adopted nanochat's checkpoint of step 20" in adopt_it(left.parents[1])
    assert models.find_model("base", "fineweb_edu") == (left, 20), "the newest, without a tag"
    assert load_record(left)["adopted"] and checkpoint.problem(left, 20) is None
    assert contents(left) == before
    model = models.load_model(left, 20, "cpu", torch.float32)
    meta = checkpoint.load_meta(left, 20)
    assert meta["adopted"] and meta["val_bpb"] == 1.5 and model.config.arch == "nanochat_2025"
    assert adopt_it(left.parents[1]).startswith("nothing is left to adopt in"), "once is enough"
    damaged = bytearray(before["model_000020.pt"])
    damaged[len(damaged) // 2] ^= 1
    (left / "model_000020.pt").write_bytes(damaged)
    assert "checksum" in checkpoint.problem(left, 20)

@pytest.mark.parametrize("adopted", [False, True])
def test_pretraining_refuses_instead_of_sweeping_it_away(left, adopted):
    state, before = left.parents[1], contents(left)
    if adopted:
        adopt_it(state)
    for name in ("shard_00000.parquet", "shard_01822.parquet"):
        texts = [f"Text {i} of {name} says that {i} is followed by {i + 1}." for i in range(200)]
        write(state / "base_data", name, texts)
    refused = script(state, "base_train.py", *TINY)
    assert refused.returncode == 2 and "holds a model made by nanochat" in refused.stderr
    assert contents(left) == before
    anew = script(state, "base_train.py", *TINY, "--start_over=True")
    assert anew.returncode == 0, anew.stderr[-2000:]
    assert contents(next(left.parent.glob("d1.old-*"))) == before

@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("{")])
def test_a_lost_record_or_manifest_makes_it_no_less_nanochats(left, capsys, damage):
    adopt_it(left.parents[1])
    before = contents(left)
    damage(left / "phase.json")
    assert exit_code(alone().open_or_exit, left, settings(), {}) == 2
    assert "made by nanochat" in capsys.readouterr().err
    (left / "phase.json").unlink(missing_ok=True)
    (left / checkpoint.manifest_name(20)).unlink()  # as if killed between the two
    adopt_it(left.parents[1])
    assert models.find_model("base", "fineweb_edu") == (left, 20) and contents(left) == before

@pytest.mark.parametrize("damage", [
    lambda p: None, lambda p: p.unlink(), lambda p: p.write_text("{")])
def test_beside_a_run_of_our_own_it_changes_nothing(left, capsys, damage):
    theirs = contents(left)
    for name in theirs:
        (left / name).unlink()
    run = start(left, damage=None)
    save(run, 9)
    exit_code(run.exit_done, step=9)
    for name, content in theirs.items():
        (left / name).write_bytes(content)
    damage(left / "phase.json")
    before = {p.name: p.read_bytes() for p in left.iterdir()}
    assert models.find_model("base", "fineweb_edu", "d1") == (left, 9)
    assert "beside a model or phase.json of our own has" in adopt_it(left.parents[1])
    assert {p.name: p.read_bytes() for p in left.iterdir()} == before
    if load_record(left):
        assert exit_code(start, left, damage=None) == 0, "done already"

def test_weights_of_another_shape_are_refused_with_the_reason(left, capsys):
    weights = torch.load(left / "model_000020.pt", weights_only=True)
    name = next(iter(weights))
    torch.save({**weights, name: weights[name][:1]}, left / "model_000020.pt")
    assert exit_code(adopt.adopt_model, left, 20) == 2
    assert "cannot adopt" in capsys.readouterr().err and not (left / "phase.json").exists()

def test_what_is_no_such_model_is_refused_and_left_alone(left, capsys):
    (left / "model_000020.pt").write_bytes(b"not a model")
    assert exit_code(adopt.adopt_model, left, 20) == 2
    assert "cannot adopt" in capsys.readouterr().err and not (left / "phase.json").exists()
    assert contents(left)["model_000020.pt"] == b"not a model"

def test_midtraining_goes_on_from_it(left, tmp_path):
    adopt_it(left.parents[1])
    talk = {"messages": [{"role": "user", "content": "How are you?"},
                         {"role": "assistant", "content": "Fine."}]}
    (tmp_path / "mine.jsonl").write_text("\n".join([json.dumps(talk)] * 60) + "\n")
    done = script(left.parents[1], "mid_train.py", f"--mixture={tmp_path}/mine.jsonl",
                  f"--held_out={tmp_path}/mine.jsonl", "--total_batch_size=256", "--max_steps=2",
                  "--device_batch_size=4", "--eval_tokens=200", "--device=cpu", "--compile=False",
                  "--dtype=float32")
    assert done.returncode == 0, done.stderr[-2000:]
    folder = pipeline.state_path("mid", "fineweb_edu", "d1")
    assert checkpoint.load_meta(folder, 2)["model"]["arch"] == "nanochat_2025"

def test_what_it_was_trained_on_is_measured_without_tokenizing_all_of_it(left):
    state = left.parents[1]
    adopt_it(state)
    for i in (0, 1, 2, 1822):
        documents = ["Some text to measure on. " * 20] * 40
        write(state / "base_data", f"shard_{i:05d}.parquet", documents)
    out = script(state, "base_eval.py", "--core_items=0", "--show_samples=False",
                 "--eval_tokens=500", "--device=cpu", "--dtype=float32")
    assert out.returncode == 0, out.stderr[-2000:]
    tokenized = re.findall(r"tokenizing (\S+)", out.stdout)
    assert tokenized == ["train_shard_00000.parquet", "val_shard_01822.parquet"]

def test_chat_talks_to_it_and_leaves_alone_what_was_put_aside(left):
    state = left.parents[1]
    aside = left.rename(left.with_name("d1.old-20260101-000000"))
    adopt_it(state)
    out = script(state, "chat_cli.py")
    assert out.returncode == 2 and "there is no trained model" in out.stderr
    assert not (aside / "phase.json").exists()
    aside.rename(left)
    adopt_it(state)
    out = script(state, "chat_cli.py", "-p", "hello", "--max_new_tokens=2")
    assert out.returncode == 0 and "base model d1 of fineweb_edu" in out.stderr

@needs_nanochat
def test_one_that_nanochat_made_itself(state):
    folder, there = state / "base_checkpoints/d4", SHARED / "nanochat_checkpoint"
    folder.mkdir(parents=True)
    for name in ("model_000400.pt", "meta_000400.json"):
        (folder / name).write_bytes((there / "base_checkpoints/d4" / name).read_bytes())
    (state / "tokenizer").mkdir()
    pickled = (there / "tokenizer/tokenizer.pkl").read_bytes()
    (state / "tokenizer/tokenizer.pkl").write_bytes(pickled)
    adopt_it(state)
    assert models.find_model("base", "fineweb_edu") == (folder, 400)
    tokenizer = models.load_tokenizer_of(folder, 400, "fineweb_edu")
    model = models.load_model(folder, 400, "cpu", torch.float32)
    meta = checkpoint.load_meta(folder, 400)
    assert meta["step"] == 400 and tokenizer.vocab_size == 4096 == model.config.vocab_size

READ_ONLY = """
set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
export NANOCHAT_BASE_DIR="$1"
shift
exec "$@"
"""

@pytest.fixture
def on_read_only_disk(state):
    """run(*args): `python ARGS`, for which the state folder is on a disk that is read-only"""
    mounts = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    if subprocess.run([*mounts, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")

    def run(*args):
        command = [*mounts, "bash", "-c", READ_ONLY, "bash", state, sys.executable, *args]
        return subprocess.run(command, cwd=REPO, env=environment(state), capture_output=True,
                              text=True, check=False)
    return run

def everything(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime) for p in folder.rglob("*") if p.is_file()}

EVALUATION = ["chat_eval.py", "--source=base", "--tasks=spellingbee", "--max_items=1",
              "--max_new_tokens=2"]

def test_on_a_read_only_disk_it_is_talked_to_or_the_line_says_copy_it(
        left, on_read_only_disk, tmp_path):
    state = left.parents[1]
    (state / "task_data").mkdir()
    words = "\n".join(f"{a}{b}word" for a in "abcdefgh" for b in "abcdefgh")
    (state / "task_data/words_alpha.txt").write_text(words)
    copied = tmp_path / "nanochat-copy"
    copy = f"copy it and adopt the copy; run: cp -a {state} ~/nanochat-copy && "
    before = everything(state)
    for args in (["chat_cli.py", "-p", "hello"], ["adopt.py"], EVALUATION):
        out = on_read_only_disk(*args)
        assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
        assert copy in out.stderr and "python adopt.py" in out.stderr, out.stderr
    assert everything(state) == before
    told = out.stderr.strip().rpartition("; run: ")[2].replace("python ", f"{sys.executable} ")
    home = {**environment(state), "HOME": str(tmp_path)}
    copying = subprocess.run(["bash", "-c", told], cwd=REPO, env=home, capture_output=True,
                             text=True, check=False)
    assert "adopted nanochat's checkpoint of step 20" in copying.stdout, copying.stderr
    assert everything(state) == before and checkpoint.problem(copied / left.relative_to(state),
                                                              20) is None
    adopt.adopt_model(left, 20)
    before = everything(state)
    out = on_read_only_disk("chat_cli.py", "-p", "hello", "--max_new_tokens=2")
    assert out.returncode == 0 and "base model d1 of fineweb_edu" in out.stderr
    out = on_read_only_disk(*EVALUATION)  # whose result has no place there
    assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
    assert "Read-only" in out.stderr and "or copy it" in out.stderr
    assert script(state, *EVALUATION).returncode == 0
    assert "done already" in on_read_only_disk(*EVALUATION).stdout, "reading it needs no writing"
    theirs = {path: what for path, what in everything(state).items() if path in before}
    assert theirs == before

def test_what_cannot_be_read_is_not_to_be_moved_away(left, monkeypatch, capsys):
    monkeypatch.setattr(adopt.os, "access", lambda *args: False)  # root may read everything
    for function, args in ((adopt.adopt_model, (left, 20)), (adopt.adopt_tokenizer, (left,))):
        assert exit_code(function, *args) == 2
        said = capsys.readouterr().err
        assert "cannot be read: make it readable" in said and "move" not in said

# ---- its pickled tokenizer

def pickle_of(folder, pattern=tok.PATTERN):
    encoding = tiktoken.Encoding("rustbpe", pat_str=pattern, mergeable_ranks=BYTES.ranks,
                                 special_tokens=BYTES.special_tokens)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))

def test_a_pickled_tokenizer_is_kept_as_plain_data(state, capsys):
    folder = pipeline.tokenizer_dir("toy")
    folder.mkdir(parents=True)
    pattern = tok.PATTERN.replace("1,2", "1,3")
    pickle_of(folder, pattern)
    before = (folder / "tokenizer.pkl").read_bytes()
    assert exit_code(tok.load_tokenizer, "toy") == 2
    assert "run: python adopt.py --data=toy" in capsys.readouterr().err, "it does not convert it"
    adopt.adopt_tokenizer(folder)
    loaded = tok.load_tokenizer("toy")
    assert loaded.pattern == pattern and loaded.ranks == BYTES.ranks
    assert loaded.special_tokens == BYTES.special_tokens
    assert (folder / "tokenizer.pkl").read_bytes() == before

class Harm:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call

@pytest.mark.parametrize("call", [(os.system, ("touch {}",)), (eval, ("open('{}', 'w')",)),
                                  (tiktoken.get_encoding, ("gpt2",))])
def test_a_hostile_pickle_runs_nothing(tmp_path, capsys, call):
    mark = tmp_path / "it-ran"
    function, args = call
    harm = pickle.dumps(Harm(function, tuple(a.format(mark) for a in args)))
    (tmp_path / "tokenizer.pkl").write_bytes(harm)
    assert exit_code(adopt.adopt_tokenizer, tmp_path) == 2 and not mark.exists()
    assert "nothing of it was run" in capsys.readouterr().err
    if "touch" in args[0]:  # and the pickle would have done it
        pickle.loads(harm)
        assert mark.exists()

@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps({"a": 1}),
                                     pickle.dumps([1] * 100)[:50]])
def test_a_broken_pickle_is_no_traceback(tmp_path, capsys, content):
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with ends() as end:
        adopt.adopt_tokenizer(tmp_path)
    assert end.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.pkl"]
