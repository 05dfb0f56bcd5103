"""
Talk to a model.

    python chat_cli.py                          # the furthest stage of the model trained last
    python chat_cli.py -p "Who are you?"        # one answer, then back to the shell
    python chat_cli.py --source=base --data=toy # the base model goes on with what you type

While it runs /help lists what else can be said; Ctrl-C stops an answer, a second one leaves.
"""
import contextlib
import json
import os
import secrets
import signal
import sys
import time
from itertools import chain
from types import SimpleNamespace

import common
import configurator
import execution
import models
import pipeline
import talk
from ranks import Ranks

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: what was trained last
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

common.check(prompt or "-p" not in sys.argv, "-p needs a prompt, as in -p \"Who are you?\"")
source, data, tag, found = talk.choose(data, source, tag)

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

compute = choose_compute(Ranks(0, 0, 1), settings)
seed = secrets.randbits(32) if seed is None else seed

def load(stage, folder, step):
    """Takes the model of a stage, as talk.find has found it."""
    now.tokenizer = models.load_tokenizer_of(folder, step, data)
    now.model = models.load_to_use(folder, step, compute.device, compute.dtype)
    now.packed = engine.Packed(now.model, 1, weights)
    now.source, now.context = stage, now.model.config.sequence_len
    drawn = "always the likeliest token"
    if temperature > 0:
        drawn = f"temperature {temperature:g}, top_k {top_k or 'off'}, seed {seed}"
    talk.say(f"{talk.description(stage, data, tag, step)}; {drawn}, max_new_tokens "
             f"{max_new_tokens}, context of {now.context:,} tokens; {compute}")
    if stage == "base":
        talk.say("the base model has not learnt to chat: it goes on with what you type")

load(source, *found)

# -------------------------------------------------------------------------------------------------
# answers. A turn: what was said, and the token ids of the answer, None while there is none.

turns, system, number = [], "", 0  # number: of the next answer, for its draws
MARKS = {now.tokenizer.special("<|python_start|>"): "[",
         now.tokenizer.special("<|python_end|>"): "]",
         now.tokenizer.special("<|output_start|>"): "[= ",
         now.tokenizer.special("<|output_end|>"): "]"}

def ids_of(turn):
    """The token ids of a turn. The base model knows none: it goes on with the text."""
    if now.source == "base":
        return now.tokenizer.encode(turn.said)
    messages = [{"role": "system", "content": system}] if system and turn is turns[0] else []
    messages.append({"role": "user", "content": turn.said})
    ids = now.tokenizer.render_for_completion({"messages": messages})[1:]
    if turn.answer is not None:
        ids += [*turn.answer, now.tokenizer.special("<|assistant_end|>")]
    return ids

def ids_of_all():
    return [now.tokenizer.bos, *chain.from_iterable(map(ids_of, turns))]

def prompt_ids():
    """The token ids of all turns. The oldest are forgotten where the context would overflow; of a
    single one only the end is read."""
    longest = now.context - talk.room_for_answer(now.context, max_new_tokens)
    ids = ids_of_all()
    while len(turns) > 1 and len(ids) > longest:
        talk.say("(the conversation is longer than the model's context: its oldest turn is "
                 "forgotten)")
        del turns[0]
        ids = ids_of_all()
    too_many = max(0, len(ids) - longest)
    if too_many:
        talk.say(f"(longer than the model's context: the first {too_many:,} tokens are not read)")
    return [now.tokenizer.bos, *ids[1 + too_many:]]

def keep_going():
    return not now.interrupted and not common.reader_is_gone()

def answer():
    """Streams the answer to the last turn to the terminal."""
    global number
    if now.source == "base":
        del turns[:-1]
    ids = prompt_ids()
    speech = talk.Speech(now.tokenizer)

    def show(token):
        print(speech.add(token)[1] + MARKS.get(token, ""), end="", flush=True)
    most = min(max_new_tokens, now.context - len(ids))
    uniforms = common.rng(seed, number).random((1, max_new_tokens))
    now.interrupted, now.answering = False, True
    began = time.perf_counter()
    tokens, _ = engine.generate(now.model, now.tokenizer, [ids], most, temperature, top_k, uniforms,
                                execution.calculate, on_token=show, keep_going=keep_going,
                                packed=now.packed)[0]
    now.seconds, now.answering = time.perf_counter() - began, False
    print(speech.end()[1], flush=True)
    if len(tokens) == most:
        why = "raise --max_new_tokens" if most == max_new_tokens else "the context is full: /new"
        talk.say(f"(cut off after {most} tokens: {why})")
    turns[-1].answer = tokens
    number += 1

