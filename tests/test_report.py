"""report.py and status.py over state folders made by hand: all done, failed, half done, nothing at
all, torn files."""
import json
import os
import re
import shlex
import time
from xml.etree import ElementTree

import pytest

import pipeline
import report
import status
import webpage
from conftest import REPO, script
from lock import take_lock

STAGES = {"base": ("base_train", "base_checkpoints"), "mid": ("mid_train", "mid_checkpoints"),
          "sft": ("chat_sft", "chatsft_checkpoints"), "rl": ("chat_rl", "chatrl_checkpoints")}
TASKS = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spellingbee", "facts")
SHOWN = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "Facts")
SCORES = {"mid": 0.3, "sft": 0.7, "rl": 0.8}
BASE = {"parameters": 5242936, "peak_bytes": 1.234e9,
        "settings": {"data": "toy", "tag": "", "depth": 4, "num_steps": 40}}
MIXTURE = ["smoltalk", "gsm8k*2", "identity*2", "spellingbee:80000", "mine.jsonl"]

# ---- state folders

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))

def write_lines(path, lines):
    write(path, "".join(json.dumps(line) + "\n" for line in lines))

def add(path, text):
    path.write_text(path.read_text() + text)

def write_record(folder, name, status="done", reason="done", **facts):
    write(folder / "phase.json", {
        "phase": name, "status": status, "reason": reason,
        "next": None if status == "done" else f"python {name}.py --data=toy",
        "settings": {"data": "toy", "tag": "", "seed": 1337}, "free": {}, "inputs": {},
        "command": f"python {name}.py --data=toy --seed=1",
        "host": "somewhere", "pid": 4194303, "commit": "abcdef0123456789", "difference": "",
        "starts": [time.time() - 100.0], "updated": time.time() - 50.0, **facts})

def folder_of(root, name):
    return root / STAGES[name][1] / "d4"

def result_of(root, name):
    return root / f"report/{'core' if name == 'base' else 'chat'}_{name}_d4.json"

def metrics(steps):
    for s in range(steps):
        clock = {"seconds": 3.0 * s, "tokens_per_second": 1000 + s}
        yield {"kind": "train", "step": s, "loss": 8.0 - s / 10, "reward": s / 100, "clock": clock}
    for s in range(0, steps + 1, 10):
        yield {"kind": "val", "step": s, "val_bpb": 2.0 - s / 40, "pass@1": s / 50}

def stage(root, name, steps=40, total=40, **record):
    """A trained stage: checkpoint files (empty ones), manifest, metrics, record"""
    folder, files = folder_of(root, name), {}
    for part in (f"model_{steps:06d}.pt", f"optim_{steps:06d}.pt"):
        write(folder / part, "weights")
        files[part] = [7, f"{name}-weights-0123456789"]
    write(folder / f"meta_{steps:06d}.json", {
        "step": steps, "num_steps": total, "seconds": 120.0, "tokens": steps * 8192, "loss": 0.5,
        "val_bpb": 0.25, "batch_tokens": 8192})
    write(folder / f"manifest_{steps:06d}.json", {"step": steps, "files": files})
    write_lines(folder / "metrics.jsonl", metrics(steps))
    write_record(folder, STAGES[name][0], **{"seconds": 120.0, **record})
    return folder

def evaluations(root):
    for name, a in SCORES.items():
        result = {"accuracy": a, "n": 500, "low": a - 0.04, "high": a + 0.04, "chance": 0.0,
                  "centred": a}
        write(result_of(root, name), {
            "inputs": {"weights": f"{name}-weights-0123456789"[:16]}, "chatcore": a,
            "results": dict.fromkeys(TASKS, result), "missing": [], "seconds": 30.0})
    result = {"accuracy": 0.5, "low": 0.4925, "high": 0.5075, "chance": 0.25, "centred": 0.2,
              "n": 10}
    write(result_of(root, "base"), {
        "core": 0.2042, "label": "toy-CORE", "seconds": 60.0, "tasks": {"x": result},
        "inputs": {"weights": "base-weights-0123456789"[:16]},
        "samples": [{"prompt": "The | cat", "text": "sat\n```"}]})

