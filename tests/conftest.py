"""Shared by the tests: the repository on the path, ways to run a script of it and to see how it
ends, a random model."""
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parent.parent
# what some tests compare with: CORE's bundle, a checkpoint of nanochat's
SHARED = Path(os.environ.get("NANOCHAT_TEST_DATA", REPO.parent / "shared" / "data"))
sys.path.insert(0, str(REPO))

import checkpoint
import common
import pipeline
import tokenizer as tok
from ranks import Ranks
from run import Run

sys.excepthook = sys.__excepthook__

# macOS gives no process cores of its own
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

def share_of_cores():
    """The cores of this one of the pytest processes that tests/run.sh starts: two teams of threads
    that spin on the same two cores are many times slower than one thread on each."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return CORES[number::int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))] or CORES

if CORES:
    os.sched_setaffinity(0, share_of_cores())
BYTES = tok.Tokenizer({bytes([i]): i for i in range(256)})  # ids are byte values
RATES = {"matrix_lr": 0.02, "embedding_lr": 0.3, "unembedding_lr": 0.004, "scalar_lr": 0.5}
needs_nanochat = pytest.mark.skipif(not (SHARED / "nanochat_checkpoint").exists(),
                                    reason="no nanochat checkpoint at hand (NANOCHAT_TEST_DATA)")
needs_venv = pytest.mark.skipif(not (REPO / ".venv/matches").exists(),
                                reason="speedrun.sh would install .venv; tests/run.sh makes it")

def alone(name="test"):
    """A Run of one process that no signal reaches."""
    return Run(name, Ranks(0, 0, 1))

@contextlib.contextmanager
def ends():
    """with ends() as end: ... -> end.code is the exit code with which a process would end there;
    its line is printed as it would be."""
    end = SimpleNamespace(code=None)
    try:
        yield end
    except SystemExit as e:
        end.code = e.code
    except common.Failure as e:
        common.show_uncaught(*sys.exc_info())
        end.code = e.code
    else:
        raise AssertionError("the process would go on")

def exit_code(function, *args, **kwargs):
    with ends() as end:
        function(*args, **kwargs)
    return end.code

def nanochats_own(folder):
    """-> (tokenizer, converted in `folder`; model) of a checkpoint that nanochat made"""
    import torch

    import adopt
    import gpt
    there = SHARED / "nanochat_checkpoint"
    (folder / "tokenizer.pkl").write_bytes((there / "tokenizer/tokenizer.pkl").read_bytes())
    adopt.adopt_tokenizer(folder)
    meta = json.loads((there / "base_checkpoints/d4/meta_000400.json").read_text())
    model = gpt.GPT(gpt.GPTConfig(**meta["model_config"], arch="nanochat_2025")).eval()
    weights = there / "base_checkpoints/d4/model_000400.pt"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return tok.read_tokenizer(folder), model

@pytest.fixture
def all_cores():
    """For what two threads do on two cores; what the test starts gets them too."""
    if len(CORES) < 2:
        pytest.skip("two threads need two cores to meet")
    os.sched_setaffinity(0, CORES)
    yield
    os.sched_setaffinity(0, share_of_cores())

@pytest.fixture
def state(tmp_path, monkeypatch):
    """An empty state folder of its own."""
    folder = tmp_path / "state"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder

def environment(state):
    """This process's, without what a job or another state folder has put there."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "NANOCHAT_"))}
    # two ranks on one GPU would be refused
    return {**kept, "NANOCHAT_BASE_DIR": str(state), "CUDA_VISIBLE_DEVICES": ""}

def script(state, *args, env=None, timeout=300, said=None):
    """Runs `python ARGS` in the repository with the given state folder -> CompletedProcess, text"""
    return subprocess.run([sys.executable, *map(str, args)], cwd=REPO, input=said, text=True,
                          env={**environment(state), **(env or {})}, capture_output=True,
                          timeout=timeout, check=False)

def without_reader(*command, **more):
    """Runs a command whose standard output is a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run([sys.executable, *command], stdout=writing, stderr=subprocess.PIPE,
                              cwd=REPO, text=True, timeout=100, check=False, **more)
    finally:
        os.close(writing)

def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline, "the instant never came"
        time.sleep(0.002)

def random_model(*shape):
    """A GPT of this config whose logits differ much more than those of a fresh one"""
    import torch

    import gpt
    model = gpt.GPT(gpt.GPTConfig(*shape))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim == 2:
            p.data.normal_(0, 0.2, generator=generator)
    return model.eval()

def save_model(stage, data, tag, model, tokenizer, step=7, **meta):
    """Saves a model as a phase would that is done. -> its folder"""
    folder = pipeline.state_path(stage, data, tag)
    folder.mkdir(parents=True)
    meta = {"model": {**vars(model.config)}, "tokenizer": tokenizer.fingerprint, "loss": None,
            **meta}
    checkpoint.save(folder, step, model.state_dict(), {}, meta)
    return folder

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A state folder with a small toy world and its tokenizer; what a module trains there stays for
    the module."""
    state = tmp_path_factory.mktemp("prepared")
    for command in (["prepare_data.py", "--data=toy", "--size=0.02"],
                    ["tok_train.py", "--data=toy", "--vocab_size=512"]):
        assert script(state, *command).returncode == 0
    return state
