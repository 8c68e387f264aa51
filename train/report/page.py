"""report.html: a finished run on one page, a single file that needs no network, and predictions.jsonl."""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Final

import numpy as np

from visionloom.common.atomic import replacing
from visionloom.common.text import printable
from visionloom.train.generate import PICTURE, Prediction
from visionloom.train.report.charts import HALF, SMALL, WIDE, Chart, Drawn, compact, draw, measured
from visionloom.train.report.gallery import PictureBudget, card
from visionloom.train.report.history import (
    NO_TASKS,
    History,
    Line,
    PhaseHistory,
    Values,
    curve,
    number,
)
from visionloom.train.report.style import STYLE

REPORT, PREDICTIONS = "report.html", "predictions.jsonl"
POINTS, SMALL_POINTS = 1000, 250
"""Points of a curve of the large chart and of the small ones."""
POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""What a browser may do with the page: show its own styles and pictures. It has no script and loads nothing."""
SOURCES_SHOWN: Final = 24
"""Datasets with a chart of their own."""
PICTURE_BYTES: Final = 1_000_000
"""All pictures together."""
EDGE_STEPS: Final = 5
"""Steps at either end of a phase that its first and last loss are the mean of."""

Table = Sequence[Sequence[str]]


def write_report(folder: Path, shown: Sequence[Prediction]) -> Path:
    """Write report.html and predictions.jsonl into a run's folder and return the report's path.

    What the folder lacks is left out of the report. Texts of samples are escaped; the same run gives the same file.
    """
    _write_predictions(folder / PREDICTIONS, shown)
    history = History.read(folder)
    sections = [part(history) for part in (_results, _phases, _losses, _sources, _pace)] + [
        _gallery(shown),
        _notes(history),
    ]
    path = folder / REPORT
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(history.name)} · visionloom</title>\n"
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n<body><main>\n'
        f"{_header(history)}\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )
    with replacing(path) as file:
        file.write(printable(page).encode())
    return path


def _write_predictions(path: Path, shown: Sequence[Prediction]) -> None:
    with replacing(path) as file:
        for prediction in shown:
            sample = prediction.sample
            line = {
                "id": sample.sample_id,
                "source": sample.dataset,
                "task": sample.task,
                "question": prediction.question.replace(PICTURE, "[picture]"),
                "answer": sample.answer,
                "prediction": prediction.text,
                "correct": prediction.correct,
            }
            file.write(
                (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
            )


def _header(history: History) -> str:
    tokens, seconds = (
        sum(phase.total(field) for phase in history.phases) for field in ("tokens", "step_seconds")
    )
    facts = {"step": f"{history.last_step:,}"}
    if model := history.part("model").get("name"):
        facts["model"] = escape(str(model))
    if tokens:
        facts["tokens without padding"] = compact(tokens)
    if seconds:
        facts["time in steps"] = _duration(seconds)
        facts["tokens per second"] = compact(tokens / seconds)
    if (when := history.seconds_since_1970) is not None:
        facts["last event"] = f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M} UTC"
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f'<header class="top"><p>visionloom run</p><h1>{escape(history.name)}</h1><dl>{items}</dl></header>'


def _results(history: History) -> str:
    tasks, losses = (_mapping(history.results.get(name)) for name in ("tasks", "loss"))
    if not tasks and not losses:
        return ""
    answers = [
        [
            escape(task),
            _bar(number(result.get("accuracy")) or 0.0),
            f"{number(result.get('n')) or 0:,.0f}",
        ]
        for task, result in ((task, _mapping(result)) for task, result in tasks.items())
    ]
    held_out = [[escape(source), _loss(number(loss))] for source, loss in losses.items()]
    parts = []
    if answers:
        parts.append(
            _table(
                ("task", "accuracy", "samples"),
                answers,
                "Greedy answers that equal the right one word for word",
            )
        )
    if held_out:
        parts.append(
            _table(("dataset", "loss"), held_out, "Held-out loss, weighted as in the last phase")
        )
    note = f"Model after step {history.results.get('step')}." + ("" if answers else f" {NO_TASKS}")
    return _section(
        "Results on held-out samples", f'<div class="two">{"".join(parts)}</div>', escape(note)
    )


def _phases(history: History) -> str:
    if not history.phases:
        return ""
    rows = []
    for place, phase in enumerate(history.phases, 1):
        _, losses = phase.series(lambda line: line.get("loss"))
        ends = (
            _loss(float(part.mean()) if len(part) else None)
            for part in (losses[:EDGE_STEPS], losses[-EDGE_STEPS:])
        )
        groups = phase.settings.get("trainable", list(_mapping(phase.lines[0].get("lr"))))
        trains = ", ".join(map(str, groups)) if isinstance(groups, list) else ""
        length = number(phase.settings.get("sequence_length"))
        rows.append([
            f"{place}", escape(phase.name), escape(trains), f"{len(phase.lines):,}", f"{int(length):,}" if length else "",
            compact(phase.total("tokens")), _duration(phase.total("step_seconds")), *ends,
        ])  # fmt: skip
    head = (
        "",
        "phase",
        "trains",
        "steps",
        "sequence length",
        "tokens",
        "time",
        "first loss",
        "last loss",
    )
    note = f"First and last loss: training loss, mean of {EDGE_STEPS} steps."
    return _section("Phases", _table(head, rows) + _held_out_by_phase(history), note)


def _held_out_by_phase(history: History) -> str:
    """Held-out loss of each dataset at both ends of each phase."""
    phases = [phase for phase in history.phases if phase.before or phase.after]
    rows = [
        [escape(source), *(_change(phase, source) for phase in phases)]
        for source in history.sources
    ]
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return ""
    head = ("dataset", *(escape(phase.name) for phase in phases))
    note = "Held-out loss at the start and at the end of each phase: green where it fell by more than a tenth, red where it rose so much"
    return _table(head, rows, note, "numbers")


def _change(phase: PhaseHistory, source: str) -> str:
    start, end = number(phase.before.get(source)), number(phase.after.get(source))
    if start is None and end is None:
        return ""
    text = f"{_loss(start)} → {_loss(end)}"
    if start is None or end is None:
        return text
    kind = "fell" if end < 0.9 * start else "rose" if end > 1.1 * start else ""
    return f'<span class="{kind}">{text}</span>' if kind else text


def _losses(history: History) -> str:
    phases = history.phases
    if not phases:
        return ""
    curves = measured(phases, lambda line: line.get("loss"), POINTS)
    chart = draw(Chart("loss", curves, phases, WIDE, named=True, logarithmic=True))
    note = "Faint: each step. Line: smoothed inside each phase. The phases differ in data and in what they train, so the loss may jump."
    return _section("Training loss", f'<div class="wide">{_figure(chart)}</div>', note)


def _sources(history: History) -> str:
    phases = history.phases
    if not phases or not history.sources:
        return ""
    charts = [
        _figure(_source_chart(history, name, i), name)
        for i, name in enumerate(history.sources[:SOURCES_SHOWN])
    ]
    note = "Blue: training loss. Orange: held-out loss at the start and the end of each phase. Numbers: phases."
    if (more := len(history.sources) - SOURCES_SHOWN) > 0:
        note += f" {more} more datasets are not shown."
    return _section("Loss by dataset", f'<div class="three">{"".join(charts)}</div>', note)


def _source_chart(history: History, name: str, place: int) -> str:
    curves = measured(
        history.phases, lambda line: _mapping(line.get("loss_by_source")).get(name), SMALL_POINTS
    )
    held_out = Drawn(*_held_out(history, name), "two", "", 1.0, 1.0, ":", "o")
    return draw(
        Chart(f"source {place}", [*curves, held_out], history.phases, SMALL, logarithmic=True)
    )


def _held_out(history: History, source: str) -> tuple[Values, Values]:
    """Held-out losses of a dataset at the ends of the phases, with a gap between phases."""
    points: list[tuple[float, float]] = []
    for phase in history.phases:
        for step, losses in ((phase.first_step - 1, phase.before), (phase.last_step, phase.after)):
            if (loss := number(losses.get(source))) is not None:
                points.append((step, loss))
        points.append((float("nan"), float("nan")))
    x, y = np.array(points).T
    return x, y


def _pace(history: History) -> str:
    phases = history.phases
    if not phases:
        return ""
    charts = [_rates(phases)]
    wait = measured(
        phases, lambda line: line.get("data_wait_seconds"), SMALL_POINTS, "two", "waiting for data"
    )
    for title, curves, percent in (
        ("Gradient norm before clipping", _plain(phases, "grad_norm"), False),
        ("Tokens per second, padding left out", _plain(phases, "tokens_per_second"), False),
        ("Seconds of a step", [*_plain(phases, "step_seconds", "whole step"), *wait], False),
        ("Padding", _plain(phases, "padding_fraction", scale=100.0), True),
        ("Most memory used by a rank, GiB", _plain(phases, "memory_gib"), False),
        ("Model FLOP utilisation", _plain(phases, "mfu", scale=100.0), True),
    ):
        if any(len(drawn.y) for drawn in curves):
            chart = Chart(
                title,
                curves,
                phases,
                HALF,
                percent=percent,
                logarithmic=title.startswith("Gradient"),
            )
            charts.append(_figure(draw(chart), title))
    return _section("Optimisation and speed", f'<div class="two">{"".join(charts)}</div>')


def _plain(
    phases: list[PhaseHistory], field: str, label: str = "", scale: float = 1.0
) -> list[Drawn]:
    return measured(
        phases,
        lambda line: None if (x := number(line.get(field))) is None else x * scale,
        SMALL_POINTS,
        "one",
        label,
    )


def _rate_of(group: str, line: Line) -> Any:
    return _mapping(line.get("lr")).get(group)


def _rates(phases: list[PhaseHistory]) -> str:
    """Learning rates; the widths differ so that equal ones can be told apart."""
    curves = []
    for group, colour, width in (
        ("vision", "three", 4.5),
        ("merger", "two", 2.6),
        ("language", "one", 1.2),
    ):
        steps, rates = curve(phases, functools.partial(_rate_of, group), SMALL_POINTS)
        curves.append(Drawn(steps, rates, colour, group, width))
    return _figure(
        draw(Chart("learning rate", [drawn for drawn in curves if len(drawn.y)], phases)),
        "Learning rate",
    )


def _gallery(shown: Sequence[Prediction]) -> str:
    if not shown:
        return ""
    budget = PictureBudget(PICTURE_BYTES)
    cards = "".join(card(prediction, budget) for prediction in shown)
    note = "The first ones of each held-out dataset, not chosen by their result."
    return _section("Samples", f'<div class="samples">{cards}</div>', note)


def _notes(history: History) -> str:
    """What a reader should know besides: resumed, skipped, left out."""
    notes = [f"Resumed after step {event.get('step')}." for event in history.of("resume")]
    if skipped := sum(bool(line.get("skipped")) for line in history.lines):
        notes.append(f"{skipped:,} steps were skipped because their gradient was not finite.")
    notes += [
        f"Phase {event.get('phase')} leaves out {number(event.get('samples')) or 0:,.0f} samples of {event.get('dataset')}: they are longer than a pack."
        for event in history.of("dropped")
    ]
    notes += [
        f"Damaged checkpoint passed over: {event.get('detail')}"
        for event in history.of("damaged_checkpoint")
    ]
    items = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes))
    return _section("Notes", f"<ul>{items}</ul>") if items else ""


def _section(title: str, body: str, note: str = "") -> str:
    return (
        f"<section><h2>{title}</h2>{f'<p class="note">{note}</p>' if note else ''}{body}</section>"
    )


def _figure(svg: str, caption: str = "") -> str:
    return f'<figure class="chart">{f"<figcaption>{escape(caption)}</figcaption>" if caption else ""}{svg}</figure>'


def _table(head: Sequence[str], rows: Table, caption: str = "", kind: str = "") -> str:
    above = f"<caption>{caption}</caption>" if caption else ""
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table class="{kind}">{above}<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>{share:.1%}'


def _loss(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever suits."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
