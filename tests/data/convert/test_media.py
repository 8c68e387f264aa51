"""Pictures and videos on their way into shards. References: numpy, Pillow, qwen-vl-utils' compositing, PyAV's own decoding."""

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import JpegImagePlugin

from visionloom.data.convert.media import prepare_image, prepare_video
from visionloom.data.convert.skip import Skip
from visionloom.data.encode.image import decode_image
from visionloom.data.shards.sample import SampleError

Pixels = NDArray[np.uint8]


def smooth(height: int = 40, width: int = 64) -> Pixels:
    """A picture that JPEG keeps nearly as it is, without any symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 3, y * 5, (x + y) * 2], axis=2).astype(np.uint8)


def saved(picture: Pillow.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixels_of(data: bytes) -> Pixels:
    return np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB"))


STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
"""How a camera stores an upright picture under each EXIF orientation (EXIF 2.32: row 0 and column 0 of what is seen)."""


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_on_its_side_becomes_upright(orientation: int, kind: str) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    data = saved(
        Pillow.fromarray(np.ascontiguousarray(STORED[orientation](smooth()))), kind, exif=exif
    )
    found = prepare_image(data)
    assert (found.width, found.height, found.suffix) == (
        64,
        40,
        {"PNG": "png", "JPEG": "jpg"}[kind],
    )
    difference = np.abs(pixels_of(found.data).astype(int) - smooth())
    assert difference.max() <= (0 if kind == "PNG" else 24) and difference.mean() <= (
        0 if kind == "PNG" else 3
    )
    assert Pillow.open(io.BytesIO(found.data)).getexif().get(0x0112, 1) == 1
    assert (found.change is None) == (found.data == data) == (orientation == 1)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_turned_jpeg_keeps_its_subsampling_and_its_quality(subsampling: int) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    data = saved(Pillow.fromarray(smooth()), "JPEG", exif=exif, quality=80, subsampling=subsampling)
    turned = Pillow.open(io.BytesIO(prepare_image(data).data))
    assert JpegImagePlugin.get_sampling(turned) == subsampling
    reference = Pillow.open(io.BytesIO(saved(Pillow.fromarray(smooth()), "JPEG", quality=95)))
    assert turned.quantization == reference.quantization  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    """Reference: `to_rgb` of qwen_vl_utils, on what it treats (RGBA)."""
    vision = pytest.importorskip("qwen_vl_utils.vision_process")
    alpha = np.linspace(0, 255, 40 * 64).reshape(40, 64, 1).astype(np.uint8)
    picture = Pillow.fromarray(np.concatenate([smooth(), alpha], axis=2))
    if mode == "P":
        picture = picture.convert("RGB").quantize(16)
        picture.info["transparency"] = 3
        data = saved(picture, "PNG", transparency=3)
    else:
        data = saved(picture.convert(mode), "PNG")
    found = prepare_image(data)
    reference = vision.to_rgb(Pillow.open(io.BytesIO(data)).convert("RGBA"))
    assert (
        np.abs(pixels_of(found.data).astype(int) - np.asarray(reference)).max() <= 1
    )  # two ways to round a product
    assert found.change is not None and "white" in found.change and found.suffix == "png"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_pictures_keep_every_byte(kind: str) -> None:
    data = saved(Pillow.fromarray(smooth()), kind)
    found = prepare_image(data)
    assert (found.data, found.width, found.height, found.change) == (data, 64, 40, None)


def test_sixteen_bits_are_reduced_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 40 * 64).reshape(40, 64).astype(np.uint16)
    found = prepare_image(saved(Pillow.fromarray(values), "PNG"))
    assert np.abs(pixels_of(found.data)[..., 0].astype(int) - values // 256).max() <= 1


def huge_png(side: int) -> bytes:
    data = bytearray(saved(Pillow.fromarray(smooth()), "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no picture that is known"),
        (b"<html>not found</html>", "no picture that is known"),
        (saved(Pillow.fromarray(smooth(400, 400)), "JPEG")[:2000], "broken picture"),
        (saved(Pillow.fromarray(smooth()), "PNG")[:100], "broken picture"),
        (huge_png(12_000), "picture too large"),
        (huge_png(50_000), "picture too large"),
    ],
)
def test_what_cannot_be_decoded_is_left_out(data: bytes, reason: str) -> None:
    with pytest.raises(Skip) as caught:
        prepare_image(data)
    assert caught.value.reason == reason


# ---- videos


def film(
    stamps: list[int],
    rate: int = 25,
    container: str = "mp4",
    path: Path | None = None,
    **options: str,
) -> bytes:
    """A moving picture of 64 x 48 pixels in H.264 with B-frames, shown at `stamps` (in 1/1000 s)."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(
        file if path is None else str(path), "w", format=container, options=options
    ) as output:
        stream = output.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.max_b_frames = 2
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, stamp in enumerate(stamps):
            picture = av.VideoFrame.from_ndarray(
                np.roll(smooth(48, 64), 3 * number, axis=1), format="rgb24"
            )
            picture.pts, picture.time_base = stamp, Fraction(1, 1000)
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
    return file.getvalue() if path is None else path.read_bytes()


