"""``token_weighted=True``: every valid label counts the same, on whatever rank and in whatever batch it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import BaseTorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_bharat.strategies.token_weights import _Watch, counted_labels, uncounted
from tests.modules import Trained, Wrapped, fit
from tests.ranks import RanksFailed, run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor_parallel_size": 2}),
    "data 2 × tensor 2": (4, {"tensor_parallel_size": 2}),
    "data 4 in 2 copies": (4, {"replicate_size": 2}),
    "all options": (2, {"activation_checkpointing": "full", "offload": True}),
}
ROWS = 8  # of a batch, over all data ranks


class Ragged(Trained):
    """Trained on labels of which few or none are valid.

    Args:
        loss: what the step computes, a name of :data:`LOSSES`.
        without: rows (of all there are) without any valid label.
        by_hand: the step differentiates its losses itself, and steps after that many batches.

    Attributes:
        norms: of all gradients, before each step of the optimizer.
    """

    def __init__(self, model: str = "nano", loss: str = "mean", without: Any = (), by_hand: int = 0) -> None:
        super().__init__(model)
        self.kind, self.without, self.by_hand = loss, torch.tensor([*without]), by_hand
        self.automatic_optimization = not by_hand
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = batch["labels"].masked_fill(torch.isin(batch["rows"], self.without)[:, None], -100)
        loss = LOSSES[self.kind](self, batch["ids"], labels)
        self.log("loss", loss, sync_dist=True)
        if not self.by_hand:
            return loss
        self.manual_backward(loss / self.by_hand)
        if (batch_idx + 1) % self.by_hand == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
            self.lr_schedulers().step()
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self.norms.append(self.norm)

    def logits(self, ids: Tensor) -> Tensor:
        whole = self.model.model(input_ids=ids).logits if isinstance(self.model, Wrapped) else self.model(ids)
        return whole.flatten(0, 1)


def _mean(module: Ragged, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(module.logits(ids), labels.flatten())


LOSSES: dict[str, Callable[[Ragged, Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "of the model": lambda m, ids, y: m.model.model(input_ids=ids, labels=y).loss,
    "another ignored": lambda m, ids, y: F.cross_entropy(m.logits(ids), y.flatten().clamp(min=0), ignore_index=0),
    "half, smoothed": lambda m, ids, y: 0.5 * nn.CrossEntropyLoss(label_smoothing=0.1)(m.logits(ids), y.flatten()),
    "likelihood": lambda m, ids, y: F.nll_loss(m.logits(ids).log_softmax(-1), y.flatten()),
    "weighed classes": lambda m, ids, y: F.cross_entropy(m.logits(ids), y.flatten(), torch.arange(96.0).double() + 1),
    # none of these is the mean over labels
    "squares": lambda m, ids, y: F.mse_loss(m.logits(ids), m.logits(ids).detach() + 1),
    "sum": lambda m, ids, y: F.cross_entropy(m.logits(ids), y.flatten(), reduction="sum") / (y >= 0).sum(),
    "another term": lambda m, ids, y: _mean(m, ids, y) + 0.1 * m.model.head.weight.square().mean(),
    "two means": lambda m, ids, y: _mean(m, ids, y) + _mean(m, ids, y.flip(0)),
    "perplexity": lambda m, ids, y: _mean(m, ids, y).exp(),
    "inverse": lambda m, ids, y: -1 / _mean(m, ids, y),
    "recomputed": lambda m, ids, y: checkpoint(_mean, m, ids, y, use_reentrant=False),
}


def trained(strategy: dict[str, Any] | None, steps: int, options: dict[str, Any], **loop: Any) -> Any:
    made: list[Ragged] = []

    def make() -> Ragged:
        made.append(Ragged(**options))
        return made[-1]

    strategy = strategy if strategy is None else {"token_weighted": True, **strategy}
    run = fit(make, strategy, steps, ragged=True, limit_val_batches=1, **loop)  # validation is not compared
    return torch.tensor(made[0].norms, dtype=torch.float64), run.gradients, run.weights, run.metrics["loss"]


@dataclass(frozen=True)
class Case:
    """Windows of batches on a layout, against one process for which each window is one batch.

    Attributes:
        windows: their batches. Not the last may be smaller than the first.
        options: of :class:`Ragged`.
    """

    layout: str
    windows: tuple[int, ...] = (2, 2)
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-9

    @property
    def steps(self) -> int:
        return len(self.windows) + 1

    def whole(self) -> Any:
        accumulate, last = self.windows[0], self.windows[-1] % self.windows[0]
        whole = {"batch": ROWS * accumulate, "batches": len(self.windows) - bool(last), "last": ROWS * last}
        alone = {name: value for name, value in self.options.items() if name != "by_hand"}
        return trained(None, self.steps, alone, **whole)

    def cut(self) -> Any:
        accumulate = 1 if self.options.get("by_hand") else self.windows[0]
        parts = {"batch": ROWS, "batches": sum(self.windows), "accumulate_grad_batches": accumulate}
        return trained(LAYOUTS[self.layout][1], self.steps, dict(self.options), **parts)


BOTH = "data 2 × tensor 2"
FEW = {"without": (*range(8, 12), *range(16, 24))}
MEANS = ("another ignored", "half, smoothed", "likelihood", "weighed classes")
CASES = {
    **{layout: Case(layout, (3, 3, 1), FEW) for layout in LAYOUTS if layout != "all options"},
    **{loss: Case(BOTH, options={"loss": loss}) for loss in MEANS},
    **{name: Case(BOTH, options={"model": name, "loss": "of the model"}, tolerance=1e-5) for name in ("llama", "gpt2")},
    "by hand": Case(BOTH, options={"by_hand": 2}),
    "all options": Case("all options"),
}


@cache
def wholes() -> dict[str, Any]:
    return run_ranks(_wholes, 1, timeout=60)[0]


def _wholes() -> dict[str, Any]:
    return {name: case.whole() for name, case in CASES.items()}


@cache
def cuts(ranks: int) -> list[dict[str, Any]]:
    return run_ranks(_cuts, ranks, ranks, timeout=90)


def _cuts(ranks: int) -> dict[str, Any]:
    return {name: case.cut() for name, case in CASES.items() if LAYOUTS[case.layout][0] == ranks}


def compare(name: str) -> None:
    case = CASES[name]
    norms, gradients, weights, _ = wholes()[name]
    for of_rank in cuts(LAYOUTS[case.layout][0]):
        found = of_rank[name]
        torch.testing.assert_close(found[0], norms, rtol=case.tolerance, atol=0)
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[1][key], gradient, rtol=case.tolerance, atol=case.tolerance, msg=key)
        for key, weight in weights.items():
            torch.testing.assert_close(found[2][key], weight, rtol=0, atol=1e3 * case.tolerance, msg=key)


def _trained(strategy: Any, steps: int, options: dict[str, Any], loop: dict[str, Any]) -> Any:
    return trained(strategy, steps, options, **loop)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "all options"])
def test_labels_count_alike_on_all_ranks_and_in_all_batches(layout: str) -> None:
    """Windows of three batches, the last one of an epoch of one; in the second batch just one data rank has labels, in
    the third none."""
    compare(layout)


@pytest.mark.parametrize("loss", MEANS)
def test_each_mean_over_labels(loss: str) -> None:
    compare(loss)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_loss_inside_hugging_faces_model(model: str) -> None:
    """It is computed in float32."""
    compare(model)


def test_a_step_that_differentiates_by_hand() -> None:
    compare("by hand")


def test_recomputed_blocks_and_offload() -> None:
    compare("all options")


def test_a_window_without_labels_changes_nothing() -> None:
    """Its gradients are zero, not 0 / 0; so is its loss."""
    for strategy, ranks in (({}, 2), ({"tensor_parallel_size": 2}, 2)):
        for norms, gradients, weights, loss in run_ranks(
            _trained, ranks, strategy, 4, {"without": range(16)}, {"accumulate_grad_batches": 2, "batches": 8}
        ):
            assert norms[0] == 0 and (norms[1:] > 0.1).all() and loss > 1
            assert not any(gradient.any() for gradient in gradients.values())
            assert all(weight.isfinite().all() for weight in weights.values())


def scaled(strategy: dict[str, Any] | None, loop: dict[str, Any]) -> Tensor:
    scaler = torch.amp.GradScaler("cpu", 256.0, growth_interval=1)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    return trained(strategy, 4, {}, precision=None, plugins=[plugin], **loop)[0]


def test_scaled_losses_are_weighed_too() -> None:
    expected = run_ranks(scaled, 1, None, {"batch": 16, "batches": 2})[0]
    for norms in run_ranks(scaled, 4, {"tensor_parallel_size": 2}, {"accumulate_grad_batches": 2, "batches": 4}):
        torch.testing.assert_close(norms, expected, rtol=1e-2, atol=0)


def unweighed(strategy: dict[str, Any] | None, loop: dict[str, Any]) -> list[float]:
    run, window = fit("nano", strategy, 4, ragged=True, **loop), loop.get("accumulate_grad_batches", 1)
    return [norm for _, norm in run.seen][window - 1 :: window]


def test_without_it_means_are_averaged() -> None:
    """As Lightning does in a window of batches: a label on a rank with few counts more."""
    alone = run_ranks(unweighed, 1, None, {"batch": 4, "batches": 8, "accumulate_grad_batches": 2})[0]
    weighed = run_ranks(unweighed, 2, {"token_weighted": True}, {"batch": 8, "batches": 4})[0]
    for found in run_ranks(unweighed, 2, {}, {"batch": 8, "batches": 4}):
        assert found == pytest.approx(alone, rel=1e-9)
        assert all(abs(one / other - 1) > 1e-3 for one, other in zip(found, weighed, strict=True))


# ---- refusals


class Several(Ragged):
    """Two optimizers, or two backward passes in a step."""

    def __init__(self, optimizers: int) -> None:
        super().__init__(by_hand=1)
        self.count = optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            self.manual_backward(_mean(self, batch["ids"], batch["labels"]))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(self.count)]


def several(optimizers: int) -> str:
    with pytest.raises(ValueError) as error:
        fit(lambda: Several(optimizers), {"token_weighted": True})
    return str(error.value)


def test_what_has_no_one_sum_of_labels_is_refused() -> None:
    assert "second backward pass" in run_ranks(several, 1, 1)[0]
    assert "configure_optimizers returns 2" in run_ranks(several, 1, 2)[0]


def refused(losses: list[str]) -> dict[str, str]:
    words = {}
    for loss in losses:
        with pytest.raises(ValueError) as error:
            trained({}, 1, {"loss": loss})
        words[loss] = str(error.value)
    return words


def test_what_is_no_mean_over_labels_is_refused() -> None:
    because = {"squares": "there is none", "sum": "there is none", "recomputed": "outside of checkpoint"}
    words = run_ranks(refused, 1, [*because, "another term", "two means", "perplexity", "inverse"])[0]
    for loss, said in words.items():
        assert because.get(loss, "not a multiple of that") in said, loss
        assert "token_weighted=False" in said
    with pytest.raises(RanksFailed, match="not a multiple of that"):
        run_ranks(_trained, 4, {"tensor_parallel_size": 2}, 1, {"loss": "another term"}, {})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_index": 3},
        {"weight": torch.rand(5, dtype=torch.float64)},
        {"label_smoothing": 0.2},
        {"label_smoothing": 0.2, "weight": torch.rand(5, dtype=torch.float64), "ignore_index": 1},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
@pytest.mark.parametrize("kind", ["classes", "two dimensions", "one row", "probabilities"])
def test_the_mean_stays_torchs(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    shape = {"classes": (7, 5), "two dimensions": (7, 5, 3), "one row": (5,), "probabilities": (7, 5)}[kind]
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 5, {"classes": (7,), "two dimensions": (7, 3), "one row": ()}.get(kind, ()))
    if kind == "probabilities":
        target = torch.randn(7, 5, dtype=torch.float64).softmax(1)
        options = {name: value for name, value in options.items() if name != "ignore_index"}
    expected = F.cross_entropy(logits, target, **options)
    with _Watch() as watch:
        found = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert len(watch.counts) == 1


def test_blocks_of_a_stage_are_not_looked_at() -> None:
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([1, 2, -100, 3])
    with counted_labels(lambda out: out) as count:
        with uncounted():
            inside = F.cross_entropy(logits[:2], labels[:2])
        loss = F.cross_entropy(logits, labels) / 2
    assert count(loss).number == 3 and count(loss).alone
    assert not count(inside).alone


def test_what_another_mode_sees_in_a_block_is_counted_too() -> None:
    """A mode that a person entered is not taken away from under it."""
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([1, 2, -100, 3])
    with counted_labels(lambda out: out) as count:
        with BaseTorchFunctionMode(), uncounted():
            F.cross_entropy(logits[:2], labels[:2])
        loss = F.cross_entropy(logits, labels)
    assert count(loss).number is None
