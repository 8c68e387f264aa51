"""Damaged files of every reader of data: an error of ours or success, never another exception, 10 s or 1 GiB.

What is damaged, how, and how the limits are held is in tests/fuzzing.py. A few inputs a reader here, many under `make faults`.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from visionloom.common.errors import UserError
from visionloom.data.convert.media import prepare_image, prepare_video
from visionloom.data.convert.run import Request, convert
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.urls import build_index
from visionloom.data.encode.encode import encode
from visionloom.data.encode.image import decode_image
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.inspect.sample_view import view_sample
from visionloom.data.inspect.verify import verify_dataset
from visionloom.data.plan.lengths import LENGTHS
from visionloom.data.plan.resumable import load_rows
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.index import index_path, index_shard, known_shard
from visionloom.data.shards.manifest import read_manifest
from visionloom.data.shards.media_header import probe
from visionloom.data.shards.sample import SampleError
from visionloom.data.shards.sample_json import parse_sample, to_json
from visionloom.data.shards.store import MissingBytes, StoreError
from visionloom.data.shards.tar import entries
from visionloom.data.shards.write import ShardLimits, write_shards
from visionloom.data.shards.write_parts import Target
from visionloom.tests.data.samples import RULES, essay, film, picture_question, png
from visionloom.tests.data.shards.test_media_header import video
from visionloom.tests.fuzzing import (
    Mutator,
    amount,
    json_edit,
    json_lines_edit,
    mutants,
    try_reader,
)

pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
OURS = (UserError, Skip, StoreError, MissingBytes)
ASK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
PICTURE = png(16, 16)


@dataclass(frozen=True)
class Case:
    """A reader: its good files, how they are damaged, and what reads them in a folder."""

    good: Sequence[bytes]
    read: Callable[[bytes, Path], object]
    mutators: Sequence[Mutator] = ()
    usual: int = 8
    """Inputs of the usual suite."""
    allowed: tuple[type[BaseException], ...] = field(default=OURS)


# ---- shards


def shard() -> bytes:
    """A tar with a picture, a film of frames and a text."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, (sample, media) in enumerate((picture_question(1), film(2), essay(3))):
            for name, data in {"json": to_json(sample).encode(), **media}.items():
                info = tarfile.TarInfo(f"{number:03d}.{name}")
                info.size, info.mtime = len(data), 1.5
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def read_tar(data: bytes, folder: Path) -> None:
    path = folder / "a.tar"
    path.write_bytes(data)
    list(entries(path, lambda fault: None))
    shutil.rmtree(index_path(path), ignore_errors=True)
    index_path(path).unlink(missing_ok=True)
    index_shard(path, skip_bad=True)


def dataset(folder: Path) -> Path:
    if not (folder / "set").exists():
        write_shards(
            folder / "set", "set", [picture_question(1), film(2), essay(3)], samples_per_shard=2
        )
    return folder / "set"


def with_file(name: str) -> Callable[[bytes, Path], object]:
    """Reads a whole dataset in which one file is damaged."""

    def read(data: bytes, folder: Path) -> None:
        path = dataset(folder)
        good = (path / name).read_bytes()
        try:
            (path / name).write_bytes(data)
            if name.endswith(".qidx"):
                known_shard(path / name.removesuffix(".qidx"))
                _sign(path, name, data)
            opened = Dataset.open(path, "set")
            for index in range(min(len(opened), 5)):
                opened.location(index)
                opened.media(index)
                view_sample(opened, index, RULES)
                opened.runs(index, ["a.png"])
            read_manifest(path, "stats")
            verify_dataset(str(path), folder / "verified.jsonl", decode=True)
        finally:
            shutil.rmtree(path)
            dataset(folder)
            assert (path / name).read_bytes() == good

    return read


def _sign(path: Path, name: str, data: bytes) -> None:
    """Let dataset.json say that a damaged index is the right one, as whoever makes both can."""
    import hashlib

    document = json.loads((path / "dataset.json").read_bytes())
    row = next(row for row in document["shards"] if row["file"] + ".qidx" == name)
    row["sha256"] = hashlib.sha256(data).hexdigest()
    (path / "dataset.json").write_text(json.dumps(document))


