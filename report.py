"""
Writes report/report.md: what was run, a section for each stage, and one table of scores over BASE,
MID, SFT and RL.

    python report.py                             # of the run written last
    python report.py --data=fineweb_edu --tag=d20

Reads what the phases left behind: records, metrics, results. What is missing, failed or half done
is named as such. Where there is no such run it ends with 2 and writes nothing.
"""
import math
import platform
import shlex
import statistics
import time
from dataclasses import dataclass

import common
import configurator
import evaluation
import pipeline
import status
import trial

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: the newest
tag = ""                     # which run, d4 for instance; empty: the one written last
settings = configurator.configure(globals()) if __name__ == "__main__" else None

TITLES = {
    "base": "Pretraining",
    "mid": "Midtraining",
    "sft": "Supervised finetuning",
    "rl": "Reinforcement learning",
}
CURVES = [  # kind of the metrics' line, its key, title, digits of its last value
    ("train", "loss", "training loss, nats", 4),
    ("val", "val_bpb", "validation, bits per byte", 4),
    ("train", "reward", "mean reward", 3),
    ("val", "pass@1", "held-out problems, pass@1", 3),
]
GOALS = {  # what the toy world's scores should be after SFT and RL
    "arc_easy": "mean 0.6",
    "arc_challenge": "mean 0.6",
    "mmlu": "mean 0.6",
    "gsm8k": "0.6",
    "spellingbee": "0.9",
    "facts": "0.7",
}
GOALS_IN_WORDS = ("Goals after SFT and RL: the mean of ARC-Easy, ARC-Challenge and MMLU at least "
                  "0.6; GSM8K at least 0.6, and RL adds 0.05 or reaches 0.95; SpellingBee at least "
                  "0.9; Facts at least 0.7.")

# -------------------------------------------------------------------------------------------------
# what is known

@dataclass
class Stage:
    """What a trained stage and its evaluations have left behind."""
    name: str
    record: dict
    meta: dict      # of its newest checkpoint
    metrics: list
    core: dict      # the results of base_eval.py and chat_eval.py; {} where they are not done,
    chat: dict      # or of weights that are gone

def gather(name, run):
    directory = pipeline.state_path(name, data, run)

    def result(kind):
        path = pipeline.report_dir(data) / f"{kind}_{name}_{run}.json"
        done = status.describe_eval(path, directory)[0] == "done"
        return common.read_json(path) if done else {}

    record, (_, meta) = common.read_json(directory / "phase.json"), status.saved(directory)
    lines = [line for line in common.read_json_lines(directory / "metrics.jsonl") if "step" in line]
    return Stage(name, record, meta, lines, result("core"), result("chat"))

def guarded(notes, what, function, *args):
    """What `function` makes; None where a file is damaged in a way that nobody thought of, which
    costs its own part only and is noted."""
    try:
        return function(*args)
    except Exception as e:  # noqa: BLE001
        notes.append(f"{what} is left out, since a file is damaged ({type(e).__name__}: {e})")
        return None

# -------------------------------------------------------------------------------------------------
# scores: {task: (name of its row, what is shown)}

def half(score):
    """Half of its 95 % confidence interval."""
    return (score["high"] - score["low"]) / 2

def shown(value, errors, digits):
    """The mean of results with these halves of intervals, which add in squares.
    example: (0.25, [0.01], 3) -> "0.250 ±0.010" """
    return f"{value:.{digits}f} ±{math.hypot(*errors) / len(errors):.{digits}f}"

def shown_mean(value, results):
    """The mean of the centred accuracies of {task: score}."""
    errors = [half(score) / (1 - score["chance"]) for score in results.values()]
    return shown(value, errors, 4)

def scores_of(stage):
    core, results = stage.core, stage.chat.get("results", {})
    scores = {}
    if tasks := core.get("tasks"):
        whole = core["core"] is not None and not evaluation.in_part(data, tasks)
        value = core["core"] if whole else core["mean_centred"]
        scores["core"] = "CORE" if whole else "CORE in part", shown_mean(value, tasks)
    for task, score in results.items():
        name = evaluation.name_of(task, data, score)
        scores[task] = name, shown(score["accuracy"], [half(score)], 3)
    if stage.chat.get("chatcore") is not None:
        averaged = {task: results[task] for task in evaluation.CHATCORE}
        part = " in part" if evaluation.in_part(data, results) else ""
        scores["chatcore"] = f"ChatCORE{part}", shown_mean(stage.chat["chatcore"], averaged)
    return scores

