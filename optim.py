"""
The optimizer: Muon for the matrices inside the blocks, AdamW for embeddings, head and scalars.

    optimizer = make_optimizer(model, matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, scalar_lr=0.5,
                               weight_decay=0.1, compute_dtype=torch.bfloat16)
    optimizer.set(lr_scale=0.5, muon_momentum=0.95, muon_weight_decay=0.05)     # the schedule, before each step
    loss.backward(); norm = optimizer.step(); optimizer.zero_grad()

Weights, gradients and states are float32. Under torchrun the model is not wrapped: every rank calls backward on its own
part of the batch, and step() adds the gradients of all ranks together. Each rank owns 1/world of every block (below):
it receives the summed gradient of its part alone, keeps optimizer state for that part alone, updates it, and all ranks
then gather the parts (ZeRO, arXiv 1910.02054). With one process nothing is sent and the same code updates the whole.
Gloo on CPU has both collectives too (torch 2.13), gathering in place included: tests/test_optim.py runs them.

A block is what is sent, sharded and updated as one tensor, along its first dimension: either one large parameter as it
is (an embedding [V, C]), or parameters of one shape stacked ([K, m, n] of K matrices [m, n]; and the many small gates).
Zero rows fill it up to a multiple of world; zeros stay zeros under both rules, so nothing has to know about them.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

# Polar Express (arXiv 2505.16932): for each iteration the odd quintic a x + b x^3 + c x^5 that brings singular values
# nearest to 1, given what the iterations before it left. These five, as nanochat uses them, are for a safety factor of
# 2 % against rounding in bfloat16. Together they take every singular value in [0.001, 1] to [0.85, 1.15].
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
SMALL = 65536  # AdamW parameters under this many elements are stacked, to be one message instead of many

def orthogonalise(matrices, steps, dtype):
    """The nearest matrix with orthonormal rows (or columns, if there are fewer) to each of [K, m, n], roughly: singular
    vectors stay, singular values become about 1. Computed in `dtype` -> [K, m, n] float32. Zero matrices stay zero."""
    tall = matrices.size(-2) > matrices.size(-1)
    X = matrices.mT if tall else matrices  # the products X X^T are then of the short side
    norms = X.norm(dim=(-2, -1), keepdim=True)  # Frobenius, at least the largest singular value
    X = (X / (norms * 1.01 + 1e-6)).to(dtype)
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).float()

def muon_update(p, grad, momentum_buffer, second_moment, group, ns_dtype):
    """One step of Muon (kellerjordan.github.io/posts/muon) on p [k, m, n], in place, with grad of the same shape:
    Nesterov momentum, orthogonalised; then NorMuon's normalisation (arXiv 2510.05491); then cautious weight decay
    (arXiv 2510.12402). momentum_buffer [k, m, n]; second_moment [k, m, 1] where m >= n, else [k, 1, n]."""
    m, n = p.shape[-2:]
    momentum_buffer.lerp_(grad, 1 - group["momentum"])
    update = orthogonalise(grad.lerp(momentum_buffer, group["momentum"]), group["ns_steps"], ns_dtype)

    # Every row of a wide matrix has norm 1 by now, its columns differ (tall: the other way round). Bring those to one
    # size over time, and then the whole matrix back to the norm that it had.
    squares = update.square().mean(dim=-1 if m >= n else -2, keepdim=True)
    second_moment.lerp_(squares, 1 - group["beta2"])
    scale = second_moment.clamp(min=1e-10).rsqrt()
    before, after = squares.sum((-2, -1), keepdim=True), (squares * scale.square()).sum((-2, -1), keepdim=True)
    update *= scale * (before / after.clamp(min=1e-20)).sqrt()

    lr = group["lr"] * max(1.0, m / n) ** 0.5
    if group["weight_decay"]:  # only where it pulls the same way as the update
        update.addcmul_(p, (update * p >= 0).to(p.dtype), value=group["weight_decay"])
    p.add_(update, alpha=-lr)

def adamw_update(p, grad, exp_avg, exp_avg_sq, step, group):
    """One step of AdamW (arXiv 1711.05101) on p, in place; all of one shape. step: 1 for the first."""
    beta1, beta2 = group["betas"]
    p.mul_(1 - group["lr"] * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2 ** step)).add_(group["eps"])
    p.addcdiv_(exp_avg, denominator, value=-group["lr"] / (1 - beta1 ** step))

class MuonAdamW:
    def __init__(self, groups, ns_dtype=torch.float32):
        """groups: dicts {"kind": "muon" | "adamw", "params": [(name, float32 parameter)], "lr", "weight_decay", and for
        adamw "betas", "eps", for muon "momentum", "ns_steps", "beta2"}. ns_dtype: what Muon orthogonalises in."""
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.groups, self.ns_dtype, self.steps = groups, ns_dtype, 0
        self.blocks = []
        for group in groups:
            group["initial_lr"] = group["lr"]
            stacks = {}
            for name, p in group["params"]:
                stacked = group["kind"] == "muon" or p.numel() < SMALL
                stacks.setdefault((p.shape, p.device) if stacked else name, []).append((name, p))
            for key, members in stacks.items():
                stacked, p = not isinstance(key, str), members[0][1]
                rows = len(members) if stacked else len(p)
                share = -(-rows // self.world)
                shape = (share, *(p.shape if stacked else p.shape[1:]))
                if group["kind"] == "muon":
                    m, n = p.shape
                    shapes = {"momentum_buffer": shape, "second_moment": (share, m, 1) if m >= n else (share, 1, n)}
                else:
                    shapes = {"exp_avg": shape, "exp_avg_sq": shape}
                self.blocks.append({"group": group, "names": [n for n, _ in members], "params": [p for _, p in members],
                                    "stacked": stacked, "rows": rows, "padded": share * self.world,
                                    "mine": slice(self.rank * share, (self.rank + 1) * share),
                                    "state": {key: torch.zeros(s, device=p.device) for key, s in shapes.items()}})

    def pack(self, block, tensors):
        """One tensor for each parameter of the block -> [padded, ...]; the tensor itself where that needs no copy."""
        full = torch.stack(tensors) if block["stacked"] else tensors[0]
        missing = block["padded"] - block["rows"]
        return F.pad(full, [0, 0] * (full.ndim - 1) + [0, missing]) if missing else full

    def unpack(self, block, full):
        """The inverse: [padded, ...] -> a list of views, one for each parameter."""
        return list(full[:block["rows"]].unbind()) if block["stacked"] else [full[:block["rows"]]]

    def set(self, lr_scale, muon_momentum, muon_weight_decay):
        """The schedule, before each step. lr_scale multiplies every group's initial_lr."""
        for group in self.groups:
            group["lr"] = group["initial_lr"] * lr_scale
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = muon_momentum, muon_weight_decay

    def zero_grad(self):
        for block in self.blocks:
            for p in block["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self):
        """Adds the gradients of all ranks (a missing one counts as zeros) and updates every parameter. -> the norm of the
        summed gradient, a float, equal on all ranks. If that is nan or inf, no parameter and no state was touched."""
        many = self.world > 1
        grads, works = [], []
        for block in self.blocks:  # start all sums ...
            full = self.pack(block, [torch.zeros_like(p) if p.grad is None else p.grad for p in block["params"]])
            grads.append(torch.empty_like(full[block["mine"]]) if many else full)
            works.append(dist.reduce_scatter_single(grads[-1], full.contiguous(), async_op=True) if many else None)
        squares = []
        for grad, work in zip(grads, works):  # ... and take the first ones while the others are on their way
            if many:
                work.wait()
            squares.append(torch.linalg.vector_norm(grad).square())
        square = torch.stack(squares).sum()
        if many:
            dist.all_reduce(square)
        norm = square.sqrt().item()
        if not math.isfinite(norm):
            return norm

        self.steps += 1
        gathers = []
        for block, grad in zip(self.blocks, grads):  # a block's new values travel while the next block is computed
            full, group, state = self.pack(block, [p.data for p in block["params"]]), block["group"], block["state"]
            p = full[block["mine"]]
            if group["kind"] == "muon":
                muon_update(p, grad, state["momentum_buffer"], state["second_moment"], group, self.ns_dtype)
            else:
                adamw_update(p, grad, state["exp_avg"], state["exp_avg_sq"], self.steps, group)
            gathers.append((full, dist.all_gather_single(full, p, async_op=True) if many else None))
        for block, (full, work) in zip(self.blocks, gathers):
            if many:
                work.wait()
            if full.data_ptr() != block["params"][0].data_ptr():  # else the parameter itself was updated
                for p, new in zip(block["params"], self.unpack(block, full)):
                    p.copy_(new)
        return norm

    @torch.no_grad()
    def state_dict(self):
        """Whole states on the CPU, the same for any number of ranks: {parameter's name: {"step": int, "exp_avg": ...}}.
        All ranks must call it; rank 0 gets the states, the others {}."""
        result = {}
        for block in self.blocks:
            for key, shard in block["state"].items():
                full = shard
                if self.world > 1:  # one tensor at a time, to need little memory
                    full = shard.new_empty(block["padded"], *shard.shape[1:])
                    dist.all_gather_single(full, shard)
                if self.rank == 0:
                    for name, tensor in zip(block["names"], self.unpack(block, full)):
                        result.setdefault(name, {"step": self.steps})[key] = tensor.to("cpu", copy=True)
        return result

    @torch.no_grad()
    def load_state_dict(self, state):
        """Takes this rank's part of what state_dict() returned on rank 0, under any number of ranks. Every rank needs the
        whole `state`. ValueError, and nothing changed, if it is not of this model."""
        names = {name for block in self.blocks for name in block["names"]}
        if names != set(state):
            raise ValueError(f"optimizer state of other parameters: {sorted(names ^ set(state))[:5]} on one side only")
        shards = [(block, key, shard) for block in self.blocks for key, shard in block["state"].items()]
        for block, key, shard in shards:
            for name, p in zip(block["names"], block["params"]):
                want = shard.shape[1:] if block["stacked"] else p.shape
                found = state[name][key].shape if key in state[name] else None
                if found != want:
                    raise ValueError(f"optimizer state of {name}: {key} should be of {want}, is of {found}")
        for block, key, shard in shards:
            shard.copy_(self.pack(block, [state[name][key] for name in block["names"]])[block["mine"]])
        self.steps = next(iter(state.values()))["step"]

def make_optimizer(model, matrix_lr, embedding_lr, unembedding_lr, scalar_lr, weight_decay, compute_dtype):
    """model: a gpt.GPT on its device -> MuonAdamW. The learning rates of embeddings and head hold at a width of 768 and go
    with width^-0.5. weight_decay: Muon's. Betas and the small decays are those that nanochat found."""
    width = (model.config.n_embd / 768) ** -0.5
    rules = [  # the first whose word is in the parameter's name; (word, lr, betas, weight decay)
        ("wte", embedding_lr * width, (0.8, 0.995), 0.001),
        ("value_embeds", embedding_lr * width, (0.8, 0.995), 0.01),
        ("lm_head", unembedding_lr * width, (0.8, 0.96), 0.01),
        ("resid_lambdas", scalar_lr * 0.01, (0.8, 0.95), 0.05),  # every layer multiplies by them: small steps
        ("x0_lambdas", scalar_lr, (0.96, 0.95), 0.0),
        ("", scalar_lr, (0.8, 0.95), 0.0)]  # gates, and what else is no matrix
    groups = [{"kind": "adamw", "params": [], "lr": lr, "betas": betas, "eps": 1e-10, "weight_decay": decay} for _, lr, betas, decay in rules]
    groups.append({"kind": "muon", "params": [], "lr": matrix_lr, "weight_decay": weight_decay, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9})
    for name, p in model.named_parameters():
        if "transformer.h." in name and p.ndim == 2 and "ve_gate" not in name:
            groups[-1]["params"].append((name, p))
        else:
            next(g for g, rule in zip(groups, rules) if rule[0] in name)["params"].append((name, p))
    return MuonAdamW([g for g in groups if g["params"]], ns_dtype=compute_dtype)
