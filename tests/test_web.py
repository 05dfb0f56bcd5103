"""chat_web.py: what a client is told, by real HTTP from a real server, by OpenAI's own package too;
and that no client can hurt it."""
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import openai
import pytest
import torch

import common
import completions
import pipeline
import talk
import tokenizer as tok
from conftest import BYTES, REPO, environment, random_model, save_model, script, wait_for
from serving import Service

COMPUTE = ["--device=cpu", "--dtype=float32", "--threads=1"]
CONTEXT = 512

def make(stage, seed=0):
    """A tiny model with random weights, saved as a phase saves its own."""
    if not pipeline.tokenizer_dir("toy").exists():
        tok.save_tokenizer(pipeline.tokenizer_dir("toy"), BYTES.ranks)
    model = random_model(CONTEXT, BYTES.vocab_size, 1, 1, 1, 32)
    folder = save_model(stage, "toy", "d1", model, BYTES, step=40, num_steps=40)
    record = {"phase": stage, "status": "done", "settings": {"data": "toy"}, "inputs": {},
              "free": {}, "updated": time.time(), "starts": [0.0], "seed": seed}
    common.atomic_write(folder / "phase.json", json.dumps(record))

class Web:
    """A server of its own process, and requests to it."""
    def __init__(self, state, *settings, program="chat_web.py", **env):
        command = [sys.executable, program, *COMPUTE, "--port=0", *settings]
        self.process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True,
                                        stderr=open(state / "stderr", "w"),  # noqa: SIM115
                                        env={**environment(state), **env})
        self.stderr = state / "stderr"
        line = self.process.stdout.readline()
        assert line, self.stderr.read_text()
        self.url = line.split()[0]
        self.port = int(re.search(r":(\d+)/", line)[1])

    def ask(self, method, path, body=None, **headers):
        """-> (status, what the JSON holds, headers)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        is_json = reply.headers["Content-Type"] == "application/json"
        return reply.status, json.loads(content) if is_json else content, reply.headers

    def complete(self, said, **more):
        status, answer, _ = self.ask("POST", "/v1/chat/completions", request(said, **more))
        assert status == 200, answer
        return answer

    def begin(self, said, **more):
        """A request whose answer is not waited for -> its socket"""
        body = json.dumps(request(said, **more)).encode()
        taken = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        taken.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                      b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                      + body)
        return taken

    def health(self):
        return self.ask("GET", "/health")[1]

    def busy(self):
        health = self.health()
        return health["answering"] + health["waiting"]

def request(said, **more):
    return {"model": "sft", "messages": [{"role": "user", "content": said}], **more}

@contextlib.contextmanager
def serving(state, *settings, **more):
    web = Web(state, *settings, **more)
    try:
        yield web
    finally:
        web.process.send_signal(signal.SIGTERM)
        code = web.process.wait(20)
        assert code == 0 and "Traceback" not in web.stderr.read_text(), web.stderr.read_text()

@pytest.fixture(scope="module")
def models_made(tmp_path_factory):
    """A state folder with a base and an SFT model, for the whole module."""
    state = tmp_path_factory.mktemp("web") / "state"
    state.mkdir()
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(state)
    make("base")
    make("sft")
    os.environ.pop("NANOCHAT_BASE_DIR")
    if before is not None:
        os.environ["NANOCHAT_BASE_DIR"] = before
    return state

@pytest.fixture(scope="module")
def web(models_made):
    with serving(models_made, "--temperature=1", "--top_k=0") as web:
        yield web

@pytest.fixture(scope="module")
def echo(models_made):
    """Two answers at once, one more may wait; a token of "slow..." takes 50 ms."""
    with serving(models_made, "--rows=2", "--max_waiting=1", program="tests/echo_web.py") as web:
        yield web

# ---- what is answered

def test_the_answer_is_that_of_the_terminal(web, models_made):
    out = script(models_made, "chat_cli.py", *COMPUTE, "-p", "Who?", "--seed=5", "--temperature=1",
                 "--top_k=0", "--max_new_tokens=20")
    answers = [web.complete("Who?", seed=seed, max_tokens=20)["choices"][0]["message"]["content"]
               for seed in (5, 5, -6)]
    assert answers[0] == answers[1] != answers[2]
    said = [answers[0], answers[2], out.stdout]
    same, other, own = (re.sub(r"[][=\s]", "", text) for text in said)
    assert own == same != other, "but for the marks of the calculator's part"

def test_a_stream_says_what_the_whole_answer_says(echo):
    whole = echo.complete("hällo 🙂")
    assert whole["object"] == "chat.completion" and whole["model"] == "sft"
    choice = whole["choices"][0]
    assert choice["message"]["content"] == "You said: hällo 🙂"
    assert choice["finish_reason"] == "stop" and choice["message"]["role"] == "assistant"
    made = len("You said: hällo 🙂".encode())
    read = 4 + len("hällo 🙂".encode())  # bos and three markers
    assert whole["usage"] == {"prompt_tokens": read, "completion_tokens": made,
                              "total_tokens": read + made}
    _, told, headers = echo.ask("POST", "/v1/chat/completions", request(
        "hällo 🙂", stream=True, stream_options={"include_usage": True}))
    assert headers["Content-Type"].startswith("text/event-stream")
    *events, last, nothing = told.decode().split("\n\n")
    assert last == "data: [DONE]" and nothing == ""
    events = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert said == "You said: hällo 🙂" and events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]

def test_the_calculators_part_stands_beside_the_text(echo):
    message = echo.complete("2+2?")["choices"][0]["message"]
    assert message["content"] == "It is 4."
    parts = [("text", "It is "), ("python", "2+2"), ("python_output", "4"), ("text", "4.")]
    assert [(part["type"], part["text"]) for part in message["parts"]] == parts
    again = [{"role": "user", "content": "2+2?"},
             {"role": "assistant", "content": message["parts"]},
             {"role": "user", "content": [{"type": "text", "text": "so"}]}]
    answer = echo.complete("", messages=again)
    ids = BYTES.render_for_completion({"messages": again})
    assert answer["usage"]["prompt_tokens"] == len(ids), "the parts are read as what they were"
    assert answer["choices"][0]["message"]["content"] == "You said: so"

@pytest.mark.parametrize("more,content,reason", [
    ({"max_tokens": 3}, "You", "length"),
    ({"max_completion_tokens": 5, "max_tokens": 3}, "You s", "length"),
    ({"stop": "said"}, "You ", "stop"),
    ({"stop": ["xyz", "id: a", "d: "]}, "You sai", "stop"),  # complete first
    ({"stop": ["abcabcd"]}, "You said: abcabc", "stop"),
    ({"stop": ["You said: abcabc!"]}, "You said: abcabc", "stop")])
def test_where_an_answer_ends(echo, more, content, reason):
    for stream in (False, True):
        answer = echo.ask("POST", "/v1/chat/completions",
                          request("abcabc", stream=stream, **more))[1]
        if stream:
            events = [json.loads(event.removeprefix("data: "))["choices"][0]
                      for event in answer.decode().split("\n\n")[:-2]]
            said = "".join(event["delta"].get("content", "") for event in events)
            assert (said, events[-1]["finish_reason"]) == (content, reason)
        else:
            choice = answer["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == (content, reason)

def test_a_stop_is_found_wherever_the_pieces_are_cut():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randrange(12)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))]
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        cut, shown = completions.Cut(stops), ""
        rest = text
        while rest and not cut.met:
            size = rng.randrange(1, 4)
            shown += cut.add(rest[:size])
            assert text.startswith(shown) and not any(stop in shown for stop in stops)
            rest = rest[size:]
        shown += "" if cut.met else cut.add("", last=True)
        assert (cut.met, shown) == (bool(ends), text[:min(ends)[1]] if ends else text)

def test_a_system_message_and_the_base_model(web):
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    read = web.complete("", messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
    assert read == 4 + len("Be kind.\n\nHi")
    base = web.complete("Once", model="base", max_tokens=4)
    assert base["usage"]["prompt_tokens"] == 1 + len("Once") and base["model"] == "base"
    _, listed, _ = web.ask("GET", "/v1/models")
    assert [(model["id"], model["chats"]) for model in listed["data"]] == [("base", False),
                                                                          ("sft", True)]
    assert listed["preferred"] == "sft"

def test_openais_own_package(echo):
    client = openai.OpenAI(base_url=f"http://localhost:{echo.port}/v1", api_key="none",
                           max_retries=0)
    asked = {"model": "sft", "messages": [{"role": "user", "content": "hello"}]}
    assert client.chat.completions.create(**asked).choices[0].message.content == "You said: hello"
    told = client.chat.completions.create(**asked, stream=True, temperature=0.5, seed=1,
                                          stream_options={"include_usage": True})
    told = list(told)
    assert "".join(event.choices[0].delta.content or "" for event in told[:-1]) == "You said: hello"
    assert told[-1].usage.completion_tokens == len("You said: hello")
    assert [model.id for model in client.models.list()] == ["base", "sft"]
    assert client.models.retrieve("sft").owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(**{**asked, "model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="not supported") as refused:
        client.chat.completions.create(**asked, n=2)
    assert refused.value.param == "n"

# ---- what is refused

@pytest.mark.parametrize("body,status,says", [
    (b"{", 400, "no JSON"), (b"[]", 400, "no JSON object"), (b"\xff", 400, "no JSON"),
    (b"[" * 100_000, 400, "no JSON"), ({}, 400, "model has to be"),
    (request("x", model="gpt-4"), 404, "'gpt-4'"), (request("x", model=["sft"]), 400, "model"),
    ({"model": "sft"}, 400, "messages"), (request("x", messages=[]), 400, "messages"),
    (request("x", messages="Hi"), 400, "messages"), (request(7), 400, "content"),
    (request("x", messages=[7]), 400, "messages[0]"),
    (request("x", messages=[{"role": "tool", "content": "x"}]), 400, "role"),
    (request("x", messages=[{"role": "system", "content": "x"}]), 400, "the last message"),
    (request("x", messages=[{"role": "user", "content": "x"}] * 2), 400, "take turns"),
    (request([{"type": "image_url", "text": "x"}]), 400, "content"),
    (request([{"type": "python", "text": "x"}]), 400, "parts that are no text"),
    (request("x", temperature=-1), 400, "temperature"),
    (request("x", temperature=float("nan")), 400, "temperature"),
    (request("x", temperature=True), 400, "temperature"),
    (request("x", max_tokens=0), 400, "max_tokens"),
    (request("x", max_tokens=1.5), 400, "max_tokens"), (request("x", seed=2 ** 63), 400, "seed"),
    (request("x", max_tokens=10 ** 400), 400, "max_tokens"),
    (request("x", temperature=10 ** 400), 400, "temperature"),
    (request("x", n=True), 400, "n other than 1"), (request("x", min_p=0.1), 400, "min_p"),
    (request("x", stop="a" * 1001), 400, "stop"),
    (request("x", top_p=0.5), 400, "top_p"), (request("x", tools=[{}]), 400, "tools"),
    (request("x", stop=[""]), 400, "stop"), (request("x", stop=["a"] * 5), 400, "stop"),
    (request("x", stream="yes"), 400, "stream"),
    (request("x", stream_options=[1]), 400, "stream_options"),
    (request("x" * CONTEXT), 400, "context"),
    (request("x" * (CONTEXT // 2)), 400, "context"),  # no room for an answer
    (request("x" * 900_000), 400, "characters, more than"),  # not encoded at all
    (request("x", messages=[{"role": role, "content": text} for role, text in (
        ("user", "x"), ("assistant", "x" * 900_000), ("user", "x"))]), 400, "characters, more"),
    (b" " * 1_000_001, 413, "1,000,000 bytes")])
def test_what_is_no_request_is_refused_in_openais_form(web, body, status, says):
    got, answer, _ = web.ask("POST", "/v1/chat/completions", body)
    assert (got, set(answer)) == (status, {"error"}) and says in answer["error"]["message"], answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}

@pytest.mark.parametrize("method,path,headers,status", [
    ("GET", "/nothing", {}, 404), ("GET", "/v1/chat/completions", {}, 405),
    ("POST", "/v1/models", {}, 405), ("PUT", "/", {}, 501), ("GET", "/?a=b", {}, 200),
    ("HEAD", "/", {}, 200), ("POST", "/v1/chat/completions", {}, 415),
    ("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, 415),
    ("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, 411),
    ("GET", "/", {"Host": "evil.example"}, 403), ("GET", "/", {"Host": "localhost:1"}, 200),
    ("GET", "/v1/models", {"Host": "[::1]:1"}, 200), ("GET", "/", {"Host": "LOCALHOST"}, 200),
    ("GET", "/", {"Host": "192.0.2.1:1"}, 200), ("GET", "/", {"Host": ""}, 403),
    ("GET", "/v1/models/sft", {}, 200), ("GET", "/v1/models/rl", {}, 404),
    ("GET", "/v1/models/x", {}, 404), ("POST", "/", {"Content-Length": "-5"}, 400),
    ("GET", "/", {"Content-Length": "5, 5"}, 400),
    ("GET", "/", {"Content-Length": "9" * 5000}, 400),
    ("POST", "/v1/chat/completions", {"Transfer-Encoding": "chunked"}, 411),
    ("GET", "/v1/models", {"Origin": "http://evil.example"}, 403),
    ("GET", "/v1/models", {"Origin": "null"}, 403)])
def test_paths_methods_and_whose_pages_may_ask(web, method, path, headers, status):
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    reply = connection.getresponse()
    content = reply.read()
    assert reply.status == status, content
    assert status == 200 or set(json.loads(content)) == {"error"}

def test_the_page_asks_for_nothing_from_anywhere_else(web):
    status, page, headers = web.ask("GET", "/")
    assert status == 200 and b"<title>nanochat</title>" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    addresses = set(re.findall(rb"(?:https?:)?//[\w.-]+", page))
    assert addresses <= {b"http://www.w3.org"}, "the name of SVG's namespace alone"

def test_a_token_is_asked_for_where_there_is_one(models_made):
    with serving(models_made, "--token=geheim") as web:
        assert web.url.endswith("/#geheim")
        assert web.ask("GET", "/")[0] == web.ask("GET", "/health")[0] == 200
        for header in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer geheim2"}):
            status, answer, _ = web.ask("GET", "/v1/models", **header)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert web.ask("GET", "/v1/models", Authorization="Bearer geheim")[0] == 200

def test_what_cannot_be_served_is_one_line(state, models_made):
    out = script(state, "chat_web.py", "--port=0")
    assert out.returncode == 2 and "there is no trained model" in out.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        out = script(models_made, "chat_web.py", f"--port={taken.getsockname()[1]}")
    assert out.returncode == 2 and "--port=0 takes a free port" in out.stderr
    assert out.stderr.count("\n") == 1
    out = script(models_made, "chat_web.py", "--token=a b")
    assert out.returncode == 2 and out.stderr.startswith("error: --token has to be of printable")

# ---- many at once

def test_answers_grow_together_and_each_gets_its_own(models_made):
    said = [f"number {i} " + "x" * i for i in range(24)]
    with serving(models_made, "--rows=5", program="tests/echo_web.py") as web, \
            concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(web.complete, said))
        contents = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert contents == [f"You said: {one}" for one in said]
        assert web.busy() == 0

def test_who_comes_when_too_many_wait_is_told_to_come_later(echo):
    taken = []
    for number in (1, 2):
        taken.append(echo.begin("slow " + "x" * 100))
        wait_for(lambda: echo.health()["answering"] == number, echo.process)  # noqa: B023
    taken.append(echo.begin("slow"))
    wait_for(lambda: echo.health()["waiting"] == 1, echo.process)
    status, answer, headers = echo.ask("POST", "/v1/chat/completions", request("x"))
    assert status == 429 and answer["error"]["code"] == "queue_full"
    assert headers["Retry-After"] == "1"
    for one in taken:
        one.close()
    wait_for(lambda: echo.busy() == 0, echo.process)

@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_takes_the_answer_along(echo, stream):
    began = time.monotonic()
    taken = echo.begin("slow " + "x" * 200, stream=stream)  # more than 10 seconds of answer
    wait_for(lambda: echo.health()["answering"] == 1, echo.process)
    taken.close()
    wait_for(lambda: echo.busy() == 0, echo.process)
    assert time.monotonic() - began < 5, "it was answered to its end"

def test_who_sends_a_request_letter_by_letter_is_hung_up_on(models_made):
    changed = (REPO / "chat_web.py").read_text().replace("PATIENCE = 30 ", "PATIENCE = 1 ")
    program = models_made / "impatient.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(REPO)!r})\n{changed}")
    with serving(models_made, program=str(program)) as web:
        slow = socket.create_connection(("127.0.0.1", web.port), timeout=60)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for letter in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1000:
                slow.sendall(bytes([letter]))
                time.sleep(0.05)
        assert time.monotonic() - began < 20, "nobody hangs up"
        assert web.complete("hello", max_tokens=2)

def test_connections_stay_open_only_where_they_may(web):
    body = json.dumps(request("Hi", max_tokens=1))
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    head = head.replace("Host: x", "Host: localhost")
    for version, more, stays in (("1.1", "", True), ("1.0", "", False),
                                 ("1.1", "Connection: close\r\n", False),
                                 ("1.0", "Connection: keep-alive\r\n", True)):
        with socket.create_connection(("127.0.0.1", web.port), timeout=20) as connection:
            asked = f"POST /v1/chat/completions HTTP/{version}\r\n{head}{more}\r\n{body}"
            connection.sendall(asked.encode())
            reply = http.client.HTTPResponse(connection)
            reply.begin()
            assert reply.status == 200 and json.loads(reply.read())["usage"]
            connection.settimeout(2)
            try:
                closed = connection.recv(1) == b""
            except TimeoutError:
                closed = False
            assert closed != stays, (version, more)

def test_a_stream_is_told_where_the_server_ends(models_made):
    with serving(models_made, program="tests/echo_web.py") as web:
        taken = web.begin("slow " + "x" * 200, stream=True)
        told = b""
        while told.count(b"data: ") < 3:
            told += taken.recv(4096)
        web.process.send_signal(signal.SIGTERM)
        rest = b""
        while part := taken.recv(4096):
            rest += part
        assert b"the server is ending" in rest and b"[DONE]" not in rest

def test_a_damaged_model_is_an_error_for_who_asks_for_it_alone(models_made, tmp_path):
    weights = models_made / "toy/base_checkpoints/d1/model_000040.pt"
    whole = weights.read_bytes()
    with serving(models_made) as web:
        weights.write_bytes(whole[:-1] + b"?")
        try:
            status, answer, _ = web.ask("POST", "/v1/chat/completions", request("x", model="base"))
        finally:
            weights.write_bytes(whole)
        assert status == 500 and "checksum" in answer["error"]["message"]
        assert web.complete("x", max_tokens=2) and web.complete("x", model="base", max_tokens=2)

def test_a_model_of_another_context_is_refused_whatever_is_loaded(state):
    make("base")
    make("sft")
    compute = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    service = Service("toy", "d1", "sft", talk.find("sft", "toy", "d1"), compute, "auto", 2, 2)
    assert service.batch_of("base")
    service.batches.clear()  # as after an error
    service.context += 1
    with pytest.raises(common.Failure, match="the base model has another context or tokenizer"):
        service.batch_of("base")
