"""
The optimizer: Muon for the matrices of the blocks, AdamW for embeddings, head and scalars. With several ranks gradients are
reduce-scattered, each rank keeps the state of its share and updates it, and the new parameters are gathered (as in ZeRO,
arXiv 1910.02054). Parameters and state are float32.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, then the nearest orthogonal matrix, here by the Polar
Express iteration (arXiv 2505.16932); rows are then evened out by their second moment (NorMuon, arXiv 2510.05491). Weight
decay only where it pulls with the update (cautious, arXiv 2411.16085).
"""
import torch
import torch.distributed as dist

# coefficients (a, b, c) of the five steps X <- aX + b(XX')X + c(XX')(XX')X that take singular values in (0, 1] to about 1 fastest
POLAR_EXPRESS = [(8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]


def orthogonalize(matrices, dtype):
    """[K, m, n] float32 -> the nearest (semi-)orthogonal matrices, singular values of about 1, float32; computed in `dtype`."""
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.mT if tall else x).float()


class MuonAdamW:
    """
    groups: list of {"kind": "muon" or "adamw", "params": [(name, parameter)], "lr": float, adamw: "betas": (b1, b2)}.
    step() takes p.grad of each parameter, summed (not averaged) over the ranks; a missing one counts as zero.
    """
    EPS = 1e-10

    def __init__(self, groups, weight_decay=0.0, ns_dtype=torch.float32):
        self.ns_dtype, self.steps = ns_dtype, 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.set(1.0, 0.95, weight_decay)
        # a unit is updated at once: matrices of one shape, stacked (padded to a multiple of the ranks), or one AdamW parameter
        self.units = []
        for group in groups:
            if group["kind"] == "adamw":
                self.units += [{**group, "params": [pair], "sharded": pair[1].dim() > 1 and pair[1].size(0) % self.world == 0} for pair in group["params"]]
            else:
                by_shape = {}
                for name, p in group["params"]:
                    by_shape.setdefault(tuple(p.shape), []).append((name, p))
                self.units += [{**group, "params": pairs, "sharded": True} for pairs in by_shape.values()]
        for unit in self.units:
            value = self.mine(unit, self.stacked(unit, [p for _, p in unit["params"]]))
            moments = {"exp_avg": value, "exp_avg_sq": value[..., :1] if unit["kind"] == "muon" else value}
            unit["state"] = {name: torch.zeros_like(like) for name, like in moments.items()}

    def set(self, lr_scale, muon_momentum, muon_weight_decay):
        """What a schedule changes from step to step."""
        self.lr_scale, self.momentum, self.weight_decay = lr_scale, muon_momentum, muon_weight_decay

    def zero_grad(self):
        for unit in self.units:
            for _, p in unit["params"]:
                p.grad = None

    def stacked(self, unit, tensors):
        """The tensors of a unit as one: an AdamW tensor itself; matrices [K, m, n] with zeros behind, so that the ranks divide K."""
        if unit["kind"] == "adamw":
            return tensors[0]
        padding = -len(tensors) % self.world
        return torch.stack([*tensors, *[torch.zeros_like(tensors[0])] * padding])

    def mine(self, unit, whole):
        """This rank's share of a unit's tensor."""
        return whole.chunk(self.world)[self.rank] if unit["sharded"] else whole

    @torch.no_grad()
    def step(self):
        """One update. -> the norm of the gradient, float; if it is not finite nothing at all is changed, on any rank."""
        waiting = []
        for unit in self.units:
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for _, p in unit["params"]]
            whole = self.stacked(unit, grads)
            unit["grad"] = self.mine(unit, whole)
            if self.world > 1 and unit["sharded"]:
                unit["grad"] = torch.empty_like(unit["grad"])
                waiting.append(dist.reduce_scatter_tensor(unit["grad"], whole.contiguous(), async_op=True))
            elif self.world > 1:
                waiting.append(dist.all_reduce(whole, async_op=True))
        for work in waiting:
            work.wait()
        squares = torch.stack([unit["grad"].square().sum() for unit in self.units])
        if self.world > 1:
            squares = squares * torch.tensor([1.0 if u["sharded"] or self.rank == 0 else 0.0 for u in self.units], device=squares.device)
            dist.all_reduce(squares)
        norm = squares.sum().sqrt().item()
        if norm != norm or norm == float("inf"):
            return norm

        self.steps += 1
        waiting = []
        for unit in self.units:
            whole = self.stacked(unit, [p.data for _, p in unit["params"]])
            share = self.mine(unit, whole).clone() if self.world > 1 else whole
            (self.adamw if unit["kind"] == "adamw" else self.muon)(unit, share, unit.pop("grad"))
            if self.world > 1 and unit["sharded"]:
                whole = torch.empty_like(whole)
                waiting.append((dist.all_gather_into_tensor(whole, share, async_op=True), unit, whole))
            else:
                self.put_back(unit, share)
        for work, unit, whole in waiting:
            work.wait()
            self.put_back(unit, whole)
        return norm

    def put_back(self, unit, whole):
        """A unit's tensor into its parameters."""
        for (_, p), new in zip(unit["params"], [whole] if unit["kind"] == "adamw" else whole):
            if p.data_ptr() != new.data_ptr():
                p.copy_(new)

    def adamw(self, unit, p, grad):
        """AdamW without decay (arXiv 1711.05101), in place."""
        b1, b2 = unit["betas"]
        m, v = unit["state"]["exp_avg"], unit["state"]["exp_avg_sq"]
        m.lerp_(grad, 1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        denominator = (v / (1 - b2 ** self.steps)).sqrt_().add_(self.EPS)
        p.addcdiv_(m, denominator, value=-unit["lr"] * self.lr_scale / (1 - b1 ** self.steps))

    def muon(self, unit, p, grad, beta2=0.95):
        """Muon on p [K, m, n], in place."""
        m, v = unit["state"]["exp_avg"], unit["state"]["exp_avg_sq"]
        m.lerp_(grad, 1 - self.momentum)
        update = orthogonalize(grad.lerp(m, self.momentum), self.ns_dtype)  # Nesterov's look ahead
        before = update.norm(dim=(-2, -1), keepdim=True)
        v.lerp_(update.square().mean(dim=-1, keepdim=True), 1 - beta2)
        update = update / (v.sqrt() + self.EPS)
        update *= before / (update.norm(dim=(-2, -1), keepdim=True) + self.EPS)
        lr = unit["lr"] * self.lr_scale * max(1.0, p.size(-2) / p.size(-1)) ** 0.5
        if self.weight_decay:
            p.sub_(p * (update * p > 0), alpha=lr * self.weight_decay)
        p.sub_(update, alpha=lr)

    @torch.no_grad()
    def state_dict(self):
        """{name: {"exp_avg": tensor, ...}} with whole tensors, whatever the ranks. Every rank must call it."""
        state = {"": {"steps": torch.tensor(self.steps)}}
        for unit in self.units:
            for key, share in unit["state"].items():
                whole = share
                if self.world > 1 and unit["sharded"]:
                    whole = torch.empty(self.world * share.size(0), *share.shape[1:], dtype=share.dtype, device=share.device)
                    dist.all_gather_into_tensor(whole, share.contiguous())
                for (name, _), tensor in zip(unit["params"], [whole] if unit["kind"] == "adamw" else whole):
                    state.setdefault(name, {})[key] = tensor.clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state):
        """The counterpart of state_dict; each rank takes its share."""
        self.steps = int(state[""]["steps"])
        for unit in self.units:
            for key, share in unit["state"].items():
                share.copy_(self.mine(unit, self.stacked(unit, [state[name][key].to(share.device) for name, _ in unit["params"]])))


