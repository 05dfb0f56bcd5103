"""core_eval.py and base_eval.py: CORE as nanochat scores it, bits per byte, and an evaluation that is interrupted."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import common
import core_eval
import data as dataset
import gpt
import phase
import tokenizer as tok
import training
from conftest import BYTES, REPO, SHARED, nanochats_own, needs_nanochat, random_model, script

torch.set_num_threads(1)
BUNDLE = SHARED / "eval_bundle"
needs_bundle = pytest.mark.skipif(not BUNDLE.exists(), reason="no CORE bundle at hand (NANOCHAT_TEST_DATA)")

def small():
    return random_model(64, BYTES.vocab_size, 2, 2, 1, 64)

def a_task(kind, items, shots=0, delimiter=" "):
    return {"label": kind, "kind": kind, "shots": shots, "delimiter": delimiter, "items": items, "baseline": 25.0}

# ---------------------------------------------------------------------------------------------------------------------
# the bundle

@needs_bundle
def test_the_real_bundle():
    tasks, missing, digest = core_eval.read_bundle(BUNDLE)
    assert len(tasks) == 22 and not missing and len(digest) == 16
    by_label = {t["label"]: t for t in tasks}
    assert sum(t["kind"] == "schema" for t in tasks) == 2 and sum(t["kind"] == "language_modeling" for t in tasks) == 9
    jeopardy = by_label["jeopardy"]
    assert (jeopardy["shots"], jeopardy["delimiter"], jeopardy["baseline"]) == (10, "\nAnswer: ", 0.0)
    assert by_label["hellaswag_zeroshot"]["delimiter"] == " " and by_label["boolq"]["baseline"] == 62.0
    assert by_label["hellaswag"]["items"] is by_label["hellaswag_zeroshot"]["items"] and len(by_label["hellaswag"]["items"]) == 10042

YAML = """# tasks
icl_tasks:
-
  label: one
  dataset_uri: a/one.jsonl
  num_fewshot: [10]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
  has_categories: true

- label: 'two'
  dataset_uri: two.jsonl
  num_fewshot: [0]
  icl_task_type: schema
