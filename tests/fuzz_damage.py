"""
Small random damages to a user's files and to a state folder, each followed by one command that
reads them. Whatever happens, a command ends in one of two ways:

    0 or 75   what was trained or measured is what an undamaged folder gives, or what was said:
              the output names the file that was skipped, or given up for another one
    2         one line, `error: ...`, that names the file or the command that mends; nothing on
              disk has changed

and after both every file that was whole is there still, with no traceback and nothing half written.

    python tests/fuzz_damage.py --cases=300 --seed=9      a line for each fault, and a table
    python tests/fuzz_damage.py --only=17 --seed=9        one case, with all that it said

One process has imported torch; it forks one for each case, so that a case takes half a second.
The judge is tried first on scripts that break a rule each.
"""
import collections
import gzip
import hashlib
import io
import json
import os
import random
import re
import runpy
import shutil
import stat
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
for variable in [name for name in os.environ if name.startswith(("SLURM_", "NANOCHAT_"))]:
    del os.environ[variable]
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "NANOCHAT_OFFLINE": "1"}

# what the scripts import is imported once, here
import pyarrow
import pyarrow.parquet

import checkpoint
import common
import corpus
import data as dataset
import evaluation  # noqa: F401
import optim  # noqa: F401
import pipeline
import run as runs
import texts  # noqa: F401
import tokenizer as tok
import training  # noqa: F401
from chaos import read_flags

PATIENCE = 40  # seconds until a command hangs

# -------------------------------------------------------------------------------------------------
# the folders: what a user has, and what all phases have made of it

FEW = ["Löwe", "Haus", "tree", "house", "river", "stone", "été", "garçon", "Fluß", "山", "水",
       "small", "green", "bird", "sings", "walks"]

def prose(draw, paragraphs):
    lines = []
    for _ in range(paragraphs):
        words = draw.choices(FEW, k=20) + [f"w{draw.randrange(10_000)}"]
        lines.append(" ".join(words) + ".")
    return lines

