"""Parquet and Arrow files in parts: row groups and record batches, read a few rows at a time."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

_UNCHECKED_BYTES: Final = 64 << 20
_EXPANSION: Final = 200
"""How many times its size a column of more bytes may unfold to: texts do ten times, one value a million times."""
_ROWS: Final = 64
"""Rows in memory at once."""


@dataclass(frozen=True, slots=True)
class RowRange:
    """Row groups (parquet) or record batches (arrow) [first, last) of a file, and the number of their first row."""

    path: str
    first: int
    last: int
    row: int


def require_pyarrow() -> None:
    """Raise UserError if pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(
            "parquet and arrow files need pyarrow: pip install visionloom[convert]"
        ) from None


def table_files(path: Path, endings: tuple[str, ...], follow_links: bool = False) -> list[Path]:
    """The file itself, or those of a folder in sorted order; raises UserError if there is none."""
    require_pyarrow()
    if path.is_file() and path.suffix not in endings:
        raise UserError(f"{path}: a file {' or '.join(endings)}, or a folder with some, expected")
    return files_below(path, endings, follow_links)


def cut_tables(files: Sequence[Path], size: int) -> Iterator[SourcePart]:
    """Parts of neighbouring row groups or batches of a file, of at least `size` rows where there are as many."""
    for path in files:
        first = row = records = 0
        for number, rows in enumerate(_sizes(path)):
            records += rows
            if records >= size:
                yield SourcePart(records, RowRange(str(path), first, number + 1, row))
                first, row, records = number + 1, row + records, 0
        if records:
            yield SourcePart(records, RowRange(str(path), first, number + 1, row))


def read_table(where: RowRange, columns: Sequence[str] | None = None) -> Iterator[SourceRecord]:
    """Rows as dictionaries; only `columns` are read from parquet if given. Nulls inside of a column's values are dropped.

    A row with a text that is no UTF-8, and each row of a damaged row group, has a Skip for its value. A value that Python has
    no type for, as moments in nanoseconds, is the error that says so.
    """
    path, number = Path(where.path), where.row
    for rows, batches in _groups(where, columns):
        end = number + rows
        try:
            for batch in batches:
                for value in _rows(batch):
                    yield SourceRecord(f"{path.name}:{number}", value)
                    number += 1
        except _damage() as error:
            if getattr(error, "errno", None) is not None:  # of the disk, not of pages
                raise
            yield from (
                SourceRecord(f"{path.name}:{row}", Skip("damaged table", str(error)))
                for row in range(number, end)
            )
        number = end


def _damage() -> tuple[type[Exception], ...]:
    """What pyarrow raises for damaged files; its OSErrors of pages have no number."""
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
    try:
        batch.validate(full=True)  # else offsets that lead outside end the process
        rows = batch.to_pylist()
    except ValueError:  # ArrowInvalid is one, and not every moment can be turned into Python's
        rows = [_row(batch.slice(row, 1)) for row in range(batch.num_rows)]
    for row in rows:
        yield (
            row
            if isinstance(row, Skip)
            else {name: without_nulls(value) for name, value in row.items()}
        )