"""

def test_core_yaml_by_hand(tmp_path):
    (tmp_path / "core.yaml").write_text(YAML)
    assert core_eval.read_core_yaml(tmp_path / "core.yaml") == [
        {"label": "one", "uri": "a/one.jsonl", "kind": "multiple_choice", "shots": 10, "delimiter": "\nAnswer: "},
        {"label": "two", "uri": "two.jsonl", "kind": "schema", "shots": 0, "delimiter": " "}]

@pytest.mark.parametrize("old,new,line", [
    ("icl_tasks:", "tasks:", 2), ("  label: one", "\tlabel: one", 4), ("  label: one", "label: one", 4), ("  label: one", "  label: [one", 4),
    ("  label: one", "  label: {a: 1}", 4), ("  num_fewshot: [10]", "  num_fewshot:", 6), ("  has_categories: true", "  label: again", 9),
    ("  num_fewshot: [10]", "  num_fewshot: 10", 3), ("multiple_choice", "essay", 3), ("  dataset_uri: two.jsonl\n", "", 11)])
def test_a_core_yaml_that_cannot_be_read_names_the_line(tmp_path, capsys, old, new, line):
    (tmp_path / "core.yaml").write_text(YAML.replace(old, new, 1))
    with pytest.raises(SystemExit) as e:
        core_eval.read_core_yaml(tmp_path / "core.yaml")
    assert e.value.code == 2 and f"core.yaml:{line}: " in capsys.readouterr().err

def write_bundle(folder, tasks):
    """tasks {label: (kind, shots, items or None for no file)}"""
    yaml, table = "icl_tasks:\n", "Eval Task,Task Category,Random baseline\n"
    for label, (kind, shots, items) in tasks.items():
        yaml += f"-\n  label: {label}\n  dataset_uri: some/{label}.jsonl\n  num_fewshot: [{shots}]\n  icl_task_type: {kind}\n"
        table += f'{label},"a, b",{25 if kind == "multiple_choice" else 0}\n'
        if items is not None:
            common.atomic_write(folder / "eval_data" / "some" / f"{label}.jsonl", "".join(json.dumps(i) + "\n" for i in items))
    common.atomic_write(folder / "core.yaml", yaml)
    common.atomic_write(folder / "eval_meta_data.csv", table)

LM = [{"context": f"say {i} ", "continuation": f"{i}"} for i in range(5)]

def test_a_missing_task_is_named_and_there_is_no_core(tmp_path, capsys):
    write_bundle(tmp_path, {"here": ("language_modeling", 2, LM), "gone": ("language_modeling", 0, None)})
    tasks, missing, _ = core_eval.read_bundle(tmp_path)
    assert [t["label"] for t in tasks] == ["here"] and missing == ["gone"]
    shuffled = list("01234")
    random.Random(1337).shuffle(shuffled)
    assert [i["continuation"] for i in tasks[0]["items"]] == shuffled
    full = {"here": core_eval.summary(tasks[0], [True] * 5)}
    assert core_eval.core_of(full, missing) == (None, "tasks without their file: gone", 1.0)
    assert core_eval.core_of(full, []) == (1.0, None, 1.0)
    assert core_eval.core_of({"here": core_eval.summary(tasks[0], [True])}, [])[:2] == (None, "1 tasks measured in part")
    (tmp_path / "eval_data/some/here.jsonl").write_text('{"context": "a", "continuation": "b"}\n{"context": "a"}\n')
    with pytest.raises(SystemExit) as e:
        core_eval.read_bundle(tmp_path)
    assert e.value.code == 2 and "here.jsonl:2: " in capsys.readouterr().err

def test_centred_by_hand():
    r = core_eval.summary(a_task("multiple_choice", LM), [True, False, True, False])
    assert r["accuracy"] == 0.5 and r["centred"] == pytest.approx(1 / 3) and (r["n"], r["of"]) == (4, 5)
    assert r["chance"] == 0.25 and (r["low"], r["high"]) == pytest.approx((0.150, 0.850), abs=1e-3)

# ---------------------------------------------------------------------------------------------------------------------
# prompts and rows

def test_prompts_by_hand():
    items = [{"query": "1+1", "choices": ["2", "3"], "gold": 0}, {"query": "2+2", "choices": ["4", " 5"], "gold": 1}]
    assert core_eval.prompts(a_task("multiple_choice", items, 1, "="), 1) == ["1+1=2\n\n2+2=4", "1+1=2\n\n2+2= 5"]
    assert core_eval.prompts(a_task("multiple_choice", items), 0) == ["1+1 2", "1+1 3"]
    items = [{"context_options": ["Ann", "Bob"], "continuation": "ran.", "gold": 1}, {"context_options": ["He", "She"], "continuation": "sat.", "gold": 0}]
    assert core_eval.prompts(a_task("schema", items, 1), 1) == ["Bob ran.\n\nHe sat.", "Bob ran.\n\nShe sat."]
    items = [{"context": " sky: \n", "continuation": "blue "}, {"context": "grass:", "continuation": "green"}]
    assert core_eval.prompts(a_task("language_modeling", items, 1), 1) == ["sky: blue \n\ngrass:", "sky: blue \n\ngrass: green"]
    assert core_eval.prompts(a_task("language_modeling", items, 0, "\nA: "), 0) == ["sky:\nA:", "sky:\nA: blue "]

@pytest.mark.parametrize("n,shots", [(2, 1), (30, 10), (2000, 10), (11, 10)])
def test_examples_are_drawn_as_from_a_list_without_the_item(n, shots):
    for number in (0, 1, n // 2, n - 1):
        others = [i for i in range(n) if i != number]
        assert core_eval.examples(number, n, shots) == random.Random(1234 + number).sample(others, shots)

def test_rows_by_hand():
    rows = lambda *args: [tuple(r) for r in core_eval.rows_of(*args)]
    assert rows("multiple_choice", [[9, 1, 2, 3], [9, 1, 4]], 10) == [([9, 1, 2, 3], 2, 4, 0), ([9, 1, 4], 2, 3, 0)]
    assert rows("multiple_choice", [[9, 1, 2, 3], [9, 1, 4]], 3) == [([1, 2, 3], 1, 3, 1), ([9, 1, 4], 2, 3, 0)]
    assert rows("multiple_choice", [[9, 1], [9, 1, 4]], 10) == [([9, 1], 2, 2, 0), ([9, 1, 4], 2, 3, 0)]  # an empty choice
    assert rows("schema", [[9, 1, 5, 6], [9, 2, 3, 5, 6]], 10) == [([9, 1, 5, 6], 2, 4, 0), ([9, 2, 3, 5, 6], 3, 5, 0)]
    assert rows("language_modeling", [[9, 1], [9, 1, 2, 3]], 3) == [([1, 2, 3], 1, 3, 1)]
    assert rows("language_modeling", [[9, 1], [9, 1, 2, 3, 4]], 2) == [([3, 4], 1, 2, 3)]  # longer than all: what fits

# ---------------------------------------------------------------------------------------------------------------------
# answers: batched with shared prefixes against one item at a time without

@torch.inference_mode()
def plain(model, tokenizer, task, number, longest):
    """One item: every row by itself, all logits. The rules are written out once more, after nanochat's evaluator."""
    tokens = [[tokenizer.bos, *tokenizer.encode(text)] for text in core_eval.prompts(task, number)]
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
        each = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        losses.append(each[start - 1:].mean().item())  # of nothing: nan
    return losses.index(min(losses)) == task["items"][number]["gold"]

