"""What names a file in data of strangers leads nowhere outside, and to nothing but files.

Row 33 of the fault matrix: paths and URLs in references of JSON, names of tar members, links, `pipe:` shards. Reference: the
file outside, whose content must appear in no sample.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from visionloom.common.errors import UserError
from visionloom.data.config import StoreConfig
from visionloom.data.convert.run import SOURCES
from visionloom.data.convert.urls import build_index
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.lengths import LENGTHS
from visionloom.data.plan.resumable import load_rows
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.index_folder import index_folder
from visionloom.data.shards.manifest import read_manifest
from visionloom.data.shards.open_store import open_store
from visionloom.data.shards.sample_json import to_json
from visionloom.data.shards.write import write_shards
from visionloom.tests.data.conversion import Run
from visionloom.tests.data.samples import essay, picture_question, png

SECRET = "a secret of this machine"
PICTURE = png(16, 16, 99)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the source with a text, a picture and tables of somebody else."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.txt").write_text(SECRET)
    (folder / "secret.png").write_bytes(PICTURE)
    (folder / "secret.jsonl").write_text(json.dumps({"text": SECRET}) + "\n")
    return folder


def texts(run: Run, *words: object, **more: object) -> str:
    """All that a conversion wrote, or the error that ended it."""
    try:
        return " ".join(map(to_json, run(*words, **more)))  # type: ignore[arg-type]
    except UserError as error:
        return f"error: {error}"


# ---- the folder of pictures and captions


def test_captions_that_are_links_are_not_read_unless_the_user_says_so(
    run: Run, outside: Path
) -> None:
    run.put("a.png", png(16, 16))
    (run.source / "a.txt").symlink_to(outside / "secret.txt")
    run.put("b.png", png(16, 16, 1))
    run.put("b.txt", "good")
    assert "good" in (found := texts(run, "folder", run.source)) and SECRET not in found
    assert run.skipped == [("a.png", "refused link out of the source's folders")]
    run.folder = run.folder.with_name("followed")
    assert SECRET in texts(run, "folder", run.source, follow_links=True)


def test_captions_and_lists_that_are_pipes_do_not_hang(run: Run) -> None:
    run.put("a.png", png(16, 16))
    os.mkfifo(run.source / "a.txt")
    os.mkfifo(run.source / "c.png")
    run.put("c.txt", "x")
    assert "no sample could be converted" in texts(run, "folder", run.source)
    os.mkfifo(run.source / "metadata.jsonl")
    run.folder = run.folder.with_name("second")
    assert "is a pipe, not a file" in texts(run, "folder", run.source)


def test_a_list_of_pictures_that_is_a_link_is_refused(run: Run, outside: Path) -> None:
    (run.source / "metadata.jsonl").symlink_to(outside / "secret.jsonl")
    found = texts(run, "folder", run.source)
    assert "is a link out of its folder: --follow-links allows it" in found and SECRET not in found


# ---- lists, tables and shards of a source


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "folder"])
@pytest.mark.parametrize("make", ["link", "pipe"])
def test_files_of_a_source_are_its_own(kind: str, make: str, run: Run, outside: Path) -> None:
    """A file of every format's ending that leads outside ends the conversion with one line; it is not left out unseen."""
    endings = {
        "hf": ".parquet",
        "obelics": ".parquet",
        "omnicorpus": ".parquet",
        "webdataset": ".tar",
    }
    path = run.source / f"a{endings.get(kind, '.jsonl')}"
    os.mkfifo(path) if make == "pipe" else path.symlink_to(outside / "secret.jsonl")
    found = texts(run, kind, run.source)
    assert (
        "is a pipe, not a file" if make == "pipe" else "is a link out of its folder"
    ) in found and SECRET not in found


def test_what_the_user_names_may_be_a_link(run: Run, outside: Path, tmp_path: Path) -> None:
    assert SECRET in texts(run, "jsonl", outside / "secret.jsonl")
    (tmp_path / "link").symlink_to(outside)
    run.folder = run.folder.with_name("second")
    assert SECRET in texts(run, "jsonl", tmp_path / "link")


