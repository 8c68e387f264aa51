"""The machinery of the fuzz tests itself: the same inputs for a seed, and every kind of fault of a reader is found."""

import json
import time
from random import Random

import pytest

from visionloom.tests.fuzzing import json_edit, mutants, try_reader


def test_the_same_seed_makes_the_same_inputs_and_another_makes_others() -> None:
    good = [bytes(range(256)), b'{"count": 12}']
    first = list(mutants(good, 50))
    assert first == list(mutants(good, 50)) != list(mutants(good, 50, seed=1))
    assert len(set(first)) > 40


def test_edits_of_json_are_json_and_some_of_them_are_odd() -> None:
    good = json.dumps({"a": [1, {"b": "c"}], "d": 2.5}).encode()
    found = [json_edit(Random(number), good) for number in range(200)]
    shallow = [json.loads(one, parse_int=float) for one in found if one.count(b"[") < 500]
    assert len(shallow) > 100 and sum(one != json.loads(good) for one in shallow) > 80
    assert any(b"0" * 5000 in one for one in found) and any(b"[" * 900 in one for one in found)


def test_good_readers_pass_and_the_errors_that_are_allowed_too() -> None:
    assert try_reader(len, [b"a", b"b"], ()) == 2
    assert try_reader(json.loads, [b"{", b"[]"], (ValueError,)) == 2


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda data: data[99], "IndexError"),
        (lambda data: bytearray(b"x" * (400 << 20)), "MiB of memory"),
        (lambda data: [time.process_time() for _ in iter(int, 1)], "s of CPU time"),
        (lambda data: __import__("os")._exit(3), "died"),
    ],
)
def test_every_fault_of_a_reader_is_found(
    read: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visionloom.tests.fuzzing.SECONDS", 0.3)
    monkeypatch.setattr("visionloom.tests.fuzzing.BYTES", 1 << 28)
    with pytest.raises(AssertionError, match=message):
        try_reader(read, [b"a"], ())  # type: ignore[arg-type]