@pytest.fixture
def whole(state):
    root = state / "toy"
    write_record(root / "base_data", "prepare_data", counts={"documents": 10})
    write_record(root / "tokenizer", "tok_train", vocab_size=2048,
                 bytes_per_token={"validation text": 4.01})
    write(root / "tokenizer/tokenizer.json", {})
    stage(root, "base", **BASE)
    stage(root, "mid", settings={"data": "toy", "tag": "", "mixture": MIXTURE})
    stage(root, "sft")
    stage(root, "rl")
    evaluations(root)
    return state

# ---- what is made of them

def run(state, data="toy"):
    """-> (report.md, what was printed)"""
    out = script(state, "report.py", f"--data={data}")
    assert out.returncode == 0 and out.stderr == "", out.stderr
    return (pipeline.data_root(data) / "report/report.md").read_text(), out.stdout

def status_of(state, *args):
    """-> (what status.py prints, its last line)"""
    out = script(state, "status.py", *args)
    assert out.returncode == 0 and out.stderr == "", out.stderr
    return out.stdout, out.stdout.strip().split("\n")[-1]

def row(text, name):
    """The cells of a table's row.  example: "| a | 1 | - |" -> ["1", "-"]"""
    line = next(line for line in text.split("\n") if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]

def section(text, title):
    return text.split(f"## {title}")[1].split("\n## ")[0]

def test_everything_done(whole):
    text, printed = run(whole)
    assert row(text, "") == ["BASE", "MID", "SFT", "RL", "goal"]
    assert row(text, "toy-CORE") == ["0.2042 ±0.0100", "-", "-", "-", ""]
    for name in SHOWN:
        *cells, goal = row(text, f"toy-{name}")
        assert cells == ["-", "0.300 ±0.040", "0.700 ±0.040", "0.800 ±0.040"]
        assert bool(goal) == (name != "HumanEval")
    assert row(text, "toy-SpellingBee")[-1] == "0.9"
    cores = row(text, "toy-ChatCORE")
    assert [float(cell.split()[0]) for cell in cores[1:4]] == [0.3, 0.7, 0.8]
    half = float(cores[3].split("±")[1])
    assert half == pytest.approx(0.04 / 6 ** 0.5, abs=1e-4), "the mean of six errs less than one"

    for words in ("Never ran", "not done", "is left out"):
        assert words not in text
    # 4 x 120 s of training, 3 x 30 s and 60 s of evaluation
    assert "Total time: 10m30s" in text and "tokenizer of 2048 tokens" in text
    assert f"tokens trained on: {4 * 40 * 8192:,}" in text and "parameters: 5,242,936" in text
    base = section(text, "Pretraining")
    assert "training loss, nats: 4.1000 at the end" in base
    assert "validation, bits per byte: 1.0000 at the end" in base
    assert "step 40 of 40" in base and "2m00s of training" in base and "1,020 tokens/s" in base
    assert "1.23 GB of memory at most" in base
    assert "command: `python base_train.py --data=toy --seed=1`" in base
    mid = section(text, "Midtraining")
    assert "taken out of the mixture: `mmlu_aux`, `gsm8k`, `simplespelling:200000`" in mid
    assert "put into the mixture: `gsm8k*2`, `mine.jsonl`" in mid and "smoltalk" not in mid
    assert "mixture" not in section(text, "Supervised finetuning"), "its record has none"
    for cell in ("toy-GSM8K", "0.800 ±0.040", "report.md"):
        assert cell in printed
    lines = [line for line in printed.split("\n") if "±0.040" in line]
    assert len({line.index("0.700") for line in lines}) == 1, "the columns stand under each other"

