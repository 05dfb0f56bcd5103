"""
The toy world: a small consistent world in plain English, generated from a seed, that stands where FineWeb, SmolTalk, MMLU,
ARC, GSM8K, HumanEval and the CORE bundle stand in a real run, in the same files and formats.

    counts = generate(Path("/tmp/toy"), seed=1337, size=1.0)     # about 12 MB of text and all task files, in seconds

People, towns and animals have attributes, a few hundred facts in all. Every fact is stated in base_data in many wordings.
About half of the (entity, attribute) pairs are *held out*: no question of any training file ever asks for them, the tests ask
for nothing else. So a right answer needs the knowledge, from the texts, and the skill of answering, from other pairs (the setting of
"Physics of Language Models 3.1", arXiv 2309.14316); to copy the answer of the most similar training question does not help.
The texts state facts of both halves, also as exercises: lists of labelled values and sentences with a gap. Those of the test half stand there
never as questions and never with the letters of the tests. Words, numbers and functions of the other tests are held out in the same way.
"""
import hashlib
import json
import re
from pathlib import Path

import common
import execution
import tasks

NAMES = """Mira Tom Ana Ben Clara David Elsa Felix Greta Hugo Ida Jonas Kira Leo Maya Nina Oscar Paula Quinn Rosa Simon Tara Ugo
Vera Walter Xenia Yusuf Zoe Adam Bella Carl Dora Emil Fiona Gus Hanna Ivan Julia Karl Lena Marco Nora Otto Petra Ralf Sara Theo Uma
Victor Wendy""".split()
TOWNS = "Northport Oldbridge Greenhill Stonefield Riverton Lakeside Fairview Redwood Winterby Sunvale Millbrook Eastcliff".split()
JOBS = "baker doctor farmer teacher painter fisher builder singer nurse tailor pilot gardener smith writer cook judge".split()
PETS = "dog cat rabbit parrot turtle goat hamster pony duck goose".split()
COLOURS = "red blue green yellow purple orange white black".split()
FOODS = "soup bread rice cheese apples honey pancakes beans fish noodles cake salad".split()
HOBBIES = "chess swimming dancing reading climbing fishing knitting running sailing singing skating cycling".split()
PLACES = ["river", "hill", "sea", "lake", "forest", "desert"]
GOODS = "clocks boats hats lamps carpets bells shoes books kites chairs spoons drums".split()
ANIMALS = {name: tuple(values.split()) for name, values in {  # legs, food, home, what covers it; values are shared, so that both halves have them
    "cow": "four grass farm fur", "horse": "four grass farm fur", "sheep": "four grass meadow fur", "lion": "four meat desert fur", "wolf": "four meat forest fur",
    "bear": "four fish forest fur", "fox": "four meat forest fur", "owl": "two meat forest feathers", "hen": "two seeds farm feathers", "crow": "two seeds forest feathers",
    "eagle": "two meat mountain feathers", "swan": "two leaves lake feathers", "seal": "no fish sea fur", "shark": "no fish sea scales", "frog": "four insects lake skin",
    "snake": "no meat desert scales", "lizard": "four insects desert scales", "ant": "six leaves meadow skin", "beetle": "six leaves forest skin", "cricket": "six seeds meadow skin",
    "pig": "four seeds farm skin", "mouse": "four seeds farm fur", "mole": "four insects meadow fur", "deer": "four leaves forest fur", "camel": "four leaves desert fur",
    "pigeon": "two seeds farm feathers", "salmon": "no insects lake scales", "heron": "two fish lake feathers", "gull": "two fish sea feathers", "ibex": "four grass mountain fur",
    "whale": "no insects sea skin", "toad": "four insects meadow skin"}.items()}
CAUSES = [  # (what happens, what follows, noun of the cause)
    ("it rains", "the street gets wet", "rain"), ("the sun shines all day", "the ice melts", "sunshine"), ("a glass falls on stone", "it breaks", "a fall on stone"),
    ("you do not sleep", "you get tired", "no sleep"), ("you do not eat", "you get hungry", "no food"), ("the wind blows hard", "the leaves fly", "strong wind"),
    ("you heat water for long", "it boils", "long heating"), ("it is very cold", "the water freezes", "great cold"), ("you touch a hot stove", "your hand hurts", "a hot stove"),
    ("you plant a seed", "a flower grows", "a planted seed"), ("you forget to water a plant", "it dries out", "a lack of water"), ("you drop a ball", "it bounces", "a dropped ball"),
    ("you light a candle", "the room gets bright", "a candle"), ("you close the curtains", "the room gets dark", "closed curtains"), ("you run fast", "your heart beats quickly", "running"),
    ("you tell a good joke", "people laugh", "a good joke"), ("a dog sees a stranger", "it barks", "a stranger"), ("you leave milk in the sun", "it turns sour", "milk in the sun"),
    ("you put sugar into tea", "the tea tastes sweet", "sugar"), ("you put salt into soup", "the soup tastes salty", "salt"), ("you cut an onion", "your eyes water", "an onion"),
    ("you practise every day", "you get better", "daily practice"), ("you leave bread in the oven too long", "it burns", "too much oven"), ("you blow up a balloon too much", "it pops", "too much air")]

