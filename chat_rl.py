"""
Phase 5: reinforcement learning. The finetuned model tries math problems many times, with the
calculator, and learns from the answers that were right. A policy gradient in the manner of GRPO
(arXiv 2402.03300) without its reference model and clipping: on-policy, a group of samples for each
problem, the advantage of a sample is its reward less the group's mean, the loss is normalised by
tokens (DAPO, arXiv 2503.14476).

    python chat_rl.py config/toy_rl.py
    torchrun --standalone --nproc_per_node=8 chat_rl.py

Needs the finetuned model (chat_sft.py) and the task files (prepare_data.py). Kill it at any moment
and run it again.
"""
from run import Run

run = Run.start("chat_rl")  # a signal counts from here on; importing torch takes seconds

import time
from typing import NamedTuple

import numpy as np

import checkpoint
import common
import configurator
import data as dataset
import execution
import models
import tasks

data = "fineweb_edu"         # the data set the finetuned model comes from
tag = ""                     # the finetuned model to go on from; empty: the newest
task = "gsm8k"               # what it practises; a task whose answers can be checked
problems_per_step = 16       # problems in a step, on all ranks
samples = 16                 # samples of each problem, which are compared with each other
num_steps = -1               # number of steps; -1: one pass through the training problems
max_new_tokens = 256         # longest sample, in tokens
temperature = 1.0            # temperature of the samples
matrix_lr = 0.02             # Muon learning rate of the blocks' matrices
embedding_lr = 0.2           # AdamW learning rate of token and value embeddings
unembedding_lr = 0.004       # AdamW learning rate of lm_head
scalar_lr = 0.0              # AdamW learning rate of per-layer scalars and gates
lr_fraction = 0.05           # multiplies all learning rates
seed = 1337                  # decides the order of the problems and every random draw
# ---- settings below may change at every resume
device_batch_size = 8        # samples that a device trains on at once; less if memory runs out
rollout_rows = 64            # samples that a device generates at once; less if memory runs out
eval_every = 60              # steps between measurements of pass@k; 0: only at the end
eval_problems = 400          # how many held-out problems are measured, at most
eval_samples = 8             # samples of each held-out problem: the k of pass@k
save_minutes = 3.0           # minutes between checkpoints
keep = 1                     # how many checkpoints are kept on disk
time_limit = None            # minutes of its loop until it stops; None: the Slurm job's, if any
max_skipped = 10             # steps in a row without a finite gradient before the run fails
device = "auto"              # where it computes: auto, cuda, mps or cpu
dtype = "auto"               # to compute in: bfloat16, float32, auto (the faster of both), float16
threads = 0                  # CPU threads of a rank; 0: the cores divided by the ranks
start_over = False           # put the old run of this tag aside and start from nothing
rewind = -1                  # go back to the checkpoint of this step, skip what came since; -1: no
try_out = False              # a trial run of a few steps: time, memory and disk; changes nothing
settings = configurator.configure(globals())

FLAT = 20  # steps in a row without any variance of the reward before it says so

# -------------------------------------------------------------------------------------------------
# inputs: opened and judged before anything on disk changes

tasks.check_names(settings)
train_items = tasks.load(task, "train", data)
test_items = tasks.load(task, "test", data, eval_problems)
files = [tasks.fingerprint([task], split, data) for split in ("train", "test")]

run.ranks.join(device)
parent, parent_step, directory = models.where_to_go_on(run, "rl", data, tag, try_out)
tokenizer = models.load_tokenizer_of(parent, parent_step, data)
# takes the lock; ends the process if the run is done, or was begun with other settings or tasks
run.open_or_exit(directory, settings,
                 {"tokenizer": tokenizer.fingerprint, "tasks": "-".join(files),
                  "sft": checkpoint.fingerprint(parent, parent_step)})

# -------------------------------------------------------------------------------------------------
# model and optimizer

import torch  # only here: it takes seconds, and what is wrong above is said without it

import engine
import optim
import training
from compute import choose_compute, peak_flops

