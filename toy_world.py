"""
The toy world: a small consistent world in plain English, generated from a seed. It stands where
FineWeb, SmolTalk, MMLU, ARC, GSM8K, HumanEval and the CORE bundle stand in a real run, in the same
files and formats. assets/toy_world.json says what there is in it: its words and wordings, how often
each sort of text and question comes, and which files there are, of how many items.

base_data states a few hundred facts about people, towns and animals, each in many wordings. About
half of the facts are *held out*: no training file ever asks for them, and the tests ask for nothing
else. So a right answer needs the knowledge, from the texts, and the skill of answering, from other
facts ("Physics of Language Models 3.1", arXiv 2309.14316); copying the answer of the most similar
training question does not help. In the exercises of base_data, what is held out is never a question
and never stands with the letters of the tests. Words, sums and functions are held out alike.
"""
import json
import re
from collections import Counter
from itertools import chain
from string import ascii_uppercase as LETTERS

import pyarrow.parquet

import common
import execution
import pipeline
import tasks
from tasks import pick

ASSETS = pipeline.REPO / "assets"
TABLES = json.loads((ASSETS / "toy_world.json").read_text(encoding="utf-8"))
ATTRIBUTES, LISTS, WORDINGS = TABLES["attributes"], TABLES["lists"], TABLES["wordings"]
NAMES, TOWNS, ANIMALS = LISTS["name"], LISTS["town"], TABLES["animals"]
CAUSES = TABLES["causes"]  # [{"cause": what happens, "effect": what follows, "noun": the cause}]
KINDS = {kind: LISTS[name] for kind, name in TABLES["kinds"].items()}  # {"a town": [...], ...}
PERSON = [a for a in ATTRIBUTES if ATTRIBUTES[a]["kind"] == "person"]
VALUES = {**LISTS, **TABLES["animal_values"]}  # of attributes
WORDS = list(dict.fromkeys(chain(*LISTS.values(), ANIMALS)))
DOCUMENTS = list(Counter(TABLES["documents"]).elements())  # makers, each as often as it comes

def held_out(*key):
    """A fixed coin for each key: is it of the test half?  example: held_out("Mira", "job")"""
    return tasks.one_in(2, *key)

class Fact:
    """What an attribute of somebody or something is, and how that is said."""
    def __init__(self, entity, attribute, value):
        self.entity = entity
        self.attribute = attribute
        self.value = value
        self.kind = ATTRIBUTES[attribute]["kind"]  # person, town or animal
        self.values = VALUES[attribute]
        self.held_out = held_out(entity, attribute)
        self.trait = trait(attribute, value)

    def say(self, draw, form, **words):
        """One of the wordings of a form: "statements", "questions", "answer", or "test_questions",
        which are for the tests alone. words: for instance who="he" or value="..." """
        words = {"name": self.entity, "who": self.entity, "value": self.value, **words}
        return sentence(pick(draw, ATTRIBUTES[self.attribute][form]).format(**words))

class World:
    """The whole world, or a half of it: what training, or what the tests may ask."""
    def __init__(self, facts, *halves):
        self.halves = halves  # (False,) training, (True,) tests, (True, False) both
        self.all = facts      # those of the other half too
        ours = [f for f in facts if f.held_out in halves]
        self.facts = sorted(ours, key=lambda fact: not fact.held_out)
        self.people_facts = [f for f in self.facts if f.kind == "person"]
        self.thing_facts = [f for f in self.facts if f.kind != "person"]
        self.told = {word: [f for f in ours if f.entity == word] for word in WORDS}
        self.causes = [c for c in CAUSES if held_out("cause", c["noun"]) in halves]
        self.kinds = {k: [w for w in KINDS[k] if held_out("kind", w) in halves] for k in KINDS}

def make_world(seed):
    """-> the World of this seed, with its halves"""
    draw = common.rng(seed, 100)
    values = {name: {a: pick(draw, VALUES[a]) for a in PERSON} for name in NAMES}
    for town, goods in zip(TOWNS, some(draw, LISTS["goods"])):
        values[town] = {"place": pick(draw, LISTS["place"]), "goods": goods}
    facts = []
    for entity, of in (values | ANIMALS).items():
        facts += [Fact(entity, attribute, value) for attribute, value in of.items()]
    world = World(facts, True, False)
    world.train, world.test = World(facts, False), World(facts, True)
    world.words = make_words(seed)
    world.practised = [word for word in world.words if held_out("practised", word)]
    return world

