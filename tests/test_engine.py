"""engine.py: a pass of one token a row against the model, the cache, draws, the tool, and rows that
come and go."""
import gzip
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import engine
import models
from conftest import BYTES, SHARED, nanochats_own, needs_nanochat, save_model
from test_gpt import NoFloat64, prompts, small

torch.set_num_threads(1)

@pytest.mark.parametrize("arch,n_kv_head", [("modern", 2), ("modern", 1), ("nanochat_2025", 2)])
def test_cached_greedy_decoding_equals_uncached(arch, n_kv_head):
    model = small(arch, n_kv_head)
    answers = engine.generate(model, BYTES, prompts(), 24, max_rows=3)
    for prompt, (tokens, forced) in zip(prompts(), answers):
        sequence = list(prompt)
        for _ in range(24):
            token = model(torch.tensor([sequence]))[0, -1].argmax().item()
            if token in (BYTES.bos, BYTES.special("<|assistant_end|>")):
                break
            sequence.append(token)
        assert tokens == sequence[len(prompt):] and not any(forced)

@torch.inference_mode()
@pytest.mark.parametrize("arch,n_kv_head", [("modern", 2), ("modern", 1), ("nanochat_2025", 2)])
def test_a_pass_of_one_token_a_row_computes_what_the_model_does(arch, n_kv_head):
    model = small(arch, n_kv_head)
    decoder = engine.Decoder(model, 4, 60)
    rows = prompts()  # in slots, as the decoder's
    generator = torch.Generator().manual_seed(2)
    def step():
        tokens = torch.randint(256, (len(rows),), generator=generator).tolist()
        for row, token in zip(rows, tokens):
            row.append(token)
        after = [model(torch.tensor([row]))[0, -1] for row in rows]
        torch.testing.assert_close(decoder.step(tokens), torch.stack(after), atol=2e-5, rtol=0)
    def remove(slot):
        decoder.remove(slot)
        rows[slot] = rows[-1]
        rows.pop()
    logits = decoder.add(rows)
    torch.testing.assert_close(logits, torch.cat([model(torch.tensor([r]))[:, -1] for r in rows]),
                               atol=2e-5, rtol=0)
    step()
    step()
    remove(0)
    step()
    remove(2)  # the last
    step()
    again = prompts()[3]  # as one that was there before
    decoder.add([again])
    rows.append(again)
    step()
    remove(1)
    remove(1)
    step()  # a single row, longer than the model's own sequence in the end
    for _ in range(20):
        step()

def test_answers_do_not_depend_on_how_many_grow_at_once():
    model, uniforms = small(), np.random.default_rng(0).random((8, 12))
    asked = [*prompts(), *prompts()[::-1]]
    for more in ({}, {"temperature": 1.0, "uniforms": uniforms},
                 {"temperature": 0.8, "top_k": 5, "uniforms": uniforms}):
        one, three, all_ = (engine.generate(model, BYTES, asked, 12, max_rows=rows, **more)
                            for rows in (1, 3, 8))
        assert one == three == all_

@torch.inference_mode()
@pytest.mark.parametrize("dtype,weights,amx,most", [
    (torch.bfloat16, "auto", False, 0.03), (torch.bfloat16, "auto", True, 0.03),
    (torch.float16, "auto", False, 0.004), (torch.float32, "int8", False, 0.06)])
def test_packed_weights_stay_near_the_models(monkeypatch, dtype, weights, amx, most):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    real, calls = torch.mv, []
    monkeypatch.setattr(torch, "mv", lambda *args: (calls.append(1), real(*args))[1])
    model = small()
    prompt = prompts()[2]
    whole = model(torch.tensor([prompt]))[0, 1:]
    model.dtype = dtype
    for rows in (1, 8):
        decoder = engine.Decoder(model, rows, 60, engine.Packed(model, rows, weights))
        decoder.add([prompt[:1]] * rows)
        logits = torch.stack([decoder.step([token] * rows) for token in prompt[1:]], dim=1)
        error = (logits - whole).norm() / (whole.norm() * rows ** 0.5)
        assert 0.1 * most < error < most
        again = engine.Decoder(model, rows, 60, engine.Packed(model, rows, weights))
        again.add([prompt[:1]] * rows)
        assert torch.equal(again.step([prompt[1]] * rows), logits[:, 0])
        assert bool(calls) == (amx and rows == 1)
        calls.clear()

@torch.inference_mode()
def test_a_model_to_use_keeps_its_weights_in_its_dtype_and_computes_the_same_bits(state):
    model = small()
    folder = save_model("sft", "toy", "d3", model, BYTES)
    to_use = models.load_to_use(folder, 7, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in to_use.parameters()} == {torch.bfloat16}
    to_train = models.load_model(folder, 7, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in to_train.parameters()} == {torch.float32}
    idx = torch.tensor([prompts()[2]])
    assert torch.equal(to_use(idx), to_train(idx))

