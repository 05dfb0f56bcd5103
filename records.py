"""
The record of a phase, phase.json in its folder: settings, inputs, status (running, interrupted,
failed, done), why, what to run next. Here it is only read and compared; a Run writes it (run.py).
"""
import contextlib
import hashlib
import subprocess
from pathlib import Path

import common
import pipeline

def load_record(directory):
    """The record of a phase's folder; None where there is none, or a damaged one."""
    record = common.read_json(Path(directory) / "phase.json")
    whole = isinstance(record, dict) and {"status", "settings", "inputs", "free"} <= record.keys()
    return record if whole else None

def recovered_record(directory):
    """What the newest checkpoint says of the record (Run.save puts it there), for a folder that has
    lost its phase.json; {} where none does."""
    for path in sorted(Path(directory).glob("meta_*.json"), reverse=True):
        if kept := (common.read_json(path) or {}).get("record"):
            return {**kept, "free": {}, "status": "running"}
    return {}

def find_record(directory, settings):
    """
    The record that a start in `directory` goes on from, {} where it begins anew.
    --start_over=True holds for one beginning: the same command given again goes on with the
    half-done run that it has begun.
    """
    directory = Path(directory)
    old = load_record(directory) or recovered_record(directory)
    if not old or not settings["start_over"]:
        return old
    before = comparable(old["settings"], directory)
    same = before == comparable(settings.defining, directory)
    began_so = old["free"].get("start_over") and same and old["status"] != "done"
    return old if began_so else {}

def check_unchanged(name, directory, old, defining, inputs):
    """Failure (code 2) where what was recorded differs from what is asked for now."""
    if load_record(directory) is None:
        common.print0(f"{directory / 'phase.json'} is gone or damaged: settings and inputs are "
                      "compared with what the newest checkpoint says of them")
    changed = differences(comparable(old["settings"], directory), defining)
    changed += differences(old["inputs"], inputs)
    if changed:
        common.fail(f"{name} was started with other settings or inputs in {directory}: "
                    f"{', '.join(changed)} (--start_over=True keeps the old state aside and starts "
                    "again)")

def differences(old, new):
    """["depth: 4 -> 6", ...] for two dicts"""
    keys = dict.fromkeys([*old, *new])
    return [f"{k}: {old.get(k, '(absent)')} -> {new.get(k, '(absent)')}"
            for k in keys if old.get(k) != new.get(k)]

def comparable(settings, directory):
    """Settings as two starts are compared: an empty tag stands for the folder's name, and a data
    folder is the same however it is named."""
    settings = dict(settings)
    if "tag" in settings:
        settings["tag"] = directory.name
    if settings.get("data"):
        settings["data"] = pipeline.whole_path(settings["data"])
    return settings

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
