"""The demo's configs, its curves and its page; `make demo` itself takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.demo.curves import Comparison, Curve
from examples.demo.page import page
from examples.demo.picture import draw
from examples.demo.run import Failed, run
from examples.demo.story import Story
from lightning_bharat.cli import main
from lightning_bharat.figures import save

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("layout", [(), ("tensor2_pipeline2",), ("data2_tensor2",)])
def test_configs_are_those_of_the_command(layout: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    configs = [f"--config={EXAMPLES / name}.yaml" for name in ("gpt", *layout)]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *configs, "--print_config"])
    assert ended.value.code == 0
    assert "precision: 64-true" in capsys.readouterr().out


def test_commands_fit_together() -> None:
    story = Story(EXAMPLES)
    first, rest, single = story.training()
    assert str(story.half) in first.words and f"step={story.half}.ckpt" in rest.words[-1]
    assert "--ckpt_path" not in single.words
    assert f"step={story.gpt['trainer']['max_steps']}.ckpt" in story.export().words[3]


def _curve(shift: float = 0.0) -> Curve:
    return Curve({step: 8 - step + shift for step in range(4)}, {1: 7.0 + shift, 3: 5.0 + shift})


def test_curves_that_part_or_do_not_fall_are_refused() -> None:
    Comparison(_curve(1e-9), _curve(), 2).check(1e-6, 1.0)
    with pytest.raises(Failed, match=r"up to 0\.1 from those of one process"):
        Comparison(_curve(0.1), _curve(), 2).check(1e-6, 1.0)
    with pytest.raises(Failed, match="has not clearly fallen"):
        Comparison(_curve(), _curve(), 2).check(1e-6, 4.0)
    with pytest.raises(Failed, match="logged different steps"):
        Comparison(Curve({0: 8.0}, {}), _curve(), 2)


def test_the_page_has_the_picture(tmp_path: Path) -> None:
    svg = save(draw(Comparison(_curve(), _curve(), 2), "first", "second"), tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    shown = page(svg, [("loss", "<5")], ["text"], ["bharat fit"])
    assert "<svg" in shown and "&lt;5" in shown


def test_a_command_that_fails_says_so() -> None:
    with pytest.raises(Failed, match="ended with exit code 3"):
        run(["python", "-c", "raise SystemExit(3)"])
