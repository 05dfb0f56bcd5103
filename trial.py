"""
Tries every phase that is still to come, before hours are spent: a forward, a backward and an optimizer step at its real shapes
(uncompiled), a save and a load, a longest generation. Then says what fits, and how long everything will take.

    python trial.py --data=toy --depth=4
    torchrun --standalone --nproc_per_node=8 trial.py --data=fineweb_edu --depth=20 --device_batch_size=16

Takes the settings of any phase; what it does not get it takes from speedrun.sh. Where memory does not suffice it tries half the rows
(the total batch stays), and the phases then use what it found, which it keeps in trial.json.
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
if rest and (code := subprocess.run([sys.executable, "configurator.py", "check", *rest], cwd=common.REPO).returncode):
    sys.exit(code)

# ---------------------------------------------------------------------------------------------------------------------
# what is to come, and its settings: those that speedrun.sh would start each phase with

listed = subprocess.run(["bash", "speedrun.sh", "--dry-run", f"--data={data}", f"--depth={depth}", "--nproc=1", *(["--", *rest] if rest else [])],
                        cwd=common.REPO, capture_output=True, text=True, env={**os.environ, "NANOCHAT_SLURM": ""})
common.check(listed.returncode == 0, f"speedrun.sh --dry-run failed: {listed.stderr.strip() or listed.stdout.strip()}")
args = {words[1]: [w for w in words[2:] if w.startswith("--") and not w.startswith("--data=")] for words in map(str.split, listed.stdout.splitlines()) if len(words) > 1}
scripts = {"tok": "tok_train.py", "base": "base_train.py", "mid": "mid_train.py", "sft": "chat_sft.py", "rl": "chat_rl.py", "eval": "chat_eval.py"}
given = {name: configurator.given(script, args.get(script, [])) for name, script in scripts.items()}
for name in phases:
    common.check(name in common.STAGES, f"--phases takes {', '.join(common.STAGES)}, not {name!r}")
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
trained = common.read_json(folders["base"] / checkpoint.names(checkpoint.last_step(folders["base"]))[2])
tokenizer = tok.load_tokenizer(common.tokenizer_dir(data)) if (common.tokenizer_dir(data) / "tokenizer.json").exists() else None
vocab_size = tokenizer.vocab_size if tokenizer else given["tok"]["vocab_size"]
config = gpt.GPTConfig(**trained["model"]) if trained else gpt.config_from_depth(depth, vocab_size, base["max_seq_len"], base["arch"])
length = config.sequence_len

# ---------------------------------------------------------------------------------------------------------------------
# trying, with a record that outlives being killed

path, folder = common.trial_path(data), common.data_root(data) / "trial"
record = common.read_json(path) or {}
if record.get("machine") != training.machine(compute):
    record = {"machine": training.machine(compute), "found": {}, "killed": {}}

def write(**facts):
    record.update(facts)
    if compute.rank == 0:
        common.atomic_write(path, json.dumps(record))

def sync():
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return time.time()

def attempt(stage, key, asked, work):
    """work(n) with n = asked rows, or half of them where memory does not suffice. -> (n, what work returned); exits with 2 where half does not fit"""
    name = f"{stage} {key}"
    for n in dict.fromkeys([asked, max(1, asked // 2)]):
        if n >= record["killed"].get(name, n + 1):
            continue
        if common.agree(1 if common.stop_requested() else 0):
            common.outcome(75, "stopped during the trial")
            leave(75)
        write(trying={"name": name, "n": n, "boot": phase.boot_id(), "kills": training.memory_kills()})
        result, out = None, 0
        try:
            result = work(n)
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
    leave(2, f"{stage} does not fit into memory here at --{key}={max(1, asked // 2)}: try --{key}={max(1, asked // 4)} (the batch of a step stays what it is), or a smaller model")

def leave(code, message=None):
    if compute.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    common.fail(message, code) if message else common.leave(code)

@functools.cache  # finetuning's shapes are mostly pretraining's
def train(rows, width, reduction):
    """-> seconds of a forward and backward pass, of an optimizer step. Done twice: the first time is slower."""
    x = torch.randint(vocab_size, (rows, width), device=compute.device)
    for _ in range(2):
        t0 = sync()
        model(x, x, reduction=reduction).sum().backward()
        t1 = sync()
    optimizer.set(lr_scale=0.0, muon_momentum=0.95, muon_weight_decay=0.0)
    optimizer.step()
    return t1 - t0, sync() - t1

@torch.inference_mode()
def generate(rows, prompt, new):
    """The last token of the longest answers, when the cache is at its largest. -> seconds of the prompts, of a token"""
    t0 = sync()
    prompts = torch.randint(vocab_size, (rows, prompt)).tolist()
    cache, logits = gpt.prefill(model, prompts, prompt + new)
    cache.advance(new - 1)
    cache.select(range(rows))  # as when a row is finished: for a moment there are two
    t1 = sync()
    logits = model.logits(model.hidden(torch.zeros(rows, 1, dtype=torch.long, device=compute.device), cache)[:, -1])
    gpt.sample(logits, 1.0, 0, torch.zeros(rows, dtype=torch.float64, device=compute.device))
    return t1 - t0, sync() - t1

def longest_prompt(stage):
    """Tokens of the longest problem of reinforcement learning, where its file and the tokenizer are there; else a guess."""
    if tokenizer and (common.task_dir(data).exists()):
        return max(len(tokenizer.render_for_completion(item)) for item in tasks.load(given["rl"]["task"], "train", data))
    return min(512, length)

def prepare():
    folder.mkdir(parents=True, exist_ok=True)
    phase.take_lock(folder)
    if (earlier := record.get("trying")):
        said = f"trial: the last one was killed while it tried {earlier['name']}={earlier['n']}"
        if earlier["kills"] is not None and earlier["boot"] == phase.boot_id() and (training.memory_kills() or 0) > earlier["kills"]:
            record["killed"][earlier["name"]] = earlier["n"]
            common.print0(f"{said}, by this host's memory guard: trying {max(1, earlier['n'] // 2)}")
        else:
            common.print0(f"{said}, not by this host's memory guard as far as it says: trying it again")
    return record

record = common.on_rank0(prepare)
model = gpt.GPT(config, compute.dtype)
model.init_weights(1)
model.to(compute.device)
optimizer = optim.make_optimizer(model, 0.02, 0.2, 0.004, 0.5, 0.1, compute.dtype)
rows, base_steps = training.horizon(model, *(base[k] for k in ("num_steps", "target_flops", "tokens_per_param", "total_batch_size")))
hours, unknown = {}, []
for stage in phases:
    s = given[stage]
    if stage == "rl":
        prompt, new = longest_prompt(stage), s["max_new_tokens"]
        batch = -(-s["problems_per_step"] // compute.world) * s["samples"]
        n, (per_pass, update) = attempt(stage, "device_batch_size", s["device_batch_size"], lambda n: train(min(n, batch), prompt + new, "none"))
        m, (first, token) = attempt(stage, "rollout_rows", s["rollout_rows"], lambda n: generate(min(n, batch), prompt, new))
        seconds = -(-batch // n) * per_pass + update + -(-batch // m) * (first + new * token)
        steps = s["num_steps"]
        if steps == -1 and tokenizer:
            steps = max(1, len(tasks.load(s["task"], "train", data)) // s["problems_per_step"])
        shape = f"{n} rows of {prompt + new} tokens, {m} answers at once"
    else:
        here = rows if stage == "base" or s["total_batch_size"] == -1 else max(1, s["total_batch_size"] // length)
        n, (per_pass, update) = attempt(stage, "device_batch_size", s["device_batch_size"], lambda n: train(dataset.fit_micro_rows(here, n, compute.world), length, "sum"))
        micro = dataset.fit_micro_rows(here, n, compute.world)
        seconds = here // (micro * compute.world) * per_pass + update
        steps = base_steps if stage == "base" else s["max_steps"]
        shape = f"{micro} rows of {length} tokens"
    left = max(0, steps - checkpoint.last_step(folders[stage]))
    common.print0(f"trial: {stage}: {shape} on each of {record['machine']}: {seconds:.3f} s a step, uncompiled"
                  + (f"; {left:,} steps = {common.clock(left * seconds)}" if steps != -1 else "; its steps are known when its conversations are tokenised"))
    hours[stage] = left * seconds / 3600 if steps != -1 else unknown.append(stage) or 0.0
if set(phases) & {"mid", "sft", "rl"}:
    s = given["eval"]
    m, (first, token) = attempt("eval", "rows", s["rows"], lambda n: generate(n, length, min(s["max_new_tokens"], 3 * length)))
    common.print0(f"trial: evaluation: {m} answers at once: {first:.2f} s for the prompts, {token:.3f} s a token")

# ---------------------------------------------------------------------------------------------------------------------
# a save, a load, the disk, the time

state, t0 = optimizer.state_dict(), time.time()
def save_and_load():
    checkpoint.save(folder, 0, model.state_dict(), state, {"model": vars(config)})
    t1 = time.time()
    checkpoint.load(folder, 0)
    size = sum((folder / name).stat().st_size for name in checkpoint.names(0))
    needed = size * (sum(given[stage]["keep"] for stage in phases) + 1)  # while one is written the one before is still there
    free = checkpoint.free_bytes(folder) + size
    common.print0(f"trial: a checkpoint has {size / 1e9:.2f} GB, is written in {t1 - t0:.1f} s and read in {time.time() - t1:.1f} s; "
                  f"the phases to come need {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free")
    return None if free >= needed else f"the disk of {common.data_root(data)} has {free / 1e9:.2f} GB free, the checkpoints to come need {needed / 1e9:.2f} GB: make room"
if (problem := common.on_rank0(save_and_load)):
    leave(2, problem)
total = sum(hours.values())
said = f"trial: all phases left take about {common.clock(3600 * total)}" + (f" besides {' and '.join(unknown)}" if unknown else "") + ", uncompiled and without evaluations"
common.set_deadline(base["time_limit"])
if (end := common.deadline()) < math.inf:
    said += f"; this job has {common.clock(end - time.time())} left" + (": it will stop with everything saved and continue in its next run" if 3600 * total > end - time.time() else "")
common.print0(said)
common.outcome(0, "done")
leave(0)
