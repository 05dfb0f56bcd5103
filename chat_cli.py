"""
Talk to a model.

    python chat_cli.py                          # the furthest stage of the data set trained last
    python chat_cli.py -p "Who are you?"        # one answer, then back to the shell
    python chat_cli.py --source=base --data=toy # the base model goes on with what you type

While it runs: /new starts a new conversation, /quit leaves, Ctrl-C stops an answer, a second one
leaves.
"""
import codecs
import contextlib
import os
import signal
import sys

import checkpoint
import common
import configurator
import execution
import models
import pipeline
import status
from ranks import Ranks

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: the one trained last
source = ""                  # base, mid, sft or rl; empty: the furthest that exists
tag = ""                     # which model; empty: the newest
prompt = ""                  # one prompt instead of a conversation (-p "..." for short)
temperature = 0.6            # 0: always the most likely token
top_k = 50                   # of how many likely tokens it draws; 0: of all
max_new_tokens = 256         # tokens of an answer
seed = None                  # of the draws: the same one gives the same answers; None: any
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads; 0: all cores
compile = False              # not compiled: every length is another shape
settings = configurator.configure(globals(), short={"-p": "prompt"})

STAGES = pipeline.STAGES
common.check(temperature >= 0 and top_k >= 0, "--temperature and --top_k must not be negative")
common.check(source in ("", *STAGES), f"--source is base, mid, sft or rl, not {source!r}")

# -------------------------------------------------------------------------------------------------
# which model

def say(*words):
    print(*words, file=sys.stderr, flush=True)

def find_models():
    """[(when, data set, stage, tag, state)] of everything with a checkpoint, the newest last; state
    is "done" or what status.py says, "nanochat's" where it is not adopted yet"""
    found = []
    for name in [data] if data else status.data_sets():
        for stage in STAGES:
            for tag in models.tags(stage, name):
                folder = pipeline.state_path(stage, name, tag)
                when = models.saved_at(folder)
                state = status.describe(folder)[0]
                if not checkpoint.steps(folder):
                    state = "nanochat's"
                found.append((when, name, stage, tag, state))
    return sorted(found)

def fail_without_model(found):
    """Failure (code 2): what is missing, what there is, and the command that makes it."""
    sets = list(dict.fromkeys(name for _, name, *_ in found))
    exists = "; ".join(f"{name}: {', '.join(models.what_exists(name))}" for name in sets)
    half = [f"{stage} {name}" for _, _, stage, name, state in found if state != "done"]
    wanted = " ".join(filter(None, [source or "trained", "model", tag, data and f"of {data}"]))
    of = data or (sets or ["toy"])[-1]
    command = f"bash speedrun.sh --data={of}"
    if any(state == "nanochat's" for *_, state in found):
        command = f"python adopt.py --data={of}"
    elif found:
        first = STAGES.index(source or found[-1][2])
        for stage in STAGES[first::-1]:  # back to what can be made now
            folder = pipeline.state_path(stage, of, tag or found[-1][3])
            if status.describe(folder)[0] == "done":
                break
            record = status.read(folder / "phase.json")
            command = record.get("next") or models.command_for(stage, of, folder.name)
    unfinished = f" (not finished: {', '.join(half)})" if half else ""
    common.fail(f"there is no {wanted} in {pipeline.base_dir()}; there is: {exists or 'nothing'}"
                f"{unfinished}", next_command=command)

found = find_models()
usable = [m for m in found if m[4] == "done" and source in ("", m[2]) and tag in ("", m[3])]
if not usable:
    fail_without_model(found)
data = usable[-1][1]
_, _, source, tag, _ = max((m for m in usable if m[1] == data),
                           key=lambda m: (STAGES.index(m[2]), m[0]))
for _, name, stage, other, state in found:
    later = (name, other) == (data, tag) and STAGES.index(stage) > STAGES.index(source)
    if later and state != "done":
        say(f"({stage} {other} is not finished, python status.py says why; this is what comes "
            "before it)")

# Ctrl-C stops an answer; where there is none to stop it leaves
answering = interrupted = False

def on_interrupt(signum, frame):
    global interrupted
    if interrupted or not answering:
        print()
        sys.exit(130)
    interrupted = True

