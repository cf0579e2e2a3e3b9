"""DeepSpeed's config, from arguments, a dict or a file; completed from the Trainer, which it must not contradict."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_bharat.strategies import _lightning_deepspeed, _lightning_loops
from lightning_bharat.strategies.arguments import refuse_unknown

STAGES = (0, 1, 2, 3)
AUTO = "auto"
FILE = "PL_DEEPSPEED_CONFIG_PATH"  # Lightning's: a config by the environment
# By the first word of Trainer(precision=...) the key that asks DeepSpeed for that type.
TYPES = {"16": "fp16", "bf16": "bf16"}
# Key, argument, and the first stage that has it.
OFFLOADED = (("offload_optimizer", "offload_optimizer", 1), ("offload_param", "offload_parameters", 3))


class ConfigError(ValueError):
    """A config that can't be used, or says something else than the arguments or the Trainer; names both values."""


class DeepSpeedConfig:
    """What a DeepSpeed engine is told.

    Args:
        stage: of ZeRO; ``None``: what ``config`` says, else 2.
        config: as DeepSpeed takes it, or the path of a JSON file with it.
        arguments: of Lightning's DeepSpeedStrategy, by name.

    Attributes:
        values: the config. "auto" and what only the Trainer knows is there after :meth:`complete`.

    Raises:
        ConfigError: no such file, or config and arguments say two things.
        TypeError: an argument that there is not.
    """

    def __init__(
        self, stage: int | None, config: str | os.PathLike | Mapping[str, Any] | None, arguments: Mapping[str, Any]
    ) -> None:
        refuse_unknown("DeepSpeedStrategy", arguments, _lightning_deepspeed.DEEPSPEED_ARGUMENTS)
        if stage is not None and (type(stage) is not int or stage not in STAGES):
            raise ConfigError(f"stage={stage!r}: write 0, 1, 2 or 3")
        asked = {**arguments, **({} if stage is None else {"stage": stage})}
        given = read(os.environ.get(FILE) if config is None else config)
        self.values = _lightning_deepspeed.deepspeed_config(asked) if given is None else merge(given, asked, stage)
        self.values.setdefault("zero_allow_untested_optimizer", True)
        _check_zero(self.values.setdefault("zero_optimization", {"stage": 0}))
        if "offload_optimizer" in self.values["zero_optimization"]:
            # The optimizer is the module's; DeepSpeed would take its own one, which it compiles, or refuse.
            self.values.setdefault("zero_force_ds_cpu_optimizer", False)
        self._given = copy.deepcopy(self.values)

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return self.values["zero_optimization"]["stage"]

    def complete(self, trainer: pl.Trainer, ranks: int, precision: str) -> None:
        """Write the Trainer's numbers into ``values``; may be called again for another run.

        Raises:
            ConfigError: the config has another number or type; names both, and what to write.
        """
        self.values.clear()
        self.values.update(copy.deepcopy(self._given))
        accumulated = trainer.accumulate_grad_batches
        self._take("gradient_accumulation_steps", accumulated, f"Trainer(accumulate_grad_batches={accumulated})")
        clip = trainer.gradient_clip_val
        if clip is None:
            self.values["gradient_clipping"] = _or(self.values.get("gradient_clipping"), 0.0)
        else:
            self._take("gradient_clipping", float(clip), f"Trainer(gradient_clip_val={clip})")
        self._take_batch(_rows(trainer), accumulated, ranks)
        self._take_precision(precision)
        for key in ("optimizer", "scheduler"):
            if key in self.values:  # Lightning asks each module for one, which DeepSpeed would then pass over
                raise ConfigError(
                    f"{key}={self.values[key]!r} is in the DeepSpeed config, and the module's configure_optimizers "
                    f"makes one; leave {key} out of the config"
                )
        for path, value in leaves(self.values):
            if value == AUTO:
                raise ConfigError(
                    f'{path} is "auto" in the DeepSpeed config, and the Trainer has no such number; write one, or '
                    f"leave {path} out for DeepSpeed's own"
                )

    def for_inference(self) -> dict[str, Any]:
        """Of ``values`` what an engine without an optimizer takes."""
        kept = [key for key in TYPES.values() if key in self.values]
        if self.stage == 3:
            kept += ["zero_allow_untested_optimizer", "zero_optimization"]
        return {"train_micro_batch_size_per_gpu": 1, **{key: self.values[key] for key in kept}}

    def _take(self, key: str, value: Any, by: str) -> None:
        """Write ``value``, which ``by`` says, under ``key``."""
        said = self.values.get(key, AUTO)
        if said not in (AUTO, value):
            raise ConfigError(
                f"{key} is {said!r} in the DeepSpeed config, and {by} makes it {value!r}; leave {key} out of the "
                "config, or write the same number in both"
            )
        self.values[key] = value

    def _take_batch(self, rows: int | None, accumulated: int, ranks: int) -> None:
        whole = self.values.get("train_batch_size", AUTO)
        if rows is None:  # then these only serve DeepSpeed's own count of samples
            said = self.values.get("train_micro_batch_size_per_gpu", AUTO)
            guess = 1 if whole == AUTO else max(1, whole // (accumulated * ranks))
            rows = guess if said == AUTO else said
        self._take("train_micro_batch_size_per_gpu", rows, f"the training loader's batch_size={rows}")
        self._take(
            "train_batch_size",
            rows * accumulated * ranks,
            f"{rows} rows × {accumulated} accumulated batches × {ranks} ranks",
        )

    def _take_precision(self, precision: str) -> None:
        used = TYPES.get(precision.partition("-")[0])
        if used and self.stage == 0:
            raise ConfigError(
                f"stage 0 with precision={precision!r}: DeepSpeed saves float32 weights of these without names, and no "
                "run could go on from them; write stage=1"
            )
        for name in TYPES.values():
            said = self.values.get(name, {}).get("enabled", AUTO) if name in self.values else AUTO
            if said != AUTO and said != (name == used):
                instead = {"fp16": '"16-mixed"', "bf16": '"bf16-mixed"'}[name] if said else '"32-true"'
                raise ConfigError(
                    f"{name}.enabled is {said} in the DeepSpeed config, and the Trainer has precision={precision!r}; "
                    f"leave {name} out of the config, or write Trainer(precision={instead})"
                )
            if name in self.values and said == AUTO:
                self.values[name]["enabled"] = name == used


def read(config: str | os.PathLike | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A config of one's own to change, out of a dict or a JSON file.

    Raises:
        ConfigError: no such file, not JSON, or no dict in it.
    """
    if config is None:
        return None
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    path = Path(config)
    if not path.is_file():
        raise ConfigError(f"config={str(config)!r}: there is no such file; write a dict, or the path of a JSON file")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"config={str(config)!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"config={str(config)!r} holds a {type(found).__name__} and not a dict of DeepSpeed's keys")
    return found


def merge(config: dict[str, Any], arguments: Mapping[str, Any], stage: int | None) -> dict[str, Any]:
    """``config`` with what ``arguments`` ask for beside it.

    Raises:
        ConfigError: both say something of one key; names it and both values.
    """
    defaults = dict(leaves(_lightning_deepspeed.deepspeed_config({})))
    for path, value in leaves(_lightning_deepspeed.deepspeed_config(arguments)):
        is_stage = path == "zero_optimization.stage"
        if (stage is None) if is_stage else (path in defaults and defaults[path] == value):
            continue
        *parents, key = path.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        if place.setdefault(key, value) != value:
            raise ConfigError(
                f"{path} is {place[key]!r} in the DeepSpeed config and {value!r} by the arguments of "
                "DeepSpeedStrategy; leave one of them out"
            )
    return config


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values.

    >>> list(leaves({"zero_optimization": {"stage": 2}, "steps_per_print": 1}))
    [('zero_optimization.stage', 2), ('steps_per_print', 1)]
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _check_zero(zero: Any) -> None:
    if not isinstance(zero, dict):
        raise ConfigError(f'zero_optimization={zero!r} in the DeepSpeed config: write {{"stage": 2}}')
    stage = zero.setdefault("stage", 0)
    if type(stage) is not int or stage not in STAGES:
        raise ConfigError(f"zero_optimization.stage={stage!r} in the DeepSpeed config: write 0, 1, 2 or 3")
    for key, argument, least in OFFLOADED:
        if zero.get(key) and zero[key].get("device", "none") != "none" and stage < least:
            raise ConfigError(
                f"{argument} with ZeRO stage {stage}: DeepSpeed would not offload them; write stage={least} or leave "
                "it out"
            )


def _or(value: Any, other: Any) -> Any:
    return other if value in (None, AUTO) else value


def _rows(trainer: pl.Trainer) -> int | None:
    """Rows of a batch that a rank is given to train with, where its loader says."""
    if trainer.state.fn != TrainerFn.FITTING:
        return None
    loaders, _, keep = _lightning_loops.loaders_of(trainer)
    keep()
    if not isinstance(loaders, DataLoader):
        return None
    return loaders.batch_size or getattr(loaders.batch_sampler, "batch_size", None)
