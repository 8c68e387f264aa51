"""What there is to see in a dataset: a sample's pictures and frames with what is marked on them, its turns, its tokens, packs.

The facts only: `view_page.py` makes a web page of them, `contact_sheet.py` a picture.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from PIL import Image as Pillow

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig, MediaConfig
from visionloom.data.encode.encode import EncodedSample, encode
from visionloom.data.encode.geometry import chosen_frames, frame_times
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.best_fit import PackBudget, pack_samples
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.open_media import MediaError, open_picture
from visionloom.data.shards.sample import (
    Box,
    Element,
    Image,
    Point,
    Sample,
    SampleError,
    Text,
    Think,
    Time,
    ToolCall,
    Video,
)

PATCHES_PER_TOKEN: Final = DataConfig().max_patches_per_token
"""Most patches of a pack for each token of its length, as runs have it by default."""
WINDOW: Final = DataConfig().packing_window_samples
MOST_FRAMES: Final = 24
"""Frames of a video that are shown at most."""
LONGEST_SIDE: Final = 768
"""Pixels to which a picture is reduced for looking at it."""
_SPLIT_CHARACTER: Final = 4
"""Tokens that one character of UTF-8 may be spread over."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A box (x1, y1, x2, y2) or a point (x, y) on a picture, in shares of its sides."""

    place: tuple[float, ...]
    label: str


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture, or one frame of a video with its time; `picture` is reduced, `width` and `height` are the source's."""

    ref: str
    picture: Pillow.Image
    width: int
    height: int
    caption: str = ""
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True)
class ShownMedia:
    """One picture or video of a sample, as it is shown, or why it can't be."""

    title: str
    shown: tuple[Shown, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """A token's text, its weight in the loss, and how many alike it stands for (visual tokens)."""

    text: str
    weight: float
    special: bool = False
    count: int = 1


@dataclass(frozen=True, slots=True)
class SampleView:
    """One sample."""

    index: int
    key: str
    shard: str
    sample: Sample
    media: tuple[ShownMedia, ...]
    tokens: tuple[Token, ...] = ()
    """Empty without a tokenizer."""
    encoded: EncodedSample | None = None
    problem: str = ""
    """Why it cannot be rendered."""


@dataclass(frozen=True, slots=True)
class PackedSample:
    """A sample inside a pack."""

    index: int
    sample_id: str
    tokens: int
    visual: int
    supervised: int


@dataclass(frozen=True, slots=True)
class PackView:
    """A pack of `length` tokens and its segments in order."""

    length: int
    segments: list[PackedSample] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return sum(segment.tokens for segment in self.segments)


@dataclass(frozen=True, slots=True)
class FirstPacks:
    """Packs of the first `tried` samples, of which `left_out` are too long for a pack or cannot be rendered."""

    packs: list[PackView]
    tried: int
    left_out: int


def find_samples(dataset: Dataset, words: Sequence[str], count: int) -> list[int]:
    """Indices of the samples with these keys or indices; without words the first `count`.

    Raises UserError for a word that is neither.
    """
    if not words:
        return list(range(min(count, len(dataset))))
    numbers: dict[str, int] | None = None
    found = []
    for word in words:
        if re.fullmatch(r"\d{1,8}", word) and int(word) < len(dataset):
            found.append(int(word))
            continue
        numbers = numbers or {key: index for index, key in enumerate(dataset.keys)}
        if word not in numbers:
            raise UserError(
                f"{dataset.path}: no sample {word!r}: give a key, or a number below {len(dataset)}"
            )
        found.append(numbers[word])
    return found


def view_sample(
    dataset: Dataset, index: int, rules: MediaConfig, tokenizer: Tokenizer | None = None
) -> SampleView:
    """Everything of one sample; media that cannot be decoded, and a sample that cannot be rendered, say why."""
    place, sample = dataset.location(index), dataset.sample(index)
    media = tuple(_media(dataset, index, sample, rules))
    view = SampleView(index, place.key, place.shard, sample, media)
    if tokenizer is None:
        return view
    try:
        encoded = encode(sample, tokenizer, rules, dataset.name)
    except SampleError as error:
        return SampleView(index, place.key, place.shard, sample, media, problem=str(error))
    return SampleView(
        index, place.key, place.shard, sample, media, tuple(tokens_of(encoded, tokenizer)), encoded
    )


# ---- media


def _media(dataset: Dataset, index: int, sample: Sample, rules: MediaConfig) -> list[ShownMedia]:
    """Pictures and videos in reading order."""
    found, pictures = list[ShownMedia](), 0
    for element in sample.elements:
        if not isinstance(element, Image | Video):
            continue
        title = _title(element)
        try:
            if isinstance(element, Image):
                shown = [_picture(dataset, index, element, _marks(sample, pictures, element))]
            else:
                shown = _frames(dataset, index, sample, element, rules)
            found.append(ShownMedia(title, tuple(shown)))
        except UserError as error:
            found.append(ShownMedia(title, (), str(error)))
        pictures += isinstance(element, Image)
    return found


def _title(element: Image | Video) -> str:
    size = f"{element.width}\u00d7{element.height}"
    if isinstance(element, Image):
        return f"{element.ref} {size}"
    if element.ref is None:
        return f"{len(element.frames)} frames {size}"
    rate = "varying" if element.times else f"{element.fps:.4g}"
    return (
        f"{element.ref} {size}, {element.file_frames} frames, {rate} fps, {element.duration:.4g} s"
    )


def _picture(dataset: Dataset, index: int, image: Image, marks: tuple[Mark, ...]) -> Shown:
    return Shown(
        image.ref,
        _open(dataset.member(index, image.ref), image.ref),
        image.width,
        image.height,
        marks=marks,
    )


def _frames(
    dataset: Dataset, index: int, sample: Sample, video: Video, rules: MediaConfig
) -> list[Shown]:
    """The frames that training sees, evenly thinned out to MOST_FRAMES, with their times."""
    chosen = chosen_frames(video, rules)
    chosen = chosen[
        np.linspace(0, len(chosen) - 1, min(len(chosen), MOST_FRAMES)).round().astype(int)
    ]
    times = frame_times(video, chosen)
    if video.ref is None:
        refs = [video.frames[frame] for frame in chosen.tolist()]
        pictures = [_open(dataset.member(index, ref), ref) for ref in refs]
    else:
        from visionloom.data.encode.video import decode_frames

        refs = [f"{video.ref}#{frame}" for frame in chosen.tolist()]
        decoded = decode_frames(dataset.member(index, video.ref), video, chosen, times, sample.id)
        pictures = [_reduced(Pillow.fromarray(pixels)) for pixels in decoded]
    return [
        Shown(ref, picture, video.width, video.height, f"{time:.2f} s")
        for ref, picture, time in zip(refs, pictures, times, strict=True)
    ]


def _open(data: bytes, name: str) -> Pillow.Image:
    try:
        return _reduced(open_picture(data).convert("RGB"))
    except MediaError as error:
        raise UserError(f"{name} cannot be decoded: {error.detail}") from None
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise UserError(f"{name} cannot be decoded: {type(error).__name__}: {error}") from error


def _reduced(picture: Pillow.Image) -> Pillow.Image:
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return picture


def _marks(sample: Sample, number: int, image: Image) -> tuple[Mark, ...]:
    """Boxes and points on the sample's `number`-th picture."""
    found = []
    for element in sample.elements:
        if isinstance(element, Box | Point) and element.image == number:
            values = element.xyxy if isinstance(element, Box) else element.xy
            sides = (image.width, image.height) if element.space == "px" else (1000, 1000)
            place = tuple(value / sides[axis % 2] for axis, value in enumerate(values))
            found.append(Mark(place, element.label or ""))
    return tuple(found)


# ---- text


def describe(sample: Sample) -> list[str]:
    """The sample as lines of text: one a turn, media as [image] and [video]."""
    if sample.kind == "doc":
        return [text_of(sample.content)]
    return [f"{message.role}: {text_of(message.content)}" for message in sample.messages]


def text_of(elements: Sequence[Element]) -> str:
    """Elements as text for looking at, not as the model reads them."""
    return "".join(map(_element_text, elements))


def _element_text(element: Element) -> str:
    match element:
        case Text():
            return element.text
        case Think():
            return f"<think>{element.text}</think> "
        case Image():
            return "[image]"
        case Video():
            return "[video]"
        case Box():
            return f"[box {_numbers(element.xyxy)}{_label(element)}]"
        case Point():
            return f"[point {_numbers(element.xy)}{_label(element)}]"
        case Time():
            return f"<{element.seconds:g} seconds>"
        case ToolCall():
            return f"[call {element.name}]"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _label(element: Box | Point) -> str:
    return "" if element.label is None else f": {element.label}"


# ---- tokens and packs


def tokens_of(encoded: EncodedSample, tokenizer: Tokenizer) -> list[Token]:
    """Tokens in order; visual tokens that lie together are one, and so are those that share a character."""
    visual = np.zeros(len(encoded.input_ids), bool)
    visual[encoded.visual_positions] = True
    ids, weights = encoded.input_ids.tolist(), encoded.target_weights.tolist()
    found, at = list[Token](), 0
    while at < len(ids):
        end = at + 1
        if visual[at]:
            while end < len(ids) and visual[end]:
                end += 1
            found.append(
                Token(tokenizer.decode(ids[at:end][:1], keep_special=True), 0.0, True, end - at)
            )
        else:
            while (
                "\ufffd" in (text := tokenizer.decode(ids[at:end], keep_special=True))
                and end - at < _SPLIT_CHARACTER
            ):
                if end == len(ids):
                    break
                end += 1
            special = end - at == 1 and not tokenizer.decode(ids[at:end])
            found.append(Token(text, max(weights[at:end]), special))
        at = end
    return found


def first_packs(
    dataset: Dataset, tokenizer: Tokenizer, rules: MediaConfig, length: int, count: int
) -> FirstPacks:
    """The packs that the dataset's first samples make in order, without shuffling or a mixture.

    Samples that are too long or cannot be rendered are left out and counted. Raises UserError if none is left.
    """
    patches, found = int(PATCHES_PER_TOKEN * length), list[tuple[int, EncodedSample]]()
    tried = min(len(dataset), WINDOW)
    for index in range(tried):
        with suppress(SampleError):
            encoded = encode(dataset.sample(index), tokenizer, rules, dataset.name)
            if len(encoded.input_ids) <= length and encoded.patch_count <= patches:
                found.append((index, encoded))
    if not found:
        raise UserError(f"--pack {length}: none of the first samples fits: give a longer sequence")
    sizes = [len(encoded.input_ids) for _, encoded in found]
    budget = PackBudget(length, patches, WINDOW)
    packs = pack_samples(sizes, [encoded.patch_count for _, encoded in found], budget)
    shown = [PackView(length, [_segment(*found[row]) for row in pack]) for pack in packs[:count]]
    return FirstPacks(shown, tried, tried - len(found))


def _segment(index: int, encoded: EncodedSample) -> PackedSample:
    return PackedSample(
        index,
        encoded.sample_id,
        len(encoded.input_ids),
        len(encoded.visual_positions),
        encoded.supervised_tokens,
    )
