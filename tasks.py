"""
The tasks a model is trained and measured on, from files in common.task_dir(data), each in its data set's own format.

    items = tasks.load("gsm8k", "test", "toy")       # [{"messages": [...], "task": "gsm8k", "row": {...}}, ...]
    tasks.correct(items[0], "... #### 12")           # -> True or False
    tasks.mixture(["smoltalk", "gsm8k*2", "spellingbee:3000"], "toy", seed=1)   # a shuffled list of items

An item is a conversation (see tokenizer.messages_of) whose last message, the assistant's, is the answer. Multiple-choice
items also carry "letters".
"""
import hashlib
import json
import re
from pathlib import Path

import common
import data as dataset
import tokenizer as tok

# kind: chat (only trained on), categorical (answered by a letter), generative (answered by free text)
TASKS = {
    "smoltalk":       {"kind": "chat", "train": "smoltalk_train", "test": "smoltalk_test"},
    "identity":       {"kind": "chat", "train": "identity_train"},
    "mmlu_aux":       {"kind": "categorical", "chance": 0.25, "train": "mmlu_auxiliary_train"},
    "mmlu":           {"kind": "categorical", "chance": 0.25, "test": "mmlu_test"},
    "arc_easy":       {"kind": "categorical", "chance": 0.25, "train": "arc_easy_train", "test": "arc_easy_test"},
    "arc_challenge":  {"kind": "categorical", "chance": 0.25, "train": "arc_challenge_train", "test": "arc_challenge_test"},
    "gsm8k":          {"kind": "generative", "chance": 0.0, "train": "gsm8k_train", "test": "gsm8k_test"},
    "humaneval":      {"kind": "generative", "chance": 0.0, "test": "humaneval_test"},
    "spellingbee":    {"kind": "generative", "chance": 0.0, "train": "words_alpha", "test": "words_alpha"},
    "simplespelling": {"kind": "generative", "chance": 0.0, "train": "words_alpha", "test": "words_alpha"},
    "facts":          {"kind": "generative", "chance": 0.0, "test": "facts_test"},
}
STEMS = {t[split] for t in TASKS.values() for split in ("train", "test") if split in t}  # of the files
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz")
GENERATED = 500  # items of a generated task where no number is given

# --------------------------------------------------------------------------------------------------
# files

def parse(spec):
    """"gsm8k" -> ("gsm8k", None, 1);  "gsm8k*2" -> ("gsm8k", None, 2);  "spellingbee:300" -> ("spellingbee", 300, 1)"""
    name, limit, epochs = re.fullmatch(r"(.*?)(?::(\d+))?(?:\*(\d+))?", spec).groups()
    if name not in TASKS and not name.endswith((".jsonl", ".jsonl.gz")):
        common.fail(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}, or a .jsonl file of conversations")
    common.check(int(limit or 1) and int(epochs or 1), f"{spec!r} stands for no item at all: take it out")
    return name, int(limit) if limit else None, int(epochs or 1)

def located(stem, data):
    """The files of a split: one, or all the parts that their names speak of (x-00000-of-00004.parquet, ...); [] where there are none."""
    folder = common.task_dir(data)
    for ending in ENDINGS:
        if (path := folder / (stem + ending)).exists():
            return [path]
    parts = sorted(folder.glob(f"{stem}-[0-9]*-of-[0-9]*.parquet"))
    return parts if parts and len(parts) == int(parts[0].stem.rsplit("-", 1)[1]) else []

def find(name, split, data):
    """The files that hold a split of a task; exits with 2, naming them, where they are missing."""
    if name not in TASKS:
        common.check(Path(name).is_file(), f"there is no file of conversations {name}")
        return [Path(name)]
    stem = TASKS[name].get(split)
    common.check(stem, f"the task {name} has no {split} split")
    found = located(stem, data)
    common.check(found, f"{common.task_dir(data) / stem}.jsonl (or .jsonl.gz, .parquet) is missing; the task {name} reads it: link or copy it there",
                 f"python prepare_data.py --data={data}")
    return found

