"""status.py: what died and why, from what deaths of many kinds really leave behind; what Slurm's
books add; figures, what is outdated, what is left, one command to go on."""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import causes
import checkpoint
import common
import pipeline
import status
from conftest import REPO, environment, script
from execution import sandbox_available
from lock import take_lock
from test_faults import BASE

needs_mounts = pytest.mark.skipif(not sandbox_available()[0], reason="no namespaces to mount in")

# ---- deaths: a process of the real pipeline dies, status.py has to say of what

FAULT = """
import os, sys
if any(word.endswith("base_train.py") for word in sys.orig_argv) and "--check=True" not in sys.argv:
    sys.path.insert(0, {repo!r})
    import resource, signal
    import torch, gpt
    real, calls = gpt.GPT.forward, [0]
    def forward(self, idx, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 5:
            {fault}
        return real(self, idx, *args, **kwargs)
    gpt.GPT.forward = forward
"""
OUT_OF_MEMORY = 'raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")'
FULL = "resource.setrlimit(resource.RLIMIT_AS, (10 ** 9, 10 ** 9)); torch.ones(10 ** 9)"
NAN = 'self.lm_head.weight.data.fill_(float("nan")); self.lm_head.requires_grad_(False)'

def launched(state, folder, fault="pass", *given, base=(), before="", data="toy", depth="1"):
    """Runs launch.py as speedrun.sh does, with a training of 12 steps whose fifth pass `fault`
    hits, then status.py --json=True; both behind the shell commands `before`, which may mount
    something. -> (what the launcher said, all that status.py has found)"""
    (folder / "sitecustomize.py").write_text(FAULT.format(repo=str(REPO), fault=fault))
    words = [data, depth]
    own = {"base": [*BASE, "--num_steps=12", *base],
           "mid": ["--tag=d1", "--max_steps=2"], "data": ["--depth=1"]}
    for phase in pipeline.PHASES:
        words += ["--run", phase.name, phase.script, *own.get(phase.name, [])]
    words += ["--given", f"--data={data}", f"--depth={depth}", "--nproc=1", "--skip-trial",
              *(given or ["--only=base"])]
    commands = [[sys.executable, str(REPO / "launch.py"), *words],
                [sys.executable, str(REPO / "status.py"), "--json=True", f"--data={data}"]]
    launch, look = (" ".join("'" + word + "'" for word in command) for command in commands)
    text = f"set -e; {before}\nset +e; {launch}; echo \"code $?\"; {look} > '{folder}/found.json'"
    wrapped = ["unshare", "--user", "--map-root-user", "--mount"] if before else []
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    out = subprocess.run([*wrapped, "bash", "-c", text], cwd=folder, text=True, timeout=200,
                         capture_output=True, check=False,
                         env={**environment(state), "PATH": path, "PYTHONPATH": str(folder)})
    said = out.stdout + out.stderr
    assert (folder / "found.json").read_text(), said
    return said, json.loads((folder / "found.json").read_text())

def facts(found, phase):
    return next(facts for facts in found["sets"][0]["runs"][0]["phases"]
                if facts["phase"] == phase)

@pytest.fixture
def fresh(prepared):
    """The small toy world without what an earlier test has trained."""
    for path in [prepared / "toy/base_checkpoints", prepared / "toy/mid_checkpoints",
                 prepared / "toy/speedrun_d1.json"]:
        subprocess.run(["rm", "-rf", path], check=True)
    return prepared

DEATHS = [  # fault, exit code of the launcher, kind, what shows it
    ("os.kill(os.getpid(), signal.SIGTERM)", 75, "signal", "signal SIGTERM: saved at step"),
    ("os.kill(os.getpid(), signal.SIGINT)", 75, "signal", "signal SIGINT: saved at step"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed", "killed by SIGKILL"),
    ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "crash", "killed by SIGSEGV"),
    (OUT_OF_MEMORY, 1, "gpu memory", "CUDA out of memory"),
    (FULL, 1, "host memory", "allocate memory"),
    ('raise ValueError("a fault of ours")', 1, "traceback", "ValueError: a fault of ours"),
]

