"""tasks.py: rendering, mixtures, judging."""
import gzip
import itertools
import json

import pytest

import common
import configurator
import conversations
import data
import execution
import pipeline
import tasks
from conftest import BYTES, SHARED, alone, ends, script
from test_cli import make

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

def test_any_path_may_stand_in_a_mixture(folder, monkeypatch):
    """With blanks, commas, colons, stars and equals signs in it, as text or as a list."""
    monkeypatch.chdir(folder)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    names = ["my chats, v2.jsonl", "a:3=b*2.jsonl", ",.json", "a,b, c.jsonl"]
    for name in names:
        (folder / name).write_text(jsonl([talk]))
    for name in names:
        for given in (f"{name}*2,gsm8k:3", f"gsm8k:3, {name}*2", f"['{name}*2', 'gsm8k:3']",
                      f"{folder}/{name}:1*2,gsm8k:3"):
            specs = configurator.convert("mixture", given, [])
            assert len(specs) == 2 and len(tasks.mixture(specs, "toy", 1)) == 5, given
    assert configurator.convert("mixture", "a,b*2, c.jsonl,,x", []) == ["a", "b*2", "c.jsonl", "",
                                                                         "x"]

@pytest.mark.parametrize("spec,says", [
    ("nothing", "there is no task"), ("smoltalk", "prepare_data.py"), ("mmlu", "no train split"),
    ("absent.jsonl", "there is no file"), ("gsm8k:0", "0 examples"),
    ("gsm8k*0", "0 examples"), ("gsm8k:x", "cannot read 'gsm8k:x'"),
    ("gsm8k:-1", "cannot read 'gsm8k:-1'"), ("gsm8k*99999999999", "at most 10,000,000 examples"),
    ("gsm8k:" + "9" * 5000, "cannot read"), ("spellingbee:99999999", "asks for too much"),
    (7, "7 is no name of a task"), ("a\nb", "there is no task"), ("", "there is no task")])
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
    ("gsm8k", {"question": "q", "answer": "#### 1"},
     [{"question": 5}, {"answer": None}, {"answer": "12"}]),
    ("humaneval", {"prompt": "p", "canonical_solution": "s", "test": "t", "entry_point": "f"},
     [{"canonical_solution": None}, {"test": ...}, {"test": 5}, {"entry_point": None}]),
    ("facts", {"question": "q", "answer": "a", "candidates": ["a"]},
     [{"candidates": ...}, {"candidates": "ab"}, {"candidates": ["b"]}])])
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
    own.write_text(jsonl([talk[::-1]]))
    with ends():
        tasks.load(str(own), "train", "toy")
    assert "own.jsonl has no usable conversation" in capsys.readouterr().err

def talk_of(*said):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text}
                         for i, text in enumerate(said)]}

def test_what_teaches_nothing_is_counted_by_reason_and_so_are_the_answers_that_a_cut_loses():
    counts = {}
    talks = [talk_of("a", "b"), talk_of("a", "b", "c"), talk_of("a"), talk_of("a", ""),
             talk_of("a", " \n", "b", ""), talk_of("a" * 40, "b"), talk_of("a", "b" * 40),
             talk_of("a", "b", "c" * 40, "d", "e", "f"), talk_of("a", "", "c" * 40, "d")]
    kept = [conversations.render(talk, BYTES, 20, counts) for talk in talks]
    assert [ids is not None for ids in kept] == [1, 1, 0, 0, 0, 0, 1, 1, 0]
    assert all(len(ids) == len(mask) <= 20 for ids, mask in filter(None, kept))
    count = conversations.total(counts)
    assert conversations.in_words(count, 19) == (
        "9 conversations; 4 longer than a row of 19 tokens and cut (4 answers lost, 1 cut short); "
        "5 teach nothing: 1 without an answer of the assistant, 2 with empty answers only, "
        "2 with all answers behind the cut")
    assert conversations.teaches(count) and not conversations.teaches({})
    counts = {}
    for talk in talks:
        conversations.render(talk, None, None, counts)
    assert conversations.in_words(conversations.total(counts)) == (
        "9 conversations; 3 teach nothing: 1 without an answer of the assistant, 2 with empty "
        "answers only")