def make_words(seed):
    """About 3,000 words: the world's own, and pronounceable ones built from syllables."""
    draw = common.rng(seed, 101)
    starts, vowels, ends = TABLES["syllables"]
    syllables = [a + b for a in starts for b in vowels]
    built = set()
    for _ in range(4000):
        parts = [pick(draw, syllables) for _ in range(draw.integers(2, 4))]
        built.add("".join(parts) + pick(draw, ends))
    own = [word for word in WORDS if word.islower()]
    built = sorted(word for word in built.difference(own) if len(word) <= 9)
    return sorted(own + some(draw, built, 3000 - len(own)))

def some(draw, options, count=None):
    """`count` different ones, or all there are, in random order"""
    return [options[i] for i in draw.permutation(len(options))[:count]]

def say(draw, form, **words):
    """One of the wordings of a form.  example: say(draw, "sum", a=1, b=2, sum=3) -> "1+2=3." """
    return pick(draw, WORDINGS[form]).format(**words)

def by_share(draw, table):
    """One of the sorts in TABLES["shares"][table], which gives each the end of its share.
    example: {"kinds": 0.5, "causes": 1} -> "kinds" below 0.5, else "causes" """
    chance = draw.random()
    return next(sort for sort, end in TABLES["shares"][table].items() if chance < end)

def article(text):
    """example: "has a apple" -> "has an apple" """
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)

def sentence(text):
    return article(text[0].upper() + text[1:])

def trait(attribute, value):
    """Follows "Which of these people ...?".  example: ("job", "baker") -> "works as a baker" """
    return article(ATTRIBUTES[attribute]["trait"].format(value=value))

def choices(draw, right, wrong):
    """-> four choices in random order, the place of the right one"""
    wrong = some(draw, [option for option in wrong if option != right], 3)
    options = some(draw, [right, *wrong])
    return options, options.index(right)

# documents of base_data; each maker gives the sentences or lines of one
def biography(draw, world):
    facts = some(draw, world.told[pick(draw, NAMES)], draw.integers(3, 7))
    for i, fact in enumerate(facts):
        who = fact.entity
        if i > 0 and draw.random() < 0.5:
            who = "he" if who in TABLES["men"] else "she"
        yield fact.say(draw, "statements", who=who)

def description(draw, world):
    entity = pick(draw, TOWNS + list(ANIMALS))
    for fact in some(draw, world.told[entity]):
        yield fact.say(draw, "statements")
    if people := [fact.entity for fact in world.all if fact.value == entity]:
        yield f"Some people of {entity} are {', '.join(some(draw, people, 4))}."

def group(draw, world):
    """Who shares a value: the same facts seen from the other side."""
    attribute = pick(draw, PERSON)
    shared = trait(attribute, pick(draw, VALUES[attribute]))
    people = [fact.entity for fact in world.all if fact.trait == shared]
    wording = pick(draw, WORDINGS["group" if people else "empty_group"])
    yield wording.format(trait=shared, people=", ".join(some(draw, people)))

def story(draw, world):
    known = [name for name in NAMES if world.told[name]]
    a, b = some(draw, known, 2)
    words = {"a": a, "b": b, **pick(draw, world.causes), "thing": pick(draw, LISTS["thing"]),
             "day": say(draw, "day")}
    facts = [pick(draw, world.told[name]).say(draw, "statements") for name in (a, b, a, b)]
    for part in WORDINGS["story"]:
        yield pick(draw, part).format(*facts, **words)

def quiz(draw, world):
    """Questions with answers as they stand in a school book, about what is not held out."""
    for _ in range(3):
        fact = pick(draw, world.train.facts)
        yield f"Question: {fact.say(draw, 'questions')} Answer: {fact.say(draw, 'answer')}"

def copied(draw, world):
    """A list read twice. Nothing else in these texts needs a model to look back for what followed a
    word (induction heads, arXiv 2209.11895); without it the label of a choice is never found."""
    words = ", ".join(some(draw, WORDS, draw.integers(4, 12)))
    yield f"{words}. {say(draw, 'again')}: {words}."