@pytest.mark.parametrize(
    "name",
    ["../outside/secret.arrow", "{outside}/secret.arrow", "link.arrow", 7, None, "pipe.arrow"],
)
def test_state_json_names_files_of_its_own_folder_only(
    name: object, run: Run, outside: Path
) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": [SECRET]})
    with (
        pa.OSFile(str(outside / "secret.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (run.source / "link.arrow").symlink_to(outside / "secret.arrow")
    os.mkfifo(run.source / "pipe.arrow")
    name = name.format(outside=outside) if isinstance(name, str) else name
    run.put("state.json", json.dumps({"_data_files": [{"filename": name}]}))
    found = texts(run, "hf", run.source)
    assert found.startswith("error: ") and SECRET not in found
    assert any(word in found for word in ("out of its folder", "is a pipe", "filename"))


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}', "{", "[" * 100_000, "9" * 5000],
)
def test_a_strange_state_json_is_one_line(content: str, run: Run) -> None:
    run.put("state.json", content)
    assert "state.json" in texts(run, "hf", run.source)


# ---- references of records


@pytest.mark.parametrize(
    "reference",
    [
        "../outside/secret.png",
        "{outside}/secret.png",
        "link.png",
        "link/secret.png",
        "file://{outside}/secret.png",
        "pipe.png",
        "a/../../outside/secret.png",
        "pipe:cat {outside}/secret.png",
        "simplecache::file://{outside}/secret.png",
    ],
)
def test_references_lead_nowhere_outside(reference: str, run: Run, outside: Path) -> None:
    (run.source / "link.png").symlink_to(outside / "secret.png")
    (run.source / "link").symlink_to(outside)
    os.mkfifo(run.source / "pipe.png")
    ask = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}]
    records = run.lines({"image": reference.format(outside=outside), "conversations": ask})
    assert texts(run, "llava", records).startswith("error: ")
    assert [reason.startswith(("refused", "not a file")) for _, reason in run.skipped] == [True]


def test_times_and_frames_of_a_video_lead_nowhere_outside(run: Run, outside: Path) -> None:
    (outside / "times.json").write_text("[0, 1]")
    for name in ("0.png", "1.png"):
        run.put(f"film/{name}", png(32, 32))
    (run.source / "film" / "times.json").symlink_to(outside / "times.json")
    ask = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "That."}]
    assert texts(run, "llava", run.lines({"video": "film", "conversations": ask})).startswith(
        "error: "
    )
    assert run.skipped[0][1] == "refused link out of the source's folders"


# ---- fetched pictures


def test_fetched_pictures_that_are_links_or_pipes_are_passed_over(
    tmp_path: Path, outside: Path
) -> None:
    images = tmp_path / "images"
    (images / "00000").mkdir(parents=True)
    for number in range(4):
        (images / "00000" / f"{number}.json").write_text(json.dumps({"url": f"http://x/{number}"}))
    (images / "00000" / "0.jpg").symlink_to(outside / "secret.png")
    os.mkfifo(images / "00000" / "1.jpg")
    (images / "00000" / "2.jpg").write_bytes(PICTURE)
    (images / "00000" / "3.jpg").write_bytes(PICTURE)
    (images / "00000" / "3.json").unlink()
    os.mkfifo(images / "00000" / "3.json")
    index = build_index(images, tmp_path / "index")
    assert [index.read(f"http://x/{number}") for number in range(4)] == [None, None, PICTURE, None]
    assert build_index(images, tmp_path / "index2", follow_links=True).read("http://x/0") == PICTURE
    (images / "00001.tar").symlink_to(outside / "secret.txt")
    with pytest.raises(
        UserError, match=r"00001\.tar is a link out of its folder: --follow-links allows it"
    ):
        build_index(images, tmp_path / "index3")


# ---- datasets


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_shards(
        tmp_path / "set",
        "set",
        [picture_question(number) for number in range(4)],
        samples_per_shard=2,
    )
    return tmp_path / "set"


def to_link(path: Path) -> None:
    moved = path.parent.parent / f"moved-{path.name}"
    path.rename(moved)
    path.symlink_to(moved)


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [to_link, to_pipe])
@pytest.mark.parametrize("file", ["dataset.json", "set-000000.tar", "set-000000.tar.qidx"])
def test_files_of_a_dataset_are_its_own(
    file: str, damage: Callable[[Path], None], dataset: Path
) -> None:
    damage(dataset / file)
    with pytest.raises(
        (UserError, OSError), match=r"is a (link out of its folder|pipe, not a file)"
    ):
        [found.sample(0) for found in [Dataset.open(dataset, "x")]]
    if file == "dataset.json":
        with pytest.raises(UserError, match=r"is a (link out of its folder|pipe, not a file)"):
            read_manifest(dataset, "stats")
    if file.endswith(".tar"):
        with pytest.raises(UserError, match=r"is a (link out of its folder|pipe, not a file)"):
            index_folder(dataset)