ranks = run.ranks
compute = choose_compute(ranks, settings, run.record.get("chosen"))
run.update_record(chosen=compute.recorded())
model = models.load_model(parent, parent_step, compute.device, compute.dtype)
if num_steps == -1:
    num_steps = max(1, len(train_items) // problems_per_step)
optimizer = optim.make_optimizer(model, settings, lr_fraction, 0.0, compute.dtype)
common.print0(f"rl {directory.name}: {num_steps:,} steps of {problems_per_step} problems with "
              f"{samples} samples each, {len(train_items):,} problems; {ranks.world} x {compute}")

# -------------------------------------------------------------------------------------------------
# samples

class Sample(NamedTuple):
    prompt: list   # token ids
    tokens: list   # token ids of the answer
    forced: list   # for each of these whether the calculator said it
    reward: float  # 1.0 where the answer is right, else 0.0

def rollout(items, numbers, n, stream, turn):
    """
    This rank's share: n samples of each of items[i] for every world-th i of numbers. A sample's
    random numbers depend on (seed, stream, turn, item, sample) alone: not on the rank, nor on what
    is sampled beside it. Where an item comes again, its samples count on.
    -> for each number its group, a list of n Samples; incomplete when asked to stop
    """
    before = [numbers[:j].count(i) for j, i in enumerate(numbers)]
    numbers, before = (part[ranks.rank::ranks.world] for part in (numbers, before))
    if not numbers:
        return []
    prompts = [tokenizer.render_for_completion(items[i]) for i in numbers for _ in range(n)]
    uniforms = np.stack([common.rng(seed, stream, turn, i, k).random(max_new_tokens)
                         for i, earlier in zip(numbers, before)
                         for k in range(earlier * n, earlier * n + n)])
    answers = engine.generate(
        model, tokenizer, prompts, max_new_tokens, temperature, uniforms=uniforms,
        calculate=execution.calculate, max_rows=rollout_rows, keep_going=run.going)
    made = []
    for j, (tokens, forced) in enumerate(answers):
        right = tasks.correct(items[numbers[j // n]], tokenizer.decode(tokens))
        made.append(Sample(prompts[j], tokens, forced, float(right)))
    return [made[i:i + n] for i in range(0, len(made), n)]

def measure_pass_at():
    """pass@1 and pass@k over the held-out problems, dealt to the ranks: {"1": mean, "8": share with
    any right}, or None if asked to stop. Collective."""
    hits, n, began = torch.zeros(2), len(test_items), time.monotonic()
    at_once = ranks.world * max(1, rollout_rows // eval_samples)
    for start in range(0, n, at_once):
        numbers = list(range(start, min(start + at_once, n)))
        groups = rollout(test_items, numbers, eval_samples, 3, 0)
        if run.should_stop():
            return None
        for group in groups:
            rewards = [sample.reward for sample in group]
            hits += torch.tensor([sum(rewards) / len(rewards), max(rewards)])
        if run.try_out:  # one turn says how long all of them take
            run.eval_seconds = (time.monotonic() - began) * n / len(numbers)
            break
    mean, any_right = (ranks.all_reduce_sum(h) / n for h in hits)
    return {"1": mean, str(eval_samples): any_right}

def with_advantages(groups):
    """Samples -> [(token ids, advantage of each)]: reward less the group's mean on the tokens that
    the model chose itself, 0 on the prompt and on what the calculator said. A sample no better and
    no worse than its group has no gradient and is left out."""
    sequences = []
    for group in groups:
        mean = sum(sample.reward for sample in group) / samples
        for prompt, tokens, forced, reward in group:
            if reward != mean and tokens:
                own = [0.0 if f else reward - mean for f in forced]
                sequences.append((prompt + tokens, [0.0] * len(prompt) + own))
    return sequences

# -------------------------------------------------------------------------------------------------
# the loop: save when due, measure when due, then sample and train one step

# where it was: its own newest whole checkpoint goes over the finetuned model; without one, step 0
step, seconds = training.resume(run, model, optimizer)
run.begin_loop(step, num_steps, seconds, model.flops_per_token(), peak_flops(compute.device))
loss_guard = training.LossGuard(run, optimizer, max_skipped)
flat = 0  # steps in a row without any variance of the reward

while True:
    last = step == num_steps
    measure = training.is_due(run, step, eval_every)

    # All ranks agree here, between two steps: one that stopped alone would leave others waiting.
    stop, save_due = run.should_stop(), run.should_save()
    # Save before measuring, which may die; not while the loss is in trouble: a good one would go.
    wanted = stop or save_due or (measure and step > 0)
    if last or (wanted and not loss_guard.in_trouble()):
        run.save(step, model, optimizer, wait=bool(stop or measure), meta={
            "model": vars(model.config), "tokenizer": tokenizer.fingerprint})
    if stop:
        run.exit_interrupted(stop)

    if measure:
        pass_at = measure_pass_at()
        if pass_at is None:
            continue  # asked to stop in the middle: the lines above save and stop
        run.log(kind="val", step=step, **{f"pass@{k}": v for k, v in pass_at.items()})
        pass_at_k = ", ".join(f"pass@{k} {v:.3f}" for k, v in pass_at.items())
        common.print0(f"step {step:,}: held-out problems {pass_at_k}")
    if last:
        break

    # Sample: of this step's problems those at places rank, rank + world, ... on this rank. A stop
    # in the middle costs these samples: the same ones are drawn again when the run continues.
    number = training.batch_number(run, step)
    numbers = dataset.batch_rows(len(train_items), seed, number, problems_per_step)
    groups = rollout(train_items, numbers, samples, 2, number)
    if run.should_stop():
        continue
    sequences = with_advantages(groups)
    with_gradient = ranks.all_reduce_sum(len(sequences))
    made = [sample for group in groups for sample in group]
    own_tokens = sum(len(sample.tokens) - sum(sample.forced) for sample in made)
    counted = ranks.all_reduce_sum(own_tokens)
    all_samples = problems_per_step * samples
    reward = ranks.all_reduce_sum(sum(sample.reward for sample in made)) / all_samples

    # Train: the log-probability of each token that the model chose, weighted by its advantage; the
    # sum is divided by all tokens that were chosen, on all ranks, whatever their samples' rewards.
    lr_scale = 1.0 - step / num_steps
    optimizer.set(lr_scale=lr_scale, muon_momentum=0.95, muon_weight_decay=0.0)
    total = torch.zeros((), device=compute.device)
    for start in range(0, len(sequences), device_batch_size):
        part = sequences[start:start + device_batch_size]
        idx = engine.pad_right([ids for ids, _ in part])
        longest = idx.size(1)
        advantages = torch.tensor([a + [0.0] * (longest - len(a)) for _, a in part])
        idx, advantages = idx.to(compute.device), advantages.to(compute.device)
        nats = model(idx[:, :-1], idx[:, 1:], weights=advantages[:, 1:])
        micro_loss = nats / max(counted, 1.0)
        optimizer.scaled(micro_loss).backward()
        total += micro_loss.detach()
    # Where all rewards of each group are equal there is no gradient, and nothing changes: neither
    # the weights nor the momenta. A gradient that is not finite changes nothing either.
    norm = optimizer.step() if with_gradient else 0.0
    optimizer.zero_grad()
    loss = ranks.all_reduce_sum(total)
    step += 1

    loss_guard.check_finite_or_exit(step, loss, norm)
    flat = 0 if with_gradient else flat + 1
    if flat and flat % FLAT == 0:
        common.print0(f"the reward has had no variance for {flat} steps (mean {reward:.3f}): there "
                      "is nothing to learn from; easier or harder problems, more samples or a "
                      "higher temperature would help")
    shown = f"reward {reward:.3f} | {counted / all_samples:.0f} tokens a sample"
    run.log_step(step, shown, counted, loss=loss, reward=reward, norm=norm,
                 with_gradient=int(with_gradient), tokens=int(counted), lr_scale=lr_scale)

training.exit_done(run, pass_at_k, pass_at=pass_at)
