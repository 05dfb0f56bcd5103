"""export.py: what transformers makes of the folder is our model, token by token."""
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import export
import gpt
import pipeline
import tokenizer as tok
from conftest import (
    REPO,
    environment,
    exit_code,
    nanochats_own,
    needs_nanochat,
    save_model,
    script,
)

MERGES = [b"th", b"he", b"the", b" t", b" the", b"in", b"ing", b"\n\n", b"23", b"12"]
RANKS = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(MERGES)}
TEXTS = ["Hello there, it's the 12th of 1234567!\n\n\n\tthe thing  in\r\n  thing",
         "naïve 你好 🙂 <|bos <|user_end| x", "", " ", "def f(x):\n    return x ** 2  # the"]

def saved(tokenizer, model, stage="sft"):
    """Saves a model and its tokenizer in the state folder, as a phase that is done would."""
    directory = pipeline.tokenizer_dir("fineweb_edu")
    directory.mkdir(parents=True, exist_ok=True)
    tok.save_tokenizer(directory, tokenizer.ranks, tokenizer.pattern, tokenizer.special_tokens)
    return save_model(stage, "fineweb_edu", "d1", model, tokenizer)

def plain_model(vocab_size, arch="nanochat_2025"):
    """With more than one layer and head, fewer heads for keys, and weights that all matter."""
    model = gpt.GPT(gpt.GPTConfig(64, vocab_size, 2, 4, 2, 64, arch))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.3, generator=generator)
    return model.eval()

@pytest.fixture(params=["ours", pytest.param("nanochat's", marks=needs_nanochat)])
def exported(request, state, tmp_path):
    """-> (our tokenizer, our model, the folder it was exported to)"""
    if request.param == "ours":
        tokenizer = tok.Tokenizer(RANKS)
        model = plain_model(tokenizer.vocab_size)
    else:
        tokenizer, model = nanochats_own(tmp_path)
    saved(tokenizer, model)
    out = script(state, "export.py", f"--out={tmp_path / 'model'}")
    assert out.returncode == 0, out.stderr
    assert "in float32 logits differ by at most 0.0000" in out.stdout
    return tokenizer, model, tmp_path / "model"

def test_transformers_says_what_we_say(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer, model, folder = exported
    there = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(there).__name__ == "NanoChatForCausalLM" and there.dtype == torch.float32
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        assert their_tokenizer(text)["input_ids"] == ids, text
        assert their_tokenizer.decode(ids[1:]) == text

    # ours is rounded to bfloat16, as nanochat trains; theirs is not, where weights are float32
    half = torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
    angles = torch.arange(64)[:, None, None] * 10_000.0 ** -half
    rounded, model.rotary = model.rotary, torch.stack([angles.cos(), angles.sin()])
    ids = torch.tensor([[tokenizer.bos, *(tokenizer.encode(TEXTS[0]) * 9)][:32]])
    with torch.inference_mode():
        logits = model(ids)
        assert logits.std() > 0.5, "something to compare"
        torch.testing.assert_close(there(ids).logits, logits, atol=1e-4, rtol=0)
        theirs = there.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None)
        for _ in range(32):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
        assert theirs.tolist() == ids.tolist()
        model.rotary = rounded
        furthest = (there(ids).logits - model(ids)).abs().max()
    assert 0 < furthest < 0.5, "so much the rounding makes, and no more"

def test_the_chat_template_gives_our_tokens(exported):
    from transformers import AutoTokenizer
    tokenizer, _, folder = exported
    theirs = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "Hi, the 12!"}, {"role": "assistant", "content": "Hello."},
             {"role": "user", "content": "thing"}]
    for messages in (turns[:1], turns, [{"role": "system", "content": "Be kind."}, *turns]):
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == tokenizer.render_for_completion({"messages": messages})
    whole = theirs.apply_chat_template(turns[:2])["input_ids"]
    assert whole == tokenizer.render_conversation({"messages": turns[:2]})[0]
    assert theirs.eos_token == "<|assistant_end|>" and theirs.bos_token_id == tokenizer.bos
    for wrong in ([*turns, {"role": "system", "content": "Be kind."}],
                  [{"role": "tool", "content": "4"}]):
        with pytest.raises(Exception, match="user and assistant take turns"):
            theirs.apply_chat_template(wrong)

def test_a_token_is_split_as_it_was_merged():
    assert export.merge_of(b"the", RANKS) == (b"th", b"e")
    assert export.merge_of(b" the", RANKS) == (b" ", b"the")
    assert export.merge_of(b"ing", RANKS) == (b"in", b"g")
    assert export.printable_bytes()[32] == "\u0120" and export.printable_bytes()[97] == "a"
    assert len(set(export.printable_bytes().values())) == 256

def test_another_pattern_is_refused(state):
    tokenizer = tok.Tokenizer(RANKS, r"\p{L}++|\++")
    assert exit_code(export.plain_pattern, tokenizer.pattern) == 2
    saved(tokenizer, plain_model(tokenizer.vocab_size))
    out = script(state, "export.py")
    assert out.returncode == 2 and "by a pattern that is not ours" in out.stderr
    assert not (state / "export").exists()

