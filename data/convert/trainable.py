"""Checks that training will accept a sample and can learn from it: each is rendered when it is converted.

A sample that training would refuse, mask, or read in every epoch without learning anything is left out now, with its reason.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np

from visionloom.data.config import DataConfig, MediaConfig
from visionloom.data.convert.marks import refuse_marks
from visionloom.data.convert.skip import Skip
from visionloom.data.encode.chat import Piece, render
from visionloom.data.encode.encode import encode
from visionloom.data.encode.tokenizer import END_OF_TEXT, TURN_END, Tokenizer
from visionloom.data.plan.over_length import fits_some_policy
from visionloom.data.plan.stretches import PackLimits
from visionloom.data.shards.sample import (
    Box,
    Element,
    Message,
    Point,
    Sample,
    SampleError,
    Text,
    Think,
    ToolCall,
    element_loss,
)
from visionloom.data.shards.sample_fields import LARGEST_WEIGHT

LONGEST: Final = 262_144
"""Tokens of the longest packs that are trained on (the ultra-long phase of the report)."""


@dataclass(frozen=True)
class Trainable:
    """The rules that samples are rendered by, as a run would have them; picklable."""

    media: MediaConfig = field(default_factory=MediaConfig)
    tokenizer: str = ""
    """Folder of a tokenizer; empty: tokens are not counted, so no sample is found too long."""
    sequence_length: int = LONGEST
    """Tokens of the longest pack."""

    def check(self, sample: Sample) -> None:
        """Raise Skip for a sample that cannot be rendered, has nothing to learn, or fits a pack under no policy."""
        if any(_is_empty_answer(message) for message in sample.messages):
            raise Skip("empty answer", "an assistant's turn with loss says nothing")
        for text in _learned_texts(sample):
            refuse_marks(text)
        _check_limits(sample)
        _check_places(sample)

        try:
            rendering = render(sample, self.media)
        except SampleError as error:
            raise Skip("cannot be rendered", str(error)) from error
        _check_weights(rendering.pieces)
        if self.tokenizer:
            self._check_length(sample)

    def _check_length(self, sample: Sample) -> None:
        encoded = encode(sample, self._tokenizer, self.media)
        patches = int(DataConfig().max_patches_per_token * self.sequence_length)
        limits = PackLimits(self.sequence_length, patches, "--sequence-length", "", "over_length")
        # Nearly all fit: policies are tried for the rest only.
        if limits.fit(len(encoded.input_ids), encoded.patch_count):
            return
        if not fits_some_policy(sample, encoded, limits, self._tokenizer, self.media):
            size = f"{len(encoded.input_ids)} tokens, {encoded.patch_count} patches"
            most = f"a pack holds {limits.tokens} and {limits.patches}"
            raise Skip("too long under every policy", f"{size}, {most}")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return, as JSON, the options that decide which samples are left out."""
        defaults = asdict(MediaConfig())
        # Defaults are left out, so that a new option does not end an old conversion.
        media = {
            name: value for name, value in asdict(self.media).items() if value != defaults[name]
        }
        length = self.sequence_length if self.tokenizer else None
        return {"media": media, "tokenizer": self.tokenizer or None, "sequence_length": length}


def _check_weights(pieces: list[Piece]) -> None:
    """Raise Skip unless a piece is learned, and none has a weight that would drown all other samples."""
    most = max(piece.weight for piece in pieces)
    if most > LARGEST_WEIGHT:
        raise Skip("weight too large", f"{most:g}, at most {LARGEST_WEIGHT:g}")
    for piece in pieces:
        # An end mark alone is nothing to learn.
        has_words = piece.text not in (TURN_END, END_OF_TEXT) and piece.text.strip()
        # As training holds weights: a smaller one is 0 there.
        if has_words and np.float32(piece.weight) > 0:
            return
    raise Skip("nothing supervised", "no token has a weight in the loss")


def _check_limits(sample: Sample) -> None:
    """Raise Skip for a picture whose smallest area is above its largest."""
    for image in sample.images:
        least, most = image.min_pixels, image.max_pixels
        if least is not None and most is not None and least > most:
            limits = f"min_pixels {least}, max_pixels {most}"
            raise Skip("limits that exclude each other", limits)


def _check_places(sample: Sample) -> None:
    """Raise Skip for a box or point in pixels that is outside its picture: it is in other units, or of another size.

    Rendering would put it on the edge. A hundredth of the side and a pixel are taken for rounding.
    """
    images = sample.images
    for place in sample.elements:
        if not isinstance(place, Box | Point) or place.space != "px":
            continue
        image = images[place.image]
        sides = (image.width, image.height) * 2
        values = place.xyxy if isinstance(place, Box) else place.xy
        for value, side in zip(values, sides, strict=False):
            rounding = 1 + side / 100
            if not -rounding <= value <= side + rounding:
                size = f"{image.width}x{image.height} pixels"
                raise Skip("box outside its picture", f"{list(values)} in {size}")


def _learned_texts(sample: Sample) -> Iterator[str]:
    """Yield the texts that an assistant says, or that are learned anyway, in which no mark may be spelled out."""
    for message in sample.messages:
        for element in message.content:
            if message.role == "assistant" or element_loss(element, message) > 0:
                yield _text_of(element)
    yield from map(_text_of, sample.content)


def _text_of(element: Element) -> str:
    match element:
        case Text() | Think():
            return element.text
        case ToolCall():
            return element.name + json.dumps(element.arguments, ensure_ascii=False)
        case Box() | Point():
            return element.label or ""
        case _:
            return ""


def _is_empty_answer(message: Message) -> bool:
    """Return whether an assistant's turn that is learned has nothing but blanks and thoughts."""
    if message.role != "assistant" or message.loss == 0:
        return False
    for element in message.content:
        is_blank = isinstance(element, Text) and not element.text.strip()
        if not is_blank and not isinstance(element, Think):
            return False
    return True