def test_the_curves_are_pictures_beside_the_report(whole):
    text, _ = run(whole)
    folder, pictures = whole / "toy/report", re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {"base_loss.svg", "base_val_bpb.svg", "sft_loss.svg", "rl_reward.svg",
            "rl_pass_1.svg"} <= set(pictures)
    for name in pictures:
        assert (folder / name).stat().st_size < 20_000
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
    parts = ElementTree.parse(folder / "base_loss.svg").getroot().iter()
    line = next(part for part in parts if part.tag.endswith("polyline"))
    heights = [float(point.split(",")[1]) for point in line.get("points").split()]
    assert len(heights) == 40
    assert heights == sorted(heights), "the loss falls, so the curve goes down (y grows downwards)"

def test_the_page_has_all_of_it_in_one_file(whole):
    text, _ = run(whole)
    page = (whole / "toy/report/report.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<svg") == text.count("](") > 5
    assert not re.search(r"""(src|href)=|url\(|@import|<script""", page), "it asks for nothing"
    rows = [line for line in text.split("\n") if line.startswith("| ") and "---" not in line]
    assert page.count("<tr>") == len(rows)
    for cell in ("0.2042 ±0.0100", "<h2>Midtraining</h2>", "<code>mine.jsonl</code>", "The | cat"):
        assert cell in page, cell

def test_a_page_of_anything():
    for text in ("# a\n```\nno end", "| alone\n", "| a |\n|---|\n| b \\| c |", "- `x", ""):
        assert webpage.page(text, REPO).startswith("<!doctype html>")
    assert "<td>b | c</td>" in webpage.page("| a |\n|---|\n| b \\| c |", REPO)
    assert "<script>" not in webpage.page("# <script>\n- <script>\n| <script> |", REPO)

def test_deaths_origins_and_answers(whole):
    restarts = [{"step": 10, "steps_lost": 4, "seconds_lost": 12.0},
                {"step": 20, "steps_lost": 0, "seconds_lost": 0.0}]
    stage(whole / "toy", "mid", inputs={"tokenizer": "0123456789abcdef0123", "base": "fedcba"},
          restarts=restarts, machine={"CPU": "AMD EPYC", "torch": "2.13.0"}, difference="dada")
    text, _ = run(whole)
    assert row(section(text, "Time"), "MID")[:3] == ["2m00s", "4 steps, 12s", "1"]
    assert row(section(text, "Time"), "SFT")[1] == "-"
    drawn = (whole / "toy/report/mid_loss.svg").read_text()
    assert drawn.count("stroke-dasharray") == 2
    assert "stroke-dasharray" not in (whole / "toy/report/sft_loss.svg").read_text()
    origin = row(section(text, "Where every number comes from"), "mid")
    assert origin == ["`python mid_train.py --data=toy --seed=1`", "abcdef012345 + dada",
                      "tokenizer 0123456789abcdef, base fedcba", "CPU AMD EPYC, torch 2.13.0"]
    assert "Ten prompts" not in text
    for name, said in (("base", "goes | on"), ("sft", "an answer")):
        result = json.loads(result_of(whole / "toy", name).read_text())
        answers = [{"prompt": "Who?", "text": said}, {"prompt": "Why?", "text": " "}]
        write(result_of(whole / "toy", name), {**result, "answers": answers})
    table = section(run(whole)[0], "Ten prompts, answered by each stage")
    assert "| Who? | `goes \\| on` | `an answer` |" in table
    assert "| Why? | (nothing) | (nothing) |" in table

def test_whether_the_curve_is_normal(whole, monkeypatch):
    band = {"low": [3.0] * 20, "high": [9.0] * 20}
    monkeypatch.setattr(report.bands, "find", lambda record: band)
    base = report.Stage("base", {}, {"num_steps": 40}, list(metrics(40)), {}, {})
    assert report.in_the_band(base).endswith("Within the band of three seeds in 20 of 20 parts")
    assert report.band_of(base)[0] == (1, 3.0, 9.0)
    drawn = webpage.picture(report.points(base.metrics, "train", "loss"), "x", report.band_of(base))
    assert "polygon" in drawn
    band["high"][:2] = [7.9, 7.9]  # the first losses are 8.0, 7.9, 7.8, 7.7
    assert "Off the band of three seeds in 1 of 20 parts: part 1: loss 7.9500, 0.0500 above" in (
        report.in_the_band(base))

