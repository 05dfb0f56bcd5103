"""
The optimizer: Muon for the matrices inside the blocks, AdamW for embeddings, head and scalars.

    optimizer = make_optimizer(model, settings, scale=1.0, weight_decay=0.1,
                               compute_dtype=torch.bfloat16)
    optimizer.set(lr_scale=0.5, muon_momentum=0.95, muon_weight_decay=0.05)  # before each step
    optimizer.scaled(loss).backward()
    norm = optimizer.step()
    optimizer.zero_grad()

Weights, gradients and states are float32. Under torchrun the model is not wrapped: every rank calls
backward on its own part of the batch, and step() adds the gradients of all ranks together. Each
rank owns 1/world of every bucket (see Bucket): it receives the summed gradient of its part alone,
keeps optimizer state for that part alone, updates it, and all ranks then gather the parts (ZeRO,
arXiv 1910.02054). With one process nothing is sent and the same code updates the whole. Gloo on CPU
has both collectives too (torch 2.13), gathering in place included: tests/test_optim.py runs them.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

# Polar Express (arXiv 2505.16932): for each iteration the odd quintic a x + b x^3 + c x^5 that
# brings singular values nearest to 1, given what the iterations before it left. These five, as
# nanochat uses them, are for a safety factor of 2 % against rounding in bfloat16. Together they
# take every singular value in [0.001, 1] to [0.85, 1.15].
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
SMALL = 65536  # AdamW parameters under this many elements are stacked, to be one message, not many
LOSS_SCALE = 2.0 ** 16  # in float16; if it grew further, a step would be lost at each overflow
DOUBLE_EVERY = 1000     # steps: a scale that was halved comes back

def orthogonalise(matrices, dtype):
    """The nearest matrix with orthonormal rows (or columns, if there are fewer) to each of
    [K, m, n], roughly: singular vectors stay, singular values become about 1. Computed in `dtype`
    -> [K, m, n] float32. Zero matrices stay zero."""
    tall = matrices.size(-2) > matrices.size(-1)
    X = matrices.mT if tall else matrices  # the products X X^T are then of the short side
    norms = X.norm(dim=(-2, -1), keepdim=True)  # Frobenius, at least the largest singular value
    X = (X / (norms * 1.01 + 1e-6)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).float()

def muon_update(p, grad, group, dtype, momentum_buffer, second_moment):
    """One step of Muon (kellerjordan.github.io/posts/muon) on p [k, m, n], in place, with grad of
    the same shape: Nesterov momentum, orthogonalised in dtype; then NorMuon's normalisation (arXiv
    2510.05491); then cautious weight decay (arXiv 2510.12402). momentum_buffer [k, m, n];
    second_moment [k, m, 1] where m >= n, else [k, 1, n]."""
    m, n = p.shape[-2:]
    momentum = group["momentum"]
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = orthogonalise(grad.lerp(momentum_buffer, momentum), dtype)

    # Every row of a wide matrix has norm 1 by now, its columns differ (tall: the other way round).
    # Bring those to one size over time, and then the whole matrix back to the norm that it had.
    squares = update.square().mean(dim=-1 if m >= n else -2, keepdim=True)
    second_moment.lerp_(squares, 1 - group["beta2"])
    scale = second_moment.clamp(min=1e-10).rsqrt()
    before = squares.sum((-2, -1), keepdim=True)
    after = (squares * scale.square()).sum((-2, -1), keepdim=True)
    update *= scale * (before / after.clamp(min=1e-20)).sqrt()

    if group["weight_decay"]:  # only where it pulls the same way as the update
        same_way = (update * p >= 0).to(p.dtype)
        update.addcmul_(p, same_way, value=group["weight_decay"])
    p.add_(update, alpha=-group["lr"] * max(1.0, m / n) ** 0.5)

def adamw_update(p, grad, group, step, exp_avg, exp_avg_sq):
    """One step of AdamW (arXiv 1711.05101) on p, in place; all of one shape. step: from 1 on."""
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    p.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2 ** step)).add_(group["eps"])
    p.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1 ** step))

class Bucket:
    """What is sent, sharded and updated as one tensor, along its first dimension: either one large
    parameter as it is (an embedding [V, C]), or parameters of one shape stacked ([K, m, n] of K
    matrices [m, n]; and the many small gates). Zero rows fill it up to a multiple of world; zeros
    stay zeros under both rules, so nothing has to know about them."""

    def __init__(self, group, members, rank, world):
        """members: [(name, parameter)]"""
        self.group = group
        self.names, self.params = zip(*members)
        p = self.params[0]
        self.stacked = is_stacked(group, p)
        self.rows = len(members) if self.stacked else len(p)
        share = math.ceil(self.rows / world)
        self.padding = share * world - self.rows
        self.mine = slice(rank * share, rank * share + share)
        if group["kind"] == "muon":
            m, n = p.shape
            shapes = {"momentum_buffer": (m, n), "second_moment": (m, 1) if m >= n else (1, n)}
        else:
            shapes = {"exp_avg": p.shape, "exp_avg_sq": p.shape}
        self.state = {}
        for key, shape in shapes.items():
            row = shape if self.stacked else shape[1:]
            self.state[key] = torch.zeros(share, *row, device=p.device)

    def pack(self, tensors):
        """One tensor for each parameter -> all of them as one, [rows + padding, ...]; the tensor
        itself where that needs no copy."""
        full = torch.stack(tensors) if self.stacked else tensors[0]
        if self.padding:
            full = F.pad(full, [0, 0] * (full.ndim - 1) + [0, self.padding])
        return full

    def unpack(self, full):
        """The inverse: [rows + padding, ...] -> views, one for each parameter."""
        full = full[:self.rows]
        return full.unbind() if self.stacked else [full]

def is_stacked(group, p):
    return group["kind"] == "muon" or p.numel() < SMALL

class MuonAdamW:
    def __init__(self, groups, ns_dtype=torch.float32):
        """groups: dicts {"kind": "muon" | "adamw", "params": [(name, float32 parameter)], "lr",
        "weight_decay", and for adamw "betas", "eps", for muon "momentum", "beta2"}.
        ns_dtype: what is computed in: Muon orthogonalises in it, and float16 needs a scale."""
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.groups = groups
        self.ns_dtype = ns_dtype
        self.steps = 0
        self.most_scale = LOSS_SCALE if ns_dtype == torch.float16 else 1.0
        self.loss_scale = self.most_scale
        self.buckets = []
        for group in groups:
            group["initial_lr"] = group["lr"]
            together = {}
            for name, p in group["params"]:
                key = p.shape if is_stacked(group, p) else name
                together.setdefault(key, []).append((name, p))
            for members in together.values():
                self.buckets.append(Bucket(group, members, self.rank, self.world))

    def set(self, lr_scale, muon_momentum, muon_weight_decay):
        """The schedule, before each step. lr_scale multiplies every group's initial_lr."""
        for group in self.groups:
            group["lr"] = group["initial_lr"] * lr_scale
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum
                group["weight_decay"] = muon_weight_decay

    def scaled(self, loss):
        """The loss as backward() is to be called on it. float16 has no number below 6e-8, where
        many gradients are: there it is multiplied by a power of two (arXiv 1710.03740), which
        step() takes out again, and halves where a gradient is not finite."""
        return loss * self.loss_scale

    def rescale(self, factor):
        self.loss_scale = min(max(self.loss_scale * factor, 1.0), self.most_scale)

    def zero_grad(self):
        for bucket in self.buckets:
            for p in bucket.params:
                p.grad = None

    def sum_gradients(self):
        """-> for each bucket this rank's part of the gradient, summed over all ranks, without the
        loss scale. A missing gradient counts as zeros."""
        parts, works = [], []
        for bucket in self.buckets:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.params]
            part = bucket.pack(grads)
            if self.world > 1:
                full = part.contiguous()
                part = torch.empty_like(full[bucket.mine])
                works.append(dist.reduce_scatter_single(part, full, async_op=True))
            parts.append(part)
        for work in works:  # all are on their way at once
            work.wait()
        if self.loss_scale != 1.0:
            parts = [part / self.loss_scale for part in parts]
        return parts

    @torch.no_grad()
    def step(self):
        """Adds the gradients of all ranks together and updates every parameter. -> the norm of the
        summed gradient, a float, equal on all ranks. If that is nan or inf, no parameter and no
        state was touched."""
        grads = self.sum_gradients()
        square = torch.stack([torch.linalg.vector_norm(grad).square() for grad in grads]).sum()
        if self.world > 1:
            dist.all_reduce(square)
        norm = square.sqrt().item()
        if not math.isfinite(norm):
            self.rescale(0.5)
            return norm

        self.steps += 1
        if self.steps % DOUBLE_EVERY == 0:
            self.rescale(2.0)
        fulls, works = [], []
        for bucket, grad in zip(self.buckets, grads):
            full = bucket.pack(bucket.params)
            part = full[bucket.mine]
            if bucket.group["kind"] == "muon":
                muon_update(part, grad, bucket.group, self.ns_dtype, **bucket.state)
            else:
                adamw_update(part, grad, bucket.group, self.steps, **bucket.state)
            fulls.append(full)
            if self.world > 1:  # it travels while the next bucket is computed
                works.append(dist.all_gather_single(full, part, async_op=True))
        for work in works:
            work.wait()
        for bucket, full in zip(self.buckets, fulls):
            if full is not bucket.params[0]:  # else the parameter itself was updated
                for p, new in zip(bucket.params, bucket.unpack(full)):
                    p.copy_(new)
        return norm

    @torch.no_grad()
    def state_dict(self):
        """Whole states on the CPU, the same for any number of ranks: {parameter's name: {"step":
        int, "exp_avg": ...}}. All ranks must call it; rank 0 gets the states, the others {}."""
        scalars = {"step": self.steps}
        if self.most_scale != 1.0:
            scalars["loss_scale"] = self.loss_scale
        states = {}
        for bucket in self.buckets:
            for key, full in bucket.state.items():
                if self.world > 1:  # one tensor at a time, to need little memory
                    shard = full
                    full = shard.new_empty(len(shard) * self.world, *shard.shape[1:])
                    dist.all_gather_single(full, shard)
                if self.rank == 0:
                    for name, tensor in zip(bucket.names, bucket.unpack(full)):
                        state = states.setdefault(name, {**scalars})
                        state[key] = tensor.to("cpu", copy=True)
        return states

    @torch.no_grad()
    def load_state_dict(self, states):
        """Takes this rank's part of what state_dict() returned on rank 0, under any number of
        ranks, and reads no more than that part: `states` may be a file mapped into memory
        (torch.load(mmap=True))."""
        for bucket in self.buckets:
            for key, shard in bucket.state.items():
                saved = [states[name][key] for name in bucket.names]
                if bucket.stacked:
                    for own, tensor in zip(shard, saved[bucket.mine]):
                        own.copy_(tensor)
                else:
                    part = saved[0][bucket.mine]
                    shard[:len(part)].copy_(part)
        scalars = next(iter(states.values()))
        self.steps = scalars["step"]
        self.loss_scale = min(scalars.get("loss_scale", LOSS_SCALE), self.most_scale)

