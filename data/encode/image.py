"""Pictures from their bytes to pixels of a wanted size: uint8 all the way, the same values as the reference processors."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from visionloom.data.shards.open_media import MediaError, check_pixels, check_scans, open_picture
from visionloom.data.shards.sample import SampleError

try:
    import simplejpeg
except ImportError:  # the optional extra `jpeg`: same pixels as Pillow, a fifth faster
    simplejpeg = None

Pixels = NDArray[np.uint8]


def decode_image(
    data: bytes,
    size: tuple[int, int],
    sample_id: str,
    name: str,
) -> Pixels:
    """Return the pixels of a picture, uint8 [height, width, 3]; what is transparent becomes white.

    Args:
        data: the file.
        size: the (height, width) that the sample says.
        sample_id: for messages.
        name: of the member, for messages.

    Raises:
        SampleError: naming the member; for a wrong or too large size before any pixel is decoded.
    """
    # The orientation in EXIF is not applied here: converters do that.
    try:
        quick = _decode_jpeg(data, size)
        if quick is not None:
            return quick
        picture = open_picture(data)
        check_size((picture.height, picture.width), size, sample_id, name)
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            problem = (
                f"more than 8 bits a value (mode {picture.mode}), which would be clipped to white"
            )
            raise SampleError(sample_id, name, problem)
        return np.array(_opaque(picture), np.uint8)
    except SampleError:
        raise
    except MediaError as error:
        raise SampleError(sample_id, name, f"cannot be decoded: {error.detail}") from None
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        problem = f"cannot be decoded: {type(error).__name__}: {error}"
        raise SampleError(sample_id, name, problem) from error


def check_size(
    actual: tuple[int, int],
    said: tuple[int, int],
    sample_id: str,
    name: str,
) -> None:
    """Compare the (height, width) of a header with what the sample says; raises SampleError."""
    if actual != said:
        here, there = (f"{width}x{height}" for height, width in (actual, said))
        raise SampleError(sample_id, name, f"{here} pixels, the sample says {there}")


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> Pixels | None:
    """Return the pixels by simplejpeg, uint8 [height, width, 3].

    None for all it does not take: Pillow decodes that, or says what is wrong with it.
    """
    if simplejpeg is None or data[:2] != b"\xff\xd8":
        return None
    # before any pixel: a small file may claim a picture of gigabytes
    check_pixels(size[1], size[0], len(data))
    check_scans(data, size[1], size[0])
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        # CMYK and others: Pillow knows what their colours mean
        if (height, width) != size or colours not in ("YCbCr", "Gray"):
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:  # its only error, for damaged and for unusual files alike
        return None
    return pixels


def _opaque(picture: Pillow.Image) -> Pillow.Image:
    """Return a picture in RGB, laid on white where it is transparent, as a page would show it."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    colours = picture.convert("RGBA")
    white = Pillow.new("RGBA", colours.size, (255, 255, 255, 255))
    return Pillow.alpha_composite(white, colours).convert("RGB")


def resize(picture: Pixels, height: int, width: int) -> Pixels:
    """Resize a picture uint8 [any height, any width, 3] to planes uint8 [3, height, width]: bicubic with antialiasing.

    Source: transformers 5 with torchvision's backend, which stays in uint8.
    """
    if picture.shape[:2] == (height, width):
        return np.ascontiguousarray(picture.transpose(2, 0, 1))
    # Torch takes the interleaved picture as it is and gives back planes, so that neither is transposed.
    interleaved = torch.from_numpy(picture).permute(2, 0, 1)[None]
    planes = _bicubic(interleaved, height, width)
    return np.ascontiguousarray(planes[0].numpy())


def _bicubic(planes: torch.Tensor, height: int, width: int) -> Any:
    return torch.nn.functional.interpolate(
        planes, (height, width), mode="bicubic", align_corners=False, antialias=True
    )


def resize_in_float(picture: Pixels, height: int, width: int) -> Pixels:
    """Resize like `resize`, but in float32 and rounded at the end: as qwen-vl-utils does it to the frames of a video."""
    if picture.shape[:2] == (height, width):
        return resize(picture, height, width)
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None].float().contiguous()
    resized = _bicubic(planes, height, width)
    rounded: Pixels = resized[0].clamp_(0, 255).round_().to(torch.uint8).numpy()
    return rounded


def resize_by_pillow(picture: Pixels, height: int, width: int) -> Pixels:
    """Resize a picture uint8 [any height, any width, 3] to [height, width, 3], as qwen-vl-utils does it: bicubic."""
    if picture.shape[:2] == (height, width):
        return picture
    resized = Pillow.fromarray(picture).resize((width, height), Pillow.Resampling.BICUBIC)
    return np.array(resized)
