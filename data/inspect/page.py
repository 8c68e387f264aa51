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
    """Return the whole page as HTML."""
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
    """Return one sample as a card: media on the left, turns and tokens on the right."""
    sample = view.sample
    facts = [f"key {view.key}", view.shard, sample.kind]
    if sample.task:
        facts.append(f"task {sample.task}")
    facts += [f"{name}: {value}" for name, value in sample.meta.items()]
    problem = f"<div class='bad'>{escape(view.problem)}</div>" if view.problem else ""

    media = "".join(map(_media, view.media))
    if media:
        # Two pictures stand one below the other, more side by side.
        alone = sum(len(one.shown) == 1 for one in view.media)
        several = " several" if alone > 2 else ""
        media = f"<div class='media{several}'>{media}</div>"
    only_text = "" if media else " text"
    text = f"<div>{_turns(view)}{_tokens(view)}</div>"
    return (
        f"<section class='card'><h2>{view.index} \u00b7 {escape(sample.id)}</h2>"
        f"<div class='soft'>{escape(' \u00b7 '.join(facts))}</div>{problem}"
        f"<div class='sample{only_text}'>{media}{text}</div></section>"
    )


def _turns(view: SampleView) -> str:
    """Return the words turn by turn, before they are rendered."""
    sample = view.sample
    # As they are stored, so that a wrong template can be seen.
    turns = []
    if sample.kind == "doc":
        turns.append(_turn("document", text_of(sample.content), True))
    for message in sample.messages:
        supervised = message.role == "assistant" if message.loss is None else message.loss > 0
        turns.append(_turn(message.role, text_of(message.content), supervised))
    return "".join(turns)


def _turn(role: str, text: str, supervised: bool) -> str:
    # About four characters a token.
    most = 4 * MOST_TOKENS
    shown = text if len(text) <= most else text[:most] + " \u2026"
    said = "said loss" if supervised else "said"
    return (
        f"<div class='turn'><div class='role'>{escape(role)}</div>"
        f"<div class='{said}'>{escape(shown)}</div></div>"
    )


# ---- pictures


def _media(media: ShownMedia) -> str:
    """Return a picture, or the frames of a video, with a caption; or the reason that there is none."""
    title = escape(media.title)
    if media.problem:
        problem = f"{title}: {escape(media.problem)}"
        return f"<figure><figcaption class='bad'>{problem}</figcaption></figure>"
    if len(media.shown) == 1:
        return _figure(media.shown[0], title)
    frames = "".join(_figure(shown, escape(shown.caption)) for shown in media.shown)
    caption = f"<figcaption>{title}; the frames that training sees</figcaption>"
    return f"{caption}<div class='frames'>{frames}</div>"


def _figure(shown: Shown, caption: str) -> str:
    return f"<figure>{_picture(shown)}<figcaption>{caption}</figcaption></figure>"


def _picture(shown: Shown) -> str:
    """Return a picture with its marks drawn over it, in the source's pixels."""
    width, height = shown.width, shown.height
    marks = "".join(_mark(mark, number, width, height) for number, mark in enumerate(shown.marks))
    label = escape(shown.ref, quote=True)
    size = f"width='{width}' height='{height}'"
    return (
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{label}'>"
        f"<image href='{_data_url(shown.picture)}' {size}/>{marks}</svg>"
    )


def _mark(mark: Mark, number: int, width: int, height: int) -> str:
    """Return a box or a point, with its label; lines stay as thick whatever the picture's size."""
    hue = _HUES[(number + 1) % len(_HUES)]
    colour, unit = f"hsl({hue} 90% 50%)", max(width, height) / 100
    x, y = mark.place[0] * width, mark.place[1] * height
    if len(mark.place) == 4:
        across, down = mark.place[2] * width - x, mark.place[3] * height - y
        shape = f"<rect x='{x:.1f}' y='{y:.1f}' width='{across:.1f}' height='{down:.1f}'"
        shape += " fill='none'"
    else:
        shape = f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{unit:.1f}' fill='white'"
    shape += f" stroke='{colour}' stroke-width='2.5' vector-effect='non-scaling-stroke'/>"
    return shape + _label(mark.label, colour, (x, y), unit) if mark.label else shape


def _label(text: str, colour: str, place: tuple[float, float], unit: float) -> str:
    """Return a mark's label, above it if there is room; `unit` is a hundredth of the picture's longer side."""
    x, y = place[0] + unit / 2, place[1]
    y += -unit if y > 5 * unit else 4 * unit
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{3.6 * unit:.1f}' font-family='sans-serif' fill='white'"
        f" stroke='{colour}' stroke-width='{0.9 * unit:.1f}' paint-order='stroke'>{escape(text)}</text>"
    )


