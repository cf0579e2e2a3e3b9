"""From a module and its training step to a proven :class:`ModelPlan`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from lightning_bharat.plan.blocks import PlanError, block_list, block_names, kinds_of, single_block
from lightning_bharat.plan.model_plan import Column, Cut, ModelPlan
from lightning_bharat.plan.observe import Observation, Step, observe
from lightning_bharat.plan.propose import Candidate, candidates, named_styles, variants
from lightning_bharat.plan.prove import Sample, Verdict


def structural_plan(module: nn.Module) -> ModelPlan:
    """The blocks alone, without a run and without tensor cuts: all that data parallelism asks for."""
    names = block_names(module)
    kinds = kinds_of([module.get_submodule(name) for name in names])
    return ModelPlan(block_list(module) or single_block(module), kinds, single=block_list(module) is None)


@torch.random.fork_rng(devices=[])  # the run that is planned for starts from the random numbers it would have had
def find_plan(
    module: nn.Module, step: Step, batch: Any, ranks: int = 2, plan: dict[str, str] | None = None
) -> ModelPlan:
    """Where ``module`` can be cut over ``ranks`` tensor ranks, observed in one dry run of its step and proven.

    Args:
        module: the whole model, real or on ``meta``; not changed.
        step: ``step(copy of module, batch)`` runs the training step.
        batch: as the loader gives it.
        ranks: tensor ranks for which the cuts are proven; with 1 nothing is cut, only observed.
        plan: module names (with ``*`` for the number of a block) to Hugging Face's strings; proposals come from it
            alone. Without it they come from the model's own plan, else from its structure.

    Raises:
        PlanError: nothing can be cut, or not what ``plan`` asks for; with the numbers that show it.
    """
    styles = named_styles(module, plan)
    seen = observe(module, step, batch, ranks)
    if ranks == 1:
        return _observed(seen, module)
    cuts: dict[str, tuple[Cut, ...]] = {}
    summed: dict[str, tuple[str, ...]] = {}
    whole: dict[str, str] = {}
    sequences: list[str] = [seen.between] if seen.between else []
    for kind in dict.fromkeys(seen.kinds):
        finder = _KindFinder(seen, module, kind, ranks, styles)
        cuts[kind], summed[kind] = finder.cuts, finder.summed
        whole |= finder.whole
        if not sequences:
            cuts[kind], problem = finder.over_sequence()
            sequences += [problem] if problem else []
    if plan is not None:
        _all_used(styles, seen, cuts, whole)
    outside, reasons = _vocabulary(seen, module, ranks, styles)
    if not any(cuts.values()) and not outside:
        tried = "; ".join(f"{name}: {why}" for name, why in whole.items()) or "it has no pair of linears in a row"
        raise PlanError(
            f"nothing in {block_list(module) or 'the model'!r} can be cut over {ranks} tensor ranks ({tried}). "
            "Write tensor_parallel_size=1, or shape the block's tensors from what its linears return "
            "(q.view(*q.shape[:-1], -1, head_dim)) rather than from the width of its input"
        )
    return replace(
        _observed(seen, module),
        cuts=cuts,
        outside=outside,
        sequence=sequences[0] if sequences else "",
        loss=_loss_reason(seen, outside),
        whole=whole | reasons,
        proven=(ranks,),
        summed=summed,
    )


def _observed(seen: Observation, module: nn.Module) -> ModelPlan:
    """What the dry run alone shows: everything but tensor cuts."""
    return ModelPlan(
        blocks=block_list(module) or single_block(module),
        kinds=seen.kinds,
        cuts={kind: () for kind in seen.kinds},
        before=seen.before,
        after=seen.after,
        tied=_tied(module),
        hidden=seen.hidden if seen.hidden is not None else 0,
        single=block_list(module) is None,
        random=seen.random,
        apart=seen.between or seen.apart,
        needs=seen.needs,
        outputs=seen.outputs,
        wire=str(seen.wire).removeprefix("torch."),
        costs=seen.costs,
    )


class _KindFinder:
    """The proven cuts of one kind of block."""

    def __init__(self, seen: Observation, module: nn.Module, kind: str, ranks: int, styles: dict[str, str]) -> None:
        self.seen, self.kind, self.ranks = seen, kind, ranks
        self.prefix = seen.names[seen.kinds.index(kind)]
        self.whole: dict[str, str] = {}
        self.sample = Sample(seen, module, kind)
        self.summed: tuple[str, ...] = ()
        found = candidates(seen, kind, styles)
        self.cuts = self._simplest(found)
        if not self.cuts:
            self.cuts = tuple(filter(None, map(self._first_proven, found)))
            if self.cuts:
                self._prove_together()

    def _simplest(self, found: list[Candidate]) -> tuple[Cut, ...]:
        """The first variant of every candidate, if they are right together: the usual case, in one proof."""
        attention = self.seen.attention.get(self.prefix)
        cuts = tuple(next(variants(self.sample.block, c, attention, self.ranks), None) for c in found)
        if any(cut is None or cut.units % self.ranks for cut in cuts) or any(map(self._read_outside, found)):
            return ()
        whole = cast(tuple[Cut, ...], cuts)
        verdict = self.sample.prove(whole, self.ranks)
        if not verdict.problem and verdict.summed:
            self.summed = verdict.summed
            verdict = self.sample.prove(whole, self.ranks, self.summed)
        if verdict.problem or verdict.summed:
            self.summed = ()
            return ()
        return whole

    def _first_proven(self, candidate: Candidate) -> Cut | None:
        read = self._read_outside(candidate)
        if read:
            self._stays_whole(candidate, read)
            return None
        block, problem = self.sample.block, ""
        for cut in variants(block, candidate, self.seen.attention.get(self.prefix), self.ranks):
            verdict = self.sample.prove([cut], self.ranks if cut.units % self.ranks == 0 else _factor(cut.units))
            if not verdict.problem:
                return cut
            problem = problem or verdict.problem
        self._stays_whole(candidate, problem or f"its sizes do not divide by {self.ranks}")
        return None

    def _read_outside(self, candidate: Candidate) -> str:
        for name in (*candidate.columns, *candidate.rows):
            for parameter, where in self.seen.read_outside.items():
                if parameter.startswith(f"{self.prefix}.{name}."):
                    return f"{parameter} is read in {where}, outside its module"
        return ""

    def _stays_whole(self, candidate: Candidate, why: str) -> None:
        self.whole[f"{self.prefix}: {', '.join(candidate.columns)} → {', '.join(candidate.rows)}"] = why

    def _prove_together(self) -> None:
        fitting = [cut for cut in self.cuts if cut.units % self.ranks == 0]
        verdict = self.sample.prove(fitting, self.ranks)
        if not verdict.problem and verdict.summed:
            self.summed = verdict.summed
            verdict = self.sample.prove(fitting, self.ranks, self.summed)
        if verdict.problem or verdict.summed:
            raise PlanError(f"the cuts of {self.prefix} are right alone and wrong together: {verdict}")

    def over_sequence(self) -> tuple[tuple[Cut, ...], str]:
        """The cuts with the place where a divided sequence is gathered, and "" or why it can't be divided."""
        if not self.cuts or any(cut.units % self.ranks for cut in self.cuts):
            return self.cuts, f"{self.prefix} has no cuts"
        verdict = Verdict("no sequence dimension")
        for entries in (True, False):
            cuts = tuple(replace(cut, entry=self._entry(cut) if entries else "") for cut in self.cuts)
            verdict = self.sample.prove(cuts, self.ranks, self.summed, divided=True)
            if not verdict.problem and not verdict.summed:
                return (
                    (cuts, "")
                    if self.sample.was_divided
                    else (self.cuts, "the hidden state is not (batch, time, channels)")
                )
        return self.cuts, f"{self.prefix}: {verdict.problem or f'partial gradients of {verdict.summed}'}"

    def _entry(self, cut: Cut) -> str:
        """The smallest module around all columns and rows; none if that is the block."""
        names = [c.module.split(".")[:-1] for c in cut.columns] + [row.split(".")[:-1] for row in cut.rows]
        common: list[str] = []
        for level in zip(*names, strict=False):
            if len(set(level)) > 1:
                break
            common.append(level[0])
        return ".".join(common)


