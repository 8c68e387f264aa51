"""The sections of a report, each from a run's history; empty where the history lacks what it shows."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, Final

from visionloom.train.generation.predictions import Prediction
from visionloom.train.observe.metrics import number
from visionloom.train.observe.time_spent import WORDS
from visionloom.train.report.charts import SMALL, WIDE, Chart, Drawn, compact, draw, measured
from visionloom.train.report.gallery import PictureBudget, card
from visionloom.train.report.history import (
    NO_TASKS,
    History,
    Line,
    PhaseHistory,
    curve,
)
from visionloom.train.report.html import bar, duration, figure, loss_text, mapping, section, table
from visionloom.train.report.needles import needle_grids

POINTS, SMALL_POINTS = 1000, 250
"""Points of a curve of the large chart and of the small ones."""
SOURCES_SHOWN: Final = 24
"""Datasets with a chart of their own."""
TASKS_SHOWN: Final = 100
PICTURE_BYTES: Final = 1_000_000
"""All pictures together."""
EDGE_STEPS: Final = 5
"""Steps at either end of a phase whose mean is its first and last loss."""
TASK_COLUMNS: Final = ("task", "accuracy", "samples")
LOSS_COLUMNS: Final = ("dataset", "loss")
NUMBER_COLUMNS: Final = ("name", "number")
TIME_COLUMNS: Final = ("", "share", "time")
NUMBERS_SHOWN: Final = 500
"""Numbers of evaluation.command."""
PHASE_COLUMNS: Final = (
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


def header(history: History) -> str:
    """Return the run's name and its facts."""
    items = []
    for name, value in facts(history).items():
        items.append(f"<div><dt>{name}</dt><dd>{value}</dd></div>")
    return (
        f'<header class="top"><p>visionloom run</p><h1>{escape(history.name)}</h1>'
        f"<dl>{''.join(items)}</dl></header>"
    )


def facts(history: History) -> dict[str, str]:
    """Return what the head of the page says of a run, by name, HTML; what is unknown is left out."""
    tokens = sum(phase.total("tokens") for phase in history.phases)
    seconds = sum(phase.total("step_seconds") for phase in history.phases)
    model = history.part("model").get("name")
    when = history.seconds_since_1970

    values = {"step": f"{history.last_step:,}"}
    if model:
        values["model"] = escape(str(model))
    if tokens:
        values["tokens without padding"] = compact(tokens)
    if seconds:
        values["time in steps"] = duration(seconds)
        values["tokens per second"] = compact(tokens / seconds)
    if when is not None:
        values["last event"] = utc(when)
    return values


def utc(seconds_since_1970: float) -> str:
    """Return a moment in UTC, so that the same run gives the same page on any machine."""
    return f"{datetime.fromtimestamp(seconds_since_1970, UTC):%Y-%m-%d %H:%M} UTC"


def results(history: History) -> str:
    """Return tables of the last evaluation: answers by task, held-out loss by dataset."""
    tasks = mapping(history.results.get("tasks"))
    losses = mapping(history.results.get("loss"))
    numbers = numbers_table(mapping(history.results.get("command")))
    if not tasks and not losses:
        return section("Results", numbers) if numbers else ""

    rows = [[escape(source), loss_text(number(loss))] for source, loss in losses.items()]

    tables = ""
    note = f"Model after step {history.results.get('step')}."
    if tasks:
        tables += answers_table(tasks)
    else:
        note += f" {NO_TASKS}"
    if rows:
        tables += table(LOSS_COLUMNS, rows, "Held-out loss, weighted as in the last phase")
    grids = needle_grids(mapping(history.results.get("needles")))
    body = f'<div class="two">{tables}</div>{grids}{numbers}'
    return section("Results on held-out samples", body, escape(note))


