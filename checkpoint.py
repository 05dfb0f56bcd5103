"""
Checkpoints that cannot be hurt by killing the writer. A checkpoint of step 400 is four files in the phase's directory:

    model_000400.pt     the weights, a state dict (nanochat's names)
    optim_000400.pt     the optimizer's tensors by parameter name, whole, whatever the number of ranks
    meta_000400.json    step, settings, inputs, model shape, time spent
    manifest_000400.json   size and SHA-256 of the other three, written last: without it there is no checkpoint

Each is written under a temporary name, flushed to disk, read back, then renamed, by a thread while the training goes on.
Older ones go only after the new one verified. Nothing random has to be saved: every draw is a function of (seed, step, item) (see common.rng).
"""
import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import common
import phase

def names(step):
    return [f"model_{step:06d}.pt", f"optim_{step:06d}.pt", f"meta_{step:06d}.json"]

def manifest_name(step):
    return f"manifest_{step:06d}.json"

def steps(directory):
    """Steps of which the directory holds a manifest, newest first."""
    found = [p.name[len("manifest_"):-len(".json")] for p in Path(directory).glob("manifest_*.json")]
    return sorted((int(s) for s in found if s.isdigit()), reverse=True)

def files(directory, step):
    """{name: [size, sha256]} as the manifest of `step` has them; {} where it is missing or damaged (a flipped bit may hit a key)"""
    manifest = common.read_json(Path(directory) / manifest_name(step))
    return manifest.get("files", {}) if isinstance(manifest, dict) else {}

def last_step(directory):
    """The newest step that a manifest stands for, the save in flight included; 0 without one."""
    finish()
    return max(steps(directory), default=0)

def problem(directory, step):
    """None if the checkpoint of `step` is whole (sizes and checksums), else why it is not."""
    if not (listed := files(directory, step)):
        return "its manifest is missing or damaged"
    for name, (size, digest) in listed.items():
        path = Path(directory) / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if common.sha256_file(path) != digest:
            return f"{name} does not match its checksum"
    return None

def newest(directory, say=common.print0):
    """The newest step whose checkpoint is whole, or None; says why it passes over others."""
    for step in steps(directory):
        why = problem(directory, step)
        if why is None:
            return step
        say(f"passing over the checkpoint of step {step} in {directory}: {why}")
    return None

def free_bytes(directory):
    return (stat := os.statvfs(directory)).f_bavail * stat.f_frsize

def free_files(directory):
    """How many files may still be made; infinity where the file system does not count them."""
    return stat.f_favail if (stat := os.statvfs(directory)).f_files else float("inf")

def write_file(directory, name, write):
    """Temporary name, write(file), flush to disk, read back and compared, lock looked at, rename. -> [size, sha256]; OSError where it fails"""
    temporary = directory / f".{name}.tmp-{os.getpid()}-{time.time_ns()}"  # an old life that wakes up writes into another file than the new one
    written = hashlib.sha256()
    with open(temporary, "wb") as f:
        write(SimpleNamespace(write=lambda part: (written.update(part), f.write(part))[1], flush=f.flush))
        f.flush()
        os.fsync(f.fileno())
    if common.sha256_file(temporary) != written.hexdigest():
        raise OSError(f"{name} reads back other than it was written")
    if not phase.still_mine(directory):
        raise OSError("the lock is lost")
    size = temporary.stat().st_size
    os.replace(temporary, directory / name)
    return [size, written.hexdigest()]

