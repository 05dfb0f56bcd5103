"""
What every phase shares: paths, printing, errors, stopping, devices, random numbers, metrics. Only the standard library
is imported here, torch inside the functions that need it, so that a script can check its inputs in milliseconds and
catches signals from its first line on.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

REPO = Path(__file__).resolve().parent
STAGES = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
SHARED_DATA = ("fineweb_edu", "climbmix")  # these live where nanochat's users have them; every other data set has a folder of its own

# ---------------------------------------------------------------------------------------------------------------------
# paths: one function owns each

def base_dir():
    """$NANOCHAT_BASE_DIR, by default ~/.cache/nanochat"""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser().absolute()

def is_folder_data(data):
    """True where `data` is the path of the user's own folder and not a name that we know."""
    return data not in SHARED_DATA and data != "toy"

def data_root(data):
    """The state folder of one data set: "fineweb_edu" -> base_dir(), "toy" -> base_dir()/toy, "/x/books" -> base_dir()/books-1a2b3c4d"""
    if data in SHARED_DATA:
        return base_dir()
    if data == "toy":
        return base_dir() / "toy"
    folder = Path(data).expanduser().resolve()
    return base_dir() / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"

def tokenizer_dir(data):
    return data_root(data) / "tokenizer"

def base_data_dir(data):
    """climbmix has its own, as nanochat has it: its files have the names of fineweb_edu's"""
    return Path(data).expanduser().resolve() if is_folder_data(data) else data_root(data) / ("base_data_climbmix" if data == "climbmix" else "base_data")

def token_dir(data):
    return data_root(data) / "tokens"

def report_dir(data):
    return data_root(data) / "report"

def task_dir(data):
    return (data_root("toy") if data == "toy" else base_dir()) / "task_data"

def eval_bundle_dir(data):
    return (data_root("toy") if data == "toy" else base_dir()) / "eval_bundle"

def stage_dir(stage, data, tag):
    """("sft", "toy", "d4") -> .../toy/chatsft_checkpoints/d4"""
    return data_root(data) / STAGES[stage] / tag

def trial_path(data, tag):
    """What trial.py found for the models of this tag: the rows that fit into memory, and what it was trying when it was killed."""
    return data_root(data) / f"trial_{tag}.json"

def eval_path(kind, stage, data, tag):
    """The result file of an evaluation, kind "core" or "chat"."""
    return report_dir(data) / f"{kind}_{stage}_{tag}.json"

# ---------------------------------------------------------------------------------------------------------------------
# printing, errors and outcomes

