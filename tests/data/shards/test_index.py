"""Indexes: what headers say, damage with its place, and folders indexed in parallel and continued."""

import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.data.shards import index
from visionloom.data.shards import index_folder as indexing
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.index import index_shard, known_shard
from visionloom.data.shards.index_folder import LEFT_OUT, index_folder
from visionloom.data.shards.manifest import Statistics
from visionloom.data.shards.media_header import MediaFacts
from visionloom.data.shards.sample import Image, Message, Sample, SampleError, Text, Think, Video
from visionloom.data.shards.sample_json import to_json
from visionloom.data.shards.write import write_shards
from visionloom.tests.data.samples import essay, film, picture_question, png
from visionloom.tests.data.shards.test_media_header import video

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members_of(number: int) -> Members:
    """A sample with a picture, as members of a tar."""
    sample, media = picture_question(number)
    return [
        (f"{number:03d}.json", to_json(sample).encode()),
        (f"{number:03d}.a.png", media["a.png"]),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "set", "set", [picture_question(number) for number in range(10)], 2)
    for path in (tmp_path / "set").glob("*.qidx"):
        path.unlink()
    (tmp_path / "set" / "dataset.json").unlink()
    return tmp_path / "set"


def test_headers_and_statistics_are_in_the_index(tmp_path: Path) -> None:
    """Reference: the numbers that the members were made with."""
    clip = Video((), (), 64, 48, "v.mp4", 20, 10.0, 2.0)
    chat = (
        Message("user", (Text("hé"), Image("a.png", 5, 7), clip)),
        Message("assistant", (Think("hm"), Text("ok"))),
    )
    media = {"a.png": png(7, 5), "v.mp4": video(20, 10)}
    lying = Sample("x:2", "doc", content=(Image("a.png", 6, 7),), task="lie")
    frames = film(1, 4)
    pairs = [
        (Sample("x:1", "chat", chat), media),
        frames,
        (lying, {"a.png": png(7, 5)}),
        essay(1, 0),
    ]
    write_shards(tmp_path / "set", "set", pairs)
    dataset = Dataset.open(tmp_path / "set", "set")
    assert dataset.media(0)["a.png"] == MediaFacts("image", 5, 7, 1)
    found = dataset.media(0)["v.mp4"]
    assert (found.kind, found.width, found.height, found.frames, found.fps) == (
        "video",
        64,
        48,
        20,
        10.0,
    )
    assert found.duration == pytest.approx(2.0, abs=0.11)
    assert dataset.media(1) == {name: MediaFacts("image", 32, 32, 1) for name in frames[1]}
    text = sum(len(words.encode()) for words in ("hé", "hm", "ok", "Watch.", "Done.", "Essay 1. "))
    pixels = 5 * 7 + 20 * 64 * 48 + 4 * 32 * 32 + 6 * 7
    expected = Statistics(2, 2, 24, pixels, 2.0 + 1.5, text, {"lie": 1}, suspect_media=1)
    assert dataset.shards[0].statistics == expected
    manifest = json.loads((tmp_path / "set" / "dataset.json").read_bytes())
    assert manifest["statistics"] == {
        **manifest["statistics"],
        "images": 2,
        "frames": 24,
        "text_bytes": text,
        "left_out": 0,
    }
    assert manifest["bytes"] == (tmp_path / "set" / "set-000000.tar").stat().st_size


def test_the_fingerprint_does_not_depend_on_pyav(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = Video((), (), 64, 48, "v.mp4", 20, 10.0, 2.0)
    write_shards(
        tmp_path / "set", "set", [(Sample("x:1", "doc", content=(clip,)), {"v.mp4": video(20, 10)})]
    )
    before = Dataset.open(tmp_path / "set", "set")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    index_folder(tmp_path / "set", force=True)
    after = Dataset.open(tmp_path / "set", "set")
    assert after.media(0)["v.mp4"] == MediaFacts("video")
    assert after.shards[0].sha256 != before.shards[0].sha256
    assert after.fingerprint == before.fingerprint


# ---- parallel, continued


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".qidx", ".json")
    }


def test_processes_change_nothing(folder: Path) -> None:
    told = list[tuple[int, int]]()
    index_folder(folder, done=lambda done, total: told.append((done, total)))
    assert told == [(number, 5) for number in range(1, 6)]
    alone = snapshot(folder)
    index_folder(folder, workers=3, force=True)
    assert snapshot(folder) == alone