# the scripts, all in one process: importing takes longest
REFUSED = """
import json, runpy, sys
sys.path.insert(0, ".")
import common
for argv in json.loads(sys.argv[1]):
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except common.Failure as e:
        print(e.code, "torch" in sys.modules, e)
"""

def test_mid_and_sft_on_conversations_that_teach_nothing_end_before_anything_changes(state):
    def unlike_tokens():
        return {path: path.read_bytes() for path in state.rglob("*")
                if path.is_file() and "tokens" not in path.parts}
    for stage in ("base", "mid", "sft"):
        make(stage)
    make("base", tag="d2")  # goes on to a new mid,
    make("mid", tag="d3")   # and this one to a new sft
    own = {"good": [talk_of("a", "b")], "users": [talk_of("a")] * 3, "empty": [talk_of("a", "")],
           "behind": [talk_of("a" * 100, "b")] * 7}
    for name, talks in own.items():
        own[name] = state / f"{name}.jsonl"
        own[name].write_text(jsonl(talks))
    before = unlike_tokens()
    good = own["good"]
    calls, expected = [], []
    for script_name, new in (("mid_train.py", "d2"), ("chat_sft.py", "d3")):
        for action in (f"--tag={new}", "--start_over=True", "--try_out=True"):
            for mixture, held_out, says in [
                    (own["users"], good, "users.jsonl: 3 conversations; 3 teach nothing: 3 with"),
                    (own["empty"], good, "empty.jsonl: 1 conversations; 1 teach nothing: 1 with"),
                    (own["behind"], good, "7 teach nothing: 7 with all answers behind the cut"),
                    (f"{good},{own['users']}", good, f"nothing to learn in {own['users']}: 3 conv"),
                    (good, own["users"], f"to measure in --held_out={own['users']}: 3 conv"),
                    (good, own["empty"], "1 with empty answers only"),
                    (good, f"{own['users']},{own['behind']}", "(7 answers lost, 0 cut short)")]:
                calls.append([script_name, "--data=toy", "--tag=d1", action,
                              f"--mixture={mixture}", f"--held_out={held_out}"])
                expected.append(says)
    out = script(state, "-c", REFUSED, json.dumps(calls))
    lines = [line for line in out.stdout.split("\n") if line[:1].isdigit()]
    for line, says in zip(lines, expected, strict=True):
        assert line.startswith("2 False ") and says in line, line
    assert unlike_tokens() == before

def test_a_few_conversations_of_ones_own_are_enough_to_finetune_on(state):
    make("base")
    make("mid")
    own = state / "my own, chats.jsonl"
    own.write_text(jsonl([talk_of("a", "b")] * 2 + [talk_of("a"), talk_of("c" * 99, "d"),
                                                    talk_of("a", "b" * 99)]))
    args = ["--data=toy", f"--mixture={own}", f"--held_out={own}", "--device=cpu", "--threads=1",
            "--dtype=float32", "--compile=False", "--total_batch_size=256"]
    out = script(state, "chat_sft.py", *args)
    assert out.returncode == 0, out.stdout + out.stderr
    counted = ("5 conversations; 2 longer than a row of 64 tokens and cut (1 answers lost, 1 cut "
               "short); 2 teach nothing: 1 without an answer of the assistant, 1 with all answers "
               "behind the cut\n")
    assert f"sft d1: {counted}  held out: {counted}" in out.stdout
    assert out.stdout.count("teach nothing") == 2 and "less than one batch of 256" in out.stdout
    assert "no token" not in out.stdout
    # half done with rows of an earlier version, which left nothing out: the same rows are gone on
    # with
    files = tasks.fingerprint([str(own)], "train", "toy")
    documents = [BYTES.render_conversation(talk_of("a", "b")), ([*b"c" * 64], [0] * 64)]
    name = f"{files}-7"
    data.make_store(alone(), "toy", BYTES, f"chat_{name}_65", name, documents, {"cut": 1})
    out = script(state, "chat_sft.py", *args, "--seed=7", "--start_over=True",
                 "--total_batch_size=64")
    assert out.returncode == 0, out.stdout + out.stderr
    assert "1 teach nothing: 1 without a token to train on" in out.stdout
    assert "2 steps of 1 of the 2 rows" in out.stdout

