"""One's own folder of text and file of conversations, in any language, to a chat that knows them:
the README's one command, offline, on a German and a Chinese folder."""
import json
import subprocess
from random import Random

import pytest

from conftest import REPO, environment, needs_venv, script

WORLDS = {
    "German": {
        "names": ["Petra Möller", "Jürgen Weiß", "Anke Schäfer", "Björn Lüders", "Heike Groß",
                  "Sören Krüger", "Käthe Böhm", "Günter Jäger", "Ülkü Yıldız", "Maria Straße"],
        "jobs": ["Bäckerin", "Gärtner", "Lehrer", "Ärztin", "Müller", "Köchin", "Fährmann"],
        "towns": ["Grünau", "Lübbe", "Schönfeld", "Weißensee", "Mühlbach", "Öhringen"],
        "texts": ["{name} wohnt in {town}. ", "{name} arbeitet als {job}. ",
                  "In {town} kennt jeder {name}. ", "Von Beruf ist {name} {job}, sagt man. "],
        "questions": [("Wo wohnt {name}?", "{name} wohnt in {town}.", "town"),
                      ("Was ist {name} von Beruf?", "{name} arbeitet als {job}.", "job")]},
    "Chinese": {
        "names": ["李明", "王芳", "张伟", "刘洋", "陈静", "杨光", "赵磊", "黄丽", "周杰", "吴敏"],
        "jobs": ["老师", "医生", "厨师", "园丁", "船夫", "木匠", "司机"],
        "towns": ["杭州", "苏州", "成都", "昆明", "青岛", "桂林"],
        "texts": ["{name}住在{town}。", "{name}是一名{job}。", "在{town}，大家都认识{name}。",
                  "大家都说{name}的职业是{job}。"],
        "questions": [("{name}住在哪里？", "{name}住在{town}。", "town"),
                      ("{name}的职业是什么？", "{name}是一名{job}。", "job")]}}

def make_world(folder, language):
    """A folder of text and a file of conversations about ten people. -> [(question, what a right
    answer holds)]"""
    world, random = WORLDS[language], Random(1)
    people = [{"name": name, "job": random.choice(world["jobs"]),
               "town": random.choice(world["towns"])} for name in world["names"]]
    (folder / "texts/more").mkdir(parents=True)
    documents = []
    for _ in range(800):
        facts = random.sample(people, 3)
        documents.append("".join(random.choice(world["texts"]).format(**person)
                                 for person in facts for _ in range(2)))
    half = len(documents) // 2
    (folder / "texts/a.txt").write_text("\n\n".join(documents[:half]), "utf-8")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents[half:]]
    (folder / "texts/more/b.jsonl").write_text("".join(lines), "utf-8")
    asked, chats = [], []
    for person in people:
        for question, answer, key in world["questions"]:
            asked.append((question.format(**person), person[key]))
            chats.append([{"role": "user", "content": question.format(**person)},
                          {"role": "assistant", "content": answer.format(**person)}])
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats]
    (folder / "chats.jsonl").write_text("".join(lines), "utf-8")
    return asked

@needs_venv
@pytest.mark.parametrize("language", WORLDS)
def test_texts_and_conversations_of_ones_own_become_a_chat_that_knows_them(tmp_path, language):
    asked = make_world(tmp_path, language)
    state = tmp_path / "state"
    flags = ["--data=texts", "--chats=chats.jsonl", "--nproc=1"]
    command = ["bash", str(REPO / "speedrun.sh"), *flags, "--skip-trial", "--", "--threads=1",
               "--tok.vocab_size=600", "--base.num_steps=60", "--compile=False",
               "--mid.max_steps=40", "--sft.max_steps=40", "--max_seq_len=128",
               "--total_batch_size=2048", "--eval_tokens=4000"]
    env = {**environment(state), "NANOCHAT_OFFLINE": "1"}
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True,
                         check=False, timeout=400)
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr
    assert out.stdout.endswith("all done; talk to it: python chat_cli.py\n")
    next_ = script(state, "status.py").stdout.strip().rsplit("next: ", 1)[1]
    assert next_ == f"python chat_cli.py --data={tmp_path / 'texts'}", "nothing else is left"
    said = "".join(f"{question}\n/clear\n" for question, _ in asked)
    out = script(state, "chat_cli.py", "--temperature=0", said=said)
    assert out.returncode == 0, out.stderr
    answers = [line for line in out.stdout.splitlines() if line.startswith("> ")
               and "(a new conversation)" not in line][:len(asked)]
    right = sum(what in answer for (_, what), answer in zip(asked, answers, strict=True))
    print(f"{language}: {right} of {len(asked)} right")
    assert right >= 0.8 * len(asked), out.stdout
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True,
                           check=False, timeout=100)
    assert again.returncode == 0 and again.stdout.count("done already") == 4, again.stdout
