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

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: all that have a state
settings = configurator.configure(globals()) if __name__ == "__main__" else None

def read(path):
    """The JSON object in `path`; {} where there is none that can be read."""
    found = common.read_json(path)
    return found if isinstance(found, dict) else {}

def saved(directory):
    """(step, meta) of the newest checkpoint in `directory`; (None, {}) where there is none"""
    for step in checkpoint.steps(directory)[:1]:
        return step, checkpoint.load_meta(directory, step)
    return None, {}

def ago(when):
    """when: seconds since the epoch, or a file written then.  example: "3m10s ago" """
    with contextlib.suppress(OSError):  # the file may have been replaced by a newer one
        when = when if isinstance(when, float) else when.stat().st_mtime
        return f"{common.duration(max(0, time.time() - when))} ago"
    return "just now"

def lost_part(directory):
    """What a phase that was done lacks now, or None."""
    step, _ = saved(directory)
    needed = {"tokenizer.json": 0} if directory.name == "tokenizer" else {}
    if directory.parent.name.endswith("_checkpoints"):
        listed = checkpoint.files(directory, step) if step is not None else {}
        needed = {name: size for name, (size, _) in listed.items()} or {"its checkpoint": 0}
    for name, size in needed.items():
        if not (directory / name).exists() or (directory / name).stat().st_size < size:
            return f"{name} is gone or cut short"
    return None

def describe(directory):
    """-> (state, words) of a phase; state is done, running, half, failed or absent.
    example: ("half", "half done, saved at step 120 of 400, 3m10s ago (signal SIGTERM: ...)")"""
    record, (step, meta) = read(directory / "phase.json"), saved(directory)
    total = f"{meta['num_steps']:,}" if "num_steps" in meta else "?"
    where = "" if step is None else f"step {step:,} of {total}"
    half = "nothing saved yet"
    if where:
        half = f"saved at {where}, {ago(directory / checkpoint.manifest_name(step))}"
    reason = record.get("reason") or "no reason was recorded"
    status = record.get("status")
    if status == "done":
        if lost := lost_part(directory):
            return "failed", f"was done, but {lost}"
        done = ago(float(record.get("updated") or 0))
        return "done", ", ".join(word for word in ("done", where, done) if word)
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
    files = directory.iterdir() if directory.is_dir() else []
    if any(path.is_file() and "lock" not in path.name for path in files):
        return "done", "there, without a record: made elsewhere"
    return "absent", "not started"

def describe_eval(path, directory):
    """The same for an evaluation with the result file `path` of the model in `directory`; one more
    state is stale."""
    partial, result = path.with_suffix(".partial.jsonl"), read(path)
    newer = not path.exists() or path.stat().st_mtime < ago_time(partial)
    if partial.exists() and newer:
        last = (common.read_json_lines(partial) or [{}])[-1]  # says why it ended, if it could
        reason = last.get("reason")
        if last.get("code", 75) != 75:
            return "failed", f"failed, {ago(partial)}: {reason}"
        return "half", (f"half done, the last piece was kept {ago(partial)}"
                        + (f" ({reason})" if reason else ""))
    if not result:
        unreadable = "failed", f"its result, {path.name}, cannot be read"
        return unreadable if path.exists() else ("absent", "not started")
    step, _ = saved(directory)
    now = checkpoint.fingerprint(directory, step) if step is not None else ""
    if now and result.get("inputs", {}).get("weights", now) != now:
        return "stale", "of other weights than those there now"
    return "done", f"done, {ago(path)}"

def ago_time(path):
    return path.stat().st_mtime if path.exists() else 0.0

def tags(root):
    """The runs of a state folder, the one written last at the end.  example: ["d12", "d4"]"""
    found = {}
    for name in pipeline.STAGES:
        for folder in (root / pipeline.find_phase(name).state).parent.glob("*"):
            if folder.is_dir() and ".old-" not in folder.name:
                found[folder.name] = max(folder.stat().st_mtime, found.get(folder.name, 0))
    return sorted(found, key=found.get)

def phases_of(root, name, tag):
    """{phase: (state, words, folder)} of a run in the state folder `root` of the data set `name`"""
    states = {}
    for phase in pipeline.PHASES:
        path = root / phase.state.format(tag=tag or "-")
        if phase.name == "data" and (root / "base_data_climbmix").is_dir() and not path.is_dir():
            path = root / "base_data_climbmix"
        if phase.kind == "evaluation":
            parent = root / pipeline.find_phase(phase.parent).state.format(tag=tag or "-")
            states[phase.name] = (*describe_eval(path, parent), parent)
        elif phase.name != "report":
            states[phase.name] = (*describe(path), path)
    if pipeline.is_folder_data(name):
        states["data"] = "done", "your own folder", None
    return states

def next_command(states, name, tag):
    """What to run next, given phases_of(): trainings before evaluations, what was begun first."""
    left = [phase for phase, (state, _, _) in states.items() if state != "done"]
    if not left:
        return shlex.join(["python", "chat_cli.py", f"--data={name}"])
    first = min(left, key=lambda phase: ("-" in phase, states[phase][0] == "absent"))
    words = ["bash", "speedrun.sh", f"--data={name}"]
    if re.fullmatch(r"d\d+", tag) and tag != ("d4" if name == "toy" else "d20"):
        words.append(f"--depth={tag[1:]}")
    command = shlex.join(words)
    if states[first][0] == "running":
        return f"wait for {first}, then {command}"
    if first in pipeline.STAGES:
        return read(states[first][2] / "phase.json").get("next") or command
    return command

def data_sets():
    """{state folder: data set}, the one touched last at the end"""
    top = {phase.state.split("/")[0] for phase in pipeline.PHASES} - {"report"}
    found = []
    for root in [pipeline.base_dir(), *pipeline.base_dir().glob("*")]:
        parts = [root / name for name in (*top, "base_data_climbmix") if (root / name).is_dir()]
        if parts:
            records = [read(path) for part in parts for path in part.glob("**/phase.json")]
            names = [record.get("settings", {}).get("data") for record in records]
            usual = "fineweb_edu" if root == pipeline.base_dir() else root.name
            name = next(filter(None, names), usual)
            folders = [folder for part in parts for folder in (part, *part.glob("*/"))]
            found.append((max(folder.stat().st_mtime for folder in folders), root, name))
    return {root: name for _, root, name in sorted(found)}

def main():
    own = data and pipeline.is_folder_data(data)
    common.check(not own or pipeline.base_data_dir(data).is_dir(), f"there is no {data}")
    sets = {pipeline.data_root(data): data} if data else data_sets()
    command = "bash speedrun.sh"
    for root, name in sets.items():
        print(f"{name} ({root})")
        for tag in tags(root) or [""]:
            states = phases_of(root, name, tag)
            for phase, (_, words, _) in states.items():
                label = phase if phase in ("data", "tok") else f"{phase} {tag}"
                print(f"  {label:<14} {words}")
            command = next_command(states, name, tag)
    if not sets:
        print(f"nothing in {pipeline.base_dir()} yet")
    print(f"next: {command}")

if __name__ == "__main__":
    main()
