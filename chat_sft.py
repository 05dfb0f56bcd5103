"""
Phase 4: supervised finetuning. The midtrained model learns to answer: only what the assistant says is trained on.

    python chat_sft.py --data=toy
    torchrun --standalone --nproc_per_node=8 chat_sft.py

Needs the midtrained model (mid_train.py) and the task files (prepare_data.py). Kill it at any moment and run it again.
"""
import common
common.install_stop_handlers()  # before torch is imported

import checkpoint
import configurator
import data as dataset
import phase
import tasks
import tokenizer as tok

data = "fineweb_edu"         # the data set the base model was trained on
tag = ""                     # the midtrained model to go on from; empty: the newest
mixture = ["smoltalk:10000", "arc_easy", "arc_challenge", "gsm8k", "identity", "simplespelling:300", "spellingbee:300"]  # what it learns from: "name", "name*epochs", "name:examples"
extra_conversations = ""     # a .jsonl file of your own conversations, added to the mixture
max_steps = -1               # stop after so many steps; -1: one pass through the mixture
total_batch_size = -1        # tokens a step; -1: the base model's
matrix_lr = 0.02             # Muon
embedding_lr = 0.2           # AdamW: token and value embeddings
unembedding_lr = 0.004       # AdamW: lm_head
scalar_lr = 0.05             # AdamW: per-layer scalars and gates
lr_fraction = 0.1            # all learning rates are multiplied by it
warmdown_ratio = 1.0         # share of the steps with falling learning rate
seed = 1337                  # decides the order
# ---- settings below may change at every resume
device_batch_size = 32       # rows a device holds at once
eval_every = 150             # steps between measurements on held-out conversations; 0: only at the end
held_out = ["smoltalk:1000"]   # conversations it is measured on, of the test splits
eval_tokens = 1_048_576      # tokens of them
save_minutes = 3.0           # minutes between saves
keep = 1                     # checkpoints kept
time_limit = None            # minutes until it saves and stops; None: no limit (under Slurm the job's)
max_skipped = 10             # steps in a row skipped for a gradient that is not finite before it gives up
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads a rank; 0: the cores divided by the ranks
compile = "auto"             # torch.compile: auto, True, False
start_over = False           # put the old run of this tag aside and start from nothing
settings = configurator.configure(globals())

# ---------------------------------------------------------------------------------------------------------------------
# inputs, all checked before a model is made

common.check(device_batch_size >= 1, f"--device_batch_size must be at least 1, not {device_batch_size}")
mixture = mixture + ([extra_conversations] if extra_conversations else [])
parent_dir, parent_step = checkpoint.find_model("mid", data, tag)
directory = common.stage_dir("sft", data, parent_dir.name)
metrics = directory / "metrics.jsonl"
tokenizer = tok.load_tokenizer(common.tokenizer_dir(data))
checkpoint.must_fit(parent_dir, parent_step, tokenizer)
files, val_files = tasks.fingerprint(mixture, "train", data), tasks.fingerprint(held_out, "test", data)

common.init_distributed()
resumed = common.on_rank0(phase.begin, directory, "chat_sft", settings,
                          {"tokenizer": tokenizer.fingerprint, "tasks": files, "mid": checkpoint.fingerprint(parent_dir, parent_step)},
                          lambda: None if checkpoint.newest(directory) is not None else "no whole checkpoint", start_over)

# ---------------------------------------------------------------------------------------------------------------------
# model, optimizer, rows

import torch
import optim
import training

compute = common.init_compute(settings, resumed.get("chosen"))
phase.note(directory, chosen=common.chosen(compute))
found = common.on_rank0(checkpoint.newest, directory)
model_state, optim_state, meta = checkpoint.load(directory, found) if found is not None else checkpoint.load(parent_dir, parent_step, optimizer=False)
model = checkpoint.build_model(meta, model_state, compute.device, compute.dtype)
row_length = model.config.sequence_len + 1
stores = dataset.tokenize_conversations(files + f"-{seed}", data, lambda: tasks.mixture(mixture, data, seed), tokenizer, row_length)
val_stores = dataset.tokenize_conversations(val_files + "-val", data, lambda: tasks.mixture(held_out, data, 1, "test"), tokenizer, row_length)
plan = dataset.make_plan(stores, row_length, tokenizer.bos, split=False)
val_plan = dataset.make_plan(val_stores, row_length, tokenizer.bos, split=False)

