"""prepare_data.py and download.py, against a server that misbehaves in every way we know."""
import ast
import email.utils
import errno
import fcntl
import gzip
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pyarrow.parquet
import pytest
import torch

import configurator
import download
import gpt
import pipeline
import tasks
import texts
from conftest import REPO, ends, environment, script, wait_for

TEXTS = [f"Document {i}: " + "some words of it " * (i % 7 + 1) for i in range(2000)]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

def parquet(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=256)
    return out.getvalue()

SHARD = parquet([{"text": t} for t in TEXTS])
# many times what is read at once, so that a part of it stays
BIG = parquet([{"text": hashlib.sha256(str(i).encode()).hexdigest()} for i in range(30_000)])

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, **headers):
        """Sends status and headers; Content_Range=... for a header with a hyphen."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_GET(self):
        server = self.server
        with server.guard:
            plan = server.plan.get(self.path, [])
            do = plan.pop(0) if plan else "whole"
            server.seen.append((self.path, do, self.headers.get("Range")))
        if self.path in server.moved:
            # as Hugging Face does it: size and checksum stand with the address of the content
            target, size, digest = server.moved[self.path]
            linked = {"X_Linked_Size": size, "X_Linked_ETag": f'"{digest}"'}
            return self.answer(302, Location=target, **linked, Content_Length=0)
        body = server.bodies.get(self.path)
        if callable(do):
            do()
            do = "whole"
        if body is None:
            do = "404"
        if re.match(r"\d{3}", do):
            wait = {"Retry_After": do[4:]} if do[4:] else {}
            return self.answer(int(do[:3]), **wait, Content_Length=0)
        if do == "garbage":
            body = b"<html>please log in</html>" * 50
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = 0
        if asked and do not in ("no range", "garbage") and "no range" not in server.manners:
            start = int(asked[1])
        if start >= len(body) > 0:
            return self.answer(416, Content_Range=f"bytes */{len(body)}", Content_Length=0)
        rest = body[start:]
        headers = {}
        if start:
            first = start + (do == "another part")
            headers["Content_Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        if self.path in server.digests:
            headers["X_Linked_ETag"] = f'"{server.digests[self.path]}"'
        claims = {"claims less": len(rest) // 2, "claims more": len(rest) + 1000}
        claimed = claims.get(do, len(rest))
        if do == "no length":
            headers["Connection"] = "close"
        else:
            headers["Content_Length"] = claimed
        self.answer(206 if start else 200, **headers)
        if do in ("cut", "stall"):
            self.wfile.write(rest[:len(rest) // 2 + 1])
        else:
            self.wfile.write(rest[:claimed])
        if do == "stall":
            self.wfile.flush()
            server.stalled.set()
            server.go.wait(20)
        if do in ("cut", "claims more", "claims less", "no length", "stall"):
            self.close_connection = True

@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.005)
    for name in ("NANOCHAT_OFFLINE", "SLURM_JOB_ID", "HF_ENDPOINT", "HTTP_PROXY", "http_proxy",
                 "NANOCHAT_OUTCOME"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = print  # not to stderr: there are tests of what is said there
    server.guard = threading.Lock()
    server.plan, server.bodies, server.digests, server.moved = {}, {}, {}, {}
    server.seen, server.manners = [], set()
    server.stalled, server.go = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()

def opens(path):
    return texts.parquet_problem(path)

def never():
    return None

def get(server, folder, names=("shard.parquet",), should_stop=never, **more):
    jobs = [(f"{server.url}/{name}", folder / name, opens, 1000) for name in names]
    download.fetch_all(jobs, "the command", should_stop, **more)

def get_one(url, path):
    download.fetch_all([(url, path, opens, 1000)], "the command", never)

def failure(capsys, function, *args, **more):
    """Calls the function, which has to fail with one line -> (exit code, that line)"""
    with ends() as stopped:
        function(*args, **more)
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return stopped.code, err

def asked_for(server, path):
    """-> the Range header of each request for this path, None where it had none"""
    return [wanted for seen, _, wanted in server.seen if seen == path]

def left_behind(folder):
    return [p.name for p in folder.rglob("*") if p.name.startswith(".")]

@pytest.mark.parametrize("plan", [
    ["cut"], ["cut"] * 5, ["429:0"], ["503", "503:0"], ["408", "425", "500", "502"],
    ["claims less"], ["claims more"], ["no length"], ["garbage"], ["cut", "no range"],
    ["cut", "garbage"], ["cut", "another part"],
    ["garbage", "cut", "429", "claims more", "claims less", "503", "cut", "no range"]])
def test_a_file_arrives_whole_whatever_the_server_does_first(server, tmp_path, plan):
    server.bodies["/shard.parquet"], server.plan["/shard.parquet"] = BIG, list(plan)
    get(server, tmp_path)
    assert (tmp_path / "shard.parquet").read_bytes() == BIG and not left_behind(tmp_path)
    assert [do for _, do, _ in server.seen][:len(plan)] == plan, "every fault happened"

def test_a_cut_connection_is_continued_where_it_was(server, tmp_path):
    server.bodies["/shard.parquet"], server.plan["/shard.parquet"] = BIG, ["cut", "cut"]
    get(server, tmp_path)
    assert (tmp_path / "shard.parquet").read_bytes() == BIG
    starts = [int(wanted[6:-1]) for wanted in asked_for(server, "/shard.parquet")[1:]]
    assert len(starts) == 2 and len(BIG) / 4 < starts[0] < starts[1]

def test_a_server_that_cannot_continue_still_gets_there(server, tmp_path):
    server.manners.add("no range")
    server.bodies["/shard.parquet"], server.plan["/shard.parquet"] = SHARD, ["cut"] * 3
    get(server, tmp_path)
    assert (tmp_path / "shard.parquet").read_bytes() == SHARD

def test_a_hopeless_file_is_given_up_and_a_missing_one_asked_for_once(server, tmp_path, capsys):
    server.bodies |= dict.fromkeys(["/hopeless.parquet", "/fine.parquet", "/busy.parquet"], SHARD)
    server.plan["/hopeless.parquet"] = ["garbage"] * 100
    server.plan["/busy.parquet"] = ["503"] * 100
    # something comes first, or the rest would not be tried
    names = ["fine.parquet", "hopeless.parquet", "gone.parquet", "busy.parquet"]
    code, err = failure(capsys, get, server, tmp_path, names, workers=1)
    assert code == 1 and "3 files" in err and "the command" in err
    assert "hopeless.parquet" in err and "no readable parquet" in err
    assert "404" in err and "503" in err
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["fine.parquet"]
    assert len(asked_for(server, "/gone.parquet")) == 1, "what is not there is asked for once"
    assert len(asked_for(server, "/hopeless.parquet")) == download.RETRIES
    assert len(asked_for(server, "/busy.parquet")) == download.RETRIES

def test_a_file_of_which_each_attempt_brings_something_is_not_given_up(server, tmp_path):
    plan = ["cut"] * (download.RETRIES + 3)
    server.bodies["/shard.parquet"], server.plan["/shard.parquet"] = BIG, list(plan)
    get(server, tmp_path)
    assert (tmp_path / "shard.parquet").read_bytes() == BIG and len(server.seen) == len(plan) + 1

def test_where_nothing_comes_at_all_not_every_file_is_tried(server, tmp_path, capsys):
    names = [f"{i}.parquet" for i in range(200)]
    code, err = failure(capsys, get, server, tmp_path, names, workers=4)
    assert code == 1 and "200 files could not be downloaded" in err and 1 <= len(server.seen) <= 8

def test_a_silent_server_is_asked_again_and_progress_is_shown(
        server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    monkeypatch.setattr(download, "PROGRESS", 0.0)
    server.bodies["/shard.parquet"], server.plan["/shard.parquet"] = BIG, ["stall"]
    get(server, tmp_path)
    assert server.stalled.is_set() and len(server.seen) == 2
    assert (tmp_path / "shard.parquet").read_bytes() == BIG
    shown = re.findall(r"0 of 1 files, ([\d.]+) of ([\d.]+) MB, [\d.]+ MB/s, \d+s left",
                       capsys.readouterr().out)
    half = [total for have, total in shown if float(have) > len(BIG) / 4e6]
    assert round(len(BIG) / 1e6, 1) in map(float, half), shown

def test_a_proxy_is_honoured(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    server.bodies["http://hub.invalid/shard.parquet"] = SHARD
    get_one("http://hub.invalid/shard.parquet", tmp_path / "shard.parquet")
    assert (tmp_path / "shard.parquet").read_bytes() == SHARD

def test_the_stated_checksum_is_compared(server, tmp_path, capsys):
    server.bodies["/shard.parquet"] = SHARD
    server.digests["/shard.parquet"] = hashlib.sha256(SHARD).hexdigest()
    get(server, tmp_path)
    (tmp_path / "shard.parquet").unlink()
    server.digests["/shard.parquet"] = "0" * 64
    code, err = failure(capsys, get, server, tmp_path)
    assert code == 1 and "checksum" in err and not (tmp_path / "shard.parquet").exists()

def test_size_and_checksum_of_a_redirection_are_compared_and_it_is_continued_through_it(
        server, tmp_path, capsys):
    server.bodies["/content"], server.plan["/content"] = BIG, ["claims less"]
    server.moved["/shard.parquet"] = "/content", len(BIG), hashlib.sha256(BIG).hexdigest()
    get(server, tmp_path)
    assert (tmp_path / "shard.parquet").read_bytes() == BIG
    half = f"bytes={len(BIG) // 2}-"
    assert asked_for(server, "/content") == [None, half], "only the redirection tells the size"
    (tmp_path / "shard.parquet").unlink()
    server.moved["/shard.parquet"] = "/content", len(BIG), "0" * 64
    code, err = failure(capsys, get, server, tmp_path)
    assert code == 1 and "checksum" in err and not (tmp_path / "shard.parquet").exists()

@pytest.mark.parametrize("there, requests", [(SHARD[:1000], 1), (SHARD, 1), (SHARD + b"more", 2)])
@pytest.mark.parametrize("moved", [False, True])
def test_the_part_that_is_there_is_used_even_where_it_is_all_or_too_much(
        server, tmp_path, there, requests, moved):
    address = "/shard.parquet"
    if moved:
        server.moved[address] = "/content", len(SHARD), hashlib.sha256(SHARD).hexdigest()
        address = "/content"
    server.bodies[address] = SHARD
    (tmp_path / ".part-shard.parquet").write_bytes(there)
    get(server, tmp_path)
    assert (tmp_path / "shard.parquet").read_bytes() == SHARD and not left_behind(tmp_path)
    wanted = asked_for(server, address)
    assert len(wanted) == requests and wanted[0] == f"bytes={len(there)}-"

def test_retry_after_is_honoured(server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", slept.append)
    in_half_a_minute = email.utils.formatdate(time.time() + 30)
    plan = ["429:7", "503:100000", f"503:{in_half_a_minute}"]
    server.bodies["/shard.parquet"], server.plan["/shard.parquet"] = SHARD, list(plan)
    get(server, tmp_path)
    assert (tmp_path / "shard.parquet").read_bytes() == SHARD and len(server.seen) == len(plan) + 1
    assert slept[:2] == [7, 600] and 25 < slept[2] < 31 and len(slept) == 3

def test_too_small_a_disk_is_said_before_the_first_byte(server, tmp_path, monkeypatch, capsys):
    def free(bytes):
        usage = shutil._ntuple_diskusage(10, 10, bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    server.bodies["/shard.parquet"] = SHARD
    free(999)
    code, err = failure(capsys, get, server, tmp_path)
    assert code == 2 and not server.seen and "NANOCHAT_BASE_DIR" in err
    free(2000)
    code, err = failure(capsys, get, server, tmp_path, also=5000)
    assert code == 2 and not server.seen
    get(server, tmp_path)

def test_a_disk_that_fills_up_is_not_tried_again(server, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    server.bodies["/shard.parquet"] = SHARD
    monkeypatch.setattr(download, "receive", full)
    code, err = failure(capsys, get, server, tmp_path)
    assert code == 1 and len(server.seen) == 1
    assert "No space left" in err and "the command" in err

def test_a_mirror_that_is_no_address_is_not_tried_again(tmp_path, server, monkeypatch, capsys):
    tried, sent = [], download.attempt
    def counted(*args):
        tried.append(args)
        return sent(*args)
    monkeypatch.setattr(download, "attempt", counted)
    monkeypatch.setenv("HF_ENDPOINT", "mirror.invalid")
    address = "https://huggingface.co/shard.parquet"
    code, err = failure(capsys, get_one, address, tmp_path / "shard.parquet")
    assert code == 1 and len(tried) == 1 and "mirror.invalid" in err

STOPPED = """
import fcntl
import sys
from pathlib import Path
import download
from run import Run