def table(columns):
    """columns: scores_of each stage -> rows of texts, their head first. A part of a public test set
    has a row of its own."""
    rows = [["", *(name.upper() for name in pipeline.STAGES)]]
    titles = {"core": "CORE", **evaluation.CHATCORE}
    if data == "toy":
        rows[0].append("goal")
        titles["facts"] = "Facts"
    titles["chatcore"] = "ChatCORE"
    for task, title in titles.items():
        scores = [column.get(task, ("", "-")) for column in columns]
        names = dict.fromkeys(name for name, _ in scores if name)
        for name in names or [title]:
            cells = [text if own == name else "-" for own, text in scores]
            if data == "toy":
                cells.append(GOALS.get(task, ""))
            rows.append([evaluation.called(name, data), *cells])
    return rows

# -------------------------------------------------------------------------------------------------
# how it is shown

def points(metrics, kind, key):
    """[(step, value)] of one curve, steps rising, each once; what is no number is left out"""
    found = {}
    for line in metrics:
        value = line.get(key)
        if line["kind"] == kind and isinstance(value, (int, float)) and math.isfinite(value):
            found[line["step"]] = value
    return sorted(found.items())

def svg(line, title):
    """[(x, y)] as a small picture; of many points means are drawn. "" for fewer than two."""
    if len(line) < 2:
        return ""
    import numpy as np  # not above: an old Python, without it, gets no further than common.py
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
    return [f"{name:<30}" + "".join(f"{cell:<17}" for cell in cells) for name, *cells in rows]

# -------------------------------------------------------------------------------------------------
# the parts of the report

def head(stages):
    tokenizer = common.read_json(pipeline.state_path("tok", data) / "phase.json")
    tokens = sum(stage.meta.get("tokens", 0) for stage in stages)
    gpus = "; ".join(trial.gpu_names()) or "no GPU"
    return [
        f"- written {time.strftime('%Y-%m-%d %H:%M')} on {platform.node()} ({gpus})",
        f"- data set `{data}`, state in `{pipeline.data_root(data)}`",
        f"- tokenizer of {tokenizer.get('vocab_size', '?')} tokens",
        f"- parameters: {stages[0].record.get('parameters', 0):,}; tokens trained on: {tokens:,}",
        "",
    ]

def section(stage, states, folder):
    """The lines on one stage; its curves go into `folder` as files: GitHub shows no SVG inside
    Markdown."""
    script = pipeline.find_phase(stage.name).script
    record, meta = stage.record, stage.meta
    state, words = states[stage.name]
    if state == "absent":
        return [f"## {TITLES[stage.name]}", "", f"**Never ran** (`{script}`)", ""]
    lines = [f"## {TITLES[stage.name]}", "", f"**{words}** (`{script}`)", ""]
    if record.get("next"):
        lines.append(f"- to go on: `{record['next']}`")
    if meta:
        speeds = [line["clock"]["tokens_per_second"] for line in stage.metrics if "clock" in line]
        speed = f", {statistics.median(speeds):,.0f} tokens/s (median)" if speeds else ""
        peak = record.get("peak_bytes")
        memory = f", {peak / 1e9:,.2f} GB of memory at most" if peak else ""
        lines.append(f"- step {meta['step']:,} of {meta['num_steps']:,}, "
                     f"{common.duration(meta.get('seconds', 0.0))} of training{speed}{memory}")
    for kind, key, title, digits in CURVES:
        line = points(stage.metrics, kind, key)
        if not line or (stage.name, key) == ("rl", "loss"):
            continue
        lines.append(f"- {title}: {line[-1][1]:.{digits}f} at the end")
        if picture := svg(line, f"{stage.name}: {title}"):
            file = f"{stage.name}_{key.replace('@', '_')}.svg"
            common.atomic_write(folder / file, picture)
            lines.append(f"  ![{stage.name}: {title}]({file})")
    lines.append(f"- evaluation: {states[f'{stage.name}-eval'][1]}")
    if "host" in record:  # neither damaged nor adopted
        lines += started(script, record)
    return [*lines, ""]

