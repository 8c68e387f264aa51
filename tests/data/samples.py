"""Samples that the tests of data write and read."""

import io

import numpy as np
from PIL import Image as Pillow

from visionloom.data.config import MediaConfig
from visionloom.data.shards.sample import Image, Message, Sample, Text, Video

RULES = MediaConfig(image_min_pixels=1024, video_min_pixels=1024)

Pair = tuple[Sample, dict[str, bytes]]


def png(height: int, width: int, seed: int = 0) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture_question(number: int, sides: tuple[int, int] = (32, 64), words: int = 3) -> Pair:
    """A chat with one picture."""
    height, width = sides
    content = (Image("a.png", width, height), Text("What is this? " + "word " * words))
    messages = (Message("user", content), Message("assistant", (Text(f"It is number {number}."),)))
    return Sample(f"picture:{number}", "chat", messages), {"a.png": png(height, width, number)}


def film(number: int, frames: int = 3) -> Pair:
    """A chat with a video of 32 x 32 pixels."""
    names = tuple(f"vid0.{index:03d}.png" for index in range(frames))
    video = Video(names, tuple(index / 2 for index in range(frames)), 32, 32)
    messages = (Message("user", (Text("Watch."), video)), Message("assistant", (Text("Done."),)))
    return Sample(f"film:{number}", "chat", messages), {
        name: png(32, 32, index) for index, name in enumerate(names)
    }


def essay(number: int, words: int = 20) -> Pair:
    """A document without pictures."""
    return Sample(
        f"essay:{number}", "doc", content=(Text(f"Essay {number}. " + "word " * words),)
    ), {}
