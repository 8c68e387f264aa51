"""A teacher's most probable next tokens on disk, sample by sample: what launch/teacher.py writes and training reads.

    teacher.json      how it was made; written last, so that a store that is there is complete
    index.bin         the place of each sample, sorted by key; mapped and not read
    NAME-000000-0000.tar   WebDataset shards: one .npz a sample, with a row for each supervised token

A sample is found by its dataset, shard, key and part, and its encoding must have the hash that was stored. So neither seed,
order, packing nor layout matters, and a changed sample or tokenizer is refused. Imports no torch.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, read_json
from visionloom.common.places import PlaceError, locate
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.shards.dataset import Location
from visionloom.data.shards.store import LocalStore, MissingBytes, StoreError

FACTS: Final = "teacher.json"
INDEX: Final = "index.bin"
KEY: Final = np.dtype("S16")
"""What a sample, or a part of one, is found by. The index holds all keys, ascending, and then their entries: a search along
one contiguous column makes no copy of it."""
ENTRY: Final = np.dtype(
    [
        ("content", "S16"),
        ("shard", "<u4"),
        ("rows", "<u4"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("crc32", "<u4"),
    ]
)
"""Of one key: a hash of the encoding, and the bytes in a shard; 0 rows: the sample could not be read."""
AGAIN: Final = "store the teacher again by launch/teacher.py"


@dataclass(frozen=True)
class StoreFacts:
    """How a store was made: teacher.json."""

    version: Annotated[int, Field(ge=1, le=1)]
    kept: Annotated[int, Field(ge=1, le=2**24)]
    """Tokens of each row, the most probable ones."""
    temperature: Annotated[float, Field(gt=0)]
    """Logits were divided by it."""
    dtype: Annotated[str, Field(pattern="^(fp16|fp32)$")]
    """Of the log-probabilities."""
    vocabulary: Annotated[int, Field(ge=1)]
    """Rows of the teacher's output matrix."""
    tokenizer: str
    """SHA-256 of its tokenizer.json."""
    weights: str
    """Folder of the teacher."""
    datasets: dict[str, str]
    """Content of each dataset that was gone through, by name."""
    shards: list[str] = field(default_factory=list)
    """Files, in the order of the index's numbers."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A teacher's k most probable tokens at each of n supervised tokens."""

    ids: NDArray[np.int32]
    """[n, k], the most probable first."""
    log_probabilities: NDArray[Any]
    """[n, k], float16 or float32, at the store's temperature."""
    log_rest: NDArray[np.float32]
    """[n]: logarithm of the mass of all other tokens; minus infinity where there are none."""

    @classmethod
    def joined(cls, parts: Sequence["StoredRows"]) -> "StoredRows":
        """Return the rows of several, one after the other."""
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.log_probabilities for part in parts]),
            np.concatenate([part.log_rest for part in parts]),
        )

    def packed(self) -> bytes:
        """Return them as an .npz file."""
        file = io.BytesIO()
        np.savez(
            file, ids=self.ids, log_probabilities=self.log_probabilities, log_rest=self.log_rest
        )
        return file.getvalue()

    @classmethod
    def unpacked(cls, content: bytes) -> "StoredRows":
        """Read an .npz file; raises ValueError where it is none of ours."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return cls(arrays["ids"], arrays["log_probabilities"], arrays["log_rest"])
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(str(error)) from None


def sample_key(dataset: str, location: Location, part_number: int) -> bytes:
    """Return what a sample, or a part of one, is found by, 16 bytes."""
    name = f"{dataset}/{location.shard}/{location.key}/{part_number}"
    return _digest(name.encode())


def content_of(sample: EncodedSample) -> bytes:
    """Return a hash of what the teacher has seen of a sample and was asked for, 16 bytes: ids, supervised tokens, picture sizes."""
    supervised = sample.target_weights > 0
    parts = (sample.input_ids.astype("<i4"), supervised, sample.grids.astype("<i4"))
    return _digest(b"".join(part.tobytes() for part in parts))


def _digest(content: bytes) -> bytes:
    # numpy ends a byte string at its last byte that is not zero.
    return hashlib.blake2b(content, digest_size=15).digest() + b"\1"


def read_facts(folder: Path, option: str) -> StoreFacts:
    """Read how a store was made; raises UserError that names `option` where there is no whole one."""
    try:
        return read_json(folder, FACTS, StoreFacts)
    except FileNotFoundError:
        raise UserError(
            f"{option}={folder} holds no complete store of a teacher ({FACTS} is missing): write it by launch/teacher.py"
        ) from None
    except (JsonError, OSError) as error:
        raise UserError(f"{option}: {error}: {AGAIN}") from None


def mapped_index(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Map an index: its keys, ascending, and their entries (dtypes KEY and ENTRY)."""
    # Not read: a store of ten million samples has an index of half a gigabyte, which all ranks of a machine share.
    count = path.stat().st_size // (KEY.itemsize + ENTRY.itemsize)
    keys = np.memmap(path, KEY, mode="r", shape=(count,))
    return keys, np.memmap(path, ENTRY, mode="r", offset=keys.nbytes, shape=(count,))


class TeacherStore:
    """Random access to the rows of a store's samples; safe in threads, and opened anew in each process."""

    def __init__(self, folder: Path, option: str) -> None:
        """Open a store; errors name it as the value of `option`.

        Raises:
            UserError: if it is not whole.
        """
        self.folder, self.option = folder, option
        self.facts = read_facts(folder, option)
        self._files = LocalStore(folder)
        try:
            self._keys, self._entries = mapped_index(locate(folder, INDEX))
        except (PlaceError, OSError, ValueError) as error:
            raise UserError(f"{option}: {folder / INDEX}: {error}: {AGAIN}") from None

    def find(self, sample: EncodedSample, location: Location, part_number: int) -> Any:
        """Return the entry (dtype ENTRY) of a sample, or of a part of one.

        Raises:
            UserError: if it is not there, or not as it was.
        """
        key = sample_key(sample.dataset, location, part_number)
        place = int(np.searchsorted(self._keys, key))
        fault = ""
        # Past the end the slice is empty.
        if key not in self._keys[place : place + 1]:
            fault = "is not in it: all datasets of the phase belong there, under the names that the phase gives them"
        # Never by the key alone: rows of other tokens would be learned from without a sign.
        elif self._entries[place]["content"] != content_of(sample):
            fault = "is in it in another form: the sample, the tokenizer, data.media or the length of a pack have changed"
        if fault:
            name = f"sample {location.key} of {location.shard} in data.datasets.{sample.dataset}"
            raise UserError(f"{self.option}={self.folder}: {name} {fault}: {AGAIN}")
        return self._entries[place]

    def read(self, entry: Any) -> StoredRows | None:
        """Read the rows of a sample that `find` found; None if the teacher could not read it.

        Raises:
            UserError: for bytes that are not those that were written.
        """
        if not entry["rows"]:
            return None
        _, number, _, offset, length, crc32 = entry.item()
        shard = self.facts.shards[number]
        try:
            content = self._files.read(shard, offset, length)
            if zlib.crc32(content) != crc32:
                raise ValueError("its bytes have changed")
            return StoredRows.unpacked(content)
        except (MissingBytes, StoreError, ValueError) as error:
            place = f"{self.folder / shard}, byte {offset}"
            raise UserError(f"{self.option}: {place}: {error}: {AGAIN}") from None
