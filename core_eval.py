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
import hashlib
import json
import math
import os
import random
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import common
import gpt
import scores

MIN_PREFIX = 8  # tokens in common from which on they are run once
KINDS = {  # icl_task_type -> what an item of it has
    "multiple_choice": "query, choices, gold",
    "schema": "context_options, continuation, gold",
    "language_modeling": "context, continuation",
}

# --------------------------------------------------------------------------------------------------
# the bundle: core.yaml, eval_meta_data.csv, eval_data/*/*.jsonl

def read_core_yaml(path):
    """-> list of {"label", "uri", "kind", "shots", "delimiter"}, one for each block of lines
    `  key: value` behind a `-`: the form in which the bundle is written, not YAML at large. A block
    that is no task, or no block at all: exit 2."""
    text = path.read_text(encoding="utf-8")
    tasks = []
    for block in re.finditer(r"^-.*(?:\n(?!-).*)*", text, re.MULTILINE):
        fields = dict(re.findall(r"^[- ] *(\w+): +(\S.*)", block[0], re.MULTILINE))
        try:
            task = {
                "label": fields["label"],
                "uri": fields["dataset_uri"],
                "kind": fields["icl_task_type"],
                "shots": int(fields["num_fewshot"].strip("[]")),
                "delimiter": json.loads(fields.get("continuation_delimiter", '" "')),
            }
        except (KeyError, ValueError):
            task = None
        line = 1 + text.count("\n", 0, block.start())
        common.check(task and task["kind"] in KINDS and task["shots"] >= 0,
                     f"{path}:{line}: a task needs a label, a dataset_uri, num_fewshot: [NUMBER], "
                     f"and as icl_task_type one of {', '.join(KINDS)}")
        tasks.append(task)
    common.check(tasks, f"{path} has no tasks")
    return tasks

def read_items(path, kind):
    """The items of a task in the order in which they are measured: shuffled with seed 1337.
    A broken one: exit 2 with file and line."""
    items = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                item = json.loads(line)
                sound = right_answer(kind, item) in range(len(written_out(kind, item, " ")))
            except (AttributeError, KeyError, TypeError, ValueError):
                sound = False
            common.check(sound, f"{path}:{number}: this is no {kind} item with {KINDS[kind]}")
            items.append(item)
    random.Random(1337).shuffle(items)
    return items

def read_bundle(bundle, command=None):
    """bundle: its folder; command: the one that prepares it -> (tasks, labels of the tasks whose
    file is missing, hash of all that is measured). A task gets "items", "baseline" (what guessing
    scores, in percent) and "bytes" (of its file) besides what read_core_yaml gives."""
    for name in ("core.yaml", "eval_meta_data.csv"):
        common.check((bundle / name).is_file(),
                     f"no {name} of CORE in {bundle} (--core_items=0 goes without)", command)
    with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as f:
        baselines = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(f)}
    tasks = []
    missing = []
    items = {}  # by file: two tasks may share one
    digest = hashlib.sha256()
    for task in read_core_yaml(bundle / "core.yaml"):
        label = task["label"]
        path = bundle / "eval_data" / task["uri"]
        if not path.is_file():
            missing.append(label)
            continue
        common.check(label in baselines,
                     f"{bundle}/eval_meta_data.csv has no random baseline of {label}")
        if path not in items:
            items[path] = read_items(path, task["kind"])
        task["items"] = items[path]
        task["baseline"] = float(baselines[label])
        task["bytes"] = path.stat().st_size
        common.check(len(task["items"]) > task["shots"],
                     f"{path} has too few items for {task['shots']} examples")
        facts = [task[key] for key in ("label", "kind", "shots", "delimiter", "baseline")]
        digest.update(json.dumps([*facts, common.sha256_file(path)]).encode())
        tasks.append(task)
    return tasks, missing, digest.hexdigest()[:16]

# --------------------------------------------------------------------------------------------------
# from an item to rows of tokens

def right_answer(kind, item):
    """The number of the right one among written_out(kind, item, ...)."""
    return 0 if kind == "language_modeling" else item["gold"]

