"""
CORE (DCLM, arXiv 2406.11794): the mean over 22 tasks of the accuracy, centred so that guessing is 0
and perfection 1. It is scored as in nanochat: same order of items, same examples before each, same
prompts, same rule for what is right.

    tasks, missing, _ = read_bundle(pipeline.eval_bundle_dir("toy"))
    evaluate(model, tokenizer, tasks[0], range(64), 2048, 2e8)  # -> [True, False, ...]

It is quick because rows of like length run together, the tokens that the choices of an item have in
common run once, and logits are made only where something is scored.
"""
import csv
import functools
import hashlib
import json
import math
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import common
import engine
import evaluation
import texts

# --------------------------------------------------------------------------------------------------
# the bundle: core.yaml, eval_meta_data.csv, eval_data/*/*.jsonl

TASK = re.compile(r"""-\s+label: (?P<label>\S+)
  dataset_uri: (?P<uri>\S+)
  num_fewshot: \[(?P<shots>\d+)\]
  icl_task_type: (?P<kind>multiple_choice|schema|language_modeling)\b
(?:  continuation_delimiter: (?P<delimiter>"(?:[^"\\\n]|\\["\\nt])*"))?(?!  continuation)""")

def read_core_yaml(path):
    """-> list of {"label", "uri", "kind", "shots", "delimiter"}, one for each TASK: the form in
    which the bundle is written, not YAML at large. Failure where another block is, or none."""
    text = path.read_text(encoding="utf-8")
    tasks = []
    for block in re.finditer("^-", text, re.MULTILINE):
        found = TASK.match(text, block.start())
        line = 1 + text.count("\n", 0, block.start())
        common.check(found, f"{path}:{line}: a task has a label, a dataset_uri, num_fewshot: "
                     "[NUMBER], and as icl_task_type multiple_choice, schema or language_modeling")
        task = found.groupdict(default='" "')  # of the delimiter
        task["shots"] = int(task["shots"])
        task["delimiter"] = json.loads(task["delimiter"])
        tasks.append(task)
    common.check(tasks, f"{path} has no tasks")
    return tasks

@functools.cache  # two tasks may share a file
def read_items(path, kind):
    """The items of a task in the order in which they are measured: shuffled with seed 1337.
    Failure with file and line for a broken one."""
    items = []
    for number, line in texts.read_lines(path):
        try:
            item = json.loads(line)
            pairs, right = choices_of(kind, item)
            written_out = [" ".join(pair) for pair in pairs]
            sound = right in range(len(written_out))
        except (AttributeError, KeyError, TypeError, ValueError):
            sound = False
        common.check(sound, f"{path}:{number} is not a valid {kind} item: restore the file")
        items.append(item)
    random.Random(1337).shuffle(items)
    return items

def read_bundle(bundle, command=None):
    """bundle: its folder; command: the one that prepares it -> (tasks, labels of the tasks whose
    file is missing, hash of all that is measured). A task gets "items" and "baseline" (what
    guessing scores, in percent) besides what read_core_yaml gives."""
    for name in ("core.yaml", "eval_meta_data.csv"):
        common.check((bundle / name).is_file(),
                     f"CORE's {name} is missing in {bundle} (--core_items=0 leaves CORE out)",
                     command)
    with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as f:
        baselines = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(f)}
    tasks = []
    missing = []
    digest = hashlib.sha256()
    for task in read_core_yaml(bundle / "core.yaml"):
        label = task["label"]
        path = bundle / "eval_data" / task["uri"]
        if not path.is_file():
            missing.append(label)
            continue
        common.check(label in baselines, f"{bundle}/eval_meta_data.csv has no {label}")
        task["items"] = read_items(path, task["kind"])
        shots, there = task["shots"], len(task["items"])
        common.check(there > shots, f"{path} has {there} items, expected more than the {shots} "
                     "that are shown before each: restore the file")
        task["baseline"] = float(baselines[label])
        facts = [task[key] for key in ("label", "kind", "shots", "delimiter", "baseline")]
        digest.update(json.dumps([*facts, common.sha256_file(path)]).encode())
        tasks.append(task)
    return tasks, missing, digest.hexdigest()[:16]

