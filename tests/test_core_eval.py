"""core_eval.py and base_eval.py: CORE as nanochat scores it, bits per byte, and an evaluation that
is interrupted."""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys

import pytest
import torch

import common
import core_eval
import data as dataset
import pipeline
import tokenizer as tok
import training
from conftest import (
    BYTES,
    REPO,
    SHARED,
    alone,
    ends,
    environment,
    nanochats_own,
    needs_nanochat,
    random_model,
    save_model,
    script,
    wait_for,
)
from test_gpt import NoFloat64

torch.set_num_threads(1)
BUNDLE = SHARED / "eval_bundle"
needs_bundle = pytest.mark.skipif(
    not BUNDLE.exists(), reason="no CORE bundle at hand (NANOCHAT_TEST_DATA)")

def small():
    return random_model(64, BYTES.vocab_size, 2, 2, 1, 64)

def a_task(kind, items, shots=0, delimiter=" "):
    return {"label": kind, "kind": kind, "shots": shots, "delimiter": delimiter, "items": items,
            "baseline": 25.0}

# --------------------------------------------------------------------------------------------------
# the bundle

@needs_bundle
def test_the_real_bundle():
    tasks, missing, digest = core_eval.read_bundle(BUNDLE)
    assert len(tasks) == 22 and not missing and len(digest) == 16
    by_label = {t["label"]: t for t in tasks}
    assert sum(t["kind"] == "schema" for t in tasks) == 2
    assert sum(t["kind"] == "language_modeling" for t in tasks) == 9
    jeopardy = by_label["jeopardy"]
    assert (jeopardy["shots"], jeopardy["delimiter"]) == (10, "\nAnswer: ")
    assert jeopardy["baseline"] == 0.0 and by_label["boolq"]["baseline"] == 62.0
    assert by_label["hellaswag_zeroshot"]["delimiter"] == " "
    assert by_label["hellaswag"]["items"] is by_label["hellaswag_zeroshot"]["items"]
    assert len(by_label["hellaswag"]["items"]) == 10042

YAML = """# tasks
icl_tasks:
-
  label: one
  dataset_uri: a/one.jsonl
  num_fewshot: [10]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
  has_categories: true

- label: two
  dataset_uri: two.jsonl
  num_fewshot: [0]
  icl_task_type: schema
"""

def test_core_yaml_by_hand(tmp_path):
    (tmp_path / "core.yaml").write_text(YAML)
    assert core_eval.read_core_yaml(tmp_path / "core.yaml") == [
        {"label": "one", "uri": "a/one.jsonl", "kind": "multiple_choice", "shots": 10,
         "delimiter": "\nAnswer: "},
        {"label": "two", "uri": "two.jsonl", "kind": "schema", "shots": 0, "delimiter": " "}]

@pytest.mark.parametrize("old,new,place", [
    ("  label: one\n", "", ":3: "),
    ("  dataset_uri: two.jsonl\n", "", ":11: "),
    ("  num_fewshot: [10]\n", "", ":3: "),
    ("  num_fewshot: [10]", "  num_fewshot: [-1]", ":3: "),
    ("  num_fewshot: [0]", "  num_fewshot: [many]", ":11: "),
    ("multiple_choice", "essay", ":3: "),
    ('"\\nAnswer: "', "Answer", ":3: "),
    ('"\\nAnswer: "', '"\\q"', ":3: "),
    ('"\\nAnswer: "', '"never ended', ":3: "),
    (YAML, "icl_tasks:\n", " has no tasks")])
def test_a_core_yaml_without_what_a_task_needs_names_the_place(tmp_path, capsys, old, new, place):
    (tmp_path / "core.yaml").write_text(YAML.replace(old, new, 1))
    with ends() as e:
        core_eval.read_core_yaml(tmp_path / "core.yaml")
    error = capsys.readouterr().err
    assert e.code == 2 and f"core.yaml{place}" in error and error.count("\n") == 1

