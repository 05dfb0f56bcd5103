"""
What is done, what is half done, what died and why; the last line is what to run next.

    python status.py                # every data set in the state folder, the newest at the end
    python status.py --data=toy     # one of them
    python status.py --json=True    # the same for a program

Reads names, sizes, records and ends of logs, and asks Slurm about its jobs: no checksums, which can
take minutes.
"""
import contextlib
import math
import os
import re
import shlex
import shutil
import time
from json import dumps, loads

import causes
import checkpoint
import common
import configurator
import pipeline
import slurm
import trial
from evaluation import called
from lock import holder_name, living_holder
from records import finished_step

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: all that have a state
json = False                 # one JSON object instead of lines to read
settings = configurator.configure(globals()) if __name__ == "__main__" else None

def saved(directory):
    """(step, meta) of the checkpoint of a training that is done, else of the newest in
    `directory`; (None, {}) where there is none"""
    step = finished_step(directory)
    if step is None:
        step = max(checkpoint.steps(directory), default=None)
    return step, {} if step is None else checkpoint.load_meta(directory, step)

def written(path):
    """When a file or folder was written to, in seconds since the epoch; 0.0 where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0

def ago(when):
    """example: three minutes before now -> "3m00s ago" """
    return f"{common.duration(max(0, time.time() - when))} ago"

def lost_part(directory):
    """What a tokenizer or a training that was done lacks now, or None."""
    sizes = {}
    if directory.name == "tokenizer":
        sizes = {"tokenizer.json": 0}
    if directory.parent.name.endswith("_checkpoints"):
        step = finished_step(directory)
        if step is None:
            return "its checkpoint is missing"
        sizes = {name: size for name, (size, _) in checkpoint.files(directory, step).items()
                 if name == checkpoint.names(step)[0]}  # nobody needs the optimizer any more
        if not checkpoint.load_meta(directory, step):
            return f"{checkpoint.names(step)[2]} is missing or damaged"
    for name, size in sizes.items():
        if not (directory / name).exists() or (directory / name).stat().st_size < size:
            return f"{name} is missing or cut short"
    return None

def describe(directory):
    """-> (state, words) of a phase; state is done, running, half, failed or absent.
    example: ("half", "half done, saved at step 120 of 400, 3m10s ago (signal SIGTERM: ...)")"""
    record, (step, meta) = common.read_json(directory / "phase.json"), saved(directory)
    status, reason = record.get("status"), record.get("reason")
    where, half = "", "nothing saved yet"
    if step is not None:
        where = f"step {step} of {meta.get('num_steps', '?')}, "
        half = f"saved at {where}{ago(written(directory / checkpoint.manifest_name(step)))}"
    if status == "done":
        if lost := lost_part(directory):
            return "failed", f"was done, but {lost}"
        return "done", f"done, {where}{ago(record.get('updated', 0.0))}"
    if status == "interrupted":
        return "half", f"half done, {half} ({reason})"
    if status == "running":
        if holder := living_holder(directory):
            return "running", f"running, {half} ({holder_name(holder)})"
        return "half", f"died without a word, {half} (process {record.get('pid')})"
    if status is not None:
        return "failed", f"failed, {half}: {reason}"
    if (directory / "phase.json").exists():
        return "failed", f"its record, phase.json, cannot be read; {half}"
    if any(path.is_file() and "lock" not in path.name for path in directory.glob("*")):
        return "done", "done (not made here)"
    return "absent", "not started"

def describe_eval(path, directory):
    """The same for an evaluation with the result file `path` of the model in `directory`; one more
    state is stale."""
    partial = path.with_suffix(".partial.jsonl")
    if written(partial) > written(path):
        if holder := living_holder(pipeline.lock_of_result(path)):
            return "running", f"running, last saved {ago(written(partial))} ({holder_name(holder)})"
        last = [{}, *common.read_json_lines(partial)][-1]  # says why it ended, if it could
        reason = last.get("reason", "killed")
        if last.get("code", 75) != 75:
            return "failed", f"failed, {ago(written(partial))}: {reason}"
        return "half", f"half done, last saved {ago(written(partial))} ({reason})"
    if not path.exists():
        return "absent", "not started"
    result = common.read_json(path)
    if not result:
        return "failed", f"its result, {path.name}, cannot be read"
    step, _ = saved(directory)
    weights = "" if step is None else checkpoint.fingerprint(directory, step)
    if directory.exists() and result.get("inputs", {}).get("weights") != weights:
        return "stale", "outdated: the model was trained again since"
    return "done", f"done, {ago(written(path))}"

def outdated(phase, name, tag):
    """What a training that is done was trained from and is another now: "base was trained again
    since"; None where nothing is."""
    inputs = common.read_json(pipeline.state_path(phase.name, name, tag) / "phase.json").get(
        "inputs", {})
    tokenizer = common.read_json(pipeline.tokenizer_dir(name) / "phase.json").get("fingerprint")
    if tokenizer and inputs.get("tokenizer", tokenizer) != tokenizer:
        return "the tokenizer was trained again since"
    if replaced(phase.parent, inputs.get(phase.parent), name, tag):
        return f"{phase.parent} was trained again since"
    return None

