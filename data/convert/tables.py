"""Parquet and Arrow files in parts: row groups and record batches, read a few rows at a time."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from visionloom.common.errors import UserError
from visionloom.data.convert.keys import without_nulls
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SourceRecord
from visionloom.data.convert.source_files import files_below
from visionloom.data.shards.write_parts import SourcePart

if TYPE_CHECKING:
    import pyarrow

    _Batches = tuple[int, Iterator[pyarrow.RecordBatch]]

_UNCHECKED_BYTES: Final = 64 << 20
_EXPANSION: Final = 200
"""Factor by which a column of more bytes may unfold: texts do ten times, one value a million times."""
_ROWS: Final = 64
"""Rows in memory at once."""


@dataclass(frozen=True, slots=True)
class RowRange:
    """Row groups (parquet) or record batches (arrow) [first, last) of a file, and the number of their first row."""

    path: str
    first: int
    last: int
    row: int

    def groups(self, columns: Sequence[str] | None) -> Iterator["_Batches"]:
        """Yield the number of rows of each row group or record batch, and these rows a few at a time."""
        path = Path(self.path)
        if path.suffix == ".parquet":
            yield from self._parquet_groups(path, columns)
            return
        with _open_arrow(path) as reader:
            # A stream has no index: the batches before are passed over.
            for number, batch in enumerate(reader):
                if self.first <= number < self.last:
                    starts = range(0, batch.num_rows, _ROWS)
                    yield batch.num_rows, map(batch.slice, starts, repeat(_ROWS))

    def _parquet_groups(self, path: Path, columns: Sequence[str] | None) -> Iterator["_Batches"]:
        file = _parquet(path)
        for number in range(self.first, self.last):
            group = file.metadata.row_group(number)
            _check_expansion(path, group)
            batches = file.iter_batches(batch_size=_ROWS, row_groups=[number], columns=columns)
            yield group.num_rows, batches


def require_pyarrow() -> None:
    """Raise UserError if pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        fix = "pip install visionloom[convert]"
        raise UserError(f"parquet and arrow files need pyarrow: {fix}") from None


def table_files(path: Path, endings: tuple[str, ...], follow_links: bool = False) -> list[Path]:
    """Return the file itself, or those of a folder in sorted order; raises UserError if there is none."""
    require_pyarrow()
    if path.is_file() and path.suffix not in endings:
        raise UserError(f"{path}: a file {' or '.join(endings)}, or a folder with some, expected")
    return files_below(path, endings, follow_links)


def cut_tables(files: Sequence[Path], size: int) -> Iterator[SourcePart]:
    """Yield parts of neighbouring row groups or batches of a file, of at least `size` rows where there are as many."""
    for path in files:
        first = row = records = 0
        for number, rows in enumerate(_sizes(path)):
            records += rows
            # A row group is read whole, so that it is never cut.
            if records >= size:
                yield SourcePart(records, RowRange(str(path), first, number + 1, row))
                first, row, records = number + 1, row + records, 0
        if records:
            yield SourcePart(records, RowRange(str(path), first, number + 1, row))


def read_table(where: RowRange, columns: Sequence[str] | None = None) -> Iterator[SourceRecord]:
    """Yield rows as dictionaries; only `columns` are read from parquet if given. Nulls inside of a column's values are dropped.

    A row with a text that is no UTF-8, and each row of a damaged row group, has a Skip for its value. A value that Python has
    no type for, as moments in nanoseconds, is the error that says so.
    """
    name, number = Path(where.path).name, where.row
    for rows, batches in where.groups(columns):
        end = number + rows
        try:
            for batch in batches:
                for value in _rows(batch):
                    yield SourceRecord(f"{name}:{number}", value)
                    number += 1
        except _damage() as error:
            # An error with a number is one of the disk, not of pages.
            if getattr(error, "errno", None) is not None:
                raise
            for row in range(number, end):
                yield SourceRecord(f"{name}:{row}", Skip("damaged table", str(error)))
        number = end


def _damage() -> tuple[type[Exception], ...]:
    """Return the errors of pyarrow for damaged files; its OSErrors of pages have no number."""
    import pyarrow

    return (
        pyarrow.ArrowException,
        struct.error,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        NotImplementedError,
        MemoryError,
    )


def _rows(batch: "pyarrow.RecordBatch") -> Iterator[Any]:
    """Yield the rows of a batch as dictionaries, a Skip for one that cannot be read."""
    rows: list[Any]
    try:
        # Without this, offsets that lead outside would end the process.
        batch.validate(full=True)
        rows = batch.to_pylist()
    except ValueError:
        # ArrowInvalid is one, and so is a moment that Python cannot hold.
        rows = [_row(batch.slice(row, 1)) for row in range(batch.num_rows)]
    for row in rows:
        if isinstance(row, Skip):
            yield row
        else:
            yield {name: without_nulls(value) for name, value in row.items()}


