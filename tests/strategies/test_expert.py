"""Experts spread over data ranks: losses, gradients, norms and logs of one process, in float64 to 1e-9."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_bharat.callbacks import ReplicaCheck
from tests.experts import TrainedGPT, TrainedMixture, held, own
from tests.modules import Result, Trained, assert_equal, fit
from tests.ranks import RanksFailed, run_ranks

WINDOW = {"steps": 3, "gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
EXPERT, TENSOR = {"expert_parallel_size": 2}, {"tensor_parallel_size": 2}


def _fits(cases: list[tuple[str, dict[str, Any] | None]]) -> list[Result]:
    return [fit(partial(TrainedMixture, name), strategy, **_window(name)) for name, strategy in cases]


def _window(name: str) -> dict[str, Any]:
    return {**WINDOW, "steps": 6} if name in ("own", "deep") else WINDOW


@cache
def whole(name: str) -> Result:
    return run_ranks(_fits, 1, [(name, None)])[0][0]


def compare(ranks: int, *cases: tuple[str, dict[str, Any]], tolerance: float = 1e-9) -> list[Result]:
    """Several fits in one job."""
    every = run_ranks(_fits, ranks, cases, timeout=60)
    for of_rank in every:
        for (name, _), found in zip(cases, of_rank, strict=True):
            assert_equal(found, whole(name), tolerance)
    return every[0]


def test_data_ranks_alone_train_it_as_any_module() -> None:
    compare(2, ("own", {}), ("one expert", {}))


def test_experts_over_both_data_ranks() -> None:
    found = compare(2, ("own", EXPERT), ("sigmoid, groups", EXPERT), ("one expert", EXPERT))
    assert "2 modules keep 1/2 of their 8 experts on each rank; proven" in found[0].explain


def test_experts_over_pairs_and_fours_of_data_ranks() -> None:
    found = compare(4, ("own", EXPERT), ("one expert", EXPERT), ("own", {"expert_parallel_size": 4}))
    assert "keep 1/4 of their 8 experts" in found[2].explain
    compare(4, ("two experts", EXPERT))  # one for each pair: of two copies, one rank holds it


def test_each_option_alone() -> None:
    options = [{"reshard_after_forward": False}, {"activation_checkpointing": "full"}, {"offload": True}]
    options += [{"token_weighted": True}, {"compile": {"backend": "eager"}}]
    compare(2, *(("own", {**EXPERT, **option}) for option in options))


def test_unchanged_hugging_face_models() -> None:
    """Their routers compute scores in float32, whose rounding shows."""
    compare(2, ("qwen3 moe", EXPERT), ("mixtral", EXPERT), ("deepseek v3", EXPERT), tolerance=1e-6)


STAGED = {**EXPERT, "pipeline_parallel_size": 2, "num_microbatches": 2}
PARTS = {**EXPERT, "context_parallel_size": 2}


def test_with_tensor_ranks_and_with_pipeline_stages() -> None:
    found = compare(4, ("own", {**EXPERT, "tensor_parallel_size": 2}), ("own", STAGED))
    assert "proven for 2 tensor ranks" in found[0].explain
    assert "Layout(data=2, pipeline=2, expert=2)" in found[1].explain


def test_tensor_ranks_divide_the_sequence_around_shared_experts() -> None:
    (found,) = compare(2, ("own", TENSOR))
    assert "sequence_parallel: used, proven" in found.explain


def test_experts_that_choose_their_tokens() -> None:
    compare(2, *(("expert choice", strategy) for strategy in ({}, EXPERT, TENSOR)))
    compare(4, ("expert choice", STAGED))


def test_with_context_ranks_out_of_which_they_are_taken_too() -> None:
    found = compare(2, ("own", PARTS))
    assert "Layout(context=2, expert=2)" in found[0].explain
    compare(
        4, ("own", PARTS), ("own", {**PARTS, "expert_parallel_size": 4}), ("own", {**PARTS, "tensor_parallel_size": 2})
    )


def test_on_eight_ranks_of_tensor_pipeline_and_context() -> None:
    compare(8, ("deep", {**PARTS, **STAGED, "tensor_parallel_size": 2}))


def test_with_schedules_that_split_the_backward_pass() -> None:
    kinds = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    compare(4, *(("deep", {**STAGED, "schedule": kind, "num_microbatches": 4}) for kind in kinds))


def test_pieces_of_experts_are_no_copies() -> None:
    """A check of what ranks hold the same finds nothing."""
    run_ranks(_checked, 4, EXPERT)
    run_ranks(_checked, 4, {**PARTS, "expert_parallel_size": 4})


def _checked(strategy: dict[str, Any]) -> None:
    fit(partial(TrainedMixture, "own"), strategy, steps=2, callbacks=[ReplicaCheck(1)])


BALANCED = {"router_aux_loss_coef": 0.1, "bias_update_speed": 0.05}


def _balanced(strategy: dict[str, Any] | None, options: dict[str, Any]) -> tuple[Result, list]:
    made: list[TrainedGPT] = []

    def module() -> TrainedGPT:
        made.append(TrainedGPT(**options))
        return made[0]

    found = fit(module, strategy, **WINDOW)
    return found, [layer.mlp.gate.bias_steps.tolist() for layer in made[0].model.layers]


# Ranks, and arguments of the strategy and of the module.
BALANCES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "data": (2, {}, BALANCED),
    "expert": (2, EXPERT, BALANCED),
    "pipeline": (4, STAGED, {"bias_update_speed": 0.05}),
    "context": (2, PARTS, {"bias_update_speed": 0.05, "scoring_func": "sigmoid"}),
    "lazy": (2, EXPERT, {"bias_update_speed": 0.05, "lazy": True}),
}


def _balances(ranks: int) -> dict[str, tuple[Result, list]]:
    cases = {name: case for name, case in BALANCES.items() if ranks in (1, case[0])}
    alone = {name: {} if "lazy" in options else None for name, (_, _, options) in cases.items()}
    return {name: _balanced(alone[name] if ranks == 1 else case[1], case[2]) for name, case in cases.items()}


@cache
def balances(ranks: int) -> list[dict[str, tuple[Result, list]]]:
    return run_ranks(_balances, ranks, ranks, timeout=60)


@pytest.mark.parametrize("name", BALANCES)
def test_balance_is_that_of_the_whole_batch(name: str) -> None:
    """The loss, the biases and what is logged of them."""
    ranks, _, options = BALANCES[name]
    expected, steps = balances(1)[0][name]
    for of_rank in balances(ranks):
        found, moved = of_rank[name]
        assert_equal(found, expected)
        assert moved == steps
    assert steps[0] != [0] * 8
    assert {"expert_imbalance", "dropped_tokens", "router_entropy"} <= expected.metrics.keys()
    assert ("balance_loss" in expected.metrics) == ("router_aux_loss_coef" in options)


@pytest.mark.parametrize("strategy", [STAGED, {**PARTS, "data_parallel_size": 2}], ids=str)
def test_a_loss_that_reads_all_blocks_is_refused_where_these_are_apart(strategy: dict[str, Any]) -> None:
    with pytest.raises(RanksFailed, match="the output of model.layers.0 is read in the loss"):
        run_ranks(_balanced, 4, strategy, BALANCED)


HALF, ALL = 2, 4  # an epoch, and two of them


def _part(strategy: dict[str, Any] | None, folder: str, steps: int, options: dict[str, Any]) -> Result:
    saving = ModelCheckpoint(folder, "step", every_n_train_steps=HALF, save_on_train_epoch_end=False)
    kept = {"enable_checkpointing": True, "callbacks": [saving]} if steps == HALF else {}
    return fit(partial(TrainedMixture, "own"), strategy, steps=steps, batches=HALF, **kept, **options)


@cache
def _all_of_it() -> Result:
    return run_ranks(_part, 1, None, "", ALL, {})[0]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((2, {"expert_parallel_size": 2}), (4, {"expert_parallel_size": 2})),
        ((4, {"expert_parallel_size": 2, "save_distributed_checkpoint": False}), (1, {})),
        ((2, {}), (2, {"expert_parallel_size": 2})),
        ((4, {"expert_parallel_size": 4}), (2, {"tensor_parallel_size": 2})),
    ],
    ids=str,
)
def test_any_layout_goes_on_with_what_any_saved(saved: tuple, loaded: tuple, tmp_path: Path) -> None:
    expected = _all_of_it()
    run_ranks(_part, saved[0], saved[1], str(tmp_path), HALF, {})
    found = run_ranks(_part, loaded[0], loaded[1], "", ALL, {"ckpt": str(next(tmp_path.glob("step*")))})[0]
    assert_close([*found.seen], expected.seen[HALF:])
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-9, msg=name)


def assert_close(found: list, expected: list) -> None:
    torch.testing.assert_close(torch.tensor(found).double(), torch.tensor(expected).double(), rtol=1e-9, atol=1e-9)


class Shapes(TrainedMixture):
    """Keeps which pieces of the experts' weights a rank holds while it trains."""

    def on_train_end(self) -> None:
        self.held = held(self)


