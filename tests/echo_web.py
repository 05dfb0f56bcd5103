"""chat_web.py with a model that is told what to say, for the tests of the server and the page:

    python tests/echo_web.py --port=0 ...   # settings of chat_web.py

Everything is real but the draws: the answer to "abc" is "You said: abc"; where a message begins
with "slow" a token takes $ECHO_SECONDS; "2+2?" asks the calculator.
"""
import os
import runpy
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import engine
from conftest import BYTES

SECONDS = float(os.environ.get("ECHO_SECONDS", "0.05"))

def special(name):
    return BYTES.special(f"<|{name}|>")

def reply_to(said):
    """-> token ids"""
    if said == "2+2?":
        return [*b"It is ", special("python_start"), *b"2+2", special("python_end"), *b"4."]
    return list(b"You said: " + said.encode())

def next_token(answer):
    start, end = special("user_start"), special("user_end")
    begins = len(answer.prompt) - answer.prompt[::-1].index(start)
    said = BYTES.decode(answer.prompt[begins:answer.prompt.index(end, begins)])
    reply = reply_to(said)
    own = [token for token, forced in zip(answer.tokens, answer.forced) if not forced]
    return said, [*reply, special("assistant_end")][len(own)]

def draw(logits, answers):
    drawn = [next_token(answer) for answer in answers]
    if any(said.startswith("slow") for said, _ in drawn):
        time.sleep(SECONDS)
    return [token for _, token in drawn]

engine.draw = draw
sys.argv[0] = str(REPO / "chat_web.py")
runpy.run_path(sys.argv[0], run_name="__main__")
