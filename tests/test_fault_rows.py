"""The table of faults names tests that are there. Reference: the files of tests."""

import io
from types import SimpleNamespace

from visionloom.tests.fault_rows import (
    ROWS,
    all_tests,
    name_of,
    place_of,
    write_table,
)


def test_every_row_has_tests_and_they_are_there() -> None:
    assert [row.number for row in ROWS] == list(range(1, 39))
    listed = {test for row in ROWS for test in row.listed}
    assert sorted(listed - set(all_tests())) == []
    assert [row.number for row in ROWS if not row.tests] == []
    assert [row.number for row in ROWS if len(set(row.tests)) < len(row.tests)] == []


def test_tests_are_known_by_their_name() -> None:
    assert "launch/composing/test_recipe_files.py::test_row_29_a_wrong_configuration_is_one_message" in ROWS[28].tests  # fmt: skip
    assert not any("test_row_" in test for row in ROWS if row.number != 29 for test in row.listed)


def test_where_a_test_runs() -> None:
    assert name_of("tests/a/test_b.py::test_c[x[1]]") == "a/test_b.py::test_c"
    assert [place_of(marks) for marks in ({"faults"}, {"long", "parametrize"}, {"parametrize"})] == [
        "in make faults", "in make proofs", "in make test",
    ]  # fmt: skip


def test_the_table_tells_what_failed() -> None:
    written = io.StringIO()
    reporter = SimpleNamespace(
        section=lambda title: None, write_line=lambda text: written.write(text + "\n")
    )
    first = ROWS[3].listed[0]
    write_table(reporter, {first: {"passed", "failed"}}, {ROWS[25].listed[0]: "in make proofs"})  # type: ignore[arg-type]
    lines = written.getvalue().splitlines()
    assert f"      failed         {first}" in lines
    assert f"      in make proofs {ROWS[25].listed[0]}" in lines
    assert sum(line[:2].strip().isdigit() for line in lines) == 38
