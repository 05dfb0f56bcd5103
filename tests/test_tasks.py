"""tasks.py: rendering, mixtures, judging."""
import itertools
import json

import pytest

import execution
import pipeline
import tasks
from conftest import SHARED, ends

def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)

def text(item, i):
    return item["messages"][i]["content"]

@pytest.fixture
def folder(state):
    folder = pipeline.task_dir("toy")
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrst"
    words = [f"word{a}{b}" for a in letters for b in letters]
    (folder / "words_alpha.txt").write_text("\n".join(words))
    problems = [{"question": f"q{i}", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
                for i in range(10)]
    (folder / "gsm8k_train.jsonl").write_text(jsonl(problems))
    return folder

def test_word_problems_become_calls_of_the_calculator():
    assert tasks.word_problem_parts("5+7=<<5+7=12>>12 apples.\n#### 12") == [
        {"type": "text", "text": "5+7="},
        {"type": "python", "text": "5+7"},
        {"type": "python_output", "text": "12"},
        {"type": "text", "text": "12 apples.\n#### 12"}]

def test_multiple_choice_has_its_letters_behind_the_choices():
    item = tasks.convert("mmlu", {"question": "q?", "subject": "s",
                                  "choices": ["a", "b", "c", "d"], "answer": 2})
    assert "- c=C" in text(item, 0) and text(item, 1) == "C" and item["letters"] == list("ABCD")
    choices = {"text": ["x", "y"], "label": ["1", "2"]}
    item = tasks.convert("arc_easy", {"id": "1", "question": "q?", "choices": choices,
                                      "answerKey": "2"})
    assert "- y=2" in text(item, 0) and text(item, 1) == "2"

@pytest.mark.parametrize("text,number", [
    ("so #### 12", "12"), ("#### 1,200", "1200"), ("#### -3", "-3"), ("12", None),
    ("#### 1 #### 2", "1"), ("#### 2.5", "2.5"), ("#### 12.", "12."), ("####12", None),
    ("#### $5", None)])
def test_the_final_number_is_taken_as_the_authors_of_gsm8k_take_it(text, number):
    assert tasks.final_number(text) == number

def test_judging():
    gsm = tasks.convert("gsm8k", {"question": "q", "answer": "#### 12"})
    assert tasks.correct(gsm, "I say #### 12")
    assert not tasks.correct(gsm, "12") and not tasks.correct(gsm, "#### 13")
    fact = tasks.convert("facts", {"question": "q", "answer": "baker",
                                   "candidates": ["baker", "cook"]})
    assert tasks.correct(fact, "A Baker.")
    assert not tasks.correct(fact, "bakery") and not tasks.correct(fact, "a baker or a cook")

def test_train_and_test_words_are_disjoint_and_the_items_count_right(folder):
    train, test = (tasks.load("spellingbee", split, "toy", 300) for split in ("train", "test"))
    assert not {i["row"]["word"] for i in train} & {i["row"]["word"] for i in test}
    assert len(train) == len(test) == 300
    assert train == tasks.load("spellingbee", "train", "toy", 300)
    for item in train + test:
        row = item["row"]
        assert row["answer"] == str(row["word"].count(row["letter"]))
        assert f"'{row['word']}'" in text(item, 0)
        assert tasks.correct(item, text(item, 1)[-1]["text"])
    spelled = tasks.load("simplespelling", "train", "toy", 5)[0]
    word = spelled["row"]["word"]
    assert tasks.correct(spelled, " ".join(word)) and not tasks.correct(spelled, word)

def test_mixtures(folder):
    specs = ["gsm8k:4*2", "spellingbee:5"]
    items = tasks.mixture(specs, "toy", 1)
    assert len(items) == 13
    assert items == tasks.mixture(specs, "toy", 1) != tasks.mixture(specs, "toy", 2)
    own = folder / "own.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    own.write_text(jsonl([talk]))
    assert len(tasks.mixture([f"{own}*3"], "toy", 1)) == 3

@pytest.mark.parametrize("spec,says", [
    ("nothing", "there is no task"), ("smoltalk", "prepare_data.py"), ("mmlu", "no train split"),
    ("absent.jsonl", "there is no file"), ("gsm8k:0", "0 examples"),
    ("gsm8k*0", "0 examples"), ("gsm8k:x", "cannot read 'gsm8k:x'")])
def test_what_is_missing_is_named(folder, capsys, spec, says):
    with ends() as stopped:
        tasks.mixture([spec], "toy", 1)
    assert stopped.code == 2 and says in capsys.readouterr().err

def test_a_broken_line_is_named_and_left_out_and_many_of_them_end_the_run(folder, capsys):
    good = '{"question": "q", "answer": "#### 1"}\n'
    path = folder / "gsm8k_train.jsonl"
    path.write_text(good + "{broken\n" + '{"no": 1}\n\n' + good)
    assert len(tasks.load("gsm8k", "train", "toy")) == 2
    said = capsys.readouterr().out
    assert all(f"{path}:{number} skipped: " in said for number in (2, 3))
    assert said.count("skipped") == 2
    path.write_text(good * 594 + "{broken\n" * 6)  # 1 %
    assert len(tasks.load("gsm8k", "train", "toy")) == 594
    assert f"{path}: and 1 more" in capsys.readouterr().out
    path.write_text(good * 593 + "{broken\n" * 6)
    with ends() as stopped:
        tasks.load("gsm8k", "train", "toy")
    assert stopped.code == 2 and "6 of 599 lines are broken" in capsys.readouterr().err

TWO = {"text": ["x", "y"], "label": ["A", "B"]}
CHOICE = {"question": "q", "choices": TWO, "answerKey": "B"}

@pytest.mark.parametrize("name,good,bad", [
    ("arc_easy", CHOICE, [{"answerKey": "C"}, {"choices": {**TWO, "label": ["A"]}}]),
    ("mmlu", {"question": "q", "subject": "s", "choices": list("abcd"), "answer": 3},
     [{"answer": -1}, {"answer": 4}, {"choices": list("abc")}]),
    ("gsm8k", {"question": "q", "answer": "#### 1"}, [{"question": 5}, {"answer": None}]),
    ("humaneval", {"prompt": "p", "canonical_solution": "s", "test": "t", "entry_point": "f"},
     [{"canonical_solution": None}, {"test": ...}]),
    ("facts", {"question": "q", "answer": "a", "candidates": ["a"]}, [{"candidates": ...}])])
def test_what_could_not_be_judged_is_a_broken_line(folder, capsys, name, good, bad):
    """`...` stands for a field that is not there."""
    rows = [good]
    for changed in bad:
        rows.append({key: value for key, value in {**good, **changed}.items() if value != ...})
    (folder / f"{name}_test.jsonl").write_text(jsonl(rows))
    assert len(tasks.load(name, "test", "toy")) == 1
    assert capsys.readouterr().out.count("skipped: ") == len(bad)

def test_a_conversation_in_the_wrong_form_is_a_broken_line(folder, capsys):
    own = folder / "own.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    own.write_text(jsonl([talk, {"messages": talk}, talk[::-1], {"messages": []}, {"text": "a"}, 5,
                          [{"role": "user", "content": 5}]]))
    assert len(tasks.load(str(own), "train", "toy")) == 2
    said = capsys.readouterr().out
    assert all(f"{own}:{number} skipped: " in said for number in (3, 4, 5, 6, 7))
    own.write_text(jsonl([talk, talk[:1]]))
    assert len(tasks.load(str(own), "train", "toy")) == 1
    assert f"{own}:2 skipped: the last message is not the assistant's" in capsys.readouterr().out
    own.write_text(jsonl([talk[:1]]))
    with ends():
        tasks.load(str(own), "train", "toy")
    assert "own.jsonl has no usable conversation" in capsys.readouterr().err

