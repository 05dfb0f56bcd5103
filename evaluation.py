"""
What base_eval.py and chat_eval.py share: an evaluation whose pieces survive a death, and scores.
Beside the result file, say report/chat_sft_d4.json, there is until it is written

    report/chat_sft_d4.partial.jsonl   a line of inputs, then one for each piece that is measured,
                                       last why the evaluation ended
    report/.chat_sft_d4/lock.json      who measures

so that an interrupted evaluation continues with the next piece, and status.py and report.py can
name one that failed. They show what was measured last; results and pieces of other weights or
settings are kept beside it, under the same name with a date.
"""
import contextlib
import glob
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import common
import pipeline
from lock import take_lock
from records import differences, origin, other_inputs

BLOCK = 64  # items measured and kept together, by one rank: batches depend on items alone

# what chat_eval.py measures; ChatCORE is the mean of these
CHATCORE = {
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "spellingbee": "SpellingBee",
}
# items of the public test sets, CORE's among them
FULL = {"arc_easy": 2376, "arc_challenge": 1172, "mmlu": 14042, "gsm8k": 1319, "humaneval": 164,
        "squad": 10570}

# -------------------------------------------------------------------------------------------------
# pieces

@dataclass
class Evaluation:
    run: object
    path: Path        # of the result
    start: dict       # what it was begun with: inputs, chosen
    compute: object
    pieces: dict      # {piece: value} that are measured
    began: float      # on time.monotonic(), as if it had never been interrupted

    def piece(self, name, measure, *args):
        """The value of a piece: measured and kept already, or measure(*args) now. Collective."""
        if name not in self.pieces:
            self.keep(name, measure(*args))
        return self.pieces[name]

    def keep(self, piece, value):
        """Keeps a piece that is measured; collective. None is the answer of one that was asked to
        stop: it ends the process with 75."""
        if value is None:
            self.run.exit_interrupted(f"{self.run.should_stop()}; parts measured and kept: "
                                      f"{len(self.pieces)}")
        self.pieces[piece] = value
        if self.run.partial:
            seconds = round(time.monotonic() - self.began, 3)
            line = {"piece": piece, "value": value, "seconds": seconds}
            self.run.check_lock()
            with common.writing(self.run.partial), \
                    open(self.run.partial, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def outcomes(self, task, items, measure):
        """
        measure(part) -> list of bool, for BLOCK items at a time: parts are dealt to the ranks in
        turns, and each is a piece. -> the outcomes of all items. measure gives None where it was
        asked to stop. Collective.
        """
        parts = {f"{task} {start} to {start + BLOCK}": items[start:start + BLOCK]
                 for start in range(0, len(items), BLOCK)}
        todo = [piece for piece in parts if piece not in self.pieces]
        ranks = self.run.ranks
        show = common.progress(f"items of {task}", sum(len(parts[piece]) for piece in todo))
        for turn in range(0, len(todo), ranks.world):
            due = todo[turn:turn + ranks.world]
            mine = measure(parts[due[ranks.rank]]) if ranks.rank < len(due) else None
            for piece, value in zip(due, ranks.gather(mine)):
                self.keep(piece, value)
            if turn + len(due) < len(todo):
                show(BLOCK * (turn + len(due)))
        return [outcome for piece in parts for outcome in self.pieces[piece]]

    def exit_done(self, **result):
        """Writes the result file, which makes the pieces superfluous; ends the process with 0."""
        seconds = time.monotonic() - self.began
        if self.run.partial:
            whole = {**self.start, "command": self.run.command, **origin(), **result,
                     "seconds": round(seconds, 1)}
            new = pipeline.lock_of_result(self.path) / "new.json"
            with common.writing(self.path):
                common.atomic_write(new, json.dumps(whole, indent=1))
                self.run.check_lock()
                put_aside(self.path)  # not before the new one is on disk
                os.replace(new, self.path)
                common.fsync_dir(self.path.parent)
                self.run.partial.unlink(missing_ok=True)
        common.print0(f"done in {common.duration(seconds)} ({self.path})")
        self.run.leave(0, "done")

def prompts(data):
    """Ten that every stage answers, for the report."""
    lists = json.loads((pipeline.REPO / "assets/prompts.json").read_text("utf-8"))
    return lists["toy" if data == "toy" else "public"]

def open_or_exit(run, path, inputs, settings, needed=()):
    """
    Opens the evaluation with the result file `path` -> Evaluation, with the pieces that are there
    already. Ends the process with 0 where that is of these inputs, of the dtype that is asked for,
    and has all `needed` tasks. Collective.
    """
    from compute import choose_compute  # report.py needs the scores alone, and no torch

    def fits(begun):
        same_dtype = settings["dtype"] in ("auto", begun.get("chosen", {}).get("dtype"))
        return begun.get("inputs") == inputs and same_dtype

    run.settings = settings
    partial = path.with_suffix(".partial.jsonl")
    result = run.ranks.on_rank0(common.read_json, path)
    if fits(result) and {*needed} <= {*result.get("results", ())}:
        if run.ranks.rank == 0 and partial.exists():  # an attempt at something else
            with contextlib.suppress(OSError, common.Failure):  # read-only, or being written
                hold(run, path)
                put_aside(partial)
        common.print0(f"done already ({path})")
        run.leave(0, "done already")
    run.ranks.on_rank0(hold, run, path)
    unfinished = run.ranks.on_rank0(attempts, partial)
    found, lines = next((one for one in unfinished if fits(one[1][0])), (None, [{}]))
    begun = lines[0]
    # a damaged one is measured again
    kept = [line for line in lines if {"piece", "value", "seconds"} <= line.keys()]
    others = [before for before in (result, *[lines[0] for _, lines in unfinished]) if before]
    if others and not found and not fits(result):
        common.print0("measuring anew, since what was measured is of other settings or inputs: "
                      + what_changed(others[0].get("inputs", {}), inputs))
    compute = choose_compute(run.ranks, settings, begun.get("chosen"))
    start = {"inputs": inputs, "chosen": compute.recorded()}
    if run.ranks.rank == 0:  # without a line torn by a death
        text = "".join(json.dumps(line) + "\n" for line in [start, *kept])
        with common.writing(partial):
            if found != partial:
                put_aside(partial)
            common.atomic_write(partial, text)
            if found and found != partial:
                found.unlink()
        run.partial = partial
    if kept:
        common.print0(f"resuming, parts measured already: {len(kept)}")
    run.set_deadline(settings["time_limit"])
    pieces = {line["piece"]: line["value"] for line in kept}
    earlier = max((line["seconds"] for line in kept), default=0.0)
    return Evaluation(run, path, start, compute, pieces, time.monotonic() - earlier)

def attempts(partial):
    """[(file, its lines)] of the unfinished evaluations, the last one first, then those that were
    put aside."""
    aside = sorted(partial.parent.glob(f"{glob.escape(partial.name)}.old-*"), reverse=True)
    found = [(path, common.read_json_lines(path)) for path in [partial, *aside]]
    return [(path, lines) for path, lines in found if lines]

def put_aside(path):
    """Renames a result, or the pieces of an unfinished evaluation, so that it is kept where another
    takes its place; OSError where it cannot be. A file of no pieces is removed."""
    of_pieces = path.suffix == ".jsonl"
    if of_pieces and not any("piece" in line for line in common.read_json_lines(path)):
        path.unlink(missing_ok=True)
    elif os.path.lexists(path):
        kept = common.aside_name(path)
        path.rename(kept)
        common.print0(f"what was measured of other weights or settings is kept in {kept}")

def hold(run, path):
    """Keeps the result file `path` for this process until it ends. Failure (code 2) with the
    other's name where another process measures the same."""
    folder = pipeline.lock_of_result(path)
    with common.writing(folder, code=2):
        folder.mkdir(parents=True, exist_ok=True)
        run.lock = take_lock(folder, path)

def what_changed(old, new):
    """The inputs of two evaluations -> what differs, in words. They are the same but for dtype
    where nothing does."""
    old, new = dict(old), dict(new)
    settings = differences(old.pop("settings", {}), new.pop("settings", {}))
    return ", ".join(settings + other_inputs(old, new)) or "dtype"

# -------------------------------------------------------------------------------------------------
# scores

def score(outcomes, chance):
    """list of bool -> accuracy with its 95 % interval (Wilson 1927), and the accuracy centred:
    guessing 0, perfection 1.
    example: ([True, False] * 5, 0.25) -> accuracy 0.5, low 0.237, high 0.763, centred 0.333"""
    n = len(outcomes)
    p = sum(outcomes) / n
    z = 1.96
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    shrink = 1 + z * z / n
    return {
        "accuracy": p,
        "n": n,
        "low": max(0.0, (middle - half) / shrink),
        "high": min(1.0, (middle + half) / shrink),
        "chance": chance,
        "centred": (p - chance) / (1 - chance),
        "outcomes": outcomes,
    }

def mean_centred(results):
    """The mean of the centred accuracies of {task: score}; None where there are none."""
    if not results:
        return None
    return sum(result["centred"] for result in results.values()) / len(results)

def in_part(data, results):
    """Whether of any public test set only a part was measured. The toy world's are whole."""
    few = any(result["n"] < FULL.get(task, 0) for task, result in results.items())
    return few and data != "toy"

def called(name, data):
    """The toy world's scores are named as toys.  example: ("CORE", "toy") -> "toy-CORE" """
    return f"toy-{name}" if data == "toy" else name

def name_of(task, data, result):
    """What the score of a task of chat_eval.py is called: that of a part of a public test set has
    not the name of the whole.  examples: "MMLU";  "MMLU, 500 of 14,042" """
    name = CHATCORE.get(task, task.capitalize())
    if in_part(data, {task: result}):
        return f"{name}, {result['n']:,} of {FULL[task]:,}"
    return name

def print_score(name, result):
    low, high = 100 * result["low"], 100 * result["high"]
    common.print0(f"{name:<32} {100 * result['accuracy']:.1f} % (95 %: {low:.1f} to {high:.1f} %, "
                  f"{result['n']:,} items), centred {result['centred']:+.4f} (0: guessing, 1: all "
                  "right)")
