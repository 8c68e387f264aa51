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
"""A fault of a member, as in quarantine.jsonl: shard, key, member, offset, error, crc32."""
JOURNAL: Final = ".unfinished"
"""Ending of the file that keeps the results of finished shards until all are finished."""


def verify_dataset(
    path: str,
    out: Path,
    decode: bool = False,
    workers: int = 1,
    done: Progress = lambda done, total: None,
) -> list[Bad]:
    """Check all members of a dataset by `workers` processes, and write their faults to `out` as JSON lines.

    Interrupted, the next call continues after the last finished shard, unless the shard's index or `decode` changed. Raises
    UserError if the dataset cannot be opened, OSError (StoreError) if its store cannot be read.
    """
    dataset = Dataset.open(path, "verify")
    counts = [shard.samples for shard in dataset.shards]
    spans = list(pairwise(accumulate(counts, initial=0)))
    names = [json.dumps([shard.file, shard.sha256, decode]) for shard in dataset.shards]

    journal = _Journal(out.with_name(out.name + JOURNAL), names)
    coming = [number for number, name in enumerate(names) if name not in journal.results]
    counted = len(dataset) - sum(counts[number] for number in coming)
    verify = partial(_verify_shard, path, decode)
    verified = in_order(verify, [spans[number] for number in coming], workers)
    for number, bad in zip(coming, verified, strict=True):
        journal.add(names[number], bad)
        counted += counts[number]
        done(counted, len(dataset))

    everything = [fault for name in names for fault in journal.results[name]]
    with replacing(out) as target:
        for fault in everything:
            target.write((json.dumps(fault, ensure_ascii=False) + "\n").encode())
    journal.path.unlink()
    return everything


class _Journal:
    """Results of the shards that are finished, kept in a file by their names until all are."""

    def __init__(self, path: Path, names: list[str]) -> None:
        """Read the results of an interrupted run; those of other names, of an older index, are left."""
        self.path = path
        # Where nothing can be written, nothing need be read.
        path.touch()
        self.results: dict[str, list[Bad]] = {}
        for line in self._complete_lines():
            # A line of another program: that shard is read again.
            with suppress(JsonError):
                document = load_json(line, str(path))
                name, bad = checked(document, tuple[str, list[Bad]], str(path))
                if name in names:
                    self.results[name] = bad

    def _complete_lines(self) -> list[str]:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        complete = [line for line in lines if line.endswith("\n")]
        # A last line cut short would swallow the next one.
        self.path.write_text("".join(complete), encoding="utf-8")
        return complete

    def add(self, name: str, bad: list[Bad]) -> None:
        """Keep the result of a shard: an interruption loses the shards under way, and no others."""
        self.results[name] = bad
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([name, bad], ensure_ascii=False) + "\n")


def _verify_shard(path: str, decode: bool, span: tuple[int, int]) -> list[Bad]:
    """Return the faults of the samples [start, end)."""
    dataset = Dataset.open(path, "verify")
    faults: list[Bad] = []
    for index in range(*span):
        faults += _verify_sample(dataset, index, decode)
    return faults


def _verify_sample(dataset: Dataset, index: int, decode: bool) -> Iterator[Bad]:
    """Yield the faults of a sample's JSON and of its members."""
    declared: dict[str, MediaFacts] = {}
    try:
        declared = dict(declared_media(dataset.sample(index)))
    except SampleError as error:
        yield _bad(dataset, index, "", error.problem)

    for name in dataset.media(index):
        try:
            data = dataset.member(index, name)
        except SampleError as error:
            yield _bad(dataset, index, name, error.problem)
            continue
        problem = _problem(name, data, declared[name], decode) if name in declared else ""
        if problem:
            yield _bad(dataset, index, name, problem)


def _bad(dataset: Dataset, index: int, ref: str, problem: str) -> Bad:
    place = dataset.location(index, ref)
    return {
        "shard": place.shard,
        "key": place.key,
        "member": ref or "json",
        "offset": place.offset,
        "error": problem,
        "crc32": f"{place.crc32:08x}",
    }


def _problem(name: str, data: bytes, declared: MediaFacts, decode: bool) -> str:
    """Return the fault of a member's bytes, as a sentence; empty if there is none."""
    try:
        header = probe(name, data)
    except ValueError as error:
        return str(error)
    # Kinds follow from the endings of names.
    if header.kind != declared.kind:
        return f"its name says {header.kind}, the sample says {declared.kind}"
    problem = difference(declared, header)
    if problem or not decode:
        return problem
    if declared.kind == "image":
        return _decode_picture(name, data, declared)
    return _decode_video(data, declared)


def _decode_picture(name: str, data: bytes, declared: MediaFacts) -> str:
    # Imports torch, which takes seconds.
    from visionloom.data.encode.image import decode_image

    try:
        decode_image(data, (declared.height, declared.width), "", name)
    except SampleError as error:
        return error.problem
    return ""


def _decode_video(data: bytes, declared: MediaFacts) -> str:
    try:
        with open_video(data) as container:
            # Before decoding: a small file may claim days of it.
            check_work(declared.frames, declared.width, declared.height, len(data))
            frames = sum(not frame.is_corrupt for frame in container.decode(video=0))
    except MediaError as error:
        return f"cannot be decoded: {error.detail}"
    if frames != declared.frames:
        return f"{frames} frames can be decoded, the sample says {declared.frames}"
    return ""
