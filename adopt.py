"""
Makes what nanochat has left in the state folder usable here: its tokenizer, and models of its plain
version of November 2025.

    python adopt.py                        # of fineweb_edu, where nanochat has its own
    python adopt.py --stage=base           # the base model alone

nanochat's own files are not changed. Beside tokenizer.pkl it writes ranks.txt and tokenizer.json,
which hold no code; beside a model a record (phase.json) and a manifest with checksums and the
settings that nanochat's own file lacks. What cannot be written has to be copied first; the line
that says so has the command. Then go on with

    bash speedrun.sh --data=fineweb_edu --from=mid
"""
import io
import json
import os
import pickle
import shlex
import sys
import time

import checkpoint
import common
import configurator
import models
import pipeline
import status
import tokenizer as tok
from lock import take_lock

data = "fineweb_edu"         # the data set in whose state folder nanochat's files are
stage = ""                   # stage to adopt: base, mid, sft or rl; empty: all
settings = configurator.configure(globals()) if __name__ == "__main__" else None

class PickledEncoding:
    """What a tiktoken.Encoding in a pickle turns into here: an empty thing that takes its fields
    and runs nothing."""

class OnlyAnEncoding(pickle.Unpickler):
    """Loads one pickled tiktoken.Encoding. A pickle may name any function and call it; this one
    nothing else."""
    def find_class(self, module, name):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return PickledEncoding
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tokenizer needs; "
                                     "nothing of it was run")

def check_readable(path):
    common.check(os.access(path, os.R_OK), f"{path}, which nanochat has left, cannot be read: make "
                 "it readable (chmod u+r)")

def refuse(directory, error):
    common.fail(f"cannot write in {directory}, which nanochat has left ({error.strerror}): copy it "
                "and adopt the copy",
                next_command=models.copy_first(shlex.join(["python", "adopt.py", *sys.argv[1:]])))

def adopt_tokenizer(directory):
    """Keeps nanochat's tokenizer.pkl, read without trust, as plain data beside it. Failure where it
    is none."""
    path = directory / "tokenizer.pkl"
    check_readable(path)
    try:
        fields = vars(OnlyAnEncoding(io.BytesIO(path.read_bytes())).load())
        parts = [fields[name] for name in ("mergeable_ranks", "pat_str", "special_tokens")]
        tok.save_tokenizer(directory, *parts)
    except OSError as e:
        refuse(directory, e)
    except Exception as e:  # noqa: BLE001  (a broken pickle can raise nearly anything)
        common.fail(f"{path} is not a tokenizer that can be used: {e}; move it away and train one "
                    "(tok_train.py)")
    print(f"adopted nanochat's tokenizer in {directory}: ranks.txt, tokenizer.json")

def adopt_model(directory, step):
    """Loads nanochat's model of `step`, to be sure, and gives it a manifest and a record. Failure
    where it cannot be loaded, or nothing can be written beside it."""
    import gpt  # it imports torch
    model_name, _, meta_name = checkpoint.names(step)
    check_readable(directory / model_name)
    meta = common.read_json(directory / meta_name)
    try:
        config = gpt.GPTConfig(**meta["model_config"], arch="nanochat_2025")
        model_state, _, _ = checkpoint.load(directory, step, optimizer=False)
        models.put_weights(gpt.GPT(config), model_state)
    except Exception as e:  # noqa: BLE001  (a broken file can raise nearly anything)
        common.fail(f"cannot adopt {directory / model_name}, which seems to be nanochat's: "
                    f"{common.one_line(e)[:200]} (gpt.py knows its plain model of November "
                    "2025); move it away to go on without")
    meta |= {"step": step, "model": vars(config), "num_steps": step, "adopted": True,
             "batch_tokens": meta.get("total_batch_size", 2 ** 19)}
    listed = {name: [(directory / name).stat().st_size, common.sha256_file(directory / name)]
              for name in (model_name, meta_name)}
    record = {"phase": "nanochat", "status": "done", "code": 0, "adopted": True, "next": None,
              "reason": "made by nanochat, adopted", "settings": {}, "free": {}, "inputs": {},
              "starts": [], "step": step, "updated": time.time()}
    try:
        lock = take_lock(directory)
        common.atomic_write(directory / "phase.json", json.dumps(record))
        common.atomic_write(directory / checkpoint.manifest_name(step),
                            json.dumps({"step": step, "files": listed, "meta": meta}))
        lock.release()
    except OSError as e:
        refuse(directory, e)
    print(f"adopted nanochat's checkpoint of step {step:,} in {directory}")

def main():
    found = False
    status.check_folder(data)
    directory = pipeline.tokenizer_dir(data)
    if (directory / "tokenizer.pkl").exists() and tok.damage(directory) is not None:
        adopt_tokenizer(directory)
        found = True
    for name in [stage] if stage else pipeline.STAGES:
        for directory in pipeline.state_path(name, data, "x").parent.glob("*"):
            step = checkpoint.made_by_nanochat(directory)
            adopted = step in (None, *checkpoint.steps(directory))
            if not adopted and ".old-" not in directory.name:
                adopt_model(directory, step)
                found = True
    if not found:
        print(f"nothing is left to adopt in {pipeline.data_root(data)} (what lies "
              "beside a model or phase.json of our own has to be moved to a folder of its own)")

if __name__ == "__main__":
    main()
