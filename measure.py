"""
What bench.py measures, each function in a process of its own: so peaks of memory, compilations and
threads of one stay apart from those of another. `computing` is always the settings device, dtype,
threads and compile, as pairs.
"""
import functools
import math
import statistics
import time
from collections import Counter
from itertools import chain, islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common
import compute
import configurator
import core_eval
import data as dataset
import engine
import gpt
import memory
import models
import optim
import texts
import tok_train
from clock import peak_memory
from compute import to_device
from ranks import Ranks
from tokenizer import SPECIAL_TOKENS, Tokenizer

DEPTH, VOCAB, LENGTH = 4, 8192, 512  # the reference model
BATCHES = (4096, 16384)              # tokens of its steps
PROMPT = 107                         # tokens before decoding begins
# a tokenizer whose tokens never end an answer
ENDLESS = SimpleNamespace(special=lambda name: -1, bos=-1)
DOCUMENTS = 500                      # of the held-out file

def choose(computing):
    """computing: settings as pairs, as a child gets them -> compute.Compute"""
    return compute.choose_compute(Ranks(0, 0, 1), dict(computing))

def wait(device):
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()

def make_model(config, chosen):
    """A random model on its device."""
    model = gpt.GPT(config, chosen.dtype)
    model.init_weights(0)
    return model.to(chosen.device)

def best_seconds(function, device, least=0.3):
    """The shortest of several calls: at least four, and `least` seconds of them. The first is not
    counted."""
    times = []
    while len(times) < 5 or sum(times[1:]) < least:
        began = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])

# -------------------------------------------------------------------------------------------------
# machine

def bandwidth(device):
    """-> bytes a second that are read from memory, the best of three ways to read much of it"""
    size = 2 ** 28 if device.type == "cuda" else 2 ** 26  # 268 MB or more: caches hold less
    numbers = torch.ones(size, device=device)
    matrix = numbers.view(2 ** 13, -1)
    vector = matrix[0].clone()
    reading = [lambda: numbers.max(), lambda: numbers.sum(), lambda: matrix @ vector]
    return numbers.nbytes / min(best_seconds(read, device) for read in reading)

def machine(computing):
    """-> {"bandwidth": bytes/s, "rates": {dtype: (FLOP/s of a step's products, of a large one)},
    "computed in": the dtype that the probe picks, "words": what there is}"""
    chosen = choose(computing)
    device = chosen.device
    with torch.device("meta"):
        model = gpt.GPT(gpt.config_from_depth(DEPTH, VOCAB, LENGTH))
    shapes = Counter(tuple(m.weight.shape) for m in model.modules()
                     if isinstance(m, gpt.Linear) and min(m.weight.shape) >= gpt.HEAD_DIM)
    rates = {}
    # not of bfloat16 where nobody computes in it: on a CPU with AVX2 alone it took minutes (LOG.md)
    for name in dict.fromkeys(["float32", chosen.recorded()["dtype"]]):
        of_type = {"device": device, "dtype": getattr(torch, name)}
        seconds = flops = 0.0
        for (n_out, n_in), count in shapes.items():
            x = torch.ones(BATCHES[0], n_in, **of_type)
            w = torch.ones(n_out, n_in, **of_type)
            g = torch.ones(BATCHES[0], n_out, **of_type)
            # the forward pass, and the gradients of input and weight
            for a, b in ((x, w.T), (g, w), (g.T, x)):
                seconds += count * best_seconds(functools.partial(torch.mm, a, b), device, 0.1)
            flops += count * 3 * 2 * BATCHES[0] * n_in * n_out
        large = torch.ones(2048, 2048, **of_type)
        once = best_seconds(functools.partial(torch.mm, large, large), device)
        rates[name] = flops / seconds, 2 * 2048 ** 3 / once
    where = compute.device_name(device)
    return {"bandwidth": bandwidth(device), "rates": rates,
            "computed in": chosen.recorded()["dtype"],
            "words": f"torch {torch.__version__}, {where}: {chosen}"}

# -------------------------------------------------------------------------------------------------
# training

