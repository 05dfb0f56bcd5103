"""
Measures a chat model on tasks with right answers: multiple choice by the logits of the letters, the
others by greedy answers with the calculator at hand.

    python chat_eval.py --data=toy --source=sft
    torchrun --standalone --nproc_per_node=8 chat_eval.py --source=mid

Writes report/chat_<source>_<tag>.json. What was measured is kept batch by batch: an interrupted
evaluation continues.
"""
from run import Run

run = Run.start("chat_eval")  # a signal counts from here on; importing torch takes seconds

import time
from concurrent.futures import ThreadPoolExecutor

import checkpoint
import common
import configurator
import execution
import models
import pipeline
import tasks as task_list

data = "fineweb_edu"         # the data set of the model
source = "sft"               # base, mid, sft or rl
tag = ""                     # which model; empty: the newest
tasks = ["arc_easy", "arc_challenge", "mmlu",     # what is measured; toy adds facts
         "gsm8k", "humaneval", "spellingbee"]
max_items = -1               # items of each task; -1: all
max_new_tokens = 512         # tokens of an answer
# ---- settings below may change at every resume
rows = 64                    # answers generated at once: less where memory runs out
unsafe_exec = False          # run HumanEval's programs without a sandbox where the system has none
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads a rank; 0: the cores divided by the ranks
compile = False              # not compiled: every batch has another shape
time_limit = None            # minutes until it stops; None: the Slurm job's, if any
try_out = False              # only the end of a longest answer, on any model of this shape
settings = configurator.configure(globals())

CHATCORE = ["arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spellingbee"]
BATCH = 256  # items that are dealt, measured and kept together; fixed, so that the batches are

# -------------------------------------------------------------------------------------------------
# inputs, all checked before a model is loaded

common.check(source in pipeline.STAGES, f"--source is base, mid, sft or rl, not {source!r}")
common.check(max_items == -1 or max_items > 0, "--max_items is at least 1, or -1 for all")
if data == "toy" and "facts" not in tasks:
    tasks = [*tasks, "facts"]
for name in tasks:
    kind = task_list.TASKS.get(name, {}).get("kind")
    common.check(kind in ("categorical", "generative"),
                 f"--tasks: {name!r} is no task with right answers")
run.ranks.join()
folder, step = run.ranks.on_rank0(models.find_parent, source, data, tag, try_out)
tokenizer = models.load_tokenizer_of(folder, step, data)

import torch

import evaluation
import gpt
import scores
from compute import choose_compute

@torch.inference_mode()
def last_token_of_longest_answers(model):
    """Seconds that it takes, when the cache is at its largest."""
    length, vocab_size = model.config.sequence_len, model.config.vocab_size
    longest = min(max_new_tokens, 3 * length)
    prompts = torch.randint(vocab_size, (rows, length)).tolist()
    cache, logits = gpt.prefill(model, prompts, length + longest)
    cache.advance(longest - 1)
    cache.select(range(rows))  # as when a row is finished: for a moment there are two
    began = time.monotonic()
    token = torch.zeros(rows, 1, dtype=torch.long, device=logits.device)
    model.logits(model.hidden(token, cache)[:, -1]).argmax(-1).tolist()  # waits for the device
    return time.monotonic() - began

if try_out:
    run.settings = settings
    compute = choose_compute(run.ranks, settings)
    model = models.load_model(folder, step, compute.device, compute.dtype)[0]
    seconds = last_token_of_longest_answers(model)
    common.print0(f"tried out: {rows} answers at once, {seconds:.3f} s for a token of each at the "
                  "end of the longest")
    run.leave(0, "tried out")

asked = list(tasks)
sandbox, no_sandbox = execution.sandbox_available() if "humaneval" in tasks else (True, "")
if run.ranks.all_reduce_max(not (sandbox or unsafe_exec)):  # on any node
    tasks = [name for name in tasks if name != "humaneval"]
    common.print0(f"HumanEval is left out: its programs cannot be run in a sandbox here "
                  f"({no_sandbox}); --unsafe_exec=True runs them without")
inputs = {"weights": checkpoint.fingerprint(folder, step),
          "tasks": task_list.fingerprint(asked, "test", data),
          "settings": {**settings.defining, "tag": folder.name}}
path = pipeline.report_dir(data) / f"chat_{source}_{folder.name}.json"

