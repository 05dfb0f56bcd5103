"""
Settings without argparse. A script keeps its settings as plain globals at its top, one a line, each with a comment:

    depth = 20                  # layers; width, heads and learning rates follow from it
    # ---- settings below may change at every resume
    device_batch_size = 32      # rows a device holds at once
    settings = configure(globals())

and is then run as `python script.py --depth=4 --device-batch-size=8 my_settings.py --help`.
A `.py` argument is a file of assignments; later arguments win. The type of the default is enforced (an int may stand
for a float; a default of None takes a number). What stands above the "may change at every resume" line defines the
result and is held against the record when a phase resumes; what stands below is only logged.
"""
import ast
import difflib
import os
import runpy
import sys
from pathlib import Path

import common

MARKER = "may change at every resume"
PHASES = {"data": "prepare_data.py", "tok": "tok_train.py", "base": "base_train.py", "base-eval": "base_eval.py", "mid": "mid_train.py", "mid-eval": "chat_eval.py",
          "sft": "chat_sft.py", "sft-eval": "chat_eval.py", "rl": "chat_rl.py", "rl-eval": "chat_eval.py", "report": "report.py"}  # and their scripts, as in speedrun.sh
KINDS = {type(None): "None or a number", int: "a whole number", float: "a number", bool: "True or False", str: "a text", list: "a list"}

STEPS, ONE = (lambda v: v == -1 or v >= 1, "-1 or at least 1"), (lambda v: v >= 1, "at least 1")
ALLOWED = {  # what settings that many scripts have may be
    "seed": (lambda v: v is None or type(v) is int and v >= 0, "a whole number from 0 on"), "keep": ONE, "rows": ONE, "device_batch_size": ONE, "max_new_tokens": ONE, "threads": (lambda v: v >= 0, "0 or more"),
    "num_steps": STEPS, "max_steps": STEPS, "total_batch_size": STEPS, "device": (("auto", "cuda", "mps", "cpu").__contains__, "auto, cuda, mps or cpu"),
    "dtype": (("auto", "bfloat16", "float32").__contains__, "auto, bfloat16 or float32"), "compile": (("auto", "True", "False", True, False).__contains__, "auto, True or False")}

class Settings(dict):
    """All settings by name; `.defining` and `.free` are the two halves, dicts too (see the module's docstring)."""

