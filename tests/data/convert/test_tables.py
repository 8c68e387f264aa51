"""Tables of strangers: bombs, damage and lies are one line or one bad record. Reference: pyarrow, which wrote the good ones."""

import io
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.tables import cut_tables, read_table
from visionloom.tests.fuzzing import try_reader

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def stream(batch: "pa.RecordBatch") -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def read(path: Path) -> list[object]:
    return [record.value for part in cut_tables([path], 100) for record in read_table(part.where)]


def test_good_tables_are_read(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.arrow").write_bytes(stream(pa.RecordBatch.from_pylist(rows)))
    assert read(tmp_path / "a.parquet") == read(tmp_path / "a.arrow") == rows


def test_more_rows_than_bytes_are_refused(tmp_path: Path) -> None:
    """A million nulls take 200 bytes of an Arrow file, and some hundred of parquet."""
    (tmp_path / "a.arrow").write_bytes(stream(pa.record_batch([pa.nulls(1_000_000)], ["a"])))
    pq.write_table(pa.table({"a": pa.nulls(1_000_000, pa.string())}), tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        with pytest.raises(UserError, match=rf"{name} says that it has more rows than bytes"):
            read(tmp_path / name)


def test_a_column_that_unfolds_is_refused(tmp_path: Path) -> None:
    table = pa.table({"a": [b"\0" * (100 << 20)], "pad": [b"x" * 100]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000

    def refused(data: bytes) -> None:
        with pytest.raises(UserError, match=r"column 'a' unfolds from \d+ to \d+ bytes"):
            read(tmp_path / "a.parquet")

    assert try_reader(refused, [b""], ()) == 1


def test_offsets_that_lead_outside_end_no_process(tmp_path: Path) -> None:
    """An Arrow file with one changed offset ended the process."""
    texts = pa.array(["a" * 40, "b" * 40])
    good = stream(pa.record_batch([texts], ["text"]))
    place = good.index(
        (0).to_bytes(4, "little") + (40).to_bytes(4, "little") + (80).to_bytes(4, "little")
    )
    for offset in (2**31 - 1, 2**30, 79, 2**32 - 1):
        (tmp_path / "a.arrow").write_bytes(
            good[: place + 4] + offset.to_bytes(4, "little") + good[place + 8 :]
        )
        found = read(tmp_path / "a.arrow")
        assert len(found) == 2 and (offset == 79 or all(isinstance(one, Skip) for one in found))


def test_a_table_cut_short_is_one_line(tmp_path: Path) -> None:
    good = stream(pa.RecordBatch.from_pylist([{"text": "a" * 1000}]))
    for size in (0, 10, 100, len(good) - 600):
        (tmp_path / "a.arrow").write_bytes(good[:size])
        with pytest.raises(UserError, match=r"a\.arrow (is damaged|is no Arrow stream)"):
            read(tmp_path / "a.arrow")


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("kind", ["column", "dictionary"])
def test_a_compressed_stream_that_unfolds_is_refused_before_it_does(
    codec: str, kind: str, tmp_path: Path
) -> None:
    values = pa.array([b"\0" * (300 << 20)])
    values = values.dictionary_encode() if kind == "dictionary" else values
    batch, sink = pa.record_batch([values], ["a"]), io.BytesIO()
    with pa.ipc.new_stream(
        sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)
    ) as writer:
        writer.write_batch(batch)
    (tmp_path / "a.arrow").write_bytes(sink.getvalue())
    del values, batch

    def refused(data: bytes) -> None:
        with pytest.raises(UserError, match=r"a\.arrow unfolds from \d+ to \d+ bytes"):
            read(tmp_path / "a.arrow")

    assert try_reader(refused, [b""], ()) == 1


def test_a_compressed_stream_of_rows_is_read(tmp_path: Path) -> None:
    batch, sink = pa.RecordBatch.from_pylist([{"text": "word " * 50}] * 20), io.BytesIO()
    with pa.ipc.new_stream(
        sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_batch(batch)
    (tmp_path / "a.arrow").write_bytes(sink.getvalue())
    assert len(read(tmp_path / "a.arrow")) == 20