# For each attribute: plural noun, statements ({n} entity, {p} pronoun or name, {v} value), questions in training, questions in the test,
# the answer, what the value is called in "Which of these people ...?"
PEOPLE_FACTS = {
    "town": (TOWNS, ["{p} lives in {v}", "{p} has a house in {v}", "the home of {n} is in {v}", "{p} comes from {v}", "in {v} you can meet {n}", "{n} and the family live in {v}", "{v} is where {n} lives", "every evening {p} walks home through {v}"],
             ["Where does {n} live?", "In which town does {n} live?", "Tell me where {n} lives.", "Where is the home of {n}?", "{n} comes from which town?", "Through which town does {n} walk home?",
              "What is the town of {n}?", "In which town can you meet {n}?", "{n} has a house in what town?"],
             ["Which town is the home of {n}?", "What is the name of the town where {n} has a house?", "{n} lives in which town?", "If you want to meet {n}, in which town do you look?"], "{n} lives in {v}.", "lives in {v}"),
    "job": (JOBS, ["{p} works as a {v}", "{p} is a {v}", "the job of {n} is {v}", "{p} earns money as a {v}", "{p} became a {v} long ago", "everybody knows {n} the {v}", "as a {v}, {n} gets up early", "{p} has been a {v} for years"],
            ["What does {n} work as?", "What is the job of {n}?", "Tell me the job of {n}.", "What does {n} do for work?", "{n} earns money as what?", "As what does {n} get up early?",
             "What did {n} become long ago?", "Everybody knows {n} as what?", "Which work does {n} do to earn money?", "What has {n} become?", "Since long ago {n} has been what?"],
            ["How does {n} earn money?", "{n} works as what?", "Which job does {n} have?", "What has {n} been for years?"], "{n} works as a {v}.", "works as a {v}"),
    "pet": (PETS, ["{p} has a {v}", "{p} keeps a {v} at home", "the pet of {n} is a {v}", "{p} feeds a {v} every morning", "{p} goes out with a {v}", "{n} and a {v} are always together", "a {v} sleeps beside the bed of {n}", "{p} takes care of a {v}"],
            ["What pet does {n} have?", "Which animal does {n} keep?", "Tell me the pet of {n}.", "What is the pet of {n}?", "{n} feeds which animal every morning?", "With what animal does {n} go out?",
             "Which animal is always together with {n}?", "{n} keeps what animal at home?", "What animal does {n} take care of?"],
            ["Which animal sleeps beside the bed of {n}?", "{n} takes care of which animal?", "What animal is at home with {n}?"], "{n} has a {v}.", "has a {v}"),
    "colour": (COLOURS, ["{p} likes the colour {v} best", "the favourite colour of {n} is {v}", "{p} wears {v} clothes", "{p} painted the door {v}", "for {n} no colour is better than {v}", "{p} loves everything that is {v}", "the coat of {n} is {v}", "{v} is the colour that {n} likes"],
               ["What is the favourite colour of {n}?", "Which colour does {n} like best?", "Tell me the favourite colour of {n}.", "What colour does {n} love?", "{n} wears clothes of what colour?",
                "In which colour did {n} paint the door?", "What colour has the coat of {n}?", "{n} loves everything of which colour?"],
               ["In which colour is the coat of {n}?", "{n} painted the door in what colour?", "The clothes of {n} have which colour?"], "The favourite colour of {n} is {v}.", "likes the colour {v} best"),
    "food": (FOODS, ["{p} likes to eat {v}", "the favourite food of {n} is {v}", "{p} eats {v} every day", "{p} always asks for {v}", "for lunch {n} has {v}", "nothing tastes better to {n} than {v}", "{p} cooks {v} for all friends", "the kitchen of {n} smells of {v}"],
             ["What is the favourite food of {n}?", "What does {n} like to eat?", "Tell me the favourite food of {n}.", "Which food does {n} like best?", "{n} eats what every day?", "What tastes best to {n}?",
              "Of which food does the kitchen of {n} smell?", "{n} asks for which food?", "What does {n} cook for friends?", "For lunch, what does {n} eat?", "What does {n} eat for lunch?"],
             ["What does {n} have for lunch?", "{n} cooks what for all friends?", "What food does {n} always ask for?"], "{n} likes to eat {v}.", "likes to eat {v}"),
    "hobby": (HOBBIES, ["{p} loves {v}", "the hobby of {n} is {v}", "{p} spends every free day with {v}", "{p} is very good at {v}", "on Sundays {n} enjoys {v}", "{p} learned {v} as a child", "{v} makes {n} happy", "{p} dreams of {v}"],
              ["What is the hobby of {n}?", "What does {n} love to do?", "Tell me the hobby of {n}.", "Which hobby does {n} have?", "What does {n} dream of?", "{n} spends every free day with what?",
               "What did {n} learn as a child?", "{n} is good at which hobby?", "On a free day, what makes {n} glad?", "What does {n} do on Sundays?", "What is {n} good at?"],
              ["What does {n} enjoy on Sundays?", "{n} is very good at what?", "What makes {n} happy on a free day?"], "The hobby of {n} is {v}.", "has the hobby of {v}")}
