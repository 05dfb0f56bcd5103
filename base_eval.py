"""
Measures a base model: bits per byte of training and validation text, CORE, and a few samples to look at.

    python base_eval.py --data=toy
    python base_eval.py --data=fineweb_edu --tag=d20 --core_items=100       # quick: an impression, not called CORE
    torchrun --standalone --nproc_per_node=8 base_eval.py --data=fineweb_edu

CORE (DCLM, arXiv 2406.11794) is the mean over 22 tasks of the accuracy, centred so that guessing is 0 and perfection 1. It
is scored as nanochat does: same order of items, same examples in front of each, same prompts, same rule for what is right.

Writes report/core_base_<tag>.json. Every finished piece is kept beside it: an interrupted evaluation continues.
"""
import common
if __name__ == "__main__":
    common.install_stop_handlers()  # before torch is imported

import csv
import hashlib
import json
import os
import random
import time
from collections import namedtuple

import checkpoint
import configurator
import data as dataset
import phase
import tokenizer as tok

data = "fineweb_edu"         # the data set of the model, as base_train.py had it
tag = ""                     # which model; empty: the newest
core_items = -1              # items of each CORE task; -1: all (fewer is not CORE); 0: no CORE
max_prompt = 2048            # tokens of a CORE prompt; of a longer one the last so many are seen
eval_tokens = 10_485_760     # tokens of each split measured for bits per byte (all, if there are fewer); 0: none
samples = True               # whether samples are written
seed = 1337                  # of the samples that are drawn
# ---- settings below may change at every resume
memory_gb = 1.0              # GB that a batch may take besides the model; answers do not depend on it
device_batch_size = 16       # rows at once for bits per byte
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads a rank; 0: the cores divided by the ranks
compile = False              # not compiled: every batch has another shape
time_limit = None            # minutes until it saves and stops; None: no limit (under Slurm the job's)
settings = configurator.configure(globals()) if __name__ == "__main__" else None

import numpy as np
import torch
import torch.nn.functional as F

import gpt
import training

WORTH = 8   # tokens in common from which on rows are run together
Row = namedtuple("Row", "ids start end cut")  # cut: tokens taken off in front
BLOCK = 64  # items that are dealt to a rank, sorted by length, measured and kept together; fixed, so that batches are
PROMPTS = ["The capital of France is", "The opposite of hot is", "If yesterday was Friday, then tomorrow will be",
           "Once upon a time", "My favourite colour is", "The planets of the solar system are:", "If 5*x + 3 = 13, then x is"]
FIELDS = {"multiple_choice": {"query": str, "choices": list, "gold": int},
          "schema": {"context_options": list, "continuation": str, "gold": int},
          "language_modeling": {"context": str, "continuation": str}}

# ---------------------------------------------------------------------------------------------------------------------
# the bundle: core.yaml, eval_meta_data.csv, eval_data/

def read_core_yaml(path):
    """
    The tasks in core.yaml: a list of {"label", "uri", "kind", "shots", "delimiter"}. Reads the little of YAML that such a file
    is made of (a list of flat maps under icl_tasks; texts, "quoted" texts, numbers, lists of numbers); exits with 2 and the line else.
    """
    def value(text, number):
        try:
            if text[0] in "\"[0123456789" or text in ("true", "false"):
                return json.loads(text)
            if text[0] == "'" and text[-1] == "'" and len(text) > 1:
                return text[1:-1].replace("''", "'")
        except ValueError:
            common.fail(f"{path}:{number}: cannot read the value {text}")
        if text[0] in "&*!|>%@`{}'#,]?-" or ": " in text or " #" in text:
            common.fail(f"{path}:{number}: only texts, numbers and lists of numbers are read here, not {text}")
        return text

    found, inside = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if not inside:
            common.check(line.rstrip() == "icl_tasks:", f"{path}:{number}: expected icl_tasks:, found {text}")
            inside = True
            continue
        if text == "-" or text.startswith("- "):
            found.append({"line": number})
            text = text[1:].strip()
            if not text:
                continue
        key, colon, rest = text.partition(":")
        common.check(found and "\t" not in line and colon and key.isidentifier() and rest[:1] == " " and rest.strip(),
                     f"{path}:{number}: expected `key: value` of a task, found {text}")
        common.check(key not in found[-1], f"{path}:{number}: {key} stands there twice")
        found[-1][key] = value(rest.strip(), number)
    tasks = []
    for task in found:
        where = f"{path}:{task['line']}: this task"
        for key in ("label", "dataset_uri", "num_fewshot", "icl_task_type"):
            common.check(key in task, f"{where} has no {key}")
        shots, kind = task["num_fewshot"], task["icl_task_type"]
        common.check(kind in FIELDS, f"{where} is of the unknown type {kind}")
        common.check(isinstance(shots, list) and shots and type(shots[0]) is int and shots[0] >= 0, f"{where} needs num_fewshot: [number]")
        tasks.append({"label": str(task["label"]), "uri": task["dataset_uri"], "kind": kind, "shots": shots[0],
                      "delimiter": task.get("continuation_delimiter", " ")})
    common.check(tasks and len({t["label"] for t in tasks}) == len(tasks), f"{path} lists no tasks, or one label twice")
    return tasks