@pytest.mark.parametrize(
    ("container", "suffix"), [("mp4", "mp4"), ("matroska", "mkv"), ("mpegts", "ts")]
)
def test_a_constant_rate_is_one_number(container: str, suffix: str) -> None:
    found = prepare_video(film([40 * number for number in range(50)], container=container))
    facts = found.facts
    assert (found.suffix, facts.width, facts.height, facts.frames, found.times) == (
        suffix,
        64,
        48,
        50,
        (),
    )
    assert facts.fps == pytest.approx(25, rel=1e-3) and facts.duration == pytest.approx(
        2.0, abs=0.05
    )


def test_a_varying_rate_has_the_time_of_every_frame() -> None:
    """Reference: the times of the frames that PyAV decodes."""
    av = pytest.importorskip("av")
    stamps = np.cumsum([0, *np.random.default_rng(0).integers(20, 300, 39)]).tolist()
    data = film(stamps)
    with av.open(io.BytesIO(data)) as container:
        reference = [float(frame.time) for frame in container.decode(video=0)]
    found = prepare_video(data)
    assert found.times == pytest.approx([time - reference[0] for time in reference], abs=1e-6)
    assert found.times == pytest.approx([stamp / 1000 for stamp in stamps], abs=2e-3)


@pytest.mark.parametrize("cut", [0, 40, 3000])
def test_a_broken_video_is_left_out(cut: int) -> None:
    data = film([40 * number for number in range(50)])
    with pytest.raises(Skip, match=r"broken video|no video that is known"):
        prepare_video(data[:cut])


def test_a_video_cut_short_is_left_out(tmp_path: Path) -> None:
    """The header comes first and promises frames that are not there."""
    data = film(
        [40 * number for number in range(50)], path=tmp_path / "a.mp4", movflags="faststart"
    )
    assert prepare_video(data).facts.frames == 50
    for length in (len(data) * 7 // 10, len(data) - 10):
        with pytest.raises(Skip, match=r"video cut short: \d+ of 50 frames"):
            prepare_video(data[:length])


def test_a_video_that_is_stored_rotated_is_not_shown_on_its_side() -> None:
    """The track header of a phone's film: a matrix that turns by 90 degrees (ISO 14496-12, tkhd)."""
    data = film([40 * number for number in range(50)])
    place = data.index(b"tkhd") + 44
    turned = b"".join(
        value.to_bytes(4, "big", signed=True)
        for value in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    )
    with pytest.raises(Skip, match=r"video stored rotated: by (90|270) degrees"):
        prepare_video(data[:place] + turned + data[place + 36 :])


def test_a_video_of_one_frame_is_left_out() -> None:
    with pytest.raises(Skip, match="video of one frame"):
        prepare_video(film([0]))


# ---- pictures that few readers know


def big_endian_tiff(values: NDArray[np.uint16]) -> bytes:
    """A TIFF of 16 bits a value, high byte first, as microscopes and scanners write (TIFF 6.0, section 2)."""
    height, width = values.shape
    data = values.astype(">u2").tobytes()
    fields = [
        (256, 3, width << 16),
        (257, 3, height << 16),
        (258, 3, 16 << 16),
        (259, 3, 1 << 16),
        (262, 3, 1 << 16),
    ]
    fields += [(273, 4, 8), (277, 3, 1 << 16), (278, 3, height << 16), (279, 4, len(data))]
    directory = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in fields)
    return (
        b"MM\0*"
        + struct.pack(">I", 8 + len(data))
        + data
        + struct.pack(">H", len(fields))
        + directory
        + bytes(4)
    )


