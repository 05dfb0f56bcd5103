"""memory.py: its formulas within a tenth of what is measured; and the rows that a device takes."""
import pytest
import torch

import compute
import engine
import gpt
import measure
import memory
import optim
import training
from conftest import RATES, alone

FP32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")

def make(depth, vocab, length, arch, dtype, pairs=0):
    config = gpt.config_from_depth(depth, vocab, length, arch, bigram_vocab_size=pairs)
    model = gpt.GPT(config, dtype)
    model.init_weights(0)
    return model, optim.make_optimizer(model, RATES, 1.0, 0.1, dtype)

def training_memory(depth, vocab, length, rows, turns, arch, dtype, pairs=0):
    """-> (predicted, measured) bytes of a step"""
    model, optimizer = make(depth, vocab, length, arch, dtype, pairs)
    x = torch.randint(vocab, (rows, length))

    def step():
        for _ in range(turns):
            model(x, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    measured = memory.of_model(model, optimizer) + memory.measured(step, CPU)
    return memory.of_training(model, optimizer, rows, turns, dtype, False), measured

def decoding_memory(depth, vocab, rows, prompt, new, dtype):
    """-> (predicted, measured) bytes of generating"""
    model, _ = make(depth, vocab, 512, "modern", dtype)
    prompts = [[row + 1] * prompt for row in range(rows)]
    measured = memory.measured(lambda: engine.generate(model, measure.ENDLESS, prompts, new),
                               CPU)
    measured += memory.of_weights(model)
    return memory.of_decoding(model, rows, prompt, new), measured

@pytest.mark.parametrize("shape", [
    (2, 512, 256, 4, 1, "modern", FP32), (3, 4096, 128, 2, 2, "nanochat_2025", FP32),
    (4, 512, 32, 2, 2, "modern", FP32), (2, 512, 512, 4, 1, "nanochat_2025", BF16),
    (3, 512, 128, 4, 2, "modern", BF16), (2, 512, 256, 4, 1, "modern", BF16, 32768)])
def test_training_takes_what_is_predicted(shape):
    predicted, measured = training_memory(*shape)
    assert predicted == pytest.approx(measured, rel=0.05)  # found: within 0.025

@pytest.mark.parametrize("shape", [(2, 8192, 1, 20, 4, FP32), (4, 512, 8, 100, 4, FP32),
                                   (2, 512, 16, 100, 40, BF16), (2, 8192, 1, 20, 4, BF16)])
def test_decoding_takes_what_is_predicted(shape):
    predicted, measured = decoding_memory(*shape)
    assert predicted == pytest.approx(measured, rel=0.1)

def test_more_ranks_keep_less_each():
    model, optimizer = make(2, 512, 64, "modern", FP32)
    whole = memory.of_step(model, optimizer)
    optimizer.world = 8
    assert memory.of_step(model, optimizer) < 0.6 * whole

def rows_of(run, asked, monkeypatch, free=None, rows=64):
    """What training.rows_at_once says at --device_batch_size=asked: on a GPU with `free` bytes
    free, or on a CPU."""
    device = CPU
    if free is not None:
        device = torch.device("cuda")
        monkeypatch.setattr(memory, "free", lambda device: free)
    monkeypatch.setattr(training, "device_name", lambda device: "this one")
    run.settings = {"device_batch_size": asked}
    model, optimizer = make(2, 512, 64, "modern", FP32)
    here = compute.Compute(device, FP32, 1, False)
    return training.rows_at_once(run, model, optimizer, here, rows)

def test_rows_are_as_many_as_fit_once_and_then_those(monkeypatch):
    run = alone()
    run.record = {}
    assert rows_of(run, -1, monkeypatch) == 32, "on a CPU"
    assert run.record["chosen"]["device_batch_size"] == 32
    assert run.settings["device_batch_size"] == 32, "of which half is tried if memory is out"
    assert rows_of(run, -1, monkeypatch, free=1e6) == 32, "what it began with: the bits stay"
    assert rows_of(run, 4, monkeypatch) == 4, "what is asked for counts"
    assert rows_of(run, -1, monkeypatch) == 4, "and stays"
    run.record = {"chosen": {"dtype": "float32"}}
    assert rows_of(run, -1, monkeypatch, free=1e6) == 32, "of a run before rows were recorded"
    run.record["chosen"].update(device="another GPU", device_batch_size=8)
    assert rows_of(run, -1, monkeypatch, free=1e6) == 1, "as many as fit this one"
    assert rows_of(run, -1, monkeypatch, free=10e9) == 8, "no more than it began with"
    assert run.record["chosen"]["device"] == "another GPU", "where it is as it was"
    for free, rows in ((1e6, 1), (10e9, 64)):
        run.record = {}
        assert rows_of(run, -1, monkeypatch, free) == rows
    assert run.settings["device_batch_size"] == 64, "not more than a step has"

def test_rows_that_fit_leave_a_tenth_and_one_more_would_not(monkeypatch):
    model, optimizer = make(2, 512, 64, "modern", FP32)
    there = memory.of_model(model, optimizer)
    for free in (2e7, 3e7):
        monkeypatch.setattr(memory, "free", lambda device, free=free: free)
        rows = memory.rows_that_fit(model, optimizer, FP32, False, 500)
        needed = [memory.of_training(model, optimizer, n, 2, FP32, False) - there
                  for n in (rows, rows + 1)]
        assert 1 < rows < 500 and needed[0] <= 0.9 * free < needed[1]

@pytest.mark.parametrize("arch,rows", [("modern", 3), ("nanochat_2025", 7)])
def test_d20_fits_a_card_of_24_gb(monkeypatch, arch, rows):
    with torch.device("meta"):  # shapes alone
        model = gpt.GPT(gpt.config_from_depth(20, 32768, 2048, arch), BF16)
    optimizer = optim.make_optimizer(model, RATES, 1.0, 0.1, BF16)
    left = 23.5e9 - memory.of_model(model, optimizer)  # CUDA itself takes some
    monkeypatch.setattr(memory, "free", lambda device: left)
    assert memory.rows_that_fit(model, optimizer, BF16, True, 32) == rows