def causes(draw, world):
    for _ in range(3):
        yield sentence(say(draw, "cause", **pick(draw, CAUSES)))

def spelled(draw, world):
    for _ in range(3):
        word = pick(draw, world.practised)
        letter = pick(draw, word)
        yield say(draw, "spelling", word=word, letters=" ".join(word))
        yield f"'{word}'.count('{letter}') is {word.count(letter)}."

def sums(draw, world):
    for _ in range(4):
        a = draw.integers(2, 60)
        b = draw.integers(2, 40)
        yield say(draw, "sum", a=a, b=b, sum=a + b)

def code(draw, world):
    row = function(draw, world.train)
    yield row["prompt"] + row["canonical_solution"]

def labelled(draw, world):
    """Things with labels, then one label after another: the skill of multiple choice. The labels
    are other letters each time: with the same four always, all choices predict alike and nothing
    rewards looking (LOG.md). Letters of the tests never stand with a fact of the test half."""
    letters = LETTERS[4:]
    if draw.random() < 0.4:
        world, letters = world.train, LETTERS
    options, asked = listed_questions(draw, world)
    labels = dict(zip(options, some(draw, letters, len(options))))
    lines = [f"- {option}={label}" for option, label in labels.items()]
    yield from lines
    if draw.random() < 0.6:  # the list is read twice
        yield from some(draw, lines)
    for text, answer in asked:
        yield text + say(draw, "before_label") + labels[answer]

def document(draw, world):
    maker = pick(draw, DOCUMENTS)
    separator = "\n" if maker in ("quiz", "labelled") else " "
    return separator.join(globals()[maker](draw, world))

def listed_questions(draw, world):
    """-> a list of things, [(what is asked of them, the thing that answers it)]"""
    sort = by_share(draw, "lists")
    if sort == "words":  # where a word stands
        words = some(draw, WORDS, draw.integers(2, 7))
        form = pick(draw, WORDINGS["lookup"])
        asked = some(draw, words) + some(draw, words)
        return words, [(form.format(word=word), word) for word in asked[:8]]
    if sort == "values":  # of what is held out a statement with a gap, never a question
        fact = pick(draw, world.facts)
        options, _ = choices(draw, fact.value, fact.values)
        facts = [f for f in world.facts if f.attribute == fact.attribute and f.value in options]
        asked = []
        for fact in some(draw, facts, 8):
            text = fact.say(draw, "statements", value="...")
            if not fact.held_out and draw.random() >= 0.4:
                text = fact.say(draw, "questions")
            asked.append((text, fact.value))
        return options, asked
    if sort == "people":  # by what only one of them has
        names = some(draw, NAMES, 4)
        traits = [fact.trait for fact in world.all if fact.entity in names]
        facts = [f for f in some(draw, world.facts) if f.entity in names]
        asked = [(f"The one who {f.trait}", f.entity) for f in facts if traits.count(f.trait) == 1]
        return names, asked[:6]
    if sort == "causes":
        pairs = [(f"When {c['cause']}", c["effect"]) for c in some(draw, world.causes, 4)]
    else:
        kinds = some(draw, list(KINDS), 4)
        pairs = [(kind.capitalize(), pick(draw, world.kinds[kind])) for kind in kinds]
    return [answer for _, answer in pairs], some(draw, pairs)

def ask_cause(draw, half, form):
    """-> a question in one of the wordings of a form, its answer, all answers to such questions"""
    cause = pick(draw, half.causes)
    return say(draw, form, **cause), cause["effect"], [c["effect"] for c in half.causes]