def replaced(parent, begun_with, name, tag):
    """Whether the finished model of the stage `parent` is another than the one with this
    fingerprint; False where either is not there."""
    folder = pipeline.state_path(parent, name, tag)
    step = finished_step(folder)
    return step is not None and begun_with not in (None, checkpoint.fingerprint(folder, step))

# -------------------------------------------------------------------------------------------------
# a run

def guarded(usual, function, *args):
    """What a function finds; `usual` where a file is damaged in a way that nobody thought of: that
    costs its own part only."""
    try:
        return function(*args)
    except Exception:  # noqa: BLE001
        return usual

def tags(name):
    """The runs of a data set, the one written last at the end.  example: ["d12", "d4"]"""
    found = {}
    for stage in pipeline.STAGES:
        for folder in pipeline.state_path(stage, name, "x").parent.glob("*/"):
            if ".old-" not in folder.name:
                found[folder.name] = max(written(folder), found.get(folder.name, 0.0))
    if not found:  # a first start that was refused, or could write nothing
        found = {path.stem.removeprefix("speedrun_"): written(path)
                 for path in pipeline.data_root(name).glob("speedrun_*.json")}
    return sorted(found, key=found.get)

def state_of(phase, name, tag):
    """-> (state, words) of a Phase of a run of the data set `name`"""
    return guarded(("failed", "what it has left is damaged"), look_at_phase, phase, name, tag)

def look_at_phase(phase, name, tag):
    path = pipeline.state_path(phase.name, name, tag)
    if phase.kind == "evaluation":
        return describe_eval(path, pipeline.state_path(phase.parent, name, tag))
    if phase.name == "data" and pipeline.is_folder_data(name):
        return "done", "your own folder"
    state, words = describe(path)
    if state == "done" and phase.kind == "training" and (why := outdated(phase, name, tag)):
        return "stale", f"outdated: {why}"
    return state, words

def phases_of(name, tag):
    """{phase: (state, words)} of a run of the data set `name`, without the report"""
    return {phase.name: state_of(phase, name, tag) for phase in pipeline.PHASES[:-1]}

def figures(phase, state, name, tag):
    """The key figures of a phase, in words, and its size on disk in bytes.
    example: (["0.3493 bits per byte", "2m50s of training", "31.5 MB"], 31503137)"""
    path = pipeline.state_path(phase.name, name, tag)
    files = path.glob("*") if path.is_dir() else [path]
    size = 0
    for file in [] if phase.name == "data" and pipeline.is_folder_data(name) else files:
        with contextlib.suppress(OSError):  # it may be removed just now
            size += file.stat().st_size
    words = []
    if phase.kind == "evaluation":
        result = common.read_json(path)
        words += worded(f"{called('CORE', name)} {{:.4f}}", result.get("core"))
        words += worded(f"{called('ChatCORE', name)} {{:.4f}}", result.get("chatcore"))
    elif state == "running":
        words += pace(path)
    else:
        record, (_, meta) = common.read_json(path / "phase.json"), saved(path)
        words += worded("{:.4f} bits per byte", record.get("val_bpb", meta.get("val_bpb")))
        words += worded("pass@1 {:.3f}", record.get("pass_at", {}).get("1"))
        if worded("{:f}", meta.get("seconds")):
            words.append(f"{common.duration(meta['seconds'])} of training")
    if size >= 100_000:
        words.append(f"{size / 1e6:,.1f} MB")
    return words, size

def worded(form, value):
    """[the value in this form], or [] where it has none: a damaged file may hold anything"""
    try:
        return [form.format(value)]
    except (TypeError, ValueError):
        return []

def pace(directory):
    """Where a training is: ["at step 431 of 1,000", "9,300 tokens/s", "about 4m10s left"], or []
    before its first step has ended."""
    steps = []
    for line in causes.last_lines(directory / "metrics.jsonl", 40):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last may be half written
            line = loads(line)
            steps.append((line["step"] + 1, line["clock"]["seconds"],
                          line["clock"]["tokens_per_second"]))
    if not steps:
        return []
    (first, began, _), (step, now, speed) = steps[0], steps[-1]
    total = common.read_json(directory / "phase.json").get("num_steps", 0)
    words = [f"at step {step:,}" + f" of {total:,}" * bool(total)]
    if step > first:  # the first one may have compiled
        words.append(f"{speed:,} tokens/s")
        left = (total - step) * (now - began) / (step - first)
        words += [f"about {common.duration(left)} left"] * bool(total)
    return words

