"""A pickle of plain data and records, read without making any object of a class that it names.

An index of torch's distributed checkpoints is a pickle. A name in it stays a name here, and an object that it would build stays a
record of the name, its arguments and its state: it can set no attributes of anything and call nothing. The reader is
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
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
    pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT,
    pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET,
    pickle.GLOBAL, pickle.STACK_GLOBAL,
)  # fmt: skip
"""Opcodes of plain data that protocols 2 to 5 write: no persistent ids, extension codes, instances, buffers or byte strings."""


class Name(str):
    """A name of a class or function in a pickle: `module.name`."""

    __slots__ = ()


@dataclass(eq=False, slots=True)
class PickledObject:
    """A record in the place of an object; hashed by identity, so that it may be a key."""

    name: Name
    """Of its class or function."""
    arguments: tuple[Any, ...]
    state: Any = None
    """Its attributes would be set from this; None: none are."""


def read_pickle(content: bytes, known: Mapping[str, Collection[str]]) -> Any:
    """Read lists, tuples, dicts, numbers, strings, names and records.

    Args:
        content: the pickle.
        known: names that may be in it, by module.

    Raises:
        pickle.UnpicklingError: if it names anything else, or is none of plain data and records.
    """
    reader = _Reader(io.BytesIO(content))
    reader.known = known
    try:
        return reader.load()
    except pickle.UnpicklingError:
        raise
    # Python's reader stumbles over damaged bytes in many ways: IndexError, ValueError, MemoryError.
    except Exception as error:
        raise pickle.UnpicklingError(
            f"it is no pickle of plain data ({type(error).__name__})"
        ) from error


class _Reader(READER):  # type: ignore[misc]
    """Python's reader with a table of opcodes of its own."""

    known: Mapping[str, Collection[str]]

    def find_class(self, module: str, name: str) -> Name:
        """Return the name itself, if it may be in the file."""
        if name not in self.known.get(module, ()):
            shown = f"{module}.{name}"[:100]
            raise pickle.UnpicklingError(f"it names {shown}, which no checkpoint needs")
        return Name(f"{module}.{name}")

    def make(self) -> None:
        """Make a record of a name and arguments, for REDUCE and NEWOBJ."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            raise pickle.UnpicklingError("it makes an object of no class")
        self.append(PickledObject(name, arguments))

    def build(self) -> None:
        """Set a record's state, for BUILD."""
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not PickledObject or record.state is not None:
            raise pickle.UnpicklingError("it sets attributes of what is no new object")
        record.state = state

    def add(self, items: list[Any]) -> None:
        """Extend a list, for APPEND and APPENDS."""
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("it appends to no list")
        self.stack[-1].extend(items)

    def put(self, items: list[Any]) -> None:
        """Set items of a dict, for SETITEM and SETITEMS."""
        target, keys = self.stack[-1], items[::2]
        is_dict = type(target) is dict and len(items) % 2 == 0
        # No other keys: hashing deep tuples would exhaust the stack of C.
        if not is_dict or any(type(key) not in (str, PickledObject) for key in keys):
            raise pickle.UnpicklingError("it sets items of no dict of names")
        target.update(zip(keys, items[1::2], strict=True))

    def _popped(self, count: int) -> list[Any]:
        """Take the last items off the stack, the deepest first."""
        items = [self.stack.pop() for _ in range(count)]
        return items[::-1]

    def other(self) -> None:
        """Refuse an opcode that is not in the table."""
        raise pickle.UnpicklingError("it holds more than plain data")

    # Everything is refused first, so that opcodes of later protocols are too.
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
