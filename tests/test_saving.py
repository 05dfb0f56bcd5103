"""Saving in the background: copies are taken at once, one save is in flight at most, and what goes
wrong in the thread ends the phase."""
import json
import os
import threading

import pytest
import torch

import checkpoint
import common
import models
from conftest import exit_code
from records import load_record
from test_run import folder, save, start  # noqa: F401  (folder is a fixture)

@pytest.fixture
def slow(monkeypatch):
    """In the thread of a save fsync waits until the event that is returned is set: a slow disk."""
    go, real = threading.Event(), os.fsync

    def fsync(fd):
        if threading.current_thread().name.startswith("save"):
            go.wait(30)
        real(fd)
    monkeypatch.setattr(os, "fsync", fsync)
    yield go
    go.set()

@pytest.fixture
def run(folder):  # noqa: F811
    run = start(folder)
    yield run
    run.close(75, "the test is over")

class Weights:
    """Stands for a model whose weights a training step changes."""
    def __init__(self, value):
        self.w = torch.full((1000,), float(value))

    def state_dict(self):
        return {"w": self.w}

class NoState:
    def state_dict(self):
        return {}

def in_background(run, step, weights=None):
    if run.clock is None:
        run.begin_loop(0, 9, 0.0)
    run.save(step, weights or Weights(step), NoState(), {"loss": 1.0}, wait=False)

def test_the_loop_goes_on_while_a_save_is_written_and_only_one_is_in_flight(run, slow):
    weights = Weights(1)
    in_background(run, 1, weights)
    assert run.saving.is_alive() and checkpoint.steps(run.directory) == []
    weights.w.fill_(99.0)  # the next training step
    waited = []

    def release():
        waited.append(run.saving.is_alive())
        slow.set()
    threading.Thread(target=release).start()
    in_background(run, 2)  # waits for the first
    assert waited == [True]
    run.finish_save()
    assert checkpoint.newest(run.directory) == 2 and not list(run.directory.glob(".*.tmp*"))

def test_what_is_saved_is_of_the_moment(run, slow):
    weights = Weights(1)
    in_background(run, 1, weights)
    weights.w.fill_(99.0)
    slow.set()
    run.finish_save()
    assert torch.equal(checkpoint.load(run.directory, 1)[0]["w"], Weights(1).w)

def test_a_step_that_is_saved_is_not_saved_again(run):
    save(run, 1)
    path = run.directory / "model_000001.pt"
    first = path.stat().st_ino
    save(run, 1)
    run.begin_loop(1, 9, 0.0)
    save(run, 1)
    assert path.stat().st_ino == first

def test_the_metrics_are_on_disk_before_the_checkpoint_counts(run, monkeypatch):
    run.begin_loop(0, 9, 0.0)
    run.log(step=0)
    real, flushed = os.fsync, []

    def fsync(fd):
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)
    monkeypatch.setattr(os, "fsync", fsync)
    save(run, 1)
    manifest = next(i for i, name in enumerate(flushed) if name.startswith(".manifest_"))
    assert "metrics.jsonl" in flushed[:manifest], flushed

def test_the_lock_is_given_back_only_after_the_save_in_flight(run, slow):
    in_background(run, 1)
    threading.Timer(0.2, slow.set).start()
    run.close(1, "the loss became nan")
    assert checkpoint.newest(run.directory) == 1, "what was being saved is whole"
    assert not (run.directory / "lock.json").exists(), "and the lock is free"

@pytest.mark.parametrize("number,text", [(28, "No space left on device"),
                                         (30, "Read-only file system"),
                                         (122, "Disk quota exceeded")])
def test_a_disk_that_fails_in_the_middle_of_a_background_save(run, monkeypatch, capsys, number,
                                                              text):
    save(run, 1)
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) == 5:  # metrics, the mark in its folder and weights are on disk, no optimizer
            raise OSError(number, text)
        real(fd)
    monkeypatch.setattr(os, "fsync", fsync)
    in_background(run, 2)
    run.saving.join()
    monkeypatch.undo()
    assert len(calls) == 5 and run.should_save(), "it is said at once"
    assert exit_code(in_background, run, 3) == 1
    said = capsys.readouterr().err
    assert text in said and "step 2" in said and said.count("\n") == 1
    assert "the last good checkpoint is that of step 1" in said
    folder = run.directory  # noqa: F811
    assert checkpoint.newest(folder) == 1 and not list(folder.glob("*_000002*"))
    run.close(1, text)
    assert load_record(folder)["status"] == "failed"
    again = start(folder)
    save(again, 2)
    assert checkpoint.newest(folder) == 2
    again.close(75, "stopped")

def test_weights_that_are_not_finite_do_not_replace_good_ones(run, capsys):
    save(run, 1)
    in_background(run, 2, Weights(float("nan")))
    assert exit_code(run.finish_save) == 1
    said = capsys.readouterr().err
    assert "weights were not finite at step 2" in said and "(w has a nan or inf)" in said
    assert "the last good checkpoint is that of step 1" in said and "learning rates" in said
    assert checkpoint.newest(run.directory) == 1
    assert not list(run.directory.glob("*_000002*"))

@pytest.mark.parametrize("keep", [1, 2, 3])
def test_however_many_are_kept_the_newest_finite_one_survives(run, capsys, keep):
    for step in (1, 2, 3):
        save(run, step, keep)
    for step in (4, 5):
        in_background(run, step, Weights(float("inf")))
        assert exit_code(run.finish_save) == 1
    assert f"--rewind=3 goes back to step 3 and skips the batches up to step {step}" in \
        capsys.readouterr().err
    assert checkpoint.steps(run.directory) == [3, 2, 1][:keep]
    assert checkpoint.newest(run.directory) == 3

def test_torch_reports_a_failed_write_as_an_error_too(run, monkeypatch, capsys):
    def fails(*args):
        raise RuntimeError("[enforce fail at inline_container.cc] . file write failed")
    monkeypatch.setattr(torch, "save", fails)
    assert exit_code(save, run, 1) == 1 and "no earlier checkpoint" in capsys.readouterr().err

def test_an_old_attempt_that_wakes_up_in_a_background_save_touches_nothing(run, slow, capsys):
    folder = run.directory  # noqa: F811
    in_background(run, 1)
    mine = json.loads((folder / "lock.json").read_text())
    common.atomic_write(folder / "lock.json", json.dumps({**mine, "token": "the new one's"}))
    (folder / ".model_000001.pt.tmp-new").write_text("half")
    record = (folder / "phase.json").read_text()
    slow.set()
    assert exit_code(run.finish_save) == 1 and "lost the lock" in capsys.readouterr().err
    run.close(1, "lost")
    assert checkpoint.steps(folder) == [] and not list(folder.glob("model_*"))
    assert (folder / "phase.json").read_text() == record
    assert (folder / ".model_000001.pt.tmp-new").exists() and (folder / "lock.json").exists()

def test_weights_of_another_version_are_one_line(capsys):
    import gpt
    config = gpt.config_from_depth(1, 300, 64, "modern")
    state = gpt.GPT(config, torch.float32).state_dict()
    del state["smear_lambda"]
    build = exit_code(models.put_weights, gpt.GPT(config), state)
    said = capsys.readouterr().err
    assert build == 2 and "smear_lambda" in said and said.count("\n") == 1
    assert "the version that trained it" in said
