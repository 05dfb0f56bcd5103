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
import difflib
import os
import re
import runpy
import sys
import traceback
import types
import warnings
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import common
import pipeline

ACTIONS = ("start_over", "rewind", "try_out", "check")  # for one call, no settings of a run
MARKER = "# ---- settings below may change at every resume"
KINDS = {type(None): "a number or None", int: "a whole number", float: "a number",
         bool: "True or False", str: "a text", list: "a list"}

# {setting: (least, most)} of every number in every script (a test holds them against this table;
# --help shows them). None, and -1 where it is the default, stand for "not given".
WHOLE, ROWS, RATE = (0, 10 ** 15), (1, 2 ** 20), (1e-9, 1000)
COUNT, STEPS = (1, 10 ** 9), (0, 10 ** 9)
RANGES = {
    "seed": (0, 2 ** 63 - 1), "threads": (0, 1024), "workers": (0, 1024), "keep": (1, 10 ** 6),
    # the model: a vocabulary is 256 bytes, 9 special tokens and a merge or more
    "depth": (1, 999), "aspect_ratio": (1, 8192), "max_seq_len": (16, 2 ** 20),
    "vocab_size": (266, 2 ** 20 - 1), "bigram_vocab_size": (0, 2 ** 24),
    # how much
    "num_steps": COUNT, "max_steps": COUNT, "rewind": COUNT,
    "total_batch_size": (1, 2 ** 31),
    "tokens_per_param": (1e-6, 10 ** 6), "target_flops": (1, 1e26), "size": (0.001, 1000),
    "shards": (0, 10 ** 6), "max_chars": (1, 10 ** 15), "doc_cap": (1, 10 ** 15),
    "problems_per_step": (1, 10 ** 6), "samples": (2, 10 ** 4), "eval_samples": (1, 10 ** 4),
    "eval_problems": COUNT, "max_items": COUNT, "core_items": STEPS,
    "eval_tokens": WHOLE, "max_prompt": (2, 2 ** 20), "max_new_tokens": ROWS,
    # at once
    "device_batch_size": ROWS, "rollout_rows": ROWS, "rows": ROWS,
    "port": (0, 65535), "max_waiting": (0, 10 ** 6), "max_body": (1, 2 ** 30),
    # learning rates, as in the scripts' comments
    "matrix_lr": RATE, "embedding_lr": RATE, "unembedding_lr": RATE, "lr_fraction": RATE,
    "scalar_lr": (0, 1000), "weight_decay": (0, 100), "warmup_ratio": (0, 1),
    "warmdown_ratio": (0, 1), "final_lr_fraction": (0, 1),
    # how often, how long
    "eval_every": STEPS, "sample_every": STEPS, "max_skipped": STEPS,
    "save_minutes": (0, 10 ** 6), "time_limit": (0, 1e6), "minutes": (0.01, 10 ** 6),
    # answers
    "temperature": (0, 100), "top_k": (0, 2 ** 20),
    # the tokenizer
    "digits": (1, 2),
}
ANY = (-1e18, 1e18)  # of a setting that you add yourself
CHOICES = {"device": ("auto", "cuda", "mps", "cpu"),
           "dtype": ("auto", "bfloat16", "float16", "float32"),
           "compile": ("auto", "True", "False"), "arch": ("modern", "nanochat_2025"),
           "source": pipeline.STAGES, "stage": pipeline.STAGES, "weights": ("auto", "int8"),
           "precision": ("float32", "bfloat16"), "quant": ("q8_0", "bf16", "f32")}

class Settings(dict):
    """All settings by name. `.defining` and `.free` are its two halves; `.of_phases` what was given
    for other phases, as it was given: {"num_steps": "9", "sft.mixture": "gsm8k,arc_easy"}."""

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
            try:  # evaluated, since 2 ** 19 or 64 * depth is what people write
                values[name] = eval(ast.unparse(node.value), {}, values)
            except Exception as e:  # noqa: BLE001  (whatever it may raise)
                common.fail(f"{path}, line {node.lineno}: the setting {name} needs a plain value "
                            f"({e})")
            found[name] = Setting(values[name], comment, node.lineno <= above)
    return found

