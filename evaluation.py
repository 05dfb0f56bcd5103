"""
What base_eval.py and chat_eval.py share. Beside the result file, say report/chat_sft_d4.json, there is until it is written

    report/chat_sft_d4.partial.jsonl   a line of inputs, then one for each piece that is measured, last why the evaluation ended

so that an interrupted evaluation continues with the next piece, and status.py and report.py can name one that failed.
"""
import json
import math
import sys
import time

import common
import phase

_run = {}  # of this process: the files, inputs, pieces, seconds

def begin(path, inputs, settings, enough=lambda result: True):
    """Opens the evaluation with the result file `path`; ends the process with 0 where that is of these inputs, of the dtype that
    is asked for, and enough(result). -> (Compute, {piece: value} that is there already)"""
    def fits(record):
        return isinstance(record, dict) and record.get("inputs") == inputs and settings["dtype"] in ("auto", record.get("chosen", {}).get("dtype"))
    found = common.on_rank0(common.read_json, path)
    if fits(found) and enough(found):
        common.print0(f"done already ({path})")
        common.outcome(0, "done already")
        common.leave()
    partial = path.with_suffix(".partial.jsonl")
    lines = common.on_rank0(common.read_metrics, partial)
    if lines and not fits(lines[0]):
        changed = ", ".join(phase.differences(lines[0].get("inputs", {}), inputs)) or "dtype"
        common.print0(f"what an evaluation with other inputs left is dropped: {changed}")
        lines = []
    compute = common.init_compute(settings, lines[0]["chosen"] if lines else None)
    start = {"inputs": inputs, "chosen": common.chosen(compute)}
    pieces = [line for line in lines if "piece" in line]
    if compute.rank == 0:
        common.atomic_write(partial, "".join(json.dumps(line) + "\n" for line in [start, *pieces]))  # without a line torn by a death
    _run.update(path=path, partial=partial, start=start, pieces={line["piece"]: line["value"] for line in pieces},
                spent=sum(line["seconds"] for line in pieces), last=time.time())

    def ended(code, reason, _):
        if code:
            with open(partial, "a") as f:
                f.write(json.dumps({"code": code, "reason": reason}) + "\n")
    common.outcome_hook = ended
    sys.excepthook = lambda kind, value, trace: (sys.__excepthook__(kind, value, trace), common.outcome(1, f"{kind.__name__}: {value}"))
    if pieces:
        common.print0(f"continuing, {len(pieces)} pieces are there already")
    return compute, _run["pieces"]

def keep(piece, value):
    """Keeps a piece that is measured. None is the answer of what was asked to stop: ends the process with 75."""
    if value is None:
        phase.interrupted(_run["path"].parent, f"{common.stop_requested() or 'another rank was asked'}; the {len(_run['pieces'])} pieces measured so far are kept")
    seconds, _run["last"] = time.time() - _run["last"], time.time()
    _run["spent"] += seconds
    _run["pieces"][piece] = value
    common.append_metrics(_run["partial"], {"piece": piece, "value": value, "seconds": round(seconds, 3)})

def done(**result):
    """Writes the result file, which makes the pieces superfluous, and ends the process."""
    if common.rank_world()[0] == 0:
        common.atomic_write(_run["path"], json.dumps({**_run["start"], **result, "seconds": round(_run["spent"], 1)}, indent=1))
        _run["partial"].unlink(missing_ok=True)
    common.print0(f"done in {common.clock(_run['spent'])} ({_run['path']})")
    common.outcome(0, "done")
    common.leave()

def score(outcomes, chance):
    """list of bool -> accuracy with its 95 % interval (Wilson 1927), and the accuracy centred: guessing 0, perfection 1.
    example: ([True, False] * 5, 0.25) -> accuracy 0.5, low 0.237, high 0.763, centred 0.333"""
    n, p, z = len(outcomes), sum(outcomes) / len(outcomes), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))
    return {"accuracy": p, "n": n, "low": low, "high": high, "chance": chance, "centred": (p - chance) / (1 - chance), "outcomes": outcomes}

FULL = {"arc_easy": 2376, "arc_challenge": 1172, "mmlu": 14042, "gsm8k": 1319, "humaneval": 164, "squad": 10570}  # items of the public test sets

def parts(data, results):
    """Which results are of a part of a public test set only: {task: "30 of 164"}; they are not called by the name of the whole."""
    known = {name: r["n"] for name, r in results.items() if data != "toy" and name in FULL and isinstance(r, dict) and isinstance(r.get("n"), int)}
    return {name: f"{n:,} of {FULL[name]:,}" for name, n in known.items() if n < FULL[name]}
