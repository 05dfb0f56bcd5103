"""run.py and common.py: records, starting over, stopping, deadlines, metrics, the end."""
import ast
import contextlib
import fcntl
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import clock
import common
import configurator
import models
import pipeline
import records
import report
import rewind
import status
import training
from configurator import Settings
from conftest import REPO, alone, ends, environment, exit_code, script, without_reader
from ranks import Ranks
from records import load_record
from run import Run

def settings(start_over=False, rows=8, **defining):
    found = Settings(start_over=start_over, **defining)
    found.defining = defining or {"depth": 4}
    found.free = {"rows": rows, "start_over": start_over, "save_minutes": 3.0, "eval_every": 0,
                  "time_limit": None, "keep": 1}
    return found

@pytest.fixture
def folder(state):
    return state / "toy/base_checkpoints/d4"

def start(folder, asked=None, inputs=None, damage=lambda: None):
    """A Run of base_train that has opened the folder."""
    run = alone("base_train")
    run.command = "python base_train.py --depth=4"
    run.open_or_exit(folder, asked or settings(), inputs or {"data": "abc"}, damage)
    return run

def save(run, step, keep=1, wait=True):
    if run.clock is None:
        run.begin_loop(0, 9, 0.0)
    state = {"w": torch.full((1000,), float(step))}
    holder = SimpleNamespace(state_dict=lambda: state)
    optimizer = SimpleNamespace(state_dict=lambda: {"w": dict(state)})
    run.record["free"]["keep"] = keep
    run.save(step, holder, optimizer, {"loss": 1.0}, wait)

# ---- the record

def test_done_half_done_changed(folder, capsys):
    run = start(folder)
    save(run, 9)
    assert exit_code(run.exit_done, val_bpb=1.0) == 0
    assert load_record(folder)["status"] == "done" and load_record(folder)["val_bpb"] == 1.0
    assert exit_code(start, folder) == 0 and "done already" in capsys.readouterr().out
    assert exit_code(start, folder, settings(depth=5)) == 2
    assert "depth was 4, now 5" in capsys.readouterr().err
    assert exit_code(start, folder, inputs={"data": "other"}) == 2
    assert "other data" in capsys.readouterr().err
    run = start(folder, settings(rows=2), damage=lambda: "damaged")
    assert run.record["status"] == "running" and run.record["val_bpb"] == 1.0
    said = capsys.readouterr().out
    changed = "changed since the last attempt: rows was 8, now 2"
    assert changed in said, "it does not define the result"
    run.close(1, "over")

@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "done"])
def test_a_record_of_a_training_that_has_saved_nothing_blocks_no_other(folder, status):
    run = start(folder, damage=None)
    run.update_record(status=status)
    run.lock.release()
    run = start(folder, settings(depth=5), {"data": "other"}, damage=None)
    assert run.record["settings"]["depth"] == 5 and run.saved_step is None
    run.close(1, "over")

@pytest.mark.parametrize("name", sorted(checkpoint.ADDED))
def test_a_run_from_before_a_setting_was_there_goes_on_with_what_held_then(folder, name, capsys):
    run = start(folder, damage=None)
    save(run, 3)
    run.close(75, "stopped")
    run = start(folder, settings(depth=4, **{name: checkpoint.ADDED[name]}), damage=None)
    assert run.saved_step == 3
    run.close(75, "stopped")
    other = settings(depth=4, **{name: 7})
    assert exit_code(start, folder, other, damage=None) == 2
    assert f"{name} was {checkpoint.ADDED[name]}, now 7" in capsys.readouterr().err

def test_what_starts_it_over_is_named_as_it_is_typed(folder, monkeypatch, capsys):
    run = start(folder, damage=None)
    save(run, 3)
    run.close(75, "stopped")
    for launched, words in ((False, "or --start_over=True"), (True, "-- --base.start_over=True")):
        if launched:
            monkeypatch.setenv("NANOCHAT_OUTCOME", str(folder / "outcome"))
        assert exit_code(start, folder, settings(depth=5), damage=None) == 2
        assert words in capsys.readouterr().err

def test_what_goes_on_with_several_ranks_starts_as_many(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/mid_train.py", "--data=my texts", "--start_over=True",
                                      "--rewind=3"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda *call: None)
    assert Run.start("mid_train").command == "python mid_train.py '--data=my texts'"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Run.start("mid_train").command == (
        "torchrun --standalone --nproc_per_node=4 mid_train.py '--data=my texts'")

def test_starting_over_is_refused_while_another_process_writes(folder, capsys):
    run = start(folder)
    assert exit_code(start, folder, settings(start_over=True)) == 2
    assert "stop it first" in capsys.readouterr().err and run.lock.mine()
    run.close(75, "stopped")

def test_starting_over_holds_for_one_beginning(folder, capsys):
    def over(depth=4, **more):
        return start(folder, settings(start_over=True, depth=depth, tag=""), **more)
    run = over()
    save(run, 3)
    run.close(75, "stopped")
    run = over()
    assert run.record["settings"] == {"depth": 4, "tag": "d4"} and checkpoint.steps(folder) == [3]
    assert not list(folder.parent.glob("d4.old-*")), "the same command goes on"
    run.close(75, "stopped")
    assert load_record(folder)["next"] == "python base_train.py --depth=4"
    start(folder, settings(depth=4, tag="")).close(75, "stopped")  # as "next" says
    over().close(75, "stopped")
    assert checkpoint.steps(folder) == [3], "it was begun so, whatever came between"
    (folder / "phase.json").unlink()
    over().close(75, "stopped")
    assert checkpoint.steps(folder) == [3], "its checkpoint says so, too"
    record = load_record(folder)
    del record["begun_over"]
    record["free"]["start_over"] = True  # an older version's
    (folder / "phase.json").write_text(json.dumps(record))
    start(folder, settings(depth=4, tag="")).close(75, "stopped")
    over().close(75, "stopped")
    assert checkpoint.steps(folder) == [3]
    over(inputs={"data": "other"}).close(75, "stopped")
    assert checkpoint.steps(folder) == [], "another run begins"
    run = over(inputs={"data": "other"})
    save(run, 3)
    assert exit_code(run.exit_done, step=3) == 0
    assert exit_code(over, inputs={"data": "other"}) == 0, "it is done already"
    assert f"used up: to begin base_train anew rename {folder}" in capsys.readouterr().out
    assert len(list(folder.parent.glob("d4.old-*"))) == 1

