"""
What is checked of GPUs where there is none: devices and ranks that are faked; and tests/gpu.py, the
checks for a machine that has one: its table and exit code, and that each check can fail.
"""
import json
from pathlib import Path

import pytest
import torch

import configurator
import gpu
from conftest import script

def test_nothing_is_made_on_the_wrong_device_and_ranks_keep_and_send_their_share(tmp_path):
    out = script(tmp_path, "tests/fake_devices.py")
    assert out.returncode == 0, out.stdout + out.stderr[-2000:]
    assert out.stdout.count("on a faked device: ok") == 4, out.stdout
    assert out.stdout.count("a tensor on the CPU put in: FakeTensorDeviceMismatchError") == 2
    assert "d20 | modern | 1,024 |" in out.stdout

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return gpu.Here(torch.device("cpu"), tmp_path)

def rows(said):
    """{name: (result, measured)} of the table"""
    cells = [line.split(" | ", 3) for line in said.splitlines() if " | " in line]
    return {name: (result, measured) for name, result, _, measured in cells}

def test_a_check_that_fails_or_dies_does_not_stop_the_others_and_the_table_counts(here, capsys):
    def fine(_):
        return True, "1 of 1"

    def wrong(_):
        return False, "off by 2"

    def dies(_):
        raise RuntimeError("CUDA error\nand a page about it")

    def cannot(_):
        return None, "needs two"
    assert gpu.run_checks(here, [dies, wrong, cannot, fine]) == 2
    said = capsys.readouterr().out
    assert rows(said) == {
        "check": ("result", "measured"), "fine": ("ok", "1 of 1"), "wrong": ("FAILED", "off by 2"),
        "dies": ("FAILED", "RuntimeError: ['CUDA error']"), "cannot": ("skipped", "needs two")}
    assert "1 ok, 2 failed, 1 skipped in" in said.splitlines()[-1]

@pytest.mark.parametrize("required,code", [("", 0), ("1", 1)])
def test_without_a_gpu_it_is_skipped_in_one_line(monkeypatch, capsys, required, code):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("GPU_TESTS_REQUIRED", required)
    assert gpu.main([]) == code
    said = capsys.readouterr().out
    assert said.startswith("skipped: torch sees no NVIDIA GPU") and said.count("\n") == 1

@pytest.mark.parametrize("result,code", [(True, 0), (None, 0), (False, 1)])
def test_the_exit_code_says_whether_a_check_has_failed(monkeypatch, capsys, result, code):
    def decoding_of_letters(_):
        return result, "said"
    monkeypatch.setattr(gpu, "CHECKS", [decoding_of_letters])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "is put back")
    assert gpu.main(["--device=cpu", "letters"]) == code
    assert gpu.main(["--device=cpu", "nothing of the kind"]) == 2
    assert "there are decoding_of_letters" in capsys.readouterr().out

def test_the_checks_of_numbers_speed_and_memory_work_on_a_cpu(here, monkeypatch):
    for check in (gpu.dtypes_and_compile, gpu.mfu_of_d12, gpu.decoding):
        ok, said = check(here)
        assert ok, (check, said)
    monkeypatch.setattr(gpu.optim.MuonAdamW, "step", lambda self: 0.0)
    assert gpu.cpu_and_gpu(here)[0] is False, "a model that learns nothing is equal everywhere"

def test_a_dtype_that_is_further_off_than_it_may_be_fails(here, monkeypatch):
    for dtype in (torch.bfloat16, torch.float16):
        with monkeypatch.context() as patch:
            patch.setitem(gpu.FURTHEST, (dtype, False), (1e-9, 1e-9))
            assert gpu.dtypes_and_compile(here)[0] is False
    assert gpu.dtypes_and_compile(here)[0] is True
    monkeypatch.setattr(gpu.optim, "LOSS_SCALE", 2.0 ** -20)  # gradients too small for float16
    assert gpu.dtypes_and_compile(here)[0] is False

# a step of 4,000 tokens in 2 s: 2,000 tokens/s of 1e9 FLOP
MEASURED = {"rows": 8, "first": 30.0, "flops": 1e9, "predicted": 1.05e9, "allocated": 1e9,
            "steps": {4000: {"data": 0.1, "passes": 1.7, "optimizer": 0.2}}}
DECODED = {1: 0.01, "weights": 1e9}  # 1,000 GB/s would read them in 0.001 s