def say_and_lock(*args, lock=fcntl.flock):
    print("locks", flush=True)
    lock(*args)
fcntl.flock = say_and_lock
run = Run.start("prepare_data")
job = (sys.argv[1], Path(sys.argv[2]), lambda path: None, 1000)
download.fetch_all([job], "the command", run.stop_reason)
"""

@pytest.mark.parametrize("slow", ["stall", "503:600", "another process"])
def test_a_stop_waits_for_nothing(server, tmp_path, slow):
    """Neither for a silent server, nor for Retry-After, nor for who else receives the file."""
    server.bodies["/shard.parquet"], server.plan["/shard.parquet"] = BIG, [slow]
    part = tmp_path / ".part-shard.parquet"
    here = len(BIG) // 4 if slow == "stall" else 0
    with open(part, "ab") as f:
        if slow == "another process":
            fcntl.flock(f, fcntl.LOCK_EX)
        address, path = f"{server.url}/shard.parquet", tmp_path / "shard.parquet"
        process = subprocess.Popen([sys.executable, "-c", STOPPED, address, path], cwd=REPO,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.readline().startswith("downloading 1 files")
        assert process.stdout.readline() == "locks\n"
        if slow != "another process":
            wait_for(lambda: server.seen and part.stat().st_size >= here, process)
        process.send_signal(signal.SIGTERM)
        started = time.time()
        _, err = process.communicate(timeout=60)
    assert time.time() - started < 2, "TIMEOUT is 30 seconds, and the server is silent for 20"
    assert process.returncode == 75 and "signal SIGTERM" in err and "same command" in err
    assert "Traceback" not in err and part.stat().st_size >= here
    assert len(server.seen) == (slow != "another process")

@pytest.mark.parametrize("name", ["NANOCHAT_OFFLINE", "SLURM_JOB_ID"])
def test_offline_means_no_attempt_at_all(server, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv(name, "1")
    server.bodies["/shard.parquet"] = SHARD
    code, err = failure(capsys, get, server, tmp_path)
    assert code == 2 and not server.seen and "shard.parquet" in err and "the command" in err

def test_only_download_py_speaks_to_the_internet():
    names = r"requests|urllib3|urllib\.request|http\.client|ftplib|huggingface_hub|datasets"
    words = re.compile(rf"^\s*(?:import|from)\s+({names})\b", re.MULTILINE)
    speaking = [p.name for p in REPO.glob("*.py") if words.search(p.read_text())]
    assert speaking == ["download.py"]

# ---- the whole of prepare_data.py, with small stand-ins for the public files

START = """
import sys, runpy, download
where = sys.argv.pop(1)
for name in ("words_alpha.txt", "eval_bundle.zip"):
    stem = name.split(".")[0]
    download.ADDRESSES[stem] = (where + "/" + name, *download.ADDRESSES[stem][1:])
