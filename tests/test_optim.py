"""optim.py: against torch's AdamW, orthogonality, several ranks (real torch.distributed over gloo), states that move between ranks."""
import os
import subprocess
import sys

import pytest
import torch

import gpt
import optim
from conftest import REPO

torch.set_num_threads(1)


def model_of(seed=0, layers=3):
    model = gpt.GPT(gpt.GPTConfig(16, 24, layers, 2, 2, 32))
    model.init_weights(seed)
    return model


def make(model, dtype=torch.float32):
    return optim.make_optimizer(model, 0.02, 0.3, 0.004, 0.5, 0.1, dtype)


def fill(model, step, share=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = share * torch.randn(p.shape, generator=generator)


def test_adamw_equals_torch():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3).clone()) for _ in range(2))
    optimizer = optim.MuonAdamW([{"kind": "adamw", "params": [("x", ours)], "lr": 0.1, "betas": (0.8, 0.95)}])
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    for step in range(20):
        ours.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        optimizer.step(), reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 64, 16), (2, 16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalized_singular_values_are_near_one(shape, dtype):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7
    values = torch.linalg.svdvals(optim.orthogonalize(matrices, dtype))
    assert values.min() > 0.7 and values.max() < 1.25, values
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    nearest = u @ v
    cosine = (nearest * optim.orthogonalize(matrices, dtype)).sum() / nearest.norm() / optim.orthogonalize(matrices, dtype).norm()
    assert cosine > 0.98


def test_every_parameter_is_in_one_group():
    model = model_of()
    names = [name for unit in make(model).units for name, _ in unit["params"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    kinds = {name: unit["kind"] for unit in make(model).units for name, _ in unit["params"]}
    assert kinds["transformer.h.0.attn.c_q.weight"] == "muon" and kinds["transformer.wte.weight"] == "adamw" and kinds["lm_head.weight"] == "adamw"


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = model_of()
    optimizer = make(model)
    fill(model, 0)
    optimizer.step()
    before = [p.clone() for p in model.parameters()], optimizer.state_dict()
    for bad in (float("nan"), float("inf")):
        fill(model, 1)
        model.lm_head.weight.grad[0, 0] = bad
        assert not optimizer.step() < 1e30
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters()))
    after = optimizer.state_dict()
    assert all(torch.equal(t, after[n][k]) for n, s in before[1].items() for k, t in s.items())


def test_cautious_decay_pulls_only_with_the_update():
    p = torch.nn.Parameter(torch.tensor([[2.0, -2.0], [2.0, 2.0]]))
    plain, decayed = p.detach().clone(), p.detach().clone()
    for target, decay in ((plain, 0.0), (decayed, 0.5)):
        q = torch.nn.Parameter(target)
        optimizer = optim.MuonAdamW([{"kind": "muon", "params": [("q", q)], "lr": 0.1}])
        optimizer.set(1.0, 0.95, decay)
        q.grad = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        optimizer.step()
        target.copy_(q.detach())
    assert torch.equal(decayed[1], plain[1]) or abs(decayed[1, 1]) == abs(plain[1, 1]), "the update raises it: no decay"
    assert decayed[0, 0] < plain[0, 0], "the update lowers it: decay helps"


def steps(model, optimizer, start, end, rank=0, world=1):
    for step in range(start, end):
        fill(model, step, share=(0.25 + 0.5 * rank) if world == 2 else 1 / world)  # shares of the ranks add up to 1
        optimizer.step()


def test_interrupted_equals_uninterrupted():
    straight = model_of()
    steps(straight, make(straight), 0, 6)
    first = model_of()
    optimizer = make(first)
    steps(first, optimizer, 0, 3)
    second = model_of(seed=9)
    second.load_state_dict(first.state_dict())
    again = make(second)
    again.load_state_dict(optimizer.state_dict())
    steps(second, again, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters()))


def worker(folder, start, end):
    """Run under torchrun: continues what is in `folder` from step start to end, on as many ranks as there are."""
    import torch.distributed as dist
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = model_of()
    if start:
        model.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
    optimizer = make(model)
    if start:
        optimizer.load_state_dict(torch.load(f"{folder}/optim.pt", weights_only=True))
    steps(model, optimizer, start, end, rank, world)
    fill(model, 99)
    model.lm_head.weight.grad[0, 0] = float("nan") if rank == 0 else 0.0
    norm = optimizer.step()
    assert norm != norm, "one rank's nan must be seen by all"
    state = optimizer.state_dict()
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/model.pt")
        torch.save(state, f"{folder}/optim.pt")
    dist.destroy_process_group()


def launch(folder, ranks, start, end):
    code = f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / 'tests')!r}]\nimport test_optim\ntest_optim.worker({str(folder)!r}, {start}, {end})\n"
    (folder / "worker.py").write_text(code)
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(folder / "worker.py")],
                         capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-2000:]


def test_ranks_agree_and_states_move_between_them(tmp_path):
    straight = model_of()
    optimizer = make(straight)
    steps(straight, optimizer, 0, 9)
    for start, end, ranks in ((0, 3, 2), (3, 6, 4), (6, 9, 1)):  # 24 rows and 3 layers: not everything divides by 4
        launch(tmp_path, ranks, start, end)
    model, state = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("model", "optim"))
    for name, p in straight.state_dict().items():
        torch.testing.assert_close(model[name], p, atol=2e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")
    for name, tensors in optimizer.state_dict().items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(state[name][key], tensor, atol=2e-5, rtol=1e-4)
