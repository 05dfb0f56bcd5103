"""chat_rl.py: what a sample is worth, which of its tokens are trained on, pass@k, and a reward that
says nothing."""
import json

import pytest

import common
import pipeline
from conftest import script
from records import load_record
from test_cli import make

# Every answer is two tokens of the model's own, two that the calculator forced, one of its own; the
# rewards are a list.
PLAY = """
import json, runpy, sys
sys.path.insert(0, ".")
import engine, gpt, tasks
answer = [65, 66, 67, 68, 69], [False, False, True, True, False]
engine.generate = lambda model, tokenizer, prompts, *args, **kwargs: [answer for _ in prompts]
rewards = iter(REWARDS)
tasks.correct = lambda item, text: next(rewards)
real, weights = gpt.GPT.forward, []
def forward(self, *args, **kwargs):
    loss = real(self, *args, **kwargs)
    loss.register_hook(lambda g: weights.extend((g * kwargs["weights"]).tolist()))
    return loss
gpt.GPT.forward = forward
sys.argv = ["chat_rl.py", "--data=toy", "--num_steps=21", "--problems_per_step=1", "--samples=4",
            "--max_new_tokens=8", "--eval_every=0", "--eval_problems=2", "--eval_samples=2",
            "--device=cpu", "--dtype=float32", "--threads=1"]
try:
    runpy.run_path("chat_rl.py", run_name="__main__")
finally:
    print("weights:", json.dumps(weights))
"""

def test_a_problem_that_comes_twice_in_a_step_is_sampled_anew(state):
    make("sft")
    for split in ("train", "test"):
        lines = [json.dumps({"question": f"{i}+1?", "answer": f"#### {i + 1}"}) + "\n"
                 for i in range(2)]
        common.atomic_write(pipeline.task_dir("toy") / f"gsm8k_{split}.jsonl", "".join(lines))
    play = PLAY.replace("REWARDS", "[0] * 99").replace("num_steps=21", "num_steps=1").replace(
        "problems_per_step=1", "problems_per_step=4").replace("engine.generate = lambda", """
drawn = {}
def generate(model, tokenizer, prompts, *args, uniforms, **kwargs):
    for prompt, row in zip(prompts, uniforms, strict=True):
        drawn.setdefault((len(prompts), tuple(prompt)), []).append(tuple(row))
    return [answer for _ in prompts]
engine.generate = generate
unused = lambda""").replace('"weights:", json.dumps(weights)',
                           '"draws:", [(len(d), len(set(d))) for (n, _), d in drawn.items() '
                           'if n == 16]')
    out = script(state, "-c", play)
    assert "draws: [(8, 8), (8, 8)]" in out.stdout, out.stdout + out.stderr

def test_the_advantage_is_reward_less_mean_over_the_models_own_tokens_alone(state):
    make("sft")
    problem = json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n"
    for split in ("train", "test"):
        common.atomic_write(pipeline.task_dir("toy") / f"gsm8k_{split}.jsonl", 2 * problem)
    rewards = [1, 0, 0, 0] + 20 * [0, 0, 0, 0] + [1, 0, 0, 0]
    out = script(state, "-c", PLAY.replace("REWARDS", repr(rewards)))
    assert out.returncode == 0, out.stdout + out.stderr
    weights = json.loads(out.stdout.split("weights:")[1])
    assert len(weights) == 4, "a step whose rewards are all the same has nothing to train on"
    for row, advantage in zip(weights, [0.75, -0.25, -0.25, -0.25], strict=True):
        a = pytest.approx(advantage / 12)  # four samples with three tokens of the model's own
        assert row[-5:] == [a, a, 0, 0, a], "what was forced is not trained on"
        assert not any(row[:-5]), "the prompt is not trained on"
    assert "no variance for 20 steps (mean 0.000)" in out.stdout
    assert "pass@1 0.250, pass@2 0.500" in out.stdout
    record = load_record(pipeline.state_path("rl", "toy", "d1"))
    assert record["status"] == "done" and record["pass_at"] == {"1": 0.25, "2": 0.5}