def started(script, record):
    """Lines on where and with what a phase was started."""
    chosen = ", ".join(f"{name}={value}" for name, value in record.get("chosen", {}).items())
    job = f", Slurm job {record['job']}" if record.get("job") else ""
    changes = " with changes" if record["difference"] else ""
    before = configurator.defaults(script).get("mixture", [])
    after = record["settings"].get("mixture", before)
    facts = {
        "command": [record.get("command", script)],
        "taken out of the mixture": [entry for entry in before if entry not in after],
        "put into the mixture": [entry for entry in after if entry not in before],
    }
    lines = [f"- attempts: {len(record['starts'])}, the last on {record['host']}{job}",
             f"- commit {record['commit'][:12]}{changes}; computed with {chosen}"]
    for step, batches in record.get("skipped", []):
        lines.append(f"- went back to step {step:,} (--rewind) and skipped {batches:,} batches")
    return lines + [f"- {words}: `{'`, `'.join(found)}`" for words, found in facts.items() if found]

def core_section(core):
    """CORE's tasks and the samples of base_eval.py."""
    rows = [["CORE task", "accuracy", "centred", "items"]]
    for name, score in core["tasks"].items():
        rows.append([name, f"{score['accuracy']:.4f}", f"{score['centred']:+.4f}",
                     f"{score['n']:,} of {score.get('of', score['n']):,}"])
    lines = markdown(rows)
    if not core["samples"]:
        return lines
    lines += ["Samples, the model's part behind the bar:", "", "```text"]
    for sample in core["samples"]:
        text = f"{sample['prompt']}|{sample['text']}".replace("\n", "\\n")
        lines.append(text.replace("`", "'")[:200])
    return [*lines, "```", ""]

# -------------------------------------------------------------------------------------------------

def run_to_report():
    """-> (data set, run): those that are asked for, or written last. Failure (code 2) where there
    is none."""
    name = data or (status.data_sets() or [""])[-1]
    common.check(name, f"there is nothing to report in {pipeline.base_dir()} yet",
                 "bash speedrun.sh")
    status.check_folder(name)
    runs = status.tags(name)
    common.check(runs, f"there is no run of {name} yet, so nothing to report",
                 shlex.join(["bash", "speedrun.sh", f"--data={name}"]))
    common.check(tag in ("", *runs), f"there is no run {tag} of {name}; there are: "
                 f"{', '.join(sorted(runs))}")
    return name, tag or runs[-1]

def main():
    global data
    data, run = run_to_report()
    folder, states = pipeline.report_dir(data), status.phases_of(data, run)
    stages = [gather(name, run) for name in pipeline.STAGES]
    notes = []
    for name, (state, words) in states.items():
        if state == "absent":
            notes.append(f"missing: {name}")
        elif state != "done":
            notes.append(f"not done: {name}: {words}")
    lines = [f"# Report: {data}, {run}", "", *(guarded(notes, "the head", head, stages) or [])]
    columns = []
    total = 0.0
    for stage in stages:
        name = stage.name
        total += sum(part.get("seconds", 0.0) for part in (stage.meta, stage.core, stage.chat))
        lines += guarded(notes, f"what {name} did", section, stage, states, folder) or []
        if stage.core:
            lines += guarded(notes, "CORE by task", core_section, stage.core) or []
        columns.append(guarded(notes, f"scores of {name}", scores_of, stage) or {})
        if reason := stage.core.get("reason"):
            notes.append(f"CORE in part: {reason}")
        if missing := stage.chat.get("missing"):
            notes.append(f"{name}: ChatCORE needs all six tasks; missing: {', '.join(missing)}")
    notes.append(f"Total time: {common.duration(total)} of training and evaluation")
    if data == "toy":
        notes.append(GOALS_IN_WORDS)
    notes.append(f"Next: `{status.next_command(states, data, run)}`")

    rows = table(columns)
    lines += ["## Scores", "", *markdown(rows)]
    lines += ["± is half of the 95 % confidence interval; - was not measured.", ""]
    lines += [f"- {note}" for note in notes]
    try:
        common.atomic_write(folder / "report.md", "\n".join(lines) + "\n")
    except OSError as e:
        common.fail(f"could not write {folder / 'report.md'}: {e.strerror or e}; check that the "
                    "folder is writable and has room", code=1)
    print("\n".join([*aligned(rows), "", *notes, f"report: {folder / 'report.md'}"]))

if __name__ == "__main__":
    main()