def answers_table(tasks: Mapping[str, Any]) -> str:
    """Return the table of the answers by task."""
    rows = []
    for task, each in tasks.items():
        result = mapping(each)
        accuracy = number(result.get("accuracy")) or 0.0
        samples = number(result.get("n")) or 0
        rows.append([escape(task), bar(accuracy), f"{samples:,.0f}"])
    return table(
        TASK_COLUMNS,
        rows,
        "Right greedy answers, by the score of their dataset; boxes from an overlap (IoU) of 0.5",
    )


def numbers_table(numbers: Mapping[str, Any]) -> str:
    """Return the table of what evaluation.command measured; empty without any."""
    rows = []
    for name, value in list(numbers.items())[:NUMBERS_SHOWN]:
        shown = number(value)
        rows.append([escape(name), "?" if shown is None else f"{shown:.6g}"])
    if not rows:
        return ""
    note = "Numbers of evaluation.command"
    if (more := len(numbers) - NUMBERS_SHOWN) > 0:
        note += f"; {more:,} more are in eval.json"
    return table(NUMBER_COLUMNS, rows, note)


def phases(history: History) -> str:
    """Return a table of the phases, and those of their tasks and their held-out losses."""
    if not history.phases:
        return ""
    rows = []
    for place, phase in enumerate(history.phases, 1):
        rows.append(phase_row(place, phase))
    tables = table(PHASE_COLUMNS, rows) + tasks_by_phase(history) + held_out_by_phase(history)
    note = f"First and last loss: training loss, mean of {EDGE_STEPS} steps."
    return section("Phases", tables, note)


def phase_row(place: int, phase: PhaseHistory) -> list[str]:
    """Return the cells of PHASE_COLUMNS."""
    length = number(phase.settings.get("sequence_length"))
    first, last = edge_losses(phase)
    return [
        f"{place}",
        escape(phase.name),
        escape(trained_groups(phase)),
        f"{len(phase.lines):,}",
        f"{int(length):,}" if length else "",
        compact(phase.total("tokens")),
        duration(phase.total("step_seconds")),
        loss_text(first),
        loss_text(last),
    ]


def trained_groups(phase: PhaseHistory) -> str:
    """Return the names of the groups that a phase trains; empty if they are unknown."""
    # Without config.yaml the metrics still say which groups have a learning rate.
    with_rate = list(mapping(phase.lines[0].get("lr")))
    groups = phase.settings.get("trainable", with_rate)
    return ", ".join(map(str, groups)) if isinstance(groups, list) else ""


def edge_losses(phase: PhaseHistory) -> tuple[float | None, float | None]:
    """Return the first and the last training loss of a phase, each a mean of EDGE_STEPS; None without any."""
    _, losses = phase.series(lambda line: line.get("loss"))
    if not len(losses):
        return None, None
    return float(losses[:EDGE_STEPS].mean()), float(losses[-EDGE_STEPS:].mean())


TASKS_NOTE = (
    "Right answers after each phase, so before the next: green where they are a tenth more than before it,"
    " red where fewer"
)


def tasks_by_phase(history: History) -> str:
    """Return a table of each task's accuracy after each phase that was measured."""
    phases = [phase for phase in history.phases if phase.tasks]
    # A phase may lack a task: its dataset may have been added on a resume.
    names = sorted({name for phase in phases for name in phase.tasks})
    rows = []
    for name in names[:TASKS_SHOWN]:
        cells = [escape(name)]
        before = None
        for phase in phases:
            accuracy = number(mapping(phase.tasks.get(name)).get("accuracy"))
            cells.append(accuracy_change(before, accuracy))
            before = accuracy
        rows.append(cells)
    if not rows:
        return ""
    head = ("task", *(escape(phase.name) for phase in phases))
    return table(head, rows, TASKS_NOTE, "numbers")


def accuracy_change(before: float | None, after: float | None) -> str:
    """Return the accuracy after a phase, marked where the phase moved it by a tenth of all answers."""
    if after is None:
        return ""
    text = f"{after:.0%}"
    if before is None:
        return text
    # A tenth of 32 answers is three of them; less is chance.
    if after >= before + 0.1:
        return f'<span class="fell">{text}</span>'
    if after <= before - 0.1:
        return f'<span class="rose">{text}</span>'
    return text


