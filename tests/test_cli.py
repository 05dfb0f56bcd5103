"""chat_cli.py: which model it takes, what it says where there is none, and what it shows while an
answer comes."""
import contextlib
import json
import os
import pty
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
import common
import engine
import gpt
import models
import pipeline
import talk
import tokenizer as tok
from conftest import BYTES, REPO, ends, environment, exit_code, save_model, script

torch.set_num_threads(1)
COMPUTE = ["--device=cpu", "--dtype=float32", "--threads=1"]

def make(stage, data="toy", tag="d1", status="done", seed=0):
    """A tiny model with random weights, saved as a phase saves its own."""
    if not pipeline.tokenizer_dir(data).exists():
        tok.save_tokenizer(pipeline.tokenizer_dir(data), BYTES.ranks)
    model = gpt.GPT(gpt.GPTConfig(64, BYTES.vocab_size, 1, 1, 1, 32))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.lm_head.weight, 0, 1, generator=generator)
    folder = save_model(stage, data, tag, model, BYTES, step=40, num_steps=60, loss=1.25,
                        seconds=1.0, batch_tokens=64)
    record = {"phase": stage, "status": status, "reason": "deadline", "settings": {"data": data},
              "inputs": {}, "free": {}, "updated": time.time(), "starts": [0.0],
              "next": None if status == "done" else f"python the_command_of_{stage}.py"}
    common.atomic_write(folder / "phase.json", json.dumps(record))

def chat(state, *args, said=None):
    return script(state, "chat_cli.py", *COMPUTE, "--max_new_tokens=12", *args, said=said)

# ---- which model

def test_a_missing_stage_is_named_with_what_exists_and_the_command_that_makes_it(state):
    out = script(state, "chat_cli.py")
    assert out.returncode == 2 and "there is no trained model" in out.stderr
    assert out.stderr.strip().endswith("run: bash speedrun.sh --data=toy") and not state.exists()

    make("base")
    make("sft", status="interrupted")
    base = "python base_train.py --data=toy config/toy_base.py --depth=9"
    mid = "python mid_train.py --data=toy config/toy_mid.py --tag=d1"
    for args, says, command in [
            (["--source=rl"], "there is no rl model d1 of the data set toy in", mid),
            (["--source=mid", "--data=toy"], "there is no mid model d1 of the data set toy", mid),
            (["--source=base", "--tag=d9"], "there is no base model d9 of", base),
            (["--tag=d9"], "there is no sft model d9 of", base),
            (["--source=rl", "--data=fineweb_edu"], "there is no rl model of fineweb_edu in",
             "bash speedrun.sh --data=fineweb_edu")]:
        out = script(state, "chat_cli.py", *args)
        assert out.returncode == 2 and says in out.stderr, out.stderr
        assert out.stderr.split("run: ")[1].strip() == command, out.stderr
        assert out.stderr.count("\n") == 1 and "Traceback" not in out.stderr and out.stdout == ""
        if "fineweb_edu" not in command:
            assert "base d1: step 40, " in out.stderr and " ago; sft" in out.stderr
            assert re.search(r"sft d1: step 40, saved \S+ ago, not finished", out.stderr)

    make("mid")
    make("base", tag="d3")  # saved last
    out = script(state, "chat_cli.py", "--source=sft")
    assert out.returncode == 2 and "sft model d1 of toy is only half trained" in out.stderr
    own = "run: python the_command_of_sft.py"
    assert out.stderr.strip().endswith(own), "half done: its own command goes on"

def test_the_command_for_a_missing_model_names_all_that_defines_it(state):
    data = str(state.parent / "my books")
    assert shlex.split(models.command_for("base", data, "d12")) == [
        "python", "base_train.py", f"--data={data}", "--depth=12"]
    assert shlex.split(models.command_for("base", "climbmix", "wide one")) == [
        "python", "base_train.py", "--data=climbmix", "--tag=wide one"]
    assert models.command_for("rl", "climbmix", "") == "python base_train.py --data=climbmix"
    make("base", data=data, tag="d12")
    assert shlex.split(models.command_for("rl", data, "d12")) == [
        "python", "mid_train.py", f"--data={data}", "--tag=d12"]
    assert exit_code(models.find_parent, "sft", "climbmix", "d6", try_out=True) == 2