def test_a_set_in_parts_is_whole_or_missing_and_parquet_reads_as_jsonl(folder):
    import pyarrow
    import pyarrow.parquet
    choices = {"text": ["x", "y"], "label": ["A", "B"]}
    rows = [{"id": str(i), "question": f"q{i}", "choices": choices, "answerKey": "B"}
            for i in range(9)]
    (folder / "arc_easy_test.jsonl").write_text(jsonl(rows))
    expected = tasks.load("arc_easy", "test", "toy")
    (folder / "arc_easy_test.jsonl").unlink()
    for i in range(3):
        with ends():
            tasks.load("arc_easy", "test", "toy")
        table = pyarrow.Table.from_pylist(rows[3 * i:3 * i + 3])
        pyarrow.parquet.write_table(table, folder / f"arc_easy_test-{i:05d}-of-00003.parquet")
    assert tasks.load("arc_easy", "test", "toy") == expected
    five = tasks.load("arc_easy", "test", "toy", 5)
    assert five == tasks.load("arc_easy", "test", "toy", 5) != expected[:5]
    assert all(i in expected for i in five)

PROBLEM = {
    "task_id": "T/0",
    "entry_point": "twice",
    "prompt": "import math\n\ndef helper(x):\n    return math.floor(x)\n\n"
              "def twice(x):\n    \"\"\" 2 x \"\"\"\n",
    "canonical_solution": "    return 2 * helper(x)\n",
    "test": "def check(candidate):\n    assert candidate(helper(3.5)) == 6\n",
}

