"""A pickle of plain data and records, read without making any object of a class that it names.

An index of torch's distributed checkpoints is a pickle. What it names stays a name here, and what it would build stays a record of
the name, its arguments and its state: there is nothing whose attributes it could set and nothing that it could call. The reader is
Python's own in pure Python: the one in C takes memory by sizes that a file only claims.
"""

import io
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

READER: Final[Any] = cast(Any, pickle)._Unpickler
AS_EVER: Final = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
    pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT,
    pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET,
    pickle.GLOBAL, pickle.STACK_GLOBAL,
)  # fmt: skip
"""Opcodes of plain data that protocols 2 to 5 write: no persistent ids, extension codes, instances, buffers or byte strings."""


class Name(str):
    """What a pickle names: `module.name`."""

    __slots__ = ()


@dataclass(eq=False, slots=True)
class PickledObject:
    """What would be an object: hashed by identity, so that it may be a key."""

    name: Name
    """Of its class or function."""
    arguments: tuple[Any, ...]
    state: Any = None
    """What would be its attributes; None: nothing."""


def read_pickle(content: bytes, known: Mapping[str, Collection[str]]) -> Any:
    """Lists, tuples, dicts, numbers, strings, names and records.

    Args:
        content: the pickle.
        known: what it may name, by module.

    Raises:
        pickle.UnpicklingError: if it names anything else, or is none of plain data and records.
    """
    reader = _Reader(io.BytesIO(content))
    reader.known = known
    try:
        return reader.load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # whatever its own code meets in a damaged file
        raise pickle.UnpicklingError(
            f"it is no pickle of plain data ({type(error).__name__})"
        ) from error


class _Reader(READER):  # type: ignore[misc]
    """Python's reader with a table of opcodes of its own."""

    known: Mapping[str, Collection[str]]

    def find_class(self, module: str, name: str) -> Name:
        """The name itself, if it may stand in the file."""
        if name not in self.known.get(module, ()):
            raise pickle.UnpicklingError(
                f"it names {f'{module}.{name}'[:100]}, which no checkpoint needs"
            )
        return Name(f"{module}.{name}")

    def make(self) -> None:
        """REDUCE and NEWOBJ: a record of a name and arguments."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            raise pickle.UnpicklingError("it makes an object of no class")
        self.append(PickledObject(name, arguments))

    def build(self) -> None:
        """BUILD: a record's state."""
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not PickledObject or record.state is not None:
            raise pickle.UnpicklingError("it sets attributes of what is no new object")
        record.state = state

    def add(self, items: list[Any]) -> None:
        """APPEND and APPENDS."""
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("it appends to no list")
        self.stack[-1].extend(items)

    def put(self, items: list[Any]) -> None:
        """SETITEM and SETITEMS; deep tuples as keys would exhaust the stack of C."""
        target = self.stack[-1]
        if (
            type(target) is not dict
            or len(items) % 2
            or any(type(key) not in (str, PickledObject) for key in items[::2])
        ):
            raise pickle.UnpicklingError("it sets items of no dict of names")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _popped(self, count: int) -> list[Any]:
        items = [self.stack.pop() for _ in range(count)]
        return items[::-1]

    def other(self) -> None:
        """Any opcode that is not in the table."""
        raise pickle.UnpicklingError("it holds more than plain data")

    dispatch: dict[int, Callable[[Any], None]] = dict.fromkeys(range(256), other) | {
        **{opcode[0]: READER.dispatch[opcode[0]] for opcode in AS_EVER},
        pickle.REDUCE[0]: make,
        pickle.NEWOBJ[0]: make,
        pickle.BUILD[0]: build,
        pickle.APPEND[0]: lambda self: self.add(self._popped(1)),
        pickle.APPENDS[0]: lambda self: self.add(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self.put(self._popped(2)),
        pickle.SETITEMS[0]: lambda self: self.put(self.pop_mark()),
    }
