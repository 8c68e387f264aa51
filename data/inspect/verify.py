"""Every byte of a dataset checked: CRC-32, schema, headers against what samples say, and with `decode` every pixel."""

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

from visionloom.common.atomic import replacing
from visionloom.common.jsonfile import JsonError, checked, load_json
from visionloom.common.processes import in_order
from visionloom.common.progress import Progress
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.index import declared_media, difference
from visionloom.data.shards.media_header import MediaFacts, probe
from visionloom.data.shards.open_media import MediaError, check_work, open_video
from visionloom.data.shards.sample import SampleError

Bad = dict[str, Any]
"""What is wrong with a member, as in quarantine.jsonl: shard, key, member, offset, error, crc32."""
JOURNAL: Final = ".unfinished"
"""Ending of the file that keeps the results of the shards that are done, until all are."""


def verify_dataset(
    path: str,
    out: Path,
    decode: bool = False,
    workers: int = 1,
    done: Progress = lambda done, total: None,
) -> list[Bad]:
    """Check all members of a dataset by `workers` processes, and write what is wrong to `out` as JSON lines.

    Interrupted, the next call goes on behind the last finished shard, unless the shard's index or `decode` changed. Raises
    UserError if the dataset cannot be opened, OSError (StoreError) if its store cannot be read.
    """
    dataset = Dataset.open(path, "verify")
    spans = list(pairwise(accumulate((shard.samples for shard in dataset.shards), initial=0)))
    names = [json.dumps([shard.file, shard.sha256, decode]) for shard in dataset.shards]
    journal = out.with_name(out.name + JOURNAL)
    found = _read_journal(journal, names)
    coming = [number for number, name in enumerate(names) if name not in found]
    counted = len(dataset) - sum(dataset.shards[number].samples for number in coming)
    results = in_order(
        partial(_verify_shard, path, decode), [spans[number] for number in coming], workers
    )
    with open(journal, "a", encoding="utf-8") as file:
        for number, bad in zip(coming, results, strict=True):
            found[names[number]] = bad
            file.write(json.dumps([names[number], bad], ensure_ascii=False) + "\n")
            file.flush()
            counted += dataset.shards[number].samples
            done(counted, len(dataset))
    everything = [bad for name in names for bad in found[name]]
    with replacing(out) as target:
        target.writelines(
            (json.dumps(bad, ensure_ascii=False) + "\n").encode() for bad in everything
        )
    journal.unlink()
    return everything


def _read_journal(path: Path, names: list[str]) -> dict[str, list[Bad]]:
    if not path.exists():
        return {}
    complete = [
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]
    path.write_text(
        "".join(complete), encoding="utf-8"
    )  # a last line cut short would swallow the next one
    found = dict[str, list[Bad]]()
    for line in complete:
        with suppress(JsonError):  # of another program: that shard is read again
            name, bad = checked(load_json(line, str(path)), tuple[str, list[Bad]], str(path))
            found |= {name: bad} if name in names else {}
    return found


def _verify_shard(path: str, decode: bool, span: tuple[int, int]) -> list[Bad]:
    dataset = Dataset.open(path, "verify")
    return [bad for index in range(*span) for bad in _verify_sample(dataset, index, decode)]


def _verify_sample(dataset: Dataset, index: int, decode: bool) -> Iterator[Bad]:
    try:
        declared = dict(declared_media(dataset.sample(index)))
    except SampleError as error:
        declared = {}
        yield _bad(dataset, index, "", error.problem)
    for name in dataset.media(index):
        try:
            data = dataset.member(index, name)
        except SampleError as error:
            yield _bad(dataset, index, name, error.problem)
            continue
        if name in declared and (problem := _problem(name, data, declared[name], decode)):
            yield _bad(dataset, index, name, problem)


def _bad(dataset: Dataset, index: int, ref: str, problem: str) -> Bad:
    place = dataset.location(index, ref)
    facts = {
        "shard": place.shard,
        "key": place.key,
        "member": ref or "json",
        "offset": place.offset,
    }
    return {**facts, "error": problem, "crc32": f"{place.crc32:08x}"}


def _problem(name: str, data: bytes, declared: MediaFacts, decode: bool) -> str:
    try:
        found = probe(name, data)
    except ValueError as error:
        return str(error)
    if found.kind != declared.kind:
        return f"its name says {found.kind}, the sample says {declared.kind}"
    if problem := difference(declared, found):
        return problem
    if not decode:
        return ""
    return (
        _decode_picture(name, data, declared)
        if declared.kind == "image"
        else _decode_video(data, declared)
    )


def _decode_picture(name: str, data: bytes, declared: MediaFacts) -> str:
    from visionloom.data.encode.image import decode_image  # imports torch

    try:
        decode_image(data, (declared.height, declared.width), "", name)
    except SampleError as error:
        return error.problem
    return ""


def _decode_video(data: bytes, declared: MediaFacts) -> str:
    try:
        with open_video(data) as container:
            check_work(declared.frames, declared.width, declared.height, len(data))
            frames = sum(not frame.is_corrupt for frame in container.decode(video=0))
    except MediaError as error:
        return f"cannot be decoded: {error.detail}"
    return (
        ""
        if frames == declared.frames
        else f"{frames} frames can be decoded, the sample says {declared.frames}"
    )
