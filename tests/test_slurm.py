"""What runs under Slurm, without a Slurm: an injected clock, and squeue, scontrol, sbatch and srun that only pretend. tests/slurm.sh has the real one."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import common
import phase
import preflight
from conftest import REPO, wait_for


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake("squeue", "echo x") puts a command of that name and text first in the PATH; calls() are the command lines of all."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    def put(name, text):
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{text}\n')
        (folder / name).chmod(0o755)
    put.calls = lambda: (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return put


# ---------------------------------------------------------------------------------------------------------------------
# the clock

NOON = time.mktime(time.strptime("2026-11-24T12:00:00", "%Y-%m-%dT%H:%M:%S"))

def test_the_end_of_the_job(fake, monkeypatch):
    assert common.slurm_end_time() is None and not fake.calls(), "without Slurm nobody is asked"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    fake("squeue", "echo EndTime=2026-11-24T12:00:00")
    fake("scontrol", "echo 'JobId=7 EndTime=2026-11-24T13:00:00 Deadline=N/A'")
    assert common.slurm_end_time() == NOON and fake.calls() == ["squeue -h -j 7 -o EndTime=%e"]
    for broken in ("exit 1", "echo EndTime=N/A", "echo 'slurm_load_jobs error' >&2"):
        fake("squeue", broken)
        assert common.slurm_end_time() == NOON + 3600, "then scontrol is asked"
    fake("scontrol", "echo 'EndTime=Unknown'")
    assert common.slurm_end_time() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1234")
    assert common.slurm_end_time() == 1234.0


def test_a_process_that_leaves_does_not_die_of_being_told_once_more():
    code = f"import sys, os, signal; sys.path.insert(0, {str(REPO)!r})\nimport common\ncommon.install_stop_handlers()\n" \
           "class Last:\n def __del__(self, kill=os.kill, pid=os.getpid()): [kill(pid, s) for s in (10, 15)]\nsys.last = Last()\ncommon.leave(75)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 75


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set: clock["now"] = ..."""
    monkeypatch.setattr(common, "_stop", dict(common._stop))
    return {"now": NOON}


def test_the_margin_before_the_end_follows_from_the_longest_save(clock, monkeypatch):
    start = lambda seconds, **limit: (monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(NOON + seconds))), common.set_deadline(now=lambda: clock["now"], **limit))
    margin = lambda seconds: NOON + seconds - common.deadline()
    start(12 * 3600)
    assert margin(12 * 3600) == 120, "no save is measured yet"
    common.save_took(40.0), common.save_took(10.0)
    assert margin(12 * 3600) == 30 + 3 * 40
    start(60)
    assert margin(60) == 15, "a short job must get on, too"
    start(12 * 3600, time_limit=60)
    assert common.deadline() == NOON + 3600
    clock["now"] = NOON + 3599
    assert common.stop_requested() is None
    clock["now"] = NOON + 3600
    assert common.stop_requested() == "deadline"
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    monkeypatch.setitem(common._stop, "reason", None)
    common.set_deadline()
    assert common.deadline() == math.inf and common.stop_requested() is None


def test_the_budget_is_said_in_words():
    line = lambda left, ends: common.budget_line("base", left, NOON + ends, NOON)
    assert line(7.1 * 3600, 4.9 * 3600) == "base needs 7.1 h more, this job has 4.9 h left: it will stop at 16:54 with everything saved and continue in its next run"
    assert line(1800, 4.9 * 3600) == "base needs 30.0 min more, this job has 4.9 h left"
    assert common.budget_line("base", 5.0, math.inf, NOON) is None


def test_the_budget_is_said_once_seconds_per_step_are_known(clock, monkeypatch, capsys):
    import torch
    import training
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    common.set_deadline()
    training.start_clock(num_steps=10_000, step=0, spent=0.0, save_minutes=3.0)
    for step in range(1, 21):
        clock["now"] += 5
        training.tick(step, "loss 1", 8, 1, common.Compute(torch.device("cpu"), torch.float32, 1, False, 0, 0, 1))
        assert ("h more, this job has" in capsys.readouterr().out) is (step == 10)