def write(directory, step, model_state, optim_state, meta, keep):
    """The three files, their manifest, and then all but the `keep` newest go. OSError or RuntimeError (torch's) where it fails."""
    import torch
    model_name, optim_name, meta_name = names(step)
    record = phase.read(directory) or {}
    meta = {**meta, "step": step, "record": {k: record[k] for k in ("settings", "inputs", "chosen", "train_files") if k in record}}  # see phase.recovered
    written = {model_name: write_file(directory, model_name, lambda f: torch.save(model_state, f)),
               optim_name: write_file(directory, optim_name, lambda f: torch.save(optim_state, f)),
               meta_name: write_file(directory, meta_name, lambda f: f.write(json.dumps(meta, indent=1).encode()))}
    common.fsync_dir(directory)
    with contextlib.suppress(FileNotFoundError), open(directory / "metrics.jsonl") as f:
        os.fsync(f.fileno())  # the steps before this one will not run again
    write_file(directory, manifest_name(step), lambda f: f.write(json.dumps({"step": step, "files": written}).encode()))
    common.fsync_dir(directory)
    whole = [s for s in steps(directory) if problem(directory, s) is None] if keep > 1 else [step]
    for old in steps(directory):
        if old not in whole[:keep]:
            remove(directory, old)
    sweep(directory)

_save = {"thread": None, "at": None, "error": None}  # the save that a thread is writing, or wrote last; at: (directory, step)

def save(directory, step, model_state, optim_state, meta, keep=1, wait=True):
    """
    Saves the checkpoint of `step` and then removes all but the `keep` newest (rank 0 only; the lock of `directory` must be held).
    model_state: {name: tensor}, copied at once, since the loop goes on changing it; optim_state: {name: {name: tensor or number}}
    or {}, already a copy; meta: JSON-able. A thread does the writing; wait=False returns while it is at it, but only one is ever
    in flight. If it cannot be written the phase ends with code 1, here or at the next save() or finish(); what was good stays.
    """
    directory = Path(directory)
    finish()
    if _save["at"] == (directory, step) or (step in steps(directory) and problem(directory, step) is None):
        return
    began = time.time()
    model_state = {name: tensor.to("cpu", copy=True) for name, tensor in model_state.items()}
    def work():
        try:
            write(directory, step, model_state, optim_state, meta, keep)
            common.save_took(time.time() - began)
        except Exception as e:  # the main thread tells it: see finish()
            _save["error"] = e
    _save.update(at=(directory, step), thread=threading.Thread(target=work, name=f"save of step {step}"))
    phase.writer = _save["thread"]  # the lock is not given back before it has ended
    _save["thread"].start()
    if wait:
        finish()

def save_failed():
    """Whether the save in flight has failed: the next save() or finish() will say so."""
    return _save["error"] is not None

def finish():
    """Waits for the save in flight. If it failed: ends the phase with code 1, and what was good before stays."""
    if _save["thread"]:
        _save["thread"].join()
        _save["thread"] = None
    if (e := _save["error"]):
        directory, step = _save["at"]
        _save.update(at=None, error=None)
        phase.must_hold(directory)  # an old life that wakes up says so, and touches nothing
        sweep(directory)
        last = next(iter(steps(directory)), None)
        common.fail(f"could not save step {step} in {directory}: {e} ({free_bytes(directory) / 1e9:.1f} GB free); "
                    + ("nothing was saved before" if last is None else f"the checkpoint of step {last} is untouched")
                    + ", make room or make it writable and run the same command again", code=1)

def remove(directory, step):
    """The manifest first: a checkpoint half removed is no checkpoint."""
    for name in [manifest_name(step), *names(step)]:
        with contextlib.suppress(OSError):
            (Path(directory) / name).unlink()

def sweep(directory):
    """Removes what deaths in the middle of a save left behind: temporary files, and parts without a manifest."""
    kept = set(steps(directory))
    for path in Path(directory).iterdir():
        parts = path.name.split(".")[0].split("_")
        orphan = parts[0] in ("model", "optim", "meta") and parts[-1].isdigit() and int(parts[-1]) not in kept
        if orphan or (path.name.startswith((".model_", ".optim_", ".meta_", ".manifest_")) and ".tmp" in path.name):
            with contextlib.suppress(OSError):
                path.unlink()

