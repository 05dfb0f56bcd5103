"""
--rewind=400 takes a training whose loss has exploded back to its checkpoint of step 400, and skips
the batches that it has trained on since. The record keeps what was skipped, as

    "skipped": [[400, 52], [900, 10]]    # from step 400 on 52 batches further, from 900 on 62

so the batch of a step stays a function of data, seed, step and record, and a run that is killed
after it went back resumes as any other.
"""
import os

import checkpoint
import common
import pipeline

def batch_number(skipped, step):
    """The number of the batch that `step` trains on.
    examples: ([[400, 52]], 399) -> 399;  ([[400, 52]], 400) -> 452"""
    return step + sum(batches for start, batches in skipped if start <= step)

def asked_for(settings, directory, record):
    """The step to go back to, or None. The same command given again, as by Slurm, goes on: a step
    that was gone back to counts again only where the run has given up since, without getting on.
    Failure (code 2) where it got on first, or where a run begins, whose record is empty."""
    step = settings.get("rewind", -1)
    if step == -1 or settings.get("try_out"):
        return None
    common.check(record, f"--rewind={step}: a new run begins in {directory}, which has nothing to "
                 "go back to: leave --rewind out")
    skipped = record.get("skipped", [])
    if not skipped or skipped[-1][0] != step:
        return step
    newest = max(checkpoint.steps(directory), default=0)
    if record.get("gave_up", 0) <= newest:
        return None
    later = [s for s in checkpoint.steps(directory)
             if s > step and checkpoint.problem(directory, s) is None]
    if later:
        common.fail(f"--rewind={step}: the run has gone back there already, got on to step "
                    f"{later[0]} and gave up at step {record['gave_up']}: --rewind={later[0]}")
    return step

def went_back(directory, record, step):
    """The record of a run that has gone back to `step`; changes nothing on disk. Failure (code 2)
    where there is no whole checkpoint of it, or nothing was trained since."""
    steps = checkpoint.steps(directory)
    if checkpoint.problem(directory, step) is not None:
        whole = [str(s) for s in steps if checkpoint.problem(directory, s) is None]
        common.fail(f"--rewind={step}: {directory} holds no whole checkpoint of step {step}; there "
                    f"is {', '.join(whole) or 'none'}")
    lines = common.read_json_lines(directory / "metrics.jsonl")
    # a damaged line may lack a key
    trained = [line.get("step", -1) + 1 for line in lines if line.get("kind") == "train"]
    end = max([steps[0], record.get("gave_up", 0), *trained])
    common.check(end > step, f"--rewind={step}: no batch was trained on since step {step}, so "
                 "there is nothing to skip: leave --rewind out")
    skipped = record.get("skipped", [])
    batches = batch_number(skipped, end - 1) + 1 - batch_number(skipped, step)
    common.print0(f"going back from step {end:,} to step {step:,}, skipping {batches:,} batches")
    kept = {key: value for key, value in record.items() if key != "gave_up"}
    earlier = [entry for entry in skipped if entry[0] <= step]
    # until the loop begins, which may be in a later start
    return {**kept, "skipped": [*earlier, [step, batches]], "going_back": True}

def put_aside_later(directory, step):
    """Renames the checkpoints that are later than `step` into a folder beside, with the date."""
    later = [s for s in checkpoint.steps(directory) if s > step]
    aside = common.aside_name(directory)
    for other in later:
        aside.mkdir(exist_ok=True)
        # the manifest last: with it a death in the middle leaves what is found again
        for name in [*checkpoint.names(other), checkpoint.manifest_name(other)]:
            if (directory / name).exists():
                os.replace(directory / name, aside / name)
        common.fsync_dir(aside)
        common.fsync_dir(directory)
        common.print0(f"the checkpoint of step {other:,} is kept in {aside}")

def give_up(run, why, step):
    """Failure (code 1): at `step` the training has gone wrong for good. It names the last good
    checkpoint and the command that goes back to it."""
    run.update_record(gave_up=step)
    saved = checkpoint.newest(run.directory)
    said = f"{why}; {run.last_good()}"
    otherwise = "lower the learning rates, or look at the data"
    if run.record.get("chosen", {}).get("dtype") == "float16":
        otherwise += ", or compute in float32 (--dtype=float32)"
    if saved is None or run.try_out:
        common.fail(f"{said}: {otherwise}", code=1)
    back = pipeline.setting_for(run.name, f"rewind={saved}")
    common.fail(f"{said}; {back} goes back to step {saved} and skips the batches up to step "
                f"{step}; else {otherwise}", 1, f"{run.command} --rewind={saved}")
