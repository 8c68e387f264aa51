"""Good files damaged at random, and readers tried on them: each must end with an error of ours or with success.

`mutants` makes the inputs, always the same ones for a seed; `try_reader` reads each in a process of its own, which is killed when
it hangs, and fails the test for any other exception, for more than 10 s of CPU time and for more than 1 GiB of memory.

FUZZ_FACTOR=50 tries fifty times as many inputs, FUZZ_SEED=7 others, FUZZ_KEEP=DIR keeps those that a reader failed on.
"""

import copy
import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, Final

SECONDS: Final = 10.0
"""CPU time that one input may take."""
BYTES: Final = 1 << 30
"""Memory that one input may take, beyond what the process has without it."""
_HANGS: Final = 60.0
"""Seconds without an answer after which the reading process is killed, however busy the machine is."""
_SHOWN: Final = 2000
"""Characters of a traceback that are shown: messages may quote the input."""
_ADDRESSES: Final = 6 << 30
"""Address space beyond which nothing is given to the reading process, so that no input can fell the machine."""

Mutator = Callable[[Random, bytes], bytes]

NUMBERS: Final = (
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64,
    10**18,
    10**5000,
    -(10**18),
    1e308,
    -1e308,
    5e-324,
    0.5,
)
TEXTS: Final = (
    "",
    "..",
    "../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "[/bold]",
    "<|im_end|>",
    "<think>",
    "a" * 100_000,
    "%s{}$x",
    "\u202e",
)
_ODD: Final[tuple[Any, ...]] = (
    *NUMBERS,
    *TEXTS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    {"": None},
    float("nan"),
    float("inf"),
)


def amount(usual: int) -> int:
    """How many inputs to try of a reader: `usual` ones, or FUZZ_FACTOR times as many."""
    return max(1, round(usual * float(os.environ.get("FUZZ_FACTOR", "1"))))


def mutants(
    good: Sequence[bytes], count: int, mutators: Sequence[Mutator] = (), seed: int = 0
) -> Iterator[bytes]:
    """`count` damaged forms of good files.

    Args:
        good: whole files that the reader takes.
        count: how many inputs to make.
        mutators: ways to damage one; empty: those of bytes. `json_edit` and `json_lines_edit` are for JSON.
        seed: of the choices, beside FUZZ_SEED.
    """
    for number in range(count):
        random = Random(f"{os.environ.get('FUZZ_SEED', '0')}/{seed}/{number}")
        data = random.choice(good)
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            data = random.choice(mutators or BYTE_MUTATORS)(random, data)
        yield data


# ---- damage to bytes


def flip(random: Random, data: bytes) -> bytes:
    """A few bits turned."""
    found = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 2, 8, 40))):
        found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    return bytes(found)


def cut(random: Random, data: bytes) -> bytes:
    """The beginning only."""
    return data[: random.randrange(len(data) + 1)]


def drop(random: Random, data: bytes) -> bytes:
    """A piece taken out."""
    start, end = _stretch(random, data)
    return data[:start] + data[end:]


def splice(random: Random, data: bytes) -> bytes:
    """A piece put in again elsewhere."""
    start, end = _stretch(random, data)
    place = random.randrange(len(data) + 1)
    return data[:place] + data[start:end] + data[place:]


def swap(random: Random, data: bytes) -> bytes:
    """Two neighbouring pieces in the other order."""
    first, second, third = sorted(random.randrange(len(data) + 1) for _ in range(3))
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def blank(random: Random, data: bytes) -> bytes:
    """A piece overwritten with one byte."""
    start, end = _stretch(random, data)
    return (
        data[:start]
        + random.choice((b"\0", b"\xff", b" ", b"[", b"9")) * (end - start)
        + data[end:]
    )


def big_binary(random: Random, data: bytes) -> bytes:
    """Two, four or eight bytes replaced by a large number, as a count or a length might be."""
    width, order = random.choice((2, 4, 4, 8)), random.choice(("big", "little"))
    number = random.choice(
        (0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1, 10**9, 10**6)
    )
    place = random.randrange(max(1, len(data) - width))
    return data[:place] + (number % 2 ** (8 * width)).to_bytes(width, order) + data[place + width :]


def big_decimal(random: Random, data: bytes) -> bytes:
    """A number in the text replaced by an odd one."""
    places = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return flip(random, data)
    start = end = random.choice(places)
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    return data[:start] + _number(random.choice(NUMBERS)).encode() + data[end:]


BYTE_MUTATORS: Final[tuple[Mutator, ...]] = (
    flip,
    flip,
    cut,
    drop,
    splice,
    swap,
    blank,
    big_binary,
    big_binary,
    big_decimal,
)


def _stretch(random: Random, data: bytes) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 4, 16, 64, 512, 4096)))


# ---- damage to JSON


def json_edit(random: Random, data: bytes) -> bytes:
    """A JSON document with one value, key or element replaced, removed, doubled or nested."""
    try:
        return _dumped(edited(random, json.loads(data))).encode()
    except (
        ValueError,
        RecursionError,
        IndexError,
    ):  # an earlier edit made it something that Python does not read
        return flip(random, data)


