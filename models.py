"""
Finding and loading trained models, by stage (base, mid, sft, rl), data set and tag (d4, ...).
Everything here only reads.
"""
import shlex
import time

import checkpoint
import common
import pipeline
import tokenizer as tok
from records import load_record

def command_for(stage, data, tag):
    """The command that trains, or goes on with, the model of a stage."""
    words = ["python", pipeline.find_phase(stage).script, f"--data={data}"]
    if tag:
        words.append(f"--depth={tag[1:]}" if is_depth(stage, tag) else f"--tag={tag}")
    return shlex.join(words)

def is_depth(stage, tag):
    """Whether it is base_train.py's own tag, which follows from the depth."""
    return stage == "base" and tag[:1] == "d" and tag[1:].isdigit()

def saved_at(folder):
    """When the newest checkpoint of a folder was saved, ours or nanochat's, in seconds since the
    epoch; None where it holds none."""
    saved = list(folder.glob("manifest_*.json"))
    if not saved and checkpoint.made_by_nanochat(folder) is not None:
        saved = folder.glob("model_*.pt")
    return max((path.stat().st_mtime for path in saved), default=None)

def tags(stage, data):
    """The runs of a stage that hold a checkpoint, the one saved last at the end.
    example: ["d12", "d4"]"""
    folders = pipeline.state_path(stage, data, "x").parent.glob("*")
    found = {f.name: saved_at(f) for f in folders if ".old-" not in f.name}
    return sorted((tag for tag in found if found[tag]), key=found.get)

def what_exists(data):
    """Lines that name what has been trained: ["base d4: step 400, loss 1.234, 3m12s old"]"""
    lines = []
    for stage in pipeline.STAGES:
        for tag in tags(stage, data):
            folder = pipeline.state_path(stage, data, tag)
            for step in checkpoint.steps(folder)[:1]:
                meta = checkpoint.load_meta(folder, step)
                written = (folder / checkpoint.manifest_name(step)).stat().st_mtime
                loss = f", loss {meta['loss']:.4f}" if meta.get("loss") else ""
                age = common.duration(time.time() - written)
                lines.append(f"{stage} {tag}: step {step}{loss}, {age} old")
    return lines

def find_model(stage, data, tag=""):
    """
    -> (folder, step) of a finished model with whole weights; tag "" takes the one saved last.
    Failure (code 2) that names what exists where there is none, or it is half trained.
    """
    tag = tag or (tags(stage, data) or [""])[-1]
    command = command_for(stage, data, tag)
    folder = pipeline.state_path(stage, data, tag)
    if not tag or not folder.exists():
        exists = "; ".join(what_exists(data)) or "nothing"
        name = f"{stage} model {tag}".rstrip()
        common.fail(f"there is no {name} of the data set {data} in {pipeline.data_root(data)} "
                    f"(trained so far: {exists})", next_command=command)
    if checkpoint.made_by_nanochat(folder) not in (None, *checkpoint.steps(folder)):
        common.fail(f"{folder} holds a model that nanochat has made; to use it, adopt it first",
                    next_command=shlex.join(["python", "adopt.py", f"--data={data}"]))
    step = checkpoint.newest(folder, optimizer=False)
    common.check(step is not None, f"{folder} holds no whole checkpoint", command)
    record = load_record(folder)
    if record is None:
        finished = step >= checkpoint.load_meta(folder, step).get("num_steps", 0)
        record = {"status": "done" if finished else "its record is lost"}
    common.check(record["status"] == "done", f"the {stage} model {tag} is only half trained (step "
                 f"{step}, {record['status']}): finish it first", record.get("next") or command)
    return folder, step

def find_parent(stage, data, tag, try_out=False):
    """The finished model of `stage` that another one goes on from -> (folder, step). For trying out
    what is to come: where it is not finished that of the stage before it, or the one with which
    base_train.py has tried itself out; all have one shape."""
    if not try_out:
        return find_model(stage, data, tag)
    while stage in pipeline.STAGES:
        try:
            return find_model(stage, data, tag)
        except common.Failure:
            stage = pipeline.find_phase(stage).parent
    folder = pipeline.state_path("base", data, tag, try_out=True)
    step = checkpoint.newest(folder, optimizer=False)
    common.check(step is not None, f"there is no base model {tag} of {data} to try out with",
                 f"python base_train.py --data={data} --try_out=True")
    return folder, step

def check_tokenizer(folder, step, tokenizer):
    """Failure (code 2) where the tokenizer is not the one that the model was trained with."""
    meta = checkpoint.load_meta(folder, step)
    vocab_size = meta["model"]["vocab_size"]
    trained_with = meta.get("tokenizer", tokenizer.fingerprint)
    fits = vocab_size == tokenizer.vocab_size and trained_with == tokenizer.fingerprint
    common.check(fits, f"tokenizer and checkpoint do not belong together: {folder} has a "
                 f"vocabulary of {vocab_size} ({trained_with[:8]}), the tokenizer one of "
                 f"{tokenizer.vocab_size} ({tokenizer.fingerprint[:8]})")

def put_weights(model, model_state):
    """Copies weights into a model. Failure (code 2) where they are not those of this model."""
    # nanochat's files have the prefix of a compiled model's names
    plain = {name.removeprefix("_orig_mod."): tensor for name, tensor in model_state.items()}
    try:
        model.load_state_dict(plain)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        common.fail("the checkpoint's weights do not fit the model of this version of the source "
                    f"({reason}): use the version that trained it (git checkout; its commit is in "
                    "phase.json), or train anew with --start_over=True")

def build_model(meta, model_state, device, dtype):
    """A gpt.GPT with the given weights on `device`, computing in `dtype`."""
    from gpt import GPT, GPTConfig
    model = GPT(GPTConfig(**meta["model"]), dtype)
    put_weights(model, model_state)
    return model.to(device)

def load_model(folder, step, device, dtype):
    """What find_model has found -> (model in eval mode, meta)"""
    model_state, _, meta = checkpoint.load(folder, step, optimizer=False)
    return build_model(meta, model_state, device, dtype).eval(), meta

def load_tokenizer_of(folder, step, data):
    """The data set's tokenizer, which has to be the one of this model."""
    tokenizer = tok.load_tokenizer(data)
    check_tokenizer(folder, step, tokenizer)
    return tokenizer
