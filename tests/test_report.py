"""report.py and status.py over state folders made by hand: all done, failed, half done, nothing at all, torn files."""
import json
import os
import re
import subprocess
import time

import pytest

import common
import pipeline
import report
import status
from conftest import script

STAGES = {"base": ("base_train", "base_checkpoints"), "mid": ("mid_train", "mid_checkpoints"),
          "sft": ("chat_sft", "chatsft_checkpoints"), "rl": ("chat_rl", "chatrl_checkpoints")}
TASKS = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spellingbee", "facts")
RAISED = "RL raises word problems by 0.05, or to 0.95"
SCORES = {"mid": 0.3, "sft": 0.7, "rl": 0.8}

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))

def phase(directory, name, status="done", reason="done", **facts):
    write(directory / "phase.json", {
        "phase": name, "status": status, "reason": reason, "next": None if status == "done" else f"python {name}.py --data=toy",
        "settings": {"data": "toy", "tag": "", "seed": 1337}, "free": {}, "inputs": {}, "host": "somewhere", "pid": 4194303,
        "commit": "abcdef0123456789", "difference": "", "starts": [time.time() - 100.0], "updated": time.time() - 50.0, **facts})

def stage(root, name, steps=40, total=40, **record):
    """A trained stage of 40 steps: checkpoint files (empty ones), manifest, metrics, record"""
    script_name, folder = STAGES[name]
    directory = root / folder / "d4"
    files = {}
    for part in (f"model_{steps:06d}.pt", f"optim_{steps:06d}.pt"):
        write(directory / part, "weights")
        files[part] = [7, f"{name}-weights-0123456789"]
    write(directory / f"meta_{steps:06d}.json", {"step": steps, "num_steps": total, "seconds": 120.0, "tokens": steps * 8192,
                                                "loss": 0.5, "val_bpb": 0.25, "batch_tokens": 8192})
    write(directory / f"manifest_{steps:06d}.json", {"step": steps, "files": files})
    lines = [{"kind": "train", "step": s, "loss": 8.0 - s / 10, "reward": s / 100, "clock": {"seconds": 3.0 * s, "tokens_per_second": 1000 + s}}
             for s in range(steps)] + [{"kind": "val", "step": s, "val_bpb": 2.0 - s / 40, "pass@1": s / 50} for s in range(0, steps + 1, 10)]
    write(directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    phase(directory, script_name, **{"seconds": 120.0, **record})
    return directory

def evaluations(root, stages=("mid", "sft", "rl")):
    for name in stages:
        a = SCORES[name]
        results = {t: {"accuracy": a, "n": 500, "low": a - 0.04, "high": a + 0.04, "chance": 0.0, "centred": a} for t in TASKS}
        write(root / f"report/chat_{name}_d4.json", {"inputs": {"weights": f"{name}-weights-0123456789"[:16]}, "results": results,
                                                     "chatcore": a, "missing": [], "seconds": 30.0})
    write(root / "report/core_base_d4.json", {
        "core": 0.2042, "label": "toy-CORE", "seconds": 60.0, "inputs": {"weights": "base-weights-0123456789"[:16]},
        "tasks": {"x": {"accuracy": 0.5, "low": 0.4925, "high": 0.5075, "chance": 0.25, "centred": 0.2, "n": 10}}, "samples": [{"prompt": "The | cat", "text": "sat\n```"}]})

@pytest.fixture
def whole(state):
    root = state / "toy"
    phase(root / "base_data", "prepare_data", counts={"documents": 10})
    phase(root / "tokenizer", "tok_train", vocab_size=2048, bytes_per_token={"validation text": 4.01})
    write(root / "tokenizer/tokenizer.json", {})
    for name in STAGES:
        facts = {"parameters": 5242936, "settings": {"data": "toy", "tag": "", "depth": 4, "num_steps": 40}} if name == "base" else {}
        if name == "mid":
            facts = {"settings": {"data": "toy", "tag": "", "mixture": ["smoltalk", "gsm8k*2", "identity*2", "spellingbee:80000", "mine.jsonl"]}}
        stage(root, name, **facts)
    evaluations(root)
    return state

def run(state, *args):
    """-> (report.md, what was printed)"""
    out = script(state, "report.py", "--data=toy", *args)
    assert out.returncode == 0 and out.stderr == "", out.stderr
    return (state / "toy/report/report.md").read_text(), out.stdout

def row(text, name):
    """The cells of a table's row.  example: "| a | 1 | - |" -> ["1", "-"]"""
    line = next(line for line in text.split("\n") if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]

def test_everything_done(whole):
    text, printed = run(whole)
    assert row(text, "") == ["BASE", "MID", "SFT", "RL"]
    assert row(text, "toy-CORE") == ["0.2042 ±0.0100", "-", "-", "-"]
    for name in ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "Facts"):
        assert row(text, f"toy-{name}") == ["-", "0.300 ±0.040", "0.700 ±0.040", "0.800 ±0.040"]
    cores = row(text, "toy-ChatCORE")
    assert [float(c.split()[0]) for c in cores[1:]] == [0.3, 0.7, 0.8]
    assert float(cores[3].split("±")[1]) == pytest.approx(0.04 / 6 ** 0.5, abs=1e-4), "the mean of six has a smaller error than one"

    assert row(text, "SpellingBee: 0.9") == ["0.700", "NO", "0.800", "NO"]
    assert row(text, "word problems (toy-GSM8K): 0.6") == ["0.700", "yes", "0.800", "yes"]
    assert row(text, "facts, asked as never before: 0.7") == ["0.700", "yes", "0.800", "yes"]
    assert row(text, RAISED) == ["0.700 to 0.800", "yes", "", ""]

    assert "Never ran" not in text and "Not done" not in text and "This part could not be made" not in text
    assert "Total time: 10m30s" in text, "4 x 120 s of training, 3 x 30 s and 60 s of evaluation"
    assert f"tokens trained on: {4 * 40 * 8192:,}" in text and "parameters: 5,242,936" in text and "tokenizer of 2048 tokens" in text
    base = text[text.index("## Pretraining"):text.index("## Midtraining")]
    assert "final loss: 4.1000 nats" in base and "validation: 1.0000 bits per byte" in base and "steps: 40 of 40" in base
    assert "`depth=4` (20)" in base and "`num_steps=40` (-1)" in base
    mid = text[text.index("## Midtraining"):text.index("## Supervised")]
    assert "taken out of the mixture: `mmlu_aux`, `simplespelling:200000`" in mid and "in their place: `mine.jsonl`" in mid
    assert "in another amount in the mixture: `gsm8k -> gsm8k*2`" in mid and "smoltalk" not in mid
    for cell in ("toy-GSM8K", "0.800 ±0.040", "RL raises word problems", "report.md"):
        assert cell in printed
    lines = [line for line in printed.split("\n") if "±0.040" in line]
    assert len({line.index("0.700") for line in lines}) == 1, "the columns stand under each other"

