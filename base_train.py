"""
Phase 2: pretraining. Trains the base model on a data set and measures bits per byte on its validation split.

    python base_train.py --data=toy --depth=4 --max_seq_len=256             # a laptop
    torchrun --standalone --nproc_per_node=8 base_train.py --depth=20       # a node with 8 GPUs

Needs the data (prepare_data.py) and the tokenizer (tok_train.py). Kill it at any moment and run the same command again:
it continues from its last save. Saves go to base_checkpoints/<tag>/ and metrics to metrics.jsonl beside them.
"""
import common
common.install_stop_handlers()  # before torch is imported: a signal in the first seconds counts too

import dataclasses
import time

import checkpoint
import configurator
import data as dataset
import phase
import tokenizer as tok

data = "fineweb_edu"         # toy, fineweb_edu, climbmix, or a folder of .parquet, .jsonl(.gz) or .txt files
tag = ""                     # name of the run; empty: d<depth>
depth = 20                   # layers; width is 64 * depth
max_seq_len = 2048           # tokens a row
arch = "modern"              # or nanochat_2025, the plain model of November 2025
tokens_per_param = 12.0      # horizon: tokens trained on for each parameter of matrices and head
num_steps = -1               # horizon as a number of steps instead; -1: not given
target_flops = -1.0          # horizon as floating point operations instead; -1: not given
total_batch_size = -1        # tokens a step; -1: derived from the horizon
matrix_lr = 0.02             # Muon: all matrices of the blocks
embedding_lr = 0.3           # AdamW: token and value embeddings
unembedding_lr = 0.004       # AdamW: lm_head
scalar_lr = 0.5              # AdamW: per-layer scalars and gates
weight_decay = -1.0          # Muon, falls to 0 over the run; -1: derived from depth
warmup_ratio = 0.01          # share of the steps with rising learning rate
warmdown_ratio = 0.6         # share of the steps with falling learning rate
final_lr_fraction = 0.02     # learning rate at the end, relative
seed = 1337                  # decides weights and order of the data
# ---- settings below may change at every resume
device_batch_size = 32       # rows a device holds at once: less where memory runs out, the result stays the same to rounding
eval_every = 250             # steps between measurements of validation bits per byte; 0: only at the end
eval_tokens = 10_485_760     # tokens of the validation split measured (all, if it has fewer)
sample_every = 1000          # steps between samples; 0: only at the end
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

common.check(1 <= depth <= 100, f"--depth must be 1 to 100, not {depth}")
common.check(max_seq_len >= 16, f"--max_seq_len must be at least 16, not {max_seq_len}")
common.check(arch in ("modern", "nanochat_2025"), f"--arch is modern or nanochat_2025, not {arch!r}")
common.check(tokens_per_param > 0, f"--tokens_per_param must be more than 0, not {tokens_per_param}")
common.check(total_batch_size == -1 or (total_batch_size >= max_seq_len and total_batch_size % max_seq_len == 0),
             f"--total_batch_size must be a multiple of --max_seq_len={max_seq_len}, not {total_batch_size}")
directory = common.stage_dir("base", data, tag or f"d{depth}")
metrics = directory / "metrics.jsonl"
dataset.dataset_files(data)
tokenizer = tok.load_tokenizer(common.tokenizer_dir(data))

common.init_distributed()
begun_with = phase.earlier(directory, settings, start_over).get("train_files")  # what was added since does not stop a run
train = dataset.tokenize_files(data, "train", tokenizer, begun_with)
val = dataset.tokenize_files(data, "val", tokenizer)
resumed = common.on_rank0(phase.begin, directory, "base_train", settings,
                          {"tokenizer": tokenizer.fingerprint, "data": dataset.fingerprint(train + val)},
                          lambda: None if checkpoint.newest(directory) is not None else "no whole checkpoint", start_over)

# ---------------------------------------------------------------------------------------------------------------------
# model, optimizer, horizon

import torch
import gpt
import optim
import training

compute = common.init_compute(settings, resumed.get("chosen"))
phase.note(directory, chosen=common.chosen(compute), train_files=[s.facts["source"]["name"] for s in train])
config = gpt.config_from_depth(depth, tokenizer.vocab_size, max_seq_len, arch)
model = gpt.GPT(config, compute.dtype)
model.init_weights(seed)
model.to(compute.device)

plan = dataset.make_plan(train, max_seq_len + 1, tokenizer.bos)
val_plan = dataset.make_plan(val, max_seq_len + 1, tokenizer.bos)
common.check(dataset.n_rows(plan) and dataset.n_rows(val_plan), f"the data set {data} has too little text for rows of {max_seq_len} tokens")
parameters = sum(p.numel() for p in model.parameters())
scaling_parameters = training.scaling_parameters(model)
rows, num_steps = training.horizon(model, num_steps, target_flops, tokens_per_param, total_batch_size)
batch_tokens = rows * max_seq_len
device_batch_size = training.rows_that_fit("base", "device_batch_size", device_batch_size, data, directory.name, compute)
micro_rows = dataset.fit_micro_rows(rows, device_batch_size, compute.world)
lr_batch_scale = min(1.0, (batch_tokens / 2 ** 19) ** 0.5)  # Adam's and Muon's rates follow the root of the batch
if weight_decay == -1.0:
    weight_decay = 0.2 * (12 / depth) ** 2 * lr_batch_scale if depth >= 8 else 0.0
