"""
What base_eval.py and chat_eval.py share. Beside the result file, say report/chat_sft_d4.json, there
is until it is written

    report/chat_sft_d4.partial.jsonl   a line of inputs, then one for each piece that is measured,
                                       last why the evaluation ended

so that an interrupted evaluation continues with the next piece, and status.py and report.py can
name one that failed.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

import common
from compute import Compute, choose_compute
from records import differences

@dataclass
class Evaluation:
    run: object
    path: Path        # of the result
    start: dict       # what it was begun with: inputs, chosen
    compute: Compute
    pieces: dict      # {piece: value} that are measured
    seconds: float    # spent on them
    last: float       # when the last one was measured

    def keep(self, piece, value):
        """Keeps a piece that is measured; collective. None is the answer of one that was asked to
        stop: it ends the process with 75."""
        if value is None:
            why = self.run.stop_reason() or "another rank was asked"
            self.run.exit_interrupted(f"{why}; the {len(self.pieces)} pieces measured so far are "
                                      "kept")
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        self.seconds += seconds
        self.pieces[piece] = value
        if self.run.ranks.rank == 0:
            with open(self.run.partial, "a") as f:
                line = {"piece": piece, "value": value, "seconds": round(seconds, 3)}
                f.write(json.dumps(line) + "\n")

    def exit_done(self, **result):
        """Writes the result file, which makes the pieces superfluous; ends the process with 0."""
        if self.run.ranks.rank == 0:
            whole = {**self.start, **result, "seconds": round(self.seconds, 1)}
            common.atomic_write(self.path, json.dumps(whole, indent=1))
            self.run.partial.unlink(missing_ok=True)
        common.print0(f"done in {common.duration(self.seconds)} ({self.path})")
        self.run.leave(0, "done")

def open_or_exit(run, path, inputs, settings, enough=lambda result: True):
    """
    Opens the evaluation with the result file `path` -> Evaluation, with the pieces that are there
    already. Ends the process with 0 where that is of these inputs, of the dtype that is asked for,
    and enough(result). Collective.
    """
    def fits(begun):
        same_dtype = settings["dtype"] in ("auto", begun.get("chosen", {}).get("dtype"))
        return begun.get("inputs") == inputs and same_dtype

    run.settings = settings
    found = run.ranks.on_rank0(common.read_json, path)
    if isinstance(found, dict) and fits(found) and enough(found):
        common.print0(f"done already ({path})")
        run.leave(0, "done already")
    partial = path.with_suffix(".partial.jsonl")
    lines = run.ranks.on_rank0(common.read_json_lines, partial)
    if lines and not fits(lines[0]):
        changed = ", ".join(differences(lines[0].get("inputs", {}), inputs)) or "dtype"
        common.print0(f"what an evaluation with other inputs left is dropped: {changed}")
        lines = []
    compute = choose_compute(run.ranks, settings, lines[0]["chosen"] if lines else None)
    start = {"inputs": inputs, "chosen": compute.recorded()}
    kept = [line for line in lines if "piece" in line]
    if run.ranks.rank == 0:  # without a line torn by a death
        whole = "".join(json.dumps(line) + "\n" for line in [start, *kept])
        common.atomic_write(partial, whole)
        run.partial = partial
    if kept:
        common.print0(f"continuing, {len(kept)} pieces are there already")
    run.set_deadline(settings["time_limit"])
    return Evaluation(run, path, start, compute, {line["piece"]: line["value"] for line in kept},
                      sum(line["seconds"] for line in kept), time.monotonic())