def random_plan(tokens, vocab, length):
    """The Plan of rows of `length` of about `tokens` random tokens below `vocab`, in documents of
    200 to 1,000, as of a file."""
    drawn = common.rng(0, 1)
    lengths = drawn.integers(200, 1000, size=tokens // 500)
    numbers = drawn.integers(vocab - 9, size=lengths.sum()).astype(np.uint16)
    store = dataset.Store(numbers, None, lengths, {})
    return dataset.text_plan([store], length + 1, vocab - 9)

def training(computing, micro_rows, repeat, config=None, turns=None):
    """
    Steps as base_train.py makes them, of the reference model, or of one of this config. micro_rows:
    of a micro-batch; -1: as many as fit, at most 32. repeat: steps of each size; 0: only the first.
    turns: micro-batches of a step, None: as many as BATCHES has it.
    -> {"first": its seconds, "rows": of a micro-batch, "flops": of a token, "peak": bytes,
    "allocated", "predicted": bytes of a step of the last size, measured and as memory.py has it,
    "steps": {tokens of a step: {"data", "passes", "optimizer": seconds}},
    "within": {"attention", "products of the head", "other products": share of the passes}}
    """
    chosen = choose(computing)
    device = chosen.device
    config = config or gpt.config_from_depth(DEPTH, VOCAB, LENGTH)
    length = config.sequence_len
    model = make_model(config, chosen)
    rates = configurator.defaults("base_train.py")
    optimizer = optim.make_optimizer(model, rates, 0.1, 0.0, chosen.dtype)
    forward = torch.compile(model, dynamic=False) if chosen.compile else model
    if micro_rows == -1:
        micro_rows = memory.rows_that_fit(model, optimizer, chosen.dtype, chosen.compile, 32)
    sizes = [turns * micro_rows * length] if turns else BATCHES
    plan = random_plan(8 * max(sizes), config.vocab_size, length)

    def batches(tokens, number):
        found = dataset.batch(plan, 0, number, tokens // length, micro_rows)
        return [(to_device(x, device), to_device(y, device)) for x, y in found]

    def passes(pairs, tokens):
        for x, y in pairs:
            optimizer.scaled(forward(x, y) / tokens).backward()
        wait(device)

    def step(tokens, number):
        at = [time.perf_counter()]
        pairs = batches(tokens, number)
        at.append(time.perf_counter())
        passes(pairs, tokens)
        at.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        at.append(time.perf_counter())
        return [after - before for before, after in pairwise(at)]

    found = {"first": sum(step(sizes[0], 0)), "rows": micro_rows,
             "flops": model.flops_per_token(), "steps": {}, "within": {}}
    if repeat == 0:
        return found
    for tokens in sizes:
        step(tokens, 1)
        times = [step(tokens, 2 + i) for i in range(repeat)]
        parts = map(statistics.median, zip(*times))
        found["steps"][tokens] = dict(zip(("data", "passes", "optimizer"), parts))
    found["peak"] = peak_memory()
    allocated = memory.measured(lambda: step(tokens, 1), device)
    found["allocated"] = allocated + memory.of_model(model, optimizer)
    turns = tokens // (length * micro_rows)
    found["predicted"] = memory.of_training(model, optimizer, micro_rows, turns, chosen.dtype,
                                            chosen.compile)
    if device.type == "cpu":
        pairs = batches(sizes[0], 0)
        with torch.profiler.profile(record_shapes=True) as profile:
            passes(pairs, sizes[0])
        events = profile.key_averages(group_by_input_shape=True)
        found["within"] = shares(events, config.vocab_size)
    return found

def shares(events, vocab):
    """What the time of a profile went to, each a share of all.  -> {"attention", "products of the
    head", "other products": 0 to 1}. The head's are known by `vocab` in their shapes. What is left
    is mostly what the compiler has fused, norms and the loss among it."""
    of = Counter()
    for event in events:
        what = "rest"
        if "attention" in event.key:
            what = "attention"
        elif event.key in ("aten::mm", "aten::addmm", "aten::bmm"):
            of_head = vocab in chain.from_iterable(event.input_shapes)
            what = "products of the head" if of_head else "other products"
        of[what] += event.self_cpu_time_total
    named = ("attention", "products of the head", "other products")
    return {what: of[what] / of.total() for what in named}

# -------------------------------------------------------------------------------------------------
# decoding

def decoding(computing, depth, tokens):
    """-> {rows: seconds of a token of each, for 1 and 16; "weights": bytes that one needs at least;
    "peak": bytes; "int8": {rows: seconds} with weights of 8 bits, on a CPU; "allocated",
    "predicted": bytes of decoding a few rows, measured and as memory.py has it}. The gaps between
    tokens are measured, their median counts."""
    chosen = choose(computing)
    model = make_model(gpt.config_from_depth(depth, VOCAB, 2048), chosen)
    used = sum(m.weight.numel() for m in model.modules() if isinstance(m, gpt.Linear))
    found = {"weights": used * chosen.dtype.itemsize, "int8": {}}

    def prompts(rows):
        return common.rng(0, rows).integers(VOCAB, size=(rows, PROMPT)).tolist()

    def seconds(rows, packed=None):
        uniforms = common.rng(1, rows).random((rows, tokens))
        came = []  # when each token came, those of all rows one after another
        engine.generate(model, ENDLESS, prompts(rows), tokens, temperature=1.0, top_k=50,
                        uniforms=uniforms, packed=packed,
                        on_token=lambda token: came.append(time.perf_counter()))
        return statistics.median(after - before for before, after in pairwise(came[::rows]))

    for rows in (1, 16):
        found[rows] = seconds(rows)
    found["peak"] = peak_memory()
    if chosen.device.type == "cpu":
        packed = engine.Packed(model, 16, "int8")
        found["int8"] = {rows: seconds(rows, packed) for rows in (1, 16)}
        del packed
    few = prompts(4)
    allocated = memory.measured(lambda: engine.generate(model, ENDLESS, few, 2), chosen.device)
    found["allocated"] = allocated + memory.of_weights(model)
    found["predicted"] = memory.of_decoding(model, len(few), PROMPT, 2)
    return found

# -------------------------------------------------------------------------------------------------
# core

def core(computing, folder, n):
    """-> {task: (seconds of its first n items, items in all)}. The tokenizer is trained on some
    text of the bundle itself."""
    chosen = choose(computing)
    tasks, _, _ = core_eval.read_bundle(Path(folder))
    some = []
    for task in tasks:
        for item in task["items"][:200]:
            some += map("".join, core_eval.choices_of(task["kind"], item)[0])
    ranks = tok_train.train_bpe(tok_train.count_words(some), VOCAB - len(SPECIAL_TOKENS))
    tokenizer = Tokenizer(ranks)
    model = make_model(gpt.config_from_depth(DEPTH, tokenizer.vocab_size, 2048), chosen)
    budget = core_eval.usual_budget(chosen.device)
    found = {}
    core_eval.evaluate(model, tokenizer, tasks[0], range(1), 2048, budget)  # warms up
    for task in tasks:
        numbers = range(min(n, len(task["items"])))
        began = time.perf_counter()
        core_eval.evaluate(model, tokenizer, task, numbers, 2048, budget)
        found[task["label"]] = time.perf_counter() - began, len(numbers), len(task["items"])
    return found

# -------------------------------------------------------------------------------------------------
# learning

def bits_per_byte(model, tokenizer, documents, rows_at_once=8):
    """
    Bits per byte of texts, each cut into rows of bos and at most LENGTH tokens, or fewer where the
    model was trained on shorter rows: it has never seen a position behind those. Every token but
    bos is predicted once, from what stands before it in its row. Nats of all tokens, divided by
    ln 2 times the bytes of the texts in UTF-8. model: a gpt.GPT; documents: list of str -> float
    """
    length = min(LENGTH, model.config.sequence_len)
    device = model.lm_head.weight.device
    rows = []
    for text in documents:
        ids = tokenizer.encode(text)
        rows += [ids[at:at + length] for at in range(0, len(ids), length)]
    nats = 0.0
    with torch.inference_mode():
        for at in range(0, len(rows), rows_at_once):
            y = engine.pad_right(rows[at:at + rows_at_once], fill=-1)  # padding is not counted
            x = torch.cat([torch.full_like(y[:, :1], tokenizer.bos), y[:, :-1].clamp(min=0)], 1)
            losses = model.nats(x.to(device), y.to(device))
            nats += losses.double().sum().item()
    return nats / (math.log(2) * sum(len(text.encode()) for text in documents))

def learned(computing, folder, tag, path):
    """-> (bits per byte of the held-out documents, list of samples) of a base model"""
    chosen = choose(computing)
    directory, step = models.find_model("base", folder, tag)
    tokenizer = models.load_tokenizer_of(directory, step, folder)
    model = models.load_model(directory, step, chosen.device, chosen.dtype)
    documents = list(islice(texts.read_documents(Path(path)), DOCUMENTS))
    prompts = ["Once upon a time", "The most important", "She said that"]
    asked = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    uniforms = common.rng(0, 3).random((len(prompts), 64))
    said = engine.generate(model, tokenizer, asked, 64, temperature=0.7, uniforms=uniforms)
    samples = [prompt + tokenizer.decode(tokens) for prompt, (tokens, _) in zip(prompts, said)]
    return bits_per_byte(model, tokenizer, documents), samples