def read_items(path, kind):
    """The items of a task in the order in which they are measured (shuffled with seed 1337); a broken one: exit 2, file and line."""
    items = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                item = json.loads(line)
                whole = all(isinstance(item[key], wanted) for key, wanted in FIELDS[kind].items())
                options = item["choices" if kind == "multiple_choice" else "context_options"] if kind != "language_modeling" else ["", ""]
                whole = whole and all(isinstance(o, str) for o in options) and 0 <= item.get("gold", 0) < len(options)
            except (ValueError, KeyError, TypeError):
                whole = False
            common.check(whole, f"{path}:{number}: this is no {kind} item with {', '.join(FIELDS[kind])}")
            items.append(item)
    random.Random(1337).shuffle(items)
    return items

def read_bundle(bundle, command=None):
    """-> (tasks with "items", "baseline" (percent) and "bytes" added, labels of tasks whose file is missing, hash of it all)"""
    for name in ("core.yaml", "eval_meta_data.csv"):
        common.check((bundle / name).is_file(), f"the CORE tasks are not in {bundle}: there is no {name} (--core_items=0 goes without)", command)
    with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as f:
        baselines = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(f)}
    tasks, missing, read, digest = [], [], {}, hashlib.sha256()
    for task in read_core_yaml(bundle / "core.yaml"):
        path = bundle / "eval_data" / task["uri"]
        if not path.is_file():
            missing.append(task["label"])
            continue
        common.check(task["label"] in baselines, f"{bundle / 'eval_meta_data.csv'} has no random baseline for {task['label']}")
        if path not in read:  # two tasks may share a file
            read[path] = read_items(path, task["kind"]), common.sha256_file(path)
        task = {**task, "items": read[path][0], "baseline": float(baselines[task["label"]]), "bytes": path.stat().st_size}
        common.check(len(task["items"]) > task["shots"], f"{path} has {len(task['items'])} items, too few for {task['shots']} examples before each")
        digest.update(json.dumps([read[path][1], *(task[k] for k in ("label", "kind", "shots", "delimiter", "baseline"))]).encode())
        tasks.append(task)
    return tasks, missing, digest.hexdigest()[:16]

# ---------------------------------------------------------------------------------------------------------------------
# from an item to rows of tokens

def examples(number, n, shots):
    """Numbers of the items shown before item `number` of `n`: drawn without it, by a generator of its own."""
    return [i + (i >= number) for i in random.Random(1234 + number).sample(range(n - 1), shots)]

