"""
Settings without argparse. A script keeps its settings as plain globals at its top, one a line, each
with a comment:

    depth = 20                  # layers; width, heads and learning rates follow from it
    # ---- settings below may change at every resume
    device_batch_size = 32      # rows a device holds at once
    settings = configure(globals())

and is then run as `python script.py my_settings.py --depth=4 --device-batch-size=8 --help`.
A `.py` argument is a file of assignments; later arguments win. The type of the default is enforced
(an int may stand for a float; a default of None takes a number). What stands above the "may change
at every resume" line defines the result and is held against the record when a phase resumes; what
stands below is only logged.
"""
import ast
import difflib
import os
import runpy
import sys
import types
from pathlib import Path

import common
import pipeline

MARKER = "may change at every resume"
KINDS = {type(None): "None or a number", int: "a whole number", float: "a number",
         bool: "True or False", str: "a text", list: "a list"}

# what settings may be that several scripts have
AT_LEAST_0 = ("seed", "threads")
AT_LEAST_1 = ("keep", "rows", "device_batch_size", "max_new_tokens")
AT_LEAST_1_OR_NONE = ("num_steps", "max_steps", "total_batch_size")  # -1 stands for none
CHOICES = {"device": ("auto", "cuda", "mps", "cpu"), "dtype": ("auto", "bfloat16", "float32"),
           "compile": ("auto", "True", "False", True, False)}

class Settings(dict):
    """All settings by name. `.defining` and `.free` are its two halves; `.of_phases` what was given
    for other phases: {"sft": {"mixture": "gsm8k,arc_easy"}}, as text."""

# -------------------------------------------------------------------------------------------------
# what a script declares

