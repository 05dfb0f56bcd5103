"""
Writes report/report.md: what was run, a section for each phase, and one table of scores over BASE,
MID, SFT and RL.

    python report.py --data=toy                  # of the run written last
    python report.py --data=fineweb_edu --tag=d20

Reads what the phases left behind: records, metrics, results. What is missing, failed or half done
is named as such.
"""
import contextlib
import html
import math
import os
import platform
import re
import statistics
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import common
import configurator
import pipeline
import records
import scores
import status

data = "toy"                 # toy, fineweb_edu, climbmix or a folder
tag = ""                     # the run; empty: the one written last
settings = configurator.configure(globals()) if __name__ == "__main__" else None

TITLES = {"base": "Pretraining", "mid": "Midtraining", "sft": "Supervised finetuning",
          "rl": "Reinforcement learning"}
SCORES = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "mmlu": "MMLU",
          "gsm8k": "GSM8K", "humaneval": "HumanEval", "spellingbee": "SpellingBee",
          "facts": "Facts"}
# kind of the metrics' line, its key, title
CURVES = [("train", "loss", "training loss, nats"), ("val", "val_bpb", "validation, bits per byte"),
          ("train", "reward", "mean reward"), ("val", "pass@1", "held-out problems, pass@1")]
# what the toy world should reach after SFT and RL: title, accuracy, mean of these tasks
GOALS = [("SpellingBee", 0.9, ["spellingbee"]), ("word problems (toy-GSM8K)", 0.6, ["gsm8k"]),
         ("multiple choice, mean of the three", 0.6, ["mmlu", "arc_easy", "arc_challenge"]),
         ("facts, asked as never before", 0.7, ["facts"])]

# -------------------------------------------------------------------------------------------------
# small helpers

def number(x):
    """x as a float if it is a finite number, else None.
    examples: 3 -> 3.0, "3" -> None, nan -> None, True -> None"""
    usable = isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
    return float(x) if usable else None

def show(x, digits=4):
    """examples: (0.25, 3) -> "0.250", (None, 3) -> "-" """
    return "-" if number(x) is None else f"{x:.{digits}f}"

def guarded(function, *args):
    """The lines that `function` makes. A file damaged in a way that nobody thought of costs its own
    part only."""
    try:
        return function(*args)
    except Exception as e:  # noqa: BLE001
        return [f"This part could not be made: {type(e).__name__}: {e}", ""]

def points(metrics, kind, key):
    """[(step, value)] of one curve, steps rising, each once"""
    found = {m["step"]: number(m.get(key)) for m in metrics if m.get("kind") == kind}
    return sorted((step, value) for step, value in found.items() if value is not None)

def svg(line, title, width=560, height=150, bins=300):
    """[(x, y)] as a small picture; more points than `bins` are averaged. "" for fewer than two."""
    if len(line) < 2:
        return ""
    size = -(-len(line) // bins)
    parts = [line[i:i + size] for i in range(0, len(line), size)]
    xs = [part[-1][0] for part in parts]
    ys = [statistics.fmean(y for _, y in part) for part in parts]
    low, high = min(ys), max(ys)
    across = [55 + (width - 65) * (x - xs[0]) / max(xs[-1] - xs[0], 1) for x in xs]
    down = [22 + (height - 42) * (high - y) / ((high - low) or 1) for y in ys]
    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down))

    def text(x, y, words, anchor="start"):
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(words)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="11" fill="#555">'
        '<rect width="100%" height="100%" fill="#fff"/>'
        f'<polyline fill="none" stroke="#2a6fbb" stroke-width="1.5" points="{curve}"/>'
        + text(55, 14, title) + text(50, 27, f"{high:.3g}", "end")
        + text(50, height - 18, f"{low:.3g}", "end")
        + text(55, height - 4, f"step {line[0][0]:,}")
        + text(width - 10, height - 4, f"step {line[-1][0]:,}", "end") + "</svg>\n")

def aligned(rows):
    """Rows of cells as text whose columns stand under each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)

def markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]

def mixture_changes(usual, used):
    """How a mixture differs from the script's: lines that name each entry taken out, replaced or
    put in.  example: (["a"], ["c"]) -> ["- taken out of the mixture: `a`", "- put into ..."]"""
    def by_name(entries):
        return {re.split(r"[*:]\d", entry)[0]: entry for entry in entries}
    before, after = by_name(usual), by_name(used)
    out = [before[name] for name in before if name not in after]
    new = [after[name] for name in after if name not in before]
    other = [f"{before[name]} -> {after[name]}" for name in before
             if name in after and before[name] != after[name]]
    put_in = "put into the mixture in their place" if out else "put into the mixture"
    listed = [("taken out of the mixture", out), (put_in, new),
              ("in another amount in the mixture", other)]
    return [f"- {words}: {', '.join(f'`{entry}`' for entry in entries)}"
            for words, entries in listed if entries]

def changed_settings(script, record):
    """Lines on the settings of a phase that are not the script's defaults."""
    used = {**(record.get("free") or {}), **(record.get("settings") or {})}
    usual = configurator.defaults(script)
    quiet = ("data", "tag", "mixture", "start_over", "try_out")
    other = [f"`{key}={value}` ({usual[key]})" for key, value in used.items()
             if key in usual and value != usual[key] and key not in quiet]
    lines = [f"- settings changed, defaults in brackets: {', '.join(other)}"] if other else []
    if "mixture" in used and "mixture" in usual:
        lines += mixture_changes(usual["mixture"], used["mixture"])
    return lines