def cause(phase, state, given, name, tag):
    """Why a phase is not done, or the last command refused for it, a causes.Cause; None where there
    is no such thing. given: what the launcher has left (pipeline.command_file)."""
    path = pipeline.state_path(phase.name, name, tag)
    if phase.kind == "evaluation":
        path = path.with_suffix(".partial.jsonl")
        record = {"updated": written(path), **[{}, *common.read_json_lines(path)][-1]}
    else:
        record = common.read_json(path / "phase.json")
    reasons = []
    if state in ("half", "failed"):
        was_done = record.get("status") == "done"  # but a file is missing
        reasons = [describe(path)[1] if was_done else record.get("reason")]
    ended = given.get("ends", {}).get(phase.name, {})
    began = (record.get("starts") or [record.get("updated", 0.0) - 60.0])[-1]
    is_newer = ended.get("time", 0.0) > began  # not the end of an attempt before
    # one that is done may have been refused since
    if ended and is_newer and state != "running" and (state != "done" or ended["code"] == 2):
        reasons.insert(0, ended["reason"])
    reasons = [reason for reason in reasons if reason]
    if not reasons and state == "half" and record.get("status") == "running":
        reasons.append(f"process {record.get('pid')} died without a word, as by SIGKILL")
    if not reasons:
        return None
    launcher = given.get("began", {})
    return causes.of_death(reasons, record.get("job") or launcher.get("job"), launcher.get("log"))

def waiting(given):
    """The job of this run, or its successor, that Slurm has in its queue or runs, in words; None
    for none."""
    job = given.get("began", {}).get("job")
    if not job:
        return None
    array = job.split("_")[0]
    for line in slurm.lines_of("squeue", "--me", "-h", "-o", "%i|%T|%r|%E"):
        number, state, reason, dependency = line.split("|", 3)
        if number.split("_")[0] == array or re.search(rf"after\w*:{array}\b", dependency):
            return f"job {number} is {state}" + f" ({reason})" * (reason != "None")
    return None

def what_is_left(states, given, name, tag):
    """What the rest needs, in words, as far as the trial before the first training knows; None
    where nothing is left or was tried."""
    root = pipeline.data_root(name)
    tried = common.read_json(root / f"tried_{tag}.json")
    tried = {phase: facts for phase, facts in tried.items()
             if states.get(phase, ("done",))[0] not in ("done", "stale") and "bytes" in facts}
    if not tried:
        return None
    seconds = trial.seconds_left(tried, name, tag)
    words = f"about {trial.in_words(seconds)}"
    began = given.get("began", {})
    if began.get("ends"):
        limit = began["ends"] - began["time"]
        jobs = math.ceil(sum(seconds.values()) / max(limit - 120.0, 60.0))
        words += f", {jobs} job{'s' * (jobs > 1)} of {common.duration(limit)}"
    files = sum(4 * facts["keep"] + 2 for facts in tried.values())
    inodes = os.statvfs(root).f_favail
    words += (f"; {trial.bytes_needed(tried, name, tag) / 1e9:.2f} GB in {files} files, "
              f"{shutil.disk_usage(root).free / 1e9:.2f} GB"
              f"{f' and {inodes:,} inodes' * (inodes > 0)} free")
    return words

def asked_for(name, tag):
    """The phases that the launcher was asked for: with --chats there are fewer than all."""
    found = common.read_json(pipeline.command_file(name, tag)).get("phases")
    return found if isinstance(found, list) else [phase.name for phase in pipeline.PHASES]

