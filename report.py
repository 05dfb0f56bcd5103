"""
Writes report/report.md: what was run, a section for each phase, and one table of scores over BASE, MID, SFT and RL.

    python report.py --data=toy                  # of the run written last
    python report.py --data=fineweb_edu --tag=d20

Reads what the phases left behind: records, metrics, results. What is missing, failed or half done is named as such.
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
from importlib import metadata

import checkpoint
import common
import configurator
import evaluation
import phase
import status

data = "toy"                 # toy, fineweb_edu, climbmix or a folder
tag = ""                     # the run; empty: the one written last
settings = configurator.configure(globals()) if __name__ == "__main__" else None

STAGES = {"base": ("base_train.py", "Pretraining"), "mid": ("mid_train.py", "Midtraining"),
          "sft": ("chat_sft.py", "Supervised finetuning"), "rl": ("chat_rl.py", "Reinforcement learning")}
SCORES = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "mmlu": "MMLU", "gsm8k": "GSM8K",
          "humaneval": "HumanEval", "spellingbee": "SpellingBee", "facts": "Facts"}
HEADS = {"done": "Done", "half": "Half done", "failed": "Failed", "running": "Running"}
CURVES = (("train", "loss", "training loss, nats"), ("val", "val_bpb", "validation, bits per byte"),
          ("train", "reward", "mean reward"), ("val", "pass@1", "held-out problems, pass@1"))

# ---------------------------------------------------------------------------------------------------------------------
# small helpers

def number(x):
    """x as a float if it is a finite number, else None.  examples: 3 -> 3.0, "3" -> None, nan -> None, True -> None"""
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) else None

def show(x, digits=4):
    """examples: (0.25, 3) -> "0.250", (None, 3) -> "-" """
    return "-" if number(x) is None else f"{x:.{digits}f}"

def guarded(function, *args):
    """The lines that `function` makes. A file damaged in a way that nobody thought of costs its own part only."""
    try:
        return function(*args)
    except Exception as e:
        return [f"This part could not be made: {type(e).__name__}: {e}", ""]

def points(metrics, kind, key):
    """[(step, value)] of one curve, steps rising, each once"""
    return sorted({m["step"]: number(m.get(key)) for m in metrics if m.get("kind") == kind and number(m.get(key)) is not None}.items())

def svg(line, title, width=560, height=150, bins=300):
    """[(x, y)] as a small picture; more points than `bins` are averaged. "" for fewer than two points."""
    if len(line) < 2:
        return ""
    size = -(-len(line) // bins)
    parts = [line[i:i + size] for i in range(0, len(line), size)]
    xs, ys = [p[-1][0] for p in parts], [statistics.fmean(y for _, y in p) for p in parts]
    low, high = min(ys), max(ys)
    across = [55 + (width - 65) * (x - xs[0]) / max(xs[-1] - xs[0], 1) for x in xs]
    down = [22 + (height - 42) * (high - y) / ((high - low) or 1) for y in ys]
    text = lambda x, y, said, at="start": f'<text x="{x}" y="{y}" text-anchor="{at}">{html.escape(said)}</text>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="11" fill="#555"><rect width="100%" height="100%" fill="#fff"/>'
            '<polyline fill="none" stroke="#2a6fbb" stroke-width="1.5" points="'
            + " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down)) + '"/>' + text(55, 14, title)
            + text(50, 27, f"{high:.3g}", "end") + text(50, height - 18, f"{low:.3g}", "end")
            + text(55, height - 4, f"step {line[0][0]:,}")
            + text(width - 10, height - 4, f"step {line[-1][0]:,}", "end") + "</svg>\n")

def aligned(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

def markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]

def mixture_changes(usual, used):
    """How a mixture differs from the script's: lines that name each entry taken out, replaced or put in.
    example: (["a"], ["c"]) -> ["- taken out of the mixture: `a`", "- put into the mixture in their place: `c`"]"""
    name = lambda entry: re.split(r"[*:]\d", entry)[0]
    before, after = {name(e): e for e in usual}, {name(e): e for e in used}
    out, new = [before[n] for n in before if n not in after], [after[n] for n in after if n not in before]
    other = [f"{before[n]} -> {after[n]}" for n in before if n in after and before[n] != after[n]]
    listed = lambda words, entries: [f"- {words}: " + ", ".join(f"`{e}`" for e in entries)] if entries else []
    return (listed("taken out of the mixture", out) + listed("put into the mixture in their place" if out else
            "put into the mixture", new) + listed("in another amount in the mixture", other))

def told(script, record):
    """Lines on the settings of a phase that are not the script's defaults."""
    used, usual = {**(record.get("free") or {}), **(record.get("settings") or {})}, configurator.defaults(common.REPO / script)
    other = [f"`{k}={v}` ({usual[k]})" for k, v in used.items()
             if k in usual and v != usual[k] and k not in ("data", "tag", "mixture", "start_over")]
    return ([f"- settings changed, defaults in brackets: {', '.join(other)}"] if other else []) + (
        mixture_changes(usual["mixture"], used["mixture"]) if "mixture" in used and "mixture" in usual else [])

