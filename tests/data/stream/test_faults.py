"""No silent loss: planted faults are found, all of them and nothing else, and no other pack changes by a bit.

Faults that are there when a dataset is indexed are in test_index.py; these come to light when a sample is trained on.
"""

import io
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from visionloom.data.config import DataConfig, DatasetConfig, StoreConfig
from visionloom.data.plan.open import StreamOptions
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Image, Message, Sample, Text, Video
from visionloom.data.shards.store import StoreError
from visionloom.data.shards.write import write_shards
from visionloom.data.stream import read_ahead as ahead
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.train_stream import PackStream
from visionloom.data.stream.workers import iterate
from visionloom.parallel.share import ALONE, Share
from visionloom.tests.data.batches import digest
from visionloom.tests.data.faulty_server import serving
from visionloom.tests.data.samples import RULES, Pair, film, picture_question, png
from visionloom.tests.data.shards.test_media_header import video

pytest.importorskip("av")
SAMPLES = 200
STEPS = 60
"""Packs of a run: about two epochs of the samples."""
VIDEO = video(20, 10, (64, 64))


def jpeg(seed: int, height: int = 64, width: int = 64) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Pillow.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims another size."""
    data = bytearray(png(4, 4))
    data[16:24] = width.to_bytes(4) + height.to_bytes(4)
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


def picture(number: int) -> Pair:
    ask = (Image("a.jpg", 64, 64), Text(f"What is {number}?"))
    return Sample(
        f"s:{number}", "chat", (Message("user", ask), Message("assistant", (Text("Noise."),)))
    ), {"a.jpg": jpeg(number)}


def clip(number: int) -> Pair:
    element = Video((), (), 64, 64, "v.mp4", 20, 10.0, 2.0)
    chat = (Message("user", (element,)), Message("assistant", (Text(f"Film {number}."),)))
    return Sample(f"s:{number}", "chat", chat), {"v.mp4": VIDEO}


def frames(number: int) -> Pair:
    sample, media = film(number, 4)
    return replace(sample, id=f"s:{number}"), media


def bomb(number: int) -> Pair:
    ask = (Image("a.png", 20_000, 20_000, max_pixels=4096), Text("Boom?"))
    chat = (Message("user", ask), Message("assistant", (Text("Yes."),)))
    return Sample(f"s:{number}", "chat", chat), {"a.png": claiming(20_000, 20_000)}


PLANTED: dict[int, tuple[str, Callable[[int], Pair], dict[str, bytes], str]] = {
    3: (
        "garbage JPEG bytes",
        picture,
        {"a.jpg": random.Random(0).randbytes(700)},
        "cannot be decoded",
    ),
    7: ("zeroed JPEG bytes", picture, {"a.jpg": bytes(700)}, "cannot be decoded"),
    11: ("JPEG cut short", picture, {"a.jpg": jpeg(11)[:900]}, "cannot be decoded"),
    15: ("decompression bomb", bomb, {}, "pixels"),
    19: ("huge dimensions", picture, {"a.jpg": claiming(60_000, 60_000)}, "60000"),
    23: (
        "wrong declared size",
        picture,
        {"a.jpg": jpeg(23, 32, 64)},
        "64x32 pixels, the sample says 64x64",
    ),
    27: ("video cut short", clip, {"v.mp4": VIDEO[: len(VIDEO) // 2]}, ""),
    31: ("garbage video", clip, {"v.mp4": random.Random(1).randbytes(5000)}, ""),
    35: ("garbage frame", frames, {"vid0.001.png": b"no picture"}, "cannot be decoded"),
    39: ("empty picture", picture, {"a.jpg": b""}, "cannot be decoded"),
}
CHANGED_LATER = {
    43: ("wrong CRC-32", "a.jpg"),
    47: ("text that is not UTF-8 any more", "json"),
    51: ("JSON changed", "json"),
}
SAME = "0" * 64
HARMLESS = 55
"""Its tar header is damaged after indexing: samples are read by offset, so nothing is lost."""


def pairs(planted: bool) -> Iterator[Pair]:
    kinds = {44: clip, 45: frames, 46: clip}
    for number in range(SAMPLES):
        _, kind, media, _ = PLANTED.get(number, ("", kinds.get(number, picture), {}, ""))
        sample, good = kind(number)
        yield sample, {**good, **(media if planted else {})}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same samples with good media and with planted faults."""
    root = tmp_path_factory.mktemp("faults")
    for name in ("good", "bad"):
        write_shards(root / name / "set", "set", pairs(name == "bad"), 25)
    return root / "good" / "set", root / "bad" / "set"