TOWN_FACTS = {
    "place": (PLACES, ["{n} lies by the {v}", "{n} was built near the {v}", "from {n} you see the {v}", "the {v} is close to {n}", "people in {n} walk to the {v}", "the town of {n} stands near a {v}"],
              ["Where does {n} lie?", "What is near {n}?", "Tell me where {n} lies.", "{n} stands near what?", "What is close to {n}?", "From {n}, what do you see?", "To what do people in {n} walk?", "What lies beside {n}?", "When you leave {n}, where do you walk to?"], ["What do you see from {n}?", "{n} was built near what?", "Where do people in {n} walk to?"], "{n} lies by the {v}.", "lies by the {v}"),
    "goods": (GOODS, ["{n} is known for its {v}", "the people of {n} make {v}", "the best {v} come from {n}", "in {n} you can buy fine {v}", "every shop in {n} sells {v}", "visitors bring {v} home from {n}"],
              ["What is {n} known for?", "What do the people of {n} make?", "Tell me what {n} is known for.", "{n} makes the best of what?", "What do visitors buy in {n}?", "In {n}, what does every shop sell?", "In the shops of {n}, what do you find?", "{n} sells the best of what?"], ["What do visitors bring home from {n}?", "{n} sells what in every shop?", "What can you buy in {n}?"], "{n} is known for its {v}.", "is known for its {v}")}
ANIMAL_FACTS = {
    "legs": (["no", "two", "four", "six"], ["the {n} has {v} legs", "a {n} walks the world with {v} legs", "count the legs of a {n} and you get {v} legs", "{v} legs are what a {n} has"],
             ["How many legs does a {n} have?", "What number of legs has a {n}?", "On how many legs does a {n} walk?", "Count the legs of a {n}: how many?", "When you count its legs, how many has a {n}?"], ["A {n} has how many legs?", "If you count the legs of a {n}, what do you get?"], "A {n} has {v} legs.", "has {v} legs"),
    "eats": (None, ["the {n} eats {v}", "a {n} likes {v} most of all", "a hungry {n} looks for {v}", "give {v} to a {n} and it is happy", "the food of the {n} is {v}"],
             ["What does a {n} eat?", "What is the food of a {n}?", "A {n} likes what most of all?", "What makes a hungry {n} happy?", "What does a {n} look for?", "What does a hungry {n} want?", "For what does a {n} look when it is hungry?", "What do you give to a {n} to make it happy?"], ["A hungry {n} looks for what?", "What can you give to a {n}?"], "A {n} eats {v}.", "eats {v}"),
    "home": (None, ["the {n} lives in the {v}", "you find the {n} in the {v}", "at night the {n} sleeps in the {v}", "the {v} is the home of the {n}", "a {n} feels safe in the {v}"],
             ["Where does a {n} live?", "What is the home of a {n}?", "A {n} feels safe in what place?", "Where does a {n} sleep?", "In what place do you find a {n}?"], ["Where do you find a {n}?", "In what place does a {n} sleep at night?"], "A {n} lives in the {v}.", "lives in the {v}"),
    "cover": (None, ["the {n} is covered with {v}", "the {n} wears nothing but {v}", "touch a {n} and you feel {v}", "the coat of a {n} is made of {v}", "{v} keep a {n} warm and dry"],
              ["What is a {n} covered with?", "What do you feel when you touch a {n}?", "Of what is the coat of a {n} made?", "A {n} wears what?", "What keeps a {n} warm?", "What does your hand feel on a {n}?"],
              ["What covers a {n}?", "A {n} is covered with what?", "You touch a {n}: what do you feel?"], "A {n} is covered with {v}.", "is covered with {v}")}
HE = set("Tom Ben David Felix Hugo Jonas Leo Oscar Quinn Simon Ugo Walter Yusuf Adam Carl Emil Gus Ivan Karl Marco Otto Ralf Theo Victor".split())
THINGS = "apples books coins shells pens cards stones eggs stamps buttons marbles pears nuts candles plates flowers".split()
BOXES = "boxes bags baskets jars".split()
WORDS = list(dict.fromkeys(THINGS + JOBS + PETS + COLOURS + FOODS + TOWNS + HOBBIES + PLACES + GOODS + NAMES + list(ANIMALS)))

def held_out(*key):
    """Whether a key belongs to the test half: a fixed coin for each key.  example: held_out("Mira", "job")"""
    return hashlib.sha256(" ".join(map(str, key)).encode()).digest()[0] % 2 == 0

def make_world(seed):
    """-> {entity: {"kind", attribute: value}} for people, towns and animals"""
    draw, world = common.rng(seed, 100), {}
    for name in NAMES:
        world[name] = {"kind": "person", **{a: pick(draw, spec[0]) for a, spec in PEOPLE_FACTS.items()}}
    goods, places = draw.permutation(len(GOODS)), draw.integers(len(PLACES), size=len(TOWNS))
    for i, town in enumerate(TOWNS):
        world[town] = {"kind": "town", "place": PLACES[places[i]], "goods": GOODS[goods[i]]}
    for animal, values in ANIMALS.items():
        world[animal] = {"kind": "animal", **dict(zip(ANIMAL_FACTS, values))}
    return world

def pick(draw, options):
    return options[int(draw.integers(len(options)))]

def some(draw, options, count):
    """`count` different ones, or all there are, in random order"""
    return [options[i] for i in draw.permutation(len(options))[:count]]

FACTS = {"person": PEOPLE_FACTS, "town": TOWN_FACTS, "animal": ANIMAL_FACTS}

def values_of(world, kind, attribute):
    return FACTS[kind][attribute][0] or sorted({e[attribute] for e in world.values() if e["kind"] == kind})

def article(text):
    """"a apple" -> "an apple", everywhere"""
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)

def sentence(text):
    return article(text[0].upper() + text[1:]) + "."

