"""chat_cli.py: which model it takes, what it says where there is none, and what it shows while an answer comes."""
import os
import runpy
import signal
import sys
import time

import pytest
import torch

import checkpoint
import common
import pipeline
import gpt
import phase
import tokenizer as tok
from conftest import BYTES, REPO, ends, script

torch.set_num_threads(1)
QUICK = ["--device=cpu", "--dtype=float32", "--threads=1", "--max_new_tokens=12"]

def make(stage, data="toy", tag="d1", status="done", seed=0):
    """A tiny model with random weights, saved as a phase saves its own."""
    if not pipeline.tokenizer_dir(data).exists():
        tok.save_tokenizer(pipeline.tokenizer_dir(data), {bytes([i]): i for i in range(256)})
    config = gpt.GPTConfig(64, BYTES.vocab_size, 1, 1, 1, 32)
    model = gpt.GPT(config)
    model.init_weights(seed)
    torch.nn.init.normal_(model.lm_head.weight, 0, 1, generator=torch.Generator().manual_seed(seed))
    directory = pipeline.state_path(stage, data, tag)
    directory.mkdir(parents=True)
    phase.take_lock(directory)
    checkpoint.save(directory, 40, model.state_dict(), {}, {
        "model": vars(config), "tokenizer": BYTES.fingerprint, "num_steps": 60, "loss": 1.25, "seconds": 1.0, "batch_tokens": 64})
    phase.write(directory, {"phase": stage, "status": status, "reason": "deadline", "settings": {"data": data}, "inputs": {}, "free": {},
                            "next": None if status == "done" else f"python the_command_of_{stage}.py", "updated": time.time(), "starts": [0.0]})
    phase.release(directory)

def chat(state, *args, said=None):
    return script(state, "chat_cli.py", *QUICK, *args, said=said)

def test_a_missing_stage_is_named_with_what_exists_and_the_command_that_makes_it(state):
    out = script(state, "chat_cli.py")
    assert out.returncode == 2 and "there is no trained model" in out.stderr and "there is: nothing" in out.stderr
    assert out.stderr.strip().endswith("run: bash speedrun.sh --data=toy") and not state.exists()
    make("base")
    make("sft", status="interrupted")
    for args, says, command in [
            (["--source=rl"], "there is no rl model in", "python mid_train.py --data=toy --tag=d1"),
            (["--source=mid", "--data=toy"], "there is no mid model of toy in", "python mid_train.py --data=toy --tag=d1"),
            (["--tag=d9"], "there is no trained model d9 in", "python"),
            (["--source=rl", "--data=fineweb_edu"], "there is: nothing", "bash speedrun.sh --data=fineweb_edu")]:
        out = script(state, "chat_cli.py", *args)
        assert out.returncode == 2 and says in out.stderr and command in out.stderr.split("run: ")[1], out.stderr
        assert out.stderr.count("\n") == 1 and "Traceback" not in out.stderr and out.stdout == ""
        if "fineweb_edu" not in command:
            assert "base d1: step 40, loss 1.2500" in out.stderr and "old" in out.stderr and "not finished: sft d1" in out.stderr
    make("mid")
    out = script(state, "chat_cli.py", "--source=sft")
    assert out.returncode == 2 and out.stderr.strip().endswith("run: python the_command_of_sft.py"), "half done: its own command goes on"

@pytest.mark.parametrize("args,says", [
    (["--seed=-1"], "--seed"), (["--seed=x"], "--seed"), (["--source=xyz"], "--source"), (["--temperature=-1"], "--temperature"),
    (["--top_k=1.5"], "--top_k"), (["--max_new_tokens=0"], "--max_new_tokens"), (["--promt=x"], "--prompt"), (["-p"], "-p")])
def test_bad_settings(state, args, says):
    out = script(state, "chat_cli.py", *args)
    assert out.returncode == 2 and says in out.stderr and out.stderr.count("\n") == 1 and not state.exists()

