"""
CORE (DCLM, arXiv 2406.11794): the mean over 22 tasks of the accuracy, centred so that guessing is 0 and perfection 1. It
is scored as in nanochat: same order of items, same examples before each, same prompts, same rule for what is right.

    tasks, missing, _ = read_bundle(common.eval_bundle_dir("toy"))
    evaluate(model, tokenizer, tasks[0], range(64), 2048, 2e8)  # -> [True, False, ...]

It is quick because rows of like length run together, the tokens that the choices of an item have in common run once,
and logits are made only where something is scored.
"""
import csv
import hashlib
import json
import os
import random
import re
from collections import namedtuple

import torch
import torch.nn.functional as F

import common
import evaluation
import gpt

WORTH = 8  # tokens in common from which on they are run once
FIELDS = {"multiple_choice": {"query": str, "choices": list, "gold": int},
          "schema": {"context_options": list, "continuation": str, "gold": int},
          "language_modeling": {"context": str, "continuation": str}}

# ---------------------------------------------------------------------------------------------------------------------
# the bundle: core.yaml, eval_meta_data.csv, eval_data/

def yaml_value(text):
    """examples: winograd -> "winograd";  "\\nA: " (in quotes) -> its text;  [10] -> [10];  else ValueError"""
    if re.fullmatch(r"'[^']*'", text):
        return text[1:-1]
    return text if re.fullmatch(r"[A-Za-z_./][\w./ -]*", text) and text not in ("true", "false") else json.loads(text)

def read_core_yaml(path):
    """-> list of {"label", "uri", "kind", "shots", "delimiter"}. Reads the little of YAML that this file is made of (under
    icl_tasks: a list of flat maps, a `-` before each); anything else: exit 2 with the number of the line."""
    found = None
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if found is None and line.rstrip() == "icl_tasks:":
            found = []
            continue
        parts = re.fullmatch(r"(?: *(-)(?: +|$)| +)(?:(\w+): +(\S.*))?", line.rstrip())
        try:
            dash, key, value = parts.groups()
            if dash:
                found.append({"line": number})
            if key in found[-1]:
                raise KeyError
            if key:
                found[-1][key] = yaml_value(value)
        except (AttributeError, IndexError, TypeError, KeyError, ValueError):
            common.fail(f"{path}:{number}: cannot read {line.strip()!r}: known are icl_tasks: and in it `-`, `key: value`")
    tasks = []
    for task in found or []:
        for key, whole in (("label", str), ("dataset_uri", str), ("num_fewshot", list), ("icl_task_type", str)):
            common.check(isinstance(task.get(key), whole), f"{path}:{task['line']}: a task whose {key} is no {whole.__name__}")
        shots, kind = task["num_fewshot"][:1], task["icl_task_type"]
        common.check(shots and type(shots[0]) is int and shots[0] >= 0 and kind in FIELDS,
                     f"{path}:{task['line']}: num_fewshot {shots} or icl_task_type {kind} cannot be measured")
        tasks.append({"label": task["label"], "uri": task["dataset_uri"], "kind": kind, "shots": shots[0],
                      "delimiter": task.get("continuation_delimiter", " ")})
    common.check(tasks and len({t["label"] for t in tasks}) == len(tasks), f"{path} has no tasks, or two of one label")
    return tasks

def read_items(path, kind):
    """The items of a task in the order of measuring: shuffled with seed 1337. A broken one: exit 2 with file and line."""
    items = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                items.append(json.loads(line))
                whole = all(isinstance(items[-1][key], wanted) for key, wanted in FIELDS[kind].items())
                if kind != "language_modeling":
                    options = items[-1]["choices" if kind == "multiple_choice" else "context_options"]
                    whole = whole and all(isinstance(o, str) for o in options) and 0 <= items[-1]["gold"] < len(options)
            except (ValueError, KeyError, TypeError):
                whole = False
            common.check(whole, f"{path}:{number}: this is no {kind} item with {', '.join(FIELDS[kind])}")
    random.Random(1337).shuffle(items)
    return items