def test_an_interrupted_pass_goes_on_where_it_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, whole = list[str](), index_shard

    def counting(path: Path, skip_bad: bool = False) -> object:
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(path.name)
        return whole(path, skip_bad)

    monkeypatch.setattr(indexing, "index_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        index_folder(folder)
    assert not (folder / "dataset.json").exists()
    monkeypatch.setattr(
        indexing,
        "index_shard",
        lambda path, skip_bad: read.append(path.name) or whole(path, skip_bad),
    )
    index_folder(folder)
    assert sorted(read) == [f"set-00000{number}.tar" for number in range(5)]
    assert len(Dataset.open(folder, "set")) == 10
    index_folder(folder, force=True)
    assert len(read) == 10


@pytest.mark.parametrize(
    "change", ["longer", "other header", "newer", "damaged index", "old index"]
)
def test_a_changed_shard_is_read_again(folder: Path, change: str) -> None:
    path = folder / "set-000000.tar"
    index_shard(path)
    assert known_shard(path) is not None
    stat = path.stat()
    data = path.read_bytes()
    if change == "longer":
        path.write_bytes(data + bytes(512))
    elif change == "other header":
        path.write_bytes(data[:1] + b"9" + data[2:])
    elif change == "damaged index":
        index.index_path(path).write_bytes(index.index_path(path).read_bytes()[:-1])
    elif change == "old index":
        content = index.index_path(path).read_bytes()
        index.index_path(path).write_bytes(content[:8] + b"\1" + content[9:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (10**12 if change == "newer" else 0)))
    assert known_shard(path) is None


# ---- damage


def damaged(change: Callable[[bytearray], bytes | bytearray]) -> Callable[[bytearray], bytes]:
    return lambda data: bytes(change(data))


def flip(data: bytearray, place: int) -> bytearray:
    data[place] ^= 1
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: flip(data, 3), "damaged: no valid member header at byte 0"),
        (lambda data: flip(data, 1024 + 130), "damaged: no valid member header at byte 1024"),
        (lambda data: data[:1600], "truncated: member '000.a.png' at byte 1024 needs"),
        (
            lambda data: b"<!DOCTYPE html><html>404" + bytes(4096),
            "at byte 0: is not a tar file but an HTML or XML page",
        ),
        (
            lambda data: b"\x1f\x8b\x08" + bytes(4096),
            "at byte 0: is not a tar file but compressed by gzip",
        ),
        (lambda data: b"", "at byte 0: is empty"),
        (lambda data: b"short", "truncated at byte 5"),
    ],
)
def test_damage_is_one_line_with_file_and_offset(
    tmp_path: Path, change: Callable[[bytearray], bytes], message: str
) -> None:
    """Row 31 of the fault matrix, where shards are indexed."""
    path = tmp_path / "a.tar"
    write_tar(path, members_of(0) + members_of(1))
    path.write_bytes(bytes(change(bytearray(path.read_bytes()))))
    with pytest.raises(UserError) as caught:
        index_shard(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_zero_block_in_the_middle_hides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, members_of(0) + members_of(1))
    data = path.read_bytes()
    path.write_bytes(data[:1024] + bytes(512) + data[1536:])  # the header of 000.a.png
    row = index_shard(path, skip_bad=True)
    assert [(offset, key) for offset, key, _ in row.statistics.left_out] == [
        (1024, ""),
        (512, "000"),
    ]
    assert row.samples == 1


def test_opening_finds_a_replaced_tar(folder: Path) -> None:
    index_folder(folder)
    path = folder / "set-000001.tar"
    path.write_bytes(bytes(flip(bytearray(path.read_bytes()), 3)))
    dataset = Dataset.open(folder, "set")
    assert dataset.sample(0)
    with pytest.raises(
        UserError,
        match=r"set-000001\.tar: its header at byte 0, or its end, is not that of the indexed tar",
    ):
        dataset.sample(2)


def link(name: str) -> Members:
    return [(name, b"LINK")]