def next_command(states, name, tag):
    """What to run next, given phases_of(): trainings before evaluations, what was begun first. What
    speedrun.sh was given last, where it runs that; else what the phase itself was given."""
    wanted = asked_for(name, tag)
    left = [phase for phase, (state, _) in states.items()
            if state != "done" and (phase in wanted or state != "absent")]
    if not left:
        return shlex.join(["python", "chat_cli.py", f"--data={name}"])
    first = min(left, key=lambda phase: ("-" in phase, states[phase][0] == "absent"))
    running = states[first][0] == "running"
    commands = common.read_json(pipeline.command_file(name, tag)).get("commands") or {}
    record = common.read_json(pipeline.state_path(first, name, tag) / "phase.json")
    words = ["bash", "speedrun.sh", f"--data={name}"]
    if re.fullmatch(r"d\d+", tag):
        words.append(f"--depth={tag[1:]}")
    command = commands.get(first, shlex.join(words))
    if first not in commands and first in pipeline.STAGES and record.get("next") and not running:
        command = record["next"]
    more = re.findall(r"-- (--\w+\.(?:rewind|start_over)=\w+)", str(record.get("reason")))[:1]
    if states[first][0] == "stale" and first in pipeline.STAGES:
        # what goes on from it is outdated when it has been trained again
        later = pipeline.STAGES[pipeline.STAGES.index(first):]
        more = [f"--{p}.start_over=True" for p in later if states[p][0] in ("done", "stale")]
    if more and command != record.get("next"):
        command += " " + shlex.join(more if " -- " in command else ["--", *more])
    return f"wait for {first}, then {command}" if running else command

def facts_of(phase, state, words, given, name, tag):
    """All that is known of a phase, as --json=True prints it."""
    found, size = [], 0
    if state != "absent":
        found, size = guarded(([], 0), figures, phase, state, name, tag)
    why = guarded(None, cause, phase, state, given, name, tag)
    return {"phase": phase.name, "state": state, "words": words, "figures": found, "bytes": size,
            "parent": phase.parent, "cause": why and why._asdict()}

def look_at(name, tag):
    """All that is known of a run, as --json=True prints it."""
    states = phases_of(name, tag)
    given = {key: value for key, value in common.read_json(pipeline.command_file(name, tag)).items()
             if isinstance(value, dict)}
    phases = [facts_of(phase, *states[phase.name], given, name, tag)
              for phase in pipeline.PHASES[:-1]]
    queued = guarded(None, waiting, given)
    command = guarded(f"bash speedrun.sh --data={shlex.quote(name)}", next_command, states, name,
                      tag)
    if queued:
        command = f"{slurm.NOTHING_TO_TYPE}: {queued}"
    return {"tag": tag, "phases": phases, "queue": queued, "next": command,
            "left": guarded(None, what_is_left, states, given, name, tag)}

def data_sets():
    """The data sets that have a state, as records name them, the one touched last at the end."""
    found = {}
    for path in pipeline.base_dir().rglob("phase.json"):
        record = common.read_json(path)
        if record and not path.relative_to(pipeline.base_dir()).parts[0].startswith("rehearsal-"):
            usual = "toy" if path.is_relative_to(pipeline.data_root("toy")) else "fineweb_edu"
            of_run = record.get("settings")
            name = of_run.get("data", usual) if isinstance(of_run, dict) else usual  # adopt.py's
            found[str(name)] = max(written(path.parent), found.get(str(name), 0.0))
    if not found.keys() & {*pipeline.SHARED_DATA} and tags("fineweb_edu"):  # nanochat's own
        found = {"fineweb_edu": 0.0, **found}
    return sorted(found, key=found.get)

def check_folder(name):
    """Failure (code 2) where a data set is the user's own folder and that is not there."""
    there = pipeline.base_data_dir(name).is_dir()
    common.check(there or not pipeline.is_folder_data(name), f"there is no {name}: --data takes "
                 "toy, fineweb_edu, climbmix or a folder of texts")

def show(run):
    """Prints a run, as look_at() gives it."""
    for facts in run["phases"]:
        phase, why = facts["phase"], facts["cause"]
        label = phase if phase in ("data", "tok") else f"{phase} {run['tag']}"
        line = f"  {label:<14} {facts['words']}"
        if facts["figures"]:
            line += f"; {', '.join(facts['figures'])}"
        print(line)
        if why:
            print(f"    why: {why['sentence']}")
            for shown_by in why["shown_by"]:
                print(f"       | {shown_by}")
            print(f"    do:  {why['mend']}")
    if run["left"]:
        print(f"  left: {run['left']}")

def main():
    if data:
        check_folder(data)
    sets = {name: [look_at(name, tag) for tag in tags(name) or [""]]
            for name in ([data] if data else data_sets())}
    commands = ["bash speedrun.sh", *(run["next"] for runs in sets.values() for run in runs)]
    if json:
        found = [{"data": name, "folder": str(pipeline.data_root(name)), "runs": runs}
                 for name, runs in sets.items()]
        print(dumps({"state": str(pipeline.base_dir()), "sets": found, "next": commands[-1]},
                    indent=1))
        return
    for name, runs in sets.items():
        print(f"{name} ({pipeline.data_root(name)})")
        for run in runs:
            show(run)
    if not sets:
        print(f"nothing in {pipeline.base_dir()} yet")
    print(f"next: {commands[-1]}")

if __name__ == "__main__":
    main()