def good_file(name: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return (dataset(Path(folder)) / name).read_bytes()


def samples() -> list[bytes]:
    video_file = {
        "type": "video",
        "ref": "v.mp4",
        "frames": 10,
        "fps": 2.0,
        "duration": 5.0,
        "w": 64,
        "h": 64,
        "t": None,
        "start": 0.5,
    }
    box = {"type": "box", "image": 0, "xyxy": [1, 2, 3, 4], "label": "x"}
    call = {"type": "tool_call", "name": "f", "arguments": {"a": [1]}}
    rich = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "image", "ref": "a.png", "w": 64, "h": 64, "max_pixels": 4096}, video_file]},
        {"role": "assistant", "content": [{"type": "think", "text": "t"}, box, {"type": "time", "t": 1.5}, call], "loss": 0.5},
    ]  # fmt: skip
    more = {
        "v": 1,
        "id": "x",
        "kind": "chat",
        "messages": rich,
        "tools": [{"name": "f"}],
        "weight": 2.0,
        "task": "q",
        "meta": {"a": 1},
    }
    return [
        json.dumps(more).encode(),
        *(to_json(pair[0]).encode() for pair in (picture_question(1), film(2), essay(3))),
    ]


def read_sample(data: bytes, folder: Path) -> None:
    sample = parse_sample(data)
    encode(sample, Tokenizer(os.environ["FUZZ_TOKENIZER"]), RULES)


# ---- media


def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for kind, mode, options in (
        *((kind, "RGB", {}) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")),
        ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "I;16", {}), ("JPEG", "CMYK", {"progressive": True}), ("TIFF", "F", {}),
        ("TIFF", "RGB", {"compression": "jpeg"}), ("TIFF", "L", {"compression": "tiff_lzw"}), ("WEBP", "RGBA", {"lossless": True}),
    ):  # fmt: skip
        picture = Pillow.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        file = io.BytesIO()
        exif = Pillow.Exif()
        exif[0x0112] = 6
        picture.convert(mode).save(
            file, kind, **options, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {})
        )
        found.append(file.getvalue())
    file = io.BytesIO()
    frames = [Pillow.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)) for _ in range(3)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return [*found, file.getvalue()]


def read_picture(data: bytes, folder: Path) -> None:
    for call in (
        lambda: prepare_image(data),
        lambda: probe("a.png", data),
        lambda: decode_image(data, (24, 32), "s", "a.png"),
    ):
        try:
            call()
        except (ValueError, Skip) as error:
            assert isinstance(error, Skip | SampleError) or type(error) is ValueError


