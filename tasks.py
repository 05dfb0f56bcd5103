"""
The tasks a model is trained and measured on, from files in pipeline.task_dir(data), each in the
format of its data set.

    items = tasks.load("gsm8k", "test", "toy")  # [{"messages": [...], "task": "gsm8k", ...}, ...]
    tasks.correct(items[0], "... #### 12")      # -> True or False
    tasks.mixture(["smoltalk", "gsm8k*2", "spellingbee:3000"], "toy", seed=1)  # a shuffled list

An item is a conversation (see tokenizer.messages_of); where its task can be judged the last
message, the assistant's, is the answer. It also carries its "task" (or file), the "row" of the file
it was made of, and, in multiple choice, its "letters".
"""
import contextlib
import functools
import hashlib
import json
import os
import re
import string
from pathlib import Path

import common
import conversations
import execution
import pipeline
import texts
import tokenizer as tok
from configurator import CONVERSATIONS, split_spec

def task(kind, train=None, test=None):
    """kind: chat (only trained on), categorical (answered by a letter) or generative (answered by
    free text); train, test: the stems of its files, None where it has no such split"""
    chance = 0.25 if kind == "categorical" else 0.0
    return {"kind": kind, "chance": chance, "train": train, "test": test}

TASKS = {
    "smoltalk":       task("chat", "smoltalk_train", "smoltalk_test"),
    "identity":       task("chat", "identity_train"),
    "mmlu_aux":       task("categorical", "mmlu_auxiliary_train"),
    "mmlu":           task("categorical", test="mmlu_test"),
    "arc_easy":       task("categorical", "arc_easy_train", "arc_easy_test"),
    "arc_challenge":  task("categorical", "arc_challenge_train", "arc_challenge_test"),
    "gsm8k":          task("generative", "gsm8k_train", "gsm8k_test"),
    "humaneval":      task("generative", test="humaneval_test"),
    "spellingbee":    task("generative", "words_alpha", "words_alpha"),
    "simplespelling": task("generative", "words_alpha", "words_alpha"),
    "facts":          task("generative", test="facts_test"),
}
TASK_OF = {facts[split]: name for name, facts in TASKS.items()  # by the stem of its files
           for split in ("train", "test")}
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz")  # of the files, behind a stem
MEASURED = [name for name, facts in TASKS.items() if facts["test"] and facts["kind"] != "chat"]
PRACTISED = [name for name, facts in TASKS.items()  # whose answers RL can check
             if facts["kind"] == "generative" and facts["train"]]
MOST_ITEMS = 10_000_000
MOST_EPOCHS = 1000
GENERATED = ("spellingbee", "simplespelling")  # tasks made from a list of words,
GENERATED_ITEMS = 500                          # so many items where no number is given

# fields of a row that only correct() looks at, hours later
JUDGED_BY = {"humaneval": {"test": str, "entry_point": str}, "facts": {"candidates": list}}

# --------------------------------------------------------------------------------------------------
# files

def parse(spec):
    """-> (task or file of conversations, how many items or None for all, how often).
    examples: "gsm8k" -> ("gsm8k", None, 1);  "gsm8k*2" -> ("gsm8k", None, 2);
    "spellingbee:300" -> ("spellingbee", 300, 1)"""
    common.check(isinstance(spec, str), f"{spec!r} is no name of a task or a file")
    name, limit, epochs = split_spec(spec)
    limit = int(limit) if limit else None
    epochs = int(epochs or 1)
    known = name in TASKS or name.endswith(CONVERSATIONS)
    common.check(known or not {":", "*"} & {*name}, f"cannot read {spec!r}: write name, name:300 "
                 "(examples) or name*2 (epochs)")
    common.check(known, f"there is no task {name!r}; the tasks are {', '.join(TASKS)}; a file of "
                 f"conversations ends in {', '.join(CONVERSATIONS)}")
    common.check(limit != 0 and epochs, f"{spec!r} asks for 0 examples: remove it")
    common.check((limit or 0) <= MOST_ITEMS and epochs <= MOST_EPOCHS, f"{spec!r} asks for too "
                 f"much: at most {MOST_ITEMS:,} examples and {MOST_EPOCHS:,} epochs")
    return name, limit, epochs

