"""What a failure is, by how ranks ended, and whether the run is started again."""

from __future__ import annotations

import signal

from lightning_bharat.cluster.failure import Failure, RankEnd, of_ends
from lightning_bharat.cluster.heartbeat import Pulse
from lightning_bharat.cluster.restart import LONGEST_WAIT, RestartPolicy
from lightning_bharat.cluster.watch import hung_first

LOST = {"exit_code": 1, "kind": "PeerError", "message": "rank 1 is gone", "is_victim": True}


def failure(*ends: RankEnd) -> Failure:
    found = of_ends(ends)
    assert found is not None
    return found


def test_the_rank_that_failed_first_is_told_from_its_victims() -> None:
    assert of_ends([RankEnd(0, 0), RankEnd(1)]) is None
    killed = failure(RankEnd(0, **LOST), RankEnd(1, -signal.SIGKILL, step=4), RankEnd(2, **LOST))
    assert (killed.cause, killed.ranks, killed.step, killed.is_of_program) == ("signal", (1,), 4, False)
    raised = failure(RankEnd(0, **LOST), RankEnd(1, 1, "ValueError", "bad\nrow"), RankEnd(2, -signal.SIGABRT))
    assert (raised.cause, raised.ranks, raised.words) == ("exception", (1,), "rank 1 raised ValueError: bad")
    assert raised.is_of_program
    aborted = failure(RankEnd(0, 1), RankEnd(1, -signal.SIGABRT))
    assert (aborted.cause, aborted.ranks) == ("signal", (1,)), "an exit code without a word says least"
    elsewhere = failure(RankEnd(0, **LOST), RankEnd(1))
    assert (elsewhere.cause, elsewhere.ranks) == ("lost connection", ())


def test_of_ranks_that_stand_still_those_are_named_that_the_others_wait_for() -> None:
    collective = 'File ".../torch/distributed/distributed_c10d.py", line 1 in all_reduce'
    behind = {0: Pulse(step=5), 1: Pulse(step=4), 2: Pulse(step=5)}
    assert hung_first(behind, dict.fromkeys(behind, collective)) == [1]
    level = {rank: Pulse(step=5) for rank in range(3)}
    assert hung_first(level, {0: collective, 1: collective, 2: "in time.sleep"}) == [2]
    assert hung_first(level, dict.fromkeys(level, collective)) == [0, 1, 2]


def raised(step: int, message: str = "no row 7") -> Failure:
    return failure(RankEnd(0, 1, "KeyError", message, step=step))


KILLED = failure(RankEnd(0, -signal.SIGKILL, step=3))


def test_the_program_fails_where_it_fails_alike_twice() -> None:
    policy = RestartPolicy(10)
    assert policy.decide(raised(3), 3).again
    assert policy.decide(raised(4), 4).again, "another step"
    assert policy.decide(raised(4, "no such file"), 4).again, "another error"
    assert policy.decide(KILLED, 4).again
    assert policy.decide(raised(4, "no row 7 at 0x7f12"), 4).again, "the one before was another"
    last = policy.decide(raised(4, "no row 8 at 0x7fab"), 4)
    assert not last.again and "the same exception twice at step 4" in last.why


def test_restarts_wait_longer_while_they_bring_nothing() -> None:
    policy = RestartPolicy(9)
    waits = [policy.decide(KILLED, 3).wait for _ in range(9)]
    assert waits == [0, 1, 2, 4, 8, 16, 32, LONGEST_WAIT, LONGEST_WAIT]
    assert not policy.decide(KILLED, 3).again
    policy = RestartPolicy(2)
    assert [policy.decide(KILLED, step).wait for step in (3, 2, 9, 9)] == [0, 1, 0, 1], "9 is beyond 3"
    assert not policy.decide(KILLED, 9).again
    assert not RestartPolicy(0).decide(KILLED, 3).again