optimizer = optim.make_optimizer(model, matrix_lr=matrix_lr * lr_batch_scale, embedding_lr=embedding_lr * lr_batch_scale,
                                 unembedding_lr=unembedding_lr * lr_batch_scale, scalar_lr=scalar_lr * lr_batch_scale,
                                 weight_decay=weight_decay, compute_dtype=compute.dtype)
epochs = num_steps * rows / dataset.n_rows(plan)
common.print0(f"base {directory.name}: {parameters:,} parameters, {num_steps:,} steps of {batch_tokens:,} tokens = {num_steps * batch_tokens / 1e6:,.1f}M tokens "
              f"({num_steps * batch_tokens / scaling_parameters:.1f} a parameter, {epochs:.2f} epochs of {dataset.n_rows(plan):,} rows, {100 * dataset.cropped(plan):.3f} % of the text cropped)")
common.print0(f"{compute.world} x {compute.device.type}, {compute.dtype}, {compute.threads} threads, compile={compute.compile}, "
              f"{rows // (micro_rows * compute.world)} x {micro_rows} rows a rank and step, {num_steps * batch_tokens * model.flops_per_token():.2e} FLOPs")

# ---------------------------------------------------------------------------------------------------------------------
# where it was

step, spent, skipped = 0, 0.0, 0
val_bpb, loss = None, None
if (found := common.on_rank0(checkpoint.newest, directory)) is not None:
    model_state, optim_state, meta = checkpoint.load(directory, found)
    checkpoint.put_weights(model, model_state)
    optimizer.load_state_dict(optim_state)
    step, spent, skipped, loss, val_bpb = meta["step"], meta["seconds"], meta["skipped"], meta["loss"], meta["val_bpb"]
    common.print0(f"continuing at step {step:,} of {num_steps:,}")
common.trim_metrics(metrics, step)
common.set_deadline(time_limit)
forward = torch.compile(model, dynamic=False) if compute.compile else model
training.start_clock(num_steps, step, spent, save_minutes)
training.explain_out_of_memory("base", device_batch_size=device_batch_size)

def save(wait=True):
    t0 = time.monotonic()
    state = optimizer.state_dict()  # a collective call: gathers the shards
    if compute.rank == 0:
        checkpoint.save(directory, step, model.state_dict(), state, {
            "model": dataclasses.asdict(config), "tokenizer": tokenizer.fingerprint, "settings": settings, "num_steps": num_steps,
            "batch_tokens": batch_tokens, "tokens": step * batch_tokens, "epoch": step * rows / dataset.n_rows(plan), "seconds": training.spent(),
            "skipped": skipped, "loss": loss, "val_bpb": val_bpb}, keep, wait)
    training.saved(t0)

# ---------------------------------------------------------------------------------------------------------------------
# the loop: save when due, measure when due, then train one step

while True:
    last = step == num_steps
    measuring = last or (eval_every and step % eval_every == 0)
    training.save_or_stop(save, directory, step, num_steps, measuring)

    if measuring:
        val_bpb = training.bits_per_byte(model, val_plan, tokenizer, eval_tokens, micro_rows, compute)
        if val_bpb is None:
            phase.interrupted(directory, f"stopped while measuring; saved at step {checkpoint.last_step(directory)} of {num_steps}")
        common.append_metrics(metrics, {"kind": "val", "step": step, "val_bpb": val_bpb})
        common.print0(f"step {step:,}: validation {val_bpb:.4f} bits per byte")
    if last or (sample_every and step and step % sample_every == 0):
        training.print_samples(model, tokenizer, ["The", "Once upon a time", "The capital of France is"])
    if last:
        break

    progress = (step + 1) / num_steps
    lr_scale = training.lr_scale(step, num_steps, warmup_ratio, warmdown_ratio, final_lr_fraction)
    optimizer.set(lr_scale=lr_scale, muon_momentum=0.85 + 0.10 * min(1.0, step / 300), muon_weight_decay=weight_decay * (1 - progress))
    total = torch.zeros((), device=compute.device)
    for x, y in dataset.batch(plan, seed, step, rows, micro_rows, compute.rank, compute.world):
        x, y = training.to_device(x, compute), training.to_device(y, compute)
        micro_loss = forward(x, y, reduction="sum") / batch_tokens
        micro_loss.backward()
        total += micro_loss.detach()
    norm = optimizer.step()
    optimizer.zero_grad()
    loss = training.all_sum(total)
    step += 1

    skipped = training.count_skipped(skipped, loss, norm, max_skipped, directory)
    training.watch(loss, directory)
    reading = training.tick(step, f"loss {loss:.4f} | lr {lr_scale:.2f}", batch_tokens, model.flops_per_token(), compute)
    common.append_metrics(metrics, {"kind": "train", "step": step - 1, "loss": loss, "norm": norm, "lr_scale": lr_scale,
                                    "epoch": int((step - 1) * rows / dataset.n_rows(plan)), "clock": reading})

phase.done(directory, step=step, seconds=training.spent(), val_bpb=val_bpb, parameters=parameters, tokens=step * batch_tokens)
common.print0(f"base {directory.name}: {val_bpb:.4f} bits per byte after {step:,} steps in {common.clock(training.spent())}; saving took {100 * training.save_share():.2f} % of it")
common.leave()