def test_bfloat16_takes_half_the_size_and_says_what_it_costs(state, tmp_path):
    from safetensors.torch import load_file
    tokenizer = tok.Tokenizer(RANKS)
    model = plain_model(tokenizer.vocab_size)
    saved(tokenizer, model)
    for precision in ("float32", "bfloat16"):
        out = script(state, "export.py", f"--precision={precision}",
                     f"--out={tmp_path / precision}")
        assert out.returncode == 0, out.stderr
    assert re.search(r"in bfloat16 logits differ by at most 0\.(?!0000)", out.stdout)
    found = re.search(r"likeliest token is the same at (\d+) of (\d+) places", out.stdout)
    assert 32 < int(found[1]) <= int(found[2]) == 64
    sizes = [(tmp_path / p / "model.safetensors").stat().st_size for p in ("float32", "bfloat16")]
    assert 1.9 < sizes[0] / sizes[1] <= 2
    found = load_file(tmp_path / "bfloat16/model.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(found.pop(export.name_there(name)), p.bfloat16())
    assert not found

def test_a_modern_model_is_refused_before_anything_is_written(state):
    tokenizer = tok.Tokenizer(RANKS)
    saved(tokenizer, plain_model(tokenizer.vocab_size, "modern"))
    before = sorted(state.rglob("*"))
    out = script(state, "export.py")
    assert out.returncode == 2 and out.stderr.count("\n") == 1
    assert "arch=modern" in out.stderr and "--arch=nanochat_2025" in out.stderr
    assert sorted(state.rglob("*")) == before

def test_an_export_is_compared_with_its_model_and_never_lost(state):
    tokenizer = tok.Tokenizer(RANKS)
    saved(tokenizer, plain_model(tokenizer.vocab_size))
    folder = state / "export/sft_d1"
    report = ("# Report: fineweb_edu, {}\n\nin /home/me\n\n## Scores\n\n| a | b |\n\nNext: x\n\n"
              "| c |\n")
    (state / "report").mkdir()
    (state / "report/report.md").write_text(report.format("d2"))  # another run's
    out = script(state, "export.py", "--check=True")
    assert out.returncode == 2 and "export it first" in out.stderr
    assert not folder.exists()
    assert script(state, "export.py").returncode == 0
    assert "| a | b |" not in (folder / "README.md").read_text()
    for args in ((), ("--check=True",)):  # what is there already is not written again
        out = script(state, "export.py", *args)
        assert out.returncode == 0 and f"{folder} holds sft_d1, read back" in out.stdout
    assert os.listdir(folder.parent) == ["sft_d1"]
    (state / "report/report.md").write_text(report.format("d1"))
    flipped = bytearray((folder / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    for file, content in (("config.json", b""), ("model.safetensors", flipped)):
        (folder / file).write_bytes(content)
        out = script(state, "export.py", "--check=True")
        assert out.returncode == 1 and f"different are {file}\n" in out.stderr
        assert (folder / file).read_bytes() == content
        out = script(state, "export.py")
        assert out.returncode == 0 and "another export was there" in out.stdout, out.stderr
    kept = {path for path in folder.parent.iterdir() if path != folder}
    assert len(kept) == 2 and flipped in [(p / "model.safetensors").read_bytes() for p in kept]
    readme = (folder / "README.md").read_text()
    assert "| a | b |" in readme
    assert not any(word in readme for word in ("/home/me", "Next", "| c |"))

def test_what_is_no_export_stays_where_it_is(state, tmp_path):
    tokenizer = tok.Tokenizer(RANKS)
    saved(tokenizer, plain_model(tokenizer.vocab_size))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name in ("letters", "file", "."):
        out = script(state, "export.py", f"--out={tmp_path / name}")
        assert out.returncode == 2 and "holds no export" in out.stderr, out.stderr
    assert script(state, "export.py", "--out=.").returncode == 2
    assert sorted(tmp_path.rglob("*")) == before

def test_a_death_in_the_middle_leaves_no_half_export(state):
    tokenizer = tok.Tokenizer(RANKS)
    saved(tokenizer, plain_model(tokenizer.vocab_size))
    killed = ("import os, export; wrong = export.wrong_in; export.wrong_in = lambda there, *rest: "
              "os.kill(os.getpid(), 9) if there.suffix == '.part' else wrong(there, *rest); "
              "export.main()")
    process = subprocess.run([sys.executable, "-c", killed], cwd=REPO, env=environment(state),
                             check=False)
    assert process.returncode == -signal.SIGKILL
    assert os.listdir(state / "export") == [".sft_d1.part"], "it died before the renaming"
    assert script(state, "export.py").returncode == 0
    assert os.listdir(state / "export") == ["sft_d1"]
    assert json.loads((state / "export/sft_d1/config.json").read_text())["num_hidden_layers"] == 2

def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(export, "write_safetensors", full)
    with pytest.raises(OSError):
        export.write_folder(tmp_path / "part", {"config.json": {}}, {}, "")
    assert not (tmp_path / "part").exists()
