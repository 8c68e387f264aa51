"""The charts of a report as SVG that takes its colours from the page, so that they suit light and dark."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Final

import numpy as np

from visionloom.common.text import one_line
from visionloom.train.report.history import Line, PhaseHistory, Values, curve

COLOURS: Final = ("ink", "muted", "grid", "band", "one", "two", "three")
_MARKERS: Final = {name: f"#0000{number:02x}" for number, name in enumerate(COLOURS, 1)}
"""Colours that no chart uses otherwise: the finished SVG has the page's variables in their place."""

WIDE: Final = (9.6, 3.4)
HALF: Final = (4.8, 2.3)
SMALL: Final = (3.2, 2.1)
"""Widths and heights in inches, for one, two and three charts beside each other."""

LONGEST_NAME: Final = 40
"""Characters of a phase's name above a chart."""
LOG_FROM: Final = 30.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Drawn:
    """One curve."""

    x: Values
    y: Values
    colour: str = "one"
    label: str = ""
    width: float = 1.6
    alpha: float = 1.0
    style: str = "-"
    marker: str = ""


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of a run, its phases shaded in turn."""

    name: str
    """Tells its elements from those of other charts."""
    curves: Sequence[Drawn]
    phases: Sequence[PhaseHistory]
    """At least one."""
    size: tuple[float, float] = HALF
    named: bool = False
    """Whether the phases' names stand above; else their numbers."""
    percent: bool = False
    logarithmic: bool = False
    """Whether the axis may be logarithmic."""


def measured(
    phases: Sequence[PhaseHistory],
    value: Callable[[Line], Any],
    points: int,
    colour: str = "one",
    label: str = "",
) -> list[Drawn]:
    """What was measured at each step, faint, and smoothed over a fiftieth of the run."""
    span = sum(len(phase.lines) for phase in phases) / 50
    raw, smoothed = curve(phases, value, points), curve(phases, value, points, span)
    return [Drawn(*raw, colour, "", 0.8, 0.35), Drawn(*smoothed, colour, label)]


def draw(chart: Chart) -> str:
    """An inline SVG element; the same chart always gives the same text."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink, muted, grid = _MARKERS["ink"], _MARKERS["muted"], _MARKERS["grid"]
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": chart.name, "path.simplify": True, "font.size": 8.5, "text.color": ink,
        "axes.facecolor": "none", "axes.edgecolor": muted, "axes.linewidth": 0.6, "axes.grid": True, "axes.grid.axis": "y",
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": grid,
        "grid.linewidth": 0.6, "xtick.color": muted, "ytick.color": muted, "figure.facecolor": "none",
        "legend.frameon": False, "text.parse_math": False, "axes.formatter.useoffset": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=chart.size, layout="constrained")
        axes = figure.add_subplot()
        _shade(axes, chart)
        for drawn in chart.curves:
            axes.plot(
                drawn.x, drawn.y, color=_MARKERS[drawn.colour], linewidth=drawn.width, alpha=drawn.alpha, label=drawn.label or "_",
                linestyle=drawn.style, marker=drawn.marker, markersize=3.5, solid_capstyle="round",
            )  # fmt: skip
        _scale(axes, chart)
        if any(drawn.label for drawn in chart.curves):
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1.0),
                ncols=4,
                borderaxespad=0.2,
                handlelength=1.6,
            )
        file = StringIO()
        figure.savefig(
            file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _embeddable(file.getvalue())


def _shade(axes: Any, chart: Chart) -> None:
    """Every other phase in grey, with names or numbers above."""
    first, last = chart.phases[0].first_step, chart.phases[-1].last_step
    axes.set_xlim(first - 0.5, last + 0.5)
    inches_per_step = chart.size[0] * 0.88 / (last - first + 1)
    free_from = -np.inf
    for place, phase in enumerate(chart.phases):
        left, right = phase.first_step - 0.5, phase.last_step + 0.5
        if place % 2 == 0:
            axes.axvspan(left, right, color=_MARKERS["band"], linewidth=0, zorder=0)
        at = max((left + right) / 2, free_from)
        if chart.named:
            free_from = at + 0.17 / inches_per_step
            axes.text(
                at,
                1.02,
                one_line(phase.name)[:LONGEST_NAME],
                transform=axes.get_xaxis_transform(),
                rotation=30,
                color=_MARKERS["muted"],
            )
        elif at == (left + right) / 2:
            free_from = at + 0.14 / inches_per_step
            axes.text(
                at, 0.985, str(place + 1), transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=7,
                color=_MARKERS["muted"],
            )  # fmt: skip


def _scale(axes: Any, chart: Chart) -> None:
    """Axes from zero up, or logarithmic where the values span so much."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    values = np.concatenate([np.asarray(drawn.y) for drawn in chart.curves])
    values = values[np.isfinite(values)]
    axes.xaxis.set_major_locator(
        MaxNLocator(
            integer=True, nbins=max(3, round(chart.size[0] * 1.2)), steps=[1, 2, 2.5, 5, 10]
        )
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    if (
        chart.logarithmic
        and len(values)
        and values.min() > 0
        and values.max() / values.min() > LOG_FROM
    ):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, _top(values, chart))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.3g}%" if chart.percent else compact(value))
    )
    axes.tick_params(length=2.5, width=0.6)
    if chart.named:
        axes.set_xlabel("step", color=_MARKERS["muted"])


def _top(values: Values, chart: Chart) -> float:
    """Upper end of an axis from zero; a few outliers may leave the picture, but no percentage does."""
    largest = float(values.max()) if len(values) else 0.0
    usual = float(np.quantile(values, 0.98)) if len(values) else 0.0
    return (1.25 * usual if largest > 3 * usual and not chart.percent else 1.16 * largest) or 1.0


def compact(value: float) -> str:
    """A number in few characters: 1200000 as 1.2M, 0.00025 as 2.5e-4."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    if value and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def _embeddable(svg: str) -> str:
    """The SVG element alone: no prolog, no group names (they would repeat on the page), colours as variables."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for name, marker in _MARKERS.items():
        svg = svg.replace(marker, f"var(--{name})")
    return svg