def _vocabulary(
    seen: Observation, module: nn.Module, ranks: int, styles: dict[str, str]
) -> tuple[tuple[Cut, ...], dict[str, str]]:
    """Cuts of heads and embeddings along the vocabulary, by its size; and what stays whole, with the reason."""
    groups: dict[int, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name in seen.heads:
        if name in seen.after:
            groups[cast(nn.Linear, module.get_submodule(name)).out_features][0].append(name)
    for name, child in module.named_modules():
        if isinstance(child, nn.Embedding) and child.num_embeddings in groups and name in seen.order:
            groups[child.num_embeddings][1].append(name)
    found, whole = [], {}
    for size, (heads, embeddings) in groups.items():
        why = _vocabulary_problem(seen, module, ranks, size, heads + embeddings)
        if why:
            whole[", ".join(heads + embeddings)] = why
        elif heads:
            found.append(Cut("vocabulary", size, tuple(Column(h, (size,)) for h in heads), tuple(embeddings)))
    return tuple(found), whole


def _vocabulary_problem(seen: Observation, module: nn.Module, ranks: int, size: int, names: list[str]) -> str:
    if size % ranks:
        return f"the vocabulary of {size} does not divide by {ranks}; pad it to {-(-size // ranks) * ranks}"
    users: dict[int, list[str]] = defaultdict(list)
    for name, child in module.named_modules():
        for parameter in child.parameters(recurse=False):
            users[id(parameter)].append(name)
    for name in names:
        child = module.get_submodule(name)
        if isinstance(child, nn.Embedding):
            if type(child).forward is not nn.Embedding.forward:
                return f"{name} is an embedding with a forward of its own"
            if child.max_norm is not None or child.sparse or child.scale_grad_by_freq:
                return f"{name} uses max_norm, sparse or scale_grad_by_freq"
        for leaf, parameter in child.named_parameters(recurse=False):
            if set(users[id(parameter)]) - set(names):
                return f"{name}.{leaf} is tied to {', '.join(set(users[id(parameter)]) - set(names))}"
            if f"{name}.{leaf}" in seen.read_outside:
                return f"{name}.{leaf} is read in {seen.read_outside[f'{name}.{leaf}']}, outside its module"
    return ""


def _loss_reason(seen: Observation, outside: Iterable[Cut]) -> str:
    if not any(cut.columns for cut in outside):
        return "the head is not cut"
    return f"the training step needs whole logits for {', '.join(dict.fromkeys(seen.gathers))}" if seen.gathers else ""


def _tied(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return tuple(tuple(alike) for alike in names.values() if len(alike) > 1)


def _all_used(
    styles: dict[str, str], seen: Observation, cuts: dict[str, tuple[Cut, ...]], whole: dict[str, str]
) -> None:
    """Refuse a person's plan of which something could not be proven."""
    if whole:
        name, why = next(iter(whole.items()))
        raise PlanError(f"plan: the cut of {name} is not right: {why}. Leave these names out of plan: they stay whole")
    for block, kind in zip(seen.names, seen.kinds, strict=True):
        used = {n for cut in cuts[kind] for n in (*(c.module for c in cut.columns), *cut.rows)}
        for name, style in styles.items():
            inside = name.removeprefix(f"{block}.")
            if name.startswith(f"{block}.") and style != "whole" and inside not in used:
                raise PlanError(
                    f"plan: {name!r} is named as a {style}, but no cut of columns whose outputs alone reach a row "
                    "has it; "
                    "name both ends: the linears before (colwise) and the linear after (rowwise)"
                )


def _factor(units: int) -> int:
    return next(n for n in range(2, units + 1) if units % n == 0)