batch_tokens = total_batch_size if total_batch_size != -1 else meta["batch_tokens"]
rows = max(1, batch_tokens // model.config.sequence_len)
batch_tokens = rows * model.config.sequence_len
num_steps = max(1, dataset.n_rows(plan) // rows)
num_steps = min(num_steps, max_steps) if max_steps != -1 else num_steps
micro_rows = dataset.fit_micro_rows(rows, device_batch_size, compute.world)
scale = lr_fraction * min(1.0, (batch_tokens / 2 ** 19) ** 0.5)
optimizer = optim.make_optimizer(model, matrix_lr=matrix_lr * scale, embedding_lr=embedding_lr * scale,
                                 unembedding_lr=unembedding_lr * scale, scalar_lr=scalar_lr * scale, weight_decay=0.0, compute_dtype=compute.dtype)
common.print0(f"sft {directory.name}: {stores[0].facts['documents']:,} conversations ({stores[0].facts['cut']} longer than a row and cut) in {dataset.n_rows(plan):,} rows, "
              f"{num_steps:,} steps of {batch_tokens:,} tokens; {compute.world} x {compute.device.type}, {compute.dtype}, compile={compute.compile}")

# ---------------------------------------------------------------------------------------------------------------------
# where it was

step, spent, skipped, loss, val_bpb = 0, 0.0, 0, None, None
if found is not None:
    optimizer.load_state_dict(optim_state)
    step, spent, skipped, loss, val_bpb = meta["step"], meta["seconds"], meta["skipped"], meta["loss"], meta["val_bpb"]
    common.print0(f"continuing at step {step:,} of {num_steps:,}")
common.trim_metrics(metrics, step)
common.set_deadline(time_limit)
forward = torch.compile(model, dynamic=False) if compute.compile else model
training.start_clock(num_steps, step, spent, save_minutes)

def save():
    state = optimizer.state_dict()  # a collective call: gathers the shards
    if compute.rank == 0:
        training.saved(checkpoint.save(directory, step, model.state_dict(), state, {
            "model": meta["model"], "tokenizer": tokenizer.fingerprint, "settings": settings, "num_steps": num_steps,
            "batch_tokens": batch_tokens, "tokens": step * batch_tokens, "seconds": training.spent(),
            "skipped": skipped, "loss": loss, "val_bpb": val_bpb}, keep))

# ---------------------------------------------------------------------------------------------------------------------
# the loop: save when due, measure when due, then train one step

while True:
    last = step == num_steps
    due = common.agree(2 if common.stop_requested() else 1 if training.save_due() else 0)
    if due or last:
        save()
    if due == 2 and not last:
        phase.interrupted(directory, f"{common.stop_requested() or 'another rank was asked'}: saved at step {step} of {num_steps}")

    if last or (eval_every and step % eval_every == 0):
        if step and not due and not last:
            save()  # before measuring: an evaluation that dies loses nothing
        val_bpb = training.bits_per_byte(model, val_plan, tokenizer, eval_tokens, micro_rows, compute)
        if val_bpb is None:
            phase.interrupted(directory, f"stopped while measuring; saved at step {step} of {num_steps}")
        common.append_metrics(metrics, {"kind": "val", "step": step, "val_bpb": val_bpb})
        common.print0(f"step {step:,}: held-out conversations {val_bpb:.4f} bits per byte")
    if last:
        break

    lr_scale = training.lr_scale(step, num_steps, 0.0, warmdown_ratio, 0.0)
    optimizer.set(lr_scale=lr_scale, muon_momentum=0.95, muon_weight_decay=0.0)
    # a row of which nothing is trained on adds 0: the sum is divided by what the whole batch counts
    counted = dataset.counted_targets(plan, seed, step, rows)
    total = torch.zeros((), device=compute.device)
    for x, y in dataset.batch(plan, seed, step, rows, micro_rows, compute.rank, compute.world):
        micro_loss = forward(training.to_device(x, compute), training.to_device(y, compute), reduction="sum") / max(counted, 1)
        micro_loss.backward()
        total += micro_loss.detach()
    norm = optimizer.step()
    optimizer.zero_grad()
    loss = training.all_sum(total)
    step += 1

    skipped = training.count_skipped(skipped, loss, norm, max_skipped, directory)
    reading = training.tick(step, f"loss {loss:.4f} | lr {lr_scale:.2f}", batch_tokens, model.flops_per_token(), compute)
    common.append_metrics(metrics, {"kind": "train", "step": step - 1, "loss": loss, "norm": norm, "lr_scale": lr_scale, "clock": reading})

phase.done(directory, step=step, seconds=training.spent(), val_bpb=val_bpb)
common.print0(f"sft {directory.name}: {val_bpb:.4f} bits per byte after {step:,} steps in {common.clock(training.spent())}")
common.leave()
