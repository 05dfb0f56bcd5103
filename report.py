"""
Writes report/report.md, and the same as one page, report.html: what was run, a section for each
stage, and one table of scores over BASE, MID, SFT and RL.

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

import bands
import common
import configurator
import evaluation
import pipeline
import status
import trial
from webpage import aligned, markdown, page, picture

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
    ("train", "lr_scale", "learning rate, as a multiple of the settings'", 3),
    ("train", "norm", "norm of the gradient", 3),
    ("train", "tokens_per_second", "tokens per second", 0),
    ("train", "peak_gb", "most memory so far, GB", 2),
]
GOALS = {  # what the toy world's scores should be after SFT and RL
    "arc_easy": "mean 0.6",
    "arc_challenge": "mean 0.6",
    "mmlu": "mean 0.6",
    "gsm8k": "0.6",
    "spellingbee": "0.9",
    "facts": "0.7",
}
GOALS_IN_WORDS = "Goals are for after SFT and RL; RL also adds 0.05 to GSM8K, or reaches 0.95."

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
    """What `function` makes; [] where a file is damaged in a way that nobody thought of, or the
    disk is full, which costs its own part only and is noted."""
    try:
        return function(*args)
    except Exception as e:  # noqa: BLE001
        why = "cannot be read or written" if isinstance(e, OSError) else "is damaged"
        notes.append(f"{what} is left out, since a file {why} ({type(e).__name__}: {e})")
        return []

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
# the parts of the report

def points(metrics, kind, key):
    """[(step, value)] of one curve, steps rising, each once; what is no number is left out"""
    found = {}
    for line in metrics:
        value = line.get(key, line.get("clock", {}).get(key))
        if line["kind"] == kind and isinstance(value, (int, float)) and math.isfinite(value):
            found[line["step"]] = value
    return sorted(found.items())

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
        lines.append(f"- {title}: {line[-1][1]:,.{digits}f} at the end")
        band = band_of(stage) if key == "loss" else None
        restarts = [restart["step"] for restart in record.get("restarts", [])]
        if drawn := picture(line, f"{stage.name}: {title}", band, restarts):
            file = f"{stage.name}_{key.replace('@', '_')}.svg"
            common.atomic_write(folder / file, drawn)
            lines.append(f"  ![{stage.name}: {title}]({file})")
        if band:
            lines.append(f"- {in_the_band(stage)}")
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

def band_of(stage):
    """[(step, low, high)] of three other seeds of this very run, or None."""
    band, total = bands.find(stage.record), stage.meta.get("num_steps")
    if not band or not total:
        return None
    ends = [round(total * (n + 0.5) / bands.PARTS) for n in range(bands.PARTS)]
    return list(zip(ends, band["low"], band["high"], strict=True))

def in_the_band(stage):
    """Whether the curve is normal, in words."""
    band, total = bands.find(stage.record), stage.meta["num_steps"]
    means = enumerate(bands.means_of(stage.metrics, total), 1)
    words = {n: bands.in_words(band, n, mean) for n, mean in means if mean is not None}
    off = [f"part {n}: {said}" for n, said in words.items() if "within" not in said]
    if not off:
        return f"is the curve normal? Within the band of three seeds in {len(words)} of 20 parts"
    return (f"is the curve normal? Off the band of three seeds in {len(off)} of 20 parts: "
            f"{'; '.join(off[:3])}")

def origins(run):
    """From what each number can be derived again: commands, commits, inputs, machines."""
    rows = [["phase", "command", "commit", "inputs", "machine"]]
    for phase in pipeline.PHASES[:-1]:
        path = pipeline.state_path(phase.name, data, run)
        record = common.read_json(path if phase.kind == "evaluation" else path / "phase.json")
        if not record:
            continue
        inputs = {k: v for k, v in record.get("inputs", {}).items() if isinstance(v, str)}
        changed = f" + {record['difference']}" if record.get("difference") else ""
        machine = record.get("machine", {})
        rows.append([
            phase.name, f"`{record['command']}`" if record.get("command") else "",
            str(record.get("commit", ""))[:12] + changed,
            ", ".join(f"{k} {v[:16]}" for k, v in inputs.items()),
            ", ".join(f"{k} {v}" for k, v in machine.items())])
    return ["## Where every number comes from", "", *markdown(rows)]

def times(stages):
    """Time of each stage, and what deaths have cost."""
    rows = [["", "training", "trained twice", "attempts", "evaluation"]]
    for stage in stages:
        restarts = stage.record.get("restarts", [])
        steps = sum(restart["steps_lost"] for restart in restarts)
        lost = common.duration(sum(restart["seconds_lost"] for restart in restarts))
        measured = sum(part.get("seconds", 0.0) for part in (stage.core, stage.chat))
        rows.append([
            stage.name.upper(), common.duration(stage.meta.get("seconds", 0.0)),
            f"{steps:,} steps, {lost}" if steps else "-",
            str(len(stage.record.get("starts", []))), common.duration(measured)])
    note = "Trained twice: steps that a death has cost, from the last save on."
    return ["## Time", "", *markdown(rows), note, ""]

def answers(stages):
    """Ten prompts, answered by each stage."""
    said = {stage.name: {entry["prompt"]: entry["text"] for entry in found}
            for stage in stages if (found := (stage.chat or stage.core).get("answers"))}
    if not said:
        return []
    prompts = list(dict.fromkeys(prompt for of_stage in said.values() for prompt in of_stage))
    rows = [["prompt", *(name.upper() for name in said)]]
    for prompt in prompts:
        cells = [of_stage.get(prompt, "-")[:200].replace("`", "'") for of_stage in said.values()]
        rows.append([prompt, *(f"`{cell}`" if cell.strip() else "(nothing)" for cell in cells)])
    return ["## Ten prompts, answered by each stage", "", *markdown(rows)]

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
    folder, phases = pipeline.report_dir(data), status.look_at(data, run)["phases"]
    states = {facts["phase"]: (facts["state"], facts["words"]) for facts in phases}
    stages = [gather(name, run) for name in pipeline.STAGES]
    notes = []
    for facts in phases:
        if facts["state"] == "absent" and facts["phase"] in status.asked_for(data, run):
            notes.append(f"missing: {facts['phase']}")
        elif facts["state"] not in ("done", "absent"):
            notes.append(f"not done: {facts['phase']}: {facts['words']}")
        if why := facts["cause"]:
            notes.append(f"{facts['phase']}: {why['sentence']}; {why['mend']}")
    parts = []
    columns = []
    seconds = []
    for stage in stages:
        name = stage.name
        seconds += [part.get("seconds") for part in (stage.meta, stage.core, stage.chat)]
        parts += guarded(notes, f"what {name} did", section, stage, states, folder)
        if stage.core:
            parts += guarded(notes, "CORE by task", core_section, stage.core)
        columns.append(guarded(notes, f"scores of {name}", scores_of, stage) or {})
        if reason := stage.core.get("reason"):
            notes.append(f"CORE in part: {reason}")
        if missing := stage.chat.get("missing"):
            notes.append(f"{name}: ChatCORE needs all six tasks; missing: {', '.join(missing)}")
    total = sum(part for part in seconds if isinstance(part, (int, float)))
    notes.append(f"Total time: {common.duration(total)} of training and evaluation")
    if data == "toy":
        notes.append(GOALS_IN_WORDS)
    notes.append(f"Next: `{status.next_command(states, data, run)}`")

    rows = table(columns)
    parts += guarded(notes, "the answers", answers, stages)
    parts += guarded(notes, "time", times, stages)
    parts += guarded(notes, "where the numbers come from", origins, run)
    lines = [f"# Report: {data}, {run}", "", *guarded(notes, "the head", head, stages)]
    lines += ["## Scores", "", *markdown(rows)]
    lines += ["± is half of the 95 % confidence interval; - was not measured.", ""]
    lines += [*(f"- {note}" for note in notes), "", *parts]
    text = "\n".join(lines) + "\n"
    path = folder / "report.md"
    with common.writing(path):
        if path.exists() and not common.content_of(path).startswith(b"# Report: "):
            aside = common.aside_name(path)  # nanochat's own, under the same name
            path.rename(aside)
            notes.append(f"A report.md that was not made here is kept in {aside}")
        common.atomic_write(path, text)
        if html := guarded(notes, "the page", page, text, folder):
            common.atomic_write(folder / "report.html", html)
    print("\n".join([*aligned(rows), "", *notes, f"report: {path}, report.html"]))

if __name__ == "__main__":
    main()
