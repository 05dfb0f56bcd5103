"""
Phase 5: reinforcement learning on math word problems with the calculator. A policy gradient in the manner of GRPO
(arXiv 2402.03300) without its reference model and clipping: on-policy, a group of samples for each problem, the advantage
of a sample is its reward less the group's mean, the loss is normalised by tokens (DAPO, arXiv 2503.14476).

    python chat_rl.py --data=toy
    torchrun --standalone --nproc_per_node=8 chat_rl.py

Needs the finetuned model (chat_sft.py) and the task files (prepare_data.py). Kill it at any moment and run it again.
"""
import common
common.install_stop_handlers()  # before torch is imported

import time

import numpy as np

import checkpoint
import configurator
import data as dataset
import execution
import phase
import tasks
import tokenizer as tok

data = "fineweb_edu"         # the data set the finetuned model comes from
tag = ""                     # the finetuned model to go on from; empty: the newest
task = "gsm8k"               # what it practises
problems_per_step = 16       # problems a step
samples = 16                 # samples of each problem
num_steps = -1               # steps; -1: one pass through the training problems
max_new_tokens = 256         # tokens of a sample
temperature = 1.0            # of the samples
matrix_lr = 0.02             # Muon
embedding_lr = 0.2           # AdamW: token and value embeddings
unembedding_lr = 0.004       # AdamW: lm_head
scalar_lr = 0.0              # AdamW: per-layer scalars and gates
lr_fraction = 0.05           # all learning rates are multiplied by it
seed = 1337                  # decides the order of the problems and every draw
# ---- settings below may change at every resume
device_batch_size = 8        # rows a device trains on at once
rollout_rows = 64            # rows a device generates at once
eval_every = 60              # steps between measurements of pass@k; 0: only at the end
eval_problems = 400          # held-out problems measured
eval_samples = 8             # samples of each: the k of pass@k
save_minutes = 3.0           # minutes between saves
keep = 1                     # checkpoints kept
time_limit = None            # minutes until it saves and stops; None: no limit (under Slurm the job's)
max_skipped = 10             # steps in a row skipped for a gradient that is not finite before it gives up
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads a rank; 0: the cores divided by the ranks
compile = False              # not compiled: every batch has another shape
start_over = False           # put the old run of this tag aside and start from nothing
settings = configurator.configure(globals())

FLAT = 20  # steps in a row without any variance of the reward before it says so

# ---------------------------------------------------------------------------------------------------------------------
# inputs, all checked before a model is made

for name in ("problems_per_step", "samples", "rollout_rows", "eval_problems", "eval_samples"):
    common.check(settings[name] >= 1, f"--{name} must be at least 1, not {settings[name]}")
common.check(task in tasks.TASKS and tasks.TASKS[task]["kind"] == "generative", f"--task={task}: there is no such generative task")
parent_dir, parent_step = checkpoint.find_model("sft", data, tag)
directory = common.stage_dir("rl", data, parent_dir.name)
metrics = directory / "metrics.jsonl"
tokenizer = tok.load_tokenizer(common.tokenizer_dir(data))
checkpoint.must_fit(parent_dir, parent_step, tokenizer)
files = tasks.fingerprint([task], "train", data), tasks.fingerprint([task], "test", data)

common.init_distributed()
resumed = common.on_rank0(phase.begin, directory, "chat_rl", settings,
                          {"tokenizer": tokenizer.fingerprint, "tasks": "-".join(files), "sft": checkpoint.fingerprint(parent_dir, parent_step)},
                          lambda: None if checkpoint.newest(directory) is not None else "no whole checkpoint", start_over)

# ---------------------------------------------------------------------------------------------------------------------
# model, optimizer, problems

import torch
import gpt
import optim
import training