def check_names(settings):
    """Failure where a script's settings name a task that is none, or not one for its purpose."""
    for key, split in (("mixture", "train"), ("held_out", "test")):
        for spec in settings.get(key, []):
            stem_of(parse(spec)[0], split)
    for name in settings.get("tasks", []):
        common.check(name in MEASURED, f"--tasks={name}: the tasks with right answers are "
                     f"{', '.join(MEASURED)}")
    name = settings.get("task", PRACTISED[0])
    common.check(name in PRACTISED, f"--task must be {', '.join(PRACTISED)} (answers that can be "
                 f"checked), not {name!r}")

def stem_of(name, split):
    """The stem of the files of a split of a task; a file of conversations stands for itself.
    Failure where the task has no such split."""
    if name not in TASKS:
        return name
    stem = TASKS[name][split]
    common.check(stem, f"the task {name} has no {split} split")
    return stem

def located(stem, data):
    """The files of a split: one, or all the parts that their names speak of
    (x-00000-of-00004.parquet, ...); [] where there are none."""
    folder = pipeline.task_dir(data)
    for ending in ENDINGS:
        path = folder / (stem + ending)
        if path.is_file():
            return [path]
    parts = sorted(folder.glob(f"{stem}-*-of-*.parquet"))
    whole = parts and parts[0].stem.endswith(f"-of-{len(parts):05d}")
    return parts if whole else []

def find(name, split, data):
    """The files that hold a split of a task. Failure (code 2), naming them, where one is missing.
    """
    if name not in TASKS:
        path = Path(os.path.expanduser(name))
        common.check(path.is_file(), f"there is no file of conversations {path}")
        common.check(os.access(path, os.R_OK), f"{path} cannot be read: you have no permission to")
        return [path]
    stem = stem_of(name, split)
    found = located(stem, data)
    path = pipeline.task_dir(data) / stem
    common.check(found, f"{path}.jsonl (or .jsonl.gz, .parquet) is missing, which the task {name} "
                 "reads (or take it out of --mixture, --held_out or --tasks)",
                 texts.prepare_command(data))
    return found

def fingerprint(specs, split, data):
    """Identifies what mixture(specs) is made of: 16 hex digits. Failure where a file is missing."""
    parts = []
    for spec in specs:
        for path in find(parse(spec)[0], split, data):
            parts.append(f"{spec} {common.sha256_file(path)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

def read_rows(path):
    """(number, row) for each row of a file, see texts.read_rows; where all of it is one JSON array,
    as many have their conversations, for each of its items."""
    lines = iter(()) if path.suffix == ".parquet" else texts.read_lines(path)
    _, first = next(lines, (1, b""))
    rows = parsed(first)
    if rows is None and first.lstrip().startswith(b"["):
        rows = parsed(b"".join([first, *(line for _, line in lines)]))
    if isinstance(rows, list) and not conversations.is_one(rows) and next(lines, None) is None:
        yield from enumerate(rows, 1)
    else:
        yield from texts.read_rows(path)

def parsed(text):
    """A JSON value, None where it is none"""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None

# --------------------------------------------------------------------------------------------------
# rows into conversations

def pick(draw, options):
    return options[draw.integers(len(options))]

def one_in(n, *key):
    """Whether it is one of n, by a fixed draw for each key.  example: one_in(10, "word")"""
    return hashlib.sha256(" ".join(map(str, key)).encode()).digest()[0] % n == 0

def conversation(turns):
    """[(content of what the user says, of what the assistant answers)] -> a conversation"""
    messages = []
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return {"messages": messages}

def item(name, row, user, assistant, **more):
    """row: what it was made of; user, assistant: content of the question and of the answer"""
    return {**conversation([(user, assistant)]), "task": name, "row": row, **more}

def with_choices(question, choices, letters="ABCD", task="Multiple choice, answer with the letter"):
    """A multiple-choice question as text. The letter stands behind its choice (nanochat's finding),
    the question behind all of them: then a model of four layers learns to look the answer up among
    what it has read, with the question first it never did (LOG.md).
    example: ("Which?", ["x", "y"], task="Answer with the letter") ->
    "Answer with the letter:\\n- x=A\\n- y=B\\nWhich?" """
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, letters)]
    return "\n".join([f"{task}:", *lines, question])

