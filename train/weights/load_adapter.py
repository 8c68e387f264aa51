"""Adapters from PEFT's folders; a pickle (adapter_model.bin) is never opened. Export is in adapter_export.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.common.text import one_line
from visionloom.model.huggingface.folder import open_safetensors
from visionloom.model.huggingface.peft import adapter_names, from_peft
from visionloom.model.huggingface.peft_config import CONFIG, read_adapter_config, targets
from visionloom.model.huggingface.safetensors_writer import DTYPES
from visionloom.model.lora_config import LinearLayer, LoraConfig, adapted_layers, linear_layers
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import canonical_parameters, cut
from visionloom.model.trainable import is_adapter
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.finite import require_finite

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def load_adapter(folder: Path, chunks: list[Qwen3VL], topology: Topology) -> None:
    """Give the adapters of this rank's chunks what a PEFT folder holds; parts that it lacks (say k_proj) begin new.

    Raises:
        UserError: if the folder is no LoRA adapter of this model, has layers that lora.targets leaves out, or another rank or
            alpha than `lora`.
    """
    model, lora = chunks[0].model_config, chunks[0].lora
    assert lora is not None
    config = read_adapter_config(folder, lora)
    try:
        ours = from_peft(_described(folder), model)  # before anything of a stranger's size is read
        for layer in linear_layers(model):
            for part, names in adapter_names(layer).items():
                if names[0] in ours:
                    _check_part(config, layer, part, [ours[name] for name in names], lora)
        ours = from_peft(_read(folder), model)
    except ValueError as error:
        raise UserError(f"lora.adapter={folder}: {one_line(str(error))}") from error
    require_finite(ours.items(), f"lora.adapter={folder}", topology)
    known = {
        name
        for layer in adapted_layers(model, lora)
        for pair in adapter_names(layer).values()
        for name in pair
    }
    if left := sorted(set(ours) - known):
        raise UserError(
            f"lora.adapter={folder} adapts {left[0]}: widen lora.targets and lora.groups to have it"
        )
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in canonical_parameters(chunk):
                if is_adapter(name) and name in ours:
                    parameter.copy_(cut(name, ours[name], parameter, topology))


def _described(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder without their numbers."""
    file = _open(folder)
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    kinds = {name: DTYPES.get(part.get_dtype()) for name, part in slices.items()}
    if odd := [
        f"{name} {slices[name].get_dtype()}" for name, kind in kinds.items() if kind is None
    ]:
        raise ValueError(f"{WEIGHTS} has a type that is not read: {odd[0]}")
    return {
        name: torch.empty(part.get_shape(), dtype=kinds[name], device="meta")
        for name, part in slices.items()
    }


def _read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder."""
    file = _open(folder)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _open(folder: Path) -> Any:
    """The file with the tensors."""
    if not (folder / WEIGHTS).exists():
        found = (
            f"only {PICKLE}, a pickle, which is not read: save it as safetensors"
            if (folder / PICKLE).exists()
            else "none"
        )
        raise ValueError(f"{WEIGHTS} is needed, the folder has {found}")
    try:
        return open_safetensors(folder, WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{WEIGHTS} cannot be read: {error}") from error


def _check_part(
    config: Mapping[str, Any],
    layer: LinearLayer,
    part: str,
    factors: list[Tensor],
    lora: LoraConfig,
) -> None:
    """Whether an adapter of the file is of the rank, and one that the file's configuration speaks of."""
    ranks, name = (factors[0].shape[-2], factors[1].shape[-1]), f"{layer.theirs}.{part}"
    if ranks != (lora.rank, lora.rank):
        raise ValueError(
            f"{name} is of rank {ranks[0]}, but r in {CONFIG} and lora.rank are {lora.rank}"
        )
    if not targets(config, name, bool(layer.experts)):
        fields = (
            "target_parameters"
            if layer.experts
            else "target_modules, exclude_modules and layers_to_transform"
        )
        raise ValueError(f"{WEIGHTS} adapts {name}, which {fields} in {CONFIG} leave out")