def test_the_curves_are_pictures_beside_the_report(whole):
    from xml.etree import ElementTree
    text, _ = run(whole)
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {"base_loss.svg", "base_val_bpb.svg", "sft_loss.svg", "rl_reward.svg", "rl_pass_1.svg"} <= set(pictures)
    for name in pictures:
        path = whole / "toy/report" / name
        tree = ElementTree.parse(path).getroot()
        assert path.stat().st_size < 20_000 and tree.tag.endswith("svg")
    line = next(e for e in ElementTree.parse(whole / "toy/report/base_loss.svg").getroot().iter() if e.tag.endswith("polyline"))
    heights = [float(p.split(",")[1]) for p in line.get("points").split()]
    assert len(heights) == 40 and heights == sorted(heights), "the loss falls, so the curve goes down (y grows downwards)"

def test_what_is_not_a_number_is_left_out_of_a_curve():
    metrics = [{"kind": "train", "step": s, "loss": v} for s, v in enumerate([3.0, float("nan"), None, "2", 1.0, float("inf")])]
    assert report.points(metrics, "train", "loss") == [(0, 3.0), (4, 1.0)]
    assert report.svg([(0, 1.0)], "x") == "" and "polyline" in report.svg([(0, 1.0), (5, 1.0)], "x")
    long = report.svg([(i, i % 7) for i in range(100_000)], "x")
    assert len(long) < 10_000