# ---------------------------------------------------------------------------------------------------------------------
# the lock of another run

@pytest.mark.parametrize("answer,over", [
    ("echo 'JobId=7 JobName=x JobState=RUNNING Restarts=0'", False),
    ("echo 'JobId=7 JobName=x JobState=COMPLETING Restarts=0'", False),
    ("echo 'JobId=7 JobName=x JobState=RUNNING Restarts=1'", True),
    ("echo 'JobId=7 JobName=x JobState=PENDING Restarts=1'", True),
    ("echo 'JobId=7 JobName=x JobState=TIMEOUT Restarts=0'", True),
    ("echo 'JobId=9 ArrayJobId=7 JobState=RUNNING Restarts=0'; echo 'JobId=7 ArrayJobId=7 JobState=FAILED Restarts=0'", True),
    ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
    ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None)])
def test_slurm_is_asked_whether_the_holder_of_a_lock_is_over(fake, answer, over):
    fake("scontrol", answer)
    assert phase.slurm_life_over("7", "0") is over
    lock = {"host": "elsewhere", "boot": "b", "pid": 1, "start": "1", "job": "7", "restart": "0"}
    assert phase.holder_alive(lock, 100.0, now=101.0) is (not over)
    assert not phase.holder_alive(lock, 100.0, now=101.0 + phase.HEARTBEAT * phase.MISSED)


