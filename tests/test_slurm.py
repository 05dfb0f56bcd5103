"""What runs under Slurm, without a Slurm: squeue, scontrol, sbatch and srun that only pretend.
tests/slurm.sh has the real one."""
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest

import slurm
from conftest import REPO, ends, needs_venv

NOON = time.mktime(time.strptime("2026-11-24T12:00:00", "%Y-%m-%dT%H:%M:%S"))
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2",
       "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NAME": "speedrun", "SLURM_JOB_PARTITION": "main",
       "SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "8", "SLURM_JOB_ACCOUNT": "lab"}
FLAGS = ["--depth=4", "--skip-rl"]
AGAIN = ("sbatch --partition=main --account=lab --nodes=2 --time=4:00:00 slurm_speedrun.sbatch "
         "--depth=4 --skip-rl")

@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake("squeue", "echo x") puts a command of that name and text first in the PATH; calls() are
    the command lines of all."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def put(name, text):
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{text}\n')
        (folder / name).chmod(0o755)

    def calls():
        path = folder / "calls"
        return path.read_text().splitlines() if path.exists() else []
    put.calls = calls
    return put

# ---- asking

def test_the_end_of_the_job(fake, monkeypatch):
    assert slurm.end_time() is None and not fake.calls(), "without Slurm nobody is asked"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    fake("scontrol", "echo 'JobId=7 EndTime=2026-11-24T12:00:00 Deadline=N/A'")
    assert slurm.end_time() == NOON and fake.calls() == ["scontrol show job -o 7"]
    fake("scontrol", 'echo "JobId=7 EndTime=$(case ${SLURM_TIME_FORMAT:-standard} in '
                     'standard) echo 2026-11-24T12:00:00;; *) echo 12:00:00; esac)"')
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert slurm.end_time() == NOON, "whatever its user likes to see"
    for broken in ("exit 1", "echo JobId=7 EndTime=Unknown", "echo 'slurm_load_jobs error' >&2"):
        fake("scontrol", broken)
        assert slurm.end_time() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1234")
    assert slurm.end_time() == 1234.0

def test_the_last_element_of_an_array_does_not_take_the_restarts_of_another_for_its_own(
        fake, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7",
                        "SLURM_ARRAY_TASK_ID": "10"}.items():
        monkeypatch.setenv(name, value)
    fake("scontrol", '[ "$4" = 7_10 ] || echo "JobId=5 ArrayTaskId=1 Restarts=3"; '
                     'echo "JobId=7 ArrayTaskId=10 Restarts=0 JobState=RUNNING"')
    assert not slurm.given_up() and fake.calls() == ["scontrol show job -o 7_10"]

# ---- when an attempt has ended

@pytest.fixture
def job(fake, monkeypatch):
    """job(code, terminated, ...) -> (what is said, requeued, calls of scontrol requeue and sbatch)
    of slurm.after_attempt in a job whose commands answer so"""
    def after(code, terminated=False, requeue="exit 0", submit="echo 8", state="RUNNING",
              restarts=None, sleep=None, waiting="", facts="", **environment):
        for name, value in {**JOB, **environment}.items():
            monkeypatch.setenv(name, value)
        restarts = environment.get("SLURM_RESTART_COUNT", "0") if restarts is None else restarts
        facts = f"JobId=7 TimeLimit=4:00:00 JobState={state} Restarts={restarts} {facts}"
        show = f'[ "$1" != show ] || [ -e "$(dirname "$0")/busy" ] || echo "{facts}"'
        fake("scontrol", f'{show}\n[ "$1" != requeue ] || {{ {requeue}; }}')
        fake("squeue", f"printf '{waiting}'")
        fake("sbatch", f'{submit}\necho "array: $SLURM_ARRAY_TASK_ID" >> "$(dirname "$0")/seen"')
        said, requeued = slurm.after_attempt(code, terminated, FLAGS, sleep)
        done = [c for c in fake.calls() if c.startswith(("scontrol requeue", "sbatch"))]
        return said, requeued, done
    return after

