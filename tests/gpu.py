"""
What a CPU cannot show, checked on one NVIDIA GPU: bash tests/gpu.sh

    python tests/gpu.py                  # every check; one table; 0 if all is well, else 1
    python tests/gpu.py decoding resume  # those with one of these words in their name
    python tests/gpu.py --device=cpu     # the checks themselves, at tiny sizes, on a CPU

A check takes Here and gives (ok, what was measured); ok is None where it could not be made. No GPU
has run it yet: its limits of speed come from data sheets.
"""
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch
import torch.distributed as dist

import checkpoint
import common
import compute
import engine
import gpt
import measure
import memory
import optim
import pipeline
import tokenizer as tok
from conftest import BYTES, RATES, random_model

# (dtype, compiled): the furthest that a loss and a gradient may be from float32 eager, as shares;
# bfloat16 keeps 8 bits, so a rounding is 0.4 %; float16 keeps 11
FURTHEST = {(torch.float32, True): (1e-4, 1e-3), (torch.bfloat16, False): (0.01, 0.1),
            (torch.bfloat16, True): (0.01, 0.1), (torch.float16, False): (0.001, 0.005),
            (torch.float16, True): (0.001, 0.005)}
LEAST_MFU = {12: 0.25, 20: 0.35}  # less, and something is wrong
GOAL_TIMES = 1.3    # of the time in which the memory could deliver the weights, for a token
LONGEST_TOKEN = 0.1  # seconds: the launches of a d20's 500 kernels should take a tenth of it
# furthest_from_best's limits; rounding alone gives less, a state left out more (test_gpu.py)
MOST_BELOW = {torch.float32: 0.01, torch.bfloat16: 1.0, torch.float16: 0.2}
FROM_FORMULA = 0.1  # the share that memory may be from what memory.py predicts

