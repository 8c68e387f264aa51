"""A folder of a Hugging Face model on disk: what is in it, and any part of any tensor without reading the rest.

Only safetensors are read, which hold numbers and nothing that could run. Files of pickles (.bin, .pt, .pth) are never opened.
"""

import functools
import re
from collections.abc import Iterable, Sequence
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
from visionloom.model.huggingface.shapes import Shape
from visionloom.model.sharding import EMBEDDING

WHOLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LARGEST_HEADER: Final = 1 << 25
"""Bytes: 32 MiB; the 36,000 tensors of the largest model, with experts apart and in one file, would take 6."""
NAMED: Final = 8
"""Tensors named for one kind of fault; the others are counted."""


class HuggingFaceFolder:
    """A Source of tensors; the files stay open and are read where a region asks for it."""

    def __init__(self, folder: Path, option: str = "hf") -> None:
        """Read config.json and the headers of all files; `option` names the folder in errors.

        Raises:
            UserError: if config.json is not of a Qwen3-VL model, a file is missing or damaged, or tensors are missing, left
                over, or of another shape or type than config.json says: all of them in one error.
        """
        self.folder, self.option = folder, option
        self.config = read_config(folder, option)
        self._files = {name: self._open(name) for name in sorted(self._file_names())}
        self._owner = {tensor: file for file in self._files.values() for tensor in file.keys()}  # noqa: SIM118
        self.expert_layout = self._layout()
        self._check(huggingface_shapes(self.config, self.expert_layout))

    def shape(self, name: str) -> Shape:
        """Full shape of a tensor."""
        return tuple(self._owner[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return DTYPES[self._owner[name].get_slice(name).get_dtype()]

    def read(self, name: str, region: Sequence[slice]) -> Tensor:
        """Part of a tensor; nothing else of it is read."""
        part: Tensor = self._owner[name].get_slice(name)[tuple(region)]
        return part

    def parameter(self, name: str, region: Sequence[slice]) -> Tensor:
        """A region of one of our parameters, as `read_parameter`; a tied output matrix must equal the embedding.

        Raises:
            UserError: if config.json ties the two and the folder holds different ones.
        """
        found = read_parameter(name, region, self, self.config)
        if name == EMBEDDING and self.config.text.tie_embeddings and HEAD in self._owner:
            end = self.shape(HEAD)[0]
            rows = slice(min(region[0].start, end), min(region[0].stop, end))
            if not torch.equal(self.read(HEAD, [rows, region[1]]), found[: rows.stop - rows.start]):
                raise UserError(
                    f"{self.option}={self.folder}: {HEAD} is not {OUTER_NAMES[EMBEDDING]}, but config.json has"
                    " tie_word_embeddings true: set it to false"
                )
        return found

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._owner)

    def parameter_dtype(self, name: str, shape: Shape) -> torch.dtype:
        """The type that holds one of our parameters without loss, by its canonical name and full shape."""
        parts = convert_parameter(
            name, torch.empty(shape, device="meta"), self.config, self.expert_layout
        )
        return functools.reduce(torch.promote_types, map(self.dtype, parts))

    def _file_names(self) -> set[str]:
        """Files with tensors: model.safetensors, as in transformers also beside an older index, those of the index, or the only one."""
        if not self.folder.is_dir():
            raise UserError(
                f"{self.option}={self.folder} is not a folder: give the folder of a Hugging Face model"
            )
        if (self.folder / WHOLE).is_file():
            return {WHOLE}
        if (self.folder / INDEX).is_file():
            files = set(self._weight_map().values())
            for name in sorted(files):
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise self._fault(
                        f"{INDEX} names {name}, which is not a safetensors file of the folder"
                    )
            return files
        found = {path.name for path in regular_files(self.folder, "*.safetensors")}
        if len(found) == 1:
            return found
        if found:
            raise self._fault(
                f"{len(found)} safetensors files and no {INDEX} to say what is in them"
            )
        pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES)
        also = (
            f", only {', '.join(pickles[:3])}: pickles can run code and are not read"
            if pickles
            else ""
        )
        raise self._fault(
            f"no safetensors files{also}: save the model with safe_serialization=True"
        )

    def _weight_map(self) -> dict[str, str]:
        """The index: the file of each tensor."""
        path = self.folder / INDEX
        found = as_type(
            read_json(path, self.option, LARGEST_TABLE).get("weight_map"),
            dict[str, str],
            path,
            self.option,
            "weight_map",
        )
        if not found:
            raise self._fault(f"{INDEX} has no weight_map")
        return found

    def _open(self, name: str) -> Any:
        try:
            return open_safetensors(self.folder, name)
        except ValueError as error:
            raise self._fault(f"{name} cannot be read: {error}") from None

    def _fault(self, text: str) -> UserError:
        return UserError(f"{self.option}={self.folder}: {one_line(text)}")

    def _layout(self) -> str:
        """How experts are laid out.

        Shapes tell the published layout from transformers'. One of the two stacks may be square (2 x width or width equal to
        the hidden size) and tell nothing, but never both: the other one decides, and all layers must agree.
        """
        text = self.config.text
        if not text.experts:
            return "transformers"
        expert, hidden, inner = r"\.mlp\.experts\.", text.hidden_size, text.expert_ffn_hidden_size
        if any(
            re.search(expert + r"\d+\.(gate|up|down)_proj\.weight$", name) for name in self._owner
        ):
            return "separate"
        shapes = {
            name: self.shape(name)[1:]
            for name in self._owner
            if re.search(expert + r"(gate_up|down)_proj$", name)
        }
        # Both sides of a stack as transformers has them; the published ones are the reverse.
        sides = {True: (2 * inner, hidden), False: (hidden, inner)}
        votes = {
            "hub" if shape == sides["gate_up" in name][::-1] else "transformers"
            for name, shape in shapes.items()
            if len(set(shape)) == 2
            and shape in (sides["gate_up" in name], sides["gate_up" in name][::-1])
        }
        if len(votes) > 1:
            raise self._fault(
                "some experts are laid out as published and some as transformers writes them: save it anew"
            )
        return votes.pop() if votes else "transformers"

    def _check(self, expected: dict[str, Shape]) -> None:
        """Compare what is there with what config.json describes."""
        allowed = {HEAD} if self.config.text.tie_embeddings else set()
        vocabulary = {
            name
            for here, name in OUTER_NAMES.items()
            if here != "language_model.decoder.final_layernorm.weight"
        }
        wrong = []
        for name in expected.keys() & self._owner.keys():
            shape, wanted = self.shape(name), expected[name]
            fewer = (
                name in vocabulary
                and len(shape) == len(wanted)
                and shape[0] < wanted[0]
                and shape[1:] == wanted[1:]
            )
            if shape != wanted and not fewer:
                wrong.append(f"{name} {list(shape)} instead of {list(wanted)}")
        kinds = {name: self._owner[name].get_slice(name).get_dtype() for name in self._owner}
        faults = [
            _named("missing", expected.keys() - self._owner.keys()),
            _named("left over", self._owner.keys() - expected.keys() - allowed),
            _named("of another shape", wrong),
            _named(
                "of a type that is not read",
                (f"{n} {kind}" for n, kind in kinds.items() if kind not in DTYPES),
            ),
            _named(
                "in the index, but in no file",
                self._listed() - self._owner.keys() - expected.keys(),
            ),
        ]
        if any(faults):
            raise self._fault(
                f"its tensors are not those of its config.json: {'; '.join(filter(None, faults))}"
            )

    def _listed(self) -> set[str]:
        is_used = (self.folder / INDEX).is_file() and not (self.folder / WHOLE).is_file()
        return set(self._weight_map()) if is_used else set()


def open_safetensors(folder: Path, name: str) -> Any:
    """A file of tensors, open; its numbers are read when they are asked for.

    The library holds offsets, shapes and the file's size against each other; the header it would parse at any size.

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
    """The fault with the first names that have it; empty if none has."""
    found = sorted(names)
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"{fault}: {', '.join(found[:NAMED])}{more}" if found else ""
