"""
Two minutes that show whether this machine, or a job of this site, cannot be hurt: a small training
is stopped by a time limit, killed in the middle, and gone on with; then its bits are compared with
those of one that nobody has disturbed. Under Slurm the job also puts itself back into the queue.

    bash speedrun.sh --rehearse
    sbatch --gpus-per-node=2 --cpus-per-task=8 --time=00:10:00 slurm_speedrun.sbatch --rehearse

Works in $NANOCHAT_BASE_DIR/rehearsal-NUMBER, of the job or process, and removes it at the end.
Exit code 0: "your site: works".
"""
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

import causes
import checkpoint
import common
import pipeline
import plan
import slurm
from lock import holds_open

def number():
    """Whose rehearsal this is: the job's that this one goes on with, this job's, or process's."""
    for job in re.findall(r"\d[\d_]*", os.environ.get("SLURM_JOB_DEPENDENCY", "")):
        if (pipeline.base_dir() / f"rehearsal-{job}").exists():
            return job
    return slurm.job_name() if IN_JOB else os.getpid()

IN_JOB = ["--slurm"] if "--slurm" in sys.argv else []
FLAGS = [word for word in sys.argv[1:] if word != "--slurm"]
FOLDER = pipeline.base_dir() / f"rehearsal-{number()}"
LOG = FOLDER / "log.txt"
STEPS = 120
PATIENCE = 240  # seconds for one training; on a laptop it takes ten
TRAINING = ["--depth=1", "--max_seq_len=128", "--compile=False",
            "--eval_every=0", "--sample_every=0", "--eval_tokens=4000", "--save_minutes=0.0",
            f"--num_steps={STEPS}"]