def test_prepare_data_says_what_ones_own_conversations_teach(state):
    own = state / "own.jsonl"
    state.mkdir()

    def check(*talks):
        own.write_text(jsonl(talks))
        return script(state, "prepare_data.py", f"--data={state}", "--check=True", "--phases=sft",
                      f"--mixture={own}", f"--held_out={own}")
    common.atomic_write(state / "a.txt", "Once upon a time.\n\n" * 50)
    talks = [talk_of("a", "b"), talk_of("a"), talk_of("c" * 99, "d")]
    out = check(*talks)
    assert out.returncode == 0, out.stdout + out.stderr
    said = "3 conversations; 1 teach nothing: 1 without an answer of the assistant"
    assert out.stdout.count(said) == 1
    assert not list(state.glob("*/*")), "it only looks"
    make("base", data=str(state))  # a tokenizer, and rows of 64 tokens
    out = check(*talks)
    assert out.returncode == 0 and (
        "3 conversations; 1 longer than a row of 64 tokens and cut (1 answers lost, 0 cut short); "
        "2 teach nothing: 1 without an answer of the assistant, 1 with all answers behind the cut"
    ) in out.stdout, out.stdout
    out = check(*talks[1:])
    assert out.returncode == 2 and out.stderr.count("\n") == 1
    assert f"there is nothing to learn in {own}: 2 conversations; " in out.stderr
    out = check(talks)  # one line, an array of conversations
    assert out.returncode == 0 and "3 conversations; 1 longer than a row of 64" in out.stdout

@pytest.mark.parametrize("name", ["mid_train.py", "chat_sft.py"])
def test_help_shows_how_a_conversation_is_written(name):
    doc = (pipeline.REPO / name).read_text().split('"""')[1]
    line, = [line for line in doc.split("\n") if line.startswith('    {"messages"')]
    assert rendered(json.loads(line)) in PLAIN

# ---- conversations as people have them: each as the text of its tokens, and what is trained on

def said(role, content, **more):
    return {"role": role, "content": content, **more}

def rendered(row):
    """-> (the text of its tokens, of which what the assistant says stands in brackets)"""
    own = tasks.convert("own.jsonl", json.dumps(row).encode())
    ids, mask = BYTES.render_conversation(own)
    text = ""
    for token, mine, before in zip(ids, mask, [0, *mask]):
        text += "]" * (before > mine) + "[" * (mine > before) + BYTES.decode([token])
    return (text + "]" * mask[-1]).replace("<|", "<").replace("|>", ">")

PLAIN = ("<bos><user_start>Hi<user_end><assistant_start>[Hello<assistant_end>]"
         "<user_start>And?<user_end><assistant_start>[Bye<assistant_end>]")
TURNS = [said("user", "Hi"), said("assistant", "Hello"), said("user", "And?"),
         said("assistant", "Bye")]
SHAREGPT = [{"from": ("human", "gpt")[i % 2], "value": turn["content"]}
            for i, turn in enumerate(TURNS)]