def test_an_empty_tag_and_the_one_it_stands_for_are_the_same(folder):
    for first, second in (("", "d4"), ("d4", "")):
        start(folder, settings(tag=first)).close(75, "stopped")
        run = start(folder, settings(tag=second))
        assert len(run.record["starts"]) == 2
        run.close(75, "stopped")
        folder.rename(folder.parent / f"kept{first}")

@pytest.mark.parametrize("damage", [
    lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-20]),
    lambda p: p.write_text(p.read_text().replace('"inputs"', '"inpuds"'))])
def test_a_lost_record_is_taken_from_the_newest_checkpoint(folder, capsys, damage):
    run = start(folder)
    run.update_record(chosen={"dtype": "float32"})
    save(run, 3)
    run.close(75, "stopped")
    damage(folder / "phase.json")
    assert exit_code(start, folder, settings(depth=5)) == 2
    assert "depth was 4, now 5" in capsys.readouterr().err
    assert exit_code(start, folder, inputs={"data": "other"}) == 2
    assert exit_code(models.find_model, "base", "toy", "d4") == 2
    assert "only half trained (step 3" in capsys.readouterr().err
    run = start(folder)
    assert run.record["chosen"] == {"dtype": "float32"}
    assert load_record(folder)["status"] == "running"
    said = capsys.readouterr().out
    assert "phase.json is missing or damaged" in said and "changed since" not in said
    run.close(75, "stopped")

@pytest.mark.parametrize("asked,advised", [({"device_batch_size": 8}, True), ({}, False)])
def test_a_start_that_ended_without_a_word_is_named_at_the_next(folder, capsys, asked, advised):
    run = start(folder, settings(**asked))
    run.lock.release()  # as the kernel does it for a process that is killed
    start(folder, settings(**asked)).close(75, "stopped")
    said = capsys.readouterr().out
    assert "attempt was killed or ran out of memory" in said
    assert ("--device_batch_size" in said) == advised
    start(folder, settings(**asked)).close(75, "stopped")
    assert "the last attempt was killed" not in capsys.readouterr().out

def test_while_another_process_writes_nobody_calls_it_dead(folder, capsys):
    run = start(folder)
    assert exit_code(start, folder) == 2
    said = capsys.readouterr()
    assert "is being written by" in said.err and "the last attempt was killed" not in said.out
    run.close(75, "over")

def test_a_folder_that_cannot_be_written_is_one_line(folder, monkeypatch, capsys):
    def refuse(directory):
        raise OSError(30, "Read-only file system", str(directory))
    monkeypatch.setattr("run.take_lock", refuse)
    assert exit_code(start, folder) == 2
    said = capsys.readouterr().err
    assert "Read-only" in said and "make it writable" in said and said.count("\n") == 1

def test_an_old_attempt_does_not_write_when_it_wakes_up(folder, capsys):
    run = start(folder)
    save(run, 1)
    holder = common.read_json(folder / "lock.json")
    common.atomic_write(folder / "lock.json", json.dumps({**holder, "token": "the new one's"}))
    before = sorted(p.name for p in folder.iterdir())
    record = (folder / "phase.json").read_text()
    assert exit_code(save, run, 2) == 1 and "lost the lock" in capsys.readouterr().err
    assert exit_code(run.exit_done, step=2) == 1
    run.close(1, "lost")
    assert checkpoint.steps(folder) == [1] and checkpoint.problem(folder, 1) is None
    assert (folder / "phase.json").read_text() == record
    assert sorted(p.name for p in folder.iterdir() if ".tmp" not in p.name) == before
    run.lock.lost = True
    assert exit_code(run.stop_reason) == 1, "and it notices at its next step"

def test_what_an_old_attempt_still_logs_does_not_reach_the_new_ones_metrics(folder):
    old = start(folder)
    old.begin_loop(0, 9, 0.0)
    old.log(step=0)
    (folder / "lock.json").unlink()  # as if taken over
    new = start(folder)
    new.begin_loop(1, 9, 0.0)
    old.log(step=1, old=True)
    new.log(step=1)
    assert common.read_json_lines(folder / "metrics.jsonl") == [{"step": 0}, {"step": 1}]
    new.close(75, "stopped")

# ---- what is saved, whole or damaged

def contents(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}

def trained(folder, step=9, finished=True, **more):
    """A run that has saved a checkpoint, and is done or half done."""
    run = start(folder, damage=None, **more)
    save(run, step)
    if finished:
        exit_code(run.exit_done, step=step)
    run.close(75, "stopped")

