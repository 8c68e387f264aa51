"""Converts small sources in a temporary folder, for the tests of converters."""

import json
from pathlib import Path
from typing import Any

from visionloom.data.convert.run import Request, convert
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Sample
from visionloom.data.shards.write import ShardLimits
from visionloom.data.shards.write_parts import Target

Counts = dict[str, int]


class Run:
    """Converts a source in a temporary folder and reads the result."""

    def __init__(self, folder: Path) -> None:
        self.source, self.folder = folder / "source", folder / "set"
        self.source.mkdir()

    def put(self, name: str, data: bytes | str) -> Path:
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def lines(self, *records: object) -> Path:
        return self.put("records.jsonl", "\n".join(json.dumps(record) for record in records))

    def __call__(self, kind: str, path: Path, samples: int = 10_000, **words: Any) -> list[Sample]:
        target = Target(self.folder, "set", ShardLimits(samples), 1)
        self.tally = convert(Request(kind, path, **words), target, lambda done, total: None)
        self.counts: Counts = dict(self.tally.counts)
        self.dataset = Dataset.open(self.folder, "set")
        return [self.dataset.sample(index) for index in range(len(self.dataset))]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        found = [
            json.loads(line) for line in (self.folder / "skipped.jsonl").read_text().splitlines()
        ]
        return [(record["record"], record["reason"]) for record in found]
