"""The visible facts of a dataset: a sample's pictures and frames with the marks on them, its turns, its tokens, packs.

`page.py` makes a web page of them, `contact_sheet.py` a picture.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
    """One picture or video of a sample, as it is shown, or the reason that it can't be."""

    title: str
    shown: tuple[Shown, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """A token's text, its weight in the loss, and the number of equal tokens that it stands for (visual ones)."""

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
    """The reason that it cannot be rendered."""


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
        """Return the tokens of all segments."""
        return sum(segment.tokens for segment in self.segments)


@dataclass(frozen=True, slots=True)
class FirstPacks:
    """Packs of the first `tried` samples, of which `left_out` are too long for a pack or cannot be rendered."""

    packs: list[PackView]
    tried: int
    left_out: int


def find_samples(dataset: Dataset, words: Sequence[str], count: int) -> list[int]:
    """Return the indices of the samples with these keys or indices; without words the first `count`.

    Raises UserError for a word that is neither.
    """
    if not words:
        return list(range(min(count, len(dataset))))
    by_key: dict[str, int] = {}
    indices: list[int] = []
    for word in words:
        # Eight digits: more would be a key of digits.
        if re.fullmatch(r"\d{1,8}", word) and int(word) < len(dataset):
            indices.append(int(word))
            continue
        # Keys are read only where a word may be one: that opens every index.
        by_key = by_key or {key: index for index, key in enumerate(dataset.keys)}
        if word not in by_key:
            fix = f"give a key, or a number below {len(dataset)}"
            raise UserError(f"{dataset.path}: no sample {word!r}: {fix}")
        indices.append(by_key[word])
    return indices


def view_sample(
    dataset: Dataset, index: int, rules: MediaConfig, tokenizer: Tokenizer | None = None
) -> SampleView:
    """Return everything of one sample; media that cannot be decoded, and a sample that cannot be rendered, have a problem."""
    place, sample = dataset.location(index), dataset.sample(index)
    media = tuple(_media(dataset, index, sample, rules))
    view = SampleView(index, place.key, place.shard, sample, media)
    if tokenizer is None:
        return view
    try:
        encoded = encode(sample, tokenizer, rules, dataset.name)
    except SampleError as error:
        return replace(view, problem=str(error))
    return replace(view, tokens=tuple(tokens_of(encoded, tokenizer)), encoded=encoded)


# ---- media


def _media(dataset: Dataset, index: int, sample: Sample, rules: MediaConfig) -> list[ShownMedia]:
    """Return pictures and videos in reading order."""
    media: list[ShownMedia] = []
    pictures = 0
    for element in sample.elements:
        if not isinstance(element, Image | Video):
            continue
        title = _title(element)
        try:
            if isinstance(element, Image):
                marks = _marks(sample, pictures, element)
                shown = [_picture(dataset, index, element, marks)]
            else:
                shown = _frames(dataset, index, sample, element, rules)
            media.append(ShownMedia(title, tuple(shown)))
        except UserError as error:
            media.append(ShownMedia(title, (), str(error)))
        # Marks count pictures, of those that cannot be shown too.
        pictures += isinstance(element, Image)
    return media


def _title(element: Image | Video) -> str:
    size = f"{element.width}\u00d7{element.height}"
    if isinstance(element, Image):
        return f"{element.ref} {size}"
    if element.ref is None:
        return f"{len(element.frames)} frames {size}"
    rate = "varying" if element.times else f"{element.fps:.4g}"
    frames = f"{element.file_frames} frames, {rate} fps, {element.duration:.4g} s"
    return f"{element.ref} {size}, {frames}"


def _picture(dataset: Dataset, index: int, image: Image, marks: tuple[Mark, ...]) -> Shown:
    picture = _open(dataset.member(index, image.ref), image.ref)
    return Shown(image.ref, picture, image.width, image.height, marks=marks)


def _frames(
    dataset: Dataset, index: int, sample: Sample, video: Video, rules: MediaConfig
) -> list[Shown]:
    """Return the frames that training sees, evenly thinned out to MOST_FRAMES, with their times."""
    # By the same rules as in training.
    chosen = chosen_frames(video, rules)
    places = np.linspace(0, len(chosen) - 1, min(len(chosen), MOST_FRAMES))
    chosen = chosen[places.round().astype(int)]
    times = frame_times(video, chosen)

    if video.ref is None:
        refs = [video.frames[frame] for frame in chosen.tolist()]
        pictures = [_open(dataset.member(index, ref), ref) for ref in refs]
    else:
        # Imports torch, which takes seconds.
        from visionloom.data.encode.video import decode_frames

        refs = [f"{video.ref}#{frame}" for frame in chosen.tolist()]
        data = dataset.member(index, video.ref)
        frames = decode_frames(data, video, chosen, times, sample.id)
        pictures = [_reduced(Pillow.fromarray(pixels)) for pixels in frames]

    shown: list[Shown] = []
    for ref, picture, time in zip(refs, pictures, times, strict=True):
        shown.append(Shown(ref, picture, video.width, video.height, f"{time:.2f} s"))
    return shown


def _open(data: bytes, name: str) -> Pillow.Image:
    try:
        return _reduced(open_picture(data).convert("RGB"))
    except MediaError as error:
        raise UserError(f"{name} cannot be decoded: {error.detail}") from None
    except Exception as error:
        # Decoders raise any error that damaged bytes lead them to.
        raise UserError(f"{name} cannot be decoded: {type(error).__name__}: {error}") from error


def _reduced(picture: Pillow.Image) -> Pillow.Image:
    # Never larger than it was.
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return picture


def _marks(sample: Sample, number: int, image: Image) -> tuple[Mark, ...]:
    """Return the boxes and points on the sample's `number`-th picture."""
    marks: list[Mark] = []
    for element in sample.elements:
        if isinstance(element, Box | Point) and element.image == number:
            values = element.xyxy if isinstance(element, Box) else element.xy
            sides = (image.width, image.height) if element.space == "px" else (1000, 1000)
            place = tuple(value / sides[axis % 2] for axis, value in enumerate(values))
            marks.append(Mark(place, element.label or ""))
    return tuple(marks)


# ---- text


def describe(sample: Sample) -> list[str]:
    """Return the sample as lines of text: one a turn, media as [image] and [video]."""
    if sample.kind == "doc":
        return [text_of(sample.content)]
    return [f"{message.role}: {text_of(message.content)}" for message in sample.messages]


def text_of(elements: Sequence[Element]) -> str:
    """Return elements as text for people, not as the model reads them."""
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
    """Return tokens in order; neighbouring visual tokens are one, and so are those that share a character."""
    visual = np.zeros(len(encoded.input_ids), bool)
    visual[encoded.visual_positions] = True
    ids, weights = encoded.input_ids.tolist(), encoded.target_weights.tolist()

    tokens: list[Token] = []
    at = 0
    while at < len(ids):
        if visual[at]:
            end = at + 1
            while end < len(ids) and visual[end]:
                end += 1
            text = tokenizer.decode([ids[at]], keep_special=True)
            tokens.append(Token(text, 0.0, True, end - at))
        else:
            end, text = _next_text(ids, at, tokenizer)
            special = end - at == 1 and not tokenizer.decode(ids[at:end])
            tokens.append(Token(text, max(weights[at:end]), special))
        at = end
    return tokens


def _next_text(ids: list[int], at: int, tokenizer: Tokenizer) -> tuple[int, str]:
    """Return the end and the text of the shortest run of tokens from `at` that holds whole characters."""
    end = at + 1
    text = tokenizer.decode(ids[at:end], keep_special=True)
    # U+FFFD stands for a part of a character, or for bytes that are none.
    while "\ufffd" in text and end - at < _SPLIT_CHARACTER and end < len(ids):
        end += 1
        text = tokenizer.decode(ids[at:end], keep_special=True)
    return end, text


def first_packs(
    dataset: Dataset, tokenizer: Tokenizer, rules: MediaConfig, length: int, count: int
) -> FirstPacks:
    """Return the packs that the dataset's first samples make in order, without shuffling or a mixture.

    Samples that are too long or cannot be rendered are left out and counted. Raises UserError if none is left.
    """
    patches = int(PATCHES_PER_TOKEN * length)
    fitting: list[tuple[int, EncodedSample]] = []
    tried = min(len(dataset), WINDOW)
    for index in range(tried):
        with suppress(SampleError):
            encoded = encode(dataset.sample(index), tokenizer, rules, dataset.name)
            # As the default policy: longer samples are not cut here.
            if len(encoded.input_ids) <= length and encoded.patch_count <= patches:
                fitting.append((index, encoded))
    if not fitting:
        raise UserError(f"--pack {length}: none of the first samples fits: give a longer sequence")

    tokens = [len(encoded.input_ids) for _, encoded in fitting]
    patch_counts = [encoded.patch_count for _, encoded in fitting]
    budget = PackBudget(length, patches, WINDOW)
    packs = pack_samples(tokens, patch_counts, budget)
    shown: list[PackView] = []
    for pack in packs[:count]:
        shown.append(PackView(length, [_segment(*fitting[row]) for row in pack]))
    return FirstPacks(shown, tried, tried - len(fitting))


def _segment(index: int, encoded: EncodedSample) -> PackedSample:
    return PackedSample(
        index,
        encoded.sample_id,
        len(encoded.input_ids),
        len(encoded.visual_positions),
        encoded.supervised_tokens,
    )
