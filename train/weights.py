"""Weights of a Hugging Face folder into a model in any layout, and the files that travel with them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from visionloom.model.config import ModelConfig
from visionloom.model.huggingface_config import differences
from visionloom.model.huggingface_folder import HuggingFaceFolder
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.shapes import parameter_shapes
from visionloom.model.sharding import canonical_parameters, cuts
from visionloom.parallel.errors import UserError
from visionloom.parallel.topology import Topology
from visionloom.train.config import InitConfig

COMPANIONS: Final = "huggingface"
"""Folder inside a run's folder or an imported checkpoint with the source's files that hold no weights."""
CARRIED: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files that an exported folder takes along; never code."""


def load_huggingface(folder: Path, chunks: list[Qwen3VL], config: ModelConfig, topology: Topology) -> None:
    """Give this rank's chunks their parts of a Hugging Face folder's weights, in the chunks' own types.

    Each rank reads only what it holds. Call it before the model is wrapped and its optimizer built.

    Raises:
        UserError: if the folder is no whole model or another one than `config` (each field named).
    """
    source = HuggingFaceFolder(folder, "init.huggingface")
    if found := differences(config, source.config, folder):
        raise UserError("; ".join(found))
    known = parameter_shapes(config)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in canonical_parameters(chunk):
                if name in known:
                    copy_parameter(name, parameter, source, topology)


def copy_parameter(name: str, parameter: Tensor, source: HuggingFaceFolder, topology: Topology) -> None:
    """Fill this rank's part of a parameter."""
    dim, begin = 0, 0
    for region in held_regions(name, parameter, topology):
        part = source.parameter(name, region)
        parameter.narrow(dim, begin, part.shape[dim]).copy_(part)
        begin += part.shape[dim]


def held_regions(name: str, parameter: Tensor, topology: Topology) -> Iterator[list[slice]]:
    """Regions of the full parameter that this rank holds, one above the other: gate and up projection are two."""
    region = [slice(0, size) for size in parameter.shape]
    for cut in cuts(name, parameter, topology):
        size = parameter.shape[cut.dim]
        if cut.halves:
            half = size // 2
            for begin in (cut.rank * half, (cut.size + cut.rank) * half):
                yield [slice(begin, begin + half), *region[1:]]
            return
        region[cut.dim] = slice(cut.rank * size, (cut.rank + 1) * size)
    yield region


def carry_into_run(init: InitConfig, run_folder: Path) -> None:
    """Keep the files that came with a run's first weights in the run's folder, so that an export finds them."""
    sources = [Path(init.huggingface)] if init.huggingface else []
    sources += companions_of(Path(init.checkpoint)) if init.checkpoint else []
    for source in reversed(sources):
        carry(source, run_folder / COMPANIONS)


def companions_of(checkpoint_folder: Path) -> list[Path]:
    """Folders with files that came with the weights of a checkpoint: its own, or its run's."""
    parents = checkpoint_folder.resolve().parents
    found = [checkpoint_folder / COMPANIONS, *([parents[2] / COMPANIONS] if len(parents) > 2 else [])]
    return [folder for folder in found if folder.is_dir()]


def carry(source: Path, target: Path) -> list[str]:
    """Copy the files that travel with weights and hold none; returns their names."""
    found = [name for name in CARRIED if (source / name).is_file()]
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
