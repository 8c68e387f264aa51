"""Samples in a report: their pictures rebuilt from patches, with question, right answer and prediction."""

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image as Pillow

from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.geometry import MERGE_SIZE, PATCH_SIZE
from visionloom.data.encode.image import Pixels
from visionloom.train.generate import PICTURE, Prediction

QUESTION_CHARACTERS, ANSWER_CHARACTERS = 1600, 1200
"""Longer texts are cut in the middle: a prompt may have a million characters."""
PICTURES_SHOWN: Final = 12
"""Pictures of one sample that are shown; the others leave an empty frame."""
SIDE, SIDE_OF_MANY = 320, 160
"""Longest side in pixels of one or two pictures, and of more."""
ENLARGED, ENLARGED_OF_MANY = 128, 64
"""Pictures are shown enlarged by the largest whole number that keeps their longest side within this."""
PNG_BYTES: Final = 20_000
"""Larger pictures are stored as JPEG."""
_MOMENT: Final = re.compile(r"<(\d+\.\d) seconds>$")


class PictureBudget:
    """Bytes that all pictures of a report may take together."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Whether so many bytes are left; they are taken if so."""
        if size > self.left:
            return False
        self.left -= size
        return True


@dataclass(frozen=True)
class ShownPicture:
    """One picture, or the two frames of a video's temporal patch, still as patches."""

    rows: Pixels
    """[height x width, 768 or 1536]"""
    height: int
    width: int
    """In patches."""

    def frames(self) -> Pixels:
        """uint8 [1 or 2, rows, columns, 3]; a second frame only where it differs from the first."""
        blocks = self.rows.reshape(
            self.height // MERGE_SIZE,
            self.width // MERGE_SIZE,
            MERGE_SIZE,
            MERGE_SIZE,
            3,
            -1,
            PATCH_SIZE,
            PATCH_SIZE,
        )
        shape = (-1, self.height * PATCH_SIZE, self.width * PATCH_SIZE, 3)
        frames = blocks.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(shape)
        return frames[:1] if len(frames) == 2 and np.array_equal(frames[0], frames[1]) else frames


def views(sample: EncodedSample) -> Iterator[ShownPicture]:
    """What each PICTURE of the sample stands for, in order; nothing if its patches are not there."""
    if sample.patches is None:
        return
    start = 0
    for time, height, width in sample.grids.tolist():
        for _ in range(time):
            yield ShownPicture(sample.patches[start : start + height * width], height, width)
            start += height * width


def card(prediction: Prediction, budget: PictureBudget) -> str:
    """One sample as HTML."""
    sample, right = prediction.sample, prediction.correct
    rows = (("answer", sample.answer or ""), ("prediction", prediction.text))
    return (
        f'<article class="sample {"right" if right else "wrong"}"><header><span class="mark">{"✓ right" if right else "✗ wrong"}</span>'
        f' {escape(sample.task or sample.dataset)} <span class="id">{escape(sample.sample_id)}</span></header>'
        f'<div class="question{" single" if prediction.question.count(PICTURE) == 1 else ""}">{_illustrated(prediction.question, list(views(sample)), budget)}</div><dl>'
        + "".join(
            f"<dt>{name}</dt><dd>{escape(shorten(text, ANSWER_CHARACTERS)) or '<i>nothing</i>'}</dd>"
            for name, text in rows
        )
        + "</dl></article>"
    )


def shorten(text: str, characters: int) -> str:
    """The text, or its two ends with a note of what is left out between them."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]} […{_omitted(text[half:-half])}…] {text[-half:]}"


def _omitted(middle: str) -> str:
    pictures = middle.count(PICTURE)
    return (
        f" {len(middle):,} characters{f' with {pictures:,} pictures' if pictures else ''} left out "
    )


def _illustrated(question: str, found: Sequence[ShownPicture], budget: PictureBudget) -> str:
    """The question with its pictures in their places; the moment before a video's frames becomes their caption."""
    half = QUESTION_CHARACTERS // 2
    cut = len(question) > QUESTION_CHARACTERS
    hidden = question[half:-half].count(PICTURE) if cut else 0
    first_hidden = question[:half].count(PICTURE)
    places = [
        i
        for i in range(question.count(PICTURE))
        if not (cut and first_hidden <= i < first_hidden + hidden)
    ]
    side = SIDE if len(places) <= 2 else SIDE_OF_MANY
    texts = shorten(question, QUESTION_CHARACTERS).split(PICTURE)
    out = []
    for number, (text, place) in enumerate(zip(texts, [*places, None], strict=True)):
        moment = _MOMENT.search(text) if place is not None else None
        out.append(escape(text[: moment.start()] if moment else text))
        if place is not None:
            shown = found[place] if place < len(found) and number < PICTURES_SHOWN else None
            out.append(_figure(shown, f"{moment[1]} s" if moment else "", side, budget))
    return "".join(out)


def _figure(view: ShownPicture | None, caption: str, side: int, budget: PictureBudget) -> str:
    frames = [_data_uri(frame, side) for frame in view.frames()] if view is not None else []
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    if not frames or not budget.take(sum(len(data) for data, _ in frames)):
        return f'<figure class="picture"><span class="empty" title="picture not shown"></span>{below}</figure>'
    times = max(1, (ENLARGED if side == SIDE else ENLARGED_OF_MANY) // max(frames[0][1]))
    kind = ' class="pixels"' if times > 1 else ""
    images = "".join(
        f'<img{kind} src="{data}" width="{times * w}" height="{times * h}" alt="">'
        for data, (w, h) in frames
    )
    return f'<figure class="picture">{images}{below}</figure>'


def _data_uri(frame: Pixels, side: int) -> tuple[str, tuple[int, int]]:
    """A frame no longer than `side` pixels as a data URI, and its (width, height)."""
    picture = Pillow.fromarray(np.ascontiguousarray(frame))
    picture.thumbnail((side, side))
    for kind, options in (("png", {}), ("jpeg", {"quality": 82})):
        file = BytesIO()
        picture.save(file, kind, optimize=True, **options)
        if file.tell() <= PNG_BYTES:
            break
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", picture.size