RAMP = np.linspace(0, 1, 40 * 64).reshape(40, 64)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (big_endian_tiff((RAMP * 65535).astype(np.uint16)), RAMP * 255.99),
        (saved(Pillow.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF"), RAMP * 255.99),
        (saved(Pillow.fromarray((RAMP * 65535).astype(np.int32)), "TIFF"), RAMP * 255.99),
        (saved(Pillow.fromarray((RAMP * 255).astype(np.int32)), "TIFF"), RAMP * 255),
        (saved(Pillow.fromarray(RAMP.astype(np.float32)), "TIFF"), RAMP * 255),
        (saved(Pillow.fromarray((RAMP * 255).astype(np.float32)), "TIFF"), RAMP * 255),
        (saved(Pillow.fromarray((RAMP * 60000).astype(np.float32)), "TIFF"), RAMP * 60000 / 256),
    ],
    ids=[
        "big-endian",
        "16 bits",
        "32 bits of 16",
        "32 bits of 8",
        "floats to 1",
        "floats to 255",
        "floats of 16 bits",
    ],
)
def test_deep_pictures_keep_their_shades(data: bytes, wanted: NDArray[np.float64]) -> None:
    """Reference: the values that numpy made the picture from."""
    found = prepare_image(data)
    assert np.abs(pixels_of(found.data)[..., 1] - wanted).max() <= 1.01
    assert (
        found.suffix == "png" and found.change is not None and "reduced to 8 bits" in found.change
    )


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 1e6), (0.0, float("nan"))])
def test_a_picture_of_unknown_range_is_refused_by_name(low: float, high: float) -> None:
    values = np.full((8, 8), low, np.float32)
    values[0, 0] = high
    with pytest.raises(Skip, match="picture of unknown range: floats from"):
        prepare_image(saved(Pillow.fromarray(values), "TIFF"))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("L", "JPEG"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
    ],
)
def test_other_colours_are_shown_as_the_loader_decodes_them(mode: str, kind: str) -> None:
    """Reference: Pillow's conversion to RGB."""
    upright = Pillow.fromarray(smooth())
    picture = (
        Pillow.new("LAB", (64, 40), (128, 10, 200)) if mode == "LAB" else upright.convert(mode)
    )
    found = prepare_image(data := saved(picture, kind))
    loaded = decode_image(found.data, (found.height, found.width), "x", f"a.{found.suffix}")
    assert (loaded == pixels_of(data)).all() and found.data == data


def test_the_first_picture_of_a_phone_s_file_is_shown() -> None:
    """Reference: the pixels of the first picture, saved as a plain JPEG."""
    first, second = Pillow.fromarray(smooth()), Pillow.new("RGB", (32, 20))
    data = saved(first, "MPO", save_all=True, append_images=[second])
    found = prepare_image(data)
    assert (found.suffix, found.width, found.height) == ("jpg", 64, 40)
    loaded = decode_image(found.data, (40, 64), "x", "a.jpg")
    assert np.abs(loaded.astype(int) - pixels_of(saved(first, "JPEG"))).max() <= 2


@pytest.mark.parametrize(
    "values",
    [(RAMP * 65535).astype(np.uint16), RAMP.astype(np.float32), (RAMP * 9999).astype(np.int32)],
)
def test_a_deep_picture_in_a_shard_made_elsewhere_is_no_white_square(
    values: NDArray[np.generic],
) -> None:
    with pytest.raises(SampleError, match=r"a\.tif: more than 8 bits a value"):
        decode_image(saved(Pillow.fromarray(values), "TIFF"), (40, 64), "x", "a.tif")


def test_a_picture_narrower_than_training_takes_is_left_out() -> None:
    assert prepare_image(saved(Pillow.new("RGB", (2, 400)), "PNG")).height == 400
    with pytest.raises(Skip, match="picture too narrow: 2x402"):
        prepare_image(saved(Pillow.new("RGB", (2, 402)), "PNG"))
