"""The drawings of plan.html as SVG: bars of stacked pieces, and the timeline of a pipeline. Colours are the page's."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from visionloom.forecast.results import Span

WIDTH: Final = 1000
LABELS: Final = 230
"""Width left of the bars, for what they are about."""
STAGE_LABELS: Final = 70
"""The same of a timeline."""
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
    lengths = [sum(bar.pieces) for bar in bars]
    longest = max([limit, *lengths])
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
    end = LABELS + sum(bar.pieces) * scale
    label = _text(0, top, shortened(bar.label), title=bar.label)
    total = _text(end + 8, top, bar.total, "over" if bar.too_long else "")
    return label + _pieces(names, bar.pieces, top, scale) + total


def _pieces(names: Sequence[str], pieces: Sequence[float], top: int, scale: float) -> str:
    """Return the pieces of a bar end to end."""
    shapes = ""
    x = float(LABELS)
    for number, (name, piece) in enumerate(zip(names, pieces, strict=True)):
        box = FilledBox(x, top + (ROW - BAR) / 2, piece * scale, BAR)
        if piece > 0:
            shapes += box.svg(f"piece-{number % COLOURS}", name)
        x += box.width
    return shapes


def shortened(label: str) -> str:
    """Return a label that fits left of a bar."""
    if len(label) <= LABEL_CHARACTERS:
        return label
    return f"{label[: LABEL_CHARACTERS - 1]}…"


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
    scale = (WIDTH - STAGE_LABELS) / (end or 1.0)
    stages = max((span.stage for span in shown), default=-1) + 1
    shapes = [_text(0, ROW * stage, f"stage {stage}") for stage in range(stages)]
    shapes += [_pass(span, scale) for span in shown]
    return _drawing(ROW * stages, shapes)


def _pass(span: Span, scale: float) -> str:
    """Return the shapes of one pass; later chunks of a stage are paler."""
    seconds = span.end - span.start
    top = ROW * span.stage
    box = FilledBox(STAGE_LABELS + span.start * scale, top + 2, seconds * scale, ROW - 4)
    title = f"{span.kind} {span.micro_batch}, chunk {span.chunk}: {seconds:.4f} s"
    # A fifth paler each, but for what could no longer be seen.
    opacity = max(0.4, 1 - 0.2 * span.chunk)
    shape = box.svg(str(span.kind), title, opacity)
    # A number of up to three digits takes 20 units.
    if box.width >= 20:
        shape += _text(box.x + box.width / 2, top, str(span.micro_batch), "inside")
    return shape


@dataclass(frozen=True)
class FilledBox:
    """A filled rectangle; the pointer shows its title."""

    x: float
    y: float
    width: float
    height: float

    def svg(self, kind: str, title: str, opacity: float = 1.0) -> str:
        """Return it with a class of the style sheet."""
        place = f'x="{self.x:.1f}" y="{self.y:.1f}"'
        size = f'width="{self.width:.2f}" height="{self.height:.1f}"'
        paler = f' fill-opacity="{opacity:.1f}"' if opacity < 1 else ""
        words = f"<title>{escape(title)}</title>"
        return f'<rect class="{kind}" {place} {size}{paler}>{words}</rect>'


def _text(x: float, top: float, words: str, kind: str = "", title: str = "") -> str:
    """Return words in the middle of a row; the pointer shows their title."""
    named = f' class="{kind}"' if kind else ""
    pointed = f"<title>{escape(title)}</title>" if title else ""
    y = top + ROW / 2
    return f'<text{named} x="{x:.1f}" y="{y:.1f}">{pointed}{escape(words)}</text>'


def _drawing(height: int, shapes: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(shapes)}</svg>'
