"""Optimizers on each layout: one process in float64 to 1e-9, or refused by words where pieces are not enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer

from lightning_bharat.strategies.optimizer_proof import OptimizerError
from tests.modules import Result, assert_equal, fit
from tests.ranks import run_ranks
from tests.strategies.layouts import LAYOUTS, Case, Layers, check, places, run
from tests.strategies.odd import OnVectors

Make = Callable[[nn.Module], Any]


class By(OnVectors):
    """Trained by the optimizer that ``make`` gives for the module."""

    def __init__(self, make: Make) -> None:
        super().__init__(Layers())
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self)


def case(make: Make, **options: Any) -> Case:
    return Case(lambda: By(make), options)


def of(kind: type[Optimizer], **options: Any) -> Case:
    """Treats each element by itself: on data × tensor ranks as on each of these axes."""
    return Case(lambda: By(lambda module: kind(module.parameters(), **{"lr": 1e-2, **options})), both=False)


def groups(module: nn.Module) -> Optimizer:
    """Three, of different rates, one of them empty."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": [], "lr": 1.0}, {"params": rest, "lr": 3e-2}],
        lr=1e-2,
        eps=1e-4,
    )


class Lamb(Optimizer):
    """Scales each update by a norm of the whole weight over that of the whole update (as in LAMB and LARS)."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 0.1)
                    ratio = (p.norm() + 0.1) / (mean.norm() + 0.1)
                    p.add_(mean * ratio, alpha=-group["lr"])
        return loss


class Lookahead(Optimizer):
    """A wrapper: slow weights follow those of the optimizer inside, every second step."""

    def __init__(self, inside: Optimizer) -> None:
        super().__init__(inside.param_groups, {})
        self.inside, self.steps = inside, 0
        self.param_groups = inside.param_groups

    def step(self, closure: Any = None) -> Any:
        loss = self.inside.step(closure)
        self.steps += 1
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    slow = self.state[p].setdefault("slow", p.detach().clone())
                    if self.steps % 2 == 0:
                        slow.lerp_(p.detach(), 0.5)
                        p.copy_(slow)
        return loss


def lookahead(module: nn.Module) -> Optimizer:
    return Lookahead(torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9))


def muon(module: nn.Module) -> Optimizer:
    return torch.optim.Muon([p for p in module.parameters() if p.ndim == 2], lr=1e-2)


def lamb_on_what_is_whole(module: Any) -> list[Optimizer]:
    """As the refusal says: what is cut by another optimizer."""
    cut = {id(p) for layer in module.model.layers for m in (layer.up, layer.down) for p in m.parameters()}
    return [
        Lamb([p for p in module.parameters() if id(p) not in cut]),
        torch.optim.AdamW([p for p in module.parameters() if id(p) in cut], lr=1e-2, eps=1e-4),
    ]


class ByTwo(By):
    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


CASES = {
    "groups": case(groups),
    "sgd": of(optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd maximize": of(optim.SGD, maximize=True, lr=1e-4),
    "adam amsgrad": of(optim.Adam, amsgrad=True, eps=1e-4),
    "adamw fused": of(optim.AdamW, fused=True, eps=1e-4),
    "adamw foreach": case(lambda module: optim.AdamW(module.parameters(), 1e-2, eps=1e-4, foreach=True)),
    "adamw one by one": of(optim.AdamW, foreach=False, eps=1e-4),
    "adamw tensor rate": of(optim.AdamW, lr=torch.tensor(1e-2), eps=1e-4),
    "adagrad": of(optim.Adagrad, eps=1e-4, initial_accumulator_value=0.1),
    "adadelta": of(optim.Adadelta, lr=1.0),
    "adamax": of(optim.Adamax, eps=1e-4),
    "asgd": of(optim.ASGD),
    "nadam": of(optim.NAdam, eps=1e-4),
    "radam": of(optim.RAdam, eps=1e-4),
    "rmsprop": of(optim.RMSprop, momentum=0.5, centered=True, eps=1e-3),
    "wrapper": case(lookahead),
    "lamb on what is whole": Case(lambda: ByTwo(lamb_on_what_is_whole)),
}
# Look at whole tensors, which DTensors show them.
OVER_DATA = {
    "lbfgs": of(optim.LBFGS, lr=0.1, max_iter=3),
    "lamb": of(Lamb),
}
# Treat each element by itself, in functions that DTensors don't have.
OVER_TENSOR = {
    "rprop": of(optim.Rprop, lr=1e-3),
    "sgd fused": of(optim.SGD, fused=True, momentum=0.9),
}
OTHERS = {"adafactor": of(optim.Adafactor), "muon": case(muon), "sparse adam": of(optim.SparseAdam)}
ALL = CASES | OVER_DATA | OVER_TENSOR | OTHERS

LOOKS = "looks at whole tensors .* piece of model.layers.0.up.weight .*AdamW, SGD.*tensor_parallel_size=1"
REFUSED = {
    "data 2": {
        "adafactor": r"Adafactor can't step on pieces of parameters \(.*use torch.optim.AdamW or SGD",
        "rprop": r"Rprop can't step on pieces of parameters",
        "sgd fused": "SGD can't step on pieces .*leave fused=True out",
    },
    "tensor 2": {
        **{
            name: f"{kind} {LOOKS}" for name, kind in {"adafactor": "Adafactor", "muon": "Muon", "lamb": "Lamb"}.items()
        },
        "lbfgs": f"LBFGS {LOOKS}",
        "sparse adam": r"SparseAdam could not be tried .*dense gradients.*optimizer.elementwise = True",
    },
    "data 2 × tensor 2": {"lamb": f"Lamb {LOOKS}", "muon": f"Muon {LOOKS}", "lbfgs": f"LBFGS {LOOKS}"},
}


@pytest.mark.parametrize(("name", "layout"), places(CASES))
def test_as_on_one_process(name: str, layout: str) -> None:
    check(CASES, name, layout)


def trained(names: list[str], strategy: dict[str, Any] | None) -> list[Result]:
    return [run(ALL[name], strategy) for name in names]


@pytest.mark.parametrize(("layout", "cases"), [("data 2", OVER_DATA), ("tensor 2", OVER_TENSOR)])
def test_as_on_one_process_over_one_axis(layout: str, cases: dict[str, Case]) -> None:
    ranks, strategy = LAYOUTS[layout]
    expected = run_ranks(trained, 1, [*cases], None)[0]
    for results in run_ranks(trained, ranks, [*cases], strategy):
        for found, one in zip(results, expected, strict=True):
            assert_equal(found, one)


def muon_in_float64(strategy: dict[str, Any] | None) -> Result:
    """It rounds gradients to bfloat16, and its iterations make that a difference of percents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
        return trained(["muon"], strategy)[0]