def test_it_is_the_model_that_was_trained_last_at_its_furthest_stage(state):
    for seconds, stage, tag in ((100, "rl", "d2"), (50, "mid", "d4"), (40, "sft", "d4"),
                                (30, "base", "d4")):
        make(stage, tag=tag)
        manifest = pipeline.state_path(stage, "toy", tag) / "manifest_000040.json"
        os.utime(manifest, (time.time() - seconds,) * 2)
    assert talk.choose("", "", "")[:3] == ("sft", "toy", "d4")
    assert talk.choose("toy", "rl", "")[:3] == ("rl", "toy", "d2")
    assert talk.choose("", "", "d2")[:3] == ("rl", "toy", "d2")

def test_an_older_checkpoint_is_not_taken_for_the_finished_model(state, capsys):
    make("base", tag="d2")
    folder = pipeline.state_path("base", "toy", "d2")
    record = common.read_json(folder / "phase.json")
    common.atomic_write(folder / "phase.json", json.dumps({**record, "step": 40}))
    assert models.find_model("base", "toy") == (folder, 40)
    weights = folder / "model_000040.pt"
    checkpoint.save(folder, 30, torch.load(weights), {}, checkpoint.load_meta(folder, 40), keep=2)
    weights.write_bytes(b"damaged")
    assert exit_code(models.find_model, "base", "toy") == 2
    said = capsys.readouterr().err
    assert "model_000040.pt has 7 bytes" in said and "train it again from step 30 on" in said

def test_a_model_without_its_optimizer_is_talked_to_and_a_damaged_one_is_named(state):
    make("sft")
    folder = pipeline.state_path("sft", "toy", "d1")
    (folder / "optim_000040.pt").unlink()
    out = chat(state, "-p", "x")
    assert out.returncode == 0, out.stderr
    weights = folder / "model_000040.pt"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    out = chat(state, "-p", "x")
    assert out.returncode == 2 and out.stdout == "", "what is no answer goes to stderr"
    assert "does not match its checksum" in out.stderr and "holds no whole checkpoint" in out.stderr
    assert "Traceback" not in out.stderr

@pytest.mark.parametrize("args,says", [
    (["--seed=-1"], "--seed"), (["--seed=x"], "--seed"), (["--source=xyz"], "--source"),
    (["--temperature=-1"], "--temperature"), (["--top_k=1.5"], "--top_k"),
    (["--max_new_tokens=0"], "--max_new_tokens"), (["--promt=x"], "--prompt"), (["-p"], "-p")])
def test_bad_settings(state, args, says):
    out = script(state, "chat_cli.py", *args)
    assert out.returncode == 2 and says in out.stderr
    assert out.stderr.count("\n") == 1 and not state.exists()

def test_one_prompt_from_the_furthest_stage_and_the_same_again_with_a_seed(state):
    make("base", seed=1)
    make("sft", seed=2)
    make("rl", status="interrupted", seed=3)
    make("base", data="fineweb_edu", tag="d3", seed=4)
    for path in pipeline.state_path("base", "fineweb_edu", "d3").iterdir():
        os.utime(path, (1e9, 1e9))  # trained long ago

    def drawn(seed):
        return chat(state, "-p", "Hällo, --x=1", f"--seed={seed}", "--top_k=0", "--temperature=1.0")
    first = drawn(1)
    assert first.returncode == 0, first.stderr
    said = first.stderr.splitlines()[-2]
    assert re.match(r"sft model d1 of toy, step 40, \d+s old; temperature 1, top_k off, seed 1, ",
                    said)
    assert "max_new_tokens 12, context of 64 tokens; cpu, float32, 1 threads" in said
    assert "rl d1 is not finished" in first.stderr and len(first.stdout) > 1
    assert drawn(1).stdout == first.stdout
    assert drawn(2).stdout != first.stdout
    base = chat(state, "--source=base", "--prompt=Once", "--temperature=0")
    assert base.returncode == 0 and "base model d1 of toy" in base.stderr
    out = chat(state, "--data=fineweb_edu", "-p", "x")
    assert "base model d3 of fineweb_edu" in out.stderr

# ---- the conversation

def test_a_conversation_longer_than_the_context_forgets_its_oldest_turn_aloud(state):
    make("sft")
    turns = ["a" * 15, "b" * 15, "/new", "", "c" * 15, "d" * 200, "/quit", "never read"]
    out = chat(state, said="\n".join(turns) + "\n")
    assert out.returncode == 0, out.stdout + out.stderr
    assert out.stdout.count("\n> ") == 7 and "(a new conversation)" in out.stdout
    assert "oldest turn is forgotten" in out.stderr and out.stderr.count("are not read") == 1
    assert chat(state, said="hello").returncode == 0, "the end of the input is a way to leave"

