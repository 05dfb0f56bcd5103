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
import statistics
import subprocess
import time

import checkpoint
import common
import pipeline
import slurm

def gpu_names():
    """The names of this machine's GPUs, without asking torch."""
    try:
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True,
                               errors="replace", check=False)
    except OSError:
        return []
    return re.findall(r"^GPU \d+: (.*?) \(", asked.stdout, re.MULTILINE)

def this_cpu():
    """example: "CPU, 2 cores, 24 GB" """
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"CPU, {common.cores()} cores, {size / 1e9:.0f} GB"

def try_out(plan, run_phase):
    """run_phase(name, words): launch.py's. -> (exit code, {phase: arguments that it needs to fit});
    Failure (code 2) where the disk is too small."""
    trainings = [p.name for p in plan.phases("training") if not plan.is_done(p.name)]
    if not trainings:
        return 0, {}
    chats = [p.name for p in plan.phases("evaluation") if p.script == "chat_eval.py"]
    machine = f"{plan.nproc} x {(gpu_names() or [this_cpu()])[0]}"
    asked = {name: {"words": plan.words(name), "machine": machine}
             for name in [*trainings, *chats[:1]]}
    path = pipeline.data_root(plan.data) / f"tried_{plan.tag}.json"
    stand_ins = pipeline.try_out_dir(plan.data, plan.tag)  # for models that are not trained yet
    old, tried = common.read_json(path), {}

    def was_tried(name):
        return asked[name].items() <= old.get(name, {}).items()
    # What was tried is not tried again when the run goes on, and an interrupted trial goes on, too,
    # as long as the models are there that the first ones have left for the others.
    if not stand_ins.exists() and not all(map(was_tried, asked)):
        old = {}
    for name, key in asked.items():
        if was_tried(name):
            tried[name] = old[name]
            continue
        old = {}
        print(f"\n=== trial of {name}", flush=True)
        code, added, outcome = run_phase(name, [*plan.words(name), "--try_out=True"])
        if code:
            return code, {}
        tried[name] = {"added": added, **outcome}
        if name in trainings and "bytes" not in outcome:
            print(f"trial: {name} gave no time and disk use; going on without", flush=True)
            continue  # it is tried again at the next start
        tried[name].update(key)
        with common.writing(path):
            common.atomic_write(path, json.dumps(tried))
    shutil.rmtree(stand_ins, ignore_errors=True)
    facts = {name: tried[name] for name in trainings if "bytes" in tried[name]}
    if facts:
        check_disk(plan, facts)
        print_time(plan, facts)
    return 0, {name: tried[name]["added"] for name in tried}

def facts_of(run):
    """What the first steps of a Run needed, which it has just saved: loads it back, prints it.
    -> facts for the launcher; in seconds and bytes"""
    if run.ranks.rank != 0:
        return {}
    began = time.monotonic()
    damage = checkpoint.problem(run.directory, run.saved_step)  # reads and hashes all of it
    common.check(damage is None, f"{damage} in {run.directory} after a save")
    checkpoint.load(run.directory, run.saved_step)
    read_seconds = time.monotonic() - began

    free, num_steps, steps = run.record["free"], run.clock.num_steps, run.clock.steps
    facts = {
        "num_steps": num_steps,
        # the first step compiles, and counts once; the second is slower than those after it, too
        "first_seconds": steps[0],
        "seconds": statistics.median_low(steps),
        "evals": 1 + (math.ceil(num_steps / free["eval_every"]) if free["eval_every"] else 0),
        "eval_seconds": run.eval_seconds,
        "save_seconds": run.longest_save,
        "bytes": sum(n for n, _ in checkpoint.files(run.directory, run.saved_step).values()),
        "keep": free["keep"],
    }
    common.print0(
        f"trial run: first step {steps[0]:.1f} s, then {facts['seconds']:.3f} s a step, "
        f"measurement {run.eval_seconds:.1f} s; checkpoint {facts['bytes'] / 1e6:,.0f} MB, written "
        f"in {run.longest_save:.1f} s, read in {read_seconds:.1f} s")
    return facts

def bytes_needed(tried, data, tag):
    """How many bytes the checkpoints to come need: those that are kept, less what is there already,
    and one more, since an old one goes after the new one is there. tried: {phase: facts_of()}"""
    needed = max(facts["bytes"] for facts in tried.values())
    for name, facts in tried.items():
        folder = pipeline.state_path(name, data, tag)
        files = [checkpoint.files(folder, step) for step in checkpoint.steps(folder)]
        there = sum(size for of_step in files for size, _ in of_step.values())
        needed += max(0, facts["keep"] * facts["bytes"] - there)
    return needed

def check_disk(plan, tried):
    """Failure (code 2) where the disk has no room for the checkpoints to come."""
    root = pipeline.data_root(plan.data)
    needed = bytes_needed(tried, plan.data, plan.tag) / 1e9
    free = shutil.disk_usage(root).free / 1e9
    words = f"checkpoints need {needed:.2f} GB, {free:.2f} GB free in {root}"
    common.check(needed <= free, f"{words}: free some disk space")
    stat = os.statvfs(root)
    common.check(stat.f_favail > 1000 or stat.f_files == 0, f"only {stat.f_favail:,} more files "
                 f"(inodes) may be made in {root}: remove some, or ask for a larger quota")
    print(f"trial: {words}", flush=True)

def seconds_left(tried, data, tag):
    """{phase: seconds that its training still takes}"""
    found = {}
    for name, facts in tried.items():
        done = max(checkpoint.steps(pipeline.state_path(name, data, tag)), default=0)
        # the model is saved, and the training waits for that, before each measurement
        measuring = facts["evals"] * (facts["eval_seconds"] + facts["save_seconds"])
        whole = facts["num_steps"] * facts["seconds"] + measuring
        found[name] = facts["first_seconds"] + whole * max(0.0, 1 - done / facts["num_steps"])
    return found

def in_words(seconds):
    """example: {"base": 600.0, "rl": 60.0} -> "11m00s (base 10m00s, rl at most 1m00s)" """
    parts = [f"{name} {'at most ' * (name == 'rl')}{common.duration(left)}"
             for name, left in seconds.items()]  # the answers of RL may be shorter
    return f"{common.duration(sum(seconds.values()))} ({', '.join(parts)})"

def print_time(plan, tried):
    """Prints how long the trainings to come take, against the time that the job has."""
    seconds = seconds_left(tried, plan.data, plan.tag)
    line = f"trial: the trainings left take about {in_words(seconds)}"
    end = slurm.end_time()
    if end:
        left = max(0.0, end - time.time())
        line += f"; this job has {common.duration(left)} left"
        if sum(seconds.values()) > left:
            line += ": it will stop with everything saved and continue in its next attempt"
    print(line, flush=True)
