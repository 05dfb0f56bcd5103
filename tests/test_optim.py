"""
optim.py: AdamW against torch's, Muon against the singular value decomposition, and one, two and
four ranks against each other with real process groups (gloo): same steps, same states, and nothing
touched by a gradient that is not finite.
"""
import copy
import datetime
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import gpt
import optim
from conftest import RATES, REPO

# counts that neither 2 nor 4 divides
MATRICES = {"square": (3, 8, 8), "tall": (5, 16, 8), "wide": (1, 8, 24)}
OTHERS = {"even": (300, 256), "odd": (257, 256), "gates.a": (2, 12), "gates.b": (2, 12),
          "lambdas": (3,), "scalar": ()}

def normal(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def make(dtype=torch.float32, decay=0.1):
    """-> ({name: parameter}, optimizer), always the same. "even" and "odd" are too large to be
    stacked."""
    shapes = {f"{kind}.{i}": shape[1:] for kind, shape in MATRICES.items() for i in range(shape[0])}
    params = {}
    for i, (name, shape) in enumerate({**shapes, **OTHERS}.items()):
        params[name] = torch.nn.Parameter(normal(i, shape))
    assert params["odd"].numel() >= optim.SMALL > params["gates.a"].numel()
    muon = {"kind": "muon", "params": [(n, params[n]) for n in shapes], "lr": 0.02,
            "weight_decay": decay, "momentum": 0.9, "beta2": 0.9}
    adamw = {"kind": "adamw", "params": [(n, params[n]) for n in OTHERS], "lr": 0.01,
             "weight_decay": decay, "betas": (0.8, 0.95), "eps": 1e-10}
    return params, optim.MuonAdamW([adamw, muon], dtype)

def train(params, optimizer, first, last):
    """Steps first..last-1. The gradient is a function of step and name; each rank has a random part
    of it."""
    norms = []
    for step in range(first, last):
        for i, (name, p) in enumerate(params.items()):
            seed, rank, world = 1000 * step + i, optimizer.rank, optimizer.world
            parts = [normal(10 ** 6 * (r + 1) + seed, p.shape) for r in range(world - 1)]
            p.grad = parts[rank] if rank < world - 1 else normal(seed, p.shape) - sum(parts)
        norms.append(optimizer.step())
        optimizer.zero_grad()
    return norms

def snapshot(params, optimizer):
    copies = {n: p.detach().clone() for n, p in params.items()}
    return {"params": copies, "optim": optimizer.state_dict()}

def restore(saved, dtype=torch.float32):
    params, optimizer = make(dtype)
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(saved["params"][n])
    optimizer.load_state_dict(saved["optim"])
    return params, optimizer

def same(a, b):
    """Equal bit for bit: nested dicts of tensors and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def furthest(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)

class Copied(TorchDispatchMode):
    """Counts the elements that operations make or write, views left out."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.elements += result.numel()
        return result

def worker(rank, world, job, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store_{job.__name__}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    result = job(folder)
    torch.save(result, f"{folder}/{job.__name__}_{rank}.pt")
    dist.destroy_process_group()

def launch(world, job, folder):
    """Runs job(folder) on `world` ranks -> what each of them returned"""
    mp.spawn(worker, (world, job, str(folder)), nprocs=world)
    return [torch.load(f"{folder}/{job.__name__}_{rank}.pt", weights_only=True)
            for rank in range(world)]

def two_ranks(folder):
    params, optimizer = make()
    norms = train(params, optimizer, 0, 5)
    half = snapshot(params, optimizer)
    box = [half]
    dist.broadcast_object_list(box)  # a real run reads the file on every rank
    norms += train(params, optimizer, 5, 10)
    whole = snapshot(params, optimizer)
    resumed = restore({"params": half["params"], "optim": box[0]["optim"]})
    train(*resumed, 5, 10)

    poisoned = restore({"params": half["params"], "optim": box[0]["optim"]})
    before, refused = snapshot(*poisoned), []
    for bad in (math.nan, math.inf):
        for p in poisoned[0].values():
            p.grad = torch.ones_like(p)
        if dist.get_rank() == 1:
            poisoned[0]["tall.3"].grad[2, 1] = bad
        refused.append(poisoned[1].step())
    untouched = same(before, snapshot(*poisoned))
    train(*poisoned, 5, 10)
    shares = sum(t.numel() for bucket in optimizer.buckets for t in bucket.state.values())
    with Copied() as copied:
        optimizer.load_state_dict(box[0]["optim"])
    return {"norms": norms, "half": half, "whole": whole, "resumed": snapshot(*resumed),
            "refused": refused, "untouched": untouched, "after": snapshot(*poisoned),
            "shares": shares, "copied": copied.elements}

def four_ranks(folder):
    saved = torch.load(f"{folder}/two_ranks_0.pt", weights_only=True, mmap=True)["whole"]
    params, optimizer = restore(saved)
    loaded = snapshot(params, optimizer)
    train(params, optimizer, 10, 13)
    return {"loaded": loaded, "later": snapshot(params, optimizer)}

@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return {2: launch(2, two_ranks, folder), 4: launch(4, four_ranks, folder)}

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def test_two_ranks_step_like_one(ranks):
    params, optimizer = make()
    norms = train(params, optimizer, 0, 10)
    one, two = snapshot(params, optimizer), ranks[2]
    assert furthest(one["params"], make()[0]) > 0.05
    assert furthest(one["params"], two[0]["whole"]["params"]) < 1e-5
    assert norms == pytest.approx(two[0]["norms"], rel=1e-5) and two[0]["norms"] == two[1]["norms"]
    assert same(two[0]["whole"]["params"], two[1]["whole"]["params"])
    assert two[1]["whole"]["optim"] == {}
    whole = sum(t.numel() for bucket in optimizer.buckets for t in bucket.state.values())
    assert all(r["shares"] < 0.55 * whole for r in two)  # each holds about half

def test_loading_reads_this_ranks_share_alone(ranks):
    for rank in ranks[2]:
        assert 0.9 * rank["shares"] < rank["copied"] <= rank["shares"]

def test_interrupted_equals_uninterrupted_on_two_ranks(ranks):
    assert ranks[2][0]["half"]["optim"]["even"]["step"] == 5
    assert same(ranks[2][0]["resumed"], ranks[2][0]["whole"])

def test_states_move_between_one_two_and_four_ranks(ranks):
    two = ranks[2][0]["whole"]
    params, optimizer = restore(two)
    one = snapshot(params, optimizer)
    assert same(one, two)                                 # 2 -> 1
    assert same(ranks[4][0]["loaded"], two)               # 2 -> 4, gathered again
    assert same(snapshot(*restore(ranks[4][0]["loaded"])), two)  # 4 -> 1
    train(params, optimizer, 10, 13)
    assert furthest(snapshot(params, optimizer)["params"], ranks[4][0]["later"]["params"]) < 1e-5
    for rank in ranks[4]:
        assert same(rank["later"]["params"], ranks[4][0]["later"]["params"])

def test_a_gradient_not_finite_on_one_rank_touches_nothing_on_any(ranks):
    for rank in ranks[2]:
        assert math.isnan(rank["refused"][0]) and rank["refused"][1] == math.inf
        assert rank["untouched"]
    assert same(ranks[2][0]["after"], ranks[2][0]["whole"])  # not even the step count

def test_one_rank_interrupted_refused_and_repeated():
    params, optimizer = make()
    train(params, optimizer, 0, 3)
    saved = copy.deepcopy(snapshot(params, optimizer))
    params["odd"].grad = torch.full((257, 256), math.nan)
    assert math.isnan(optimizer.step()) and same(saved, snapshot(params, optimizer))
    train(params, optimizer, 3, 6)
    again = restore(saved)
    train(*again, 3, 6)
    assert same(snapshot(*again), snapshot(params, optimizer))

def test_adamw_equals_torch():
    params, _ = make()
    ours = {n: params[n] for n in OTHERS}
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = optim.MuonAdamW([{"kind": "adamw", "params": list(ours.items()), **settings}])
    reference = torch.optim.AdamW(theirs.values(), **settings)
    for step in range(20):
        scale = 1.0 - step / 40
        optimizer.set(scale, 0.9, 0.1)
        reference.param_groups[0]["lr"] = 0.01 * scale
        for i, n in enumerate(ours):
            ours[n].grad = normal(100 * step + i, ours[n].shape)
            theirs[n].grad = ours[n].grad.clone()
        norm = optimizer.step()
        reference.step()
    assert furthest(ours, theirs) < 1e-6
    squares = sum(p.grad.square().sum().item() for p in theirs.values())
    assert norm == pytest.approx(math.sqrt(squares), rel=1e-6)

def test_the_five_polynomials():
    x = torch.logspace(-3, 0, 10_000, dtype=torch.float64)
    for a, b, c in optim.POLAR_EXPRESS:
        x = a * x + b * x ** 3 + c * x ** 5
    assert 0.85 < x.min() and x.max() < 1.15

@pytest.mark.parametrize("shape", [(2, 32, 32), (3, 64, 16), (1, 16, 80)])
@pytest.mark.parametrize("dtype, low, high", [(torch.float32, 0.85, 1.15),
                                              (torch.bfloat16, 0.80, 1.20),
                                              (torch.float16, 0.85, 1.15)])
def test_orthogonalise(shape, dtype, low, high):
    U, _, V = torch.linalg.svd(normal(0, shape), full_matrices=False)
    # their Frobenius norm is below 4: the smallest enters at about 0.01
    values = torch.logspace(0, -1.5, U.size(-1))
    for scale in (1e-3, 1.0, 1e3):
        result = optim.orthogonalise(scale * (U * values) @ V, dtype)
        found = torch.linalg.svdvals(result)
        assert low < found.min() and found.max() < high
        assert torch.linalg.matrix_norm(result - U @ V, 2).max() < 0.2  # and the directions stayed
    assert optim.orthogonalise(torch.zeros(shape), dtype).eq(0).all()

def muon_group(p, lr):
    return {"kind": "muon", "params": [("p", p)], "lr": lr, "weight_decay": 0.0, "momentum": 0.9,
            "beta2": 0.9}

def muon_step(p, grad, **changes):
    """One step from zero state on one matrix -> what was added to it, divided by -lr"""
    p = torch.nn.Parameter(p.clone())
    p.grad = grad.clone()
    before = p.detach().clone()
    optim.MuonAdamW([{**muon_group(p, 0.5), **changes}]).step()
    return (before - p.detach()) / 0.5

def test_muon_step_by_hand():
    grad = torch.linalg.qr(normal(0, (16, 16)))[0] * 3.0
    p = normal(1, (16, 16))
    update = muon_step(p, grad)
    # orthogonal already: direction kept
    assert torch.allclose(update, update.norm() / grad.norm() * grad, atol=1e-3)
    assert 0.85 * 4 < update.norm() < 1.15 * 4

    # along the long side all vectors come out equally long
    for shape, dim in (((32, 8), 1), ((8, 32), 0)):
        update = muon_step(normal(2, shape), normal(3, shape))
        norms, scale = update.norm(dim=dim), max(1, shape[0] / shape[1]) ** 0.5
        assert norms.max() / norms.min() < 1.001
        assert 0.85 * scale < update.norm() / 8 ** 0.5 < 1.15 * scale

    decayed, update = muon_step(p, grad, weight_decay=0.2), muon_step(p, grad)
    wanted = torch.where(update * p >= 0, 0.2 * p, 0.0)
    assert 0.2 < (wanted == 0).float().mean() < 0.8
    assert torch.allclose(decayed - update, wanted, atol=1e-5)

def test_muon_momentum_by_hand():
    """The buffer is an exponential average of the gradients."""
    params, optimizer = make()
    name, buffer = "wide.0", torch.zeros(8, 24)
    for step in range(3):
        optimizer.set(1.0, 0.5 + 0.1 * step, 0.0)
        for i, p in enumerate(params.values()):
            p.grad = normal(100 * step + i, p.shape)
        buffer = (0.5 + 0.1 * step) * buffer + (0.5 - 0.1 * step) * params[name].grad
        optimizer.step()
    assert torch.allclose(optimizer.state_dict()[name]["momentum_buffer"], buffer, atol=1e-6)

def test_muon_looks_one_step_ahead():
    """Nesterov: what is orthogonalised is the gradient mixed with the buffer, not the buffer
    alone."""
    p = torch.nn.Parameter(normal(0, (16, 16)))
    optimizer = optim.MuonAdamW([muon_group(p, 1.0)])
    g1, g2 = (torch.linalg.qr(normal(seed, (16, 16)))[0] for seed in (1, 2))
    for g in (g1, g2):
        before, p.grad = p.detach().clone(), g.clone()
        optimizer.step()
    update = before - p.detach()
    def cosine_to_nearest_orthogonal(matrix):
        U, _, V = torch.linalg.svd(matrix)
        return torch.cosine_similarity((U @ V).flatten(), update.flatten(), dim=0).item()
    buffer = 0.9 * 0.1 * g1 + 0.1 * g2
    assert cosine_to_nearest_orthogonal(0.1 * g2 + 0.9 * buffer) > 0.99
    assert cosine_to_nearest_orthogonal(buffer) < 0.98

def test_a_missing_gradient_counts_as_zeros():
    results = []
    for missing in (True, False):
        params, optimizer = make()
        train(params, optimizer, 0, 2)
        for n, p in params.items():
            p.grad = None if missing and n in ("even", "tall.1", "scalar") else torch.zeros_like(p)
        assert optimizer.step() == 0.0
        results.append(snapshot(params, optimizer))
    assert same(*results)

@pytest.mark.parametrize("arch", ["modern", "nanochat_2025"])
def test_every_parameter_of_the_model_is_in_its_group(arch):
    model = gpt.GPT(gpt.config_from_depth(2, 512, 32, arch, bigram_vocab_size=100))
    model.init_weights(0)
    rates = {"matrix_lr": 0.01, "embedding_lr": 0.1, "unembedding_lr": 0.002, "scalar_lr": 0.25}
    optimizer = optim.make_optimizer(model, rates, 2.0, 0.1, torch.bfloat16)
    found = {n: g for g in optimizer.groups for n, _ in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.groups) == len(found)
    assert set(found) == {n for n, _ in model.named_parameters()}
    assert {n for n, g in found.items() if g["kind"] == "muon"} == {
        n for n, p in model.named_parameters()
        if n.startswith("transformer.h.") and min(p.shape) > 2}
    scale = (768 / model.config.n_embd) ** 0.5
    rates = {"transformer.wte.weight": 0.2 * scale, "lm_head.weight": 0.004 * scale,
             "transformer.h.1.mlp.c_fc.weight": 0.02}
    if arch == "modern":
        rates |= {"value_embeds.1.weight": 0.2 * scale, "bigram_embeds.weight": 0.02 * scale,
                  "resid_lambdas": 0.005, "x0_lambdas": 0.5,
                  "transformer.h.1.attn.ve_gate.weight": 0.5}
    for name, rate in rates.items():
        assert found[name]["lr"] == found[name]["initial_lr"] == pytest.approx(rate)
    assert optimizer.ns_dtype == torch.bfloat16

    optimizer.set(lr_scale=0.25, muon_momentum=0.7, muon_weight_decay=0.03)
    assert found["resid_lambdas" if arch == "modern" else "lm_head.weight"]["weight_decay"] != 0.03
    assert found["lm_head.weight"]["lr"] == pytest.approx(0.001 * scale)
    muon = found["transformer.h.0.attn.c_q.weight"]
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.005, 0.7, 0.03)

    idx = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(1))
    optimizer.set(0.1, 0.7, 0.03)
    losses = []
    for _ in range(12):  # it learns four rows by heart
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0

