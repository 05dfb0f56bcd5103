"""
What is done, what is half done, what died and why; the last line is what to run next.

    python status.py                # every data set in the state folder, the one touched last at the end
    python status.py --data=toy     # one of them
"""
import contextlib
import re
import shlex
import time

import checkpoint
import common
import configurator
import phase

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: every data set that has a state
settings = configurator.configure(globals()) if __name__ == "__main__" else None

UNITS = ("data", "tok", "base", "base-eval", "mid", "mid-eval", "sft", "sft-eval", "rl", "rl-eval")  # as in speedrun.sh

def read(path):
    """The JSON object in `path`; {} where there is none that can be read."""
    return found if isinstance(found := common.read_json(path), dict) else {}

def saved(directory):
    """(step, meta, {name: [size, sha256]}) of the newest checkpoint in `directory`; (None, {}, {}) where there is none"""
    for step in checkpoint.steps(directory)[:1]:
        return step, read(directory / checkpoint.names(step)[2]), checkpoint.files(directory, step)
    return None, {}, {}

def ago(when):
    """when: seconds since the epoch, or a file written then.  example: "3m10s ago" """
    with contextlib.suppress(OSError):  # the file may have been replaced by a newer one
        return f"{common.clock(max(0, time.time() - (when if isinstance(when, float) else when.stat().st_mtime)))} ago"
    return "just now"

def gone(directory):
    """What a phase that was done lacks now, or None. Looks at names and sizes only: checksums can take minutes."""
    usual = {"base_data": {}, "base_data_climbmix": {}, "tokenizer": {"tokenizer.json": 0}}.get(directory.name, {"its checkpoint": 0})
    for name, size in ({n: size for n, (size, _) in saved(directory)[2].items()} or usual).items():
        if not (directory / name).exists() or (directory / name).stat().st_size < size:
            return f"{name} is gone or cut short"
    return None

def describe(directory):
    """-> (state, words) of a phase; state is done, running, half, failed or absent.
    example: ("half", "half done, saved at step 120 of 400, 3m10s ago (signal SIGTERM: saved at step 120 of 400)")"""
    if directory is None:
        return "absent", "not started"
    record, (step, meta, _) = read(directory / "phase.json"), saved(directory)
    where = "" if step is None else f"step {step:,} of " + (f"{meta['num_steps']:,}" if "num_steps" in meta else "?")
    half = f"saved at {where}, {ago(directory / checkpoint.manifest_name(step))}" if where else "nothing saved yet"
    reason, updated = record.get("reason") or "no reason was recorded", ago(float(record.get("updated") or 0))
    match record.get("status"):
        case "done":
            lost, done = gone(directory), f"done, {where}{', ' if where else ''}{updated}"
            return ("failed", f"was done, but {lost}") if lost else ("done", done)
        case "interrupted":
            return "half", f"half done, {half} ({reason})"
        case "running":
            lock = directory / "lock.json"
            with contextlib.suppress(OSError, KeyError):  # it goes when the phase ends
                if (holder := read(lock)) and phase.holder_alive(holder, lock.stat().st_mtime):
                    return "running", f"running, {half} (process {holder['pid']} on {holder['host']})"
            return "half", f"died without a word, {half} (process {record.get('pid')}: killed, or out of memory?)"
        case None if (directory / "phase.json").exists():
            return "failed", f"its record, phase.json, cannot be read; {half}"
        case None:
            there = directory.is_dir() and any(p.is_file() and "lock" not in p.name for p in directory.iterdir())
            return ("done", "there, without a record: made elsewhere") if there else ("absent", "not started")
    return "failed", f"failed, {half}: {reason}"