@pytest.mark.parametrize("code", [1, 2])
def test_a_failed_job_is_not_started_again_and_says_what_to_type(job, code):
    said, requeued, calls = job(code)
    assert not requeued and not calls and said.endswith(f"type: {AGAIN}") and "failed" in said

def test_saved_and_not_done_requeues_itself(job):
    said, requeued, calls = job(75, SLURM_RESTART_COUNT="2")
    assert requeued and calls == ["scontrol requeue 7"]
    assert "goes on by itself in its attempt 4" in said

@pytest.mark.parametrize("code", [75, 1])
def test_an_attempt_that_slurm_gave_up_does_not_requeue_the_next(job, code):
    said, requeued, calls = job(code, restarts=1)
    assert not requeued and not calls
    assert "into the queue itself" in said and "failed" not in said

def test_an_element_of_an_array_requeues_itself_alone(job):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "10", "SLURM_ARRAY_TASK_MAX": "10"}
    _, _, calls = job(75, **array)
    assert calls == ["scontrol requeue 7_10"], "the last element has the whole array's number"
    ninth = {**array, "SLURM_ARRAY_TASK_ID": "9"}
    said, _, calls = job(75, requeue="exit 1", waiting="9\\n10\\n", **ninth)
    assert "element 10 of the array goes on" in said
    assert not any(c.startswith("sbatch") for c in calls)
    said, _, _ = job(75, requeue="exit 1", waiting="9\\n", **ninth)
    assert "element" not in said and "job 8 is submitted" in said, "none is left to go on"
    said, requeued, _ = job(75, True, state="COMPLETING", waiting="10\\n", **ninth)
    assert "element 10 of the array goes on" in said and not requeued, "and nobody has ended it"

def test_a_successor_where_requeueing_is_not_permitted(job, tmp_path):
    said, requeued, calls = job(
        75, requeue="echo 'Requested operation is presently disabled for job 7' >&2; exit 1",
        SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="10", SLURM_ARRAY_TASK_MAX="10")
    assert not requeued and "job 8 is submitted and goes on" in said
    for part in ("--dependency=afterany:5_10", "--nodes=2", "--time=4:00:00", "--partition=main",
                 "--account=lab", "slurm_speedrun.sbatch --depth=4 --skip-rl"):
        assert part in calls[-1], calls
    assert (tmp_path / "fakes/seen").read_text() == "array: \n", "the successor is no element"

def test_a_command_to_type_where_neither_is_permitted(job):
    said, requeued, _ = job(75, requeue="exit 1", submit="exit 1")
    assert not requeued and said.endswith(f"to go on, type: {AGAIN}")

@pytest.mark.parametrize(("allowed", "requeues", "submits"), [
    ("requeue,submit", True, False), ("submit", False, True), ("requeue", True, False),
    ("", False, False)])
def test_a_site_that_forbids_jobs_to_submit_jobs(job, allowed, requeues, submits):
    said, requeued, calls = job(75, NANOCHAT_GO_ON=allowed)
    assert requeued is requeues and any(c.startswith("sbatch") for c in calls) is submits
    assert requeues or submits or said.endswith(f"type: {AGAIN}")