# --------------------------------------------------------------------------------------------------
# from an item to rows of tokens

def choices_of(kind, item):
    """-> (pairs of a text and what may follow it, number of the right one).
    example: multiple_choice, {"query": "2+2", "choices": ["4", "5"], "gold": 0} ->
    [("2+2", "4"), ("2+2", "5")], 0"""
    if kind == "multiple_choice":
        return [(item["query"], choice) for choice in item["choices"]], item["gold"]
    if kind == "schema":
        ending = item["continuation"]
        return [(context, ending) for context in item["context_options"]], item["gold"]
    return [(item["context"].strip(), item["continuation"])], 0

def examples(number, n, shots):
    """Numbers of the items shown before item `number` of `n`: drawn without it, by a generator of
    its own."""
    drawn = random.Random(1234 + number).sample(range(n - 1), shots)
    return [i if i < number else i + 1 for i in drawn]

def prompts(task, number):
    """The texts to compare: one a choice, or for language modelling the text without and with its
    continuation.
    example: {"query": "2+2", "choices": ["4", "5"]} behind the example {"query": "1+1", "choices":
    ["2", "3"], "gold": 0} and with the delimiter "=" -> ["1+1=2\\n\\n2+2=4", "1+1=2\\n\\n2+2=5"]"""
    kind, items, delimiter = task["kind"], task["items"], task["delimiter"]
    shown = ""
    for i in examples(number, len(items), task["shots"]):
        pairs, right = choices_of(kind, items[i])
        shown += delimiter.join(pairs[right]) + "\n\n"
    pairs, _ = choices_of(kind, items[number])
    found = [shown + delimiter.join(pair) for pair in pairs]
    if kind == "language_modeling":
        # without the space at its end: that is part of the continuation's first token
        asked = shown + pairs[0][0] + delimiter
        found.insert(0, asked.strip())
    return found

def shared(rows):
    """How many tokens the rows have in common at their start.  [[1, 2, 3], [1, 2, 4]] -> 2"""
    return len(os.path.commonprefix(rows))  # takes lists too

@dataclass
class Row:
    ids: list
    start: int            # ids[start:] is scored
    prefix: int = 0       # ids[:prefix] is run once for all rows of an item
    greedy: bool = False  # whether each of the tokens scored was most likely
    loss: float = field(default=math.nan, compare=False)  # their mean, in nats

def rows_of(kind, tokens, longest):
    """The tokens of the prompts of an item -> list of Row. Scored is, in a schema, the end that
    all have in common, else what follows what all have in common. Of more than `longest` tokens the
    last ones are kept."""
    starts = [shared(tokens)] * len(tokens)
    if kind == "schema":
        ending = shared([ids[::-1] for ids in tokens])
        starts = [len(ids) - ending for ids in tokens]
    if kind == "language_modeling":
        tokens = tokens[1:]
    rows = []
    for ids, start in zip(tokens, starts):
        cut = max(0, len(ids) - longest)
        # the first token that is kept follows nothing
        rows.append(Row(ids[cut:], max(1, start - cut)))
    prefix = shared([row.ids[:row.start - 1] for row in rows])
    if len(rows) > 1:
        for row in rows:
            row.prefix = prefix
    return rows

# --------------------------------------------------------------------------------------------------
# scoring: what the rows of an item share is run once, logits are made only where they are needed

def worth_scoring(rows):
    """Without repetitions, and without rows with nothing to score (an empty choice)."""
    return [row for i, row in enumerate(rows)
            if row.start < len(row.ids) and row not in rows[:i]]

def usual_budget(device):
    """Bytes that a batch takes on a device, the model not counted; on a CPU more is no faster."""
    return 0.2e9 if device.type == "cpu" else 4e9