def multiple_choice(name, row, choices, letters, answer):
    """letters: one a choice; answer: one of them, else a ValueError"""
    if answer not in letters or len(letters) != len(choices):
        raise ValueError("not one letter for each choice, one of them right")
    asked = with_choices(row["question"], choices, letters)
    return item(name, row, asked, answer, letters=list(letters))

def part(kind, text):
    return {"type": kind, "text": text}

def word_problem_parts(answer):
    """"5+7=<<5+7=12>>12 apples.\\n#### 12" -> text "5+7=", python "5+7", python_output "12",
    text "12 apples.\\n#### 12" """
    parts = []
    for i, piece in enumerate(re.split(r"<<(.*?)>>", answer)):
        if i % 2 == 1:  # between the brackets
            expression, _, result = piece.partition("=")
            parts += [part("python", expression), part("python_output", result)]
        elif piece:
            parts.append(part("text", piece))
    return parts

def convert(name, row):
    """A row of a file (of a .jsonl file: the line) as an item, of a list of words as a word; an
    error where it is none."""
    if name in GENERATED:
        return word_of(row)
    if isinstance(row, bytes):
        row = json.loads(row)
    for field, kind in JUDGED_BY.get(name, {}).items():
        if not isinstance(row[field], kind):
            raise TypeError(f"{field} is {conversations.shown(row[field])}, expected a "
                            f"{kind.__name__}")
    if name in ("mmlu", "mmlu_aux"):
        letter = dict(enumerate("ABCD"))[row["answer"]]  # -1, where it is not told, is an error
        made = multiple_choice(name, row, row["choices"], "ABCD", letter)
    elif name in ("arc_easy", "arc_challenge"):
        choices = row["choices"]
        made = multiple_choice(name, row, choices["text"], choices["label"], row["answerKey"])
    elif name == "gsm8k":
        made = item(name, row, row["question"], word_problem_parts(row["answer"]))
        if final_number(row["answer"]) is None:
            raise ValueError("its answer has no number, expected one as in #### 12")
    elif name == "humaneval":
        asked = f"Complete this Python function.\n{row['prompt']}"
        made = item(name, row, asked, row["canonical_solution"])
    elif name == "facts":
        made = item(name, row, row["question"], row["answer"])
        if row["answer"] not in row["candidates"]:
            raise ValueError("its answer is not among its candidates")
    else:
        made = {"messages": conversations.read(row), "task": name, "row": None}
    tok.messages_of(made)  # an error where it is no conversation
    return made

SPELLING_QUESTIONS = [
    "How many '{c}' are in '{w}'?",
    "How many times does '{c}' occur in '{w}'?",
    "Count the letter '{c}' in '{w}'.",
    "In the word '{w}', how many '{c}' are there?",
    "How often is '{c}' in '{w}'?",
    "What number of '{c}' does '{w}' have?",
    "Tell me how many '{c}' you find in '{w}'.",
    "The word '{w}': how many '{c}'?",
]

def word_of(line):
    """A line of the list of words -> its word, or None where it is none to spell. ValueError where
    it comes from no such list."""
    if len(line) > 100:
        raise ValueError("no word")
    word = line.decode().strip()
    return word if re.fullmatch("[a-z]{3,15}", word) else None