def test_a_failed_phase_is_named_with_its_reason_and_the_way_on(whole):
    root = whole / "toy"
    stage(root, "sft", steps=20, status="failed", reason="ValueError: the reason why", code=1)
    for path in [root / "report/chat_sft_d4.json", root / "report/chat_rl_d4.json", *(root / "chatrl_checkpoints/d4").iterdir()]:
        path.unlink()
    (root / "chatrl_checkpoints/d4").rmdir()
    (root / "chatsft_checkpoints/d4/manifest_000040.json").unlink()
    (root / "report/chat_mid_d4.json").rename(root / "kept.json")
    write(root / "report/chat_mid_d4.partial.jsonl", '{"inputs": {}}\n{"code": 1, "reason": "OSError: out of memory"}\n')
    text, printed = run(whole)
    assert re.search(r"evaluation: failed, \S+ ago: OSError: out of memory", text) and re.search("not done: mid-eval: failed, .*OSError", printed)
    (root / "report/chat_mid_d4.partial.jsonl").unlink()
    (root / "kept.json").rename(root / "report/chat_mid_d4.json")
    text, printed = run(whole)
    sft = text[text.index("## Supervised"):text.index("## Reinforcement")]
    assert "**Failed**: ValueError: the reason why, step 20 of 40" in sft and "step 20 of 40" in sft and "the reason why" in sft and "`python chat_sft.py --data=toy`" in sft
    assert "**Never ran** (`chat_rl.py`)" in text
    assert row(text, "toy-GSM8K") == ["-", "0.300 ±0.040", "-", "-"]
    assert row(text, "word problems (toy-GSM8K): 0.6") == ["-"] * 4 and row(text, RAISED)[1] == "-"
    assert "Next: `python chat_sft.py --data=toy`" in text
    assert re.search(r"not done: sft: failed, .*the reason why", printed) and "not done: rl: not started" in printed

    status = script(whole, "status.py").stdout
    assert re.search(r"sft d4 +failed, saved at step 20 of 40, \S+ ago: .*the reason why", status) and re.search(r"rl d4 +not started", status)
    assert re.search(r"mid d4 +done, step 40 of 40", status) and re.search(r"mid-eval d4 +done", status)
    assert status.strip().split("\n")[-1] == "next: python chat_sft.py --data=toy"

def test_a_part_of_a_public_test_set_is_not_called_by_the_name_of_the_whole(whole):
    """Of real data: half of a test set, or some items of it; the toy world's are whole as they are."""
    (whole / "texts").mkdir()
    real = pipeline.data_root(str(whole / "texts"))
    (whole / "toy").rename(real)
    counts = {"arc_easy": 1197, "arc_challenge": 1172, "mmlu": 14042, "gsm8k": 30, "humaneval": 164, "spellingbee": 500}
    for name in SCORES:
        found = json.loads((real / f"report/chat_{name}_d4.json").read_text())
        write(real / f"report/chat_{name}_d4.json", {**found, "results": {t: {**found["results"][t], "n": n} for t, n in counts.items()}})
    core = json.loads((real / "report/core_base_d4.json").read_text())
    table = lambda: script(whole, "report.py", f"--data={whole / 'texts'}").stdout and (real / "report/report.md").read_text()
    text = table()
    assert row(text, "CORE")[0] == "0.2042 ±0.0100" and row(text, "ChatCORE in part")[3].startswith("0.8000")
    assert row(text, "ARC-Easy, 1,197 of 2,376")[1] == row(text, "ARC-Challenge")[1] == row(text, "GSM8K, 30 of 1,319")[1] == row(text, "SpellingBee")[1] == "0.300 ±0.040"
    for more in ({"tasks": {"arc_easy": {**core["tasks"]["x"], "n": 1197}}}, {"core": None}):
        write(real / "report/core_base_d4.json", {**core, "mean_centred": 0.2, **more})
        assert row(table(), "CORE in part")[0].startswith("0.2000")

def test_scores_of_other_weights_are_left_out(whole):
    path = whole / "toy/report/chat_rl_d4.json"
    write(path, path.read_text().replace("rl-weights", "xy-weights"))
    text, _ = run(whole)
    assert row(text, "toy-GSM8K")[3] == "-" and "of other weights" in text
    assert "next: bash speedrun.sh --data=toy" in script(whole, "status.py").stdout

