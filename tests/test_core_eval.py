"""core_eval.py: prompts by hand, batched verdicts against one row at a time, and nanochat's own outcomes item by item."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import core_eval
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
    one, two = core_eval.read_core_yaml(tmp_path / "core.yaml")
    assert (one["label"], one["uri"], one["shots"], one["kind"], one["delimiter"]) == ("one", "a/one.jsonl", 10, "language_modeling", "\nAnswer: ")
    assert (two["label"], two["shots"], two["kind"], two["delimiter"]) == ("two", 0, "schema", " ")
    (tmp_path / "core.yaml").write_text(YAML + "what: {is: this}\n")
    with pytest.raises(SystemExit):
        core_eval.read_core_yaml(tmp_path / "core.yaml")


def task(kind, items, shots=0, delimiter=" "):
    return {"label": "t", "kind": kind, "shots": shots, "delimiter": delimiter, "items": items}


def test_prompts_by_hand():
    items = [{"query": f"q{i}", "choices": ["yes", "no"], "gold": i % 2} for i in range(3)]
    first, second = core_eval.prompts(task("multiple_choice", items, 2, "\nAnswer: "), 0)
    assert sorted(first.split("\n\n")[:2]) == ["q1\nAnswer: no", "q2\nAnswer: yes"] and first.endswith("\n\nq0\nAnswer: yes") and second.endswith("q0\nAnswer: no")
    assert core_eval.prompts(task("schema", [{"context_options": ["he", "she"], "continuation": "runs", "gold": 0}]), 0) == ["he runs", "she runs"]
    assert core_eval.prompts(task("language_modeling", [{"context": " a b ", "continuation": "c"}, {"context": "x", "continuation": "y"}], 1), 0) == ["x y\n\na b", "x y\n\na b c"]


def random_tasks(n):
    draw = np.random.default_rng(0)
    text = lambda k: "".join(chr(97 + c) for c in draw.integers(0, 6, k))
    multiple = [{"query": text(draw.integers(1, 60)), "choices": [text(draw.integers(1, 9)) for _ in range(4)], "gold": int(draw.integers(4))} for _ in range(n)]
    multiple += [{"query": "same", "choices": ["tie", "tie", "other"], "gold": 0}, {"query": "prefix", "choices": ["ab", "abc", "abcd"], "gold": 1},
                 {"query": "empty", "choices": ["", "abc"], "gold": 0}, {"query": "empty", "choices": ["abc", ""], "gold": 1}]
    schema = [{"context_options": [text(draw.integers(1, 30)) for _ in range(2)], "continuation": text(5), "gold": int(draw.integers(2))} for _ in range(n)]
    modelling = [{"context": text(draw.integers(1, 60)), "continuation": text(1)} for _ in range(n)]
    return [task("multiple_choice", multiple, 2), task("schema", schema), task("language_modeling", modelling, 1)]


@torch.inference_mode()
def plain_verdict(model, one, number, longest):
    """The evaluator as nanochat states it, one row at a time: crop from the left, mean loss, the first of the smallest."""
    rows = [[BYTES.bos, *BYTES.encode(p)] for p in core_eval.prompts(one, number)]
    common_prefix = lambda rs: next((i for i in range(min(map(len, rs))) if len({r[i] for r in rs}) > 1), min(map(len, rs)))
    if one["kind"] == "language_modeling":
        spans = [(rows[1], len(rows[0]))]
    elif one["kind"] == "multiple_choice":
        spans = [(r, common_prefix(rows)) for r in rows]
    else:
        spans = [(r, len(r) - common_prefix([r[::-1] for r in rows])) for r in rows]
    means = []
    for ids, start in spans:
        cut = max(0, len(ids) - longest)
        ids, start = ids[cut:], max(start - cut, 1)
        logits = model(torch.tensor([ids]))[0, start - 1:len(ids) - 1]
        target = torch.tensor(ids[start:])
        if one["kind"] == "language_modeling":
            return bool((logits.argmax(-1) == target).all())
        means.append(F.cross_entropy(logits, target, reduction="none").mean().item())
    return means.index(min(means)) == one["items"][number]["gold"]


@pytest.mark.parametrize("longest,budget", [(2048, 1e9), (2048, 1e6), (40, 1e9)])
def test_batched_verdicts_equal_one_row_at_a_time(longest, budget):
    model = gpt.GPT(gpt.GPTConfig(64, BYTES.vocab_size, 2, 2, 2, 64))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.15, generator=generator)
    verdicts = []
    for one in random_tasks(60):
        numbers = range(len(one["items"]))
        ours = core_eval.evaluate(model, BYTES, one, numbers, longest, budget)
        assert ours == [plain_verdict(model, one, n, longest) for n in numbers], one["kind"]
        verdicts += ours
    assert 20 < sum(verdicts) < len(verdicts) - 20, "both verdicts must occur for the comparison to mean anything"


@pytest.mark.skipif(not (SHARED / "nanochat_checkpoint").exists(), reason="no nanochat checkpoint at hand (NANOCHAT_TEST_DATA)")
def test_outcomes_equal_nanochats_item_by_item(tmp_path):
    folder = SHARED / "nanochat_checkpoint"
    (tmp_path / "tokenizer.pkl").write_bytes((folder / "tokenizer/tokenizer.pkl").read_bytes())
    tokenizer = tok.load_tokenizer(tmp_path)
    model = gpt.GPT(gpt.GPTConfig(256, 4096, 4, 2, 2, 256, "nanochat_2025"))
    model.load_state_dict(torch.load(folder / "base_checkpoints/d4/model_000400.pt", map_location="cpu", weights_only=True))
    expected = json.loads((folder / "core_expected.json").read_text())
    per_task = int(os.environ.get("CORE_ITEMS", 2))
    tasks, missing = core_eval.read_bundle(SHARED / "eval_bundle")[:2]
    assert len(tasks) == 22 and not missing
    compared, different = 0, []
    for one in tasks:
        wanted = expected["tasks"][one["label"]]
        numbers = list(range(wanted["first"], wanted["first"] + min(per_task, len(wanted["correct"]))))
        outcomes = core_eval.evaluate(model, tokenizer, one, numbers, expected["max_seq_len"], 1e9, 2)
        compared += len(outcomes)
        different += [(one["label"], i) for i, ours, theirs in zip(numbers, outcomes, wanted["correct"]) if ours != theirs]
    assert compared == 22 * per_task and not different, different