compute = common.init_compute(settings, resumed.get("chosen"))
phase.note(directory, chosen=common.chosen(compute))
found = common.on_rank0(checkpoint.newest, directory)
model_state, optim_state, meta = checkpoint.load(directory, found) if found is not None else checkpoint.load(parent_dir, parent_step, optimizer=False)
model = checkpoint.build_model(meta, model_state, compute.device, compute.dtype)
device_batch_size = training.rows_that_fit("rl", "device_batch_size", device_batch_size, data, directory.name, compute)
rollout_rows = training.rows_that_fit("rl", "rollout_rows", rollout_rows, data, directory.name, compute)
train_items, test_items = tasks.load(task, "train", data), tasks.load(task, "test", data, eval_problems)
num_steps = num_steps if num_steps != -1 else max(1, len(train_items) // problems_per_step)
optimizer = optim.make_optimizer(model, matrix_lr=matrix_lr * lr_fraction, embedding_lr=embedding_lr * lr_fraction,
                                 unembedding_lr=unembedding_lr * lr_fraction, scalar_lr=scalar_lr * lr_fraction, weight_decay=0.0, compute_dtype=compute.dtype)
common.print0(f"rl {directory.name}: {num_steps:,} steps of {problems_per_step} problems with {samples} samples each, {len(train_items):,} problems; "
              f"{compute.world} x {compute.device.type}, {compute.dtype}")

step, spent, skipped, flat, reward, pass_at = 0, 0.0, 0, 0, None, {}
if found is not None:
    optimizer.load_state_dict(optim_state)
    step, spent, skipped, flat, reward, pass_at = (meta[k] for k in ("step", "seconds", "skipped", "flat", "reward", "pass_at"))
    common.print0(f"continuing at step {step:,} of {num_steps:,}")
common.trim_metrics(metrics, step)
common.set_deadline(time_limit)
training.start_clock(num_steps, step, spent, save_minutes)
training.explain_out_of_memory("rl", device_batch_size=device_batch_size, rollout_rows=rollout_rows)

def save(wait=True):
    t0 = time.monotonic()
    state = optimizer.state_dict()  # a collective call: gathers the shards
    if compute.rank == 0:
        checkpoint.save(directory, step, model.state_dict(), state, {
            "model": meta["model"], "batch_tokens": meta["batch_tokens"], "tokenizer": tokenizer.fingerprint, "settings": settings,
            "num_steps": num_steps, "seconds": training.spent(), "skipped": skipped, "flat": flat, "reward": reward, "pass_at": pass_at}, keep, wait)
    training.saved(t0)

def rollout(items, numbers, n, stream, turn):
    """
    n samples of each of items[i] for i in numbers. Each sample's random numbers depend on (seed, stream, turn, item, sample) alone.
    -> per number a list of n (prompt, tokens, forced, reward); incomplete when a stop was requested
    """
    prompts = [tokenizer.render_for_completion(items[i]) for i in numbers for _ in range(n)]
    uniforms = np.stack([common.rng(seed, stream, turn, i, k).random(max_new_tokens) for i in numbers for k in range(n)])
    answers = gpt.generate(model, tokenizer, prompts, max_new_tokens, temperature, uniforms=uniforms, calculate=execution.calculate,
                           max_rows=rollout_rows, keep_going=lambda: not common.stop_requested())
    made = [(prompt, tokens, forced, float(tasks.correct(items[numbers[j // n]], tokenizer.decode(tokens))))
            for j, (prompt, (tokens, forced)) in enumerate(zip(prompts, answers))]
    return [made[i:i + n] for i in range(0, len(made), n)]

def measure():
    """pass@1 ... pass@k over the held-out problems, dealt to the ranks: {"1": mean, "8": share with any right}, or None if asked to stop."""
    hits = torch.zeros(2)
    turns = range(0, len(test_items), compute.world * max(1, rollout_rows // eval_samples))
    for start in turns:
        mine = [i for i in range(start, min(start + turns.step, len(test_items))) if i % compute.world == compute.rank]
        groups = rollout(test_items, mine, eval_samples, 3, 0) if mine else []
        if common.agree(1 if common.stop_requested() else 0):
            return None
        for group in groups:
            rewards = [r for _, _, _, r in group]
            hits += torch.tensor([sum(rewards) / len(rewards), max(rewards)])
    one, any_right = (training.all_sum(h) / len(test_items) for h in hits)
    return {"1": one, str(eval_samples): any_right}

# ---------------------------------------------------------------------------------------------------------------------
# the loop: save when due, measure when due, then sample and train one step

while True:
    last = step == num_steps
    measuring = last or (eval_every and step % eval_every == 0)
    training.save_or_stop(save, directory, step, num_steps, measuring)

    if measuring:
        measured = measure()
        if measured is None:
            phase.interrupted(directory, f"stopped while measuring; saved at step {checkpoint.last_step(directory)} of {num_steps}")
        pass_at = measured
        common.append_metrics(metrics, {"kind": "val", "step": step, **{f"pass@{k}": v for k, v in pass_at.items()}})
        common.print0(f"step {step:,}: held-out problems " + ", ".join(f"pass@{k} {v:.3f}" for k, v in pass_at.items()))
    if last:
        break

    # sample: the problems of this step, those at places rank, rank + world, ... on this rank
    numbers = dataset.batch_rows(len(train_items), seed, step, problems_per_step)
    groups = rollout(train_items, mine, samples, 2, step) if (mine := numbers[compute.rank::compute.world]) else []
    if common.agree(1 if common.stop_requested() else 0):
        save()  # the samples of this step are drawn again, the same ones, when it continues
        training.stopped(directory, num_steps)

    sequences, rewards, lengths = [], [], []
    for group in groups:
        mean = sum(r for _, _, _, r in group) / samples
        for prompt, tokens, forced, r in group:
            rewards.append(r)
            lengths.append(len(tokens) - sum(forced))
            if r != mean and tokens:  # a sample no better and no worse than its group has no gradient
                sequences.append((prompt + tokens, [0.0] * len(prompt) + [0.0 if f else r - mean for f in forced]))
    counted = training.all_sum(sum(lengths))
    reward = training.all_sum(sum(rewards)) / (problems_per_step * samples)
    with_gradient = training.all_sum(len(sequences))

    # train: the log-probability of each token that the model chose itself, weighted by the advantage
    lr_scale = 1.0 - step / num_steps
    optimizer.set(lr_scale=lr_scale, muon_momentum=0.95, muon_weight_decay=0.0)
    total = torch.zeros((), device=compute.device)
    for start in range(0, len(sequences), device_batch_size):
        part = sequences[start:start + device_batch_size]
        idx, _ = gpt.pad_right([ids for ids, _ in part])
        longest = idx.size(1)
        advantages = torch.tensor([a + [0.0] * (longest - len(a)) for _, a in part])
        idx, advantages = idx.to(compute.device), advantages.to(compute.device)
        nats = model(idx[:, :-1], idx[:, 1:].contiguous(), reduction="none")
        micro_loss = (nats * advantages[:, 1:]).sum() / max(counted, 1.0)
        micro_loss.backward()
        total += micro_loss.detach()
    norm = optimizer.step() if with_gradient else 0.0
    optimizer.zero_grad()
    loss = training.all_sum(total)
    flat = 0 if with_gradient else flat + 1
    if flat and flat % FLAT == 0:
        common.print0(f"the reward has had no variance for {flat} steps (mean {reward:.3f}): there is nothing to learn from; easier or harder problems, more samples or a higher temperature would help")
    step += 1

    skipped = training.count_skipped(skipped, loss, norm, max_skipped, directory)
    reading = training.tick(step, f"reward {reward:.3f} | {counted / (problems_per_step * samples):.0f} tokens a sample", counted, model.flops_per_token(), compute)
    common.append_metrics(metrics, {"kind": "train", "step": step - 1, "loss": loss, "reward": reward, "norm": norm, "with_gradient": int(with_gradient),
                                    "tokens": int(counted), "lr_scale": lr_scale, "clock": reading})

phase.done(directory, step=step, seconds=training.spent(), pass_at=pass_at)
common.print0(f"rl {directory.name}: " + ", ".join(f"pass@{k} {v:.3f}" for k, v in pass_at.items()) + f" after {step:,} steps in {common.clock(training.spent())}; saving took {100 * training.save_share():.2f} % of it")
common.leave()