@pytest.mark.parametrize("row", [
    TURNS,
    {"messages": TURNS, "tools": [], "id": 3},
    {"messages": [said("user", [{"type": "text", "text": "Hi"}], name="Ann"),
                  said("assistant", "Hello", weight=1, tool_calls=None, refusal=None), *TURNS[2:]]},
    {"messages": None, "conversations": SHAREGPT},
    {"id": "x_0", "system": "", "conversations": SHAREGPT},
    {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"},
                       *TURNS[2:]]}])
def test_a_conversation_is_the_same_in_every_form(row):
    assert rendered(row) == PLAIN

@pytest.mark.parametrize("first", [
    [said("system", "Be brief.\n\nIn French.")],
    [said("system", [{"type": "text", "text": text} for text in ("Be brief.", "In French.")])],
    [said("system", "Be brief."), said("developer", "In French.")],
    [{"from": "system", "value": "Be brief.\n\nIn French."}]])
def test_a_system_message_stands_in_front_of_what_the_user_says(first):
    expected = PLAIN.replace("Hi", "Be brief.\n\nIn French.\n\nHi")
    assert rendered({"messages": first + TURNS}) == expected
    assert rendered({"system": "Be brief.\n\nIn French.", "conversations": SHAREGPT}) == expected

def test_the_instruction_of_alpaca_and_its_input_are_what_the_user_says():
    row = {"instruction": "Add them.", "input": "1 and 2", "output": "3", "system": "Be brief."}
    assert rendered(row) == ("<bos><user_start>Be brief.\n\nAdd them.\n\n1 and 2<user_end>"
                             "<assistant_start>[3<assistant_end>]")
    del row["input"], row["system"]
    assert "<user_start>Add them.<user_end>" in rendered(row)

def test_messages_of_one_side_in_a_row_are_one():
    row = [said("user", "Hi"), said("user", "there"), said("assistant", "Hello"),
           said("assistant", [{"type": "text", "text": "you"}]), said("user", "Bye")]
    assert rendered(row) == ("<bos><user_start>Hi\n\nthere<user_end><assistant_start>"
                             "[Hello\n\nyou<assistant_end>]<user_start>Bye<user_end>")

def call(name, arguments, key=None):
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}

def test_calls_of_a_calculator_and_their_answers_are_calls_of_ours():
    first = said("assistant", None, tool_calls=[call("calculator", {"expression": "1+2"}, "a"),
                                                call("python", {"code": "3*4"}, "b")])
    row = [said("user", "Hi"), first, said("tool", "12", tool_call_id="b"),
           said("tool", [{"type": "text", "text": "3"}], tool_call_id="a"),
           said("assistant", "3 and 12.")]
    answer = ("<assistant_start>[<python_start>1+2<python_end>]<output_start>3<output_end>"
              "[<python_start>3*4<python_end>]<output_start>12<output_end>"
              "[3 and 12.<assistant_end>]")
    assert rendered({"messages": row}).endswith(answer)
    older = {"name": "python", "arguments": '{"code": "1+2"}'}
    row = [said("user", "Hi"), said("assistant", "So: ", function_call=older),
           said("function", "3", name="python"), said("assistant", "3.")]
    assert rendered(row).endswith("<assistant_start>[So: <python_start>1+2<python_end>]"
                                  "<output_start>3<output_end>[3.<assistant_end>]")