def test_nothing_at_all(state):
    text, printed = run(state)
    assert text.count("**Never ran**") == 4 and row(text, "toy-ChatCORE") == ["-"] * 4 and "Total time: 0s" in text
    assert "not done: base: not started" in printed
    state_of_nothing = script(state / "other", "status.py")
    assert state_of_nothing.returncode == 0 and state_of_nothing.stdout.strip().split("\n")[-1] == "next: bash speedrun.sh"
    assert not (state / "other").exists(), "status.py only reads"
    for name in ("report.py", "status.py"):
        out = script(state, name, "--data=/there/is/no/such/folder")
        assert out.returncode == 2 and out.stderr.count("\n") == 1
    assert [p.name for p in state.iterdir()] == ["toy"]

def test_torn_and_damaged_files_cost_their_own_part_only(whole):
    root = whole / "toy"
    metrics = root / "base_checkpoints/d4/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '17\nnull\n{"kind": "train", "loss": 1.0}\n{"kind": "train", "step": 40, "lo')
    (root / "mid_checkpoints/d4/metrics.jsonl").write_bytes(b"\xff\xfe\x00 no text")
    write(root / "chatsft_checkpoints/d4/phase.json", '{"phase": "chat_sft", "status"')
    write(root / "chatrl_checkpoints/d4/meta_000040.json", "[1, 2")
    write(root / "report/chat_mid_d4.json", '{"results": {"gsm8k"')
    write(root / "report/core_base_d4.json", {"core": "x", "tasks": {"a": 5}})
    write(root / "tokenizer/phase.json", "")
    text, printed = run(whole)
    base = text[text.index("## Pretraining"):text.index("## Midtraining")]
    assert "final loss: 4.1000 nats" in base and "base_loss.svg" in base
    assert "cannot be read" in text and row(text, "toy-GSM8K") == ["-", "-", "0.700 ±0.040", "0.800 ±0.040"]
    status = script(whole, "status.py")
    assert status.returncode == 0 and status.stderr == "" and status.stdout.count("cannot be read") == 3

def test_half_done_running_and_dead(whole):
    root = whole / "toy"
    directory = stage(root, "rl", steps=40, total=60, status="interrupted", reason="signal SIGTERM: saved at step 40 of 60")
    last = lambda: script(whole, "status.py", "--data=toy").stdout.strip().split("\n")
    assert re.search(r"rl d4 +half done, saved at step 40 of 60, \S+ ago \(signal SIGTERM", "\n".join(last()))
    assert last()[-1] == "next: python chat_rl.py --data=toy"
    assert "**Half done**: signal SIGTERM: saved at step 40 of 60" in run(whole)[0]

    phase(directory, "chat_rl", status="running", reason="")
    assert re.search(r"rl d4 +died without a word, saved at step 40 of 60", "\n".join(last()))
    import phase as phase_module
    import socket
    write(directory / "lock.json", {"token": "x", "host": socket.gethostname(), "boot": phase_module.boot_id(), "pid": os.getpid(),
                                    "start": phase_module.process_start(os.getpid())})
    assert re.search(rf"rl d4 +running, saved at step 40 of 60, .*process {os.getpid()} on ", "\n".join(last()))
    assert last()[-1] == "next: wait for rl, then bash speedrun.sh --data=toy"

    write(root / "report/chat_rl_d4.partial.jsonl", "{}\n")
    assert re.search(r"rl-eval d4 +half done", "\n".join(last()))
    (directory / "model_000040.pt").unlink()
    phase(directory, "chat_rl")
    assert "was done, but model_000040.pt is gone" in "\n".join(last())

def test_the_last_data_set_comes_last_and_status_is_fast(whole):
    other = whole / "books-0123abcd/base_checkpoints/d6"
    phase(other, "base_train", status="interrupted", reason="deadline", settings={"data": "/my/books"}, next="python base_train.py --data=/my/books")
    assert status.following({"mid": ("absent", "", whole)} | {u: ("done", "", None) for u in status.UNITS if u != "mid"}, "/my books", "d6") == "bash speedrun.sh --data='/my books' --depth=6"
    out = script(whole, "status.py").stdout
    assert out.index("toy (") < out.index("/my/books (") and "your own folder" in out
    assert out.strip().split("\n")[-1] == "next: python base_train.py --data=/my/books"
    loaded = subprocess.run(["python3", "-c", "import sys; sys.argv = ['status.py']; import status; print('torch' in sys.modules, 'numpy' in sys.modules)"],
                            cwd=report.common.REPO, capture_output=True, text=True).stdout
    assert loaded.strip() == "False False"
