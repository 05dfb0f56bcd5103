"""evaluation.py: pieces that are kept, an evaluation that dies or is stopped, and intervals against Wilson's by hand."""
import json

import pytest

import evaluation
import status
from conftest import script

SCRIPT = """
import os, signal, sys, common
common.install_stop_handlers()
import evaluation
compute, kept = evaluation.begin(common.Path(sys.argv[1]), {"weights": "w"}, {"device": "cpu", "dtype": sys.argv[2], "threads": 1, "compile": False})
print("kept", kept)
if "a" not in kept:
    evaluation.keep("a", [True, False])
if sys.argv[3] == "raise":
    raise ValueError("the reason why")
if sys.argv[3] == "stop":
    os.kill(os.getpid(), signal.SIGTERM)
    evaluation.keep("b", None)
evaluation.keep("b", 2)
evaluation.done(results=kept)
"""

def test_a_death_is_named_and_a_stop_continues_and_another_dtype_is_measured_anew(state):
    path = state / "report" / "chat_sft_d4.json"
    def run(dtype, what):
        out = script(state, "-c", SCRIPT, path, dtype, what)
        return out.returncode, out.stdout, status.describe_eval(path, state / "none")
    code, out, (word, words) = run("float32", "raise")
    assert code == 1 and "kept {}" in out and word == "failed" and words.endswith("ago: ValueError: the reason why")
    code, out, (word, words) = run("auto", "stop")
    assert code == 75 and "kept {'a': [True, False]}" in out and word == "half" and "signal SIGTERM; the 1 pieces" in words
    with open(path.with_suffix(".partial.jsonl"), "a") as f:
        f.write('{"piece": "b", "val')  # as a death in the middle of a line leaves it
    code, out, (word, _) = run("auto", "finish")
    assert code == 0 and "kept {'a': [True, False]}" in out and word == "done"
    result = json.loads(path.read_text())
    assert result["results"] == {"a": [True, False], "b": 2} and result["chosen"]["dtype"] == "float32", "what the first start chose"
    assert not path.with_suffix(".partial.jsonl").exists()
    assert "done already" in run("auto", "finish")[1] and "done already" in run("float32", "finish")[1]
    code, out, _ = run("bfloat16", "raise")
    assert code == 1 and "kept {}" in out
    code, out, _ = run("float32", "stop")
    assert code == 0 and "done already" in out, "the result of before is there still"
    path.unlink()
    code, out, _ = run("float32", "finish")
    assert code == 0 and "is dropped: dtype" in out and "kept {}" in out

@pytest.mark.parametrize("right,n,low,high", [(5, 10, 0.237, 0.763), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (560, 1000, 0.529, 0.590)])
def test_intervals_as_in_wilsons_tables(right, n, low, high):
    r = evaluation.score([True] * right + [False] * (n - right), 0.25)
    assert (r["low"], r["high"]) == pytest.approx((low, high), abs=1e-3) and r["n"] == n
    assert r["centred"] == pytest.approx((right / n - 0.25) / 0.75)