def test_bytes_that_are_no_text_do_not_end_the_conversation(state):
    make("sft")
    command = [sys.executable, "chat_cli.py", *COMPUTE, "--max_new_tokens=3"]
    out = subprocess.run(command, cwd=REPO, capture_output=True, check=False,
                         input=b"a\xffb\nthe next\n",
                         env={**environment(state), "PYTHONIOENCODING": "ascii"})
    assert out.returncode == 0 and out.stdout.count(b"\n> ") == 3, out.stderr
    as_argument = b"a\xffb".decode(errors="surrogateescape")
    assert BYTES.decode(BYTES.encode(as_argument)) == "a\ufffdb"

def test_a_conversation_whose_answers_nobody_reads_ends(state):
    make("sft")
    shell = f"yes | {sys.executable} chat_cli.py {' '.join(COMPUTE)} | head -n 3"
    out = subprocess.run(["bash", "-c", f"{shell}; exit ${{PIPESTATUS[1]}}"], cwd=REPO, text=True,
                         env=environment(state), capture_output=True, check=False, timeout=60)
    assert out.returncode == 0 and "Broken" not in out.stderr and "Traceback" not in out.stderr

def test_no_escape_codes_where_the_terminal_is_dumb(state):
    make("sft")
    screen, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "chat_cli.py", *COMPUTE], cwd=REPO,
                               stdin=terminal, stdout=terminal, stderr=terminal,
                               env={**environment(state), "TERM": "dumb", "NO_COLOR": "1"})
    os.close(terminal)
    os.write(screen, b"/new\n/quit\n")
    said = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while part := os.read(screen, 4096):
            said += part
    assert process.wait(60) == 0 and b"(a new conversation)" in said
    assert b"\x1b" not in said

def test_what_can_be_said_besides(state, tmp_path):
    make("base", seed=1)
    make("sft", seed=2)
    saved = tmp_path / "talk.jsonl"
    said = ["/regen", "/stats", f"/save {saved}", "/nothing", "/help", "hello", "/stats", "/regen",
            f"/save {saved}", f"/save {saved}", "/save /no/such/folder/x", "/temp hot", "/temp -1",
            "/temp 0", "/topk 5", "/regen", "/regen", "/source rl", "/source x", "/source base",
            "Once", "/source sft", "/system Be kind.", "hello again", "/clear"]
    out = chat(state, "--seed=1", "--temperature=1", "--top_k=0", said="\n".join(said) + "\n")
    assert out.returncode == 0 and "Traceback" not in out.stderr, out.stderr
    for words in ("/regen: nothing was said", "/stats: nothing was said", "/save: nothing was said",
                  "tokens/s; the conversation is", "is there already", "cannot be written",
                  "--temperature takes", "--temperature must be 0 to 100", "/source takes",
                  "there is no rl model d1", "base model d1 of toy", "has not learnt to chat",
                  "another answer to what you said last"):
        assert words in out.stderr, words
    assert out.stderr.count("/help: what else can be said") == 2, "at the start, and /nothing"
    shown = out.stdout.split("\n> ")
    first, second, third, fourth = (shown[said.index("hello") + 1], shown[8], shown[16], shown[17])
    assert first != second, "other draws"
    assert third == fourth, "without draws"
    conversation, = common.read_json_lines(saved)
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]
    tok.messages_of(conversation)  # as chat_sft.py reads it
    assert "(a new conversation)" in shown[-2]

