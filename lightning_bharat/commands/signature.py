"""A command from a plain function: its options from the signature, its help from the docstring."""

from __future__ import annotations

import inspect
import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

# What a person can put right by writing something else. Anything else that is raised is shown with its traceback.
BAD_INPUT = (ValueError, OSError, ModuleNotFoundError)


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Shows types and defaults of options, and the description with its example as it is written."""


class OneMessage:
    """A parser's mixin: an error is one message and exit code 2, without a page of usage before it."""

    prog: str

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what was wrong, once for all ranks, and leave."""
        program = self.prog.replace(" [options]", "")
        if program.startswith("bharat"):
            say_error(program, f"{message}\n(all options: {program} --help)")
        else:  # a parser that jsonargparse made for a class's own options
            say_error("bharat", message)
        raise SystemExit(2)


class Parser(OneMessage, ArgumentParser):
    """jsonargparse's parser with this command's way of saying errors."""


def say_error(program: str, message: object) -> None:
    """Print an error on stderr, on the first rank alone: every rank has the same one."""
    if int(next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)) == 0:
        print(f"{program}: error: {message}", file=sys.stderr)


def call(function: Callable[..., Any], words: Sequence[str], program: str) -> int:
    """Parse ``words`` by the signature of ``function`` and call it.

    Parameters without a default are positional, the others options. The docstring up to ``Args:`` and what it shows
    under ``Example:`` is the help.

    Returns:
        What ``function`` returned, if that is a whole number, else 0; 2 after a message about bad input.
    """
    parser = Parser(prog=program, description=_description(function), formatter_class=HelpFormatter)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    options = parser.parse_args(list(words))
    try:
        result = function(**parser.instantiate_classes(options))
    except BAD_INPUT as error:
        say_error(program, error)
        return 2
    return result if isinstance(result, int) else 0


def _description(function: Callable[..., Any]) -> str:
    """The docstring without the sections that the options' help shows already."""
    kept, section = [], ""
    for line in (inspect.getdoc(function) or "").splitlines():
        if line.endswith(":") and not line.startswith(" ") and line[:-1].isalpha():
            section = line
        if section in ("", "Example:", "Examples:"):
            kept.append(line)
    return "\n".join(kept).strip()