def damage_file(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

def test_asking_whether_a_phase_is_done_changes_nothing_on_disk(folder, capsys):
    trained(folder)
    before = contents(folder), folder.stat().st_mtime_ns
    assert exit_code(start, folder, damage=None) == 0
    assert "done already" in capsys.readouterr().out
    assert (contents(folder), folder.stat().st_mtime_ns) == before

@pytest.mark.parametrize("damage", [damage_file, lambda path: path.unlink()])
def test_what_is_done_needs_its_weights_alone(folder, damage):
    trained(folder)
    for name in ("optim_000009.pt", "meta_000009.json"):
        damage(folder / name)
    before = contents(folder)
    assert exit_code(start, folder, damage=None) == 0 and contents(folder) == before
    assert models.find_model("base", "toy", "d4") == (folder, 9)
    assert checkpoint.load(folder, 9, optimizer=False)[2]["loss"] == 1.0
    assert status.describe(folder)[0] == "done"

def test_a_whole_model_that_came_without_record_and_optimizer_is_done(folder, capsys):
    trained(folder)
    for name in ("optim_000009.pt", "phase.json"):
        (folder / name).unlink()
    before = contents(folder)
    assert exit_code(start, folder, damage=None) == 0 and contents(folder) == before
    assert models.find_model("base", "toy", "d4") == (folder, 9)
    assert exit_code(start, folder, settings(depth=5), damage=None) == 2
    damage_file(folder / "model_000009.pt")
    assert exit_code(start, folder, damage=None) == 2

@pytest.mark.parametrize("finished,name", [
    (True, "model_000009.pt"), (True, "manifest_000009.json"), (False, "model_000009.pt"),
    (False, "optim_000009.pt"), (False, "meta_000009.json"), (False, "manifest_000009.json")])
@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, path.stat().st_size // 2),
                                    lambda path: path.unlink()])
def test_nothing_begins_anew_over_what_is_damaged(folder, capsys, finished, name, damage):
    trained(folder, finished=finished)
    damage(folder / name)
    before = contents(folder)
    assert exit_code(start, folder, damage=None) == 2
    said = capsys.readouterr().err
    assert "no checkpoint in" in said and "--start_over=True" in said and said.count("\n") == 1
    assert name.split("_")[0] in said, "it says what is wrong"
    assert contents(folder) == before
    run = start(folder, settings(start_over=True), damage=None)
    assert run.saved_step is None and checkpoint.steps(folder) == []
    old, = folder.parent.glob("d4.old-*")
    assert contents(old) == before
    run.close(75, "stopped")

def test_an_older_whole_checkpoint_is_gone_on_from(folder, capsys):
    run = start(folder, damage=None)
    save(run, 3)
    save(run, 9, keep=2)
    exit_code(run.exit_done, step=9)
    damage_file(folder / "model_000009.pt")
    run = start(folder, damage=None)
    assert run.saved_step == 3
    assert "skipping the damaged checkpoint of step 9" in capsys.readouterr().out
    run.close(75, "stopped")

def test_a_run_begun_before_a_setting_came_asks_for_what_held_then(folder, capsys):
    run = start(folder, settings(depth=4), damage=None)
    save(run, 3)
    run.close(75, "stopped")
    assert exit_code(start, folder, settings(depth=4, key_offset=True), damage=None) == 2
    assert "key_offset was False, now True" in capsys.readouterr().err
    run = start(folder, settings(depth=4, key_offset=False), damage=None)
    assert run.saved_step == 3
    save(run, 5)
    assert checkpoint.steps(folder) == [5], "the older one is of the same run, and goes"
    run.close(75, "stopped")

def test_to_the_plain_model_settings_of_the_modern_one_say_nothing(folder):
    run = start(folder, settings(depth=4, arch="nanochat_2025"), damage=None)
    save(run, 3)
    run.close(75, "stopped")
    modern = {"key_offset": True, "bigram_vocab_size": 9}
    run = start(folder, settings(depth=4, arch="nanochat_2025", **modern), damage=None)
    assert run.saved_step == 3
    save(run, 5)
    assert checkpoint.steps(folder) == [5]
    run.close(75, "stopped")

def put_another_runs_checkpoint_into(folder, step):
    """Somebody copies there what a run with other settings has saved."""
    other = folder.with_name("d5")
    run = start(other, settings(depth=5), damage=None)
    save(run, step)
    run.close(75, "stopped")
    for path in other.glob("m*_0*"):
        (folder / path.name).write_bytes(path.read_bytes())

@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("step", [2, 500])
def test_another_runs_checkpoint_in_the_folder_costs_nothing(folder, capsys, step, finished):
    trained(folder, finished=finished)
    put_another_runs_checkpoint_into(folder, step)
    before = contents(folder)
    assert exit_code(start, folder, damage=None) == (0 if finished else 2)
    said = capsys.readouterr().err
    assert finished or f"model_{step:06d}.pt is of another run" in said
    assert contents(folder) == before
    assert records.finished_step(folder) == (9 if finished else None)
    assert status.describe(folder)[0] == ("done" if finished else "half")
    if finished:
        assert models.find_model("base", "toy", "d4") == (folder, 9)

def test_status_calls_done_what_later_stages_can_use(folder, capsys):
    run = start(folder, damage=None)
    save(run, 3)
    save(run, 9, keep=2)
    exit_code(run.exit_done, step=9)
    assert models.is_finished(folder) and status.describe(folder)[0] == "done"
    (folder / "manifest_000009.json").unlink()
    assert not models.is_finished(folder)
    assert status.describe(folder) == ("failed", "was done, but its checkpoint is missing")
    assert exit_code(models.find_model, "base", "toy", "d4") == 2

def test_a_run_begun_with_start_over_whose_checkpoint_is_damaged_is_put_aside_too(folder):
    asked = settings(start_over=True)
    run = start(folder, asked, damage=None)
    save(run, 3)
    run.close(75, "stopped")
    damage_file(folder / "model_000003.pt")
    run = start(folder, asked, damage=None)
    assert run.saved_step is None and len(list(folder.parent.glob("d4.old-*"))) == 1
    run.close(75, "stopped")

def test_a_first_save_that_was_never_finished_is_begun_anew(folder):
    run = start(folder, damage=None)
    run.close(75, "stopped")
    for name in ("model_000003.pt", "meta_000003.json", ".partial_000003"):
        (folder / name).write_text("half")
    run = start(folder, damage=None)
    assert run.saved_step is None
    run.begin_loop(0, 9, 0.0)
    assert not list(folder.glob("*_000003*")), "and its parts are swept"
    run.close(75, "stopped")

