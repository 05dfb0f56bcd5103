"""
What is done, what is half done, what died and why; the last line is what to run next.

    python status.py                # every data set in the state folder, the newest at the end
    python status.py --data=toy     # one of them

Reads names, sizes and records only: checksums can take minutes.
"""
import contextlib
import re
import shlex
import time

import checkpoint
import common
import configurator
import pipeline
from lock import holder_name, living_holder
from records import finished_step

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: all that have a state
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
        return "half", (f"died without a word, {half} (process {record.get('pid')}: killed, or out "
                        "of memory?)")
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
        last = [{}, *common.read_json_lines(partial)][-1]  # says why it ended, if it could
        reason = last.get("reason", "running, or was killed")
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

def tags(name):
    """The runs of a data set, the one written last at the end.  example: ["d12", "d4"]"""
    found = {}
    for stage in pipeline.STAGES:
        for folder in pipeline.state_path(stage, name, "x").parent.glob("*/"):
            if ".old-" not in folder.name:
                found[folder.name] = max(written(folder), found.get(folder.name, 0.0))
    return sorted(found, key=found.get)

def state_of(phase, name, tag):
    """-> (state, words) of a Phase of a run of the data set `name`"""
    path = pipeline.state_path(phase.name, name, tag)
    if phase.kind == "evaluation":
        return describe_eval(path, pipeline.state_path(phase.parent, name, tag))
    if phase.name == "data" and pipeline.is_folder_data(name):
        return "done", "your own folder"
    return describe(path)

def phases_of(name, tag):
    """{phase: (state, words)} of a run of the data set `name`, without the report"""
    return {phase.name: state_of(phase, name, tag) for phase in pipeline.PHASES[:-1]}

def next_command(states, name, tag):
    """What to run next, given phases_of(): trainings before evaluations, what was begun first. What
    speedrun.sh was given last, where it runs that; else what the phase itself was given."""
    left = [phase for phase, (state, _) in states.items() if state != "done"]
    if not left:
        return shlex.join(["python", "chat_cli.py", f"--data={name}"])
    first = min(left, key=lambda phase: ("-" in phase, states[phase][0] == "absent"))
    running = states[first][0] == "running"
    given = common.read_json(pipeline.command_file(name, tag))
    record = common.read_json(pipeline.state_path(first, name, tag) / "phase.json")
    if first in given.get("phases", []):
        command = given["command"]
    elif first in pipeline.STAGES and record.get("next") and not running:
        command = record["next"]
    else:
        words = ["bash", "speedrun.sh", f"--data={name}"]
        if re.fullmatch(r"d\d+", tag):
            words.append(f"--depth={tag[1:]}")
        command = shlex.join(words)
    return f"wait for {first}, then {command}" if running else command

def data_sets():
    """The data sets that have a state, as records name them, the one touched last at the end."""
    found = {}
    for path in pipeline.base_dir().rglob("phase.json"):
        if record := common.read_json(path):
            usual = "toy" if path.is_relative_to(pipeline.data_root("toy")) else "fineweb_edu"
            name = record.get("settings", {}).get("data", usual)  # adopt.py's has none
            found[name] = max(written(path.parent), found.get(name, 0.0))
    if not found.keys() & {*pipeline.SHARED_DATA} and tags("fineweb_edu"):  # nanochat's own
        found = {"fineweb_edu": 0.0, **found}
    return sorted(found, key=found.get)

def check_folder(name):
    """Failure (code 2) where a data set is the user's own folder and that is not there."""
    there = pipeline.base_data_dir(name).is_dir()
    common.check(there or not pipeline.is_folder_data(name), f"there is no {name}: --data takes "
                 "toy, fineweb_edu, climbmix or a folder of texts")

def main():
    if data:
        check_folder(data)
    sets = [data] if data else data_sets()
    command = "bash speedrun.sh"
    for name in sets:
        print(f"{name} ({pipeline.data_root(name)})")
        for tag in tags(name) or [""]:
            states = phases_of(name, tag)
            for phase, (_, words) in states.items():
                label = phase if phase in ("data", "tok") else f"{phase} {tag}"
                print(f"  {label:<14} {words}")
            command = next_command(states, name, tag)
    if not sets:
        print(f"nothing in {pipeline.base_dir()} yet")
    print(f"next: {command}")

if __name__ == "__main__":
    main()
