"""bench.py: what it refuses, its figures held against arithmetic by hand, and its measurements on
shapes small enough for a test."""
import json
import math
from types import SimpleNamespace

import pytest
import torch

import bench
import gpt
import measure
from conftest import BYTES, script
from tokenizer import Tokenizer

SMALL = (("device", "cpu"), ("dtype", "float32"), ("threads", 1), ("compile", False))

def write_documents(path, number):
    lines = [json.dumps({"text": f"The {i}th cat sat on mat {i * i}. " * 5}) for i in range(number)]
    path.write_text("\n".join(lines) + "\n")

def test_help_and_what_is_refused_in_one_line(state, tmp_path):
    out = script(state, "bench.py", "--help")
    assert out.returncode == 0 and "--quick=False" in out.stdout and "[0.01 to" in out.stdout
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        write_documents(folder / f"{name}.jsonl", 20)
    learning = ["--sections=learning", f"--data={folder}", f"--held_out={folder / 'b.jsonl'}"]
    (tmp_path / "empty").touch()
    for words, says in [
            (["--sections=trainin"], "not 'trainin'"),
            (["--sections="], "--sections is empty"),
            (["--sections=learning"], "needs --data"),
            (["--sections=learning", "--seeds=1,b"], "--seeds takes whole numbers"),
            ([*learning, f"--held_out={tmp_path / 'absent'}"], "needs --held_out"),
            ([*learning, "--recipe=config/absent.py"], "no --recipe=config/absent.py"),
            ([*learning, "--recipe=config/toy_base.py", f"--held_out={folder / 'a.jsonl'}"],
             "would be trained on"),
            ([f"--beside={tmp_path / 'absent'}"], "there is no --beside"),
            ([f"--beside={tmp_path / 'empty'}"], "holds no figures"),
            ([f"--out={tmp_path / 'absent/x'}"], "cannot be written")]:
        out = script(state, "bench.py", *words)
        assert out.returncode == 2 and says in out.stderr, out.stderr
        assert out.stderr.count("\n") == 1 and out.stdout == "" and not state.exists()

# ---- bits per byte

class Halves(torch.nn.Module):
    """Gives the token behind <|bos|> a probability of 1/2, every other one of 1/4."""

    def __init__(self, bos, sequence_len):
        super().__init__()
        self.lm_head = SimpleNamespace(weight=torch.zeros(1))
        self.config = SimpleNamespace(sequence_len=sequence_len)
        self.bos = bos
        self.rows = []

    def nats(self, x, y):
        self.rows += [(a[b != -1].tolist(), b[b != -1].tolist()) for a, b in zip(x, y)]
        bits = torch.where(x == self.bos, 1.0, 2.0)
        return torch.where(y == -1, 0.0, bits * math.log(2))

def test_bits_per_byte_by_hand(monkeypatch):
    tokenizer = Tokenizer({**BYTES.ranks, b"ab": 256})
    bos, ab, c, d, e = tokenizer.bos, 256, *b"cde"
    model = Halves(bos, 2)
    found = measure.bits_per_byte(model, tokenizer, ["abcde", "é", ""], rows_at_once=2)
    assert model.rows == [([bos, ab], [ab, c]), ([bos, d], [d, e]), ([bos, 195], [195, 169])]
    assert found == pytest.approx((3 + 3 + 3) / (5 + 2)), "bits of 3 rows, bytes of two texts"
    whole = measure.bits_per_byte(Halves(bos, 2048), tokenizer, ["abcde"])
    assert whole == pytest.approx((1 + 2 + 2 + 2) / 5)
    monkeypatch.setattr(measure, "LENGTH", 3)
    cut = measure.bits_per_byte(Halves(bos, 2048), tokenizer, ["abcde"])
    assert cut == pytest.approx((1 + 2 + 2 + 1) / 5), "no row is longer, whatever the model's are"