@pytest.mark.parametrize(("fault", "code", "kind", "shown"), DEATHS)
def test_what_has_killed_a_training_is_named(fresh, tmp_path, fault, code, kind, shown):
    said, found = launched(fresh, tmp_path, fault)
    assert f"code {code}\n" in said, said
    why = facts(found, "base")["cause"]
    assert why["kind"] == kind and shown in why["shown_by"][0], (why, said)
    assert facts(found, "base")["state"] in ("half", "failed")
    if code == 75:
        assert found["next"] == ("bash speedrun.sh --data=toy --depth=1 --nproc=1 --skip-trial "
                                 "--only=base"), "what a person would type"

def test_a_time_limit_and_numbers_that_are_not_finite(fresh, tmp_path):
    _, found = launched(fresh, tmp_path, base=["--time_limit=0"])
    why = facts(found, "base")["cause"]
    assert why["kind"] == "time limit" and "deadline: saved at step" in why["shown_by"][0]
    said, found = launched(fresh, tmp_path, NAN)
    assert "code 1\n" in said, said
    why = facts(found, "base")["cause"]
    assert why["kind"] == "not finite" and "no finite gradient" in why["shown_by"][0], said

@needs_mounts
def test_a_full_disk_and_one_that_cannot_be_written(fresh, tmp_path):
    folder = fresh / "toy/base_checkpoints"
    folder.mkdir()
    said, found = launched(fresh, tmp_path, before=f"mount -t tmpfs -o size=500k x '{folder}'")
    assert "code 1\n" in said and "No space left" in said, said
    assert facts(found, "base")["cause"]["kind"] == "disk"
    said, found = launched(fresh, tmp_path, before=f"mount -t tmpfs -o ro x '{folder}'")
    assert "code 2\n" in said and "Read-only" in said, said
    why = facts(found, "base")["cause"]
    assert why["kind"] == "read-only" and "Read-only file system" in why["shown_by"][0]

def test_what_was_never_begun_has_its_cause_too(fresh, tmp_path):
    """The run of DESIGN.md: pretraining ended well, midtraining had nothing to read."""
    assert "code 0\n" in launched(fresh, tmp_path)[0]
    tasks = fresh / "toy/task_data/smoltalk_train.jsonl"
    tasks = tasks if tasks.exists() else next((fresh / "toy/task_data").glob("smoltalk_train*"))
    tasks.rename(tmp_path / tasks.name)
    said, found = launched(fresh, tmp_path, "pass", "--only=mid")
    (tmp_path / tasks.name).rename(tasks)
    assert "code 2\n" in said, said
    why = facts(found, "mid")["cause"]
    assert facts(found, "mid")["state"] == "absent" and why["kind"] == "missing data"
    assert "smoltalk_train" in why["shown_by"][0] and found["next"].startswith("bash speedrun.sh")
    assert facts(found, "base")["cause"] is None and facts(found, "sft")["cause"] is None

    said, found = launched(fresh, tmp_path, base=["--matrix_lr=0.01"])
    assert "code 2\n" in said, said
    assert facts(found, "base")["state"] == "done"
    assert facts(found, "base")["cause"]["kind"] == "other inputs"
    model = fresh / "toy/base_checkpoints/d1/model_000012.pt"
    whole = model.read_bytes()
    model.write_bytes(whole[:5000] + b"?" + whole[5001:])
    said, found = launched(fresh, tmp_path, "pass", "--only=mid")
    assert "code 2\n" in said, said
    assert facts(found, "mid")["cause"]["kind"] == "damaged", said

def test_no_network(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None")
    env = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9",
           "PYTHONPATH": str(tmp_path)}  # it tries again and again, in the end after minutes
    state = tmp_path / "state"
    out = script(state, "prepare_data.py", "--data=climbmix", "--phases=tok", env=env)
    assert out.returncode not in (0, 2), out.stdout + out.stderr
    found = json.loads(script(state, "status.py", "--json=True", "--data=climbmix").stdout)
    why = facts(found, "data")["cause"]
    assert why["kind"] == "no network" and "--only=data" in why["mend"], why

# ---- Slurm's books, and the log

