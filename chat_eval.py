"""
Measures a chat model on tasks with right answers: multiple choice by the logits of the letters, the others by greedy
answers with the calculator at hand.

    python chat_eval.py --data=toy --source=sft
    torchrun --standalone --nproc_per_node=8 chat_eval.py --source=mid

Writes report/chat_<source>_<tag>.json. What was measured is kept batch by batch: an interrupted evaluation continues.
"""
import common
common.install_stop_handlers()  # before torch is imported

import time
from concurrent.futures import ThreadPoolExecutor

import checkpoint
import configurator
import evaluation
import execution
import tasks as task_list
import tokenizer as tok

data = "fineweb_edu"         # the data set of the model
source = "sft"               # base, mid, sft or rl
tag = ""                     # which model; empty: the newest
tasks = ["arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spellingbee"]  # what is measured; toy adds facts
max_items = -1               # items of each task; -1: all
max_new_tokens = 512         # tokens of an answer
# ---- settings below may change at every resume
rows = 64                    # answers generated at once
unsafe_exec = False          # run HumanEval's programs without a sandbox where the system has none
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads a rank; 0: the cores divided by the ranks
compile = False              # not compiled: every batch has another shape
time_limit = None            # minutes until it saves and stops; None: no limit (under Slurm the job's)
settings = configurator.configure(globals())

CHATCORE = ["arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spellingbee"]  # ChatCORE is the mean over these
prefix = "toy-" if data == "toy" else ""
BATCH = 256  # items that are dealt, measured and kept together; fixed, so that a resume has the same batches

common.check(source in common.STAGES, f"--source is base, mid, sft or rl, not {source!r}")
common.check(max_items == -1 or max_items > 0, "--max_items is at least 1, or -1 for all")
tasks = tasks + (["facts"] if data == "toy" and "facts" not in tasks else [])
for name in tasks:
    common.check(task_list.TASKS.get(name, {}).get("kind") in ("categorical", "generative"), f"--tasks: {name!r} is no task with right answers")
directory, step = checkpoint.find_model(source, data, tag)
tokenizer = tok.load_tokenizer(common.tokenizer_dir(data))
checkpoint.must_fit(directory, step, tokenizer)
path = common.eval_path("chat", source, data, directory.name)
inputs = {"weights": checkpoint.fingerprint(directory, step), "tasks": task_list.fingerprint(tasks, "test", data), "settings": {**settings.defining, "tag": directory.name}}
common.init_distributed()  # does nothing, and imports nothing, for one process

sandbox, no_sandbox = execution.sandbox_available() if "humaneval" in tasks else (True, "")
left_out = ["humaneval"] if common.agree(0 if sandbox or unsafe_exec else 1) else []  # nodes may differ
tasks = [t for t in tasks if t not in left_out]
compute, kept = evaluation.begin(path, inputs, settings, lambda result: set(tasks) <= set(result["results"]))  # what was left out then may be possible now

import torch
import gpt
import training

common.set_deadline(time_limit)
model = checkpoint.load_found(directory, step, compute.device, compute.dtype)[0]
rows = training.rows_that_fit("eval", "rows", rows, data, directory.name, compute)
if left_out:
    common.print0(f"HumanEval is left out: its programs cannot be run in a sandbox here ({no_sandbox}); --unsafe_exec=True runs them without")

@torch.inference_mode()
def categorical(items):
    """Whether the letter of the right choice has the largest logit of the item's letters. -> list of bool"""
    outcomes = []
    for start in range(0, len(items), rows):
        part = items[start:start + rows]
        prompts = [tokenizer.render_for_completion(item)[-model.config.sequence_len:] for item in part]
        logits = gpt.prefill(model, prompts, max(map(len, prompts)))[1]
        for item, row in zip(part, logits.cpu()):
            letters = [tokenizer.encode(letter)[0] for letter in item["letters"]]
            outcomes.append(item["letters"][row[letters].argmax().item()] == item["messages"][-1]["content"])
    return outcomes

def generative(items):
    """Whether the greedy answer is right. -> list of bool"""
    prompts = [tokenizer.render_for_completion(item)[-model.config.sequence_len:] for item in items]
    longest = min(max_new_tokens, 3 * model.config.sequence_len)  # not of the prompts: these differ with the number of ranks
    answers = gpt.generate(model, tokenizer, prompts, longest, calculate=execution.calculate, max_rows=rows,
                           keep_going=lambda: not common.stop_requested())
    with ThreadPoolExecutor(compute.threads) as pool:  # HumanEval's programs are processes of their own
        return list(pool.map(lambda item, answer: task_list.correct(item, tokenizer.decode(answer[0]), unsafe_exec), items, answers))

results = {}
for name in tasks:
    items = task_list.load(name, "test", data, None if max_items == -1 else max_items)
    measure = categorical if task_list.TASKS[name]["kind"] == "categorical" else generative
    t0, measured, pieces = time.time(), 0, [(f"{name} {start}", items[start:start + BATCH]) for start in range(0, len(items), BATCH)]
    for piece, batch in pieces:
        if piece not in kept:
            numbers = sorted(range(len(batch)), key=lambda i: len(str(batch[i]["messages"][:-1])))[compute.rank::compute.world]  # by length: little padding
            mine = dict(zip(numbers, measure([batch[i] for i in numbers]))) if numbers else {}
            stopped = common.agree(1 if common.stop_requested() else 0)  # what was cut short is measured again
            found = {k: bool(v) for part in common.gather(mine) for k, v in part.items()}
            evaluation.keep(piece, None if stopped else [found[i] for i in range(len(batch))])
            measured += len(batch)
            if (left := sum(len(b) for p, b in pieces if p not in kept)):
                common.print0(f"  {name}: {len(items) - left:,} of {len(items):,} items, about {common.clock(left * (time.time() - t0) / measured)} left")
    results[name] = r = evaluation.score([ok for piece, _ in pieces for ok in kept[piece]], task_list.TASKS[name]["chance"])
    common.print0(f"{prefix + name:<18} {r['accuracy']:.3f}  ({r['low']:.3f} to {r['high']:.3f}, {r['n']} items" + (f" of {evaluation.FULL[name]:,}" if evaluation.parts(data, {name: r}) else "") + f", chance {r['chance']:.2f}, "
                  f"{common.clock(time.time() - t0)})")

missing = [name for name in CHATCORE if name not in results]
chatcore = None if missing else sum(results[name]["centred"] for name in CHATCORE) / len(CHATCORE)
common.print0(f"{prefix}ChatCORE {'in part ' * bool(evaluation.parts(data, results))}{chatcore:.4f}" if chatcore is not None else f"no ChatCORE: {', '.join(missing)} not measured")
evaluation.done(source=source, data=data, tag=directory.name, step=step, results=results, chatcore=chatcore, missing=missing)