def test_generating_leaves_nothing_in_the_model_that_training_cannot_use():
    model = small()
    before = {name: id(t) for name, t in model.named_buffers()}
    engine.generate(model, BYTES, prompts(), model.config.sequence_len + 10)
    assert {name: id(t) for name, t in model.named_buffers()} == before
    assert not any(t.is_inference() for t in model.buffers())

@needs_nanochat
@torch.inference_mode()
def test_int8_costs_less_than_five_thousandths_of_a_bit_per_byte(tmp_path):
    tokenizer, model = nanochats_own(tmp_path)
    rows, T, texts = 16, 64, []
    with gzip.open(SHARED / "corpus/corpus_07.jsonl.gz", "rt") as f:
        while len(texts) < rows:
            ids = tokenizer.encode(json.loads(next(f))["text"])
            if len(ids) >= T:
                texts.append(ids[:T])
    tokens = torch.tensor(texts)
    bits = math.log(2) * sum(len(tokenizer.decode_bytes(ids)) for ids in texts)
    def bits_per_byte(weights):
        decoder = engine.Decoder(model, rows, T + 1, engine.Packed(model, rows, weights))
        logits = [decoder.add([[tokenizer.bos]] * rows)]
        for column in tokens.T[:-1]:
            logits.append(decoder.step(column.tolist()))
        logits = torch.stack(logits, dim=1).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tokens.flatten(), reduction="sum") / bits
    whole, rounded = bits_per_byte("auto"), bits_per_byte("int8")
    assert 2.0 < whole < 2.4 and 0 < abs(rounded - whole) < 0.005, (whole, rounded)

def test_weights_that_change_between_two_calls_are_seen():
    model = small()
    before = engine.generate(model, BYTES, prompts(), 12)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(-1)
    changed = engine.generate(model, BYTES, prompts(), 12)
    assert changed != before

