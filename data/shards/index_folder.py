"""Indexing a folder of shards made elsewhere: in parallel, continued where it stopped, dataset.json last."""

import json
from functools import partial
from pathlib import Path
from typing import Final

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.places import PlaceError, locate
from visionloom.common.processes import in_order
from visionloom.common.progress import Progress
from visionloom.data.shards.index import NoSamples, index_shard, known_shard
from visionloom.data.shards.manifest import ShardInfo, is_shard_name, write_manifest
from visionloom.data.shards.store import MEND
from visionloom.data.shards.tar import Fault

LEFT_OUT: Final = "left_out.jsonl"
"""File next to dataset.json with what `skip_bad` left out: shard, offset, key and error of each."""


def index_folder(
    folder: Path,
    workers: int = 1,
    force: bool = False,
    skip_bad: bool = False,
    done: Progress = lambda done, total: None,
) -> list[ShardInfo]:
    """Index all tar files of a folder by `workers` processes and write dataset.json.

    A shard whose index still fits is not read again unless `force`. Raises UserError (one line: file, offset, what is
    wrong) at the first fault; with `skip_bad` the samples at fault are left out and written to LEFT_OUT.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    # All names are checked before hours of reading begin.
    paths = [_located(folder, path.name) for path in sorted(folder.glob("*.tar"))]
    if not paths:
        raise UserError(f"{folder} has no .tar files to index")

    rows: list[ShardInfo] = []
    faults: list[Fault] = []
    index = partial(_index, force=force, skip_bad=skip_bad)
    for number, (row, shard_faults) in enumerate(in_order(index, paths, workers), start=1):
        if row is not None:
            rows.append(row)
        faults += shard_faults
        done(number, len(paths))
    # The first fault stands for all: they are often of one kind.
    if not rows:
        raise UserError(f"{folder}: no sample of its {len(paths)} shards can be used: {faults[0]}")
    _write_left_out(folder, faults)
    write_manifest(folder, rows)
    return rows


def _located(folder: Path, name: str) -> Path:
    """Return the path of a shard of the folder; raises UserError for what is none, rather than leave it out unseen."""
    if not is_shard_name(name):
        raise UserError(
            f"{folder / name}: a shard's name may hold no \\, no control character, nothing but Unicode, and not begin with a dot:"
            " rename the file"
        )
    try:
        return locate(folder, name)
    except PlaceError as error:
        raise UserError(f"{folder / name} {error}: {MEND}") from None


def _index(path: Path, force: bool, skip_bad: bool) -> tuple[ShardInfo | None, list[Fault]]:
    """Return a shard's row, None if no sample of it can be used, and what was left out of it."""
    row = None if force else known_shard(path)
    # An index that lacks samples is good only for one who accepts that.
    if row is None or (row.statistics.left_out and not skip_bad):
        try:
            row = index_shard(path, skip_bad)
        except NoSamples as error:
            if not error.faults:
                raise
            return None, error.faults
    left_out = row.statistics.left_out
    return row, [Fault(str(path), offset, key, error) for offset, key, error in left_out]


def _write_left_out(folder: Path, faults: list[Fault]) -> None:
    """Write LEFT_OUT, one JSON object a line; remove an old one if there is nothing to say."""
    if not faults:
        (folder / LEFT_OUT).unlink(missing_ok=True)
        return
    with replacing(folder / LEFT_OUT) as file:
        for fault in faults:
            place = {"shard": Path(fault.file).name, "offset": fault.offset}
            row = {**place, "key": fault.key, "error": fault.error}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
