"""
Measures a base model: bits per byte of training and validation text, a few samples to look at, and
CORE.

    python base_eval.py --data=toy
    python base_eval.py --tag=d20 --core_items=100       # quick: an impression, not called CORE
    torchrun --standalone --nproc_per_node=8 base_eval.py

Scores on the toy world's own tasks are called toy-CORE. CORE is CORE only if all items of all its
tasks were measured. Writes report/core_base_<tag>.json. Every finished piece is kept beside it: an
interrupted evaluation continues.
"""
from run import Run

run = Run.start("base_eval")  # a signal counts from here on; importing torch takes seconds

import time

import checkpoint
import common
import configurator
import data as dataset
import models
import pipeline
from records import load_record

data = "fineweb_edu"         # the data set of the model, as base_train.py had it
tag = ""                     # which model; empty: the newest
core_items = -1              # items of each CORE task; -1: all (fewer is not CORE); 0: no CORE
max_prompt = 2048            # tokens of a CORE prompt, of a longer one the last; -1: a row's
eval_tokens = 10_485_760     # tokens of each split measured for bits per byte (or all); 0: none
show_samples = True          # whether samples are written
seed = 1337                  # of the samples that are drawn
# ---- settings below may change at every resume
memory_gb = 0.0              # GB that a CORE batch may take besides the model; 0: CPU 0.2, else 4
device_batch_size = 16       # rows at once for bits per byte
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads a rank; 0: the cores divided by the ranks
compile = False              # not compiled: every batch has another shape
time_limit = None            # minutes until it stops; None: the Slurm job's, if any
settings = configurator.configure(globals())

import numpy as np

import core_eval
import evaluation
import gpt
import scores
import training

BLOCK = 64  # items dealt to a rank, measured and kept together; fixed, so that the batches are
PROMPTS = ["The capital of France is", "The opposite of hot is",
           "If yesterday was Friday, then tomorrow will be", "Once upon a time",
           "My favourite colour is", "The planets of the solar system are:",
           "If 5*x + 3 = 13, then x is"]

# -------------------------------------------------------------------------------------------------
# inputs, all checked before a model is loaded

common.check(core_items >= -1, f"--core_items must be -1 (all), 0 (no CORE) or a number of items, "
             f"not {core_items}")
common.check(max_prompt == -1 or max_prompt >= 2,
             f"--max_prompt must be at least 2 (or -1), not {max_prompt}")
common.check(memory_gb >= 0 and eval_tokens >= 0,
             "--memory_gb and --eval_tokens must not be negative")
core_tasks, missing, bundle = [], [], None
if core_items:
    where = pipeline.eval_bundle_dir(data)
    core_tasks, missing, bundle = core_eval.read_bundle(
        where, f"python prepare_data.py --data={data}")
for label in missing:
    common.print0(f"the file of the task {label} is missing in {where}")

run.ranks.join()
folder, step = run.ranks.on_rank0(models.find_model, "base", data, tag)
tokenizer = models.load_tokenizer_of(folder, step, data)
splits = {}
if eval_tokens:
    # files that were added since are not what the model was trained on
    begun_with = (load_record(folder) or {}).get("train_files")
    splits = {split: dataset.tokenize_files(run, data, split, tokenizer, begun_with)
              for split in ("train", "val")}
stores = [store for part in splits.values() for store in part]
inputs = {"weights": checkpoint.fingerprint(folder, step), "step": step,
          "tokenizer": tokenizer.fingerprint, "data": dataset.fingerprint(stores),
          "bundle": bundle, "missing": missing,
          "settings": {**settings.defining, "tag": folder.name}}
path = pipeline.state_path("base-eval", data, folder.name)
measured = evaluation.open_or_exit(run, path, inputs, settings)

# -------------------------------------------------------------------------------------------------
# bits per byte and samples

ranks, compute = run.ranks, measured.compute
model = models.load_model(folder, step, compute.device, compute.dtype)[0]
length = model.config.sequence_len
common.print0(f"base {folder.name}, step {step:,}: {ranks.world} x {compute}")

def going():
    return run.stop_reason() is None

def write_samples():
    """Greedy continuations of PROMPTS, and four texts out of nothing, drawn.
    -> [{"prompt", "text"}], None if stopped"""
    asked = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    said = gpt.generate(model, tokenizer, asked, 24, keep_going=going)
    uniforms = np.stack([common.rng(seed, i).random(64) for i in range(4)])
    said += gpt.generate(model, tokenizer, [[tokenizer.bos]] * 4, 64, 1.0, uniforms=uniforms,
                         keep_going=going)
    texts = [{"prompt": prompt, "text": tokenizer.decode(tokens)}
             for prompt, (tokens, _) in zip([*PROMPTS, "", "", "", ""], said)]
    return texts if going() else None