def test_a_system_message_stands_before_the_first_turn(in_process, state, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    said = iter(["/system Be kind.", "Hi", "there", "/quit"])
    in_process(list(b"ok"), lambda i: asked.append(in_process.prompt), prompt=None)
    for ids, turns in ((asked[0], ["Hi"]), (asked[-1], ["Hi", "ok", "there"])):
        messages = [{"role": "system", "content": "Be kind."}]
        messages += [{"role": ("user", "assistant")[i % 2], "content": text}
                     for i, text in enumerate(turns)]
        assert ids == BYTES.render_for_completion({"messages": messages})

def test_it_says_what_it_talks_with_and_whether_its_parent_is_still_the_same(state):
    make("mid")
    make("sft")
    folder = pipeline.state_path("sft", "toy", "d1")
    record = common.read_json(folder / "phase.json")
    parent = checkpoint.fingerprint(pipeline.state_path("mid", "toy", "d1"), 40)
    again = "trained from mid, which was trained again since, "
    for weights, words in ((parent, "trained from mid, "), ("another", again)):
        record["inputs"] = {"mid": weights}
        common.atomic_write(folder / "phase.json", json.dumps(record))
        said = talk.description("sft", "toy", "d1", 40)
        assert said.startswith(f"sft model d1 of toy, step 40, {words}") and said.endswith(" old")

def test_what_was_typed_before_is_there_again(state):
    make("sft")
    for typed in (b"remember me\n/quit\n", b"\x1b[A\x1b[A\n/quit\n"):
        screen, terminal = pty.openpty()
        process = subprocess.Popen([sys.executable, "chat_cli.py", *COMPUTE, "--max_new_tokens=2"],
                                   cwd=REPO, stdin=terminal, stdout=terminal, stderr=terminal,
                                   env={**environment(state), "TERM": "xterm"})
        os.close(terminal)
        said = b""
        while b"> " not in said:
            said += os.read(screen, 4096)
        os.write(screen, typed)
        with contextlib.suppress(OSError):  # the end, on Linux
            while part := os.read(screen, 4096):
                said += part
        assert process.wait(60) == 0 and b"remember me" in said
    assert (state / "chat_history").read_text().splitlines()[:2] == ["remember me", "/quit"]

@pytest.fixture
def in_process(state, monkeypatch):
    """in_process(answer, after, ...) runs chat_cli.py in this process on a model that answers with
    these token ids, calling after(i) behind each -> its exit code"""
    make("sft")
    handler = signal.getsignal(signal.SIGINT)

    def start(answer, after=lambda i: None, *args, prompt="Hi"):
        def generate(model, tokenizer, prompts, max_new_tokens, temperature, top_k, uniforms,
                     calculate, on_token, keep_going, packed):
            start.prompt, came = prompts[0], []
            for i, token in enumerate(answer):
                if not keep_going():
                    break
                came.append(token)
                on_token(token)
                after(i)
            return [(came, [False] * len(came))]
        monkeypatch.setattr(engine, "generate", generate)
        asked = [] if prompt is None else ["-p", prompt]
        command = ["chat_cli.py", "--data=toy", *COMPUTE, *asked, *args]
        monkeypatch.setattr(sys, "argv", command)
        with ends() if prompt else contextlib.nullcontext() as end:
            runpy.run_path(str(REPO / "chat_cli.py"), run_name="__main__")
        return end.code if prompt else 0
    yield start
    signal.signal(signal.SIGINT, handler)

def special(name):
    return BYTES.special(f"<|{name}|>")

def test_characters_cut_between_tokens_come_out_whole_and_tool_calls_are_marked(in_process, capsys):
    call = [special("python_start"), *b"2+2", special("python_end")]
    result = [special("output_start"), *b"4", special("output_end")]
    cut = "好".encode()[:2]
    assert in_process([*"é€😀 ".encode(), *call, *result, *" 好".encode(), *cut]) == 0
    said = capsys.readouterr().out
    assert said == "é€😀 [2+2][= 4] 好\ufffd\n", "only what never came to its end is replaced"
    asked = [special("user_start"), *b"Hi", special("user_end"), special("assistant_start")]
    assert in_process.prompt == [BYTES.bos, *asked]

def test_weights_are_packed_once_and_as_asked(in_process, monkeypatch):
    real, packed = engine.Packed, []
    monkeypatch.setattr(engine, "Packed", lambda *a: (packed.append(a[1:]), real(*a))[1])
    assert in_process(list(b"a")) == in_process(list(b"a"), print, "--weights=int8") == 0
    assert packed == [(1, "auto"), (1, "int8")]

def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(in_process, capsys):
    def press(times):
        def after(i):
            for _ in range(times if i == 2 else 0):
                os.kill(os.getpid(), signal.SIGINT)
            went_on.append(i)
        return after
    went_on = []
    assert in_process(list(b"abcdefgh"), press(1)) == 130
    assert capsys.readouterr().out == "abc\n" and went_on == [0, 1, 2]
    went_on.clear()
    assert in_process(list(b"abcdefgh"), press(2)) == 130
    assert capsys.readouterr().out.startswith("abc")
    assert went_on == [0, 1], "at once"