def written_out(kind, item, delimiter):
    """An item with each of its answers.
    example: multiple_choice, {"query": "2+2", "choices": ["4", "5"]}, "=" -> ["2+2=4", "2+2=5"]"""
    if kind == "multiple_choice":
        return [item["query"] + delimiter + choice for choice in item["choices"]]
    if kind == "schema":
        ending = delimiter + item["continuation"]
        return [context + ending for context in item["context_options"]]
    return [item["context"].strip() + delimiter + item["continuation"]]

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
        answers = written_out(kind, items[i], delimiter)
        shown += answers[right_answer(kind, items[i])] + "\n\n"
    texts = [shown + text for text in written_out(kind, items[number], delimiter)]
    if kind == "language_modeling":
        # without the space at its end: that is part of the continuation's first token
        asked = shown + items[number]["context"].strip() + delimiter
        texts.insert(0, asked.strip())
    return texts

def shared(rows):
    """How many tokens the rows have in common at their start.  [[1, 2, 3], [1, 2, 4]] -> 2"""
    return len(os.path.commonprefix(rows))  # takes lists too

@dataclass
class Row:
    ids: list
    start: int  # ids[start:] is scored
    loss: float = field(default=math.nan, compare=False)  # mean over ids[start:], in nats
    greedy: bool = field(default=False, compare=False)    # whether each of them was most likely

def rows_of(kind, tokens, longest):
    """The tokens of the prompts of an item -> list of Row, a repetition being the first Row itself.
    Scored is, in multiple choice, what follows what all have in common; in a schema, the end that
    all have in common; in language modelling, the continuation. Of more than `longest` tokens the
    last ones are kept."""
    if kind == "language_modeling":
        starts = [shared(tokens)]
        tokens = tokens[1:]
    elif kind == "multiple_choice":
        starts = [shared(tokens)] * len(tokens)
    else:
        ending = shared([ids[::-1] for ids in tokens])
        starts = [len(ids) - ending for ids in tokens]
    rows = []
    for ids, start in zip(tokens, starts):
        cut = max(0, len(ids) - longest)
        if start < cut:  # what is kept is all continuation, and its first token follows nothing
            start = cut + 1
        row = Row(ids[cut:], start - cut)
        if row in rows:
            row = rows[rows.index(row)]
        rows.append(row)
    return rows

# --------------------------------------------------------------------------------------------------
# scoring: what the rows of an item share is run once, logits are made only where they are needed

def make_groups(rows):
    """The rows of an item -> list of groups (prefix, rows that begin with the same `prefix` tokens,
    none of them scored). Repetitions and rows with nothing to score (an empty choice) are left
    out."""
    different = []
    for row in rows:
        if row not in different and 0 < row.start < len(row.ids):
            different.append(row)
    prefix = min([shared([row.ids for row in different]), *(row.start - 1 for row in different)])
    if len(different) > 1 and prefix >= MIN_PREFIX:
        return [(prefix, different)]
    return [(0, [row]) for row in different]

def make_batches(groups, config, itemsize, budget):
    """-> list of batches, each a list of groups of like length that take about `budget` bytes:
    first those with a prefix, which need a cache, then those without, the longest of each first"""
    head_dim = config.n_embd // config.n_head
    # bytes of a token: while a block runs; in the cache, where select() copies keys and values
    run_bytes = 24 * config.n_embd * itemsize
    cache_bytes = 2 * 2 * config.n_layer * config.n_kv_head * head_dim * itemsize

    def order(group):
        prefix, rows = group
        return prefix > 0, max(len(row.ids) for row in rows)

    batches = []
    left = 0
    cached = False
    for prefix, rows in sorted(groups, key=order, reverse=True):
        length = max(len(row.ids) for row in rows)
        need = (prefix + len(rows) * (length - prefix)) * run_bytes
        if prefix:
            need += len(rows) * length * cache_bytes
        if need > left or (prefix > 0) != cached:
            cached = prefix > 0
            batches.append([])
            left = budget
        batches[-1].append((prefix, rows))
        left -= need
    return batches

