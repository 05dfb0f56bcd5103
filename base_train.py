"""
Phase 2: pretraining. Trains the base model on a data set and measures bits per byte on its
validation split.

    python base_train.py config/toy_base.py                                # a laptop
    torchrun --standalone --nproc_per_node=8 base_train.py --depth=20      # a node with 8 GPUs

Needs the data (prepare_data.py) and the tokenizer (tok_train.py). Kill it at any moment and run the
same command again: it continues from its last save. Saves go to base_checkpoints/<tag>/, metrics to
metrics.jsonl beside them.
"""
from run import Run

run = Run.start("base_train")  # a signal counts from here on; importing torch takes seconds

import common
import configurator
import corpus
import data as dataset
import pipeline
import records
import tokenizer as tok

data = "fineweb_edu"         # toy, fineweb_edu, climbmix, or a folder of texts
tag = ""                     # name of the run and of its folder; empty: d<depth>
depth = 20                   # layers
aspect_ratio = 64            # the width is depth times this, rounded up to whole heads of 128
max_seq_len = 2048           # tokens in a row, the context that the model sees
arch = "modern"              # modern, or nanochat_2025: the plain model of November 2025
key_offset = True            # modern: whether half a key's channels are of the token before
bigram_vocab_size = 0        # modern: rows of a table of embeddings of token pairs; 0: none
tokens_per_param = 12.0      # training tokens per parameter (embeddings not counted)
num_steps = -1               # number of steps, instead of --tokens_per_param; -1: derived
target_flops = -1.0          # floating point operations in all, instead of both; -1: not given
total_batch_size = -1        # tokens a step, however few rows fit a device; -1: follows the horizon
matrix_lr = 0.02             # Muon learning rate of matrices, times min(1, sqrt(batch / 2^19))
embedding_lr = 0.3           # AdamW learning rate of all embeddings; scaled as matrix_lr
unembedding_lr = 0.004       # AdamW learning rate of lm_head; scaled as matrix_lr
scalar_lr = 0.5              # AdamW learning rate of layer scalars and gates; scaled as matrix_lr
weight_decay = -1.0          # Muon weight decay, falls to 0 over the run; -1: derived from depth
warmup_ratio = 0.01          # share of the steps, at the start, in which the learning rate rises
warmdown_ratio = 0.6         # share of the steps, at the end, in which the learning rate falls
final_lr_fraction = 0.02     # final learning rate as a share of the peak
seed = 1337                  # decides the initial weights and the order of the rows
# ---- settings below may change at every resume
device_batch_size = -1       # rows that a device holds at once; -1: those that fit, 32 on a CPU
eval_every = 250             # steps between measurements of bits per byte; 0: only at the end
eval_tokens = 10_485_760     # how many tokens of the validation split are measured, at most
sample_every = 1000          # steps between printed samples; 0: only at the end
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

directory = pipeline.state_path("base", data, tag or f"d{depth}", try_out)

run.ranks.join(device)
begun = run.ranks.on_rank0(records.check_settings, run.name, directory, settings)
if begun.get("status") != "done":
    given = total_batch_size // max_seq_len if total_batch_size != -1 else -1
    dataset.check_shared(given, run.ranks.world)
# Files that were added since the run began do not stop it: it goes on with those it knows. But one
# that starts over a second time, since its inputs have changed, takes all that are there. Rank 0
# looks for them, since on a shared disk another node may see an older state of the folders.
for known in ({} if try_out else begun, {}):
    files = run.ranks.on_rank0(corpus.dataset_files, data, known)
    if files["not_read"]:
        common.print0(files["not_read"])
    known_files = run.ranks.on_rank0(corpus.facts_to_record, files)
    if not start_over:
        corpus.check_same(known, known_files)
    tokenizer = tok.load_tokenizer(data)
    val = dataset.tokenize_files(run, data, files, "val", tokenizer)
    if try_out:
        train = val  # any text shows what a step needs, and this one is short
    else:
        train = dataset.tokenize_files(run, data, files, "train", tokenizer)
    dataset.check_enough(data, train, val, 1 if try_out else max_seq_len + 1)
    inputs = {"tokenizer": tokenizer.fingerprint, "data": dataset.fingerprint(train + val)}
    if not start_over:
        corpus.check_same(known, known_files, inputs["data"])
    if not start_over or known.get("inputs", inputs) == inputs:
        break
# takes the lock; ends the process if the run is done, or was begun with other settings or data
run.open_or_exit(directory, settings, inputs)

# -------------------------------------------------------------------------------------------------
# model, horizon, optimizer

import torch  # only here: it takes seconds, and what is wrong above is said without it

import gpt
import memory
import optim
import training
from compute import choose_compute, peak_flops, to_device

ranks = run.ranks
compute = choose_compute(ranks, settings, run.record.get("chosen"))
run.update_record(**known_files)
config = gpt.config_from_depth(depth, tokenizer.vocab_size, max_seq_len, arch, aspect_ratio,
                               key_offset, bigram_vocab_size)
model = gpt.GPT(config, compute.dtype)
model.init_weights(seed)
model.to(compute.device)
flops_per_token = model.flops_per_token()
parameters = sum(p.numel() for p in model.parameters())

# a step trains on `rows` rows, of which a device takes micro_rows at once
rows, why, num_steps, scaling_params = training.horizon(
    model, num_steps, target_flops, tokens_per_param, total_batch_size)
batch_tokens = rows * max_seq_len
total_tokens = num_steps * batch_tokens
scale = training.batch_lr_scale(batch_tokens)
if weight_decay == -1.0:
    weight_decay = 0.2 * (12 / depth) ** 2 * scale if depth >= 8 else 0.0
