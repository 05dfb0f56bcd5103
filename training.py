"""
What the training scripts share; their loops each of them has in sight. How a run resumes, schedules
and the horizon, the guard against a loss that goes wrong, bits per byte and samples.
"""
import math
import time
from dataclasses import dataclass, field

import torch

import checkpoint
import common
import conversations
import data as dataset
import engine
import memory
import models
import pipeline
import rewind
from clock import peak_memory
from compute import device_name, to_device
from run import TRY_OUT_STEPS

# -------------------------------------------------------------------------------------------------
# where a training begins, and how it ends

def resume(run, model, optimizer):
    """Loads the newest whole checkpoint of the run into model and optimizer, if there is one.
    -> (step, seconds of training so far): (0, 0.0) without one. run.open_or_exit has verified it
    on rank 0; each rank reads the whole model and its own share of the optimizer."""
    step = run.saved_step
    if step is None:
        return 0, 0.0
    weights, optim_state, meta = checkpoint.load(run.directory, step)
    models.put_weights(model, weights)
    try:
        optimizer.load_state_dict(optim_state)
    except (LookupError, StopIteration, RuntimeError) as e:
        common.fail(f"the optimizer's state of step {step} in {run.directory} does not fit that of "
                    f"this version of the source ({type(e).__name__}: {e}): use the version that "
                    "trained it (git checkout; its commit is in phase.json), or train anew with "
                    f"{pipeline.starting_over(run.name)}")
    common.print0(f"continuing at step {step:,} of {meta['num_steps']:,}")
    return step, meta["seconds"]

def batch_number(run, step):
    """The number of the batch that `step` trains on: its own, and further by what --rewind has
    skipped."""
    return rewind.batch_number(run.record.get("skipped", []), step)

def in_words(tokens):
    """examples: 12_288 -> "12,288", 1_600_000_000 -> "1,600.0M" """
    return f"{tokens:,}" if tokens < 1_000_000 else f"{tokens / 1e6:,.1f}M"

def exit_done(run, result, **facts):
    """Says what came out and how long it took, records the facts for the report, and ends the
    process with 0."""
    clock = run.clock
    seconds, peak = clock.seconds(), peak_memory()
    common.print0(f"{run.name} is done: {result} after {clock.num_steps:,} steps in "
                  f"{common.duration(seconds)}; saving took {100 * clock.save_share():.2f} %; at "
                  f"most {peak / 1e9:,.2f} GB of memory; the checkpoint is in {run.directory}")
    run.exit_done(step=clock.num_steps, seconds=seconds, peak_bytes=peak, **facts)

# -------------------------------------------------------------------------------------------------
# schedule and horizon

