"""
What the terminal (chat_cli.py), the page and OpenAI's endpoints (chat_web.py) share: which model is
talked to, what it reads, and the tokens of an answer as text.
"""
import codecs
import contextlib
import shlex
import sys
import time
from itertools import groupby

import common
import models
import pipeline
import status
from records import load_record

def say(*words):
    print(*words, file=sys.stderr, flush=True)

def choose(data, source, tag):
    """What a person has asked for, "" where nothing -> (stage, data, tag) of a finished model, the
    furthest stage, of the model trained last; and its (folder, step). Failure (code 2) where
    there is none; says what is not finished."""
    place = pipeline.STAGES.index
    sets = [data] if data else status.data_sets()
    found = sorted(model for name in sets for model in models.trained(name))
    asked_for = [m for m in found if source in ("", m.stage) and tag in ("", m.tag)]
    usable = [m for m in asked_for if m.finished]
    if not found:
        of_data = f" of {data}" if data else ""
        common.fail(f"there is no {source or 'trained'} model{of_data} in {pipeline.base_dir()}",
                    next_command=shlex.join(["bash", "speedrun.sh", f"--data={data or 'toy'}"]))
    last = (asked_for or found)[-1]  # where none is usable find_model says what to do for one
    if usable:
        of_newest = [m for m in usable if (m.data, m.tag) == (usable[-1].data, usable[-1].tag)]
        last = max(of_newest, key=lambda m: (place(m.stage), m.saved))
    source, data, tag = source or last.stage, data or last.data, tag or last.tag
    folder_and_step = find(source, data, tag)
    for m in found:
        later = place(m.stage) > place(source)
        if later and (m.data, m.tag) == (data, tag) and not m.finished:
            say(f"({m.stage} {tag} is not finished: python status.py says why; this is the stage "
                "before it)")
    return source, data, tag, folder_and_step

def find(source, data, tag):
    """models.find_model, which says what it passes over: that is no answer to anybody"""
    with contextlib.redirect_stdout(sys.stderr):
        return models.find_model(source, data, tag)

def description(source, data, tag, step):
    """example: "sft model d4 of toy, step 130, trained from mid, 3m12s old" """
    folder = pipeline.state_path(source, data, tag)
    words = f"{source} model {tag} of {data}, step {step:,}"
    parent = pipeline.find_phase(source).parent
    begun_with = (load_record(folder) or {}).get("inputs", {}).get(parent)
    if parent in pipeline.STAGES and begun_with:
        words += f", trained from {parent}"
        if status.replaced(parent, begun_with, data, tag):
            words += ", which was trained again since"
    return f"{words}, {common.duration(max(0, time.time() - models.saved_at(folder)))} old"

def room_for_answer(context, most):
    """How many tokens of the context a prompt has to leave, where an answer may have `most`."""
    return min(most, context // 2)

class Speech:
    """The tokens of an answer, one after another, as text. A character may be cut in tokens: it is
    said when it is whole."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.kind = "text"  # or "python", a call of the calculator, or "python_output", its answer
        self.turns = {tokenizer.special("<|python_start|>"): "python",
                      tokenizer.special("<|python_end|>"): "text",
                      tokenizer.special("<|output_start|>"): "python_output",
                      tokenizer.special("<|output_end|>"): "text"}

    def add(self, token):
        """-> (kind, text) that the next token completes; the text may be empty"""
        if token not in self.turns:
            return self.kind, self.decoder.decode(self.tokenizer.decode_bytes([token]))
        ended = self.end()
        self.kind = self.turns[token]
        return ended

    def end(self):
        """-> (kind, text) of a character that never came to its end"""
        return self.kind, self.decoder.decode(b"", True)

def joined(parts):
    """[(kind, text)] -> the same with neighbours of one kind together, empty ones left out.
    example: [("text", "a"), ("text", "b"), ("python", "")] -> [("text", "ab")]"""
    said = [part for part in parts if part[1]]
    return [(kind, "".join(text for _, text in group))
            for kind, group in groupby(said, key=lambda part: part[0])]
