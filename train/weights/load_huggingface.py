"""Weights of Hugging Face folders into a model in any layout."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.config import differences
from visionloom.model.huggingface.folder import HuggingFaceFolder
from visionloom.model.huggingface.part_config import part_differences
from visionloom.model.huggingface.part_folders import language_folder, tower_folder
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import canonical_parameters, cuts
from visionloom.model.trainable import group_of
from visionloom.parallel.divided import own_numbers, written
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.finite import require_finite


class ParameterSource(Protocol):
    """Full parameters by their canonical names, of which any part can be read."""

    def covers(self, name: str) -> bool:
        """Return whether the source has a parameter."""

    def parameter(self, name: str, region: Sequence[slice]) -> Tensor:
        """Read a region of a parameter."""


def load_huggingface(
    folder: Path, parts: list[Qwen3VL], config: ModelConfig, topology: Topology
) -> None:
    """Load a Hugging Face folder's weights into this rank's parts of the model, in the parts' own types.

    Each rank reads only what it holds. Call it before the model is wrapped and its optimizer built.

    Raises:
        UserError: if the folder is no whole model, another one than `config` (each field named), or has weights that are no numbers.
    """
    source = HuggingFaceFolder(folder, "init.huggingface")
    if faults := list(differences(config, source.config, folder)):
        raise UserError("; ".join(faults))
    fill(parts, source, topology, f"init.huggingface={folder}")


def load_language(
    folder: Path, parts: list[Qwen3VL], config: ModelConfig, topology: Topology
) -> None:
    """Load a folder's language model, as `load_huggingface`; vision tower and mergers stay as they are."""
    source = language_folder(folder, "init.language", config)
    if faults := part_differences(config, source.config, "text", folder):
        raise UserError("; ".join(faults))
    fill(parts, source, topology, f"init.language={folder}", "language")


def load_tower(folder: Path, parts: list[Qwen3VL], config: ModelConfig, topology: Topology) -> None:
    """Load a folder's vision tower, as `load_huggingface`; mergers and language model stay as they are."""
    source = tower_folder(folder, "init.vision", config)
    if faults := part_differences(config, source.config, "vision", folder):
        raise UserError("; ".join(faults))
    fill(parts, source, topology, f"init.vision={folder}", "vision")


def fill(
    parts: list[Qwen3VL], source: ParameterSource, topology: Topology, named: str, group: str = ""
) -> None:
    """Fill this rank's parameters that a source has; `group` alone, or all groups if it is empty.

    Raises:
        UserError: if there are weights that are no numbers; `named` says where they come from.
    """
    held = []
    for part in parts:
        for name, parameter in canonical_parameters(part):
            # A folder of a whole model has the other parts too.
            if source.covers(name) and group in ("", group_of(name)):
                held.append((name, parameter))
    with torch.no_grad():
        for name, parameter in held:
            with written(parameter):
                copy_parameter(name, parameter, source, topology)
    require_finite([(name, own_numbers(each)[1]) for name, each in held], named, topology)


def copy_parameter(
    name: str, parameter: Tensor, source: ParameterSource, topology: Topology
) -> None:
    """Fill this rank's part of a parameter; call it without gradients."""
    dim, begin = 0, 0
    for region in held_regions(name, parameter, topology):
        part = source.parameter(name, region)
        parameter.narrow(dim, begin, part.shape[dim]).copy_(part)
        begin += part.shape[dim]


def held_regions(name: str, parameter: Tensor, topology: Topology) -> Iterator[list[slice]]:
    """Yield the regions of the full parameter that this rank holds, in order: gate and up projection are two."""
    region = [slice(0, size) for size in parameter.shape]
    for cut in cuts(name, parameter, topology):
        size = parameter.shape[cut.dim]
        if cut.halves:
            # Rows of gate and up projection are stacked: a rank has its share of each.
            half = size // 2
            for begin in (cut.rank * half, (cut.size + cut.rank) * half):
                yield [slice(begin, begin + half), *region[1:]]
            return
        region[cut.dim] = slice(cut.rank * size, (cut.rank + 1) * size)
    yield region
