"""
How much memory training and decoding take, in bytes, from the shape of the model alone.

What is counted is what torch allocates: on CUDA torch.cuda.max_memory_allocated() measures it, on a
CPU torch's profiler does (measured()). The process itself, Python, torch and its compiler, takes a
few hundred MB of the host more. tests/test_memory.py holds the formulas against what is measured,
and the memory section of bench.py.
"""
import bisect
from itertools import accumulate

import torch

import gpt
from clock import peak_memory
from packed import is_reordered

# What the backward pass of a layer finds saved, for each token and channel of the residual stream:
# (numbers in the compute dtype, float32 numbers). Counted from torch.autograd.graph's
# saved_tensors_hooks (eager) and from measured peaks (compiled, which computes cheap ones again).
SAVED = {("nanochat_2025", False): (14, 4), ("modern", False): (16, 4),
         ("nanochat_2025", True): (17, 0), ("modern", True): (19.5, 0)}

MOST_TOKENS = 2 ** 16  # of a micro-batch: more at once make no GPU faster

def of_weights(model):
    """Bytes of its weights and tables."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

def of_model(model, optimizer):
    """Bytes of weights, tables, and of the optimizer's states on this rank."""
    states = (t for bucket in optimizer.buckets for t in bucket.state.values())
    return of_weights(model) + sum(t.nbytes for t in states)

def of_step(model, optimizer):
    """Bytes that optimizer.step() takes for itself: copies of the gradients and of the weights that
    travel stacked, and what Muon or AdamW needs for its largest group."""
    stacked = 0
    largest = {"muon": 0, "adamw": 0}
    for bucket in optimizer.buckets:
        size = sum(p.nbytes for p in bucket.params)
        if bucket.stacked:
            stacked += size
        kind = bucket.group["kind"]
        largest[kind] = max(largest[kind], size)
    world = optimizer.world
    for_muon = (2 + 0.375 * optimizer.ns_dtype.itemsize) * largest["muon"]
    return stacked / world + stacked + max(for_muon, largest["adamw"]) / world

def of_activations(config, rows, dtype, compiled):
    """Bytes that the forward pass of `rows` rows leaves for the backward pass, and that the loss of
    a chunk, or the backward pass where it begins, needs beside them."""
    size = dtype.itemsize
    tokens = rows * config.sequence_len
    in_dtype, in_float32 = SAVED[config.arch, compiled]
    channels = tokens * config.n_embd
    of_layer = channels * (in_dtype * size + in_float32 * 4)
    head = config.n_embd * config.vocab_size
    saved = config.n_layer * of_layer
    saved += 4 * channels * size  # the embedding, its norm, the last norm and its gradient
    saved += 4 * head             # the gradient of lm_head's weights
    cast = 0
    if size < 4:  # each matrix is cast once, and kept until the backward pass; the head's is not
        saved += size * 12 * config.n_layer * config.n_embd ** 2
        cast = size * head
    chunk = min(tokens, gpt.chunk_of(tokens)) * config.vocab_size
    if compiled:
        return saved + cast + 2 * 4 * chunk  # logits and their gradient
    # in float32 the tanh, the logits, their softmax, the targets and the difference of both, and a
    # byte for which is right; of the chunk before there is still the gradient
    loss = cast + 5.25 * 4 * chunk
    if tokens > gpt.chunk_of(tokens):
        loss += size * chunk
    mlp = 3 * 4 * channels * size  # gradients inside the first MLP that is met
    return saved + max(loss, mlp)

def of_training(model, optimizer, rows, turns, dtype, compiled):
    """
    The peak of training, in bytes. rows: of a micro-batch; turns: micro-batches of a step on this
    rank; dtype: what is computed in. The peak is where a forward pass ends, or where the
    optimizer works.
    """
    gradients = sum(p.nbytes for p in model.parameters())
    activations = of_activations(model.config, rows, dtype, compiled)
    if turns > 1:  # those of the micro-batches before are there
        activations += gradients
    working = max(activations, gradients + of_step(model, optimizer))
    return of_model(model, optimizer) + working

def of_decoding(model, rows, prompt, new):
    """The peak of engine.generate, in bytes: rows different prompts of `prompt` tokens, each
    continued by at most `new`. It is where the prompts go through the MLP of a layer, or where
    the head's weights are packed, the last of them."""
    config = model.config
    size = model.dtype.itemsize

    def is_copied(name, weight):
        together = name.endswith(("c_q", "c_k", "c_v"))  # one product
        return together or weight.dtype != model.dtype or is_reordered(weight, model.dtype, rows)
    packed = size * sum(m.weight.numel() for name, m in model.named_modules()
                        if isinstance(m, gpt.Linear) and is_copied(name, m.weight))
    on_cpu = model.lm_head.weight.device.type == "cpu"
    of_token = 2 * config.n_layer * config.n_kv_head * config.head_dim  # keys and values
    cache = rows * (prompt + new) * of_token * (4 if on_cpu else size)
    prefilled = rows * prompt * size * (of_token + 13.5 * config.n_embd)
    packing = size * model.lm_head.weight.numel() if size < 4 else 0
    return of_weights(model) + packed + max(cache + prefilled, packing)

def free(device):
    """Bytes that this process can still get on a CUDA device."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved

def rows_that_fit(model, optimizer, dtype, compiled, most):
    """How many rows, at most `most` and at least 1, a micro-batch can have on the model's device,
    where the model and the optimizer are already. A tenth of what is free is left free."""
    room = 0.9 * free(model.lm_head.weight.device) + of_model(model, optimizer)

    def needed(rows):  # more for more rows
        return of_training(model, optimizer, rows, 2, dtype, compiled)
    return max(1, bisect.bisect_right(range(1, most + 1), room, key=needed))

# -------------------------------------------------------------------------------------------------
# measuring

def measured(function, device):
    """-> the most bytes that were allocated on a device at once while function() ran, what was
    there before not counted. On a CPU torch's profiler hears of every block, those inside compiled
    code and inside operations too; the process's own size would add Python, and pages that are kept
    when freed."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0))

def of_process(model, optimizer, compute, micro_rows, rows):
    """What peak_memory() will say at the end of a training of steps of `rows` rows, which is
    about to begin, on each rank: model and optimizer are there already."""
    turns = rows // (micro_rows * optimizer.world)
    needed = of_training(model, optimizer, micro_rows, turns, compute.dtype, compute.compile)
    if compute.device.type == "cuda":
        return needed
    return peak_memory() + needed - of_model(model, optimizer)