def test_what_is_not_a_number_is_left_out_of_a_curve():
    losses = [3.0, float("nan"), None, "2", 1.0, float("inf")]
    lines = [{"kind": "train", "step": s, "loss": loss} for s, loss in enumerate(losses)]
    assert report.points(lines, "train", "loss") == [(0, 3.0), (4, 1.0)]
    assert webpage.picture([(0, 1.0)], "x") == ""
    assert "polyline" in webpage.picture([(0, 1.0), (5, 1.0)], "x")
    long = webpage.picture([(i, i % 7) for i in range(100_000)], "x")
    assert len(long) < 10_000

def test_a_failed_phase_is_named_with_its_reason_and_the_way_on(whole):
    root = whole / "toy"
    stage(root, "sft", steps=20, status="failed", reason="ValueError: the reason why", code=1)
    (folder_of(root, "sft") / "manifest_000040.json").unlink()
    rl = folder_of(root, "rl")
    for path in (result_of(root, "sft"), result_of(root, "rl"), *rl.iterdir()):
        path.unlink()
    rl.rmdir()
    result = result_of(root, "mid")
    partial = result.with_suffix(".partial.jsonl")
    result.rename(root / "kept.json")
    write_lines(partial, [{"inputs": {}}, {"code": 1, "reason": "OSError: out of memory"}])
    text, printed = run(whole)
    assert re.search(r"evaluation: failed, \S+ ago: OSError: out of memory", text)
    assert re.search("not done: mid-eval: failed, .*OSError", printed)

    partial.unlink()
    (root / "kept.json").rename(result)
    text, printed = run(whole)
    sft = section(text, "Supervised finetuning")
    failed = r"\*\*failed, saved at step 20 of 40, \S+ ago: ValueError: the reason why\*\*"
    assert re.search(failed, sft) and "to go on: `python chat_sft.py --data=toy`" in sft
    assert "**Never ran** (`chat_rl.py`)" in text
    assert row(text, "toy-GSM8K")[:4] == ["-", "0.300 ±0.040", "-", "-"]
    assert "Next: `python chat_sft.py --data=toy`" in text
    assert re.search(r"not done: sft: failed, .*the reason why", printed)
    assert "missing: rl\n" in printed

    said, last = status_of(whole)
    failed = r"sft d4 +failed, saved at step 20 of 40, \S+ ago: .*the reason why"
    assert re.search(failed, said) and re.search(r"rl d4 +not started", said)
    assert re.search(r"mid d4 +done, step 40 of 40", said)
    assert re.search(r"mid-eval d4 +done", said)
    assert last == "next: python chat_sft.py --data=toy"

def test_a_part_of_a_public_test_set_is_not_called_by_the_name_of_the_whole(whole):
    """Of real data: half of a test set, or some items of it; the toy world's are whole as they
    are."""
    texts = str(whole / "texts")
    os.mkdir(texts)
    root = pipeline.data_root(texts)
    (whole / "toy").rename(root)
    counts = {"arc_easy": 1197, "arc_challenge": 1172, "mmlu": 14042, "gsm8k": 30, "humaneval": 164,
              "spellingbee": 500}
    for name in SCORES:
        path = result_of(root, name)
        found = json.loads(path.read_text())
        found["results"] = {task: {**found["results"][task], "n": n} for task, n in counts.items()}
        write(path, found)
    text, _ = run(whole, texts)
    assert row(text, "CORE")[0] == "0.2042 ±0.0100"
    assert row(text, "ChatCORE in part")[3].startswith("0.8000")
    for name in ("ARC-Easy, 1,197 of 2,376", "ARC-Challenge", "GSM8K, 30 of 1,319", "SpellingBee"):
        assert row(text, name)[1] == "0.300 ±0.040"
    assert not re.search(r"^\| (ARC-Easy|GSM8K|Facts) \|", text, re.MULTILINE)

    path = result_of(root, "sft")
    found = json.loads(path.read_text())
    found["results"]["gsm8k"]["n"] = 1319
    write(path, found)
    text, _ = run(whole, texts)
    assert row(text, "GSM8K, 30 of 1,319") == ["-", "0.300 ±0.040", "-", "0.800 ±0.040"]
    assert row(text, "GSM8K") == ["-", "-", "0.700 ±0.040", "-"]

    path = result_of(root, "base")
    core = json.loads(path.read_text())
    part = {"arc_easy": {**core["tasks"]["x"], "n": 1197}}
    for more in ({"tasks": part}, {"core": None}):
        write(path, {**core, "mean_centred": 0.2, **more})
        text, _ = run(whole, texts)
        assert row(text, "CORE in part")[0].startswith("0.2000")