@pytest.fixture
def stream(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., PackStream]:
    def make(path: Path | str, quarantine: str = "quarantine.jsonl", **store: object) -> PackStream:
        data = DataConfig(
            str(tokenizer_folder), {"set": DatasetConfig(path=str(path))}, {}, media=replace(RULES)
        )
        data.store = StoreConfig(**store)  # type: ignore[arg-type]
        data.max_bad_fraction = 1.0
        data.cache = str(tmp_path / "tables") if "://" in str(path) else ""
        return PackStream(
            StreamOptions(data, "p", 256, 1, {}, "sqrt", 7), quarantine=tmp_path / quarantine
        )

    return make


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys(path: Path) -> list[int]:
    return sorted(int(str(row["key"])) for row in lines(path))


def run(made: PackStream, workers: int = 0) -> list[PackedBatch]:
    return [batch for step in iterate(made, range(STEPS), ALONE, 1, workers) for batch in step]


def damage_later(folder: Path) -> None:
    dataset = Dataset.open(folder, "set")
    places = {
        number: dataset.location(number, member) for number, (_, member) in CHANGED_LATER.items()
    }
    places[HARMLESS] = dataset.location(HARMLESS)
    for number, place in places.items():
        data = bytearray((folder / place.shard).read_bytes())
        at = place.offset - 500 if number == HARMLESS else place.offset + 8
        data[at] = 0xFF if data[at] != 0xFF else 0
        (folder / place.shard).write_bytes(data)


@pytest.fixture(scope="module")
def damaged(folders: tuple[Path, Path], tokenizer_folder: Path) -> tuple[Path, Path]:
    """The faulty folder, its lengths counted, with more of it changed since."""
    for folder in folders:
        data = DataConfig(
            str(tokenizer_folder),
            {"set": DatasetConfig(path=str(folder))},
            {},
            media=replace(RULES),
        )
        PackStream(StreamOptions(data, "p", 256, 1, {}, "sqrt", 7))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Dataset, "fingerprint", SAME)
            PackStream(StreamOptions(data, "p", 256, 1, {}, "sqrt", 7))
    damage_later(folders[1])
    return folders


@pytest.fixture
def same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders are keyed by a dataset's content: so that good and faulty ones can be compared pack by pack."""
    monkeypatch.setattr(Dataset, "fingerprint", SAME)


@pytest.mark.usefixtures("same_plan")
def test_exactly_the_planted_faults_are_written_down(
    damaged: tuple[Path, Path], stream: Callable[..., PackStream], tmp_path: Path
) -> None:
    good, bad = damaged
    expected, found = run(stream(good, "good.jsonl")), run(stream(bad))
    planted = {*PLANTED, *CHANGED_LATER}
    assert len(planted) >= 12
    assert keys(tmp_path / "quarantine.jsonl") == sorted(planted), "each once, nothing else"
    names = {f"s:{number}" for number in planted}
    untouched = [
        number for number, batch in enumerate(expected) if not names & set(batch.sample_ids)
    ]
    assert STEPS / 4 <= len(untouched) < STEPS
    assert [digest([found[number]]) for number in untouched] == [
        digest([expected[number]]) for number in untouched
    ]
    assert {f"s:{n}" for n in range(SAMPLES) if n not in CHANGED_LATER} <= {
        name for one in found for name in one.sample_ids
    }


def test_processes_write_the_same_set(
    damaged: tuple[Path, Path], stream: Callable[..., PackStream], tmp_path: Path
) -> None:
    expected = [digest([batch]) for batch in run(stream(damaged[1], "alone.jsonl"))]
    assert [digest([batch]) for batch in run(stream(damaged[1]), workers=2)] == expected
    assert (
        keys(tmp_path / "quarantine.jsonl")
        == keys(tmp_path / "alone.jsonl")
        == sorted({*PLANTED, *CHANGED_LATER})
    )


