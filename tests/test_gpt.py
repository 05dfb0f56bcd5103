"""gpt.py: gradients, the shape, and a checkpoint that nanochat made."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import compute
import engine
import gpt
import optim
from conftest import BYTES, RATES, REPO, SHARED, nanochats_own, needs_nanochat, script

torch.set_num_threads(1)

def small(arch="modern", n_kv_head=2, seed=0):
    modern = arch == "modern"
    model = gpt.GPT(gpt.GPTConfig(64, BYTES.vocab_size, 3, 2, n_kv_head, 64, arch,
                                  key_offset=modern, bigram_vocab_size=100 * modern))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():  # no zero projections: every part has to matter
        if p.ndim == 2:
            p.data.normal_(0, 0.1, generator=generator)
    return model.eval()

def prompts():
    texts = ("hello there", "a", "something a good deal longer", "hello there")
    return [[BYTES.bos, *BYTES.encode(text)] for text in texts]

class NoFloat64(TorchDispatchMode):
    """Fails where an operation makes a float64 tensor on a device of this type."""
    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.device.type == self.device:
                assert made.dtype != torch.float64, f"{func} makes float64 on {self.device}"
        return result

def test_all_but_the_draws_does_without_float64():
    model = small()
    optimizer = optim.make_optimizer(model, RATES, 1.0, 0.1, torch.float32)
    idx = torch.arange(40).view(2, 20)
    with NoFloat64("cpu"):
        model.init_weights(1)
        model(idx, idx).backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        engine.generate(model, BYTES, prompts(), 3)

def test_user_tokens_carry_no_gradient_and_an_all_masked_batch_gives_zero():
    model = small()
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "so."}]
    ids, mask = BYTES.render_conversation({"messages": messages})
    x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    masked = torch.where(torch.tensor([mask[1:]]) == 1, y, -1)
    assert ((model.nats(x, masked) > 0) == (torch.tensor([mask[1:]]) == 1)).all()
    model(x, masked).backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    changed = torch.where(masked == -1, torch.full_like(y, -1), y)
    changed_y = torch.where(masked == -1, (y + 1) % 256, y)  # other user targets, same mask
    model(x, torch.where(torch.tensor([mask[1:]]) == 1, changed_y, -1)).backward()
    assert torch.equal(model.lm_head.weight.grad, gradient) and torch.equal(changed, masked)
    model.zero_grad()
    loss = model(x, torch.full_like(y, -1))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())

def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

def test_loss_and_gradients_by_chunks_are_those_of_all_logits(monkeypatch):
    model = small()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(BYTES.vocab_size, (2, 3, 50), generator=generator)
    y[0, :7] = -1
    weights = torch.randn(y.shape, generator=generator)
    losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1,
                             reduction="none").view(y.shape)
    whole = gradients(model, (losses * weights).sum())
    for chunk in (2048, 64):  # 64 does not divide the 150 tokens
        monkeypatch.setattr(gpt, "CHUNK", chunk)
        loss = model(x, y, weights)
        torch.testing.assert_close(loss, (losses * weights).sum())
        torch.testing.assert_close(gradients(model, 0.5 * loss), 0.5 * whole)
        torch.testing.assert_close(model.nats(x, y), losses)

class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *made])
        return result

def test_chunks_are_few_enough_to_compile():
    assert [gpt.chunk_of(tokens) for tokens in (64, 32 * 1024, 64 * 1024)] == [2048, 2048, 4096]

def test_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(gpt, "CHUNK", 64)
    model = small()
    x = torch.zeros(8, 64, dtype=torch.long)
    with Largest() as largest:
        model(x, x).backward()
        model.nats(x, x)
    most_else = 8 * 64 * 4 * model.config.n_embd  # of the MLP
    assert largest.numel == most_else < 8 * 64 * BYTES.vocab_size

def test_the_switch_turns_the_additions_off():
    plain = {n for n, _ in small("nanochat_2025").named_parameters()}
    modern = {n for n, _ in small().named_parameters()}
    added = {"ve_gate" if "ve_gate" in n else n.split(".")[0] for n in modern}
    assert added - {"transformer", "lm_head"} == {
        "resid_lambdas", "x0_lambdas", "smear_lambda", "smear_gate", "value_embeds", "ve_gate",
        "bigram_embeds"}
    assert not any(word in n for n in plain for word in ("lambda", "ve_", "smear", "embeds"))
    config = gpt.config_from_depth(20, 512, 64, "nanochat_2025", key_offset=True,
                                   bigram_vocab_size=100)
    assert not config.key_offset and not config.bigram_vocab_size

def test_half_the_channels_of_a_key_are_of_the_token_before():
    keys = torch.arange(1, 9) + 10.0 * torch.arange(1, 4).view(1, 1, 3, 1)  # of three tokens
    first, second, third = gpt.offset_keys(keys)[0, 0].tolist()
    assert first == [11, 12, 0, 0, 15, 16, 0, 0]
    assert second == [21, 22, 13, 14, 25, 26, 17, 18]
    assert third == [31, 32, 23, 24, 35, 36, 27, 28]
    assert gpt.config_from_depth(20, 512, 64).key_offset

def test_a_model_saved_before_there_was_a_setting_is_without_what_it_turns_on():
    added = ("key_offset", "bigram_vocab_size")
    old = {name: value for name, value in vars(small().config).items() if name not in added}
    assert not any(getattr(gpt.GPTConfig(**old), name) for name in added)

def test_a_pair_of_tokens_has_an_embedding_of_its_own():
    """Only what stands behind the pair 5, 9 changes with its embedding."""
    model = small()
    model.bigram_embeds = torch.nn.Embedding(model.config.bigram_vocab_size, 64)
    model.bigram_embeds.weight.data.zero_()
    tokens = [3, 9, 5, 7, 5, 9, 2]
    pairs = list(zip([3, *tokens], tokens))  # nothing stands before the first but itself
    rows = [(9 * 36313 ^ 5 * 27191) % 100 == (b * 36313 ^ a * 27191) % 100 for a, b in pairs]
    assert rows == [False] * 5 + [True, False]
    without = model(torch.tensor([tokens]))[0]
    model.bigram_embeds.weight.data[(9 * 36313 ^ 5 * 27191) % 100] = 1.0
    same = (model(torch.tensor([tokens]))[0] == without).all(dim=-1).tolist()
    assert same == [True] * 5 + [False] * 2

def test_depth_gives_the_shape():
    deep = gpt.config_from_depth(20, 65536, 2048)
    assert (deep.n_embd, deep.n_head, deep.n_kv_head, deep.head_dim) == (1280, 10, 10, 128)
    assert [gpt.config_from_depth(depth, 512, 64).n_embd for depth in (1, 2, 3)] == [128, 128, 256]
    wide = [gpt.config_from_depth(2, 512, 64, aspect_ratio=ratio) for ratio in (1, 128, 129)]
    assert [(config.n_embd, config.n_head) for config in wide] == [(128, 1), (256, 2), (384, 3)]

def test_flops_by_hand():
    model = gpt.GPT(gpt.GPTConfig(32, 100, 1, 1, 1, 128, "nanochat_2025"))
    assert model.flops_per_token() == 6 * (12 * 128 * 128 + 100 * 128) + 12 * 128 * 32

@needs_nanochat
def test_a_checkpoint_made_by_nanochat_gives_its_numbers(tmp_path):
    tokenizer, model = nanochats_own(tmp_path)
    expected = np.load(SHARED / "nanochat_checkpoint/expected.npz")
    ids = expected["prompt_ids"].reshape(1, -1)
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids.astype(np.int64)))[0].numpy()
    np.testing.assert_allclose(logits, expected["logits"].reshape(logits.shape), atol=2e-3)
    greedy = engine.generate(model, tokenizer, [ids[0].tolist()], 32)[0][0]
    assert greedy == expected["greedy_ids"].reshape(-1).tolist()

def test_what_is_asked_for_comes_before_what_was_recorded(state):
    """And the compiler, which takes as long to import as torch, is imported where it is used."""
    chosen = """