def read_bundle(bundle, command=None):
    """-> (tasks with "items", "baseline" in percent and "bytes" too, labels of tasks whose file is missing, hash of all)"""
    for name in ("core.yaml", "eval_meta_data.csv"):
        common.check((bundle / name).is_file(), f"no {name} of CORE in {bundle} (--core_items=0 goes without)", command)
    with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as f:
        baselines = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(f)}
    tasks, missing, read, digest = [], [], {}, hashlib.sha256()
    for task in read_core_yaml(bundle / "core.yaml"):
        path = bundle / "eval_data" / task["uri"]
        if not path.is_file():
            missing.append(task["label"])
            continue
        common.check(task["label"] in baselines, f"{bundle}/eval_meta_data.csv has no random baseline of {task['label']}")
        if path not in read:  # two tasks may share a file
            read[path] = read_items(path, task["kind"]), common.sha256_file(path)
        task |= {"items": read[path][0], "baseline": float(baselines[task["label"]]), "bytes": path.stat().st_size}
        common.check(len(task["items"]) > task["shots"], f"{path} has too few items for {task['shots']} examples")
        facts = [task[k] for k in ("label", "kind", "shots", "delimiter", "baseline")]
        digest.update(json.dumps([*facts, read[path][1]]).encode())
        tasks.append(task)
    return tasks, missing, digest.hexdigest()[:16]

# ---------------------------------------------------------------------------------------------------------------------
# from an item to rows of tokens

def examples(number, n, shots):
    """Numbers of the items shown before item `number` of `n`: drawn without it, by a generator of its own."""
    return [i + (i >= number) for i in random.Random(1234 + number).sample(range(n - 1), shots)]

def prompts(task, number):
    """The texts to compare: one a choice, or for language modelling the text without and with its continuation.
    example: {"query": "2+2", "choices": ["4", "5"]} behind {"query": "1+1", "choices": ["2", "3"], "gold": 0} and with the
    delimiter "=" -> ["1+1=2\\n\\n2+2=4", "1+1=2\\n\\n2+2=5"]"""
    items, delimiter, item = task["items"], task["delimiter"], task["items"][number]
    texts = {"multiple_choice": lambda item: [item["query"] + delimiter + choice for choice in item["choices"]],
             "schema": lambda item: [context + delimiter + item["continuation"] for context in item["context_options"]],
             "language_modeling": lambda item: [item["context"].strip() + delimiter + item["continuation"]],
             }[task["kind"]]
    before = [items[i] for i in examples(number, len(items), task["shots"])]
    shown = "".join(texts(b)[b.get("gold", 0)] + "\n\n" for b in before)
    if task["kind"] == "language_modeling":  # a space at the end would belong to the next token: the first goes without
        return [(shown + item["context"].strip() + delimiter).strip(), shown + texts(item)[0]]
    return [shown + text for text in texts(item)]

def shared(rows):
    """How many tokens at their start the rows have in common.  example: [[1, 2, 3], [1, 2, 4]] -> 2"""
    return len(os.path.commonprefix(rows))  # takes lists too

Row = namedtuple("Row", "ids start end cut")  # ids[start:end] is scored; cut: how many tokens were taken off in front

def rows_of(kind, tokens, longest):
    """-> list of Row. Scored is, in multiple choice, what follows what all have in common; in a schema, the end that all
    have in common; in language modelling, the continuation. Of more than `longest` tokens the last ones are kept."""
    if kind == "language_modeling":
        spans = [(tokens[1], shared(tokens))]
    elif kind == "multiple_choice":
        spans = [(ids, shared(tokens)) for ids in tokens]
    else:
        suffix = shared([ids[::-1] for ids in tokens])
        spans = [(ids, len(ids) - suffix) for ids in tokens]
    cuts = [max(0, len(ids) - longest) for ids, _ in spans]  # of a continuation longer than that, what fits is scored
    return [Row(ids[cut:], start - cut if start >= cut else 1, len(ids) - cut, cut) for (ids, start), cut in zip(spans, cuts)]

# ---------------------------------------------------------------------------------------------------------------------
# scoring: what the rows of an item share is run once, and logits are made only where something is scored

def make_groups(rows):
    """rows {(item, choice): Row} -> [(common, [keys])]: rows of an item that begin with the same `common` tokens, none of
    them scored. Left out: rows with nothing to score (an empty choice) and repetitions of a row. Rows that were cut by
    different amounts share nothing: the same token stands elsewhere in them and sees something else."""
    together, groups = {}, []
    for (item, choice), row in rows.items():
        if 0 < row.start < row.end and all(rows[item, earlier] != row for earlier in range(choice)):
            together.setdefault((item, row.cut), []).append((item, choice))
    for keys in together.values():
        n = min(shared([rows[k].ids for k in keys]), min(rows[k].start for k in keys) - 1)
        groups += [(n, keys)] if len(keys) > 1 and n >= WORTH else [(0, [k]) for k in keys]
    return groups

