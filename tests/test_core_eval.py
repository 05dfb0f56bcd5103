"""base_eval.py: prompts by hand, batched scores against one row at a time, and nanochat's own outcomes item by item."""
import json
import os
from pathlib import Path

import pytest
import torch

import base_eval
import gpt
import tokenizer as tok

torch.set_num_threads(2)
SHARED = Path(os.environ.get("NANOCHAT_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
BYTES = tok.Tokenizer({bytes([i]): i for i in range(256)})
YAML = """icl_tasks:
-
  label: one
  dataset_uri: a/one.jsonl
  num_fewshot: [10]
  icl_task_type: language_modeling
  continuation_delimiter: "\\nAnswer: "
  has_categories: true
-
  label: two
  dataset_uri: two.jsonl
  num_fewshot: [0]
  icl_task_type: schema
"""


def test_the_yaml_of_the_bundle(tmp_path):
    (tmp_path / "core.yaml").write_text(YAML)
    assert base_eval.read_core_yaml(tmp_path / "core.yaml") == [
        {"label": "one", "dataset_uri": "a/one.jsonl", "num_fewshot": [10], "icl_task_type": "language_modeling", "continuation_delimiter": "\nAnswer: ", "has_categories": True},
        {"label": "two", "dataset_uri": "two.jsonl", "num_fewshot": [0], "icl_task_type": "schema"}]
    (tmp_path / "core.yaml").write_text(YAML + "what: {is: this}\n")
    with pytest.raises(SystemExit):
        base_eval.read_core_yaml(tmp_path / "core.yaml")


def task(kind, shots=0, between=" "):
    return {"icl_task_type": kind, "num_fewshot": [shots], "continuation_delimiter": between}


def test_prompts_by_hand():
    items = [{"query": f"q{i}", "choices": ["yes", "no"], "gold": i % 2} for i in range(3)]
    first, second = base_eval.render(task("multiple_choice", 2, "\nAnswer: "), items, 0)
    assert sorted(first.split("\n\n")[:2]) == ["q1\nAnswer: no", "q2\nAnswer: yes"] and first.endswith("\n\nq0\nAnswer: yes") and second.endswith("q0\nAnswer: no")
    assert base_eval.render(task("schema"), [{"context_options": ["he", "she"], "continuation": "runs", "gold": 0}], 0) == ["he runs", "she runs"]
    items = [{"context": " a b ", "continuation": "c"}, {"context": "x", "continuation": "y"}]
    assert base_eval.render(task("language_modeling", 1), items, 0) == ["x y\n\na b", "x y\n\na b c"]


def random_items(n):
    import numpy as np
    draw = np.random.default_rng(0)
    text = lambda k: "".join(chr(97 + c) for c in draw.integers(0, 6, k))
    multiple = [{"query": text(draw.integers(1, 60)), "choices": [text(draw.integers(1, 9)) for _ in range(4)], "gold": int(draw.integers(4))} for _ in range(n)]
    multiple += [{"query": "same", "choices": ["tie", "tie", "other"], "gold": 0}, {"query": "prefix", "choices": ["ab", "abc", "abcd"], "gold": 1}]
    schema = [{"context_options": [text(draw.integers(1, 30)) for _ in range(2)], "continuation": text(5), "gold": 0} for _ in range(n)]
    modelling = [{"context": text(draw.integers(1, 60)), "continuation": text(2)} for _ in range(n)]
    return [(task("multiple_choice", 2), multiple), (task("schema"), schema), (task("language_modeling", 1), modelling)]


@pytest.mark.parametrize("longest", [2048, 40])
def test_batched_scores_equal_one_row_at_a_time(longest):
    model = gpt.GPT(gpt.GPTConfig(64, BYTES.vocab_size, 2, 2, 2, 64))
    model.init_weights(0)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.15, generator=torch.Generator().manual_seed(3))
    for one, items in random_items(40):
        rows = [base_eval.to_rows(one, items, i, BYTES, longest) for i in range(len(items))]
        for item, item_rows, scored in zip(items, rows, base_eval.score(model, rows, 700)):
            for (ids, start, end), (losses, hit) in zip(item_rows, scored):
                with torch.inference_mode():
                    logits = model(torch.tensor([ids]))[0, start - 1:end - 1]
                expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:end]), reduction="none")
                torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
                assert hit == (logits.argmax(-1) == torch.tensor(ids[start:end])).all()
            assert isinstance(base_eval.outcome(one, {**item, "gold": item.get("gold")}, scored), bool)


def test_ties_and_empty_continuations_are_decided_as_nanochat_does():
    losses = lambda *x: (torch.tensor(x), True)
    assert base_eval.outcome(task("multiple_choice"), {"gold": 0}, [losses(1.0), losses(1.0)]), "the first of equal ones"
    assert base_eval.outcome(task("multiple_choice"), {"gold": 0}, [losses(), losses(1.0)]), "min() stays with a nan in front"
    assert not base_eval.outcome(task("multiple_choice"), {"gold": 1}, [losses(1.0), losses()])


@pytest.mark.skipif(not (SHARED / "nanochat_checkpoint").exists(), reason="no nanochat checkpoint at hand (NANOCHAT_TEST_DATA)")
def test_outcomes_equal_nanochats_item_by_item(tmp_path):
    folder = SHARED / "nanochat_checkpoint"
    (tmp_path / "tokenizer.pkl").write_bytes((folder / "tokenizer/tokenizer.pkl").read_bytes())
    tokenizer = tok.load_tokenizer(tmp_path)
    model = gpt.GPT(gpt.GPTConfig(256, 4096, 4, 2, 2, 256, "nanochat_2025"))
    model.load_state_dict(torch.load(folder / "base_checkpoints/d4/model_000400.pt", map_location="cpu", weights_only=True))
    expected = json.loads((folder / "core_expected.json").read_text())
    per_task = int(os.environ.get("CORE_ITEMS", 3))
    tasks, missing = base_eval.read_bundle(SHARED / "eval_bundle", None)
    assert len(tasks) == 22 and not missing
    compared, different = 0, []
    for one in tasks:
        wanted = expected["tasks"][one["label"]]
        items = base_eval.read_items(SHARED / "eval_bundle/eval_data" / one["dataset_uri"])
        numbers = list(range(wanted["first"], wanted["first"] + min(per_task, len(wanted["correct"]))))
        scored = base_eval.score(model, [base_eval.to_rows(one, items, i, tokenizer, expected["max_seq_len"]) for i in numbers], 16384)
        outcomes = [base_eval.outcome(one, items[i], s) for i, s in zip(numbers, scored)]
        compared += len(outcomes)
        different += [(one["label"], i) for i, ours, theirs in zip(numbers, outcomes, wanted["correct"]) if ours != theirs]
    assert compared == 22 * per_task and not different, different
