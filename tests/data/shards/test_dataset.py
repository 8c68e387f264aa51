"""Shards: what is written reads back byte for byte, and damage of any kind is one clear line, never lost samples."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.index_folder import index_folder
from visionloom.data.shards.sample import Image, Message, Sample, SampleError, Text
from visionloom.data.shards.sample_json import to_json
from visionloom.data.shards.store import LocalStore
from visionloom.data.shards.write import write_shards

Pair = tuple[Sample, dict[str, bytes]]


def make(count: int) -> list[Pair]:
    def one(number: int) -> Pair:
        content = (
            Text(f"sample {number} \u00e9"),
            Image("a.png", 2, 3),
            Image("vid0.001.png", 2, 3),
        )
        sample = Sample(
            f"test:{number}",
            "chat",
            (Message("user", content), Message("assistant", (Text("yes"),))),
        )
        return sample, {"vid0.001.png": bytes([number]) * 700, "a.png": bytes([number, 1])}

    return [one(number) for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "set", "set", make(25), samples_per_shard=10)
    return tmp_path / "set"


def test_reads_back_what_was_written(folder: Path) -> None:
    dataset = Dataset.open(folder, "set")
    assert len(dataset) == 25
    for index in (24, 0, 9, 10):
        sample, media = make(25)[index]
        assert dataset.sample(index) == sample
        assert {ref: dataset.member(index, ref) for ref in sample.refs} == media
    assert dataset.keys == [f"{number:09d}" for number in range(25)]
    place = dataset.location(12)
    raw = (folder / place.shard).read_bytes()[place.offset : place.offset + place.length]
    assert (place.shard, place.row, place.key) == ("set-000001.tar", 2, "000000012")
    assert raw.decode() == to_json(make(25)[12][0])


def test_webdataset_reads_the_same(folder: Path) -> None:
    """Reference: the webdataset package."""
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    rows = list(webdataset.WebDataset(urls, shardshuffle=False))
    for row, (sample, media) in zip(rows, make(25), strict=True):
        assert row["json"].decode() == to_json(sample)
        assert {ref: row[ref] for ref in media} == media


def test_the_kernel_is_told_what_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the places of a sample's members by Python's tarfile."""
    told = list[tuple[int, int]]()
    dataset = Dataset.open(folder, "set")
    dataset.sample(12)
    monkeypatch.setattr(
        "os.posix_fadvise", lambda descriptor, offset, length, advice: told.append((offset, length))
    )
    dataset.will_read(12)
    with tarfile.open(folder / "set-000001.tar") as tar:
        mine = [member for member in tar if member.name.startswith("000000012.")]
    start = min(member.offset_data for member in mine)
    end = max(member.offset_data + member.size for member in mine)
    assert told == [(start, end - start)]
    (folder / "set-000002.tar").unlink()
    dataset.will_read(24)  # the read itself will tell


def test_json_lies_before_its_media(folder: Path) -> None:
    with tarfile.open(folder / "set-000000.tar") as tar:
        assert tar.getnames()[:3] == ["000000000.json", "000000000.a.png", "000000000.vid0.001.png"]


def test_the_bytes_depend_on_the_samples_only(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "again", "set", iter(make(25)), samples_per_shard=10)
    files = sorted(path.name for path in folder.iterdir())
    assert [path.name for path in sorted((tmp_path / "again").iterdir())] == files
    assert all(
        (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files
    )
    write_shards(tmp_path / "other", "set", make(24), samples_per_shard=10)
    assert (
        Dataset.open(folder, "x").fingerprint == Dataset.open(tmp_path / "again", "y").fingerprint
    )
    assert (
        Dataset.open(folder, "x").fingerprint != Dataset.open(tmp_path / "other", "x").fingerprint
    )


def test_a_failing_source_leaves_no_half_written_shard(tmp_path: Path) -> None:
    def source() -> list[Pair]:
        return [*make(3), (make(1)[0][0], {})]

    with pytest.raises(SampleError, match=r"sample test:0: media member 'a.png' is missing"):
        write_shards(tmp_path / "set", "set", source(), samples_per_shard=2)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "set-000000.tar",
        "set-000000.tar.qidx",
    ]


def test_an_existing_dataset_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(UserError, match="already holds a dataset"):
        write_shards(folder, "set", make(1))


def test_works_in_threads_after_fork_and_pickled(folder: Path) -> None:
    dataset = Dataset.open(folder, "set")
    expected = [media["vid0.001.png"] for _, media in make(25)]
    read = dataset.member
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(25), ["vid0.001.png"] * 25)) == expected
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy.member(index, "vid0.001.png") for index in range(25)] == expected
    for method in ("fork", "spawn"):
        with get_context(method).Pool(1) as workers:
            found = workers.starmap(dataset.member, [(index, "vid0.001.png") for index in (0, 24)])
        assert found == [expected[0], expected[24]]


def test_more_shards_than_files_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloom.data.shards.store.OPEN_FILES", 2)
    write_shards(tmp_path / "set", "set", make(6), samples_per_shard=1)
    dataset = Dataset.open(tmp_path / "set", "set")
    assert [dataset.member(index, "a.png")[0] for index in (*range(6), 0)] == [0, 1, 2, 3, 4, 5, 0]
    store = dataset._store
    assert isinstance(store, LocalStore)
    assert len(store._files) == 2


