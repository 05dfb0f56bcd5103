"""
Writes report/report.md: what was run, a section for each phase, and one table of scores over BASE,
MID, SFT and RL.

    python report.py --data=toy                  # of the run written last
    python report.py --data=fineweb_edu --tag=d20

Reads what the phases left behind: records, metrics, results. What is missing, failed or half done
is named as such.
"""
import contextlib
import math
import platform
import re
import statistics
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

import common
import configurator
import evaluation
import pipeline
import records
import status
import trial

data = "toy"                 # toy, fineweb_edu, climbmix or a folder
tag = ""                     # the run; empty: the one written last
settings = configurator.configure(globals()) if __name__ == "__main__" else None

TITLES = {
    "base": "Pretraining",
    "mid": "Midtraining",
    "sft": "Supervised finetuning",
    "rl": "Reinforcement learning",
}
TASKS = {
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "spellingbee": "SpellingBee",
}
CURVES = [  # kind of the metrics' line, its key, title of the curve, what is said of its end
    ("train", "loss", "training loss, nats", "- final loss: {:.4f} nats"),
    ("val", "val_bpb", "validation, bits per byte", "- validation: {:.4f} bits per byte"),
    ("train", "reward", "mean reward", "- mean reward: {:.3f}"),
    ("val", "pass@1", "held-out problems, pass@1", "- held-out pass@1: {:.3f}"),
]
GOALS = [  # what the toy world should reach after SFT and RL: title, accuracy, mean of these tasks
    ("SpellingBee", 0.9, ["spellingbee"]),
    ("word problems (toy-GSM8K)", 0.6, ["gsm8k"]),
    ("multiple choice, mean of the three", 0.6, ["mmlu", "arc_easy", "arc_challenge"]),
    ("facts, asked as never before", 0.7, ["facts"]),
]

# -------------------------------------------------------------------------------------------------
# what is known

@dataclass
class Stage:
    """What a trained stage and its evaluation have left behind."""
    name: str
    record: dict
    meta: dict
    metrics: list
    clocks: list      # the readings of the clock in them
    seconds: float    # of training
    core: dict        # results of base_eval.py and chat_eval.py; {} where they are not done,
    chat: dict        # damaged, or of weights that are gone

def gather(name, run):
    directory = pipeline.state_path(name, data, run)
    record = status.read(directory / "phase.json")
    meta = status.saved(directory)[1]
    metrics = [m for m in common.read_json_lines(directory / "metrics.jsonl") if "step" in m]
    clocks = [m["clock"] for m in metrics if isinstance(m.get("clock"), dict)]
    seconds = max(part.get("seconds", 0.0) for part in (record, *clocks[-1:]))
    core = result_of(f"core_{name}_{run}", "tasks", directory)
    chat = result_of(f"chat_{name}_{run}", "results", directory)
    return Stage(name, record, meta, metrics, clocks, seconds, core, chat)

def result_of(name, key, directory):
    """A result file of the model in `directory`, its scores under `key`."""
    path = pipeline.report_dir(data) / f"{name}.json"
    result = status.read(path)
    with contextlib.suppress(KeyError, TypeError):
        for score in result[key].values():  # half of the 95 % interval, and of the centred one
            score["half"] = (score["high"] - score["low"]) / 2
            score["centred_half"] = score["half"] / (1 - score["chance"])
        if status.describe_eval(path, directory)[0] == "done":
            return result
    return {}

def points(metrics, kind, key):
    """[(step, value)] of one curve, steps rising, each once; what is no number is left out"""
    found = {}
    for line in metrics:
        value = line.get(key)
        if line["kind"] == kind and isinstance(value, (int, float)) and math.isfinite(value):
            found[line["step"]] = value
    return sorted(found.items())

def machine():
    """The machine that writes this.  example: "Linux, 2 cores (Intel Xeon), no GPU" """
    cpu = platform.machine()
    with contextlib.suppress(OSError, TypeError):
        cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    gpus = "; ".join(trial.gpu_names()) or "no GPU"
    return f"{platform.system()}, {common.cores()} cores ({cpu}), {gpus}"

