"""
Measures a chat model on tasks with right answers: multiple choice by the logits of the letters, the others by greedy
answers with the calculator at hand. Confidence intervals are Wilson's, 95 %.

    python chat_eval.py --data=toy --source=sft
    torchrun --standalone --nproc_per_node=8 chat_eval.py --source=mid

Writes report/chat_<source>_<tag>.json. What was measured is kept batch by batch: an interrupted evaluation continues.
"""
import common
common.install_stop_handlers()  # before torch is imported

import hashlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import checkpoint
import configurator
import execution
import phase
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
inputs = {"weights": checkpoint.fingerprint(directory, step), "tasks": task_list.fingerprint(tasks, "test", data), "settings": settings.defining}
common.init_distributed()  # does nothing, and imports nothing, for one process

sandbox, no_sandbox = execution.sandbox_available() if "humaneval" in tasks else (True, "")
left_out = ["humaneval"] if common.agree(0 if sandbox or unsafe_exec else 1) else []  # nodes may differ
tasks = [t for t in tasks if t not in left_out]
done = common.read_json(path)
if done and done.get("inputs") == inputs and set(tasks) <= set(done["results"]):  # what was left out then may be possible now
    common.print0(f"chat_eval {source} {directory.name}: done already ({path})")
    common.outcome(0, "done already")
    common.leave()

import torch
import gpt

compute = common.init_compute(settings)
common.set_deadline(time_limit)
model = checkpoint.load_found(directory, step, compute.device, compute.dtype)[0]
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

def wilson(right, n):
    """The 95 % confidence interval of a share (Wilson 1927).  example: (5, 10) -> (0.237, 0.763)"""
    z, p = 1.96, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))

# partial results: one line a batch; those of other weights, tasks or settings are worth nothing
identity = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
partial = path.with_suffix(".partial.jsonl")
kept = {(r["task"], r["start"]): r["outcomes"] for r in common.read_metrics(partial) if r.get("identity") == identity}
common.on_rank0(lambda: common.atomic_write(partial, "".join(
    json.dumps({"identity": identity, "task": t, "start": s, "outcomes": o}) + "\n" for (t, s), o in kept.items())))

results, t0 = {}, time.time()
for name in tasks:
    items = task_list.load(name, "test", data, None if max_items == -1 else max_items)
    measure = categorical if task_list.TASKS[name]["kind"] == "categorical" else generative
    outcomes, t1 = [], time.time()
    for start in range(0, len(items), BATCH):
        if (name, start) not in kept:
            batch = items[start:start + BATCH]
            numbers = sorted(range(len(batch)), key=lambda i: len(str(batch[i]["messages"][:-1])))[compute.rank::compute.world]  # by length: little padding
            mine = dict(zip(numbers, measure([batch[i] for i in numbers]))) if numbers else {}
            if common.agree(1 if common.stop_requested() else 0):  # what was cut short is measured again
                phase.interrupted(directory, f"{common.stop_requested() or 'another rank was asked'} in {name} at item {start}; everything before is kept")
            mine = {k: v for part in common.gather(mine) for k, v in part.items()}
            kept[name, start] = [bool(mine[i]) for i in range(len(batch))]
            common.append_metrics(partial, {"identity": identity, "task": name, "start": start, "outcomes": kept[name, start]})
        outcomes += kept[name, start]
    right, n, chance = sum(outcomes), len(outcomes), task_list.TASKS[name]["chance"]
    low, high = wilson(right, n)
    results[name] = {"accuracy": right / n, "n": n, "low": low, "high": high, "chance": chance, "centred": (right / n - chance) / (1 - chance), "outcomes": outcomes}
    shown = ("toy-" if data == "toy" else "") + name
    common.print0(f"{shown:<18} {right / n:.3f}  ({low:.3f} to {high:.3f}, {n} items, chance {chance:.2f}, {common.clock(time.time() - t1)})")

missing = [name for name in CHATCORE if name not in results]
chatcore = None if missing else sum(results[name]["centred"] for name in CHATCORE) / len(CHATCORE)
common.print0(f"{'toy-' if data == 'toy' else ''}ChatCORE {chatcore:.4f}" if chatcore is not None else f"no ChatCORE: {', '.join(missing)} not measured")
if compute.rank == 0:
    common.atomic_write(path, json.dumps({"source": source, "data": data, "tag": directory.name, "step": step, "inputs": inputs, "results": results,
                                          "chatcore": chatcore, "missing": missing, "seconds": time.time() - t0}, indent=1))
    partial.unlink(missing_ok=True)
common.outcome(0, "done")
common.leave()
