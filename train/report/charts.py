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
_MARKERS: Final = {
    name: f"#0000{number:02x}"  # almost black, and no two alike
    for number, name in enumerate(COLOURS, 1)
}
"""Colours that no chart uses otherwise: the finished SVG has the page's variables in their place."""

WIDE: Final = (9.6, 3.4)
HALF: Final = (4.8, 2.3)
SMALL: Final = (3.2, 2.1)
"""Widths and heights in inches, for one, two and three charts in a row."""

LONGEST_NAME: Final = 40
"""Characters of a phase's name above a chart."""
UNITS: Final = (
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
)
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

    def plot(self, axes: Any) -> None:
        """Add the curve to matplotlib's axes."""
        axes.plot(
            self.x,
            self.y,
            color=_MARKERS[self.colour],
            linewidth=self.width,
            alpha=self.alpha,
            label=self.label or "_",  # matplotlib leaves such a label out of the legend
            linestyle=self.style,
            marker=self.marker,
            markersize=3.5,
            solid_capstyle="round",
        )


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of a run, its phases shaded in turn."""

    name: str
    """Unique on the page: matplotlib derives the ids of elements from it."""
    curves: Sequence[Drawn]
    phases: Sequence[PhaseHistory]
    """At least one."""
    size: tuple[float, float] = HALF
    named: bool = False
    """Write the phases' names above; else their numbers."""
    percent: bool = False
    """Values are percentages."""
    logarithmic: bool = False
    """Allow a logarithmic axis, which values over a wide range then get."""

    def shade(self, axes: Any) -> None:
        """Shade every other phase in grey, with names or numbers above."""
        first = self.phases[0].first_step
        last = self.phases[-1].last_step
        axes.set_xlim(first - 0.5, last + 0.5)
        inches_per_step = (
            self.size[0] * 0.88 / (last - first + 1)
        )  # the axes take 88 % of the width
        free_from = -np.inf
        for place, phase in enumerate(self.phases):
            left = phase.first_step - 0.5
            right = phase.last_step + 0.5
            if place % 2 == 0:
                axes.axvspan(left, right, color=_MARKERS["band"], linewidth=0, zorder=0)

            middle = (left + right) / 2
            at = max(middle, free_from)
            title: dict[str, Any] = {
                "transform": axes.get_xaxis_transform(),
                "color": _MARKERS["muted"],
            }
            if self.named:
                # Names of short phases move right, each by the 0.17 inches that a slanted line takes.
                free_from = at + 0.17 / inches_per_step
                axes.text(at, 1.02, one_line(phase.name)[:LONGEST_NAME], rotation=30, **title)
            elif at == middle:
                # Numbers stay in the middle of their phase; those without room are left out.
                free_from = at + 0.14 / inches_per_step
                axes.text(at, 0.985, str(place + 1), ha="center", va="top", fontsize=7, **title)

    def scale(self, axes: Any) -> None:
        """Make axes from zero up, or logarithmic where the values span a ratio above LOG_FROM."""
        from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

        rounded = [1, 2, 2.5, 5, 10]
        ticks = max(3, round(self.size[0] * 1.2))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=ticks, steps=rounded))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))

        values = np.concatenate([np.asarray(drawn.y) for drawn in self.curves])
        values = values[np.isfinite(values)]
        if self.logarithmic and _is_wide(values):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, self._top(values))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=rounded))

        def written(value: float, _: int | None) -> str:
            return f"{value:.3g}%" if self.percent else compact(value)

        axes.yaxis.set_major_formatter(FuncFormatter(written))
        axes.tick_params(length=2.5, width=0.6)
        if self.named:
            axes.set_xlabel("step", color=_MARKERS["muted"])

    def name_curves(self, axes: Any) -> None:
        """Add a legend if a curve has a label."""
        if not any(drawn.label for drawn in self.curves):
            return
        # Above the axes: inside it would cover curves of some run or other.
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=4,
            borderaxespad=0.2,
            handlelength=1.6,
        )

    def _top(self, values: Values) -> float:
        """Return the upper end of an axis from zero; outliers may be cut off, but no percentage is."""
        if not len(values):
            return 1.0
        largest = float(values.max())
        usual = float(np.quantile(values, 0.98))
        if largest > 3 * usual and not self.percent:
            return 1.25 * usual or 1.0
        return 1.16 * largest or 1.0


def measured(
    phases: Sequence[PhaseHistory],
    value: Callable[[Line], Any],
    points: int,
    colour: str = "one",
    label: str = "",
) -> list[Drawn]:
    """Return the values of each step, faint, and the same smoothed over a fiftieth of the run."""
    span = sum(len(phase.lines) for phase in phases) / 50
    raw = curve(phases, value, points)
    smoothed = curve(phases, value, points, span)
    return [Drawn(*raw, colour, "", 0.8, 0.35), Drawn(*smoothed, colour, label)]


def draw(chart: Chart) -> str:
    """Return an inline SVG element; the same chart always gives the same text."""
    # Here and below, since importing matplotlib takes longer than composing a configuration.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_style(chart.name)):
        figure = Figure(figsize=chart.size, layout="constrained")
        axes = figure.add_subplot()
        chart.shade(axes)
        for drawn in chart.curves:
            drawn.plot(axes)
        chart.scale(axes)
        chart.name_curves(axes)
        file = StringIO()
        # Without these four, the date of drawing among them, the same run gives the same file.
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=metadata)
    return _embeddable(file.getvalue())


def _style(salt: str) -> Any:
    """Return matplotlib's settings of a chart; `salt` makes its element ids its own."""
    muted = _MARKERS["muted"]
    return {
        # Text stays text, so that it takes the page's font and can be searched for.
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "path.simplify": True,
        "font.size": 8.5,
        "text.color": _MARKERS["ink"],
        "text.parse_math": False,  # a dataset may have dollar signs in its name
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": muted,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,  # labels show whole values, without "+1.2e1" at the side
        "grid.color": _MARKERS["grid"],
        "grid.linewidth": 0.6,
        "xtick.color": muted,
        "ytick.color": muted,
        "legend.frameon": False,
    }


def _is_wide(values: Values) -> bool:
    """Return whether values are all above 0 and span a ratio above LOG_FROM."""
    if not len(values) or values.min() <= 0:
        return False
    return bool(values.max() / values.min() > LOG_FROM)


def compact(value: float) -> str:
    """Return a number in few characters: 1200000 as 1.2M, 0.00025 as 2.5e-4."""
    for size, unit in UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    if value and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def _embeddable(svg: str) -> str:
    """Return the SVG element alone, its colours as the page's variables."""
    svg = svg[svg.index("<svg") :].strip()  # without the prolog, which only a file of its own has
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # these ids would repeat on the page
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for name, marker in _MARKERS.items():
        svg = svg.replace(marker, f"var(--{name})")
    return svg
