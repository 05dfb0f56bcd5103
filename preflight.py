"""
Before a Slurm job's GPU work, on each of its nodes: packages, GPUs, the state folder, and whether the runs before this one
got anywhere. (Room on the disk and in memory: trial.py.) speedrun.sh calls it, and once more when a run has ended.

    python preflight.py --data=toy --depth=4      # exit code 0, or 2 with the reason
    python preflight.py --data=toy --depth=4 --ended=75            # 1 where starting the same again would be pointless
"""
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import common
import configurator
import phase

data = "toy"                 # toy, fineweb_edu, climbmix, or a folder
depth = 4                    # layers
nproc = 1                    # processes on each node
ended = -1                   # exit code of a run that has ended; -1: it is about to start
settings = configurator.configure(globals()) if __name__ == "__main__" else None

PATIENCE, KILLED = 3, 10      # runs in a row without progress: that ended by themselves, that were ended from outside
TOLD = 143                   # instead of 75: it was told to end by SIGTERM, as a preemption does


def landmarks(root, tag):
    """What changes when something got done: checkpoints, finished phases, pieces of tokens and of evaluations. -> a sorted list of texts"""
    found = [p for pattern in ("base_data/*", "tokens/**/*", f"*/{tag}/manifest_*.json", "report/*.jsonl", "report/*.json") for p in root.glob(pattern)]
    found = [p for p in found if p.is_file() and not p.name.startswith(".") and p.name not in ("phase.json", "lock.json")]
    done = [p for pattern in ("base_data", "tokenizer", f"*/{tag}") for p in root.glob(pattern) if (phase.read(p) or {}).get("status") == "done"]
    return sorted([f"{p.relative_to(root)} {p.stat().st_size}" for p in found] + [f"{p.relative_to(root)} done" for p in done])

def fruitless(path, marks, ended):
    """-> (how many runs in a row ended by themselves with nothing done, how many were ended from outside: preempted, or with their node).
    ended: this run's exit code, -1 where it starts. `path` keeps both, what was done, and whether the last run has said how it ended"""
    old = common.read_json(path) or {}
    same = old.get("marks") == marks
    runs, killed = (old["runs"], old.get("killed", 0)) if same else (0, 0)
    runs += same and ended == 75
    killed += same and (ended == TOLD or ended == -1 and old.get("open", True))
    common.atomic_write(path, json.dumps({"runs": runs, "killed": killed, "marks": marks, "open": ended == -1}))
    return runs, killed

def check_packages():
    for line in (common.REPO / "requirements.txt").read_text().split():
        name, wanted = line.split("==")
        try:
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        common.check(found == wanted, f"{name} {wanted} is required and {found} is installed; on the login node", "bash speedrun.sh --only=setup")

def check_node():
    """Every node: its packages, its GPUs, and the same state folder as the first node's."""
    check_packages()
    shared = os.environ.get("NANOCHAT_OUTCOME")
    common.check(not shared or Path(shared).exists(), f"the first node's state folder {common.base_dir()} cannot be seen from {platform.node()}: "
                 "set NANOCHAT_BASE_DIR in site.env to a folder that all nodes share")
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        import torch
        common.check(torch.cuda.is_available(), f"torch {torch.__version__} cannot use the GPUs {os.environ['CUDA_VISIBLE_DEVICES']} of {platform.node()}: look at its driver", "nvidia-smi")
        common.check(torch.cuda.device_count() >= nproc, f"{nproc} processes were asked for and {platform.node()} has {torch.cuda.device_count()} GPUs: give --nproc or --gpus-per-node")
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return "no GPU"

def main():
    root, tag = common.data_root(data), f"d{depth}"
    memory = root / f"slurm_{tag}.json"
    if ended not in (-1, 75, TOLD):
        memory.unlink(missing_ok=True)
        return
    first = int(os.environ.get("SLURM_NODEID", 0)) == 0
    if ended == -1:
        gpus = check_node()
        if not first:
            return
        print(f"preflight: Python {platform.python_version()}, torch {importlib.metadata.version('torch')}, {gpus}, {nproc} processes a node", flush=True)
    runs, killed = fruitless(memory, landmarks(root, tag), ended)
    if runs >= PATIENCE or killed >= KILLED:
        memory.unlink()  # whoever starts it again after looking gets as many tries
        common.fail(f"{runs + killed} runs in a row got nothing done, so this one is the last: see why in the log above (is the time limit shorter than the start and one save?)", code=1)

if __name__ == "__main__":
    main()
