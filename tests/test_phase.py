"""phase.py, checkpoint.py and common.py: locks, records, damaged files, a full disk, stopping, metrics."""
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import common
import phase
import report
import status
from conftest import REPO, script

SETTINGS = SimpleNamespace(defining={"depth": 4}, free={"rows": 8})


@pytest.fixture
def folder(state, monkeypatch):
    folder = state / "toy" / "base_checkpoints" / "d4"
    yield folder
    phase.release(folder)
    common.outcome_hook = None
    sys.excepthook = sys.__excepthook__


def begin(folder, settings=SETTINGS, inputs=None, verify=lambda: None, **more):
    return phase.begin(folder, "base_train", settings, inputs or {"data": "abc"}, verify, **more)


def tensors(seed):
    return {"w": torch.full((1000,), float(seed))}


def save(folder, step, keep=1):
    return checkpoint.save(folder, step, tensors(step), {"w": tensors(step)}, {"loss": 1.0, "num_steps": 9}, keep)


def exit_code(function, *args, **kwargs):
    with pytest.raises(SystemExit) as stopped:
        function(*args, **kwargs)
    return stopped.value.code


def lock_of(**changes):
    return {"token": "x", "host": "elsewhere", "boot": "b", "pid": 1, "start": "1", "job": None, "restart": "0", **changes}


def test_who_is_alive(monkeypatch):
    mine = {"host": "here", "boot": phase.boot_id(), "pid": os.getpid(), "start": phase.process_start(os.getpid())}
    alive = lambda now=0.0, **lock: phase.holder_alive(lock_of(**lock), 0.0, now=now, this_host="here")
    assert alive(**mine)
    assert not alive(**{**mine, "start": "7"}), "another process of that number"
    assert not alive(**{**mine, "boot": "earlier"}), "the machine has been started anew"
    assert alive(now=100.0) and not alive(now=phase.HEARTBEAT * phase.MISSED + 1), "another host lives as long as its heart beats"
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not alive(now=1.0, job="5", restart="0"), "an earlier life of this very job"
    assert alive(now=1.0, job="6", restart="0")


def test_a_killed_process_that_nobody_has_reaped_is_dead():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    lock = lock_of(host="here", boot=phase.boot_id(), pid=child.pid, start=phase.process_start(child.pid))
    assert phase.holder_alive(lock, 0.0, this_host="here")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is dead now, and stays a zombie
    stat = open(f"/proc/{child.pid}/stat").read()
    assert stat.rsplit(")", 1)[1].split()[0] == "Z", "the test must look at a zombie"
    assert not phase.holder_alive(lock, 0.0, this_host="here")
    child.wait()


def test_done_half_done_changed(folder, capsys):
    assert begin(folder) == {}
    save(folder, 9)
    phase.done(folder, val_bpb=1.0)
    assert exit_code(begin, folder) == 0 and "done already" in capsys.readouterr().out
    assert exit_code(begin, folder, SimpleNamespace(defining={"depth": 5}, free={})) == 2 and "depth: 4 -> 5" in capsys.readouterr().err
    assert exit_code(begin, folder, inputs={"data": "other"}) == 2 and "data: abc -> other" in capsys.readouterr().err
    assert begin(folder, SimpleNamespace(defining={"depth": 4}, free={"rows": 2}), verify=lambda: "damaged")["status"] == "done"
    assert "rows: 8 -> 2" in capsys.readouterr().out, "what does not define the result is only logged"


def test_starting_over_keeps_the_old(folder):
    begin(folder)
    save(folder, 3)
    phase.release(folder)
    assert begin(folder, start_over=True) == {} and checkpoint.steps(folder) == []
    old, = folder.parent.glob("d4.old-*")
    assert checkpoint.steps(old) == [3]


def test_starting_over_holds_for_one_beginning(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["base_train.py", "--depth=4", "--start_over=True"])
    over = lambda depth=4, **more: begin(folder, SimpleNamespace(defining={"depth": depth, "tag": ""}, free={"start_over": True}), start_over=True, **more)
    over()
    save(folder, 3)
    phase.release(folder)
    assert over()["settings"] == {"depth": 4, "tag": "d4"} and checkpoint.steps(folder) == [3] and not list(folder.parent.glob("d4.old-*")), "the same command goes on"
    assert phase.read(folder)["next"] == "python base_train.py --depth=4"
    phase.release(folder)
    monkeypatch.setenv("NANOCHAT_ASK", "1")
    assert exit_code(over, 5) == 3 and checkpoint.steps(folder) == [3], "who only asks puts nothing aside"
    monkeypatch.delenv("NANOCHAT_ASK")
    assert over(inputs={"data": "other"}) == {}, "another run begins"
    phase.done(folder)
    monkeypatch.setenv("NANOCHAT_OUTCOME", str(folder.parent / "outcome"))
    assert exit_code(over, inputs={"data": "other"}) == 0, "speedrun.sh skips what is done, with the same flags too"
    monkeypatch.delenv("NANOCHAT_OUTCOME")
    time.sleep(1)  # the folders put aside have names by the second
    assert over(inputs={"data": "other"}) == {} and len(list(folder.parent.glob("d4.old-*"))) == 2