def test_a_line_says_where_and_why(
    damaged: tuple[Path, Path], stream: Callable[..., PackStream], tmp_path: Path
) -> None:
    folder, made = damaged[1], stream(damaged[1])
    batches = run(made)
    dataset = Dataset.open(folder, "set")
    for row in lines(tmp_path / "quarantine.jsonl"):
        number = int(str(row["key"]))
        member = (
            next(iter(PLANTED[number][2] or ["a.png"]))
            if number in PLANTED
            else CHANGED_LATER[number][1]
        )
        place = dataset.location(number, member)
        assert (row["dataset"], row["shard"], row["member"], row["offset"]) == (
            "set",
            place.shard,
            member,
            place.offset,
        )
        bytes_there = (folder / place.shard).read_bytes()[place.offset :][: place.length]
        assert (row["crc32"] == f"{zlib.crc32(bytes_there):08x}") == (number in PLANTED)
        said = PLANTED[number][3] if number in PLANTED else "the bytes changed since"
        assert said in str(row["error"])
        assert any(
            str(row["sample"]) in batch.sample_ids for batch in batches[int(str(row["step"])) :][:1]
        )


@pytest.mark.usefixtures("same_plan")
def test_a_planted_sample_changes_nothing_but_itself(
    damaged: tuple[Path, Path], stream: Callable[..., PackStream]
) -> None:
    names = {f"s:{number}" for number in PLANTED if number != 15}
    touched = 0
    for before, after in zip(
        run(stream(damaged[0], "good.jsonl")), run(stream(damaged[1])), strict=True
    ):
        if any(
            name.startswith("s:") and int(name[2:]) in CHANGED_LATER for name in before.sample_ids
        ):
            continue
        assert before.sample_ids == after.sample_ids
        for name in (
            "input_ids",
            "position_ids",
            "cu_seqlens",
            "grid_thw",
            "visual_rows",
            "padding_mask",
        ):
            assert getattr(before, name).equal(getattr(after, name))
        for segment, sample in enumerate(before.sample_ids):
            here = slice(int(before.cu_seqlens[segment]), int(before.cu_seqlens[segment + 1]))
            if sample in names:
                touched += 1
                assert not after.loss_weights[here].any()
                assert (after.labels[here] == -100).all()
            else:
                assert before.labels[here].equal(after.labels[here])
                assert before.loss_weights[here].equal(after.loss_weights[here])
    assert touched >= len(names)


def test_a_resumed_run_and_a_second_rank_write_no_line_twice(
    damaged: tuple[Path, Path], stream: Callable[..., PackStream], tmp_path: Path
) -> None:
    run(stream(damaged[1]))
    before = (tmp_path / "quarantine.jsonl").read_bytes()
    run(stream(damaged[1]))
    assert (tmp_path / "quarantine.jsonl").read_bytes() == before


