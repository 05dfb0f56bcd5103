"""
Finding and loading trained models, by stage (base, mid, sft, rl), data set and tag (d4, ...).
Nothing here writes to disk.
"""
import contextlib
import os
import shlex
import time
from typing import NamedTuple

import checkpoint
import common
import pipeline
import tokenizer as tok
from lock import holder_name, living_holder
from records import finished_step, load_record

class Model(NamedTuple):
    """One that holds a checkpoint, ours or nanochat's."""
    saved: float     # when, in seconds since the epoch
    data: str
    stage: str
    tag: str
    finished: bool

    def __str__(self):
        """example: "base d4: step 400, saved 3m12s ago, not finished" """
        steps = checkpoint.steps(pipeline.state_path(self.stage, self.data, self.tag))
        age = common.duration(time.time() - self.saved)
        rest = "" if self.finished else ", not finished"
        return f"{self.stage} {self.tag}: step {(steps or '?')[0]}, saved {age} ago{rest}"

def saved_at(folder):
    """When the newest checkpoint of a folder was saved, ours or nanochat's, in seconds since the
    epoch; None where it holds none."""
    saved = list(folder.glob("manifest_*.json"))
    if not saved and checkpoint.made_by_nanochat(folder) is not None:
        saved = folder.glob("model_*.pt")
    times = []
    for path in saved:
        with contextlib.suppress(FileNotFoundError):  # a training that goes on removes old ones
            times.append(path.stat().st_mtime)
    return max(times, default=None)

def is_finished(folder):
    return finished_step(folder) is not None

def trained(data, stage=""):
    """All models of a data set (and stage), the one saved last at the end."""
    found = []
    for name in [stage] if stage else pipeline.STAGES:
        for folder in pipeline.state_path(name, data, "x").parent.glob("*"):
            saved = saved_at(folder)
            if saved and ".old-" not in folder.name:
                found.append(Model(saved, data, name, folder.name, is_finished(folder)))
    return sorted(found)

def command_for(stage, data, tag):
    """The command that trains, or goes on with, the model of a stage; where what it goes on from is
    not there either, the command for that."""
    phase = pipeline.find_phase(stage)
    parent = phase.parent
    if parent in pipeline.STAGES and not is_finished(pipeline.state_path(parent, data, tag)):
        return command_for(parent, data, tag)
    record = load_record(pipeline.state_path(stage, data, tag)) or {}
    if known := record.get("next") or record.get("command"):
        return known
    words = pipeline.command_of(stage, data)
    if stage == "base" and tag[:1] == "d" and tag[1:].isdigit():
        words.append(f"--depth={tag[1:]}")  # from which base_train.py makes its tag
    elif tag:
        words.append(f"--tag={tag}")
    return shlex.join(words)

def find_model(stage, data, tag=""):
    """
    -> (folder, step) of a finished model with whole weights; tag "" takes the one saved last.
    Failure (code 2) that names what exists where there is none, or it is half trained.
    """
    if not tag:
        tag = next((model.tag for model in reversed(trained(data, stage))), "")
    folder = pipeline.state_path(stage, data, tag)
    command, over = command_for(stage, data, tag), pipeline.starting_over(stage)
    if not tag or not folder.exists():
        exists = "; ".join(map(str, trained(data))) or "nothing"
        name = f"{stage} model {tag}".rstrip()
        common.fail(f"there is no {name} of the data set {data} in {pipeline.data_root(data)} "
                    f"(trained so far: {exists})", next_command=command)
    if checkpoint.made_by_nanochat(folder) not in (None, *checkpoint.steps(folder)):
        adopt = shlex.join(["python", "adopt.py", f"--data={data}"])
        made = f"{folder} holds a model that nanochat has made"
        if not os.access(folder, os.W_OK):
            common.fail(f"{made} and cannot be written: copy it and adopt the copy",
                        next_command=copy_first(adopt))
        common.fail(f"{made}; to use it, adopt it first", next_command=adopt)
    step = finished_step(folder)
    damage = None
    if step is not None:
        damage = checkpoint.problem(folder, step, optimizer=False)
        if damage is None:
            return folder, step
    reasons = []
    half_way = checkpoint.newest(folder, optimizer=False, say=reasons.append)
    common.check(half_way is not None, f"{folder} holds no whole checkpoint "
                 f"({'; '.join(reasons) or 'no manifest'}): put the damaged or missing file back, "
                 f"or train it anew ({over} puts the old one aside)",
                 f"{command} {over}" if over.startswith("--start") else None)
    state, advice = f"only half trained (step {half_way})", "finish it first"
    if damage:
        state, advice = f"damaged in {folder}: {damage}", f"train it again from step {half_way} on"
    said = f"the {stage} model {tag} of {data} is {state}"
    if holder := living_holder(folder):
        common.fail(f"{said} and is being trained now by {holder_name(holder)}: wait for it")
    common.fail(f"{said}: {advice}", next_command=command)

