"""
Settings without argparse. A script declares its settings as plain assignments, each with a comment:

    depth = 20              # layers of the model
    # ---- settings below may change at every resume
    device_batch_size = 32  # rows a device holds at once
    settings = configure(globals())

and is then run as `python script.py my_settings.py --depth=4 --device-batch-size=8 --help`.
A `.py` argument is a file of assignments; later arguments win. The type of the default is enforced
(an int may stand for a float; a default of None takes a number). What stands above the line of
dashes defines the result and is held against the record when a phase resumes; what stands below is
only logged.
"""
import ast
import contextlib
import difflib
import math
import os
import re
import runpy
import sys
import types
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import common
import pipeline

ACTIONS = ("start_over", "try_out", "check")  # for one call, they are no settings of a run
MARKER = "# ---- settings below may change at every resume"
KINDS = {type(None): "a number or None", int: "a whole number", float: "a number",
         bool: "True or False", str: "a text", list: "a list"}

# what settings may be that several scripts have; -1 only where it is the default: not given
LEAST = {"seed": 0, "threads": 0, "eval_every": 0, "sample_every": 0, "depth": 1, "keep": 1,
         "max_seq_len": 16, "rows": 1, "device_batch_size": 1, "rollout_rows": 1,
         "max_new_tokens": 1, "num_steps": 1, "max_steps": 1, "total_batch_size": 1,
         "max_items": 1, "problems_per_step": 1, "samples": 2, "eval_problems": 1,
         "eval_samples": 1, "eval_tokens": 0, "max_skipped": 0}
# likewise, of numbers: from, to
NUMBERS = {"matrix_lr": (0, math.inf), "embedding_lr": (0, math.inf),
           "unembedding_lr": (0, math.inf), "scalar_lr": (0, math.inf),
           "lr_fraction": (0, math.inf), "temperature": (0, math.inf),
           "save_minutes": (0, math.inf), "time_limit": (0, math.inf),
           "target_flops": (0, math.inf), "warmup_ratio": (0, 1), "warmdown_ratio": (0, 1),
           "final_lr_fraction": (0, 1)}
CHOICES = {"device": ("auto", "cuda", "mps", "cpu"), "dtype": ("auto", "bfloat16", "float32"),
           "compile": ("auto", "True", "False"), "arch": ("modern", "nanochat_2025")}

class Settings(dict):
    """All settings by name. `.defining` and `.free` are its two halves; `.of_phases` what was given
    for other phases: {"sft.mixture": "gsm8k,arc_easy"}, as text."""

# -------------------------------------------------------------------------------------------------
# what a script declares

class Setting(NamedTuple):
    default: object
    comment: str
    defining: bool  # above the marker

