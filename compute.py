"""
What is computed with: device, dtype, threads, compiled or not. Chosen once, by a short measurement
or by asking the machine, then recorded and kept when a run resumes: other choices change the bits.
"""
import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import timeit
from dataclasses import dataclass
from pathlib import Path

import torch

import common

# bf16 without sparsity, FLOP/s (vendors' data sheets), looked up by a part of the device's name
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
              "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
              "L40": 181e12, "L4": 121e12, "4090": 165e12, "3090": 71e12}

@dataclass
class Compute:
    device: torch.device
    dtype: torch.dtype
    threads: int   # of a CPU, for each rank
    compile: bool

    def recorded(self):
        """The choices that decide about the bits, as they stand in the record."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "threads": self.threads,
                "compile": str(self.compile), "local_world_size": common.local_world_size()}

    def __str__(self):
        return (f"{self.device.type}, {self.recorded()['dtype']}, {self.threads} threads, "
                f"compile={self.compile}")

def choose_compute(ranks, settings, recorded=None):
    """
    settings: the script's, of which device, dtype, threads and compile count (compile is
    missing where each batch has another shape); "auto" (threads: 0) takes what the run has
    recorded when it was first started, else measures or asks; without what compiling needs steps
    are not compiled. -> Compute. Failure where there is no such device. Collective.
    """
    recorded = dict(recorded or {})
    here = common.local_world_size()
    if recorded.get("local_world_size", here) != here:
        recorded.pop("threads", None)  # that many ranks had other shares of the cores

    def wanted(key):
        asked = settings.get(key, False)
        open_choice = asked == "auto" or (key == "threads" and asked == 0)
        return recorded.get(key, asked) if open_choice else asked

    name = settings["device"]
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if usable(kind))
    check_device(name)
    common.check(settings.get("weights") != "int8" or name == "cpu",
                 "--weights=int8 needs --device=cpu")
    device = torch.device(name, ranks.local_rank) if name == "cuda" else torch.device(name)

    threads = wanted("threads") or cores_of_rank()
    torch.set_num_threads(threads)
    dtype = wanted("dtype")
    if dtype == "auto":
        dtype = ranks.on_rank0(probe_dtype, device)
    compiled = str(wanted("compile"))
    lacking = ranks.on_rank0(lacks, name) if settings.get("compile") == "auto" else ""
    if compiled != "False" and lacking:
        common.print0(f"note: steps are not compiled, and slower, for want of {lacking}")
        if compiled == "True":
            common.print0("warning: so far they were: the last bits will be others; --compile=True "
                          "brings it back, on a machine that can")
    compiled = compiled != "False" and not lacking
    if compiled:
        set_up_compiler()
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
    # Else the threads of a compiled step add up the gradient of an embedding in any order, and two
    # runs of one seed differ in their last bits. Measured: it costs no time on a CPU. On CUDA it
    # does, and needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment: who sets that wants it.
    if name == "cpu" or (name == "cuda" and "CUBLAS_WORKSPACE_CONFIG" in os.environ):
        if compiled:
            torch.use_deterministic_algorithms(True)
        else:  # the same, but it does not import the compiler, which takes a second and a half
            torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # we read none
    if name == "cpu":
        keep_freed_memory()
    return Compute(device, getattr(torch, dtype), threads, compiled)

def usable(kind):
    """Whether there is such a device here: cuda, mps or cpu."""
    if kind == "cpu":
        return True
    return torch.cuda.is_available() if kind == "cuda" else torch.backends.mps.is_available()

def check_device(kind):
    """Failure (code 2) where there is no such device. Asked before anything is written, too."""
    common.check(usable(kind), f"--device={kind}: torch sees no GPU of that kind here (nvidia-smi "
                 "says whether there is one)")

def probe_dtype(device):
    """"bfloat16" where a matrix product is measured to be at least 1.3 times faster in it than in
    float32, else "float32"."""
    def seconds(dtype):
        a = torch.ones(1024, 512, device=device, dtype=dtype)
        # .item() waits for the device
        return min(timeit.repeat(lambda: (a @ a.T).sum().item(), number=1, repeat=5))
    if device.type == "mps":
        return "float32"
    faster = 1.3 * seconds(torch.bfloat16) < seconds(torch.float32)
    return "bfloat16" if faster else "float32"

def cores_of_rank():
    """How many of this machine's cores are for one of its ranks."""
    return max(1, common.cores() // common.local_world_size())

def lacks(kind):
    """What torch.compile needs and is not here, in words; "" where it has all. On a CPU it writes
    C++, which includes Python's headers and is hashed by openssl; Triton writes C that does."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    commands = {"cpu": [compiler, "openssl"], "cuda": [os.environ.get("CC", "gcc")]}
    if kind not in commands:
        return f"a compiler for {kind}"
    missing = [command for command in commands[kind] if not shutil.which(command)]
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        missing.append(f"Python's headers (python3-dev: {header})")
    return " and ".join(missing)

def set_up_compiler():
    """
    Before torch.compile is first called. What is compiled on this kind of machine has a folder of
    its own: the compiler looks it up by the program alone, so that on a shared disk or in an image
    a CPU with AVX2 finds what one with AVX512 has compiled, which leaves half of its numbers
    uncomputed there; the other way round it writes behind the end of arrays (torch 2.13, LOG.md).
    """
    able = [name for name, yes in torch.cpu.get_capabilities().items() if yes is True]
    capability = torch.backends.cpu.get_cpu_capability()
    kind = f"{capability} {sorted(able)} {platform.libc_ver()}"
    own = "cpu-" + hashlib.sha256(kind.encode()).hexdigest()[:8]
    default = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default
    if os.path.basename(folder) != own:  # else it is this process's parent's
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, own)
    # Passes with an autograd.Function in them, gpt.SummedLoss, are looked up there too, by forward
    # and backward, constants included: a later start's first step takes 5 s instead of 11 (LOG.md).
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")
    # It believes the CPU about its instructions, and does not try each of them out by a program:
    # the first compilation of a d4 takes 45 s instead of 55.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

def keep_freed_memory():
    """Large blocks otherwise go back to the system at every free and fault in anew: 11,500 ->
    15,400 tokens/s on two cores (d4, eager)."""
    with contextlib.suppress(AttributeError):  # macOS, musl: no mallopt there
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)            # M_MMAP_MAX: no block by mmap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: keep what was freed

def device_name(device):
    """examples: "NVIDIA H100 80GB HBM3", "cpu" """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

def peak_flops(device):
    """FLOP/s of a device in bf16, None where its name is not known."""
    if device.type != "cuda":
        return None
    name = device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)

def to_device(array, device):
    """numpy array -> tensor on the device, without waiting for the copy on CUDA"""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
