"""
Writes report/report.md: what was run, a section for each phase, and one table of scores over BASE, MID, SFT and RL.

    python report.py --data=toy

Reads what the phases left behind (records, metrics, results); what is missing, failed or half done is named as such.
"""
import html
import os
import platform
import time

import checkpoint
import common
import configurator
import phase

data = "toy"                 # the data set
tag = ""                     # the run; empty: the newest base model's
settings = configurator.configure(globals()) if __name__ == "__main__" else None

STAGES = {"base": ("base_train.py", "Pretraining"), "mid": ("mid_train.py", "Midtraining"), "sft": ("chat_sft.py", "Supervised finetuning"), "rl": ("chat_rl.py", "Reinforcement learning")}
SCORES = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "mmlu": "MMLU", "gsm8k": "GSM8K", "humaneval": "HumanEval", "spellingbee": "SpellingBee", "facts": "Facts"}


def curve(points, title, width=560, height=150):
    """(x, y) points as a small SVG picture, text."""
    points = [(x, y) for x, y in points if isinstance(y, (int, float)) and y == y and abs(y) != float("inf")]
    if len(points) < 2:
        return ""
    step = max(1, len(points) // 400)
    points = points[::step] + ([points[-1]] if points[::step][-1] != points[-1] else [])
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    across = lambda x: 55 + (width - 65) * (x - xs[0]) / max(xs[-1] - xs[0], 1)
    down = lambda y: 22 + (height - 42) * (high - y) / max(high - low, 1e-12)
    line = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
    text = lambda x, y, s, anchor="start": f'<text x="{x}" y="{y}" font-size="11" font-family="sans-serif" fill="#555" text-anchor="{anchor}">{html.escape(s)}</text>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"><rect width="100%" height="100%" fill="#fff"/>'
            f'<polyline fill="none" stroke="#2a6fbb" stroke-width="1.5" points="{line}"/>' + text(55, 14, title) + text(50, 30, f"{high:.3g}", "end") + text(50, height - 20, f"{low:.3g}", "end")
            + text(55, height - 5, f"step {xs[0]:,}") + text(width - 10, height - 5, f"step {xs[-1]:,}", "end") + "</svg>\n")

def section(stage, directory, folder):
    """The lines of a phase's section; writes its curves into `folder`."""
    script, title = STAGES[stage]
    record = phase.read(directory) if directory else None
    lines = [f"## {title}", ""]
    if not record:
        return lines + [f"Never ran ({script}).", ""]
    steps = checkpoint.steps(directory)
    meta = (common.read_json(directory / checkpoint.names(steps[0])[2]) or {}) if steps else {}
    word = {"done": "Done", "interrupted": "Half done", "running": "Half done, or running", "failed": "Failed"}.get(record["status"], record["status"])
    lines.append(f"**{word}**" + (f": {record['reason']}" if record.get("reason") and record["status"] != "done" else "")
                 + (f", step {meta.get('step', 0):,} of {meta.get('num_steps', 0):,}" if meta else "") + f", started {len(record.get('starts', []))} times.")
    if record["status"] != "done" and record.get("next"):
        lines.append(f"To continue: `{record['next']}`")
    facts = {"loss": meta.get("loss"), "validation bits per byte": record.get("val_bpb", meta.get("val_bpb")), "training time": common.clock(meta["seconds"]) if "seconds" in meta else None,
             "tokens": f"{meta['tokens']:,}" if "tokens" in meta else None, "parameters": f"{record['parameters']:,}" if "parameters" in record else None,
             "reward": meta.get("reward"), "computed in": " ".join(map(str, (record.get("chosen") or {}).values())) or None}
    lines += ["", *(f"- {k}: {v:.4f}" if isinstance(v, float) else f"- {k}: {v}" for k, v in facts.items() if v is not None)]
    changed = {k: v for k, v in record["settings"].items() if k == "mixture"}
    lines += [f"- {k}: `{v}`" for k, v in changed.items()] + [""]
    metrics = common.read_metrics(directory / "metrics.jsonl")
    for kind, key, name in (("train", "loss", "training loss, nats"), ("val", "val_bpb", "validation, bits per byte"), ("train", "reward", "reward")):
        picture = "" if stage == "rl" and key == "loss" else curve([(m["step"], m[key]) for m in metrics if m.get("kind") == kind and key in m], f"{stage}: {name}")
        if picture:
            common.atomic_write(folder / f"{stage}_{key}.svg", picture)
            lines += [f"![{stage} {name}]({stage}_{key}.svg)", ""]
    return lines

def table(core, chat, prefix):
    """-> rows [name, BASE, MID, SFT, RL] of texts"""
    rows = [[prefix + "CORE", f"{core['core']:.4f}" if core and core.get("core") is not None else "-", "-", "-", "-"]]
    for name, shown in SCORES.items():
        cells = [(chat[s] or {}).get("results", {}).get(name) for s in STAGES]
        if any(cells) or name != "facts":
            rows.append([prefix + shown, *(f"{c['accuracy']:.3f} ±{(c['high'] - c['low']) / 2:.3f}" if c else "-" for c in cells)])
    cores = [(chat[s] or {}).get("chatcore") for s in STAGES]
    return rows + [[prefix + "ChatCORE", *(f"{c:.4f}" if c is not None else "-" for c in cores)]]