@pytest.mark.parametrize("loss", ["vanishes", "shrinks"])
def test_a_shard_that_goes_while_training_costs_its_samples_only(
    folders: tuple[Path, Path], stream: Callable[..., PackStream], tmp_path: Path, loss: str
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for path in folders[0].glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    expected, made = run(stream(folder, "good.jsonl")), stream(folder)
    shard, first = folder / "set-000001.tar", 25
    if loss == "vanishes":
        shard.unlink()
    else:
        first = 30
        with open(shard, "r+b") as file:
            file.truncate(Dataset.open(folder, "set").location(first).offset - 512)
    found = run(made)
    lost = set(range(first, 50))
    assert keys(tmp_path / "quarantine.jsonl") == sorted(lost | {15})
    names = {f"s:{number}" for number in lost}
    same = [
        digest([one]) == digest([two])
        for one, two in zip(expected, found, strict=True)
        if not names & set(one.sample_ids)
    ]
    assert same
    assert all(same)


# ---- from a remote store


def test_a_stream_from_a_faulty_server_is_the_same_and_bounded(
    folders: tuple[Path, Path], stream: Callable[..., PackStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third range request fails; packs equal those from the folder, and bytes in flight keep their limit."""
    monkeypatch.setattr("visionloom.data.shards.remote_store.FIRST_WAIT", 0.001)
    expected = [digest([batch]) for batch in run(stream(folders[0], "good.jsonl"))]
    with serving(folders[0]) as server:
        limit = 4 * len(VIDEO)
        made = stream(
            server.url, timeout_seconds=30.0, retries=9, hedge_seconds=0.2, bytes_in_flight=limit
        )
        server.faults = [
            "",
            "",
            "503",
            "",
            "",
            "reset",
            "",
            "",
            "truncated",
            "",
            "",
            "wrong range",
            "",
            "",
        ] * 9 + ["stall"]
        assert [digest([batch]) for batch in run(made)] == expected
        assert server.connections < len(server.ranges) / 2
    budget = made._reader.budget
    assert len(VIDEO) <= budget.peak <= limit
    assert budget.used == 0


def test_ranks_that_share_pictures_read_their_own_only(
    folders: tuple[Path, Path], stream: Callable[..., PackStream]
) -> None:
    local = stream(folders[0], "good.jsonl")
    step = next(n for n in range(STEPS) if len(local.micro_batches(n, ALONE, 1)[0].grid_thw) > 5)
    expected = [local.micro_batches(step, Share(0, 1, rank, 3), 1)[0] for rank in range(3)]
    members = len(local.micro_batches(step, ALONE, 1)[0].sample_ids)
    with serving(folders[0]) as server:
        asked = list[set[str]]()
        for rank in range(3):
            made = stream(server.url, f"{rank}.jsonl")
            server.ranges.clear()
            found = made.micro_batches(step, Share(0, 1, rank, 3), 1)[0]
            assert digest([found]) == digest([expected[rank]])
            asked.append(set(server.ranges))
    documents = set.intersection(*asked)
    assert len(documents) == members, "all ranks read the text"
    assert all(asked)
    pictures = [one - documents for one in asked]
    assert all(pictures)
    assert not pictures[0] & pictures[1] & pictures[2]


def test_a_store_that_goes_away_stops_the_run_with_one_error(
    folders: tuple[Path, Path],
    stream: Callable[..., PackStream],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("visionloom.data.shards.remote_store.FIRST_WAIT", 0.001)
    with serving(folders[0]) as server:
        made = stream(server.url, timeout_seconds=30.0, retries=2, hedge_seconds=0.0)
        steps = iterate(made, range(STEPS), ALONE, 1, 0)
        next(steps)
        server.faults = ["503"] * 10_000
        with pytest.raises(StoreError, match=r"cannot be read: 3 attempts in .*HTTP 503"):
            list(steps)
    assert (
        not [row for row in lines(tmp_path / "quarantine.jsonl") if row["key"] != "000000015"]
        if (tmp_path / "quarantine.jsonl").exists()
        else True
    )


def test_packs_with_many_large_pictures_need_few_bytes(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack of 40 pictures of 1.5 MB each over HTTP under 8 MB in flight: counted in the store, not by the reader."""
    noise = png(700, 700)
    one = picture_question(0)[0]
    many = [
        replace(one.elements[0], ref=f"p{n}.png", width=700, height=700, max_pixels=4096)
        for n in range(40)
    ]
    chat = (Message("user", tuple(many)), Message("assistant", (Text("Many."),)))
    sample = Sample("many", "chat", chat)
    write_shards(tmp_path / "set", "set", [(sample, {f"p{n}.png": noise for n in range(40)})])
    held, most = [0], [0]
    begin, release = ahead.AheadReader._begin, ahead.ByteBudget.release

    def count(change: int) -> None:
        held[0] += change
        most[0] = max(most[0], held[0])

    monkeypatch.setattr(
        ahead.AheadReader, "_begin", lambda self, w: (count(w.run.length), begin(self, w))[1]
    )
    monkeypatch.setattr(
        ahead.ByteBudget, "release", lambda self, n: (count(-n), release(self, n))[1]
    )
    limit = 8 * 2**20
    with serving(tmp_path / "set") as server:
        data = DataConfig(
            str(tokenizer_folder), {"set": DatasetConfig(path=server.url)}, {}, media=replace(RULES)
        )
        data.store, data.cache = StoreConfig(bytes_in_flight=limit), str(tmp_path / "tables")
        made = PackStream(StreamOptions(data, "p", 300, 1, {}, "sqrt", 7))
        batch = made.micro_batches(0, ALONE, 1)[0]
        assert len(batch.grid_thw) == 40
        sent = sum(
            int(asked.split()[1].split("-")[1]) - int(asked.split()[1].split("-")[0])
            for asked in server.ranges
        )
    assert sent > 40 * len(noise) > 6 * limit
    assert len(noise) < most[0] <= limit
    assert held[0] == 0


def test_ranks_that_share_pictures_write_one_list(
    damaged: tuple[Path, Path], stream: Callable[..., PackStream], tmp_path: Path
) -> None:
    """Each rank meets the faults of its own pictures: together they are all of the planted ones, each written once."""
    met = list[int]()
    for rank in range(3):
        made = stream(damaged[1])
        for step in range(STEPS):
            made.micro_batches(step, Share(0, 1, rank, 3), 1)
        met.append(len(keys(tmp_path / "quarantine.jsonl")))
    assert keys(tmp_path / "quarantine.jsonl") == sorted({*PLANTED, *CHANGED_LATER})
    assert met[0] < met[-1], "one rank alone does not see them all"