download.ADDRESSES = {what: (*facts, 1000) for what, (*facts, _) in download.ADDRESSES.items()}
download.BACKOFF = 0.005
sys.argv = ["prepare_data.py", *sys.argv[1:]]
runpy.run_path("prepare_data.py", run_name="__main__")
"""

CORE = """icl_tasks:
-
  label: t
  dataset_uri: a/t.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
"""
CORE_ITEM = '{"context": "a", "continuation": "b"}\n'
FINEWEB = ["--data=fineweb_edu", "--shards=1"]

def choice(form, i):
    if form == "mmlu":
        return {"question": f"q{i}", "subject": "s", "choices": list("abcd"), "answer": i % 4}
    choices = {"text": list("abcd"), "label": list("ABCD")}
    return {"id": str(i), "question": f"q{i}", "choices": choices, "answerKey": "ABCD"[i % 4]}

def bundle():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("eval_bundle/core.yaml", CORE)
        z.writestr("eval_bundle/eval_meta_data.csv", "Eval Task,Random baseline\nt,0\n")
        z.writestr("eval_bundle/eval_data/a/t.jsonl", CORE_ITEM * 20)
    return out.getvalue()

@pytest.fixture
def hub(server):
    """The server with a body for every address."""
    letters = "abcdefghijklmnopqrst"
    words = "\r\n".join(f"word{a}{b}" for a in letters for b in letters)
    rows = {
        "smoltalk": [{"messages": TALK}] * 30,
        "mmlu": [choice("mmlu", i) for i in range(30)],
        "arc": [choice("arc", i) for i in range(30)],
        "gsm8k": [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(30)],
        "humaneval": [{"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f",
                       "canonical_solution": "    return 1\n", "test": "def check(c): pass"}]}
    not_parquet = {"words_alpha": words.encode(), "eval_bundle": bundle()}
    for name, (address, _, many, _) in download.ADDRESSES.items():
        if address == "here":
            continue
        if name in not_parquet:
            server.bodies["/" + address.rpartition("/")[2]] = not_parquet[name]
            continue
        body = SHARD if many > 1000 else parquet(rows[name.split("_")[0]])
        for i in range(many):
            server.bodies[address.format(i).removeprefix(download.HUB)] = body
    return server

def fineweb_path(hub, name):
    return next(p for p in hub.bodies if p.endswith(name) and "fineweb" in p)

def prepare(hub, state, *args, env=None):
    env = {"HF_ENDPOINT": hub.url + "/", **(env or {})}
    return script(state, "-c", START, hub.url, *args, env=env)

def begin(hub, state, *args):
    """The same as a process that runs on."""
    return subprocess.Popen([sys.executable, "-c", START, hub.url, *args], cwd=REPO, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**environment(state), "HF_ENDPOINT": hub.url})

def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock")
            and p.name not in ("phase.json", "lock.json")}

def test_everything_is_downloaded_and_then_nothing_needs_the_network(hub, state):
    args = ["--data=fineweb_edu", "--shards=2"]
    out = prepare(hub, state, *args, "--check=True")
    assert out.returncode == 2 and not hub.seen and not state.exists()
    assert re.search(r"missing +text +0 of 3", out.stdout), out.stdout
    assert re.search(r"missing +smoltalk_train +0 of 4 +mid sft\n", out.stdout)
    assert f"{state}/task_data/NAME.jsonl" in out.stdout
    assert "run: python prepare_data.py --data=fineweb_edu --shards=2\n" in out.stderr
    hub.plan[fineweb_path(hub, "shard_00001.parquet")] = ["503", "cut", "garbage"]
    hub.plan["/eval_bundle.zip"] = ["cut", "429:0"]
    out = prepare(hub, state, *args)
    assert out.returncode == 0, out.stdout + out.stderr
    assert {p.name for p in (state / "base_data").glob("*.parquet")} == {
        "shard_00000.parquet", "shard_00001.parquet", "shard_01822.parquet"}
    assert (state / "eval_bundle/eval_data/a/t.jsonl").exists()
    assert not (state / "eval_bundle.zip").exists()
    before, asked = digests(state), len(hub.seen)
    assert not [name for name in before if "/.part" in name]
    for task, split, count in (("smoltalk", "train", 120), ("mmlu_aux", "train", 30),
                               ("arc_easy", "test", 30), ("humaneval", "test", 1),
                               ("identity", "train", 1000)):
        assert len(tasks.load(task, split, "fineweb_edu")) == count
    out = prepare(hub, state, *args, "--check=True", env={"NANOCHAT_OFFLINE": "1"})
    assert out.returncode == 0
    out = prepare(hub, state, *args, env={"SLURM_JOB_ID": "1"})
    assert out.returncode == 0 and "done already" in out.stdout
    assert len(hub.seen) == asked and digests(state) == before

def test_starting_over_without_a_network_leaves_the_old_data_where_they_are(hub, state):
    args = ["--data=fineweb_edu", "--shards=1", "--phases=tok"]
    assert prepare(hub, state, *args).returncode == 0
    before = digests(state)
    out = prepare(hub, state, *args, "--start_over=True", env={"NANOCHAT_OFFLINE": "1"})
    assert out.returncode == 2 and "NANOCHAT_OFFLINE is set" in out.stderr
    assert digests(state) == before and not list(state.glob("*.old-*"))
    assert prepare(hub, state, *args, "--start_over=True").returncode == 0
    assert len(list(state.glob("*.old-*"))) == 1
    out = prepare(hub, state, *args, "--start_over=True", env={"NANOCHAT_OFFLINE": "1"})
    assert out.returncode == 0 and "done already" in out.stdout, "the same command again"

def test_damage_is_found_and_mended(hub, state):
    args = ["--data=fineweb_edu", "--shards=2"]
    assert prepare(hub, state, *args).returncode == 0
    before, asked = digests(state), len(hub.seen)
    (state / "base_data/shard_00001.parquet").write_bytes(SHARD[:5000])
    # not asked for, but a phase would read it
    (state / "base_data/shard_00007.parquet").write_bytes(SHARD[:5000])
    # one broken item is enough: base_eval.py takes none
    core = state / "eval_bundle/eval_data/a/t.jsonl"
    core.write_text("{broken\n" + CORE_ITEM * 19)
    (state / "task_data/gsm8k_test.parquet").write_bytes(b"<html>")
    (state / "task_data/humaneval_test.parquet").unlink()
    (state / "task_data/words_alpha.txt").write_bytes(b"\xff\xfe" * 500 + b"\n" * 3)
    out = prepare(hub, state, *args, "--check=True")
    assert out.returncode == 2 and len(hub.seen) == asked
    for line in (r"damaged +text +2 of 4 ", r"damaged +CORE ", r"t.jsonl:1 is not a valid ",
                 r"damaged +gsm8k_test .* mid-eval sft-eval rl rl-eval\n",
                 r"missing +humaneval_test ", r"damaged +words_alpha ", r"ok +arc_easy_test "):
        assert re.search(line, out.stdout), line + out.stdout
    out = prepare(hub, state, *args, env={"NANOCHAT_OFFLINE": "1"})
    assert out.returncode == 2 and len(hub.seen) == asked
    assert "run: python prepare_data.py --data=fineweb_edu --shards=2" in out.stderr
    out = prepare(hub, state, *args)
    assert out.returncode == 2 and len(hub.seen) == asked + 6
    assert f"left alone, since it may be your own: {core} " in out.stdout, out.stdout
    assert core.read_text() == "{broken\n" + CORE_ITEM * 19
    core.unlink()
    assert prepare(hub, state, *args).returncode == 0 and len(hub.seen) == asked + 7
    (state / "base_data/shard_00007.parquet").unlink()
    kept = {path.name.partition(".old-")[0]: path for path in state.rglob("*.old-*")}
    assert {*kept} == {"shard_00001.parquet", "shard_00007.parquet", "gsm8k_test.parquet",
                       "words_alpha.txt"}, "they may be the user's own"
    assert kept["gsm8k_test.parquet"].read_bytes() == b"<html>"
    for path in kept.values():
        path.unlink()
    assert digests(state) == before

def test_a_bundle_of_ones_own_gets_what_it_lacks_and_keeps_the_rest(hub, state):
    own = state / "eval_bundle"
    (own / "eval_data/a").mkdir(parents=True)
    half = CORE_ITEM * 10
    (own / "eval_data/a/t.jsonl").write_text(half)
    (own / "core.yaml").write_text(CORE)
    (state / "eval_bundle.zip").write_text("mine, too")
    out = prepare(hub, state, *FINEWEB, "--phases=base-eval")
    assert out.returncode == 0, out.stdout + out.stderr
    assert (own / "eval_data/a/t.jsonl").read_text() == half and (own / "core.yaml").exists()
    assert (own / "eval_meta_data.csv").exists()
    assert out.stdout.count("left alone") == 1 and "eval_data/a/t.jsonl" in out.stdout
    assert (state / "eval_bundle.zip").read_text() == "mine, too"

def test_a_linked_bundle_is_the_users_own_and_not_written_to(hub, state):
    assert prepare(hub, state, *FINEWEB).returncode == 0
    asked = len(hub.seen)
    own = (state / "eval_bundle").rename(state.parent / "own")
    (state / "eval_bundle").symlink_to(own)
    (own / "eval_data/a/t.jsonl").unlink()
    out = prepare(hub, state, *FINEWEB)
    assert out.returncode == 2 and "by hand" in out.stderr and len(hub.seen) == asked
    assert not (own / "eval_data/a/t.jsonl").exists()

def required(hub, state, *args):
    """-> {what has to be there: [phases that read it]}"""
    out = prepare(hub, state, *FINEWEB, "--check=True", *args).stdout
    rows = re.findall(r"^(?:missing|have) +(\S+) +\d+ of \d+   (.*)$", out, re.MULTILINE)
    names = [phase.name for phase in pipeline.PHASES]
    return {what: [word for word in read_by.split() if word in names] for what, read_by in rows}

def test_what_is_required_follows_from_the_settings_of_the_phases(hub, state):
    everything = required(hub, state)
    for name, path in (("mid", "mid_train.py"), ("sft", "chat_sft.py")):
        for spec in configurator.defaults(path)["mixture"]:
            assert name in everything[tasks.TASKS[tasks.parse(spec)[0]]["train"]]
    for name in configurator.defaults("chat_eval.py")["tasks"]:
        assert "sft-eval" in everything[tasks.TASKS[name]["test"]]
    assert set(required(hub, state, "--phases=tok,base", "--mixture=gsm8k")) == {"text"}
    assert set(required(hub, state, "--phases=base-eval", "--core_items=0")) == {"text"}
    found = required(hub, state, "--phases=mid", "--mixture=gsm8k*2,identity", "--held_out=gsm8k")
    read = {what for what, phases in found.items() if phases}
    assert read == {"gsm8k_train", "identity_train", "gsm8k_test"}
    assert set(found) - read == {what for what, phases in everything.items() if not phases}
    found = required(hub, state, "--phases=mid,sft,base-eval", "--mixture=gsm8k",
                     "--held_out=gsm8k", "--sft.mixture=gsm8k,arc_easy", "--rl.task=spellingbee",
                     "--base-eval.core_items=0")
    assert found["gsm8k_train"] == ["mid", "sft"] and found["arc_easy_train"] == ["sft"]
    assert not {"words_alpha", "CORE"} & set(found)
    talks = state.with_name("talks.jsonl")
    talks.write_text(json.dumps(TALK) + "\n")
    found = required(hub, state, "--phases=mid,sft", "--mixture=", "--held_out=gsm8k",
                     f"--extra_conversations={talks}")
    read = {what for what, phases in found.items() if phases}
    assert read == {"gsm8k_test"}, "besides one's own"
    out = prepare(hub, state, *FINEWEB, "--check=True", "--phases=mid", "--mixture=mmlu")
    assert out.returncode == 2 and "no train split" in out.stderr
    out = prepare(hub, state, *FINEWEB, "--check=True", "--sft.mixtrue=gsm8k")
    assert out.returncode == 2 and "did you mean --mixture" in out.stderr
    (state.with_name("mine.py")).write_text("num_steps = 9\nGB = 1e9\n")
    out = prepare(hub, state, *FINEWEB, "--check=True", state.with_name("mine.py"))
    assert out.returncode == 2 and "unknown setting 'GB' in " in out.stderr
    assert "mine.py, line 2" in out.stderr

def test_phases_read_tasks_only_through_settings_that_declare_them():
    """prepare_data.py knows what a phase reads from these settings alone: a task named elsewhere
    would not be prepared."""
    source = (REPO / "prepare_data.py").read_text()
    reads = ast.literal_eval(re.search(r"^READS = ({.*?})", source, re.MULTILINE | re.DOTALL)[1])
    reading = re.compile(r"(tasks|task_list)\.(load|mixture|fingerprint|find|read)")
    found = 0
    for path in {*REPO.glob("*.py")} - {REPO / "tasks.py", REPO / "prepare_data.py"}:
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
                 and reading.fullmatch(ast.unparse(node.func))]
        assigned = {node.targets[0].id: node.value for node in tree.body
                    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
        for call in calls:
            found += 1
            nodes = list(ast.walk(call.args[0]))
            names = {node.id for node in nodes if isinstance(node, ast.Name)}
            for name in (names - set(reads)) & set(assigned):  # a variable made of settings
                nodes += ast.walk(assigned[name])
            mentioned = {node.id for node in nodes if isinstance(node, ast.Name)}
            literals = {node.value for node in nodes if isinstance(node, ast.Constant)}
            where = f"{path.name}:{call.lineno} {ast.unparse(call)}"
            assert mentioned & set(reads) or names == {"name"}, where
            assert not literals & set(tasks.TASKS), where
    assert found >= 8

def test_speedrun_requires_what_its_phases_read_and_data_alone_prepares_everything():
    def first(*args):
        out = subprocess.run(["bash", "speedrun.sh", "--dry-run", *args], cwd=REPO, text=True,
                             capture_output=True, check=True, env=environment("/nowhere"))
        return out.stdout.splitlines()[0]
    command = "python prepare_data.py --data=fineweb_edu"
    assert first("--data=fineweb_edu", "--depth=6", "--only=data,tok,base") == (
        f"{command} --depth=6 --phases=data,tok,base")
    everything = ",".join(phase.name for phase in pipeline.PHASES)
    assert first("--data=fineweb_edu", "--only=data") == (
        f"{command} --depth=20 --phases={everything}")

def test_the_number_of_shards_follows_from_depth_and_horizon(hub, state):
    def shards(*args):
        args = ["--data=fineweb_edu", "--check=True", "--phases=tok", *args]
        return int(re.search(r"text +0 of (\d+)", prepare(hub, state, *args).stdout)[1])
    base = configurator.defaults("base_train.py")
    for depth in (4, 20):
        config = gpt.config_from_depth(depth, 32768, base["max_seq_len"], base["arch"])
        with torch.device("meta"):
            model = gpt.GPT(config)
        # as base_train.py counts them
        parameters = sum(p.numel() for name, p in model.named_parameters()
                         if "transformer.h" in name or "lm_head" in name)
        wanted = base["tokens_per_param"] * parameters / 50e6
        assert wanted + 1 <= shards(f"--depth={depth}") <= 1.1 * wanted + 4
    assert abs(shards("--depth=20", "--tokens_per_param=24") - 2 * wanted) < 15
    assert shards("--depth=20", "--aspect_ratio=128") > 3 * wanted
    assert shards("--depth=4", "--tok.vocab_size=4096") < shards("--depth=4")
    assert shards("--num_steps=100", "--total_batch_size=1000000") == 4
    assert shards("--num_steps=9000", "--base.num_steps=100", "--total_batch_size=1000000",
                  "--rl.num_steps=9000") == 4
    assert shards("--depth=100") == 1823 and shards("--shards=0") == 1

def test_two_processes_at_once_on_one_folder(hub, state):
    """fineweb_edu and climbmix share the tasks. A slow server keeps both busy with the same file
    at the same time."""
    path = next(p for p in hub.bodies if p.endswith("train-00002-of-00004.parquet"))
    hub.plan[path] = ["stall"]
    first = begin(hub, state, *FINEWEB)
    assert hub.stalled.wait(60)
    second = begin(hub, state, "--data=climbmix", "--shards=1")
    wait_for(lambda: any("climbmix" in p for p, _, _ in hub.seen), second)
    third = prepare(hub, state, "--data=climbmix", "--shards=1")
    assert third.returncode == 2 and "is being written by process" in third.stderr, third.stderr
    hub.go.set()
    said = [process.communicate(timeout=100) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    asked = [do for p, do, _ in hub.seen if p == path]
    assert asked == ["stall", "whole"], "the file was brought once, with one continuation"
    assert len(tasks.load("smoltalk", "train", "climbmix")) == 120
    assert not [name for name in digests(state) if ".part" in name]
    assert (state / "base_data_climbmix/shard_06542.parquet").exists()
    shutil.rmtree(state / "base_data")
    assert re.search(r"climbmix .*\n  data +done", script(state, "status.py").stdout)

def test_a_stop_keeps_what_came_and_the_same_command_goes_on(hub, state):
    path = fineweb_path(hub, "shard_00000.parquet")
    hub.bodies[path], hub.plan[path] = BIG, ["stall"]
    process = begin(hub, state, *FINEWEB, "--phases=tok")
    assert hub.stalled.wait(60)
    part = state / "base_data/.part-shard_00000.parquet"
    wait_for(lambda: part.exists() and part.stat().st_size >= len(BIG) // 4, process)
    process.send_signal(signal.SIGTERM)
    started = time.time()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75 and time.time() - started < 20
    assert "same command" in err and "Traceback" not in err
    record = json.loads((state / "base_data/phase.json").read_text())
    kept = part.stat().st_size
    assert record["status"] == "interrupted" and kept > len(BIG) // 4
    assert prepare(hub, state, *FINEWEB, "--phases=tok").returncode == 0
    assert asked_for(hub, path) == [None, f"bytes={kept}-"]
    assert (state / "base_data/shard_00000.parquet").read_bytes() == BIG

def test_a_folder_of_ones_own_with_own_conversations_and_linked_tasks(hub, state, tmp_path):
    own = tmp_path / "texts"
    own.mkdir()
    for i in range(2):
        with gzip.open(own / f"{i}.jsonl.gz", "wt") as f:
            f.write("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:50]))
    talks = tmp_path / "talks.jsonl"
    talks.write_text((json.dumps({"messages": TALK}) + "\n") * 3)
    pipeline.task_dir(str(own)).mkdir(parents=True)
    (pipeline.task_dir(str(own)) / "smoltalk_test.jsonl").symlink_to(talks)
    args = [f"--data={own}", "--phases=tok,base,mid", f"--extra_conversations={talks}",
            "--mixture=identity"]
    out = prepare(hub, state, *args, env={"NANOCHAT_OFFLINE": "1"})
    assert out.returncode == 0 and not hub.seen, out.stdout + out.stderr
    assert "1 files for training" in out.stdout and "not read" not in out.stdout
    assert "held out for validation: 1.jsonl.gz\n" in out.stdout and "median" not in out.stdout
    out = prepare(hub, state, *args, "--check=True")
    lengths = sorted(map(len, TEXTS[:50]))
    facts = (f"50 documents, {sum(lengths):,} characters, median "
             f"{(lengths[24] + lengths[25]) / 2:.0f}, UTF-8, Latin\n")
    assert out.returncode == 0 and f"0.jsonl.gz: {facts}1.jsonl.gz: {facts}" in out.stdout, out
    assert sorted(p.name for p in own.iterdir()) == ["0.jsonl.gz", "1.jsonl.gz"]
    (own / "more.jsonl").mkdir()
    (own / "notes.md").write_text("not for training")
    out = prepare(hub, state, *args, "--check=True")
    assert out.returncode == 0
    assert "not read: 2 (more.jsonl (a folder), notes.md); read are" in out.stdout, out.stdout
    (own / "1.jsonl.gz").write_bytes((own / "1.jsonl.gz").read_bytes()[:-20])
    talks.write_text("{broken\n" * 30)
    out = prepare(hub, state, *args, "--check=True")
    assert out.returncode == 2 and re.search("damaged +text +1 of 2", out.stdout)
    assert "1.jsonl.gz is damaged " in out.stdout and "talks.jsonl: 30 of 30 " in out.stdout
    out = prepare(hub, state, *args)
    assert out.returncode == 2 and not hub.seen and "by hand" in out.stderr
    talks.unlink()
    out = prepare(hub, state, *args, "--check=True")
    assert out.returncode == 2 and re.search("missing +talks.jsonl +0 of 1", out.stdout)
    assert "there is no phase bse" in prepare(hub, state, *args, "--phases=bse").stderr

def test_the_toy_world_is_checked_file_by_file(state, monkeypatch):
    monkeypatch.setenv("HOME", str(state))

    def check(*args):
        return script(state, "prepare_data.py", "--data=toy", *args, "--check=True")
    made = ["prepare_data.py", "--data=toy", "--size=0.01"]
    assert check().returncode == 2 and not state.exists(), "it only looks"
    assert script(state, *made).returncode == 0
    out = check()
    assert out.returncode == 0, out.stdout
    assert re.search(r"ok +smoltalk_train +1 of 1 .*mid sft", out.stdout)
    assert re.search(r"ok +CORE +8 of 8 ", out.stdout), "each of its files"
    # one's own conversations are looked at here too, and before the world is made anew
    talks = state / "talks.jsonl"
    for extra, text, code in ((f"--extra_conversations={talks}", None, 2),
                              (f"--mid.mixture=gsm8k,{talks}", "{broken\n" * 30, 2),
                              (f"--held_out={talks}", json.dumps(TALK) + "\n", 0),
                              ("--held_out=~/talks.jsonl", None, 0),
                              ("--held_out=~nobody/talks.jsonl", None, 2)):
        if text:
            talks.write_text(text)
        looked, again = check("--size=0.01", extra), script(state, *made, extra)
        assert looked.returncode == again.returncode == code, looked.stdout + again.stdout
        assert ("done already" in again.stdout) == (code == 0), again.stdout
        assert ("talks.jsonl" in again.stderr) == (code == 2), again.stderr
    path = state / "toy/task_data/gsm8k_test.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    out = check()
    assert out.returncode == 2
    assert re.search(r"damaged +gsm8k_test ", out.stdout)
    assert "gsm8k_test.jsonl does not match its checksum" in out.stdout
    assert "run: python prepare_data.py --data=toy\n" in out.stderr

def test_texts_that_are_reached_by_another_path_do_not_begin_anew_in_silence(state, tmp_path):
    paths = [tmp_path / where / "books[1]" for where in ("home", "mount")]
    for path in paths:
        path.mkdir(parents=True)
        for name in ("a.txt", "b.txt"):
            (path / name).write_text("A paragraph that says something.\n\n" * 30)

    def looked(path):
        out = script(state, "prepare_data.py", f"--data={path}", "--check=True", "--phases=tok")
        assert out.returncode == 0, out.stderr
        return [line for line in out.stdout.splitlines() if line.startswith("note: the state")]
    assert looked(paths[0]) == looked(paths[1]) == []
    old = pipeline.data_root(str(paths[0]))
    old.mkdir(parents=True)
    assert looked(paths[0]) == [] and str(old) in looked(paths[1])[0]
    pipeline.data_root(str(paths[1])).mkdir()
    assert looked(paths[1]) == []

def test_the_toy_world_is_made_beside_the_users_own_files(state):
    made = ["prepare_data.py", "--data=toy", "--size=0.01"]
    folder = state / "toy/task_data"
    folder.mkdir(parents=True)
    talk = json.dumps({"messages": TALK}) + "\n"
    for name in ("mine.jsonl", "gsm8k_test.jsonl"):
        (folder / name).write_text(talk)
    extra = f"--extra_conversations={folder / 'mine.jsonl'}"
    out = script(state, *made, extra)
    assert out.returncode == 0, out.stdout + out.stderr
    kept = list(folder.glob("gsm8k_test.jsonl.old-*"))
    assert [path.read_text() for path in kept] == [talk] and kept[0].name in out.stdout
    assert not (state / "toy/.new").exists()
    # what is the user's own is not taken for a part of the world
    (folder / "mine.jsonl").write_text(talk * 2)
    world = digests(state)
    out = script(state, *made, extra)
    assert out.returncode == 0 and "done already" in out.stdout and digests(state) == world
    # half of it is gone: it comes again, and what is whole stays as it is
    (folder / "gsm8k_test.jsonl").unlink()
    other = (folder / "arc_easy_test.jsonl").stat()
    assert script(state, *made).returncode == 0 and digests(state) == world
    assert (folder / "arc_easy_test.jsonl").stat().st_mtime_ns == other.st_mtime_ns
    # another world: all of the old one is kept
    assert script(state, *made, "--seed=2").returncode == 2
    assert script(state, *made, "--seed=2", "--start_over=True").returncode == 0
    after = digests(state)
    gone = {name for name in world if name not in after or world[name] != after[name]}
    assert gone and {world[name] for name in gone} <= {*after.values()}

DIES = """
import os, runpy, sys, common
left, write = int(sys.argv.pop(1)), common.atomic_write
def count_down(path, content):
    global left
    left -= 1
    if left == 0:
        os._exit(9)
    write(path, content)