def rank_world():
    """(rank, local_rank, world) as torchrun sets them; (0, 0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def print0(*args):
    if rank_world()[0] == 0:
        print(*args, flush=True)

outcome_hook = None  # phase.py puts its record-writing here once a phase has begun

def outcome(code, reason, next_command=None):
    """Leaves the outcome where a launcher finds it: torchrun turns every exit code into 1."""
    if rank_world()[0] == 0:
        try:
            path = os.environ.get("NANOCHAT_OUTCOME")
            if path:
                atomic_write(Path(path), json.dumps({"code": code, "reason": reason, "next": next_command}))
            if outcome_hook:
                outcome_hook(code, reason, next_command)
        except OSError as e:  # a full disk: the message and the exit code still have to get out
            print(f"the outcome could not be recorded: {e}", file=sys.stderr, flush=True)

def fail(message, code=2, next_command=None):
    """Ends the program with one clear line: what, where, what to do. code 2: nothing was started; 1: it failed."""
    message = " ".join(str(message).split())
    if rank_world()[0] == 0:
        print(f"error: {message}" + (f"; run: {next_command}" if next_command else ""), file=sys.stderr, flush=True)
    outcome(code, message, next_command)
    sys.stdout.flush()
    raise SystemExit(code)

def only_asked():
    """Ends a process that speedrun.sh started only to hear whether its phase is done: it is not."""
    if os.environ.get("NANOCHAT_ASK"):
        raise SystemExit(3)

def check(condition, message, next_command=None):
    if not condition:
        fail(message, next_command=next_command)

# ---------------------------------------------------------------------------------------------------------------------
# stopping: a handler only sets a flag; loops look at it where everything can be saved

_stop = {"reason": None, "limit": math.inf, "end": math.inf, "room": 0.0, "save": None, "now": time.time}

def install_stop_handlers():
    """SIGTERM, SIGINT, SIGUSR1 ask for a save and a stop. A second SIGINT ends the process at once; under torchrun it does not, since Ctrl-C may come there twice."""
    def handler(signum, frame):
        if signum == signal.SIGINT and _stop["reason"] and "TORCHELASTIC_RUN_ID" not in os.environ:
            os._exit(130)
        _stop["reason"] = f"signal {signal.Signals(signum).name}"
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), handler)
    if "NANOCHAT_OUTCOME" in os.environ and sys.platform == "linux":
        # started by speedrun.sh: where that is killed outright, this process saves and stops too instead of running on unseen
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

def slurm_end_time():
    """End of this Slurm job in seconds since the epoch, or None. Slurm 22.05 (Debian 12) sets no SLURM_JOB_END_TIME, so squeue or scontrol is asked."""
    if os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(os.environ["SLURM_JOB_END_TIME"])
    job = os.environ.get("SLURM_JOB_ID")
    for command in (["squeue", "-h", "-j", job, "-o", "EndTime=%e"], ["scontrol", "show", "job", "-o", job]) if job else ():
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, TypeError):
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
            return time.mktime(time.strptime(re.search(r"\bEndTime=(\S+)", answer)[1], "%Y-%m-%dT%H:%M:%S"))
    return None

def set_deadline(time_limit=None, now=time.time):
    """From here on stop_requested() also answers when `time_limit` minutes have passed, or in time before the end of the Slurm job."""
    _stop["now"], _stop["limit"] = now, now() + 60.0 * time_limit if time_limit is not None else math.inf
    slurm = slurm_end_time() if rank_world()[0] == 0 else None
    _stop["end"], _stop["room"], _stop["save"] = slurm or math.inf, (slurm or 0.0) - now(), None

def save_took(seconds):
    """Tells how long a whole save took: the margin before the end of a Slurm job follows from the longest."""
    _stop["save"] = max(seconds, _stop["save"] or 0.0)

def deadline():
    """When to stop, in seconds since the epoch; infinity for never. Before Slurm's end: three of the longest saves and half a minute, or two
    minutes while none was measured, but never more than a quarter of what the job had left (short jobs must get on, too)."""
    save = _stop["save"]
    margin = max(0.0, min(120.0 if save is None else 30.0, _stop["room"] / 4)) + 3 * (save or 0.0)
    return min(_stop["limit"], _stop["end"] - margin)

def budget_line(name, seconds_left, deadline, now):
    """What there is to say about the time, once seconds per step are known; None without a deadline.
    example: "base needs 7.1 h more, this job has 4.9 h left: it will stop at 23:41 with everything saved and continue in its next run" """
    if deadline == math.inf:
        return None
    def hours(seconds):
        return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(0, seconds) / 60:.1f} min"
    line = f"{name} needs {hours(seconds_left)} more, this job has {hours(deadline - now)} left"
    if now + seconds_left <= deadline:
        return line
    return f"{line}: it will stop at {time.strftime('%H:%M', time.localtime(deadline))} with everything saved and continue in its next run"

def stop_requested():
    """Why this process should stop ("signal SIGTERM", "deadline"), or None."""
    if _stop["reason"] is None and _stop["now"]() >= deadline():
        _stop["reason"] = "deadline"
    return _stop["reason"]

# ---------------------------------------------------------------------------------------------------------------------
# devices and ranks

Compute = namedtuple("Compute", "device dtype threads compile rank local_rank world")

_patient = {"group": None}  # the group in which the other ranks wait while rank 0 tokenises, for hours if need be

def init_distributed():
    """Joins the process group when started by torchrun (gloo for CPU tensors, NCCL for CUDA ones); else does nothing.
    A rank that dies ends the job at once (gloo's connection breaks, torchrun stops the others); one that hangs after half an hour."""
    rank, local_rank, world = rank_world()
    if world > 1:
        import datetime
        import torch
        import torch.distributed as dist
        cuda = torch.cuda.is_available()
        if cuda:
            here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            check(here <= gpus, f"{here} processes were asked for on this machine and it has {gpus} GPUs: at most --nproc={gpus}, or --nproc_per_node of torchrun")
            torch.cuda.set_device(local_rank)
        patience = datetime.timedelta(minutes=30)
        store = next(dist.rendezvous("env://", timeout=patience))[0]
        # torchrun starts workers again on the same store, where a quick rank would find the address of a dead one (pytorch issue 135712): each life writes
        # under a name of its own. Only on one node: each node's torchrun counts its own restarts, and the names would differ.
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else 0
        store = dist.PrefixStore(f"life_{life}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=patience)
        _patient["group"] = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))

def on_rank0(function, *args, **kwargs):
    """function's result on every rank, computed on rank 0 alone; an exit there is an exit everywhere."""
    if rank_world()[2] == 1:
        return function(*args, **kwargs)
    import torch.distributed as dist
    box = [None, None]
    if rank_world()[0] == 0:
        try:
            box[0] = function(*args, **kwargs)
        except SystemExit as e:
            box[1] = e.code or 0
    dist.broadcast_object_list(box, src=0, group=_patient["group"])
    if box[1] is not None:
        if box[1] == 75:
            leave(75)
        dist.destroy_process_group()
        raise SystemExit(box[1])
    return box[0]

def gather(value):
    """The values of all ranks, a list in their order, on every rank."""
    values = [value] * rank_world()[2]
    if len(values) > 1:
        import torch.distributed as dist
        dist.all_gather_object(values, value)
    return values