# -------------------------------------------------------------------------------------------------
# what is known

@dataclass
class Stage:
    """Everything that is known about a trained stage and its evaluation."""
    name: str
    record: dict
    meta: dict
    metrics: list
    seconds: float      # of training
    speeds: list        # tokens per second
    status: tuple       # (state, words)
    eval_status: tuple
    core: dict          # results of base_eval.py and chat_eval.py; {} where they are not done, or
    chat: dict          # of weights that are gone

def result_of(kind, name, run):
    """The result of an evaluation; {} where it is not done, or of weights that are gone."""
    path = pipeline.report_dir(data) / f"{kind}_{name}_{run}.json"
    state, _ = status.describe_eval(path, pipeline.state_path(name, data, run))
    result = status.read(path) if state == "done" else {}
    tasks = result.get("results") or {}
    return result if all(isinstance(r, dict) for r in tasks.values()) else {}

def gather(name, run):
    directory = pipeline.state_path(name, data, run)
    record = status.read(directory / "phase.json")
    meta = status.saved(directory)[1]
    metrics = [m for m in common.read_json_lines(directory / "metrics.jsonl")
               if isinstance(m.get("step"), int)]
    clocks = [m["clock"] for m in metrics if isinstance(m.get("clock"), dict)]
    seconds = [number(x.get("seconds")) or 0.0 for x in (record, meta, *clocks[-1:])]
    speeds = [number(clock.get("tokens_per_second")) for clock in clocks]
    evaluated = status.describe_eval(pipeline.state_path(f"{name}-eval", data, run), directory)
    return Stage(name, record, meta, metrics, max(seconds), [s for s in speeds if s],
                 status.describe(directory), evaluated, result_of("core", name, run),
                 result_of("chat", name, run))

def machine():
    """The machine that writes this.  example: "Linux, 2 cores (...), 8 GB of memory, no GPU" """
    cpu, memory, gpus = platform.processor() or platform.machine(), "?", ""
    with contextlib.suppress(OSError, TypeError):
        cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = f"{size / 2 ** 30:.0f}"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        gpus = "; ".join(asked.stdout.strip().split("\n"))
    return (f"{platform.system()}, {os.cpu_count()} cores ({cpu}), {memory} GB of memory, "
            f"{gpus or 'no GPU'}")

# -------------------------------------------------------------------------------------------------
# the parts of the report

def head(stages, total):
    tok = status.read(pipeline.state_path("tok", data) / "phase.json")
    tokens = sum(number(stage.meta.get("tokens")) or 0 for stage in stages)
    parameters = number(stages[0].record.get("parameters"))
    ratios = (tok.get("bytes_per_token") or {}).items()
    ratios = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios)
    torch = next((d.version for d in metadata.distributions(name="torch")), "(none)")
    commit = records.source_version()[0][:12]
    size = f"{parameters:,.0f}" if parameters else "?"
    return [f"- written {time.strftime('%Y-%m-%d %H:%M')} on {platform.node()}: {machine()}",
            f"- torch {torch}, Python {platform.python_version()}, commit {commit}",
            f"- data set `{data}`, state in `{pipeline.data_root(data)}`",
            f"- tokenizer of {tok.get('vocab_size', '?')} tokens; bytes per token: {ratios or '?'}",
            f"- parameters: {size}; tokens trained on: {tokens:,.0f}",
            f"- time in training and evaluation: {common.duration(total)}", ""]