def words(rng, n):
    return " ".join("".join(rng.choice("abcdefg") for _ in range(rng.randint(1, 6))) for _ in range(n))

def some_tasks(model):
    rng = random.Random(5)
    mc = [{"query": words(rng, rng.randint(1, 9)), "choices": [words(rng, rng.randint(1, 4)) for _ in range(rng.randint(2, 5))]} for _ in range(40)]
    mc += [{"query": "tie", "choices": ["same", "same"]}, {"query": "tie", "choices": ["x", "same", "same"]},
           {"query": "empty", "choices": ["", "full"]}, {"query": "empty", "choices": ["full", ""]},
           {"query": "empty", "choices": ["", "", ""]}, {"query": "start", "choices": ["ab", "abc"]}, {"query": "one", "choices": ["only"]}]
    schema = [{"context_options": [words(rng, rng.randint(1, 9)) for _ in range(2)], "continuation": words(rng, 3)} for _ in range(20)]
    schema += [{"context_options": ["same", "same"], "continuation": "end"}, {"context_options": ["a", "b"], "continuation": ""}]
    for item in mc + schema:
        item["gold"] = rng.randrange(len(item.get("choices", item.get("context_options"))))
    lm = [{"context": words(rng, rng.randint(1, 9)), "continuation": ""} for _ in range(20)]
    for i, item in enumerate(lm):  # greedy continuations, so that some answers are right; every third with a wrong end
        ids = [BYTES.bos, *BYTES.encode(item["context"] + "=")]
        for _ in range(3):
            ids.append(model(torch.tensor([ids]))[0, -1, :128].argmax().item())
        item["continuation"] = BYTES.decode(ids[-3:]) + "?" * (i % 3 == 0)
    lm += [{"context": "nothing", "continuation": ""}]
    return [a_task(kind, items, shots, "=" if kind == "language_modeling" else " ") for kind, items in (("multiple_choice", mc), ("schema", schema), ("language_modeling", lm)) for shots in (0, 2)]

@pytest.mark.parametrize("longest", [1000, 40])  # 40 tokens: prompts of two examples are cut
def test_batched_answers_equal_those_of_one_at_a_time(longest):
    model = small()
    with torch.inference_mode():
        tasks = some_tasks(model)
    for task in tasks:
        numbers = range(len(task["items"]))
        expected = [plain(model, BYTES, task, n, longest) for n in numbers]
        assert core_eval.evaluate(model, BYTES, task, numbers, longest, 1e9) == expected
        assert core_eval.evaluate(model, BYTES, task, numbers, longest, 2e5) == expected, "in batches of a few rows"
        assert [core_eval.evaluate(model, BYTES, task, [n], longest, 1e9)[0] for n in numbers] == expected
        assert len(set(expected)) == 2 or (task["kind"], task["shots"]) == ("language_modeling", 2), "both outcomes occur"
    ties = tasks[0]
    verdicts = lambda gold: core_eval.evaluate(model, BYTES, {**ties, "items": [{**i, "gold": gold} for i in ties["items"]]}, range(40, 46), 1000, 1e9)
    first, second = verdicts(0), verdicts(1)
    assert first[0] and not second[0], "of equal choices the first is taken"
    assert first[2] and first[4] and first[5], "an empty choice that stands first is taken"
    assert first[3], "an empty choice that stands later is not"