def make_optimizer(model, settings, scale, weight_decay, compute_dtype):
    """
    model: a gpt.GPT on its device; settings: a script's, of which the four learning rates count;
    scale: multiplies them; weight_decay: Muon's; compute_dtype: what the model computes in
    -> MuonAdamW. The learning rates of embeddings and head hold at a width of 768 and go with
    width^-0.5. Betas and the small decays are those that nanochat found.
    """
    width = (model.config.n_embd / 768) ** -0.5
    matrix_lr = scale * settings["matrix_lr"]
    embedding_lr = scale * settings["embedding_lr"] * width
    unembedding_lr = scale * settings["unembedding_lr"] * width
    scalar_lr = scale * settings["scalar_lr"]

    def adamw(lr, betas, decay):
        return {"kind": "adamw", "params": [], "lr": lr, "betas": betas, "eps": 1e-10,
                "weight_decay": decay}

    groups = {  # a parameter belongs to the first whose word is in its name
        "wte": adamw(embedding_lr, (0.8, 0.995), 0.001),
        "value_embeds": adamw(embedding_lr, (0.8, 0.995), 0.01),
        # a pair is met seldom; at the full rate they are worth nothing (LOG.md)
        "bigram_embeds": adamw(0.1 * embedding_lr, (0.8, 0.995), 0.01),
        "lm_head": adamw(unembedding_lr, (0.8, 0.96), 0.01),
        # every layer multiplies by these: small steps
        "resid_lambdas": adamw(scalar_lr * 0.01, (0.8, 0.95), 0.05),
        "x0_lambdas": adamw(scalar_lr, (0.96, 0.95), 0.0),
        "": adamw(scalar_lr, (0.8, 0.95), 0.0),  # gates, and what else is no matrix
    }
    muon = {"kind": "muon", "params": [], "lr": matrix_lr, "weight_decay": weight_decay,
            "momentum": 0.95, "beta2": 0.9}
    for name, p in model.named_parameters():
        group = next(groups[word] for word in groups if word in name)
        if "transformer.h." in name and p.ndim == 2 and "ve_gate" not in name:
            group = muon
        group["params"].append((name, p))
    return MuonAdamW([*groups.values(), muon], ns_dtype=compute_dtype)
