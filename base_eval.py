"""
Measures a base model: bits per byte of training and validation text, CORE (the mean over 22 public
tasks, arXiv 2406.11794), and a few samples to look at.

    python base_eval.py --data=toy
    python base_eval.py --tag=d20 --core_items=100       # quick: an impression, not called CORE
    torchrun --standalone --nproc_per_node=8 base_eval.py

Scores on the toy world's own tasks are called toy-CORE. CORE is CORE only if all items of all its
tasks were measured. Writes report/core_base_<tag>.json in the state folder. Every finished piece is
kept beside it: an interrupted evaluation continues.
"""
from run import Run

run = Run.start("base_eval")  # a signal counts from here on; importing torch takes seconds

import checkpoint
import common
import configurator
import corpus
import data as dataset
import models
import pipeline
import texts
from records import load_record

data = "fineweb_edu"         # the data set of the model, as base_train.py had it
tag = ""                     # which model, d20 for instance; empty: the newest
core_items = -1              # items of each CORE task; -1: all (fewer is not CORE); 0: no CORE
max_prompt = 2048            # tokens kept of a longer CORE prompt, the last ones
eval_tokens = 10_485_760     # tokens of each split to measure bits per byte on; 0: none
show_samples = True          # whether the model writes samples
seed = 1337                  # random seed of the samples
# ---- settings below may change at every resume
device_batch_size = 16       # rows on a device at once; less than 16: CORE's batches shrink, too
device = "auto"              # device to compute on: auto, cuda, mps, cpu
dtype = "auto"               # compute dtype: auto (the faster), bfloat16, float32
threads = 0                  # CPU threads of each rank; 0: the cores divided by the ranks
time_limit = None            # minutes until it stops; None: the Slurm job's, if any
settings = configurator.configure(globals())

import numpy as np

import core_eval
import engine
import evaluation
import training

PROMPTS = ["The capital of France is", "The opposite of hot is",
           "If yesterday was Friday, then tomorrow will be", "Once upon a time",
           "My favourite colour is", "The planets of the solar system are:",
           "If 5*x + 3 = 13, then x is"]

# -------------------------------------------------------------------------------------------------
# inputs, all checked before a model is loaded

run.ranks.join(device)
folder, step = run.ranks.on_rank0(models.find_model, "base", data, tag)
core_tasks, missing, bundle = [], [], None
if core_items:
    where = pipeline.eval_bundle_dir(data)
    core_tasks, missing, bundle = core_eval.read_bundle(where, texts.prepare_command(data))
for label in missing:
    common.print0(f"the file of the task {label} is missing in {where}")
tokenizer = models.load_tokenizer_of(folder, step, data)
splits = {}
if eval_tokens:
    # files that were added since are not what the model was trained on
    begun = load_record(folder) or {}
    files = run.ranks.on_rank0(corpus.dataset_files, data, begun)
    held_out = begun.get("val_files") or list(files["val"])
    if "train_files" not in begun and data in pipeline.SHARED_DATA:
        # a model of nanochat's: to tokenize all that there is would take hours
        some = 1 + 2 * eval_tokens // corpus.SHARD_TOKENS
        files["train"] = dict(list(files["train"].items())[:some])
    common.check(held_out == list(files["val"]), "what was held out for validation is no longer "
                 f"all there ({corpus.listed(held_out, 3)}): put it back, or give --eval_tokens=0")
    splits = {split: dataset.tokenize_files(run, data, files, split, tokenizer)
              for split in ("train", "val")}
    gone = sorted({*begun.get("train_files", [])} - {*files["train"]})
    if gone:
        common.print0(f"not measured on, though the model was trained on it: {', '.join(gone)}, "
                      "which is no file any more")
stores = [store for part in splits.values() for store in part]
inputs = {
    "weights": checkpoint.fingerprint(folder, step),
    "step": step,
    "tokenizer": tokenizer.fingerprint,
    "data": dataset.fingerprint(stores),
    "bundle": bundle,
    "missing": missing,
    "settings": {**settings.defining, "tag": folder.name},
}
path = pipeline.state_path("base-eval", data, folder.name)
measured = evaluation.open_or_exit(run, path, inputs, settings)

# -------------------------------------------------------------------------------------------------
# bits per byte and samples

compute = measured.compute
model = models.load_to_use(folder, step, compute.device, compute.dtype)
length = model.config.sequence_len
common.print0(f"base {folder.name}, step {step:,}: {run.ranks.world} x {compute}")

def bits_per_byte(stores):
    """Of the first eval_tokens of a split; None if stopped. Failure (code 2) where it does not fill
    a row. Collective."""
    common.check(dataset.n_tokens(stores) > 0, f"a split of {data} has no text")
    few = []
    for store in stores:  # to pack every shard would take longer than to measure
        few.append(store)
        if sum(store.facts["tokens"] for store in few) >= 2 * eval_tokens:
            break
    plan = dataset.text_plan(few, length + 1, tokenizer.bos)
    return training.bits_per_byte(run, model, plan, tokenizer, eval_tokens, device_batch_size,
                                  compute.device)

def write_samples():
    """Greedy continuations of PROMPTS, and four texts out of nothing, drawn.
    -> [{"prompt", "text"}], None if stopped"""
    samples = training.continuations(run, model, tokenizer, PROMPTS, 24)
    uniforms = np.stack([common.rng(seed, i).random(64) for i in range(4)])
    drawn = engine.generate(model, tokenizer, [[tokenizer.bos]] * 4, 64, 1.0, uniforms=uniforms,
                            keep_going=run.going)
    samples += [{"prompt": "", "text": tokenizer.decode(tokens)} for tokens, _ in drawn]
    return samples if run.going() else None

def write_answers():
    """What the model, which knows no turns yet, goes on with behind each of the ten prompts."""
    answers = training.continuations(run, model, tokenizer, evaluation.prompts(data), 48)
    return answers if run.going() else None

bpb = {}
for split, stores in splits.items():
    bpb[split] = measured.piece(f"{split} bpb", bits_per_byte, stores)
    common.print0(f"{split}: {bpb[split]:.4f} bits per byte")
samples = answers = []
if show_samples:
    samples = measured.piece("samples", run.ranks.on_rank0, write_samples)
    answers = measured.piece("answers", run.ranks.on_rank0, write_answers)
for sample in samples:
    common.print0(f"  {sample['prompt']} | {sample['text']}".replace("\n", "\\n"))

# -------------------------------------------------------------------------------------------------
# CORE

budget = core_eval.usual_budget(compute.device) * min(1, device_batch_size / 16)
results = {}
for task in core_tasks:
    def right(numbers, task=task):
        return core_eval.evaluate(model, tokenizer, task, numbers, max_prompt, budget, run.going)
    label, n = task["label"], len(task["items"])
    asked = range(n if core_items == -1 else min(core_items, n))
    results[label] = core_eval.summary(task, measured.outcomes(label, asked, right))
    evaluation.print_score(label, results[label])

core, reason = core_eval.core_of(results, missing)
mean = evaluation.mean_centred(results)
name = evaluation.called("CORE", data)
if results:
    common.print0(f"{name} {mean:.4f}" if core is not None
                  else f"mean of what was measured: {mean:.4f} (not {name}: {reason})")
measured.exit_done(
    data=data, tag=folder.name, step=step, core=core, reason=reason, mean_centred=mean,
    train_bpb=bpb.get("train"), val_bpb=bpb.get("val"),
    missing=missing, tasks=results, samples=samples, answers=answers)