def _row(batch: "pyarrow.RecordBatch") -> dict[str, Any] | Skip:
    """The only row of a batch, column by column."""
    try:
        batch.validate(full=True)
    except ValueError as error:
        return Skip("no valid Unicode" if "UTF8" in str(error) else "damaged table", str(error))
    found: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            found[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return Skip("no valid Unicode", str(error))
        except ValueError as error:
            found[name] = error
    return found


def _sizes(path: Path) -> Iterator[int]:
    """Rows of each row group or batch; raises UserError for a file that cannot be read, or that has more rows than bytes."""
    left = path.stat().st_size
    for rows in _read_sizes(path):
        if not 0 <= rows <= left:
            raise UserError(
                f"{path} says that it has more rows than bytes: write it again, or give another file"
            )
        left -= rows
        yield rows


def _read_sizes(path: Path) -> Iterator[int]:
    try:
        if path.suffix == ".parquet":
            facts = _parquet(path).metadata
            yield from (facts.row_group(number).num_rows for number in range(facts.num_row_groups))
        else:
            _check_unfolding(path)
            with _open_arrow(path) as reader:
                yield from (batch.num_rows for batch in reader)
    except UserError:
        raise
    except _damage() as error:
        raise UserError(f"{path} is damaged: {error}: fetch it again or remove it") from None


def _groups(
    where: RowRange, columns: Sequence[str] | None
) -> Iterator[tuple[int, Iterator["pyarrow.RecordBatch"]]]:
    """The rows of each row group or record batch, and these rows a few at a time."""
    path = Path(where.path)
    if path.suffix == ".parquet":
        file = _parquet(path)
        for group in range(where.first, where.last):
            _check_expansion(path, file.metadata.row_group(group))
            batches = file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=columns)
            yield file.metadata.row_group(group).num_rows, batches
        return
    with _open_arrow(path) as reader:
        for number, batch in enumerate(reader):
            if where.first <= number < where.last:
                yield (
                    batch.num_rows,
                    (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS)),
                )


def _check_expansion(path: Path, group: Any) -> None:
    """Raise UserError for a row group that unfolds to many times its size."""
    columns = [group.column(number) for number in range(group.num_columns)]
    for column in columns:
        if column.total_uncompressed_size > max(
            _UNCHECKED_BYTES, _EXPANSION * column.total_compressed_size
        ):
            raise UserError(
                f"{path}: column {column.path_in_schema!r} unfolds from {column.total_compressed_size} to"
                f" {column.total_uncompressed_size} bytes: write the file again with smaller row groups"
            )


def _check_unfolding(path: Path) -> None:
    """Raise UserError for compressed buffers of an Arrow stream that say they unfold to many times the file's size.

    A compressed buffer begins with its true size (int64), -1 if it is stored as it is (Arrow's Message.fbs).
    """
    import pyarrow

    total, size = 0, path.stat().st_size
    with pyarrow.memory_map(str(path)) as source:
        for message in pyarrow.ipc.MessageReader.open_stream(source):
            if message.type in ("record batch", "dictionary"):
                total += sum(_unfolded(message))
                if total > max(_UNCHECKED_BYTES, _EXPANSION * size):
                    raise UserError(
                        f"{path} unfolds from {size} to {total} bytes: write it without compression"
                    )


def _unfolded(message: Any) -> Iterator[int]:
    """True sizes of the compressed buffers of a message, by its flatbuffer."""
    head, body = memoryview(message.metadata), memoryview(message.body)

    def field(start: int, number: int) -> int:
        """Where a table's field stands, 0 if the table lacks it."""
        layout = start - struct.unpack_from("<i", head, start)[0]
        place = 4 + 2 * number
        offset = (
            struct.unpack_from("<H", head, layout + place)[0]
            if place < struct.unpack_from("<H", head, layout)[0]
            else 0
        )
        return int(start + offset) if offset else 0

    def at(place: int) -> int:
        """What an offset at a place leads to."""
        return place + int(struct.unpack_from("<I", head, place)[0])

    batch = at(field(at(0), 2))
    batch = at(field(batch, 1)) if message.type == "dictionary" else batch
    if field(batch, 3):
        buffers = at(field(batch, 2))
        for number in range(struct.unpack_from("<I", head, buffers)[0]):
            start, length = struct.unpack_from("<qq", head, buffers + 4 + 16 * number)
            if length >= 8:
                yield max(0, struct.unpack_from("<q", body, start)[0])


def _parquet(path: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except _damage() as error:
        raise UserError(f"{path} is no parquet file that can be read: {error}") from None


def _open_arrow(path: Path) -> Any:
    """A stream of record batches, mapped into memory: what Hugging Face datasets save."""
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    except _damage() as error:
        raise UserError(f"{path} is no Arrow stream that can be read: {error}") from None