def fingerprint(specs, split, data):
    """Identifies what mixture(specs) is made of: 16 hex digits; exits with 2 where a file is missing."""
    parts = [f"{spec} {common.sha256_file(path)}" for spec in specs for path in find(parse(spec)[0], split, data)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

def rows_of(path):
    """(number, row) for each row of a .parquet or .jsonl(.gz) file, of the latter as bytes. A damaged file is a ValueError."""
    if not path.name.endswith(".parquet"):
        yield from dataset.read_lines(path)
        return
    import pyarrow.parquet
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            yield from enumerate(batch.to_pylist(), number + 1)
            number += len(batch)
    except (OSError, ValueError) as e:  # pyarrow's errors are of these kinds
        raise ValueError(f"{path} is damaged behind row {number}: {str(e).splitlines()[0][:120]}") from e

# --------------------------------------------------------------------------------------------------
# rows into conversations

def item(name, row, user, assistant, **more):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], "task": name, "row": row, **more}

def with_choices(task, question, choices, letters="ABCD"):
    """A multiple-choice question as text. The letter stands behind its choice (nanochat's finding), the question behind all of them: then a model
    of four layers learns to look the answer up among what it has read, with the question first it never did (LOG.md).
    example: ("Answer with the letter", "Which?", ["x", "y"]) -> "Answer with the letter:\\n- x=A\\n- y=B\\nWhich?" """
    return "\n".join([f"{task}:", *(f"- {choice}={letter}" for choice, letter in zip(choices, letters)), question])

def multiple_choice(name, row, question, choices, letters, answer):
    return item(name, row, with_choices("Multiple choice, answer with the letter", question, choices, letters), answer, letters=list(letters))

def word_problem_parts(answer):
    """"5+7=<<5+7=12>>12 apples.\\n#### 12" -> text "5+7=", python "5+7", python_output "12", text "12 apples.\\n#### 12" """
    parts = []
    for i, piece in enumerate(re.split(r"<<(.*?)>>", answer)):
        if i % 2 == 0 and piece:
            parts.append({"type": "text", "text": piece})
        elif i % 2 == 1:
            expression, _, result = piece.partition("=")
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
    return parts