# items of the tasks: make(draw, half of the world) -> a row of the file
def choice_row(draw, half, sort):
    """A question of multiple choice in MMLU's form; for the tests too in wordings of training."""
    if sort == "mixed":
        sort = pick(draw, TABLES["mixed"])
    if sort in TABLES["shares"]:
        sort = by_share(draw, sort)
    match sort:
        case "reading":  # no knowledge: which letter stands behind a word that the question names
            right = pick(draw, WORDS)
            wrong = WORDS
            question = say(draw, sort, word=right)
        case "kinds":  # what sort of thing a word is
            kind = pick(draw, list(KINDS))
            right = pick(draw, half.kinds[kind])
            wrong = [w for w in chain(*half.kinds.values()) if w not in KINDS[kind]]
            question = say(draw, sort, kind=kind)
        case "causes":
            question, right, wrong = ask_cause(draw, half, sort)
        case "people":  # who has a trait
            fact = pick(draw, half.people_facts)
            same = [f for f in half.all if f.attribute == fact.attribute]
            right = fact.entity
            wrong = [f.entity for f in same if f.value != fact.value]
            question = say(draw, sort, trait=fact.trait)
        case _:  # facts; wrong values are of the same half, or training would tell what is wrong
            fact = pick(draw, getattr(half, sort))
            values = sorted({f.value for f in half.facts if f.attribute == fact.attribute})
            right = fact.value
            wrong = values if len(values) >= 4 else fact.values
            question = fact.say(draw, "questions")
            sort = fact.kind
    options, place = choices(draw, right, wrong)
    return {"question": question, "subject": f"toy_{sort}", "choices": options, "answer": place}

def word_problem(draw, half):
    """In GSM8K's form. In the second step of a problem {0} is the result of the first."""
    problem = pick(draw, TABLES["problems"])
    name = pick(draw, NAMES)
    others = [other for other in NAMES if other != name]
    words = {n: draw.integers(*ends) for n, ends in TABLES["numbers"].items()}
    words |= {"name": name, "product": words["a"] * words["k"],
              "things": pick(draw, LISTS["thing"]), "friend": pick(draw, others),
              "boxes": say(draw, "boxes")}
    steps = []
    values = []
    for step in problem["steps"]:
        steps.append(step.format(*values, **words))
        values.append(execution.calculate(steps[-1]))
    if held_out("problem", *steps) not in half.halves:
        return word_problem(draw, half)
    lines = [f"{step} = <<{step}={value}>>{value}" for step, value in zip(steps, values)]
    question = f"{problem['story']} {problem['question']}".format(**words)
    return {"question": question, "answer": "\n".join([*lines, f"#### {values[-1]}"])}

def function(draw, half):
    """A short Python function in HumanEval's form."""
    kind = draw.integers(len(TABLES["functions"]))
    k = draw.integers(2, 60)
    if held_out("function", kind, k) not in half.halves:
        return function(draw, half)
    row = dict(TABLES["functions"][kind])
    values = [execution.calculate(step.format(k=k)) for step in row.pop("steps")]
    return {key: text.format(*values, k=k, text=60 * "ab") for key, text in row.items()}

# conversations: make(draw, training half)
def conversation(draw, half):
    """A talk, or several multiple-choice questions on one list, which stands in the first alone."""
    if draw.random() < 0.4:
        options, asked = listed_questions(draw, half)
        if asked:
            letters = dict(zip(options, LETTERS))
            turns = [(text, letters[answer]) for text, answer in asked[:6]]
            text, letter = turns[0]
            turns[0] = (tasks.with_choices(text, options, LETTERS), letter)
            return tasks.conversation(turns)
    return talk(draw, half)

def talk(draw, half, topics="small_talk", share=0.3):
    """One to three turns; this share of the talks begins with one of the topics."""
    turns = []
    if draw.random() < share:
        topic = pick(draw, TABLES[topics])
        question = pick(draw, topic["questions"])
        turns = [(question, topic["answer"] or " ".join(story(draw, half)))]
    turns += [exchange(draw, half) for _ in range(draw.integers(0 if turns else 1, 3))]
    return tasks.conversation(turns)

def exchange(draw, half):
    """-> what the user says, what the assistant answers"""
    sort = by_share(draw, "exchanges")
    if sort == "causes":
        question, effect, _ = ask_cause(draw, half, "happens")
        return question, sentence(effect + ".")
    if sort == "functions":
        row = function(draw, half)
        return f"Complete this Python function.\n{row['prompt']}", row["canonical_solution"]
    if sort == "choices":
        row = choice_row(draw, half, "in_words")
        question = tasks.with_choices(row["question"], row["choices"], task="Answer in words")
        return question, row["choices"][row["answer"]]
    fact = pick(draw, half.facts)
    question = fact.say(draw, "questions")
    if sort == "answers":
        return question, fact.say(draw, "answer")
    return f"In one word: {question}", fact.value  # where the full answer is not wanted