def held_out_by_phase(history: History) -> str:
    """Return a table of each dataset's held-out loss at both ends of each phase."""
    phases = [phase for phase in history.phases if phase.before or phase.after]
    rows = []
    for source in history.sources:
        losses = [held_out_change(phase, source) for phase in phases]
        if any(losses):
            rows.append([escape(source), *losses])
    if not rows:
        return ""
    head = ("dataset", *(escape(phase.name) for phase in phases))
    note = "Held-out loss at the start and at the end of each phase: green where it fell by more than a tenth, red where it rose so much"
    return table(head, rows, note, "numbers")


def held_out_change(phase: PhaseHistory, source: str) -> str:
    """Return a dataset's held-out loss at both ends of a phase, marked where it moved by a tenth."""
    start = number(phase.before.get(source))
    end = number(phase.after.get(source))
    if start is None and end is None:
        return ""
    text = f"{loss_text(start)} → {loss_text(end)}"
    if start is None or end is None:
        return text
    if end < 0.9 * start:
        return f'<span class="fell">{text}</span>'
    if end > 1.1 * start:
        return f'<span class="rose">{text}</span>'
    return text


def time_spent(history: History) -> str:
    """Return a table of where the wall time went, over all starts of the run; empty if its logs hold no times."""
    spent = history.time_spent
    if not spent.wall:
        return ""
    rows = []
    for name, seconds in spent.seconds.items():
        share = seconds / spent.wall
        rows.append([WORDS[name], bar(share), duration(seconds)])
    note = (
        f"{duration(spent.wall)} from the first start to the last line of the logs, in {spent.starts} starts; {spent.lost_steps}"
        " steps were lost. The share of steps that count is the effective training time ratio (ETTR)."
    )
    return section("Where the time went", table(TIME_COLUMNS, rows), note)


def losses(history: History) -> str:
    """Return the chart of the training loss over the whole run."""
    phases = history.phases
    if not phases:
        return ""
    curves = measured(phases, lambda line: line.get("loss"), POINTS)
    chart = draw(Chart("loss", curves, phases, WIDE, named=True, logarithmic=True))
    note = "Faint: each step. Line: smoothed inside each phase. The phases differ in data and in what they train, so the loss may jump."
    return section("Training loss", f'<div class="wide">{figure(chart)}</div>', note)


def sources(history: History) -> str:
    """Return a chart of the loss of each dataset, at most SOURCES_SHOWN."""
    phases = history.phases
    if not phases or not history.sources:
        return ""
    charts = []
    for place, name in enumerate(history.sources[:SOURCES_SHOWN]):
        charts.append(figure(source_chart(history, name, place), name))
    note = "Blue: training loss. Orange: held-out loss at the start and the end of each phase. Numbers: phases."
    if (more := len(history.sources) - SOURCES_SHOWN) > 0:
        note += f" {more} more datasets are not shown."
    return section("Loss by dataset", f'<div class="three">{"".join(charts)}</div>', note)


def source_chart(history: History, name: str, place: int) -> str:
    """Draw a dataset's training loss, and its held-out losses as dots."""

    def loss_of(line: Line) -> Any:
        return mapping(line.get("loss_by_source")).get(name)

    curves = measured(history.phases, loss_of, SMALL_POINTS)
    steps, losses = history.held_out(name)
    curves.append(Drawn(steps, losses, "two", width=1.0, style=":", marker="o"))
    # Numbered, not named: the name is the dataset's own and may hold anything.
    return draw(Chart(f"source {place}", curves, history.phases, SMALL, logarithmic=True))


def pace(history: History) -> str:
    """Return the charts of rates, gradients, time, padding and memory; empty ones are left out."""
    phases = history.phases
    if not phases:
        return ""
    figures = [learning_rates_chart(phases)]
    for chart in pace_charts(phases):
        if any(len(drawn.y) for drawn in chart.curves):
            figures.append(figure(draw(chart), chart.name))
    return section("Optimisation and speed", f'<div class="two">{"".join(figures)}</div>')