SLURM_ENDS = {  # State of sacct -> kind
    "TIMEOUT": "time limit", "PREEMPTED": "preempted", "CANCELLED by 1000": "cancelled",
    "NODE_FAIL": "node lost", "OUT_OF_MEMORY": "host memory"}
SIGTERM = ["signal SIGTERM: saved at step 40 of 60"]

@pytest.fixture
def books(tmp_path, monkeypatch):
    """books(sacct, scontrol, squeue): what Slurm's commands print, None: there is none of it."""
    folder = tmp_path / "books"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(**texts):
        for name in ("sacct", "scontrol", "squeue"):
            text = texts.get(name)
            (folder / name).write_text("#!/bin/bash\nexit 1" if text is None else
                                       f"#!/bin/bash\ncat <<'END'\n{text}\nEND")
            (folder / name).chmod(0o755)
    return put

@pytest.mark.parametrize(("end", "kind"), SLURM_ENDS.items())
def test_slurm_knows_more_than_the_signal_that_came(books, end, kind):
    books(sacct=f"7|{end}|0:15|01:00:00|01:00:00|n1\n7.batch|COMPLETED|0:0|01:00:00||n1\n")
    why = causes.of_death(SIGTERM, "7")
    assert why.kind == kind and end in why.shown_by[0]
    books(scontrol=f"JobId=7 JobState={end.split()[0]} Reason=None")
    assert causes.of_death(SIGTERM, "7").kind == kind, "a site without accounting"
    books()
    assert causes.of_death(SIGTERM, "7").kind == "signal"
    full = ["OSError: [Errno 28] No space left on device", *SIGTERM]
    books(sacct=f"7|{end}|0:15|01:00:00|01:00:00|n1\n")
    assert causes.of_death(full, "7").kind == "disk", "what it has said itself comes first"

def test_only_the_last_attempt_counts_and_no_guess_of_ours(books, tmp_path):
    books(sacct="7|NODE_FAIL|0:0|1|1|n1\n7.0|NODE_FAIL|0:0|1|1|n1\n7|CANCELLED by 5|0:0|1|1|n2")
    assert causes.of_death(SIGTERM, "7").kind == "cancelled"
    books()
    log = tmp_path / "log"
    log.write_text("base was killed (SIGKILL), probably because the host ran out of memory\n"
                   "base_train: the last attempt was killed or ran out of memory\n")
    assert causes.of_death(["killed by SIGKILL"], "7", log).kind == "killed"
    reason = "one of its processes has died, the lines above say of what (exit 1); signal SIGTERM"
    assert causes.of_death([reason]).kind == "another rank"

def test_the_end_of_the_log_of_the_last_attempt_counts(books, tmp_path):
    books()
    log = tmp_path / "speedrun-7.log"
    log.write_text("job 7, attempt 1 of it, 2026-11-29\nslurmstepd: error: Detected 1 oom_kill "
                   "event\njob 7, attempt 2 of it, 2026-11-29\n" + "step 1\n" * 50
                   + "is missing, says a line of somebody else\n"
                   "srun: error: n2: task 1: Killed\nsrun: error: Node failure on n2\n")
    why = causes.of_death(["process 12 died without a word, as by SIGKILL"], "7", log)
    assert why.kind == "node lost" and why.shown_by == ["srun: error: Node failure on n2"]
    assert causes.of_death([], "7", tmp_path / "no.log").kind == "unknown"
    assert causes.of_death(["nobody has written this line yet"]).shown_by

SAID = {  # kind: what our own code, Python, torch, Slurm or the kernel say; others are made above
    "quota": "OSError: [Errno 122] Disk quota exceeded: 'model.tmp'",
    "another writer": "lost the lock of /x/d4 to another process; stopping without writing",
    "another rank": "another rank died or cannot be reached (Connection reset by peer)",
    "disk": "checkpoints need 4.20 GB, 1.00 GB free in /x: free some disk space",
    "preempted": "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 12:00:00 DUE TO PREEMPTION ***",
    "time limit": "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 12:00:00 DUE TO TIME LIMIT ***",
    "not finite": "the loss has exploded: for 50 steps in a row loss 9.1 is far above its level",
    "no network": "requests.exceptions.ConnectionError: Max retries exceeded",
    "no progress": "3 attempts in a row got nothing done, so this one is the last: see why in the "
                   "log above (is the time limit shorter than the start and one save?)",
    "job": "8 processes a node need as many CPUs at least, and this job has 1",
    "read-only": "could not save step 9 in /x: [Errno 30] Read-only file system; the last good "
                 "checkpoint is that of step 4; 812.0 GB are free: free some space or make it "
                 "writable",
    "missing data": "there is no base model d4 of toy; run: bash speedrun.sh",
}

