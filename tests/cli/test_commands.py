"""The `bharat` command: its list, its help, and what it says about bad input."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from lightning_bharat.cli import COMMANDS, GROUPS, main
from lightning_bharat.commands.signature import call
from tests.cli.project import QUIET, Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, monkeypatch)


def bad(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `bharat words` says on stderr, after it has left with exit code 2 and said nothing else."""
    try:
        code: object = main(words)
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert code == 2, err
    assert "Traceback" not in err and "usage:" not in err
    assert err.startswith("bharat"), err
    assert out == ""
    return err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, command in COMMANDS.items():
        if " " not in name:
            assert f"  {name} " in out and command.summary in out
    for group in GROUPS:
        assert main([group, "--help"]) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in COMMANDS if name.startswith(f"{group} "))
    assert main([]) == 2


def test_help_is_shown_without_torch_in_less_than_a_second() -> None:
    code = "import sys; sys.argv = ['bharat', '--help']; from lightning_bharat.cli import main; code = main()"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.endswith("False\n"), done.stderr
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_says_what_it_does_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*name.split(), "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert "Example: bharat " + name in out
    assert out.startswith(f"usage: bharat {name}") or out.startswith(f"usage: bharat [options] {name}")


def test_every_target_exists() -> None:
    for command in COMMANDS.values():
        module, _, function = command.target.partition(":")
        assert callable(getattr(import_module(module), function))


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'frobnicate' is not a command; write one of fit, validate, test" in bad(["frobnicate"], capsys)
    assert "checkpoint: error: 'eat' is not a command; write one of export, " in bad(["checkpoint", "eat"], capsys)
    assert "'--layout' is not a command" in bad(["--layout", "fit"], capsys)


def test_bad_options_of_fit(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fit.model" in bad(["fit"], capsys)
    assert "does not exist: " in bad(["fit", "--config", "nowhere.yaml"], capsys)
    said = bad(["fit", "--model", f"{project.package}.model.Modell"], capsys)
    assert "has no attribute 'Modell'" in said
    assert "'depht' is not accepted" in bad(["fit", *project.classes, "--model.depht=3"], capsys)
    assert "Got value: many" in bad(["fit", *project.classes, "--trainer.max_steps=many"], capsys)


def test_a_trainer_that_cannot_be_built(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    said = bad(["fit", *project.classes, *QUIET, "--trainer.strategy=nothing"], capsys)
    assert "invalid strategy name: `strategy='nothing'`" in said
    words = ["--trainer.strategy=lightning_bharat.HybridStrategy", "--trainer.strategy.expert_parallel_size=2"]
    said = bad(["fit", *project.classes, *QUIET, *words], capsys)
    assert said.startswith("bharat fit: error: expert_parallel_size=2 does not divide the 1 data ranks")
    words = ["fit", *project.classes, *QUIET, "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]
    assert "--lr_scheduler needs --optimizer" in bad(words, capsys)


@pytest.mark.parametrize("before", [[], ["--trainer.strategy=bharat_hybrid"]], ids=["nothing", "a name"])
def test_arguments_of_a_strategy_without_its_class(
    before: list[str], project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    said = bad(["fit", *project.classes, *before, "--trainer.strategy.pipeline_parallel_size=2"], capsys)
    assert "needs its class before it" in said
    assert "--trainer.strategy HybridStrategy --trainer.strategy.pipeline_parallel_size 2\n" in said


def test_bad_options_of_layout(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert "write --devices 8, --cluster cluster.yaml or" in bad(["layout", *project.classes], capsys)
    assert 'key "devices"' in bad(["layout", *project.classes, "--devices=0"], capsys)
    words = ["layout", "--model", f"{project.package}.model.OnMetaImpossible", *project.classes[2:], "--devices=2"]
    said = bad(words, capsys)
    assert "OnMetaImpossible could not be built on meta" in said and "no .item() or .tolist()" in said


def test_bad_options_of_functions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "required: checkpoint" in bad(["checkpoint", "show"], capsys)
    assert "nowhere.ckpt does not exist" in bad(["checkpoint", "show", str(tmp_path / "nowhere.ckpt")], capsys)
    assert "Given value: float8" in bad(["checkpoint", "export", "a", "b", "--dtype=float8"], capsys)


def test_errors_are_said_by_the_first_rank_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        main(["checkpoint", "show"])
    assert left.value.code == 2
    assert capsys.readouterr().err == ""


def add(a: int, *, b: int = 1, path: Path = Path(".")) -> int:
    """Add two numbers.

    It returns an exit code.

    Example:
        bharat add 1 --b 2

    Args:
        a: the first.
        b: the second.
        path: not used.

    Raises:
        ValueError: a is 13.
    """
    if a == 13:
        raise ValueError("a=13: write another")
    if a == 14:
        raise KeyError("a bug")
    assert isinstance(path, Path)
    return a + b


def test_options_come_from_the_signature(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(add, ["1", "--b", "2"], "bharat add") == 3
    assert call(add, ["13"], "bharat add") == 2
    assert capsys.readouterr().err == "bharat add: error: a=13: write another\n"
    with pytest.raises(KeyError):
        call(add, ["14"], "bharat add")
    with pytest.raises(SystemExit):
        call(add, ["--help"], "bharat add")
    out = capsys.readouterr().out
    assert "Example:\n    bharat add 1 --b 2" in out
    assert out.count("the second.") == 1 and "Raises" not in out