# -------------------------------------------------------------------------------------------------
# how it is shown

def guarded(function, *args):
    """The lines that `function` makes. A file damaged in a way that nobody thought of costs its own
    part only."""
    try:
        return function(*args)
    except Exception as e:  # noqa: BLE001
        return [f"This part could not be made: {type(e).__name__}: {e}", ""]

def svg(line, title):
    """[(x, y)] as a small picture; of many points means are drawn. "" for fewer than two."""
    if len(line) < 2:
        return ""
    parts = np.array_split(np.array(line), min(len(line), 300))
    xs, ys = np.array([part.mean(axis=0) for part in parts]).T
    across = np.interp(xs, [xs[0], xs[-1]], [10, 550])
    down = np.interp(ys, [ys.min(), ys.max()], [130, 22])
    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 140" width="560"
height="140" font-family="sans-serif" font-size="11" fill="#555">
<rect width="100%" height="100%" fill="#fff"/>
<polyline fill="none" stroke="#2a6fbb" stroke-width="1.5" points="{curve}"/>
<text x="10" y="14">{title}, {ys.min():.3g} to {ys.max():.3g}; steps {xs[0]:,.0f} to {xs[-1]:,.0f}
</text>
</svg>
"""

def markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]

def aligned(rows):
    """The same for a terminal, the columns under each other."""
    return "\n".join(f"{name:<44}" + "".join(f"{cell:<17}" for cell in cells)
                     for name, *cells in rows)

# -------------------------------------------------------------------------------------------------
# the parts of the report

def head(stages):
    tokenizer = status.read(pipeline.state_path("tok", data) / "phase.json")
    ratios = tokenizer.get("bytes_per_token", {}).items()
    ratios = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios)
    tokens = sum(stage.meta.get("tokens", 0) for stage in stages)
    parameters = stages[0].record.get("parameters", 0)
    commit = records.source_version()[0][:12]
    return [
        f"- written {time.strftime('%Y-%m-%d %H:%M')} on {platform.node()}: {machine()}",
        f"- torch {metadata.version('torch')}, Python {platform.python_version()}, commit {commit}",
        f"- data set `{data}`, state in `{pipeline.data_root(data)}`",
        f"- tokenizer of {tokenizer.get('vocab_size', '?')} tokens; bytes per token: {ratios}",
        f"- parameters: {parameters:,}; tokens trained on: {tokens:,}",
        "",
    ]

def section(stage, states, folder):
    """The lines on one stage; its curves go into `folder` as files: GitHub shows no SVG inside
    Markdown."""
    script = pipeline.find_phase(stage.name).script
    state, words = states[stage.name]
    lines = [f"## {TITLES[stage.name]}", ""]
    if state == "absent":
        return [*lines, f"**Never ran** (`{script}`).", ""]
    record, meta = stage.record, stage.meta
    steps = f"{meta['step']:,} of {meta['num_steps']:,}" if meta else "0"
    said = f"**{words}**"
    if ended := {"interrupted": "Half done", "failed": "Failed"}.get(record.get("status")):
        said = f"**{ended}**: {record['reason']}, step {steps}"
    lines += [f"{said} (`{script}`).", ""]
    if ended:
        lines.append(f"- to go on: `{record['next']}`")
    lines.append(f"- time: {common.duration(stage.seconds)} of training; steps: {steps}")
    for kind, key, title, end in CURVES:
        line = points(stage.metrics, kind, key)
        if not line or (stage.name, key) == ("rl", "loss"):
            continue
        lines.append(end.format(line[-1][1]))
        if picture := svg(line, f"{stage.name}: {title}"):
            file = f"{stage.name}_{key.replace('@', '_')}.svg"
            common.atomic_write(folder / file, picture)
            lines.append(f"  ![{stage.name}: {title}]({file})")
    if stage.clocks:
        speed = statistics.median(clock["tokens_per_second"] for clock in stage.clocks)
        lines.append(f"- speed: {speed:,.0f} tokens/s (median)")
    lines.append(f"- evaluation: {states[f'{stage.name}-eval'][1]}")
    if "host" in record:  # neither damaged nor adopted
        lines += started(script, record)
    return [*lines, ""]

def started(script, record):
    """Lines on where and with what a phase was started."""
    chosen = ", ".join(f"{name} {value}" for name, value in record.get("chosen", {}).items())
    job = f", Slurm job {record['job']}" if record.get("job") else ""
    changes = " with changes" if record["difference"] else ""
    used = {**record["free"], **record["settings"]}
    usual = configurator.defaults(script)
    quiet = ("data", "tag", "mixture", "start_over", "try_out")
    changed = [f"`{key}={value}` ({usual[key]})" for key, value in used.items()
               if key in usual and value != usual[key] and key not in quiet]
    lines = [f"- starts: {len(record['starts'])}, the last on {record['host']}{job}",
             f"- commit {record['commit'][:12]}{changes}; computed in {chosen}"]
    if changed:
        lines.append(f"- settings changed, defaults in brackets: {', '.join(changed)}")
    if "mixture" in used:
        lines += mixture_changes(usual["mixture"], used["mixture"])
    return lines

def mixture_changes(usual, used):
    """How a mixture differs from the script's: lines that name each entry taken out, replaced or
    put in.  example: (["a"], ["c"]) -> ["- taken out of the mixture: `a`", "- put into ..."]"""
    def by_name(entries):
        return {re.sub(r"[*:]\d.*", "", entry): entry for entry in entries}
    before, after = by_name(usual), by_name(used)
    out = [entry for name, entry in before.items() if name not in after]
    new = [entry for name, entry in after.items() if name not in before]
    other = [f"{entry} -> {after[name]}" for name, entry in before.items()
             if after.get(name, entry) != entry]
    listed = {
        "taken out of the mixture": out,
        "put into the mixture" + " in their place" * bool(out): new,
        "in another amount in the mixture": other,
    }
    return [f"- {words}: " + ", ".join(f"`{entry}`" for entry in entries)
            for words, entries in listed.items() if entries]

def core_section(core):
    """CORE's tasks and the samples of base_eval.py."""
    rows = [["CORE task", "accuracy", "centred", "items"]]
    for name, score in core["tasks"].items():
        rows.append([name, f"{score['accuracy']:.4f}", f"{score['centred']:+.4f}",
                     f"{score['n']}"])
    lines = markdown(rows)
    lines += ["Samples, the model's part behind the bar:", "", "```text"]
    for sample in core["samples"]:
        text = f"{sample['prompt']}|{sample['text']}".replace("\n", "\\n")
        lines.append(text.replace("`", "'")[:200])
    return [*lines, "```", ""]

