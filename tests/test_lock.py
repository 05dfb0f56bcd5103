"""lock.py: who counts as alive, on this machine, on others, and in a Slurm job."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
import lock
import pipeline
import tokenizer as tok
from conftest import REPO, ends, environment
from test_data import write

HOLD = f"""
import sys, time
sys.path.insert(0, {str(REPO)!r})
import lock
held = lock.take_lock(sys.argv[1])
print("held", flush=True)
time.sleep(100)
"""

def hold(folder, *before, **environment):
    """A process that holds the lock of `folder`."""
    process = subprocess.Popen([*before, sys.executable, "-c", HOLD, str(folder)], text=True,
                               stdout=subprocess.PIPE, env={**os.environ, **environment})
    assert process.stdout.readline() == "held\n", "it has it"
    return process

def write_lock(folder, **changes):
    """A lock.json that nobody here holds, of a process on another host by default."""
    holder = {"token": "x", "host": "elsewhere", "boot": "b", "pid": 1, "job": None,
              "restart": "0", **changes}
    (folder / "lock.json").write_text(json.dumps(holder))

def alive(folder, after=0.0):
    """Whether the holder counts as alive `after` seconds from its last heartbeat."""
    now = (folder / "lock.json").stat().st_mtime + after
    return lock.living_holder(folder, now=lambda: now) is not None

@pytest.fixture
def outside_of_jobs(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

def test_a_living_process_keeps_others_out_and_a_killed_one_does_not(tmp_path, capsys):
    assert lock.living_holder(tmp_path) is None
    process = hold(tmp_path)
    assert lock.living_holder(tmp_path)["pid"] == process.pid
    with ends() as end:
        lock.take_lock(tmp_path)
    said = capsys.readouterr().err
    assert end.code == 2 and f"process {process.pid}" in said and said.count("\n") == 1
    assert alive(tmp_path, after=1e6), "the kernel knows better than a heart that was stopped"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead now, and a zombie
    assert Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    assert not alive(tmp_path)
    mine = lock.take_lock(tmp_path)
    assert mine.mine() and "is gone: resuming" in capsys.readouterr().out
    mine.release()
    assert not (tmp_path / "lock.json").exists()
    process.wait()

@pytest.fixture
def container():
    """The start of a command line whose process sees no process of this test, with the same host
    name and boot id."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
    if os.geteuid():
        unshare.append("--map-root-user")
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    return unshare

# the script of a phase, which waits as long as nobody closes its standard input, once it has the
# lock
WAITS = """
import runpy, sys
import lock
take_lock = lock.take_lock
def take_and_wait(directory):
    taken = take_lock(directory)
    print('held', flush=True)
    sys.stdin.read()
    return taken
lock.take_lock = take_and_wait
sys.argv = ['tok_train.py', *sys.argv[1:]]
runpy.run_path('tok_train.py', run_name='__main__')
"""

@pytest.mark.parametrize("first_inside", [True, False])
def test_the_same_command_in_another_container_of_this_host_waits_its_turn(
        state, tmp_path, container, first_inside):
    write(tmp_path / "mine", "a.txt", [f"A paragraph that says {n}.\n\n" * 3 for n in range(200)])
    args = [f"--data={tmp_path}/mine", "--vocab_size=300", "--workers=1"]
    first, second = (container, []) if first_inside else ([], container)
    how = {"cwd": REPO, "env": environment(state), "text": True, "stdout": -1, "stderr": -1}
    running = subprocess.Popen([*first, sys.executable, "-c", WAITS, *args], stdin=-1, **how)
    assert running.stdout.readline() == "held\n"
    folder = pipeline.tokenizer_dir(args[0].removeprefix("--data="))
    before = (folder / "lock.json").read_bytes()
    refused = subprocess.run([*second, sys.executable, "tok_train.py", *args], check=False, **how)
    holder = common.read_json(folder / "lock.json")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"is being written by process {holder['pid']} on {holder['host']}" in refused.stderr
    assert "kill" not in refused.stderr, "that number is here another process, or none"
    assert (folder / "lock.json").read_bytes() == before
    _, said = running.communicate("")
    assert running.returncode == 0, said
    assert tok.damage(folder) is None and not (folder / "lock.json").exists()

@pytest.mark.parametrize("key", ["token", "host", "boot", "pid", "job", "restart", "kernel"])
def test_a_bit_flipped_in_it_ends_no_living_run_and_is_no_traceback(
        tmp_path, outside_of_jobs, capsys, key):
    process = hold(tmp_path)
    path = tmp_path / "lock.json"
    with open(path, "r+") as f:  # the same file: the kernel's lock stays
        damaged = path.read_text().replace(f'"{key}"', f'"{key[:-1]}?"')
        f.write(damaged)
    with ends() as end:
        lock.take_lock(tmp_path)
    assert end.code == 2 and "is being written by process" in capsys.readouterr().err
    process.kill()
    process.wait()
    os.utime(path, (0, 0))
    lock.take_lock(tmp_path).release()