def make_batches(groups, model, budget):
    """groups: the rows of an item each -> list of batches, each of groups of like length that take
    about `budget` bytes: first those with a prefix, which need a cache, then those without, the
    longest of each first"""
    config = model.config
    # numbers for a token: while a block runs; in the cache, where select() copies keys and values
    of_token = 24 * config.n_embd + 4 * config.n_layer * config.n_kv_head * config.head_dim

    def order(rows):
        return rows[0].prefix > 0, max(len(row.ids) for row in rows)

    batches = []
    left = 0
    for rows in sorted(groups, key=order, reverse=True):
        cached, length = order(rows)
        scored = sum(len(row.ids) - row.start for row in rows)
        need = len(rows) * length * of_token * model.dtype.itemsize
        need += 3 * 4 * scored * config.vocab_size  # logits, in float32, and what is made of them
        if need > left or cached != (batches[-1][0].prefix > 0):
            batches.append([])
            left = budget
        batches[-1] += rows
        left -= need
    return batches

def score(model, rows):
    """Runs a batch and fills in `loss` and `greedy` of its rows."""
    device = model.lm_head.weight.device
    ids = engine.pad_right([row.ids[row.prefix:-1] for row in rows])
    cache = None
    if rows[0].prefix:
        prefixes = [row.ids[:row.prefix] for row in rows]
        longest = max(map(len, prefixes))
        cache, _ = engine.prefill(model, prefixes, longest + ids.size(1))  # equal ones once
    hidden = model.hidden(ids.to(device), cache)
    before = [h[row.start - row.prefix - 1:len(row.ids) - row.prefix - 1]
              for row, h in zip(rows, hidden)]
    # all at once: each product with lm_head casts its weights to the compute dtype anew (row by
    # row takes about a fifth more CPU time on one core)
    logits = model.logits(torch.cat(before))
    targets = torch.cat([torch.tensor(row.ids[row.start:]) for row in rows]).to(device)
    losses = F.cross_entropy(logits, targets, reduction="none").cpu()
    likeliest = (logits.argmax(-1) == targets).cpu()
    counts = [len(h) for h in before]
    for row, loss, greedy in zip(rows, losses.split(counts), likeliest.split(counts)):
        row.loss = loss.mean().item()
        row.greedy = greedy.all().item()

@torch.inference_mode()
def evaluate(model, tokenizer, task, numbers, longest, budget, keep_going=lambda: True):
    """Items of a task by number -> list of bool, whether each is answered rightly; None where
    keep_going() said no between batches. longest: tokens of a prompt, of a longer one the last;
    budget: bytes that a batch may take besides the model"""
    def tokenized(number):
        tokens = [[tokenizer.bos, *tokenizer.encode(text)] for text in prompts(task, number)]
        return rows_of(task["kind"], tokens, longest)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        items = list(pool.map(tokenized, numbers))
    groups = [rows for rows in map(worth_scoring, items) if rows]
    for batch in make_batches(groups, model, budget):
        if not keep_going():
            return None
        score(model, batch)
    if task["kind"] == "language_modeling":
        return [rows[0].greedy for rows in items]
    outcomes = []
    for number, rows in zip(numbers, items):
        # the first of the smallest; nan (an empty choice) wins if it stands first, else it loses,
        # as a repetition does
        best = min(rows, key=lambda row: row.loss)
        outcomes.append(best is rows[task["items"][number]["gold"]])
    return outcomes

# --------------------------------------------------------------------------------------------------
# the numbers

def summary(task, outcomes):
    """What evaluation.score says of a task's outcomes (list of bool), and how many items it has:
    the bundle's file may hold a part of a public test set."""
    of = max(len(task["items"]), evaluation.FULL.get(task["label"], 0))
    return {**evaluation.score(outcomes, 0.01 * task["baseline"]), "of": of}

def core_of(results, missing):
    """results {label: summary}, missing: labels -> (CORE, None), or (None, why there is none)"""
    reasons = []
    if missing:
        reasons.append(f"tasks without their file: {', '.join(missing)}")
    partial = sum(result["n"] < result["of"] for result in results.values())
    if partial:
        reasons.append(f"{partial} tasks measured in part")
    if not results:
        reasons.append("nothing measured")
    if reasons:
        return None, "; ".join(reasons)
    return evaluation.mean_centred(results), None