def videos() -> list[bytes]:
    kinds = [
        ("mp4", "h264"),
        ("mp4", "mpeg4"),
        ("matroska", "mpeg4"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
    ]
    kinds += [
        ("mpegts", "mpeg2video"),
        ("mpeg", "mpeg2video"),
        ("flv", "flv"),
        ("asf", "wmv2"),
        ("mov", "png"),
    ]
    return [
        video(8, container=container, codec=codec) if codec != "png" else video(8, container="mov")
        for container, codec in kinds
    ]


def read_video(data: bytes, folder: Path) -> None:
    from visionloom.data.encode.video import decode_frames
    from visionloom.data.shards.sample import Video

    for call in (lambda: prepare_video(data), lambda: probe("a.mp4", data)):
        try:
            call()
        except (ValueError, Skip) as error:
            assert isinstance(error, Skip) or type(error) is ValueError
    said = Video((), (), 64, 48, "a.mp4", 8, 25.0, 0.32)
    list(decode_frames(data, said, np.arange(0, 8, 3), [0.0, 0.12, 0.24], "s"))


# ---- sources


def conversion(
    kind: str, name: str, others: dict[str, bytes] | None = None
) -> Callable[[bytes, Path], object]:
    """Converts a folder with the damaged file and others."""

    def read(data: bytes, folder: Path) -> None:
        source = folder / "source"
        for file, content in {**(others or {}), name: data}.items():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes(content)
        try:
            request = Request(
                kind, source, images_dir=source if kind in ("mmc4", "obelics") else None
            )
            convert(
                request,
                Target(folder / "set", "set", ShardLimits(100), 1),
                lambda done, total: None,
            )
        finally:
            shutil.rmtree(folder / "set", ignore_errors=True)
            shutil.rmtree(source)

    return read


def table(kind: str, rows: list[dict[str, Any]]) -> bytes:
    import pyarrow.parquet

    sink, content = io.BytesIO(), pa.Table.from_pylist(rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(content, sink)
    else:
        with pa.ipc.new_stream(sink, content.schema) as writer:
            writer.write_table(content)
    return sink.getvalue()


def lines(*records: object) -> list[bytes]:
    return ["\n".join(map(json.dumps, records)).encode()]


CHATS = [
    {"id": "a", "image": "p.png", "conversations": ASK, "weight": 1.5},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "p.png"}, {"type": "text", "text": "x"}]},
                  {"role": "assistant", "content": "<think>a</think>b<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>"}],
     "tools": [{"name": "f"}]},
    {"video": ["p.png", "p.png"], "fps": 2, "conversations": [{"from": "human", "value": "<video>w"}, {"from": "gpt", "value": "x"}]},
    {"objects": {"bbox": [[1, 2, 3, 4]], "ref": ["x"]}, "images": ["p.png"],
     "messages": [{"role": "user", "content": "<image><ref-object>"}, {"role": "assistant", "content": "<bbox>"}]},
]  # fmt: skip
ROWS = [
    {
        "image": {"bytes": PICTURE, "path": None},
        "question": "q <image>",
        "answer": "a",
        "id": str(number),
    }
    for number in range(3)
]
OBELICS = [
    {"images": ["http://x/1", None], "texts": [None, "t"], "metadata": '[{"document_url": "u"}]'}
]
MMC4 = {
    "text_list": ["a", "b"],
    "url": "u",
    "image_info": [{"image_name": "p.png", "raw_url": "http://x/1", "matched_text_index": 1}],
}
OWN = json.loads(to_json(picture_question(1)[0]))
OWN["messages"][0]["content"][0] = {"type": "image", "file": "p.png"}
P = {"p.png": PICTURE}