def describe_eval(path, directory):
    """The same for an evaluation with the result file `path` of the model in `directory`; one more state is stale."""
    partial, result, (step, _, _) = path.with_suffix(".partial.jsonl"), read(path), saved(directory)
    if partial.exists() and not (path.exists() and path.stat().st_mtime >= partial.stat().st_mtime):
        last = (common.read_metrics(partial) or [{}])[-1]  # says why it ended, if it could
        if last.get("code", 75) != 75:
            return "failed", f"failed, {ago(partial)}: {last.get('reason')}"
        return "half", f"half done, the last piece was kept {ago(partial)}" + (f" ({last['reason']})" if "reason" in last else "")
    if not result:
        return ("failed", f"its result, {path.name}, cannot be read") if path.exists() else ("absent", "not started")
    now = checkpoint.fingerprint(directory, step) if step is not None else ""
    fits = not now or result.get("inputs", {}).get("weights", now) == now
    return ("done", f"done, {ago(path)}") if fits else ("stale", "of other weights than those there now")

def tags(root):
    """The runs of a state folder, the one written last at the end.  example: ["d12", "d4"]"""
    runs = [d for f in common.STAGES.values() for d in (root / f).glob("*") if d.is_dir() and ".old-" not in d.name]
    return list(dict.fromkeys(d.name for d in sorted(runs, key=lambda d: -d.stat().st_mtime)))[::-1]

def unit(root, name, tag):
    """-> (state, words, directory) of a phase by speedrun.sh's name.  example: (root, "sft-eval", "d4")"""
    stage = name.removesuffix("-eval")
    text = "base_data_climbmix" if (root / "base_data_climbmix").is_dir() and not (root / "base_data").is_dir() else "base_data"
    folder = root / ({"data": text, "tok": "tokenizer"}.get(stage) or f"{common.STAGES[stage]}/{tag or '-'}")
    result = root / f"report/{'core' if stage == 'base' else 'chat'}_{stage}_{tag}.json"
    return *(describe(folder) if stage == name else describe_eval(result, folder)), folder

def following(states, name, tag):
    """What to run next, given {unit: (state, words, directory)}: trainings before evaluations, what was begun first."""
    left = sorted((u for u in UNITS if "done" not in states[u]), key=lambda u: ("-" in u, "absent" in states[u])) or [0]
    depth = f" --depth={tag[1:]}" if re.fullmatch(r"d\d+", tag) and tag != ("d4" if name == "toy" else "d20") else ""
    name = shlex.quote(name)  # a folder's may hold a blank
    command = f"bash speedrun.sh --data={name}{depth}" if left[0] else f"python chat_cli.py --data={name}"
    if left[0] and states[left[0]][0] == "running":
        return f"wait for {left[0]}, then {command}"
    return read(states[left[0]][2] / "phase.json").get("next") or command if left[0] in common.STAGES else command

def data_sets():
    """{state folder: data set}, the one touched last at the end"""
    found, folders = [], ("base_data", "base_data_climbmix", "tokenizer", *common.STAGES.values())
    for root in [common.base_dir(), *common.base_dir().glob("*")]:
        if parts := [root / f for f in folders if (root / f).is_dir()]:
            names = [read(p).get("settings", {}).get("data") for part in parts for p in part.glob("**/phase.json")]
            name = next(filter(None, names), "fineweb_edu" if root == common.base_dir() else root.name)
            found.append((max(d.stat().st_mtime for part in parts for d in (part, *part.glob("*/"))), root, name))
    return {root: name for _, root, name in sorted(found)}

def main():
    common.check(not common.is_folder_data(data or "toy") or common.base_data_dir(data).is_dir(), f"there is no {data}")
    sets, last = {common.data_root(data): data} if data else data_sets(), "bash speedrun.sh"
    for root, name in sets.items():
        print(f"{name} ({root})")
        for tag in tags(root) or [""]:
            states = {u: unit(root, u, tag) for u in UNITS}
            if common.is_folder_data(name):
                states["data"] = "done", "your own folder", None
            for u, (_, words, _) in states.items():
                print(f"  {u if u in ('data', 'tok') else f'{u} {tag}':<14} {words}")
            last = following(states, name, tag)
    print(f"next: {last}" if sets else f"nothing in {common.base_dir()} yet\nnext: {last}")

if __name__ == "__main__":
    main()
