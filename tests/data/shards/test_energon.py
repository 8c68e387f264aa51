"""The export keeps to megatron-energon's format on disk. Reference: Python's tarfile, as energon's own index pass uses it.

That megatron-energon 7.4.1 opens it and reads all samples was tried by hand (docs/data.md): it is no dependency of ours.
"""

import io
import json
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from visionloom.common.errors import UserError
from visionloom.data.shards.energon import export_energon
from visionloom.data.shards.index_folder import index_folder
from visionloom.data.shards.write import write_shards
from visionloom.tests.data.samples import essay, film, picture_question


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pairs = [*map(picture_question, range(7)), *map(film, range(3)), *map(essay, range(5))]
    write_shards(tmp_path / "set", "set", pairs, 4)
    return tmp_path / "set"


def test_the_files_are_those_of_the_format(folder: Path) -> None:
    parts = export_energon(folder)
    names = [f"set-00000{number}.tar" for number in range(4)]
    assert parts == {"train": names, "val": [], "test": []}
    info = json.loads((folder / ".nv-meta" / ".info.json").read_text())
    assert info["shard_counts"] == dict(zip(names, [4, 4, 4, 3], strict=True))
    split = yaml.safe_load((folder / ".nv-meta" / "split.yaml").read_text())
    assert split == {"exclude": [], "split_parts": parts}
    dataset = yaml.safe_load((folder / ".nv-meta" / "dataset.yaml").read_text())
    assert dataset == {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}


def test_offsets_are_those_of_the_first_members(folder: Path) -> None:
    export_energon(folder)
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            firsts = [member.offset for member in tar if member.name.endswith(".json")]
            expected = [*firsts, tar.offset]
        assert np.fromfile(path.with_name(path.name + ".idx"), "<u8").tolist() == expected


def test_offsets_cut_a_shard_into_its_samples(folder: Path) -> None:
    export_energon(folder)
    for path in folder.glob("*.tar"):
        offsets = np.fromfile(path.with_name(path.name + ".idx"), "<u8").tolist()
        with tarfile.open(path) as tar:
            everything = [(member.name, member.size) for member in tar]
        data, found = path.read_bytes(), list[tuple[str, int]]()
        for start, end in pairwise(offsets):
            with tarfile.open(fileobj=io.BytesIO(data[start:end] + bytes(1024))) as part:
                members = [(member.name, member.size) for member in part]
            assert len({name.split(".")[0] for name, _ in members}) == 1
            found += members
        assert found == everything
        assert not any(data[offsets[-1] :]), "the last offset is where the zero blocks begin"


def test_shards_are_dealt_to_splits(folder: Path) -> None:
    parts = export_energon(folder, {"train": 3, "val": 1})
    assert [len(files) for files in parts.values()] == [3, 1]
    with pytest.raises(UserError, match="split val would hold none of the 4 shards"):
        export_energon(folder, {"train": 0.99, "val": 0.01})


def test_what_energon_would_read_too_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no dataset\.json"):
        export_energon(tmp_path)
    with tarfile.open(folder / "set-000000.tar", "a") as tar:
        info = tarfile.TarInfo("extra.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    index_folder(folder, skip_bad=True)
    with pytest.raises(UserError, match="energon would read the 1 bad samples that were left out"):
        export_energon(folder)