def tokens_a_step():
    """1,024 or nearly so, in rows of 128 that all processes can share."""
    usual = plan.default_nproc(plan.gpus_here(bool(IN_JOB)))
    nproc = [usual, *(word.removeprefix("--nproc=") for word in FLAGS)][-1]
    nodes = int(os.environ["SLURM_NNODES"]) if IN_JOB else 1
    ranks = nodes * int(nproc)
    return 128 * ranks * max(1, 8 // ranks)

def environment(name):
    # inside, nothing is requeued or submitted: that is tried once, at the end
    return {**os.environ, "NANOCHAT_BASE_DIR": str(FOLDER / name), "NANOCHAT_GO_ON": "",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # a GPU's bits, too (see compute.py)

def begin(name, *flags):
    """Starts the training of FOLDER/name as speedrun.sh does. -> its launcher, a Popen"""
    words = ["toy", "1", "--run", "data", "prepare_data.py", "--run", "base", "base_train.py",
             *TRAINING, f"--total_batch_size={tokens_a_step()}", *flags,
             "--given", *FLAGS, *IN_JOB, "--only=base", "--skip-trial"]
    with open(LOG, "a", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, pipeline.REPO / "launch.py", *words],
                                env=environment(name), stdout=log, stderr=log)

def end_of(launcher):
    """-> its exit code; TimeoutExpired where it takes too long"""
    try:
        return launcher.wait(PATIENCE)
    finally:
        launcher.terminate()  # where it takes too long: the training saves and stops

def folder_of(name):
    return FOLDER / name / "toy/base_checkpoints/d1"

def saved(name):
    """The step of the newest checkpoint, -1 for none."""
    return max(checkpoint.steps(folder_of(name)), default=-1)

def prepare():
    """A small toy world, in two folders alike."""
    for words in (["prepare_data.py", "--data=toy", "--depth=1", "--size=0.02"],
                  ["tok_train.py", "--data=toy", "--vocab_size=512"]):
        with open(LOG, "a", encoding="utf-8") as log:
            code = subprocess.run(pipeline.inside("python", *words), cwd=pipeline.REPO, stdout=log,
                                  env=environment("straight"), stderr=log, check=False).returncode
        common.check(code == 0, f"{words[0]} ended with {code}")
    shutil.copytree(FOLDER / "straight", FOLDER / "broken")
    return "a small toy world was made"

# -------------------------------------------------------------------------------------------------
# what is tried; each says what it has found

def nobody_disturbs():
    code = end_of(begin("straight"))
    last_error = "".join(f" ({line})" for line in causes.errors_in(LOG)[:1])
    common.check(code == 0, f"a small training ended with {code}{last_error}")
    seconds = common.read_json(folder_of("straight") / "phase.json")["seconds"]
    speed = STEPS * tokens_a_step() / seconds
    return f"a training of {STEPS} steps, {speed:,.0f} tokens/s with a save a step"

def time_limit():
    code = end_of(begin("broken", "--time_limit=0.005"))
    common.check(code == 75 and 0 <= saved("broken") < STEPS,
                 f"a time limit ended with {code}, saved at step {saved('broken')}")
    return f"a time limit: saved at step {saved('broken')} and stopped"

def kill():
    before, launcher = saved("broken"), begin("broken")
    latest = time.monotonic() + PATIENCE
    while saved("broken") <= before and launcher.poll() is None and time.monotonic() < latest:
        time.sleep(0.01)
    record = common.read_json(folder_of("broken") / "phase.json")
    common.check(launcher.poll() is None, "the training to be killed ended by itself")
    common.check(holds_open(record["pid"], folder_of("broken") / "lock.json"),
                 f"process {record['pid']} is not the training (a container with processes of its "
                 "own?)")
    os.kill(record["pid"], signal.SIGKILL)
    code = end_of(launcher)
    common.check(code not in (0, 2, 75), f"a training that was killed ended with {code}")
    return f"SIGKILL after step {saved('broken')}: noticed (exit {code})"

def go_on():
    code = end_of(begin("broken"))
    common.check(code == 0 and saved("broken") == STEPS,
                 f"the same command again ended with {code}")
    return "the same command went on to the end"

def compare():
    def left(name):
        lines = common.read_json_lines(folder_of(name) / "metrics.jsonl")
        return (checkpoint.files(folder_of(name), STEPS),
                [{k: v for k, v in line.items() if k != "clock"} for line in lines])
    (files, lines), (others, other_lines) = left("straight"), left("broken")
    differing = [name for name in checkpoint.names(STEPS)[:2] if files[name] != others[name]]
    common.check(not differing, f"the bits of {', '.join(differing)} differ from those of the "
                 "training that nobody has disturbed")
    common.check(lines == other_lines, "the lines of metrics.jsonl differ")
    return f"model, optimizer and {len(lines)} lines of metrics are equal, bit for bit"

def the_disk():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    stat = os.statvfs(FOLDER)
    free, inodes = shutil.disk_usage(FOLDER).free / 1e9, stat.f_favail
    common.check(free > 1.0 and (inodes > 10_000 or stat.f_files == 0),
                 f"{free:.1f} GB and {inodes:,} inodes are free in {pipeline.base_dir()}")
    return f"{free:,.0f} GB and {inodes:,} inodes free ({size / 1e6:.0f} MB were used)"

def the_job():
    end = slurm.end_time()
    common.check(end is not None, "neither SLURM_JOB_END_TIME nor scontrol says when this job "
                 "ends: it would be killed instead of saved; give every training "
                 "--time_limit=MINUTES")
    return f"the job's end is known: in {common.duration(end - time.time())}"

# -------------------------------------------------------------------------------------------------

def end():
    """Where nothing is missing: removes what was made."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    print("your site: works")
    return 0

def main():
    common.check(all(re.fullmatch(r"--nproc=[1-9]\d{0,3}", word) for word in FLAGS),
                 f"--rehearse takes --nproc=N alone, not {' '.join(FLAGS)}")
    mark = FOLDER / "goes_on"
    if mark.exists():  # by a job that has put itself back into the queue
        print("ok       the job has gone on by itself, on", platform.node())
        return end()
    shutil.rmtree(FOLDER, ignore_errors=True)
    with common.writing(pipeline.base_dir(), code=2):
        FOLDER.mkdir(parents=True)
    print(f"rehearsal on {platform.node()} in {FOLDER}: Python {platform.python_version()}",
          flush=True)
    for what in (prepare, nobody_disturbs, time_limit, kill, go_on, compare, the_disk,
                 *([the_job] if IN_JOB else [])):
        began = time.monotonic()
        try:
            found = what()
        except (KeyError, OSError, common.Failure, subprocess.SubprocessError) as e:
            missing = f"{what.__name__}: {e}"
            print("MISSING ", missing)
            print(f"your site: 1 missing: {missing}; all that was said: {LOG}")
            return 1  # those behind it build on it
        print(f"ok       {found} ({time.monotonic() - began:.0f} s)", flush=True)
    if not IN_JOB:
        return end()
    mark.touch()
    line, requeued = slurm.after_attempt(75, False, ["--rehearse", *FLAGS])
    print(line, flush=True)
    if requeued:  # Slurm ends this attempt now
        time.sleep(300)
    if slurm.NOTHING_TO_TYPE in line:
        return 0
    print("note     neither requeueing nor submitting from a job is permitted: after every time "
          "limit the command is to be typed again")
    return end()

if __name__ == "__main__":
    sys.exit(main())
