"""gpt.py: gradients, the cache, generation with the tool, and nanochat's own checkpoint."""
import numpy as np
import pytest
import torch

import gpt
from conftest import BYTES, SHARED, nanochats_own, needs_nanochat

torch.set_num_threads(1)

def small(arch="modern", n_kv_head=2, seed=0):
    model = gpt.GPT(gpt.GPTConfig(64, BYTES.vocab_size, 3, 2, n_kv_head, 64, arch))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():  # no zero projections: every part has to matter
        if p.ndim == 2:
            p.data.normal_(0, 0.1, generator=generator)
    return model.eval()

def prompts():
    return [[BYTES.bos, *BYTES.encode(t)] for t in ("hello there", "a", "something a good deal longer", "hello there")]

@pytest.mark.parametrize("arch,n_kv_head", [("modern", 2), ("modern", 1), ("nanochat_2025", 2)])
def test_cached_greedy_decoding_equals_uncached(arch, n_kv_head):
    model = small(arch, n_kv_head)
    for prompt, (tokens, forced) in zip(prompts(), gpt.generate(model, BYTES, prompts(), 24, max_rows=3)):
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
    alone = [gpt.generate(model, BYTES, [p], 12, temperature=1.0, uniforms=uniforms[i:i + 1])[0] for i, p in enumerate(prompts())]
    assert together == alone
    assert together[0] != together[3], "the same prompt with other numbers must come out otherwise"

def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = gpt.sample(logits.expand(10_000, 4), 1.0, 0, uniforms)
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 10_000, logits[0].softmax(0), atol=2e-4, rtol=0)
    assert set(gpt.sample(logits.expand(100, 4), 1.0, 2, uniforms[::100]).tolist()) == {1, 2}, "top_k=2 leaves two"
    assert gpt.sample(logits, 0.0, 0, None).item() == 2

def test_the_tool_speaks_and_is_marked(monkeypatch):
    model = small()
    script = [BYTES.special("<|python_start|>"), *BYTES.encode("2+3"), BYTES.special("<|python_end|>"),
              *BYTES.encode("????"), BYTES.special("<|assistant_end|>")]
    said = iter(script)
    monkeypatch.setattr(gpt, "sample", lambda *a: torch.tensor([next(said)]))
    tokens, forced = gpt.generate(model, BYTES, [[BYTES.bos]], 40, calculate=lambda text: {"2+3": "5"}[text])[0]
    output = [BYTES.special("<|output_start|>"), *BYTES.encode("5"), BYTES.special("<|output_end|>")]
    assert tokens == script[:5] + output + BYTES.encode("?")
    assert [t for t, f in zip(tokens, forced) if f] == output

def test_finished_rows_leave_the_batch(monkeypatch):
    model, sizes = small(), []
    hidden = model.hidden
    model.hidden = lambda idx, *a: (sizes.append(idx.shape[0]), hidden(idx, *a))[1]
    end, turn = BYTES.special("<|assistant_end|>"), iter(range(100))
    monkeypatch.setattr(gpt, "sample", lambda logits, *a: torch.tensor([end if next(turn) % 2 else 65 for _ in range(logits.shape[0])]))
    gpt.generate(model, BYTES, [[BYTES.bos, i] for i in range(8)], 10)
    assert sizes[:3] == [8, 4, 2]

def test_user_tokens_carry_no_gradient_and_an_all_masked_batch_gives_zero():
    model = small()
    ids, mask = BYTES.render_conversation({"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "so."}]})
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
        assert loss.item() == 0.0 and all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())

def test_the_switch_turns_the_additions_off():
    plain = {n for n, _ in small("nanochat_2025").named_parameters()}
    added = {n.split(".")[0] if "ve_gate" not in n else "ve_gate" for n, _ in small().named_parameters()} - {"transformer", "lm_head"}
    assert added == {"resid_lambdas", "x0_lambdas", "smear_lambda", "smear_gate", "value_embeds", "ve_gate"} and not any("lambda" in n or "ve_" in n or "smear" in n for n in plain)
    assert gpt.config_from_depth(20, 65536, 2048).n_embd == 1280 and gpt.config_from_depth(20, 65536, 2048).n_head == 10

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