def test_a_start_that_has_saved_nothing_binds_nobody(folder, capsys):
    start(folder, damage=None).close(1, "out of memory")
    run = start(folder, settings(depth=5), inputs={"data": "other"}, damage=None)
    said = capsys.readouterr().out
    assert "had saved nothing: depth was 4, now 5, other data" in said
    assert run.record["settings"] == {"depth": 5} and run.record["inputs"] == {"data": "other"}
    save(run, 1)
    run.close(75, "stopped")
    assert exit_code(start, folder, damage=None) == 2, "now it binds"

def test_what_is_whole_binds_though_a_death_came_before_it_was_called_done(folder, capsys):
    start(folder).close(1, "killed behind the last write")
    assert exit_code(start, folder, settings(depth=5)) == 2
    assert "depth was 4, now 5" in capsys.readouterr().err
    run = start(folder, settings(depth=5), damage=lambda: "damaged")
    assert run.record["settings"] == {"depth": 5}
    run.close(75, "stopped")

def test_without_any_word_of_what_it_was_started_with_nothing_goes_on(folder, capsys):
    trained(folder)
    (folder / "phase.json").unlink()
    meta = checkpoint.load_meta(folder, 9)
    del meta["record"]  # as an older version has saved it
    weights, optim_state, _ = checkpoint.load(folder, 9)
    checkpoint.save(folder, 9, weights, optim_state, meta)
    before = contents(folder)
    assert exit_code(start, folder, damage=None) == 2 and contents(folder) == before
    said = capsys.readouterr().err
    assert "phase.json is missing" in said and "--start_over=True" in said and said.count("\n") == 1

def test_nor_do_the_files_that_it_has_found(folder):
    run = start(folder, damage=None)
    run.update_record(train_files=["a"], chosen={"dtype": "bfloat16"})
    for expected in (None, ["a"]):
        assert records.find_record(folder, settings()).get("train_files") == expected
        save(run, 1)
    run.close(75, "stopped")

def test_a_disk_that_is_full_when_all_is_done_is_no_success(folder, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")
    run = start(folder, damage=None)
    save(run, 9)
    with monkeypatch.context() as patch:
        patch.setattr(common, "atomic_write", full)
        assert exit_code(run.exit_done, step=9) == 1
    assert "No space left" in capsys.readouterr().err
    run.lock.release()
    run = start(folder, damage=None)
    assert run.saved_step == 9
    run.close(75, "stopped")

def test_what_another_process_writes_while_it_looks_is_not_gone_over(folder, monkeypatch, capsys):
    trained(folder, step=3, finished=False)
    real = checkpoint.newest

    def slow(*args, **more):
        step = real(*args, **more)
        monkeypatch.setattr(checkpoint, "newest", real)
        trained(folder, step=5, finished=False)
        return step
    monkeypatch.setattr(checkpoint, "newest", slow)
    assert exit_code(start, folder, damage=None) == 2
    assert "another process just wrote" in capsys.readouterr().err
    run = start(folder, damage=None)
    assert run.saved_step == 5
    run.close(75, "stopped")

# ---- metrics

def test_metrics_survive_a_torn_line_and_a_resume(folder):
    run = start(folder)
    run.begin_loop(0, 9, 0.0)
    for step in range(5):
        run.log(step=step, loss=step)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    run.begin_loop(3, 9, 0.0)
    run.log(step=3, loss=3)
    assert [r["step"] for r in common.read_json_lines(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    run.close(75, "stopped")

def test_metrics_on_a_disk_that_is_full_at_the_start_of_the_loop(folder, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")
    run = start(folder, damage=None)
    with monkeypatch.context() as patch:
        patch.setattr(common, "atomic_write", full)
        assert exit_code(run.begin_loop, 0, 9, 0.0) == 1
    said = capsys.readouterr().err
    assert "No space left" in said and "metrics.jsonl" in said and said.count("\n") == 1
    run.close(1, "full")

def test_metrics_on_a_full_disk(capsys):
    run = alone()
    run.metrics = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    assert exit_code(run.log, step=1) == 1 and "No space left" in capsys.readouterr().err
    with pytest.raises(OSError):
        run.metrics.close()

# ---- stopping

START = f"""
import sys, os, signal, time
sys.path.insert(0, {str(REPO)!r})
from run import Run
run = Run.start("test")
"""

def python(code, **more):
    return subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True,
                          check=False, env={**os.environ, **more})

def test_signals_and_time_limits_ask_for_a_stop():
    out = python("print(run.stop_reason()); os.kill(os.getpid(), signal.SIGUSR1); "
                 "print(run.should_stop())")
    assert out.stdout == "None\nsignal SIGUSR1\n"
    hang_up = "os.kill(os.getpid(), signal.SIGHUP); print(run.should_stop())"
    for handler, says in ((signal.SIG_DFL, "signal SIGHUP"), (signal.SIG_IGN, "None")):
        out = subprocess.run([sys.executable, "-c", START + hang_up], capture_output=True,
                             text=True, check=False,
                             preexec_fn=functools.partial(signal.signal, signal.SIGHUP, handler))
        assert out.stdout == f"{says}\n", "nohup has it ignored"
    out = python("run.set_deadline(60); print(run.stop_reason()); run.set_deadline(0.0); "
                 "print(run.stop_reason())")
    assert out.stdout == "None\ndeadline\n"
    out = python("[os.kill(os.getpid(), number) for number in (15, 2)]; print('still here')")
    assert out.stdout == "still here\n", "Ctrl-C once, whatever else has asked for a stop"
    twice = "for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\nprint('still here')"
    out = python(twice)
    assert out.returncode == 130 and out.stdout == ""
    out = python(twice, TORCHELASTIC_RUN_ID="x")
    assert out.stdout == "still here\n", "under torchrun it goes on saving"

@pytest.mark.parametrize("ends_with,code", [
    ("run.leave(75, 'stopped')", 75), ("run.leave(0, 'done')", 0), ("raise ValueError", 1)])
def test_a_process_that_leaves_does_not_die_of_being_told_once_more(ends_with, code):
    last = """
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, 10), kill(pid, 15), kill(pid, 2)
sys.last = Last()
"""
    assert python(last + ends_with).returncode == code

@pytest.mark.parametrize("code,says", [(1, "error: rank "), (2, "error: "), (75, "stopped: ")])
def test_a_failure_is_one_line_and_its_exit_code_without_a_run_too(code, says):
    fails = f"import common; common.fail('what and where', {code}, 'python x.py')"
    for text in (fails, f"import sys; sys.path.insert(0, {str(REPO)!r}); {fails}"):
        out = python(text)
        assert out.returncode == code and out.stderr.count("\n") == 1
        assert out.stderr.endswith("what and where; run: python x.py\n")
        assert out.stderr.startswith(says.replace("rank ", ""))

def test_any_other_exception_keeps_its_traceback_and_is_recorded(folder):
    out = python(f"""
from types import SimpleNamespace
import pathlib
from configurator import Settings
asked = Settings(start_over=False)
asked.defining, asked.free = {{"depth": 4}}, {{"start_over": False}}
run.open_or_exit(pathlib.Path({str(folder)!r}), asked, {{}}, lambda: None)
raise ValueError("the reason why")
""")
    record = load_record(folder)
    assert out.returncode == 1 and "Traceback" in out.stderr
    assert record["status"] == "failed" and record["reason"] == "ValueError: the reason why"
    assert not (folder / "lock.json").exists()

def test_a_stop_while_the_others_wait_for_rank_0_is_no_failure_to_torchrun(monkeypatch):
    run = Run("test", Ranks(1, 1, 2))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for failure, code in ((common.Failure("stopped", 75), 0), (common.Failure("bad", 2), 2)):
        monkeypatch.setattr(torch.distributed, "broadcast_object_list",
                            lambda box, failure=failure, **more: box.__setitem__(1, failure))
        with ends() as end:
            try:
                run.ranks.on_rank0(len)
            except common.Failure:
                run.end_process(*sys.exc_info())
        assert end.code == code  # else it would start the workers again

@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't "
                                "allocate memory: you tried to allocate 99 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")])