signal.signal(signal.SIGINT, on_interrupt)  # before torch is imported, which takes seconds
sys.stdout.reconfigure(errors="replace")    # a terminal that lacks a character shows ? instead

import gpt
from compute import choose_compute

folder, step = models.find_model(source, data, tag)
tokenizer = models.load_tokenizer_of(folder, step, data)
compute = choose_compute(Ranks(0, 0, 1), settings)
model, meta = models.load_model(folder, step, compute.device, compute.dtype)
context = model.config.sequence_len
room = min(max_new_tokens, context // 2)    # kept free for the answer
loss = meta.get("loss") if source != "rl" else None
say(f"{source} model {tag} of {data}, step {meta['step']:,}"
    + (f", loss {loss:.3f}" if isinstance(loss, float) else "")
    + ("" if prompt else "; /new, /quit"))
seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed

# -------------------------------------------------------------------------------------------------
# answers

DIM, PLAIN = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
MARKS = {tokenizer.special("<|python_start|>"): DIM + "[",    # the calculator's part is dimmed
         tokenizer.special("<|python_end|>"): "]" + PLAIN,
         tokenizer.special("<|output_start|>"): DIM + "[= ",
         tokenizer.special("<|output_end|>"): "]" + PLAIN}

def answer(ids, number):
    """Streams the answer to the prompt `ids` to the terminal. -> its token ids"""
    global interrupted, answering
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be cut in tokens

    def show(row, token):
        if token in MARKS:
            print(decoder.decode(b"", True) + MARKS[token], end="", flush=True)
        else:
            print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    most = max(1, min(max_new_tokens, context - len(ids)))
    uniforms = None
    if temperature > 0:
        uniforms = common.rng(seed, number).random((1, max_new_tokens))
    calculate = None if source == "base" else execution.calculate
    interrupted, answering = False, True
    tokens, _ = gpt.generate(model, tokenizer, [ids], most, temperature, top_k, uniforms, calculate,
                             on_token=show, keep_going=lambda: not interrupted)[0]
    answering = False
    print(decoder.decode(b"", True) + PLAIN, flush=True)
    if len(tokens) == most and source != "base":
        why = "--max_new_tokens" if most == max_new_tokens else "the context is full"
        say(f"(cut after {most} tokens: {why})")
    return tokens

def wrap(role, ids):
    return [tokenizer.special(f"<|{role}_start|>"), *ids, tokenizer.special(f"<|{role}_end|>")]

def prompt_ids(turns):
    """Token ids for turns [user, assistant, user, ...], the user's as text and the assistant's as
    ids. The oldest are removed from the list where the context would overflow; of a single one that
    is too long only the end is read."""
    while True:
        parts = [wrap("assistant", turn) if i % 2 else wrap("user", tokenizer.encode(turn))
                 for i, turn in enumerate(turns)]
        too_many = sum(map(len, parts)) + 2 - (context - room)
        if too_many <= 0 or len(turns) == 1:
            break
        say("(the conversation is longer than the model's context: its oldest turn is forgotten)")
        del turns[:2]
    if too_many > 0:
        say(f"(longer than the model's context: the first {too_many:,} tokens are not read)")
        parts = [wrap("user", tokenizer.encode(turns[0])[too_many:])]
    if source == "base":  # it knows no turns: it goes on with the text
        return [tokenizer.bos, *parts[0][1:-1]]
    ids = [token for part in parts for token in part]
    return [tokenizer.bos, *ids, tokenizer.special("<|assistant_start|>")]

# -------------------------------------------------------------------------------------------------

if prompt:
    answer(prompt_ids([prompt]), 0)
    raise SystemExit(130 if interrupted else 0)
with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (the arrow keys in input())
turns, number, said = [], 0, ""
while said != "/quit":
    try:
        said = input("\n> ").strip()
    except EOFError:
        break
    if said == "/new":
        turns = []
        print("(a new conversation)")
    elif said not in ("", "/quit"):
        turns = [said] if source == "base" else [*turns, said]
        turns.append(answer(prompt_ids(turns), number))
        number += 1
