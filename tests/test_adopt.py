"""A folder that nanochat has left: its model is adopted, later phases go on from it, and nothing that would overwrite it starts."""
import json
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import common
import gpt
import phase
import tokenizer as tok
from conftest import BYTES, SHARED, needs_nanochat, script
from test_data import write
from test_phase import exit_code

CONFIG = {"sequence_len": 64, "vocab_size": BYTES.vocab_size, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 128}


@pytest.fixture
def left(state):
    """Its base model of step 20 and an older one, of a compiled model as nanochat saved them in 2025."""
    folder = state / "base_checkpoints/d1"
    folder.mkdir(parents=True)
    model = gpt.GPT(gpt.GPTConfig(**CONFIG, arch="nanochat_2025"))
    model.init_weights(1)
    for step in (10, 20):
        torch.save({f"_orig_mod.{k}": v for k, v in model.state_dict().items()}, folder / f"model_{step:06d}.pt")
        (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": CONFIG, "val_bpb": 1.5}))
    tok.save_tokenizer(state / "tokenizer", {bytes([i]): i for i in range(256)})
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("model_*.pt")}


def test_it_is_loaded_marked_and_whole(left, capsys):
    before = contents(left)
    assert checkpoint.find_model("base", "fineweb_edu") == (left, 20)  # the newest, without a tag
    assert "adopted nanochat's checkpoint of step 20" in capsys.readouterr().out
    assert phase.read(left)["adopted"] and checkpoint.problem(left, 20) is None and contents(left) == before
    model, _, meta = checkpoint.load_model("base", "fineweb_edu", "d1", "cpu", torch.float32)
    assert meta["adopted"] and meta["val_bpb"] == 1.5 and model.config.arch == "nanochat_2025"
    assert checkpoint.find_model("base", "fineweb_edu", "d1") == (left, 20) and "adopted" not in capsys.readouterr().out
    damaged = bytearray(before["model_000020.pt"])
    damaged[len(damaged) // 2] ^= 1
    (left / "model_000020.pt").write_bytes(damaged)
    assert "checksum" in checkpoint.problem(left, 20)


def test_pretraining_refuses_instead_of_sweeping_it_away(left):
    before = contents(left)
    tiny = ["--depth=1", "--max_seq_len=64", "--total_batch_size=512", "--device_batch_size=8", "--num_steps=2", "--eval_tokens=500", "--device=cpu", "--compile=False", "--dtype=float32"]
    for name in ("shard_00000.parquet", "shard_01822.parquet"):
        write(left.parents[1] / "base_data", name, [f"Text number {i} of {name} says that {i} is followed by {i + 1}." for i in range(200)])
    refused = script(left.parents[1], "base_train.py", *tiny)
    assert refused.returncode == 2 and "holds a model made by nanochat" in refused.stderr, refused.stderr[-2000:]
    assert contents(left) == before
    anew = script(left.parents[1], "base_train.py", *tiny, "--start_over=True")
    assert anew.returncode == 0, anew.stderr[-2000:]
    assert contents(next(left.parent.glob("d1.old-*"))) == before


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("{")])
def test_a_lost_record_or_manifest_makes_it_no_less_nanochats(left, capsys, damage):
    checkpoint.find_model("base", "fineweb_edu", "d1")
    before = contents(left)
    damage(left / "phase.json")
    assert exit_code(phase.earlier, left, SimpleNamespace(defining={}, free={})) == 2 and "made by nanochat" in capsys.readouterr().err
    (left / "phase.json").unlink()
    (left / checkpoint.manifest_name(20)).unlink()  # as if killed between the two
    assert checkpoint.find_model("base", "fineweb_edu") == (left, 20) and contents(left) == before


def test_weights_of_another_shape_are_refused_with_the_reason(left, capsys):
    state = torch.load(left / "model_000020.pt", weights_only=True)
    name = next(iter(state))
    torch.save({**state, name: state[name][:1]}, left / "model_000020.pt")
    assert exit_code(checkpoint.find_model, "base", "fineweb_edu", "d1") == 2 and "cannot adopt" in capsys.readouterr().err
    assert phase.earlier(left, SimpleNamespace(defining={}, free={}), start_over=True) == {}, "put aside without a look"


def test_midtraining_goes_on_from_it(left, tmp_path):
    conversation = json.dumps({"messages": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]})
    (tmp_path / "mine.jsonl").write_text("\n".join([conversation] * 60) + "\n")
    done = script(left.parents[1], "mid_train.py", f"--mixture={tmp_path}/mine.jsonl", f"--held_out={tmp_path}/mine.jsonl", "--total_batch_size=256", "--device_batch_size=4",
                  "--max_steps=2", "--eval_tokens=200", "--device=cpu", "--compile=False", "--dtype=float32")
    assert done.returncode == 0, done.stderr[-2000:]
    meta = json.loads((common.stage_dir("mid", "fineweb_edu", "d1") / "meta_000002.json").read_text())
    assert meta["model"]["arch"] == "nanochat_2025"


def test_chat_adopts_it_but_not_what_was_put_aside(left):
    aside = left.rename(left.with_name("d1.old-20260101-000000"))
    out = script(aside.parents[1], "chat_cli.py")
    assert out.returncode == 2 and "there is no trained model" in out.stderr and not (aside / "phase.json").exists()
    aside.rename(left)
    out = script(left.parents[1], "chat_cli.py", "-p", "hello", "--max_new_tokens=2")
    assert out.returncode == 0 and "adopted" in out.stdout and (left / "phase.json").exists(), out.stdout + out.stderr


def test_what_is_no_such_model_is_refused_and_left_alone(left, capsys):
    for step in (10, 20):
        (left / f"model_{step:06d}.pt").write_bytes(b"not a model")
    assert exit_code(checkpoint.find_model, "base", "fineweb_edu", "d1") == 2 and "cannot adopt" in capsys.readouterr().err
    assert not (left / "phase.json").exists() and contents(left)["model_000020.pt"] == b"not a model"


@needs_nanochat
def test_one_that_nanochat_made_itself(state):
    folder = state / "base_checkpoints/d4"
    folder.mkdir(parents=True)
    for name in ("model_000400.pt", "meta_000400.json"):
        (folder / name).write_bytes((SHARED / "nanochat_checkpoint/base_checkpoints/d4" / name).read_bytes())
    (state / "tokenizer").mkdir()
    (state / "tokenizer/tokenizer.pkl").write_bytes((SHARED / "nanochat_checkpoint/tokenizer/tokenizer.pkl").read_bytes())
    model, tokenizer, meta = checkpoint.load_model("base", "fineweb_edu", "d4", "cpu", torch.float32)
    assert meta["step"] == 400 and tokenizer.vocab_size == 4096 == model.config.vocab_size