def result_of(kind, stage, run):
    """The result of an evaluation; {} where there is none, it is not finished, or it is of weights that are gone."""
    path = common.eval_path(kind, stage, data, run)
    if status.describe_eval(path, common.stage_dir(stage, data, run))[0] != "done":
        return {}
    found = status.read(path)
    return found if all(isinstance(r, dict) for r in (found.get("results") or {}).values()) else {}

def gather(stage, run):
    """Everything that is known about a stage, as one dict."""
    directory = common.stage_dir(stage, data, run)
    record, meta = status.read(directory / "phase.json"), status.saved(directory)[1]
    metrics = [m for m in common.read_metrics(directory / "metrics.jsonl") if isinstance(m.get("step"), int)]
    clocks = [m["clock"] for m in metrics if isinstance(m.get("clock"), dict)]
    seconds = [number(x.get("seconds")) or 0.0 for x in (record, meta, *clocks[-1:])]
    result = common.eval_path("core" if stage == "base" else "chat", stage, data, run)
    return {"stage": stage, "directory": directory, "record": record, "meta": meta, "metrics": metrics,
            "seconds": max(seconds), "speeds": [v for c in clocks if (v := number(c.get("tokens_per_second")))],
            "status": status.describe(directory), "eval": status.describe_eval(result, directory),
            "core": result_of("core", stage, run), "chat": result_of("chat", stage, run)}

def machine():
    """The machine that writes this.  example: "Linux, 2 cores (...), 8 GB of memory, no GPU" """
    cpu, memory, gpus = platform.processor() or platform.machine(), "?", ""
    with contextlib.suppress(OSError, TypeError), open("/proc/cpuinfo") as f:
        cpu = re.search(r"model name\s*:\s*(.*)", f.read())[1]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2 ** 30:.0f}"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
                               capture_output=True, text=True, timeout=20)
        gpus = "; ".join(asked.stdout.strip().split("\n")) if asked.returncode == 0 else ""
    return f"{platform.system()}, {os.cpu_count()} cores ({cpu}), {memory} GB of memory, {gpus or 'no GPU'}"

# ---------------------------------------------------------------------------------------------------------------------
# the parts of the report

def head(run, stages, tok, total):
    tokens = sum(number(s["meta"].get("tokens")) or 0 for s in stages.values())
    parameters = number(stages["base"]["record"].get("parameters"))
    ratios = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in (tok.get("bytes_per_token") or {}).items())
    torch_version = next((d.version for d in metadata.distributions(name="torch")), "(none)")
    return [f"- written {time.strftime('%Y-%m-%d %H:%M')} on {platform.node()}: {machine()}",
            f"- torch {torch_version}, Python {platform.python_version()}, commit {phase.source_version()[0][:12]}",
            f"- data set `{data}`, state in `{common.data_root(data)}`",
            f"- tokenizer of {tok.get('vocab_size', '?')} tokens" + (f"; bytes per token: {ratios}" if ratios else ""),
            f"- parameters: {f'{parameters:,.0f}' if parameters else '?'}; tokens trained on: {tokens:,.0f}",
            f"- time in training and evaluation: {common.clock(total)}", ""]