optimizer = optim.make_optimizer(model, settings, scale, weight_decay, compute.dtype)
micro_rows = training.rows_at_once(run, model, optimizer, compute, rows)
needed = memory.of_process(model, optimizer, compute, micro_rows, rows)

plan = dataset.text_plan(train, max_seq_len + 1, tokenizer.bos)
val_plan = dataset.text_plan(val, max_seq_len + 1, tokenizer.bos)
epoch_rows = dataset.n_rows(plan)
common.print0(
    f"base {directory.name}: {parameters:,} parameters\n"
    f"  training: {num_steps:,} steps of {batch_tokens:,} tokens = "
    f"{training.in_words(total_tokens)} tokens, {total_tokens / scaling_params:.1f} per parameter "
    f"(embeddings not counted), {total_tokens * flops_per_token:.2e} FLOPs\n"
    f"  batch: {training.batch_in_words(why, rows, max_seq_len, micro_rows, ranks.world)}\n"
    f"  devices: {ranks.world} x {compute}; at least {needed / 1e9:,.2f} GB each")
if not try_out:
    epochs = num_steps * rows / epoch_rows
    common.print0(f"  text: {epoch_rows:,} rows, read {epochs:,.2f} times; "
                  f"{corpus.held_out_in_words(files)}")
    if epochs > 100:
        common.print0(f"warning: the text will be repeated {epochs:,.0f} times; a smaller --depth "
                      "or --num_steps would fit it")

# -------------------------------------------------------------------------------------------------
# the loop: save when due, measure when due, then train one step

# where it was: the newest whole checkpoint goes into model and optimizer; without one, step 0
step, seconds = training.resume(run, model, optimizer)
run.begin_loop(step, num_steps, seconds, flops_per_token, peak_flops(compute.device))
forward = torch.compile(model, dynamic=False) if compute.compile else model
loss_guard = training.LossGuard(run, optimizer, max_skipped)
loss_guard.recall()  # the level that the loss had in earlier attempts
loss = None

while True:
    last = step == num_steps
    measure = training.is_due(run, step, eval_every)

    # Here, between two steps, all ranks hold the same weights, and here they agree on what comes
    # next: a rank that stopped alone would leave the others waiting for its gradients.
    stop, save_due = run.should_stop(), run.should_save()
    # Save before measuring, so that an evaluation that dies costs no model; but not while the loss
    # explodes or is no number, since the checkpoint of better days would go. Unless it has to wait,
    # a thread writes while the training goes on.
    wanted = stop or save_due or (measure and step > 0)
    if last or (wanted and not loss_guard.in_trouble()):
        run.save(step, model, optimizer, wait=bool(stop or measure), meta={
            "model": vars(config), "tokenizer": tokenizer.fingerprint,
            "batch_tokens": batch_tokens, "tokens": step * batch_tokens, "loss": loss})
    if stop:
        run.exit_interrupted(stop)

    if measure:
        val_bpb = training.bits_per_byte(run, model, val_plan, tokenizer, eval_tokens, micro_rows,
                                         compute.device)
        if val_bpb is None:
            continue  # asked to stop in the middle: the lines above save and stop
        training.log_measured(run, step, val_bpb)
        common.print0(f"step {step:,}: validation {val_bpb:.4f} bits per byte")
    if step > 0 and training.is_due(run, step, sample_every):
        prompts = ["The", "Once upon a time", "The capital of France is"]
        training.print_samples(run, model, tokenizer, prompts)
    if last:
        break

    lr_scale = training.lr_scale(step, num_steps, warmup_ratio, warmdown_ratio, final_lr_fraction)
    optimizer.set(lr_scale=lr_scale, muon_momentum=0.85 + 0.10 * min(1.0, step / 300),
                  muon_weight_decay=weight_decay * (1 - (step + 1) / num_steps))
    total = torch.zeros((), device=compute.device)
    # The rows follow from (data, seed, number) alone: nothing about the order has to be saved, and
    # whatever the ranks and micro-batches, the same rows are trained on. The number is the step,
    # further by what --rewind has skipped.
    number = training.batch_number(run, step)
    for x, y in dataset.batch(plan, seed, number, rows, micro_rows, ranks.rank, ranks.world):
        x, y = to_device(x, compute.device), to_device(y, compute.device)
        # The sum over a micro-batch is divided by the tokens of the whole batch, not by its own:
        # so the gradients of all micro-batches and ranks add up to that of the batch.
        micro_loss = forward(x, y) / batch_tokens
        optimizer.scaled(micro_loss).backward()
        total += micro_loss.detach()
    loss = ranks.all_reduce_sum(total)  # waits for the device, not for the optimizer
    # Adds up the gradients of all ranks. Where their norm is nan or inf it touches nothing: one bad
    # batch must not poison weights and momenta for good.
    norm = optimizer.step()
    optimizer.zero_grad()
    step += 1

    # One bad step is left out; many in a row, or a loss that explodes, end the run before it has
    # computed for hours in vain.
    loss_guard.check_or_exit(step, loss, norm)
    run.log_step(step, f"loss {loss:.4f} | lr x{lr_scale:.2f}", batch_tokens, loss=loss, norm=norm,
                 lr_scale=lr_scale, epoch=number * rows // epoch_rows)

training.exit_done(run, f"{val_bpb:.4f} bits per byte", val_bpb=val_bpb, parameters=parameters,
                   tokens=total_tokens)
