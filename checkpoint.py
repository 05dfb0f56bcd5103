"""
Checkpoints that cannot be hurt by killing the writer. That of step 400 is four files in a folder:

    model_000400.pt        the weights, a state dict (nanochat's names)
    optim_000400.pt        the optimizer's tensors by parameter name, whole, whatever the ranks
    meta_000400.json       step, settings, model shape, time spent
    manifest_000400.json   size and SHA-256 of the other three, and the meta again, written last

Each is written under a temporary name, flushed to disk, read back, then renamed. Without its
manifest there is no checkpoint, so a death at any moment leaves the old one or the new one. While
it is being saved, or removed, there is a file .partial_000400 beside it: so what a death in the
middle has left is told from files that have lost their manifest otherwise, which nobody removes.
Older ones of the same run go only after the new one is whole; later ones, and those of other runs
that somebody has copied there, never. Nothing random has to be saved: every draw is a function of
(seed, step, item), see common.rng.
"""
import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path

import common

def names(step):
    """-> names of the files of a step: weights, optimizer, meta"""
    return [f"model_{step:06d}.pt", f"optim_{step:06d}.pt", f"meta_{step:06d}.json"]

def manifest_name(step):
    return f"manifest_{step:06d}.json"

def mark_name(step):
    return f".partial_{step:06d}"

def steps(directory, pattern="manifest_*.json"):
    """Steps of which the directory holds such a file, newest first."""
    prefix = pattern.partition("*")[0]
    found = [path.stem.removeprefix(prefix) for path in Path(directory).glob(pattern)]
    return sorted((int(s) for s in found if s.isdigit()), reverse=True)

def files(directory, step):
    """{name: [size, sha256]} as the manifest of `step` has them; {} where it is missing or damaged
    (a flipped bit may hit a key)"""
    return common.read_json(Path(directory) / manifest_name(step)).get("files", {})

def repeated_meta(directory, step):
    """The meta as the manifest repeats it; {} where it does not, or a bit has flipped there.
    nanochat's own file stays as nanochat wrote it: what we add stands here (see adopt.py)."""
    manifest = common.read_json(Path(directory) / manifest_name(step))
    meta = manifest.get("meta", {})
    listed = manifest.get("files", {}).get(names(step)[2], [0, ""])
    fits = hashlib.sha256(json.dumps(meta, indent=1).encode()).hexdigest() == listed[1]
    return meta if fits or "adopted" in meta else {}

def load_meta(directory, step):
    """The meta of a checkpoint, a dict; {} where it can be read nowhere."""
    return repeated_meta(directory, step) or common.read_json(Path(directory) / names(step)[2])

# settings that came later, with what held before they were there
ADDED = {"aspect_ratio": 64, "key_offset": False, "bigram_vocab_size": 0, "digits": 2}

def as_today(settings):
    """Recorded settings with those that came later; two of them say nothing to the plain model,
    which has neither."""
    settings = {**ADDED, **settings}
    if settings.get("arch") == "nanochat_2025":
        settings.update(key_offset=False, bigram_vocab_size=0)
    return settings

def same_run(meta, other):
    """Whether the metas of two checkpoints are of one run: settings and inputs are the same, as
    Run.save has put them there. Those of earlier versions, which do not say, count as of the run in
    whose folder they are; one that cannot be read is of none."""
    if not (meta and other):
        return False
    one, two = [m.get("record", {}) for m in (meta, other)]
    if not (one and two):
        return True
    # a folder may be renamed
    plain = [{**as_today(r.get("settings", {})), "tag": ""} for r in (one, two)]
    return plain[0] == plain[1] and one.get("inputs") == two.get("inputs")

def fingerprint(directory, step):
    """Identifies the weights of a checkpoint: the start of the model file's SHA-256, "" where the
    manifest is missing or damaged."""
    return files(directory, step).get(names(step)[0], [0, ""])[1][:16]

# -------------------------------------------------------------------------------------------------
# verifying

def problem(directory, step, optimizer=True):
    """None if the checkpoint of `step` is whole (sizes and checksums), else why it is not.
    optimizer=False: for who needs the weights and meta alone, wherever the meta stands."""
    needed = files(directory, step)
    if not needed:
        return "its manifest is missing or damaged"
    if not optimizer:
        needed.pop(names(step)[1], None)
        if repeated_meta(directory, step):
            needed.pop(names(step)[2], None)
    for name, (size, digest) in needed.items():
        path = Path(directory) / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if common.sha256_file(path) != digest:
            return f"{name} does not match its checksum"
    return None

def newest(directory, optimizer=True, say=common.print0):
    """The newest step whose checkpoint is whole, or None; says why it skips others."""
    for step in steps(directory):
        why = problem(directory, step, optimizer)
        if why is None:
            return step
        say(f"skipping the damaged checkpoint of step {step} in {directory}: {why}")
    return None