def write_bundle(folder, tasks):
    """tasks {label: (kind, shots, items or None for no file)}"""
    yaml, table = "icl_tasks:\n", "Eval Task,Task Category,Random baseline\n"
    for label, (kind, shots, items) in tasks.items():
        yaml += f"-\n  label: {label}\n  dataset_uri: some/{label}.jsonl\n"
        yaml += f"  num_fewshot: [{shots}]\n  icl_task_type: {kind}\n"
        table += f'{label},"a, b",{25 if kind == "multiple_choice" else 0}\n'
        if items is not None:
            lines = "".join(json.dumps(i) + "\n" for i in items)
            common.atomic_write(folder / "eval_data" / "some" / f"{label}.jsonl", lines)
    common.atomic_write(folder / "core.yaml", yaml)
    common.atomic_write(folder / "eval_meta_data.csv", table)

LM = [{"context": f"say {i} ", "continuation": f"{i}"} for i in range(5)]

@pytest.mark.parametrize("items,shots", [([], 0), (LM[:3], 3), (LM, 10)])
def test_a_task_with_fewer_items_than_are_shown_is_refused(tmp_path, capsys, items, shots):
    write_bundle(tmp_path, {"say": ("language_modeling", shots, items)})
    with ends() as e:
        core_eval.read_bundle(tmp_path)
    error = capsys.readouterr().err
    assert e.code == 2 and f"say.jsonl has {len(items)} items, expected more than" in error
    write_bundle(tmp_path, {"say": ("language_modeling", len(LM) - 1, LM)})
    core_eval.read_items.cache_clear()
    assert len(core_eval.read_bundle(tmp_path)[0][0]["items"]) == len(LM)

def test_a_missing_task_is_named_and_there_is_no_core(tmp_path):
    write_bundle(tmp_path, {"here": ("language_modeling", 2, LM),
                            "gone": ("language_modeling", 0, None)})
    tasks, missing, _ = core_eval.read_bundle(tmp_path)
    assert [t["label"] for t in tasks] == ["here"] and missing == ["gone"]
    shuffled = list("01234")
    random.Random(1337).shuffle(shuffled)
    assert [i["continuation"] for i in tasks[0]["items"]] == shuffled
    full = {"here": core_eval.summary(tasks[0], [True] * 5)}
    part = {"here": core_eval.summary(tasks[0], [True])}
    assert core_eval.core_of(full, missing) == (None, "tasks without their file: gone")
    assert core_eval.core_of(full, []) == (1.0, None)
    assert core_eval.core_of(part, []) == (None, "1 tasks measured in part")
    assert core_eval.core_of({}, []) == (None, "nothing measured")

def test_half_of_a_public_test_set_is_no_core():
    """Where the bundle's own file holds a part, as some that people pass on do."""
    half = core_eval.summary({**a_task("language_modeling", LM), "label": "squad"}, [True] * 5)
    assert half["of"] == 10570
    assert core_eval.core_of({"squad": half}, []) == (None, "1 tasks measured in part")

@pytest.mark.parametrize("kind,good,broken", [
    ("language_modeling", LM[0], {"context": "a"}),
    ("language_modeling", LM[0], {"context": 1, "continuation": "b"}),
    ("multiple_choice", {"query": "a", "choices": ["b"], "gold": 0},
     {"query": "a", "choices": ["b"]}),
    ("multiple_choice", {"query": "a", "choices": ["b"], "gold": 0},
     {"query": "a", "choices": ["b", 1], "gold": 0}),
    ("schema", {"context_options": ["a"], "continuation": "b", "gold": 0},
     {"context_options": ["a"], "continuation": "b", "gold": 1}),
    ("schema", {"context_options": ["a"], "continuation": "b", "gold": 0}, [])])
def test_a_broken_item_is_named(tmp_path, capsys, kind, good, broken):
    write_bundle(tmp_path, {"here": (kind, 0, [good, broken])})
    with ends() as e:
        core_eval.read_bundle(tmp_path)
    error = capsys.readouterr().err
    assert e.code == 2 and "here.jsonl:2 is not" in error and error.count("\n") == 1

