"""Samples and packs as one web page: no script, nothing from elsewhere, and all that comes from data escaped."""

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import Final

from PIL import Image as Pillow

from visionloom.data.inspect.sample_view import (
    FirstPacks,
    Mark,
    PackedSample,
    PackView,
    SampleView,
    Shown,
    ShownMedia,
    Token,
    text_of,
)

MOST_TOKENS: Final = 6_000
"""Tokens of a sample that are shown at most."""
_JPEG_QUALITY: Final = 85
_HUES: Final = (211, 24, 150, 268, 45, 330, 185, 95)
"""Of a pack's segments in turn."""
_STYLE: Final = """
:root { color-scheme: light dark; --back: #f4f5f7; --card: #fff; --ink: #1c2330; --soft: #667085; --line: #dfe3ea;
  --loss: 152 60% 42%; --special: #7a5af8; --bad: #c4320a; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1d2128; --ink: #e6e9ef; --soft: #98a2b3;
  --line: #323843; --loss: 152 55% 38%; --special: #a48afb; --bad: #f97066; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1280px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; } .bad { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin-top: 16px; }
.sample { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); gap: 20px; margin-top: 12px; }
.sample.text { grid-template-columns: minmax(0, 1fr); }
@media (max-width: 800px) { .sample { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0 0 14px; position: relative; } figure svg, figure img { display: block; width: 100%; height: auto;
  border-radius: 6px; background: var(--back); }
figcaption { color: var(--soft); font-size: 12px; margin-top: 3px; overflow-wrap: anywhere; }
.several { display: grid; grid-template-columns: 1fr 1fr; gap: 0 12px; align-content: start; }
.frames { grid-column: 1 / -1; display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 8px; margin-bottom: 14px; }
.frames figure { margin: 0; }
.turn { margin-bottom: 12px; } .role { font-size: 12px; font-weight: 600; color: var(--soft); letter-spacing: .03em; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
.said.loss { border-left: 3px solid hsl(var(--loss)); padding-left: 10px; }
.tokens { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border-top: 1px solid
  var(--line); margin-top: 14px; padding-top: 12px; }
.t { border-radius: 3px; box-shadow: inset 0 -1px 0 var(--line); padding: 2px 0; margin-right: 1px; }
.s { color: var(--special); } .v { border: 1px solid var(--special); border-radius: 4px; padding: 0 4px; }
.key { display: inline-block; padding: 0 6px; border-radius: 3px; margin-right: 10px; }
.bar { display: flex; height: 34px; border-radius: 6px; overflow: hidden; border: 1px solid var(--line); margin: 6px 0 2px; }
.bar span { overflow: hidden; white-space: nowrap; font-size: 11px; padding: 8px 4px; color: #fff; border-right: 1px solid
  rgb(255 255 255 / 55%); } .bar .gap { background: repeating-linear-gradient(45deg, transparent 0 5px, var(--line) 5px 7px);
  border: 0; }
"""
_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(
    title: str, subtitle: str, samples: Iterable[SampleView], packs: FirstPacks | None = None
) -> str:
    """The whole page as HTML."""
    body = [f"<h1>{escape(title)}</h1><div class='soft'>{escape(subtitle)}</div>"]
    if packs:
        body.append(_packs(packs))
    body += [_sample(view) for view in samples]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _sample(view: SampleView) -> str:
    media = "".join(map(_media, view.media))
    several = " several" if sum(len(media.shown) == 1 for media in view.media) > 2 else ""
    turns = "".join(_turns(view))
    facts = [f"key {view.key}", view.shard, view.sample.kind]
    facts += [f"task {view.sample.task}"] if view.sample.task else []
    facts += [f"{name}: {value}" for name, value in view.sample.meta.items()]
    problem = f"<div class='bad'>{escape(view.problem)}</div>" if view.problem else ""
    return (
        f"<section class='card'><h2>{view.index} \u00b7 {escape(view.sample.id)}</h2>"
        f"<div class='soft'>{escape(' \u00b7 '.join(facts))}</div>{problem}"
        f"<div class='sample{'' if media else ' text'}'>{f"<div class='media{several}'>{media}</div>" if media else ''}<div>{turns}{_tokens(view)}</div></div></section>"
    )


def _turns(view: SampleView) -> Iterable[str]:
    """What is said, turn by turn, before it is rendered."""
    sample = view.sample
    if sample.kind == "doc":
        yield _turn("document", text_of(sample.content), True)
    for message in sample.messages:
        supervised = message.role == "assistant" if message.loss is None else message.loss > 0
        yield _turn(message.role, text_of(message.content), supervised)


def _turn(role: str, text: str, supervised: bool) -> str:
    shown = text if len(text) <= 4 * MOST_TOKENS else text[: 4 * MOST_TOKENS] + " \u2026"
    return (
        f"<div class='turn'><div class='role'>{escape(role)}</div>"
        f"<div class='said{' loss' if supervised else ''}'>{escape(shown)}</div></div>"
    )


# ---- pictures


def _media(media: ShownMedia) -> str:
    caption = escape(media.title)
    if media.problem:
        return f"<figure><figcaption class='bad'>{caption}: {escape(media.problem)}</figcaption></figure>"
    if len(media.shown) == 1:
        return f"<figure>{_picture(media.shown[0])}<figcaption>{caption}</figcaption></figure>"
    frames = "".join(
        f"<figure>{_picture(shown)}<figcaption>{escape(shown.caption)}</figcaption></figure>"
        for shown in media.shown
    )
    return f"<figcaption>{caption}; the frames that training sees</figcaption><div class='frames'>{frames}</div>"


