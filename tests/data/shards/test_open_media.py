"""Media of strangers: only known formats are opened, no other file is, and no small file costs much.

Row 32 of the fault matrix: truncated and undecodable pictures, bombs, narrow ones, CMYK and 16 bits. References: Pillow and PyAV, which
wrote the good files; the attacks are what FFmpeg's and Pillow's own lists of formats allow.
"""

import ast
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from visionloom.data.convert.media import prepare_image, prepare_video
from visionloom.data.convert.skip import Skip
from visionloom.data.encode.image import decode_image
from visionloom.data.shards.media_header import probe
from visionloom.data.shards.open_media import (
    MediaError,
    check_pixels,
    check_work,
    container_of,
    open_picture,
    open_video,
    packets_of,
)
from visionloom.data.shards.sample import SampleError
from visionloom.tests.data.samples import png
from visionloom.tests.data.shards.test_media_header import video
from visionloom.tests.fuzzing import try_reader

av = pytest.importorskip("av")
ROOT = Path(__file__).resolve().parents[3]


def saved(picture: Pillow.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# ---- one door


def test_nothing_else_opens_media() -> None:
    """Every call of an `open` of Pillow or PyAV, and every import of them by another way, is in data/shards/open_media.py."""
    found = set()
    for folder in ("common", "data", "launch", "model", "parallel", "train"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            names = {
                name.asname or name.name
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in node.names
                if (getattr(node, "module", None) or name.name).partition(".")[0] in ("PIL", "av")
            }
            calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
            opened = [
                call
                for call in calls
                if (
                    isinstance(call, ast.Attribute)
                    and call.attr == "open"
                    and _first_name(call) in names
                )
                or (isinstance(call, ast.Name) and call.id == "open" and "open" in names)
            ]
            found |= {str(file.relative_to(ROOT))} if opened else set()
    assert found == {"data/shards/open_media.py"}


def _first_name(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


# ---- formats


def playlists(target: Path) -> dict[str, bytes]:
    """Files of many kinds that make FFmpeg open `target`."""
    name = str(target)
    return {
        "ffconcat": f"ffconcat version 1.0\nfile {target.name}\n".encode(),
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n".encode(),
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{name}</BaseURL></MPD>'.encode(),
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "vobsub": f"# VobSub index file, v7 (do not modify this line!)\nsize: 720x576\n{name}".encode(),
        "tedcaptions": b'{"captions":[{"duration":1,"content":"x","startOfParagraph":true,"startTime":0}]}',
        "webvtt": b"WEBVTT\n\n00:00.000 --> 00:01.000\nx\n",
        "srt": b"1\n00:00:00,000 --> 00:00:01,000\nx\n",
        "text screen": b"\x1b[2Jhello\n" * 100,
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{name}"/></svg>'.encode(),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%BeginBinary: 9\n",
        "pdf": b"%PDF-1.4\n1 0 obj\n",
        "y4m": b"YUV4MPEG2 W16 H16 F25:1 Ip A0:0 C420\nFRAME\n" + bytes(384),
        "raw h264": b"\0\0\0\1\x67\x42\0\x0a\xf8\x41\xa2\0\0\0\1\x68\xce\x38\x80",
        "ogg": video(4, container="ogg", codec="libtheora")
        if "libtheora" in av.codecs_available
        else b"OggS\0\2" + bytes(99),
        "gif": saved(
            Pillow.new("P", (16, 16)),
            "GIF",
            save_all=True,
            append_images=[Pillow.new("P", (16, 16), 1)],
        ),
        "wav": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0" + bytes(24),
        "nothing": b"",
    }


@pytest.mark.parametrize("kind", playlists(Path("x")))
def test_a_video_of_another_kind_is_not_opened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 50 bytes played one of the working folder; decided by the first bytes, whatever the name says."""
    target = tmp_path / "secret.mp4"
    target.write_bytes(video(5))
    monkeypatch.chdir(tmp_path)
    data = playlists(target)[kind]
    for name in ("v.mp4", "v.mkv", "v.avi", "v.ts"):
        with pytest.raises(ValueError, match="is no video that can be read"):
            probe(name, data)
    with pytest.raises(Skip, match="no video that is known"):
        prepare_video(data)


def with_reference(name: str) -> bytes:
    """A QuickTime file whose media lie in another file: its data reference is an alias to `name`."""
    data = bytearray(video(5, container="mov"))
    place = data.index(b"url \0\0\0\1")  # the media are in this file
    path = name.encode()
    alias = (
        b"alis\0\0\0\0"
        + struct.pack(">4sH", bytes(4), 150)
        + bytes(138)
        + struct.pack(">hh", 2, len(path))
        + path
    )
    alias += b"\0" * (len(path) % 2) + struct.pack(">hh", -1, 0)
    grown = struct.pack(">I", len(alias) + 4) + alias
    data[place - 4 : place + 8] = grown
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        at = data.index(box)
        size = int.from_bytes(data[at - 4 : at]) + len(grown) - 12
        data[at - 4 : at] = size.to_bytes(4)
    return bytes(data)


def test_a_reference_of_quicktime_to_another_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for a pipe for ever."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "secret.mov")
    assert (
        try_reader(
            prepare_video,
            [with_reference("secret.mov"), with_reference("secret.mov")[:-200]],
            (Skip,),
        )
        == 2
    )


@pytest.mark.parametrize(
    ("container", "codec", "name"),
    [
        ("mp4", "h264", "mov"),
        ("mov", "mpeg4", "mov"),
        ("matroska", "mpeg4", "matroska"),
        ("webm", "libvpx-vp9", "matroska"),
        ("avi", "mpeg4", "avi"),
        ("mpegts", "mpeg2video", "mpegts"),
        ("mpeg", "mpeg2video", "mpeg"),
        ("flv", "flv", "flv"),
        ("asf", "wmv2", "asf"),
    ],
)
def test_every_container_that_is_read(container: str, codec: str, name: str) -> None:
    data = video(12, container=container, codec=codec)
    assert container_of(data) == name
    with open_video(data) as opened, av.open(io.BytesIO(data)) as reference:
        found = [(packet.pts, packet.size) for packet in packets_of(opened)]
        assert found == [
            (packet.pts, packet.size) for packet in reference.demux(video=0) if packet.size
        ]


def test_a_codec_that_no_video_has_is_refused() -> None:
    """Text screens, pictures and the like inside of an allowed container."""
    with (
        pytest.raises(MediaError, match="codec asv1 is not read"),
        open_video(video(3, container="avi", codec="asv1")),
    ):
        pass


@pytest.mark.parametrize(
    "kind",
    ["ICO", "PPM", "TGA", "PCX", "ICNS", "DDS", "JPEG2000", "EPS", "PDF", "SGI", "IM", "AVIF"],
)
def test_a_picture_of_another_kind_is_not_opened(kind: str) -> None:
    try:
        data = saved(Pillow.new("RGB", (32, 32)), kind)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow does not write {kind}")
    for name in ("a.png", "a.jpg", "a.tif"):
        with pytest.raises(ValueError, match="it is none of PNG, JPEG"):
            probe(name, data)
    with pytest.raises(SampleError, match="it is none of"):
        decode_image(data, (32, 32), "s", "a.png")


# ---- costs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def blank_png(width: int, height: int, *extra: bytes, colours: int = 0) -> bytes:
    """A PNG of one colour: a kilobyte for each megapixel."""
    rows = zlib.compressobj(9)
    row = bytes(1 + width * (1, 0, 3, 0, 0, 0, 4)[colours])
    body = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def test_a_bomb_is_refused_from_its_header_and_the_largest_allowed_one_is_cheap() -> None:
    """Row 32: 175 kB that become 180 million pixels. What is let through stays below 1 GiB and 10 s, as try_reader asserts."""
    bomb = blank_png(13_400, 13_400)
    assert len(bomb) < 200_000
    with pytest.raises(Skip, match="picture too large"):
        prepare_image(bomb)
    with pytest.raises(SampleError, match=r"too many for .* bytes"):
        decode_image(blank_png(7000, 7000), (7000, 7000), "s", "a.png")
    transparent = blank_png(5792, 5792, colours=6)
    both = lambda data: (prepare_image(data), decode_image(data, (5792, 5792), "s", "a.png"))  # noqa: E731
    assert try_reader(both, [transparent], ()) == 1
    check_pixels(12_000, 9000, 20_000_000)  # a telephone's picture of 108 megapixels


def test_large_profiles_and_texts_in_a_png_are_cheap() -> None:
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 28), 1))
    texts = [chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 26), 1))] * 50

    def read(data: bytes) -> None:
        prepare_image(data)

    assert try_reader(read, [blank_png(8, 8, profile), blank_png(8, 8, *texts)], (Skip,)) == 2


def test_a_gif_of_comments_and_a_jpeg_of_scans_are_refused() -> None:
    gif = saved(Pillow.new("P", (16, 16)), "GIF")
    place = gif.index(b",", 13 + 3 * (2 << (gif[10] & 7)))
    comments = gif[:place] + b"!\xfe" + (b"\xff" + b"x" * 255) * 40_000 + b"\0" + gif[place:]
    with pytest.raises(MediaError, match="bytes of comments"):
        open_picture(comments)
    assert open_picture(
        gif[:place] + b"!\xfe" + (b"\xff" + b"x" * 255) * 4 + b"\0" + gif[place:]
    ).size == (16, 16)

    jpeg = saved(Pillow.new("L", (8000, 8000)), "JPEG", progressive=True)
    start = jpeg.index(b"\xff\xda")
    with pytest.raises(MediaError, match="scans of 8000x8000"):
        open_picture(jpeg[:start] + jpeg[start:-2] * 200 + jpeg[-2:])


def test_only_the_first_picture_of_an_animation_is_looked_at() -> None:
    """A million frames in a GIF of 10 MB are never counted."""
    one = saved(Pillow.new("P", (16, 16)), "GIF")
    place = one.index(b",", 13 + 3 * (2 << (one[10] & 7)))
    assert try_reader(prepare_image, [one[:-1] + one[place:-1] * 300_000 + b";"], ()) == 1


def test_a_tiff_with_a_huge_tile_is_refused() -> None:
    tags = [
        (256, 8),
        (257, 8),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 40_000),
        (323, 40_000),
        (324, 200),
        (325, 9),
    ]
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    data += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    with pytest.raises(Skip, match="tiles of"):
        prepare_image(data.ljust(200, b"\0") + zlib.compress(bytes(1000)))


@pytest.mark.parametrize("where", ["first", "exif", "png"])
def test_tags_that_share_a_megabyte_are_refused(where: str) -> None:
    """60,000 tags of a TIFF named the same megabyte, and Pillow copied it for each: 60 GB."""

    def directory(tags: int, size: int, first: int) -> bytes:
        entries = b"".join(struct.pack("<HHII", 300 + number, 7, size, 8) for number in range(tags))
        return struct.pack("<H", tags) + entries + bytes(4)

    data = (
        b"II*\0"
        + struct.pack("<I", 1 << 20)
        + bytes((1 << 20) - 8)
        + directory(60_000, 1_000_000, 8)
    )
    if where == "exif":
        pointer = struct.pack("<H", 1) + struct.pack("<HHII", 34665, 4, 1, 1 << 20) + bytes(4)
        data = data[:4] + struct.pack("<I", len(data)) + data[8:] + pointer
    if where == "png":
        data = blank_png(8, 8, chunk(b"eXIf", data))
    with pytest.raises(Skip, match=r"tags of 60000\d+ bytes"):
        prepare_image(data)


def test_narrow_deep_and_cmyk_pictures() -> None:
    """Row 32: 6000:1 is left out; CMYK is read as Pillow converts it; 16 bits lose their lower half and are not clipped."""
    with pytest.raises(Skip, match="picture too narrow"):
        prepare_image(saved(Pillow.new("RGB", (6000, 1)), "PNG"))
    cmyk = Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8), "CMYK")
    data = saved(cmyk, "TIFF")
    assert np.array_equal(decode_image(data, (8, 8), "s", "a.tif"), np.asarray(cmyk.convert("RGB")))
    deep = np.arange(0, 65536, 1024, np.uint16).reshape(8, 8)
    stored = prepare_image(saved(Pillow.fromarray(deep), "PNG"))
    assert np.array_equal(np.asarray(Pillow.open(io.BytesIO(stored.data))), deep >> 8)
    with pytest.raises(SampleError, match="more than 8 bits"):
        decode_image(saved(Pillow.fromarray(deep), "PNG"), (8, 8), "s", "a.png")


def test_a_truncated_picture_is_an_error_and_never_gray_below() -> None:
    """Row 32: Pillow would fill up with gray if it were told to (LOAD_TRUNCATED_IMAGES)."""
    for data in (saved(Pillow.new("RGB", (64, 64), "red"), "JPEG", quality=100), png(64, 64)):
        with pytest.raises(Skip, match="broken picture"):
            prepare_image(data[: len(data) * 2 // 3])
        with pytest.raises(SampleError, match="cannot be decoded"):
            decode_image(data[: len(data) * 2 // 3], (64, 64), "s", "a.jpg")


@pytest.mark.parametrize(
    ("box", "skip", "count"),
    [
        (b"stsz", 12, 400_000_000),
        (b"stts", 12, 2**32 - 1),
        (b"elst", 8, 1_000_000),
    ],
)
def test_an_mp4_whose_tables_lie_is_refused_before_ffmpeg_believes_them(
    box: bytes, skip: int, count: int
) -> None:
    """A sample table of equal sizes counts 400 million frames in 30 bytes: FFmpeg made 10 GB of it."""
    data = bytearray(video(5))
    place = data.index(box)
    if box == b"stsz":
        data[place + 8 : place + 12] = (1).to_bytes(4)
    data[place + skip : place + skip + 4] = count.to_bytes(4)
    with pytest.raises(Skip, match=r"its tables count|edits of"):
        prepare_video(bytes(data))


def test_a_fragment_that_lies_and_a_compressed_header_are_refused() -> None:
    trun = struct.pack(">I4sII", 16, b"trun", 0, 300_000_000)
    fragment = struct.pack(">I4s", 8 + len(trun), b"traf") + trun
    with pytest.raises(Skip, match="its tables count"):
        prepare_video(video(5) + struct.pack(">I4s", 8 + len(fragment), b"moof") + fragment)
    with pytest.raises(Skip, match="compressed header"):
        prepare_video(video(5) + struct.pack(">I4sI4s", 24, b"moov", 16, b"cmov") + bytes(8))


def test_long_videos_of_few_bytes_are_refused() -> None:
    check_work(216_000, 1920, 1080, 40_000_000)  # two hours of slides at 30 frames a second
    with pytest.raises(MediaError, match="video too long"):
        check_work(100_000, 8192, 4320, 1_500_000)