def assignments(source):
    """The settings in the text of a script, as nodes of its syntax tree."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and "configure(" in ast.unparse(node.value):
            return  # what comes after configure(globals()) is no setting
        plain = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if plain and len(node.targets) == 1 and not isinstance(node.value, ast.Call):
            yield node

def declared(path):
    """The settings of the script at `path`: a list of (name, comment, defining), as in the file.
    example: a line `depth = 4  # layers` above the marker -> [("depth", "layers", True)]"""
    source = Path(path).read_text(encoding="utf-8")
    lines = source.split("\n")
    marker = next((i for i, line in enumerate(lines, 1) if MARKER in line and line[:1] == "#"),
                  len(lines))
    found = []
    for node in assignments(source):
        own = lines[node.lineno - 1:node.end_lineno]
        comment = " ".join(line.split("  #", 1)[1].strip() for line in own if "  #" in line)
        found.append((node.targets[0].id, comment, node.lineno < marker))
    return found

def defaults(script):
    """{setting: default} of a script of this repository, without running it."""
    source = (pipeline.REPO / script).read_text(encoding="utf-8")
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments(source)}

# -------------------------------------------------------------------------------------------------
# from text to values

def convert(name, value, default):
    """`value` (text from the command line, or a Python value from a file) as the type of `default`.
    Failure where it is none, or out of its range.
    examples: ("depth", "4", 20) -> 4;  ("lr", "1", 0.1) -> 1.0;  ("tasks", "a,b", []) -> ["a", "b"]
    """
    found = value
    if isinstance(value, str) and not isinstance(default, str):
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass
    if isinstance(default, list) and isinstance(found, str):
        found = found.split(",") if found else []
    if isinstance(default, list) and isinstance(found, tuple):
        found = list(found)
    if isinstance(default, float) and type(found) is int:
        found = float(found)
    number = default is None and type(found) in (int, float)
    if type(found) is not type(default) and not number:
        common.fail(f"--{name} takes {KINDS[type(default)]} (default {default!r}), not {value!r}")
    if name == "data" and found:
        found = pipeline.whole_path(found)
    check_range(name, found)
    return found

def check_range(name, value):
    """Failure where the value of a setting that several scripts have makes no sense."""
    key, rule = name.rpartition(".")[2], None
    if key in CHOICES and value not in CHOICES[key]:
        rule = ", ".join(dict.fromkeys(str(choice) for choice in CHOICES[key]))
    elif value is not None and key in AT_LEAST_0 and (value < 0 or type(value) is not int):
        rule = "a whole number from 0 on"
    elif key in AT_LEAST_1 and value < 1:
        rule = "at least 1"
    elif key in AT_LEAST_1_OR_NONE and value < 1 and value != -1:
        rule = "-1 or at least 1"
    if rule:
        common.fail(f"--{name} must be {rule}, not {value!r}")

def split(argument):
    """An argument as (phase, key, value).
    examples: "--rl.num-steps=8" -> ("rl", "num_steps", "8");  "--depth=4" -> ("", "depth", "4")"""
    common.check(argument.startswith("--") and "=" in argument, f"cannot read the argument "
                 f"{argument!r}: write --key=value, or the name of a .py file of assignments")
    name, _, value = argument[2:].partition("=")
    part, _, key = name.rpartition(".")
    return part, key.replace("-", "_"), value

def nearest(name, names):
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]

# -------------------------------------------------------------------------------------------------
# a script's own call

def configure(module_globals, short=None, of_phases=False):
    """
    Applies sys.argv to the settings in `module_globals` (a script's globals()) -> Settings.
    short: {"-p": "prompt"}, settings that may be given as two words; of_phases: whether settings of
    other phases (--sft.mixture=...) are taken, too. Failure for an unknown key or a wrong type;
    prints all settings for --help and ends the process with 0.
    """
    table = declared(module_globals["__file__"])
    usual = {name: module_globals[name] for name, _, _ in table}
    settings = Settings()
    settings.of_phases = {}

    def assign(name, value, where):
        key = name.replace("-", "_")
        if key not in usual:
            common.fail(f"unknown setting {name!r} in {where}; the nearest is "
                        f"--{nearest(key, usual)} (--help prints them all)")
        module_globals[key] = convert(key, value, usual[key])

    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument in ("--help", "-h"):
            print_help(module_globals["__doc__"], table, usual)
            sys.exit(0)
        elif argument in (short or {}):
            value = next(arguments, None)
            common.check(value is not None, f"{argument} takes a value behind it")
            assign(short[argument], value, argument)
        elif argument.endswith(".py") and not argument.startswith("-"):
            common.check(os.path.exists(argument), f"no such settings file: {argument}")
            for name, value in runpy.run_path(argument).items():
                helper = callable(value) or isinstance(value, types.ModuleType)
                if not (name.startswith("_") or helper):
                    assign(name, value, argument)
        else:
            part, key, value = split(argument)
            if part and of_phases:
                settings.of_phases.setdefault(part, {})[key] = value
            else:
                assign(f"{part}.{key}" if part else key, value, argument)
    for name, default in usual.items():  # an edited default is checked as an override is
        module_globals[name] = convert(name, module_globals[name], default)
    settings.update((name, module_globals[name]) for name in usual)
    settings.defining = {name: settings[name] for name, _, defining in table if defining}
    settings.free = {name: settings[name] for name, _, defining in table if not defining}
    return settings

def print_help(doc, table, usual):
    print((doc or "").strip() + "\n\nsettings:")
    above = True
    for name, comment, defining in table:
        if above and not defining:
            print(f"\nthese do not define the result and {MARKER}:")
        above = defining
        left = f"  --{name}={usual[name]!r}"
        if len(left) >= 40:
            print(left)
            left = ""
        print(f"{left:<40} {comment}")

# -------------------------------------------------------------------------------------------------
# settings behind the -- of speedrun.sh, which go to every phase that has them

def accepted(phase, arguments):
    """The arguments that a phase has a setting for, those for it alone last. What other phases
    alone were given is the business of the phase "data": it brings what they read.
    example: ("rl", ["--rl.samples=4", "--seed=1", "--depth=3"]) -> ["--seed=1", "--samples=4"]"""
    known = defaults(phase.script)
    shared, own, others = [], [], []
    for part, key, value in map(split, arguments):
        if part in ("", phase.name) and key in known:
            (own if part else shared).append(f"--{key}={value}")
        elif part and phase.name == "data":
            others.append(f"--{part}.{key}={value}")
    return [*shared, *own, *others]

def check_arguments(arguments):
    """Failure where an argument behind the -- fits no phase, or its value not all that have it:
    said before the first phase begins, not hours later."""
    names = [phase.name for phase in pipeline.PHASES]
    for argument in arguments:
        part, key, value = split(argument)
        common.check(key not in ("data", "depth", "tag"), f"--{key} cannot stand behind the --: "
                     "--data and --depth stand before it, and the tag is d<depth>")
        common.check(part in ("", *names), f"there is no phase {part!r} ({argument}); there are "
                     f"{', '.join(names)}")
        theirs = [defaults(p.script) for p in pipeline.PHASES if part in ("", p.name)]
        having = [known for known in theirs if key in known]
        whose = f"the phase {part} has no" if part else "no phase has a"
        common.check(having, f"{whose} setting {key!r}; the nearest is "
                     f"--{nearest(key, {name for known in theirs for name in known})}")
        for known in having:
            convert(f"{part}.{key}" if part else key, value, known[key])