def test_scores_of_other_weights_are_left_out(whole):
    path = result_of(whole / "toy", "rl")
    write(path, path.read_text().replace("rl-weights", "xy-weights"))
    text, _ = run(whole)
    assert row(text, "toy-GSM8K")[3] == "-" and "the model was trained again since" in text
    assert status_of(whole)[1] == "next: bash speedrun.sh --data=toy --depth=4"

def test_a_run_that_is_not_there_costs_no_report(whole):
    text, _ = run(whole)
    out = script(whole, "report.py", "--data=toy", "--tag=nope")
    assert out.returncode == 2 and "there is no run nope of toy; there are: d4" in out.stderr
    assert (whole / "toy/report/report.md").read_text() == text
    newest = script(whole, "report.py")
    assert "toy/report/report.md, report.html" in newest.stdout, "without --data the newest"

def test_a_report_of_nanochats_own_is_kept(whole):
    path = whole / "toy/report/report.md"
    path.write_text("# nanochat training report\n")
    _, printed = run(whole)
    kept, = path.parent.glob("report.md.old-*")
    assert kept.read_text() == "# nanochat training report\n" and str(kept) in printed
    run(whole)
    assert list(path.parent.glob("report.md.old-*")) == [kept], "one of ours is made anew"

def test_nothing_at_all(state):
    for args in ([], ["--data=toy"]):
        out = script(state, "report.py", *args)
        assert out.returncode == 2 and "run: bash speedrun.sh" in out.stderr, out.stderr
    assert not state.exists(), "nothing is written"
    assert status_of(state / "other")[1] == "next: bash speedrun.sh"
    assert not (state / "other").exists(), "status.py only reads"
    for name in ("report.py", "status.py"):
        out = script(state, name, "--data=/there/is/no/such/folder")
        assert out.returncode == 2 and out.stderr.count("\n") == 1
    assert not state.exists()

def test_torn_and_damaged_files_cost_their_own_part_only(whole):
    root = whole / "toy"
    torn = '{"kind": "train", "step": 40, "lo'
    add(folder_of(root, "base") / "metrics.jsonl",
        '17\nnull\n{"kind": "train", "loss": 1.0}\n' + torn)
    (folder_of(root, "mid") / "metrics.jsonl").write_bytes(b"\xff\xfe\x00 no text")
    write(folder_of(root, "sft") / "phase.json", '{"phase": "chat_sft", "status"')
    write(folder_of(root, "rl") / "meta_000040.json", "[1, 2")
    write(result_of(root, "mid"), '{"results": {"gsm8k"')
    core = {"core": "x", "tasks": {"a": 5}, "inputs": {"weights": "base-weights-012"}}
    write(result_of(root, "base"), core)
    chat = json.loads(result_of(root, "rl").read_text())
    write(result_of(root, "rl"), {**chat, "results": []})
    write(root / "tokenizer/phase.json", "")
    text, printed = run(whole)
    base = section(text, "Pretraining")
    assert "training loss, nats: 4.1000 at the end" in base and "base_loss.svg" in base
    assert "cannot be read" in text
    for what in ("CORE by task", "scores of base", "scores of rl"):
        assert f"{what} is left out, since a file is damaged" in printed
    assert row(text, "toy-GSM8K")[:4] == ["-", "-", "0.700 ±0.040", "-"]
    said, _ = status_of(whole)
    assert said.count("cannot be read") == 3

