"""``make demo``. Everything it writes is in runs/demo."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

from examples.demo.curves import Comparison, Curve
from examples.demo.run import Failed, run
from examples.demo.story import CORPUS, EXPORTED, FIRST, FOLDER, KEPT, PREPARED, REFERENCE, REST, Step, Story

LAYOUTS = "tensor 2 × pipeline 2", "data 2 × tensor 2"
TOLERANCE = 1e-6  # of losses in float64, whose rounding adds up from step to step
FALL = 1.0


class Demo:
    """Runs the steps, and keeps what the summary needs."""

    def __init__(self, story: Story) -> None:
        self.story, self.commands, self.began = story, list[str](), time.monotonic()

    def run(self) -> None:
        """All of it.

        Raises:
            Failed: a step did not do what it should; the message says which.
        """
        start_clean()
        for step in (*self.story.data(), *self.story.training(), self.story.export()):
            self.do(step)
        samples = self.do(self.story.sample(languages()), read=True).splitlines()
        shown = compare(self.story.half)
        numbers = summary(shown, time.monotonic() - self.began)
        files = write_report(shown, numbers, samples, self.commands)
        title("Done")
        width = max(len(name) for name, _ in (*numbers, *files))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in (*numbers, *files)))

    def do(self, step: Step, read: bool = False) -> str:
        """One step."""
        title(step.title)
        self.commands.append(shlex.join(step.words))
        return run(step.words, read=read)


def title(text: str) -> None:
    """Between steps."""
    print(f"\n── {text}", flush=True)


def start_clean() -> None:
    """Remove what an earlier demo has left, also in the middle; text and tokens stay where they belong together."""
    kept = KEPT if CORPUS.exists() else ()
    for path in FOLDER.iterdir() if FOLDER.exists() else ():
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def languages() -> list[str]:
    """Those of which there is enough text to learn something."""
    report = json.loads((CORPUS / "report.json").read_text(encoding="utf-8"))
    return [language for language, sources in report["languages"].items() if sum(sources.values()) > 50_000]


def compare(half: int) -> Comparison:
    """Both runs' curves.

    Raises:
        Failed: they do not coincide, or do not fall.
    """
    first, rest, single = (Curve.read(FOLDER / name) for name in (FIRST, REST, REFERENCE))
    shown = Comparison(first.then(rest), single, half)
    shown.check(TOLERANCE, FALL)
    return shown


def summary(shown: Comparison, seconds: float) -> list[tuple[str, str]]:
    """What came out, as names and values."""
    first, last = shown.fall()
    training, validation = shown.largest()
    return [
        ("layouts", f"{LAYOUTS[0]} for {shown.changed} steps, then {LAYOUTS[1]}, on 4 ranks"),
        ("training loss", f"{shown.hybrid.training[0]:.3f} at the first step"),
        ("validation loss", f"{first:.3f} after {min(shown.hybrid.validation) + 1} steps, {last:.3f} at the end"),
        ("from one process", f"at most {training:.1e} in training losses, {validation:.1e} in validation losses"),
        ("time", f"{seconds:.0f} s"),
    ]


def write_report(
    shown: Comparison, numbers: list[tuple[str, str]], samples: list[str], commands: list[str]
) -> list[tuple[str, str]]:
    """The plot and the page; returns where everything is."""
    from examples.demo.page import page
    from examples.demo.picture import draw
    from lightning_bharat.figures import save

    plot, html = FOLDER / "losses.png", FOLDER / "losses.html"
    picture = save(draw(shown, *LAYOUTS), plot)
    html.write_text(page(picture, numbers, samples, commands), encoding="utf-8")
    return [
        ("plot", f"{plot}, {html}"),
        ("checkpoints", ", ".join(str(FOLDER / name / "checkpoints") for name in (FIRST, REST))),
        ("exported model", str(EXPORTED)),
        ("text and tokens", f"{CORPUS}, {PREPARED} (kept for the next demo; remove {FOLDER} to start from nothing)"),
    ]


def main() -> int:
    """Run the demo; 1 where it failed, after saying why."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    try:
        Demo(Story(Path(__file__).parents[1])).run()
    except Failed as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the next one starts clean", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
