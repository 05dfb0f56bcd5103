"""
Measures a chat model on tasks with right answers: multiple choice by the logits of the letters, the
others by greedy answers with the calculator at hand.

    python chat_eval.py --data=toy --source=sft
    torchrun --standalone --nproc_per_node=8 chat_eval.py --source=mid

Writes report/chat_<source>_<tag>.json in the state folder. What was measured is kept batch by
batch: an interrupted evaluation continues.
"""
from run import Run

run = Run.start("chat_eval")  # a signal counts from here on; importing torch takes seconds

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import checkpoint
import common
import configurator
import execution
import models
import pipeline
import tasks as task_list

data = "fineweb_edu"         # the data set of the model
source = "sft"               # the model's stage of training: base, mid, sft or rl
tag = ""                     # which model, d20 for instance; empty: the newest
tasks = ["arc_easy", "arc_challenge", "mmlu",     # tasks to measure; toy adds facts
         "gsm8k", "humaneval", "spellingbee"]
max_items = -1               # items of each task; -1: all
max_new_tokens = 512         # tokens of an answer at most
# ---- settings below may change at every resume
rows = 64                    # answers generated at once; fewer need less memory
unsafe_exec = False          # run HumanEval's programs without a sandbox where the system has none
device = "auto"              # device to compute on: auto, cuda, mps, cpu
dtype = "auto"               # compute dtype: auto (the faster), bfloat16, float32
threads = 0                  # CPU threads of each rank; 0: the cores divided by the ranks
time_limit = None            # minutes until it stops; None: the Slurm job's, if any
try_out = False              # trial run: the end of the longest answers; measures, saves nothing
settings = configurator.configure(globals())

# -------------------------------------------------------------------------------------------------
# inputs, all checked before a model is loaded

if data == "toy" and "facts" not in tasks:
    tasks = [*tasks, "facts"]
task_list.check_names(settings)
most = None if max_items == -1 else max_items
items_of = {name: task_list.load(name, "test", data, most) for name in tasks}
run.ranks.join(device)
folder, step = run.ranks.on_rank0(models.find_parent, source, data, tag, try_out)
tokenizer = models.load_tokenizer_of(folder, step, data)

import torch

import engine
import evaluation
from compute import choose_compute, cores_of_rank

if try_out:
    run.settings = settings
    compute = choose_compute(run.ranks, settings)
    model = models.load_to_use(folder, step, compute.device, compute.dtype)
    length = model.config.sequence_len
    with torch.inference_mode():
        decoder = engine.Decoder(model, rows, length + max_new_tokens)
        # rows that differ, or equal ones would be run once
        first = [divmod(row, model.config.vocab_size) for row in range(rows)]
        decoder.add([[*two, *[0] * (length - 2)] for two in first])
        decoder.lengths = [length + max_new_tokens - 1] * rows
        decoder.step([0] * rows).tolist()  # waits for the device
    common.print0(f"tried out: {rows} answers at once, to the end of the longest")
    run.leave(0, "tried out")

inputs = {
    "weights": checkpoint.fingerprint(folder, step),
    "tasks": task_list.fingerprint(tasks, "test", data),
    "settings": {**settings.defining, "tag": folder.name},
}
if "humaneval" in tasks:
    able, why = execution.can_run(unsafe_exec)
    if run.ranks.all_reduce_max(not able):  # on any node
        tasks = [name for name in tasks if name != "humaneval"]
        common.print0("HumanEval is left out, since its programs cannot be run: "
                      f"{why or 'see what another node says'}")
path = pipeline.report_dir(data) / f"chat_{source}_{folder.name}.json"
# a result without a task that was left out then does not do where it is possible now
measured = evaluation.open_or_exit(run, path, inputs, settings, needed=tasks)
compute = measured.compute
common.print0(f"{source} {folder.name}, step {step:,}: {run.ranks.world} x {compute}; tasks: "
              f"{', '.join(tasks)}")
model = models.load_to_use(folder, step, compute.device, compute.dtype)
packed = engine.Packed(model, rows)

# -------------------------------------------------------------------------------------------------
# whether some items of a task are answered rightly: a list of bool, None if stopped

@torch.inference_mode()
def categorical(items, prompts):
    """Right is the letter with the largest logit of the item's letters."""
    outcomes = []
    for start in range(0, len(items), rows):
        if not run.going():
            return None
        part = prompts[start:start + rows]
        logits = engine.prefill(model, part, max(map(len, part)))[1].cpu()
        for item, row in zip(items[start:], logits):
            letters = [tokenizer.encode(letter)[0] for letter in item["letters"]]
            best = item["letters"][row[letters].argmax().item()]
            outcomes.append(best == item["messages"][-1]["content"])
    return outcomes

def answer(prompts, most):
    """The greedy answers to prompts, of so many tokens at most: texts, None if stopped."""
    said = engine.generate(model, tokenizer, prompts, most, max_rows=rows, packed=packed,
                           calculate=execution.calculate, keep_going=run.going)
    return [tokenizer.decode(tokens) for tokens, _ in said] if run.going() else None

def generative(items, prompts):
    """What is right of the greedy answers."""
    texts = answer(prompts, max_new_tokens)
    if texts is None:
        return None
    # HumanEval's are processes of their own, and where more run than there are cores, a right one
    # may take too long; compute.threads may be those of the larger machine that began
    with ThreadPoolExecutor(min(compute.threads, cores_of_rank())) as pool:
        return list(pool.map(task_list.correct, items, texts, repeat(unsafe_exec)))

def write_answers():
    """The greedy answers to the ten prompts of the report. -> [{"prompt", "text"}], None if
    stopped"""
    prompts = evaluation.prompts(data)
    turns = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    texts = answer([tokenizer.render_for_completion(turn) for turn in turns],
                   min(96, max_new_tokens))
    return texts and [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)]

def outcomes_of(items):
    length = model.config.sequence_len
    prompts = [tokenizer.render_for_completion(item)[-length:] for item in items]
    measure = categorical if "letters" in items[0] else generative
    return measure(items, prompts)

# -------------------------------------------------------------------------------------------------

results = {}
for name in tasks:
    outcomes = measured.outcomes(name, items_of[name], outcomes_of)
    results[name] = evaluation.score(outcomes, task_list.TASKS[name]["chance"])
    title = evaluation.name_of(name, data, results[name])
    evaluation.print_score(evaluation.called(title, data), results[name])

answers = measured.piece("answers", run.ranks.on_rank0, write_answers)
missing = [name for name in evaluation.CHATCORE if name not in results]
chatcore = None
if missing:
    common.print0(f"ChatCORE needs all six tasks; missing: {', '.join(missing)}")
else:
    chatcore = evaluation.mean_centred({name: results[name] for name in evaluation.CHATCORE})
    part = " in part" if evaluation.in_part(data, results) else ""
    common.print0(f"{evaluation.called('ChatCORE', data)}{part} {chatcore:.4f}")
measured.exit_done(source=source, data=data, tag=folder.name, step=step, results=results,
                   chatcore=chatcore, missing=missing, answers=answers)