def test_a_full_disk_is_not_called_a_damaged_file():
    notes = []
    with open("/dev/full", "wb", buffering=0) as full:
        assert report.guarded(notes, "the page", full.write, b"x") == []
    note, = notes
    assert note == ("the page is left out, since a file cannot be read or written (OSError: "
                    "[Errno 28] No space left on device)")

def test_half_done_running_and_dead(whole):
    root = whole / "toy"
    reason = "signal SIGTERM: saved at step 40 of 60"
    folder = stage(root, "rl", steps=40, total=60, status="interrupted", reason=reason)
    said, last = status_of(whole, "--data=toy")
    half = r"rl d4 +half done, saved at step 40 of 60, \S+ ago \(signal SIGTERM"
    assert re.search(half, said) and last == "next: python chat_rl.py --data=toy"
    assert re.search(rf"\*\*half done, .* \({reason}\)\*\*", run(whole)[0])

    write_record(folder, "chat_rl", status="running", reason="")
    said, _ = status_of(whole, "--data=toy")
    assert re.search(r"rl d4 +died without a word, saved at step 40 of 60", said)
    lock = take_lock(folder)
    said, last = status_of(whole, "--data=toy")
    lock.release()
    running = rf"rl d4 +running, saved at step 40 of 60, .*process {os.getpid()} on "
    assert re.search(running, said)
    assert last == "next: wait for rl, then bash speedrun.sh --data=toy --depth=4"

    write(result_of(root, "rl").with_suffix(".partial.jsonl"), "{}\n")
    write_record(folder, "chat_rl")
    (folder / "optim_000040.pt").unlink()
    assert re.search(r"rl d4 +done, step 40", status_of(whole, "--data=toy")[0])
    (folder / "model_000040.pt").write_bytes(b"")
    assert "was done, but model_000040.pt is missing or cut" in status_of(whole, "--data=toy")[0]
    (folder / "model_000040.pt").unlink()
    (root / "tokenizer/tokenizer.json").unlink()
    said, _ = status_of(whole, "--data=toy")
    assert re.search(r"rl-eval d4 +half done", said)
    assert "was done, but model_000040.pt is missing" in said
    assert "was done, but tokenizer.json is missing" in said

def test_a_report_that_cannot_be_written_is_one_line(whole):
    (whole / "toy/report/report.md").mkdir()
    out = script(whole, "report.py", "--data=toy")
    assert out.returncode == 1 and out.stderr.count("\n") == 1
    assert "error: could not write" in out.stderr

def test_what_to_run_next_names_the_data_and_the_depth(state):
    states = {phase.name: ("done", "") for phase in pipeline.PHASES}
    states["mid"] = "absent", ""
    words = shlex.split(status.next_command(states, "/my books", "d6"))
    assert words == ["bash", "speedrun.sh", "--data=/my books", "--depth=6"]

def test_scores_of_the_toy_world_are_named_as_such_in_status_too(whole):
    said, _ = status_of(whole, "--data=toy")
    assert re.search(r"base-eval d4 +done, \S+ ago; toy-CORE 0\.2042", said), said
    assert re.search(r"sft-eval d4 +done, \S+ ago; toy-ChatCORE 0\.7000", said), said

def test_the_last_data_set_comes_last_and_status_is_fast(whole):
    other = pipeline.state_path("base", "/my/books", "d6")
    write_record(other, "base_train", status="interrupted", reason="deadline",
                 settings={"data": "/my/books"}, next="python base_train.py --data=/my/books")
    said, last = status_of(whole)
    assert said.index("toy (") < said.index("/my/books (") and "your own folder" in said
    assert last == "next: python base_train.py --data=/my/books"
    loaded = script(whole, "-c", "import status, sys; print({'torch', 'numpy'} & set(sys.modules))")
    assert loaded.stdout.strip() == "set()"
