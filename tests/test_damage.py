"""Some small damages to a user's files and to a state folder; python tests/fuzz_damage.py
--cases=300 tries many. The judge is tried on broken rules first, see fuzz_damage.BREAKS."""
from conftest import REPO, script

def test_no_small_damage_costs_a_good_file_or_is_trained_on_in_silence(tmp_path):
    out = script(tmp_path, REPO / "tests/fuzz_damage.py", "--cases=30", "--seed=1",
                 f"--folder={tmp_path}", timeout=600)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "30 cases in" in out.stdout
