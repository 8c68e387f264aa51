"""Read a folder of a Hugging Face model as parameters of ours: any part of any parameter without the rest."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Final

import torch
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.model.config import ModelConfig, TextConfig
from visionloom.model.huggingface.config import read_config
from visionloom.model.huggingface.names import (
    HEAD,
    OUTER_NAMES,
    convert_parameter,
    huggingface_shapes,
    read_parameter,
)
from visionloom.model.huggingface.shapes import Shape, parameter_shapes
from visionloom.model.huggingface.tensor_files import TensorFiles
from visionloom.model.sharding import EMBEDDING
from visionloom.model.trainable import group_of

SEPARATE_EXPERT: Final = re.compile(r"\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight$")
STACKED_EXPERTS: Final = re.compile(r"\.mlp\.experts\.(gate_up|down)_proj$")


class HuggingFaceFolder:
    """A TensorSource of a whole model; the files stay open and are read where a region asks for it."""

    groups: ClassVar[tuple[str, ...]] = ("vision", "merger", "language")
    """Parameter groups that the folder has."""
    prefixes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """How names of a whole model begin, and what stands there in the folder instead."""
    left_alone: ClassVar[tuple[str, ...]] = ()
    """How names of tensors begin that may be there and are not read."""

    def __init__(self, folder: Path, option: str = "hf", model: ModelConfig | None = None) -> None:
        """Read config.json and the headers of all files.

        Args:
            folder: of the model.
            option: that names the folder in errors.
            model: the other parts of the model where the folder has one alone.

        Raises:
            UserError: if config.json is of another kind of model, a file is missing or damaged, or tensors are missing, left
                over, or of another shape or type than config.json says: all of them in one error.
        """
        self.folder, self.option = folder, option
        self.config = self._read_config(model or ModelConfig())
        self._parameters = parameter_shapes(self.config)
        self.files = TensorFiles(folder, option)
        self.expert_layout = self._layout(self.config.text)
        self._check()

    def _read_config(self, model: ModelConfig) -> ModelConfig:
        """Return the model of which the folder has its part."""
        return read_config(self.folder, self.option)

    def covers(self, name: str) -> bool:
        """Return whether the folder has one of our parameters, by its canonical name."""
        return name in self._parameters and group_of(name) in self.groups

    def spelled(self, name: str) -> str:
        """Return the name in the files of a tensor of transformers' whole model."""
        for whole, part in self.prefixes.items():
            if name.startswith(whole):
                return part + name.removeprefix(whole)
        return name

    def shape(self, name: str) -> Shape:
        """Return the full shape of a tensor."""
        return self.files.shape(self.spelled(name))

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor's elements."""
        return self.files.dtype(self.spelled(name))

    def read(self, name: str, region: Sequence[slice]) -> Tensor:
        """Read a part of a tensor, and nothing else of it."""
        return self.files.read(self.spelled(name), region)

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors, as the files have them."""
        return self.files.names

    def parameter(self, name: str, region: Sequence[slice]) -> Tensor:
        """Read a region of one of our parameters, as `read_parameter`; a tied output matrix must equal the embedding.

        Raises:
            UserError: if config.json ties the two and the folder holds different ones.
        """
        part = read_parameter(name, region, self, self.config)
        if name == EMBEDDING and self.config.text.tie_embeddings and HEAD in self.files:
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
            theirs = self.spelled(OUTER_NAMES[EMBEDDING])
            raise UserError(
                f"{self.option}={self.folder}: {HEAD} is not {theirs}, but config.json has"
                " tie_word_embeddings true: set it to false"
            )

    def parameter_dtype(self, name: str, shape: Shape) -> torch.dtype:
        """Return the type that holds one of our parameters without loss, by its canonical name and full shape."""
        # The meta device: shapes and names without memory.
        full = torch.empty(shape, device="meta")
        parts = convert_parameter(name, full, self.config, self.expert_layout)
        return functools.reduce(torch.promote_types, map(self.dtype, parts))

    def _layout(self, text: TextConfig) -> str:
        """Return how experts are laid out, one of names.LAYOUTS.

        Shapes distinguish the published layout from transformers'. One of the two stacks may be square (2 x width or width
        equal to the hidden size) and then says nothing, but never both: the other one decides, and all layers must agree.
        """
        if not text.experts:
            return "transformers"
        if any(SEPARATE_EXPERT.search(name) for name in self.names):
            return "separate"

        hidden, width = text.hidden_size, text.expert_ffn_hidden_size
        votes = set()
        for name in filter(STACKED_EXPERTS.search, self.names):
            # As transformers has them; the published ones are the reverse.
            sides = (2 * width, hidden) if "gate_up" in name else (hidden, width)
            shape = self.files.shape(name)[1:]
            if sides[0] == sides[1]:
                continue
            if shape == sides:
                votes.add("transformers")
            elif shape == sides[::-1]:
                votes.add("hub")
        if len(votes) > 1:
            raise self.files.fault(
                "some experts are laid out as published and some as transformers writes them: save it anew"
            )
        return votes.pop() if votes else "transformers"

    def _check(self) -> None:
        """Compare the tensors of the files with those that config.json describes; UserError with all that is wrong."""
        theirs = huggingface_shapes(self.config, self.expert_layout, self.covers)
        expected = {self.spelled(name): shape for name, shape in theirs.items()}
        left_alone = [name for name in self.names if name.startswith(self.left_alone)]
        # A tied output matrix is often there: `parameter` compares it with the embedding.
        if self.config.text.tie_embeddings:
            left_alone.append(HEAD)
        fewer_rows = {HEAD, self.spelled(OUTER_NAMES[EMBEDDING])}
        self.files.check(expected, left_alone, fewer_rows)