@dataclass(frozen=True)
class Here:
    """Where the checks run: on what, and a folder that goes away after them."""
    device: torch.device
    folder: Path

    @property
    def cuda(self):
        return self.device.type == "cuda"

    def config(self, depth):
        """The real shape of a depth; on a CPU a tiny one, since there only the check is checked."""
        if self.cuda:
            return gpt.config_from_depth(depth, 32768, 2048)
        return gpt.config_from_depth(depth // 6, 512, 64)

    def computing(self):
        """What measure.py's functions take: as in training, on a CPU eager in float32."""
        dtype = "bfloat16" if self.cuda else "float32"
        return (("device", self.device.type), ("dtype", dtype), ("threads", 1),
                ("compile", self.cuda))

def make(config, device, dtype, seed=0):
    """-> (model, optimizer); the blocks of a fresh model do nothing, these do"""
    model = gpt.GPT(config, dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.transformer.h:
            for linear in (block.attn.c_proj, block.mlp.c_proj):
                linear.weight.normal_(0.0, 0.02, generator=generator)
    model.to(device)
    return model, optim.make_optimizer(model, RATES, 0.1, 0.1, dtype)

def batch(config, rows, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, config.sequence_len + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    return tokens[:, :-1], tokens[:, 1:]

# -------------------------------------------------------------------------------------------------
# numbers

def loss_and_gradient(here, dtype, compiled):
    """-> (loss, gradient of all weights as one vector) of one batch"""
    config = gpt.config_from_depth(4, 8192, 512) if here.cuda else here.config(12)
    model, optimizer = make(config, here.device, dtype)
    forward = torch.compile(model, dynamic=False) if compiled else model
    x, y = batch(config, 8, here.device)
    loss = forward(x, y) / y.numel()
    optimizer.scaled(loss).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return loss.item(), gradients / optimizer.loss_scale

def dtypes_and_compile(here):
    torch.set_float32_matmul_precision("highest")  # else products of float32 are in TF32
    true_loss, true = loss_and_gradient(here, torch.float32, False)
    ok, said = True, []
    for (dtype, compiled), (loss_share, gradient_share) in FURTHEST.items():
        if compiled and not here.cuda:
            continue  # minutes, and other tests compile on a CPU
        loss, gradient = loss_and_gradient(here, dtype, compiled)
        loss_off = abs(loss / true_loss - 1)
        gradient_off = ((gradient - true).norm() / true.norm()).item()
        ok = ok and loss_off <= loss_share and gradient_off <= gradient_share
        name = f"{str(dtype)[6:]} {'compiled' if compiled else 'eager'}"
        said.append(f"{name} loss {loss_off:.1e} gradient {gradient_off:.1e}")
    return ok, "off by: " + ", ".join(said)

def cpu_and_gpu(here):
    """The losses of ten steps of the same training."""
    torch.set_float32_matmul_precision("highest")
    config = gpt.config_from_depth(2, 512, 128)
    losses = []
    for device in (torch.device("cpu"), here.device):
        model, optimizer = make(config, device, torch.float32)
        for step in range(10):
            x, y = batch(config, 4, device, seed=step % 2)
            loss = model(x, y) / y.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    furthest = max(abs(a - b) for a, b in zip(losses[:10], losses[10:]))
    learned = losses[0] - losses[9]
    return furthest < 1e-3 and learned > 0.01, (
        f"furthest {furthest:.1e}, loss {losses[0]:.3f} -> CPU {losses[9]:.4f}, "
        f"{here.device.type} {losses[19]:.4f}")

# -------------------------------------------------------------------------------------------------
# whole processes

def base_train(here, **settings):
    """The words that start base_train.py on a folder of texts, which is made at the first call."""
    texts = here.folder / "texts"
    if not texts.exists():
        texts.mkdir()
        words = ["salt", "river", "over", "the", "a", "grey", "stone", "sings", "and", "falls"]
        draw = random.Random(0)
        for name in ("a.txt", "b.txt"):
            lines = [" ".join(draw.choices(words, k=20)) for _ in range(4000)]
            (texts / name).write_text("\n\n".join(lines))
        tok.save_tokenizer(pipeline.tokenizer_dir(str(texts)), BYTES.ranks)
    tiny = {"depth": 1, "max_seq_len": 64, "total_batch_size": 512, "compile": False, "threads": 1}
    full = {"depth": 4, "max_seq_len": 256, "total_batch_size": 4096}
    settings = {"data": texts, "device": here.device.type, "device_batch_size": 8, "num_steps": 30,
                "eval_every": 0, "eval_tokens": 4096, "sample_every": 0, "save_minutes": 0.0,
                **(full if here.cuda else tiny), **settings}
    return ["base_train.py", *(f"--{name}={value}" for name, value in settings.items())]

def start(here, *words, **env):
    """Starts Python with these words -> the process; what it says goes to its .log"""
    log = here.folder / f"{time.monotonic_ns()}.log"
    with open(log, "w") as f:
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=REPO, stdout=f,
                                   stderr=subprocess.STDOUT, env={**os.environ, **env})
    process.log = log
    return process

def finish(process, seconds=300):
    """-> (its exit code, what it said)"""
    try:
        code = process.wait(seconds)
    finally:
        process.kill()
    return code, process.log.read_text()

def last_line(said):
    return (said.strip().splitlines() or ["it said nothing"])[-1][:200]

def resume(here):
    """A run that was killed ends as one that was not: every weight, every state, every loss."""
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    code, said = finish(start(here, *base_train(here, tag="whole"), **deterministic))
    if code != 0:
        return False, last_line(said)
    stage = pipeline.state_path("base", str(here.folder / "texts"), "whole").parent
    killed = start(here, *base_train(here, tag="killed"), **deterministic)
    while killed.poll() is None and checkpoint.steps(stage / "killed")[:1] < [5]:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    if finish(killed)[0] != -signal.SIGKILL:
        return False, f"it ended before it was killed: {last_line(killed.log.read_text())}"
    code, said = finish(start(here, *base_train(here, tag="killed"), **deterministic))
    if code != 0 or "continuing at step" not in said:
        return False, last_line(said)
    ends = [checkpoint.load(stage / tag, 30)[:2] for tag in ("whole", "killed")]
    weights = [end[0] for end in ends]
    states = [{(name, key): state[key] for name, state in end[1].items() for key in state}
              for end in ends]
    lines = [common.read_json_lines(stage / tag / "metrics.jsonl") for tag in ("whole", "killed")]
    losses = [[line["loss"] for line in each if line["kind"] == "train"] for each in lines]
    differ = [name for old, new in (weights, states) for name in old
              if not torch.equal(torch.as_tensor(old[name]), torch.as_tensor(new[name]))]
    at = said.partition("continuing at step ")[2].split()[0]
    return not differ and losses[0] == losses[1], (
        f"killed and continued at step {at} of 30: {len(differ)} tensors differ, losses "
        f"{'equal' if losses[0] == losses[1] else 'differ'}")

def out_of_memory(here):
    """A trial with half as much again as fits says what does, and that does. A deep model, so that
    these are tens of rows; and eager, since a compiled loss has a piece of graph for each chunk."""
    if not here.cuda:
        return None, "needs a GPU: a CPU's memory belongs to others, too"
    config = gpt.config_from_depth(16, BYTES.vocab_size, 2048)
    one, two = (memory.of_activations(config, rows, torch.bfloat16, False) for rows in (1, 2))
    row = two - one
    rows = 2 * round(0.75 * torch.cuda.mem_get_info()[1] / row)
    outcome = here.folder / "outcome"
    words = base_train(here, depth=16, max_seq_len=2048, total_batch_size=2048 * rows, tag="large",
                       device_batch_size=rows, dtype="bfloat16", compile=False, try_out=True)
    code, said = finish(start(here, *words, NANOCHAT_OUTCOME=str(outcome)))
    advice = json.loads(outcome.read_text()).get("retry_with") if outcome.exists() else None
    if advice != [f"--device_batch_size={rows // 2}"]:
        return False, f"{rows} rows: exit code {code}, advice {advice}: {last_line(said)}"
    code, said = finish(start(here, *words, *advice))
    return code == 0, f"{rows} rows: out of memory; {rows // 2} rows: {last_line(said)}"

def two_ranks_on_one_card(here):
    if not here.cuda:
        return None, "needs a GPU: on a CPU it is allowed"
    count = torch.cuda.device_count()
    outcome = here.folder / "outcome_of_ranks"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count + 1}"]
    process = start(here, *torchrun, *base_train(here, tag="ranks"), NANOCHAT_OUTCOME=str(outcome))
    _, said = finish(process)
    lines = [line for line in said.splitlines() if "processes were asked for" in line]
    code = json.loads(outcome.read_text())["code"] if outcome.exists() else None
    refused = code == 2 and len(lines) > 0 and "Traceback" not in said
    return refused, (lines or [last_line(said)])[0]

def one_rank_sends(here):
    """torchrun with one rank: what NCCL (on a CPU gloo) has sent is what was not sent."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    code, said = finish(start(here, *torchrun, "tests/gpu.py", f"--sends={here.device.type}"))
    return code == 0 and "as without sending" in said, last_line(said)

def sends(device):
    """The worker of one_rank_sends."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    config = gpt.config_from_depth(2, 512, 64)
    ends = []
    for through_the_group in (False, True):
        model, optimizer = make(config, device, torch.float32)
        if through_the_group:
            optimizer.world = 2  # it sends where this is more than 1; there is only itself
        for step in range(2):
            x, y = batch(config, 4, device, seed=step)
            (model(x, y) / y.numel()).backward()
            norm = optimizer.step()
            optimizer.zero_grad()
        ends.append((norm, [p.detach() for p in model.parameters()]))
    equal = ends[0][0] == ends[1][0] and all(map(torch.equal, ends[0][1], ends[1][1]))
    backend = dist.get_backend_config()
    dist.destroy_process_group()
    print(f"{backend}: two steps end {'as' if equal else 'NOT as'} without sending")
    return 0 if equal else 1

# -------------------------------------------------------------------------------------------------
# speed and memory

@functools.cache
def trained(here, depth):
    """Steps as in training, of two micro-batches of as many rows as fit: measure.training's"""
    torch._dynamo.reset()  # it gives up compiling a function for too many shapes
    return measure.training(here.computing(), -1 if here.cuda else 2, 6, here.config(depth), 2)

def mfu(here, depth):
    """The model's FLOP a second, of what the device could do."""
    found = trained(here, depth)
    (tokens, parts), = found["steps"].items()
    speed = tokens / sum(parts.values())
    said = f"{speed:,.0f} tokens/s, {found['rows']} rows at once, first step {found['first']:.0f} s"
    peak = compute.peak_flops(here.device)
    if peak is None:
        return None if here.cuda else True, f"{said}; no peak of this device is known"
    share = speed * found["flops"] / peak
    return share >= LEAST_MFU[depth], f"MFU {100 * share:.1f} %, {said}"

def mfu_of_d12(here):
    return mfu(here, 12)

def mfu_of_d20(here):
    return mfu(here, 20)

def memory_against_the_formula(here):
    ok, said = True, []
    for depth in (12, 20):
        found = trained(here, depth)
        ratio = found["predicted"] / found["allocated"]
        ok = ok and abs(ratio - 1) <= FROM_FORMULA
        said.append(f"d{depth} with {found['rows']} rows: predicted {found['predicted'] / 1e9:.2f} "
                    f"GB, measured {found['allocated'] / 1e9:.2f}")
    return ok, "; ".join(said)

def furthest_from_best(here, dtype):
    """Greedy answers to three prompts, in one batch. -> how far a token's logit is at most below
    the best one that the plain forward pass finds there, without a cache. A wrong token is
    several below it."""
    torch.set_float32_matmul_precision("highest")
    model = random_model(64, BYTES.vocab_size, 4, 4, 2, 512).to(here.device)
    model.dtype = dtype
    prompts = [[1, 2, 3], [4], [5, 6] * 10]
    answers = engine.generate(model, measure.ENDLESS, prompts, 24)
    furthest = 0.0
    for prompt, (tokens, _) in zip(prompts, answers):
        assert len(tokens) == 24
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens], device=here.device))[0]
        logits = logits[len(prompt) - 1:-1]
        chosen = logits[torch.arange(24), tokens]
        furthest = max(furthest, (logits.amax(dim=-1) - chosen).max().item())
    return furthest