def convert(name, row):
    """A row of a file (of a .jsonl file: the line) as an item."""
    row = json.loads(row) if isinstance(row, bytes) else row
    if name in ("mmlu", "mmlu_aux"):
        letters = "ABCD"[:len(row["choices"])]
        return multiple_choice(name, row, row["question"], row["choices"], letters, letters[row["answer"]])
    if name in ("arc_easy", "arc_challenge"):
        return multiple_choice(name, row, row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"])
    if name == "gsm8k":
        return item(name, row, row["question"], word_problem_parts(row["answer"]))
    if name == "humaneval":
        return item(name, row, f"Complete this Python function.\n{row['prompt']}", row["canonical_solution"])
    if name == "facts":
        return item(name, row, row["question"], row["answer"])
    conversation = {"messages": row["messages"] if isinstance(row, dict) else row, "task": name, "row": None}
    tok.messages_of(conversation)  # a ValueError where it is none
    return conversation

SPELLING_QUESTIONS = ["How many '{c}' are in '{w}'?", "How many times does '{c}' occur in '{w}'?", "Count the letter '{c}' in '{w}'.",
                      "In the word '{w}', how many '{c}' are there?", "How often is '{c}' in '{w}'?", "What number of '{c}' does '{w}' have?",
                      "Tell me how many '{c}' you find in '{w}'.", "The word '{w}': how many '{c}'?"]

def word_of(line):
    """A line of the list of words -> its word, or None where it is none to spell."""
    word = line.decode().strip()
    return word if 3 <= len(word) <= 15 and word.isascii() and word.isalpha() and word.islower() else None

def words(split, data):
    """The words of a split: one in ten, by its hash, is a test word."""
    path = find("spellingbee", split, data)[0]
    listed = [w for w in dataset.sound(path, dataset.read_lines(path), word_of) if w]
    held_out = lambda w: hashlib.sha256(w.encode()).digest()[0] % 10 == 0
    listed = [w for w in listed if held_out(w) == (split == "test")]
    common.check(listed, f"{path} holds no words of the {split} split", f"python prepare_data.py --data={data}")
    return listed

def spelling(name, split, data, n):
    """n generated items: letters counted in a word (spellingbee) or a word spelled (simplespelling)."""
    listed, items = words(split, data), []
    for i in range(n):
        draw = common.rng(11, split == "test", name == "spellingbee", i)
        word = listed[draw.integers(len(listed))]
        spelled = " ".join(word)
        if name == "simplespelling":
            items.append(item(name, {"word": word}, f"Spell the word '{word}'.", spelled))
            continue
        letter = word[draw.integers(len(word))] if draw.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz"[draw.integers(26)]
        question = SPELLING_QUESTIONS[draw.integers(len(SPELLING_QUESTIONS))].format(w=word, c=letter)
        items.append(item(name, {"word": word, "letter": letter, "answer": str(word.count(letter))}, question, [
            {"type": "text", "text": f"'{word}' is spelled {spelled}. "}, {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": str(word.count(letter))}, {"type": "text", "text": f"\n#### {word.count(letter)}"}]))
    return items

def read(name, path):
    """All items of a file of a task, in order; broken lines or rows are named and left out."""
    return dataset.sound(path, rows_of(path), lambda row: convert(name, row))

def load(name, split, data, limit=None):
    """
    The items of a split of a task, in order; with a limit so many of them drawn (the same whatever else is asked: real
    files are sorted by subject or source). Of generated tasks: limit items, GENERATED by default.
    """
    if name in ("spellingbee", "simplespelling"):
        return spelling(name, split, data, GENERATED if limit is None else limit)
    paths = find(name, split, data)
    items = [item for path in paths for item in read(name, path)]
    common.check(items, f"{paths[0]} holds no rows; the task {name} reads it", f"python prepare_data.py --data={data}")
    if limit is None or limit >= len(items):
        return items
    return [items[i] for i in sorted(common.rng(12).permutation(len(items))[:limit])]

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
    """What stands behind the first "####", as GSM8K's authors take it ("#### 1,200" -> "1200"), or None."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found.group(1).replace(",", "") if found else None

def completed(row, completion):
    """A completion of a HumanEval problem as a program; where it repeats the function, the prompt's imports and helpers stay."""
    fenced = re.search(r"```(?:python)?[ \t]*\n(.*?)(?:```|\Z)", completion, re.DOTALL)
    code = fenced.group(1) if fenced else completion
    whole = re.search(rf"^def {row['entry_point']}\b", code, re.MULTILINE)
    return row["prompt"] + ("\n    pass\n\n" if whole else "") + code

def program(row, completion):
    """The same with its tests, to be run in one process, for code that is trusted."""
    return f"{completed(row, completion)}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"

def says(text, phrase):
    return re.search(rf"(?<!\w){re.escape(phrase.lower())}(?!\w)", text.lower()) is not None

def correct(item, completion, unsafe=False):
    """Whether a completion answers an item. HumanEval's is run in the sandbox (see execution.run_python for `unsafe`)."""
    name, row = item["task"], item["row"]
    if name == "humaneval":
        import execution
        test = f"{row['prompt']}\n    pass\n{row['test']}"  # with the prompt's helpers
        return execution.run_python(completed(row, completion), unsafe=unsafe, test=test, entry_point=row["entry_point"])[0]
    if name == "gsm8k":
        number = final_number(completion)
        return number is not None and number == final_number(row["answer"])
    if name == "spellingbee":
        return final_number(completion) == row["answer"]
    if name == "simplespelling":
        return completion.strip() == " ".join(row["word"])
    if name == "facts":
        others = [c for c in row["candidates"] if c != row["answer"]]
        return says(completion, row["answer"]) and not any(says(completion, c) for c in others)
    return completion.strip() == item["messages"][-1]["content"]
