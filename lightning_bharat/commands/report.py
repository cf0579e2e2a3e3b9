"""What `bharat report` runs."""

from __future__ import annotations

import json
import re
from pathlib import Path


def report(study: str, *, name: str | None = None, output: Path | None = None) -> None:
    """Write what a study found and cost: an HTML file that needs no network, with Markdown and JSON beside it.

    The study may still run; it is only read.

    Example:
        bharat report runs/width

    Args:
        study: its folder, its journal file, or the URL of a storage, as sqlite:///study.db or grpc://host:port.
        name: of the study, where the storage has several.
        output: the HTML file; by default report.html in the study's folder, or NAME.html here for a storage.
    """
    try:
        import optuna

        from lightning_bharat.reports.study import StudyReport
        from lightning_bharat.reports.study_sections import sections
        from lightning_bharat.reports.study_source import open_study
        from lightning_bharat.reports.study_text import as_html, as_markdown
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"bharat report needs {error.name}, which is not installed; write pip install 'lightning-bharat[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would tell of the copy that is drawn
    found = StudyReport.of(open_study(study, name))
    if output is None:
        output = Path(study) / "report.html" if Path(study).is_dir() else Path(f"{_file_name(found.name)}.html")
    output.parent.mkdir(parents=True, exist_ok=True)
    page, parts = output.with_suffix(".html"), sections(found)
    for path, text in (
        (page, as_html(found.name, parts)),
        (page.with_suffix(".md"), as_markdown(found.name, parts)),
        (page.with_suffix(".json"), json.dumps(found.as_dict(), indent=1)),
    ):
        path.write_text(text, encoding="utf-8")
        print(path)


def _file_name(study: str) -> str:
    """A study's name may hold anything."""
    return re.sub(r"[^\w.-]+", "_", study).strip("._") or "report"
