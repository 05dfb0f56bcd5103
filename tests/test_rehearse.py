"""rehearse.py: that it really stops, kills and goes on, and that it notices what must not be."""
import os
import re
import subprocess
import sys
from pathlib import Path

import rehearse
from conftest import REPO, environment, needs_venv, script

PATH = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

SHORT = """
import runpy, sys
sys.path.insert(0, ".")
sys.argv = ["rehearse.py", "--nproc=1"]
import rehearse
rehearse.STEPS, rehearse.TRAINING[-1] = 30, "--num_steps=30"
sys.exit(rehearse.main())
"""
# another last bit where a training goes on
CHANGED = """
import sys
if any(word.endswith("base_train.py") for word in sys.orig_argv):
    sys.path.insert(0, ".")
    import checkpoint
    load = checkpoint.load
    def changed(*args, **more):
        weights, *others = load(*args, **more)
        weights["lm_head.weight"] = weights["lm_head.weight"] * 1.001
        return weights, *others
    checkpoint.load = changed
"""

def test_a_machine_that_works(tmp_path):
    out = script(tmp_path, "-c", SHORT, env=PATH)
    assert out.stdout.endswith("your site: works\n"), out.stdout + out.stderr
    assert out.returncode == 0
    assert out.stdout.count("\nok ") == 7 and "MISSING" not in out.stdout
    stopped, killed = (int(re.search(words, out.stdout)[1]) for words in
                       (r"a time limit: saved at step (\d+) and", r"SIGKILL after step (\d+): not"))
    assert 0 <= stopped < killed < 30, "each fault came in the middle"
    assert "31 lines of metrics are equal, bit for bit" in out.stdout
    assert not list(tmp_path.glob("rehearsal-*"))

def test_one_that_goes_on_with_other_bits(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(CHANGED)
    out = script(tmp_path / "state", "-c", SHORT, env={"PYTHONPATH": str(tmp_path), **PATH})
    assert out.returncode == 1, out.stdout + out.stderr
    assert re.search(r"your site: 1 missing: compare: the bits of .*model_000030.pt", out.stdout)
    assert list((tmp_path / "state").glob("rehearsal-*/log.txt")), "to look at"
    said = script(tmp_path / "state", "status.py").stdout
    assert said.startswith("nothing in"), "it is no data set"
    assert script(tmp_path / "state", "rehearse.py", "--dry-run").returncode == 2

def test_all_processes_can_share_its_batch(monkeypatch):
    monkeypatch.setattr(rehearse, "IN_JOB", ["--slurm"])
    for nproc, nodes, rows in ((1, 1, 8), (3, 1, 6), (8, 1, 8), (8, 2, 16), (4, 3, 12)):
        monkeypatch.setattr(rehearse, "FLAGS", [f"--nproc={nproc}"])
        monkeypatch.setenv("SLURM_NNODES", str(nodes))
        assert rehearse.tokens_a_step() == 128 * rows and rows % (nproc * nodes) == 0

@needs_venv
def test_one_whose_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    out = subprocess.run(["bash", "speedrun.sh", "--rehearse"], cwd=REPO, text=True, check=False,
                         capture_output=True, env=environment(tmp_path / "file/state"))
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and "could not write" in out.stderr
