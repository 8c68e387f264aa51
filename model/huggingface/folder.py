"""Read a folder of a Hugging Face model: its tensors' names and shapes, and any part of a tensor without the rest.

Only safetensors are read, which hold numbers and nothing that could run. Files of pickles (.bin, .pt, .pth) are never opened.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.common.places import locate, regular_files
from visionloom.common.text import one_line
from visionloom.model.huggingface.config import LARGEST_TABLE, as_type, read_config, read_json
from visionloom.model.huggingface.names import (
    HEAD,
    OUTER_NAMES,
    convert_parameter,
    huggingface_shapes,
    read_parameter,
)
from visionloom.model.huggingface.safetensors_writer import DTYPES
from visionloom.model.huggingface.shapes import Shape
from visionloom.model.sharding import EMBEDDING

WHOLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LARGEST_HEADER: Final = 1 << 25
"""Bytes: 32 MiB; the 36,000 tensors of the largest model, with experts apart and in one file, would take 6."""
NAMED: Final = 8
"""Tensors named for one kind of fault; the others are counted."""
SEPARATE_EXPERT: Final = re.compile(r"\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight$")
STACKED_EXPERTS: Final = re.compile(r"\.mlp\.experts\.(gate_up|down)_proj$")


class HuggingFaceFolder:
    """A TensorSource; the files stay open and are read where a region asks for it."""

    def __init__(self, folder: Path, option: str = "hf") -> None:
        """Read config.json and the headers of all files; `option` names the folder in errors.

        Raises:
            UserError: if config.json is not of a Qwen3-VL model, a file is missing or damaged, or tensors are missing, left
                over, or of another shape or type than config.json says: all of them in one error.
        """
        self.folder, self.option = folder, option
        self.config = read_config(folder, option)
        # Sorted, so that every rank names the same file in an error.
        self._files = {name: self._open(name) for name in sorted(self._file_names())}
        self._owner: dict[str, Any] = {}
        for file in self._files.values():
            # Its keys() makes a list; the file itself cannot be iterated.
            self._owner.update(dict.fromkeys(file.keys(), file))
        self.expert_layout = self._layout()
        self._check(huggingface_shapes(self.config, self.expert_layout))

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

    def parameter(self, name: str, region: Sequence[slice]) -> Tensor:
        """Read a region of one of our parameters, as `read_parameter`; a tied output matrix must equal the embedding.

        Raises:
            UserError: if config.json ties the two and the folder holds different ones.
        """
        part = read_parameter(name, region, self, self.config)
        if name == EMBEDDING and self.config.text.tie_embeddings and HEAD in self._owner:
            self._check_head(part, region)
        return part

    def _check_head(self, embedding: Tensor, region: Sequence[slice]) -> None:
        """Compare a region of the embedding with that of the output matrix, which transformers would drop unread."""
        # Rows of our vocabulary that the folder lacks are zeros in `embedding` and not in the file.
        end = self.shape(HEAD)[0]
        first = min(region[0].start, end)
        stop = min(region[0].stop, end)
        head = self.read(HEAD, [slice(first, stop), region[1]])
        if not torch.equal(head, embedding[: stop - first]):
            theirs = OUTER_NAMES[EMBEDDING]
            raise UserError(
                f"{self.option}={self.folder}: {HEAD} is not {theirs}, but config.json has"
                " tie_word_embeddings true: set it to false"
            )

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._owner)

    def parameter_dtype(self, name: str, shape: Shape) -> torch.dtype:
        """Return the type that holds one of our parameters without loss, by its canonical name and full shape."""
        # The meta device: shapes and names without memory.
        full = torch.empty(shape, device="meta")
        parts = convert_parameter(name, full, self.config, self.expert_layout)
        return functools.reduce(torch.promote_types, map(self.dtype, parts))

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
            raise self._fault(
                f"{len(files)} safetensors files and no {INDEX} to say what is in them"
            )
        raise self._nothing_to_read()

    def _nothing_to_read(self) -> UserError:
        """Return the error of a folder without safetensors; it names the files of pickles that are there instead."""
        pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES)
        also = ""
        if pickles:
            also = f", only {', '.join(pickles[:3])}: pickles can run code and are not read"
        return self._fault(
            f"no safetensors files{also}: save the model with safe_serialization=True"
        )

    def _indexed_files(self) -> set[str]:
        """Return the files that the index names; they may not be outside the folder."""
        files = set(self._weight_map().values())
        for name in sorted(files):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise self._fault(
                    f"{INDEX} names {name}, which is not a safetensors file of the folder"
                )
        return files

    def _weight_map(self) -> dict[str, str]:
        """Return the file of each tensor, from the index."""
        path = self.folder / INDEX
        content = read_json(path, self.option, LARGEST_TABLE).get("weight_map")
        files = as_type(content, dict[str, str], path, self.option, "weight_map")
        if not files:
            raise self._fault(f"{INDEX} has no weight_map")
        return files

    def _open(self, name: str) -> Any:
        try:
            return open_safetensors(self.folder, name)
        except ValueError as error:
            raise self._fault(f"{name} cannot be read: {error}") from None

    def _fault(self, text: str) -> UserError:
        return UserError(f"{self.option}={self.folder}: {one_line(text)}")

    def _layout(self) -> str:
        """Return how experts are laid out, one of names.LAYOUTS.

        Shapes distinguish the published layout from transformers'. One of the two stacks may be square (2 x width or width
        equal to the hidden size) and then says nothing, but never both: the other one decides, and all layers must agree.
        """
        text = self.config.text
        if not text.experts:
            return "transformers"
        if any(SEPARATE_EXPERT.search(name) for name in self._owner):
            return "separate"

        hidden, width = text.hidden_size, text.expert_ffn_hidden_size
        votes = set()
        for name in filter(STACKED_EXPERTS.search, self._owner):
            # As transformers has them; the published ones are the reverse.
            sides = (2 * width, hidden) if "gate_up" in name else (hidden, width)
            shape = self.shape(name)[1:]
            if sides[0] == sides[1]:
                continue
            if shape == sides:
                votes.add("transformers")
            elif shape == sides[::-1]:
                votes.add("hub")
        if len(votes) > 1:
            raise self._fault(
                "some experts are laid out as published and some as transformers writes them: save it anew"
            )
        return votes.pop() if votes else "transformers"

    def _check(self, expected: dict[str, Shape]) -> None:
        """Compare the tensors of the files with those that config.json describes; UserError with all that is wrong."""
        present = self._owner.keys()
        # A tied output matrix is often there: `parameter` compares it with the embedding.
        left = present - expected.keys()
        if self.config.text.tie_embeddings:
            left.discard(HEAD)

        faults = [
            _named("missing", expected.keys() - present),
            _named("left over", left),
            _named("of another shape", self._misshapen(expected)),
            _named("of a type that is not read", self._unread()),
            _named("in the index, but in no file", self._listed() - present - expected.keys()),
        ]
        if any(faults):
            raise self._fault(
                f"its tensors are not those of its config.json: {'; '.join(filter(None, faults))}"
            )

    def _unread(self) -> list[str]:
        """Return the names and types of tensors whose types are not read, such as those of quantized weights."""
        clauses = []
        for name, file in self._owner.items():
            kind = file.get_slice(name).get_dtype()
            if kind not in DTYPES:
                clauses.append(f"{name} {kind}")
        return clauses

    def _misshapen(self, expected: Mapping[str, Shape]) -> list[str]:
        """Return a clause for each tensor of another shape; matrices of the vocabulary may have fewer rows."""
        clauses = []
        for name in expected.keys() & self._owner.keys():
            shape, wanted = self.shape(name), expected[name]
            rows_may_differ = name in (HEAD, OUTER_NAMES[EMBEDDING]) and len(shape) == 2
            fewer_rows = rows_may_differ and shape[0] < wanted[0] and shape[1:] == wanted[1:]
            if shape != wanted and not fewer_rows:
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