@torch.inference_mode()
def test_cached_logits_equal_uncached_with_several_tokens_at_once():
    model = small()
    idx = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    whole = model(idx)
    cache = engine.KVCache(model.config, 2, 20, "cpu", torch.float32)
    parts = [model.logits(model.hidden(idx[:, a:b], cache)) for a, b in ((0, 7), (7, 8), (8, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)

@torch.inference_mode()
def test_padding_a_prompt_changes_nothing():
    model = small()
    together = engine.prefill(model, prompts(), 40)[1]
    alone = torch.cat([engine.prefill(model, [p], 40)[1] for p in prompts()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)

def test_a_sample_depends_on_its_own_numbers_alone():
    model, uniforms = small(), np.random.default_rng(0).random((4, 12))
    together = engine.generate(model, BYTES, prompts(), 12, temperature=1.0, uniforms=uniforms)
    for i, prompt in enumerate(prompts()):
        own = uniforms[i:i + 1]
        alone = engine.generate(model, BYTES, [prompt], 12, temperature=1.0, uniforms=own)
        assert together[i] == alone[0]
    assert together[0] != together[3], "the same prompt with other numbers must come out otherwise"

def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = engine.sample(logits.expand(10_000, 4), 1.0, 0, uniforms)
    shares = torch.bincount(drawn, minlength=4) / 10_000
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=2e-4, rtol=0)
    drawn = engine.sample(logits.expand(100, 4), 1.0, 2, uniforms[::100])
    assert set(drawn.tolist()) == {1, 2}, "top_k=2 leaves two"
    assert engine.sample(logits, 0.0, 0, None).item() == 2

class Scripted:
    """In place of engine.Decoder: counts its passes, computes nothing."""
    logits = torch.zeros(1, BYTES.vocab_size)

    def __init__(self, *args):
        self.lengths, self.passes = [], []
        Scripted.last = self

    def add(self, prompts):
        self.passes.append(("add", len(prompts)))
        self.lengths += prompts
        return self.logits.expand(len(prompts), -1)

    def step(self, tokens):
        assert len(tokens) == len(self.lengths)
        self.passes.append(("step", len(tokens)))
        return self.logits.expand(len(tokens), -1)

    def remove(self, slot):
        self.lengths.pop()

@pytest.mark.parametrize("top_k", [0, 5])
def test_draws_need_no_float64_on_apples_gpus(monkeypatch, top_k):
    """The GPU is imagined: its tensors have a device, a shape and a dtype, but no numbers."""
    real, drawn_on = engine.sample, []
    def sample(*args):
        drawn_on.append(real(*args).device.type)
        return SimpleNamespace(tolist=lambda: [65, 66])
    monkeypatch.setattr(engine, "sample", sample)
    monkeypatch.setattr(engine, "Decoder", Scripted)
    uniforms = np.random.default_rng(0).random((2, 3))
    with FakeTensorMode(), NoFloat64("mps"):
        monkeypatch.setattr(Scripted, "logits", torch.empty(1, BYTES.vocab_size, device="mps"))
        answers = engine.generate(None, BYTES, prompts()[:2], 3, 1.0, top_k, uniforms)
    assert drawn_on == ["cpu"] * 3 and answers == [([65] * 3, [False] * 3), ([66] * 3, [False] * 3)]

def test_the_tool_speaks_and_is_marked(monkeypatch):
    model = small()
    script = [BYTES.special("<|python_start|>"), *BYTES.encode("2+3"),
              BYTES.special("<|python_end|>"), *BYTES.encode("????"),
              BYTES.special("<|assistant_end|>")]
    said = iter(script)
    monkeypatch.setattr(engine, "sample", lambda *a: torch.tensor([next(said)]))
    answers = {"2+3": "5"}
    tokens, forced = engine.generate(model, BYTES, [[BYTES.bos]], 40, calculate=answers.get)[0]
    output = [BYTES.special("<|output_start|>"), *BYTES.encode("5"),
              BYTES.special("<|output_end|>")]
    assert tokens == script[:5] + output + BYTES.encode("?")
    assert [t for t, f in zip(tokens, forced) if f] == output

def test_what_is_a_call_of_the_tool():
    names = ("python_start", "python_end", "output_start", "output_end")
    start, end, out, out_end = (BYTES.special(f"<|{name}|>") for name in names)
    a, b, c = BYTES.encode("abc")
    def reply(*tokens):
        return engine.tool_reply(list(tokens), BYTES, {"a": "b", "": "c"}.get)
    assert reply(a, start, a, end) == [out, b, out_end]
    assert reply(start, b, start, a, end) == [out, b, out_end], "begun again"
    assert reply(start, end) == [out, c, out_end]
    assert reply(start, a) == reply(a, end) == [], "no end, no start"
    assert reply(start, a, end, b, end) == [], "ended before"
    assert reply(start, b, end) == [], "the tool has no answer"

def answers_of_lengths(monkeypatch, lengths, **more):
    """generate() where the answer to prompt i ends after lengths[i] tokens -> (lengths, passes)"""
    end = BYTES.special("<|assistant_end|>")
    uniforms = np.arange(len(lengths))[:, None] * np.ones(99)  # they tell which row is drawn
    said = [0] * len(lengths)
    def draw(logits, temperature, top_k, numbers):
        tokens = []
        for row in map(int, numbers):
            tokens.append(end if said[row] == lengths[row] else 65 + row)
            said[row] += 1
        return torch.tensor(tokens)
    monkeypatch.setattr(engine, "sample", draw)
    monkeypatch.setattr(engine, "Decoder", Scripted)
    made = engine.generate(None, BYTES, [[i] for i in range(len(lengths))], 99, 1.0, 0, uniforms,
                           **more)
    assert all({*tokens} <= {65 + row} for row, (tokens, _) in enumerate(made))
    return [len(tokens) for tokens, _ in made], Scripted.last.passes

def test_a_finished_rows_place_is_taken_by_the_next_prompt(monkeypatch):
    lengths = [40, 1, 2, 3, 4, 5, 6, 7]
    made, passes = answers_of_lengths(monkeypatch, lengths, max_rows=2)
    assert made == lengths
    # all others pass through the second slot: 28 tokens and 7 ends; four fixed pairs would take 57
    assert sum(kind == "step" for kind, _ in passes) == 40
    assert passes[:5] == [("add", 2), ("step", 2), ("step", 1), ("add", 1), ("step", 2)]

def test_samples_of_a_prompt_that_come_one_after_another_run_it_once(monkeypatch):
    real, ran = engine.prefill, []
    monkeypatch.setattr(engine, "prefill", lambda m, *a: (ran.extend(a[0]), real(m, *a))[1])
    a, b = prompts()[:2]
    answers = engine.generate(small(), BYTES, [a] * 5 + [b] * 3, 4, max_rows=2)
    assert ran == [tuple(a), tuple(b)] and answers[:5] == [answers[0]] * 5

def test_finished_rows_leave_where_none_waits(monkeypatch):
    made, passes = answers_of_lengths(monkeypatch, [3, 0, 1, 3])
    assert made == [3, 0, 1, 3]
    assert passes == [("add", 4), ("step", 3), ("step", 2), ("step", 2)]

def test_generation_that_is_told_to_end_computes_no_further(monkeypatch):
    left = iter([True] * 3)
    made, passes = answers_of_lengths(monkeypatch, [10] * 4, max_rows=1,
                                      keep_going=lambda: next(left, False))
    assert made == [3, 0, 0, 0] and passes == [("add", 1), ("step", 1), ("step", 1)]
