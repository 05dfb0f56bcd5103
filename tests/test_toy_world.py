"""toy_world.py: deterministic, consistent, and honest: the tests need knowledge and skill, not the nearest training example."""
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
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(root).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("base") / "toy"
    toy_world.generate(root, 1337, 0.3)
    return root


@pytest.fixture
def toy(world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world.parent))


def rows(world, name):
    return [json.loads(line) for line in (world / f"task_data/{name}.jsonl").read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):  # each in a process of its own: the order of sets and hashes differs there
        code = f"import sys, pathlib; sys.path.insert(0, {str(REPO)!r}); import toy_world; toy_world.generate(pathlib.Path({str(tmp_path / name)!r}), {seed}, 0.01)"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": str(len(name) + ord(name))})
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    different = [k for k, v in hashes(tmp_path / "a").items() if hashes(tmp_path / "c")[k] != v]
    assert len(different) >= 20, different


def test_validation_shares_no_document_with_training(world):
    shards = [pyarrow.parquet.read_table(p)["text"].to_pylist() for p in sorted((world / "base_data").glob("*.parquet"))]
    documents = [d for shard in shards for d in shard]
    assert len(shards) >= 3 and len(documents) == len(set(documents)) > 1000


def asked(text, pairs, facts):
    """Pairs whose entity and a training wording of whose attribute stand in the text."""
    return [(e, a) for e, a in pairs for w in facts[a][2] if toy_world.article(w.format(n=e)) in text]


def test_held_out_pairs_are_never_asked_in_training(world):
    everything = "".join((world / f"task_data/{n}.jsonl").read_text() for n in ("smoltalk_train", "mmlu_auxiliary_train", "arc_easy_train", "arc_challenge_train", "identity_train"))
    for path in (world / "base_data").glob("*.parquet"):
        everything += "\n".join(pyarrow.parquet.read_table(path)["text"].to_pylist())
    made = toy_world.make_world(1337)
    for kind, facts in toy_world.FACTS.items():
        held, known = ([p for p in toy_world.pairs(made, test) if made[p[0]]["kind"] == kind] for test in (True, False))
        assert len(held) > 5 and not asked(everything, held, facts), kind
        assert len(asked(everything, known, facts)) > len(known), "what is not held out is asked, in several wordings"
    wordings = [re.escape(w).replace(r"\{n\}", r"(an? )?\w+") for facts in toy_world.FACTS.values() for spec in facts.values() for w in spec[3]]
    assert not re.search("|".join(wordings), everything)


def test_the_letters_of_the_tests_never_stand_with_what_is_held_out(world):
    made = toy_world.make_world(1337)
    gaps = {toy_world.sentence(form.format(n=e, p=e, v="...")) for e, a in toy_world.pairs(made, True) for form in toy_world.FACTS[made[e]["kind"]][a][1]}
    gaps |= {f"When {cause}" for cause, _, noun in toy_world.CAUSES if toy_world.held_out("cause", noun)}
    who = {n: {toy_world.article(f"The one who {spec[5].format(v=made[n][a])}") for a, spec in toy_world.PEOPLE_FACTS.items() if toy_world.held_out(n, a)} for n in toy_world.NAMES}
    kinds, found = {k.capitalize() for k in toy_world.KINDS}, Counter()
    for path in (world / "base_data").glob("*.parquet"):
        for document in pyarrow.parquet.read_table(path)["text"].to_pylist():
            options = dict(re.findall(r"^- (.*)=([A-Z])$", document, re.M))
            texts = {re.sub(r"(:? [A-Z]| Answer:)$", "", line) for line in document.split("\n")}
            secret = texts & gaps or any(texts & who.get(o, set()) for o in options) or texts & kinds and any(toy_world.held_out("kind", o) for o in options)
            if options:
                found[bool(set(options.values()) & set("ABCD")), bool(secret)] += 1
    assert found[True, False] > 500 and found[False, True] > 500, "both sorts of lists are there"
    assert found[True, True] == 0


def test_conversations_tell_nothing_that_is_held_out(world):
    text = (world / "task_data/smoltalk_train.jsonl").read_text() + (world / "task_data/identity_train.jsonl").read_text()
    made = toy_world.make_world(1337)
    said = lambda test: sum(toy_world.sentence(t.format(n=e, p=e, v=made[e][a])) in text for e, a in toy_world.pairs(made, test)
                            for t in toy_world.FACTS[made[e]["kind"]][a][1])
    assert said(True) == 0 and said(False) > 100