def make_batches(groups, rows, config, itemsize, budget):
    """-> list of batches, each a list of groups of like length that take about `budget` bytes; the longest first"""
    run = 24 * config.n_embd * itemsize  # bytes of a token in a block
    held = 4 * config.n_layer * config.n_kv_head * (config.n_embd // config.n_head) * itemsize  # keys, values, and a copy
    longest = lambda group: max(len(rows[k].ids) for k in group[1])
    batches, used = [], 0
    for group in sorted(groups, key=lambda g: (g[0] > 0, longest(g), g[1]), reverse=True):
        n, keys = group
        need = n * run + len(keys) * ((longest(group) - n) * run + longest(group) * held * (n > 0))
        if not batches or used + need > budget or (batches[-1][0][0] > 0) != (n > 0):
            batches.append([])
            used = 0
        batches[-1].append(group)
        used += need
    return batches

def score(model, batch, rows, budget):
    """A batch of groups -> {key: (mean loss over ids[start:end] in nats, whether each of them has the largest logit)}"""
    at = model.lm_head.weight.device
    keys, skips = zip(*((k, n) for n, members in batch for k in members))
    idx, _ = gpt.pad_right([rows[k].ids[n:rows[k].end - 1] for k, n in zip(keys, skips)])  # the last predicts nothing
    cache = None
    if skips[0]:
        prefixes, lengths = gpt.pad_right([rows[members[0]].ids[:n] for n, members in batch])
        cache = gpt.KVCache(model.config, len(batch), prefixes.size(1) + idx.size(1), at, model.dtype)
        model.hidden(prefixes.to(at), cache, lengths.to(at))
        cache.select([i for i, (_, members) in enumerate(batch) for _ in members])
    h = model.hidden(idx.to(at), cache)
    places = [(i, p - 1 - n) for i, (k, n) in enumerate(zip(keys, skips)) for p in range(rows[k].start, rows[k].end)]
    h = h[tuple(torch.tensor(places, device=at).T)]
    targets = torch.tensor([t for k in keys for t in rows[k].ids[rows[k].start:rows[k].end]], device=at)
    losses, right, chunk = [], [], max(1, int(budget / (16 * model.config.vocab_size)))
    for some, target in zip(h.split(chunk), targets.split(chunk)):
        logits = model.logits(some)
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    counts = [rows[k].end - rows[k].start for k in keys]
    parts = zip(keys, torch.cat(losses).cpu().split(counts), torch.cat(right).cpu().split(counts))
    return {k: (loss.mean().item(), bool(ok.all())) for k, loss, ok in parts}

@torch.inference_mode()
def evaluate(model, tokenizer, task, numbers, longest, budget, threads=1, keep_going=lambda: True):
    """Items of a task by number -> whether each is answered rightly; None where keep_going() said no between batches."""
    texts = [prompts(task, n) for n in numbers]
    encoded = iter(tokenizer.encode_batch([text for some in texts for text in some], threads))
    rows = {}
    for n, some in zip(numbers, texts):
        tokens = [[tokenizer.bos, *next(encoded)] for _ in some]
        rows |= {(n, choice): row for choice, row in enumerate(rows_of(task["kind"], tokens, longest))}
    scores = {key: (float("nan"), False) for key in rows}  # of what has nothing to score
    for batch in make_batches(make_groups(rows), rows, model.config, model.dtype.itemsize, budget):
        if not keep_going():
            return None
        scores |= score(model, batch, rows, budget)
    if task["kind"] == "language_modeling":
        return [scores[n, 0][1] for n in numbers]
    verdicts = []
    for n, some in zip(numbers, texts):  # the first of the smallest; nan (an empty choice) wins as first, else loses
        mine = [rows[n, choice] for choice in range(len(some))]
        losses = [scores[n, mine.index(row)][0] for row in mine]
        verdicts.append(losses.index(min(losses)) == task["items"][n]["gold"])
    return verdicts

# ---------------------------------------------------------------------------------------------------------------------
# the numbers

def summary(task, outcomes):
    return {**evaluation.score(outcomes, 0.01 * task["baseline"]), "of": len(task["items"]), "kind": task["kind"], "shots": task["shots"]}

def core_of(results, missing):
    """-> (CORE or None, why there is none or None, mean of the centred accuracies that were measured or None)"""
    few = sum(r["n"] < r["of"] for r in results.values())
    reasons = [f"tasks without their file: {', '.join(missing)}"] if missing else []
    reasons += [f"{few} tasks measured in part"] if few else []
    reasons += [] if results else ["nothing measured"]
    mean = sum(r["centred"] for r in results.values()) / len(results) if results else None
    return (None if reasons else mean), "; ".join(reasons) or None, mean
