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
from visionloom.train.generation.predictions import PICTURE, Prediction

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

    def spend(self, size: int) -> bool:
        """Spend `size` bytes if that many are left; return whether they were."""
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
        """Return the pixels, uint8 [1 or 2, rows, columns, 3]; a second frame only if it differs."""
        # The merger wants the patches of each 2 x 2 block together; here they go back into rows.
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
        # A picture fills both frames of its temporal patch.
        if len(frames) == 2 and np.array_equal(frames[0], frames[1]):
            return frames[:1]
        return frames


def views(sample: EncodedSample) -> Iterator[ShownPicture]:
    """Yield the picture for each PICTURE of the sample, in order; none if it has no patches."""
    if sample.patches is None:
        return
    start = 0
    for time, height, width in sample.grids.tolist():
        for _ in range(time):
            end = start + height * width
            yield ShownPicture(sample.patches[start:end], height, width)
            start = end


def card(prediction: Prediction, budget: PictureBudget) -> str:
    """Return one sample as HTML."""
    sample, question = prediction.sample, prediction.question
    kind, mark = ("right", "✓ right") if prediction.correct else ("wrong", "✗ wrong")
    single = " single" if question.count(PICTURE) == 1 else ""
    illustrated = _illustrated(question, list(views(sample)), budget)
    texts = []
    for name, text in (("answer", sample.answer or ""), ("prediction", prediction.text)):
        shown = escape(shorten(text, ANSWER_CHARACTERS)) or "<i>nothing</i>"
        texts.append(f"<dt>{name}</dt><dd>{shown}</dd>")
    return (
        f'<article class="sample {kind}"><header><span class="mark">{mark}</span>'
        f" {escape(sample.task or sample.dataset)}"
        f' <span class="id">{escape(sample.sample_id)}</span></header>'
        f'<div class="question{single}">{illustrated}</div>'
        f"<dl>{''.join(texts)}</dl></article>"
    )


def shorten(text: str, characters: int) -> str:
    """Return the text, or its two ends with a note of what is left out between them."""
    if len(text) <= characters:
        return text
    half = characters // 2
    omitted = text[half:-half]
    pictures = omitted.count(PICTURE)
    with_pictures = f" with {pictures:,} pictures" if pictures else ""
    note = f" {len(omitted):,} characters{with_pictures} left out "
    return f"{text[:half]} […{note}…] {text[-half:]}"


def _shown_places(question: str) -> list[int]:
    """Return the numbers of a question's pictures that `shorten` does not cut out."""
    places = range(question.count(PICTURE))
    if len(question) <= QUESTION_CHARACTERS:
        return list(places)
    half = QUESTION_CHARACTERS // 2
    first = question[:half].count(PICTURE)
    after = first + question[half:-half].count(PICTURE)
    return [*places[:first], *places[after:]]


def _illustrated(question: str, pictures: Sequence[ShownPicture], budget: PictureBudget) -> str:
    """Return the question with its pictures in their places, HTML.

    The moment before a video's frames becomes their caption.
    """
    places = _shown_places(question)
    side = SIDE if len(places) <= 2 else SIDE_OF_MANY
    *texts, rest = shorten(question, QUESTION_CHARACTERS).split(PICTURE)
    html = []
    before_pictures = zip(texts, places, strict=True)
    for number, (text, place) in enumerate(before_pictures):
        caption = ""
        if moment := _MOMENT.search(text):
            text = text[: moment.start()]
            caption = f"{moment[1]} s"
        is_shown = place < len(pictures) and number < PICTURES_SHOWN
        picture = pictures[place] if is_shown else None
        html.append(escape(text))
        html.append(_figure(picture, caption, side, budget))
    return "".join(html) + escape(rest)


def _figure(view: ShownPicture | None, caption: str, side: int, budget: PictureBudget) -> str:
    """Return a picture, or both frames of a pair, as HTML; an empty frame if there is no room."""
    frames = [_data_uri(frame, side) for frame in view.frames()] if view is not None else []
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    # Base64 is what the page holds, so it is what the budget counts.
    if not frames or not budget.spend(sum(len(data) for data, _ in frames)):
        empty = '<span class="empty" title="picture not shown"></span>'
        return f'<figure class="picture">{empty}{below}</figure>'

    _, size = frames[0]
    limit = ENLARGED if side == SIDE else ENLARGED_OF_MANY
    times = max(1, limit // max(size))
    kind = ' class="pixels"' if times > 1 else ""
    images = []
    for data, (columns, rows) in frames:
        extent = f'width="{times * columns}" height="{times * rows}"'
        images.append(f'<img{kind} src="{data}" {extent} alt="">')
    return f'<figure class="picture">{"".join(images)}{below}</figure>'


def _data_uri(frame: Pixels, side: int) -> tuple[str, tuple[int, int]]:
    """Return a frame no longer than `side` pixels as a data URI, and its (width, height)."""
    picture = Pillow.fromarray(np.ascontiguousarray(frame))
    picture.thumbnail((side, side))
    # Drawings and text stay sharp as PNG; photographs are smaller as JPEG.
    for kind, options in (("png", {}), ("jpeg", {"quality": 82})):
        file = BytesIO()
        picture.save(file, kind, optimize=True, **options)
        if file.tell() <= PNG_BYTES:
            break
    content = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind};base64,{content}", picture.size