def _picture(shown: Shown) -> str:
    """A picture with its marks drawn over it, in the source's pixels."""
    width, height = shown.width, shown.height
    marks = "".join(_mark(mark, number, width, height) for number, mark in enumerate(shown.marks))
    return (
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{escape(shown.ref, quote=True)}'>"
        f"<image href='{_data_url(shown.picture)}' width='{width}' height='{height}'/>{marks}</svg>"
    )


def _mark(mark: Mark, number: int, width: int, height: int) -> str:
    """A box or a point, with its label; lines stay as thick whatever the picture's size."""
    colour, unit = f"hsl({_HUES[(number + 1) % len(_HUES)]} 90% 50%)", max(width, height) / 100
    x, y = mark.place[0] * width, mark.place[1] * height
    if len(mark.place) == 4:
        w, h = mark.place[2] * width - x, mark.place[3] * height - y
        shape = f"<rect x='{x:.1f}' y='{y:.1f}' width='{w:.1f}' height='{h:.1f}' fill='none'"
    else:
        shape = f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{unit:.1f}' fill='white'"
    shape += f" stroke='{colour}' stroke-width='2.5' vector-effect='non-scaling-stroke'/>"
    if not mark.label:
        return shape
    above = y - unit if y > 5 * unit else y + 4 * unit
    return shape + (
        f"<text x='{x + unit / 2:.1f}' y='{above:.1f}' font-size='{3.6 * unit:.1f}' font-family='sans-serif' fill='white'"
        f" stroke='{colour}' stroke-width='{0.9 * unit:.1f}' paint-order='stroke'>{escape(mark.label)}</text>"
    )


def _data_url(picture: Pillow.Image) -> str:
    """The picture inside the page: small ones exactly, others as JPEG."""
    file = io.BytesIO()
    if max(picture.size) <= 128:
        picture.save(file, "PNG")
        kind = "png"
    else:
        picture.save(file, "JPEG", quality=_JPEG_QUALITY)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- tokens and packs


def _tokens(view: SampleView) -> str:
    """The rendered prompt, token by token, coloured by weight."""
    if view.encoded is None:
        return ""
    heaviest = max((token.weight for token in view.tokens), default=0.0) or 1.0
    shown = "".join(_token(token, heaviest) for token in view.tokens[:MOST_TOKENS])
    more = len(view.tokens) - MOST_TOKENS
    rest = f"<span class='soft'> \u2026 and {more:,} more</span>" if more > 0 else ""
    facts = (
        f"{len(view.encoded.input_ids):,} tokens \u00b7 {len(view.encoded.visual_positions):,} visual"
        f" \u00b7 {view.encoded.supervised_tokens:,} supervised \u00b7 {view.encoded.patch_count:,} patches"
    )
    return (
        f"<div class='tokens'><div class='soft'><span class='key' style='background: hsl(var(--loss) / 35%)'>in the loss</span>"
        f"<span class='key s'>special</span>{facts}</div>{shown}{rest}</div>"
    )


def _token(token: Token, heaviest: float) -> str:
    if token.count > 1 or (token.special and token.text.endswith("_pad|>")):
        return f"<span class='t s v'>{escape(token.text)} \u00d7 {token.count}</span>"
    colour = (
        f" style='background: hsl(var(--loss) / {12 + 28 * token.weight / heaviest:.0f}%)'"
        if token.weight
        else ""
    )
    text = escape(token.text).replace("\n", "\u23ce\n")
    return f"<span class='t{' s' if token.special else ''}'{colour} title='weight {token.weight:g}'>{text}</span>"


def _packs(found: FirstPacks) -> str:
    packs = found.packs
    fill = sum(pack.tokens for pack in packs) / sum(pack.length for pack in packs)
    bars = "".join(_bar(number, pack) for number, pack in enumerate(packs))
    return (
        f"<section class='card'><h2>First packs of {packs[0].length:,} tokens, {fill:.1%} full</h2>"
        f"<div class='soft'>Samples in the dataset's order, without shuffling or a mixture; of the first {found.tried:,},"
        f" {found.left_out:,} are too long or cannot be rendered and are left out. The lower part of a segment is its share"
        f" of visual tokens.</div>{bars}</section>"
    )


def _bar(number: int, pack: PackView) -> str:
    segments = "".join(
        _segment(place, segment, pack.length) for place, segment in enumerate(pack.segments)
    )
    gap = pack.length - pack.tokens
    empty = (
        f"<span class='gap' style='width: {100 * gap / pack.length:.4f}%' title='{gap:,} free'></span>"
        if gap
        else ""
    )
    return (
        f"<div class='bar'>{segments}{empty}</div><div class='soft'>pack {number}: {len(pack.segments)} samples,"
        f" {pack.tokens:,} tokens, {gap:,} free</div>"
    )


def _segment(place: int, segment: PackedSample, length: int) -> str:
    hue, visual = _HUES[place % len(_HUES)], 100 * segment.visual / segment.tokens
    title = escape(
        f"{segment.sample_id}: {segment.tokens:,} tokens, {segment.visual:,} visual, {segment.supervised:,} supervised",
        quote=True,
    )
    back = f"linear-gradient(to top, hsl({hue} 60% 32%) {visual:.1f}%, hsl({hue} 55% 48%) {visual:.1f}%)"
    width = 100 * segment.tokens / length
    return f"<span style='width: {width:.4f}%; background: {back}' title='{title}'>{segment.index}</span>"