def pace_charts(phases: list[PhaseHistory]) -> list[Chart]:
    """Return the charts of gradients, time, padding and memory, empty ones among them."""
    return [
        Chart(
            "Gradient norm before clipping",
            _plain(phases, "grad_norm"),
            phases,
            logarithmic=True,  # one spike would press all other steps onto the axis
        ),
        Chart("Tokens per second, padding left out", _plain(phases, "tokens_per_second"), phases),
        Chart("Seconds of a step", seconds_of_steps(phases), phases),
        Chart("Padding", _plain(phases, "padding_fraction", scale=100.0), phases, percent=True),
        Chart("Most memory used by a rank, GiB", _plain(phases, "memory_gib"), phases),
        Chart(
            "Model FLOP utilisation",
            _plain(phases, "mfu", scale=100.0),
            phases,
            percent=True,
        ),
    ]


def seconds_of_steps(phases: list[PhaseHistory]) -> list[Drawn]:
    """Return the curves of the time of a step and of its part that waits for data."""
    whole = _plain(phases, "step_seconds", "whole step")
    return whole + measured(
        phases,
        lambda line: line.get("data_wait_seconds"),
        SMALL_POINTS,
        "two",
        "waiting for data",
    )


def _plain(
    phases: list[PhaseHistory], field: str, label: str = "", scale: float = 1.0
) -> list[Drawn]:
    """Return the curves of a field of the metrics, times `scale`."""

    def scaled(line: Line) -> float | None:
        value = number(line.get(field))
        return None if value is None else value * scale

    return measured(phases, scaled, SMALL_POINTS, "one", label)


def rate_of(group: str, line: Line) -> Any:
    """Return a group's learning rate, of any type that a log may hold."""
    return mapping(line.get("lr")).get(group)


def learning_rates_chart(phases: list[PhaseHistory]) -> str:
    """Return the chart of learning rates; the widths differ so that equal ones can be told apart."""
    curves = []
    for group, colour, width in (
        ("vision", "three", 4.5),
        ("merger", "two", 2.6),
        ("language", "one", 1.2),
    ):
        steps, rates = curve(phases, functools.partial(rate_of, group), SMALL_POINTS)
        if len(rates):
            curves.append(Drawn(steps, rates, colour, group, width))
    return figure(draw(Chart("learning rate", curves, phases)), "Learning rate")


def gallery(shown: Sequence[Prediction]) -> str:
    """Return the samples with their pictures and answers."""
    if not shown:
        return ""
    budget = PictureBudget(PICTURE_BYTES)
    cards = "".join(card(prediction, budget) for prediction in shown)
    note = "The first ones of each held-out dataset, not chosen by their result."
    return section("Samples", f'<div class="samples">{cards}</div>', note)


def notes(history: History) -> str:
    """Return a list of what explains odd numbers: resumed, skipped, left out, damaged."""
    # Each start of a run writes its notes again.
    different = dict.fromkeys(every_note(history))
    items = "".join(f"<li>{escape(note)}</li>" for note in different)
    return section("Notes", f"<ul>{items}</ul>") if items else ""


def every_note(history: History) -> Iterator[str]:
    """Yield a sentence for each event that explains odd numbers."""
    for event in history.of("resume"):
        yield f"Resumed after step {event.get('step')}."
    if skipped := sum(bool(line.get("skipped")) for line in history.lines):
        yield f"{skipped:,} steps were skipped: their loss or gradient was not finite, or a spike where optim.skip_spikes is on."
    yield from map(dropped_note, history.of("dropped"))
    for event in history.of("damaged_checkpoint"):
        yield f"Damaged checkpoint passed over: {event.get('detail')}"


def dropped_note(event: Line) -> str:
    """Return the note for samples that a phase leaves out."""
    samples = number(event.get("samples")) or 0
    return (
        f"Phase {event.get('phase')} leaves out {samples:,.0f} samples"
        f" of {event.get('dataset')}: they are longer than a pack."
    )