def prompts(task, number):
    """
    The texts to compare: one a choice, or for language modelling the text without and with its continuation.
    example: item {"query": "2+2", "choices": ["4", "5"]} after an example {"query": "1+1", "choices": ["2", "3"], "gold": 0} and
    the delimiter "=" -> ["1+1=2\n\n2+2=4", "1+1=2\n\n2+2=5"]
    """
    items, delimiter = task["items"], task["delimiter"]
    if task["kind"] == "multiple_choice":
        texts = lambda item: [item["query"] + delimiter + choice for choice in item["choices"]]
    elif task["kind"] == "schema":
        texts = lambda item: [context + delimiter + item["continuation"] for context in item["context_options"]]
    else:
        texts = lambda item: [item["context"].strip() + delimiter + item["continuation"]]
    shown = [items[i] for i in examples(number, len(items), task["shots"])]
    before = "".join(texts(item)[item.get("gold", 0)] + "\n\n" for item in shown)
    item = items[number]
    if task["kind"] == "language_modeling":  # a space at the end would belong to the next token: the shorter one goes without
        return [(before + item["context"].strip() + delimiter).strip(), before + texts(item)[0]]
    return [before + text for text in texts(item)]

def shared(rows):
    """How many tokens at their start the rows have in common.  example: [[1, 2, 3], [1, 2, 4]] -> 2"""
    return len(os.path.commonprefix(rows))  # takes lists too, and is quick

def rows_of(kind, tokens, longest):
    """
    -> list of Row, whose ids[start:end] is what is scored. Multiple choice: behind what all have in common. Schema: the end
    that all have in common. Language modelling: the continuation. Of more than `longest` tokens the last are kept.
    """
    if kind == "language_modeling":
        spans = [(tokens[1], shared(tokens), len(tokens[1]))]
    elif kind == "multiple_choice":
        start = shared(tokens)
        spans = [(ids, start, len(ids)) for ids in tokens]
    else:
        suffix = shared([ids[::-1] for ids in tokens])
        spans = [(ids, len(ids) - suffix, len(ids)) for ids in tokens]
    rows = []
    for ids, start, end in spans:
        cut = max(0, len(ids) - longest)  # of a continuation longer than that, what fits is scored
        rows.append(Row(ids[cut:], start - cut if start >= cut else 1, end - cut, cut))
    return rows

# ---------------------------------------------------------------------------------------------------------------------
# scoring: what the rows of an item share is run once, and logits are made only where something is scored

def make_groups(rows):
    """
    rows {(item, choice): Row} -> [(common, [keys])]: rows of one item that begin with the same `common` tokens, none of them
    scored. Rows with nothing to score (an empty choice) and repetitions of a row are left out. Rows that were cut at
    different places stand at different positions and share nothing.
    """
    together, groups = {}, []
    for (item, choice), row in rows.items():
        if 0 < row.start < row.end and not any(rows[item, earlier] == row for earlier in range(choice)):
            together.setdefault((item, row.cut), []).append((item, choice))
    for keys in together.values():
        common_tokens = min(shared([rows[k].ids for k in keys]), min(rows[k].start for k in keys) - 1)
        groups += [(common_tokens, keys)] if len(keys) > 1 and common_tokens >= WORTH else [(0, [k]) for k in keys]
    return groups

