"""bands.py: the curves of three seeds as a band, and where another run is to it."""
import json
import sys
from types import SimpleNamespace

import pytest

import bands
import configurator
from conftest import REPO, alone, ends, script
from test_faults import BASE

def a_run(folder, seed, shift=0.0, status="done", **settings):
    folder.mkdir()
    lines = [{"kind": "train", "step": s, "loss": 5.0 - s / 20 + shift} for s in range(40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"phase": "base_train", "status": status, "step": 40, "commit": "c" * 40,
              "inputs": {"data": "d", "base": f"parent of {seed}"},
              "settings": {"depth": 2, "seed": seed, "tag": f"t{seed}", "data": f"/{seed}",
                           **settings}}
    (folder / "phase.json").write_text(json.dumps(record))
    return record

def test_three_seeds_make_a_band(tmp_path, monkeypatch):
    monkeypatch.setattr(bands, "PATH", tmp_path / "bands.json")
    bands.PATH.write_text("[]")
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        record = a_run(folder, seed, shift=0.1 * seed)
    monkeypatch.setattr(sys, "argv", ["bands.py", *map(str, folders)])
    bands.main()
    bands.main()
    band, = json.loads(bands.PATH.read_text())
    # the first two losses of the seeds: 4.975, 5.075, 5.175 in the mean; as far again on each side
    assert (band["low"][0], band["high"][0]) == (4.775, 5.375) and band["seeds"] == [0, 1, 2]
    assert bands.find(record) == band
    assert bands.find({**record, "settings": {**record["settings"], "seed": 9}}) == band
    assert bands.find({**record, "inputs": {"data": "other"}}) is None
    assert bands.find({**record, "settings": {**record["settings"], "depth": 3}}) is None
    assert bands.find({**record, "phase": "mid_train"}) is None and bands.find({}) is None
    for wrong in ({"status": "interrupted"}, {"depth": 3}):
        a_run(tmp_path / str(wrong), 3, **wrong)
        with ends() as end:
            bands.make([*folders[:2], tmp_path / str(wrong)])
        assert end.code == 2
    metrics = folders[2] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().partition("\n")[2])  # the first step is gone
    with ends() as end:
        bands.make(folders)
    assert end.code == 2

def test_parts_and_words():
    ended = {step: bands.part_ending(step, 600) for step in (0, 29, 30, 300, 600)}
    assert ended == {0: None, 29: None, 30: 1, 300: 10, 600: 20}
    ends = [step for step in range(1, 46) if bands.part_ending(step, 45)]
    assert len(ends) == 20 and ends[-1] == 45
    losses = dict(enumerate([4.0, 2.0, 3.0], 1))
    assert bands.mean_of(losses, 1, 40) == 3.0 and bands.mean_of(losses, 2, 40) is None
    band = {"low": [2.0], "high": [3.0]}
    assert bands.in_words(band, 1, 2.5) == (
        "loss 2.5000, within the band of three seeds (2.0000 to 3.0000)")
    assert bands.in_words(band, 1, 3.25).startswith("loss 3.2500, 0.2500 above the band")
    assert bands.in_words(band, 1, 1.75).startswith("loss 1.7500, 0.2500 below the band")

def test_a_training_says_where_it_is(tmp_path, monkeypatch):
    a_run(tmp_path / "run", 1)
    with open(tmp_path / "run/metrics.jsonl", "a") as f:
        f.write('{"kind": "train"}\n')  # a damaged line
    band = {"low": [4.0] * 20, "high": [9.0] * 20}
    monkeypatch.setattr(bands, "find", lambda record: band)
    run = alone()
    run.directory, run.clock = tmp_path / "run", SimpleNamespace(num_steps=40)
    said = {step: bands.look(run, step) for step in range(1, 41)}
    assert "within" in said[2] and "within" in said[10], "at the first part, and at a quarter"
    assert said[3] is said[4] is None, "else nothing where it is normal"
    off = [step for step, words in said.items() if words and "below the band" in words]
    assert off == list(range(22, 41, 2)), "but always where it is not: below 4.0"
    run.try_out = True
    assert bands.look(run, 2) is None

@pytest.mark.parametrize(("recipe", "phase"), [
    ("base", "base_train"), ("mid", "mid_train"), ("sft", "chat_sft")])
def test_the_toy_world_has_bands_of_today(recipe, phase):
    """Where a recipe changes, its band is to be made anew: python bands.py"""
    args = [f"{REPO}/config/toy_{recipe}.py", "--data=toy", *["--depth=2"] * (recipe == "base")]
    settings = configurator.read(REPO / f"{phase}.py", args).defining
    wanted = bands.what_decides({"settings": settings})["settings"]
    assert wanted in [band["settings"] for band in json.loads(bands.PATH.read_text())]

def test_a_run_of_the_band_says_so(prepared, tmp_path):
    """Through the real loop: three short seeds, their band, and a fourth."""
    base = [word for word in BASE if not word.startswith("--save_minutes")]
    for seed in (1, 2, 3):
        out = script(prepared, "base_train.py", *base, "--num_steps=20", f"--seed={seed}",
                     f"--tag=s{seed}")
        assert out.returncode == 0 and "band" not in out.stdout, out.stderr
    own = tmp_path / "bands.json"
    own.write_text("[]")

    def with_own_bands(name, *args):
        code = (f"import bands, pathlib, runpy, sys; bands.PATH = pathlib.Path({str(own)!r})\n"
                f"sys.argv = {[name, *map(str, args)]!r}\n"
                f"runpy.run_path({name!r}, run_name='__main__')")
        return script(prepared, "-c", code)
    folders = [prepared / f"toy/base_checkpoints/s{seed}" for seed in (1, 2, 3)]
    own.write_text(json.dumps([bands.make(folders)]))
    out = with_own_bands("base_train.py", *base, "--num_steps=20", "--seed=4", "--tag=s4")
    assert out.stdout.count("the band of three seeds") >= 5, out.stdout + out.stderr