if prompt:
    turns.append(SimpleNamespace(said=prompt, answer=None))
    answer()
    raise SystemExit(130 if now.interrupted else 0)

# -------------------------------------------------------------------------------------------------
# the conversation

HELP = """/new, /clear      begin a new conversation
/regen            another answer to what you said last
/source STAGE     go on with the model of another stage: base, mid, sft, rl
/temp NUMBER      sampling temperature; 0: always the likeliest token
/topk NUMBER      sample from so many of the likeliest tokens; 0: from all
/system TEXT      what every conversation begins with; alone: nothing
/save FILE        write the conversation as a line of JSON, as chat_sft.py reads it
/stats            tokens of the last answer, and how fast it came
/help             this
/quit             leave (or Ctrl-D)"""
SHORT_HELP = "(/help: what else can be said, /quit: leave)"

def conversation():
    """The conversation as a line of a file of conversations holds it."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        speech = talk.Speech(now.tokenizer)
        parts = talk.joined([*map(speech.add, turn.answer), speech.end()])
        messages += [{"role": "user", "content": turn.said},
                     {"role": "assistant",
                      "content": [{"type": kind, "text": text} for kind, text in parts]}]
    return {"messages": messages}

def command(word, rest):
    """What begins with a slash. Failure where it cannot be done."""
    global temperature, top_k, system
    if word in ("/regen", "/stats"):
        common.check(turns, f"{word}: nothing was said yet")
    if word in ("/new", "/clear", "/system"):
        system = rest if word == "/system" else system
        turns.clear()
        print("(a new conversation)")
    elif word == "/regen":
        turns[-1].answer = None
        answer()
    elif word == "/source":
        common.check(rest in pipeline.STAGES, f"/source takes {', '.join(pipeline.STAGES)}")
        load(rest, *talk.find(rest, data, tag))
    elif word == "/temp":
        temperature = configurator.convert("temperature", rest, temperature)
    elif word == "/topk":
        top_k = configurator.convert("top_k", rest, top_k)
    elif word == "/save":
        common.check(rest, "/save needs the name of a file")
        path = os.path.expanduser(rest)
        common.check(not os.path.exists(path), f"{rest} is there already")
        common.check(turns, "/save: nothing was said yet")
        try:
            with open(path, "x", encoding="utf-8") as f:
                f.write(json.dumps(conversation(), ensure_ascii=False) + "\n")
        except OSError as e:
            common.fail(f"{rest} cannot be written: {e}")
        print(f"(saved in {rest})")
    elif word == "/stats":
        made = len(turns[-1].answer)
        talk.say(f"({made} tokens in {now.seconds:.2f} s, {made / now.seconds:,.0f} tokens/s; the "
                 f"conversation is {len(ids_of_all()):,} of {now.context:,} tokens)")
    elif word == "/help":
        talk.say(HELP)
    else:
        talk.say(SHORT_HELP)

# the arrow keys in input(), and what was typed before; a dumb terminal would show their codes
history = pipeline.base_dir() / "chat_history"
if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
    with contextlib.suppress(ImportError, OSError):
        import atexit
        import readline

        def keep_history():
            with contextlib.suppress(OSError):
                readline.set_history_length(1000)
                readline.write_history_file(history)
        atexit.register(keep_history)
        readline.read_history_file(history)
talk.say(SHORT_HELP)
while not common.reader_is_gone():
    try:
        said = input("\n> ").strip()
    except EOFError:
        print()
        break
    if said == "/quit":
        break
    word, _, rest = said.partition(" ")
    if said.startswith("/") and word[1:].isalpha():
        try:
            command(word, rest.strip())
        except common.Failure as e:
            talk.say(f"({e})")
    elif said:
        turns.append(SimpleNamespace(said=said, answer=None))
        answer()