def read_fetched(name: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        images = folder / "images"
        (images / "00000").mkdir(parents=True, exist_ok=True)
        (images / "00000" / "1.jpg").write_bytes(PICTURE)
        (images / name).write_bytes(data)
        shutil.rmtree(folder / "index", ignore_errors=True)
        build_index(images, folder / "index").read("http://x/1")

    return read


def fetched_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (
            ("1.jpg", PICTURE),
            ("1.json", b'{"url": "http://x/1"}'),
            ("1.txt", b"x"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def tables() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(5, LENGTHS))
    return file.getvalue()


def read_rows(data: bytes, folder: Path) -> None:
    (folder / "a.npy").write_bytes(data)
    rows = load_rows(folder / "a.npy", LENGTHS)
    assert rows is None or (
        rows.dtype == LENGTHS and rows.ndim == 1 and rows["tokens"].min(initial=0) >= 0
    )


def read_tokenizer(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(data)
    tokenizer = Tokenizer(str(folder))
    tokenizer.decode(tokenizer.encode(["Hello <|im_end|> 7"])[0].tolist())


def tokenizers() -> list[bytes]:
    return [(Path(os.environ["FUZZ_TOKENIZER"]) / "tokenizer.json").read_bytes()]


JSON, LINES = (json_edit, json_edit), (json_lines_edit, json_lines_edit, json_lines_edit)
CASES: dict[str, Callable[[], Case]] = {
    "tar": lambda: Case([shard()], read_tar, usual=30),
    "shard index": lambda: Case([good_file("set-000000.tar.qidx")], with_file("set-000000.tar.qidx"), usual=8),
    "shard": lambda: Case([good_file("set-000000.tar")], with_file("set-000000.tar"), usual=6),
    "dataset.json": lambda: Case([good_file("dataset.json")], with_file("dataset.json"), JSON, usual=8),
    "sample JSON": lambda: Case(samples(), read_sample, JSON, usual=40),
    "sample bytes": lambda: Case(samples(), read_sample, usual=12),
    "picture": lambda: Case(pictures(), read_picture, usual=40),
    "video": lambda: Case(videos(), read_video, usual=30),
    "llava": lambda: Case(lines(*CHATS), conversion("llava", "a.jsonl", P), LINES),
    "llava array": lambda: Case([json.dumps(CHATS).encode()], conversion("llava", "a.json", P), JSON),
    "llava bytes": lambda: Case([json.dumps(CHATS).encode(), *lines(*CHATS)], conversion("llava", "a.json", P)),
    "sharegpt": lambda: Case(lines(*CHATS), conversion("sharegpt", "a.jsonl", P), LINES),
    "jsonl": lambda: Case(lines({"text": "a", "id": 3}, OWN), conversion("jsonl", "a.jsonl", P), LINES),
    "mmc4": lambda: Case(lines(MMC4), conversion("mmc4", "a.jsonl", P), LINES),
    "obelics": lambda: Case([table("parquet", OBELICS)], conversion("obelics", "a.parquet", P)),
    "omnicorpus": lambda: Case([table("parquet", [{**OBELICS[0], "general_metadata": '{"id": "x"}'}])], conversion("omnicorpus", "a.parquet")),
    "hf parquet": lambda: Case([table("parquet", ROWS)], conversion("hf", "a.parquet")),
    "hf arrow": lambda: Case([table("arrow", ROWS)], conversion("hf", "a.arrow")),
    "hf state.json": lambda: Case([b'{"_data_files": [{"filename": "a.arrow"}], "_split": "train"}'], conversion("hf", "state.json", {"a.arrow": table("arrow", ROWS)}), JSON),
    "folder metadata": lambda: Case(lines({"file_name": "p.png", "text": "x"}), conversion("folder", "metadata.jsonl", P), LINES),
    "folder caption": lambda: Case([b"a caption"], conversion("folder", "p.txt", P)),
    "folder picture": lambda: Case([PICTURE], conversion("folder", "p.png", {"p.txt": b"x"})),
    "webdataset": lambda: Case([shard()], conversion("webdataset", "a.tar"), usual=12),
    "times.json": lambda: Case([b"[0, 0.5]", b'{"0.png": 0, "1.png": 1}'], conversion("llava", "film/times.json", {"film/0.png": PICTURE, "film/1.png": PICTURE, "a.jsonl": lines({"video": "film", "conversations": [{"from": "human", "value": "<video>w"}, {"from": "gpt", "value": "x"}]})[0]}), JSON),
    "img2dataset tar": lambda: Case([fetched_tar()], read_fetched("00001.tar")),
    "img2dataset json": lambda: Case([b'{"url": "http://x/1", "key": "1"}'], read_fetched("00000/1.json"), JSON),
    "length table": lambda: Case([tables()], read_rows, usual=40),
    "tokenizer.json": lambda: Case(tokenizers(), read_tokenizer, JSON, usual=8),
    "tokenizer bytes": lambda: Case(tokenizers(), read_tokenizer, usual=4),
}  # fmt: skip


@pytest.fixture
def tokenizer_of_environment(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setenv("FUZZ_TOKENIZER", str(tokenizer_folder))
    yield


def fuzz(name: str, folder: Path, times: int = 1, seed: int = 0) -> int:
    case = CASES[name]()
    inputs = mutants(case.good, amount(case.usual * times), case.mutators, seed)
    for data in case.good:
        case.read(data, folder)  # good files are read
    return try_reader(lambda data: case.read(data, folder), inputs, case.allowed, name)


@pytest.mark.usefixtures("tokenizer_of_environment")
@pytest.mark.parametrize("name", CASES)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    print(f"{name}: {fuzz(name, tmp_path)} inputs tried")


@pytest.mark.faults
@pytest.mark.usefixtures("tokenizer_of_environment")
@pytest.mark.parametrize("name", CASES)
def test_many_damaged_files(name: str, tmp_path: Path) -> None:
    """The same with other inputs, four times as many."""
    print(f"{name}: {fuzz(name, tmp_path, 4, seed=1)} inputs tried")