@pytest.mark.parametrize("check,change,result,says", [
    (gpu.mfu_of_d12, {"peak": 7e12}, True, "MFU 28.6 %, 2,000 tokens/s, 8 rows at once"),
    (gpu.mfu_of_d12, {"peak": 9e12}, False, "MFU 22.2 %"),
    (gpu.mfu_of_d20, {"peak": 7e12}, False, "MFU 28.6 %"),
    (gpu.mfu_of_d20, {"peak": None}, None, "no peak of this device is known"),
    (gpu.memory_against_the_formula, {}, True, "d20 with 8 rows: predicted 1.05 GB, measured 1.00"),
    (gpu.memory_against_the_formula, {"predicted": 1.11e9}, False, "predicted 1.11"),
    (gpu.memory_against_the_formula, {"predicted": 0.89e9}, False, "predicted 0.89"),
    (gpu.decoding, {}, True, "d20 100 tokens/s, 10.0 times the reading (goal: 1.3; MISSED)"),
    (gpu.decoding, {1: 0.0012}, True, "1.2 times the reading (goal: 1.3; ok)"),
    (gpu.decoding, {1: 0.2}, False, "d12 5 tokens/s"),
    (gpu.decoding, {torch.float32: 0.1}, False, "float32 1.0e-01 below the best logit"),
    (gpu.decoding, {torch.bfloat16: 2.0}, False, "bfloat16 2.0e+00 below the best logit")])
def test_good_numbers_pass_and_bad_ones_fail(here, monkeypatch, check, change, result, says):
    """With the GPU and what is measured on it faked."""
    numbers = {"peak": 7e12, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.01,
               **MEASURED, **DECODED, **change}
    monkeypatch.setattr(gpu.Here, "cuda", property(lambda self: True))
    monkeypatch.setattr(gpu.compute, "peak_flops", lambda device: numbers["peak"])
    monkeypatch.setattr(gpu.measure, "training", lambda *_: numbers)
    monkeypatch.setattr(gpu.measure, "decoding", lambda *_: numbers)
    monkeypatch.setattr(gpu.measure, "bandwidth", lambda device: 1e12)
    monkeypatch.setattr(gpu, "furthest_from_best", lambda here, dtype: numbers[dtype])
    ok, said = check(here)
    assert ok is result and says in said, said

@pytest.mark.parametrize("dtype", gpu.MOST_BELOW)
def test_a_cache_that_forgets_the_token_before_gives_wrong_tokens(here, monkeypatch, dtype):
    assert gpu.furthest_from_best(here, dtype) <= gpu.MOST_BELOW[dtype]
    embed = gpu.engine.Decoder.embed
    monkeypatch.setattr(gpu.engine.Decoder, "embed", lambda self, ids: embed(self, ids[[0, 0]]))
    assert gpu.furthest_from_best(here, dtype) > gpu.MOST_BELOW[dtype]

class Ended:
    """A process that has ended with this code and has said this."""
    def __init__(self, folder, code, said):
        self.code, self.log = code, folder / "log"
        self.log.write_text(said)

    def wait(self, _):
        return self.code

    def poll(self):
        return self.code

    def send_signal(self, _):
        """It comes too late."""

    kill = poll

PROCESSES = [gpu.resume, gpu.out_of_memory, gpu.two_ranks_on_one_card, gpu.one_rank_sends]

@pytest.mark.parametrize("check", PROCESSES)
@pytest.mark.parametrize("code", [0, 1])
def test_a_process_that_did_something_else_fails_its_check(here, monkeypatch, check, code):
    """With the GPU faked: every check starts what there is to start, with settings that exist."""
    monkeypatch.setattr(gpu.Here, "cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(80e9), int(80e9)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    started = []

    def start(here, *words, **_):
        started.append([str(word) for word in words])
        return Ended(here.folder, code, "once upon a time\nno memory of it\n")
    monkeypatch.setattr(gpu, "start", start)
    ok, said = check(here)
    assert ok is False and ("no memory of it" in said or code == 0), said
    assert started
    for words in started:
        if "base_train.py" in words:
            given = words[words.index("base_train.py") + 1:]
            known = configurator.defaults("base_train.py")
            assert {word[2:].partition("=")[0] for word in given} <= known.keys()

def test_refused_and_halved_are_recognised(here, monkeypatch):
    monkeypatch.setattr(gpu.Here, "cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(80e9), int(80e9)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused = "error: 2 processes were asked for on this machine and it has 1 GPUs"

    def start(here, *words, NANOCHAT_OUTCOME=None):
        settings = dict(str(word)[2:].partition("=")[::2] for word in words)
        asked = int(settings["device_batch_size"])
        if NANOCHAT_OUTCOME:
            said = {"code": 2, "retry_with": [f"--device_batch_size={asked // 2}"]}
            Path(NANOCHAT_OUTCOME).write_text(json.dumps(said))
        return Ended(here.folder, 0, refused)
    monkeypatch.setattr(gpu, "start", start)
    assert gpu.two_ranks_on_one_card(here) == (True, refused)
    ok, said = gpu.out_of_memory(here)
    assert ok and "rows: out of memory" in said
    assert 10 <= int(said.split()[0]) < 100, "more would be thousands of chunks of the loss"