def test_matrix_products_over_data_ranks() -> None:
    expected = run_ranks(muon_in_float64, 1, None)[0]
    for found in run_ranks(muon_in_float64, 2, {}):
        assert_equal(found, expected)


def refused(layout: str) -> None:
    for name, words in REFUSED[layout].items():
        with pytest.raises(OptimizerError, match=words):
            fit(ALL[name].module, LAYOUTS[layout][1], steps=1)


@pytest.mark.parametrize("layout", REFUSED)
def test_what_needs_more_than_pieces_is_refused(layout: str) -> None:
    run_ranks(refused, LAYOUTS[layout][0], layout)


def by_word(strategy: dict[str, Any]) -> str:
    def make(module: nn.Module) -> Optimizer:
        optimizer = torch.optim.SparseAdam(module.parameters())
        optimizer.elementwise = True
        return optimizer

    with pytest.raises(RuntimeError) as failed:
        fit(lambda: By(make), strategy, steps=1)
    return str(failed.value)


def test_what_can_not_be_tried_is_taken_by_a_person_s_word() -> None:
    for said in run_ranks(by_word, 2, {"tensor_parallel_size": 2}):
        assert "SparseAdam does not support dense gradients" in said


STAGES = {"pipeline_parallel_size": 2}


def on_stages(strategy: dict[str, Any] | None) -> list[Result]:
    return [fit(ALL[name].module, strategy, 6, batch=6) for name in ("lamb", "adafactor", "rprop", "adam amsgrad")]


def refused_on_stages() -> None:
    words = r"LBFGS looks at whole tensors or at all of them together .* write pipeline_parallel_size=1"
    with pytest.raises(OptimizerError, match=words):
        fit(ALL["lbfgs"].module, STAGES, steps=1)


def test_stages_hold_whole_parameters_but_not_all() -> None:
    expected = run_ranks(on_stages, 1, None)[0]
    for results in run_ranks(on_stages, 2, STAGES):
        for found, one in zip(results, expected, strict=True):
            assert_equal(found, one)
    run_ranks(refused_on_stages, 2)