def leave(code=0):
    """Ends this process; under torchrun with 0, since it would start a worker again that says anything else."""
    for name in ("SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # told once more while Python winds up, when its handlers are gone, it would die of it
    if rank_world()[2] > 1:
        import torch.distributed as dist
        dist.destroy_process_group()
    raise SystemExit(0 if "TORCHELASTIC_RUN_ID" in os.environ else code)

def agree(code):
    """The largest `code` (a small int) of all ranks, so that they stop or save at the same step."""
    if rank_world()[2] == 1:
        return code
    import torch
    import torch.distributed as dist
    box = torch.tensor([code])
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box.item())

def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

def init_compute(settings, recorded=None):
    """
    Chooses device, dtype, threads and whether to compile, from the settings of these names: "auto" (threads: 0) takes what
    the phase recorded when it was first started (other choices would change the bits), else measures or asks the machine.
    -> Compute; put `chosen(compute)` into the record.
    """
    only_asked()
    import shutil
    import torch
    rank, local_rank, world = rank_world()
    want = {k: settings[k] if settings[k] not in ("auto", 0) else (recorded or {}).get(k, settings[k]) for k in ("dtype", "threads", "compile")}
    device = settings["device"]
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in usable if usable[name]) if device == "auto" else device
    check(usable[device], f"--device={device}: torch sees no GPU of that kind here (nvidia-smi says whether there is one)")
    threads = want["threads"] or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of the ranks on this machine
    torch.set_num_threads(threads)
    device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    dtype = on_rank0(probe_dtype, device) if want["dtype"] == "auto" else want["dtype"]
    compiled = want["compile"]
    if compiled == "auto":  # on a CPU the compiler writes C++
        compiled = device.type == "cuda" or (device.type == "cpu" and bool(shutil.which("g++") or shutil.which("clang++")))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu" and sys.platform == "linux":
        # large blocks otherwise go back to the system at every free and fault in anew: 11,500 -> 15,400 tokens/s on two cores (d4, eager)
        import ctypes
        with contextlib.suppress(AttributeError):  # a C library without mallopt
            ctypes.CDLL(None).mallopt(-4, 0)             # M_MMAP_MAX: no block by mmap
            ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD: keep what was freed
    return Compute(device, getattr(torch, dtype), threads, str(compiled) == "True", rank, local_rank, world)

def chosen(compute):
    """What of a Compute belongs into the record: it decides about the bits."""
    return {"dtype": str(compute.dtype).split(".")[1], "threads": compute.threads, "compile": str(compute.compile)}

def probe_dtype(device):
    """"bfloat16" where a matrix product is measured to be at least 1.3 times faster in it than in float32, else "float32"."""
    import torch
    def seconds(dtype):
        a = torch.ones(1024, 512, device=device, dtype=dtype)
        times = []
        for _ in range(5):
            t0 = time.perf_counter()
            (a @ a.T).sum().item()  # .item() waits for the device
            times.append(time.perf_counter() - t0)
        return min(times)
    if device.type == "mps":
        return "float32"
    return "bfloat16" if 1.3 * seconds(torch.bfloat16) < seconds(torch.float32) else "float32"

# ---------------------------------------------------------------------------------------------------------------------
# randomness, files, metrics

def rng(seed, *keys):
    """The one source of randomness: a numpy Generator that is a pure function of (seed, keys), all whole numbers >= 0.
    example: rng(1, 7).integers(10) is the same number on every machine, whatever was drawn before."""
    import numpy as np
    return np.random.default_rng([int(seed), *(int(k) for k in keys)])

def fsync_dir(directory):
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

def atomic_write(path, content):
    """Writes text or bytes to `path` so that a reader, or a death of this process, sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        with open(temporary, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)

def read_json(path):
    """The JSON in `path`, or None where there is no file or no JSON in it."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None

def sha256_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

lock_hook = None  # phase.py: ends this process when another one has taken its folder over

def append_metrics(path, record):
    """Appends one JSON line. A reading of the clock belongs into record["clock"], everything else is reproducible."""
    if rank_world()[0] == 0:
        if lock_hook:
            lock_hook()
        try:
            with open(path, "a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as e:
            fail(f"could not write to {path}: {e}; what is saved is untouched, make room or make it writable and run the same command again", code=1)

def read_metrics(path):
    """All whole lines (dicts) of a metrics file; a line torn by a death is left out."""
    records = []
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]

def trim_metrics(path, step):
    """Before a resume at `step`: keeps what steps before it wrote (they will not run again) and drops the rest."""
    if rank_world()[0] == 0 and Path(path).exists():
        kept = [r for r in read_metrics(path) if r["step"] < step]
        atomic_write(path, "".join(json.dumps(r) + "\n" for r in kept))

def clock(seconds):
    """examples: 42 -> "42s", 750 -> "12m30s", 9000 -> "2h30m" """
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