def json_lines_edit(random: Random, data: bytes) -> bytes:
    """JSON Lines with one line edited."""
    lines = data.splitlines() or [b""]
    place = random.randrange(len(lines))
    return (
        b"\n".join([*lines[:place], json_edit(random, lines[place]), *lines[place + 1 :]]) + b"\n"
    )


def edited(random: Random, document: Any) -> Any:
    """A copy of a JSON value with one edit somewhere in it."""
    holder = [copy.deepcopy(document)]
    places = list(_places(holder))
    parent, key = random.choice(places)
    match random.randrange(6):
        case 0 if isinstance(parent, dict):
            del parent[key]
        case 0 | 1:
            parent[key] = copy.deepcopy(random.choice(_ODD))
        case 2:
            other, name = random.choice(places)
            parent[key] = copy.deepcopy(other[name])
        case 3 if isinstance(parent, dict):
            parent[random.choice((*TEXTS, *map(str, parent)))] = parent.pop(key)
        case 3 | 4:
            parent[key] = [parent[key]] * random.choice((1, 2, 1000))
        case _:
            parent[key] = Nested(random.choice((20, 900, 5000, 100_000)))
    return holder[0]


class Nested:
    """Lists in lists, `depth` of them: more than Python's own encoder can write."""

    def __init__(self, depth: int) -> None:
        self.depth = depth


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield value, key
        yield from _places(child)


def _dumped(value: Any) -> str:
    if isinstance(value, Nested):
        return "[" * value.depth + "]" * value.depth
    if isinstance(value, dict):
        return (
            "{"
            + ",".join(f"{json.dumps(str(key))}:{_dumped(one)}" for key, one in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ",".join(map(_dumped, value)) + "]"
    return (
        _number(value)
        if isinstance(value, int) and not isinstance(value, bool)
        else json.dumps(value)
    )


def _number(value: float) -> str:
    """A number's digits, also of those that Python refuses to write."""
    return "1" + "0" * 5000 if value == 10**5000 else str(value)


# ---- trying a reader


def try_reader(
    read: Callable[[bytes], object],
    inputs: Iterable[bytes],
    allowed: tuple[type[BaseException], ...],
    name: str = "reader",
) -> int:
    """Read every input; returns how many there were.

    Args:
        read: takes a file's content; runs in a forked process.
        inputs: contents.
        allowed: errors that it may raise.
        name: for messages.

    Raises:
        AssertionError: naming the first inputs that raised something else, took too long or too much memory.
    """
    waiting, faults, tried = list(inputs), list[str](), 0
    context = multiprocessing.get_context("fork")
    while tried < len(waiting) and len(faults) < 5:
        ours, theirs = context.Pipe()
        child = context.Process(target=_read_all, args=(read, waiting[tried:], allowed, theirs))
        child.start()
        theirs.close()
        tried, problem = _answers(ours, tried, len(waiting))
        child.kill()
        child.join()
        if problem:
            faults.append(
                f"input {tried - 1}{_kept(name, tried - 1, waiting[tried - 1])}: {problem}"
            )
    assert not faults, f"{name}: {len(faults)} faults in {tried} inputs:\n" + "\n".join(faults)
    return tried


def _answers(answers: "Connection[Any, Any]", tried: int, total: int) -> tuple[int, str]:
    """The number of inputs that were tried, and what is wrong with the last of them."""
    while tried < total:
        try:
            if not answers.poll(_HANGS):
                return tried + 1, f"no answer within {_HANGS:.0f} s"
            problem = answers.recv()
        except EOFError:
            return tried + 1, "the reading process died"
        tried += 1
        if problem:
            return tried, problem
    return tried, ""


def _read_all(
    read: Callable[[bytes], object],
    inputs: list[bytes],
    allowed: tuple[type[BaseException], ...],
    out: Any,
) -> None:
    signal.signal(signal.SIGPROF, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + _ADDRESSES, resource.RLIM_INFINITY))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    for data in inputs:
        out.send(_read_one(read, data, allowed))
    out.close()


def _read_one(
    read: Callable[[bytes], object], data: bytes, allowed: tuple[type[BaseException], ...]
) -> str:
    """What is wrong with how a reader takes an input; empty if nothing is."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is counted from now on
    before, started, problem = _memory("VmRSS"), time.process_time(), ""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        read(data)
    except allowed:
        pass
    except BaseException:
        problem = traceback.format_exc(limit=-4)[-_SHOWN:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (seconds := time.process_time() - started) > SECONDS:
        return f"{seconds:.1f} s of CPU time {problem}"
    if (more := _memory("VmHWM") - before) > BYTES:
        return f"{more / 2**20:.0f} MiB of memory {problem}"
    return problem


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS:g} s of CPU time")


def _memory(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name + ":")
    )
    return int(line.split()[1]) * 1024


def _kept(name: str, number: int, data: bytes) -> str:
    """Write an input down where FUZZ_KEEP says so."""
    if not (folder := os.environ.get("FUZZ_KEEP")):
        return f" ({len(data)} bytes, beginning {data[:40]!r})"
    path = Path(folder) / f"{name.replace(' ', '-')}-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return f" ({path})"
