"""Shared by the tests: the repository on the path, one thread for torch, and a way to run a script of it."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))


@pytest.fixture
def state(tmp_path, monkeypatch):
    """An empty state folder of its own."""
    folder = tmp_path / "state"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


def script(state, *args, env=None, timeout=300):
    """Runs `python ARGS` in the repository with the given state folder -> CompletedProcess with text output"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "NANOCHAT_"))}
    environment.update(NANOCHAT_BASE_DIR=str(state), **(env or {}))
    return subprocess.run([sys.executable, *map(str, args)], cwd=REPO, env=environment, capture_output=True, text=True, timeout=timeout)
