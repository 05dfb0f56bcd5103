"""
Phase 4: supervised finetuning. The midtrained model learns to answer.

    python chat_sft.py config/toy_sft.py
    torchrun --standalone --nproc_per_node=8 chat_sft.py

The loop is mid_train.py's; what differs: only what the assistant says is trained on (the masks of
the conversations are kept), the rates are a tenth, and the mixture is smaller and of answers. Needs
the midtrained model (mid_train.py) and the task files (prepare_data.py). Kill it at any moment and
run it again.

A mixture may name files of your own, .jsonl (or .jsonl.gz, .parquet) with a conversation a line, or
.json with an array of them:
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
or the list of messages alone, or as ShareGPT and Alpaca have it: {"conversations": [{"from": ...}]}
and {"instruction": "...", "input": "...", "output": "..."}; see conversations.py.
"""
from run import Run

run = Run.start("chat_sft")  # a signal counts from here on; importing torch takes seconds

import checkpoint
import common
import configurator
import data as dataset
import models
import records
import tasks

data = "fineweb_edu"         # the data set the base model was trained on
tag = ""                     # the midtrained model to go on from; empty: the newest
mixture = ["smoltalk:10000", "arc_easy", "arc_challenge",  # what it learns from: "name",
           "gsm8k", "identity", "simplespelling:300",      # "name*epochs", "name:examples"
           "spellingbee:300"]
extra_conversations = ""     # a file of your own conversations, added to the mixture
max_steps = -1               # number of steps, at most; -1: one pass through the mixture
total_batch_size = -1        # tokens a step, on all ranks; -1: as in pretraining
matrix_lr = 0.02             # Muon learning rate of matrices, times min(1, sqrt(batch / 2^19))
embedding_lr = 0.2           # AdamW learning rate of all embeddings; scaled as matrix_lr
unembedding_lr = 0.004       # AdamW learning rate of lm_head; scaled as matrix_lr
scalar_lr = 0.05             # AdamW learning rate of layer scalars and gates; scaled as matrix_lr
lr_fraction = 0.1            # multiplies all learning rates
warmdown_ratio = 1.0         # share of the steps, at the end, in which the learning rate falls
seed = 1337                  # decides the order of the conversations
# ---- settings below may change at every resume
device_batch_size = -1       # rows that a device holds at once; -1: those that fit, 32 on a CPU
eval_every = 150             # steps between measurements of bits per byte; 0: only at the end
held_out = ["smoltalk:1000"]  # conversations of test splits to measure on, as in mixture
eval_tokens = 1_048_576      # how many tokens of held_out are measured, at most
save_minutes = 3.0           # minutes between checkpoints
keep = 1                     # how many checkpoints are kept on disk
time_limit = None            # minutes of its loop until it stops; None: the Slurm job's, if any
max_skipped = 10             # steps in a row without a finite gradient before the run fails
device = "auto"              # where it computes: auto, cuda, mps or cpu
dtype = "auto"               # to compute in: bfloat16, float32, auto (the faster of both), float16
threads = 0                  # CPU threads of a rank; 0: the cores divided by the ranks
compile = "auto"             # whether to use torch.compile: auto, True or False
start_over = False           # put the old run of this tag aside and start from nothing
rewind = -1                  # go back to the checkpoint of this step, skip what came since; -1: no
try_out = False              # a trial run of a few steps: time, memory and disk; changes nothing
settings = configurator.configure(globals())

# -------------------------------------------------------------------------------------------------
# inputs: opened and judged before anything on disk changes

learned = [*mixture, extra_conversations] if extra_conversations else mixture
files = tasks.fingerprint(learned, "train", data)
val_files = tasks.fingerprint(held_out, "test", data)

run.ranks.join(device)
parent, parent_step, directory = models.where_to_go_on(run, "sft", data, tag, try_out)
begun = run.ranks.on_rank0(records.check_settings, run.name, directory, settings)
tokenizer = models.load_tokenizer_of(parent, parent_step, data)
meta = checkpoint.load_meta(parent, parent_step)
length = meta["model"]["sequence_len"]
common.check(total_batch_size == -1 or total_batch_size % length == 0,
             f"--total_batch_size must be a multiple of the model's {length} tokens in a row, "
             f"not {total_batch_size}")
rows = (total_batch_size if total_batch_size != -1 else meta["batch_tokens"]) // length or 1
batch_tokens = rows * length
if begun.get("status") != "done":
    dataset.check_shared(rows, run.ranks.world)

store = dataset.tokenize_conversations(
    run, f"{files}-{seed}", data, lambda: tasks.mixture(learned, data, seed), tokenizer, length + 1)
val_store = dataset.tokenize_conversations(
    run, f"{val_files}-val", data, lambda: tasks.mixture(held_out, data, 1, "test"), tokenizer,
    length + 1)