def test_one_prompt_from_the_furthest_stage_and_the_same_again_with_a_seed(state):
    make("base", seed=1)
    make("sft", seed=2)
    make("rl", status="interrupted", seed=3)
    make("base", data="fineweb_edu", tag="d3", seed=4)
    os.utime(pipeline.state_path("base", "fineweb_edu", "d3") / "manifest_000040.json", (1e9, 1e9))  # trained long ago
    first = chat(state, "-p", "Hällo, --x=1", "--seed=1", "--top_k=0", "--temperature=1.0")
    assert first.returncode == 0 and "sft model d1 of toy, step 40, loss 1.250" in first.stderr, first.stderr
    assert "rl d1 is not finished" in first.stderr and len(first.stdout) > 1
    assert chat(state, "-p", "Hällo, --x=1", "--seed=1", "--top_k=0", "--temperature=1.0").stdout == first.stdout
    assert chat(state, "-p", "Hällo, --x=1", "--seed=2", "--top_k=0", "--temperature=1.0").stdout != first.stdout
    base = chat(state, "--source=base", "--prompt=Once", "--temperature=0")
    assert base.returncode == 0 and "base model d1 of toy" in base.stderr
    assert "base model d3 of fineweb_edu" in chat(state, "--data=fineweb_edu", "-p", "x").stderr

def test_a_conversation_longer_than_the_context_forgets_its_oldest_turn_aloud(state):
    make("sft")
    said = "\n".join(["a" * 15, "b" * 15, "/new", "", "c" * 15, "d" * 200, "/quit", "never read"]) + "\n"
    out = chat(state, said=said)
    assert out.returncode == 0 and out.stdout.count("\n> ") == 7 and "(a new conversation)" in out.stdout, out.stdout + out.stderr
    assert "oldest turn is forgotten" in out.stderr and out.stderr.count("are not read") == 1
    assert chat(state, said="hello").returncode == 0, "the end of the input is a way to leave"

@pytest.fixture
def in_process(state, monkeypatch):
    """Runs chat_cli.py in this process on a model whose answer is the given token ids -> its exit code"""
    make("sft")
    handler = signal.getsignal(signal.SIGINT)
    def start(answer, after=lambda i: None):
        def generate(model, tokenizer, prompts, max_new_tokens, temperature, top_k, uniforms, calculate, on_token, keep_going):
            start.prompt, came = prompts[0], []
            for i, token in enumerate(answer):
                if not keep_going():
                    break
                came.append(token)
                on_token(0, token)
                after(i)
            return [(came, [False] * len(came))]
        monkeypatch.setattr(gpt, "generate", generate)
        monkeypatch.setattr(sys, "argv", ["chat_cli.py", "--data=toy", "--threads=1", "--dtype=float32", "--device=cpu", "-p", "Hi"])
        with ends() as end:
            runpy.run_path(str(REPO / "chat_cli.py"), run_name="__main__")
        return end.code
    yield start
    signal.signal(signal.SIGINT, handler)

def test_characters_cut_between_tokens_come_out_whole_and_tool_calls_are_marked(in_process, capsys):
    special = lambda name: BYTES.special(f"<|{name}|>")
    calls = [special("python_start"), *b"2+2", special("python_end"), special("output_start"), *b"4", special("output_end")]
    assert in_process([*"é€😀 ".encode(), *calls, *" 好".encode(), *"好".encode()[:2]]) == 0
    assert capsys.readouterr().out == "é€😀 [2+2][= 4] 好\ufffd\n", "only what never came to its end is replaced"
    assert in_process.prompt == [BYTES.bos, special("user_start"), *b"Hi", special("user_end"), special("assistant_start")]

def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(in_process, capsys):
    interrupt = lambda i: os.kill(os.getpid(), signal.SIGINT) if i == 2 else None
    assert in_process(list(b"abcdefgh"), interrupt) == 130
    assert capsys.readouterr().out == "abc\n"
    twice = lambda i: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] if i == 2 else None
    assert in_process(list(b"abcdefgh"), twice) == 130
    assert capsys.readouterr().out.startswith("abc")