def lr_scale(step, num_steps, warmup_ratio, warmdown_ratio, final_fraction):
    """Trapezoid: rises over the first warmup_ratio of the steps, is 1, and falls to final_fraction
    over the last warmdown_ratio.
    examples: (0, 100, 0.1, 0.5, 0.0) -> 0.1;  (20, ...) -> 1.0;  (75, ...) -> 0.5"""
    warmup = round(warmup_ratio * num_steps)
    warmdown = round(warmdown_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= num_steps - warmdown:
        return 1.0
    left = (num_steps - step) / warmdown
    return left + (1 - left) * final_fraction

def batch_lr_scale(batch_tokens):
    """Adam's and Muon's learning rates are given for batches of 2^19 tokens; smaller ones need
    less, with the root of their size."""
    return min(1.0, (batch_tokens / 2 ** 19) ** 0.5)

def horizon(model, num_steps, target_flops, tokens_per_param, total_batch_size):
    """How much base_train.py trains, from its settings of these names.
    -> (rows of a step, why so many, steps, parameters of matrices and head)"""
    length = model.config.sequence_len
    scaling = sum(p.numel() for n, p in model.named_parameters()
                  if "transformer.h" in n or "lm_head" in n)
    if num_steps != -1:
        tokens = 1.6e9  # wanted for the batch alone, which is then that of d12
    elif target_flops > 0:
        tokens = target_flops / model.flops_per_token()
    else:
        tokens = tokens_per_param * scaling
    if total_batch_size != -1:
        rows = total_batch_size // length
        why = GIVEN
    else:
        # the best batch grows with about the 0.38th power of the tokens (arXiv 2505.13738):
        # 2^19 tokens at d12's 1.6e9
        guess = 2 ** 19 * (tokens / 1.6e9) ** 0.383
        rows = max(1, 2 ** round(math.log2(guess / length)))
        why = f"chosen as for {in_words(round(tokens))} tokens of training"
    if num_steps == -1:
        num_steps = max(1, round(tokens / (rows * length)))
    return rows, why, num_steps, scaling

GIVEN = "set by --total_batch_size"

def batch_in_words(why, rows, length, micro_rows, world):
    """What a step trains on, and how it fits the devices. example: (GIVEN, 256, 2048, 32, 8) ->
    "524,288 tokens a step (set by --total_batch_size) = 256 rows of 2,048 tokens = 1 micro-batches
    of 32 on each of 8 ranks" """
    turns = rows // (micro_rows * world)
    return (f"{rows * length:,} tokens a step ({why}) = {rows:,} rows of {length:,} tokens = "
            f"{turns} micro-batches of {micro_rows} on each of {world} ranks")

def print_lessons(run, stage, store, val_store, plan, num_steps, rows, micro_rows, compute):
    """Says what mid_train.py or chat_sft.py is about to train on, and how."""
    length = plan.length - 1
    batch_tokens = rows * length
    why = "as in pretraining" if run.settings["total_batch_size"] == -1 else GIVEN
    lessons, held_out = [conversations.in_words(dataset.counts_of(part), length)
                         for part in (store, val_store)]
    common.print0(
        f"{stage} {run.directory.name}: {lessons}\n"
        f"  held out: {held_out}\n"
        f"  training: {num_steps:,} steps of {rows:,} of the {dataset.n_rows(plan):,} rows "
        f"({batch_tokens:,} tokens)\n"
        f"  batch: {batch_in_words(why, rows, length, micro_rows, run.ranks.world)}\n"
        f"  devices: {run.ranks.world} x {compute}")
    if dataset.n_rows(plan) < rows:
        common.print0(f"  all rows together are less than one batch of {batch_tokens:,} tokens: "
                      "some are trained on more than once; a smaller --total_batch_size makes "
                      "more steps")

OLD_DEFAULT = 32  # --device_batch_size, before it could be left open

def rows_at_once(run, model, optimizer, compute, rows):
    """
    How many of a step's `rows` rows a device takes at once: --device_batch_size or, where that is
    -1, as many as the run has recorded, else as many as fit a GPU by memory.py's formula, elsewhere
    32. Recorded with what else was chosen: another number would round otherwise. On another device
    than that of the record no more than fit there, which is not recorded. Collective.
    """
    device = ", ".join(sorted(set(run.ranks.gather(device_name(compute.device)))))
    asked, asked_on = run.settings["device_batch_size"], device
    chosen = run.record.get("chosen")
    if asked == -1 and chosen:
        asked = chosen.get("device_batch_size", OLD_DEFAULT)
        asked_on = chosen.get("device", device)
    most = asked
    if asked == -1 or asked_on != device:
        most = OLD_DEFAULT
        if compute.device.type == "cuda":
            most = memory.MOST_TOKENS // model.config.sequence_len or 1
            fitting = memory.rows_that_fit(model, optimizer, compute.dtype, compute.compile, most)
            most = -run.ranks.all_reduce_max(-fitting)  # the least of all ranks
    if asked == -1:
        asked = most
    run.update_record(chosen={**compute.recorded(), "device": asked_on, "device_batch_size": asked})
    micro_rows = dataset.fit_micro_rows(rows, min(asked, most), run.ranks.world)
    run.settings["device_batch_size"] = micro_rows  # of which half is tried where memory runs out
    return micro_rows

# -------------------------------------------------------------------------------------------------
# a loss that goes wrong

EXPLODED = 50         # steps in a row with a loss far above its level before a run gives up
EXPLODED_AT_END = 10  # the same where they are its last ones: fewer are a few hard batches

@dataclass
class LossGuard:
    """Looks at the loss of each step for the two ways in which it goes wrong: no finite gradient,
    and a loss that explodes."""
    run: object
    optimizer: object
    max_skipped: int
    skipped: int = 0                           # steps in a row without a finite gradient
    first: list = field(default_factory=list)  # losses, until 20 are there
    level: float = math.inf                    # the mean of the loss over about 50 steps
    steps_above: int = 0                       # in a row, far above the level

    def recall(self):
        """Goes through the losses of earlier attempts, which begin_loop has left in metrics.jsonl:
        a run that was interrupted judges its next loss as one that was not. Collective."""
        for loss in self.run.ranks.on_rank0(finite_losses, self.run.directory):
            self.follow(loss)

    def follow(self, loss):
        """The loss of a step: moves the level, or counts the step as one far above it."""
        if len(self.first) < 20:  # their median, since one batch may be much easier than others
            self.first.append(loss)
            self.level = sorted(self.first)[len(self.first) // 2]
        if loss <= 1.5 * self.level + 0.5:
            self.level += 0.02 * (loss - self.level)
            self.steps_above = 0
        else:
            self.steps_above += 1

    def in_trouble(self):
        """Whether nothing should be saved now: the checkpoint of better days would go. A trial's
        first steps are too few for a level, and what it saves is thrown away."""
        return self.skipped > 0 or (self.steps_above > 0 and not self.run.try_out)

    def check_or_exit(self, step, loss, norm):
        """Looks at the loss after `step` steps and at the norm of its gradient. Failure (code 1)
        after max_skipped steps in a row without a finite gradient, where the last step of all has
        none, or after EXPLODED steps in a row far above the level (EXPLODED_AT_END, if they are the
        last ones)."""
        if not self.check_finite_or_exit(step, loss, norm):
            return
        self.follow(loss)
        if self.steps_above == 0:
            return
        above = f"loss {loss:.4f} is far above its level of {self.level:.4f}"
        if self.steps_above % 10 == 1:
            common.print0(f"{above} ({self.steps_above} steps in a row): not saving "
                          "checkpoints until it falls")
        at_most = EXPLODED_AT_END if step == self.run.clock.num_steps else EXPLODED
        if self.steps_above >= at_most:
            self.give_up(f"the loss has exploded: for {self.steps_above} steps in a row {above}",
                         step)

    def check_finite_or_exit(self, step, loss, norm):
        """-> whether both are finite; if not the optimizer has left the step out. Failure (code 1)
        after max_skipped such steps in a row, or where the last step of all, or of a trial, is one:
        a model that gives no number is not finished. A gradient that was too large for float16 is
        no such fault: the optimizer has halved its scale."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        scale = self.optimizer.loss_scale
        lowered = f"; loss scale {scale:,.0f} from here on" if self.optimizer.most_scale > 1 else ""
        common.print0(f"loss {loss}, gradient norm {norm}: this step was skipped "
                      f"({self.skipped} in a row){lowered}")
        last = TRY_OUT_STEPS if self.run.try_out else self.run.clock.num_steps
        overflow = math.isfinite(loss) and scale > 1
        if self.skipped > self.max_skipped or (step == last and not overflow):
            self.give_up(f"the last steps had no finite gradient ({self.skipped} in a row)", step)
        return False

    def give_up(self, why, step):
        """Failure (code 1) that names the last good checkpoint and how to go back to it."""
        self.run.finish_save()
        rewind.give_up(self.run, why, step)

def finite_losses(directory):
    """The losses of the steps in metrics.jsonl, without those that were skipped."""
    lines = common.read_json_lines(directory / "metrics.jsonl")
    both = [(line.get("loss", math.nan), line.get("norm", math.nan)) for line in lines
            if line.get("kind") == "train"]  # a damaged line may lack a key
    return [loss for loss, norm in both if math.isfinite(loss) and math.isfinite(norm)]

# -------------------------------------------------------------------------------------------------
# measuring

def is_due(run, step, every):
    """Every so many steps (0: never) and after the last one; also once, before the first, where the
    run only tries itself out."""
    if step == run.clock.num_steps or (run.try_out and step == 0):
        return True
    return every > 0 and step % every == 0

@torch.inference_mode()
def bits_per_byte(run, model, plan, tokenizer, tokens, micro_rows, device):
    """
    Bits per byte of text over the first rows of `plan` that hold `tokens` tokens (all, if there are
    fewer): nats over all targets that stand for bytes, divided by ln 2 times their bytes. Special
    tokens stand for none. -> float (nan where no target stands for a byte), or None if asked to
    stop. Collective.
    """
    wanted = dataset.rows_to_measure(plan, tokens)
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(device)
    precise = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    nats = torch.zeros((), dtype=precise, device=device)
    total_bytes = torch.zeros((), dtype=torch.long, device=device)
    turn = micro_rows * run.ranks.world
    n = min(wanted, 2 * turn) if run.try_out else wanted
    for start in range(0, n, turn):  # as many turns on every rank, since they agree in each
        if run.should_stop():
            common.print0("stopped in a measurement, which begins anew: fewer --eval_tokens take "
                          "less time")
            return None
        if run.try_out:
            nats.item()  # waits for the device: the last turn is timed, since the first is slow
            began = time.monotonic()
        first = start + run.ranks.rank * micro_rows
        mine = range(first, min(n, first + micro_rows))
        if not mine:
            continue
        rows, counted = dataset.read_rows(plan, mine)
        x, y = to_device(rows[:, :-1].copy(), device), to_device(rows[:, 1:].copy(), device)
        sizes = token_bytes[y] * to_device(counted[:, 1:].astype("int64"), device)
        losses = model.nats(x, y)
        nats += (losses * (sizes > 0)).sum(dtype=nats.dtype)
        total_bytes += sizes.sum()
    nats, total_bytes = run.ranks.all_reduce_sum(nats), run.ranks.all_reduce_sum(total_bytes)
    if run.try_out:
        run.eval_seconds = (time.monotonic() - began) * wanted / (n - start)
    return nats / (math.log(2) * total_bytes) if total_bytes else math.nan

TURNED = 0.005  # validation this share above its best, two measurements in a row, has turned up

def turned_up(values):
    """The place in a list of measurements at which validation has turned up, None where it has not.
    examples: [3, 2, 2.1, 2.2] -> 3;  [3, 2, 2.1, 1.9] -> None"""
    for i in range(2, len(values)):
        if min(values[i - 1:i + 1]) > min(values[:i - 1]) * (1 + TURNED):
            return i
    return None

def log_measured(run, step, val_bpb):
    """Logs a measurement of bits per byte, and says once where validation turns up while the
    training goes on: from there it learns its text by heart."""
    run.log(kind="val", step=step, val_bpb=val_bpb)
    if run.ranks.rank != 0:
        return
    lines = common.read_json_lines(run.directory / "metrics.jsonl")
    measured = [(line["val_bpb"], line.get("step", 0)) for line in lines if "val_bpb" in line]
    if turned_up([value for value, _ in measured]) == len(measured) - 1:
        best, its_step = min(measured)
        common.print0(f"warning: validation has turned up: it was best at step {its_step:,} with "
                      f"{best:.4f} bits per byte and is {val_bpb:.4f} now (overfitting): more "
                      "text, fewer steps or a smaller model would help")

def continuations(run, model, tokenizer, prompts, tokens):
    """How a model goes on with texts, greedily, for so many tokens. -> [{"prompt", "text"}], cut
    short where the run is asked to stop"""
    asked = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    said = engine.generate(model, tokenizer, asked, tokens, keep_going=run.going)
    return [{"prompt": prompt, "text": tokenizer.decode(ids)}
            for prompt, (ids, _) in zip(prompts, said)]

def print_samples(run, model, tokenizer, prompts):
    if run.ranks.rank == 0:
        for sample in continuations(run, model, tokenizer, prompts, 48):
            common.print0(f"  sample: {sample['prompt'] + sample['text']!r}"[:300])