def test_an_empty_tag_and_the_one_it_stands_for_are_the_same(folder):
    named = lambda tag: SimpleNamespace(defining={"tag": tag}, free={})
    for first, second in (("", "d4"), ("d4", "")):
        begin(folder, named(first), start_over=True)
        phase.release(folder)
        assert begin(folder, named(second))
        phase.release(folder)
        folder.rename(folder.parent / f"kept{first}")


def test_a_stopped_old_life_does_not_write_when_it_wakes_up(folder, capsys):
    begin(folder)
    save(folder, 1)
    lock = common.read_json(folder / "lock.json")
    common.atomic_write(folder / "lock.json", json.dumps({**lock, "token": "the new life's"}))
    before = sorted(p.name for p in folder.iterdir())
    record = (folder / "phase.json").read_text()
    assert exit_code(save, folder, 2) == 1 and "lost the lock" in capsys.readouterr().err
    assert checkpoint.steps(folder) == [1] and checkpoint.problem(folder, 1) is None and (folder / "phase.json").read_text() == record
    assert [n for n in sorted(p.name for p in folder.iterdir()) if ".tmp" not in n] == before


@pytest.mark.parametrize("damage,why", [
    (lambda f: (f / "model_000002.pt").write_bytes((f / "model_000002.pt").read_bytes()[:-7]), "bytes, not"),
    (lambda f: (f / "optim_000002.pt").unlink(), "missing"),
    (lambda f: (f / "meta_000002.json").write_bytes((f / "meta_000002.json").read_bytes().replace(b"1.0", b"2.0")), "checksum"),
    (lambda f: (f / "manifest_000002.json").write_text("{"), "manifest")])
def test_a_damaged_checkpoint_is_passed_over(folder, damage, why):
    begin(folder)
    save(folder, 1, keep=2), save(folder, 2, keep=2)
    assert checkpoint.newest(folder) == 2
    damage(folder)
    said = []
    assert checkpoint.newest(folder, said.append) == 1 and why in said[0]
    model, optim, meta = checkpoint.load(folder, 1)
    assert torch.equal(model["w"], tensors(1)["w"]) and meta["step"] == 1