def copy_first(command):
    """A command line for a state folder that cannot be written: copies it to where it can, and runs
    the command there."""
    here, there = shlex.quote(str(pipeline.base_dir())), "~/nanochat-copy"
    return (f"cp -a {here} {there} && chmod -R u+w {there} && export NANOCHAT_BASE_DIR={there} && "
            f"{command}")

def choose_tag(stage, data, command):
    """The tag of a training of `stage` whose command names none: that of the half-done one which
    the same command has begun, whatever was trained since, so that it goes on; else that of the
    newest model to go on from ("" where there is none)."""
    parent = pipeline.find_phase(stage).parent
    for model in reversed(trained(data, stage)):
        record = load_record(pipeline.state_path(stage, data, model.tag)) or {}
        begun_by = record.get("command", "").removesuffix(tag_argument(model.tag))
        has_parent = is_finished(pipeline.state_path(parent, data, model.tag))
        if begun_by == command and has_parent and not model.finished:
            return model.tag
    return next((model.tag for model in reversed(trained(data, parent))), "")

def tag_argument(tag):
    """What a command that named no tag gets behind it, to be recorded and said."""
    return f" {shlex.quote(f'--tag={tag}')}"

def where_to_go_on(run, stage, data, tag, try_out):
    """What a training of `stage` goes on from, and where it saves -> (folder and step of that
    model, its own folder). Where no tag is named the command to go on with gets one. Collective."""
    if not tag:
        tag = run.ranks.on_rank0(choose_tag, stage, data, run.command)
        run.command += tag_argument(tag)
    parent = pipeline.find_phase(stage).parent
    folder, step = run.ranks.on_rank0(find_parent, parent, data, tag, try_out)
    return folder, step, pipeline.state_path(stage, data, folder.name, try_out)

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
                 f"{command_for('base', data, tag)} --try_out=True")
    return folder, step

def load_tokenizer_of(folder, step, data):
    """The data set's tokenizer. Failure (code 2) where the model of `step` was not trained with it.
    """
    tokenizer = tok.load_tokenizer(data)
    meta = checkpoint.load_meta(folder, step)
    vocab_size = meta["model"]["vocab_size"]
    trained_with = meta.get("tokenizer", tokenizer.fingerprint)
    fits = vocab_size == tokenizer.vocab_size and trained_with == tokenizer.fingerprint
    common.check(fits, f"tokenizer and checkpoint do not belong together: {folder} was trained "
                 f"with another tokenizer (vocabulary of {vocab_size}, now "
                 f"{tokenizer.vocab_size}); put that one back (tokenizer.old-DATE, if it was put "
                 f"aside), or train the model anew ({pipeline.starting_over('base')})")
    return tokenizer

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
                    f"phase.json), or train anew ({pipeline.starting_over('base')})")

def load_model(folder, step, device, dtype):
    """What find_model has found -> gpt.GPT in eval mode on `device`, computing in `dtype`, to go
    on training"""
    from gpt import GPT, GPTConfig
    model_state, _, meta = checkpoint.load(folder, step, optimizer=False)
    model = GPT(GPTConfig(**meta["model"]), dtype)
    put_weights(model, model_state)
    return model.to(device).eval()

def load_to_use(folder, step, device, dtype):
    """What find_model has found -> model that is not trained any more: its weights are kept in
    dtype. In bfloat16 that takes half the memory and no cast at each use; a forward pass gives the
    same bits."""
    return load_model(folder, step, device, dtype).to(dtype)