for split, stores in splits.items():
    if f"{split} bpb" not in measured.pieces:
        enough, tokens = 0, 0  # to pack every shard would take longer than to measure
        while enough < len(stores) and tokens < 2 * eval_tokens:
            tokens += stores[enough].facts["tokens"]
            enough += 1
        plan = dataset.make_plan(stores[:enough], length + 1, tokenizer.bos)
        common.check(dataset.n_rows(plan), f"the {split} split of {data} is too small for one row "
                     f"of {length + 1} tokens")
        measured.keep(f"{split} bpb", training.bits_per_byte(
            run, model, plan, tokenizer, eval_tokens, device_batch_size, compute.device))
    common.print0(f"{split}: {measured.pieces[f'{split} bpb']:.4f} bits per byte")
if show_samples and "samples" not in measured.pieces:
    measured.keep("samples", ranks.on_rank0(write_samples))
for sample in measured.pieces.get("samples", []):
    common.print0(f"  {sample['prompt']} | {sample['text']}".replace("\n", "\\n"))

# -------------------------------------------------------------------------------------------------
# CORE: blocks of items are dealt to the ranks in turns

name = "toy-CORE" if data == "toy" else "CORE"
longest = length if max_prompt == -1 else max_prompt
usual_gb = 0.2 if compute.device.type == "cpu" else 4.0  # on a CPU more is no faster
budget = 1e9 * (memory_gb or usual_gb)

def blocks_of(task):
    n = len(task["items"]) if core_items == -1 else min(core_items, len(task["items"]))
    return [range(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]

def piece(task, numbers):
    return f"{task['label']} {numbers.start}"

def effort(work):
    """How long blocks take, relatively: as long as their prompts are."""
    return sum((task["shots"] + 1) * task["bytes"] / len(task["items"]) for task, _ in work)

todo = [(task, numbers) for task in core_tasks for numbers in blocks_of(task)
        if piece(task, numbers) not in measured.pieces]
results, items, total = {}, 0, effort(todo)
began = shown = time.monotonic()
while True:
    for task in core_tasks:
        kept = [measured.pieces.get(piece(task, numbers)) for numbers in blocks_of(task)]
        if task["label"] not in results and None not in kept:
            outcomes = [right for block in kept for right in block]
            result = results[task["label"]] = core_eval.summary(task, outcomes)
            common.print0(f"  {task['label']:<32} {result['accuracy']:.4f}  "
                          f"({result['low']:.4f} to {result['high']:.4f}, centred "
                          f"{result['centred']:+.4f}, {result['n']} of {result['of']} items)")
    if not todo:
        break
    due, todo = todo[:ranks.world], todo[ranks.world:]
    mine = [core_eval.evaluate(model, tokenizer, task, numbers, longest, budget, compute.threads,
                               going) for task, numbers in due[ranks.rank:ranks.rank + 1]]
    values = [value for part in ranks.gather(mine) for value in part]
    # what was stopped (None) ends the process, so the whole ones are kept first
    for work, value in sorted(zip(due, values), key=lambda pair: pair[1] is None):
        measured.keep(piece(*work), value)
        items += len(value)
    now = time.monotonic()
    if now - shown > 10:
        shown, left = now, (now - began) * effort(todo) / (total - effort(todo))
        common.print0(f"{name}: {len(results)} of {len(core_tasks)} tasks, "
                      f"{items / (now - began):.1f} items/s, about {common.duration(left)} left")

core, reason, mean = core_eval.core_of(results, missing)
part = ", ".join(f"{task} {n}" for task, n in scores.parts(data, results).items())
if core is not None:
    common.print0(f"{name} {core:.4f}" + (f" in part: {part} items" if part else ""))
else:
    common.print0(f"no {name}: {reason}"
                  + (f" (mean of what was measured: {mean:.4f})" if results else ""))
measured.exit_done(
    stage="base", data=data, tag=folder.name, step=step, label=name, core=core, reason=reason,
    train_bpb=measured.pieces.get("train bpb"), val_bpb=measured.pieces.get("val bpb"),
    mean_centred=mean, missing=missing, tasks=results,
    samples=measured.pieces.get("samples", []))
