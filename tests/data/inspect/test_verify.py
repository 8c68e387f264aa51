"""verify names every bad member and nothing else; references: the faults that were planted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from visionloom.data.inspect import verify
from visionloom.data.inspect.verify import JOURNAL, verify_dataset
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Image, Sample, Video
from visionloom.data.shards.write import write_shards
from visionloom.tests.data.faulty_server import serving
from visionloom.tests.data.samples import Pair, film, picture_question, png
from visionloom.tests.data.shards.test_media_header import video

CLIP = video(20, 10)


def clip(number: int, **changes: object) -> Pair:
    element = Video((), (), 64, 48, "v.mp4", 20, 10.0, 2.0)
    return Sample(f"clip:{number}", "doc", content=(replace(element, **changes),)), {"v.mp4": CLIP}  # type: ignore[arg-type]


def pairs() -> list[Pair]:
    half = png(64, 64)[:6000]
    found = [picture_question(number) for number in range(12)]
    found[2] = found[2][0], {"a.png": b"no picture"}
    found[4] = found[4][0], {"a.png": png(32, 32)}
    found[5] = Sample("half", "doc", content=(Image("a.png", 64, 64),)), {"a.png": half}
    found += [
        film(0),
        clip(1),
        clip(2, file_frames=25),
        clip(3, fps=30.0),
        clip(4, width=48, height=64),
    ]
    return [*found, (clip(5)[0], {"v.mp4": CLIP[: len(CLIP) // 2]})]


HEADERS = {
    2: "no picture",
    4: "32x32 pixels",
    14: "20 frames, the sample says 25",
    15: "fps 10",
    16: "64x48 pixels",
    17: "v.mp4",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "set", "set", pairs(), 5)
    dataset = Dataset.open(tmp_path / "set", "set")
    for index, ref in ((7, "json"), (9, "a.png")):
        place = dataset.location(index, ref)
        data = bytearray((tmp_path / "set" / place.shard).read_bytes())
        data[place.offset + place.length // 2] ^= 1
        (tmp_path / "set" / place.shard).write_bytes(data)
    return tmp_path / "set"


@pytest.mark.parametrize("decode", [False, True])
def test_every_bad_member_is_named_with_its_place(
    folder: Path, tmp_path: Path, decode: bool
) -> None:
    expected = HEADERS | {7: "CRC-32", 9: "CRC-32"} | ({5: "cannot be decoded"} if decode else {})
    bad = verify_dataset(str(folder), tmp_path / "bad.jsonl", decode)
    assert bad == [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [int(row["key"]) for row in bad] == sorted(expected)
    dataset = Dataset.open(folder, "set")
    for row in bad:
        number = int(row["key"])
        place = dataset.location(number, row["member"])
        assert expected[number] in row["error"]
        assert (row["shard"], row["offset"], row["crc32"]) == (
            place.shard,
            place.offset,
            f"{place.crc32:08x}",
        )
        assert (row["member"] == "json") == (number == 7)


def test_processes_and_urls_change_nothing(folder: Path, tmp_path: Path) -> None:
    expected = verify_dataset(str(folder), tmp_path / "a.jsonl")
    assert verify_dataset(str(folder), tmp_path / "b.jsonl", workers=2) == expected
    with serving(folder) as server:
        found = verify_dataset(server.url, tmp_path / "c.jsonl")
    assert [row["key"] for row in found] == [row["key"] for row in expected]


def test_an_interrupted_check_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, spans = verify._verify_shard, list[tuple[int, int]]()

    def counting(path: str, decode: bool, span: tuple[int, int]) -> list[verify.Bad]:
        if len(spans) == 2:
            raise KeyboardInterrupt
        spans.append(span)
        return whole(path, decode, span)

    out = tmp_path / "bad.jsonl"
    monkeypatch.setattr(verify, "_verify_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        verify_dataset(str(folder), out)
    journal = out.with_name(out.name + JOURNAL)
    journal.write_text(journal.read_text() + '["half a li')
    monkeypatch.setattr(
        verify,
        "_verify_shard",
        lambda path, decode, span: spans.append(span) or whole(path, decode, span),
    )
    told = list[tuple[int, int]]()
    bad = verify_dataset(str(folder), out, done=lambda done, total: told.append((done, total)))
    assert spans == [(0, 5), (5, 10), (10, 15), (15, 18)]
    assert told == [(15, 18), (18, 18)]
    assert not journal.exists()
    assert bad == verify_dataset(str(folder), tmp_path / "again.jsonl")