common.atomic_write = count_down
sys.argv = ["prepare_data.py", *sys.argv[1:]]
runpy.run_path("prepare_data.py", run_name="__main__")
"""

def test_a_death_while_the_toy_world_is_made_leaves_nothing_that_is_not_whole(state):
    made = ["--data=toy", "--size=0.01"]
    (state / "toy/.new/task_data").mkdir(parents=True)  # of a death of another version
    (state / "toy/.new/task_data/stray.jsonl").write_text("stray")
    for last in (4, 30, 38):  # the record is the first write, then 27 files are made twice
        out = script(state, "-c", DIES, last, *made)
        assert out.returncode == 9, out.stdout + out.stderr
        assert script(state, "prepare_data.py", *made, "--check=True").returncode == 2
    assert script(state, "prepare_data.py", *made).returncode == 0
    assert not list(state.rglob("*.old-*")), "what the earlier ones wrote was as it has to be"
    straight = state.with_name("straight")
    assert script(straight, "prepare_data.py", *made).returncode == 0
    assert digests(state) == digests(straight)

@pytest.mark.parametrize("what", ["toy", "texts"])
def test_a_state_folder_that_cannot_be_written_is_one_line(state, tmp_path, what):
    state.write_text("a file")
    talks = tmp_path / "talks.jsonl"
    talks.write_text(json.dumps({"messages": TALK}) + "\n")
    data = "toy"
    if what == "texts":
        data = tmp_path / "texts"
        data.mkdir()
        (data / "a.txt").write_text("text")
    out = script(state, "prepare_data.py", f"--data={data}", "--phases=mid", "--mixture=identity",
                 f"--held_out={talks}")
    assert out.returncode in (1, 2) and "could not write to" in out.stderr, out.stderr
    assert out.stderr.count("\n") == 1

def test_in_a_network_namespace_without_interface(hub, state):
    unshare = ["unshare", "-rn"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False,
                                                         capture_output=True).returncode:
        pytest.skip("unshare -rn is not allowed here")

    def run(*args):
        return subprocess.run([*unshare, sys.executable, *args], cwd=REPO, text=True, check=False,
                              capture_output=True, timeout=200, env=environment(state))
    assert prepare(hub, state, *FINEWEB).returncode == 0
    reach = "import socket; socket.create_connection(('127.0.0.1', 9))"
    out = run("-c", reach)
    assert out.returncode != 0 and "unreachable" in out.stderr, "there is a network"
    for command in (["prepare_data.py", *FINEWEB, "--check=True"], ["prepare_data.py", *FINEWEB],
                    ["tok_train.py", "--data=fineweb_edu", "--vocab_size=300", "--workers=1"]):
        out = run(*command)
        assert out.returncode == 0, out.stdout + out.stderr
    (state / "task_data/gsm8k_test.parquet").unlink()
    out = run("prepare_data.py", *FINEWEB, "--check=True")
    assert out.returncode == 2 and "missing  gsm8k_test" in out.stdout

def test_identity_conversations_are_the_same_each_time_and_well_formed(hub, state):
    out = prepare(hub, state, "--data=fineweb_edu", "--shards=0", "--phases=mid",
                  "--mixture=identity", "--held_out=identity")
    assert out.returncode == 2, "it has no test split"
    args = ["--shards=0", "--phases=sft", "--mixture=identity", "--held_out=smoltalk"]
    written = []
    for name in ("fineweb_edu", "climbmix"):
        path = pipeline.task_dir(name) / "identity_train.jsonl"
        path.unlink(missing_ok=True)
        assert prepare(hub, state, f"--data={name}", *args).returncode == 0
        written.append(path.read_bytes())
        assert len(tasks.load("identity", "train", name)) == 1000
    assert written[0] == written[1] and len(set(written[0].splitlines())) > 900
    path.write_text("{broken\n" * 30)
    out = prepare(hub, state, f"--data={name}", *args)
    assert out.returncode == 2 and "identity_train.jsonl" in out.stderr and "by hand" in out.stderr
    assert path.read_text() == "{broken\n" * 30, "it may be the user's own"
