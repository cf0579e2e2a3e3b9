"""The config that all trials of a study share: parsed as ``bharat fit`` parses it, with nothing built."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_bharat.commands.inspection import InspectionCLI
from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning.trial_run import CONFIG

# What of it may change when a study goes on: none of it changes what a trial computes.
_FREE = ("trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary")


class StudyCLI(InspectionCLI):
    """A project's parser with the options of a command that runs its trials.

    Args:
        words: config files and options of ``bharat fit``, and the command's own.
        add: adds the command's own options.
    """

    def __init__(
        self,
        words: Sequence[str],
        prog: str = "bharat tune",
        description: str = "",
        add: Callable[[LightningArgumentParser], None] = lambda parser: None,
    ) -> None:
        self._add, self._words = add, list(words)
        self._own: list[str] = []
        super().__init__(prog, description, list(words))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse them; a seed that nobody gave would be drawn after it."""
        super().parse_arguments(parser, args)
        seed = self.config.get("seed_everything")
        self.seed: int | None = None if isinstance(seed, bool) else seed
        self.config["seed_everything"] = False if self.seed is None else self.seed

    def add_options(self, parser: LightningArgumentParser) -> None:
        before = {action.dest for action in parser._actions}
        self._add(parser)
        self._own = [action.dest for action in parser._actions if action.dest not in before and "." not in action.dest]

    @property
    def words(self) -> list[str]:
        """Those of ``bharat fit``."""
        kept, skip = [], False
        for word in self._words:
            if word.startswith("--"):
                skip = re.split(r"[=.+]", word[2:], maxsplit=1)[0] in self._own
            if not skip:
                kept.append(word)
        return kept

    @property
    def project_name(self) -> str:
        """Of the first config file, else of the module's class."""
        files = self.config.get("config") or []
        return Path(str(files[0])).stem if files else str(self.config.model.class_path).rsplit(".", 1)[-1]

    def own_options(self) -> dict[str, Any]:
        """Those of the command."""
        return {name: self.config[name] for name in self._own}


class StudyConfig:
    """What trials are started with.

    Args:
        cli: has parsed the words.
        seed: of all trials, where the config has none.
    """

    def __init__(self, cli: StudyCLI, seed: int) -> None:
        options: Namespace = cli.config.clone()
        for name in ("config", *cli.own_options()):
            options.pop(name, None)
        options["seed_everything"] = seed if cli.seed is None else cli.seed
        self.words, self.name = cli.words, cli.project_name
        self.text = cli.parser.dump(options, skip_unset=False, skip_validation=True)
        self._options = options.trainer
        _check_where(self._options)

    @property
    def seed(self) -> int:
        """Of all trials."""
        return int(yaml.safe_load(self.text)["seed_everything"])

    def keep(self, folder: Path) -> Path:
        """Write it to the study's folder.

        Raises:
            BadInput: the study was made with another one.
        """
        path = folder / CONFIG
        if path.is_file():
            different = _differences(yaml.safe_load(path.read_text()), yaml.safe_load(self.text))
            if different:
                raise BadInput(
                    f"the trials of the study in {folder} ran with another config: {'; '.join(different[:5])}. Write "
                    "the same options to go on with it, or another --study_name to begin a new one"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text)
        return path

    def ranks(self, params: Mapping[str, Any], devices_here: int) -> int:
        """Of a trial with ``params``: the trainer's devices, which are all of ``devices_here`` where it says so."""
        devices = params.get("trainer.devices", self._options.get("devices"))
        if isinstance(devices, str) and devices.lstrip("-").isdigit():
            devices = int(devices)
        if isinstance(devices, list):
            return len(devices)
        return devices if isinstance(devices, int) and devices > 0 else max(1, devices_here)

    def length(self, unit: str) -> int:
        """Of a whole training: the trainer's ``max_epochs`` or ``max_steps``.

        Raises:
            BadInput: the config does not say.
        """
        found = self._options.get(f"max_{unit}")
        if not isinstance(found, int) or found < 1:
            raise BadInput(
                f"trainer.max_{unit}={found}: a population needs the length of a member's whole training; write "
                f"--trainer.max_{unit}=..., in which there are as many generations as its interval says"
            )
        return found

    @property
    def on_cpu(self) -> bool:
        """Whether the config asks for no accelerator."""
        return self._options.get("accelerator") == "cpu"


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """One line for each key that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [name for name in {**old, **new} if f"{key}{name}" not in _FREE]
        return [line for name in keys for line in _differences(old.get(name), new.get(name), f"{key}{name}.")]
    return [] if old == new else [f"{key[:-1]} was {old!r}, and is {new!r}"]


def _check_where(trainer: Namespace) -> None:
    if (trainer.get("num_nodes") or 1) != 1:
        raise BadInput(
            f"--trainer.num_nodes={trainer.num_nodes}: a trial runs on one host; start the same command on each host, "
            "and they share the study's trials"
        )
    strategy = trainer.get("strategy")
    method = strategy if isinstance(strategy, str) else strategy and strategy.get("init_args.start_method")
    if any(word in str(method) for word in ("fork", "spawn", "notebook")):
        raise BadInput(
            f"--trainer.strategy={method}: the study starts the ranks of a trial, and this would start more from each "
            "of them; write --trainer.strategy=ddp"
        )
