"""Metadata that lets megatron-energon read the same shards: nothing of the shards themselves is changed or copied.

Written by its published on-disk format (Megatron-Energon 7, "Dataset Format on Disk"): `.nv-meta/` with `.info.json`,
`dataset.yaml`, `split.yaml`, and a `.tar.idx` beside each shard with the byte offset of each sample and of the end.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.progress import Progress
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.index import ShardIndex
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
    dataset = Dataset.open(folder, "export-energon")
    shards = dataset.shards
    for number, shard in enumerate(shards):
        _write_offsets(folder / shard.file, dataset.index(number))
        done(number + 1, len(shards))
    parts = _split(
        [shard.file for shard in shards], splits or {"train": 1.0, "val": 0.0, "test": 0.0}
    )
    meta = folder / FOLDER
    meta.mkdir(exist_ok=True)
    info = {
        "energon_version": MADE_FOR,
        "shard_counts": {shard.file: shard.samples for shard in shards},
    }
    files = {
        ".info.json": json.dumps(info, indent=1) + "\n",
        "dataset.yaml": _DATASET,
        "split.yaml": _split_yaml(parts),
    }
    for name, text in files.items():
        with replacing(meta / name) as file:
            file.write(text.encode())
    return parts


def _write_offsets(path: Path, index: ShardIndex) -> None:
    """`<shard>.tar.idx`: little-endian u64 offsets of where the samples' headers begin, and of the end of the last sample."""
    if left_out := len(index.statistics.left_out):
        raise UserError(
            f"{path}: energon would read the {left_out} bad samples that were left out of its index: write the shard again"
            " (python launch/data.py convert webdataset ...)"
        )
    ends = -(-index.ends // BLOCK) * BLOCK
    with replacing(path.with_name(path.name + ".idx")) as file:
        file.write(np.array([0, *ends.tolist()], "<u8").tobytes())


def _split(files: list[str], shares: Mapping[str, float]) -> dict[str, list[str]]:
    borders = np.cumsum([0.0, *shares.values()]) / sum(shares.values()) * len(files)
    places = np.rint(borders).astype(int).tolist()
    parts = {
        name: files[start:end] for name, start, end in zip(shares, places, places[1:], strict=False)
    }
    if empty := [name for name, share in shares.items() if share and not parts[name]]:
        raise UserError(
            f"split {empty[0]} would hold none of the {len(files)} shards: make its share larger"
        )
    return parts


def _split_yaml(parts: Mapping[str, list[str]]) -> str:
    """JSON strings and lists are YAML."""
    lines = [f"  {name}: {json.dumps(files)}" for name, files in parts.items()]
    return "exclude: []\nsplit_parts:\n" + "\n".join(lines) + "\n"
