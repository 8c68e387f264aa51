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
"""Bytes after which an element of an array that has not ended is taken for a broken one."""
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


class JsonSource:
    """What formats of JSON files share: how a source is cut and read; `convert` is their own."""

    def parts(self, path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
        """Yield byte ranges of the JSON files."""
        return cut_json(path, size, follow_links)

    def records(self, where: RecordSpan) -> Iterator[SourceRecord]:
        """Yield one JSON object after another."""
        return read_json(where)


def cut_json(path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
    """Yield parts of `size` records of all JSON files at `path`; raises UserError if there is no file."""
    for file in files_below(path, ENDINGS, follow_links):
        lines = not _is_array(file)
        start = first = records = 0
        for begin, end in _line_spans(file) if lines else _element_spans(file):
            if not records:
                start = begin
            records += 1
            if records == size:
                yield SourcePart(records, RecordSpan(str(file), start, end, first, lines))
                first, records = first + records, 0
            last = end
        if records:
            yield SourcePart(records, RecordSpan(str(file), start, last, first, lines))


def read_json(span: RecordSpan) -> Iterator[SourceRecord]:
    """Yield the records of a span, without keys that are null; a line that is no JSON has a Skip for its value."""
    path = Path(span.path)
    spans = _line_spans(path, span) if span.lines else _element_spans(path, span)
    with open(path, "rb") as file:
        for number, (begin, end) in enumerate(spans, start=span.first):
            # Spans leave out blanks and commas between records.
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
        start = file.read(_CHUNK).removeprefix(_MARK)
    return start.lstrip().startswith(b"[")


def _line_spans(path: Path, span: RecordSpan | None = None) -> Iterator[tuple[int, int]]:
    """Yield begin and end of every line that is not blank."""
    with open(path, "rb") as file:
        has_mark = file.read(len(_MARK)) == _MARK
        place = span.start if span else len(_MARK) * has_mark
        file.seek(place)
        while span is None or place < span.end:
            line = file.readline()
            if not line:
                return
            if line.strip():
                yield place, place + len(line)
            place += len(line)


def _element_spans(path: Path, span: RecordSpan | None = None) -> Iterator[tuple[int, int]]:
    """Yield begin and end of every element of the array at the top."""
    with open(path, "rb") as file:
        scanner = _Scanner(path, file, span.start if span else None)
        while span is None or scanner.place < span.end:
            place = scanner.element()
            if place is None:
                return
            yield place


class _Scanner:
    """Walks over the elements of an array; the text is decoded as Latin-1, so that characters count bytes."""

    def __init__(self, path: Path, file: BinaryIO, start: int | None) -> None:
        self.path, self.file, self.text, self.at = path, file, "", 0
        self.base = start or 0
        """Offset of the text's first character in the file."""
        file.seek(self.base)
        # Only the end of an element counts, not its numbers.
        self.decode = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode
        # A later part begins at an element, the first one before the bracket.
        if start is None:
            self._more(_CHUNK)
            self.at = self.text.index("[") + 1

    @property
    def place(self) -> int:
        return self.base + self.at

    def element(self) -> tuple[int, int] | None:
        """Return begin and end of the next element; None at the array's end. Raises UserError where it is no JSON."""
        if self._skip(_SPACE + ",") == "]":
            return None
        wanted = _CHUNK
        while True:
            end, problem = self._end()
            if end is not None:
                break
            if wanted > _LARGEST_ELEMENT or not self._more(wanted):
                place = f"not valid JSON in the element at byte {self.place}"
                raise UserError(f"{self.path}: {place}: {problem}")
            # Twice as much each time: a long element is not begun again at each chunk.
            wanted *= 2
        begin, self.at = self.place, end
        return begin, self.place

    def _end(self) -> tuple[int | None, str]:
        """Return the end of the element in the text, or None and the reason that the text has none."""
        try:
            _, end = self.decode(self.text, self.at)
        except RecursionError:
            # The record will be left out, but those after it are read.
            return self._end_of_nested(), "nested too deeply"
        except ValueError as error:
            # The error itself would keep the text, through its frame, even after this call.
            return None, str(error)
        # A number at the end of the text may have more digits.
        return (end, "") if end < len(self.text) else (None, "the array has no end")

    def _skip(self, characters: str) -> str:
        """Move to the next character that is none of these."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in characters:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more(_CHUNK):
                problem = f"the array is not closed at its end, byte {self.place}"
                raise UserError(f"{self.path}: not valid JSON: {problem}")

    def _more(self, size: int) -> bool:
        """Read more, and let go of the elements before; return False at the end of the file."""
        data = self.file.read(size)
        self.base += self.at
        self.text = self.text[self.at :] + data.decode("latin-1")
        self.at = 0
        return bool(data)

    def _end_of_nested(self) -> int | None:
        """Return the end of a list or object that begins here, by its brackets alone; None if the text ends before."""
        depth = 0
        for match in _BRACKETS.finditer(self.text, self.at):
            # Texts match too, so that their brackets do not.
            if match[0] in "[{":
                depth += 1
            elif match[0] in "]}":
                depth -= 1
            if depth == 0:
                return match.end()
        return None
