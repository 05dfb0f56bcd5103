"""gpt.py: gradients, the cache, generation with the tool, and nanochat's own checkpoint."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import gpt
import optim
from conftest import BYTES, SHARED, nanochats_own, needs_nanochat, script

torch.set_num_threads(1)
RATES = {"matrix_lr": 0.02, "embedding_lr": 0.2, "unembedding_lr": 0.004, "scalar_lr": 0.5}

def small(arch="modern", n_kv_head=2, seed=0):
    model = gpt.GPT(gpt.GPTConfig(64, BYTES.vocab_size, 3, 2, n_kv_head, 64, arch))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():  # no zero projections: every part has to matter
        if p.ndim == 2:
            p.data.normal_(0, 0.1, generator=generator)
    return model.eval()

def prompts():
    texts = ("hello there", "a", "something a good deal longer", "hello there")
    return [[BYTES.bos, *BYTES.encode(text)] for text in texts]

@pytest.mark.parametrize("arch,n_kv_head", [("modern", 2), ("modern", 1), ("nanochat_2025", 2)])
def test_cached_greedy_decoding_equals_uncached(arch, n_kv_head):
    model = small(arch, n_kv_head)
    answers = gpt.generate(model, BYTES, prompts(), 24, max_rows=3)
    for prompt, (tokens, forced) in zip(prompts(), answers):
        sequence = list(prompt)
        for _ in range(24):
            token = model(torch.tensor([sequence]))[0, -1].argmax().item()
            if token in (BYTES.bos, BYTES.special("<|assistant_end|>")):
                break
            sequence.append(token)
        assert tokens == sequence[len(prompt):] and not any(forced)

@torch.inference_mode()
def test_cached_logits_equal_uncached_with_several_tokens_at_once():
    model = small()
    idx = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    whole = model(idx)
    cache = gpt.KVCache(model.config, 2, 20, "cpu", torch.float32)
    parts = [model(idx[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)

@torch.inference_mode()
def test_padding_a_prompt_changes_nothing():
    model = small()
    together = gpt.prefill(model, prompts(), 40)[1]
    alone = torch.cat([gpt.prefill(model, [p], 40)[1] for p in prompts()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)

def test_a_sample_depends_on_its_own_numbers_alone():
    model, uniforms = small(), np.random.default_rng(0).random((4, 12))
    together = gpt.generate(model, BYTES, prompts(), 12, temperature=1.0, uniforms=uniforms)
    for i, prompt in enumerate(prompts()):
        own = uniforms[i:i + 1]
        alone = gpt.generate(model, BYTES, [prompt], 12, temperature=1.0, uniforms=own)
        assert together[i] == alone[0]
    assert together[0] != together[3], "the same prompt with other numbers must come out otherwise"

def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = gpt.sample(logits.expand(10_000, 4), 1.0, 0, uniforms)
    shares = torch.bincount(drawn, minlength=4) / 10_000
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=2e-4, rtol=0)
    drawn = gpt.sample(logits.expand(100, 4), 1.0, 2, uniforms[::100])
    assert set(drawn.tolist()) == {1, 2}, "top_k=2 leaves two"
    assert gpt.sample(logits, 0.0, 0, None).item() == 2

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

@pytest.mark.parametrize("top_k", [0, 5])
def test_draws_need_no_float64_on_apples_gpus(monkeypatch, top_k):
    """The GPU is imagined: its tensors have a device, a shape and a dtype, but no numbers."""
    real, drawn_on = gpt.sample, []
    def sample(*args):
        drawn_on.append(real(*args).device.type)
        return SimpleNamespace(tolist=lambda: [65, 66])
    monkeypatch.setattr(gpt, "sample", sample)
    monkeypatch.setattr(gpt, "prefill", lambda *a: (None, logits))
    monkeypatch.setattr(gpt, "decode_one_token", lambda *a: logits, raising=False)
    uniforms = np.random.default_rng(0).random((2, 3))
    with FakeTensorMode(), NoFloat64("mps"):
        logits = torch.empty(2, BYTES.vocab_size, device="mps")
        answers = gpt.generate(None, BYTES, prompts()[:2], 3, 1.0, top_k, uniforms)
    assert drawn_on == ["cpu"] * 3 and answers == [([65] * 3, [False] * 3), ([66] * 3, [False] * 3)]

def test_all_but_the_draws_does_without_float64():
    model = small()
    optimizer = optim.make_optimizer(model, RATES, 1.0, 0.1, torch.float32)
    idx = torch.arange(40).view(2, 20)
    with NoFloat64("cpu"):
        model.init_weights(1)
        model(idx, idx).backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        gpt.generate(model, BYTES, prompts(), 3)

def test_a_pass_prepares_places_and_mask_once_for_all_layers(monkeypatch):
    def aranges(layers):
        model = gpt.GPT(gpt.GPTConfig(64, BYTES.vocab_size, layers, 2, 2, 64))
        cache, _ = gpt.prefill(model, prompts(), 40)
        real, calls = torch.arange, []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "arange", lambda *a, **k: (calls.append(a), real(*a, **k))[1])
            model.hidden(torch.tensor([[65]] * 4), cache)
        return len(calls)
    assert 0 < aranges(1) == aranges(3) <= 3

def test_the_tool_speaks_and_is_marked(monkeypatch):
    model = small()
    script = [BYTES.special("<|python_start|>"), *BYTES.encode("2+3"),
              BYTES.special("<|python_end|>"), *BYTES.encode("????"),
              BYTES.special("<|assistant_end|>")]
    said = iter(script)
    monkeypatch.setattr(gpt, "sample", lambda *a: torch.tensor([next(said)]))
    answers = {"2+3": "5"}
    tokens, forced = gpt.generate(model, BYTES, [[BYTES.bos]], 40, calculate=answers.get)[0]
    output = [BYTES.special("<|output_start|>"), *BYTES.encode("5"),
              BYTES.special("<|output_end|>")]
    assert tokens == script[:5] + output + BYTES.encode("?")
    assert [t for t, f in zip(tokens, forced) if f] == output

def test_what_is_a_call_of_the_tool():
    names = ("python_start", "python_end", "output_start", "output_end")
    start, end, out, out_end = (BYTES.special(f"<|{name}|>") for name in names)
    a, b, c = BYTES.encode("abc")
    def reply(*tokens):
        return gpt.tool_reply(list(tokens), BYTES, {"a": "b", "": "c"}.get)
    assert reply(a, start, a, end) == [out, b, out_end]
    assert reply(start, b, start, a, end) == [out, b, out_end], "begun again"
    assert reply(start, end) == [out, c, out_end]
    assert reply(start, a) == reply(a, end) == [], "no end, no start"
    assert reply(start, a, end, b, end) == [], "ended before"
    assert reply(start, b, end) == [], "the tool has no answer"

def test_finished_rows_leave_the_batch(monkeypatch):
    model, sizes = small(), []
    hidden = model.hidden
    model.hidden = lambda idx, *a: (sizes.append(idx.shape[0]), hidden(idx, *a))[1]
    end, turn = BYTES.special("<|assistant_end|>"), iter(range(100))
    def every_second_ends(logits, *a):
        return torch.tensor([end if next(turn) % 2 else 65 for _ in logits])
    monkeypatch.setattr(gpt, "sample", every_second_ends)
    gpt.generate(model, BYTES, [[BYTES.bos, i] for i in range(8)], 10)
    assert sizes[:3] == [8, 4, 2]

def test_generation_that_is_told_to_end_computes_no_further():
    model, passes = small(), []
    hidden = model.hidden
    model.hidden = lambda *a: (passes.append(a), hidden(*a))[1]
    answers = gpt.generate(model, BYTES, prompts(), 10, max_rows=1,
                           keep_going=lambda: len(passes) < 3)
    assert len(passes) == 3 and [len(tokens) for tokens, _ in answers] == [3, 0, 0, 0]

def test_user_tokens_carry_no_gradient_and_an_all_masked_batch_gives_zero():
    model = small()
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "so."}]
    ids, mask = BYTES.render_conversation({"messages": messages})
    x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    masked = torch.where(torch.tensor([mask[1:]]) == 1, y, -1)
    losses = model(x, masked, reduction="none")
    assert ((losses > 0) == (torch.tensor([mask[1:]]) == 1)).all()
    losses.sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    changed = torch.where(masked == -1, torch.full_like(y, -1), y)
    changed_y = torch.where(masked == -1, (y + 1) % 256, y)  # other user targets, same mask
    model(x, torch.where(torch.tensor([mask[1:]]) == 1, changed_y, -1), reduction="sum").backward()
    assert torch.equal(model.lm_head.weight.grad, gradient) and torch.equal(changed, masked)
    for reduction in ("mean", "sum"):
        model.zero_grad()
        loss = model(x, torch.full_like(y, -1), reduction=reduction)
        loss.backward()
        assert loss.item() == 0.0
        assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())

def test_the_switch_turns_the_additions_off():
    plain = {n for n, _ in small("nanochat_2025").named_parameters()}
    modern = {n for n, _ in small().named_parameters()}
    added = {"ve_gate" if "ve_gate" in n else n.split(".")[0] for n in modern}
    assert added - {"transformer", "lm_head"} == {
        "resid_lambdas", "x0_lambdas", "smear_lambda", "smear_gate", "value_embeds", "ve_gate"}
    assert not any("lambda" in n or "ve_" in n or "smear" in n for n in plain)

def test_depth_gives_the_shape():
    deep = gpt.config_from_depth(20, 65536, 2048)
    assert (deep.n_embd, deep.n_head, deep.n_kv_head, deep.head_dim) == (1280, 10, 10, 128)
    assert [gpt.config_from_depth(depth, 512, 64).n_embd for depth in (1, 2, 3)] == [128, 128, 256]

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
    greedy = gpt.generate(model, tokenizer, [ids[0].tolist()], 32)[0][0]
    assert greedy == expected["greedy_ids"].reshape(-1).tolist()

def test_what_is_asked_for_comes_before_what_was_recorded(state):
    chosen = """
from compute import choose_compute
from ranks import Ranks
recorded = {"dtype": "float32", "threads": 2, "compile": "True"}
wanted = {"device": "cpu", "dtype": "auto", "threads": 0}
for compiled in ("auto", False):
    print(choose_compute(Ranks(0, 0, 1), {**wanted, "compile": compiled}, recorded))
"""
    out = script(state, "-c", chosen)
    assert out.stdout.splitlines() == ["cpu, float32, 2 threads, compile=True",
                                       "cpu, float32, 2 threads, compile=False"], out.stderr

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
        forward(rows[:, :-1], rows[:, 1:], reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]
first = train()
print([all(map(torch.equal, first, train())) for _ in range(5)])
"""

@pytest.mark.skipif(common.cores() < 2, reason="two threads need two cores to meet")
def test_compiled_and_on_two_threads_a_seed_gives_the_same_bits(state):
    out = script(state, "-c", f"RATES = {RATES}\n{TRAIN_TWICE}")
    assert out.stdout.strip() == str([True] * 5), out.stdout + out.stderr