def test_in_float16_small_gradients_survive_by_a_scale(monkeypatch):
    config = gpt.config_from_depth(2, 512, 32)
    idx = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(1))

    def gradient(dtype):
        model = gpt.GPT(config, dtype)
        model.init_weights(0)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # in a fresh model the blocks have no gradient
            model.transformer.h[0].mlp.c_proj.weight.normal_(0.0, 0.02, generator=generator)
        optimizer = optim.make_optimizer(model, RATES, 1.0, 0.1, dtype)
        loss = model(idx[:, :-1], idx[:, 1:]) / 2 ** 20  # as in a batch of a million tokens
        optimizer.scaled(loss).backward()
        names = [bucket.names[0] for bucket in optimizer.buckets]
        return optimizer.sum_gradients()[names.index("transformer.h.0.mlp.c_fc.weight")]

    true = gradient(torch.float32)
    assert (gradient(torch.float16) - true).norm() < 0.01 * true.norm()
    monkeypatch.setattr(optim, "LOSS_SCALE", 1.0)
    assert (gradient(torch.float16) - true).norm() > 0.1 * true.norm()

def test_the_scale_is_halved_where_it_overflows_and_comes_back(monkeypatch):
    monkeypatch.setattr(optim, "DOUBLE_EVERY", 3)
    params, optimizer = make(torch.float16)
    train(params, optimizer, 0, 4)
    assert optimizer.loss_scale == 2 ** 16, "it does not grow above what it is at first"
    for halved in (2 ** 15, 2 ** 14):
        before = snapshot(params, optimizer)["params"]
        for p in params.values():
            p.grad = torch.full_like(p, math.inf)
        assert optimizer.step() == math.inf and optimizer.loss_scale == halved
        assert same(before, snapshot(params, optimizer)["params"])
    train(params, optimizer, 4, 5)
    assert optimizer.loss_scale == 2 ** 14
    other_params, other = restore(snapshot(params, optimizer), torch.float16)
    for some_params, some in ((params, optimizer), (other_params, other)):
        train(some_params, some, 5, 6)
        assert some.loss_scale == 2 ** 15
    assert same(snapshot(params, optimizer), snapshot(other_params, other))
    _, plain = restore(snapshot(params, optimizer))  # goes on in float32
    assert plain.loss_scale == 1.0

def test_every_phase_scales_its_loss():
    lines = [line.strip() for path in REPO.glob("*.py") for line in path.read_text().splitlines()]
    calls = [line for line in lines if line.endswith(".backward()")]
    assert len(calls) >= 6 and all(line.startswith("optimizer.scaled(") for line in calls)