def score(model, batch, budget):
    """Runs a batch of groups and fills in `loss` and `greedy` of its rows."""
    device = model.lm_head.weight.device
    everyone = [(prefix, row) for prefix, rows in batch for row in rows]
    ids, lengths = gpt.pad_right([row.ids[prefix:] for prefix, row in everyone])
    starts = torch.tensor([row.start - prefix for prefix, row in everyone])
    places = torch.arange(1, ids.size(1))  # of targets: the token before each predicts it
    scored = (places >= starts[:, None]) & (places < lengths[:, None])  # [B, T]
    cache = None
    if batch[0][0]:
        prefixes, lengths = gpt.pad_right([rows[0].ids[:prefix] for prefix, rows in batch])
        room = prefixes.size(1) + len(places)
        cache = gpt.KVCache(model.config, len(batch), room, device, model.dtype)
        model.hidden(prefixes.to(device), cache, lengths.to(device))
        cache.select([i for i, (_, rows) in enumerate(batch) for _ in rows])
    h = model.hidden(ids[:, :-1].to(device), cache)[scored.to(device)]  # [scored tokens, C]
    targets = ids[:, 1:][scored].to(device)
    losses = []
    hits = []
    chunk = max(1, int(budget / (16 * model.config.vocab_size)))  # 4 copies of float32 logits
    for some, target in zip(h.split(chunk), targets.split(chunk)):
        logits = model.logits(some)
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(-1) == target)
    counts = scored.sum(1).tolist()
    losses = torch.cat(losses).cpu().split(counts)
    hits = torch.cat(hits).cpu().split(counts)
    for (_, row), loss, hit in zip(everyone, losses, hits):
        row.loss = loss.mean().item()
        row.greedy = bool(hit.all())

@torch.inference_mode()
def evaluate(model, tokenizer, task, numbers, longest, budget, threads=1, keep_going=lambda: True):
    """Items of a task by number -> list of bool, whether each is answered rightly; None where
    keep_going() said no between batches. longest: tokens of a prompt, of a longer one the last;
    budget: bytes that a batch may take besides the model; threads: for the tokenizer"""
    texts = [prompts(task, number) for number in numbers]
    encoded = iter(tokenizer.encode_batch([text for some in texts for text in some], threads))
    items = []
    groups = []
    for some in texts:
        tokens = [[tokenizer.bos, *next(encoded)] for _ in some]
        rows = rows_of(task["kind"], tokens, longest)
        items.append(rows)
        groups += make_groups(rows)
    for batch in make_batches(groups, model.config, model.dtype.itemsize, budget):
        if not keep_going():
            return None
        score(model, batch, budget)
    if task["kind"] == "language_modeling":
        return [rows[0].greedy for rows in items]
    outcomes = []
    for number, rows in zip(numbers, items):
        losses = [row.loss for row in rows]
        # the first of the smallest; nan (an empty choice) wins if it stands first, else it loses
        outcomes.append(losses.index(min(losses)) == task["items"][number]["gold"])
    return outcomes

# --------------------------------------------------------------------------------------------------
# the numbers

def summary(task, outcomes):
    """What scores.score says of a task's outcomes (list of bool), and what was measured."""
    facts = {"of": len(task["items"]), "kind": task["kind"], "shots": task["shots"]}
    return {**scores.score(outcomes, 0.01 * task["baseline"]), **facts}

def core_of(results, missing):
    """results {label: summary}, missing: labels -> (CORE or None, why there is none or None, mean
    of the centred accuracies that were measured or None)"""
    reasons = []
    if missing:
        reasons.append(f"tasks without their file: {', '.join(missing)}")
    partial = sum(result["n"] < result["of"] for result in results.values())
    if partial:
        reasons.append(f"{partial} tasks measured in part")
    if not results:
        reasons.append("nothing measured")
        return None, "; ".join(reasons), None
    mean = sum(result["centred"] for result in results.values()) / len(results)
    if reasons:
        return None, "; ".join(reasons), mean
    return mean, None, mean