@pytest.mark.parametrize(("kind", "line"), SAID.items())
def test_what_is_said_has_a_kind(kind, line):
    assert causes.cause_of(["something else", line]).kind == kind
    assert causes.cause_of(["something else"]) is None

def test_every_kind_is_tried():
    tried = {kind for *_, kind, _ in DEATHS} | {*SLURM_ENDS.values()} | {*SAID}
    tried |= {"other inputs", "damaged"}  # above
    assert tried == {sign.kind for sign in causes.SIGNS} and len(tried) >= 15

# ---- the table, what is outdated, what is left, what goes on

def record(stage, tag="d4", **facts):
    """A stage of 60 steps of the toy world as it looks after a save at step 40, or its end."""
    folder = pipeline.state_path(stage, "toy", tag)
    folder.mkdir(parents=True)
    step = facts.get("step", 40)
    (folder / checkpoint.names(step)[0]).write_text("weights")
    (folder / checkpoint.names(step)[2]).write_text(json.dumps({"num_steps": 60, "seconds": 90.0}))
    (folder / checkpoint.manifest_name(step)).write_text(json.dumps(
        {"step": step, "files": {checkpoint.names(step)[0]: [7, stage * 8]}}))
    common.atomic_write(folder / "phase.json", json.dumps({
        "status": "done", "settings": {"data": "toy"}, "inputs": {}, "free": {}, "pid": 4194303,
        "reason": "", "updated": time.time(), "num_steps": 60, **facts}))
    return folder

def seen(state, *args):
    out = script(state, "status.py", "--data=toy", *args)
    assert out.returncode == 0 and out.stderr == "", out.stderr
    return out.stdout

def test_what_was_trained_from_another_model_is_outdated(state):
    record("base", step=60, val_bpb=0.8123)
    mid = record("mid", step=60, inputs={"base": checkpoint.fingerprint(
        pipeline.state_path("base", "toy", "d4"), 60)})
    record("sft", step=60, inputs={"mid": "of another life"})
    said = seen(state)
    assert re.search(r"base d4 +done, step 60 of 60, 0s ago; 0\.8123 bits per byte, 1m30s", said)
    assert re.search(r"mid d4 +done, step 60", said) and mid.exists()
    assert re.search(r"sft d4 +outdated: mid was trained again since", said)
    assert said.endswith("next: bash speedrun.sh --data=toy --depth=4 -- --sft.start_over=True\n")
    common.atomic_write(pipeline.tokenizer_dir("toy") / "phase.json",
                        '{"fingerprint": "new", "status": "done"}')
    common.atomic_write(pipeline.tokenizer_dir("toy") / "tokenizer.json", "{}")
    folder = pipeline.state_path("base", "toy", "d4")
    old = json.loads((folder / "phase.json").read_text())
    (folder / "phase.json").write_text(json.dumps({**old, "inputs": {"tokenizer": "old"}}))
    said = seen(state)
    assert re.search(r"base d4 +outdated: the tokenizer was trained again since", said)
    assert "-- --base.start_over=True --mid.start_over=True --sft.start_over=True" in said

def test_nothing_is_damaged_where_all_is_well(state, monkeypatch):
    """What a damaged file may cost, a fault of ours must not: none is caught here."""
    monkeypatch.setattr(status, "guarded", lambda usual, function, *args: function(*args))
    assert status.look_at("toy", "d4")["next"] == "bash speedrun.sh --data=toy --depth=4"
    record("base", step=60, val_bpb=0.8123)
    record("mid", status="failed", reason="x")
    record("sft", status="running")
    phases = {facts["phase"]: facts for facts in status.look_at("toy", "d4")["phases"]}
    assert phases["base"]["figures"][0] == "0.8123 bits per byte"
    assert phases["mid"]["cause"].keys() == {"kind", "sentence", "mend", "shown_by"}
    assert phases["sft"]["cause"]["kind"] == "killed" and phases["rl"]["state"] == "absent"