import sys, torch
from compute import choose_compute
from ranks import Ranks
recorded = {"dtype": "float32", "threads": 2, "compile": "True"}
wanted = {"device": "cpu", "dtype": "auto", "threads": 0}
for compiled in (False, "auto"):
    print(choose_compute(Ranks(0, 0, 1), {**wanted, "compile": compiled}, recorded))
    print("torch._dynamo" in sys.modules, torch.are_deterministic_algorithms_enabled())
for ranks in (1, 4):
    recorded.update(threads=99, local_world_size=ranks)
    print(choose_compute(Ranks(0, 0, 1), wanted, recorded).threads)
"""
    out = script(state, "-c", chosen)
    assert out.stdout.splitlines() == [
        "cpu, float32, 2 threads, compile=False", "False True",
        "cpu, float32, 2 threads, compile=True", "True True",
        "99", str(common.cores())], out.stderr  # four ranks had other shares of the cores

# A model without blocks compiles in seconds, and a small vocabulary makes the threads meet: without
# choose_compute's care five runs of five differ.
TRAIN_TWICE = """
import torch, gpt, optim
from compute import choose_compute
from ranks import Ranks
wanted = {"device": "cpu", "dtype": "float32", "threads": 2, "compile": True}
assert choose_compute(Ranks(0, 0, 1), wanted).compile
model = gpt.GPT(gpt.GPTConfig(128, 16, 0, 1, 1, 64))
forward = torch.compile(model, dynamic=False)
rows = torch.randint(16, (16, 129), generator=torch.Generator().manual_seed(1))
def train():
    model.init_weights(0)
    optimizer = optim.make_optimizer(model, RATES, 1.0, 0.0, torch.float32)
    for _ in range(5):
        forward(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]