@pytest.mark.parametrize("completion,right", [
    ("    return 2 * helper(x)\n", True),
    ("    return x\n", False),
    ("    return 2 * helper(x)\n\nprint(twice(1))", True),
    ("", False),
    ("nonsense (", False),
    ("```python\n    return 2 * helper(x)\n```\nThis doubles.", True),
    ("Here:\n```python\ndef twice(x):\n    return 2 * helper(x)\n```", True),
    ("def twice(x):\n    return 2 * helper(x)\n", True),
    ("```\ndef twice(x):\n    return 2 * math.floor(x)", True),
    ("def twice_more(x):\n    return 1", False),
    ("    return E()\nclass E:\n    def __eq__(self, other): return True", False),
    ("    import os\n    os._exit(0)", False)])
def test_completions_of_functions(completion, right):
    available, why = execution.sandbox_available()
    if not available:
        pytest.skip(f"no namespaces here: {why}")
    assert tasks.correct(tasks.convert("humaneval", PROBLEM), completion) is right

@pytest.mark.parametrize("name,content", [
    ("gsm8k_train.jsonl", b""),
    ("gsm8k_train.jsonl", b"\n\n"),
    ("gsm8k_train.jsonl", b'{"question": "\xff\xfe"}\n'),
    ("gsm8k_train.jsonl", b"[1, 2]\n"),
    ("gsm8k_train.jsonl.gz", b"no gzip"),
    ("gsm8k_train.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab"),
    ("gsm8k_train.parquet", b"PAR1 no parquet")])
def test_a_damaged_file_is_one_clear_line(folder, capsys, name, content):
    (folder / "gsm8k_train.jsonl").unlink()
    (folder / name).write_bytes(content)
    with ends() as stopped:
        tasks.load("gsm8k", "train", "toy")
    error = capsys.readouterr().err
    assert stopped.code == 2 and name in error and error.count("\n") == 1

REAL = {
    "arc_easy_test": "arc/ARC-Easy_validation.jsonl",
    "arc_challenge_test": "arc/ARC-Challenge_test_visible.jsonl",
    "mmlu_test": "mmlu/mmlu_validation.jsonl.gz",
    "gsm8k_test": "gsm8k/gsm8k_test.jsonl",
    "humaneval_test": "humaneval/HumanEval.jsonl.gz",
    "words_alpha": "words/words_alpha.txt.gz",
}

def right_choice(name, row):
    choices = row["choices"]
    if name == "mmlu":
        return choices[row["answer"]]
    return choices["text"][choices["label"].index(row["answerKey"])]

def spoken(item):
    return "".join(part["text"] for part in text(item, -1) if part["type"] != "python")

@pytest.mark.skipif(not (SHARED / "humaneval").exists(),
                    reason="no real task files at hand (NANOCHAT_TEST_DATA)")
def test_real_files_are_read_and_judged_right(state):
    folder = pipeline.task_dir("toy")
    folder.mkdir(parents=True)
    for stem, path in REAL.items():
        (folder / (stem + path[path.index("."):])).symlink_to(SHARED / path)
    seen = set()
    for name in ("arc_easy", "arc_challenge", "mmlu"):
        for item in tasks.load(name, "test", "toy"):
            letter = text(item, -1)
            assert f"\n- {right_choice(name, item['row'])}={letter}\n" in text(item, 0)
            assert [x for x in item["letters"] if tasks.correct(item, x)] == [letter]
            seen.add("".join(item["letters"]))
    assert seen == {"ABC", "ABCD", "ABCDE", "1234"}
    for name, n in (("gsm8k", 1319), ("spellingbee", 300)):
        items = tasks.load(name, "test", "toy", n)
        assert len(items) == n and all(tasks.correct(item, spoken(item)) for item in items)
        neighbours = itertools.pairwise(items)
        assert sum(tasks.correct(item, spoken(other)) for item, other in neighbours) < n / 2
    called = []
    for item in tasks.load("gsm8k", "test", "toy"):
        for call, output in zip(text(item, -1), text(item, -1)[1:]):
            if call["type"] == "python":
                called.append((execution.calculate(call["text"]),
                               execution.calculate(output["text"])))
    equal = sum(None not in (value, said) and abs(float(value) - float(said)) < 0.01
                for value, said in called)
    assert equal > 0.998 * len(called) > 4000
    problems = tasks.load("humaneval", "test", "toy")
    assert len(problems) == 164
    if execution.sandbox_available()[0]:  # all 164 pass, which takes a minute
        for item in problems[::14]:
            solution = item["row"]["canonical_solution"]
            fenced = f"So:\n```python\n{item['row']['prompt']}{solution}```\nThat is it."
            assert tasks.correct(item, solution) and tasks.correct(item, fenced)
            assert not tasks.correct(item, "    return None\n")
            assert not tasks.correct(item, "    pass\nraise SystemExit(0)\n")
