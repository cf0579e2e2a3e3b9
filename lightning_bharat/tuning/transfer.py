"""A study that learns from earlier ones: on other data, of smaller models, over other ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning._optuna import FIXED, all_trials, note
from lightning_bharat.tuning.acquisition import Params, clipped, propose
from lightning_bharat.tuning.earlier import Earlier, EarlierStudy, losses_of, read_earlier, usable_trials
from lightning_bharat.tuning.knowledge import Knowledge
from lightning_bharat.tuning.samplers import make_sampler
from lightning_bharat.tuning.source_seeds import SEED, Seeds
from lightning_bharat.tuning.surrogate import Array

SHARE = 0.8  # of trials that earlier studies propose, as long as they agree; the others are the base's
RISK = 0.05  # that a source passes which has nothing to do with the study


class TransferSampler(BaseSampler):
    """Proposes points by what earlier studies found, for as long as this study's own results agree with them.

    The first trial is the best point of a source, and up to ``seeds`` of the first ones are, as long as they are better
    than what the base sampler finds between them. Then each source has a weight: the lower end of an interval of the
    rank correlation between what it expects and what came (ranks and weights by similarity as in Wistuba et al., 2016,
    https://doi.org/10.1007/978-3-319-46128-1_3, and Feurer et al., 2018, https://arxiv.org/abs/1802.02219). As long as
    no weight is above 0, the base sampler goes on alone; so sources that have nothing to do with the study cost the
    seeds and no more.

    Parameters are matched by name, numbers with numbers and choices with choices; each is asked one by one, so
    conditional ones too, and what no source knows comes from the base. Points are clipped to the study's own ranges.

    Args:
        sources: earlier studies with one objective: an ``optuna.Study``, its folder, or its storage and name; or what
            was read of them. The direction of each is its own.
        base: the sampler without sources: a name, options, or a sampler, as :func:`make_sampler` takes it.
        seed: of the proposals, and of a named base.
        seeds: at most so many trials are the sources' best points.

    Raises:
        ValueError: there is no source, or one can't be used, see :func:`read_earlier`.
    """

    def __init__(
        self,
        sources: Sequence[EarlierStudy | Earlier],
        base: str | Mapping[str, Any] | BaseSampler = "tpe",
        seed: int | None = None,
        seeds: int = 3,
    ) -> None:
        if isinstance(sources, (str, tuple, optuna.Study)) or not sources:
            raise ValueError(f"sources={sources!r}: write a list of earlier studies")
        self._sources = [Knowledge(_read(source, i)) for i, source in enumerate(sources)]
        self._sampler = make_sampler(base, seed)
        self._seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self._seeds = Seeds([source.best_first[:seeds] for source in self._sources], seeds)
        self._proposed: dict[int, Params] = {}

    def weights(self, study: optuna.Study) -> dict[str, float]:
        """By the sources' names, 0 for one that the study's results so far do not agree with."""
        return dict(zip([s.name for s in self._sources], self._weights(*_results(study)), strict=True))

    def _weights(self, trials: Sequence[FrozenTrial], losses: Sequence[float]) -> list[float]:
        risk = RISK / len(self._sources)  # Bonferroni: of many, one agrees by chance
        return [source.agreement(trials, losses, risk) for source in self._sources]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        proposed = self._propose(study, trial)
        if proposed is None:
            return self._sampler.infer_relative_search_space(study, trial)
        self._proposed[trial.number] = proposed
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if trial.number in self._proposed:
            return {}
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        proposed = self._proposed.get(trial.number, {})
        if param_name in proposed and _allows(param_distribution, proposed[param_name]):
            return _into(param_distribution, proposed[param_name])
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if len(study.directions) != 1:
            raise ValueError(
                f"TransferSampler ranks trials by one objective and the study has {len(study.directions)}; write its "
                "base sampler alone, and warm_start for points of earlier studies"
            )
        self._sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._proposed.pop(trial.number, None)
        self._sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self._sampler.reseed_rng()

    def _propose(self, study: optuna.Study, trial: FrozenTrial) -> Params | None:
        """A point, or None where it is the base's turn, or the trial was enqueued with one."""
        if FIXED in trial.system_attrs or trial.params:
            return None
        others = [other for other in all_trials(study) if other.number != trial.number]
        own = [other for other in others if other.state != TrialState.WAITING]
        trials, losses = _results(study)
        seed = self._seeds.next(own, dict(zip([t.number for t in trials], losses, strict=True)))
        if seed is not None:
            note(study, trial, SEED, seed)
            return self._seeds.params(seed)
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, trial.number])))
        if random.rand() > SHARE:
            return None
        weights = self._weights(trials, losses)
        if not any(weights):
            return None
        running = [other for other in own if other.state == TrialState.RUNNING and other.params]
        return self._by_sources(trials, losses, running, weights, random)

    def _by_sources(
        self,
        trials: Sequence[FrozenTrial],
        losses: Sequence[float],
        running: Sequence[FrozenTrial],
        weights: Sequence[float],
        random: np.random.RandomState,
    ) -> Params:
        distributions = {n: d for trial in [*trials, *running] for n, d in trial.distributions.items()}
        used = [(source, weight) for source, weight in zip(self._sources, weights, strict=True) if weight]

        def prior(points: Sequence[Mapping[str, Any]]) -> Array:
            each = [w * s.predict_points([s.shared(point, distributions) for point in points]) for s, w in used]
            return np.sum(each, 0) / sum(weight for _, weight in used)

        starts = [_clip(trial.params, distributions) for source, _ in used for trial in source.best_first[:3]]
        return propose(trials, losses, running, distributions, prior, [s for s in starts if s], random)


def _read(source: EarlierStudy | Earlier, i: int) -> Earlier:
    return source if isinstance(source, Earlier) else read_earlier(source, f"sources[{i}]")


def _results(study: optuna.Study) -> tuple[list[FrozenTrial], list[float]]:
    trials = usable_trials(study)
    return trials, losses_of(study, trials)


def _allows(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a source's value says something about ``distribution``."""
    if isinstance(distribution, CategoricalDistribution):
        return any(type(choice) is type(value) and choice == value for choice in distribution.choices)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _into(distribution: BaseDistribution, value: Any) -> Any:
    return clipped(value, distribution) if isinstance(distribution, (FloatDistribution, IntDistribution)) else value


def _clip(params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> Params:
    return {
        n: _into(distributions[n], v) for n, v in params.items() if n in distributions and _allows(distributions[n], v)
    }