def load(directory, step, device="cpu", optimizer=True):
    """-> (model_state, optim_state or {}, meta)"""
    import torch
    model_name, optim_name, meta_name = names(step)
    model_state = torch.load(Path(directory) / model_name, map_location=device, weights_only=True)
    optim_state = torch.load(Path(directory) / optim_name, map_location=device, weights_only=True) if optimizer else {}
    return model_state, optim_state, json.loads((Path(directory) / meta_name).read_text())

def fingerprint(directory, step):
    """Identifies the weights of a checkpoint: the start of the model file's SHA-256, "" where the manifest is missing or damaged."""
    return files(directory, step).get(names(step)[0], [0, ""])[1][:16]

# ---------------------------------------------------------------------------------------------------------------------
# finding and loading trained models

def latest_tag(stage, data):
    """The tag ("d4") of `stage` that was saved last and holds a checkpoint, ours or nanochat's, or None."""
    parent = common.data_root(data) / common.STAGES[stage]
    found = [p for p in parent.glob("*/m*_*.json") if ".old-" not in p.parent.name and (p.name.startswith("manifest_") or "model_config" in (common.read_json(p) or {}))]
    return max(found, key=lambda p: p.stat().st_mtime).parent.name if found else None

def what_exists(data):
    """Lines that name what has been trained: ["base d4: step 400, loss 1.234, 3m12s old"]"""
    lines = []
    for stage, folder in common.STAGES.items():
        for directory in sorted((common.data_root(data) / folder).glob("*")):
            for step in steps(directory)[:1]:
                meta = common.read_json(directory / names(step)[2]) or {}
                age = common.clock(time.time() - (directory / manifest_name(step)).stat().st_mtime)
                loss = f", loss {meta['loss']:.4f}" if meta.get("loss") else ""
                lines.append(f"{stage} {directory.name}: step {step}{loss}, {age} old")
    return lines

def adopt(directory):
    """Makes a checkpoint that nanochat has left in `directory` (model_021400.pt, meta_021400.json with its model_config, no manifest) one of ours: it is
    loaded, to be sure, and gets a manifest and a record; its weights stay untouched. -> the record, None where there is no such checkpoint"""
    left = [p for p in directory.glob("model_*.pt") if p.stem[6:].isdigit() and "model_config" in (common.read_json(directory / f"meta_{p.stem[6:]}.json") or {})]
    if not left:
        return None
    path = max(left)
    step, there = int(path.stem[6:]), path.with_name(f"meta_{path.stem[6:]}.json")
    import torch
    from gpt import GPT, GPTConfig
    try:
        if not steps(directory):  # else only the record is lost
            meta = common.read_json(there)
            meta.update(step=step, model=vars(GPTConfig(**meta["model_config"], arch="nanochat_2025")), num_steps=step, batch_tokens=meta.get("total_batch_size", 2 ** 19), adopted=True)
            GPT(GPTConfig(**meta["model"]), torch.float32).load_state_dict(plain(torch.load(path, map_location="cpu", weights_only=True)))
            common.atomic_write(there, json.dumps(meta, indent=1))
            whole = {p.name: [p.stat().st_size, common.sha256_file(p)] for p in (path, there)}
            common.atomic_write(directory / manifest_name(step), json.dumps({"step": step, "files": whole}))
        phase.write(directory, {"phase": "nanochat", "status": "done", "code": 0, "reason": "made by nanochat, adopted", "adopted": True, "next": None, "settings": {}, "free": {}, "inputs": {}, "starts": [], "step": step, "updated": time.time()})
    except PermissionError as e:
        common.fail(f"cannot write in {directory}, which nanochat has left: {e}; make it writable or copy it")
    except Exception as e:  # a broken file can raise nearly anything
        common.fail(f"cannot adopt {path}, which seems to be nanochat's: {' '.join(str(e).split())[:200]} (gpt.py knows its plain model of November 2025); move it away to go on without")
    common.print0(f"adopted nanochat's checkpoint of step {step:,} in {directory}")
    return phase.read(directory)

