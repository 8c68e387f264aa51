"""Large JSON files in parts: JSON Lines by lines, an array by its elements, both cut at byte offsets.

An array of gigabytes is never in memory: the standard library's scanner reads one element after another from a buffer.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from visionloom.common.errors import UserError
from visionloom.data.convert.keys import record_json, without_nulls
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SourceRecord
from visionloom.data.convert.source_files import files_below
from visionloom.data.shards.write_parts import SourcePart

ENDINGS: Final = (".json", ".jsonl", ".ndjson")
_CHUNK: Final = 1 << 20
_LARGEST_ELEMENT: Final = 1 << 28
"""Bytes: an element of an array that does not end after so many is taken for a broken one."""
_MARK: Final = b"\xef\xbb\xbf"
_BRACKETS: Final = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)
_SPACE: Final = " \t\r\n"


@dataclass(frozen=True, slots=True)
class RecordSpan:
    """Bytes [start, end) of a JSON file, and the number of the first record in them."""

    path: str
    start: int
    end: int
    first: int
    lines: bool


def cut_json(path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
    """Parts of `size` records of all JSON files at `path`; raises UserError if there is none."""
    for file in files_below(path, ENDINGS, follow_links):
        lines = not _is_array(file)
        start = first = records = 0
        for begin, end in _line_spans(file) if lines else _element_spans(file):
            start = begin if not records else start
            records += 1
            if records == size:
                yield SourcePart(records, RecordSpan(str(file), start, end, first, lines))
                first, records = first + records, 0
            last = end
        if records:
            yield SourcePart(records, RecordSpan(str(file), start, last, first, lines))


def read_json(span: RecordSpan) -> Iterator[SourceRecord]:
    """The records of a span, without keys that are null; a line that is no JSON has a Skip for its value."""
    path = Path(span.path)
    spans = _line_spans(path, span) if span.lines else _element_spans(path, span)
    with open(path, "rb") as file:
        for number, (begin, end) in enumerate(spans, start=span.first):
            file.seek(begin)
            yield SourceRecord(f"{path.name}:{number}", _value(file.read(end - begin)))


def _value(data: bytes) -> Any:
    try:
        return without_nulls(record_json(data))
    except Skip as skip:
        return skip
    except RecursionError:
        return Skip("not valid JSON", "nested too deeply")


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(_CHUNK).removeprefix(_MARK).lstrip().startswith(b"[")


def _line_spans(path: Path, span: RecordSpan | None = None) -> Iterator[tuple[int, int]]:
    """Begin and end of every line that is not blank."""
    with open(path, "rb") as file:
        place = span.start if span else len(_MARK) * file.read(3).startswith(_MARK)
        file.seek(place)
        while span is None or place < span.end:
            line = file.readline()
            if not line:
                return
            if line.strip():
                yield place, place + len(line)
            place += len(line)


def _element_spans(path: Path, span: RecordSpan | None = None) -> Iterator[tuple[int, int]]:
    """Begin and end of every element of the array at the top."""
    with open(path, "rb") as file:
        scanner = _Scanner(path, file, span.start if span else None)
        while scanner.place < span.end if span else True:
            found = scanner.element()
            if found is None:
                return
            yield found


class _Scanner:
    """Walks over the elements of an array; the text is decoded as Latin-1, so that characters count bytes."""

    def __init__(self, path: Path, file: BinaryIO, start: int | None) -> None:
        self.path, self.file, self.text, self.at = path, file, "", 0
        self.base = start or 0
        """Offset of the text's first character in the file."""
        file.seek(self.base)
        self.decode = json.JSONDecoder(
            parse_int=str, parse_float=str
        ).raw_decode  # only its end counts, not its numbers
        if start is None:
            self._more(_CHUNK)
            self.at = self.text.index("[") + 1

    @property
    def place(self) -> int:
        return self.base + self.at

    def element(self) -> tuple[int, int] | None:
        """Begin and end of the next element; None at the array's end. Raises UserError where it is no JSON."""
        if self._skip(_SPACE + ",") == "]":
            return None
        wanted = _CHUNK
        while True:
            try:
                _, end = self.decode(self.text, self.at)
                if end < len(self.text):
                    break
                problem = "the array has no end"
            except RecursionError:  # the record will be left out, but those behind it are read
                if (found := _end_of_nested(self.text, self.at)) is not None:
                    end = found
                    break
                problem = "nested too deeply"
            except ValueError as error:
                problem = str(
                    error
                )  # the error itself would keep the text, through its frame even after this call
            if wanted > _LARGEST_ELEMENT or not self._more(wanted):
                raise UserError(
                    f"{self.path}: not valid JSON in the element at byte {self.place}: {problem}"
                )
            wanted *= 2
        begin, self.at = self.place, end
        return begin, self.place

    def _skip(self, characters: str) -> str:
        """Move to the next character that is none of these."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in characters:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more(_CHUNK):
                raise UserError(
                    f"{self.path}: not valid JSON: the array is not closed at its end, byte {self.place}"
                )

    def _more(self, size: int) -> bool:
        """Read on, and let go of what was walked over."""
        data = self.file.read(size)
        self.base, self.text, self.at = (
            self.base + self.at,
            self.text[self.at :] + data.decode("latin-1"),
            0,
        )
        return bool(data)


def _end_of_nested(text: str, at: int) -> int | None:
    """Where a list or object that begins at `at` ends, by its brackets alone; None if the text ends before."""
    depth = 0
    for found in _BRACKETS.finditer(text, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    return None