def test_memory_that_is_out_is_one_line_in_any_words(capsys, error):
    run = alone()
    run.settings = {"device_batch_size": 8}
    assert exit_code(run.end_process, type(error), error, None) == 1
    said = capsys.readouterr().err
    assert "ran out of memory in test" in said and "--device_batch_size=4" in said

def test_one_row_at_once_is_not_halved(capsys):
    run = alone()
    run.settings = {"device_batch_size": 1, "rows": 4}
    with ends():
        run.end_process(MemoryError, MemoryError(), None)
    said = capsys.readouterr().err
    assert "--rows=2" in said and "--device_batch_size" not in said
    run.settings = {"device_batch_size": 1}
    failure = common.explained(MemoryError(), "test", run.settings, None)
    assert not failure.facts["retry_with"] and "run the same command" not in failure.message

def test_a_compiler_that_the_same_signal_has_ended_is_no_failure(capsys):
    class InductorError(Exception):
        pass
    run = alone()
    error = InductorError("CppCompileError" + "\nall that the compiler has written" * 1000)
    assert exit_code(run.end_process, InductorError, error, None) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: InductorError: CppCompileError") and len(last) < 300
    run.stop = "signal SIGINT"
    assert exit_code(run.end_process, InductorError, error, None) == 75
    assert capsys.readouterr().err.count("\n") == 1

def test_a_training_of_fewer_steps_than_a_trial_takes_leaves_the_trials_facts(
        folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_OUTCOME", str(tmp_path / "outcome"))
    asked = settings(try_out=True)
    asked.free["time_limit"] = 0.0
    run = start(folder, asked, damage=None)
    run.begin_loop(0, 1, 0.0)
    assert run.stop_reason() is None, "the time is for the training, not for its trial"
    run.log_step(1, "", 8, loss=1.0)
    save(run, 1)
    assert exit_code(run.exit_done, step=1) == 0
    outcome = common.read_json(tmp_path / "outcome")
    assert outcome["num_steps"] == 1 and outcome["bytes"] > 0 and outcome["keep"] == 1

def test_a_stop_before_anything_is_saved_says_so(folder):
    run = start(folder, damage=None)
    run.begin_loop(0, 9, 0.0)
    assert exit_code(run.exit_interrupted, "deadline") == 75
    assert load_record(folder)["reason"] == "deadline: nothing saved yet"

def test_more_processes_than_gpus_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert exit_code(Ranks(0, 0, 2).join) == 2
    assert "2 processes were asked for on this machine and it has 1 GPUs" in capsys.readouterr().err
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *args, **more: iter(()))
    with pytest.raises(StopIteration):  # it goes on to where the ranks meet
        Ranks(0, 0, 2).join("cpu")

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys):
    from compute import choose_compute
    asked = {"device": "cuda", "dtype": "float32", "threads": 1, "compile": False}
    assert exit_code(choose_compute, alone().ranks, asked) == 2
    assert "torch sees no GPU" in capsys.readouterr().err

# ---- going back

def rewound(folder, step, kill=False):
    """A start with --rewind=step, which ends at once."""
    asked = settings()
    asked["rewind"] = step
    run = start(folder, asked, damage=None)
    if kill:
        run.lock.release()
    else:
        run.close(75, "stopped")
    return run

@pytest.fixture
def half(folder):
    """A run with checkpoints of the steps 3, 6 and 9, that has trained on the batches 0 to 10."""
    run = start(folder, damage=None)
    for step in range(11):
        if step in (3, 6, 9):
            save(run, step, keep=9)
        if run.clock is None:
            run.begin_loop(0, 20, 0.0)
        run.log(kind="train", step=step, loss=1.0)
    run.close(75, "stopped")
    return folder