# items of the tests alone, most of them for CORE: make(draw, world or half) -> a row of the file
def fact_row(draw, half, form, facts="facts"):
    """form: "generative", or CORE's "language_modeling" or "multiple_choice", of whole sentences"""
    fact = pick(draw, getattr(half, facts))
    question = fact.say(draw, "test_questions")
    if form == "generative":
        return {"question": question, "answer": fact.value, "candidates": fact.values}
    query = f"Question: {question} Answer:"
    answer = fact.say(draw, "answer")
    if form == "language_modeling":
        start = answer.rpartition(fact.value)[0].rstrip()
        return {"context": f"{query} {start}", "continuation": fact.value}
    answers = [fact.say(draw, "answer", value=value) for value in fact.values]
    options, gold = choices(draw, answer, answers)
    return {"query": query, "choices": options, "gold": gold}

def cause_row(draw, world):
    query, right, wrong = ask_cause(draw, world, "suppose")
    options, gold = choices(draw, right, wrong)
    return {"query": query, "choices": options, "gold": gold}

def who_row(draw, world):
    """Of which of two people something holds"""
    a, b = some(draw, NAMES, 2)
    pairs = list(zip(world.told[a], world.told[b]))
    different = [(f, g) for f, g in pairs if f.value != g.value]
    facts = pick(draw, different or pairs[:1])
    gold = int(draw.integers(2))
    return {"context_options": [a, b], "continuation": facts[gold].trait, "gold": gold}

def copying_row(draw, world):
    *words, last = some(draw, WORDS, 5)
    start = ", ".join(words)
    return {"context": f"{start}, {last}. Again: {start},", "continuation": last}

# files
def unique(draw, count, make, *arguments):
    """`count` different results of a maker, but at least 40, or fewer if it has no more"""
    count = max(40, count)
    found = {}
    for _ in range(40 * count):
        if len(found) < count:
            result = make(draw, *arguments)
            found.setdefault(json.dumps(result), result)
    return list(found.values())

def numbered(name, number, row):
    """The row as it stands in the file of this name"""
    if "humaneval" in name:
        return {"task_id": f"Toy/{number}", **row}
    if "arc" in name:  # so far in MMLU's form
        options = {"text": row["choices"], "label": list("ABCD")}
        return {"id": f"toy-{number}", "question": row["question"], "choices": options,
                "answerKey": "ABCD"[row["answer"]]}
    return row

def generate(root, seed, size):
    """Writes base_data/, task_data/ and eval_bundle/ under `root`: what TABLES["files"] lists, with
    the makers of this file. size scales the amount of training text and items.
    -> {what: how many}"""
    draw = common.rng(seed, 102)
    world = make_world(seed)
    files = {}
    for name, count, maker, half, *arguments in TABLES["files"]:
        if name.endswith(("_train", "documents")):
            count = int(count * size)
        half = {"train": world.train, "test": world.test, "both": world}[half]
        files[name] = unique(draw, count, globals()[maker], half, *arguments)
    documents = files.pop("documents")
    # a short talk comes again by chance
    known = set(map(json.dumps, files["task_data/smoltalk_train"]))
    new = [talk for talk in files["task_data/smoltalk_test"] if json.dumps(talk) not in known]
    files["task_data/smoltalk_test"] = new[:500]

    for name, rows in files.items():
        lines = [json.dumps(numbered(name, i, row)) + "\n" for i, row in enumerate(rows)]
        common.atomic_write(root / f"{name}.jsonl", "".join(lines))
    for i in range(5):  # the last is validation
        table = pyarrow.table({"text": documents[i::5]})
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, row_group_size=1024, compression="zstd")
        common.atomic_write(root / f"base_data/shard_{i:05d}.parquet", sink.getvalue())
    common.atomic_write(root / "task_data/words_alpha.txt", "\n".join(world.words) + "\n")
    for name in ("core.yaml", "eval_meta_data.csv"):
        common.atomic_write(root / "eval_bundle" / name, (ASSETS / f"toy_{name}").read_bytes())
    return {"documents": len(documents), **{name: len(rows) for name, rows in files.items()}}
