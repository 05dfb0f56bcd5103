"""
Before hours are spent: every training that is still to come, and the longest answer of an
evaluation, is tried by its own script (--try_out=True), which runs its first steps at full shape, a
save and a load. Where memory is out half the rows are tried, and then used. Says how much disk and
time all of it needs.
"""
import json
import math
import os
import re
import shutil
import subprocess
import time

import checkpoint
import common
import pipeline
import slurm

def gpu_names():
    """The names of this machine's GPUs, without asking torch."""
    try:
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return []
    return re.findall(r"^GPU \d+: (.*?) \(", asked.stdout, re.MULTILINE)

def try_out(plan, run_phase):
    """run_phase(name, words): launch.py's. -> (exit code, {phase: arguments that it needs to fit});
    Failure (code 2) where the disk is too small."""
    phases = [p for p in plan.phases("training") if not plan.is_done(p.name)]
    if not phases:
        return 0, {}
    chats = [p for p in plan.phases("evaluation") if p.script == "chat_eval.py"]
    names = [p.name for p in phases] + [p.name for p in chats[:1]]
    machine = f"{plan.nproc} x {(gpu_names() or ['CPU'])[0]}"
    asked = {name: {"words": plan.words(name), "machine": machine} for name in names}
    path = pipeline.data_root(plan.data) / f"trial_{plan.tag}.json"
    stand_ins = pipeline.data_root(plan.data) / "try_out"  # for models that are not trained yet
    old, tried = common.read_json(path) or {}, {}

    def was_tried(name):
        return asked[name].items() <= old.get(name, {}).items()
    # what was tried is not tried again when the run goes on, a trial that was interrupted included
    reuse = stand_ins.exists() or all(map(was_tried, names))
    for name in names:
        reuse = reuse and was_tried(name)
        if reuse:
            tried[name] = old[name]
            continue
        print(f"\n=== trial of {name}", flush=True)
        code, fewer, outcome = run_phase(name, [*plan.words(name), "--try_out=True"])
        if code:
            return code, {}
        tried[name] = {**asked[name], "fewer": fewer, **outcome}
        common.atomic_write(path, json.dumps(tried))
    shutil.rmtree(stand_ins, ignore_errors=True)
    check_disk(plan, [tried[p.name] for p in phases])
    say_time(plan, {p.name: tried[p.name] for p in phases})
    return 0, {name: tried[name]["fewer"] for name in names}

def facts_of(run):
    """What the first steps of a Run needed, which it has just saved: loads it back, prints it.
    -> facts for the launcher; in seconds and bytes"""
    free, num_steps = run.record["free"], run.clock.num_steps
    evals = 1 + (math.ceil(num_steps / free["eval_every"]) if free["eval_every"] else 0)
    facts = {"seconds": run.clock.step_seconds(), "num_steps": num_steps, "evals": evals,
             "eval_seconds": run.eval_seconds, "keep": free["keep"]}
    if run.ranks.rank == 0:
        began = time.monotonic()
        damage = checkpoint.problem(run.directory, run.saved_step)  # reads and hashes all of it
        common.check(damage is None, f"{damage} in {run.directory} after a save")
        checkpoint.load(run.directory, run.saved_step)
        sizes = checkpoint.files(run.directory, run.saved_step).values()
        facts["bytes"] = sum(size for size, _ in sizes)
        common.print0(
            f"tried out: {facts['seconds']:.3f} s a step, {run.eval_seconds:.1f} s a measurement; "
            f"a checkpoint has {facts['bytes'] / 1e9:.2f} GB, is written in "
            f"{run.longest_save:.1f} s and read in {time.monotonic() - began:.1f} s")
    return facts

def check_disk(plan, tried):
    """Failure (code 2) where the disk has no room for the checkpoints to come: those that are kept,
    and one more, since an old one goes after the new one is there."""
    root = pipeline.data_root(plan.data)
    sizes = [facts["bytes"] for facts in tried for _ in range(facts["keep"])]
    needed, count = sum(sizes) + max(sizes), 4 * (len(sizes) + 1)
    stat = os.statvfs(root)
    free = stat.f_bavail * stat.f_frsize
    files = stat.f_favail if stat.f_files else math.inf  # not all file systems count them
    print(f"trial: the checkpoints to come need {needed / 1e9:.2f} GB of disk in {count} files, "
          f"{free / 1e9:.2f} GB are free", flush=True)
    common.check(needed <= free and count <= files, f"{root} has {free / 1e9:.2f} GB and {files:,} "
                 f"files free, the checkpoints to come need {needed / 1e9:.2f} GB and {count} "
                 "files: make room")

def say_time(plan, tried):
    """Prints how long the trainings to come take, against the time that the job has."""
    total, words = 0.0, []
    for name, facts in tried.items():
        done = max(checkpoint.steps(plan.folder(name)), default=0)
        whole = facts["num_steps"] * facts["seconds"] + facts["evals"] * facts["eval_seconds"]
        left = whole * max(0.0, 1 - done / facts["num_steps"])
        total += left
        at_most = "at most " if name == "rl" else ""  # its answers may be shorter
        words.append(f"{name} {at_most}{common.duration(left)}")
    end = slurm.end_time()
    line = f"trial: the trainings left take about {common.duration(total)} ({', '.join(words)})"
    if end:
        line += f"; this job has {common.duration(max(0, end - time.time()))} left"
        if end - time.time() < total:
            line += ": it will stop with everything saved and continue in its next attempt"
    print(line, flush=True)
