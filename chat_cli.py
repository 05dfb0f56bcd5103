"""
Talk to a model.

    python chat_cli.py                          # the furthest stage that exists, of the data set trained last
    python chat_cli.py -p "Who are you?"        # one answer, then back to the shell
    python chat_cli.py --source=base --data=toy # the base model goes on with what you type

While it runs: /new starts a new conversation, /quit leaves, Ctrl-C stops an answer.
"""
import codecs
import signal
import sys

import checkpoint
import common
import configurator
import execution
import phase

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: the one trained last
source = ""                  # base, mid, sft or rl; empty: the furthest that exists
tag = ""                     # which model; empty: the newest
prompt = ""                  # one prompt instead of a conversation (-p "..." for short)
temperature = 0.6            # 0: always the most likely token
top_k = 50                   # of how many likely tokens it draws; 0: of all
max_new_tokens = 256         # tokens of an answer
seed = -1                    # of the draws; -1: another one each time
device = "auto"              # auto, cuda, mps, cpu
dtype = "auto"               # auto (measured), bfloat16, float32
threads = 0                  # CPU threads; 0: all cores
compile = False              # not compiled: every length is another shape
if "-p" in sys.argv[:-1]:
    at = sys.argv.index("-p")
    sys.argv[at:at + 2] = [f"--prompt={sys.argv[at + 1]}"]
settings = configurator.configure(globals())

common.check(temperature >= 0 and top_k >= 0 and max_new_tokens >= 1, "--temperature and --top_k must not be negative, --max_new_tokens at least 1")
common.check(source in ("", *common.STAGES), f"--source is base, mid, sft or rl, not {source!r}")

def trained():
    """[(when, data set, stage, tag)] of all finished models of all data sets"""
    found = []
    for root in {common.base_dir(), *(p for p in common.base_dir().glob("*") if p.is_dir())}:
        for stage, folder in common.STAGES.items():
            for manifest in root.glob(f"{folder}/*/manifest_*.json"):
                record = phase.read(manifest.parent) or {"status": "done", "settings": {}}
                name = record["settings"].get("data") or ("fineweb_edu" if root == common.base_dir() else root.name)
                if record["status"] == "done" and ".old-" not in manifest.parent.name:
                    found.append((manifest.stat().st_mtime, name, stage, manifest.parent.name))
    return sorted(found)

models = [m for m in trained() if (not data or common.data_root(m[1]) == common.data_root(data)) and (not source or m[2] == source) and (not tag or m[3] == tag)]
if not models:
    sets = [data] if data else sorted({m[1] for m in trained()})
    exists = "; ".join(f"{name}: {', '.join(checkpoint.what_exists(name))}" for name in sets if checkpoint.what_exists(name)) or "nothing"
    wanted = " ".join(x for x in (source, tag, f"of {data}" if data else "") if x) or "trained"
    common.fail(f"there is no {wanted} model in {common.base_dir()} (there is: {exists})",
                next_command=f"{checkpoint.COMMANDS[source]} --data={data or (sets or ['toy'])[0]}" if source and (data or sets) else "bash speedrun.sh")
data = data or models[-1][1]
source = source or max((m[2] for m in models if m[1] == data), key=list(common.STAGES).index)

import torch
import gpt

compute = common.init_compute(settings)
model, tokenizer, meta = checkpoint.load_model(source, data, tag or None, compute.device, compute.dtype)
print(f"{source} model {meta['tag']} of {data}, step {meta['step']:,}" + ("; type something, /new, /quit" if not prompt else ""), file=sys.stderr)
seed = seed if seed != -1 else int.from_bytes(__import__("os").urandom(4), "big")
interrupted = False

def on_interrupt(signum, frame):
    global interrupted
    if interrupted or not answering:
        print()
        sys.exit(0)
    interrupted = True

answering = False
signal.signal(signal.SIGINT, on_interrupt)

def answer(ids, turn):
    """Streams the answer to the prompt `ids` to the terminal; the calculator's part is dimmed. -> its token ids"""
    global interrupted, answering
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be cut between tokens
    dim = {tokenizer.special(f"<|{n}_start|>"): "\x1b[2m[" for n in ("python", "output")} | {tokenizer.special(f"<|{n}_end|>"): "]\x1b[0m" for n in ("python", "output")}
    def show(row, token):
        text = (dim[token] if sys.stdout.isatty() else dim[token].replace("\x1b[2m", "").replace("\x1b[0m", "")) if token in dim else decoder.decode(tokenizer.decode_bytes([token]))
        print(text, end="", flush=True)
    interrupted, answering = False, True
    uniforms = common.rng(seed, turn).random((1, max_new_tokens)) if temperature > 0 else None
    tokens, _ = gpt.generate(model, tokenizer, [ids], max_new_tokens, temperature, top_k, uniforms, execution.calculate if source != "base" else None,
                             on_token=show, keep_going=lambda: not interrupted)[0]
    print(decoder.decode(b"", final=True), flush=True)
    answering = False
    return tokens

def prompt_ids(turns):
    """Token ids for the user's and assistant's turns so far; the oldest turns are dropped where the context would overflow."""
    while True:
        if source == "base":
            ids = [tokenizer.bos, *tokenizer.encode(turns[-1])]
            return ids[-model.config.sequence_len:]
        ids = [tokenizer.bos]
        for i, turn in enumerate(turns):
            role = "user" if i % 2 == 0 else "assistant"
            ids += [tokenizer.special(f"<|{role}_start|>"), *(tokenizer.encode(turn) if isinstance(turn, str) else turn), tokenizer.special(f"<|{role}_end|>")]
        ids.append(tokenizer.special("<|assistant_start|>"))
        if len(ids) <= model.config.sequence_len - min(64, model.config.sequence_len // 4) or len(turns) == 1:
            return ids if len(turns) > 1 else ids[:1] + ids[1:][-model.config.sequence_len:]
        print("(the conversation is longer than the model's context: its oldest turn is forgotten)", file=sys.stderr)
        del turns[:2]

if prompt:
    answer(prompt_ids([prompt]), 0)
    raise SystemExit(0)
turns, number = [], 0
while True:
    try:
        said = input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        break
    if said == "/quit":
        break
    if said == "/new":
        turns = []
        print("(a new conversation)")
    elif said:
        turns.append(said)
        turns.append(answer(prompt_ids(turns), number))
        number += 1