def test_centred_by_hand():
    r = core_eval.summary(a_task("multiple_choice", LM), [True, False, True, False])
    assert r["accuracy"] == 0.5 and r["centred"] == pytest.approx(1 / 3)
    assert (r["n"], r["of"]) == (4, 5) and r["chance"] == 0.25
    assert (r["low"], r["high"]) == pytest.approx((0.150, 0.850), abs=1e-3)

# --------------------------------------------------------------------------------------------------
# prompts and rows

def test_prompts_by_hand():
    choices = [{"query": "1+1", "choices": ["2", "3"], "gold": 0},
               {"query": "2+2", "choices": ["4", " 5"], "gold": 1}]
    task = a_task("multiple_choice", choices, 1, "=")
    assert core_eval.prompts(task, 1) == ["1+1=2\n\n2+2=4", "1+1=2\n\n2+2= 5"]
    assert core_eval.prompts(a_task("multiple_choice", choices), 0) == ["1+1 2", "1+1 3"]
    contexts = [{"context_options": ["Ann", "Bob"], "continuation": "ran.", "gold": 1},
                {"context_options": ["He", "She"], "continuation": "sat.", "gold": 0}]
    task = a_task("schema", contexts, 1)
    assert core_eval.prompts(task, 1) == ["Bob ran.\n\nHe sat.", "Bob ran.\n\nShe sat."]
    texts = [{"context": " sky: \n", "continuation": "blue "},
             {"context": "grass:", "continuation": "green"}]
    task = a_task("language_modeling", texts, 1)
    assert core_eval.prompts(task, 1) == ["sky: blue \n\ngrass:", "sky: blue \n\ngrass: green"]
    task = a_task("language_modeling", texts, 0, "\nA: ")
    assert core_eval.prompts(task, 0) == ["sky:\nA:", "sky:\nA: blue "]

