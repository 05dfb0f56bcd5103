"""
Is my curve normal? For runs that many people make (the toy world, the rows of LEADERBOARD.md)
assets/bands.json has what the training loss of three seeds was, in twenty parts of the run. A
training of the same settings and inputs says whether it is within; report.py draws it.

    python bands.py FOLDER FOLDER FOLDER    # folders of three seeds that are done: adds their band
"""
import json
import sys
from pathlib import Path

import checkpoint
import common
import pipeline

PATH = pipeline.REPO / "assets/bands.json"
PARTS = 20
SAID_AT = (1, 5, 10, 15, 20)  # after so many parts it is said in any case

def what_decides(record):
    """What of a record has to be the same for two curves to be: all but seed, names and the
    parent, which is of another seed, too."""
    settings = checkpoint.as_today(record.get("settings", {}))
    settings = {k: v for k, v in settings.items() if k not in ("seed", "data", "tag")}
    inputs = {k: v for k, v in record.get("inputs", {}).items() if k not in pipeline.STAGES}
    return {"phase": record.get("phase"), "settings": settings, "inputs": inputs}

def find(record):
    """The band of a run, given its record: {"low": [20 numbers], "high": ...}, or None."""
    mine = what_decides(record)
    bands = json.loads(PATH.read_text("utf-8"))
    return next((band for band in bands if what_decides(band) == mine), None)

def part_ending(step, num_steps):
    """The number of the part, from 1, that the step ends; None for none.
    example: (300, 600) -> 10"""
    number = round(PARTS * step / num_steps)
    return number if number and step == round(number * num_steps / PARTS) else None

def mean_of(losses, number, num_steps):
    """losses: {step, from 1: loss} -> their mean over a part, None where a step is missing"""
    first, last = (round(n * num_steps / PARTS) for n in (number - 1, number))
    values = [losses.get(step) for step in range(first + 1, last + 1)]
    return None if None in values or not values else sum(values) / len(values)

def in_words(band, number, mean):
    """example: "loss 1.2345, within the band of three seeds (1.21 to 1.26)" """
    low, high = band["low"][number - 1], band["high"][number - 1]
    of = f"the band of three seeds ({low:.4f} to {high:.4f})"
    if low <= mean <= high:
        return f"loss {mean:.4f}, within {of}"
    off = f"{mean - high:.4f} above" if mean > high else f"{low - mean:.4f} below"
    return f"loss {mean:.4f}, {off} {of}"

def means_of(lines, num_steps):
    """mean_of each part. lines: of metrics.jsonl"""
    losses = {line["step"] + 1: line["loss"] for line in lines
              if line.get("kind") == "train" and {"step", "loss"} <= line.keys()}
    return [mean_of(losses, number, num_steps) for number in range(1, PARTS + 1)]

def look(run, step):
    """What a training says after so many steps, or None. run: a Run, in its loop."""
    num_steps = run.clock.num_steps
    number = part_ending(step, num_steps)
    if number is None or run.ranks.rank != 0 or run.try_out:
        return None
    band = find(run.record)
    lines = common.read_json_lines(run.directory / "metrics.jsonl") if band else []
    mean = means_of(lines, num_steps)[number - 1]
    if mean is None:
        return None
    words = in_words(band, number, mean)
    return words if number in SAID_AT or "within" not in words else None

def make(folders):
    """Three folders of one run, of three seeds -> their band: from the lowest to the highest, and
    as far again on each side, at least 1 %."""
    records = [common.read_json(folder / "phase.json") for folder in folders]
    wanted = what_decides(records[0])
    for folder, record in zip(folders, records):
        common.check(record.get("status") == "done", f"{folder} is not done")
        common.check(what_decides(record) == wanted, f"{folder} is another run than {folders[0]}")
    steps = records[0]["step"]
    curves = [common.read_json_lines(folder / "metrics.jsonl") for folder in folders]
    means = list(zip(*(means_of(lines, steps) for lines in curves)))
    common.check(None not in {mean for part in means for mean in part},
                 "a step is missing in metrics.jsonl of one of these folders")
    spread = [max(max(part) - min(part), 0.01 * min(part)) for part in means]
    return {**wanted, "seeds": [record["settings"]["seed"] for record in records],
            "commits": sorted({record["commit"][:12] for record in records}),
            "low": [round(min(part) - more, 4) for part, more in zip(means, spread)],
            "high": [round(max(part) + more, 4) for part, more in zip(means, spread)]}

def main():
    folders = [Path(word) for word in sys.argv[1:]]
    common.check(len(folders) == 3, "give the folders of three seeds of one run, as in: "
                 "python bands.py d2 /other/d2 /third/d2")
    band = make(folders)
    others = [old for old in json.loads(PATH.read_text("utf-8"))
              if what_decides(old) != what_decides(band)]
    lines = ",\n".join(json.dumps(found) for found in [*others, band])
    common.atomic_write(PATH, f"[\n{lines}\n]\n")
    print(f"{band['phase']}: loss {band['low'][0]} to {band['high'][0]} at first, "
          f"{band['low'][-1]} to {band['high'][-1]} at the end ({PATH})")

if __name__ == "__main__":
    main()
