"""What ranks that failed have to say to the person at a command."""

from __future__ import annotations

from lightning_bharat.cluster.outcome import RankOutcome
from lightning_bharat.commands.project import BAD_PROJECT
from lightning_bharat.plan.whole_attention import ContextError
from lightning_bharat.strategies.buffers import BuffersError
from lightning_bharat.strategies.initialize import InitializeError
from lightning_bharat.strategies.loaders import LoaderError
from lightning_bharat.strategies.microbatch import MicrobatchError
from lightning_bharat.strategies.optimizer_proof import OptimizerError
from lightning_bharat.strategies.pipeline import PipelineError
from lightning_bharat.strategies.recording import RecordingError
from lightning_bharat.strategies.refusals import ModuleError
from lightning_bharat.strategies.stage_metrics import MetricError
from lightning_bharat.strategies.token_weights import TokenWeightError

_BY_STRATEGY = (
    *(
        BuffersError,
        ContextError,
        InitializeError,
        LoaderError,
        MetricError,
        MicrobatchError,
        ModuleError,
        OptimizerError,
    ),
    *(PipelineError, RecordingError, TokenWeightError, NotImplementedError),
)


def why(outcomes: list[RankOutcome]) -> str:
    """The words of the rank that failed first; with its traceback, unless it refused something in words."""
    failed = next((o for o in outcomes if o.error not in (None, "PeerError")), next(o for o in outcomes if not o.ok))
    refused = failed.error in {kind.__name__ for kind in (*BAD_PROJECT, *_BY_STRATEGY)}
    return failed.message if refused else f"{failed.summary()}\n{failed.traceback or failed.stacks or failed.output}"