def spelling(name, words, test, i):
    """Item i of simplespelling, or of spellingbee: how often a letter, mostly one of its own, is in
    a word."""
    draw = common.rng(11, test, name == "spellingbee", i)
    word = pick(draw, words)
    spelled = " ".join(word)
    if name == "simplespelling":
        return item(name, {"word": word}, f"Spell the word '{word}'.", spelled)
    letters = word if draw.random() < 0.9 else string.ascii_lowercase
    letter = pick(draw, letters)
    question = pick(draw, SPELLING_QUESTIONS).format(w=word, c=letter)
    count = str(word.count(letter))
    return item(name, {"word": word, "letter": letter, "answer": count}, question, [
        part("text", f"'{word}' is spelled {spelled}. "),
        part("python", f"'{word}'.count('{letter}')"),
        part("python_output", count),
        part("text", f"\n#### {count}"),
    ])

def load(name, split, data, limit=None):
    """The items of a split of a task, in order; with a limit so many of them drawn (the same
    whatever else is asked: real files are sorted by subject or source). Of generated tasks: limit
    items, GENERATED_ITEMS by default. Broken lines or rows of a file are named and left out."""
    paths = find(name, split, data)
    test = split == "test"
    items = []
    for path in paths:
        items += texts.good_rows(path, read_rows(path), functools.partial(convert, name))
    if name in GENERATED:  # one word in ten, by its hash, is a test word
        items = [word for word in items if word and one_in(10, word) == test]
    common.check(items or name in TASKS,
                 f"{name} has no usable conversation: see the lines named above")
    common.check(items, f"{paths[0]} has no usable rows of the {split} split of the task {name}",
                 texts.prepare_command(data))
    if name in GENERATED:
        return [spelling(name, items, test, i) for i in range(limit or GENERATED_ITEMS)]
    drawn = common.rng(12).permutation(len(items))[:limit]
    return [items[i] for i in sorted(drawn)]

def mixture(specs, data, seed, split="train"):
    """All items of a split of `specs`, shuffled by seed."""
    items = []
    for spec in specs:
        name, limit, epochs = parse(spec)
        items += load(name, split, data, limit) * epochs
    return [items[i] for i in common.rng(seed, 4).permutation(len(items))]

# --------------------------------------------------------------------------------------------------
# judging

def final_number(text):
    """What stands behind the first "####", as GSM8K's authors take it ("#### 1,200" -> "1200"), or
    None."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1].replace(",", "") if found else None

def completed(row, completion):
    """A completion of a HumanEval problem as a program; where it repeats the function, the prompt's
    imports and helpers stay."""
    fenced = re.search(r"```(?:python)?[ \t]*\n(.*?)(?:```|\Z)", completion, re.DOTALL)
    code = fenced[1] if fenced else completion
    if re.search(rf"^def {re.escape(row['entry_point'])}\b", code, re.MULTILINE):
        code = "\n    pass\n\n" + code
    return row["prompt"] + code

def says(text, phrase):
    """Whether the phrase is in the text as whole words.  ("A Baker.", "baker") -> True"""
    return re.search(rf"(?<!\w){re.escape(phrase.lower())}(?!\w)", text.lower()) is not None

def correct(item, completion, unsafe=False):
    """Whether a completion answers an item. HumanEval's is run in the sandbox (see
    execution.run_python for `unsafe`)."""
    name = item["task"]
    row = item["row"]
    answer = item["messages"][-1]["content"]
    if name == "humaneval":
        test = f"{row['prompt']}\n    pass\n{row['test']}"  # with the prompt's helpers
        return execution.run_python(completed(row, completion), unsafe=unsafe, test=test,
                                    entry_point=row["entry_point"])[0]
    if name in ("gsm8k", "spellingbee"):
        number = final_number(completion)  # GSM8K's own answer ends with it
        return number is not None and number in (row["answer"], final_number(row["answer"]))
    if name == "facts":
        return [c for c in row["candidates"] if says(completion, c)] == [answer]
    return completion.strip() == answer
