"""
Measures a base model: bits per byte of training and validation text, a few samples to look at, and CORE.

    python base_eval.py --data=toy
    python base_eval.py --data=fineweb_edu --tag=d20 --core_items=100       # quick: an impression, not called CORE
    torchrun --standalone --nproc_per_node=8 base_eval.py --data=fineweb_edu

Scores on the toy world's own tasks are called toy-CORE. CORE is CORE only if all items of all its tasks were measured.
Writes report/core_base_<tag>.json. Every finished piece is kept beside it: an interrupted evaluation continues.
"""
import common
common.install_stop_handlers()  # before torch is imported

import time

import checkpoint
import configurator
import data as dataset
import evaluation
import phase
import tokenizer as tok

data = "fineweb_edu"         # the data set of the model, as base_train.py had it
tag = ""                     # which model; empty: the newest
core_items = -1              # items of each CORE task; -1: all (fewer is not CORE); 0: no CORE
max_prompt = 2048            # tokens of a CORE prompt, of a longer one the last; -1: as many as the model's rows have
eval_tokens = 10_485_760     # tokens of each split measured for bits per byte (all, if there are fewer); 0: none
show_samples = True          # whether samples are written
seed = 1337                  # of the samples that are drawn
# ---- settings below may change at every resume
memory_gb = 0.0              # GB that a CORE batch may take besides the model; 0: 0.2 on a CPU, else 4
device_batch_size = 16       # rows at once for bits per byte
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads a rank; 0: the cores divided by the ranks
compile = False              # not compiled: every batch has another shape
time_limit = None            # minutes until it saves and stops; None: no limit (under Slurm the job's)
settings = configurator.configure(globals())

import numpy as np

import core_eval
import gpt
import training

BLOCK = 64  # items dealt to a rank, sorted by length, measured and kept together; fixed, so that the batches are
PROMPTS = ["The capital of France is", "The opposite of hot is", "If yesterday was Friday, then tomorrow will be",
           "Once upon a time", "My favourite colour is", "The planets of the solar system are:",
           "If 5*x + 3 = 13, then x is"]

# ---------------------------------------------------------------------------------------------------------------------
# inputs, all checked before a model is loaded

common.check(core_items >= -1, f"--core_items must be -1 (all), 0 (no CORE) or a number of items, not {core_items}")
common.check(max_prompt == -1 or max_prompt >= 2, f"--max_prompt must be at least 2 (or -1), not {max_prompt}")
common.check(memory_gb >= 0 and eval_tokens >= 0, "--memory_gb and --eval_tokens must not be negative")
directory, step = checkpoint.find_model("base", data, tag or None)
tokenizer = tok.load_tokenizer(common.tokenizer_dir(data))
checkpoint.must_fit(directory, step, tokenizer)
tasks, missing, bundle = [], [], None
if core_items:
    where = common.eval_bundle_dir(data)
    tasks, missing, bundle = core_eval.read_bundle(where, f"python prepare_data.py --data={data}")
for label in missing:
    common.print0(f"the file of the task {label} is missing in {where}")
common.init_distributed()
begun_with = (phase.read(directory) or {}).get("train_files")  # what was added since is not what it was trained on
splits = {split: dataset.tokenize_files(data, split, tokenizer, begun_with) for split in ("train", "val")} if eval_tokens else {}
inputs = {"weights": checkpoint.fingerprint(directory, step), "step": step, "tokenizer": tokenizer.fingerprint,
          "data": dataset.fingerprint(sum(splits.values(), [])), "bundle": bundle, "missing": missing,
          "settings": {**settings.defining, "tag": directory.name}}
path = common.eval_path("core", "base", data, directory.name)
compute, kept = evaluation.begin(path, inputs, settings)

# ---------------------------------------------------------------------------------------------------------------------
# bits per byte and samples

common.set_deadline(time_limit)
model = checkpoint.load_found(directory, step, compute.device, compute.dtype)[0]
longest = model.config.sequence_len if max_prompt == -1 else max_prompt
budget = 1e9 * (memory_gb or (0.2 if compute.device.type == "cpu" else 4.0))  # on a CPU more is no faster
common.print0(f"base {directory.name}, step {step:,}: {compute.world} x {compute.device.type}, {compute.dtype}, "
              f"{compute.threads} threads")
keep_going = lambda: not common.stop_requested()

