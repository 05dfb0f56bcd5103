"""
Tries every phase that is still to come, before hours are spent: a forward, a backward and an optimizer step at its real shapes
(uncompiled), a save and a load, the end of a longest answer. Then says what fits, and how long everything will take.

    python trial.py --data=toy --depth=4
    torchrun --standalone --nproc_per_node=8 trial.py --data=fineweb_edu --depth=20 --device_batch_size=16

Takes the settings of any phase, and what it does not get is what speedrun.sh would give. Where memory does not suffice half the rows
are tried (the batch of a step stays); the phases then use what was found, which is kept in trial_<tag>.json.
"""
import common
common.install_stop_handlers()  # before torch is imported

import functools
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time

import checkpoint
import configurator
import data as dataset
import phase
import tasks
import tokenizer as tok

data = "toy"                 # the data set
depth = 4                    # layers
phases = ["base", "mid", "sft", "rl"]  # what will be run; what is done already is left out

def split(args):
    """-> (arguments that are settings of the phases, arguments of this script)"""
    others = [a for a in args if a.startswith("--") and a[2:].split("=")[0].replace("-", "_") not in ("data", "depth", "phases", "help")]
    return others, [a for a in args if a not in others]

rest, sys.argv[1:] = split(sys.argv[1:])
settings = configurator.configure(globals())

# ---------------------------------------------------------------------------------------------------------------------
# what is to come, with the settings that speedrun.sh would start each phase with

for name in phases:
    common.check(name in common.STAGES, f"--phases takes {', '.join(common.STAGES)}, not {name!r}")
listed = subprocess.run(["bash", "speedrun.sh", "--dry-run", f"--data={data}", f"--depth={depth}", "--nproc=1", *(["--", *rest] if rest else [])],
                        cwd=common.REPO, capture_output=True, text=True, env={**os.environ, "NANOCHAT_SLURM": ""})
if common.stop_requested():  # it may have died of the same signal
    common.fail("stopped before anything was tried: run the same command again", 75)
common.check(listed.returncode == 0, f"speedrun.sh --dry-run failed: {listed.stderr or listed.stdout}")
args = {words[1]: [w for w in words[2:] if w.startswith("--") and not w.startswith("--data=")] for words in map(str.split, listed.stdout.splitlines()) if len(words) > 1}
given = {name: configurator.given(script, args.get(script, [])) for name, script in
         {**configurator.PHASES, "eval": configurator.PHASES["sft-eval"]}.items() if name in ("tok", *common.STAGES, "eval")}
folders = {name: common.stage_dir(name, data, f"d{depth}") for name in common.STAGES}
phases = [name for name in phases if (phase.read(folders[name]) or {}).get("status") != "done"]
if not phases:
    common.print0("trial: all phases are done")
    sys.exit(0)

common.init_distributed()
import torch
import gpt
import optim
import training

base = given["base"]
compute = common.init_compute({**base, "compile": False}, (phase.read(folders["base"]) or {}).get("chosen"))
tokenizer = tok.load_tokenizer(common.tokenizer_dir(data)) if (common.tokenizer_dir(data) / "tokenizer.json").exists() else None
vocab_size = tokenizer.vocab_size if tokenizer else given["tok"]["vocab_size"]
trained = common.read_json(folders["base"] / checkpoint.names(checkpoint.last_step(folders["base"]))[2])
config = gpt.GPTConfig(**trained["model"]) if trained else gpt.config_from_depth(depth, vocab_size, base["max_seq_len"], base["arch"])
length = config.sequence_len
model = gpt.GPT(config, compute.dtype)
model.init_weights(1)
model.to(compute.device)
optimizer = optim.make_optimizer(model, 0.02, 0.2, 0.004, 0.5, 0.1, compute.dtype)

# ---------------------------------------------------------------------------------------------------------------------
# trying, with a record that outlives being killed

path, folder = common.trial_path(data, f"d{depth}"), common.data_root(data) / f"trial_d{depth}"