def is_ours(directory):
    """Whether the record of a run, or a checkpoint, is there that adopt.py has not written."""
    record = common.read_json(Path(directory) / "phase.json")
    if record and "adopted" not in record:
        return True
    return any("adopted" not in load_meta(directory, step) for step in steps(directory))

def made_by_nanochat(directory):
    """The step of the newest checkpoint in `directory` that nanochat has made (its meta file has a
    model_config), None where there is none, or a run of our own, beside which it counts for
    nothing. It may have no manifest yet: see adopt.py."""
    if is_ours(directory):
        return None
    for step in steps(directory, "model_*.pt"):
        if "model_config" in common.read_json(Path(directory) / names(step)[2]):
            return step
    return None

def leftovers(directory):
    """What deaths in the middle of a save have left, a list of paths: temporary files, and the
    parts of a step that has no manifest but its mark."""
    directory = Path(directory)
    found = list(directory.glob(".*_*.tmp-*"))
    for step in steps(directory, ".partial_*"):
        if not (directory / manifest_name(step)).exists():
            found += [directory / name for name in names(step)]
        found.append(directory / mark_name(step))  # last: by it the parts are known
    return found

def holds_any(directory):
    """Whether a checkpoint was ever saved there, whole or damaged, ours or not."""
    found = {*Path(directory).glob("manifest_*.json"), *Path(directory).glob("model_*.pt")}
    return not found.issubset(leftovers(directory))

# -------------------------------------------------------------------------------------------------
# saving and loading

class HashingWriter:
    """Hands what is written on to a file, and hashes it on the way."""
    def __init__(self, file):
        self.file, self.flush, self.sha256 = file, file.flush, hashlib.sha256()

    def write(self, part):
        self.sha256.update(part)
        return self.file.write(part)

def write_file(path, write, still_mine):
    """write(file) into a temporary file, flushed, read back and compared, renamed to `path` if
    still_mine(). -> [size, sha256]; OSError where it fails"""
    # a name of its own: an old process that wakes up writes into another file than the new one
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    with open(temporary, "wb") as f:
        hashing = HashingWriter(f)
        write(hashing)
        f.flush()
        os.fsync(f.fileno())
    digest = hashing.sha256.hexdigest()
    if common.sha256_file(temporary) != digest:
        raise OSError(f"{path.name} was written to disk wrongly")
    if not still_mine():
        raise OSError("the lock is lost")
    size = temporary.stat().st_size
    os.replace(temporary, path)
    return [size, digest]

def save(directory, step, model_state, optim_state, meta, keep=1, still_mine=lambda: True):
    """
    Writes the three files, then their manifest; then earlier ones of the same run go, until `keep`
    are left.
    in: model_state {name: tensor}, optim_state {name: {name: tensor or number}} or {}, meta
    JSON-able. still_mine() is asked before each rename and removal. OSError or RuntimeError
    (torch's) where it cannot be written, FloatingPointError where a weight is nan or inf; what was
    good stays.
    """
    import torch
    directory = Path(directory)
    model_name, optim_name, meta_name = names(step)
    meta_text = json.dumps({**meta, "step": step}, indent=1)
    meta = json.loads(meta_text)  # as it is read again
    for name, tensor in model_state.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} has a nan or inf")

    def write(name, how):
        return write_file(directory / name, how, still_mine)

    write(mark_name(step), lambda f: None)
    common.fsync_dir(directory)
    written = {model_name: write(model_name, lambda f: torch.save(model_state, f)),
               optim_name: write(optim_name, lambda f: torch.save(optim_state, f)),
               meta_name: write(meta_name, lambda f: f.write(meta_text.encode()))}
    common.fsync_dir(directory)
    manifest = json.dumps({"step": step, "files": written, "meta": meta})
    write(manifest_name(step), lambda f: f.write(manifest.encode()))
    common.fsync_dir(directory)

    whole = 1  # it has just been read back; others are worth keeping where they are whole
    for other in steps(directory):
        if other >= step or not same_run(meta, load_meta(directory, other)):
            continue
        if whole < keep and problem(directory, other) is None:
            whole += 1
        elif still_mine():
            os.replace(directory / manifest_name(other), directory / mark_name(other))
    sweep(directory, still_mine)

def sweep(directory, still_mine):
    """Removes what leftovers() finds, as long as still_mine()."""
    for path in leftovers(directory):
        with contextlib.suppress(OSError):
            if still_mine():
                path.unlink()

def load(directory, step, optimizer=True):
    """-> (model_state, optim_state or {}, meta); the tensors are the file's own memory (mmap), so
    that of many ranks each reads only what it takes."""
    import torch
    def read(name):
        return torch.load(Path(directory) / name, map_location="cpu", mmap=True, weights_only=True)
    model_name, optim_name, _ = names(step)
    return read(model_name), read(optim_name) if optimizer else {}, load_meta(directory, step)