def declared(path):
    """{name: Setting} of the script at `path`, as in the file; the script is not run.
    example: a line `depth = 4  # layers` above the marker -> {"depth": (4, "layers", True)}"""
    source = Path(path).read_text(encoding="utf-8").partition("\nsettings = ")[0]
    lines = source.split("\n")
    above = lines.index(MARKER) if MARKER in lines else len(lines)
    found, values = {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
            name = ast.unparse(node.targets[0])
            own = lines[node.lineno - 1:node.end_lineno]
            comment = " ".join(line.partition("  # ")[2].strip() for line in own)
            # evaluated, since 2 ** 19 or 64 * depth is what people write
            values[name] = eval(ast.unparse(node.value), {}, values)
            found[name] = Setting(values[name], comment, node.lineno <= above)
    return found

def defaults(script):
    """{setting: default} of a script of this repository."""
    return {name: found.default for name, found in declared(pipeline.REPO / script).items()}

# -------------------------------------------------------------------------------------------------
# from text to values

def convert(name, value, default):
    """`value` (text from the command line, or a Python value from a file) as the type of `default`.
    Failure where it is none, or out of its range.
    examples: ("depth", "4", 20) -> 4;  ("lr", "1", 0.1) -> 1.0;  ("tasks", "a,b", []) -> ["a", "b"]
    """
    found = value
    if isinstance(value, str) and not isinstance(default, str):
        with contextlib.suppress(ValueError, SyntaxError):
            found = ast.literal_eval(value)
    if isinstance(default, list) and isinstance(found, str):
        found = found.split(",") if found else []
    if isinstance(found, tuple):
        found = list(found)
    if isinstance(default, float) and type(found) is int:
        found = float(found)
    number = default is None and type(found) in (int, float)
    if type(found) is not type(default) and not number:
        common.fail(f"--{name} takes {KINDS[type(default)]} (default {default!r}), not {value!r}")
    if name == "data":
        common.check(found or not default, "--data is empty: give toy, fineweb_edu, climbmix or a "
                     "folder of texts")
    if name == "data" and found:
        found = pipeline.whole_path(found)
    check_range(name, found, default)
    return found

def check_range(name, value, default):
    """Failure where the value of a setting that several scripts have makes no sense."""
    key = name.rpartition(".")[2]
    if key in CHOICES:
        choices = CHOICES[key]
        common.check(str(value) in choices, f"--{name} must be one of {', '.join(choices)}, not "
                     f"{value!r}")
    if key == "tag":
        sound = re.fullmatch(r"([\w-][\w.-]*)?", value, re.ASCII) and ".old-" not in value
        common.check(sound, f"--{name} must be of letters, digits, -, _ and . only, without . at "
                     f"its start and without .old- in it, not {value!r}")
    if value is None or value == default == -1:
        return
    if key in LEAST:
        sound = type(value) is int and value >= LEAST[key]
        common.check(sound, f"--{name} must be a whole number of at least {LEAST[key]}, not "
                     f"{value!r}")
    if key in NUMBERS:
        low, high = NUMBERS[key]
        allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        common.check(low <= value <= high, f"--{name} must be {allowed}, not {value!r}")

def split(argument):
    """An argument as (name, value).
    example: "--mid-eval.max-items=8" -> ("mid-eval.max_items", "8")"""
    common.check(argument.startswith("--"), f"cannot read the argument {argument!r}: write "
                 "--key=value, or the name of a .py file of assignments")
    common.check("=" in argument, f"{argument} needs a value: write {argument}=VALUE (a switch is "
                 f"{argument}=True)")
    name, _, value = argument[2:].partition("=")
    part, dot, key = name.rpartition(".")
    return part + dot + key.replace("-", "_"), value

def suggestion(name, names):
    """example: ("lr", ["matrix_lr", "depth"]) -> "did you mean --matrix_lr?"; without a name that
    is close it says where all are listed"""
    name = name.lower()
    found = [other for other in dict.fromkeys(names) if other.endswith(f"_{name}")]
    found = found or difflib.get_close_matches(name, names, n=1)
    if not found:
        return "--help lists all of them"
    return f"did you mean {' or '.join('--' + other for other in found)}?"

def read_settings_file(path):
    """{name: value} of a file of assignments. Failure where it cannot be run."""
    common.check(os.path.exists(path), f"no such settings file: {path}")
    try:
        found = runpy.run_path(path)
    except SyntaxError as e:
        common.fail(f"{path}, line {e.lineno}: {e.msg}")
    except Exception as e:  # noqa: BLE001  (whatever its lines may raise)
        common.fail(f"{path} cannot be run: {type(e).__name__}: {e}")
    return {name: value for name, value in found.items() if not (name.startswith("_")
            or callable(value) or isinstance(value, types.ModuleType))}

# -------------------------------------------------------------------------------------------------
# a script's own call

def configure(module_globals, short=(), of_phases=False):
    """
    Applies sys.argv to the settings in `module_globals` (a script's globals()) -> Settings.
    short: {"-p": "prompt"}, settings that may be given as two words; of_phases: whether settings of
    other phases (--sft.mixture=...) are taken, too. Failure for an unknown key or a wrong type;
    prints all settings for --help and ends the process with 0.
    """
    table = declared(module_globals["__file__"])
    values = {name: setting.default for name, setting in table.items()}
    settings = Settings()
    settings.of_phases = {}

    words = iter(sys.argv[1:])
    for word in words:
        if word in ("--help", "-h"):
            print_help(module_globals["__doc__"], table)
            sys.exit(0)
        if word in short:
            given = {short[word]: next(words, None)}
            common.check(given[short[word]] is not None, f"{word} needs a {short[word]}")
        elif word.endswith(".py") and not word.startswith("-"):
            given = read_settings_file(word)
        else:
            given = dict([split(word)])
        for name, value in given.items():
            if of_phases and "." in name:
                settings.of_phases[name] = value
                continue
            common.check(name in table, f"unknown setting {name!r} in {word}; "
                         f"{suggestion(name, table)}")
            values[name] = value
    settings.defining, settings.free = {}, {}
    for name, setting in table.items():  # an edited default is checked as an override is
        settings[name] = convert(name, values[name], setting.default)
        half = settings.defining if setting.defining else settings.free
        half[name] = settings[name]
    module_globals.update(settings)
    return settings

def print_help(doc, table):
    print(doc.strip())
    head = None
    for name, setting in sorted(table.items(), key=lambda item: item[0] in ACTIONS):
        before = head
        head = "settings"
        if not setting.defining:
            head = "settings that may change when a run is resumed"
        if name in ACTIONS:
            head = "actions of this call"
        if head != before:
            print(f"\n{head}:")
        left = f"  --{name}={setting.default!r}"
        print(f"{left:<40} {setting.comment}")

# -------------------------------------------------------------------------------------------------
# settings behind the -- of speedrun.sh, which go to every phase that has them

def accepted(phase, arguments):
    """The arguments that a phase has a setting for, those for it alone last. What other phases
    alone were given is the business of the phase "data": it brings what they read.
    example: ("rl", ["--rl.samples=4", "--seed=1", "--depth=3"]) -> ["--seed=1", "--samples=4"]"""
    known = defaults(phase.script)
    found = []
    for name, value in sorted(map(split, arguments), key=lambda pair: "." in pair[0]):
        part, _, key = name.rpartition(".")
        if part in ("", phase.name) and key in known:
            found.append(f"--{key}={value}")
        elif part and phase.name == "data":
            found.append(f"--{name}={value}")
    return found

def check_arguments(arguments):
    """Failure where an argument behind the -- fits no phase, or its value not all that have it:
    said before the first phase begins, not hours later."""
    for argument in arguments:
        name, value = split(argument)
        part, _, key = name.rpartition(".")
        flag = key in ("only", "from") or key.startswith("skip_")
        common.check(not flag, f"--{key} is a flag of speedrun.sh: put it before the --")
        common.check(key not in ("data", "depth", "tag"), f"--{key} cannot stand behind the --: "
                     "put --data and --depth before it (the tag is d<depth>)")
        known = [defaults(phase.script) for phase in pipeline.PHASES if part in ("", phase.name)]
        common.check(known, f"there is no phase {part!r} ({argument}); there are "
                     f"{', '.join(phase.name for phase in pipeline.PHASES)}")
        having = [settings for settings in known if key in settings]
        whose = f"the phase {part} has no" if part else "no phase has a"
        common.check(having, f"{whose} setting {key!r}; "
                     f"{suggestion(key, list(chain(*known)))}")
        for settings in having:
            convert(name, value, settings[key])
