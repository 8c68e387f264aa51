"""From encoded images to rows of patches, as uint8: decode, resize, cut. Normalisation to -1..1 is left to the device."""

import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from visionloom.data.config import MediaConfig
from visionloom.data.encode import EncodedSample
from visionloom.data.geometry import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, Grid, chosen_frames
from visionloom.data.sample import Image, SampleError, Video

IMAGE_ROW: Final = 3 * PATCH_SIZE**2
"""Values of an image's patch: (channel, row, column)."""
VIDEO_ROW: Final = IMAGE_ROW * TEMPORAL_PATCH_SIZE
"""Values of a video's patch: (channel, frame, row, column)."""
MAX_PIXELS: Final = 1 << 27
"""Larger pictures (134 million pixels, 400 MB decoded) are refused from their header."""
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

Pixels = NDArray[np.uint8]


def decode_patches(sample: EncodedSample, read: Callable[[str], bytes], rules: MediaConfig) -> Pixels:
    """Rows of all pictures and videos of a sample, in order: uint8 [patches, 768], or 1536 wide if it has a video.

    `read` returns the bytes of a media member. Raises SampleError if one is missing, cannot be decoded or differs in size
    from what the sample says. Equal to transformers' Qwen2VLImageProcessor and Qwen3VLVideoProcessor before they rescale.
    """
    width = VIDEO_ROW if any(isinstance(media, Video) for media in sample.media) else IMAGE_ROW
    if not sample.media:
        return np.empty((0, width), np.uint8)
    grids = [(int(time), int(height), int(width)) for time, height, width in sample.grids]
    rows = [_rows(media, grid, sample.sample_id, read, rules) for media, grid in zip(sample.media, grids, strict=True)]
    return np.concatenate([widen(found, width) for found in rows])


def widen(rows: Pixels, width: int) -> Pixels:
    """Rows of an image as rows of a video whose two frames are alike, if `width` says so."""
    if rows.shape[1] == width:
        return rows
    return np.repeat(rows.reshape(-1, 3, 1, PATCH_SIZE**2), TEMPORAL_PATCH_SIZE, axis=2).reshape(-1, width)


def _rows(media: Image | Video, grid: Grid, sample_id: str, read: Callable[[str], bytes], rules: MediaConfig) -> Pixels:
    if isinstance(media, Image):
        names = [media.ref]
    else:
        names = [media.frames[index] for index in chosen_frames(media, rules)]
    size = (media.height, media.width)
    frames = np.stack([decode_image(read(name), size, sample_id, name) for name in names])
    frames = resize(frames, grid[1] * PATCH_SIZE, grid[2] * PATCH_SIZE)
    return patchify_image(frames[0]) if isinstance(media, Image) else patchify_video(frames)


def decode_image(data: bytes, size: tuple[int, int], sample_id: str, name: str) -> Pixels:
    """Pixels uint8 [height, width, 3]; what is transparent becomes white. `size` is the (height, width) to find.

    Raises SampleError naming the member. The orientation in EXIF is not applied: converters do that.
    """
    try:
        with warnings.catch_warnings(action="ignore", category=Pillow.DecompressionBombWarning):
            picture = Pillow.open(BytesIO(data), formats=_FORMATS)
        if (picture.height, picture.width) != size:
            raise SampleError(sample_id, name, f"{picture.width}x{picture.height} pixels, the sample says {size[1]}x{size[0]}")
        if picture.height * picture.width > MAX_PIXELS:
            raise SampleError(sample_id, name, f"{picture.width}x{picture.height} pixels are too many: at most {MAX_PIXELS}")
        return np.asarray(_opaque(picture), np.uint8)
    except SampleError:
        raise
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise SampleError(sample_id, name, f"cannot be decoded: {type(error).__name__}: {error}") from error


def _opaque(picture: Pillow.Image) -> Pillow.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    colours = picture.convert("RGBA")
    white = Pillow.new("RGBA", colours.size, (255, 255, 255, 255))
    return Pillow.alpha_composite(white, colours).convert("RGB")


def resize(frames: Pixels, height: int, width: int) -> Pixels:
    """Frames uint8 [n, height, width, 3] at a new size: bicubic with antialiasing in uint8, as transformers 5 does."""
    if frames.shape[1:3] == (height, width):
        return frames
    pixels = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized.numpy().transpose(0, 2, 3, 1)


def patchify_image(pixels: Pixels) -> Pixels:
    """Rows uint8 [patches, 768] of one image [height, width, 3], in the order (block row, block column, row, column)."""
    height, width = (side // (MERGE_SIZE * PATCH_SIZE) for side in pixels.shape[:2])
    blocks = pixels.reshape(height, MERGE_SIZE, PATCH_SIZE, width, MERGE_SIZE, PATCH_SIZE, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, IMAGE_ROW)


def patchify_video(frames: Pixels) -> Pixels:
    """Rows uint8 [patches, 1536] of frames [n, height, width, 3], two frames each; an odd last frame counts twice."""
    if len(frames) % TEMPORAL_PATCH_SIZE:
        frames = np.concatenate([frames, frames[-1:]])
    height, width = (side // (MERGE_SIZE * PATCH_SIZE) for side in frames.shape[1:3])
    shape = (-1, TEMPORAL_PATCH_SIZE, height, MERGE_SIZE, PATCH_SIZE, width, MERGE_SIZE, PATCH_SIZE, 3)
    return frames.reshape(shape).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, VIDEO_ROW)