def defaults(script):
    """{setting: default} of a script of this repository."""
    return {name: found.default for name, found in declared(pipeline.REPO / script).items()}

def of_any_phase():
    """The names of all settings that some phase has."""
    return {*chain(*(defaults(phase.script) for phase in pipeline.PHASES))}

# -------------------------------------------------------------------------------------------------
# from text to values

def convert(name, value, default):
    """`value` (text from the command line, or a Python value from a file) as the type of `default`.
    Failure where it is none, or out of its range.
    examples: ("depth", "4", 20) -> 4;  ("lr", "1", 0.1) -> 1.0;  ("tasks", "a,b", []) -> ["a", "b"]
    """
    found = value
    if isinstance(value, str) and not isinstance(default, str):
        found = python_value(value)
    if isinstance(default, list) and isinstance(found, str):
        found = split_list(found)
    if isinstance(found, tuple):
        found = list(found)
    number = isinstance(default, (float, type(None))) and type(found) in (int, float)
    if type(found) is not type(default) and not number:
        common.fail(f"--{name} takes {KINDS[type(default)]} (default {default!r}), not "
                    f"{shown(value)}")
    check_value(name, found, default)
    if isinstance(default, float):
        return float(found)
    return pipeline.whole_path(found) if name == "data" and found else found

def python_value(text):
    """The value of a text that is Python, else the text.  examples: "4" -> 4;  "a" -> "a" """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parser, about odd texts
        try:
            return ast.literal_eval(text)
        except Exception:  # noqa: BLE001  (whatever the parser may raise)
            return text

def shown(value):
    """A value in a message, of any length.  example: "4" -> "'4'" """
    try:
        text = repr(value)
    except ValueError:  # Python prints no number of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"

# the endings of a user's files of conversations, which a mixture may name
CONVERSATIONS = (".jsonl", ".jsonl.gz", ".json", ".parquet")

def split_spec(spec):
    """An entry of a mixture as (name, number behind : or None, number behind * or None), in text.
    example: "my.jsonl:300*2" -> ("my.jsonl", "300", "2")"""
    numbers = r"(?::([0-9]{1,20}))?(?:\*([0-9]{1,20}))?"
    return re.fullmatch(f"(.*?){numbers}", spec, re.DOTALL).groups()

def split_list(text):
    """A text at its commas, but for those in the name of a file of conversations that is there.
    examples: "b, c*2" -> ["b", "c*2"];  "my chats, v2.jsonl*2,c" -> ["my chats, v2.jsonl*2", "c"]
    """
    def is_there(entry):
        name = split_spec(entry)[0]
        return name.endswith(CONVERSATIONS) and os.path.isfile(os.path.expanduser(name))
    pieces = text.split(",") if text else []
    entries = []
    while pieces:
        beginnings = [",".join(pieces[:n + 1]).strip() for n in range(len(pieces))]
        entries.append(next(filter(is_there, beginnings), beginnings[0]))
        del pieces[:entries[-1].count(",") + 1]
    return entries

