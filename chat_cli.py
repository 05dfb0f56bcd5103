"""
Talk to a model.

    python chat_cli.py                          # the furthest stage that exists, of the data set trained last
    python chat_cli.py -p "Who are you?"        # one answer, then back to the shell
    python chat_cli.py --source=base --data=toy # the base model goes on with what you type

While it runs: /new starts a new conversation, /quit leaves, Ctrl-C stops an answer, a second one leaves.
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
import phase
import status

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: the one trained last
source = ""                  # base, mid, sft or rl; empty: the furthest that exists
tag = ""                     # which model; empty: the newest
prompt = ""                  # one prompt instead of a conversation (-p "..." for short)
temperature = 0.6            # 0: always the most likely token
top_k = 50                   # of how many likely tokens it draws; 0: of all
max_new_tokens = 256         # tokens of an answer
seed = None                  # of the draws: the same one gives the same answers; None: another one each time
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads; 0: all cores
compile = False              # not compiled: every length is another shape
if "-p" in sys.argv[1:-1]:
    at = sys.argv.index("-p")
    sys.argv[at:at + 2] = [f"--prompt={sys.argv[at + 1]}"]
settings = configurator.configure(globals())

STAGES = list(common.STAGES)
common.check(temperature >= 0 and top_k >= 0, "--temperature and --top_k must not be negative")
common.check(source in ("", *STAGES), f"--source is base, mid, sft or rl, not {source!r}")

# ---------------------------------------------------------------------------------------------------------------------
# which model

def say(*words):
    print(*words, file=sys.stderr, flush=True)

def find():
    """[(when, data set, stage, tag, state)] of everything with a checkpoint; state is "done" or what status.py says"""
    found = []
    for root, name in status.data_sets().items():
        for stage, folder in common.STAGES.items():
            for directory in (root / folder).glob("*"):
                if ".old-" in directory.name or (data and root != common.data_root(data)):
                    continue
                if not phase.read(directory):
                    checkpoint.adopt(directory)  # nanochat's, if it has left one
                if steps := checkpoint.steps(directory):
                    when = (directory / checkpoint.manifest_name(steps[0])).stat().st_mtime
                    found.append((when, data or name, stage, directory.name, status.describe(directory)[0]))
    return sorted(found)

def missing(found):
    """Ends with 2: what is missing, what there is, and the command that makes it."""
    sets = list(dict.fromkeys(name for _, name, *_ in found))
    exists = "; ".join(f"{name}: {', '.join(checkpoint.what_exists(name))}" for name in sets)
    half = [f"{stage} {name}" for _, _, stage, name, state in found if state != "done"]
    wanted = " ".join(filter(None, (source or "trained", "model", tag, f"of {data}" if data else "")))
    of = data or (sets or ["toy"])[-1]
    command = f"bash speedrun.sh --data={of}"
    for stage in STAGES[STAGES.index(source or found[-1][2])::-1] if found else []:  # back to what can be made now
        directory = common.stage_dir(stage, of, tag or found[-1][3])
        if status.describe(directory)[0] == "done":
            break
        usual = f"{checkpoint.COMMANDS[stage]} --data={of} --tag={directory.name}"
        command = status.read(directory / "phase.json").get("next") or usual
    common.fail(f"there is no {wanted} in {common.base_dir()}; there is: {exists or 'nothing'}"
                + (f" (not finished: {', '.join(half)})" if half else ""), next_command=command)

there = find()
models = [m for m in there if m[4] == "done" and source in ("", m[2]) and tag in ("", m[3])]
if not models:
    missing(there)
data = models[-1][1]
_, _, source, tag, _ = max((m for m in models if m[1] == data), key=lambda m: (STAGES.index(m[2]), m[0]))
for _, name, stage, other, state in there:
    if state != "done" and (name, other) == (data, tag) and STAGES.index(stage) > STAGES.index(source):
        say(f"({stage} {other} is not finished, python status.py says why; this is what comes before it)")

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

import torch
import gpt

compute = common.init_compute(settings)
model, tokenizer, meta = checkpoint.load_model(source, data, tag, compute.device, compute.dtype)
context = model.config.sequence_len
room = min(max_new_tokens, context // 2)    # kept free for the answer
loss = f", loss {meta['loss']:.3f}" if isinstance(meta.get("loss"), float) and source != "rl" else ""
say(f"{source} model {tag} of {data}, step {meta['step']:,}{loss}" + ("" if prompt else "; /new, /quit"))
seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
DIM, PLAIN = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
MARKS = {tokenizer.special(f"<|{name}_{end}|>"): mark for name, opens in (("python", "["), ("output", "[= "))
         for end, mark in (("start", DIM + opens), ("end", "]" + PLAIN))}

def answer(ids, number):
    """Streams the answer to the prompt `ids` to the terminal, the calculator's part dimmed. -> the token ids"""
    global interrupted, answering
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be cut between tokens
    def show(row, token):
        mark, new = MARKS.get(token), tokenizer.decode_bytes([token])
        print(decoder.decode(b"", True) + mark if mark else decoder.decode(new), end="", flush=True)
    most = max(1, min(max_new_tokens, context - len(ids)))
    uniforms = common.rng(seed, number).random((1, max_new_tokens)) if temperature > 0 else None
    interrupted, answering = False, True
    calculate = None if source == "base" else execution.calculate
    tokens, _ = gpt.generate(model, tokenizer, [ids], most, temperature, top_k, uniforms, calculate,
                             on_token=show, keep_going=lambda: not interrupted)[0]
    answering = False
    print(decoder.decode(b"", True) + PLAIN, flush=True)
    if len(tokens) == most and source != "base":
        say(f"(cut after {most} tokens: {'--max_new_tokens' if most == max_new_tokens else 'the context is full'})")
    return tokens

def prompt_ids(turns):
    """Token ids for turns [user, assistant, user, ...], the user's as text and the assistant's as ids. The oldest are
    removed from the list where the context would overflow; of a single one that is too long only the end is read."""
    wrap = lambda role, ids: [tokenizer.special(f"<|{role}_start|>"), *ids, tokenizer.special(f"<|{role}_end|>")]
    while True:
        parts = [wrap("assistant", t) if i % 2 else wrap("user", tokenizer.encode(t)) for i, t in enumerate(turns)]
        too_many = max(0, sum(map(len, parts)) + 2 - (context - room))
        if not too_many or len(turns) == 1:
            break
        say("(the conversation is longer than the model's context: its oldest turn is forgotten)")
        del turns[:2]
    if too_many:
        say(f"(longer than the model's context: the first {too_many:,} tokens are not read)")
        parts = [wrap("user", tokenizer.encode(turns[0])[too_many:])]
    if source == "base":  # it knows no turns: it goes on with the text
        return [tokenizer.bos, *parts[0][1:-1]]
    return [tokenizer.bos, *(t for part in parts for t in part), tokenizer.special("<|assistant_start|>")]

if prompt:
    answer(prompt_ids([prompt]), 0)
    raise SystemExit(130 if interrupted else 0)
with contextlib.suppress(ImportError):
    import readline  # the arrow keys in input()
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
        turns = [*turns, said] if source != "base" else [said]
        turns.append(answer(prompt_ids(turns), number))
        number += 1