val_plan = dataset.make_plan([val_store], length + 1, tokenizer.bos, split=False)
dataset.check_lessons(learned, store, length)
dataset.check_measurable(held_out, val_store, val_plan, eval_tokens, tokenizer)

# takes the lock; ends the process if the run is done, or was begun with other settings or tasks
run.open_or_exit(directory, settings,
                 {"tokenizer": tokenizer.fingerprint, "tasks": files,
                  "mid": checkpoint.fingerprint(parent, parent_step)})

# -------------------------------------------------------------------------------------------------
# model, rows, optimizer

import torch  # only here: it takes seconds, and what is wrong above is said without it

import optim
import training
from compute import choose_compute, peak_flops, to_device

ranks = run.ranks
compute = choose_compute(ranks, settings, run.record.get("chosen"))
model = models.load_model(parent, parent_step, compute.device, compute.dtype)

plan = dataset.make_plan([store], length + 1, tokenizer.bos, split=False)
num_steps = max(1, dataset.n_rows(plan) // rows)
if max_steps != -1:
    num_steps = min(num_steps, max_steps)
scale = lr_fraction * training.batch_lr_scale(batch_tokens)
optimizer = optim.make_optimizer(model, settings, scale, 0.0, compute.dtype)
micro_rows = training.rows_at_once(run, model, optimizer, compute, rows)
training.print_lessons(run, "sft", store, val_store, plan, num_steps, rows, micro_rows, compute)

# -------------------------------------------------------------------------------------------------
# the loop: save when due, measure when due, then train one step

# where it was: its own newest whole checkpoint goes over the midtrained model; without one, step 0
step, seconds = training.resume(run, model, optimizer)
run.begin_loop(step, num_steps, seconds, model.flops_per_token(), peak_flops(compute.device))
forward = torch.compile(model, dynamic=False) if compute.compile else model
loss_guard = training.LossGuard(run, optimizer, max_skipped)
loss_guard.recall()  # the level that the loss had in earlier attempts
loss = None

while True:
    last = step == num_steps
    measure = training.is_due(run, step, eval_every)

    # All ranks agree here, between two steps: one that stopped alone would leave others waiting.
    stop, save_due = run.should_stop(), run.should_save()
    # Save before measuring, which may die; not while the loss is in trouble: a good one would go.
    wanted = stop or save_due or (measure and step > 0)
    if last or (wanted and not loss_guard.in_trouble()):
        run.save(step, model, optimizer, wait=bool(stop or measure), meta={
            "model": vars(model.config), "tokenizer": tokenizer.fingerprint,
            "batch_tokens": batch_tokens, "tokens": step * batch_tokens, "loss": loss})
    if stop:
        run.exit_interrupted(stop)

    if measure:
        val_bpb = training.bits_per_byte(run, model, val_plan, tokenizer, eval_tokens, micro_rows,
                                         compute.device)
        if val_bpb is None:
            continue  # asked to stop in the middle: the lines above save and stop
        training.log_measured(run, step, val_bpb)
        common.print0(f"step {step:,}: held-out conversations {val_bpb:.4f} bits per byte")
    if last:
        break

    lr_scale = training.lr_scale(step, num_steps, 0.0, warmdown_ratio, 0.0)
    optimizer.set(lr_scale=lr_scale, muon_momentum=0.95, muon_weight_decay=0.0)
    # The rows follow from (data, seed, number) alone: the same ones on any number of ranks.
    number = training.batch_number(run, step)
    batches = list(dataset.batch(plan, seed, number, rows, micro_rows, ranks.rank, ranks.world))
    # Rows have few or many of the assistant's tokens, so a micro-batch's own mean would weigh them
    # differently on each rank: the sum is divided by the tokens that the whole batch trains on.
    counted = ranks.all_reduce_sum(sum((y != -1).sum() for _, y in batches))
    total = torch.zeros((), device=compute.device)
    for x, y in batches:
        x, y = to_device(x, compute.device), to_device(y, compute.device)
        micro_loss = forward(x, y) / max(counted, 1)
        optimizer.scaled(micro_loss).backward()
        total += micro_loss.detach()
    loss = ranks.all_reduce_sum(total)
    # Adds up the gradients of all ranks; touches nothing where their norm is nan or inf.
    norm = optimizer.step()
    optimizer.zero_grad()
    step += 1

    loss_guard.check_or_exit(step, loss, norm)
    run.log_step(step, f"loss {loss:.4f} | lr x{lr_scale:.2f}", batch_tokens, loss=loss, norm=norm,
                 lr_scale=lr_scale)

training.exit_done(run, f"{val_bpb:.4f} bits per byte", val_bpb=val_bpb)
