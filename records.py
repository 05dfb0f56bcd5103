"""
The record of a phase, phase.json in its folder: settings, inputs, status (running, interrupted,
failed, done), why, what to run next. Here it is only read and judged; a Run writes it (run.py).
"""
import contextlib
import hashlib
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import checkpoint
import common
import pipeline
import rewind

# inputs that are not those of the last start, in words
INPUTS = {"data": "other data", "tasks": "other files of tasks", "base": "another base model",
          "mid": "another midtrained model", "sft": "another finetuned model",
          "bundle": "other files of CORE",
          "weights": "other weights of the model", "missing": "other missing files"}

# what a run that has saved nothing yet need not keep to
OF_A_SAVE = ("chosen", "train_files", "val_files", "texts", "skipped")

# -------------------------------------------------------------------------------------------------
# reading

def load_record(directory):
    """The record of a phase's folder; None where there is none, or a damaged one."""
    record = common.read_json(Path(directory) / "phase.json")
    return record if {"status", "settings", "inputs", "free"} <= record.keys() else None

def recovered_record(directory):
    """What the newest checkpoint says of the record (Run.save puts it there), for a folder that has
    lost its phase.json; {} where none does."""
    for step in checkpoint.steps(directory):
        if kept := checkpoint.load_meta(directory, step).get("record"):
            return {**kept, "free": {}, "status": "lost"}
    return {}

def find_record(directory, settings, inputs=None, damage=None):
    """
    The record that a start in `directory` goes on from, {} where it begins anew.
    --start_over=True holds for one beginning: the same command given again goes on with what it has
    begun, or finds it done. inputs=None: they are not known yet. damage: see Run.open_or_exit.
    """
    old = load_record(directory) or recovered_record(directory)
    if old and not binds(old, directory, damage):
        old = {k: v for k, v in old.items() if k not in OF_A_SAVE}
    if not old or not settings["start_over"]:
        return old
    return old if begun_over(old, False) and not changes(old, directory, settings, inputs) else {}

def begun_over(record, asked):
    """Whether a run with this record was begun by --start_over; `asked` where it begins now. Older
    records only say it of their last start."""
    return record.get("begun_over", record.get("free", {}).get("start_over", asked))

def finished_step(directory):
    """The step of the checkpoint of a training that is done, whole or damaged; None where it is
    not done, or that checkpoint is gone. A model of another run that lies beside it does not count,
    whatever its step."""
    record, steps = load_record(directory), checkpoint.steps(directory)
    if record:
        step = record.get("step", max(steps, default=None))
        return step if record["status"] == "done" and step in steps else None
    for step in steps:
        meta = checkpoint.load_meta(directory, step)
        if meta and step >= meta.get("num_steps", 0):
            return step
    return None

def source_version():
    """(commit, hash of the uncommitted difference); ("unknown", "") outside of git."""
    def git(*args):
        command = ["git", "-C", str(pipeline.REPO), *args]
        return subprocess.run(command, capture_output=True, timeout=20, check=False).stdout
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        difference = git("diff", "HEAD")
        digest = hashlib.sha256(difference).hexdigest()[:16] if difference else ""
        return git("rev-parse", "HEAD").decode().strip() or "unknown", digest
    return "unknown", ""