def test_a_process_in_another_namespace_of_processes_is_alive(tmp_path, container):
    """As in another container on this host: nobody here sees the number of its process."""
    process = hold(tmp_path, *container)
    assert common.read_json(tmp_path / "lock.json")["pid"] == 1
    assert alive(tmp_path)
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while alive(tmp_path) and time.time() < deadline:
        time.sleep(0.05)
    assert not alive(tmp_path)

def test_a_container_that_was_killed_blocks_none_that_has_another_name(tmp_path, container):
    """As every container that is started again: its host's name is a random one."""
    rename = ("import os, socket, sys; socket.sethostname('3f2a'); "
              "os.execv(sys.argv[1], sys.argv[1:])")
    process = hold(tmp_path, *container, sys.executable, "-c", rename)
    assert common.read_json(tmp_path / "lock.json")["host"] == "3f2a" != lock.socket.gethostname()
    assert alive(tmp_path, after=1e6)
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while alive(tmp_path) and time.time() < deadline:
        time.sleep(0.05)
    assert not alive(tmp_path)

def test_an_earlier_attempt_in_a_container_is_over_and_no_other_process_is_ended_for_it(
        tmp_path, monkeypatch, capsys, container):
    stray = hold(tmp_path, *container, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0")
    stranger = subprocess.Popen(["sleep", "100"])
    path = tmp_path / "lock.json"
    text = path.read_text().replace('"pid": 1,', f'"pid": {stranger.pid},')
    path.write_text(text)  # as if the container's numbers went as far as ours
    assert common.read_json(path)["pid"] == stranger.pid
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    mine = lock.take_lock(tmp_path)
    said = capsys.readouterr().out
    assert "a process of it still runs, out of reach, until it sees that: resuming" in said
    assert stranger.poll() is None and stray.poll() is None
    assert mine.mine() and lock.held_in_kernel(path)
    mine.release()
    for process in (stray, stranger):
        process.kill()
        process.wait()

def test_a_heartbeat_counts_where_the_kernel_takes_one_file_system_for_two(
        tmp_path, outside_of_jobs):
    """As two containers do that have mounted it each for itself, by FUSE for instance: then the
    lock of the one is not seen by the other."""
    here = {"host": lock.socket.gethostname(), "boot": lock.boot_id(), "kernel": True}
    disk = tmp_path.stat().st_dev
    write_lock(tmp_path, **here, disk=disk)
    assert not alive(tmp_path), "the kernel would hold it"
    write_lock(tmp_path, **here)
    assert not alive(tmp_path), "as locks of older versions"
    write_lock(tmp_path, **here, disk=disk + 1)
    assert alive(tmp_path, after=lock.PATIENCE_HERE - 1)
    assert not alive(tmp_path, after=lock.PATIENCE_HERE + 1)

@pytest.mark.parametrize("kernel", [True, False])
def test_without_proc_a_number_that_is_used_again_blocks_nothing(
        tmp_path, monkeypatch, outside_of_jobs, kernel):
    monkeypatch.setattr(lock, "boot_id", lambda: "")
    write_lock(tmp_path, host=lock.socket.gethostname(), boot="", kernel=kernel, pid=os.getpid())
    assert alive(tmp_path, after=1.0) is not kernel
    assert not alive(tmp_path, after=lock.PATIENCE_HERE + 1)
    os.utime(tmp_path / "lock.json", (0, 0))
    mine = lock.take_lock(tmp_path)
    assert mine.mine()
    mine.release()

def test_the_heart_beats_by_the_clock_of_its_host_whatever_the_file_servers_says(
        tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    monkeypatch.setattr(lock.time, "time", lambda: 1e6)  # decades behind the disk's
    mine = lock.take_lock(tmp_path)
    deadline = time.monotonic() + 20
    while (tmp_path / "lock.json").stat().st_mtime != 1e6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "lock.json").stat().st_mtime == 1e6
    mine.release()

def test_another_host_lives_as_long_as_its_heart_beats(tmp_path, outside_of_jobs):
    write_lock(tmp_path)
    assert alive(tmp_path, after=lock.PATIENCE - 1) and not alive(tmp_path, after=lock.PATIENCE + 1)
    (tmp_path / "lock.json").write_text("[1]")
    assert lock.living_holder(tmp_path) is None, "rubbish holds nothing"
    lock.take_lock(tmp_path).release()

def test_where_the_file_system_has_no_flock_the_heartbeat_counts_on_this_host_too(
        tmp_path, monkeypatch, outside_of_jobs):
    def unknown(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    mine = lock.take_lock(tmp_path)
    assert mine.mine() and common.read_json(tmp_path / "lock.json")["kernel"] is False
    assert alive(tmp_path, after=lock.PATIENCE_HERE - 1)
    assert not alive(tmp_path, after=lock.PATIENCE_HERE + 1)
    mine.release()
    here = {"host": lock.socket.gethostname(), "boot": lock.boot_id()}
    write_lock(tmp_path, **here, kernel=True)  # taken where it has it, or when it still had it
    assert alive(tmp_path, after=lock.PATIENCE_HERE - 1)
    assert not alive(tmp_path, after=lock.PATIENCE_HERE + 1)

def test_the_heart_beats_and_notices_that_the_lock_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    mine = lock.take_lock(tmp_path)
    os.utime(tmp_path / "lock.json", (0, 0))
    deadline = time.time() + 20
    while (tmp_path / "lock.json").stat().st_mtime == 0 and time.time() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "lock.json").stat().st_mtime > 0 and not mine.lost
    write_lock(tmp_path)
    while not mine.lost and time.time() < deadline:
        time.sleep(0.01)
    assert mine.lost
    mine.release()
    assert (tmp_path / "lock.json").exists(), "what another process has taken is left alone"

def test_a_heart_goes_on_after_its_lock_could_not_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    mine = lock.take_lock(tmp_path)
    path = tmp_path / "lock.json"
    path.rename(tmp_path / "unseen")
    deadline = time.time() + 20
    while not mine.lost and time.time() < deadline:
        time.sleep(0.01)
    (tmp_path / "unseen").rename(path)
    os.utime(path, (0, 0))
    while path.stat().st_mtime == 0 and time.time() < deadline:
        time.sleep(0.01)
    assert path.stat().st_mtime > 0 and not mine.lost
    mine.release()

def test_an_earlier_attempt_of_the_same_slurm_job_is_over_and_its_stray_process_is_ended(
        tmp_path, monkeypatch, capsys):
    stray = hold(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lock.living_holder(tmp_path) is None, "whatever its process does"
    mine = lock.take_lock(tmp_path)
    said = capsys.readouterr().out
    assert stray.wait(10) == -signal.SIGKILL and "ended it, and was killed" in said
    assert mine.mine() and lock.held_in_kernel(tmp_path / "lock.json")
    mine.release()

ELEMENT = "echo 'JobId={} ArrayJobId=7 JobState={} Restarts=0'"

@pytest.mark.parametrize("answer,over", [
    ("echo 'JobId=7 JobName=x JobState=RUNNING Restarts=0'", False),
    ("echo 'JobId=7 JobName=x JobState=COMPLETING Restarts=0'", False),
    ("echo 'JobId=7 JobName=x JobState=RUNNING Restarts=1'", True),
    ("echo 'JobId=7 JobName=x JobState=PENDING Restarts=1'", True),
    ("echo 'JobId=7 JobName=x JobState=TIMEOUT Restarts=0'", True),
    (f"{ELEMENT.format(9, 'RUNNING')}; {ELEMENT.format(7, 'FAILED')}", True),
    ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
    ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None)])
def test_slurm_is_asked_whether_the_holder_is_over(tmp_path, monkeypatch, outside_of_jobs, answer,
                                                   over):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/bash\n{answer}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert lock.slurm.attempt_over("7", "0") is over
    write_lock(tmp_path, job="7")
    assert alive(tmp_path, after=1.0) is (not over)
    assert not alive(tmp_path, after=lock.PATIENCE + 1)

def test_what_a_death_in_the_middle_of_taking_it_has_left_is_removed(tmp_path):
    (tmp_path / ".lock.json.tmp-dead").write_text("half")
    lock.take_lock(tmp_path).release()
    assert [path.name for path in tmp_path.iterdir()] == [".lock-guard"]

def test_what_is_put_aside_is_kept_apart_counted_and_cleared_by_what_is_printed(
        tmp_path, monkeypatch, capsys):
    folder = tmp_path / "it's mine" / "d4"
    monkeypatch.setattr(common.time, "strftime", lambda form: "20260101-000000")  # in one second
    for number in range(3):
        folder.mkdir(parents=True)
        (folder / "model.pt").write_bytes(bytes([number]) * 1_000_000)
        lock.put_aside(folder)
    said = capsys.readouterr().out.splitlines()
    copies = sorted(folder.parent.iterdir())
    name = "d4.old-20260101-000000"
    assert [path.name for path in copies] == [name, f"{name}-2", f"{name}-3"]
    assert [(path / "model.pt").read_bytes()[0] for path in copies] == [0, 1, 2], "none is lost"
    assert "so far: 3, 3.0 MB;" in said[-1]
    (folder.parent / "d40.old-20260101-000000").mkdir()
    subprocess.run(said[-1].partition("none of them: ")[2], shell=True, check=True)
    assert [path.name for path in folder.parent.iterdir()] == ["d40.old-20260101-000000"]

def test_two_that_start_at_once_do_not_both_get_it(tmp_path):
    code = HOLD.replace("time.sleep(100)", "time.sleep(3)")
    start = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for _ in range(6)]
    said = [process.communicate(timeout=60) for process in processes]
    assert sum("held" in out for out, _ in said) == 1, said
    assert sum("is being written by" in err for _, err in said) == 5, said

def test_a_lock_of_an_older_version_has_no_mark_of_the_kernel(tmp_path, outside_of_jobs):
    write_lock(tmp_path, host=lock.socket.gethostname(), boot=lock.boot_id(), start="77", pid=1)
    assert alive(tmp_path, after=lock.PATIENCE_HERE - 1)
    assert not alive(tmp_path, after=lock.PATIENCE_HERE + 1)
