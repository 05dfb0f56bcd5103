"""A handful of kills of the small pipeline; python tests/chaos.py --kills=200 makes many."""
import chaos
from conftest import needs_venv

@needs_venv
def test_a_pipeline_killed_at_random_instants_ends_bit_for_bit_as_an_undisturbed_one(tmp_path):
    # all phases are in the long run
    quick = ["--skip-mid-eval", "--skip-sft-eval", "--skip-rl", "--skip-rl-eval"]
    table = chaos.chaos(kills=5, seed=4, folder=tmp_path, flags=quick)
    assert table.total() == 5
