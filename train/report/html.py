"""The pieces that a report's page is built of, as HTML text."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Lets a browser show the page's own styles and pictures, and nothing else: no script, nothing loaded."""


def whole_page(name: str, style: str, parts: Sequence[str]) -> str:
    """Return a page of its parts, which are HTML; empty ones are left out.

    Args:
        name: of the run, text.
        style: the style sheet.
        parts: in their order.
    """
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(name)} · visionloom</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{style}</style></head>\n<body><main>\n"
        f"{body}\n</main></body></html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """Return a part of the page under a heading."""
    above = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{above}{body}</section>"


def figure(svg: str, caption: str = "") -> str:
    """Return a chart with its caption, which is text and not HTML."""
    above = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="chart">{above}{svg}</figure>'


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    kind: str = "",
) -> str:
    """Return a table of HTML cells, in a box of its own that scrolls on a narrow screen."""
    above = f"<caption>{caption}</caption>" if caption else ""
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = []
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row)
        body.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="table"><table class="{kind}">{above}<thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def bar(share: float) -> str:
    """Return a share as a bar and a percentage."""
    width = 100 * min(1.0, max(0.0, share))  # a damaged eval.json may say anything
    drawn = f'<span class="bar"><i style="width:{width:.1f}%"></i></span>'
    return f"{drawn}{share:.1%}"


def loss_text(value: float | None) -> str:
    """Return a loss in three decimals; "?" where it was not measured."""
    return "?" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Return a time in hours, minutes or seconds, whichever suits."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping, else an empty one: a log may hold anything."""
    return value if isinstance(value, Mapping) else {}