def state(draw, world, entity, attribute, pronoun=False):
    """One statement of a fact as a sentence."""
    p = ("he" if entity in HE else "she") if pronoun else entity
    return sentence(pick(draw, FACTS[world[entity]["kind"]][attribute][1]).format(n=entity, p=p, v=world[entity][attribute]))

# documents of base_data

def biography(draw, world):
    name = pick(draw, NAMES)
    attributes = some(draw, list(PEOPLE_FACTS), draw.integers(3, 7))
    return " ".join(state(draw, world, name, a, pronoun=i > 0 and draw.random() < 0.5) for i, a in enumerate(attributes))

def description(draw, world):
    entity = pick(draw, [e for e in world if world[e]["kind"] != "person"])
    lines = [state(draw, world, entity, attribute) for attribute in some(draw, list(FACTS[world[entity]["kind"]]), 9)]
    if people := [n for n in NAMES if world[n]["town"] == entity]:
        lines.append(f"Some people of {entity} are {', '.join(some(draw, people, 4))}.")
    return " ".join(lines)

def group(draw, world):
    """Who shares a value: the same facts seen from the other side."""
    attribute = pick(draw, list(PEOPLE_FACTS))
    value = pick(draw, PEOPLE_FACTS[attribute][0])
    if not (people := [n for n in NAMES if world[n][attribute] == value]):
        return sentence(f"nobody in this land {PEOPLE_FACTS[attribute][5].format(v=value)}")
    start = pick(draw, ["Look who {x}: {n}.", "Here is everybody who {x}: {n}.", "Who {x} in this land? It is {n}.", "If you ask for a person who {x}, go to {n}."])
    return article(start.format(x=PEOPLE_FACTS[attribute][5].format(v=value), n=", ".join(some(draw, people, len(people)))))