def test_what_is_submitted_and_printed_is_what_was_given(job, tmp_path):
    """All that a site may ask for, as scontrol shows it."""
    facts = ("Features=a100&ib ExcNodeList=n[7-9] ReqNodeList=(null) Reservation=course "
             "Licenses=(null) MailUser=me@x.org MailType=END,FAIL StdOut=/logs/mine-7.out "
             "OverSubscribe=NO Requeue=0 ArrayTaskThrottle=2 Nice=100 Comment=for the thesis ")
    environment = {"SLURM_JOB_NAME": "my run", "SLURM_JOB_QOS": "long", "SLURM_CPUS_PER_GPU": "8",
                   "SLURM_MEM_PER_CPU": "4000", "SLURM_GPUS_PER_NODE": "4",
                   "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3",
                   "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "3",
                   "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_EXPORT_ENV": "A=b c,D"}
    said, _, calls = job(75, requeue="exit 1", submit="exit 1", facts=facts, **environment)
    again = shlex.split(said.split("type: ")[1])
    file = again.index(str(slurm.SBATCH))
    assert again[file + 1:] == FLAGS
    assert {*again[1:file]} == {
        "--job-name=my run", "--partition=main", "--account=lab", "--qos=long", "--nodes=2",
        "--gpus-per-node=4", "--cpus-per-gpu=8", "--mem-per-cpu=4000", "--time=4:00:00",
        "--constraint=a100&ib", "--exclude=n[7-9]", "--reservation=course",
        "--mail-user=me@x.org", "--mail-type=END,FAIL", "--output=/logs/mine-7.out",
        "--array=1-3%2", "--no-requeue", "--exclusive", "--nice=100",
        "--comment=for the thesis", "--export=A=b c,D"}
    submitted = next(c for c in calls if c.startswith("sbatch"))
    assert "--constraint=a100&ib" in submitted and "--exclusive" in submitted
    assert "--array" not in submitted and submitted.count("--no-requeue") == 1
    spaces = f"WorkDir={tmp_path}/my runs StdOut={tmp_path}/my runs/speedrun-7.log Power= X=1"
    said, _, _ = job(75, requeue="exit 1", submit="exit 1", facts=spaces)
    assert "--output" not in said, "it is where it is written without one"
    said, _, _ = job(75, requeue="exit 1", submit="exit 1", SBATCH_GPUS_PER_NODE="4",
                     **{**environment, "SLURM_GPUS_PER_NODE": "8"})
    assert "--gpus-per-node=8" in said, "else the variable of site.env would count"

@pytest.mark.parametrize("line", ["-o run-%j.out", "--output logs/run-%j.out",
                                  "--output=logs/run-%j.out", ""])
@pytest.mark.parametrize("facts", ["StdOut=/x/logs/run-7.out", ""])
def test_where_the_log_goes_may_be_edited(job, tmp_path, monkeypatch, line, facts):
    text = slurm.SBATCH.read_text()
    assert "#SBATCH --output=speedrun-%j.log\n" in text
    edited = tmp_path / "slurm_speedrun.sbatch"
    edited.write_text(text.replace("--output=speedrun-%j.log", line or "--requeue"))
    monkeypatch.setattr(slurm, "SBATCH", edited)
    said, _, _ = job(75, requeue="exit 1", submit="exit 1", facts=facts)
    assert "type: sbatch" in said and "--output" not in said

def test_tasks_and_all_of_a_nodes_memory_are_asked_for_again(job):
    said, _, _ = job(75, requeue="exit 1", submit="exit 1", facts="MinMemoryNode=0",
                     SLURM_NTASKS_PER_NODE="4", SLURM_CPUS_PER_TASK="4")
    asked = shlex.split(said.split("type: ")[1])
    assert {"--ntasks-per-node=4", "--cpus-per-task=4", "--mem=0"} <= {*asked}
    said, _, _ = job(75, requeue="exit 1", submit="exit 1", facts="MinMemoryNode=0",
                     SLURM_MEM_PER_GPU="8000")
    assert "--mem-per-gpu=8000" in said and "--mem=0" not in said, "sbatch takes one of them"

@pytest.mark.parametrize("facts,goes_on", [
    ("Reason=None PreemptTime=None", False), ("Reason=TimeLimit PreemptTime=None", True),
    ("Reason=None PreemptTime=2026-11-30T14:02:11", True),
    ("Reason=None PreemptTime=2026-11-30T14:02:11 SuspendTime=None SecsPreSuspend=700", False)])
def test_a_cancelled_job_stays_cancelled(job, facts, goes_on):
    """As Slurm 22.05 shows them while the batch script lives."""
    said, requeued, calls = job(75, terminated=True, state="COMPLETING", facts=facts)
    assert requeued is goes_on and bool(calls) is goes_on
    assert goes_on or ("ended this job" in said and said.endswith(AGAIN))