def check_value(name, value, default):
    """Failure where a value of the right type makes no sense."""
    key = name.rpartition(".")[2]
    if key in CHOICES and not value == default == "":
        choices = CHOICES[key]
        common.check(str(value) in choices, f"--{name} must be one of {', '.join(choices)}, not "
                     f"{shown(value)}")
    if key == "tag":
        sound = re.fullmatch(r"(\w[\w.-]{0,99})?", value, re.ASCII) and ".old-" not in value
        common.check(sound, f"--{name} must be of letters, digits, -, _ and . only, at most 100, "
                     "without - or . at its start and without .old- in it, not " + shown(value))
    if key == "data":
        common.check(value or not default, f"--{name} is empty: give toy, fineweb_edu, climbmix or "
                     "a folder of texts")
    texts = value if isinstance(value, list) else [value]
    if isinstance(default, list):
        sound = all(isinstance(text, str) for text in texts)
        common.check(sound, f"--{name} takes a list of texts, not {shown(value)}")
        # a mixture may be of your own conversations alone
        common.check(value or not default or key == "mixture", f"--{name} is empty: name one or "
                     f"more, as in --{name}={','.join(default[:1])}")
    if any(isinstance(text, str) and re.search("[\0\ud800-\udfff]", text) for text in texts):
        common.fail(f"--{name} is no text: {shown(value)}")
    if type(value) in (int, float) and not value == default == -1:
        low, high = RANGES.get(key, ANY)
        whole = default is None and type(high) is int
        sound = low <= value <= high and not (whole and type(value) is float)
        common.check(sound, f"--{name} must be {range_of(key)}, not {shown(value)}")

def range_of(key):
    """example: "depth" -> "1 to 999","""
    low, high = RANGES.get(key, ANY)
    return f"{low:,} to {high:,}"

def check_together(settings):
    """Failure where settings do not go together."""
    if "max_seq_len" in settings:
        length, batch = settings["max_seq_len"], settings["total_batch_size"]
        common.check(batch == -1 or batch % length == 0, "--total_batch_size must be a multiple of "
                     f"--max_seq_len={length}, not {batch}")
    if "max_steps" in settings:
        common.check(settings["mixture"] or settings["extra_conversations"], "--mixture must not "
                     "be empty without --extra_conversations: there is nothing to learn from")
    if "problems_per_step" in settings:
        common.check(settings["temperature"] > 0, "--temperature must be more than 0: else all "
                     "samples of a problem are the same, and there is nothing to learn from")

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
    common.check(os.path.isfile(path), f"no such settings file: {path}")
    try:
        found = runpy.run_path(path)
    except SyntaxError as e:
        common.fail(f"{path}, line {e.lineno or 1}: {e.msg}")
    except (Exception, SystemExit) as e:  # noqa: BLE001  (whatever its lines may raise)
        lines = [at.lineno for at in traceback.extract_tb(e.__traceback__) if at.filename == path]
        where = f", line {lines[-1]}," if lines else ""
        common.fail(f"{path}{where} cannot be run: {type(e).__name__}: {e}")
    return {name: value for name, value in found.items() if not (name.startswith("_")
            or callable(value) or isinstance(value, types.ModuleType))}

def place_of(name, path):
    """Where a settings file assigns a name last.
    example: ("depth", "mine.py") -> "mine.py, line 3" """
    lines = [node.lineno for node in ast.walk(ast.parse(Path(path).read_bytes()))
             if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)]
    return f"{path}, line {max(lines)}" if lines else path

# -------------------------------------------------------------------------------------------------
# a script's own call

def configure(module_globals, short=(), of_phases=False):
    """
    Applies sys.argv to the settings in `module_globals` (a script's globals()) -> Settings; short
    and of_phases as in `read`. Failure where they make no sense, or the device is not there; prints
    all settings for --help and ends the process with 0.
    """
    script = module_globals["__file__"]
    exit_with_help(script)
    settings = read(script, sys.argv[1:], short, of_phases)
    check_device(settings)
    module_globals.update(settings)
    return settings

def check_device(settings):
    """Failure where the device is asked for by its name and not there."""
    if settings.get("device") in ("cuda", "mps"):
        import compute  # and torch, which takes seconds
        compute.check_device(settings["device"])

