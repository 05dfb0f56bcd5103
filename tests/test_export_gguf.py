"""export_gguf.py: what the official gguf package reads from the file is our model; llama.cpp,
where it is there (pip install llama-cpp-python, which compiles for minutes), says what we say."""
import os

import gguf
import numpy as np
import pytest
import torch

import engine
import export_gguf
import gpt
import tokenizer as tok
from conftest import script
from test_export import RANKS, plain_model, saved

SINGLE = tok.Tokenizer({token: rank for token, rank in (
    (token, i) for i, token in enumerate(token for token in RANKS if not token.isdigit()
                                         or len(token) == 1))}, tok.pattern_of(1))

@pytest.fixture
def model():
    return plain_model(SINGLE.vocab_size)

def exported(state, tmp_path, model, quant):
    saved(SINGLE, model)
    out = script(state, "export_gguf.py", f"--out={tmp_path / 'x.gguf'}",
                 f"--quant={quant}")
    assert out.returncode == 0, out.stderr
    return tmp_path / "x.gguf"

@pytest.mark.parametrize(("quant", "furthest"), [
    ("f32", 0.0), ("bf16", 2 ** -8), ("q8_0", 1 / 127)])
def test_the_official_reader_finds_our_model(state, tmp_path, model, quant, furthest):
    reader = gguf.GGUFReader(exported(state, tmp_path, model, quant))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "apertus" and fields["apertus.block_count"] == 2
    assert fields["apertus.attention.head_count"] == 4
    assert fields["apertus.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.tokens"][SINGLE.bos] == "<|bos|>"
    assert fields["tokenizer.ggml.token_type"][SINGLE.bos] == 3
    assert fields["tokenizer.ggml.merges"][0] == "t h" and fields["tokenizer.ggml.pre"] == "qwen2"
    softplus = np.log1p(np.exp(fields["xielu.alpha_p"]))
    assert softplus == pytest.approx(1.0, abs=1e-7), "so that x^2 * alpha_p is squared ReLU"
    wanted = export_gguf.tensors_of(model, quant)
    assert {tensor.name for tensor in reader.tensors} == wanted.keys()
    for tensor in reader.tensors:
        ours, kind = wanted[tensor.name]
        read = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(ours.shape)
        limit = furthest if kind != "f32" else 0.0
        far = np.abs(read - ours.numpy()).max()
        assert far <= limit * ours.abs().max(), (tensor.name, far)

def test_the_turn_of_queries_and_keys_is_the_other_way_round():
    """llama.cpp turns the pair (a, b) by (a cos - b sin, b cos + a sin), gpt.rotate by the other
    angle: with the halves swapped they give the same products of queries and keys."""
    torch.manual_seed(0)
    angles = torch.outer(torch.arange(64), 10_000.0 ** -(torch.arange(8) / 8))
    cos, sin = angles.cos(), angles.sin()
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    ours = gpt.rotate((x @ weight.T).view(1, 64, 4, 16), cos[None, :, None], sin[None, :, None])
    a, b = (x @ export_gguf.turned(weight, 4).T).view(64, 4, 16).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    theirs = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    own, other = (torch.einsum("thd,shd->hts", y, y) for y in (ours[0], theirs))
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)

def test_what_has_no_place_there_is_refused(state, tmp_path):
    saved(tok.Tokenizer(RANKS), plain_model(tok.Tokenizer(RANKS).vocab_size))
    out = script(state, "export_gguf.py")
    assert out.returncode == 2 and "tok_train.py --digits=1" in out.stderr
    assert out.stderr.count("\n") == 1 and not list(state.rglob("*.gguf"))
    out = script(state, "export_gguf.py", "--quant=f16")
    assert out.returncode == 2 and "--quant must be one of q8_0, bf16, f32" in out.stderr

def test_a_file_is_checked_and_never_lost(state, tmp_path, model):
    path = exported(state, tmp_path, model, "q8_0")
    whole = path.read_bytes()
    check = ["export_gguf.py", f"--out={path}", "--check=True"]
    assert script(state, *check).returncode == 0
    path.write_bytes(whole[:-5] + b"12345")
    out = script(state, *check)
    assert out.returncode == 1 and "is not what this model is exported to" in out.stderr
    out = script(state, *check[:2])
    assert out.returncode == 0 and path.read_bytes() == whole
    kept, = tmp_path.glob("x.gguf.old-*")
    assert f"the file that was there is kept in {kept}" in out.stdout
    assert kept.read_bytes() == whole[:-5] + b"12345"
    path.write_bytes(b"an older one")
    full = ("import common, errno, runpy\ndef full(*args): raise OSError(errno.ENOSPC, 'full')\n"
            "common.atomic_write = full\n"
            "runpy.run_path('export_gguf.py', run_name='__main__')")
    out = script(state, "-c", full, check[1])
    assert out.returncode == 1 and "full" in out.stderr
    assert path.read_bytes() == b"an older one", "under its own name until another is whole"
    (tmp_path / "notes.txt").write_text("mine")
    out = script(state, "export_gguf.py", f"--out={tmp_path / 'notes.txt'}")
    assert out.returncode == 2 and (tmp_path / "notes.txt").read_text() == "mine"

@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_llama_cpp_says_what_we_say(state, tmp_path, model, quant):
    try:
        import llama_cpp
    except ImportError:
        assert "LLAMA_REQUIRED" not in os.environ, "tests/llama.sh compiles it"
        pytest.skip("no llama.cpp here: tests/llama.sh compiles it")
    path = exported(state, tmp_path, model, quant)
    theirs = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False, logits_all=True)
    text = "Hello there, it's the 12th of 1234567!\n\n\n\tthe thing  in"
    ids = theirs.tokenize(text.encode(), add_bos=True, special=False)
    assert ids == [SINGLE.bos, *SINGLE.encode(text)]
    if quant == "f32":
        own, = engine.generate(model, SINGLE, [ids[:40]], 64)
        theirs.reset()
        greedy = []
        for token in theirs.generate(ids[:40], temp=0.0):
            greedy.append(token)
            if len(greedy) == len(own[0]):
                break
        assert greedy == own[0]
    theirs.reset()
    theirs.eval(ids)
    with torch.inference_mode():
        own = model(torch.tensor([ids]))[0].double().numpy()
    logits = np.array(theirs.scores[:len(ids), :own.shape[1]], np.float64)
    logits = gpt.SOFTCAP * np.tanh(logits / gpt.SOFTCAP)  # which stays behind
    off = np.linalg.norm(logits - own) / np.linalg.norm(own)
    # measured 0.1 %, since it keeps keys and values in float16, and 2.2 %: 8 bits of all factors
    assert off < {"f32": 0.002, "q8_0": 0.03}[quant], off