def test_a_cancelled_job_stays_cancelled_where_slurm_does_not_answer_for_a_moment(job, tmp_path):
    busy = tmp_path / "fakes/busy"
    busy.touch()
    said, requeued, calls = job(75, terminated=True, facts="Reason=TimeLimit",
                                sleep=lambda seconds: busy.unlink())
    assert requeued and calls == ["scontrol requeue 7"], "it was asked again"
    busy.touch()
    said, requeued, calls = job(75, terminated=True, facts="Reason=TimeLimit",
                                sleep=lambda seconds: None)
    assert not requeued and len(calls) == 1, "it may be cancelled"
    assert "state unknown" in said and "type: sbatch" in said

# ---- slurm_speedrun.sbatch

def sbatch(folder, *args, **environment):
    usual = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.run(["bash", "slurm_speedrun.sbatch", *args], cwd=folder, text=True,
                          capture_output=True, env={**usual, **environment}, check=False)

def test_outside_a_job_it_says_how_to_submit(tmp_path):
    out = sbatch(REPO, "--depth=4")
    assert out.returncode == 2 and "sbatch slurm_speedrun.sbatch --depth=4" in out.stderr
    shutil.copy(REPO / "slurm_speedrun.sbatch", tmp_path)
    out = sbatch(tmp_path, "--depth=4", **JOB)
    assert out.returncode == 2 and "no speedrun.sh is" in out.stderr

def test_the_repository_is_where_the_file_was_submitted_from(fake, tmp_path):
    """Slurm runs a copy, in the folder where it was submitted: two of its own words lead back."""
    repo = tmp_path / "my copy"
    repo.mkdir()
    (repo / "speedrun.sh").write_text('echo "$PWD: $*"')
    shutil.copy(REPO / "slurm_speedrun.sbatch", tmp_path)
    fake("scontrol", f"echo 'JobId=7 JobState=RUNNING Command={repo}/slurm_speedrun.sbatch "
                     "--data=slurm_speedrun.sbatch WorkDir=/x'")
    out = sbatch(tmp_path, "--depth=4", **JOB)
    assert out.stdout == f"{tmp_path}: --slurm --depth=4\n", out.stderr

def test_a_dry_run_asks_slurm(fake):
    fake("sbatch", "echo 'sbatch: Job 9 to start at noon'")
    out = sbatch(REPO, "--dry-run", "--only=base", "--depth=4")
    assert out.returncode == 0 and "base_train.py --data=toy" in out.stdout, out.stderr
    assert "to start at noon" in out.stdout
    call, = fake.calls()
    assert call == "sbatch --test-only ./slurm_speedrun.sbatch --dry-run --only=base --depth=4"

def test_the_launcher_takes_the_place_of_the_batch_script(tmp_path):
    """So a signal to the batch script, which is all that Slurm sends, reaches it."""
    shutil.copy(REPO / "slurm_speedrun.sbatch", tmp_path)
    (tmp_path / "speedrun.sh").write_text('echo "$$: $*"; exit 75')
    process = subprocess.Popen(["bash", "slurm_speedrun.sbatch", "--depth=4", "--", "--seed=1"],
                               cwd=tmp_path, env={**os.environ, **JOB}, stdout=subprocess.PIPE,
                               text=True)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and out == f"{process.pid}: --slurm --depth=4 -- --seed=1\n"

# ---- speedrun.sh inside a job

def speedrun(state, *flags, **environment):
    return subprocess.run(["bash", "speedrun.sh", "--slurm", *flags], cwd=REPO, text=True,
                          env={**os.environ, **JOB, "NANOCHAT_BASE_DIR": str(state), **environment},
                          capture_output=True, timeout=200, stdin=subprocess.DEVNULL, check=False)