def _data_url(picture: Pillow.Image) -> str:
    """Return the picture as part of the page: small ones exactly, others as JPEG."""
    file = io.BytesIO()
    # JPEG would blur the few pixels of a small one.
    if max(picture.size) <= 128:
        picture.save(file, "PNG")
        kind = "png"
    else:
        picture.save(file, "JPEG", quality=_JPEG_QUALITY)
        kind = "jpeg"
    content = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind};base64,{content}"


# ---- tokens and packs


def _tokens(view: SampleView) -> str:
    """Return the rendered prompt, token by token, coloured by weight."""
    encoded = view.encoded
    if encoded is None:
        return ""
    # Where all weights are 0, nothing is coloured.
    heaviest = max((token.weight for token in view.tokens), default=0.0) or 1.0
    shown = "".join(_token(token, heaviest) for token in view.tokens[:MOST_TOKENS])
    more = len(view.tokens) - MOST_TOKENS
    rest = f"<span class='soft'> \u2026 and {more:,} more</span>" if more > 0 else ""

    facts = (
        f"{len(encoded.input_ids):,} tokens \u00b7 {len(encoded.visual_positions):,} visual"
        f" \u00b7 {encoded.supervised_tokens:,} supervised \u00b7 {encoded.patch_count:,} patches"
    )
    loss = "<span class='key' style='background: hsl(var(--loss) / 35%)'>in the loss</span>"
    special = "<span class='key s'>special</span>"
    key = f"<div class='soft'>{loss}{special}{facts}</div>"
    return f"<div class='tokens'>{key}{shown}{rest}</div>"


def _token(token: Token, heaviest: float) -> str:
    """Return a token, coloured from 12 % (no weight to speak of) to 40 % (the heaviest of the sample)."""
    if token.count > 1 or (token.special and token.text.endswith("_pad|>")):
        return f"<span class='t s v'>{escape(token.text)} \u00d7 {token.count}</span>"
    colour = ""
    if token.weight:
        share = 12 + 28 * token.weight / heaviest
        colour = f" style='background: hsl(var(--loss) / {share:.0f}%)'"
    kind = "t s" if token.special else "t"
    text = escape(token.text).replace("\n", "\u23ce\n")
    return f"<span class='{kind}'{colour} title='weight {token.weight:g}'>{text}</span>"


def _packs(first: FirstPacks) -> str:
    """Return the first packs as bars."""
    packs = first.packs
    fill = sum(pack.tokens for pack in packs) / sum(pack.length for pack in packs)
    bars = "".join(_bar(number, pack) for number, pack in enumerate(packs))
    return (
        f"<section class='card'><h2>First packs of {packs[0].length:,} tokens, {fill:.1%} full</h2>"
        f"<div class='soft'>Samples in the dataset's order, without shuffling or a mixture; of the first {first.tried:,},"
        f" {first.left_out:,} are too long or cannot be rendered and are left out. The lower part of a segment is its share"
        f" of visual tokens.</div>{bars}</section>"
    )


def _bar(number: int, pack: PackView) -> str:
    """Return a pack as a bar of its segments, with its free tokens at the end."""
    segments = ""
    for place, segment in enumerate(pack.segments):
        segments += _segment(place, segment, pack.length)
    gap = pack.length - pack.tokens
    if gap:
        width = 100 * gap / pack.length
        segments += f"<span class='gap' style='width: {width:.4f}%' title='{gap:,} free'></span>"
    return (
        f"<div class='bar'>{segments}</div><div class='soft'>pack {number}: {len(pack.segments)} samples,"
        f" {pack.tokens:,} tokens, {gap:,} free</div>"
    )


def _segment(place: int, segment: PackedSample, length: int) -> str:
    """Return a segment as a part of its pack's bar; its lower, darker part is the share of visual tokens."""
    hue = _HUES[place % len(_HUES)]
    visual = 100 * segment.visual / segment.tokens
    counts = (
        f"{segment.tokens:,} tokens, {segment.visual:,} visual, {segment.supervised:,} supervised"
    )
    title = escape(f"{segment.sample_id}: {counts}", quote=True)
    dark = f"hsl({hue} 60% 32%) {visual:.1f}%"
    light = f"hsl({hue} 55% 48%) {visual:.1f}%"
    back = f"linear-gradient(to top, {dark}, {light})"
    width = 100 * segment.tokens / length
    style = f"width: {width:.4f}%; background: {back}"
    return f"<span style='{style}' title='{title}'>{segment.index}</span>"