def test_going_back_keeps_later_checkpoints_aside_and_counts_the_batches(half, capsys):
    run = rewound(half, 3)
    assert run.saved_step == 3 and run.record["skipped"] == [[3, 8]]
    assert load_record(half)["skipped"] == [[3, 8]] and checkpoint.steps(half) == [3]
    aside, = half.parent.glob("d4.old-*")
    assert [checkpoint.problem(aside, step) for step in checkpoint.steps(aside)] == [None, None]
    assert checkpoint.steps(aside) == [9, 6]
    assert "- went back to step 3 (--rewind) and skipped 8 batches" in report.started(
        "base_train.py", {**run.record, "commit": "?"})
    said = capsys.readouterr().out
    assert "going back from step 11 to step 3, skipping 8 batches" in said and str(aside) in said
    assert [rewind.batch_number([[3, 8], [9, 2]], step) for step in (2, 3, 9)] == [2, 11, 19]

def test_the_same_command_goes_back_once_for_each_explosion(half):
    assert rewound(half, 3, kill=True).record["skipped"] == [[3, 8]]
    assert rewound(half, 3).record["skipped"] == [[3, 8]]
    run = start(half, damage=None)
    run.begin_loop(3, 20, 0.0)
    for step in range(3, 7):
        run.log(kind="train", step=step, loss=1.0)
    with pytest.raises(common.Failure):
        rewind.give_up(run, "it exploded", 8)
    run.close(1, "it exploded")
    assert start(half, damage=None).close(75, "stopped")
    assert rewound(half, 3).record["skipped"] == [[3, 8], [3, 5]], "batches 11 to 15, too"
    assert rewound(half, 3).record["skipped"] == [[3, 8], [3, 5]]
    run = start(half, damage=None)
    save(run, 9, keep=9)
    run.close(75, "stopped")
    assert rewound(half, 3).saved_step == 9, "it got on"

def test_a_new_explosion_is_not_gone_back_from_to_where_the_last_one_was(half, capsys):
    rewound(half, 3)
    run = start(half, damage=None)
    run.begin_loop(3, 20, 0.0)
    save(run, 9, keep=9)
    with pytest.raises(common.Failure):
        rewind.give_up(run, "it exploded", 11)
    run.close(1, "it exploded")
    before = contents(half)
    assert exit_code(rewound, half, 3) == 2 and contents(half) == before
    said = capsys.readouterr().err
    assert "--rewind=3: the run has gone back there already, got on to step 9 and gave up at step "\
        "11: --rewind=9" in said and said.count("\n") == 1
    damage_file(half / "model_000009.pt")
    assert rewound(half, 3).saved_step == 3, "that one is no way on"

def test_who_begins_anew_does_not_go_back(half, capsys):
    asked = settings(start_over=True, matrix_lr=0.01)
    asked["rewind"] = 6
    before = contents(half)
    assert exit_code(start, half, asked, damage=None) == 2 and contents(half) == before
    said = capsys.readouterr().err
    assert "which has nothing to go back to: leave --rewind out" in said and said.count("\n") == 1

def test_what_dies_after_it_went_back_is_counted_though_the_command_says_rewind(half):
    asked = {**settings(), "rewind": 3}
    for restarts in ([], [{"step": 3, "steps_lost": 2, "seconds_lost": 0.0}]):
        again = settings()
        again.update(asked)
        run = start(half, again, damage=None)
        run.begin_loop(3, 20, 0.0)
        assert run.record.get("restarts", []) == restarts
        for step in (3, 4):
            run.log(kind="train", step=step, loss=1.0)
        run.close(75, "stopped")

def test_what_going_back_skips_is_not_lost_where_a_death_comes_before_the_loop(half):
    rewound(half, 3, kill=True)
    run = start(half, damage=None)
    run.begin_loop(3, 20, 0.0)
    assert run.record.get("restarts", []) == [] and "going_back" not in load_record(half)
    run.close(75, "stopped")