# ---- tars made elsewhere


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_index_reads_every_tar_format(tmp_path: Path, tar_format: int) -> None:
    """Reference: the offsets and names of Python's tarfile, which wrote the files; keys of 80, names above 100."""
    ref = "frame-" + "0" * 60 + ".png"
    prefix = "./" if tar_format != tarfile.USTAR_FORMAT else ""
    key = "k" * (80 if tar_format != tarfile.USTAR_FORMAT else 20)
    sample = Sample("x:1", "doc", content=(Image(ref, 1, 1),))
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
        tar.addfile(_folder("."))
        add(tar, f"{prefix}{key}.{ref}", b"frame")
        add(tar, f"{prefix}{key}.json", to_json(sample).encode())
    index_folder(tmp_path)
    dataset = Dataset.open(tmp_path, "a")
    assert (dataset.keys, dataset.sample(0), dataset.member(0, ref)) == ([key], sample, b"frame")


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_index_makes_what_the_writer_made(folder: Path) -> None:
    names = ["dataset.json", "set-000002.tar.qidx"]
    before = [(folder / name).read_bytes() for name in names]
    for name in names:
        (folder / name).unlink()
    index_folder(folder)
    assert [(folder / name).read_bytes() for name in names] == before


DOCUMENT = to_json(Sample("x:1", "doc", content=(Text("hi"),))).encode()
PICTURE = to_json(Sample("x:2", "doc", content=(Image("a.png", 1, 1),))).encode()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no samples"),
        ([("a/1.json", DOCUMENT)], "member 'a/1.json': KEY.NAME expected"),
        ([("readme", b"x")], "member 'readme': KEY.NAME expected"),
        ([("1.png", b"x")], "sample '1' has no 1.json"),
        ([("1.json", DOCUMENT), ("1.json", DOCUMENT)], "member '1.json' comes twice"),
        ([("1.json", DOCUMENT), ("2.json", DOCUMENT), ("1.png", b"x")], "key '1' comes twice"),
        ([("1.json", PICTURE)], "sample x:2: media member 'a.png' is missing"),
        ([("1.json", b"{}")], "sample a.tar:1: id: missing"),
    ],
)
def test_index_refuses_broken_contents(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members:
            add(tar, name, data)
    with pytest.raises(UserError) as caught:
        index_folder(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def overwrite(offset: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + b"\xff" * 40 + data[offset + 40 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:300], "truncated at byte 300"),
        (lambda data: data[: len(data) * 6 // 10], "truncated"),
        (lambda data: data[: len(data.rstrip(b"\0")) // 512 * 512 + 512], "truncated at byte"),
        (
            lambda data: data[: len(data.rstrip(b"\0")) // 512 * 512 + 1024],
            "end of the archive is incomplete",
        ),
        (overwrite(3584), "no valid member header at byte 3584"),
        (
            lambda data: data[:3584] + bytes(512) + data[4096:],
            "a zero block at byte 3584 with more data after it",
        ),
    ],
)
def test_index_finds_damage(folder: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = folder / "set-000001.tar"
    with tarfile.open(path) as tar:
        assert 3584 in [info.offset for info in tar]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        index_folder(folder)
    assert str(path) in str(caught.value)


# ---- opening


def test_open_names_the_option_and_the_fix(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.datasets\.mine\.path: no folder .*/nowhere$"):
        Dataset.open(tmp_path / "nowhere", "mine")
    with pytest.raises(
        UserError, match=r"^data\.validation\.mine\.path: .*: run python launch/data\.py index "
    ):
        Dataset.open(tmp_path, "mine", group="data.validation")
    shard = folder / "set-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(UserError, match=rf"has {len(data) - 512} bytes, {len(data)} were indexed"):
        Dataset.open(folder, "mine")
    shard.unlink()
    with pytest.raises(
        UserError, match=r"data\.datasets\.mine\.path: shard .*set-000001\.tar is missing"
    ):
        Dataset.open(folder, "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(shards=[]), "holds no samples"),
        (lambda manifest: manifest.update(schema_version=9), "schema version 9"),
        (lambda manifest: manifest.pop("shards"), "is damaged"),
        (lambda manifest: manifest["shards"][0].update(file="../set.tar"), "no file of its folder"),
    ],
)
def test_open_refuses_a_strange_manifest(
    folder: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    manifest = json.loads((folder / "dataset.json").read_bytes())
    change(manifest)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        Dataset.open(folder, "set")


def test_a_foreign_or_missing_index_is_refused(folder: Path) -> None:
    index = folder / "set-000000.tar.qidx"
    index.write_bytes((folder / "set-000001.tar.qidx").read_bytes())
    with pytest.raises(
        UserError, match=r"does not match dataset\.json: run python launch/data\.py index"
    ):
        Dataset.open(folder, "set").sample(0)
    index.unlink()
    with pytest.raises(UserError, match="is missing or empty: run python"):
        Dataset.open(folder, "set").sample(0)
    assert Dataset.open(folder, "set").sample(10).id == "test:10"


def test_changed_bytes_are_never_served(folder: Path) -> None:
    dataset = Dataset.open(folder, "set")
    path = folder / "set-000000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"sample 3")] ^= 1
    data[data.index(bytes([4]) * 700)] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        SampleError, match=r"sample set-000000.tar:000000003: json: the bytes changed"
    ):
        dataset.sample(3)
    with pytest.raises(
        SampleError, match=r"sample set-000000.tar:000000004: vid0.001.png: the bytes changed"
    ):
        dataset.member(4, "vid0.001.png")
    with pytest.raises(SampleError, match=r"no\.png: no such media member"):
        dataset.member(5, "no.png")
    assert dataset.sample(4).id == "test:4"
