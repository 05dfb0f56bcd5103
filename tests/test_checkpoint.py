"""checkpoint.py: what is found whole, what a damaged file costs, what is kept and swept."""
import os

import pytest
import torch

import checkpoint

def tensors(value):
    return {"w": torch.full((1000,), float(value))}

def save(folder, step, keep=1, **more):
    checkpoint.save(folder, step, tensors(step), {"w": tensors(step)}, {"loss": 1.0}, keep, **more)

def test_it_is_loaded_as_it_was_saved(tmp_path):
    save(tmp_path, 3)
    assert checkpoint.newest(tmp_path) == 3 and checkpoint.problem(tmp_path, 3) is None
    model, optim, meta = checkpoint.load(tmp_path, 3)
    assert torch.equal(model["w"], tensors(3)["w"]) and torch.equal(optim["w"]["w"], model["w"])
    assert meta == {"loss": 1.0, "step": 3}
    assert checkpoint.load(tmp_path, 3, optimizer=False)[1] == {}

@pytest.mark.parametrize("damage,why", [
    (lambda f: os.truncate(f / "model_000002.pt", 700), "bytes, not"),
    (lambda f: (f / "optim_000002.pt").unlink(), "missing"),
    (lambda f: flip(f / "meta_000002.json", 80), "checksum"),
    (lambda f: (f / "manifest_000002.json").write_text("{"), "manifest")])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, why):
    save(tmp_path, 1, keep=2)
    save(tmp_path, 2, keep=2)
    assert checkpoint.newest(tmp_path) == 2
    damage(tmp_path)
    said = []
    assert checkpoint.newest(tmp_path, say=said.append) == 1 and why in said[0]
    model, _, meta = checkpoint.load(tmp_path, 1)
    assert torch.equal(model["w"], tensors(1)["w"]) and meta["step"] == 1

def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)

def test_a_bit_flipped_anywhere_is_found(tmp_path):
    save(tmp_path, 1, keep=2)
    save(tmp_path, 2, keep=2)
    for path in tmp_path.glob("*_000002*"):
        whole = path.read_bytes()
        every = 5 if "manifest" in path.name else len(whole) // 12
        for bit in range(0, 8 * len(whole), every):
            flip(path, bit)
            found = checkpoint.newest(tmp_path, say=lambda why: None)
            # a flip in the manifest may hit white space, or the case of a hexadecimal digit's name
            harmless = found == 2 and "manifest" in path.name
            assert found == 1 or (harmless and checkpoint.problem(tmp_path, 2) is None), path.name
            path.write_bytes(whole)

def test_who_needs_the_weights_alone_is_not_stopped_by_the_optimizer(tmp_path):
    save(tmp_path, 2)
    flip(tmp_path / "optim_000002.pt", 4000)
    assert checkpoint.newest(tmp_path, say=lambda why: None) is None
    assert checkpoint.newest(tmp_path, optimizer=False) == 2
    flip(tmp_path / "model_000002.pt", 4000)
    assert checkpoint.newest(tmp_path, optimizer=False, say=lambda why: None) is None

def test_a_meta_is_needed_once(tmp_path):
    save(tmp_path, 2)
    manifest = tmp_path / "manifest_000002.json"
    whole = manifest.read_text()
    (tmp_path / "meta_000002.json").unlink()
    assert checkpoint.newest(tmp_path, optimizer=False) == 2
    assert checkpoint.load(tmp_path, 2, optimizer=False)[2] == {"loss": 1.0, "step": 2}
    manifest.write_text(whole.replace('"loss": 1.0', '"loss": 9.0'))
    assert checkpoint.load_meta(tmp_path, 2) == {}, "a bit has flipped in the one that is left"
    assert checkpoint.newest(tmp_path, optimizer=False, say=lambda why: None) is None

