"""Whether training will take a sample and can learn from it: each is rendered when it is converted.

What training would refuse, mask, or read in every epoch without learning anything is left out now, with its reason.
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
from visionloom.data.encode.chat import render
from visionloom.data.encode.encode import encode
from visionloom.data.encode.tokenizer import END_OF_TEXT, TURN_END, Tokenizer
from visionloom.data.plan.over_length import fits_some_policy
from visionloom.data.plan.stretches import PackLimits
from visionloom.data.shards.sample import (
    LARGEST_WEIGHT,
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
        for text in _said(sample):
            refuse_marks(text)
        for image in sample.images:
            if (image.min_pixels or 0) > (image.max_pixels or image.min_pixels or 0):
                raise Skip(
                    "limits that exclude each other",
                    f"min_pixels {image.min_pixels}, max_pixels {image.max_pixels}",
                )
        _check_places(sample)
        try:
            rendering = render(sample, self.media)
        except SampleError as error:
            raise Skip("cannot be rendered", str(error)) from error
        if (most := max(piece.weight for piece in rendering.pieces)) > LARGEST_WEIGHT:
            raise Skip("weight too large", f"{most:g}, at most {LARGEST_WEIGHT:g}")
        seen = (
            piece for piece in rendering.pieces if np.float32(piece.weight) > 0
        )  # as training holds weights
        learned = (piece for piece in seen if piece.text not in (TURN_END, END_OF_TEXT))
        if not any(piece.text.strip() for piece in learned):
            raise Skip("nothing supervised", "no token has a weight in the loss")
        if self.tokenizer:
            self._check_length(sample)

    def _check_length(self, sample: Sample) -> None:
        encoded = encode(sample, self._tokenizer, self.media)
        patches = int(DataConfig().max_patches_per_token * self.sequence_length)
        limits = PackLimits(self.sequence_length, patches, "--sequence-length", "", "over_length")
        if limits.fit(len(encoded.input_ids), encoded.patch_count):
            return
        if not fits_some_policy(sample, encoded, limits, self._tokenizer, self.media):
            size = f"{len(encoded.input_ids)} tokens, {encoded.patch_count} patches"
            raise Skip(
                "too long under every policy",
                f"{size}, a pack holds {limits.tokens} and {limits.patches}",
            )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides which samples are left out, as JSON."""
        media = {
            name: value
            for name, value in asdict(self.media).items()
            if value != getattr(MediaConfig(), name)
        }
        length = self.sequence_length if self.tokenizer else None
        return {"media": media, "tokenizer": self.tokenizer or None, "sequence_length": length}


def _check_places(sample: Sample) -> None:
    """Raise Skip for a box or point in pixels that lies outside its picture: it is in other units, or of another size.

    Rendering would put it on the edge. A hundredth of the side and a pixel are taken for rounding.
    """
    images = sample.images
    for place in (
        one for one in sample.elements if isinstance(one, Box | Point) and one.space == "px"
    ):
        image, values = images[place.image], place.xyxy if isinstance(place, Box) else place.xy
        for value, side in zip(values, (image.width, image.height) * 2, strict=False):
            if not -1 - side / 100 <= value <= side + 1 + side / 100:
                raise Skip(
                    "box outside its picture",
                    f"{list(values)} in {image.width}x{image.height} pixels",
                )


def _said(sample: Sample) -> Iterator[str]:
    """Texts that an assistant says, or that are learned anyway: what must hold no mark that is spelled out."""
    for message in sample.messages:
        spoken = message.role == "assistant"
        yield from (
            _text_of(one) for one in message.content if spoken or element_loss(one, message) > 0
        )
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
    if message.role != "assistant" or message.loss == 0:
        return False
    said = (element for element in message.content if not isinstance(element, Think))
    return not any(element.text.strip() if isinstance(element, Text) else True for element in said)