def test_bits_per_byte_of_a_model_that_knows_nothing():
    model = gpt.GPT(gpt.GPTConfig(16, BYTES.vocab_size, 1, 1, 1, 32))
    model.init_weights(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = measure.bits_per_byte(model, BYTES, ["some text", "x" * 40])
    assert found == pytest.approx(math.log2(BYTES.vocab_size))

# ---- figures

def test_numbers_and_the_table(capsys, tmp_path):
    assert [bench.number(value) for value in (1.90314, 2300.4, 0, 0.0123456, 99.96, math.inf)] == [
        "1.903", "2,300", "0", "0.01235", "99.96", "inf"]
    figures = bench.Figures()
    figures.add("slow", 50.0, "s", at_most=40)
    figures.add("fast", 12.0, "times", at_least=10)
    figures.add("free", 3.0, "GB/s")
    assert capsys.readouterr().out.splitlines() == [
        "  slow: 50.00 s (goal: at most 40.00; MISSED)",
        "  fast: 12.00 times (goal: at least 10.00; ok)", "  free: 3.000 GB/s"]
    assert list(bench.table(figures, {}))[2] == "| slow | 50.00 s | at most 40.00 | MISSED |"
    (tmp_path / "other").write_text('{"name": "slow", "value": 100}\n{"name": "fast", "value": 4}')
    other = bench.read_figures(tmp_path / "other")
    lines = list(bench.table(figures, other))
    assert lines[2:] == ["| slow | 50.00 s | 0.50 | at most 40.00 | MISSED |",
                         "| fast | 12.00 times | 3.00 | at least 10.00 | ok |",
                         "| free | 3.000 GB/s | - | - |  |"]

MACHINE = {"bandwidth": 20e9, "computed in": "bfloat16", "words": "",
           "rates": {"float32": (80e9, 90e9), "bfloat16": (200e9, 400e9)}}
TRAINING = {"first": 30.0, "flops": 20e6, "peak": 1e9, "allocated": 8e8, "predicted": 7e8,
            "steps": {4096: {"data": 0.1, "passes": 0.8, "optimizer": 0.1},
                      16384: {"data": 0.1, "passes": 1.8, "optimizer": 0.1}},
            "within": {"attention": 0.25, "products of the head": 0.5, "other products": 0.2}}

def test_sections_compute_shares_and_ratios(monkeypatch):
    measured = {"machine": MACHINE, "training": TRAINING, "core": {"a": (2.0, 2, 3600)},
                "decoding": {1: 0.02, 16: 0.04, "int8": {1: 0.01, 16: 0.02}, "weights": 200e6,
                             "peak": 5e8, "allocated": 4e8, "predicted": 4.2e8}}
    monkeypatch.setattr(bench, "in_child", lambda function, *args: measured[function])
    figures = bench.Figures()
    bench.training(figures, (), None)
    bench.decoding(figures, (), None)
    bench.memory(figures, (), None)
    monkeypatch.setattr(bench, "bundle", str(bench.pipeline.REPO / "tests"))
    bench.core(figures, (), None)
    assert "CORE on a d4" not in [figure["name"] for figure in figures], "no bundle there"
    found = {figure["name"]: (round(figure["value"], 3), figure["met"]) for figure in figures}
    expected = {
        "training, 4,096 tokens a step": (4096.0, ""),
        "training, 16,384 tokens a step": (8192.0, ""),
        "training, of the products' rate": (81.92, True),  # 8,192 * 20e6 / 200e9
        "training, of a large product's rate": (40.96, ""),
        "attention, of a step of 4,096 tokens": (20.0, ""),
        "products of the head, of a step of 4,096 tokens": (40.0, ""),
        "fused kernels and the rest, of a step of 4,096 tokens": (4.0, ""),
        "optimizer, of a step of 4,096 tokens": (10.0, ""),
        "first step, cold compilation": (30.0, True),
        "peak of training, 8 rows at once": (1000.0, ""),
        "tensors of training, 8 rows at once": (800.0, ""),
        "memory.py's formula for training, 8 rows at once, off by": (12.5, False),
        "peak of decoding d20": (500.0, ""),
        "memory.py's formula for decoding d20, off by": (5.0, True),
        "decoding d12, int8, batch 1": (100.0, ""),
        "decoding d12, int8, batch 16": (800.0, ""),
        "decoding d12, batch 1": (50.0, ""),
        "decoding d12, batch 16": (400.0, ""),
        "batch 16 over batch 1, d12": (8.0, False),
        "weights read, d20, batch 1": (10.0, ""),
        "decoding's time over memory's, d12, batch 1": (2.0, False),
        "decoding's time over memory's, d4, batch 1": (2.0, ""),
    }
    assert {name: found[name] for name in expected} == expected

@pytest.mark.parametrize("quick, sections, starts", [
    (False, ["training", "start"], {"cold": "state/compiled", "warm": "state/compiled"}),
    (True, ["start"], {"cold": "compiled", "warm": "compiled"}),
    (True, ["training", "start"], {"warm": "compiled"})])  # with what the training compiled
def test_a_start_is_called_warm_where_it_was_compiled_before(monkeypatch, tmp_path, quick, sections,
                                                             starts):
    begun = {}

    def run_script(env, script, *words, until=None):
        if script == "base_train.py" and until:
            tag = next(word for word in words if word.startswith("--tag="))
            begun[tag.removeprefix("--tag=")] = env["TORCHINDUCTOR_CACHE_DIR"]
        return 1.0

    monkeypatch.setattr(bench, "run_script", run_script)
    monkeypatch.setattr(bench, "quick", quick)
    monkeypatch.setattr(bench, "sections", sections)
    figures = bench.Figures()
    bench.start(figures, (), tmp_path)
    assert begun == {how: str(tmp_path / folder) for how, folder in starts.items()}
    named = [figure["name"] for figure in figures if "first step" in figure["name"]]
    assert named == [f"base_train.py to its first step, {how}" for how in starts]

def test_the_measurements_run(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "LENGTH", 16)
    monkeypatch.setattr(measure, "DEPTH", 1)
    monkeypatch.setattr(measure, "VOCAB", 300)
    monkeypatch.setattr(measure, "BATCHES", (32, 64))
    found = measure.training(SMALL, 2, 2)
    assert found["first"] > 0 and list(found["steps"]) == [32, 64]
    assert all(seconds > 0 for seconds in found["steps"][64].values())
    assert all(0 < share < 1 for share in found["within"].values())
    assert sum(found["within"].values()) < 1
    assert found["predicted"] == pytest.approx(found["allocated"], rel=0.1)
    assert measure.training(SMALL, 2, 0)["steps"] == {}

    found = measure.decoding(SMALL, 1, 4)
    assert found[1] > 0 and found[16] > 0 and found["int8"][1] > 0 and found["int8"][16] > 0
    assert found["predicted"] == pytest.approx(found["allocated"], rel=0.1)
    assert found["weights"] == 4 * (12 * 128 * 128 + 300 * 128 + 12 + 12), "every matrix, fp32"

    (tmp_path / "eval_data").mkdir()
    items = [{"query": f"{i} + 1", "choices": [f"{i + 1}", "none"], "gold": 0} for i in range(5)]
    lines = [json.dumps(item) + "\n" for item in items]
    (tmp_path / "eval_data/sums.jsonl").write_text("".join(lines))
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nsums,50\n")
    (tmp_path / "core.yaml").write_text(
        "icl_tasks:\n- label: sums\n  dataset_uri: sums.jsonl\n  num_fewshot: [1]\n"
        "  icl_task_type: multiple_choice\n")
    seconds, n, of = measure.core(SMALL, tmp_path, 3)["sums"]
    assert seconds > 0 and (n, of) == (3, 5)

def test_learning_trains_by_a_recipe_and_measures_what_was_held_out(state, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_documents(folder / "a.jsonl", 100)
    write_documents(folder / "b.jsonl", 10)
    (tmp_path / "tiny.py").write_text(
        "depth = 1\nmax_seq_len = 32\ntotal_batch_size = 64\nnum_steps = 9\neval_tokens = 64\n")
    out = script(state, "bench.py", "--sections=learning", f"--data={folder}", "--seeds=7",
                 f"--held_out={folder / 'b.jsonl'}", "--vocab_size=300", "--num_steps=3",
                 f"--recipe={tmp_path / 'tiny.py'}", f"--out={tmp_path / 'figures'}",
                 *(f"--{key}={value}" for key, value in SMALL))
    assert out.returncode == 0, out.stdout + out.stderr
    found = bench.read_figures(tmp_path / "figures")
    assert found["seed 7, steps"] == 3 and found["seed 7, tokens"] == 3 * 64 / 1e6
    assert 0 < found["bits per byte, mean of 1"] < 8 and found["seed 7, training"] < 5
    assert "sample: 'Once upon a time" in out.stdout and "commit " in out.stdout
    assert not state.exists(), "all of it was in a temporary folder"
