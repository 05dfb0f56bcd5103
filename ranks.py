"""
The processes that compute together, as torchrun has started them; one alone without it. What is
called collective must be called by all of them, or they wait for each other.
"""
import datetime
import os
import sys
from dataclasses import dataclass

import common

@dataclass
class Ranks:
    rank: int
    local_rank: int
    world: int
    patient_group: object = None  # in which ranks wait for hours while rank 0 tokenises

    def join(self, device="auto"):
        """
        Joins the process group where torchrun has started this process (gloo for CPU tensors, NCCL
        for CUDA ones); else does nothing. device: the setting of this name. A rank that dies ends
        the job at once (its connection breaks, torchrun stops the others), one that hangs after
        half an hour.
        """
        if self.world == 1:
            return
        import torch
        import torch.distributed as dist
        cuda = device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            here, gpus = common.local_world_size(), torch.cuda.device_count()
            common.check(here <= gpus, f"{here} processes were asked for on this machine and it "
                         f"has {gpus} GPUs: at most --nproc={gpus} (torchrun: --nproc_per_node)")
            torch.cuda.set_device(self.local_rank)
        patience = datetime.timedelta(minutes=30)
        store = next(dist.rendezvous("env://", timeout=patience))[0]
        # torchrun starts workers again on the same store, where a quick rank would find the address
        # of a dead one (pytorch issue 135712): each attempt writes under a name of its own. Only on
        # one node: each node's torchrun counts its own restarts, and the names would differ.
        alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
        end_process = sys.excepthook
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=self.rank,
                                store=dist.PrefixStore(f"attempt_{attempt}", store),
                                world_size=self.world, timeout=patience)
        sys.excepthook = end_process  # torch's own would swallow what ours prints
        self.patient_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))

    def leave(self):
        """Leaves the group; without, gloo's threads may abort the process where it ends."""
        if self.patient_group is not None:
            import torch.distributed as dist
            dist.destroy_process_group()

    def on_rank0(self, function, *args):
        """function's result on every rank, computed on rank 0 alone; a Failure there is one on
        every rank. Collective."""
        if self.world == 1:
            return function(*args)
        import torch.distributed as dist
        box = [None, None]
        if self.rank == 0:
            try:
                box[0] = function(*args)
            except common.Failure as e:
                box[1] = e
        dist.broadcast_object_list(box, src=0, group=self.patient_group)
        result, failure = box
        if failure is not None:
            failure.of_rank_0 = True
            raise failure
        return result

    def all_reduce_max(self, number):
        """The largest of all ranks' whole numbers. Collective."""
        return int(self._all_reduce(int(number), "MAX"))

    def all_reduce_sum(self, number):
        """The sum over all ranks of a number or a tensor of one element, a float. Collective."""
        return self._all_reduce(float(number), "SUM")

    def _all_reduce(self, number, operation):
        if self.world == 1:
            return number
        import torch
        import torch.distributed as dist
        box = torch.tensor(number, dtype=torch.float64)  # on the CPU, so over gloo
        dist.all_reduce(box, op=getattr(dist.ReduceOp, operation))
        return box.item()

    def gather(self, value):
        """The values of all ranks, a list in their order, on every rank. Collective."""
        values = [value] * self.world
        if self.world > 1:
            import torch.distributed as dist
            dist.all_gather_object(values, value)
        return values