def section(stage, folder):
    """The lines on one stage; its curves go into `folder` as files: GitHub shows no SVG inside
    Markdown."""
    script, (state, words) = pipeline.find_phase(stage.name).script, stage.status
    lines = [f"## {TITLES[stage.name]}", ""]
    if state == "absent":
        return [*lines, f"**Never ran** (`{script}`).", ""]
    record, meta = stage.record, stage.meta
    where = f", step {meta.get('step', 0):,} of {meta.get('num_steps', 0):,}" if meta else ""
    said = f": {words}"
    if record.get("status") in ("interrupted", "failed"):
        said = f": {record.get('reason')}{where}"
    if state == "done":
        said = where
    title = {"half": "Half done"}.get(state, state.capitalize())
    lines += [f"**{title}**{said} (`{script}`).", ""]
    if state in ("half", "failed") and record.get("next"):
        lines.append(f"- to go on: `{record['next']}`")
    starts = len(record.get("starts") or []) or "?"
    facts = [("time", f"{common.duration(stage.seconds)} of training; starts: {starts}")]
    facts += curve_ends(stage)
    if stage.speeds:
        facts.append(("speed", f"{statistics.median(stage.speeds):,.0f} tokens/s (median)"))
    if record.get("chosen"):
        facts.append(("computed in", ", ".join(f"{k} {v}" for k, v in record["chosen"].items())))
    place = [record.get("host", "?")]
    place += [f"Slurm job {record['job']}"] if record.get("job") else []
    place.append(f"commit {str(record.get('commit', '?'))[:12]}"
                 + (" with changes" if record.get("difference") else ""))
    facts.append(("ran on", ", ".join(place)))
    facts.append(("evaluation", stage.eval_status[1]))
    lines += [f"- {name}: {value}" for name, value in facts]
    lines += [*guarded(changed_settings, script, record), ""]
    for kind, key, name in CURVES:
        picture = svg(points(stage.metrics, kind, key), f"{stage.name}: {name}")
        if picture and not (stage.name == "rl" and key == "loss"):
            file = f"{stage.name}_{re.sub('[^a-z0-9]+', '_', key)}.svg"
            common.atomic_write(folder / file, picture)
            lines += [f"![{stage.name}: {name}]({file})", ""]
    return lines

def curve_ends(stage):
    """[(name, where a curve has ended)]"""
    facts, metrics = [], stage.metrics
    steps = [m["step"] + 1 for m in metrics if m.get("kind") == "train"]
    if steps:
        of = f" of {stage.meta['num_steps']:,}" if "num_steps" in stage.meta else ""
        facts.append(("steps", f"{max(steps):,}{of}"))
    losses = points(metrics, "train", "loss")
    if losses and stage.name != "rl":
        facts.append(("final loss", f"{losses[-1][1]:.4f} nats"))
    for _, bpb in points(metrics, "val", "val_bpb")[-1:]:
        facts.append(("validation", f"{bpb:.4f} bits per byte"))
    for _, reward in points(metrics, "train", "reward")[-1:]:
        facts.append(("mean reward", f"{reward:.3f}"))
    passes = points(metrics, "val", "pass@1")
    if passes:
        ends = sorted({passes[0], passes[-1]})
        facts.append(("held-out pass@1", ", ".join(f"{v:.3f} at step {n:,}" for n, v in ends)))
    return facts

def core_section(core):
    """CORE's tasks and the samples of base_eval.py."""
    rows = [[name, show(r.get("accuracy")), f"{r.get('centred', 0):+.4f}", str(r.get("n", "?"))]
            for name, r in (core.get("tasks") or {}).items()]
    lines = markdown([["CORE task", "accuracy", "centred", "items"], *rows]) if rows else []
    if core and core.get("core") is None:
        reason = core.get("reason") or "not all of its tasks were measured"
        lines += [f"No CORE: {reason}; mean of what was: {show(core.get('mean_centred'))}.", ""]
    if core.get("samples"):
        said = [f"{x['prompt']}|{x['text']}".replace("\n", "\\n").replace("`", "'")[:200]
                for x in core["samples"]]
        lines += ["Samples, the model's part behind the bar:", "", "```text", *said, "```", ""]
    return lines

# -------------------------------------------------------------------------------------------------
# the table of scores

def interval(results):
    """Half of the 95 % interval of one result, or of the mean of several centred ones (errors add
    in squares); None where something is missing."""
    with contextlib.suppress(KeyError, TypeError, ZeroDivisionError):
        halves = [(r["high"] - r["low"]) / 2 / (1 - r["chance"]) for r in results]
        return math.sqrt(sum(half * half for half in halves)) / len(halves)
    return None

def cell(value, half, digits):
    """examples: (0.25, 0.01, 3) -> "0.250 ±0.010";  (None, None, 3) -> "-" """
    if number(value) is None or not half:
        return show(value, digits)
    return f"{value:.{digits}f} ±{half:.{digits}f}"

