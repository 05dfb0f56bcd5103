"""
What the training scripts share besides their loops, which each of them has in sight: the schedule, the clock that decides
when to save, sums over ranks, bits per byte, samples. Plain functions; the clock is one dict of this process.
"""
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import common
import data as dataset
import gpt
import phase

# bf16 without sparsity, FLOP/s (vendors' data sheets); looked up by a part of the device's name
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


def lr_scale(step, num_steps, warmup_ratio, warmdown_ratio, final_fraction):
    """Trapezoid: rises over the first warmup_ratio of the steps, is 1, and falls to final_fraction over the last warmdown_ratio.
    example: (0, 100, 0.1, 0.5, 0.0) -> 0.1;  (20, ...) -> 1.0;  (75, ...) -> 0.5"""
    warmup, warmdown = round(warmup_ratio * num_steps), round(warmdown_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= num_steps - warmdown:
        return 1.0
    left = (num_steps - step) / warmdown
    return left + (1 - left) * final_fraction


def scaling_parameters(model):
    """Parameters of matrices and head: what the horizon is proportional to."""
    return sum(p.numel() for n, p in model.named_parameters() if "transformer.h" in n or "lm_head" in n)


def horizon(model, num_steps, target_flops, tokens_per_param, total_batch_size):
    """From base_train.py's settings of these names -> (rows of a step, steps)"""
    length = model.config.sequence_len
    tokens_wanted = (num_steps * max(total_batch_size, 0) or None if num_steps != -1 else
                     target_flops / model.flops_per_token() if target_flops > 0 else tokens_per_param * scaling_parameters(model))
    if total_batch_size == -1:
        # the best batch grows with about the 0.38th power of the tokens (arXiv 2505.13738): 2^19 tokens at d12's 1.6e9
        guess = 2 ** 19 * ((tokens_wanted or 1.6e9) / 1.6e9) ** 0.383
        rows = max(1, 2 ** round(math.log2(guess / length)))
    else:
        rows = total_batch_size // length
    return rows, num_steps if num_steps != -1 else max(1, round(tokens_wanted / (rows * length)))


def to_device(array, compute):
    """numpy array -> tensor on the device, without waiting for the copy on CUDA"""
    tensor = torch.from_numpy(array)
    if compute.device.type == "cuda":
        return tensor.pin_memory().to(compute.device, non_blocking=True)
    return tensor.to(compute.device)


def all_sum(value):
    """The sum over ranks of a number or a tensor of one element, as a float."""
    if not dist.is_initialized():
        return float(value)
    box = torch.as_tensor(float(value), dtype=torch.float64)
    dist.all_reduce(box)
    return box.item()


def stop_for(directory, why, advice):
    """Ends the phase with 1, naming the last good checkpoint."""
    checkpoint.finish()
    last = next(iter(checkpoint.steps(directory)), None)
    common.fail(f"{why}; " + (f"the last good checkpoint is that of step {last} in {directory}" if last is not None else f"there is no checkpoint in {directory} yet")
                + f": {advice}", code=1)


def count_skipped(skipped, loss, norm, limit, directory):
    """How many steps in a row had a gradient that is not finite (the optimizer left such steps out); ends the phase with 1 after `limit`."""
    if math.isfinite(loss) and math.isfinite(norm):
        return 0
    common.print0(f"loss {loss}, gradient norm {norm}: this step was skipped ({skipped + 1} in a row)")
    if skipped + 1 > limit:
        stop_for(directory, f"{skipped + 1} steps in a row had no finite gradient", "lower the learning rates, or look at the data")
    return skipped + 1


EXPLODED = 50  # steps in a row with a loss far above its level before it gives up

def watch(loss, directory):
    """Follows the level of the loss, a mean over about 50 steps. Far above it nothing is saved (the checkpoint of better days would go),
    and after EXPLODED such steps in a row the phase ends with 1."""
    if not math.isfinite(loss):
        return  # count_skipped's
    if len(first := _clock.setdefault("losses", [])) < 20:  # of a life: its median, since one batch alone may be much easier than the others
        first.append(loss)
        _clock["level"] = sorted(first)[len(first) // 2]
    level = _clock["level"]
    if loss <= 1.5 * level + 0.5:
        _clock.update(level=level + 0.02 * (loss - level), high=0)
        return
    _clock["high"] = _clock.get("high", 0) + 1
    if _clock["high"] == 1 or _clock["high"] % 10 == 0:
        common.print0(f"loss {loss:.4f} is far above its level of {level:.4f} ({_clock['high']} steps in a row): nothing is saved meanwhile")
    if _clock["high"] >= EXPLODED:
        stop_for(directory, f"the loss has exploded: {loss:.4f}, and for {EXPLODED} steps far above its level of {level:.4f}", "lower the learning rates, or look at the data")

def exploding():
    return _clock.get("high", 0) > 0


def is_out_of_memory(e):
    """True for CUDA's, MPS's and the host allocator's ways to say so."""
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(e) or "out of memory" in str(e)

def machine(compute):
    """What memory depends on.  example: "4 x NVIDIA H100 80GB HBM3" """
    return f"{compute.world} x {torch.cuda.get_device_name() if compute.device.type == 'cuda' else compute.device.type}"

def rows_that_fit(stage, key, asked, data, tag, compute):
    """The number of rows that trial.py found to fit on this machine, where that is less than `asked` for the setting `key` of `stage`."""
    record = common.read_json(common.trial_path(data, tag)) or {}
    found = record.get("found", {}).get(f"{stage} {key}")
    if record.get("machine") != machine(compute) or not found or found[0] != asked or found[1] == asked:
        return asked
    common.print0(f"{stage}: --{key}={found[1]} instead of {asked}, which does not fit into memory here (found by trial.py)")
    return found[1]


def explain_out_of_memory(name, **rows):
    """From here on running out of memory ends the phase `name` with 1 and one line that says what to try. rows: the settings that decide
    about memory, with their values, e.g. device_batch_size=32."""
    before = sys.excepthook
    def hook(kind, value, trace):
        if not is_out_of_memory(value):
            return before(kind, value, trace)
        try_this = " ".join(f"--{key}={max(1, n // 2)}" for key, n in rows.items())
        print(f"error: rank {common.rank_world()[0]} ran out of memory in {name} ({str(value).splitlines()[0][:150]}); run the same command with {try_this}: "
              "the result stays the same to rounding, and what is saved goes on", file=sys.stderr, flush=True)
        common.outcome(1, f"out of memory in {name}: try {try_this}")
    sys.excepthook = hook


# ---------------------------------------------------------------------------------------------------------------------
# the clock: nothing that it says affects weights; one that cannot be set back, or nothing would be saved until then

_clock = {}
PHASE = Path(sys.argv[0]).stem.removesuffix("_train").removeprefix("chat_")  # base, mid, sft, rl

def start_clock(num_steps, step, spent, save_minutes):
    """spent: seconds of training in earlier lives of this phase."""
    now = time.monotonic()
    _clock.update(num_steps=num_steps, first=step, spent=spent, start=now, interval=60.0 * save_minutes, last_save=now,
                  last_tick=now, last_show=0.0, save_seconds=0.0, steps=[])

def spent():
    """Seconds of training, earlier lives included."""
    return _clock["spent"] + time.monotonic() - _clock["start"]

def save_due():
    """When the interval is over; and at once where the save in flight has failed, to say so."""
    return (time.monotonic() - _clock["last_save"] >= _clock["interval"] and not exploding()) or checkpoint.save_failed()

def saved(since):
    """The training has waited for a save from `since` to now."""
    _clock["last_save"] = time.monotonic()
    _clock["save_seconds"] += _clock["last_save"] - since

def save_or_stop(save, directory, step, num_steps, measuring):
    """At the beginning of each turn of a training loop: all ranks agree; saves when it is due, before measuring and at the end, but not a model
    whose loss explodes; ends the phase, saved, where it was asked to stop. save(wait): the script's; wait=False may go on in the background"""
    last = step == num_steps
    due = common.agree(2 if common.stop_requested() else 1 if save_due() else 0)
    if last or ((due or (measuring and step)) and not exploding()):
        save(wait=measuring or due == 2)  # measuring waits for it: an evaluation that dies loses nothing
    if due == 2 and not last:
        stopped(directory, num_steps)

def stopped(directory, num_steps):
    """Ends the phase, saved, with 75."""
    phase.interrupted(directory, f"{common.stop_requested() or 'another rank was asked'}: saved at step {checkpoint.last_step(directory)} of {num_steps}")

def save_share():
    """Share of this life's time that the training waited for saves, 0 to 1."""
    return _clock["save_seconds"] / max(time.monotonic() - _clock["start"], 1e-9)

def tick(step, text, tokens, flops_per_token, compute):
    """Called after each step: prints progress, at most about once in two seconds, and returns the readings for the metrics."""
    now = time.monotonic()
    _clock["steps"] = (_clock["steps"] + [now - _clock["last_tick"]])[-20:]
    _clock["last_tick"] = now
    seconds = sorted(_clock["steps"])[len(_clock["steps"]) // 2]  # the median: evaluations and saves are no steps
    reading = {"seconds": round(spent(), 2), "tokens_per_second": round(tokens / seconds)}
    peak = next((f for name, f in PEAK_FLOPS.items() if compute.device.type == "cuda" and name in torch.cuda.get_device_name()), None)
    if peak:
        reading["mfu"] = round(flops_per_token * tokens / seconds / (peak * compute.world), 4)
    if len(_clock["steps"]) == 10 and (line := common.budget_line(PHASE, (_clock["num_steps"] - step) * seconds, common.deadline(), time.time())):
        common.print0(line)
    if now - _clock["last_show"] >= 2.0 or step == _clock["num_steps"]:
        _clock["last_show"] = now
        mfu = f" | MFU {100 * reading['mfu']:.1f} %" if peak else ""
        common.print0(f"step {step:,}/{_clock['num_steps']:,} | {text} | {tokens / seconds:,.0f} tokens/s{mfu} | "
                      f"{common.clock(spent())} so far, {common.clock((_clock['num_steps'] - step) * seconds)} left")
    return reading


# ---------------------------------------------------------------------------------------------------------------------
# measuring

@torch.inference_mode()
def bits_per_byte(model, plan, tokenizer, tokens, micro_rows, compute):
    """
    Bits per byte of text over the first rows of `plan` that hold `tokens` tokens (all, if there are fewer): nats over all targets
    that stand for bytes, divided by ln 2 times their bytes. Special tokens stand for none. -> float, or None if asked to stop.
    """
    n = min(dataset.n_rows(plan), max(1, tokens // (plan.length - 1)))
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(compute.device)
    nats = torch.zeros((), dtype=torch.float64 if compute.device.type != "mps" else torch.float32, device=compute.device)
    total_bytes = torch.zeros((), dtype=torch.long, device=compute.device)
    for start in range(0, n, micro_rows * compute.world):  # as many turns on every rank, since they agree in each
        if common.agree(1 if common.stop_requested() else 0):
            return None
        mine = range(n)[start + compute.rank * micro_rows:min(n, start + (compute.rank + 1) * micro_rows)]
        if not len(mine):
            continue
        rows, counted = dataset.read_rows(plan, mine)
        x, y = to_device(rows[:, :-1].copy(), compute), to_device(rows[:, 1:].copy(), compute)
        sizes = token_bytes[y] * to_device(counted[:, 1:].astype("int64"), compute)
        losses = model(x, y, reduction="none")
        nats += (losses * (sizes > 0)).sum(dtype=nats.dtype)
        total_bytes += sizes.sum()
    return all_sum(nats) / (math.log(2) * all_sum(total_bytes))


def print_samples(model, tokenizer, prompts, max_new_tokens=48):
    """Greedy continuations of a few prompts, on rank 0."""
    if common.rank_world()[0] == 0:
        for prompt in prompts:
            tokens, _ = gpt.generate(model, tokenizer, [[tokenizer.bos, *tokenizer.encode(prompt)]], max_new_tokens,
                                     keep_going=lambda: not common.stop_requested())[0]
            common.print0(f"  sample: {prompt + tokenizer.decode(tokens)!r}"[:300])
