"""The mixin by which a strategy's ranks end together: where :class:`ErrorWatch` hangs on Lightning's hooks."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_bharat.cluster import heartbeat
from lightning_bharat.strategies._lightning import NOT_AN_ERROR, SubprocessLauncher
from lightning_bharat.strategies._lightning_resume import keep_ckpt_path
from lightning_bharat.strategies._torch import default_store
from lightning_bharat.strategies.errors import ErrorWatch
from lightning_bharat.strategies.progress import tell_progress


class GoOn(BaseException):
    """Leaves the trainer's function on all ranks, which is then called again. Not an ``Exception``: no one's code is
    to catch it.

    Args:
        ckpt_path: of the checkpoint to go on from.
        prepare: called before.
    """

    def __init__(self, ckpt_path: str, prepare: Callable[[], None]) -> None:
        super().__init__(f"goes on from {ckpt_path}")
        self.ckpt_path, self.prepare = ckpt_path, prepare


class Stopped(SIGTERMException):
    """Leaves the trainer on all ranks after the same step, saved: the run was asked to stop. No error, and no
    ``Exception``; left to itself it ends the process with exit code 0.

    Attributes:
        step: of the trainer.
        why: the name of a signal, or "the end of its time".
    """

    def __init__(self, step: int, why: str) -> None:
        super().__init__(0)
        self.step, self.why = step, why

    def __str__(self) -> str:
        return f"stopped after step {self.step} by {self.why}"


class EndsTogether:
    """Put before one of Lightning's parallel strategies: ``class HybridStrategy(EndsTogether, ParallelStrategy)``.

    Its methods call ``super()``, and a strategy that overrides one of them does as well:

    - ``setup_environment``: after it, the process group exists and the watch runs;
    - ``_configure_launcher``: the launcher reports what leaves the trainer's function *before* Lightning calls any
      callback's ``on_exception``, which may save a checkpoint and wait for ranks that will not come;
    - ``on_exception``: reports what the launcher has not seen;
    - the launcher calls the trainer's function again where it is left by :class:`GoOn`;
    - the launcher also waits, when the trainer's function is through with its last hooks (``on_fit_end`` and
      ``teardown`` come after the strategy's ``teardown``), until all ranks are: none ends well beside one that fails;
    - ``teardown``: ends the watch after an error, whatever happens in it.

    Attributes:
        watch: ``None`` before ``setup_environment``. A strategy that has a layout sets ``self.watch.rank_name =
            layout.name`` as soon as it knows it.
    """

    watch: ErrorWatch | None = None
    _launcher: Any

    def setup_environment(self) -> None:
        super().setup_environment()  # type: ignore[misc]
        self.watch_errors()

    def watch_errors(self) -> None:
        """Start the watch, once there is a process group; one that runs goes on (:class:`GoOn`)."""
        if self.watch is not None and self.watch.is_running:
            return
        self.watch = ErrorWatch(default_store(), self.global_rank, self.world_size, self.num_processes)  # type: ignore[attr-defined]
        self.watch.start()

    def _configure_launcher(self) -> None:
        super()._configure_launcher()  # type: ignore[misc]
        # Also where torchrun or Slurm has started the ranks: then it starts none, but still calls the function.
        if self._launcher is None or type(self._launcher) is SubprocessLauncher:
            self._launcher = _ReportingLauncher(self.cluster_environment, self.num_processes, self.num_nodes)  # type: ignore[attr-defined]
            self._launcher.watch = lambda: self.watch

    def on_exception(self, exception: BaseException) -> None:
        if self.watch is not None and isinstance(exception, Stopped):
            self.watch.finish()
        elif self.watch is not None:
            self.watch.report(exception)
        super().on_exception(exception)  # type: ignore[misc]

    def teardown(self) -> None:
        try:
            super().teardown()  # type: ignore[misc]
        finally:
            if self.watch is not None and not getattr(self._launcher, "is_running", False):
                self.watch.stop()


class _ReportingLauncher(SubprocessLauncher):
    watch: Callable[[], ErrorWatch | None]
    is_running = False

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        if trainer is not None:
            keep_ckpt_path(trainer)  # here is the one place that a strategy sees before it is chosen
            tell_progress(trainer)

        def reporting(*args: Any, **kwargs: Any) -> Any:
            self.is_running = True
            try:
                result = self._call(function, args, kwargs)
                if (watch := self.watch()) is not None:
                    watch.finish()
                return result
            except (*NOT_AN_ERROR, Stopped):
                raise
            except BaseException as error:
                watch = self.watch()
                answer = error if watch is None else watch.report(error)
                if answer is error:
                    raise
                raise answer from error
            finally:
                self.is_running = False
                heartbeat.progress("script")  # what a script does next may take as long as it likes

        return super().launch(reporting, *args, trainer=trainer, **kwargs)

    def _call(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        while True:
            try:
                return function(*args, **kwargs)
            except GoOn as left:
                again = left.with_traceback(None)  # its frames hold the module's old pieces
            again.prepare()
            call = signature(function).bind(*args, **kwargs)
            call.arguments["ckpt_path"] = again.ckpt_path
            args, kwargs = call.args, call.kwargs
