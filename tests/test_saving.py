"""Saving in the background: copies are taken at once, one save is in flight at most, and what goes wrong in the thread ends the phase."""
import json
import os
import threading
import time

import pytest
import torch

import checkpoint
import common
import phase
from test_phase import begin, exit_code, folder, save, tensors  # noqa: F401  (folder is a fixture)


def in_background(folder, step, weights=None, keep=1):
    checkpoint.save(folder, step, weights or tensors(step), {"w": tensors(step)}, {"loss": 1.0}, keep, wait=False)


@pytest.fixture
def slow(monkeypatch):
    """fsync waits until the event that is returned is set: the disk is slow."""
    go, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (go.wait(30) if threading.current_thread().name.startswith("save") else None, real(fd))[1])
    yield go
    go.set()
    checkpoint._save["thread"] and checkpoint._save["thread"].join()


def test_the_loop_goes_on_while_a_save_is_written_and_what_is_saved_is_of_the_moment(folder, slow):
    begin(folder)
    weights = tensors(1)
    in_background(folder, 1, weights)
    assert checkpoint._save["thread"].is_alive() and checkpoint.steps(folder) == []
    weights["w"].fill_(99.0)  # the next training step
    waited = []
    threading.Thread(target=lambda: (waited.append(checkpoint._save["thread"].is_alive()), slow.set())).start()
    in_background(folder, 2)  # waits for the first
    assert waited == [True]
    checkpoint.finish()
    assert checkpoint.newest(folder) == 2 and not list(folder.glob(".*.tmp*"))


def test_the_metrics_are_on_disk_before_the_checkpoint_counts(folder, monkeypatch):
    begin(folder)
    common.append_metrics(folder / "metrics.jsonl", {"step": 0})
    real, flushed = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), real(fd))[1])
    save(folder, 1)
    manifest = next(i for i, name in enumerate(flushed) if name.startswith(".manifest_"))
    assert "metrics.jsonl" in flushed[:manifest], flushed


def test_weights_of_another_version_are_one_line(capsys):
    import gpt
    config = gpt.config_from_depth(1, 300, 64, "modern")
    state = gpt.GPT(config, torch.float32).state_dict()
    del state["smear_lambda"]
    assert exit_code(checkpoint.build_model, {"model": vars(config)}, state, "cpu", torch.float32) == 2
    said = capsys.readouterr().err
    assert "smear_lambda" in said and "the version that trained it" in said and said.count("\n") == 1


def test_what_is_saved_is_of_the_moment(folder, slow):
    begin(folder)
    weights = tensors(1)
    in_background(folder, 1, weights)
    weights["w"].fill_(99.0)
    slow.set()
    checkpoint.finish()
    assert torch.equal(checkpoint.load(folder, 1)[0]["w"], tensors(1)["w"])


def test_the_lock_is_given_back_only_after_the_save_in_flight(folder, slow):
    begin(folder)
    in_background(folder, 1)
    threading.Timer(0.2, slow.set).start()
    with pytest.raises(SystemExit):
        common.fail("the loss became nan", code=1)
    assert checkpoint.newest(folder) == 1 and not (folder / "lock.json").exists(), "what was being saved is whole, and the lock is free"


@pytest.mark.parametrize("how", ["full", "read-only", "quota"])
def test_a_disk_that_fails_in_the_middle_of_a_background_save(folder, monkeypatch, capsys, how):
    begin(folder)
    save(folder, 1)
    number, text = {"full": (28, "No space left on device"), "read-only": (30, "Read-only file system"), "quota": (122, "Disk quota exceeded")}[how]
    real, calls = os.fsync, []
    def fsync(fd):
        calls.append(fd)
        if len(calls) == 2:  # the weights are on disk, the optimizer is not
            raise OSError(number, text)
        real(fd)
    monkeypatch.setattr(os, "fsync", fsync)
    in_background(folder, 2)
    phase.writer.join()
    monkeypatch.undo()
    assert checkpoint.save_failed() and len(calls) == 2
    assert exit_code(in_background, folder, 3) == 1
    said = capsys.readouterr().err
    assert text in said and "step 2" in said and "the checkpoint of step 1 is untouched" in said and said.count("\n") == 1
    assert checkpoint.newest(folder) == 1 and phase.read(folder)["status"] == "failed" and not list(folder.glob("*_000002*"))
    begin(folder)
    save(folder, 2)
    assert checkpoint.newest(folder) == 2


def test_torch_reports_a_failed_write_as_an_error_too(folder, monkeypatch, capsys):
    begin(folder)
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(RuntimeError("[enforce fail at inline_container.cc] . file write failed")))
    assert exit_code(save, folder, 1) == 1 and "nothing was saved before" in capsys.readouterr().err


def test_bytes_that_read_back_other_than_written_are_no_checkpoint(folder, monkeypatch, capsys):
    begin(folder)
    save(folder, 1)
    real = common.sha256_file
    monkeypatch.setattr(common, "sha256_file", lambda path: "0" * 64 if ".tmp" in str(path) else real(path))
    assert exit_code(save, folder, 2) == 1 and "reads back other" in capsys.readouterr().err and checkpoint.newest(folder) == 1


def test_an_old_life_that_wakes_up_in_the_middle_of_a_background_save_touches_nothing(folder, slow, capsys):
    begin(folder)
    in_background(folder, 1)
    mine = json.loads((folder / "lock.json").read_text())
    common.atomic_write(folder / "lock.json", json.dumps({**mine, "token": "the new life's"}))
    (folder / ".model_000001.pt.tmp-new-life").write_text("half")
    record = (folder / "phase.json").read_text()
    slow.set()
    assert exit_code(checkpoint.finish) == 1 and "lost the lock" in capsys.readouterr().err
    assert checkpoint.steps(folder) == [] and not list(folder.glob("model_*")) and (folder / "phase.json").read_text() == record
    assert (folder / ".model_000001.pt.tmp-new-life").exists() and (folder / "lock.json").exists()


def test_a_folder_that_cannot_be_written_is_one_line(folder, monkeypatch, capsys):
    def refuse(directory):
        raise OSError(30, "Read-only file system", str(directory))
    monkeypatch.setattr(phase, "take_lock", refuse)
    assert exit_code(begin, folder) == 2
    said = capsys.readouterr().err
    assert "Read-only" in said and "make it writable" in said and said.count("\n") == 1


def test_metrics_on_a_full_disk(tmp_path, capsys):
    assert exit_code(common.append_metrics, "/dev/full", {"step": 1}) == 1
    assert "No space left" in capsys.readouterr().err


def test_a_clock_that_is_set_back_does_not_put_off_a_save(monkeypatch):
    import training
    wall, running = [5000.0], [100.0]  # neither depends on this machine's pace
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "monotonic", lambda: running[0])
    training.start_clock(num_steps=10, step=0, spent=5.0, save_minutes=1.0)
    wall[0] -= 3600
    running[0] += 59
    assert not training.save_due() and training.spent() == 64.0
    running[0] += 2
    assert training.save_due() and training.spent() == 66.0
    training.saved(running[0] - 1)
    assert not training.save_due() and 0.0 < training.save_share() < 1.0
