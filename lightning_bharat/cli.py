"""The ``bharat`` command: one table of commands, which are imported when they are run.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's; the options of all others come from the signature
of the function that they run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """A line of the table.

    Attributes:
        summary: what it does, for the list of commands.
        target: ``"module:function"``.
        project: whether the function takes the words after the command as a list, because they are the options of a
            LightningCLI project; otherwise they are parsed by the function's signature.
    """

    summary: str
    target: str
    project: bool = False


COMMANDS = {
    "fit": Command("train a module on any number of ranks", "lightning_bharat.commands.project:fit", project=True),
    "validate": Command("run its validation loop", "lightning_bharat.commands.project:validate", project=True),
    "test": Command("run its test loop", "lightning_bharat.commands.project:test", project=True),
    "predict": Command("run its prediction loop", "lightning_bharat.commands.project:predict", project=True),
    "layout": Command(
        "show where a model can be cut, and bytes per rank", "lightning_bharat.commands.layout:main", project=True
    ),
    "verify": Command(
        "compare a few steps of a module whole and cut", "lightning_bharat.commands.verify:main", project=True
    ),
    "launch": Command(
        "start a script on ranks, and keep it running", "lightning_bharat.commands.launch:command", project=True
    ),
    "report": Command("write what a study found, as a page and Markdown", "lightning_bharat.commands.report:report"),
    "tune": Command("search for the best options of a project", "lightning_bharat.commands.tune:main", project=True),
    "data fetch": Command(
        "fetch real text: English, on Debian also Indian languages", "lightning_bharat.commands.data:fetch"
    ),
    "data prepare": Command("tokenize text and pack it for training", "lightning_bharat.commands.data:prepare"),
    "data show": Command("print what prepared data hold", "lightning_bharat.commands.data:show"),
    "checkpoint export": Command(
        "write weights as safetensors for Hugging Face or plain torch", "lightning_bharat.commands.checkpoint:export"
    ),
    "checkpoint convert": Command(
        "turn a directory into one Lightning .ckpt, or back", "lightning_bharat.commands.checkpoint:convert"
    ),
    "checkpoint show": Command("print what a checkpoint is", "lightning_bharat.commands.checkpoint:show"),
    "checkpoint list": Command("list the checkpoints of a folder", "lightning_bharat.commands.checkpoints:list_all"),
    "checkpoint verify": Command("read every byte of checkpoints", "lightning_bharat.commands.checkpoints:verify"),
    "checkpoint diff": Command("compare the tensors of two checkpoints", "lightning_bharat.commands.checkpoints:diff"),
    "checkpoint history": Command("print what happened to a run", "lightning_bharat.commands.history:history"),
    "checkpoint prune": Command("remove old checkpoints", "lightning_bharat.commands.checkpoints:prune"),
}

GROUPS = {"data": "text for training", "checkpoint": "read and write checkpoints"}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        words: what follows ``bharat``; the process's own arguments by default.

    Returns:
        0; 1 where the command found a difference or failed in words; 2 for bad input, after one message on stderr.
    """
    words = list(sys.argv[1:] if words is None else words)
    if os.getcwd() not in sys.path:  # as `python -m` does, so that class paths of the project here are found
        sys.path.insert(0, os.getcwd())
    name, rest = _find(words)
    if name in COMMANDS:
        return _run(name, rest)
    if not rest or rest[0] in ("-h", "--help"):
        print(_overview(name))
        return 0 if rest else 2
    print(_unknown(name, rest[0]), file=sys.stderr)
    return 2


def _find(words: list[str]) -> tuple[str, list[str]]:
    """The command, or group of commands, that ``words`` begin with, and the other words."""
    if words and words[0] in GROUPS:
        two = " ".join(words[:2])
        return (two, words[2:]) if two in COMMANDS else (words[0], words[1:])
    if words and words[0] in COMMANDS:
        return words[0], words[1:]
    return "", words


def _run(name: str, rest: list[str]) -> int:
    command = COMMANDS[name]
    module, _, function = command.target.partition(":")
    target = getattr(import_module(module), function)
    if command.project:
        return target(rest) or 0
    from lightning_bharat.commands.signature import call

    return call(target, rest, f"bharat {name}")


def _overview(group: str) -> str:
    if group:
        lines = {name: c.summary for name, c in COMMANDS.items() if name.startswith(f"{group} ")}
        title = f"{GROUPS[group].capitalize()}."
    else:
        lines = {name: c.summary for name, c in COMMANDS.items() if " " not in name}
        lines |= {name: f"{summary} ({_members(name)})" for name, summary in GROUPS.items()}
        title = "Trains an ordinary LightningModule, cut over data, tensor and pipeline ranks, and checks that it does."
    width = max(map(len, lines))
    table = "\n".join(f"  {name:{width}}  {summary}" for name, summary in lines.items())
    prefix = f"bharat {group}".strip()
    return f"usage: {prefix} COMMAND ...\n\n{title}\n\n{table}\n\n`bharat COMMAND --help` says more, with an example."


def _members(group: str) -> str:
    return ", ".join(name.split()[1] for name in COMMANDS if name.startswith(f"{group} "))


def _unknown(group: str, word: str) -> str:
    names = _members(group) if group else ", ".join([name for name in COMMANDS if " " not in name] + list(GROUPS))
    prefix = f"bharat {group}".strip()
    return f"{prefix}: error: {word!r} is not a command; write one of {names}, or {prefix} --help"


if __name__ == "__main__":
    sys.exit(main())