def test_the_newest_are_kept_where_they_are_whole(tmp_path):
    for step in range(5):
        save(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [4, 3] and len(list(tmp_path.glob("*_0000*"))) == 8
    flip(tmp_path / "model_000004.pt", 4000)
    save(tmp_path, 5, keep=2)
    assert checkpoint.steps(tmp_path) == [5, 3], "a damaged one takes no place"

def test_what_deaths_in_a_save_have_left_is_swept(tmp_path):
    save(tmp_path, 1)
    left = ["model_000002.pt", ".optim_000002.pt.tmp-x", "meta_000002.json", ".partial_000002"]
    others = ["metrics.jsonl", "phase.json", "optim_000002_rank0.pt", ".lock.json.tmp-x",
              "model_000003.pt"]
    for name in left + others:
        (tmp_path / name).write_text("half")
    assert checkpoint.holds_any(tmp_path)
    checkpoint.sweep(tmp_path, lambda: False)
    assert all((tmp_path / name).exists() for name in left), "the lock is lost"
    checkpoint.sweep(tmp_path, lambda: True)
    assert checkpoint.newest(tmp_path) == 1
    assert {p.name for p in tmp_path.iterdir()} >= set(others)
    assert not any((tmp_path / name).exists() for name in left)

def test_a_death_at_any_rename_of_the_first_save_leaves_nothing_that_counts(tmp_path, monkeypatch):
    real, renamed = os.replace, []

    def dies(temporary, path):
        if len(renamed) == number:
            raise KeyboardInterrupt
        renamed.append(path.name)
        real(temporary, path)
    monkeypatch.setattr(os, "replace", dies)
    for number in range(5):
        renamed.clear()
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 7)
        assert list(tmp_path.iterdir()) and not checkpoint.holds_any(tmp_path), renamed
    assert renamed[-1] == "meta_000007.json", "only the manifest was missing"
    number = 9
    save(tmp_path, 7)
    assert checkpoint.newest(tmp_path) == 7 and len(list(tmp_path.iterdir())) == 4

def test_a_death_while_an_old_one_is_removed_leaves_nothing_for_good(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = checkpoint.Path.unlink

    def dies(path, **more):
        if path.name == "optim_000001.pt":
            raise KeyboardInterrupt
        real(path, **more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Path, "unlink", dies)
        save(tmp_path, 2)
    assert (tmp_path / "optim_000001.pt").exists() and checkpoint.newest(tmp_path) == 2
    save(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 4 and checkpoint.newest(tmp_path) == 3

def test_later_steps_and_files_that_have_lost_their_manifest_are_never_removed(tmp_path):
    save(tmp_path, 8, keep=2)
    save(tmp_path, 9, keep=2)
    (tmp_path / "manifest_000008.json").unlink()
    (tmp_path / "manifest_000009.json").write_text("{")
    for step in (3, 4):
        save(tmp_path, step)
    assert checkpoint.newest(tmp_path, say=lambda why: None) == 4
    assert (tmp_path / "model_000008.pt").exists() and (tmp_path / "model_000009.pt").exists()
    assert not (tmp_path / "model_000003.pt").exists()

def test_those_of_other_runs_are_never_removed(tmp_path):
    def save_of(depth, step):
        record = {"settings": {"depth": depth, "tag": f"d{step}"}, "inputs": {"data": "x"}}
        checkpoint.save(tmp_path, step, tensors(step), {}, {"record": record})
    for step in (500, 2, 9):
        save_of(5, step)
    (tmp_path / "manifest_000003.json").write_text((tmp_path / "manifest_000009.json").read_text())
    for step in (7, 8, 10):
        save_of(4, step)
    assert checkpoint.steps(tmp_path) == [500, 10, 9, 3], "8 goes for 10, 9 is another's"

def test_an_old_attempt_that_wakes_up_after_its_last_rename_removes_nothing(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".model_000003.pt.tmp-new").write_text("the new attempt's save in flight")
    save(tmp_path, 2, still_mine=lambda: not (tmp_path / "manifest_000002.json").exists())
    assert checkpoint.steps(tmp_path) == [2, 1] and checkpoint.problem(tmp_path, 1) is None
    assert (tmp_path / ".model_000003.pt.tmp-new").exists()

def test_bytes_that_read_back_other_than_written_are_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = checkpoint.common.sha256_file
    monkeypatch.setattr(checkpoint.common, "sha256_file",
                        lambda path: "0" * 64 if ".tmp" in str(path) else real(path))
    with pytest.raises(OSError, match="written to disk wrongly"):
        save(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == 1