def begin():
    """The record of what was found on this machine; names what the last trial was killed at."""
    folder.mkdir(parents=True, exist_ok=True)
    phase.take_lock(folder)
    record = common.read_json(path) or {}
    if record.get("machine") != training.machine(compute):
        record = {"machine": training.machine(compute), "found": {}, "killed": {}}
    if (earlier := record.get("trying")):
        if by_guard := phase.killed_since(earlier):
            record["killed"][earlier["name"]] = earlier["n"]
        common.print0(f"trial: the last one was killed while it tried {earlier['name']}={earlier['n']}, "
                      + (f"by this host's memory guard: trying {max(1, earlier['n'] // 2)}" if by_guard else "not by this host's memory guard as far as it says: trying it again"))
    return record

def write(**facts):
    record.update(facts)
    if compute.rank == 0:
        common.atomic_write(path, json.dumps(record))

def stop(message, code=2):
    if compute.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    common.fail(message, code)

def attempt(stage, key, work):
    """work(n) with n = the rows asked for, or half of them where memory does not suffice. -> (n, what work returned); exits with 2 where half does not fit"""
    name, asked = f"{stage} {key}", given[stage][key]
    if common.agree(1 if common.stop_requested() else 0):
        stop(f"stopped during the trial ({common.stop_requested() or 'another rank was asked'}), nothing was begun: run the same command again", 75)
    for n in dict.fromkeys([asked, max(1, asked // 2)]):
        if n >= record["killed"].get(name, n + 1):
            continue
        write(trying={"name": name, "n": n, "boot": phase.boot_id(), "kills": phase.memory_kills()})
        try:
            result, out = work(n), 0
        except Exception as e:
            if not training.is_out_of_memory(e):
                raise
            out = 1
        optimizer.zero_grad()
        gc.collect()
        if compute.device.type == "cuda":
            torch.cuda.empty_cache()
        if not common.agree(out):
            write(trying=None, found={**record["found"], name: [asked, n]})
            return n, result
        common.print0(f"trial: {stage} runs out of memory at --{key}={n}; try --{key}={max(1, n // 2)}")
    write(trying=None)
    stop(f"{stage} does not fit into memory here at --{key}={max(1, asked // 2)}: try --{key}={max(1, asked // 4)} (the batch of a step stays what it is), or a smaller model")

def now():
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return time.time()

@functools.cache  # finetuning's shapes are mostly pretraining's
def train(rows, width, reduction):
    """-> seconds of a forward and backward pass (the second one: the first is slower), of an optimizer step"""
    x, out = torch.randint(vocab_size, (rows, width), device=compute.device), 0
    try:
        for _ in range(2):
            t0 = now()
            model(x, x, reduction=reduction).sum().backward()
    except Exception as e:
        if not training.is_out_of_memory(e):
            raise
        out = 1
    if common.agree(out):  # on all ranks, before the optimizer's step, in which they wait for each other
        raise torch.OutOfMemoryError("on one of the ranks")
    t1 = now()
    optimizer.set(lr_scale=0.0, muon_momentum=0.95, muon_weight_decay=0.0)
    optimizer.step()
    return t1 - t0, now() - t1

@torch.inference_mode()
def generate(rows, prompt, new):
    """The last token of the longest answers, when the cache is at its largest. -> seconds of the prompts, of that token"""
    t0 = now()
    cache, logits = gpt.prefill(model, torch.randint(vocab_size, (rows, prompt)).tolist(), prompt + new)
    cache.advance(new - 1)
    cache.select(range(rows))  # as when a row is finished: for a moment there are two
    t1 = now()
    logits = model.logits(model.hidden(torch.zeros(rows, 1, dtype=torch.long, device=compute.device), cache)[:, -1])
    gpt.sample(logits, 1.0, 0, torch.zeros(rows, dtype=torch.float64, device=compute.device))
    return t1 - t0, now() - t1

record = common.on_rank0(begin)
base_rows, base_steps = training.horizon(model, *(base[k] for k in ("num_steps", "target_flops", "tokens_per_param", "total_batch_size")))
total, unknown = 0.0, []
for stage in phases:
    s = given[stage]
    if stage == "rl":
        problems = tasks.load(s["task"], "train", data) if tokenizer and common.task_dir(data).exists() else None
        prompt, new = max(len(tokenizer.render_for_completion(p)) for p in problems) if problems else min(512, length), s["max_new_tokens"]
        batch = -(-s["problems_per_step"] // compute.world) * s["samples"]
        n, (one, update) = attempt(stage, "device_batch_size", lambda n: train(min(n, batch), prompt + new, "none"))
        m, (first, token) = attempt(stage, "rollout_rows", lambda n: generate(min(n, batch), prompt, new))
        seconds = -(-batch // n) * one + update + -(-batch // m) * (first + new * token)
        steps = s["num_steps"] if s["num_steps"] != -1 else max(1, len(problems) // s["problems_per_step"]) if problems else -1
        shape = f"{n} rows of {prompt + new} tokens, {m} answers at once"
    else:
        rows = base_rows if stage == "base" or s["total_batch_size"] == -1 else max(1, s["total_batch_size"] // length)
        micro = functools.partial(dataset.fit_micro_rows, rows, world=compute.world)
        n, (one, update) = attempt(stage, "device_batch_size", lambda n: train(micro(n), length, "sum"))
        seconds, steps = rows // (micro(n) * compute.world) * one + update, base_steps if stage == "base" else s["max_steps"]
        shape = f"{micro(n)} rows of {length} tokens"
    left = 0 if steps == -1 else max(0, steps - checkpoint.last_step(folders[stage])) * seconds
    total, unknown = total + left, unknown + [stage] * (steps == -1)
    common.print0(f"trial: {stage}: {shape} on each of {record['machine']}: {seconds:.3f} s a step, uncompiled"
                  + (f"; {steps:,} steps, {common.clock(left)} left" if steps != -1 else "; its steps are known when its conversations are tokenised"))
if set(phases) & {"mid", "sft", "rl"}:
    new = min(given["eval"]["max_new_tokens"], 3 * length)
    m, (first, token) = attempt("eval", "rows", lambda n: generate(n, length, new))
    common.print0(f"trial: evaluation: {m} answers of up to {new} tokens at once: {first:.2f} s for the prompts, {token:.3f} s a token")

# ---------------------------------------------------------------------------------------------------------------------
# a save, a load, the disk, the time

def save_and_load():
    """None, or what is wrong"""
    t0 = time.time()
    checkpoint.save(folder, 0, model.state_dict(), state, {"model": vars(config)})
    t1 = time.time()
    checkpoint.load(folder, 0)
    size = sum((folder / name).stat().st_size for name in checkpoint.names(0))
    count = sum(given[stage]["keep"] for stage in phases) + 1  # + 1: the old one goes after the new one is there
    needed, free, files = size * count, checkpoint.free_bytes(folder) + size, checkpoint.free_files(folder) + 4
    common.print0(f"trial: a checkpoint has {size / 1e9:.2f} GB, is written in {t1 - t0:.1f} s and read in {time.time() - t1:.1f} s; "
                  f"the phases to come need {needed / 1e9:.2f} GB of disk in {4 * count} files, {free / 1e9:.2f} GB are free")
    return None if free >= needed and files >= 4 * count else (f"{common.data_root(data)} has {free / 1e9:.2f} GB and {files:,} files free, "
                                                              f"the checkpoints to come need {needed / 1e9:.2f} GB and {4 * count} files: make room")

state = optimizer.state_dict()  # a collective call
if (wrong := common.on_rank0(save_and_load)):
    stop(wrong)
common.set_deadline(base["time_limit"])
limit = common.deadline() - time.time()
common.print0(f"trial: all phases left take about {common.clock(total)}" + (f" besides {' and '.join(unknown)}" if unknown else "") + ", uncompiled and without evaluations"
              + (f"; this job has {common.clock(limit)} left" if limit < math.inf else "")
              + (": it will stop with everything saved and continue in its next run" if limit < total else ""))
if compute.rank == 0:
    shutil.rmtree(folder, ignore_errors=True)
common.outcome(0, "done")
common.leave()