def test_what_is_shared_is_run_once(monkeypatch):
    model, run, scored = small(), [], []
    hidden, logits = model.hidden, model.logits
    monkeypatch.setattr(model, "hidden", lambda idx, *a: (run.append(idx.numel()), hidden(idx, *a))[1])
    monkeypatch.setattr(model, "logits", lambda h: (scored.append(len(h)), logits(h))[1])
    task = a_task("multiple_choice", [{"query": "q" * 98, "choices": ["a", "b", "c", "d"], "gold": 0}])
    core_eval.evaluate(model, BYTES, task, [0], 1000, 1e9)
    assert run == [99, 4] and scored == [4]  # bos and the question without the space, then the space before each of four

def test_asked_to_stop_between_batches():
    answers = iter([True, False])
    task = a_task("language_modeling", LM)
    assert core_eval.evaluate(small(), BYTES, task, range(5), 100, 1, keep_going=lambda: next(answers)) is None

@needs_bundle
@needs_nanochat
def test_outcomes_equal_nanochats_own(tmp_path):
    tokenizer, model = nanochats_own(tmp_path)
    expected = json.loads((SHARED / "nanochat_checkpoint/core_expected.json").read_text())
    count = int(os.environ.get("NANOCHAT_TEST_CORE_ITEMS", 2))  # of 12 items a task; all of them take about a minute
    for task in core_eval.read_bundle(BUNDLE)[0]:
        one = expected["tasks"][task["label"]]
        assert len(task["items"]) == one["rows"] and task["delimiter"] == one["continuation_delimiter"]
        numbers = range(len(one["correct"]))[-count:]
        got = core_eval.evaluate(model, tokenizer, task, numbers, expected["max_seq_len"], 2e8)
        assert got == one["correct"][-count:], task["label"]

# ---------------------------------------------------------------------------------------------------------------------
# bits per byte

COMPUTE = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1)

class EightBits:
    """Gives every token 8 bits for each of its bytes, and anything at all to tokens that stand for none."""
    def __init__(self, tokenizer):
        self.sizes = torch.from_numpy(tokenizer.token_bytes())

    def __call__(self, x, y, reduction):
        return torch.where(self.sizes[y] > 0, self.sizes[y] * 8 * math.log(2), 5.0)

def plan_of(folder, tokenizer, length):
    folder.mkdir()
    texts = ["na\u00efve banana bandana", "an apple", "banana " * 30]
    dataset.write_store(folder / "s", [[(tokenizer.encode(t), None) for t in texts]], "test", tokenizer.vocab_size)
    return dataset.make_plan([dataset.open_store(folder / "s")], length, tokenizer.bos)

def test_bits_per_byte_do_not_depend_on_tokenizer_or_batch(tmp_path):
    pairs = tok.Tokenizer({**{bytes([i]): i for i in range(256)}, b"an": 256, b"ana": 257, " b".encode(): 258})
    for name, tokenizer in (("bytes", BYTES), ("pairs", pairs)):
        plan = plan_of(tmp_path / name, tokenizer, 17)
        for rows in (1, 3, 100):
            assert training.bits_per_byte(EightBits(tokenizer), plan, tokenizer, 10 ** 9, rows, COMPUTE) == pytest.approx(8.0, abs=1e-6)

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
    for rows in (1, 2, 50):
        assert training.bits_per_byte(model, plan, BYTES, 10 ** 9, rows, COMPUTE) == pytest.approx(nats / count / math.log(2), abs=1e-5)

# ---------------------------------------------------------------------------------------------------------------------
# the script

@pytest.fixture
def ready(state, tmp_path, monkeypatch):
    """A state folder with a (random) base model of a folder of text and a bundle -> the data argument"""
    folder = tmp_path / "books"
    folder.mkdir()
    rng = random.Random(0)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("\n\n".join(words(rng, 60) for _ in range(20)))
    data = str(folder)
    tok.save_tokenizer(common.tokenizer_dir(data), BYTES.ranks)
    directory = common.stage_dir("base", data, "d2")
    directory.mkdir(parents=True)
    phase.take_lock(directory)
    model = small()
    meta = {"model": {**vars(model.config)}, "tokenizer": BYTES.fingerprint, "loss": None}
    checkpoint.save(directory, 7, model.state_dict(), {}, meta)
    phase.release(directory)
    mc = [{"query": words(rng, 30), "choices": [words(rng, 2) for _ in range(4)], "gold": rng.randrange(4)} for _ in range(1500)]
    lm = [{"context": words(rng, 30), "continuation": "a"} for _ in range(500)]
    write_bundle(common.eval_bundle_dir(data), {"choose": ("multiple_choice", 2, mc), "go_on": ("language_modeling", 0, lm)})
    return data