def read(script, words, short=(), of_phases=False):
    """
    The Settings of a script that is called with these words; it is not run.
    short: {"-p": "prompt"}, settings that may be given as two words; of_phases: whether settings of
    other phases (--mixture=..., --sft.mixture=...) are taken, too, as they are: check_arguments
    looks at them. Failure for an unknown key or a wrong value.
    """
    table = declared(script)
    others = of_any_phase() - {"tag"} if of_phases else set()
    values = {name: setting.default for name, setting in table.items()}
    given_in = {}
    settings = Settings()
    settings.defining, settings.free, settings.of_phases = {}, {}, {}
    words = iter(words)
    for word in words:
        if word in short:
            given = {short[word]: next(words, None)}
            common.check(given[short[word]] is not None, f"{word} needs a {short[word]}")
        elif word.endswith(".py") and not word.startswith("-"):
            given = read_settings_file(word)
        else:
            given = dict([split(word)])
        for name, value in given.items():
            key = name.rpartition(".")[2]
            if name not in table and key in others:
                settings.of_phases[name] = value
                continue
            place = shown(word) if word.startswith("-") else place_of(name, word)
            common.check(name in table, f"unknown setting {shown(name)} in {place}; "
                         f"{suggestion(key, [*table, *others])}")
            values[name] = value
            given_in[name] = word
    for name, setting in table.items():  # an edited default is checked as an override is
        try:
            settings[name] = convert(name, values[name], setting.default)
        except common.Failure as e:
            word = given_in.get(name, "-")
            common.fail(e if word.startswith("-") else f"{place_of(name, word)}: {e}")
        half = settings.defining if setting.defining else settings.free
        half[name] = settings[name]
    check_together(settings)
    return settings

def exit_with_help(script):
    """Prints what a script is for, and all its settings, and ends the process with 0, if --help is
    in its call. It is not run: Run.start asks before anything large is imported."""
    if not {"--help", "-h"} & {*sys.argv[1:]}:
        return
    print(ast.get_docstring(ast.parse(Path(script).read_bytes())) or "")
    table = declared(script)
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
        between = f" [{range_of(name)}]" if name in RANGES else ""
        print(f"{left:<40} {setting.comment}{between}")
    sys.exit(0)

# -------------------------------------------------------------------------------------------------
# settings behind the -- of speedrun.sh, which go to every phase that has them

def accepted(phase, arguments):
    """The arguments that a phase has a setting for, those for it alone last. The phase "data" is
    given those of all others, too: it brings what they read.
    example: ("rl", ["--rl.samples=4", "--seed=1", "--depth=3"]) -> ["--seed=1", "--samples=4"]"""
    known = defaults(phase.script)
    others = of_any_phase() if phase.name == "data" else set()
    found = []
    for name, value in sorted(map(split, arguments), key=lambda pair: "." in pair[0]):
        part, _, key = name.rpartition(".")
        if part in ("", phase.name) and key in known:
            found.append(f"--{key}={value}")
        elif key in others:
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
        common.check(part or key not in ACTIONS, f"--{key} needs its phase, or all of them would "
                     f"take it: write --sft.{key}={value}")
        known = [defaults(phase.script) for phase in pipeline.PHASES if part in ("", phase.name)]
        common.check(known, f"there is no phase {part!r} ({argument}); there are "
                     f"{', '.join(phase.name for phase in pipeline.PHASES)}")
        having = [settings for settings in known if key in settings]
        whose = f"the phase {part} has no" if part else "no phase has a"
        common.check(having, f"{whose} setting {key!r}; "
                     f"{suggestion(key, list(chain(*known)))}")
        for settings in having:
            convert(name, value, settings[key])

def from_here(word):
    """A setting with the files of conversations in it as seen from the repository, where phases
    run, and not from where the user stands.  example: "--sft.mixture=gsm8k,my.jsonl*2" ->
    "--sft.mixture=gsm8k,/home/me/my.jsonl*2" """
    here = os.getcwd()
    if Path(here) == pipeline.REPO:
        return word
    name, value = split(word)
    if name.rpartition(".")[2] not in ("mixture", "held_out", "extra_conversations"):
        return word
    specs = convert("mixture", value, [])
    for i, spec in enumerate(specs):
        if split_spec(spec)[0].endswith(CONVERSATIONS):
            # a whole path stays as it is
            specs[i] = os.path.join(here, os.path.expanduser(spec))
    return f"--{name}={specs if value.startswith('[') else ','.join(specs)}"