@pytest.mark.parametrize("row,says", [
    (5, "found 5, expected a conversation"),
    ({"prompt": "a", "chosen": "b"}, "found the fields prompt, chosen, expected messages, conv"),
    ({"messages": "Hi"}, 'messages is "Hi", expected a list of messages'),
    (["Hi", "Hello"], 'message 1 is "Hi", expected one with role and content'),
    ([said("user", "Hi"), said("bard", "Hello")], 'message 2 has the role "bard", expected user, '),
    ([{"text": "Hi"}], "message 1 has the role null, expected user, human"),
    ([said("user", "Hi"), said("assistant", None)], "message 2 has the content null, expected"),
    ([said("user", 5)], "message 1 has the content 5, expected text"),
    ([said("user", [{"type": "image_url", "image_url": {}}])],
     'message 1 has the part {"type": "image_url", "image_url": {}}, expected {"type": "text"'),
    ([said("assistant", "Hello")], "the user does not speak first"),
    ([said("system", "Hi")], "the user does not speak first"),
    ([*TURNS, said("system", "Hi")], "message 5 is a system message, expected before all others"),
    ([*TURNS, said("tool", "3")], "message 5 is a tool's answer, expected a call"),
    ([said("user", "Hi"), said("assistant", "", tool_calls=[call("weather", {"code": "1"})])],
     '"function": {"name": "weather", "arguments": '),
    ([said("user", "Hi"), said("assistant", "", tool_calls=[call("python", {"a": 1, "b": 2})])],
     'expected python or calculator with code or expression alone'),
    ([said("user", "Hi"), said("assistant", "", tool_calls=[call("python", "1+2")])],
     '"arguments": "1+2"}}, expected python or calculator'),
    ([said("user", "Hi"), said("assistant", "", tool_calls=[{"name": "python"}])],
     'message 2 has the tool call {"name": "python"}, expected python or calculator with'),
    ([said("user", "Hi"), said("assistant", "", tool_calls="python")],
     'message 2 has the tool call "p", expected python or calculator with'),
    ({"instruction": "a"}, "found the fields instruction, expected messages, conversations, or"),
    ({"instruction": "a", "input": 5, "output": "b"}, "input is 5, expected text"),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "found a history, expected all"),
    ({"system": 5, "messages": TURNS}, "system has the content 5, expected text")])
def test_what_is_no_conversation_is_named_with_line_what_was_found_and_what_is_expected(
        folder, capsys, row, says):
    own = folder / "own.jsonl"
    own.write_text(jsonl([TURNS, row]))
    assert len(tasks.load(str(own), "train", "toy")) == 1
    out = capsys.readouterr().out
    assert f"{own}:2 skipped: " in out and says in out and out.count("\n") == 1

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_line_ends_of_windows_and_byte_order_marks_are_no_part_of_a_conversation(folder, encoding):
    own = folder / "own.jsonl"
    own.write_bytes(jsonl([TURNS, TURNS]).replace("\n", "\r\n").encode(encoding))
    items = tasks.load(str(own), "train", "toy")
    assert len(items) == 2 and items == tasks.load(str(own), "train", "toy", 5)
    assert BYTES.decode(BYTES.render_conversation(items[0])[0]).count("\r") == 0

@pytest.mark.parametrize("name", ["own.jsonl", "own.json", "own.jsonl.gz"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("rows", [[{"messages": TURNS}] * 2, [TURNS, TURNS]])
def test_a_file_that_is_one_array_is_read(folder, name, indent, rows):
    content = json.dumps(rows, indent=indent).replace("\n", "\r\n").encode("utf-8-sig")
    own = folder / name
    own.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [item["messages"] for item in tasks.load(str(own), "train", "toy")] == [
        item["messages"] for item in 2 * [tasks.convert("own", json.dumps(TURNS).encode())]]

def test_of_an_array_the_broken_conversations_are_named_by_their_number(folder, capsys):
    own = folder / "own.json"
    own.write_text("\n  " + json.dumps([TURNS, TURNS, 5], indent=1))
    assert len(tasks.load(str(own), "train", "toy")) == 2
    assert f"{own}:3 skipped: found 5, expected a conversation" in capsys.readouterr().out
    own.write_text(json.dumps([TURNS] * 9, indent=1)[:-99])
    with ends() as stopped:
        tasks.load(str(own), "train", "toy")
    assert stopped.code == 2 and "not JSON" in capsys.readouterr().err

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

def test_the_name_of_a_function_is_no_pattern():
    program = tasks.completed({"prompt": "def f(", "entry_point": "f("}, "x):\n    return 1")
    assert program == "def f(x):\n    return 1"

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