def goals(chat):
    """The toy world's goals -> rows [goal, value, reached]"""
    def of(stage, *names):
        results = (chat[stage] or {}).get("results", {})
        return sum(results[n]["accuracy"] for n in names) / len(names) if all(n in results for n in names) else None
    before, after = of("sft", "gsm8k"), of("rl", "gsm8k")
    rows = [("SFT: SpellingBee at least 0.9", of("sft", "spellingbee"), 0.9), ("SFT: word problems at least 0.6", before, 0.6),
            ("SFT: multiple choice at least 0.6 (chance 0.25)", of("sft", "arc_easy", "arc_challenge", "mmlu"), 0.6), ("SFT: facts, asked as never before, at least 0.7", of("sft", "facts"), 0.7)]
    judged = [[name, "-" if v is None else f"{v:.3f}", "-" if v is None else "yes" if v >= goal else "NO"] for name, v, goal in rows]
    rl = None if before is None or after is None else after >= 0.95 or after - before >= 0.05
    return judged + [["RL: word problems 0.05 better, or 0.95", "-" if rl is None else f"{before:.3f} to {after:.3f}", "-" if rl is None else "yes" if rl else "NO"]]

def aligned(rows):
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(r, widths)).rstrip() for r in rows)

def markdown(rows):
    return ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0]), *("| " + " | ".join(r) + " |" for r in rows[1:])]

def main():
    name = tag or checkpoint.latest_tag("base", data)
    folder, prefix = common.report_dir(data), "toy-" if data == "toy" else ""
    directories = {s: (common.stage_dir(s, data, name) if name else None) for s in STAGES}
    core = common.read_json(common.eval_path("core", "base", data, name)) if name else None
    chat = {s: common.read_json(common.eval_path("chat", s, data, name)) if name else None for s in STAGES}
    records = {s: phase.read(d) if d else None for s, d in directories.items()}
    metas = {s: common.read_json(d / checkpoint.names(checkpoint.steps(d)[0])[2]) or {} if d and checkpoint.steps(d) else {} for s, d in directories.items()}
    tokenizer = phase.read(common.tokenizer_dir(data)) or {}
    total = sum(m.get("seconds", 0) for m in metas.values()) + sum((r or {}).get("seconds", 0) for r in (core, *chat.values()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    try:
        from importlib.metadata import version
        torch_version = version("torch")
    except ImportError:
        torch_version = "unknown"
    lines = [f"# Report: {data}, {name or 'no model yet'}", "", f"- written {time.strftime('%Y-%m-%d %H:%M')} on {platform.system()}, {os.cpu_count()} cores, {memory:.0f} GB, torch {torch_version}, commit {phase.source_version()[0][:12]}",
             f"- data set `{data}`, state in `{common.data_root(data)}`",
             f"- tokenizer of {tokenizer.get('vocab_size', '?')} tokens; bytes per token: " + ", ".join(f"{k} {v:.2f}" for k, v in tokenizer.get("bytes_per_token", {}).items()),
             f"- time spent in training and evaluation: {common.clock(total)}", ""]
    for stage in STAGES:
        lines += section(stage, directories[stage], folder)
        if stage == "base" and core:
            lines += [f"CORE by task ({core.get('reason') or 'all items of all tasks'}):", ""]
            lines += markdown([["task", "accuracy", "centred", "items"], *([n, f"{r['accuracy']:.4f}", f"{r['centred']:+.4f}", str(r["n"])] for n, r in core["tasks"].items())]) + [""]
            lines += ["Samples:", "", *(f"- {s['prompt']}**{s['text']}**".replace("\n", " ") for s in core.get("samples", [])), ""]
    rows = [["", "BASE", "MID", "SFT", "RL"], *table(core, chat, prefix)]
    lines += ["## Scores", "", *markdown(rows), "", "± is half of the 95 % confidence interval (Wilson). - was not measured.", ""]
    for stage in STAGES:
        if records[stage] and not chat[stage] and stage != "base":
            lines.append(f"The {stage} model has not been evaluated, or its evaluation failed: `python chat_eval.py --data={data} --source={stage}`")
        if chat[stage] and chat[stage].get("missing"):
            lines.append(f"No ChatCORE for {stage}: {', '.join(chat[stage]['missing'])} not measured.")
    shown = aligned(rows)
    if data == "toy":
        judged = [["goal", "value", "reached"], *goals(chat)]
        lines += ["", "## Goals of the toy world", "", *markdown(judged)]
        shown += "\n\n" + aligned(judged)
    lines += ["", f"Total time: {common.clock(total)}"]
    common.atomic_write(folder / "report.md", "\n".join(lines) + "\n")
    print(shown + f"\n\ntotal time of training and evaluation: {common.clock(total)}\nreport: {folder / 'report.md'}")
    common.outcome(0, "done")

if __name__ == "__main__":
    main()