def _row(batch: "pyarrow.RecordBatch") -> dict[str, Any] | Skip:
    """Return the only row of a batch, column by column."""
    try:
        batch.validate(full=True)
    except ValueError as error:
        return Skip("no valid Unicode" if "UTF8" in str(error) else "damaged table", str(error))

    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return Skip("no valid Unicode", str(error))
        except ValueError as error:
            # Only a record whose format reads this column is left out for it.
            row[name] = error
    return row


def _sizes(path: Path) -> Iterator[int]:
    """Yield the rows of each row group or batch.

    Raises UserError for a file that cannot be read, or that claims more rows than it has bytes.
    """
    left = path.stat().st_size
    for rows in _read_sizes(path):
        # Counts come from the file: a false one would make millions of records.
        if not 0 <= rows <= left:
            fix = "write it again, or give another file"
            raise UserError(f"{path} says that it has more rows than bytes: {fix}")
        left -= rows
        yield rows


def _read_sizes(path: Path) -> Iterator[int]:
    try:
        if path.suffix == ".parquet":
            facts = _parquet(path).metadata
            for number in range(facts.num_row_groups):
                yield facts.row_group(number).num_rows
            return
        _check_unfolding(path)
        with _open_arrow(path) as reader:
            for batch in reader:
                yield batch.num_rows
    except UserError:
        raise
    except _damage() as error:
        raise UserError(f"{path} is damaged: {error}: fetch it again or remove it") from None


def _check_expansion(path: Path, group: Any) -> None:
    """Raise UserError for a row group that unfolds to many times its size."""
    for number in range(group.num_columns):
        column = group.column(number)
        packed, unfolded = column.total_compressed_size, column.total_uncompressed_size
        if unfolded > max(_UNCHECKED_BYTES, _EXPANSION * packed):
            raise UserError(
                f"{path}: column {column.path_in_schema!r} unfolds from {packed} to"
                f" {unfolded} bytes: write the file again with smaller row groups"
            )


def _check_unfolding(path: Path) -> None:
    """Raise UserError for an Arrow stream whose compressed buffers claim to unfold to many times the file's size."""
    import pyarrow

    total, size = 0, path.stat().st_size
    most = max(_UNCHECKED_BYTES, _EXPANSION * size)
    with pyarrow.memory_map(str(path)) as source:
        for message in pyarrow.ipc.MessageReader.open_stream(source):
            if message.type not in ("record batch", "dictionary"):
                continue
            total += sum(_ArrowMessage(message).unfolded_sizes())
            if total > most:
                problem = f"{path} unfolds from {size} to {total} bytes"
                raise UserError(f"{problem}: write it without compression")


class _ArrowMessage:
    """The flatbuffer of a record batch or dictionary (Arrow's Message.fbs), as far as the sizes of its buffers need it."""

    def __init__(self, message: Any) -> None:
        self.is_dictionary = message.type == "dictionary"
        self.head, self.body = memoryview(message.metadata), memoryview(message.body)

    def unfolded_sizes(self) -> Iterator[int]:
        """Yield the true sizes, in bytes, of the compressed buffers.

        A compressed buffer begins with its true size (int64), -1 if it is stored as it is.
        """
        batch = self._target(self._field(self._target(0), 2))
        if self.is_dictionary:
            batch = self._target(self._field(batch, 1))
        # Field 3 is the compression; without one the sizes are those in the file.
        if not self._field(batch, 3):
            return

        buffers = self._target(self._field(batch, 2))
        for number in range(self._number("<I", buffers)):
            place = buffers + 4 + 16 * number
            start, length = struct.unpack_from("<qq", self.head, place)
            if length >= 8:
                (size,) = struct.unpack_from("<q", self.body, start)
                yield max(0, size)

    def _field(self, table: int, number: int) -> int:
        """Return the place of a table's field, 0 if the table lacks it."""
        layout = table - self._number("<i", table)
        # The layout's own size and the table's come first.
        place = 4 + 2 * number
        if place >= self._number("<H", layout):
            return 0
        offset = self._number("<H", layout + place)
        return table + offset if offset else 0

    def _target(self, place: int) -> int:
        """Return the place to which the offset at `place` leads."""
        return place + self._number("<I", place)

    def _number(self, layout: str, place: int) -> int:
        return int(struct.unpack_from(layout, self.head, place)[0])


def _parquet(path: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except _damage() as error:
        raise UserError(f"{path} is no parquet file that can be read: {error}") from None


def _open_arrow(path: Path) -> Any:
    """Open a stream of record batches, as Hugging Face datasets save it, mapped into memory."""
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    except _damage() as error:
        raise UserError(f"{path} is no Arrow stream that can be read: {error}") from None