def make_optimizer(model, matrix_lr, embedding_lr, unembedding_lr, scalar_lr, weight_decay, compute_dtype):
    """Sorts a GPT's parameters into groups. AdamW's rates of embeddings and head shrink with the root of the width (768 is the reference)."""
    width_scale = (model.config.n_embd / 768) ** -0.5
    groups = {
        "matrices": {"kind": "muon", "lr": matrix_lr},
        "embeddings": {"kind": "adamw", "lr": embedding_lr * width_scale, "betas": (0.8, 0.95)},
        "head": {"kind": "adamw", "lr": unembedding_lr * width_scale, "betas": (0.8, 0.95)},
        "gates": {"kind": "adamw", "lr": scalar_lr * 0.1, "betas": (0.8, 0.95)},
        "x0": {"kind": "adamw", "lr": scalar_lr, "betas": (0.96, 0.95)},
        "resid": {"kind": "adamw", "lr": scalar_lr * 0.01, "betas": (0.8, 0.95)}}  # they multiply up over the layers
    members = {key: [] for key in groups}
    for name, p in model.named_parameters():
        key = ("embeddings" if "wte" in name or "value_embeds" in name else "head" if "lm_head" in name else "gates" if "ve_gate" in name
               else "x0" if "x0_lambdas" in name else "resid" if "resid_lambdas" in name else "matrices")
        members[key].append((name, p))
    return MuonAdamW([{**group, "params": members[key]} for key, group in groups.items() if members[key]], weight_decay, compute_dtype)
