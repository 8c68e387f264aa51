"""Metadata that lets megatron-energon read the same shards: nothing of the shards themselves is changed or copied.

Written by its published on-disk format (Megatron-Energon 7, "Dataset Format on Disk"): `.nv-meta/` with `.info.json`,
`dataset.yaml`, `split.yaml`, and a `.tar.idx` next to each shard with the byte offset of each sample and of the end.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.progress import Progress
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.shard_index import ShardIndex
from visionloom.data.shards.tar import BLOCK

FOLDER: Final = ".nv-meta"
MADE_FOR: Final = "7.4.1"
"""Version of megatron-energon that the export was tried with."""
_DATASET: Final = """\
# Written by visionloom: samples are raw dictionaries (json, img0.jpg, ...) for a cooker of your task encoder.
__module__: megatron.energon
__class__: CrudeWebdataset
"""


def export_energon(
    folder: Path,
    splits: Mapping[str, float] | None = None,
    done: Progress = lambda done, total: None,
) -> dict[str, list[str]]:
    """Write energon's metadata into a dataset's folder and return the shards of each split.

    `splits` maps names to shares of the shards, in order (default: all to `train`). Raises UserError if the folder is no
    dataset, a split would be empty, or samples were left out of the index, which energon would read all the same.
    """
    # Opening checks the shards' sizes against dataset.json.
    dataset = Dataset.open(folder, "export-energon")
    shards = dataset.shards
    for number, shard in enumerate(shards):
        _write_offsets(folder / shard.file, dataset.index(number))
        done(number + 1, len(shards))
    # energon wants all three names, if only to find two of them empty.
    splits = splits or {"train": 1.0, "val": 0.0, "test": 0.0}
    parts = _split([shard.file for shard in shards], splits)

    counts = {shard.file: shard.samples for shard in shards}
    info = {"energon_version": MADE_FOR, "shard_counts": counts}
    # JSON strings and lists are YAML.
    lines = [f"  {name}: {json.dumps(files)}\n" for name, files in parts.items()]

    meta = folder / FOLDER
    meta.mkdir(exist_ok=True)
    _write_text(meta / ".info.json", json.dumps(info, indent=1) + "\n")
    _write_text(meta / "dataset.yaml", _DATASET)
    _write_text(meta / "split.yaml", "exclude: []\nsplit_parts:\n" + "".join(lines))
    return parts


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _write_offsets(path: Path, index: ShardIndex) -> None:
    """Write `<shard>.tar.idx`: little-endian u64 offsets of each sample's first header, and of the last sample's end."""
    left_out = len(index.statistics.left_out)
    if left_out:
        raise UserError(
            f"{path}: energon would read the {left_out} bad samples that were left out of its index: write the shard again"
            " (python launch/data.py convert webdataset ...)"
        )

    # Members are padded to whole blocks: there the next sample begins.
    ends = -(-index.ends // BLOCK) * BLOCK
    offsets = np.concatenate([np.zeros(1, np.int64), ends])
    with replacing(path.with_name(path.name + ".idx")) as file:
        file.write(offsets.astype("<u8").tobytes())


def _split(files: list[str], shares: Mapping[str, float]) -> dict[str, list[str]]:
    """Cut the shards, in order, into parts by their shares; raises UserError for a part without any."""
    sums = np.cumsum([0.0, *shares.values()])
    borders = np.rint(sums / sums[-1] * len(files))
    places = borders.astype(int).tolist()

    parts: dict[str, list[str]] = {}
    for name, (start, end) in zip(shares, pairwise(places), strict=True):
        parts[name] = files[start:end]
        if shares[name] and not parts[name]:
            problem = f"would hold none of the {len(files)} shards"
            raise UserError(f"split {name} {problem}: make its share larger")
    return parts