def decoding(here):
    """
    Fails where tokens are not those of the plain forward pass, or where one takes absurdly long.
    For one row the goal is GOAL_TIMES the time in which the memory could deliver the weights. It
    is printed, and fails nothing: Python launches each kernel, and at one row of a small model the
    launches take longer than the kernels.
    """
    ok, said = True, []
    for dtype, most in MOST_BELOW.items():
        below = furthest_from_best(here, dtype)
        ok = ok and below <= most
        said.append(f"{str(dtype)[6:]} {below:.1e} below the best logit")
    speed = measure.bandwidth(here.device)
    said.append(f"{speed / 1e9:,.0f} GB/s")
    for depth in (12, 20):
        found = measure.decoding(here.computing(), depth if here.cuda else 2, 24)
        times = found[1] / (found["weights"] / speed)
        ok = ok and found[1] <= LONGEST_TOKEN
        said.append(f"d{depth} {1 / found[1]:,.0f} tokens/s, {times:.1f} times the reading (goal: "
                    f"{GOAL_TIMES}; {'ok' if times <= GOAL_TIMES else 'MISSED'})")
    return ok, ", ".join(said)

# -------------------------------------------------------------------------------------------------
# the table

CHECKS = [dtypes_and_compile, cpu_and_gpu, resume, out_of_memory, two_ranks_on_one_card,
          one_rank_sends, mfu_of_d12, mfu_of_d20, memory_against_the_formula, decoding]