def assignments(source):
    """The settings in the text of a script, as nodes of its syntax tree."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and "configure(" in ast.unparse(node.value):
            return  # what comes after configure(globals()) is no setting
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            yield node

def declared(path):
    """The settings of the script at `path`: a list of (name, comment, defining) in the order of the file.
    example: a line `depth = 4  # layers` above the marker -> [("depth", "layers", True)]"""
    source = Path(path).read_text(encoding="utf-8")
    lines = source.split("\n")
    marker = next((i for i, line in enumerate(lines, 1) if line.startswith("#") and MARKER in line), len(lines) + 1)
    comment = lambda node: " ".join(line.split("  #", 1)[1].strip() for line in lines[node.lineno - 1:node.end_lineno] if "  #" in line)
    return [(node.targets[0].id, comment(node), node.lineno < marker) for node in assignments(source)]

def defaults(path):
    """{setting: default} of the script at `path`, without running it."""
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments(Path(path).read_text(encoding="utf-8"))}

def given(script, args):
    """{setting: value} that `python SCRIPT ARGS` would run with; args: a list of --key=value"""
    values = defaults(common.REPO / script)
    for name, value in (arg[2:].split("=", 1) for arg in args):
        name = name.replace("-", "_")
        values[name] = convert(name, value, values[name])
    return values

def whole_path(data):
    """The same folder, from wherever and however it is named.  examples: "toy" -> "toy", "../my/texts" -> "/home/me/my/texts" """
    return str(Path(data).expanduser().resolve()) if common.is_folder_data(data) else data

def convert(name, value, default):
    """`value` (text from the command line, or a Python value from a file) as the type of `default`.
    examples: ("depth", "4", 20) -> 4;  ("lr", "1", 0.1) -> 1.0;  ("mixture", "a,b*2", ["c"]) -> ["a", "b*2"]"""
    literal = value
    if isinstance(value, str) and not isinstance(default, str):
        try:
            literal = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            literal = value.split(",") if isinstance(default, list) and value else value
    if isinstance(default, list) and isinstance(literal, (tuple, str)):
        literal = list(literal) if isinstance(literal, tuple) else ([literal] if literal else [])
    if isinstance(default, float) and isinstance(literal, int) and not isinstance(literal, bool):
        literal = float(literal)
    if type(literal) is not type(default) and not (default is None and type(literal) in (int, float)):
        common.fail(f"--{name} takes {KINDS[type(default)]} (default {default!r}), not {value!r}")
    if name == "data" and literal:
        literal = whole_path(literal)
    right, what = ALLOWED.get(name.rpartition(".")[2], (lambda v: True, ""))
    common.check(right(literal), f"--{name} must be {what}, not {value!r}")
    return literal

def configure(module_globals):
    """Applies sys.argv to the settings in `module_globals` (a script's globals()) and returns them as Settings.
    Exits with 2 and one line for an unknown key or a wrong type; prints all settings for --help and exits with 0."""
    table = [row for row in declared(module_globals["__file__"]) if row[0] in module_globals]
    defaults = {name: module_globals[name] for name, _, _ in table}

    def assign(name, value, where):
        key = name.replace("-", "_")
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)
            common.fail(f"unknown setting {name!r} in {where}; the nearest is --{near[0]} (--help prints them all)")
        module_globals[key] = convert(key, value, defaults[key])

    for arg in sys.argv[1:]:
        if arg in ("--help", "-h"):
            print((module_globals["__doc__"] or "").strip() + "\n\nsettings:")
            first_free = next((name for name, _, defining in table if not defining), None)
            for name, comment, _ in table:
                if name == first_free:
                    print(f"\nthese do not define the result and {MARKER}:")
                left = f"  --{name}={defaults[name]!r}"
                print(f"{left:<40} {comment}" if len(left) < 40 else f"{left}\n{'':<40} {comment}")
            sys.exit(0)
        elif arg.startswith("--") and "=" in arg:
            name, value = arg[2:].split("=", 1)
            assign(name, value, arg)
        elif arg.endswith(".py") and not arg.startswith("-"):
            common.check(os.path.exists(arg), f"no such settings file: {arg}")
            for name, value in runpy.run_path(arg).items():
                if not name.startswith("_") and not callable(value) and type(value).__name__ != "module":
                    assign(name, value, arg)
        else:
            common.fail(f"cannot read the argument {arg!r}: write --key=value or the name of a .py file of assignments")
    for name in defaults:  # an edited default is the same as an override
        module_globals[name] = convert(name, module_globals[name], defaults[name])
    settings = Settings((name, module_globals[name]) for name in defaults)
    settings.defining = {name: settings[name] for name, _, defining in table if defining}
    settings.free = {name: settings[name] for name, _, defining in table if not defining}
    return settings

def main():
    """`python configurator.py accepted PHASE SCRIPT --key=value --PHASE.key=value ...` prints the arguments that SCRIPT has a setting
    for, those of PHASE alone last; `python configurator.py check --key=value ...` exits with 2 if one fits no phase, or its value not all that have it. For speedrun.sh."""
    def key(arg):  # example: "--rl.num-steps=8" -> ("rl", "num_steps")
        common.check(arg.startswith("--") and "=" in arg, f"cannot read {arg!r} behind --: write --key=value")
        part, _, name = arg[2:].split("=", 1)[0].rpartition(".")
        return part, name.replace("-", "_")
    if sys.argv[1] == "accepted":
        known = {name for name, _, _ in declared(common.REPO / sys.argv[3])}
        given = [(*key(arg), arg.split("=", 1)[1]) for arg in sys.argv[4:] if key(arg)[1] in known]
        mine = [g for g in given if not g[0]] + [g for g in given if g[0] == sys.argv[2]]
        others = [g for g in given if g not in mine and sys.argv[2] == "data"]  # what other phases read is its business
        print("".join(f"--{name}={value}\n" for _, name, value in mine) + "".join(f"--{part}.{name}={value}\n" for part, name, value in others), end="")
    else:
        known = {part: defaults(common.REPO / script) for part, script in PHASES.items()}
        for arg in sys.argv[2:]:
            part, name = key(arg)
            common.check(name not in ("data", "depth", "tag"), f"--{name} cannot stand behind the --: --data and --depth stand before it, and the tag is d<depth>")
            common.check(part in ("", *PHASES), f"there is no phase {part!r} ({arg}); there are {', '.join(PHASES)}")
            theirs = [values for of, values in known.items() if part in ("", of)]
            near = difflib.get_close_matches(name, {n for values in theirs for n in values}, n=1, cutoff=0.0)[0]
            common.check(any(name in values for values in theirs), f"{f'the phase {part}' if part else 'no phase'} has {'no' if part else 'a'} setting {name!r}; the nearest is --{near}")
            for values in theirs:  # before the first phase begins, not hours later
                if name in values:
                    convert(arg[2:].split("=", 1)[0], arg.split("=", 1)[1], values[name])

if __name__ == "__main__":
    main()