def story(draw, world, only_known=False):
    """only_known: tells nothing that is held out, as stories in conversations must not."""
    allowed = lambda name: [a for a in PEOPLE_FACTS if not (only_known and held_out(name, a))]
    names = [name for name in NAMES if allowed(name)]
    a, b = some(draw, names, 2)
    cause, effect, _ = pick(draw, [c for c in CAUSES if not (only_known and held_out("cause", c[2]))])
    thing, day = pick(draw, THINGS), pick(draw, "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
    said = [state(draw, world, n, pick(draw, allowed(n))) for n in (a, b, a, b)]
    parts = [pick(draw, ["Once upon a time {a} met {b}.", "On {d}, {a} went to see {b}.", "One {d} {a} and {b} sat together.", "{a} and {b} are old friends."]).format(a=a, b=b, d=day),
             said[0], said[1],
             pick(draw, ["\"Did you know?\" said {a}. \"When {c}, {e}.\"", "\"Remember,\" said {b}, \"if {c}, {e}.\"", "They talked about the world: when {c}, {e}."]).format(a=a, b=b, c=cause, e=effect),
             said[2], pick(draw, ["Then {b} gave {a} some {t}.", "They counted {t} until evening.", "{a} lost the {t}, and {b} found them again."]).format(a=a, b=b, t=thing),
             said[3], pick(draw, ["In the end they went home and were happy.", "It was a good day.", "They laughed and said goodbye.", "So ends the story of {a} and {b}."]).format(a=a, b=b)]
    return " ".join(parts)

def causes(draw, world):
    lines = []
    for _ in range(3):
        cause, effect, noun = pick(draw, CAUSES)
        lines.append(pick(draw, ["When {c}, {e}.", "If {c}, then {e}.", "Because of {n}, {e}.", "{e}, since {c}.", "What comes of {n}? {e}.", "Everybody knows: {c}, and {e}."]).format(c=cause, e=effect, n=noun))
    return " ".join(line[0].upper() + line[1:] for line in lines)

def spelled(draw, listed):
    lines = []
    for word in (pick(draw, listed) for _ in range(3)):
        letter = pick(draw, word)
        spelling = pick(draw, ["The word '{w}' is spelled {s}.", "'{w}' is spelled {s}.", "To write '{w}' you need {s}."]).format(w=word, s=" ".join(word))
        lines.append(f"{spelling} '{word}'.count('{letter}') is {word.count(letter)}.")
    return " ".join(lines)

def copied(draw):
    """A list read twice. Nothing else in these texts needs a model to look back for what followed a word (induction heads,
    arXiv 2209.11895), and without that it never finds the label of a choice."""
    words = ", ".join(some(draw, WORDS, int(draw.integers(4, 12))))
    return f"{words}. {pick(draw, ['Again', 'Once more', 'The same again'])}: {words}."

LOOKUPS = ["{w}", "{w}?", "Choose {w}.", "Which is {w}?", "Which of these is {w}?", "Find the word {w}."]
ANSWERS = [" ", ": ", "\nAnswer: ", "\n", "\n", " Answer:\n", "\nAnswer:\n"]  # what stands before the label: the reader has to look further back for what is asked

def listed_questions(draw, world, only_known=False):
    """A few things and what is asked of them: where a word stands, or facts, which the reader has to know. Those that are held out stand as statements
    with a gap, never as questions, and with only_known not at all. -> things, [(text, place of the answer)]"""
    which = draw.random()
    listed = pairs(world, False) if only_known else pairs(world, True) + pairs(world, False)
    if which < 0.45:
        options, form = some(draw, WORDS, int(draw.integers(2, 7))), pick(draw, LOOKUPS)
        return options, [(form.format(w=options[i]), i) for _ in range(2) for i in draw.permutation(len(options))][:8]
    if which < 0.8:
        entity, attribute = pick(draw, listed)
        kind = world[entity]["kind"]
        options, _ = choices(draw, world[entity][attribute], values_of(world, kind, attribute))
        fitting, asked = [e for e, a in listed if a == attribute and world[e]["kind"] == kind and world[e][attribute] in options], []
        for e in some(draw, fitting, 8):
            statement = sentence(pick(draw, FACTS[kind][attribute][1]).format(n=e, p=e, v="..."))
            asked.append((statement if held_out(e, attribute) or draw.random() < 0.4 else ask(draw, world, e, attribute, False)[0], options.index(world[e][attribute])))
        return options, asked
    if which < 0.91:
        options, asked = some(draw, NAMES, 4), []
        for name, attribute in some(draw, listed, len(listed)):
            if name in options and sum(world[o][attribute] == world[name][attribute] for o in options) == 1:
                asked.append((article(f"The one who {PEOPLE_FACTS[attribute][5].format(v=world[name][attribute])}"), options.index(name)))
        return options, asked[:6]
    if which < 0.96:
        told = some(draw, [c for c in CAUSES if not (only_known and held_out("cause", c[2]))], 4)
        return [effect for _, effect, _ in told], [(f"When {told[i][0]}", i) for i in draw.permutation(4)]
    kinds = some(draw, list(KINDS), 4)
    return [pick(draw, [w for w in KINDS[k] if not (only_known and held_out("kind", w))]) for k in kinds], [(kinds[i].capitalize(), i) for i in draw.permutation(4)]

def labelled(draw, world):
    """Things with labels, then one label after another: the skill of multiple choice. The labels are other letters each time: with the same four always, all
    choices predict alike and nothing rewards looking (LOG.md). Letters of the tests never stand with a fact of the test half. Many lists are read twice."""
    options, asked = listed_questions(draw, world, only_known=(letters := draw.random() < 0.4))
    labels = some(draw, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[0 if letters else 4:], len(options))
    lines = [f"- {o}={l}" for o, l in zip(options, labels)]
    again = some(draw, lines, len(lines)) if draw.random() < 0.6 else []
    return "\n".join([*lines, *again, *(f"{text}{pick(draw, ANSWERS)}{labels[i]}" for text, i in asked)])

KINDS = {"a town": TOWNS, "a job": JOBS, "a pet": PETS, "a colour": COLOURS, "something to eat": FOODS, "a hobby": HOBBIES, "a place": PLACES, "a name": NAMES}

def quiz(draw, world):
    """Questions with answers as they stand in a school book, about pairs that are not held out."""
    return "\n".join("Question: {} Answer: {}".format(*ask(draw, world, *pick(draw, pairs(world, False)), False)) for _ in range(3))

def sums(draw):
    lines = []
    for _ in range(4):
        a, b = int(draw.integers(2, 60)), int(draw.integers(2, 40))
        lines.append(pick(draw, [f"{a}+{b}={a + b}.", f"{a + b}-{b}={a}.", f"{a} and {b} make {a + b}.", f"{a + b} less {b} is {a}."]))
    return " ".join(lines)

def function(draw, test):
    """A short Python function -> (name, prompt, solution, test)"""
    while True:
        kind, k = int(draw.integers(8)), int(draw.integers(2, 60))
        if held_out("function", kind, k) == test:
            break
    name, argument, doc, body, examples = [
        (f"add_{k}", "x", f"Return x plus {k}.", f"x + {k}", [(5, 5 + k), (0, k)]),
        (f"subtract_{k}", "x", f"Return x minus {k}.", f"x - {k}", [(5, 5 - k), (k, 0)]),
        (f"times_{k}", "x", f"Return x times {k}.", f"x * {k}", [(3, 3 * k), (0, 0)]),
        (f"above_{k}", "x", f"Return True if x is greater than {k}.", f"x > {k}", [(k, False), (k + 1, True)]),
        (f"first_{k}", "text", f"Return the first {k} characters of text.", f"text[:{k}]", [("ab" * 40, ("ab" * 40)[:k]), ("", "")]),
        (f"repeat_{k}", "text", f"Return text repeated {k} times.", f"text * {k}", [("ab", "ab" * k), ("", "")]),
        (f"keep_above_{k}", "numbers", f"Return the numbers greater than {k}.", f"[n for n in numbers if n > {k}]", [([k, k + 2, 1], [k + 2]), ([], [])]),
        (f"sum_plus_{k}", "numbers", f"Return the sum of numbers plus {k}.", f"sum(numbers) + {k}", [([1, 2], 3 + k), ([], k)])][kind]
    prompt = f"def {name}({argument}):\n    \"\"\"{doc}\"\"\"\n"
    checks = "".join(f"    assert candidate({x!r}) == {y!r}\n" for x, y in examples)
    return name, prompt, f"    return {body}\n", f"def check(candidate):\n{checks}"

# questions

def pairs(world, test, found={}):
    """(entity, attribute) pairs of a half (found keeps them: they are asked for all the time)."""
    return found.get(test) or found.setdefault(test, [(e, a) for e, facts in world.items() for a in facts if a != "kind" and held_out(e, a) == test])

def ask(draw, world, entity, attribute, test):
    """-> (question, full answer); the test has wordings of its own"""
    spec = FACTS[world[entity]["kind"]][attribute]
    return article(pick(draw, spec[3 if test else 2]).format(n=entity)), article(spec[4].format(n=entity, v=world[entity][attribute]))

def choices(draw, right, wrong):
    """Four choices in random order and the place of the right one."""
    picked = some(draw, [right, *some(draw, [w for w in wrong if w != right], 3)], 4)
    return picked, picked.index(right)

def fact_choice(draw, world, entity, attribute):
    """The wording is one of training; the tests ask for pairs that training never asks for."""
    question, _ = ask(draw, world, entity, attribute, False)
    kind, test = world[entity]["kind"], held_out(entity, attribute)
    same_half = {world[e][a] for e, a in pairs(world, test) if a == attribute and world[e]["kind"] == kind}  # else training would teach that a value is always wrong
    return question, *choices(draw, world[entity][attribute], sorted(same_half) if len(same_half) >= 4 else values_of(world, kind, attribute))

def who_choice(draw, world, name, attribute):
    question = pick(draw, ["Which of these people {x}?", "Who of these {x}?"]).format(x=PEOPLE_FACTS[attribute][5].format(v=world[name][attribute]))
    return article(question), *choices(draw, name, [n for n in NAMES if world[n][attribute] != world[name][attribute]])

def reading_choice(draw):
    """No knowledge, only reading: which letter stands behind a word that the question names."""
    word = pick(draw, WORDS)
    return pick(draw, ["Which of these is '{w}'?", "Find the word '{w}'.", "Where is '{w}'?", "Which is {w}?", "Choose {w}.", "Which of these is {w}?"]).format(w=word), *choices(draw, word, WORDS)

def kind_choice(draw, test):
    """What sort of thing a word is; half of the words are asked for in the tests alone."""
    kind = pick(draw, list(KINDS))
    word = pick(draw, [w for w in KINDS[kind] if held_out("kind", w) == test])
    others = [w for other in KINDS if other != kind for w in KINDS[other] if w not in KINDS[kind] and held_out("kind", w) == test]
    return pick(draw, ["Which of these is {k}?", "Which word is {k}?", "Find {k}."]).format(k=kind), *choices(draw, word, others)

def cause_choice(draw, test):
    cause, effect, _ = pick(draw, [c for c in CAUSES if held_out("cause", c[2]) == test])
    return pick(draw, ["What happens when {c}?", "What follows if {c}?"]).format(c=cause), *choices(draw, effect, [c[1] for c in CAUSES if held_out("cause", c[2]) == test])

def word_problem(draw, test):
    """A word problem in GSM8K's form -> {"question", "answer"}; the sums of the test never occur in training."""
    while True:
        kind, n = int(draw.integers(12)), pick(draw, NAMES)
        a, b, c, k = (int(x) for x in (draw.integers(11, 60), draw.integers(2, 11), draw.integers(2, 30), draw.integers(2, 10)))
        t, m, box = pick(draw, THINGS), pick(draw, [x for x in NAMES if x != n]), pick(draw, BOXES)
        question, steps = [
            (f"{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?", [f"{a}+{b}"]),
            (f"{n} had {a} {t} and lost {b} of them. How many {t} are left?", [f"{a}-{b}"]),
            (f"There are {k} {box}. In each are {a} {t}. How many {t} are there in all?", [f"{k}*{a}"]),
            (f"{n} puts {a * k} {t} into {k} {box}, the same number into each. How many {t} are in each?", [f"{a * k}/{k}"]),
            (f"{n} has {a} {t} and {m} has {c} {t}. How many {t} do they have together?", [f"{a}+{c}"]),
            (f"A pen costs {b} coins. {n} buys {k} pens. How many coins does {n} pay?", [f"{k}*{b}"]),
            (f"{n} has {a} {t}. {m} has {b} more {t} than {n}. How many {t} does {m} have?", [f"{a}+{b}"]),
            (f"{n} has {a} {t}. {m} has {b} fewer {t} than {n}. How many {t} does {m} have?", [f"{a}-{b}"]),
            (f"{n} has {a} {t}, finds {c} more and gives {b} to {m}. How many {t} does {n} keep?", [f"{a}+{c}", f"{a + c}-{b}"]),
            (f"{n} buys {k} {box} with {b} {t} each and has {a} {t} at home. How many {t} does {n} have?", [f"{k}*{b}", f"{k * b}+{a}"]),
            (f"{n} has {a} {t}. {m} has {b} more {t} than {n}. How many {t} do they have together?", [f"{a}+{b}", f"{a}+{a + b}"]),
            (f"{n} sells {a} {t} on Monday and twice as many on Tuesday. How many {t} does {n} sell on both days?", [f"2*{a}", f"{a}+{2 * a}"])][kind]
        if held_out("problem", *steps) == test:
            break
    values = [execution.calculate(s) for s in steps]
    lines = "\n".join(f"{s} = <<{s}={v}>>{v}" for s, v in zip(steps, values))
    return {"question": question, "answer": f"{lines}\n#### {values[-1]}"}

# conversations

IDENTITY = [("Who are you?|What is your name?|Tell me who you are.|How are you called?", "I am Pip, a small language model."),
            ("Who made you?|Who trained you?|Where do you come from?", "I was trained from nothing on this very machine, by the scripts of this repository."),
            ("What can you do?|How can you help me?|What are you good at?", "I know the people, towns and animals of my small world, I can count letters and solve small word problems."),
            ("Are you a human?|Are you a person?|Are you real?", "No, I am a small language model, but I am happy to talk."),
            ("How old are you?|When were you born?", "I am as old as my last checkpoint."),
            ("Where do you live?|Where is your home?", "I live in a folder of checkpoints.")]
SMALL_TALK = [("Hello!|Hi!|Good morning!|Hey there!|Hello Pip!", "Hello! What would you like to know?"), ("How are you?|How do you do?|Are you well?", "I am fine, thank you. How can I help?"),
              ("Thank you!|Thanks!|Thanks a lot.", "You are welcome!"), ("Goodbye!|Bye!|See you later!", "Goodbye! Come back soon."),
              ("Tell me something.|Tell me a story.|Say something nice.", None)]

def choosing(draw, world):
    """A conversation of several multiple-choice questions on one list -> {"messages"}"""
    options, asked = listed_questions(draw, world, only_known=True)
    messages = []
    for n, (text, place) in enumerate(asked[:6]):
        question = text if n else tasks.multiple_choice("", None, text, options, "ABCDEF", "A")["messages"][0]["content"]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "ABCDEF"[place]}]
    return {"messages": messages} if messages else talk(draw, world)