def has_all_tasks(result):
    """What was left out then may be possible now."""
    return set(tasks) <= set(result["results"])

measured = evaluation.open_or_exit(run, path, inputs, settings, has_all_tasks)
ranks, compute = run.ranks, measured.compute
model = models.load_model(folder, step, compute.device, compute.dtype)[0]

# -------------------------------------------------------------------------------------------------
# outcomes of some items: a list of bool each

@torch.inference_mode()
def categorical(items):
    """Whether the letter of the right choice has the largest logit of the item's letters."""
    outcomes = []
    for start in range(0, len(items), rows):
        part = items[start:start + rows]
        prompts = [prompt_of(item) for item in part]
        logits = gpt.prefill(model, prompts, max(map(len, prompts)))[1]
        for item, row in zip(part, logits.cpu()):
            letters = [tokenizer.encode(letter)[0] for letter in item["letters"]]
            best = item["letters"][row[letters].argmax().item()]
            outcomes.append(best == item["messages"][-1]["content"])
    return outcomes

def generative(items):
    """Whether the greedy answer is right."""
    # not as long as the prompts allow: these differ with the number of ranks
    longest = min(max_new_tokens, 3 * model.config.sequence_len)
    answers = gpt.generate(model, tokenizer, [prompt_of(item) for item in items], longest,
                           calculate=execution.calculate, max_rows=rows,
                           keep_going=lambda: run.stop_reason() is None)

    def judge(item, answer):
        return task_list.correct(item, tokenizer.decode(answer[0]), unsafe_exec)
    with ThreadPoolExecutor(compute.threads) as pool:  # HumanEval's are processes of their own
        return list(pool.map(judge, items, answers))

def prompt_of(item):
    return tokenizer.render_for_completion(item)[-model.config.sequence_len:]

def outcomes_of(items, measure):
    """The outcomes of a batch on all ranks, dealt by length, so that there is little padding. None
    if asked to stop: what was cut short is measured again. Collective."""
    by_length = sorted(range(len(items)), key=lambda i: len(str(items[i]["messages"][:-1])))
    mine = by_length[ranks.rank::ranks.world]
    outcomes = measure([items[i] for i in mine]) if mine else []
    stop = run.should_stop()
    found = {}
    for part in ranks.gather(dict(zip(mine, outcomes))):
        found.update(part)
    return None if stop else [bool(found[i]) for i in range(len(items))]

# -------------------------------------------------------------------------------------------------

prefix = "toy-" if data == "toy" else ""
results = {}
for name in tasks:
    kind, chance = task_list.TASKS[name]["kind"], task_list.TASKS[name]["chance"]
    measure = categorical if kind == "categorical" else generative
    items = task_list.load(name, "test", data, None if max_items == -1 else max_items)
    starts = range(0, len(items), BATCH)
    t0, done = time.monotonic(), 0
    for start in starts:
        piece, batch = f"{name} {start}", items[start:start + BATCH]
        if piece in measured.pieces:
            continue
        measured.keep(piece, outcomes_of(batch, measure))
        done += len(batch)
        kept = sum(len(measured.pieces.get(f"{name} {s}", [])) for s in starts)
        if kept < len(items):
            left = (len(items) - kept) * (time.monotonic() - t0) / done
            common.print0(f"  {name}: {kept:,} of {len(items):,} items, about "
                          f"{common.duration(left)} left")
    outcomes = [right for s in starts for right in measured.pieces[f"{name} {s}"]]
    result = results[name] = scores.score(outcomes, chance)
    of = f" of {scores.FULL[name]:,}" if scores.parts(data, {name: result}) else ""
    common.print0(f"{prefix + name:<18} {result['accuracy']:.3f}  ({result['low']:.3f} to "
                  f"{result['high']:.3f}, {result['n']} items{of}, chance {chance:.2f}, "
                  f"{common.duration(time.monotonic() - t0)})")

missing = [name for name in CHATCORE if name not in results]
chatcore = None
if missing:
    common.print0(f"no ChatCORE: {', '.join(missing)} not measured")
else:
    chatcore = sum(results[name]["centred"] for name in CHATCORE) / len(CHATCORE)
    in_part = "in part " if scores.parts(data, results) else ""
    common.print0(f"{prefix}ChatCORE {in_part}{chatcore:.4f}")
measured.exit_done(source=source, data=data, tag=folder.name, step=step, results=results,
                   chatcore=chatcore, missing=missing)