def table(stages):
    """The rows of the final table, its head first: [name, BASE, MID, SFT, RL] as texts"""
    prefix = "toy-" if data == "toy" else ""
    core, chats = stages[0].core, [stage.chat for stage in stages]
    tasks = core.get("tasks") or {}
    in_part = bool(core) and (core.get("core") is None or bool(scores.parts(data, tasks)))
    value = core.get("mean_centred" if in_part else "core")
    rows = [["", *(stage.name.upper() for stage in stages)],
            [f"{prefix}CORE" + " in part" * in_part, cell(value, interval(tasks.values()), 4),
             "-", "-", "-"]]
    for name, shown in SCORES.items():
        if name == "facts" and data != "toy":
            continue
        found = [(chat.get("results") or {}).get(name) or {} for chat in chats]
        parts = [scores.parts(data, {name: result}).get(name, "all") for result in found if result]
        of = " / ".join(dict.fromkeys(parts))
        title = prefix + shown + (f", {of}" if set(parts) - {"all"} else "")
        # of an accuracy the interval is not centred
        cells = [cell(result.get("accuracy"), interval([{**result, "chance": 0}]), 3)
                 for result in found]
        rows.append([title, *cells])
    cells, in_part = [], False
    for chat in chats:
        results = chat.get("results") or {}
        in_part = in_part or bool(scores.parts(data, results))
        parts = [r for name, r in results.items() if name in SCORES and name != "facts"]
        cells.append(cell(chat.get("chatcore"), interval(parts), 4))
    rows.append([f"{prefix}ChatCORE" + " in part" * in_part, *cells])
    return rows

def goals(sft, rl):
    """GOALS judged by the results of chat_eval.py after SFT and RL ({} for none):
    rows [goal, after SFT, reached, after RL, reached] as texts"""
    def mean(chat, names):
        results = chat.get("results") or {}
        values = [number((results.get(name) or {}).get("accuracy")) for name in names]
        return None if None in values else statistics.fmean(values)

    def reached(value, needed):
        if None in (value, needed):
            return "-"
        return "yes" if value >= needed - 1e-9 else "NO"

    rows = []
    for goal, needed, names in GOALS:
        row = [f"{goal}: {needed}"]
        for value in (mean(sft, names), mean(rl, names)):
            row += [show(value, 3), reached(value, needed)]
        rows.append(row)
    before, after = mean(sft, ["gsm8k"]), mean(rl, ["gsm8k"])
    needed = None if before is None else min(0.95, before + 0.05)
    return [*rows, ["RL raises word problems by 0.05, or to 0.95",
                    f"{show(before, 3)} to {show(after, 3)}", reached(after, needed), "", ""]]

def main():
    root = pipeline.data_root(data)
    known = root.is_dir() or not pipeline.is_folder_data(data)
    common.check(known, f"nothing was ever trained on {data}: there is no {root}")
    folder, runs = pipeline.report_dir(data), status.tags(data)
    run = tag or (runs or ["no model yet"])[-1]
    stages = [gather(name, run) for name in pipeline.STAGES]
    results = [result for stage in stages for result in (stage.core, stage.chat)]
    total = sum(stage.seconds for stage in stages)
    total += sum(number(result.get("seconds")) or 0 for result in results)

    lines = [f"# Report: {data}, {run}", "", *guarded(head, stages, total)]
    for stage in stages:
        lines += guarded(section, stage, folder)
        if stage.name == "base":
            lines += guarded(core_section, stage.core)
    states = status.phases_of(data, run)
    left = [f"{name}: {words}" for name, (state, words) in states.items() if state != "done"]
    if left:
        command = status.next_command(states, data, run)
        lines += ["## Not done", "", *(f"- {x}" for x in left), "", f"Next: `{command}`", ""]

    core = stages[0].core
    short = ", ".join(f"{task} {n} items"
                      for task, n in scores.parts(data, core.get("tasks") or {}).items())
    notes = [f"{stage.name}: no ChatCORE, since {', '.join(stage.chat['missing'])} was not "
             "measured" for stage in stages if stage.chat.get("missing")]
    if core and (core.get("reason") or short):
        notes.append(f"CORE in part: {core.get('reason') or short}")
    if len(runs) > 1:
        others = ", ".join(other for other in runs if other != run)
        notes.append(f"more runs are here: {others} (--tag=...)")
    rows = table(stages)
    shown = aligned(rows)
    explained = "± is half of the 95 % confidence interval; - was not measured."
    listed = [*(f"- {note}" for note in notes), ""] if notes else []
    lines += ["## Scores", "", *markdown(rows), explained, "", *listed,
              f"Total time: {common.duration(total)}", ""]
    if data == "toy":
        judged = [["goal", "SFT", "reached", "RL", "reached"],
                  *goals(stages[2].chat, stages[3].chat)]
        lines += ["## Goals", "", *markdown(judged)]
        shown += "\n\n" + aligned(judged)
    try:
        common.atomic_write(folder / "report.md", "\n".join(lines))
    except OSError as e:
        common.fail(f"could not write {folder / 'report.md'}: {e}", code=1)
    print("\n".join([shown, "", *(f"not done: {x}" for x in left), *notes]))
    print(f"total time of training and evaluation: {common.duration(total)}")
    print(f"report: {folder / 'report.md'}")

if __name__ == "__main__":
    main()