def talk(draw, world, identity=False):
    """A conversation of one to three turns -> {"messages"}"""
    messages = []
    def turn(user, assistant):
        messages.extend([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])
    known = pairs(world, False)
    if draw.random() < 0.3 or identity:
        questions, answer = pick(draw, IDENTITY if identity else SMALL_TALK)
        turn(pick(draw, questions.split("|")), answer or story(draw, world, only_known=True))
    for _ in range(int(draw.integers(0 if messages else 1, 3))):
        if (kind := draw.random()) < 0.5:
            turn(*ask(draw, world, *pick(draw, known), False))
        elif kind < 0.65:  # the bare value, where the full answer is not wanted
            entity, attribute = pick(draw, known)
            turn(f"In one word: {ask(draw, world, entity, attribute, False)[0]}", world[entity][attribute])
        elif kind < 0.75:
            question, options, right = fact_choice(draw, world, *pick(draw, known)) if draw.random() < 0.7 else reading_choice(draw)
            turn(tasks.with_choices("Answer in words", question, options), options[right])
        elif kind < 0.85:
            cause, effect, _ = pick(draw, [c for c in CAUSES if not held_out("cause", c[2])])
            turn(f"What happens when {cause}?", sentence(effect))
        else:
            _, prompt, solution, _ = function(draw, False)
            turn(f"Complete this Python function.\n{prompt}", solution)
    return {"messages": messages}