def _held(strategy: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    made: list[Shapes] = []

    def module() -> Shapes:
        made.append(Shapes("own"))
        return made[0]

    fit(module, strategy, steps=1)
    return made[0].held


def test_a_rank_holds_its_share_of_the_experts() -> None:
    for shapes in run_ranks(_held, 4, {"expert_parallel_size": 2}):
        assert set(shapes.values()) == {(2, 32, 32), (2, 32, 16)}  # of 8, over 2 expert ranks × 2 copies


class Normalizing(nn.Module):
    """Fused experts that are no sum over a token's choices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32, 32))

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        weights = weights / weights.abs().sum(-1, keepdim=True)
        return torch.einsum("nkoi,ni,nk->no", self.weight[chosen], hidden, weights)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(4))


class Expert(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 32)


def _refused(change: str, strategy: dict[str, Any]) -> Result:
    def module() -> Trained:
        made = TrainedMixture("own")
        for layer in made.model.layers:  # type: ignore[union-attr]
            if change == "normalizing":
                layer.mlp.experts = Normalizing()
            elif change == "listed":
                layer.mlp.experts = Listed()
            elif change == "choosing":
                layer.mlp = own(router_choice="expert").layers[0].mlp  # type: ignore[union-attr]
        return made

    return fit(module, strategy, steps=1)


@pytest.mark.parametrize(
    ("change", "ranks", "strategy", "words"),
    [
        ("", 3, {"expert_parallel_size": 3}, "does not divide the 8 experts of model.layers.0.mlp.experts; sizes"),
        ("", 2, {"expert_parallel_size": 3}, "expert_parallel_size=3 does not divide the 2 data ranks"),
        ("", 2, {"expert_parallel_size": 2, "replicate_size": 2}, "write replicate_size=1"),
        ("", 2, {"expert_parallel_size": 2, "activation_checkpointing": "selective"}, 'write "full" or leave it out'),
        ("normalizing", 2, {"expert_parallel_size": 2}, r"experts \(Normalizing\) does not compute the same when"),
        ("choosing", 2, {"context_parallel_size": 2}, "context_parallel_size"),
        ("listed", 2, {"expert_parallel_size": 2}, r"experts \(ModuleList\) is none. That is a module whose"),
        ("", 4, {"expert_parallel_size": 2, "tensor_parallel_size": 2, "sequence_parallel": True}, "sequence_parallel"),
    ],
)
def test_refused(change: str, ranks: int, strategy: dict[str, Any], words: str) -> None:
    with pytest.raises(RanksFailed, match=words) as failed:
        run_ranks(_refused, ranks, change, strategy)
    assert len({(outcome.error, outcome.message) for outcome in failed.value.outcomes}) == 1