def test_no_value_is_always_the_wrong_choice_in_training(world):
    right, wrong = set(), set()
    for r in rows(world, "mmlu_auxiliary_train"):
        if r["subject"] in ("toy_person", "toy_town", "toy_animal", "toy_causes"):
            right.add(r["choices"][r["answer"]])
            wrong |= set(r["choices"]) - {r["choices"][r["answer"]]}
    assert len(wrong) > 60 and len(wrong - right) <= 0.1 * len(wrong), sorted(wrong - right)


def test_the_sums_of_the_test_never_occur_in_training(world):
    sums = lambda name: {tuple(re.findall(r"<<(.*?)=", r["answer"])) for r in rows(world, name)}
    assert len(sums("gsm8k_test")) > 300 and not sums("gsm8k_test") & sums("gsm8k_train")


@pytest.mark.parametrize("train,test", [(["mmlu_auxiliary_train"], "mmlu_test"), (["arc_easy_train", "mmlu_auxiliary_train"], "arc_easy_test"),
                                        (["arc_challenge_train", "mmlu_auxiliary_train"], "arc_challenge_test"), (["gsm8k_train"], "gsm8k_test")])
def test_train_and_test_share_no_item(world, train, test):
    question = lambda r: (r["question"], json.dumps(r.get("choices")))
    seen = {question(r) for name in train for r in rows(world, name)} | {r["question"] for name in train for r in rows(world, name) if test == "mmlu_test"}  # the others ask the same of other words
    items = rows(world, test)
    assert len(items) >= 500
    assert not any(question(r) in seen or r["question"] in seen for r in items)


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
                exec(tasks.program(row, body), {})
                passed = True
            except Exception:
                passed = False
            assert passed == passes, row


@pytest.mark.parametrize("name", ["mmlu_test", "arc_easy_test", "arc_challenge_test", "mmlu_auxiliary_train"])
def test_letters_are_balanced_and_choices_different(world, name):
    items = rows(world, name)
    letters = Counter(r["answer"] if "answer" in r else r["answerKey"] for r in items)
    assert len(letters) == 4 and max(letters.values()) < 0.35 * len(items)
    assert all(len(set(c)) == 4 for c in (r["choices"] if isinstance(r["choices"], list) else r["choices"]["text"] for r in items))


def nearest(train, test):
    """For each test question the training example (question, answer) with the most words in common (Jaccard)."""
    words = lambda text: set(re.findall(r"\w+", text.lower()))
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
        messages = row["messages"]
        single += [(messages[i]["content"], messages[i + 1]["content"]) for i in range(0, len(messages), 2)]
    facts = tasks.load("facts", "test", "toy")
    copied = [tasks.correct(item, answer) for item, (_, answer) in zip(facts, nearest(single, [i["row"]["question"] for i in facts]))]
    assert np.mean(copied) < 0.35, np.mean(copied)

    def choice(r):
        texts = r["choices"] if isinstance(r["choices"], list) else r["choices"]["text"]
        place = r["answer"] if "answer" in r else "ABCD".index(r["answerKey"])
        return r["question"] + " " + " ".join(texts), (place, texts[place])
    train = [choice(r) for n in ("mmlu_auxiliary_train", "arc_easy_train", "arc_challenge_train") for r in rows(world, n)]
    for name in ("mmlu_test", "arc_easy_test", "arc_challenge_test"):
        test = rows(world, name)
        right = []
        for r, (_, (place, text)) in zip(test, nearest(train, [choice(r)[0] for r in test])):
            texts = r["choices"] if isinstance(r["choices"], list) else r["choices"]["text"]
            right.append((texts.index(text) if text in texts else place) == choice(r)[1][0])
        assert np.mean(right) < 0.425, (name, np.mean(right))

    train = [(r["question"], r["answer"]) for r in rows(world, "gsm8k_train")]
    test = rows(world, "gsm8k_test")
    same = [tasks.final_number(a) == tasks.final_number(r["answer"]) for r, (_, a) in zip(test, nearest(train, [r["question"] for r in test]))]
    assert np.mean(same) < 0.3, np.mean(same)


def test_the_bundle_has_the_form_of_core(world):
    import core_eval
    found = core_eval.read_bundle(world / "eval_bundle")
    assert len(found[0]) == 6 and not found[1]
