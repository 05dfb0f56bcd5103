"""Shared by the tests: the repository on the path, one thread for torch, and a way to run a script of it."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("NANOCHAT_TEST_DATA", REPO.parent / "shared" / "data"))  # what some tests compare with: CORE's bundle, a checkpoint of nanochat's
sys.path.insert(0, str(REPO))

import tokenizer as tok

BYTES = tok.Tokenizer({bytes([i]): i for i in range(256)})  # ids are byte values
needs_nanochat = pytest.mark.skipif(not (SHARED / "nanochat_checkpoint").exists(), reason="no nanochat checkpoint at hand (NANOCHAT_TEST_DATA)")


def nanochats_own(folder):
    """-> (tokenizer, converted in `folder`; model) of a checkpoint that nanochat made"""
    import json
    import torch
    import gpt
    there = SHARED / "nanochat_checkpoint"
    (folder / "tokenizer.pkl").write_bytes((there / "tokenizer/tokenizer.pkl").read_bytes())
    config = json.loads((there / "base_checkpoints/d4/meta_000400.json").read_text())["model_config"]
    model = gpt.GPT(gpt.GPTConfig(**config, arch="nanochat_2025")).eval()
    model.load_state_dict(torch.load(there / "base_checkpoints/d4/model_000400.pt", map_location="cpu", weights_only=True))
    return tok.load_tokenizer(folder), model


@pytest.fixture
def state(tmp_path, monkeypatch):
    """An empty state folder of its own."""
    folder = tmp_path / "state"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


def environment(state):
    """This process's, without what a job or another state folder has put there."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "NANOCHAT_"))}, "NANOCHAT_BASE_DIR": str(state), "CUDA_VISIBLE_DEVICES": ""}  # two ranks on one GPU would be refused


def script(state, *args, env=None, timeout=300, said=None):
    """Runs `python ARGS` in the repository with the given state folder -> CompletedProcess with text output"""
    return subprocess.run([sys.executable, *map(str, args)], cwd=REPO, env={**environment(state), **(env or {})}, input=said, capture_output=True, text=True, timeout=timeout)


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline, "the instant never came"
        time.sleep(0.002)


def random_model(*shape):
    """A GPT with the config of these values whose logits differ much more than those of a fresh one"""
    import torch
    import gpt
    model = gpt.GPT(gpt.GPTConfig(*shape))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim == 2:
            p.data.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A state folder with a small toy world and its tokenizer; what a module trains there stays for the module."""
    state = tmp_path_factory.mktemp("prepared")
    for command in (["prepare_data.py", "--data=toy", "--size=0.02"], ["tok_train.py", "--data=toy", "--vocab_size=512"]):
        assert script(state, *command).returncode == 0
    return state