def make_batches(groups, rows, config, itemsize, budget):
    """Groups of like length together, the longest first, each batch within `budget` bytes. -> list of lists of groups"""
    run = 24 * config.n_embd * itemsize  # bytes for a token that runs through a block, about
    held = 4 * config.n_layer * config.n_kv_head * (config.n_embd // config.n_head) * itemsize  # for keys and values, and a copy
    longest = lambda group: max(len(rows[k].ids) for k in group[1])
    batches, used = [], 0
    for group in sorted(groups, key=lambda g: (g[0] > 0, longest(g), g[1]), reverse=True):
        prefix, keys = group
        need = prefix * run + len(keys) * ((longest(group) - prefix) * run + longest(group) * held * (prefix > 0))
        if not batches or used + need > budget or (batches[-1][0][0] > 0) != (prefix > 0):
            batches.append([])
            used = 0
        batches[-1].append(group)
        used += need
    return batches

def score(model, batch, rows, budget):
    """-> {key: (mean loss over ids[start:end] in nats, whether each of them has the largest logit)} for the rows of a batch"""
    at = model.lm_head.weight.device
    keys = [k for _, members in batch for k in members]
    skips = [common_tokens for common_tokens, members in batch for _ in members]
    idx, _ = gpt.pad_right([rows[k].ids[skip:rows[k].end - 1] for k, skip in zip(keys, skips)])  # the last token predicts nothing
    cache = None
    if skips[0]:
        prefixes, lengths = gpt.pad_right([rows[members[0]].ids[:common_tokens] for common_tokens, members in batch])
        cache = gpt.KVCache(model.config, len(batch), prefixes.size(1) + idx.size(1), at, model.dtype)
        model.hidden(prefixes.to(at), cache, lengths.to(at))
        cache.select([group for group, (_, members) in enumerate(batch) for _ in members])
    h = model.hidden(idx.to(at), cache)
    places = [(i, p - 1 - skip) for i, (k, skip) in enumerate(zip(keys, skips)) for p in range(rows[k].start, rows[k].end)]
    h = h[tuple(torch.tensor(places, device=at).T)]
    targets = torch.tensor([t for k in keys for t in rows[k].ids[rows[k].start:rows[k].end]], device=at)
    losses, right = [], []
    for part, target in zip(*(x.split(max(1, int(budget / (16 * model.config.vocab_size)))) for x in (h, targets))):
        logits = model.logits(part)
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    counts = [rows[k].end - rows[k].start for k in keys]
    losses, right = torch.cat(losses).cpu().split(counts), torch.cat(right).cpu().split(counts)
    return {k: (loss.mean().item(), bool(ok.all())) for k, loss, ok in zip(keys, losses, right)}

@torch.inference_mode()
def evaluate(model, tokenizer, task, numbers, longest, budget, threads=1, keep_going=lambda: True):
    """Whether the items `numbers` of a task are answered rightly: a list of bool, or None where keep_going() said no between batches."""
    texts = {n: prompts(task, n) for n in numbers}
    encoded = iter(tokenizer.encode_batch([text for n in numbers for text in texts[n]], threads))
    rows = {(n, choice): row for n in numbers
            for choice, row in enumerate(rows_of(task["kind"], [[tokenizer.bos, *next(encoded)] for _ in texts[n]], longest))}
    scores = {key: (float("nan"), False) for key in rows}  # of what has nothing to score
    for batch in make_batches(make_groups(rows), rows, model.config, model.dtype.itemsize, budget):
        if not keep_going():
            return None
        scores |= score(model, batch, rows, budget)
    if task["kind"] == "language_modeling":
        return [scores[n, 0][1] for n in numbers]
    verdicts = []
    for n in numbers:  # the first of the smallest; nan, of an empty choice, wins where it stands first and loses elsewhere
        mine = [rows[n, choice] for choice in range(len(texts[n]))]
        losses = [scores[n, mine.index(row)][0] for row in mine]
        verdicts.append(losses.index(min(losses)) == task["items"][n]["gold"])
    return verdicts

# ---------------------------------------------------------------------------------------------------------------------
# the numbers

def summary(task, outcomes):
    """Accuracy, the same centred on guessing (0) and perfection (1), and half of the 95 % interval of the latter."""
    n, guess = len(outcomes), 0.01 * task["baseline"]
    accuracy = sum(outcomes) / n
    return {"accuracy": accuracy, "centred": (accuracy - guess) / (1 - guess), "error95": 1.96 * (accuracy * (1 - accuracy) / n) ** 0.5 / (1 - guess),
            "n": n, "of": len(task["items"]), "kind": task["kind"], "shots": task["shots"], "outcomes": outcomes}

def core_of(results, missing):
    """-> (CORE or None, why there is none or None, mean of the centred accuracies that were measured or None)"""
    few = sum(r["n"] < r["of"] for r in results.values())
    reasons = ([f"tasks without their file: {', '.join(missing)}"] if missing else []) + ([f"{few} tasks measured in part"] if few else [])
    reasons += [] if results else ["nothing measured"]
    mean = sum(r["centred"] for r in results.values()) / len(results) if results else None
    return (None if reasons else mean), "; ".join(reasons) or None, mean

def write_samples(model, tokenizer):
    """Greedy continuations of PROMPTS, and texts out of nothing drawn at temperature 1. -> [{"prompt", "text"}], None if stopped"""
    keep_going = lambda: not common.stop_requested()
    said = gpt.generate(model, tokenizer, [[tokenizer.bos, *tokenizer.encode(p)] for p in PROMPTS], 24, keep_going=keep_going)
    uniforms = np.stack([common.rng(seed, i).random(64) for i in range(4)])
    said += gpt.generate(model, tokenizer, [[tokenizer.bos]] * 4, 64, 1.0, uniforms=uniforms, keep_going=keep_going)
    return [{"prompt": p, "text": tokenizer.decode(ids)} for p, (ids, _) in zip([*PROMPTS, *[""] * 4], said)] if keep_going() else None

def gather(value):
    """The value of every rank, on every rank."""
    values = [value] * common.rank_world()[2]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def main():
    # inputs, all checked before a model is loaded
    common.check(core_items >= -1, f"--core_items must be -1 (all), 0 (no CORE) or a number of items, not {core_items}")
    common.check(max_prompt == -1 or max_prompt >= 2, f"--max_prompt must be at least 2 (or -1), not {max_prompt}")
    common.check(memory_gb > 0 and device_batch_size >= 1 and eval_tokens >= 0,
                 "--memory_gb must be more than 0, --device_batch_size at least 1, --eval_tokens not negative")
    directory, step = checkpoint.find_model("base", data, tag or None)
    tokenizer = tok.load_tokenizer(common.tokenizer_dir(data))
    tasks, missing, bundle = [], [], None
    if core_items:
        tasks, missing, bundle = read_bundle(common.eval_bundle_dir(data), f"python prepare_data.py --data={data}")
    for label in missing:
        common.print0(f"the file of the task {label} is missing in {common.eval_bundle_dir(data)}: there will be no CORE")
    common.init_distributed()
    splits = {split: dataset.tokenize_files(data, split, tokenizer) for split in ("train", "val")} if eval_tokens else {}
    inputs = {"weights": checkpoint.fingerprint(directory, step), "step": step, "tokenizer": tokenizer.fingerprint, "bundle": bundle,
              "missing": missing, "data": dataset.fingerprint(sum(splits.values(), [])), "settings": {**settings.defining, "tag": directory.name}}
    path = common.eval_path("core", "base", data, directory.name)
    if (common.read_json(path) or {}).get("inputs") == inputs:
        common.print0(f"base_eval {directory.name}: done already ({path})")
        return common.outcome(0, "done already")

    # what an interrupted evaluation left: a line that says of what, then a line a piece
    partial = path.with_suffix(".partial.jsonl")
    lines = common.on_rank0(common.read_metrics, partial)
    if lines and lines[0].get("inputs") != inputs:
        common.print0("base_eval: dropping what is left of an evaluation of something else: " + ", ".join(phase.differences(lines[0].get("inputs", {}), inputs)))
        lines = []
    compute = common.init_compute(settings, lines[0]["chosen"] if lines else None)
    lines = lines or [{"inputs": inputs, "chosen": common.chosen(compute)}]
    kept = {line["piece"]: line["value"] for line in lines[1:]}
    spent, last = sum(line["seconds"] for line in lines[1:]), time.time()
    if compute.rank == 0:
        common.atomic_write(partial, "".join(json.dumps(line) + "\n" for line in lines))  # without a line torn by a death
    if kept:
        common.print0(f"base_eval {directory.name}: continuing, {len(kept)} pieces are there already")

    def keep(piece, value):
        nonlocal spent, last
        seconds, last = time.time() - last, time.time()
        spent += seconds
        kept[piece] = value
        common.append_metrics(partial, {"piece": piece, "value": value, "seconds": round(seconds, 3)})

    def stop():
        phase.interrupted(directory, f"{common.stop_requested() or 'another rank was asked'}: the {len(kept)} pieces measured so far are kept")

    common.set_deadline(time_limit)
    model, tokenizer, _ = checkpoint.load_model("base", data, directory.name, compute.device, compute.dtype)
    longest = model.config.sequence_len if max_prompt == -1 else max_prompt
    common.print0(f"base {directory.name}, step {step:,}: {compute.world} x {compute.device.type}, {compute.dtype}, {compute.threads} threads")

    for split, stores in splits.items():
        if f"{split} bpb" not in kept:
            length, enough = model.config.sequence_len + 1, 1  # packing every shard of a large data set would take longer than measuring
            while enough < len(stores) and sum(s.facts["tokens"] for s in stores[:enough]) < 2 * eval_tokens:
                enough += 1
            plan = dataset.make_plan(stores[:enough], length, tokenizer.bos)
            common.check(dataset.n_rows(plan), f"the {split} split of {data} has too little text for one row of {length} tokens")
            bpb = training.bits_per_byte(model, plan, tokenizer, eval_tokens, device_batch_size, compute)
            stop() if bpb is None else keep(f"{split} bpb", bpb)
        common.print0(f"{split}: {kept[f'{split} bpb']:.4f} bits per byte")

    if samples and "samples" not in kept:
        texts = common.on_rank0(write_samples, model, tokenizer)
        stop() if texts is None else keep("samples", texts)
    for sample in kept.get("samples", []):
        common.print0(f"  {sample['prompt']} | {sample['text']}".replace("\n", "\\n"))

    # CORE: blocks of items are dealt to the ranks in turns
    name = "toy-CORE" if data == "toy" else "CORE"
    counts = {t["label"]: min(core_items, len(t["items"])) if core_items > 0 else len(t["items"]) for t in tasks}
    blocks = {t["label"]: [f"{t['label']} {start}" for start in range(0, counts[t["label"]], BLOCK)] for t in tasks}
    todo = [(t, b * BLOCK, piece) for t in tasks for b, piece in enumerate(blocks[t["label"]]) if piece not in kept]
    effort = lambda due: sum((t["shots"] + 1) * t["bytes"] / len(t["items"]) for t, _, _ in due)  # in characters of a prompt
    results, items, began, shown, total = {}, 0, time.time(), time.time(), effort(todo)
    while True:
        for t in tasks:
            if t["label"] not in results and all(piece in kept for piece in blocks[t["label"]]):
                r = results[t["label"]] = summary(t, [outcome for piece in blocks[t["label"]] for outcome in kept[piece]])
                common.print0(f"  {t['label']:<32} accuracy {r['accuracy']:.4f}  centred {r['centred']:+.4f} +- {r['error95']:.4f}  ({r['n']} of {r['of']} items)")
        if not todo:
            break
        due, todo = todo[:compute.world], todo[compute.world:]
        value = []
        if compute.rank < len(due):
            task, start, _ = due[compute.rank]
            value = evaluate(model, tokenizer, task, range(start, min(start + BLOCK, counts[task["label"]])), longest, memory_gb * 1e9,
                             compute.threads, lambda: not common.stop_requested())
        values = gather(value)
        for (_, _, piece), value in zip(due, values):
            if value is not None:
                keep(piece, value)
                items += len(value)
        if None in values:
            stop()
        if time.time() - shown > 10:
            shown = time.time()
            left = (shown - began) * effort(todo) / (total - effort(todo))
            common.print0(f"{name}: {len(results)} of {len(tasks)} tasks, {items / (shown - began):.1f} items/s, about {common.clock(left)} left")

    core, reason, mean = core_of(results, missing)
    common.print0(f"{name} {core:.4f}" if core is not None else f"no {name}: {reason}" + (f" (mean of what was measured: {mean:.4f})" if results else ""))
    if compute.rank == 0:
        common.atomic_write(path, json.dumps({"stage": "base", "data": data, "tag": directory.name, "step": step, "inputs": inputs, "label": name, "core": core,
            "core_error95": None if core is None else sum(r["error95"] ** 2 for r in results.values()) ** 0.5 / len(results), "reason": reason,
            "mean_centred": mean, "missing": missing, "tasks": results, "train_bpb": kept.get("train bpb"), "val_bpb": kept.get("val bpb"),
            "samples": kept.get("samples", []), "seconds": round(spent, 1)}, indent=1))
        partial.unlink(missing_ok=True)
    common.print0(f"base_eval {directory.name}: done in {common.clock(spent)} ({path})")
    common.outcome(0, "done")


if __name__ == "__main__":
    main()
    if common.rank_world()[2] > 1:
        torch.distributed.destroy_process_group()
