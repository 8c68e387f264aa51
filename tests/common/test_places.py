"""Names that lead outside, and to what is no file. Reference: what the operating system itself opens at each name."""

import os
from pathlib import Path

import pytest

from visionloom.common.places import PlaceError, locate, read_located, regular_files, roots


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("s")
    inside = tmp_path / "data"
    (inside / "sub").mkdir(parents=True)
    (inside / "sub" / "a").write_text("abc")
    (inside / "inner").symlink_to("sub/a")
    (inside / "folder_link").symlink_to("sub")
    (inside / "outer").symlink_to("../secret")
    (inside / "outer_folder").symlink_to("..")
    (inside / "absolute").symlink_to(tmp_path / "secret")
    (inside / "circle").symlink_to("circle")
    (inside / "nothing").symlink_to("gone")
    os.mkfifo(inside / "pipe")
    return inside


@pytest.mark.parametrize("name", ["sub/a", "inner", "folder_link/a", "./sub//a"])
def test_what_lies_inside_is_found(folder: Path, name: str) -> None:
    assert locate(folder, name).read_text() == "abc"
    assert locate(folder, str(folder / name)).read_text() == "abc", "as an absolute name too"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../secret", "with .."),
        ("sub/../../secret", "with .."),
        ("sub/../sub/a", "with .."),
        ("/etc/passwd", "leads out of its folder"),
        ("outer", "is a link out"),
        ("outer_folder/secret", "is a link out"),
        ("absolute", "is a link out"),
        ("circle", "leads to itself|to nothing"),
        ("nothing", "is a link to nothing"),
        ("pipe", "is a pipe, not a file"),
        ("sub", "is a folder, not a file"),
        ("", "not a file name"),
        ("sub/a\0", "zero byte"),
        ("a" * 300, "too long"),
        ("a/" * 3000, "too long"),
        ("\ud800", "no valid Unicode"),
    ],
)
def test_what_does_not_is_refused(folder: Path, name: str, why: str) -> None:
    with pytest.raises(PlaceError, match=why):
        locate(folder, name)


def test_what_is_not_there(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        locate(folder, "sub/b")


def test_the_user_may_let_links_lead_outside(folder: Path) -> None:
    assert locate(folder, "outer", follow_links=True).read_text() == "s"
    with pytest.raises(PlaceError):
        locate(folder, "../secret", follow_links=True)


def test_a_folder_reached_by_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert locate(tmp_path / "link", "sub/a").read_text() == "abc"
    assert locate(tmp_path / "link", "folder_link", "folder").is_dir()


def test_snapshots_of_the_hub_are_links_to_their_blobs(tmp_path: Path) -> None:
    """As huggingface_hub lays out its cache: models--NAME/{blobs,snapshots/REVISION}."""
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "0f",
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "12").write_text("{}")
    (tmp_path / "secret").write_text("s")
    (snapshot / "config.json").symlink_to("../../blobs/12")
    (snapshot / "other").symlink_to("../../../secret")
    assert locate(snapshot, "config.json").read_text() == "{}"
    assert roots(snapshot) == (snapshot, blobs)
    with pytest.raises(PlaceError):
        locate(snapshot, "other")


def test_reading_is_bounded(folder: Path) -> None:
    assert read_located(folder, "sub/a", 3) == b"abc"
    with pytest.raises(PlaceError, match="larger than 2 bytes"):
        read_located(folder, "sub/a", 2)


def test_only_regular_files_are_listed(folder: Path) -> None:
    assert [path.name for path in regular_files(folder)] == ["inner"]
    assert [path.name for path in regular_files(folder, "*/*")] == ["a", "a"]


def test_reading_takes_no_more_memory_than_the_file(folder: Path) -> None:
    """Python's read(n) allocates n bytes at once: gigabytes for a file of three."""
    import tracemalloc

    tracemalloc.start()
    assert read_located(folder, "sub/a", 1 << 40) == b"abc"
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