WORDS = {True: "ok", False: "FAILED", None: "skipped"}

def run_checks(here, checks):
    """Runs them all, whatever one does; prints the table. -> how many have failed"""
    began = time.monotonic()
    results = []
    print("check | result | seconds | measured")
    for check in checks:
        since = time.monotonic()
        try:
            ok, said = check(here)
        except Exception as e:  # noqa: BLE001  (whatever it is, the others still run)
            ok, said = False, f"{type(e).__name__}: {str(e).strip().splitlines()[:1]}"[:300]
        results.append(ok)
        seconds = time.monotonic() - since
        name = check.__name__.replace("_", " ")
        print(f"{name} | {WORDS[ok]} | {seconds:.0f} | {said}", flush=True)
        if here.cuda:
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if here.cuda else "CPU"
    print(f"{results.count(True)} ok, {results.count(False)} failed, {results.count(None)} skipped "
          f"in {common.duration(time.monotonic() - began)} on {name}, torch {torch.__version__}")
    return results.count(False)

def main(words):
    flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    if "sends" in flags:
        return sends(torch.device(flags["sends"]))
    device = torch.device(flags.get("device", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no NVIDIA GPU here (nvidia-smi says whether there is one)")
        return 1 if os.environ.get("GPU_TESTS_REQUIRED") == "1" else 0
    names = [word for word in words if not word.startswith("--")]
    chosen = [c for c in CHECKS if not names or any(name in c.__name__ for name in names)]
    if not chosen:
        print(f"no check is called so; there are {', '.join(c.__name__ for c in CHECKS)}")
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        return 1 if run_checks(Here(device, Path(folder)), chosen) else 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