def machine():
    """What a number may depend on beside source and data.  example: {"Python": "3.11.7",
    "CPU": "AMD EPYC", "cores": "2", "torch": "2.13.0", ...}"""
    cpu = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
        cpu = "".join(re.findall(r"^model name\s*: (.*)", text, re.MULTILINE)[:1])
    facts = {"Python": platform.python_version(), "CPU": cpu or platform.machine(),
             "cores": str(common.cores())}
    for name in ("torch", "tiktoken", "numpy", "pyarrow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    return facts

def origin():
    """What, beside settings and inputs, a number can be derived again from."""
    commit, difference = source_version()
    return {"commit": commit, "difference": difference, "machine": machine()}

def restarts(record, lines, step, seconds):
    """The starts of a training after its first, with what each has cost: the steps behind the last
    save, which run again, and their seconds. lines: of metrics.jsonl, as the last attempt has left
    it; it goes on at `step` after `seconds` of training."""
    before = record.get("restarts")
    before = before if isinstance(before, list) else []
    if not lines:
        return before
    again = [line for line in lines if line.get("kind") == "train" and line.get("step", -1) >= step]
    until = seconds
    with contextlib.suppress(IndexError, KeyError, TypeError):
        until = max(seconds, again[-1]["clock"]["seconds"])
    return [*before, {"step": step, "steps_lost": len(again),
                      "seconds_lost": round(until - seconds, 1)}]

def binds(record, directory, damage=None):
    """Whether later starts have to keep to the record: something was saved. What is no checkpoint
    was saved where all is done, or where there is no damage() to it, even if a death came before
    the record could say so."""
    if damage is None:
        return checkpoint.holds_any(directory)
    return record["status"] == "done" or damage() is None

# -------------------------------------------------------------------------------------------------
# comparing

def differences(old, new):
    """["depth was 4, now 6", ...] for two dicts"""
    return [f"{k} was {old.get(k, 'not set')}, now {new.get(k, 'not set')}"
            for k in {**old, **new} if old.get(k) != new.get(k)]

def other_inputs(old, new):
    """["other data", ...] for the inputs of two starts, whose hashes tell a person nothing"""
    return [INPUTS.get(k, f"another {k}") for k in {**old, **new} if old.get(k) != new.get(k)]

def comparable(settings, directory):
    """Settings as two starts are compared: an empty tag stands for the folder's name, and a data
    folder is the same however it is named."""
    settings = dict(settings)
    if "tag" in settings:
        settings["tag"] = directory.name
    if settings.get("data"):
        settings["data"] = pipeline.whole_path(settings["data"])
    return settings

def changes(old, directory, settings, inputs=None):
    """What defines the result and is other than in the record `old`, in words. inputs=None:
    they are not known yet."""
    before, now = (checkpoint.as_today(comparable(given, directory))
                   for given in (old["settings"], settings.defining))
    changed = differences(before, now)
    return changed + other_inputs(old["inputs"], old["inputs"] if inputs is None else inputs)

# -------------------------------------------------------------------------------------------------
# judging

def check_settings(name, directory, settings, inputs=None, damage=None):
    """-> the record that a start of the phase `name` goes on from, as find_record. Failure (code 2)
    where it was started with other settings, or inputs, and has saved something, or where nanochat
    has left a model. inputs=None: asked before they are tokenized, which may take hours."""
    old, over = find_record(directory, settings, inputs, damage), pipeline.starting_over(name)
    begins_anew = settings["start_over"] and not old
    common.check(begins_anew or checkpoint.made_by_nanochat(directory) is None,
                 f"{directory} holds a model made by nanochat: {over} puts it aside and trains "
                 "anew; without, later phases go on from it (speedrun.sh --from)")
    changed = changes(old, directory, settings, inputs) if old else []
    if changed and binds(old, directory, damage) and not settings.get("try_out"):
        common.fail(f"{name} in {directory} was started with other settings or inputs "
                    f"({', '.join(changed)}): give the old ones to resume it, or {over} to put it "
                    "aside and start anew")
    return old

def judge(name, directory, settings, inputs, damage=None):
    """
    What a start of the phase `name` finds in its folder; only looks. See Run.open_or_exit.
    -> (the record that it goes on from, the step of the checkpoint that it goes on from): {} and
    None for a new run. None where the phase is done. Failure (code 2) where it must not go on.
    """
    old = check_settings(name, directory, settings, inputs, damage)
    over = pipeline.starting_over(name)
    if settings["start_over"] and not old:
        return {}, None
    common.check(old or not checkpoint.holds_any(directory), f"{directory / 'phase.json'} is "
                 f"missing or damaged, and no checkpoint there says what {name} was started with: "
                 f"restore the file, or start anew with {over}, which puts the checkpoints aside")
    if old.get("status") == "lost":
        common.print0(f"{directory / 'phase.json'} is missing or damaged: restored from the "
                      "newest checkpoint")
    if old and (changed := ", ".join(changes(old, directory, settings, inputs))):
        common.print0(f"{name}: starts with other settings or inputs than the last attempt, which "
                      f"had saved nothing: {changed}")
        return {}, None
    if old.get("status") == "done" and is_whole(directory, old, damage):
        common.check(rewind.asked_for(settings, directory, old) is None, f"{name} in {directory} "
                     "is done, so it does not go back: leave --rewind out")
        if settings["start_over"]:
            common.print0(f"--start_over=True has begun this one, and is used up: to begin {name} "
                          f"anew rename {directory}")
        return None
    if damage:
        return old, None
    for other in checkpoint.steps(directory):
        kept = checkpoint.load_meta(directory, other).get("record")
        strange = kept and changes(kept, directory, settings, inputs)
        if strange and checkpoint.problem(directory, other, optimizer=False) is None:
            common.fail(f"{directory / checkpoint.names(other)[0]} is of another run than "
                        f"{directory / 'phase.json'} ({', '.join(strange)}): move the files of its "
                        "step out of the folder")
    reasons = []
    step = checkpoint.newest(directory, say=reasons.append)
    if step is None and old.get("status") == "lost" and \
            is_whole(directory, {"step": finished_step(directory)}, damage):
        return None  # all is lost that it would have needed to go on, but nothing else
    if step is None and checkpoint.holds_any(directory):
        if settings["start_over"]:
            return {}, None
        why = "; ".join(reasons) or "the manifest of model_*.pt is missing"
        common.fail(f"no checkpoint in {directory} is whole ({why}): restore the files, or train "
                    f"again from step 0 with {over}, which puts them aside")
    for reason in reasons:
        common.print0(reason)
    return old, step

def is_whole(directory, record, damage):
    """Whether what the record calls done is there. Nobody needs the optimizer any more."""
    if damage:
        return damage() is None
    return checkpoint.problem(directory, record.get("step") or -1, optimizer=False) is None
