"""Batches of samples of like length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from lightning_bharat.data.counts import Counts, checked
from lightning_bharat.data.errors import DataError
from lightning_bharat.data.order import GlobalOrder, Steps, refuse_too_few
from lightning_bharat.data.shared_batches import SharedBatches

WIDTH = 8  # lengths are rounded up to its multiples: tensor cores and tensor ranks like those
Rule = tuple[int, int, bool]  # batch_size, data ranks, drop_last


def padded(length: Any) -> Any:
    """``length`` rounded up to a multiple of 8, as it counts in a batch."""
    return -(-length // WIDTH) * WIDTH


@dataclass(frozen=True)
class _Cut:
    """What is left of an epoch, cut into steps.

    Attributes:
        begin: position of its first sample in the epoch.
        samples: in their order; those behind the last step are left out.
        ends: position behind each step, from ``begin`` on.
        past: rules that steps before ``begin`` were cut by, and how many samples were taken by each.
    """

    begin: int
    samples: np.ndarray
    ends: np.ndarray
    past: tuple[tuple[Rule, int], ...] = ()

    def done(self, position: int) -> int:
        """Steps before a position."""
        return int(np.searchsorted(self.ends, position - self.begin, side="right"))


class LengthBatches(SharedBatches):
    """By length: the samples of a step are of like length, on all data ranks, so that little is padded.

    Samples are sorted by their length, rounded up to a multiple of 8, and cut into steps; each data rank has its part
    of a step. The steps come in another order in each epoch, and among samples of one rounded length it is drawn anew
    which step they are in. So the number of steps is that of every epoch, and there is no sweep from long to short. All
    of it depends on the seed, the epoch, the lengths and the rows of a step (over all data ranks) alone. (fairseq's
    batches are cut once for all epochs, and the ranks' batches of a step are of different lengths; Hugging Face's
    ``LengthGroupedSampler`` sweeps from long to short, and knows no position.)

    A run that goes on in the middle of an epoch with other rows in a step has the samples that are left cut anew.

    Args:
        lengths: of each sample, in tokens or any other unit.
        batch_size: samples a step of one data rank.
        num_replicas: number of data ranks.
        rank: which of them this is.
        seed: of the order.
        shuffle: as above; or the same order in each epoch, from the longest samples to the shortest.
        drop_last: as in :class:`~lightning_bharat.data.Steps`; what is left out is drawn in each epoch.

    Raises:
        DataError: a length is below 1, or there are fewer samples than one step takes.
    """

    sharding = "length"

    def __init__(
        self,
        lengths: Counts,
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        self._lengths = checked("lengths", lengths, "sample", least=1)
        self._digest = xxhash.xxh3_64_hexdigest(self._lengths.data)
        self._widths = padded(self._lengths)
        narrower = (self._widths.max() - self._widths) // WIDTH
        self._narrower = narrower.astype(np.min_scalar_type(narrower.max()))  # 16 bits are sorted ten times as fast
        self._order = GlobalOrder(len(self._lengths), seed, shuffle)
        self._past: tuple[tuple[Rule, int], ...] = ()
        self._found: tuple[Any, _Cut] | None = None
        super().__init__(len(self._lengths), batch_size, num_replicas, rank, drop_last)

    def resize(self, batch_size: int) -> None:
        super().resize(batch_size)
        self._steps = len(self._slots(np.arange(self.length), self._rule)[1])
        if not self._steps:
            self._refuse_no_step()

    def _refuse_no_step(self) -> None:
        refuse_too_few(Steps(self.length, *self._rule))

    @property
    def _rule(self) -> Rule:
        return self.batch_size, self.num_replicas, self.drop_last

    def _slots(self, samples: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """``samples`` sorted into steps, and the number of samples in each step."""
        steps = Steps(len(samples), *rule)
        ends = [steps.end(step) for step in range(len(steps))]
        used = ends[-1] if ends else 0
        return np.concatenate([self._sorted(samples[:used]), samples[used:]]), np.diff([0, *ends])

    def _sorted(self, samples: np.ndarray) -> np.ndarray:
        return samples[np.argsort(self._narrower[samples], kind="stable")]

    def _arranged(self, epoch: int, samples: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """``samples`` in the order of their steps, and the end of each step."""
        slots, sizes = self._slots(samples, rule)
        ends = np.cumsum(sizes)
        order = GlobalOrder(len(sizes), self._order.seed, self._order.shuffle)(epoch, 0, len(sizes))
        steps = np.split(slots, ends)
        return np.concatenate([*(steps[step] for step in order), steps[-1]]), np.cumsum(sizes[order])

    def _cut(self) -> _Cut:
        asked = self.epoch, self._past, self._rule
        if self._found is None or self._found[0] != asked:
            self._found = asked, self._find(*asked)
        return self._found[1]

    def _find(self, epoch: int, past: tuple[tuple[Rule, int], ...], rule: Rule) -> _Cut:
        left, begin = self._order(epoch, 0, self.length), 0
        for number, (former, taken) in enumerate(past):
            samples, ends = self._arranged(epoch, left, former)
            if number == len(past) - 1 and (taken == 0 or taken in ends):
                mine, my_ends = self._arranged(epoch, left, rule)
                if np.array_equal(ends, my_ends) and np.array_equal(samples, mine):
                    return _Cut(begin, mine, my_ends, past[:-1])
            left = left[~np.isin(left, samples[:taken])]
            begin += taken
        return _Cut(begin, *self._arranged(epoch, left, rule), tuple(one for one in past if one[1]))

    def go_to(self, epoch: int, position: int = 0) -> None:
        self._past = ()
        super().go_to(epoch, position)

    def left(self) -> int:
        cut = self._cut()
        return len(cut.ends) - cut.done(self.position)

    def state_dict(self, done: int = 0) -> dict[str, Any]:
        cut = self._cut()
        behind = cut.done(self.position) + done
        position = cut.begin + int(cut.ends[behind - 1]) if behind else cut.begin
        return {
            "epoch": self.epoch,
            "position": position,
            "samples": self.length,
            "seed": self._order.seed,
            "shuffle": self._order.shuffle,
            "sharding": self.sharding,
            "sizes": self._digest,
            "rules": [[*rule, taken] for rule, taken in (*cut.past, (self._rule, position - cut.begin))],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = self.epoch, self.position, self._past
        self.go_to(state["epoch"], state["position"])
        self._past = tuple(((size, ranks, drop_last), taken) for size, ranks, drop_last, taken in state["rules"])
        try:
            self._cut()
        except DataError:
            self.epoch, self.position, self._past = before
            raise

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on every data rank."""
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        cut = self._cut()
        ends = [0, *cut.ends.tolist()]
        for step in range(cut.done(self.position), len(cut.ends)):
            begin, end = ends[step], ends[step + 1]
            even, more = divmod(end - begin, self.num_replicas)
            begin += self.rank * even + min(self.rank, more)
            yield cut.samples[begin : begin + even + (self.rank < more)].tolist()