def result(data):
    return json.loads(common.eval_path("core", "base", data, "d2").read_text())

def test_an_interrupted_evaluation_continues(state, ready):
    args = ["base_eval.py", f"--data={ready}", "--threads=1", "--dtype=float32"]
    whole = script(state, *args)
    assert whole.returncode == 0, whole.stderr
    first = result(ready)
    assert first["core"] is not None and first["label"] == "CORE" and first["tasks"]["choose"]["n"] == 1500
    assert first["train_bpb"] > 1 and first["val_bpb"] > 1 and len(first["samples"]) == 11 and first["samples"][-1]["prompt"] == ""
    again = script(state, *args)
    assert again.returncode == 0 and "done already" in again.stdout

    path = common.eval_path("core", "base", ready, "d2")
    partial = path.with_suffix(".partial.jsonl")
    path.unlink()
    process = subprocess.Popen([sys.executable, *args], cwd=REPO, env={**os.environ, "NANOCHAT_BASE_DIR": str(state)}, stdout=subprocess.PIPE, text=True)
    patience = time.time() + 120
    while (not partial.exists() or partial.read_text().count("\n") < 7) and time.time() < patience:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 75, out
    kept = partial.read_text().count("\n")
    assert 7 <= kept < 1 + 3 + 24 + 8 and not path.exists(), "the signal must have come in the middle"
    with open(partial, "a") as f:
        f.write('{"piece": "choose 1408", "val')  # as a death in the middle of a line leaves it
    resumed = script(state, *args)
    assert resumed.returncode == 0 and f"{kept - 2} pieces are there already" in resumed.stdout, resumed.stdout + resumed.stderr
    second = result(ready)
    assert not partial.exists()
    assert {k: v for k, v in second.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}

def test_parts_missing_tasks_and_stale_pieces(state, ready):
    partial = common.eval_path("core", "base", ready, "d2").with_suffix(".partial.jsonl")
    lines = [{"inputs": {"weights": "others"}, "chosen": {}}, {"piece": "choose 0", "value": [True] * 64, "seconds": 1.0}]
    common.atomic_write(partial, "".join(json.dumps(r) + "\n" for r in lines))
    (common.eval_bundle_dir(ready) / "eval_data/some/go_on.jsonl").unlink()
    done = script(state, "base_eval.py", f"--data={ready}", "--core_items=100", "--eval_tokens=0", "--show_samples=False", "--threads=1")
    assert done.returncode == 0 and "is dropped: weights: others -> " in done.stdout and "go_on is missing" in done.stdout, done.stdout + done.stderr
    r = result(ready)
    assert r["core"] is None and "go_on" in r["reason"] and "in part" in r["reason"] and r["missing"] == ["go_on"]
    assert r["tasks"]["choose"]["n"] == 100 and r["val_bpb"] is None and r["samples"] == []
    (common.eval_bundle_dir(ready) / "core.yaml").unlink()
    failed = script(state, "base_eval.py", f"--data={ready}")
    assert failed.returncode == 2 and "core.yaml" in failed.stderr and failed.stderr.count("\n") == 1

def test_two_ranks_measure_what_one_does(state, ready):
    args = ["base_eval.py", f"--data={ready}", "--core_items=200", "--threads=1", "--dtype=float32"]
    one = script(state, *args)
    assert one.returncode == 0, one.stderr
    first = result(ready)
    common.eval_path("core", "base", ready, "d2").unlink()
    two = script(state, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args)
    assert two.returncode == 0 and "2 x cpu" in two.stdout, two.stdout + two.stderr
    second = result(ready)
    assert second["tasks"] == first["tasks"] and second["samples"] == first["samples"] and second["inputs"] == first["inputs"]
    assert second["val_bpb"] == pytest.approx(first["val_bpb"], abs=1e-6)