def test_going_back_further_forgets_what_was_skipped_later(half):
    with open(half / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train"}\n')  # a damaged line
    rewound(half, 6)
    run = start(half, damage=None)
    run.begin_loop(6, 20, 0.0)
    run.log(kind="train", step=6, loss=1.0)
    run.close(75, "stopped")
    # steps 0 to 5, the batches 6 to 10 that were skipped, and batch 11
    assert rewound(half, 3).record["skipped"] == [[3, 9]]

@pytest.mark.parametrize("step,says", [(4, "there is 9, 6"), (3, "there is 9, 6")])
def test_a_step_without_a_whole_checkpoint_is_not_gone_back_to(half, capsys, step, says):
    damage_file(half / "model_000003.pt")
    before = contents(half)
    assert exit_code(rewound, half, step) == 2
    said = capsys.readouterr().err
    assert f"no whole checkpoint of step {step}; {says}" in said and said.count("\n") == 1
    assert contents(half) == before

def test_what_is_done_does_not_go_back(half, capsys):
    run = start(half, damage=None)
    save(run, 20, keep=9)
    assert exit_code(run.exit_done, step=20) == 0
    assert exit_code(rewound, half, 9) == 2 and "is done" in capsys.readouterr().err

def test_one_phase_of_many_goes_back():
    configurator.check_arguments(["--mid.rewind=3"])
    for argument in ("--rewind=3", "--mid.rewind=0", "--tok.rewind=3"):
        assert exit_code(configurator.check_arguments, [argument]) == 2

def test_a_setting_for_one_phase_is_said_as_its_script_or_speedrun_takes_it(monkeypatch):
    monkeypatch.delenv("NANOCHAT_OUTCOME", raising=False)
    assert pipeline.setting_for("chat_sft", "rewind=7") == "--rewind=7"
    monkeypatch.setenv("NANOCHAT_OUTCOME", "of speedrun.sh")
    assert pipeline.setting_for("chat_sft", "rewind=7") == "-- --sft.rewind=7"
    assert pipeline.starting_over("base_train") == "-- --base.start_over=True"

def test_nor_does_what_has_trained_on_nothing_since(folder, capsys):
    trained(folder, finished=False)
    assert exit_code(rewound, folder, 9) == 2
    assert "no batch was trained on since step 9" in capsys.readouterr().err

# ---- standard streams and names

@pytest.mark.parametrize("command,code", [
    (["status.py"], 0), (["base_train.py", "--help"], 0), (["report.py"], 2),
    (["prepare_data.py", "--data=toy", "--check=True"], 2)])
def test_who_stops_reading_ends_no_script(state, command, code):
    out = without_reader(*command, env=environment(state))
    assert out.returncode == code, "that of a script whose output is read"
    assert "Broken" not in out.stderr and "Traceback" not in out.stderr
    assert out.stderr.count("\n") == (code == 2) and not state.exists()

@pytest.mark.parametrize("setting", ["ascii", "ascii:strict", "latin-1"])
def test_what_a_terminal_lacks_is_shown_as_an_escape(setting):
    code = ("import common; name = b'f\\xff'.decode(errors='surrogateescape'); "
            "common.print0('h\\xe9 \\u4f60', name); print('\\u4f60', file=sys.stderr); "
            "print(repr(input()))")
    out = subprocess.run([sys.executable, "-c", START + code], capture_output=True, check=False,
                         input=b"a\xffb\n", env={**os.environ, "PYTHONIOENCODING": setting})
    said = out.stdout.decode("latin-1").splitlines()
    assert said[0] in ("h\\xe9 \\u4f60 f\\udcff", "h\xe9 \\u4f60 f\\udcff")
    assert out.returncode == 0 and out.stderr == b"\\u4f60\n", out.stderr
    if setting != "latin-1":  # in which every byte is a character
        assert said[1] == "'a\\ufffdb'"

def test_streams_that_are_closed_or_full(tmp_path):
    file = tmp_path / "file"
    code = f"open({str(file)!r}, 'w').close(); print('x'); sys.stdout.flush(); run.end(5)"
    shell = f"exec {sys.executable} -c \"$CODE\""
    for closed in ("<&- >&- 2>&-", ">&-", "2>&-"):
        out = subprocess.run(["bash", "-c", f"{shell} {closed}"], capture_output=True, check=False,
                             env={**os.environ, "CODE": START + code})
        assert out.returncode == 5 and out.stderr == b""
        assert file.read_bytes() == b"", "no print goes to another file"
    out = subprocess.run(["bash", "-c", f"{shell} > /dev/full"], capture_output=True, check=False,
                         text=True, env={**os.environ, "CODE": START + "print(1)\n" * 9 + code})
    assert out.returncode == 5 and out.stderr.count("\n") == 1
    assert "No space left on device" in out.stderr

def test_names_of_files_are_read_alike_in_every_locale(tmp_path):
    (tmp_path / "n\xe9\u4f60.txt").write_text("x")
    code = START + f"print(ascii(os.listdir({str(tmp_path)!r})), sys.argv[1:])"
    for setting in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        out = subprocess.run([sys.executable, "-c", code, "a b"], capture_output=True, text=True,
                             check=False, env={**os.environ, **setting})
        assert out.stdout == "['n\\xe9\\u4f60.txt'] ['a b']\n", out.stderr

def text_calls_without(module):
    """The lines of a module that open a text file, or read a command, in the locale's encoding."""
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).split(".")[-1]
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        texts = [word.value for word in node.args if isinstance(word, ast.Constant)]
        if ast.unparse(node.func) in ("open", "io.open"):
            mode = given.get("mode", str(texts[-1:]))
            bad = "b" not in mode and "encoding" not in given
        elif name == "read_text":
            bad = not node.args and "encoding" not in given
        elif name == "write_text":
            bad = len(node.args) < 2 and "encoding" not in given
        else:
            bad = given.get("text") == "True" and "errors" not in given
        if bad:
            yield f"{module.name}:{node.lineno}"

def test_text_is_utf8_on_every_disk_and_no_command_says_what_cannot_be_read():
    assert [line for module in REPO.glob("*.py") for line in text_calls_without(module)] == []

# ---- the clock

NOON = time.mktime(time.strptime("2026-11-24T12:00:00", "%Y-%m-%dT%H:%M:%S"))

def test_the_margin_before_the_end_of_a_job_follows_from_the_longest_save(monkeypatch):
    def run_of(seconds, time_limit=None):
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(NOON + seconds)))
        run = alone()
        run.now = lambda: now[0]
        run.set_deadline(time_limit)
        return run
    now = [NOON]
    run = run_of(12 * 3600)
    assert NOON + 12 * 3600 - run.deadline() == 120, "no save is measured yet"
    run.longest_save = 40.0
    assert NOON + 12 * 3600 - run.deadline() == 30 + 3 * 40
    run.clock = clock.Clock(9, 0.0, 60.0)
    assert NOON + 12 * 3600 - run.deadline() == 30 + 3 * 40
    run.clock.steps.extend([7.0, 90.0, 9.0])
    assert NOON + 12 * 3600 - run.deadline() == 2 * 9 + 30 + 3 * 40, "one more may be begun"
    assert NOON + 60 - run_of(60).deadline() == 15, "a short job must get on, too"
    run = run_of(12 * 3600, time_limit=60)
    assert run.deadline() == NOON + 3600
    now[0] = NOON + 3599
    assert run.stop_reason() is None
    now[0] = NOON + 3600
    assert run.stop_reason() == "deadline"
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    run = alone()
    run.set_deadline()
    assert run.deadline() == math.inf and run.stop_reason() is None