def make_inputs(here):
    """A folder of texts, conversations to learn from and to measure on."""
    draw, books = random.Random(1), here / "books"
    books.mkdir(parents=True)
    (here / "talks").mkdir()
    rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in prose(draw, 60)]
    (books / "a.txt").write_text("\n\n".join(prose(draw, 60)))
    (books / "b.jsonl").write_text("".join(rows[:30]))
    with gzip.GzipFile(books / "c.jsonl.gz", "wb", mtime=0) as f:
        f.write("".join(rows[30:]).encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": prose(draw, 60)}), books / "d.parquet")
    (books / "e.txt").write_text("\n\n".join(prose(draw, 40)))
    for name, n in ("learn", 40), ("measure", 20):
        lines = []
        for question in prose(draw, n):
            said = [{"role": "user", "content": question[:20]},
                    {"role": "assistant", "content": question[-6:-1]}]
            lines.append(json.dumps({"messages": said}, ensure_ascii=False) + "\n")
        (here / f"talks/{name}.jsonl").write_text("".join(lines))
    folder = here / "state/task_data"
    folder.mkdir(parents=True)
    rows = [{"question": f"What is {i} plus 1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### "
             f"{i + 1}"} for i in range(12)]
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

def commands(here):
    """{name: words of the command}"""
    own = f"--data={here / 'books'}"
    where = [own, "--device=cpu", "--dtype=float32", "--threads=1"]
    train = [*where, "--compile=False", "--device_batch_size=4", "--save_minutes=0",
             "--eval_tokens=500", "--keep=2"]
    base = ["base_train.py", *train, "--depth=1", "--max_seq_len=64", "--total_batch_size=256",
            "--num_steps=6", "--sample_every=0"]
    chat = [*train, f"--mixture={here / 'talks/learn.jsonl'}",
            f"--held_out={here / 'talks/measure.jsonl'}", "--max_steps=4", "--tag=d1"]
    gsm8k = ["chat_eval.py", *where, "--source=mid", "--tag=d1", "--tasks=gsm8k",
             "--max_new_tokens=4"]
    core = ["base_eval.py", *where, "--tag=d1", "--core_items=0", "--eval_tokens=500",
            "--show_samples=False", "--device_batch_size=4"]
    return {
        "check": ["prepare_data.py", own, "--check=True", "--phases=tok,base"],
        "tok": ["tok_train.py", own, "--vocab_size=300", "--workers=1"],
        "tok over": ["tok_train.py", own, "--vocab_size=310", "--workers=1", "--start_over=True"],
        "base": base,
        "base half": [*base, "--tag=half"],
        "base new": [*base, "--tag=new"],
        "base over": [*base, "--start_over=True"],
        "mid": ["mid_train.py", *chat],
        "mid over": ["mid_train.py", *chat, "--start_over=True"],
        "sft half": ["chat_sft.py", *chat],
        "sft over": ["chat_sft.py", *chat, "--start_over=True"],
        "base-eval": core,
        "base-eval more": [*core, "--eval_tokens=800"],
        "mid-eval": gsm8k,
        "mid-eval more": [*gsm8k, "--max_items=8"],
        "chat": ["chat_cli.py", *where, "-p", "Löwe", "--temperature=0", "--max_new_tokens=8"],
        "status": ["status.py", own],
        "report": ["report.py", own, "--tag=d1"],
    }

PREPARE = ["tok", "base", "base half", "mid", "sft half", "base-eval", "mid-eval", "report"]
HALF = {"base half": 3, "sft half": 2}  # steps after which they are asked to stop
# which files a command reads: parts of their paths
READS = {"check": ["books/"], "tok": ["books/", "tokenizer/"], "tok over": ["books/", "tokenizer/"],
         "base": ["books/", "tokenizer/", "base_checkpoints/d1", "tokens/"],
         "base half": ["books/", "tokenizer/", "base_checkpoints/half", "tokens/"],
         "base new": ["books/", "tokenizer/", "tokens/"],
         "base over": ["books/", "tokenizer/", "base_checkpoints/d1", "tokens/"],
         "mid": ["talks/", "tokenizer/", "base_checkpoints/d1", "mid_", "tokens/"],
         "mid over": ["talks/", "tokenizer/", "base_checkpoints/d1", "mid_", "tokens/"],
         "sft half": ["talks/", "tokenizer/", "mid_", "chatsft_", "tokens/"],
         "sft over": ["talks/", "tokenizer/", "mid_", "chatsft_", "tokens/"],
         "base-eval": ["books/", "tokenizer/", "base_checkpoints/d1", "report/core", "tokens/"],
         "base-eval more": ["books/", "tokenizer/", "base_checkpoints/d1", "report/core"],
         "mid-eval": ["task_data/", "tokenizer/", "mid_", "report/chat"],
         "mid-eval more": ["task_data/", "tokenizer/", "mid_", "report/chat"],
         "chat": ["tokenizer/", "_checkpoints/"], "status": ["state/"], "report": ["state/"]}

# -------------------------------------------------------------------------------------------------
# damages: each takes (path, draw), and changes that file alone

def rewrite(path, content):
    """Writes other content; its time of writing changes, too."""
    path.write_bytes(content)

def flip_bit(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    rewrite(path, content)

def change_bytes(path, draw):
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at:at + 8] = draw.randbytes(8)
    rewrite(path, content)

def truncate(path, draw):
    rewrite(path, path.read_bytes()[:draw.randrange(1, path.stat().st_size)])

def empty(path, draw):
    rewrite(path, b"")

def zeros(path, draw):
    """A block that never reached the disk."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at:] = bytes(len(content) - at)
    rewrite(path, content)

def append_garbage(path, draw):
    rewrite(path, path.read_bytes() + draw.choice([b"\n{", b"\0\0\0", b"\xff\xfe\xfd\n", b"}}"]))

def recode(path, draw):
    """Another encoding, as an editor saves it."""
    content = path.read_bytes()
    name = draw.choice(["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-8-sig", "utf-32"])
    try:
        rewrite(path, content.decode().encode(name, errors="replace"))
    except UnicodeDecodeError:
        rewrite(path, content.replace(b"\n", b"\r\n"))

def swap(path, draw):
    others = [p for p in path.parent.rglob("*") if p.is_file() and p != path and p.stat().st_size]
    other = draw.choice(others or [path])
    mine, theirs = path.read_bytes(), other.read_bytes()
    rewrite(path, theirs)
    rewrite(other, mine)

def remove(path, draw):
    path.unlink()

def duplicate(path, draw):
    name = draw.choice([f"copy of {path.name}", f"2026-11-28-{path.name}", f"{path.name}.bak",
                        f"zz{path.name}", re.sub("_0+", "_99", path.name)])
    if name == path.name:
        name += "2"
    shutil.copy2(path, path.with_name(name))

def rename(path, draw):
    odd = draw.choice(["it's ", "-", "ü\u0301", "a\nb ", "*", "$(x)", "\udcff", ".", ""])
    ending = draw.choice(["", "", "~", ".TXT"])
    path.rename(path.with_name(f"{odd}{path.name}{ending}"))

def make_folder(path, draw):
    path.unlink()
    path.mkdir()

def make_link(path, draw):
    """Dangling, to itself, or to the file, which stands elsewhere now."""
    to = draw.choice([path.with_name("nowhere"), path, path.parents[1] / f"moved-{path.name}"])
    if to.name.startswith("moved-"):
        shutil.copy2(path, to)
    path.unlink()
    path.symlink_to(to)

def make_fifo(path, draw):
    path.unlink()
    os.mkfifo(path)

def forbid(path, draw):
    """Root may read it all the same."""
    path.chmod(0)

DAMAGES = [flip_bit, flip_bit, change_bytes, truncate, empty, zeros, append_garbage, recode, swap,
           remove, remove, duplicate, rename, make_folder, make_link, make_fifo, forbid]

# -------------------------------------------------------------------------------------------------
# running

@dataclass
class Outcome:
    """How a command has ended."""
    code: int
    out: str
    err: str
    trained_on: str = ""  # the text of all that was planned to be trained on or measured

def trace_plans(path, name):
    """Every plan of rows that is made leaves the text of its stores in `path`."""
    real = dataset.make_plan

    def make_plan(stores, *args, **kwargs):
        tokenizer = tok.load_tokenizer(name)
        with open(path, "ab") as f:
            for store in stores:
                at = 0
                for length in store.lengths.tolist():
                    f.write(tokenizer.decode_bytes(store.tokens[at:at + length].tolist()) + b"\n")
                    at += length
        return real(stores, *args, **kwargs)
    dataset.make_plan = make_plan

def ask_to_stop(step):
    """After so many steps, as a signal does."""
    real = runs.Run.log_step

    def log_step(self, done, *args, **kwargs):
        real(self, done, *args, **kwargs)
        if done == step:
            self.stop = "signal SIGTERM"
    runs.Run.log_step = log_step

def child(words, said, trace, stop_after):
    """Runs a script as Python does; ends the process."""
    for number, path in enumerate([os.devnull, *said]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(REPO)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", False), "utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", False), "utf-8", "backslashreplace",
                                  write_through=True)
    sys.argv = list(words)
    trace_plans(trace, next((w[7:] for w in words if w.startswith("--data=")), ""))
    if stop_after:
        ask_to_stop(stop_after)
    code = 0
    try:
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit:
            raise
        except BaseException:  # noqa: BLE001
            code = 1
            sys.excepthook(*sys.exc_info())
    except SystemExit as e:
        code = e.code or 0
    os._exit(code)

def start(words, state, folder, stop_after=None):
    """Runs a command in a process of its own -> Outcome; its code is None where it hangs."""
    said = [folder / "out", folder / "err"]
    trace = folder / "trace"
    for path in [*said, trace]:
        path.write_bytes(b"")
    os.environ["NANOCHAT_BASE_DIR"] = str(state)
    pid = os.fork()
    if pid == 0:
        child(words, said, trace, stop_after)
    end, code, deadline = 0, None, time.time() + PATIENCE
    while end == 0:
        end, status_word = os.waitpid(pid, os.WNOHANG)
        if end:
            code = os.waitstatus_to_exitcode(status_word)
        elif time.time() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            break
        else:
            time.sleep(0.005)
    texts_said = [path.read_text(errors="replace") for path in said]
    return Outcome(code, *texts_said, trace.read_text(errors="replace"))

# -------------------------------------------------------------------------------------------------
# judging

def seen(folder):
    """{path in it: content, or what else it is}"""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = stat.S_IFMT(mode)
        if stat.S_ISLNK(mode):
            content = os.readlink(path)
        elif stat.S_ISREG(mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        if not stat.S_ISDIR(mode):
            found[str(path.relative_to(folder))] = content
    return found

GUARDED = ("books/", "talks/", "task_data/", "tokenizer/", "_checkpoints/", "report/core",
           "report/chat")
CHANGES = ("phase.json", "metrics.jsonl", "lock.json", ".lock-guard", ".partial.jsonl")

def lost(whole, damaged, now, here):
    """Files that were whole before the command and are nowhere now, without something newer of the
    same run that verifies."""
    contents, gone = {*now.values()}, []
    for name, content in damaged.items():
        users = name.startswith(("books/", "talks/")) or "task_data/" in name
        if users and now.get(name) != content:
            gone.append(name)  # a user's file, whole or not, is left alone
        is_whole = content in whole.values() and any(part in name for part in GUARDED)
        if users or not is_whole or name.endswith(CHANGES) or content in contents:
            continue
        step = [int(part) for part in Path(name).stem.split("_") if part.isdigit()][:1]
        folder = (here / name).parent
        newer = [s for s in checkpoint.steps(folder) if step and s >= step[0]]
        if not any(checkpoint.problem(folder, s) is None for s in newer):
            gone.append(name)
    return gone

def words_of(path):
    """All words of a file of texts or conversations, read without the product; None where it
    cannot be read strictly."""
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)["text"].to_pylist()
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
        if path.suffix == ".txt":
            return [text]
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        return [row["text"] if "text" in row else " ".join(m["content"] for m in row["messages"])
                for row in rows]
    except Exception:  # noqa: BLE001  (pyarrow raises nearly anything)
        return None

def unsaid(folder, outcome, names, trained=True):
    """What of the files in `folder` was not trained on, or trained on as something else, without a
    word about it; trained=False: which of them cannot be read, without a word."""
    faults = []
    trained_on = collections.Counter(re.sub(r"<\|\w+\|>", " ", outcome.trained_on).split())
    if {"\ufffd", "\0"} & {*outcome.trained_on}:
        faults.append("trained on characters that are none")
    for path in folder.rglob("*"):
        if path.is_dir() or path.is_fifo() or not path.exists():
            continue
        if path.name.startswith(".") and not path.name.endswith(corpus.ENDINGS):
            continue  # as editors leave them
        found = words_of(path)
        said = path.name in outcome.out or any(name in outcome.out for name in names)
        missing = found is None
        if trained and not missing:
            missing = collections.Counter(" ".join(found).split()) - trained_on
        if missing and not said:
            faults.append(f"{path.name} was not read whole, which is not said")
    return faults

def result(name, words, here):
    """What a command has made, to be compared; None where it makes nothing that lasts."""
    data = f"{here / 'books'}"
    tag = next((word[6:] for word in words if word.startswith("--tag=")), "d1")
    phase = name.split()[0]
    if phase in pipeline.STAGES:
        folder = pipeline.state_path(phase, data, tag)
        step = checkpoint.newest(folder, optimizer=False, say=lambda why: None)
        return step, step is not None and checkpoint.fingerprint(folder, step)
    if phase.endswith("-eval"):
        found = common.read_json(pipeline.state_path(phase, data, tag))
        return {k: v for k, v in found.items() if k not in ("seconds", "chosen")}
    return None

def judge(name, words, here, whole, damaged, outcome, names, expected):
    """-> the rules that were broken, in words. whole, damaged: what was seen before and after the
    damage; names: of the damaged files; expected: what the undamaged folder gives."""
    now, faults = seen(here), []
    if outcome.code is None:
        return ["it hangs"]
    # a folder in the place of a file that is written: nothing is lost, and one line says so
    in_the_way = outcome.err.startswith("error: could not") and "Is a directory" in outcome.err
    if outcome.code not in (0, 2, 75) and not in_the_way:
        faults.append(f"ended with {outcome.code}")
    if "Traceback" in outcome.err + outcome.out:
        faults.append("a traceback")
    faults += [f"{path} is lost" for path in lost(whole, damaged, now, here)]
    new = {path for path in now if path not in damaged}
    faults += [f"left {path}" for path in sorted(new)
               if ".tmp-" in path or ".partial_" in path or path.endswith("lock.json")]
    everything = " ".join((outcome.out + outcome.err).split())
    named = any(" ".join(n.split()) in everything or repr(n)[1:-1] in everything for n in names)
    if outcome.code == 2:
        error = outcome.err.strip().split("\n")[-1]
        lines = [line for line in outcome.err.split("\n") if line and not line.startswith("(")]
        if len(lines) != 1 or not error.startswith("error: "):
            faults.append(f"{len(lines)} lines of errors")
        if not (named or "; run: " in error or "--start_over" in error):
            faults.append("names neither the file nor a command")
        changed = sorted(path for path in {*now, *damaged} if now.get(path) != damaged.get(path))
        faults += [f"refused, but changed {path}" for path in changed
                   if "/tokens/" not in path and ".lock-guard" not in path]
    if outcome.code == 0 and name in ("check", "tok over"):
        faults += unsaid(here / "books", outcome, names, trained=False)
    if outcome.code == 0 and not named:
        if "new" in name or "over" in name:
            users = {"base": ["books"], "mid": ["talks"], "sft": ["talks"]}.get(name.split()[0], [])
            for folder in users:
                faults += unsaid(here / folder, outcome, names)
        elif result(name, words, here) != expected[0] and "measuring anew" not in outcome.out:
            faults.append("another result, and nothing said")
        if name == "chat" and outcome.out != expected[1]:
            faults.append("another answer, and nothing said")
    return faults

# -------------------------------------------------------------------------------------------------
# cases

@dataclass
class World:
    """The prepared folders, and what each command gives there undamaged."""
    folder: Path
    commands: dict
    expected: dict
    whole: dict

    @property
    def here(self):
        return self.folder / "now"

    def fresh(self):
        """Puts the undamaged folders where the cases work: always the same place, since the name of
        a user's folder is in its state's."""
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self.folder / "whole", self.here, symlinks=True)

    def run(self, name, stop_after=None):
        return start(self.commands[name], self.here / "state", self.folder, stop_after)

def prepare(folder):
    """-> World"""
    world = World(folder, commands(folder / "now"), {}, {})
    make_inputs(world.here)
    for name in PREPARE:
        outcome = world.run(name, HALF.get(name))
        assert outcome.code == (75 if name in HALF else 0), (name, outcome.err)
    shutil.copytree(world.here, folder / "whole")
    world.whole = seen(world.here)
    for name, words in world.commands.items():
        world.fresh()
        outcome = world.run(name)
        made = result(name, words, world.here), outcome.out
        faults = judge(name, words, world.here, world.whole, world.whole, outcome, [], made)
        assert not faults, f"without any damage: {name}: {faults}: {outcome.err}"
        world.expected[name] = made
    return world

def damage(world, draw, name):
    """Damages one file that the command reads. -> (what was done, names of the files touched)"""
    files = [path for path in world.whole if any(part in path for part in READS[name])
             and not path.endswith(".lock-guard")]
    # checkpoints and tokens have many files: a folder is drawn first
    folders = sorted({str(Path(path).parent) for path in files})
    folder = draw.choice(folders)
    path = world.here / draw.choice([p for p in files if str(Path(p).parent) == folder])
    how = draw.choice(DAMAGES)
    how(path, draw)
    now = seen(world.here)
    touched = [p for p in {*now, *world.whole} if now.get(p) != world.whole.get(p)]
    names = sorted({Path(p).name for p in [*touched, path]})
    return f"{how.__name__} {path.relative_to(world.here)}", names

def case(world, seed, number):
    """-> (command, damage, Outcome, faults)"""
    draw = random.Random(f"{seed} {number}")
    name = draw.choice(list(world.commands))
    world.fresh()
    done, names = damage(world, draw, name)
    damaged = seen(world.here)
    outcome = world.run(name)
    faults = judge(name, world.commands[name], world.here, world.whole, damaged, outcome, names,
                   world.expected[name])
    return name, done, outcome, faults

BREAKS = {  # what a script does: what the judge must say
    "next(here.rglob('d1/model_*6.pt')).unlink()": "is lost",
    "(here / 'books/a.txt').write_text('x')": "is lost",
    "raise SystemExit(2)": "0 lines of errors",
    "sys.exit('error: no')": "ended with",
    "print('error: no', file=sys.stderr); os._exit(2)": "names neither",
    "(here / 'x').touch(); print('error: a.txt', file=sys.stderr); os._exit(2)": "but changed",
    "(here / 'state/.x.tmp-1').touch()": "left",
    "next(here.rglob('d1/manifest_*6.json')).rename(here / 'moved')": "another result",
    "1 / 0": "a traceback",
}

def try_judge(world):
    """AssertionError where a rule that is broken on purpose is not seen."""
    script = world.folder / "breaks.py"
    for line, sign in BREAKS.items():
        script.write_text(f"import os, sys, pathlib\nhere = pathlib.Path({str(world.here)!r})\n"
                          f"{line}\n")
        world.fresh()
        outcome = start([str(script)], world.here / "state", world.folder)
        faults = judge("base", world.commands["base"], world.here, world.whole, world.whole,
                       outcome, ["a.txt"], world.expected["base"])
        assert any(sign in fault for fault in faults), (line, faults, outcome.err)

def fuzz(cases, seed, folder, say=print):
    """Runs the cases -> Counter of (command, how it ended); faults are said as they are found."""
    world = prepare(folder)
    try_judge(world)
    table, began = collections.Counter(), time.time()
    for number in cases:
        name, done, outcome, faults = case(world, seed, number)
        table[name, "FAULT" if faults else str(outcome.code)] += 1
        if faults or len(cases) == 1:
            said = (outcome.out + outcome.err).strip()
            say(f"case {number}: {done!r}; {name}: code {outcome.code}: {'; '.join(faults)}\n"
                f"    {said if len(cases) == 1 else said[-300:]}")
    say(f"{len(cases)} cases in {time.time() - began:.0f} s")
    return table

def main():
    given = read_flags(cases="30", seed="9", only="", folder="")
    folder = Path(given["folder"] or tempfile.mkdtemp(prefix="damage-"))
    cases = [int(given["only"])] if given["only"] else range(int(given["cases"]))
    table = fuzz(cases, int(given["seed"]), folder)
    ends = sorted({end for _, end in table})
    print(f"{'command':<16}" + "".join(f"{end:>8}" for end in ends))
    for name in dict.fromkeys(name for name, _ in sorted(table)):
        print(f"{name:<16}" + "".join(f"{table[name, end]:>8}" for end in ends))
    print(f"{'together':<16}" + "".join(
        f"{sum(n for (_, e), n in table.items() if e == end):>8}" for end in ends))
    sys.exit("FAULT" in ends)

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    main()
