"""tasks.py: rendering, mixtures, judging."""
import json

import pytest

import common
import execution
import tasks
from conftest import SHARED


@pytest.fixture
def folder(state):
    folder = common.task_dir("toy")
    folder.mkdir(parents=True)
    (folder / "words_alpha.txt").write_text("\n".join(f"word{chr(97 + i)}{chr(97 + j)}" for i in range(20) for j in range(20)))
    (folder / "gsm8k_train.jsonl").write_text("".join(json.dumps({"question": f"q{i}", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}) + "\n" for i in range(10)))
    return folder


def test_word_problems_become_calls_of_the_calculator():
    assert tasks.word_problem_parts("5+7=<<5+7=12>>12 apples.\n#### 12") == [
        {"type": "text", "text": "5+7="}, {"type": "python", "text": "5+7"}, {"type": "python_output", "text": "12"}, {"type": "text", "text": "12 apples.\n#### 12"}]


def test_multiple_choice_has_its_letters_behind_the_choices():
    item = tasks.convert("mmlu", {"question": "q?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 2})
    assert "- c=C" in item["messages"][0]["content"] and item["messages"][1]["content"] == "C" and item["letters"] == list("ABCD")
    item = tasks.convert("arc_easy", {"id": "1", "question": "q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"})
    assert "- y=2" in item["messages"][0]["content"] and item["messages"][1]["content"] == "2"


@pytest.mark.parametrize("text,number", [("so #### 12", "12"), ("#### 1,200", "1200"), ("#### -3", "-3"), ("12", None), ("#### 1 #### 2", "1"), ("#### 2.5", "2.5"),
                                         ("#### 12.", "12."), ("####12", None), ("#### $5", None)])
def test_the_final_number_is_taken_as_the_authors_of_gsm8k_take_it(text, number):
    assert tasks.final_number(text) == number


def test_judging():
    gsm = tasks.convert("gsm8k", {"question": "q", "answer": "#### 12"})
    assert tasks.correct(gsm, "I say #### 12") and not tasks.correct(gsm, "12") and not tasks.correct(gsm, "#### 13")
    fact = tasks.convert("facts", {"question": "q", "answer": "baker", "candidates": ["baker", "cook"]})
    assert tasks.correct(fact, "A Baker.") and not tasks.correct(fact, "bakery") and not tasks.correct(fact, "a baker or a cook")


def test_train_and_test_words_are_disjoint_and_the_items_count_right(folder):
    train, test = (tasks.load("spellingbee", split, "toy", 300) for split in ("train", "test"))
    assert not {i["row"]["word"] for i in train} & {i["row"]["word"] for i in test} and len(train) == len(test) == 300
    assert train == tasks.load("spellingbee", "train", "toy", 300)
    for item in train + test:
        assert item["row"]["answer"] == str(item["row"]["word"].count(item["row"]["letter"]))
        assert f"'{item['row']['word']}'" in item["messages"][0]["content"]
        assert tasks.correct(item, item["messages"][1]["content"][-1]["text"])
    spelled = tasks.load("simplespelling", "train", "toy", 5)[0]
    assert tasks.correct(spelled, " ".join(spelled["row"]["word"])) and not tasks.correct(spelled, spelled["row"]["word"])


def test_mixtures(folder):
    items = tasks.mixture(["gsm8k:4*2", "spellingbee:5"], "toy", 1)
    assert len(items) == 13 and items == tasks.mixture(["gsm8k:4*2", "spellingbee:5"], "toy", 1) != tasks.mixture(["gsm8k:4*2", "spellingbee:5"], "toy", 2)
    own = folder / "own.jsonl"
    own.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) + "\n")
    assert len(tasks.mixture([f"{own}*3"], "toy", 1)) == 3


@pytest.mark.parametrize("spec,says", [("nothing", "there is no task"), ("smoltalk", "prepare_data.py"), ("mmlu", "no train split"), ("absent.jsonl", "there is no file"), ("gsm8k:0", "no item at all"), ("gsm8k*0", "no item at all")])
def test_what_is_missing_is_named(folder, capsys, spec, says):
    with pytest.raises(SystemExit) as stopped:
        tasks.mixture([spec], "toy", 1)
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_a_broken_line_is_named_and_left_out_and_many_of_them_end_the_run(folder, capsys):
    good = '{"question": "q", "answer": "#### 1"}\n'
    path = folder / "gsm8k_train.jsonl"
    path.write_text(good + "{broken\n" + '{"no": 1}\n\n' + good)
    assert len(tasks.load("gsm8k", "train", "toy")) == 2
    said = capsys.readouterr().out
    assert "gsm8k_train.jsonl:2: left out" in said and "gsm8k_train.jsonl:3: left out" in said and said.count("left out") == 2
    path.write_text(good * 594 + "{broken\n" * 6)  # 1 %
    assert len(tasks.load("gsm8k", "train", "toy")) == 594
    path.write_text(good * 593 + "{broken\n" * 6)
    with pytest.raises(SystemExit) as stopped:
        tasks.load("gsm8k", "train", "toy")
    assert stopped.value.code == 2 and "6 broken lines" in capsys.readouterr().err


def test_a_conversation_in_the_wrong_form_is_a_broken_line(folder, capsys):
    own = folder / "own.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    own.write_text("".join(json.dumps(c) + "\n" for c in (talk, {"messages": talk}, talk[::-1], {"messages": []}, {"text": "a"}, 5, [{"role": "user", "content": 5}])))
    assert len(tasks.load(str(own), "train", "toy")) == 2
    said = capsys.readouterr().out
    assert all(f"own.jsonl:{n}: left out" in said for n in (3, 4, 5, 6, 7))


