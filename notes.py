"""
What the launcher leaves for status.py in a run's pipeline.command_file():

    commands   {phase: the command that goes on with it}
    ends       {phase: how it has ended, where that was not well: code, reason, time}
    phases     all that the launcher was asked for
    began      when the last launcher began; in a Slurm job its name, its end, its log
"""
import contextlib
import json
import time

import common
import pipeline

def note(plan, **facts):
    """Keeps facts on a run for status.py, where it has a folder. What goes wrong here costs
    nothing else."""
    path = pipeline.command_file(plan.data, plan.tag)
    with contextlib.suppress(Exception):
        if path.parent.is_dir():
            common.atomic_write(path, json.dumps({**common.read_json(path), **facts}))

def noted(plan, key):
    """What was noted by phase, a dict."""
    found = common.read_json(pipeline.command_file(plan.data, plan.tag)).get(key)
    return found if isinstance(found, dict) else {}

def note_command(plan):
    """Keeps what goes on with the phases of this run."""
    commands = {**noted(plan, "commands"), **dict.fromkeys(plan.names, plan.to_type(plan.given))}
    note(plan, commands=commands, phases=list(plan.listed))

def note_end(plan, name, code, reason):
    """Keeps how a phase has ended, or why it did not begin: code 0 forgets it."""
    ends = {k: v for k, v in noted(plan, "ends").items() if k != name}
    if code:
        ends[name] = {"code": code, "reason": reason, "time": time.time()}
    note(plan, ends=ends)