first = train()
print([all(map(torch.equal, first, train())) for _ in range(5)])
"""

def test_compiled_and_on_two_threads_a_seed_gives_the_same_bits(state, all_cores):
    out = script(state, "-c", f"RATES = {RATES}\n{TRAIN_TWICE}")
    assert out.stdout.strip() == str([True] * 5), out.stdout + out.stderr

ON_ONE_CPU = """
import os, torch
from compute import choose_compute
from ranks import Ranks
wanted = {"device": "cpu", "dtype": "float32", "threads": 1, "compile": True}
for _ in range(2):  # the second time it stays where it is
    choose_compute(Ranks(0, 0, 1), wanted)
def double(x):
    return (2 * x).sin()
x = torch.arange(1000.0)
print(torch.allclose(torch.compile(double)(x), double(x)), torch.backends.cpu.get_cpu_capability())
"""

@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_f") or bool(compute.lacks("cpu")),
                    reason="needs a CPU with AVX512, which can do as one with AVX2, and a compiler")
def test_what_one_cpu_has_compiled_is_not_run_on_another_kind(state, tmp_path):
    """On a shared disk, in an image: the compiler does not ask which CPU it was made for."""
    shared = str(tmp_path / "compiled")
    for capability in ("AVX512", "AVX2"):
        env = {"TORCHINDUCTOR_CACHE_DIR": shared, "ATEN_CPU_CAPABILITY": capability.lower()}
        out = script(state, "-c", ON_ONE_CPU, env=env)
        assert out.stdout.split() == ["True", capability], out.stdout + out.stderr
    folders = os.listdir(shared)
    assert len(folders) == 2 and all(name.startswith("cpu-") for name in folders)

LOSS_IN_A_PROCESS = """
import sys, torch
import gpt
from compute import choose_compute
from ranks import Ranks
choose_compute(Ranks(0, 0, 1), {"device": "cpu", "dtype": "float32", "threads": 1, "compile": True})
from torch._dynamo.utils import counters
h, weight = (torch.arange(n * 8.0).view(n, 8).sin().requires_grad_() for n in (4, 6))
def loss(h, weight):
    return gpt.SummedLoss.apply(h, weight, torch.arange(4), torch.ones(4))
(plain,) = torch.autograd.grad(loss(h, weight), h)
(compiled,) = torch.autograd.grad(torch.compile(loss)(h, weight), h)
print(torch.allclose(plain, compiled, rtol=1e-5), plain.abs().sum().item(),
      counters["aot_autograd"]["autograd_cache_hit"])
"""

@pytest.mark.skipif(bool(compute.lacks("cpu")), reason="needs a compiler")
def test_what_was_compiled_is_taken_again_but_not_for_a_loss_that_was_edited(state, tmp_path):
    """torch keeps passes with an autograd.Function only where it is told to."""
    edits = [("", ""), ("", ""), ("return grad_h * grad,", "return 2 * grad_h * grad,")]
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled"),
           "PYTHONPATH": f"{tmp_path}:{REPO}"}
    source = (REPO / "gpt.py").read_text("utf-8")
    found = []
    for before, after in edits:
        assert before in source
        (tmp_path / "gpt.py").write_text(source.replace(before, after, 1), "utf-8")
        out = script(state, "-P", "-c", LOSS_IN_A_PROCESS, env=env)
        right, size, hits = out.stdout.split() or [out.stderr, 0, 0]
        assert right == "True"
        found.append((float(size), int(hits)))
    (first, cold), (again, warm), (doubled, edited) = found
    assert (cold, warm, edited) == (0, 1, 0) and again == first
    assert doubled == pytest.approx(2 * first)

def test_a_machine_that_cannot_compile_goes_on_with_a_run_that_was_compiled(state, tmp_path):
    """And does not begin one so: a compiler without Python's headers is of no use."""
    ask = f"""
import os, sysconfig, compute
from ranks import Ranks
sysconfig.get_path = lambda name: {str(tmp_path)!r}
wanted = {{"device": "cpu", "dtype": "float32", "threads": 1, "compile": "auto"}}
for recorded in (None, {{"compile": "True"}}):
    print(compute.choose_compute(Ranks(0, 0, 1), wanted, recorded).compile)
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""
    for command in ("g++", "openssl", "Python.h"):  # stand-ins: they are only looked for
        (tmp_path / command).touch(0o755)
    env = {"PATH": str(tmp_path), "TMPDIR": str(tmp_path), "CXX": "g++",
           "TORCHINDUCTOR_CACHE_DIR": ""}
    *said, folder = script(state, "-c", ask, env=env).stdout.splitlines()
    assert said == ["True", "True"] and folder.startswith(f"{tmp_path}/torchinductor_")
    for command in ("Python.h", "openssl", "g++"):
        (tmp_path / command).unlink()
        first, no, then, warning, no_more, _ = script(state, "-c", ask, env=env).stdout.splitlines()
        assert no == no_more == "False" and first == then and command in first
        assert warning.startswith("warning: so far they were")
