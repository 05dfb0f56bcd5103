"""A handful of kills of the small pipeline; python tests/chaos.py --kills=200 makes as many as one likes."""
import pytest

import chaos
from conftest import REPO


@pytest.mark.skipif(not (REPO / ".venv/matches").exists(), reason="speedrun.sh would install .venv; tests/run.sh makes it first")
def test_a_pipeline_that_is_killed_at_random_instants_ends_bit_for_bit_as_one_that_nobody_disturbed(tmp_path, monkeypatch):
    quick = ["--skip-trial", "--skip-mid-eval", "--skip-sft-eval", "--skip-rl", "--skip-rl-eval"]  # all of them are in the long run
    monkeypatch.setattr(chaos, "COMMAND", [*chaos.COMMAND[:4], *quick, *chaos.COMMAND[4:]])
    table = chaos.chaos(kills=5, seed=4, folder=tmp_path)
    assert sum(table.values()) == 5
