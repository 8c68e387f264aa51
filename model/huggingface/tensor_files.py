"""Read the safetensors files of a folder: names, shapes and types of their tensors, and any part of one without the rest.

Only safetensors are read, which hold numbers and nothing that could run. Files of pickles (.bin, .pt, .pth) are never opened.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.common.places import locate, regular_files
from visionloom.common.text import one_line
from visionloom.model.huggingface.config import LARGEST_TABLE, as_type, read_json
from visionloom.model.huggingface.safetensors_writer import DTYPES
from visionloom.model.huggingface.shapes import Shape

WHOLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LARGEST_HEADER: Final = 1 << 25
"""Bytes: 32 MiB; the 36,000 tensors of the largest model, with experts apart and in one file, would take 6."""
NAMED: Final = 8
"""Tensors named for one kind of fault; the others are counted."""


class TensorFiles:
    """The tensors of a folder by the names that they have in its files, which stay open."""

    def __init__(self, folder: Path, option: str) -> None:
        """Read the headers of all files; `option` names the folder in errors.

        Raises:
            UserError: if there are none, or one is missing or damaged.
        """
        self.folder, self.option = folder, option
        self._owner: dict[str, Any] = {}
        # Sorted, so that every rank names the same file in an error.
        for name in sorted(self._file_names()):
            file = self._open(name)
            # Its keys() makes a list; the file itself cannot be iterated.
            self._owner.update(dict.fromkeys(file.keys(), file))

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._owner)

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def shape(self, name: str) -> Shape:
        """Return the full shape of a tensor."""
        return tuple(self._owner[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor's elements."""
        return DTYPES[self._owner[name].get_slice(name).get_dtype()]

    def read(self, name: str, region: Sequence[slice]) -> Tensor:
        """Read a part of a tensor, and nothing else of it."""
        part: Tensor = self._owner[name].get_slice(name)[tuple(region)]
        return part

    def fault(self, text: str) -> UserError:
        """Return an error about the folder, which is named first."""
        return UserError(f"{self.option}={self.folder}: {one_line(text)}")

    def check(
        self,
        expected: Mapping[str, Shape],
        left_alone: Iterable[str] = (),
        fewer_rows: Set[str] = frozenset(),
    ) -> None:
        """Compare the tensors with those that config.json describes.

        Args:
            expected: shapes by name.
            left_alone: names that may be there and are not read.
            fewer_rows: matrices that may have fewer rows.

        Raises:
            UserError: with all that is wrong: tensors missing, left over, of another shape or of a type that is not read.
        """
        present, wanted = self._owner.keys(), expected.keys()
        faults = [
            _named("missing", wanted - present),
            _named("left over", present - wanted - set(left_alone)),
            _named("of another shape", self._misshapen(expected, fewer_rows)),
            _named("of a type that is not read", self._unread()),
            _named("in the index, but in no file", self._listed() - present - wanted),
        ]
        if listed := "; ".join(filter(None, faults)):
            raise self.fault(f"its tensors are not those of its config.json: {listed}")

    def _file_names(self) -> set[str]:
        """Return the files with tensors: model.safetensors, those of the index, or the only one.

        As in transformers, model.safetensors goes before an index, which is then an older one.
        """
        if not self.folder.is_dir():
            raise UserError(
                f"{self.option}={self.folder} is not a folder: give the folder of a Hugging Face model"
            )
        if (self.folder / WHOLE).is_file():
            return {WHOLE}
        if (self.folder / INDEX).is_file():
            return self._indexed_files()

        files = {path.name for path in regular_files(self.folder, "*.safetensors")}
        if len(files) == 1:
            return files
        if files:
            raise self.fault(
                f"{len(files)} safetensors files and no {INDEX} to say what is in them"
            )
        raise self._nothing_to_read()

    def _nothing_to_read(self) -> UserError:
        """Return the error of a folder without safetensors; it names the files of pickles that are there instead."""
        pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES)
        also = ""
        if pickles:
            also = f", only {', '.join(pickles[:3])}: pickles can run code and are not read"
        return self.fault(
            f"no safetensors files{also}: save the model with safe_serialization=True"
        )

    def _indexed_files(self) -> set[str]:
        """Return the files that the index names; they may not be outside the folder."""
        files = set(self._weight_map().values())
        for name in sorted(files):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise self.fault(
                    f"{INDEX} names {name}, which is not a safetensors file of the folder"
                )
        return files

    def _weight_map(self) -> dict[str, str]:
        """Return the file of each tensor, from the index."""
        path = self.folder / INDEX
        content = read_json(path, self.option, LARGEST_TABLE).get("weight_map")
        files = as_type(content, dict[str, str], path, self.option, "weight_map")
        if not files:
            raise self.fault(f"{INDEX} has no weight_map")
        return files

    def _open(self, name: str) -> Any:
        try:
            return open_safetensors(self.folder, name)
        except ValueError as error:
            raise self.fault(f"{name} cannot be read: {error}") from None

    def _unread(self) -> list[str]:
        """Return the names and types of tensors whose types are not read, such as those of quantized weights."""
        clauses = []
        for name, file in self._owner.items():
            kind = file.get_slice(name).get_dtype()
            if kind not in DTYPES:
                clauses.append(f"{name} {kind}")
        return clauses

    def _misshapen(self, expected: Mapping[str, Shape], fewer_rows: Set[str]) -> list[str]:
        """Return a clause for each tensor of another shape."""
        clauses = []
        for name in expected.keys() & self._owner.keys():
            shape, wanted = self.shape(name), expected[name]
            rows_may_differ = name in fewer_rows and len(shape) == 2
            has_fewer = rows_may_differ and shape[0] < wanted[0] and shape[1:] == wanted[1:]
            if shape != wanted and not has_fewer:
                clauses.append(f"{name} {list(shape)} instead of {list(wanted)}")
        return clauses

    def _listed(self) -> set[str]:
        """Return the tensors of the index; none where it is not used."""
        is_used = (self.folder / INDEX).is_file() and not (self.folder / WHOLE).is_file()
        return set(self._weight_map()) if is_used else set()


def open_safetensors(folder: Path, name: str) -> Any:
    """Open a file of tensors; its numbers are read when they are asked for.

    The library compares offsets, shapes and the file's size, but would parse a header of any size.

    Raises:
        ValueError: saying what is wrong with the file.
    """
    try:
        path = locate(folder, name)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LARGEST_HEADER:
            raise ValueError(f"its header has {header} bytes, at most {LARGEST_HEADER} are read")
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(one_line(str(error))) from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


def _named(fault: str, names: Iterable[str]) -> str:
    """Return the fault with the first names that have it; empty if none has."""
    ordered = sorted(names)
    if not ordered:
        return ""
    rest = len(ordered) - NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"{fault}: {', '.join(ordered[:NAMED])}{more}"
