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
import secrets
import shlex
import signal
import sys
from types import SimpleNamespace

import common
import configurator
import execution
import models
import pipeline
import status
from ranks import Ranks

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: the one trained last
source = ""                  # stage of training: base, mid, sft or rl; empty: the furthest
tag = ""                     # which model, d4 for instance; empty: the newest
prompt = ""                  # answer this one prompt and end (-p "..." for short)
temperature = 0.6            # sampling temperature; 0: always the most likely token
top_k = 50                   # sample from the k likeliest tokens; 0: from all
max_new_tokens = 256         # tokens of an answer at most
seed = None                  # random seed: the same gives the same answers; None: a new one
device = "auto"              # device to compute on: auto, cuda, mps, cpu
dtype = "auto"               # compute dtype: auto (the faster), bfloat16, float32
weights = "auto"             # auto (in dtype), or int8: faster on a CPU, less exact
threads = 0                  # CPU threads; 0: all cores
settings = configurator.configure(globals(), short={"-p": "prompt"})

STAGES = pipeline.STAGES
common.check(prompt or "-p" not in sys.argv, "-p needs a prompt, as in -p \"Who are you?\"")

# -------------------------------------------------------------------------------------------------
# which model

def say(*words):
    print(*words, file=sys.stderr, flush=True)

sets = [data] if data else status.data_sets()
found = sorted(model for name in sets for model in models.trained(name))
asked_for = [m for m in found if source in ("", m.stage) and tag in ("", m.tag)]
usable = [m for m in asked_for if m.finished]
if not found:
    of_data = f" of {data}" if data else ""
    common.fail(f"there is no {source or 'trained'} model{of_data} in {pipeline.base_dir()}",
                next_command=shlex.join(["bash", "speedrun.sh", f"--data={data or 'toy'}"]))
if usable:
    data = usable[-1].data
    chosen = max((m for m in usable if m.data == data),
                 key=lambda m: (STAGES.index(m.stage), m.saved))
    source, tag = chosen.stage, chosen.tag
last = (asked_for or found)[-1]  # where none is usable find_model says what to do for one
source, data, tag = source or last.stage, data or last.data, tag or last.tag
with contextlib.redirect_stdout(sys.stderr):  # what it says is no answer
    folder, step = models.find_model(source, data, tag)
for m in found:
    later = STAGES.index(m.stage) > STAGES.index(source)
    if later and (m.data, m.tag) == (data, tag) and not m.finished:
        say(f"({m.stage} {tag} is not finished: python status.py says why; this is the stage "
            "before it)")

# Ctrl-C stops an answer; where there is none to stop it leaves
now = SimpleNamespace(answering=False, interrupted=False)

def on_interrupt(signum, frame):
    if now.interrupted or not now.answering:
        print()
        sys.exit(130)
    now.interrupted = True

signal.signal(signal.SIGINT, on_interrupt)  # before torch is imported, which takes seconds

import engine
from compute import choose_compute

tokenizer = models.load_tokenizer_of(folder, step, data)
compute = choose_compute(Ranks(0, 0, 1), settings)
common.check(weights != "int8" or compute.device.type == "cpu", "--weights=int8 needs --device=cpu")
model = models.load_to_use(folder, step, compute.device, compute.dtype)
packed = engine.Packed(model, 1, weights)
context = model.config.sequence_len
longest_prompt = context - min(max_new_tokens, context // 2)  # the rest is kept for the answer
COMMANDS = "(/new: new conversation, /quit: leave)"
seed = secrets.randbits(32) if seed is None else seed
drawn = "always the likeliest token"
if temperature > 0:
    drawn = f"temperature {temperature:g}, top_k {top_k or 'off'}, seed {seed}"
say(f"{source} model {tag} of {data}, step {step:,}; {drawn}, max_new_tokens {max_new_tokens}, "
    f"context of {context:,} tokens; {compute}")
if not prompt:
    say(COMMANDS)

# -------------------------------------------------------------------------------------------------
# answers

MARKS = {tokenizer.special("<|python_start|>"): "[", tokenizer.special("<|python_end|>"): "]",
         tokenizer.special("<|output_start|>"): "[= ", tokenizer.special("<|output_end|>"): "]"}

def asked(text):
    """What the user says, as token ids; the base model knows no turns, it goes on with the text."""
    if source == "base":
        return tokenizer.encode(text)
    return tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]})[1:]

def prompt_of(turns):
    """The token ids of all turns (lists of ids: what was asked and answered). The oldest leave the
    list where the context would overflow; of a single one only the end is read."""
    while len(turns) > 1 and 1 + sum(map(len, turns)) > longest_prompt:
        say("(the conversation is longer than the model's context: its oldest turn is forgotten)")
        del turns[0]
    ids = [token for turn in turns for token in turn]
    too_many = max(0, 1 + len(ids) - longest_prompt)
    if too_many:
        say(f"(longer than the model's context: the first {too_many:,} tokens are not read)")
    return [tokenizer.bos, *ids[too_many:]]

def keep_going():
    return not now.interrupted and not common.reader_is_gone()

def answer(ids, number):
    """Streams the answer to the prompt `ids` to the terminal. -> its token ids"""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be cut in tokens

    def show(row, token):
        if token in MARKS:
            text = decoder.decode(b"", True) + MARKS[token]
        else:
            text = decoder.decode(tokenizer.decode_bytes([token]))
        print(text, end="", flush=True)
    most = min(max_new_tokens, context - len(ids))
    uniforms = common.rng(seed, number).random((1, max_new_tokens))
    now.interrupted = False
    now.answering = True
    tokens, _ = engine.generate(model, tokenizer, [ids], most, temperature, top_k, uniforms,
                                execution.calculate, on_token=show, keep_going=keep_going,
                                packed=packed)[0]
    now.answering = False
    print(decoder.decode(b"", True), flush=True)
    if len(tokens) == most:
        why = "raise --max_new_tokens" if most == max_new_tokens else "the context is full: /new"
        say(f"(cut off after {most} tokens: {why})")
    return tokens

# -------------------------------------------------------------------------------------------------

if prompt:
    answer(prompt_of([asked(prompt)]), 0)
    raise SystemExit(130 if now.interrupted else 0)
# the arrow keys in input(); a dumb terminal would show their codes
if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
turns, number, said = [], 0, ""
while said != "/quit" and not common.reader_is_gone():
    try:
        said = input("\n> ").strip()
    except EOFError:
        print()
        break
    if said == "/new":
        turns = []
        print("(a new conversation)")
    elif said.startswith("/") and said[1:].isalpha() and said != "/quit":
        say(COMMANDS)
    elif said not in ("", "/quit"):
        if source == "base":
            turns = []
        turns.append(asked(said))
        tokens = answer(prompt_of(turns), number)
        turns[-1] += [*tokens, tokenizer.special("<|assistant_end|>")]
        number += 1