def test_a_training_that_runs_says_where_it_is(state):
    folder = record("base", status="running")
    lines = [{"kind": "train", "step": s, "clock": {"seconds": 2.0 * s, "tokens_per_second": 9300}}
             for s in range(40, 51)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "st')
    lock = take_lock(folder)
    said = seen(state)
    lock.release()
    assert re.search(r"base d4 +running, saved at step 40 of 60, .*; at step 51 of 60, "
                     r"9,300 tokens/s, about 18s left", said), said

def test_what_is_left_against_the_limit_of_a_job(state):
    record("base", status="interrupted", reason="deadline: saved at step 40 of 60")
    tried = {"num_steps": 60, "seconds": 600.0, "first_seconds": 0.0, "evals": 0, "save_seconds": 0,
             "eval_seconds": 0.0, "bytes": 2_000_000_000, "keep": 1}
    root = pipeline.data_root("toy")
    (root / "tried_d4.json").write_text(json.dumps({"base": tried, "mid": tried}))
    now = time.time()
    command = "sbatch --time=2:00:00 slurm_speedrun.sbatch --data=toy"
    (root / "speedrun_d4.json").write_text(json.dumps({
        "commands": {"base": command}, "began": {"time": now - 7200, "ends": now, "job": None}}))
    said = seen(state)
    # 20 of 60 steps of ten minutes, and 60 more: 800 minutes of 118 each
    assert "left: about 13h20m (base 3h20m, mid 10h00m), 7 jobs of 2h00m" in said
    assert re.search(r"; 6\.00 GB in 12 files, [\d.]+ GB( and [\d,]+ inodes)? free", said)
    assert said.endswith(f"next: {command}\n") and "why: its time was over" in said

def test_a_job_in_the_queue_goes_on_by_itself(state, books):
    record("base", status="interrupted", reason="deadline: saved at step 40 of 60")
    root = pipeline.data_root("toy")
    (root / "speedrun_d4.json").write_text(json.dumps({"began": {"job": "7", "time": 0}}))
    books(squeue="70|RUNNING|None|(null)\n7|PENDING|Resources|(null)")
    path = f"{os.environ['PATH']}"
    said = seen(state)
    assert said.endswith("next: nothing needs to be typed: job 7 is PENDING (Resources)\n"), path
    books(squeue="8|PENDING|Dependency|afterany:7(unfulfilled)")
    assert seen(state).endswith("nothing needs to be typed: job 8 is PENDING (Dependency)\n")
    books(squeue="9|PENDING|Dependency|afterany:70(unfulfilled)")
    assert seen(state).endswith("next: bash speedrun.sh --data=toy --depth=4\n")

def test_a_phase_that_ended_well_has_no_cause_and_a_failed_one_its_own(fresh, tmp_path):
    """In a run of several phases: the report that comes after a failure is not what failed."""
    said, found = launched(fresh, tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)",
                           "--only=base,report")
    assert "=== report" in said and "code 139" in said, said
    assert facts(found, "base")["cause"]["kind"] == "crash"
    assert [f["phase"] for f in found["sets"][0]["runs"][0]["phases"] if f["cause"]] == ["base"]
    said, found = launched(fresh, tmp_path, "pass", "--only=base,report")
    assert "code 0" in said and "\ndone\n" in said, said
    assert not any(f["cause"] for f in found["sets"][0]["runs"][0]["phases"])

def test_a_refused_start_makes_no_run(fresh, tmp_path):
    launched(fresh, tmp_path, "pass")
    said, found = launched(fresh, tmp_path, "pass", "--only=mid", depth="40")
    assert "code 2" in said, said
    assert [run["tag"] for run in found["sets"][0]["runs"]] == ["d1"]