def test_a_folder_that_is_a_link_and_links_inside_stay(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(dataset)
    (dataset / "set-000000.tar").rename(dataset / "real")
    (dataset / "set-000000.tar").symlink_to("real")
    assert Dataset.open(tmp_path / "link", "x").sample(0).id == "picture:0"


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "a/b.tar",
        "../set.tar",
        "/etc/passwd",
        "a\\b.tar",
        "a\nb.tar",
        "a\0.tar",
        ".hidden",
    ],
)
def test_a_manifest_names_files_of_its_own_folder(name: str, dataset: Path) -> None:
    document = json.loads((dataset / "dataset.json").read_bytes())
    document["shards"][0]["file"] = name
    (dataset / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="names a shard that is no file of its folder"):
        Dataset.open(dataset, "x")


def test_names_of_a_remote_shard_are_names_and_no_part_of_an_address() -> None:
    from visionloom.data.shards.transports import HttpTransport

    asked = []
    transport = HttpTransport("http://example.invalid/a?key=1", StoreConfig(retries=0))
    transport._pool = type(
        "Pool", (), {"request": lambda self, method, url, **words: asked.append(url) or 1 / 0}
    )()
    with pytest.raises(ZeroDivisionError):
        transport.whole("x?y#%2e%2e.tar")
    assert asked == ["http://example.invalid/a/x%3Fy%23%252e%252e.tar?key=1"]


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch {x}", "pipe://touch {x}", "file://{x}", "FILE:///etc", "local:///etc", "simplecache::file://{x}",
        "simplecache::local://{x}", "filecache::zip://a.zip::file://{x}", "zip://*::s3://a/b", "dir::file://{x}",
        "reference::http://a/b.json", "github://a:b@c/d", "git:///x", "python:os", "data:,x", "simplecache::{x}", "dask::file://{x}",
        "jupyter://x", "ssh://a/b", "smb://a/b", "generic::file://{x}", "blockcache::dirfs::file://{x}", "simplecache:file://{x}",
        "simplecache::", "simplecache::::file://{x}", "simplecache::filecache::::{x}", "simplecache::::", "simplecache::::s3://a/b",
    ],
)  # fmt: skip
def test_urls_are_unchained_and_their_schemes_are_from_a_list(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is refused: give a folder, or an http"):
        open_store(url.format(x=tmp_path / "touched"), "data.datasets.x.path", StoreConfig())
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE],
)
@pytest.mark.parametrize("name", ["000.a.png", "../000.a.png", "/000.a.png"])
def test_tar_members_that_are_no_files_or_lead_outside(
    kind: bytes, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
        body = to_json(essay(1)[0]).encode()
        info = tarfile.TarInfo("001.json")
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
    with pytest.raises(UserError, match=r"a\.tar: at byte .*is not a regular file"):
        index_folder(folder)
    assert sum(row.samples for row in index_folder(folder, skip_bad=True)) == 1


# ---- tokenizers and tables


def test_a_tokenizer_is_a_file_of_its_folder_or_of_the_hub_cache(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models--me--mine"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "abc").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    snapshot = repository / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    assert Tokenizer(str(snapshot)).fingerprint == Tokenizer(str(tokenizer_folder)).fingerprint

    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").symlink_to(tokenizer_folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"data\.tokenizer=.*is a link out of its folder"):
        Tokenizer(str(other))
    to_pipe(other / "tokenizer.json")
    with pytest.raises(UserError, match="is a pipe, not a file"):
        Tokenizer(str(other))


def test_tables_beside_a_dataset_are_not_believed(tmp_path: Path) -> None:
    good = np.zeros(3, LENGTHS)
    bad = good.copy()
    bad["tokens"][1] = -1
    for name, rows in (
        ("good", good),
        ("bad", bad),
        ("other", np.zeros(3)),
        ("square", np.zeros((3, 1), LENGTHS)),
    ):
        np.save(tmp_path / f"{name}.npy", rows)
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    os.mkfifo(tmp_path / "pipe.npy")
    found = {path.stem: load_rows(path, LENGTHS) is not None for path in tmp_path.glob("*.npy")}
    assert found == {
        "good": True,
        "bad": False,
        "other": False,
        "square": False,
        "objects": False,
        "pipe": False,
    }


@pytest.mark.parametrize("name", ["a\x1b[31m.tar", "a\n.tar", "a\\b.tar", ".a.tar"])
def test_no_index_is_made_of_shards_that_no_dataset_may_name(name: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "set", "set", [picture_question(0)], 5)
    next((tmp_path / "set").glob("*.tar")).rename(tmp_path / "set" / name)
    with pytest.raises(UserError, match=r"a shard's name may hold no .*: rename the file"):
        index_folder(tmp_path / "set")