PLANTED: dict[str, tuple[Members, str]] = {
    "wrong json": ([("bad.json", b'{"v":1,')], "not valid JSON"),
    "wrong schema": (
        [("bad.json", b'{"v":1,"id":"x","kind":"chat"}')],
        "sample x: messages: missing",
    ),
    "not utf-8": ([("bad.json", b'{"v":1,"id":"\xff\xfe"}')], "not valid JSON: 'utf-8' codec"),
    "half a surrogate": (
        [
            (
                "bad.json",
                b'{"v":1,"id":"x","kind":"doc","content":[{"type":"text","text":"\\ud800"}]}',
            )
        ],
        "no valid Unicode",
    ),
    "missing member": ([("bad.json", members_of(1)[0][1])], "media member 'a.png' is missing"),
    "no json": ([("bad.a.png", b"x")], "sample 'bad' has no bad.json"),
    "twice": (
        [("bad.json", members_of(1)[0][1]), ("bad.a.png", b"x"), ("bad.a.png", b"y")],
        "member 'bad.a.png' comes twice",
    ),
    "leads out": ([("../bad.a.png", b"x")], "member '../bad.a.png' leads out of its folder"),
    "leads out behind": ([("a/../../bad.a.png", b"x")], "leads out of its folder"),
    "absolute": ([("/bad.json", b"x")], "member '/bad.json' has an absolute path"),
    "folder": ([("dir/bad.json", b"x")], "member 'dir/bad.json': KEY.NAME expected"),
    "name not utf-8": ([("bad.\udcff.png", b"x")], "KEY.NAME expected"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_bad_sample_is_an_error_or_left_out(tmp_path: Path, kind: str) -> None:
    members, message = PLANTED[kind]
    write_tar(tmp_path / "a.tar", members_of(0) + members_of(1) + members + members_of(2))
    with pytest.raises(UserError) as caught:
        index_folder(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'a.tar'}: at byte ")
    (row,) = index_folder(tmp_path, skip_bad=True)
    assert [message in error for _, _, error in row.statistics.left_out] == [True]
    dataset = Dataset.open(tmp_path, "a")
    assert dataset.keys == ["000", "001", "002"]
    assert [dataset.sample(number).id for number in range(3)] == [
        "picture:0",
        "picture:1",
        "picture:2",
    ]
    with pytest.raises(
        UserError, match="at byte"
    ):  # what was left out once is not silently accepted later
        index_folder(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_are_refused(tmp_path: Path, kind: bytes) -> None:
    write_tar(tmp_path / "a.tar", members_of(0))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        info = tarfile.TarInfo("001.json")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"at byte \d+: member '001\.json' is not a regular file"):
        index_folder(tmp_path)


def test_exactly_what_is_bad_is_left_out_and_listed(folder: Path) -> None:
    """Ten samples in five shards: a damaged header, a truncated shard, an HTML page, an empty file, and one good shard."""
    paths = [folder / f"set-00000{number}.tar" for number in range(5)]
    with tarfile.open(paths[0]) as tar:
        offsets = {member.name: member.offset for member in tar}
    data = paths[0].read_bytes()
    second = next(offset for name, offset in offsets.items() if name == "000000001.a.png")
    paths[0].write_bytes(bytes(flip(bytearray(data), second + 1)))
    paths[1].write_bytes(paths[1].read_bytes()[: second + 600])
    paths[2].write_bytes(b"<html>not found</html>" * 99)
    paths[3].write_bytes(b"")
    rows = index_folder(folder, workers=2, skip_bad=True)
    assert [(row.file, row.samples) for row in rows] == [
        ("set-000000.tar", 1),
        ("set-000001.tar", 1),
        ("set-000004.tar", 2),
    ]
    assert Dataset.open(folder, "set").keys == ["000000000", "000000002", "000000008", "000000009"]
    listed = [json.loads(line) for line in (folder / LEFT_OUT).read_text().splitlines()]
    assert [(row["shard"], row["key"], row["offset"]) for row in listed] == [
        ("set-000000.tar", "", second),
        ("set-000000.tar", "000000001", offsets["000000001.json"] + 512),
        ("set-000001.tar", "000000003.a.png", second),
        ("set-000001.tar", "000000003", offsets["000000001.json"] + 512),
        ("set-000002.tar", "", 0),
        ("set-000003.tar", "", 0),
    ]
    assert rows == index_folder(folder, skip_bad=True), (
        "a second pass, from the indexes, says the same"
    )
    assert json.loads((folder / "dataset.json").read_bytes())["statistics"]["left_out"] == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:1024],  # at a member's border
        lambda data: data[:1024] + data[1024:1300],  # in a header
        lambda data: data[:1600],  # in a member's data
        lambda data: bytes(512) + data[512:],
        lambda data: data[:1024] + bytes(512) + data[1536:],
        lambda data: bytes(flip(bytearray(data), 1024 + 130)),
        lambda data: bytes(flip(bytearray(data), 1024 + 600)),
        lambda data: b"<html><body>404</body></html>",
        lambda data: b"<html>".ljust(len(data), b"x"),
        lambda data: b"",
        lambda data: random.Random(0).randbytes(len(data)),
    ],
)
def test_damage_after_indexing_is_never_silent(
    folder: Path, change: Callable[[bytes], bytes]
) -> None:
    """Row 31 of the fault matrix, where indexed shards are read: every sample comes as it was, or is counted as lost."""
    index_folder(folder)
    whole = everything(Dataset.open(folder, "set"))
    path = folder / "set-000000.tar"
    path.write_bytes(change(path.read_bytes()))
    try:
        found = everything(Dataset.open(folder, "set"))
    except UserError as error:
        assert str(path) in str(error)
        return
    assert found.keys() == whole.keys()
    assert {
        name for name in found if found[name] is not None and found[name] != whole[name]
    } == set()


def everything(dataset: Dataset) -> dict[tuple[int, str], object]:
    """Each sample (without a name) and each member by its name, as they are read; None for what cannot be."""
    found: dict[tuple[int, str], object] = {}
    for number, sample in enumerate(dataset.samples(range(len(dataset)))):
        found[number, ""] = sample if isinstance(sample, Sample) else None
        for name in dataset.media(number):
            try:
                found[number, name] = dataset.member(number, name)
            except SampleError:
                found[number, name] = None
    return found