COMMANDS = {"base": "python base_train.py", "mid": "python mid_train.py", "sft": "python chat_sft.py", "rl": "python chat_rl.py"}

def find_model(stage, data, tag=None):
    """-> (directory, step) of a finished, whole checkpoint; exits with 2, naming what exists, where there is none."""
    tag = tag or latest_tag(stage, data)
    command = f"{COMMANDS[stage]} --data={data}"
    if tag is None or not common.stage_dir(stage, data, tag).exists():
        exists = "; ".join(what_exists(data)) or "nothing"
        common.fail(f"there is no {stage} model{f' {tag}' if tag else ''} of the data set {data} in {common.data_root(data)} (trained so far: {exists})",
                    next_command=command)
    directory = common.stage_dir(stage, data, tag)
    record = phase.read(directory) or adopt(directory)
    step = newest(directory)
    if step is None:
        common.fail(f"{directory} holds no whole checkpoint", next_command=command)
    record = record or {"status": "done" if step >= (common.read_json(directory / names(step)[2]) or {}).get("num_steps", 0) else "its record is lost"}
    if record["status"] != "done":
        common.fail(f"the {stage} model {tag} is only half trained (step {step}, {record['status']}): finish it first", next_command=record.get("next") or command)
    return directory, step

def must_fit(directory, step, tokenizer):
    """Exits with 2 where the tokenizer is not the one that the checkpoint was trained with."""
    meta = json.loads((Path(directory) / names(step)[2]).read_text())
    vocab_size = meta["model"]["vocab_size"]
    if vocab_size != tokenizer.vocab_size or meta.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        common.fail(f"tokenizer and checkpoint do not belong together: {directory} has a vocabulary of {vocab_size} "
                    f"({meta.get('tokenizer', 'unknown')[:8]}), the tokenizer one of {tokenizer.vocab_size} ({tokenizer.fingerprint[:8]})")

def plain(model_state):
    """Without the prefix of a compiled model's names, which nanochat's files have"""
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in model_state.items()}

def put_weights(model, model_state):
    """Exits with 2 where the weights are not those of this model."""
    try:
        model.load_state_dict(plain(model_state))
    except RuntimeError as e:
        common.fail(f"the checkpoint's weights do not fit the model of this version of the source ({' '.join(str(e).split())[:200]}): "
                    "use the version that trained it (git checkout; its commit is in phase.json), or train anew with --start_over=True")

def build_model(meta, model_state, device, dtype):
    """A GPT with the given weights on `device`, computing in `dtype`."""
    from gpt import GPT, GPTConfig
    model = GPT(GPTConfig(**meta["model"]), dtype)
    put_weights(model, model_state)
    return model.to(device)

def load_found(directory, step, device, dtype):
    """-> (model in eval mode, meta) of what find_model found, whose files it has just verified"""
    model_state, _, meta = load(directory, step, "cpu", optimizer=False)
    return build_model(meta, model_state, device, dtype).eval(), meta

def load_model(stage, data, tag, device, dtype):
    """-> (model in eval mode, tokenizer, meta) of a finished stage; tag None takes the newest. meta also gets "tag", "weights"."""
    from tokenizer import load_tokenizer
    directory, step = find_model(stage, data, tag)
    tokenizer = load_tokenizer(common.tokenizer_dir(data))
    must_fit(directory, step, tokenizer)
    model, meta = load_found(directory, step, device, dtype)
    return model, tokenizer, {**meta, "tag": directory.name, "weights": fingerprint(directory, step)}

if __name__ == "__main__":  # python checkpoint.py tok|base|mid|sft|rl DATA TAG: exits with 2 and says why if it is not there, whole
    import sys
    if sys.argv[1] == "tok":
        from tokenizer import load_tokenizer
        load_tokenizer(common.tokenizer_dir(sys.argv[2]))
    else:
        find_model(*sys.argv[1:4])