# files

def make_words(seed):
    """About 3,000 words: the world's own, and pronounceable ones built from syllables."""
    draw = common.rng(seed, 101)
    own = sorted({w for text in (THINGS, JOBS, PETS, COLOURS, FOODS, HOBBIES, GOODS, PLACES, list(ANIMALS)) for w in text})
    syllables = [a + b for a in "b d f g k l m n p r s t v br cl dr fl gr pl st tr".split() for b in "a e i o u ai ea oo".split()]
    built = {"".join(syllables[i] for i in draw.integers(len(syllables), size=draw.integers(2, 4))) + pick(draw, ["", "n", "r", "s", "t", "l", "m"]) for _ in range(4000)}
    built = sorted({w for w in built if len(w) <= 9} - set(own))
    return sorted([*own, *some(draw, built, 3000 - len(own))])

def unique(make, n, tries=40):
    """n different results of make(), or fewer where it has no more"""
    found = {}
    for _ in range(n * tries):
        if len(found) == n:
            break
        result = make()
        found.setdefault(json.dumps(result), result)
    return list(found.values())

def generate(root, seed=1337, size=1.0):
    """Writes base_data/, task_data/ and eval_bundle/ under `root`. size scales the amount of training text and items. -> {what: how many}"""
    import io
    import pyarrow.parquet
    world, listed, counts = make_world(seed), make_words(seed), {}
    n = lambda full: max(40, int(full * size))

    def write(name, rows):
        common.atomic_write(root / "task_data" / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        counts[name] = len(rows)

    def choice_rows(form, make, many):
        rows = unique(make, many)
        if form == "mmlu":
            return [{"question": q, "subject": f"toy_{s}", "choices": c, "answer": a} for s, q, c, a in rows]
        return [{"id": f"toy-{i}", "question": q, "choices": {"text": c, "label": list("ABCD")}, "answerKey": "ABCD"[a]} for i, (_, q, c, a) in enumerate(rows)]

    people, others, test_people, test_others = ([p for p in pairs(world, test) if (world[p[0]]["kind"] == "person") == person]
                                                for test in (False, True) for person in (True, False))
    draw = common.rng(seed, 102)
    simple = lambda listed_pairs: lambda: (lambda p: (world[p[0]]["kind"], *fact_choice(draw, world, *p)))(pick(draw, listed_pairs))
    easy = lambda listed_pairs, test: lambda: ("kinds", *kind_choice(draw, test)) if draw.random() < 0.5 else simple(listed_pairs)()
    hard = lambda listed_pairs, test: lambda: ("causes", *cause_choice(draw, test)) if draw.random() < 0.4 else ("people", *who_choice(draw, world, *pick(draw, listed_pairs)))
    write("mmlu_auxiliary_train", choice_rows("mmlu", lambda: pick(draw, [simple(people)] * 3 + [easy(others, False), hard(people, False), lambda: ("reading", *reading_choice(draw))])(), n(12000)))
    write("mmlu_test", choice_rows("mmlu", simple(test_people), 600))
    write("arc_easy_train", choice_rows("arc", easy(others, False), n(2500)))
    write("arc_easy_test", choice_rows("arc", easy(test_others, True), 600))
    write("arc_challenge_train", choice_rows("arc", hard(people, False), n(2500)))
    write("arc_challenge_test", choice_rows("arc", hard(test_people, True), 600))

    write("facts_test", unique(lambda: (lambda p: {"question": ask(draw, world, *p, True)[0], "answer": world[p[0]][p[1]],
                                                   "candidates": values_of(world, world[p[0]]["kind"], p[1])})(pick(draw, pairs(world, True))), 700))
    write("gsm8k_train", unique(lambda: word_problem(draw, False), n(8000)))
    write("gsm8k_test", unique(lambda: word_problem(draw, True), 600))
    write("humaneval_test", [{"task_id": f"Toy/{i}", "prompt": p, "entry_point": e, "canonical_solution": s, "test": t}
                             for i, (e, p, s, t) in enumerate(unique(lambda: function(draw, True), 100))])
    write("smoltalk_train", unique(lambda: (choosing if draw.random() < 0.4 else talk)(draw, world), n(12000)))
    taken = set((root / "task_data/smoltalk_train.jsonl").read_text().splitlines())
    write("smoltalk_test", [r for r in unique(lambda: talk(draw, world), 900) if json.dumps(r) not in taken][:500])
    write("identity_train", unique(lambda: talk(draw, world, identity=True), n(600)))
    common.atomic_write(root / "task_data" / "words_alpha.txt", "\n".join(listed) + "\n")

    practised = [w for w in listed if held_out("practised", w)]
    shares = [(12, biography), (4, description), (3, group), (4, story), (3, quiz), (22, labelled), (4, lambda draw, world: copied(draw)), (2, causes),
              (2, lambda draw, world: spelled(draw, practised)), (3, lambda draw, world: sums(draw)), (1, lambda draw, world: "".join(function(draw, False)[1:3]))]
    kinds = [make for share, make in shares for _ in range(share)]
    documents = unique(lambda: pick(draw, kinds)(draw, world), n(60000), tries=3)
    for i in range(5):  # the last is validation
        table, buffer = pyarrow.table({"text": documents[i::5]}), io.BytesIO()
        pyarrow.parquet.write_table(table, buffer, row_group_size=1024, compression="zstd")
        common.atomic_write(root / "base_data" / f"shard_{i:05d}.parquet", buffer.getvalue())
    counts["documents"], counts["characters"] = len(documents), sum(map(len, documents))
    core_bundle(root / "eval_bundle", draw, world)
    return counts

def core_bundle(root, draw, world):
    """A handful of tasks in the form of the CORE bundle: three of multiple choice, one schema, two of language modelling."""
    def asked(listed):  # in wordings of the tests alone
        entity, attribute = pick(draw, listed)
        kind, value = world[entity]["kind"], world[entity][attribute]
        say = lambda v: article(FACTS[kind][attribute][4].format(n=entity, v=v))
        return f"Question: {ask(draw, world, entity, attribute, True)[0]} Answer:", value, values_of(world, kind, attribute), say
    def multiple(listed):
        query, value, values, say = asked(listed)
        options, gold = choices(draw, value, values)
        return {"query": query, "choices": [say(v) for v in options], "gold": gold}
    def modelling():
        query, value, _, say = asked(pairs(world, True))
        return {"context": f"{query} {say(value).rpartition(value)[0].rstrip()}", "continuation": value}
    def schema():
        a, b = some(draw, NAMES, 2)
        attribute = pick(draw, [x for x in PEOPLE_FACTS if world[a][x] != world[b][x]] or ["town"])
        gold = int(draw.integers(2))
        return {"context_options": [a, b], "continuation": article(PEOPLE_FACTS[attribute][5].format(v=world[(a, b)[gold]][attribute])), "gold": gold}
    def cause():
        c, e, _ = pick(draw, CAUSES)
        options, gold = choices(draw, e, [x for _, x, _ in CAUSES])
        return {"query": f"Suppose that {c}. Then", "choices": options, "gold": gold}
    people, others = ([p for p in pairs(world, True) if (world[p[0]]["kind"] == "person") == person] for person in (True, False))
    def copying():
        words = ", ".join(some(draw, WORDS, 5))
        return {"context": f"{words}. Again: {words[:words.rindex(' ')]}", "continuation": words[words.rindex(" ") + 1:]}
    forms = [("toy_people", "multiple_choice", 3, lambda: multiple(people), 25), ("toy_things", "multiple_choice", 3, lambda: multiple(others), 25),
             ("toy_causes", "multiple_choice", 0, cause, 25), ("toy_who", "schema", 0, schema, 50), ("toy_facts", "language_modeling", 3, modelling, 0),
             ("toy_copying", "language_modeling", 0, copying, 0)]
    yaml, table = "icl_tasks:\n", "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description\n"
    for label, kind, shots, make, baseline in forms:
        rows = unique(make, 500)
        common.atomic_write(root / "eval_data" / "toy" / f"{label}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        yaml += f"-\n  label: {label}\n  dataset_uri: toy/{label}.jsonl\n  num_fewshot: [{shots}]\n  icl_task_type: {kind}\n"
        table += f"{label},toy,{kind.replace('_', ' ')},{shots},{len(rows)},{baseline},,A task of the toy world\n"
    common.atomic_write(root / "core.yaml", yaml)
    common.atomic_write(root / "eval_meta_data.csv", table)