# -------------------------------------------------------------------------------------------------
# the table of scores

def cell(value, halves, digits):
    """A score: the mean of results with these halves of intervals, whose errors add in squares.
    examples: (0.25, [0.01], 3) -> "0.250 ±0.010";  (None, [], 3) -> "-" """
    if value is None:
        return "-"
    return f"{value:.{digits}f} ±{math.hypot(*halves) / len(halves):.{digits}f}"

def in_part(core):
    """Why a result of base_eval.py is not the whole CORE, "" where it is."""
    if core and core["core"] is None:
        return core.get("reason") or "not all of its tasks were measured"
    parts = evaluation.parts(data, core.get("tasks", {}))
    return ", ".join(f"{task} {n} items" for task, n in parts.items())

def table(stages):
    """The rows of the final table, its head first: [name, BASE, MID, SFT, RL] as texts"""
    prefix = "toy-" if data == "toy" else ""
    core = stages[0].core
    name, key = f"{prefix}CORE", "core"
    if in_part(core):
        name, key = f"{prefix}CORE in part", "mean_centred"
    halves = [score["centred_half"] for score in core.get("tasks", {}).values()]
    rows = [["", "BASE", "MID", "SFT", "RL"]]
    rows.append([name, cell(core.get(key), halves, 4), "-", "-", "-"])
    results = [stage.chat.get("results", {}) for stage in stages]
    parts = [evaluation.parts(data, result) for result in results]
    shown = {**TASKS, "facts": "Facts"} if data == "toy" else TASKS
    for task, title in shown.items():
        of = dict.fromkeys(part[task] for part in parts if task in part)
        row = [", ".join([prefix + title, *of])]
        for result in results:
            score = result.get(task, {})
            row.append(cell(score.get("accuracy"), [score.get("half")], 3))
        rows.append(row)
    row = [f"{prefix}ChatCORE in part" if any(parts) else f"{prefix}ChatCORE"]
    for stage, result in zip(stages, results):
        halves = [result[task]["centred_half"] for task in TASKS if task in result]
        row.append(cell(stage.chat.get("chatcore"), halves, 4))
    return [*rows, row]