@needs_venv
def test_one_torchrun_a_node_with_a_meeting_point_from_the_allocation(fake, tmp_path):
    fake("scontrol", "printf 'n1\\nn2\\n'")
    out = speedrun(tmp_path, "--dry-run", "--only=base,report").stdout.splitlines()
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1" in out[0], "whatever was asked for"
    assert "--export=ALL" in out[0] and "--nproc_per_node=8" in out[0]
    assert "torchrun --nnodes=2" in out[0] and "--master_addr=n1" in out[0]
    assert "srun" not in out[1]
    lines = [line for restart in "01" for line in speedrun(
        tmp_path, "--dry-run", "--only=base,mid", SLURM_RESTART_COUNT=restart).stdout.splitlines()]
    ports = {line.split("--master_port=")[1].split()[0] for line in lines}
    assert len(ports) == 4, "what a dead one may still hold is not used again"
    alone = speedrun(tmp_path, "--dry-run", "--only=base", SLURM_NNODES="1",
                     SLURM_GPUS_ON_NODE="1").stdout
    assert "torchrun" not in alone and "srun" in alone

@needs_venv
def test_a_job_whose_inputs_are_missing_ends_at_once_with_the_reason(fake, tmp_path):
    fake("scontrol", "echo 'JobId=7 TimeLimit=4:00:00 JobState=RUNNING Restarts=0'")
    for data in ("fineweb_edu", "/no/such/folder"):
        out = speedrun(tmp_path / "state", f"--data={data}")
        assert out.returncode == 2 and "error: " in out.stdout + out.stderr
        assert not any(c.startswith("srun") for c in fake.calls())
        for part in ("job 7, attempt 1 of it", "limit 4:00:00", "nodes: n[1-2], GPUs per node: 8",
                     "state: ", "commit: ", f"flags: --data={data}"):
            assert part in out.stdout, out.stdout
        assert out.stdout.rstrip().endswith(f"slurm_speedrun.sbatch --data={data}")

def test_a_job_does_not_install(tmp_path):
    for name in ("speedrun.sh", "setup_venv.sh", "requirements.txt"):
        shutil.copy(REPO / name, tmp_path)
    out = subprocess.run(["bash", "speedrun.sh"], cwd=tmp_path, env={**os.environ, **JOB},
                         capture_output=True, text=True, check=False)
    assert out.returncode == 2 and "bash speedrun.sh --only=setup" in out.stderr
    assert not (tmp_path / ".venv").exists()

# ---- the guard

def test_attempts_without_progress_are_counted(state, monkeypatch):
    path = state / "toy/slurm_d4.json"
    killed = slurm.KILLED
    attempts = [(["a"], None, []), (["a"], 75, [75]),      # the first: nothing done
                # the second, started again at the same place
                (["a"], None, [75]), (["a"], 75, [75, 75]),
                (["b"], None, []), (["c"], 75, []),   # somebody moved it on; this one did get on
                # killed twice before it could say so, told to end once
                (["c"], None, []), (["c"], None, [killed]), (["c"], None, [killed] * 2),
                (["c"], killed, [killed] * 3), (["c"], None, [killed] * 3),
                (["c"], 75, [killed] * 3 + [75])]
    for marks, ended, counted in attempts:
        monkeypatch.setattr(slurm, "progress", lambda data, tag, marks=marks: marks)
        slurm.guard("toy", "d4", ended)
        ends = json.loads(path.read_text())["ends"]
        if ended is None:
            assert ends.pop() == killed, "until it says how it has ended"
        assert ends == counted, (marks, ended)

def test_what_counts_as_progress(state):
    folder = state / "toy/base_checkpoints/d4"
    folder.mkdir(parents=True)
    marks = [slurm.progress("toy", "d4")]

    def changed():
        marks.append(slurm.progress("toy", "d4"))
        return marks[-1] != marks[-2]
    (folder / "manifest_000010.json").write_text("{}")
    assert changed()
    for name in ("phase.json", "lock.json", "metrics.jsonl", ".model_000020.pt.tmp"):
        (folder / name).write_text('{"status": "running"}')
        assert not changed(), name
    (folder / "manifest_000010.json").rename(folder / "manifest_000020.json")
    assert changed()
    (folder / "phase.json").write_text('{"status": "done"}')
    assert changed()
    (state / "toy/report").mkdir()
    (state / "toy/report/chat_mid_d4.partial.jsonl").write_text("1")
    assert changed()
    (state / "toy/base_checkpoints/d8").mkdir()
    (state / "toy/base_checkpoints/d8/manifest_000020.json").write_text("{}")
    assert not changed(), "another run's"