def test_a_stray_process_of_an_earlier_run_is_ended_when_its_lock_is_taken(tmp_path, monkeypatch, capsys):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = {"token": "x", "host": phase.socket.gethostname(), "boot": phase.boot_id(), "pid": child.pid, "start": phase.process_start(child.pid), "job": "7", "restart": "0"}
    (tmp_path / "lock.json").write_text(json.dumps(lock))
    phase.take_lock(tmp_path)
    assert child.wait(10) == -signal.SIGKILL and "a run that Slurm has ended: killed" in capsys.readouterr().out
    common.append_metrics(tmp_path / "metrics.jsonl", {"step": 1})
    (tmp_path / "lock.json").write_text(json.dumps(lock))  # and if this were the stray: it must not even add to the metrics
    with pytest.raises(SystemExit):
        common.append_metrics(tmp_path / "metrics.jsonl", {"step": 2})
    assert common.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    phase.release(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# the guard

def test_runs_without_progress_are_counted(tmp_path):
    path = tmp_path / "slurm_d4.json"
    runs = [preflight.fruitless(path, marks, ended) for marks, ended in
            [(["a"], -1), (["a"], 75),   # the first run: nothing done
             (["a"], -1), (["a"], 75),   # the second, started again at the same place
             (["b"], -1), (["c"], 75),   # somebody moved it on; this one did get on
             (["c"], -1), (["c"], -1), (["c"], -1), (["c"], preflight.TOLD), (["c"], -1), (["c"], 75)]]  # killed twice before it could say so, told to end once
    assert runs == [(0, 0), (1, 0), (1, 0), (2, 0), (0, 0), (0, 0), (0, 0), (0, 1), (0, 2), (0, 3), (0, 3), (1, 3)]


def test_what_counts_as_progress(tmp_path):
    folder = tmp_path / "base_checkpoints/d4"
    folder.mkdir(parents=True)
    marks = [preflight.landmarks(tmp_path, "d4")]
    def changed():
        marks.append(preflight.landmarks(tmp_path, "d4"))
        return marks[-1] != marks[-2]
    (folder / "manifest_000010.json").write_text("{}")
    assert changed()
    for name in ("phase.json", "lock.json", "metrics.jsonl", ".model_000020.pt.tmp"):
        (folder / name).write_text('{"status": "running", "settings": {}, "inputs": {}, "free": {}}')
        assert not changed(), name
    (folder / "manifest_000010.json").rename(folder / "manifest_000020.json")
    assert changed()
    (folder / "phase.json").write_text('{"status": "done", "settings": {}, "inputs": {}, "free": {}}')
    assert changed()
    (tmp_path / "report").mkdir()
    (tmp_path / "report/chat_mid_d4.partial.jsonl").write_text("1")
    assert changed()
    (tmp_path / "base_checkpoints/d8").mkdir()
    (tmp_path / "base_checkpoints/d8/manifest_000020.json").write_text("{}")
    assert not changed(), "another run's"


# ---------------------------------------------------------------------------------------------------------------------
# slurm_speedrun.sbatch, with a speedrun.sh that only ends with a code

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NAME": "speedrun", "SLURM_JOB_PARTITION": "main",
       "SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "8", "SLURM_JOB_ACCOUNT": "lab"}


@pytest.fixture
def job(tmp_path, fake):
    """job(speedrun="exit 75", requeue="exit 0", submit="echo 8", **environment) -> (code, output) of the batch script"""
    def run(speedrun, requeue="kill -TERM $PPID", submit="echo 8", state="RUNNING", restarts="${SLURM_RESTART_COUNT:-0}", args=("--depth=4", "--skip-rl"), during=None, **environment):
        shutil.copy(REPO / "slurm_speedrun.sbatch", tmp_path)
        (tmp_path / "speedrun.sh").write_text(speedrun)
        fake("squeue", "echo 4:00:00")
        fake("scontrol", f'[ "$1" != show ] || echo "JobId=7 JobState={state} Restarts={restarts} Requeue=1"\n[ "$1" != requeue ] || {{ {requeue}; }}')
        fake("sbatch", submit + '\necho "array: $SLURM_ARRAY_TASK_ID" >> ' + str(tmp_path / "fakes/environment"))
        process = subprocess.Popen(["bash", "slurm_speedrun.sbatch", *args], cwd=tmp_path, env={**os.environ, **JOB, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if during:
            during(process)
        out, _ = process.communicate(timeout=120)
        return process.returncode, out, [c for c in fake.calls() if c.startswith(("scontrol requeue", "sbatch"))]
    return run


def test_the_log_says_what_runs_where_and_codes_pass_through(job):
    for code in (0, 1, 2):
        got, out, calls = job(f'echo "flags: $*"; exit {code}')
        assert got == code and not calls, "neither done nor failed is started again"
        assert ("failed" in out) is (code > 0) and (not code or out.rstrip().endswith("type: sbatch --nodes=2 --time=4:00:00 slurm_speedrun.sbatch --depth=4 --skip-rl"))
    for part in ("job 7, run 1 of it", "limit 4:00:00", "nodes: n[1-2], GPUs per node: 8", "state: ", "commit: ", "flags: --depth=4 --skip-rl"):
        assert part in out, out


def test_saved_and_not_done_requeues_itself(job):
    code, out, calls = job("exit 75", SLURM_RESTART_COUNT="2")
    assert code == 75 and calls == ["scontrol requeue 7"] and "goes on by itself in its run 4" in out


def test_a_run_that_slurm_gave_up_does_not_requeue_the_next(job):
    for ends in (75, 1):
        code, out, calls = job(f"exit {ends}", restarts=1)
        assert code == ends and not calls and "into the queue itself" in out and "failed" not in out


def test_an_element_of_an_array_requeues_itself_alone(job):
    _, _, calls = job("exit 75", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="10", SLURM_ARRAY_TASK_MAX="10")
    assert calls == ["scontrol requeue 7_10"], "the last element has the whole array's number"
    code, out, calls = job("exit 75", requeue="exit 1", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="9", SLURM_ARRAY_TASK_MAX="10")
    assert code == 75 and "next element" in out and not any(c.startswith("sbatch") for c in calls)


def test_a_successor_where_requeueing_is_not_permitted(job, tmp_path):
    code, out, calls = job("exit 75", requeue="echo 'Requested operation is presently disabled for job 7' >&2; exit 1", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="10", SLURM_ARRAY_TASK_MAX="10")
    assert code == 75 and "job 8 is submitted and goes on" in out
    for part in ("--dependency=afterany:5_10", "--nodes=2", "--time=4:00:00", "--partition=main", "--account=lab", "slurm_speedrun.sbatch --depth=4 --skip-rl"):
        assert part in calls[-1], calls
    assert (tmp_path / "fakes/environment").read_text() == "array: \n", "the successor is no element"


def test_a_command_to_type_where_neither_is_permitted(job):
    code, out, _ = job("exit 75", requeue="exit 1", submit="exit 1")
    assert code == 75 and out.rstrip().endswith("to go on, type: sbatch --nodes=2 --time=4:00:00 slurm_speedrun.sbatch --depth=4 --skip-rl")


@pytest.mark.parametrize("state,goes_on", [("CANCELLED", False), ("RUNNING", False), ("TIMEOUT", True), ("PREEMPTED", True)])
def test_a_cancelled_job_stays_cancelled(job, tmp_path, state, goes_on):
    def cancel(process):
        assert process.stdout.readline() is not None
        wait_for((tmp_path / "listening").exists, process)
        process.send_signal(signal.SIGTERM)
    code, out, calls = job("trap 'exit 75' TERM; touch listening; while :; do sleep 0.05; done", state=state, during=cancel)
    assert code == 75 and bool(calls) is goes_on, out


def test_outside_a_job_it_says_how_to_submit(fake):
    out = subprocess.run(["bash", "slurm_speedrun.sbatch", "--depth=4"], cwd=REPO, capture_output=True, text=True)
    assert out.returncode == 2 and "sbatch slurm_speedrun.sbatch --depth=4" in out.stderr


# ---------------------------------------------------------------------------------------------------------------------
# speedrun.sh inside a job

needs_venv = pytest.mark.skipif(not (REPO / ".venv/matches").exists(), reason="speedrun.sh would install .venv; tests/run.sh makes it first")


def speedrun(state, *flags, **environment):
    return subprocess.run(["bash", "speedrun.sh", *flags], cwd=REPO, env={**os.environ, **JOB, "NANOCHAT_SLURM": "1", "NANOCHAT_BASE_DIR": str(state), **environment},
                          capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)


@needs_venv
def test_one_torchrun_a_node_with_a_meeting_point_from_the_allocation(fake, tmp_path):
    fake("scontrol", "printf 'n1\\nn2\\n'")
    out = speedrun(tmp_path, "--dry-run", "--only=base,report").stdout.splitlines()
    assert "srun --ntasks-per-node=1" in out[0] and "torchrun --nnodes=2 --nproc_per_node=8" in out[0] and "--master_addr=n1" in out[0] and "srun" not in out[1]
    ports = {line.split("--master_port=")[1].split()[0] for restart in "01" for line in speedrun(tmp_path, "--dry-run", "--only=base,mid", SLURM_RESTART_COUNT=restart).stdout.splitlines()}
    assert len(ports) == 4, "what a dead run may still hold is not used again"
    alone = speedrun(tmp_path, "--dry-run", "--only=base", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="1").stdout
    assert "torchrun" not in alone and "srun" in alone


@needs_venv
def test_a_job_whose_inputs_are_missing_ends_at_once_with_the_reason(fake, tmp_path):
    for data in ("fineweb_edu", "/no/such/folder"):
        out = speedrun(tmp_path, f"--data={data}")
        assert out.returncode == 2 and out.stderr.startswith("error: ") and not any(c.startswith("srun") for c in fake.calls()), out.stderr


@needs_venv
def test_a_signal_reaches_the_processes_on_all_nodes_and_nothing_more_is_started(fake, tmp_path):
    flags = ["--depth=1", "--only=data,tok,base,report", "--", "--size=0.02", "--vocab_size=512"]
    assert subprocess.run(["bash", "speedrun.sh", "--only=data,tok", *flags[2:]], cwd=REPO, env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "state")}, capture_output=True).returncode == 0
    fake("scontrol", '[ "$2" = job ] && echo "JobId=7 Restarts=0 JobState=RUNNING" || echo n1')
    fake("srun", f'[[ "$*" == *preflight.py* ]] || {{ trap "echo signal; exit 0" USR1; touch {tmp_path}/listening; while :; do sleep 0.05; done; }}')
    start = lambda **environment: subprocess.Popen(["bash", "speedrun.sh", *flags], cwd=REPO, env={**os.environ, **JOB, "NANOCHAT_SLURM": "1", "NANOCHAT_BASE_DIR": str(tmp_path / "state"), **environment},
                                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = start()
    wait_for((tmp_path / "listening").exists, process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "signal\n" in out and "=== base" not in out and out.rstrip().endswith("run the same command again"), out
    fake("scontrol", '[ "$2" = job ] && echo "JobId=7 Restarts=1 JobState=RUNNING" || echo n1')
    out, _ = (process := start()).communicate(timeout=120)
    assert process.returncode == 1 and "going no further" in out and "===" not in out, "a run whose node Slurm lost lives on, but starts nothing in the next run's nodes"
    fake("srun", f'[[ "$*" == *preflight.py* ]] || {{ touch {tmp_path}/lost; exit 1; }}')
    fake("scontrol", f'[ "$2" = job ] && echo "JobId=7 Restarts=$([ -f {tmp_path}/lost ] && echo 1 || echo 0) JobState=RUNNING" || echo n1')
    out, _ = (process := start()).communicate(timeout=120)
    assert process.returncode == 1 and "=== trial" in out and out.rstrip().endswith("going no further"), "nor does it report, or set the guard of the next one back"


@needs_venv
def test_the_last_element_of_an_array_does_not_take_the_restarts_of_another_for_its_own(fake, tmp_path):
    fake("srun", "exit 0")
    fake("scontrol", '[ "$4" = 7_10 ] || echo "JobId=5 ArrayTaskId=1 Restarts=3 JobState=COMPLETED"; echo "JobId=7 ArrayTaskId=10 Restarts=0 JobState=RUNNING"')
    out = speedrun(tmp_path, "--only=report", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="10")
    assert out.returncode == 0 and "all done" in out.stdout, out.stdout + out.stderr


@needs_venv
def test_a_job_does_not_install(tmp_path, fake):
    for name in ("speedrun.sh", "setup_venv.sh", "requirements.txt"):
        shutil.copy(REPO / name, tmp_path)
    out = subprocess.run(["bash", "speedrun.sh"], cwd=tmp_path, env={**os.environ, **JOB}, capture_output=True, text=True)
    assert out.returncode == 2 and "bash speedrun.sh --only=setup" in out.stderr and not (tmp_path / ".venv").exists()


def test_preflight_finds_a_folder_that_is_not_shared_and_ends_what_gets_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    memory = tmp_path / "toy/slurm_d4.json"
    run = lambda ended: (monkeypatch.setattr(preflight, "ended", ended), preflight.main())
    for start in range(preflight.PATIENCE - 1):
        run(-1)
        assert "torch" in capsys.readouterr().out and json.loads(memory.read_text())["runs"] == start
        run(75)
    run(-1)
    with pytest.raises(SystemExit) as stopped:
        run(75)
    assert stopped.value.code == 1 and "3 runs in a row got nothing done" in capsys.readouterr().err and not memory.exists()
    for _ in range(preflight.KILLED):
        run(-1)  # each is killed, as by a preemption or a node that fails
    with pytest.raises(SystemExit):
        run(-1)
    assert "10 runs in a row got nothing done" in capsys.readouterr().err and not memory.exists()
    monkeypatch.setattr(preflight, "ended", -1)
    preflight.main()
    monkeypatch.setattr(preflight, "ended", 0)
    preflight.main()
    assert not memory.exists(), "done: the next elements of an array find nothing to count"
    monkeypatch.setattr(preflight, "ended", -1)
    monkeypatch.setenv("NANOCHAT_OUTCOME", str(tmp_path / "seen by the first node alone"))
    with pytest.raises(SystemExit):
        preflight.main()
    assert "all nodes share" in capsys.readouterr().err


def test_preflight_wants_the_packages_that_are_pinned(monkeypatch, capsys):
    monkeypatch.setattr(preflight.importlib.metadata, "version", lambda name: "0.1")
    with pytest.raises(SystemExit):
        preflight.check_packages()
    assert "0.1 is installed" in capsys.readouterr().err