def test_a_bit_flipped_anywhere_is_found(folder):
    begin(folder)
    save(folder, 1, keep=2), save(folder, 2, keep=2)
    for path in folder.glob("*_000002*"):
        whole = path.read_bytes()
        for place in range(0, 8 * len(whole), 5 if "manifest" in path.name else len(whole) // 12):
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            found = checkpoint.newest(folder, lambda why: None)
            assert found == 1 or (found == 2 and "manifest" in path.name and checkpoint.problem(folder, 2) is None), (path.name, place)
        path.write_bytes(whole)


def test_keep(folder):
    begin(folder)
    for step in range(5):
        save(folder, step, keep=2)
    assert checkpoint.steps(folder) == [4, 3] and len(list(folder.glob("*_0000*"))) == 8


def test_a_full_disk_loses_nothing(folder, monkeypatch, capsys):
    begin(folder)
    save(folder, 1)
    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert exit_code(save, folder, 2) == 1
    monkeypatch.undo()
    assert "No space left" in capsys.readouterr().err
    assert checkpoint.newest(folder) == 1 and not list(folder.glob(".*.tmp"))


def test_sweeping(folder):
    begin(folder)
    save(folder, 1)
    for name in ("model_000002.pt", ".optim_000002.pt.tmp", "meta_000002.json"):
        (folder / name).write_text("half")
    checkpoint.sweep(folder)
    assert checkpoint.newest(folder) == 1 and len(list(folder.glob("*00000*"))) == 4 and not list(folder.glob("*.tmp"))


def test_metrics_survive_a_torn_line_and_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(5):
        common.append_metrics(path, {"step": step, "loss": step})
    with open(path, "a") as f:
        f.write('{"step": 5, "lo')
    common.trim_metrics(path, 3)
    common.append_metrics(path, {"step": 3, "loss": 3})
    assert [r["step"] for r in common.read_metrics(path)] == [0, 1, 2, 3]


def test_a_stop_while_the_others_wait_for_rank_0_is_no_failure_to_torchrun(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    for code, left in ((75, 0), (2, 2)):  # at a code other than 0 it would start the workers again
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box, **k: box.__setitem__(1, code))
        assert exit_code(common.on_rank0, len) == left


def test_a_file_system_without_flock_has_a_lock_too(folder, monkeypatch):
    def unknown(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(phase.fcntl, "flock", unknown)
    begin(folder)
    assert phase.still_mine(folder)


def test_more_processes_than_gpus_are_one_line(monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert exit_code(common.init_distributed) == 2 and "2 processes were asked for on this machine and it has 1 GPUs" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys):
    assert exit_code(common.init_compute, {"device": "cuda", "dtype": "float32", "threads": 1, "compile": False}) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_signals_and_deadlines_ask_for_a_stop():
    code = f"import sys, os, signal, time; sys.path.insert(0, {str(REPO)!r})\nimport common\ncommon.install_stop_handlers()\n"
    out = subprocess.run([sys.executable, "-c", code + "print(common.stop_requested())\nos.kill(os.getpid(), signal.SIGUSR1)\nprint(common.stop_requested())"], capture_output=True, text=True)
    assert out.stdout == "None\nsignal SIGUSR1\n"
    out = subprocess.run([sys.executable, "-c", code + "common.set_deadline(60)\nprint(common.stop_requested())\ncommon._stop['limit'] = time.time()\nprint(common.stop_requested())"], capture_output=True, text=True)
    assert out.stdout == "None\ndeadline\n"
    out = subprocess.run([sys.executable, "-c", code + "for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\nprint('still here')"], capture_output=True, text=True)
    assert out.returncode == 130 and out.stdout == ""
    out = subprocess.run([sys.executable, "-c", code + "for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\nprint('still here')"], capture_output=True, text=True, env={**os.environ, "TORCHELASTIC_RUN_ID": "x"})
    assert out.stdout == "still here\n", "under torchrun it goes on saving"


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    common.atomic_write(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        common.atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_status_and_report_over_what_is_not_whole(state, folder, capsys):
    assert script(state, "status.py").stdout.startswith("nothing in")
    out = script(state, "report.py")
    assert out.returncode == 0 and "Never ran" in (state / "toy/report/report.md").read_text()

    begin(folder)
    save(folder, 3)
    with open(folder / "metrics.jsonl", "w") as f:
        f.write("".join(json.dumps({"kind": "train", "step": i, "loss": 3.0 - i}) + "\n" for i in range(3)) + '{"kind": "tr')
    with pytest.raises(SystemExit):
        common.fail("the loss became nan", code=1, next_command="python base_train.py --matrix_lr=0.01")
    out = script(state, "status.py")
    assert "failed, saved at step 3 of 9" in out.stdout and "the loss became nan" in out.stdout and "next: python base_train.py --matrix_lr=0.01" in out.stdout
    out = script(state, "report.py")
    text = (state / "toy/report/report.md").read_text()
    assert out.returncode == 0 and "**Failed**: the loss became nan, step 3 of 9" in text and (state / "toy/report/base_loss.svg").read_text().startswith("<svg")
    record = phase.read(folder)
    phase.write(folder, {**record, "status": "running", "pid": 10 ** 8})
    assert "died without a word" in script(state, "status.py").stdout


def test_the_report_judges_the_goals():
    result = lambda a: {"accuracy": a}
    chat = {"base": None, "mid": None, "sft": {"results": {n: result(0.65) for n in ("gsm8k", "arc_easy", "arc_challenge", "mmlu", "facts", "spellingbee")}}, "rl": {"results": {"gsm8k": result(0.71)}}}
    assert [row[2] for row in report.goals(chat)] == ["NO", "yes", "yes", "NO", "yes"]
    assert status.describe(None)[0] == "absent"


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-20]), lambda p: p.write_text(p.read_text().replace('"inputs"', '"inpuds"'))])
def test_a_lost_record_is_taken_from_the_newest_checkpoint(folder, capsys, damage):
    begin(folder)
    phase.note(folder, chosen={"dtype": "float32"})
    save(folder, 3)
    phase.release(folder)
    damage(folder / "phase.json")
    assert exit_code(begin, folder, SimpleNamespace(defining={"depth": 5}, free={})) == 2
    assert "depth: 4 -> 5" in capsys.readouterr().err
    assert exit_code(begin, folder, inputs={"data": "other"}) == 2
    assert exit_code(checkpoint.find_model, "base", "toy", "d4") == 2 and "only half trained (step 3" in capsys.readouterr().err
    old = begin(folder)
    assert old["chosen"] == {"dtype": "float32"} and phase.read(folder)["status"] == "running"
    said = capsys.readouterr().out
    assert "phase.json is gone or damaged" in said and "setting changed" not in said


@pytest.mark.parametrize("kills,named", [(4, False), (5, True)])
def test_a_death_by_the_memory_guard_is_named_at_the_next_start(folder, capsys, monkeypatch, kills, named):
    monkeypatch.setattr(phase, "memory_kills", lambda: 4)
    begin(folder)
    phase.release(folder)
    monkeypatch.setattr(phase, "memory_kills", lambda: kills)
    begin(folder)
    assert ("memory guard" in capsys.readouterr().out) == named
