"""State of optimizers: any that torch has on one process; on cut weights what can be cut, and words for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bharat.checkpoints import Checkpoint, CheckpointError, optimizers, save, weights
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.plan.shards import TensorSlice

MAKERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, amsgrad=True),
    "capturable": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.1), foreach=False),
    "fused": lambda ps: torch.optim.AdamW(ps, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adafactor": lambda ps: torch.optim.Adafactor(ps),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, max_iter=3),
    "rprop": lambda ps: torch.optim.Rprop(ps),
    "muon": lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2]),
}


def module_of(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    dtype = next(module.parameters()).dtype
    data = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (module(data) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def save_both(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = weights.parameter_names(module)
    checkpoint = {
        "state_dict": weights.as_shares(module.state_dict(), module, {}, True),
        "optimizer_states": [optimizers.state_by_name(optimizer, names, {})],
    }
    save(folder, checkpoint, Manifest.of(checkpoint))


def load_both(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    checkpoint = Checkpoint(folder).load()
    weights.load_weights(module, {}, checkpoint["state_dict"])
    optimizers.load_state(optimizer, weights.parameter_names(module), {}, checkpoint["optimizer_states"][0])


@pytest.mark.parametrize("name", MAKERS)
def test_training_goes_on_bit_by_bit(tmp_path: Path, name: str) -> None:
    module, other = module_of(1), module_of(2)
    optimizer, another = MAKERS[name](list(module.parameters())), MAKERS[name](list(other.parameters()))
    train(module, optimizer, 3)
    save_both(tmp_path / "a.ckpt", module, optimizer)
    load_both(tmp_path / "a.ckpt", other, another)
    train(module, optimizer, 2)
    train(other, another, 2)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_state_follows_its_parameter_s_type_unless_it_has_one_of_its_own(tmp_path: Path) -> None:
    module, other = module_of(1, torch.float64), module_of(2, torch.float32)
    optimizer, another = torch.optim.Adam(module.parameters()), torch.optim.Adam(other.parameters())
    train(module, optimizer, 1)
    save_both(tmp_path / "double.ckpt", module, optimizer)
    load_both(tmp_path / "double.ckpt", other, another)
    assert {t.dtype for state in another.state.values() for t in state.values()} == {torch.float32}
    train(other, another, 1)
    half = module_of(1, torch.bfloat16)
    optimizer, another = torch.optim.Adam(half.parameters()), torch.optim.Adam(half.parameters())
    for p in half.parameters():  # as optimizers do that keep their moments more exact than the weights
        optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.full(p.shape, 0.123456789)}
    save_both(tmp_path / "half.ckpt", half, optimizer)
    load_both(tmp_path / "half.ckpt", half, another)
    for p in half.parameters():
        assert torch.equal(another.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize(("name", "key"), [("adafactor", "row_var"), ("lbfgs", "al")])
def test_state_that_can_not_be_cut_is_refused(name: str, key: str) -> None:
    module = module_of(1)
    optimizer = MAKERS[name](list(module.parameters()))
    train(module, optimizer, 2)
    cut = {"0.weight": TensorSlice(0, (12,), 2, 0)}
    with pytest.raises(CheckpointError, match=rf"optimizer state '{key}' of 0.weight is .* how it would be cut"):
        optimizers.state_by_name(optimizer, weights.parameter_names(module), cut)


def test_parameters_without_state_and_frozen_ones(tmp_path: Path) -> None:
    module, other = module_of(1), module_of(2)
    for m in (module, other):
        m[0].weight.requires_grad_(False)
    made: list[Any] = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad]) for m in (module, other)]
    save_both(tmp_path / "new.ckpt", module, made[0])
    load_both(tmp_path / "new.ckpt", other, made[1])
    assert not made[1].state
    train(module, made[0], 1)
    save_both(tmp_path / "a.ckpt", module, made[0])
    load_both(tmp_path / "a.ckpt", other, made[1])
    assert len(made[1].state) == 3
    assert not other[0].weight.requires_grad


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    module, other = module_of(1).cuda(), module_of(2).cuda()
    optimizer, another = (torch.optim.AdamW(m.parameters(), fused=True) for m in (module, other))
    for m, o in ((module, optimizer),):
        (m(torch.ones(2, 4, device="cuda"))).sum().backward()
        o.step()
    save_both(tmp_path / "a.ckpt", module, optimizer)
    load_both(tmp_path / "a.ckpt", other, another)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for key, value in optimizer.state[one].items():
            assert torch.equal(another.state[two][key], value)
            assert another.state[two][key].device == value.device