def test_rewind_is_in_the_command_that_goes_on(state):
    reason = "the loss has exploded: ...; go back with -- --base.rewind=40"
    record("base", status="failed", reason=reason, next="python base_train.py --rewind=40")
    root = pipeline.data_root("toy")
    (root / "speedrun_d4.json").write_text(json.dumps({"commands": {"base": "bash speedrun.sh"}}))
    assert seen(state).endswith("next: bash speedrun.sh -- --base.rewind=40\n")

def damaged(value):
    """All ways in which one value of a JSON object is another than it should be."""
    if isinstance(value, dict):
        for key in value:
            for other in (None, 5, "x", [], {}):
                yield {**value, key: other}
            for inner in damaged(value[key]):
                yield {**value, key: inner}

def test_no_damaged_file_costs_more_than_its_own_part(state, capsys, monkeypatch):
    record("base", status="interrupted", reason="deadline", inputs={"tokenizer": "x"})
    folder = record("mid", step=60, inputs={"base": "y"}, val_bpb=0.5, pass_at={"1": 0.5})
    root = pipeline.data_root("toy")
    tried = {"num_steps": 60, "seconds": 6.0, "first_seconds": 0.0, "evals": 0, "save_seconds": 0,
             "eval_seconds": 0.0, "bytes": 2_000, "keep": 1}
    (root / "tried_d4.json").write_text(json.dumps({"base": tried, "mid": tried}))
    (root / "speedrun_d4.json").write_text(json.dumps({
        "commands": {"base": "bash"}, "phases": ["base"], "began": {"time": 1.0, "ends": 9.0},
        "ends": {"base": {"code": 1, "reason": "x", "time": 9e9}}}))
    monkeypatch.setattr(status, "data", "")
    cases = 0
    for path in (root / "tried_d4.json", root / "speedrun_d4.json", folder / "phase.json",
                 folder.parents[1] / "base_checkpoints/d4/phase.json",
                 folder / "manifest_000060.json", folder / "meta_000060.json"):
        whole = path.read_text()
        for other in damaged(json.loads(whole)):
            path.write_text(json.dumps(other))
            status.main()
            cases += 1
        path.write_text(whole)
    assert cases > 200 and "next: " in capsys.readouterr().out

def test_speedrun_shows_it_too_and_within_a_second(state):
    record("base", status="interrupted", reason="signal SIGTERM: saved at step 40 of 60")
    began = time.monotonic()
    out = subprocess.run(["bash", "speedrun.sh", "--status", "--data=toy", "--json=True"], cwd=REPO,
                         text=True, capture_output=True, check=True, env=environment(state))
    assert time.monotonic() - began < 2.0, "a second on a machine that is not busy"
    behind = ["bash", "speedrun.sh", "--data=toy", "--depth=4", "--skip-rl", "--status", "--"]
    asked = subprocess.run([*behind, "--num_steps=9"], cwd=REPO, text=True, capture_output=True,
                           check=True, env=environment(state)).stdout
    without = script(state, "status.py", "--data=toy").stdout
    assert re.sub("[0-9]+s ago", "", asked) == re.sub("[0-9]+s ago", "", without)
    found = json.loads(out.stdout)
    assert found["state"] == str(state) and found["sets"][0]["data"] == "toy"
    base = facts(found, "base")
    assert base["state"] == "half" and base["bytes"] > 7 and base["parent"] == "tok"
    assert base["cause"]["kind"] == "signal" and found["next"].startswith("bash speedrun.sh")

def test_what_a_death_has_cost_is_counted(fresh, tmp_path):
    """The steps behind the last save, which run again: known to the report."""
    launched(fresh, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)",
             base=["--save_minutes=9", "--num_steps=12"])
    said, _ = launched(fresh, tmp_path, base=["--save_minutes=9", "--num_steps=12"])
    assert "code 0\n" in said, said
    record = json.loads((fresh / "toy/base_checkpoints/d1/phase.json").read_text())
    restart, = record["restarts"]
    lost = restart["steps_lost"]
    assert restart["step"] == 0 and lost >= 1 and restart["seconds_lost"] > 0
    assert record["machine"]["torch"] and record["machine"]["Python"].startswith("3.")