def test_a_set_in_parts_is_whole_or_missing_and_parquet_reads_as_jsonl(folder, capsys):
    import pyarrow
    import pyarrow.parquet
    rows = [{"id": str(i), "question": f"q{i}", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"} for i in range(9)]
    (folder / "arc_easy_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    expected = tasks.load("arc_easy", "test", "toy")
    (folder / "arc_easy_test.jsonl").unlink()
    for i in range(3):
        with pytest.raises(SystemExit):
            tasks.load("arc_easy", "test", "toy")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[3 * i:3 * i + 3]), folder / f"arc_easy_test-{i:05d}-of-00003.parquet")
    assert tasks.load("arc_easy", "test", "toy") == expected
    five = tasks.load("arc_easy", "test", "toy", 5)
    assert five == tasks.load("arc_easy", "test", "toy", 5) != expected[:5] and all(i in expected for i in five)


PROBLEM = {"task_id": "T/0", "entry_point": "twice", "prompt": "import math\n\ndef helper(x):\n    return math.floor(x)\n\ndef twice(x):\n    \"\"\" 2 x \"\"\"\n",
           "canonical_solution": "    return 2 * helper(x)\n", "test": "def check(candidate):\n    assert candidate(helper(3.5)) == 6\n"}


@pytest.mark.parametrize("completion,right", [
    ("    return 2 * helper(x)\n", True), ("    return x\n", False), ("    return 2 * helper(x)\n\nprint(twice(1))", True), ("", False), ("nonsense (", False),
    ("```python\n    return 2 * helper(x)\n```\nThis doubles.", True), ("Here:\n```python\ndef twice(x):\n    return 2 * helper(x)\n```", True),
    ("def twice(x):\n    return 2 * helper(x)\n", True), ("```\ndef twice(x):\n    return 2 * math.floor(x)", True), ("def twice_more(x):\n    return 1", False),
    ("    return E()\nclass E:\n    def __eq__(self, other): return True", False), ("    import os\n    os._exit(0)", False)])
def test_completions_of_functions(completion, right):
    import execution
    if not execution.sandbox_available()[0]:
        pytest.skip(f"no namespaces here: {execution.sandbox_available()[1]}")
    assert tasks.correct(tasks.convert("humaneval", PROBLEM), completion) is right


@pytest.mark.parametrize("name,content", [
    ("gsm8k_train.jsonl", b""), ("gsm8k_train.jsonl", b"\n\n"), ("gsm8k_train.jsonl", b'{"question": "\xff\xfe"}\n'), ("gsm8k_train.jsonl", b"[1, 2]\n"),
    ("gsm8k_train.jsonl.gz", b"no gzip"), ("gsm8k_train.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab"), ("gsm8k_train.parquet", b"PAR1 no parquet")])
def test_a_damaged_file_is_one_clear_line(folder, capsys, name, content):
    (folder / "gsm8k_train.jsonl").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        tasks.load("gsm8k", "train", "toy")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and name in error and error.count("\n") == 1


REAL = {"arc_easy_test": "arc/ARC-Easy_validation.jsonl", "arc_challenge_test": "arc/ARC-Challenge_test_visible.jsonl", "mmlu_test": "mmlu/mmlu_validation.jsonl.gz",
        "gsm8k_test": "gsm8k/gsm8k_test.jsonl", "humaneval_test": "humaneval/HumanEval.jsonl.gz", "words_alpha": "words/words_alpha.txt.gz"}


@pytest.mark.skipif(not (SHARED / "humaneval").exists(), reason="no real task files at hand (NANOCHAT_TEST_DATA)")
def test_real_files_are_read_and_judged_right(state):
    folder = common.task_dir("toy")
    folder.mkdir(parents=True)
    for stem, path in REAL.items():
        (folder / (stem + path[path.index("."):])).symlink_to(SHARED / path)
    seen = set()
    for name in ("arc_easy", "arc_challenge", "mmlu"):
        for item in tasks.load(name, "test", "toy"):
            row, letter, choices = item["row"], item["messages"][-1]["content"], item["row"]["choices"]
            right = choices[row["answer"]] if name == "mmlu" else choices["text"][choices["label"].index(row["answerKey"])]
            assert f"\n- {right}={letter}\n" in item["messages"][0]["content"]
            assert [x for x in item["letters"] if tasks.correct(item, x)] == [letter]
            seen.add("".join(item["letters"]))
    assert seen == {"ABC", "ABCD", "ABCDE", "1234"}
    for name, n in (("gsm8k", 1319), ("spellingbee", 300)):
        items = tasks.load(name, "test", "toy", n)
        spoken = lambda item: "".join(part["text"] for part in item["messages"][-1]["content"] if part["type"] != "python")
        assert len(items) == n and all(tasks.correct(item, spoken(item)) for item in items)
        assert sum(tasks.correct(item, spoken(other)) for item, other in zip(items, items[1:])) < n / 2
    called = [(execution.calculate(a["text"]), execution.calculate(b["text"])) for item in tasks.load("gsm8k", "test", "toy") for a, b in zip(item["messages"][-1]["content"], item["messages"][-1]["content"][1:])
              if a["type"] == "python"]
    assert sum(None not in (value, said) and abs(float(value) - float(said)) < 0.01 for value, said in called) > 0.998 * len(called) > 4000
    problems = tasks.load("humaneval", "test", "toy")
    assert len(problems) == 164
    if execution.sandbox_available()[0]:  # all 164 pass, which takes a minute
        for item in problems[::14]:
            row = item["row"]
            assert tasks.correct(item, row["canonical_solution"]) and tasks.correct(item, f"So:\n```python\n{row['prompt']}{row['canonical_solution']}```\nThat is it.")
            assert not tasks.correct(item, "    return None\n") and not tasks.correct(item, "    pass\nraise SystemExit(0)\n")