def section(s, folder):
    """The lines on one stage; its curves go into `folder` as files, since GitHub shows no SVG inside Markdown."""
    script, title, state, words, record, meta = *STAGES[s["stage"]], *s["status"], s["record"], s["meta"]
    if state == "absent":
        return [f"## {title}", "", f"**Never ran** (`{script}`).", ""]
    steps = [m["step"] + 1 for m in s["metrics"] if m.get("kind") == "train"]
    losses, bpbs = points(s["metrics"], "train", "loss"), points(s["metrics"], "val", "val_bpb")
    rewards, passes = points(s["metrics"], "train", "reward"), points(s["metrics"], "val", "pass@1")
    chosen, rl = record.get("chosen") or {}, s["stage"] == "rl"
    where = f", step {meta.get('step', 0):,} of {meta.get('num_steps', 0):,}" if meta else ""
    why = f": {record.get('reason')}{where}" if record.get("status") in ("interrupted", "failed") else f": {words}"
    lines = [f"## {title}", "", f"**{HEADS[state]}**{where if state == 'done' else why} (`{script}`).", ""]
    lines += [f"- to go on: `{record['next']}`"] if state in ("half", "failed") and record.get("next") else []
    lines += [f"- {name}: {value}" for name, value in (
        ("time", f"{common.clock(s['seconds'])} of training; starts: {len(record.get('starts') or []) or '?'}"),
        ("steps", f"{max(steps):,}" + (f" of {meta['num_steps']:,}" if "num_steps" in meta else "") if steps else None),
        ("final loss", f"{losses[-1][1]:.4f} nats" if losses and not rl else None),
        ("validation", f"{bpbs[-1][1]:.4f} bits per byte" if bpbs else None),
        ("mean reward", f"{rewards[-1][1]:.3f}" if rewards else None),
        ("held-out pass@1", ", ".join(f"{v:.3f} at step {n:,}" for n, v in sorted({*passes[:1], *passes[-1:]}))),
        ("speed", f"{statistics.median(s['speeds']):,.0f} tokens/s (median)" if s["speeds"] else None),
        ("computed in", ", ".join(f"{k} {v}" for k, v in chosen.items()) or None),
        ("ran on", f"{record.get('host', '?')}" + (f", Slurm job {record['job']}" if record.get("job") else "")
         + f", commit {str(record.get('commit', '?'))[:12]}" + (" with changes" if record.get("difference") else "")),
        ("evaluation", s["eval"][1])) if value]
    lines += [*guarded(told, script, record), ""]
    for kind, key, name in CURVES:
        picture = "" if rl and key == "loss" else svg(points(s["metrics"], kind, key), f"{s['stage']}: {name}")
        if picture:
            file = f"{s['stage']}_{re.sub('[^a-z0-9]+', '_', key)}.svg"
            common.atomic_write(folder / file, picture)
            lines += [f"![{s['stage']}: {name}]({file})", ""]
    return lines

def core_section(core):
    """CORE's tasks and the samples of base_eval.py."""
    tasks = [[name, show(r.get("accuracy")), f"{r.get('centred', 0):+.4f}", str(r.get("n", "?"))]
             for name, r in (core.get("tasks") or {}).items()]
    lines = markdown([["CORE task", "accuracy", "centred", "items"], *tasks]) if tasks else []
    if core.get("core") is None and core:
        lines += [f"No CORE: {core.get('reason') or 'not all of its tasks were measured'}; "
                  f"mean of what was: {show(core.get('mean_centred'))}.", ""]
    if core.get("samples"):
        said = [f"{x['prompt']}|{x['text']}".replace("\n", "\\n").replace("`", "'")[:200] for x in core["samples"]]
        lines += ["Samples, the model's part behind the bar:", "", "```text", *said, "```", ""]
    return lines

def interval(results):
    """Half of the 95 % interval of one result, or of the mean of several centred ones (errors add in squares)."""
    with contextlib.suppress(KeyError, TypeError, ZeroDivisionError):  # not measured
        halves = [(number(r["high"]) - number(r["low"])) / 2 / (1 - number(r["chance"])) for r in results]
        return math.sqrt(sum(h * h for h in halves)) / len(halves)

def table(stages):
    """The rows of the final table, its head first: [name, BASE, MID, SFT, RL] as texts"""
    prefix = "toy-" if data == "toy" else ""
    core = stages[0]["core"]
    part = bool(core) and (core.get("core") is None or bool(evaluation.parts(data, core.get("tasks") or {})))
    cell = lambda value, half, digits: show(value, digits) + (f" ±{half:.{digits}f}" if half and number(value) is not None else "")
    rows = [["", *(name.upper() for name in STAGES)],
            [prefix + "CORE" + " in part" * part, *(cell(s["core"].get("mean_centred") if part else s["core"].get("core"),
                                                              interval((s["core"].get("tasks") or {}).values()), 4) for s in stages)]]
    for name, shown in SCORES.items():
        if name != "facts" or data == "toy":
            found = [(s["chat"].get("results") or {}).get(name) or {} for s in stages]
            few = dict.fromkeys(evaluation.parts(data, {name: r}).get(name, "all") for r in found if r)
            rows.append([prefix + shown + (f", {' / '.join(few)}" if set(few) - {"all"} else ""), *(cell(r.get("accuracy"), interval([{**r, "chance": 0}]), 3) for r in found)])
    rows.append([prefix + "ChatCORE" + " in part" * any(evaluation.parts(data, s["chat"].get("results") or {}) for s in stages)])
    for chat in (s["chat"] for s in stages):
        parts = [r for name, r in (chat.get("results") or {}).items() if name in SCORES and name != "facts"]
        rows[-1].append(cell(chat.get("chatcore"), interval(parts), 4))
    return rows

