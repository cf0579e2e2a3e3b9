"""SIGTERM to ``bharat launch``: its ranks save after the same step and leave, and the next start goes on from there."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.whole import checkpoints_in
from tests.cluster.launching import launched
from tests.cluster.test_hosts import until
from tests.faults.small_run import fit, steps

STEPS, ASKED_AFTER = 12, 4
SCRIPT = """
    import sys
    from pathlib import Path
    from lightning_bharat import HybridStrategy
    from lightning_bharat.callbacks import FaultTolerantCheckpoint
    from tests.faults.small_run import Steps, fit

    folder = Path(sys.argv[1])
    saves = FaultTolerantCheckpoint(folder / "saved", every_n_train_steps=1000)
    fit(folder, [Steps(folder), saves], int(sys.argv[2]), strategy=HybridStrategy(), devices=2)
"""


def test_ranks_save_after_the_same_step_and_the_next_start_goes_on(tmp_path: Path) -> None:
    right = fit(tmp_path / "undisturbed", [], STEPS)

    def ask() -> None:
        until(lambda: len(steps(tmp_path)) >= ASKED_AFTER, seconds=60)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher is this process

    asking = threading.Thread(target=ask)
    asking.start()
    words = str(tmp_path), str(STEPS)
    first = launched(tmp_path, SCRIPT, ranks=2, words=words)
    asking.join()
    assert first.code == 128 + signal.SIGTERM
    (stop,) = first.events("stop")
    reached = steps(tmp_path)[-1].step
    assert (stop["why"], stop["step"]) == ("SIGTERM", reached) and ASKED_AFTER <= reached < STEPS
    (saved,) = checkpoints_in(tmp_path / "saved")
    assert Manifest.read(saved).step == reached and not first.events("failure")
    assert launched(tmp_path, SCRIPT, ranks=2, words=words).code == 0
    done = steps(tmp_path)
    assert [each.step for each in done] == list(range(1, STEPS + 1)), "no step is lost, and none made twice"
    assert all(abs(each.loss - loss) < 1e-9 for each, loss in zip(done, right, strict=True))