def test_a_clock_that_is_set_back_does_not_put_off_a_save(monkeypatch):
    wall, running = [5000.0], [100.0]  # neither depends on this machine's pace
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "monotonic", lambda: running[0])
    loop = clock.Clock(num_steps=10, seconds_before=5.0, save_interval=60.0)
    wall[0] -= 3600
    running[0] += 59
    assert not loop.save_due() and loop.seconds() == 64.0
    running[0] += 2
    assert loop.save_due() and loop.seconds() == 66.0
    loop.saved(since=running[0] - 1)
    assert not loop.save_due() and 0.0 < loop.save_share() < 1.0

def test_a_step_takes_the_median_of_the_last_ones(monkeypatch):
    running = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: running[0])
    loop = clock.Clock(10, 0.0, 60.0, flops_per_token=6.0, peak_flops=1200.0)
    for seconds in (50, 2, 2, 2, 9):  # the first compiles, at the last it was measured, too
        running[0] += seconds
        reading = loop.tick(tokens=100)
    assert 0.01 < reading.pop("peak_gb") < 50
    assert reading == {"seconds": 65.0, "tokens_per_second": 50, "mfu": 0.25}

def test_the_time_left_is_said_from_the_second_step_on(monkeypatch, capsys):
    running = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: running[0])
    loop = clock.Clock(num_steps=601, seconds_before=0.0, save_interval=60.0)
    for step, seconds in ((1, 51), (2, 2)):  # the first compiles
        running[0] += seconds
        loop.show(step, "loss 7.6", loop.tick(tokens=4096))
    assert capsys.readouterr().out.splitlines() == [
        "step 1/601 | loss 7.6 | 51s so far; the first step after a start is slow",
        "step 2/601 | loss 7.6 | 2,048 tokens/s | 53s so far, 19m58s left"]

# ---- files

def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    def full(fd):
        raise OSError("full")
    common.atomic_write(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        common.atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1

def test_what_deaths_have_left_is_removed_by_the_next_write_and_what_is_being_written_is_not(
        tmp_path):
    path = tmp_path / "shard[1].npy"
    left, other, living = (tmp_path / name for name in (
        ".shard[1].npy.tmp-77-1", ".shard1.npy.tmp-77-1", ".shard[1].npy.tmp-88-1"))
    for file in (left, other, living):
        file.write_text("half")
    with open(living) as f:
        common.flock(f, fcntl.LOCK_EX)
        common.atomic_write(path, "whole")
        assert set(tmp_path.iterdir()) == {path, other, living}
    common.atomic_write(path, "whole")
    assert set(tmp_path.iterdir()) == {path, other}

def test_progress_is_shown_now_and_then_with_the_time_left(monkeypatch, capsys):
    running = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: running[0])
    show, unknown = common.progress("items", 1000), common.progress("documents")
    for done in (0, 10, 20, 30, 40):
        show(done)
        unknown(done)
        running[0] += 5
    said = capsys.readouterr().out
    assert said == ("  20 of 1,000 items, about 8m10s left\n  20 documents\n"
                    "  40 of 1,000 items, about 8m00s left\n  40 documents\n")

def test_the_first_ranks_word_is_the_outcome(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_OUTCOME", str(tmp_path / "outcome"))
    common.leave_outcome(1, "out of memory", retry_with=["--rows=4"])
    common.leave_outcome(1, "another rank died")
    assert common.read_json(tmp_path / "outcome")["retry_with"] == ["--rows=4"]

def test_a_bit_flipped_anywhere_in_the_record_or_metrics_is_no_traceback(folder, capsys):
    run = start(folder, damage=None)
    run.begin_loop(0, 9, 0.0)
    for step in range(3):
        run.log(kind="train", step=step, loss=1.0, norm=1.0)
    save(run, 3)
    exit_code(run.exit_done, step=3, val_bpb=1.0)
    for name in ("phase.json", "metrics.jsonl", "manifest_000003.json"):
        path = folder / name
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 11):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            status.data_sets()
            status.phases_of("toy", "d4")
            training.finite_losses(folder)
            for call in (records.judge, models.find_model):
                args = ("base", "toy", "d4")
                if call is records.judge:
                    args = ("base", folder, settings(), {"data": "abc"})
                with contextlib.suppress(common.Failure):
                    call(*args)
        path.write_bytes(whole)

# ---- what others make of it

def test_status_and_report_over_what_is_not_whole(state, folder):
    assert script(state, "status.py").stdout.startswith("nothing in")
    out = script(state, "report.py")
    assert out.returncode == 2 and "nothing to report" in out.stderr and not state.exists()

    run = start(folder)
    save(run, 3)
    for step in range(3):
        run.log(kind="train", step=step, loss=3.0 - step)
    run.metrics.write('{"kind": "tr')
    run.close(1, "the loss became nan", "python base_train.py --matrix_lr=0.01")
    out = script(state, "status.py").stdout
    assert "failed, saved at step 3 of 9" in out and "the loss became nan" in out
    assert "next: python base_train.py --matrix_lr=0.01" in out
    out = script(state, "report.py")
    text = (state / "toy/report/report.md").read_text()
    assert out.returncode == 0 and "ago: the loss became nan**" in text
    assert "**failed, saved at step 3 of 9, " in text
    assert (state / "toy/report/base_loss.svg").read_text().startswith("<svg")
    record = {**load_record(folder), "status": "running", "pid": 10 ** 8}
    common.atomic_write(folder / "phase.json", json.dumps(record))
    assert "died without a word" in script(state, "status.py").stdout

def test_the_report_knows_the_goals():
    names = ("gsm8k", "arc_easy", "arc_challenge", "mmlu", "facts", "spellingbee")
    assert {*names} == report.GOALS.keys()
    assert status.describe(REPO / "nowhere")[0] == "absent"