@pytest.mark.parametrize("n,shots", [(2, 1), (30, 10), (2000, 10), (11, 10)])
def test_examples_are_drawn_as_from_a_list_without_the_item(n, shots):
    for number in (0, 1, n // 2, n - 1):
        others = [i for i in range(n) if i != number]
        expected = random.Random(1234 + number).sample(others, shots)
        assert core_eval.examples(number, n, shots) == expected

@pytest.mark.parametrize("kind,tokens,longest,expected", [
    ("multiple_choice", [[9, 1, 2, 3], [9, 1, 4]], 10, [([9, 1, 2, 3], 2), ([9, 1, 4], 2)]),
    ("multiple_choice", [[9, 1, 2, 3], [9, 1, 4]], 3, [([1, 2, 3], 1), ([9, 1, 4], 2)]),
    # an empty choice: nothing is scored
    ("multiple_choice", [[9, 1], [9, 1, 4]], 10, [([9, 1], 2), ([9, 1, 4], 2)]),
    ("schema", [[9, 1, 5, 6], [9, 2, 3, 5, 6]], 10,
     [([9, 1, 5, 6], 2), ([9, 2, 3, 5, 6], 3)]),
    ("language_modeling", [[9, 1], [9, 1, 2, 3]], 3, [([1, 2, 3], 1)]),
    # a continuation longer than all: what fits
    ("language_modeling", [[9, 1], [9, 1, 2, 3, 4]], 2, [([3, 4], 1)])])
def test_rows_by_hand(kind, tokens, longest, expected):
    rows = core_eval.rows_of(kind, tokens, longest)
    assert [(row.ids, row.start) for row in rows] == expected

# --------------------------------------------------------------------------------------------------
# answers: batched with shared prefixes against one item at a time without

@torch.inference_mode()
def plain(model, tokenizer, task, number, longest):
    """One item: every row by itself, all logits. The rules are written out once more, after
    nanochat's evaluator."""
    tokens = [[tokenizer.bos, *tokenizer.encode(t)] for t in core_eval.prompts(task, number)]
    if task["kind"] == "language_modeling":
        starts, tokens = [len(tokens[0])], tokens[1:]
    elif task["kind"] == "multiple_choice":
        start = 0
        while all(len(t) > start and t[start] == tokens[0][start] for t in tokens):
            start += 1
        starts = [start] * len(tokens)
    else:
        end = 0
        while all(len(t) > end and t[-1 - end] == tokens[0][-1 - end] for t in tokens):
            end += 1
        starts = [len(t) - end for t in tokens]
    losses = []
    for ids, start in zip(tokens, starts):
        cut = max(0, len(ids) - longest)
        ids, start = ids[cut:], start - cut
        logits = model(torch.tensor([ids]))[0]
        if task["kind"] == "language_modeling":
            return start < len(ids) and logits[start - 1:-1].argmax(-1).tolist() == ids[start:]
        targets = torch.tensor(ids[1:])
        each = torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none")
        losses.append(each[start - 1:].mean().item())  # of nothing: nan
    return losses.index(min(losses)) == task["items"][number]["gold"]

def word(rng):
    return "".join(rng.choice("abcdefg") for _ in range(rng.randint(1, 6)))

def words(rng, n):
    return " ".join(word(rng) for _ in range(n))

def some_choices(rng):
    items = []
    for _ in range(40):
        query = words(rng, rng.randint(1, 9))
        choices = [words(rng, rng.randint(1, 4)) for _ in range(rng.randint(2, 5))]
        items.append({"query": query, "choices": choices})
    return items + [
        {"query": "tie", "choices": ["same", "same"]},
        {"query": "tie", "choices": ["x", "same", "same"]},
        {"query": "empty", "choices": ["", "full"]},
        {"query": "empty", "choices": ["full", ""]},
        {"query": "empty", "choices": ["", "", ""]},
        {"query": "start", "choices": ["ab", "abc"]},
        {"query": "one", "choices": ["only"]}]

def some_contexts(rng):
    items = []
    for _ in range(20):
        contexts = [words(rng, rng.randint(1, 9)) for _ in range(2)]
        items.append({"context_options": contexts, "continuation": words(rng, 3)})
    return items + [{"context_options": ["same", "same"], "continuation": "end"},
                    {"context_options": ["a", "b"], "continuation": ""}]

def some_texts(rng, model):
    """Greedy continuations, so that some answers are right; every third with a wrong end"""
    items = [{"context": words(rng, rng.randint(1, 9)), "continuation": ""} for _ in range(20)]
    for i, item in enumerate(items):
        ids = [BYTES.bos, *BYTES.encode(item["context"] + "=")]
        for _ in range(3):
            ids.append(model(torch.tensor([ids]))[0, -1, :128].argmax().item())
        item["continuation"] = BYTES.decode(ids[-3:]) + "?" * (i % 3 == 0)
    return items + [{"context": "nothing", "continuation": ""}]

def some_tasks(model):
    rng = random.Random(5)
    choices, contexts = some_choices(rng), some_contexts(rng)
    for item in choices + contexts:
        item["gold"] = rng.randrange(len(item.get("choices", item.get("context_options"))))
    texts = some_texts(rng, model)
    tasks = []
    for shots in (0, 2):
        tasks += [a_task("multiple_choice", choices, shots), a_task("schema", contexts, shots),
                  a_task("language_modeling", texts, shots, "=")]
    return tasks

@pytest.mark.parametrize("longest", [1000, 40])  # 40 tokens: prompts of two examples are cut
def test_batched_answers_equal_those_of_one_at_a_time(longest):
    model = small()
    with torch.inference_mode():
        tasks = some_tasks(model)
    for task in tasks:
        numbers = range(len(task["items"]))
        expected = [plain(model, BYTES, task, n, longest) for n in numbers]
        assert core_eval.evaluate(model, BYTES, task, numbers, longest, 1e9) == expected
        few_rows = core_eval.evaluate(model, BYTES, task, numbers, longest, 2e5)
        assert few_rows == expected, "in batches of a few rows"
        each = [core_eval.evaluate(model, BYTES, task, [n], longest, 1e9)[0] for n in numbers]
        assert each == expected
        if (task["kind"], task["shots"]) != ("language_modeling", 2):
            assert len(set(expected)) == 2, "both outcomes occur"

    def outcomes(gold):
        items = [{**item, "gold": gold} for item in tasks[0]["items"]]
        ties = {**tasks[0], "items": items}
        return core_eval.evaluate(model, BYTES, ties, range(40, 46), 1000, 1e9)

    first, second = outcomes(0), outcomes(1)
    assert first[0] and not second[0], "of equal choices the first is taken"
    assert first[2] and first[4] and first[5], "an empty choice that stands first is taken"
    assert first[3], "an empty choice that stands later is not"

def test_what_is_shared_is_run_once(monkeypatch):
    model, run, scored = small(), [], []
    hidden, logits = model.hidden, model.logits

    def counted_hidden(idx, *args):
        run.append(idx.numel())
        return hidden(idx, *args)

    def counted_logits(h):
        scored.append(len(h))
        return logits(h)

    monkeypatch.setattr(model, "hidden", counted_hidden)
    monkeypatch.setattr(model, "logits", counted_logits)
    item = {"query": "q" * 98, "choices": ["a", "b", "c", "d"], "gold": 0}
    core_eval.evaluate(model, BYTES, a_task("multiple_choice", [item]), [0], 1000, 1e9)
    # bos and the question without the space, then the space before each of four; logits of the
    # last token of each, all at once
    assert run == [99, 4] and scored == [1, 4]

def test_a_batch_has_room_for_its_logits():
    """Of a small model with a large vocabulary they are most of what a batch takes."""
    model = random_model(64, 10_000, 1, 1, 1, 8)
    one = [[core_eval.Row(list(range(40)), 30)] for _ in range(6)]
    logits = 10 * 10_000 * 4  # bytes of one row's, of which there are three
    batches = core_eval.make_batches(one, model, 2.5 * 3 * logits)
    assert [len(batch) for batch in batches] == [2, 2, 2]

def test_nothing_is_made_in_float64():
    """Apple's GPUs have none."""
    model = small()
    for task in some_tasks(model):
        with NoFloat64("cpu"):
            core_eval.evaluate(model, BYTES, task, range(20), 1000, 1e9)

def test_asked_to_stop_between_batches():
    answers = iter([True, False])
    task = a_task("language_modeling", LM)
    stopped = core_eval.evaluate(
        small(), BYTES, task, range(5), 100, 1, keep_going=lambda: next(answers))
    assert stopped is None

@needs_bundle
@needs_nanochat
def test_outcomes_equal_nanochats_own(tmp_path):
    tokenizer, model = nanochats_own(tmp_path)
    expected = json.loads((SHARED / "nanochat_checkpoint/core_expected.json").read_text())
    # of 12 items a task; all of them take about a minute
    count = int(os.environ.get("NANOCHAT_TEST_CORE_ITEMS", "2"))
    for task in core_eval.read_bundle(BUNDLE)[0]:
        one = expected["tasks"][task["label"]]
        assert len(task["items"]) == one["rows"]
        assert task["delimiter"] == one["continuation_delimiter"]
        numbers = range(len(one["correct"]))[-count:]
        longest = expected["max_seq_len"]
        got = core_eval.evaluate(model, tokenizer, task, numbers, longest, 2e8)
        assert got == one["correct"][-count:], task["label"]

# --------------------------------------------------------------------------------------------------
# bits per byte

def measure(model, plan, tokenizer, rows, run=None):
    """Bits per byte of all of a plan, so many rows at once."""
    cpu = torch.device("cpu")
    return training.bits_per_byte(run or alone(), model, plan, tokenizer, 10 ** 9, rows, cpu)

class EightBits:
    """Gives every token 8 bits for each of its bytes, and anything at all to tokens that stand for
    none."""
    def __init__(self, tokenizer):
        self.sizes = torch.from_numpy(tokenizer.token_bytes())

    def nats(self, x, y):
        return torch.where(self.sizes[y] > 0, self.sizes[y] * 8 * math.log(2), 5.0)

def plan_of(folder, tokenizer, length):
    folder.mkdir()
    texts = ["na\u00efve banana bandana", "an apple", "banana " * 30]
    documents = [(tokenizer.encode(t), []) for t in texts]
    dataset.write_store(alone(), folder / "s", "test", documents, tokenizer.vocab_size, None)
    return dataset.make_plan([dataset.open_store(folder / "s", "test")], length, tokenizer.bos)

def test_bits_per_byte_do_not_depend_on_tokenizer_or_batch(tmp_path):
    pairs = tok.Tokenizer({**BYTES.ranks, b"an": 256, b"ana": 257, b" b": 258})
    for name, tokenizer in (("bytes", BYTES), ("pairs", pairs)):
        model = EightBits(tokenizer)
        plan = plan_of(tmp_path / name, tokenizer, 17)
        for rows in (1, 3, 100):
            assert measure(model, plan, tokenizer, rows) == pytest.approx(8.0, abs=1e-6)

def test_a_stop_in_a_measurement_says_what_makes_it_shorter(tmp_path, capsys):
    run = alone()
    run.stop = "deadline"
    assert measure(EightBits(BYTES), plan_of(tmp_path / "s", BYTES, 17), BYTES, 1, run) is None
    assert "fewer --eval_tokens take less time" in capsys.readouterr().out

def test_bits_per_byte_by_hand(tmp_path):
    model = small()
    plan = plan_of(tmp_path / "bytes", BYTES, 17)
    with torch.inference_mode():
        nats, count = 0.0, 0
        for row in dataset.read_rows(plan, range(dataset.n_rows(plan)))[0].tolist():
            probabilities = model(torch.tensor([row]))[0].double().softmax(-1)
            for at, token in enumerate(row[1:]):
                if token < 256:  # not bos
                    nats, count = nats - math.log(probabilities[at, token]), count + 1
    by_hand = nats / count / math.log(2)
    for rows in (1, 2, 50):
        assert measure(model, plan, BYTES, rows) == pytest.approx(by_hand, abs=1e-5)

# --------------------------------------------------------------------------------------------------
# the script

@pytest.fixture
def ready(state, tmp_path):
    """A state folder with a (random) base model of a folder of text and a bundle -> the data
    argument"""
    folder = tmp_path / "books"
    folder.mkdir()
    rng = random.Random(0)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("\n\n".join(words(rng, 60) for _ in range(20)))
    data = str(folder)
    tok.save_tokenizer(pipeline.tokenizer_dir(data), BYTES.ranks)
    save_model("base", data, "d2", small(), BYTES)
    mc = [{"query": words(rng, 30), "choices": [words(rng, 2) for _ in range(4)],
           "gold": rng.randrange(4)} for _ in range(1500)]
    lm = [{"context": words(rng, 30), "continuation": "a"} for _ in range(500)]
    tasks = {"choose": ("multiple_choice", 2, mc), "go_on": ("language_modeling", 0, lm)}
    write_bundle(pipeline.eval_bundle_dir(data), tasks)
    return data

def result(data):
    return json.loads(pipeline.state_path("base-eval", data, "d2").read_text())

def test_an_interrupted_evaluation_continues(state, ready):
    args = ["base_eval.py", f"--data={ready}", "--threads=1", "--dtype=float32"]
    whole = script(state, *args)
    assert whole.returncode == 0, whole.stderr
    first = result(ready)
    assert first["core"] is not None and f"CORE {first['core']:.4f}\n" in whole.stdout
    assert first["tasks"]["choose"]["n"] == 1500
    assert first["train_bpb"] > 1 and first["val_bpb"] > 1
    assert len(first["samples"]) == 11 and first["samples"][-1]["prompt"] == ""
    again = script(state, *args)
    assert again.returncode == 0 and "done already" in again.stdout

    path = pipeline.state_path("base-eval", ready, "d2")
    partial = path.with_suffix(".partial.jsonl")
    path.unlink()
    process = subprocess.Popen([sys.executable, *args], cwd=REPO, env=environment(state),
                               stdout=subprocess.PIPE, text=True)
    wait_for(lambda: partial.exists() and partial.read_text().count("\n") >= 7, process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 75, out
    kept = len(common.read_json_lines(partial))
    assert 7 <= kept < 1 + 3 + 24 + 8, "the signal must have come in the middle"
    assert not path.exists(), "the signal must have come in the middle"
    lines = common.read_json_lines(partial)
    block = next(line["value"] for line in lines if line.get("piece") == "choose 0 to 64")
    block.reverse()  # another value, of which all scores are the same: not measured again
    torn = '{"piece": "choose 1408 to 1472", "val'  # as a death in the middle of a line leaves it
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    resumed = script(state, *args)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"parts measured already: {kept - 2}" in resumed.stdout, resumed.stdout
    second = result(ready)
    assert not partial.exists()
    outcomes = first["tasks"]["choose"]["outcomes"]
    assert block == outcomes[:64][::-1] != outcomes[:64]
    outcomes[:64] = block
    assert {**second, "seconds": None} == {**first, "seconds": None}

def test_half_the_rows_at_once_are_half_of_a_core_batch_too(state, ready):
    """Where memory is out the launcher tries half of them."""
    watch = ("import runpy, sys, core_eval\n"
             "def evaluate(model, tokenizer, task, numbers, most, budget, going):\n"
             "    print('budget', budget)\n"
             "    raise MemoryError\n"
             "core_eval.evaluate = evaluate\n"
             "sys.argv = sys.argv[1:]\n"
             "runpy.run_path(sys.argv[0], run_name='__main__')")
    budgets = []
    for rows in (16, 8):
        out = script(state, "-c", watch, "base_eval.py", f"--data={ready}", "--eval_tokens=0",
                     "--show_samples=False", f"--device_batch_size={rows}")
        assert out.returncode == 1 and f"--device_batch_size={rows // 2}:" in out.stderr
        budgets.append(float(re.search("budget (.*)", out.stdout)[1]))
    assert budgets[0] == 2 * budgets[1] == core_eval.usual_budget(torch.device("cpu"))

def test_parts_missing_tasks_and_stale_pieces(state, ready):
    partial = pipeline.state_path("base-eval", ready, "d2").with_suffix(".partial.jsonl")
    lines = [{"inputs": {"weights": "others"}, "chosen": {}},
             {"piece": "choose 0 to 64", "value": [True] * 64, "seconds": 1.0}]
    common.atomic_write(partial, "".join(json.dumps(r) + "\n" for r in lines))
    (pipeline.eval_bundle_dir(ready) / "eval_data/some/go_on.jsonl").unlink()
    done = script(state, "base_eval.py", f"--data={ready}", "--core_items=100", "--eval_tokens=0",
                  "--show_samples=False", "--threads=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "other weights of the model" in done.stdout, done.stdout
    assert "go_on is missing" in done.stdout, done.stdout
    r = result(ready)
    assert r["core"] is None and "go_on" in r["reason"] and "in part" in r["reason"]
    assert r["missing"] == ["go_on"]
    assert r["tasks"]["choose"]["n"] == 100 and r["val_bpb"] is None and r["samples"] == []
    (pipeline.eval_bundle_dir(ready) / "core.yaml").unlink()
    failed = script(state, "base_eval.py", f"--data={ready}")
    assert failed.returncode == 2 and "core.yaml" in failed.stderr
    assert failed.stderr.count("\n") == 1

def test_two_ranks_measure_what_one_does(state, ready):
    args = ["base_eval.py", f"--data={ready}", "--core_items=200", "--threads=1", "--dtype=float32"]
    one = script(state, *args)
    assert one.returncode == 0, one.stderr
    first = result(ready)
    pipeline.state_path("base-eval", ready, "d2").unlink()
    two = script(state, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args)
    assert two.returncode == 0 and "2 x cpu" in two.stdout, two.stdout + two.stderr
    second = result(ready)
    assert second["tasks"] == first["tasks"] and second["samples"] == first["samples"]
    assert second["inputs"] == first["inputs"]
    assert second["val_bpb"] == pytest.approx(first["val_bpb"], abs=1e-6)
