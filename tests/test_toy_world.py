"""toy_world.py: deterministic, consistent, and honest: the tests need knowledge and skill, not the
nearest training example."""
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import execution
import tasks
import toy_world
from conftest import REPO

def hashes(root):
    files = [p for p in sorted(Path(root).rglob("*")) if p.is_file()]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("base") / "toy"
    toy_world.generate(root, 1337, 0.3)
    return root

@pytest.fixture
def toy(world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world.parent))

def rows(world, name):
    lines = (world / f"task_data/{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]

def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    # each in a process of its own: the order of sets and hashes differs there
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code = (f"import sys, pathlib; sys.path.insert(0, {str(REPO)!r}); import toy_world; "
                f"toy_world.generate(pathlib.Path({str(tmp_path / name)!r}), {seed}, 0.01)")
        env = {**os.environ, "PYTHONHASHSEED": str(len(name) + ord(name))}
        subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    other = hashes(tmp_path / "c")
    different = [k for k, v in hashes(tmp_path / "a").items() if other[k] != v]
    assert len(different) >= 20, different

def test_validation_shares_no_document_with_training(world):
    paths = sorted((world / "base_data").glob("*.parquet"))
    shards = [pyarrow.parquet.read_table(path)["text"].to_pylist() for path in paths]
    documents = [d for shard in shards for d in shard]
    assert len(shards) >= 3 and len(documents) == len(set(documents)) > 1000

def wordings(fact, form, **words):
    """What toy_world.py can make of the wordings of a form for a fact."""
    templates = toy_world.ATTRIBUTES[fact.attribute][form]
    words = {"name": fact.entity, "who": fact.entity, "value": fact.value, **words}
    return [toy_world.article(template.format(**words)) for template in templates]

def asked(text, facts):
    """Facts whose entity and a training wording of whose attribute stand in the text."""
    return [fact for fact in facts for w in wordings(fact, "questions") if w in text]

def halves(made):
    """-> the facts that are held out, and the others"""
    held = [f for f in made.all if toy_world.held_out(f.entity, f.attribute)]
    return held, [f for f in made.all if not toy_world.held_out(f.entity, f.attribute)]

def test_held_out_pairs_are_never_asked_in_training(world):
    names = ("smoltalk_train", "mmlu_auxiliary_train", "arc_easy_train", "arc_challenge_train",
             "identity_train")
    everything = "".join((world / f"task_data/{n}.jsonl").read_text() for n in names)
    for path in (world / "base_data").glob("*.parquet"):
        everything += "\n".join(pyarrow.parquet.read_table(path)["text"].to_pylist())
    made = toy_world.make_world(1337)
    for kind in ("person", "town", "animal"):
        held, known = ([f for f in half if f.kind == kind] for half in halves(made))
        assert len(held) > 5 and not asked(everything, held), kind
        assert len(asked(everything, known)) > len(known), "others are asked, in several wordings"
    patterns = [re.escape(w).replace(r"\{name\}", r"(an? )?\w+")
                for spec in toy_world.ATTRIBUTES.values() for w in spec["test_questions"]]
    assert len(patterns) > 30 and not re.search("|".join(patterns), everything)

def test_the_letters_of_the_tests_never_stand_with_what_is_held_out(world):
    held, _ = halves(toy_world.make_world(1337))
    gaps = {text[0].upper() + text[1:]
            for fact in held for text in wordings(fact, "statements", value="...")}
    causes = [c for c in toy_world.CAUSES if toy_world.held_out("cause", c["noun"])]
    gaps |= {f"When {c['cause']}" for c in causes}
    who = {}
    for fact in held:
        trait = toy_world.ATTRIBUTES[fact.attribute]["trait"].format(value=fact.value)
        text = toy_world.article(f"The one who {trait}")
        who.setdefault(fact.entity, set()).add(text)
    kinds, found = {k.capitalize() for k in toy_world.KINDS}, Counter()
    for path in (world / "base_data").glob("*.parquet"):
        for document in pyarrow.parquet.read_table(path)["text"].to_pylist():
            options = dict(re.findall(r"^- (.*)=([A-Z])$", document, re.MULTILINE))
            texts = {re.sub(r"(:? [A-Z]| Answer:)$", "", line) for line in document.split("\n")}
            secret = (texts & gaps or any(texts & who.get(o, set()) for o in options)
                      or texts & kinds and any(toy_world.held_out("kind", o) for o in options))
            if options:
                found[bool(set(options.values()) & set("ABCD")), bool(secret)] += 1
    assert found[True, False] > 500 and found[False, True] > 500, "both sorts of lists are there"
    assert found[True, True] == 0

def test_conversations_tell_nothing_that_is_held_out(world):
    files = [world / f"task_data/{name}_train.jsonl" for name in ("smoltalk", "identity")]
    text = "".join(path.read_text() for path in files)

    def said(facts):
        statements = [s for fact in facts for s in wordings(fact, "statements")]
        return sum(s[0].upper() + s[1:] in text for s in statements)
    held, known = halves(toy_world.make_world(1337))
    assert said(held) == 0 and said(known) > 100

def test_the_halves_of_the_world_are_whole_and_its_tables_fit_together(world):
    made = toy_world.make_world(1337)
    held, known = halves(made)
    assert (made.test.facts, made.train.facts) == (held, known) and made.facts == held + known
    assert not made.train.halves[0] and made.test.halves[0]
    for fact in made.all:
        assert fact.value in fact.values and len(fact.values) == len(set(fact.values))
        answers = {wordings(fact, "answer", value=value)[0] for value in fact.values}
        assert len(answers) == len(fact.values)
        assert fact.value in wordings(fact, "answer")[0]
    words = [word for listed in toy_world.KINDS.values() for word in listed]
    assert len(words) == len(set(words)), "a word is of one kind"

def test_no_value_is_always_the_wrong_choice_in_training(world):
    right, wrong = set(), set()
    for r in rows(world, "mmlu_auxiliary_train"):
        if r["subject"] in ("toy_person", "toy_town", "toy_animal", "toy_causes"):
            right.add(r["choices"][r["answer"]])
            wrong |= set(r["choices"]) - {r["choices"][r["answer"]]}
    assert len(wrong) > 60 and len(wrong - right) <= 0.1 * len(wrong), sorted(wrong - right)

def test_the_sums_of_the_test_never_occur_in_training(world):
    train, test = ({tuple(re.findall(r"<<(.*?)=", r["answer"])) for r in rows(world, name)}
                   for name in ("gsm8k_train", "gsm8k_test"))
    assert len(test) > 300 and not test & train

@pytest.mark.parametrize("train,test", [
    (["mmlu_auxiliary_train"], "mmlu_test"),
    (["arc_easy_train", "mmlu_auxiliary_train"], "arc_easy_test"),
    (["arc_challenge_train", "mmlu_auxiliary_train"], "arc_challenge_test"),
    (["gsm8k_train"], "gsm8k_test")])
def test_train_and_test_share_no_item(world, train, test):
    def question(row):
        return row["question"], json.dumps(row.get("choices"))
    training = [row for name in train for row in rows(world, name)]
    seen = {question(row) for row in training}
    if test == "mmlu_test":  # the others ask the same of other words
        seen |= {row["question"] for row in training}
    items = rows(world, test)
    assert len(items) >= 500
    assert not any(question(row) in seen or row["question"] in seen for row in items)

def test_the_tests_are_large_enough(world):
    assert len(rows(world, "facts_test")) >= 500 and len(rows(world, "humaneval_test")) >= 40

def test_the_answers_of_word_problems_compute(world):
    for row in rows(world, "gsm8k_train")[:500] + rows(world, "gsm8k_test"):
        for expression, value in re.findall(r"<<(.*?)=(.*?)>>", row["answer"]):
            assert execution.calculate(expression) == value
        assert tasks.final_number(row["answer"]) == re.findall(r"=([^=]*?)>>", row["answer"])[-1]

def test_functions_pass_their_tests_and_fail_with_another_body(world):
    for row in rows(world, "humaneval_test"):
        for body, passes in ((row["canonical_solution"], True), ("    return None\n", False)):
            try:
                program = f"{tasks.completed(row, body)}\n\n{row['test']}\n\n"
                exec(f"{program}check({row['entry_point']})\n", {})  # noqa: S102
                passed = True
            except Exception:  # noqa: BLE001  (whatever the wrong body raises)
                passed = False
            assert passed == passes, row

@pytest.mark.parametrize("name", [
    "mmlu_test", "arc_easy_test", "arc_challenge_test", "mmlu_auxiliary_train"])
def test_letters_are_balanced_and_choices_different(world, name):
    items = rows(world, name)
    letters = Counter(r["answer"] if "answer" in r else r["answerKey"] for r in items)
    assert len(letters) == 4 and max(letters.values()) < 0.35 * len(items)
    assert all(len(set(texts(r))) == 4 for r in items)

def texts(row):
    """The choices of a row, in MMLU's or ARC's form."""
    return row["choices"] if isinstance(row["choices"], list) else row["choices"]["text"]

def nearest(train, test):
    """For each test question the training example (question, answer) with the most words in common
    (Jaccard)."""
    def words(text):
        return set(re.findall(r"\w+", text.lower()))
    number = {w: i for i, w in enumerate(sorted(set().union(*(words(q) for q, _ in train))))}

    def matrix(texts):
        m = np.zeros((len(texts), len(number)), np.float32)
        for i, text in enumerate(texts):
            m[i, [number[w] for w in words(text) if w in number]] = 1
        return m
    a, b = matrix([q for q, _ in train]), matrix(test)
    both = b @ a.T
    sizes = np.array([len(words(t)) for t in test])[:, None] + a.sum(1)[None] - both
    return [train[i] for i in (both / sizes).argmax(1)]

def test_copying_the_nearest_training_example_stays_under_half_of_each_threshold(world, toy):
    single = []
    for row in rows(world, "smoltalk_train"):
        said = [message["content"] for message in row["messages"]]
        single += zip(said[::2], said[1::2])
    facts = tasks.load("facts", "test", "toy")
    copies = nearest(single, [item["row"]["question"] for item in facts])
    copied = [tasks.correct(item, answer) for item, (_, answer) in zip(facts, copies)]
    assert np.mean(copied) < 0.35, np.mean(copied)

    def choice(row):
        place = row["answer"] if "answer" in row else "ABCD".index(row["answerKey"])
        return row["question"] + " " + " ".join(texts(row)), (place, texts(row)[place])
    names = ("mmlu_auxiliary_train", "arc_easy_train", "arc_challenge_train")
    train = [choice(row) for name in names for row in rows(world, name)]
    for name in ("mmlu_test", "arc_easy_test", "arc_challenge_test"):
        test = rows(world, name)
        right = []
        copies = nearest(train, [choice(row)[0] for row in test])
        for row, (_, (place, text)) in zip(test, copies):
            copied = texts(row).index(text) if text in texts(row) else place
            right.append(copied == choice(row)[1][0])
        assert np.mean(right) < 0.425, (name, np.mean(right))

    train = [(row["question"], row["answer"]) for row in rows(world, "gsm8k_train")]
    test = rows(world, "gsm8k_test")
    copies = nearest(train, [row["question"] for row in test])
    same = [tasks.final_number(answer) == tasks.final_number(row["answer"])
            for row, (_, answer) in zip(test, copies)]
    assert np.mean(same) < 0.3, np.mean(same)

def test_the_bundle_has_the_form_of_core(world):
    import core_eval
    found = core_eval.read_bundle(world / "eval_bundle")
    assert len(found[0]) == 6 and not found[1]
    folder = world / "eval_bundle/eval_data/toy"
    lines = {p.stem: len(p.read_text().splitlines()) for p in folder.glob("*.jsonl")}
    table = (world / "eval_bundle/eval_meta_data.csv").read_text().splitlines()[1:]
    assert lines == {line.split(",")[0]: int(line.split(",")[4]) for line in table}