def write_samples(model, tokenizer):
    """Greedy continuations of PROMPTS, and four texts out of nothing, drawn. -> [{"prompt", "text"}], None if stopped"""
    asked = [[tokenizer.bos, *tokenizer.encode(p)] for p in PROMPTS]
    said = gpt.generate(model, tokenizer, asked, 24, keep_going=keep_going)
    uniforms = np.stack([common.rng(seed, i).random(64) for i in range(4)])
    said += gpt.generate(model, tokenizer, [[tokenizer.bos]] * 4, 64, 1.0, uniforms=uniforms, keep_going=keep_going)
    texts = [{"prompt": p, "text": tokenizer.decode(ids)} for p, (ids, _) in zip(PROMPTS + [""] * 4, said)]
    return texts if keep_going() else None

for split, stores in splits.items():
    if f"{split} bpb" not in kept:
        length, enough = model.config.sequence_len + 1, 1  # to pack every shard would take longer than to measure
        while enough < len(stores) and sum(s.facts["tokens"] for s in stores[:enough]) < 2 * eval_tokens:
            enough += 1
        plan = dataset.make_plan(stores[:enough], length, tokenizer.bos)
        common.check(dataset.n_rows(plan), f"the {split} split of {data} is too small for one row of {length} tokens")
        evaluation.keep(f"{split} bpb", training.bits_per_byte(model, plan, tokenizer, eval_tokens, device_batch_size, compute))
    common.print0(f"{split}: {kept[f'{split} bpb']:.4f} bits per byte")
if show_samples and "samples" not in kept:
    evaluation.keep("samples", common.on_rank0(write_samples, model, tokenizer))
for sample in kept.get("samples", []):
    common.print0(f"  {sample['prompt']} | {sample['text']}".replace("\n", "\\n"))

# ---------------------------------------------------------------------------------------------------------------------
# CORE: blocks of items are dealt to the ranks in turns

name = "toy-CORE" if data == "toy" else "CORE"
blocks = {t["label"]: [range(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
          for t in tasks for n in [len(t["items"]) if core_items == -1 else min(core_items, len(t["items"]))]}
piece = lambda t, numbers: f"{t['label']} {numbers.start}"
todo = [(t, numbers) for t in tasks for numbers in blocks[t["label"]] if piece(t, numbers) not in kept]
effort = lambda work: sum((t["shots"] + 1) * t["bytes"] / len(t["items"]) for t, _ in work)  # as long as prompts are
results, items, began, shown, total = {}, 0, time.time(), time.time(), effort(todo)
while True:
    for t in tasks:
        if t["label"] not in results and all(piece(t, numbers) in kept for numbers in blocks[t["label"]]):
            r = core_eval.summary(t, [ok for numbers in blocks[t["label"]] for ok in kept[piece(t, numbers)]])
            common.print0(f"  {t['label']:<32} {r['accuracy']:.4f}  ({r['low']:.4f} to {r['high']:.4f}, centred {r['centred']:+.4f}, {r['n']} of {r['of']} items)")
            results[t["label"]] = r
    if not todo:
        break
    due, todo = todo[:compute.world], todo[compute.world:]
    mine = due[compute.rank:compute.rank + 1]
    values = common.gather([core_eval.evaluate(model, tokenizer, t, numbers, longest, budget, compute.threads, keep_going)
                            for t, numbers in mine])
    for work, value in sorted(zip(due, values), key=lambda pair: pair[1] == [None]):  # those that stopped come last
        evaluation.keep(piece(*work), value[0])
        items += len(value[0])
    if time.time() - shown > 10:
        shown = time.time()
        left = (shown - began) * effort(todo) / (total - effort(todo))
        common.print0(f"{name}: {len(results)} of {len(tasks)} tasks, {items / (shown - began):.1f} items/s, "
                      f"about {common.clock(left)} left")

core, reason, mean = core_eval.core_of(results, missing)
measured = f" (mean of what was measured: {mean:.4f})" if results else ""
short = ", ".join(f"{task} {n}" for task, n in evaluation.parts(data, results).items())
common.print0(f"{name} {core:.4f}" + (f" in part: {short} items" if short else "") if core is not None else f"no {name}: {reason}{measured}")
evaluation.done(stage="base", data=data, tag=directory.name, step=step, train_bpb=kept.get("train bpb"), val_bpb=kept.get("val bpb"), label=name,
                core=core, reason=reason, mean_centred=mean, missing=missing, tasks=results, samples=kept.get("samples", []))