def goals(sft, rl):
    """GOALS judged by the results of chat_eval.py after SFT and RL ({} for none):
    rows [goal, after SFT, reached, after RL, reached] as texts"""
    def accuracy(chat, tasks):
        results = chat.get("results", {})
        if not {*tasks} <= results.keys():
            return None
        return statistics.fmean(results[task]["accuracy"] for task in tasks)

    def judged(value, needed):
        if value is None:
            return ["-", "-"]
        return [f"{value:.3f}", "yes" if value >= needed - 1e-9 else "NO"]

    rows = []
    for goal, needed, tasks in GOALS:
        row = [f"{goal}: {needed}"]
        for chat in (sft, rl):
            row += judged(accuracy(chat, tasks), needed)
        rows.append(row)
    before, after = accuracy(sft, ["gsm8k"]), accuracy(rl, ["gsm8k"])
    change, reached = "-", "-"
    if None not in (before, after):
        words, reached = judged(after, min(0.95, before + 0.05))
        change = f"{before:.3f} to {words}"
    return [*rows, ["RL raises word problems by 0.05, or to 0.95", change, reached, "", ""]]

# -------------------------------------------------------------------------------------------------

def main():
    status.check_folder(data)
    folder, runs = pipeline.report_dir(data), status.tags(data)
    run = tag or (runs or ["no model yet"])[-1]
    states = status.phases_of(data, run)
    stages = [gather(name, run) for name in pipeline.STAGES]
    lines = [f"# Report: {data}, {run}", "", *guarded(head, stages)]
    notes = [f"not done: {name}: {words}" for name, (state, words) in states.items()
             if state != "done"]
    total = 0.0
    for stage in stages:
        total += stage.seconds + stage.core.get("seconds", 0.0) + stage.chat.get("seconds", 0.0)
        lines += guarded(section, stage, states, folder)
        if stage.core:
            lines += guarded(core_section, stage.core)
        if missing := stage.chat.get("missing"):
            notes.append(f"{stage.name}: no ChatCORE, since {', '.join(missing)} was not measured")
    if why := in_part(stages[0].core):
        notes.append(f"CORE in part: {why}")
    if len(runs) > 1:
        notes.append(f"more than one run is here (--tag=...): {', '.join(runs)}")
    notes.append(f"Total time: {common.duration(total)} of training and evaluation")
    notes.append(f"Next: `{status.next_command(states, data, run)}`")

    rows = table(stages)
    lines += ["## Scores", "", *markdown(rows)]
    lines += ["± is half of the 95 % confidence interval; - was not measured.", ""]
    lines += [f"- {note}" for note in notes]
    shown = aligned(rows)
    if data == "toy":
        rows = [["goal", "SFT", "reached", "RL", "reached"],
                *goals(stages[2].chat, stages[3].chat)]
        lines += ["", "## Goals", "", *markdown(rows)]
        shown += "\n\n" + aligned(rows)
    try:
        common.atomic_write(folder / "report.md", "\n".join(lines) + "\n")
    except OSError as e:
        common.fail(f"could not write {folder / 'report.md'}: {e}", code=1)
    print("\n".join([shown, "", *notes, f"report: {folder / 'report.md'}"]))

if __name__ == "__main__":
    main()
