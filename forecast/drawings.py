"""The drawings of plan.html as SVG: bars of stacked pieces, and the timeline of a pipeline. Colours are the page's."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from visionloom.forecast.results import Span
from visionloom.forecast.trace.events import SlotKind

WIDTH: Final = 1000
LABELS: Final = 230
"""Width left of the bars, for what they are about."""
NUMBERS: Final = 100
"""Width to their right, for their sum."""
ROW: Final = 26
BAR: Final = 16
LABEL_CHARACTERS: Final = 36
"""Longest label that fits left of a bar; the pointer shows all of it."""
COLOURS: Final = 8
"""Colours of pieces, which the style sheet names piece-0, piece-1, ...; more pieces begin again."""
MOST_SPANS: Final = 4000
"""Passes that a timeline shows, 0.5 MB of page: of longer steps it shows the beginning."""


@dataclass(frozen=True)
class StackedBar:
    """A row of pieces end to end."""

    label: str
    pieces: Sequence[float]
    """The same kinds of pieces in each bar of a drawing; 0 where it lacks one."""
    total: str
    """Their sum in words."""
    too_long: bool = False
    """It passes the limit."""


def stacked_bars(names: Sequence[str], bars: Sequence[StackedBar], limit: float = 0.0) -> str:
    """Return an SVG element of bars on one scale.

    Args:
        names: of the pieces.
        bars: from top to bottom.
        limit: drawn as a line that no bar should pass; 0: none.
    """
    longest = max([limit, *(sum(bar.pieces) for bar in bars)])
    scale = (WIDTH - LABELS - NUMBERS) / (longest or 1.0)
    shapes = []
    for place, bar in enumerate(bars):
        shapes.append(_bar(names, bar, ROW * place, scale))
    height = ROW * len(bars)
    if limit:
        x = LABELS + limit * scale
        shapes.append(f'<path class="limit" d="M{x:.1f} 0V{height}"/>')
    return _drawing(height, shapes)


def _bar(names: Sequence[str], bar: StackedBar, top: int, scale: float) -> str:
    """Return the shapes of one bar."""
    middle = top + ROW / 2
    label = bar.label
    if len(label) > LABEL_CHARACTERS:
        label = f"{label[: LABEL_CHARACTERS - 1]}…"
    title = f"<title>{escape(bar.label)}</title>"
    shapes = [f'<text x="0" y="{middle:.1f}">{title}{escape(label)}</text>']
    x = float(LABELS)
    for number, (name, piece) in enumerate(zip(names, bar.pieces, strict=True)):
        width = piece * scale
        if piece > 0:
            box = _box(x, top + (ROW - BAR) / 2, width, BAR)
            shapes.append(
                f'<rect class="piece-{number % COLOURS}" {box}><title>{escape(name)}</title></rect>'
            )
        x += width
    kind = ' class="over"' if bar.too_long else ""
    shapes.append(f'<text{kind} x="{x + 8:.1f}" y="{middle:.1f}">{escape(bar.total)}</text>')
    return "".join(shapes)


def legend(names: Sequence[str]) -> str:
    """Return the names of pieces with their colours, as HTML."""
    items = []
    for number, name in enumerate(names):
        items.append(f'<li><i class="piece-{number % COLOURS}"></i>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def timeline(spans: Sequence[Span], step_seconds: float) -> str:
    """Return an SVG element with a row for each stage: forward and backward passes of micro-batches over the time of a step.

    Of more than MOST_SPANS passes the first are shown, and the time that they take.
    """
    shown = sorted(spans, key=lambda span: span.start)[:MOST_SPANS]
    end = step_seconds
    if len(shown) < len(spans):
        end = max(span.end for span in shown)
    left = 70
    scale = (WIDTH - left) / (end or 1.0)
    stages = max((span.stage for span in shown), default=-1) + 1
    shapes = []
    for stage in range(stages):
        middle = ROW * stage + ROW / 2
        shapes.append(f'<text x="0" y="{middle:.1f}">stage {stage}</text>')
    for span in shown:
        shapes.append(_pass(span, left + span.start * scale, scale))
    return _drawing(ROW * stages, shapes)


def _pass(span: Span, x: float, scale: float) -> str:
    """Return the shapes of one pass; later chunks of a stage are paler."""
    width = (span.end - span.start) * scale
    kind = "forward" if span.kind is SlotKind.FORWARD else "backward"
    box = _box(x, ROW * span.stage + 2, width, ROW - 4)
    paler = f' fill-opacity="{max(0.4, 1 - 0.2 * span.chunk):.1f}"' if span.chunk > 0 else ""
    words = f"{kind} {span.micro_batch}, chunk {span.chunk}: {span.end - span.start:.4f} s"
    shape = f'<rect class="{kind}" {box}{paler}><title>{words}</title></rect>'
    # A number of up to three digits takes 20 units.
    if width >= 20:
        at = f'x="{x + width / 2:.1f}" y="{ROW * span.stage + ROW / 2:.1f}"'
        shape += f'<text class="inside" {at}>{span.micro_batch}</text>'
    return shape


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}"'


def _drawing(height: int, shapes: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(shapes)}</svg>'