def goals(chat):
    """What the toy world should reach, from {stage: result of chat_eval.py or None}:
    rows [goal, after SFT, reached, after RL, reached] as texts"""
    def mean(stage, *names):
        results = (chat[stage] or {}).get("results") or {}
        values = [number((results.get(name) or {}).get("accuracy")) for name in names]
        return None if None in values else statistics.fmean(values)
    reached = lambda value, needed: "-" if value is None else "yes" if value >= needed - 1e-9 else "NO"
    rows = []
    for goal, needed, *names in (("SpellingBee", 0.9, "spellingbee"), ("word problems (toy-GSM8K)", 0.6, "gsm8k"),
                                 ("multiple choice, mean of the three", 0.6, "mmlu", "arc_easy", "arc_challenge"),
                                 ("facts, asked as never before", 0.7, "facts")):
        values = mean("sft", *names), mean("rl", *names)
        rows.append([f"{goal}: {needed}", *(text for v in values for text in (show(v, 3), reached(v, needed)))])
    before, after = mean("sft", "gsm8k"), mean("rl", "gsm8k")
    raised = reached(after, min(0.95, before + 0.05)) if None not in (before, after) else "-"
    change = f"{show(before, 3)} to {show(after, 3)}"
    return [*rows, ["RL raises word problems by 0.05, or to 0.95", change, raised, "", ""]]

def main():
    if common.is_folder_data(data) and not common.data_root(data).is_dir():
        common.fail(f"nothing was ever trained on {data}: there is no {common.data_root(data)}")
    root, folder, runs = common.data_root(data), common.report_dir(data), status.tags(common.data_root(data))
    run = tag or (runs or ["no model yet"])[-1]
    stages = {stage: gather(stage, run) for stage in STAGES}
    tok = status.read(common.tokenizer_dir(data) / "phase.json")
    total = sum(number(part.get("seconds")) or 0 for s in stages.values() for part in (s, s["core"], s["chat"]))

    lines = [f"# Report: {data}, {run}", "", *guarded(head, run, stages, tok, total)]
    for s in stages.values():
        lines += guarded(section, s, folder) + guarded(core_section, s["core"])
    units = {unit: status.unit(root, unit, run) for unit in status.UNITS}
    units.update({"data": ("done", "your own folder", None)} if common.is_folder_data(data) else {})
    left = [f"{unit}: {words}" for unit, (state, words, _) in units.items() if state != "done"]
    notes = [f"{s['stage']}: no ChatCORE, since {', '.join(s['chat']['missing'])} was not measured"
             for s in stages.values() if s["chat"].get("missing")]
    core, short = stages["base"]["core"], evaluation.parts(data, stages["base"]["core"].get("tasks") or {})
    why = core.get("reason") or ", ".join(f"{name} {n} items" for name, n in short.items())
    notes += [f"CORE in part: {why}"] if core and why else []
    notes += [f"more runs are here: {', '.join(r for r in runs if r != run)} (--tag=...)"] if len(runs) > 1 else []
    rows = table(list(stages.values()))
    shown = aligned(rows)
    if left:
        lines += ["## Not done", "", *(f"- {x}" for x in left), "", f"Next: `{status.following(units, data, run)}`", ""]
    lines += ["## Scores", "", *markdown(rows),
              "± is half of the 95 % confidence interval; - was not measured.", "", *(f"- {n}" for n in notes),
              *([""] if notes else []), f"Total time: {common.clock(total)}", ""]
    if data == "toy":
        judged = [["goal", "SFT", "reached", "RL", "reached"], *goals({name: s["chat"] for name, s in stages.items()})]
        lines += ["## Goals", "", *markdown(judged)]
        shown += "\n\n" + aligned(judged)
    try:
        common.atomic_write(folder / "report.md", "\n".join(lines))
    except OSError as e:
        common.fail(f"could not write {folder / 'report.md'}: {e}", code=1)
    print("\n".join([shown, "", *(f"not done: {x}" for x in left), *notes]))
    print(f"total time of training and evaluation: {common.clock(total)}\nreport: {folder / 'report.md'}")
    common.outcome(0, "done")

if __name__ == "__main__":
    main()