def test_downloaded_shards_count_as_progress_and_a_users_own_folder_is_not_read(state, tmp_path):
    for data, counts in (("climbmix", True), (str(tmp_path / "own"), False)):
        folder = slurm.pipeline.base_data_dir(data)
        folder.mkdir(parents=True)
        before = slurm.progress(data, "d4")
        (folder / "shard_00000.parquet").write_text("x")
        assert (slurm.progress(data, "d4") != before) is counts

def test_a_full_disk_costs_the_guard_its_count_alone(state, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(slurm.common, "atomic_write", full)
    for ended in (None, 75, slurm.KILLED):
        slurm.guard("toy", "d4", ended)
    assert not (state / "toy/slurm_d4.json").exists()

def test_the_guard_ends_what_gets_nowhere(state, capsys):
    path = state / "toy/slurm_d4.json"
    for attempt in range(slurm.MOST_STOPPED - 1):
        slurm.guard("toy", "d4")
        assert json.loads(path.read_text())["ends"].count(75) == attempt
        slurm.guard("toy", "d4", ended=75)
    slurm.guard("toy", "d4")
    with ends() as end:
        slurm.guard("toy", "d4", ended=75)
    assert end.code == 1 and not path.exists()
    assert "3 attempts in a row got nothing done" in capsys.readouterr().err
    for _ in range(slurm.MOST_KILLED):
        slurm.guard("toy", "d4")  # each is killed, as by a preemption or a node that fails
    with ends():
        slurm.guard("toy", "d4")
    assert "10 attempts in a row" in capsys.readouterr().err and not path.exists()
    slurm.guard("toy", "d4")
    slurm.guard("toy", "d4", ended=0)
    assert not path.exists(), "done: the next elements of an array find nothing to count"

# ---- what cannot work

def test_what_was_asked_of_slurm_is_looked_at(fake, monkeypatch):
    def refused(nproc, facts="", **environment):
        for name, value in {**JOB, **environment}.items():
            monkeypatch.setenv(name, value)
        fake("scontrol", f"echo 'JobId=7 JobState=RUNNING {facts}'")
        with ends() as end:
            slurm.check_job(nproc)
            raise SystemExit(0)
        return end.code == 2
    cpus = {"SLURM_JOB_CPUS_PER_NODE": "64(x2),8"}
    assert slurm.cpus_per_node() == 1, "outside of a job"
    assert not refused(8, "TresPerNode=gres:gpu:8", **cpus) and slurm.cpus_per_node() == 8
    assert not refused(1, SLURM_JOB_CPUS_PER_NODE="1")
    assert refused(2, SLURM_JOB_CPUS_PER_NODE="1") and refused(9, **cpus)
    assert refused(1, "TresPerNode=gres:gpu:8,gres:gpu:1", **cpus)
    assert not refused(1, "TresPerNode=gres:gpu:1,gres:gpumem:24G", **cpus)
    assert refused(1, "TresPerNode=gres/gpu:8,gres/gpu:1", **cpus)
    assert refused(1, SLURM_JOB_END_TIME=str(int(time.time()) - 5), **cpus)
    assert not refused(1, SLURM_JOB_END_TIME=str(int(time.time()) + 500), **cpus)

@needs_venv
def test_a_state_folder_that_cannot_be_written_is_one_line(fake, tmp_path):
    fake("scontrol", "echo 'JobId=7 JobState=RUNNING Restarts=0'")
    (tmp_path / "file").write_text("")
    out = speedrun(tmp_path / "file/state", "--only=base")
    assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
    assert "error: could not write to" in out.stderr

def test_the_python_of_the_venv_counts_and_not_the_first_in_the_path(fake, tmp_path):
    """A login node and a compute node with others first sent people back and forth."""
    shutil.copy(REPO / "setup_venv.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    command = ". ./setup_venv.sh; setup_venv requirements.txt; command -v python"

    def setup(**environment):
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, text=True, check=False,
                              capture_output=True, env={**os.environ, **environment})
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    (tmp_path / ".venv/bin/pip").write_text("")
    own = subprocess.run([tmp_path / ".venv/bin/python", "--version"], text=True,
                         capture_output=True, check=True).stdout.strip()
    twice = subprocess.run(["cksum"], input="", text=True, capture_output=True, check=True).stdout
    (tmp_path / ".venv/matches").write_text(f"{own} {twice}")
    fake("python3", "echo Python 3.9.2; exit 1")  # a compute node's
    out = setup(**JOB)
    assert out.returncode == 0 and out.stdout.strip() == f"{tmp_path}/.venv/bin/python", out.stderr
    two, _, _ = own.rpartition(".")  # of Python 3.11.7: Python 3.11
    for other, code in ((f"{two}.99", 0), (two, 0), ("Python 3.1", 2), (f"{two}7", 2)):
        (tmp_path / ".venv/matches").write_text(f"{other} {twice}")
        assert setup(**JOB).returncode == code, "a node may have a newer third number of it"
    (tmp_path / ".venv/bin/python").unlink()
    (tmp_path / ".venv/bin/python").symlink_to("/opt/python/3.12/bin/python3")
    out = setup(**JOB)
    assert out.returncode == 2 and ".venv was made with /opt/python/3.12" in out.stderr
    assert out.stderr.count("\n") == 1

def test_a_venv_whose_python_is_gone_or_that_has_other_packages_is_made_anew(fake, tmp_path):
    shutil.copy(REPO / "setup_venv.sh", tmp_path)
    fake("python3", f'exec {sys.executable} "$@"')
    command = ". ./setup_venv.sh; setup_venv requirements.txt; command -v python"

    def installs(requirements):
        (tmp_path / "requirements.txt").write_text(requirements)
        out = subprocess.run(["bash", "-c", command], cwd=tmp_path, text=True, check=True,
                             capture_output=True)
        assert out.stdout.endswith(f"{tmp_path}/.venv/bin/python\n"), out.stderr
        subprocess.run([tmp_path / ".venv/bin/python", "-c", ""], check=True)
        return "installing" in out.stdout
    assert [installs(text) for text in ("# a", "# a", "# b", "# b", "# a")] == [
        True, False, True, False, True]
    python = tmp_path / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/opt/python/3.11.7/bin/python3")
    assert installs("# a")

def test_a_venv_that_was_half_made_is_made_anew(tmp_path):
    """A creation that was killed leaves a Python without pip."""
    shutil.copy(REPO / "setup_venv.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT_", "SLURM_"))}
    subprocess.run(["bash", "-c", ". ./setup_venv.sh; setup_venv requirements.txt"], cwd=tmp_path,
                   env=kept, check=True)
    subprocess.run([tmp_path / ".venv/bin/python", "-m", "pip", "--version"], check=True)
    assert (tmp_path / ".venv/matches").exists()

# ---- each node

def test_a_node_that_does_not_see_the_state_folder_is_named(state, capsys):
    with ends() as end:
        slurm.check_node(1, state / "seen by the first node alone")
    assert end.code == 2 and "all nodes share" in capsys.readouterr().err

def test_the_check_runs_as_a_script_on_each_node(state):
    state.mkdir()
    out = subprocess.run([sys.executable, "slurm.py", "3", str(state)], cwd=REPO, text=True,
                         capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                         check=False)
    assert out.returncode == 0 and "no GPU, 3 processes a node" in out.stdout
    out = subprocess.run([sys.executable, "slurm.py"], cwd=REPO, text=True, capture_output=True,
                         check=False)
    assert out.returncode == 2 and "sbatch slurm_speedrun.sbatch" in out.stderr
