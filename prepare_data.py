"""
Phase 0: brings everything that a later phase reads into the state folder, and opens all of it.

    python prepare_data.py --data=toy                 # generates the toy world: no download
    python prepare_data.py --data=../my/folder        # your own text: only looks at it
    python prepare_data.py --data=toy --check=True    # only looks: exit 0 if all is there, 2 if not
"""
import common
common.install_stop_handlers()

import configurator
import data as dataset
import phase

data = "toy"                 # toy, fineweb_edu, climbmix, or a folder of .parquet, .jsonl(.gz) or .txt files
seed = 1337                  # of the toy world
size = 1.0                   # of the toy world: how much text, relative
# ---- settings below may change at every resume
check = False                # only look, write nothing
start_over = False           # put the old data aside and make it again
settings = configurator.configure(globals())

common.check(0.001 <= size <= 1000, f"--size must be 0.001 to 1000, not {size}")
directory = common.base_data_dir(data)


def damaged():
    """None if every file of the toy world is as it was written, else the first that is not."""
    record = phase.read(directory) or {}
    if "files" not in record:
        return f"{directory} was never filled"
    for name, (length, digest) in record["files"].items():
        path = common.data_root(data) / name
        if not path.exists() or path.stat().st_size != length or common.sha256_file(path) != digest:
            return f"{path} is missing or damaged"
    return None


if data == "toy":
    if check:
        why = damaged()
        common.check(why is None, why, next_command="python prepare_data.py --data=toy")
        common.print0(f"data: all there ({common.data_root(data)})")
        raise SystemExit(0)
    phase.begin(directory, "prepare_data", settings, {}, damaged, start_over)
    import toy_world
    counts = toy_world.generate(common.data_root(data), seed, size)
    root = common.data_root(data)
    files = [p for folder in (directory, common.task_dir(data), common.eval_bundle_dir(data)) for p in sorted(folder.rglob("*"))
             if p.is_file() and not p.name.startswith(".") and p.name not in ("phase.json", "lock.json")]
    phase.done(directory, counts=counts, files={str(p.relative_to(root)): [p.stat().st_size, common.sha256_file(p)] for p in files})
    common.print0("the toy world: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))
else:
    train, val = dataset.dataset_files(data)  # exits with 2 where there is nothing
    common.print0(f"data: {len(train)} files to train on and {len(val)} to validate on in {directory}")
    common.outcome(0, "done")
