"""A run's history as text, and as one HTML page that needs nothing from a network."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

from lightning_bharat.reports.history import Event, History

# What the words of an event say already, or a person does not ask.
_SILENT = {"time", "kind", "host", "node", "nodes", "report", "names", "attempt", "ok", "progress", "in_a_row"}
_COLOURS = {"failure": "#c62828", "save_failed": "#c62828", "health": "#ef6c00", "save": "#2e7d32", "load": "#2e7d32"}


def as_text(history: History) -> str:
    """A line an event, and what they come to."""
    lines = ["no events"] if not history.events else []
    for events in _grouped(history.events):
        lines.append(f"{_clock(events[0])}  {events[0]['kind']:12}  {said(events)}".rstrip())
    return "\n".join([*lines, "", *summary(history)])


def summary(history: History) -> list[str]:
    """What the events come to, in a few lines."""
    counted = ", ".join(f"{count} × {cause}" for cause, count in history.failures.items())
    total = sum(history.failures.values())
    failed = f"failures: {total} ({counted})" if total else "failures: none"
    if history.lost:
        failed += f"; {history.lost:.1f} s lost, {history.steps_again} steps done again"
    goodput = "not known: no step was timed" if history.goodput is None else f"{history.goodput:.1%}"
    return [
        f"attempts: {len(history.attempts)} in {history.seconds:.1f} s",
        failed,
        f"goodput:  {goodput}",
    ]


def said(events: Sequence[Event]) -> str:
    """One event in words, or several saves in a row."""
    event = events[0]
    if len(events) > 1:
        return f"{len(events)} × step {event.get('step', '?')} to {events[-1].get('step', '?')}"
    kind = event["kind"]
    if kind == "start":
        hosts = f" on {event['nodes']} hosts" if event.get("nodes", 1) > 1 else ""
        return f"attempt {event.get('attempt', 0)}, {event.get('ranks', '?')} ranks{hosts}"
    if kind == "training":
        return f"goes on from step {event.get('step', 0)}: the first step is done"
    if kind == "failure" and "words" in event:
        after = f", after step {event['step']}" if event.get("step", -1) >= 0 else ""
        return f"{event['cause']}: {event['words']}{after}" + (f" ({event['report']})" if event.get("report") else "")
    if kind == "restart":
        return f"in {event.get('wait', 0):g} s: {event.get('why', '')}"
    if kind == "end" and event.get("ok"):
        return "well" + (f", after step {event['step']}" if event.get("step", -1) >= 0 else "")
    return ", ".join(f"{name} {_short(value)}" for name, value in event.items() if name not in _SILENT)


def as_html(history: History, title: str) -> str:
    """One page: what it comes to, attempts on a line of time, and all events."""
    rows = "\n".join(
        f'<tr style="color:{_COLOURS.get(events[0]["kind"], "inherit")}"><td>{_clock(events[0])}</td>'
        f"<td>{html.escape(str(events[0]['kind']))}</td><td>{html.escape(said(events))}</td></tr>"
        for events in _grouped(history.events)
    )
    facts = "<br>".join(html.escape(line) for line in summary(history))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        "<style>body{font:15px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "td{padding:.15em .8em .15em 0;vertical-align:top}svg{width:100%;height:3.5em}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1><p>{facts}</p>\n{_line_of_time(history)}\n<table>\n{rows}\n</table>"
        "</body></html>\n"
    )


def _line_of_time(history: History) -> str:
    """Green: steps that stay; red: from where a failed attempt last got on to the next one's first step."""
    if not history.seconds:
        return ""
    begin = float(history.events[0]["time"])

    def bar(start: float, end: float, colour: str, tip: str) -> str:
        left, width = (start - begin) / history.seconds * 100, max(end - start, 0) / history.seconds * 100
        return (
            f'<rect x="{left:.3f}%" y="5" width="{max(width, 0.15):.3f}%" height="26" fill="{colour}">'
            f"<title>{html.escape(tip)}</title></rect>"
        )

    bars, last = [bar(begin, begin + history.seconds, "#ddd", "no steps")], float(history.events[-1]["time"])
    for attempt, following in zip(history.attempts, [*history.attempts[1:], None], strict=False):
        end = last if attempt.ended is None else attempt.ended
        if attempt.first is not None:
            tip = f"attempt {attempt.number}: steps {attempt.begins} to {attempt.reached}"
            bars.append(bar(attempt.first, end, "#66bb6a", tip))
        if attempt.cause:
            until = last if following is None else following.first or following.started
            bars.append(bar(end, until, "#e57373", f"{attempt.cause}: {attempt.words}"))
    return f"<svg>{''.join(bars)}</svg>"


def _grouped(events: Sequence[Event]) -> list[list[Event]]:
    """Saves that follow on each other are told together."""
    found: list[list[Event]] = []
    for event in events:
        if found and event["kind"] == "save" == found[-1][0]["kind"]:
            found[-1].append(event)
        else:
            found.append([event])
    return found


def _clock(event: Event) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(event["time"])))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
