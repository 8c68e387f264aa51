"""Weights of a Hugging Face folder into a model in any layout."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from visionloom.common.errors import UserError
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.config import differences
from visionloom.model.huggingface.folder import HuggingFaceFolder
from visionloom.model.huggingface.shapes import parameter_shapes
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import canonical_parameters, cuts
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.finite import require_finite


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
    held = list(held_parameters(parts, config))
    with torch.no_grad():
        for name, parameter in held:
            copy_parameter(name, parameter, source, topology)
    weights = [(name, parameter.detach()) for name, parameter in held]
    require_finite(weights, f"init.huggingface={folder}", topology)


def held_parameters(
    parts: list[Qwen3VL], config: ModelConfig
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield this rank's parameters that a Hugging Face folder has, by canonical name."""
    known = parameter_shapes(config)
    for part in parts:
        for name, parameter in canonical_parameters(part):
            if name in known:
                # The parameter and not a detached tensor: its attributes say how it is cut.
                yield name, parameter


def copy_parameter(
    name: str, parameter: Tensor, source: HuggingFaceFolder, topology: Topology
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
