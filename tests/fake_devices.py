"""
What devices would say that are not here. On a faked device: whether a step of training, or
decoding, makes a tensor on the CPU or mixes devices. On faked ranks: what each of 8, 64 and 1,024
keeps of the optimizer's states and sends in a step, against what that should be.

    python tests/fake_devices.py      # prints both, exits 1 if one is not as it should be

FakeTensorMode runs every operation on shapes, dtypes and devices alone. A torch without CUDA cannot
even name it in a backward pass, so the device is torch's slot for one of your own, called "gpu".
"""
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import engine
import gpt
import optim
from conftest import BYTES, RATES

READ = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
ARCHS = ("modern", "nanochat_2025")
WORLDS = (1, 8, 64, 1024)
class Watched(TorchDispatchMode):
    """Notes the operations that make a tensor on the CPU. Reading a number off the device, of which
    a fake one has none, gives 0."""

    def __init__(self):
        super().__init__()
        self.on_cpu = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READ:
            return 0
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.on_cpu.add(str(func))
        return result

def make_device():
    """Registers the device "gpu" in this process, for good."""
    _setup_privateuseone_for_python_backend("gpu")
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([1], device="gpu") goes through a copy

def make(config):
    """-> (model, optimizer) on the faked device"""
    with torch.device("gpu"):  # only here: elsewhere it would hide what this looks for
        model = gpt.GPT(config, torch.bfloat16)
    return model, optim.make_optimizer(model, RATES, 1.0, 0.1, torch.bfloat16)

def problem_of_training(arch):
    """-> None, or what is wrong with a forward, a backward and an optimizer step"""
    with FakeTensorMode(), Watched() as watched:
        model, optimizer = make(gpt.config_from_depth(4, 512, 64, arch, bigram_vocab_size=100))
        idx = torch.zeros(3, 64, dtype=torch.long, device="gpu")
        try:
            model(idx, idx).backward()
            optimizer.step()
        except RuntimeError as e:
            return f"{type(e).__name__}: {e}"
        found = [*model.parameters(), *(p.grad for p in model.parameters())]
        found += [state for bucket in optimizer.buckets for state in bucket.state.values()]
        if {tensor.device.type for tensor in found} != {"gpu"}:
            return "a weight, gradient or state is not on the device"
    return f"on the CPU: {', '.join(sorted(watched.on_cpu))}" if watched.on_cpu else None

def problem_of_decoding(arch):
    """-> None, or what is wrong with generating. Tensors are made on the CPU here, of the prompts
    and of the tokens that were drawn; mixing them with the device's is what is looked for."""
    with FakeTensorMode(), Watched():
        model, _ = make(gpt.config_from_depth(2, 512, 64, arch, bigram_vocab_size=100))
        try:
            engine.generate(model, BYTES, [[1, 2], [3], [3]], 4, temperature=1.0, top_k=5,
                            uniforms=np.zeros((3, 4)))
        except RuntimeError as e:
            return f"{type(e).__name__}: {e}"
    return None

def norm_with_a_tensor_on_the_cpu(x):
    ones = 1 + 0 * torch.arange(x.size(-1))
    return torch.nn.functional.rms_norm(x, (x.size(-1),)) * ones

def check_devices():
    """Prints a line for each arch; the last two show that what is looked for would be found.
    -> whether all is well"""
    well = True
    for arch in ARCHS:
        for what, look in (("training", problem_of_training), ("decoding", problem_of_decoding)):
            problem = look(arch)
            print(f"{what} {arch} on a faked device: {problem or 'ok'}", flush=True)
            well = well and problem is None
    right = gpt.norm
    gpt.norm = norm_with_a_tensor_on_the_cpu
    for what, look in (("training", problem_of_training), ("decoding", problem_of_decoding)):
        problem = look("modern")
        print(f"{what} with a tensor on the CPU put in: {str(problem)[:60]}", flush=True)
        well = well and problem is not None
    gpt.norm = right
    return well

# -------------------------------------------------------------------------------------------------
# ranks

def shard_of(config, world):
    """What a rank keeps and sends, by hand. Of each kind of parameter the optimizer deals out whole
    rows of a table, or whole matrices of one shape, each rank the same number: where the ranks do
    not divide it, some get rows that stand for nothing.
    -> (bytes of states, bytes sent in a step)"""
    vocab, width = config.vocab_size, config.n_embd
    layers = config.n_layer
    kinds = [  # (how many, float32 numbers of one, states of one)
        (layers * 4, width * width, width * width + width),  # queries, keys, values, projection
        (layers, 4 * width * width, 4 * width * width + 4 * width),  # into the MLP
        (layers, 4 * width * width, 4 * width * width + 4 * width),  # and out of it
        (vocab, width, 2 * width),  # the embedding
        (vocab, width, 2 * width),  # the head
    ]
    if config.modern:
        gate = gpt.GATE_CHANNELS
        values = (layers + 1) // 2  # every second layer has a value embedding and its gate
        kinds += [(vocab, width, 2 * width)] * values
        kinds += [(values, config.n_kv_head * gate, 2 * config.n_kv_head * gate)]
        # scalars of the residual stream and of the embedding; smear's strength and gate
        kinds += [(1, layers, 2 * layers), (1, layers, 2 * layers), (1, 1, 2), (1, gate, 2 * gate)]
    kept = sent = 0
    for count, numbers, states in kinds:
        share = -(-count // world)
        kept += 4 * share * states
        # a ring passes all but its own part: gradients are summed, then weights gathered
        sent += 2 * 4 * share * numbers * (world - 1)
    return kept, sent

def measured_shard(config, world):
    """The same of optim.py, as rank world - 1 of torch's fake process group."""
    sent = []

    def counted(collective, whole):
        def call(*tensors, **more):
            sent.append(tensors[whole].nbytes * (world - 1) // world)
            return collective(*tensors, **more)
        return call

    real = dist.reduce_scatter_single, dist.all_gather_single
    dist.init_process_group("fake", rank=world - 1, world_size=world, store=FakeStore())
    try:
        dist.reduce_scatter_single = counted(real[0], 1)
        dist.all_gather_single = counted(real[1], 0)
        with FakeTensorMode(), Watched():
            model, optimizer = make(config)
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.step()
            kept = sum(s.nbytes for bucket in optimizer.buckets for s in bucket.state.values())
    finally:
        dist.reduce_scatter_single, dist.all_gather_single = real
        dist.destroy_process_group()
    return kept, sum(sent)

def check_ranks(depths=(12, 20)):
    """Prints the table. -> whether optim.py does what the formula says, to the byte"""
    well = True
    print("depth | arch | ranks | states of a rank, MB | of 1 rank's | sent by a rank, MB a step")
    for depth in depths:
        for arch in ARCHS:
            config = gpt.config_from_depth(depth, 32768, 2048, arch)
            alone = shard_of(config, 1)[0]
            for world in WORLDS:
                found, expected = measured_shard(config, world), shard_of(config, world)
                kept, sent = found
                wrong = "" if found == expected else f" | should be {expected}, not {found}"
                print(f"d{depth} | {arch} | {world:,} | {kept / 1e6:,.1f} | {kept / alone:.2%} | "
                      f"{sent / 1e6:,.1f}{wrong}", flush=True)
                well = well and not wrong
    return well

if __name__ == "__main__":
    make_device()
    devices_are_well = check_devices()
    ranks_are_well = check_ranks()
    sys.exit(0 if devices_are_well and ranks_are_well else 1)
