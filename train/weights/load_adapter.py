"""Adapters from PEFT's folders; a pickle (adapter_model.bin) is never opened. exchange/export_adapter.py writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.common.text import one_line
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.peft import adapter_names, from_peft, whole_parameters
from visionloom.model.huggingface.peft_config import CONFIG, read_adapter_config, targets
from visionloom.model.huggingface.safetensors_writer import DTYPES
from visionloom.model.huggingface.tensor_files import open_safetensors
from visionloom.model.lora_config import LinearLayer, LoraConfig, adapted_layers, linear_layers
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import canonical_parameters, cut
from visionloom.parallel.divided import written
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.finite import require_finite

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def load_adapter(folder: Path, parts: list[Qwen3VL], topology: Topology) -> None:
    """Load a PEFT folder into this rank's parts; layers that it lacks (say k_proj) begin new, groups of lora.full as they are.

    Raises:
        UserError: if the folder is no LoRA adapter of this model, has layers that lora.targets leaves out, or another rank or
            alpha than `lora`.
    """
    model, lora = parts[0].model_config, parts[0].lora
    assert lora is not None
    try:
        # Shapes first: before anything of a stranger's size is read.
        _check_shapes(folder, model, lora)
        adapters = from_peft(_read(folder), model)
    except ValueError as error:
        raise UserError(f"lora.adapter={folder}: {one_line(str(error))}") from error
    require_finite(adapters.items(), f"lora.adapter={folder}", topology)

    known = set(whole_parameters(model, lora))
    for layer in adapted_layers(model, lora):
        for pair in adapter_names(layer).values():
            known.update(pair)
    if left := sorted(set(adapters) - known):
        raise UserError(
            f"lora.adapter={folder} has {left[0]}: widen lora.targets and lora.groups to have it,"
            " or lora.full where it is a weight"
        )

    with torch.no_grad():
        for part in parts:
            for name, parameter in canonical_parameters(part):
                if name not in adapters:
                    continue
                with written(parameter):
                    parameter.copy_(cut(name, adapters[name], parameter, topology))


def _check_shapes(folder: Path, model: ModelConfig, lora: LoraConfig) -> None:
    """Refuse a PEFT folder whose adapters are not those of its configuration, without reading a number.

    Raises:
        ValueError: naming an adapter and what is wrong with it.
        UserError: if the configuration itself does not fit.
    """
    config = read_adapter_config(folder, lora)
    adapters = from_peft(_described(folder), model)
    for layer in linear_layers(model):
        for part, names in adapter_names(layer).items():
            if names[0] in adapters:
                factors = [adapters[name] for name in names]
                _check_part(config, layer, part, factors, lora)


def _described(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a PEFT folder on the meta device, without their numbers."""
    file = _open(folder)
    tensors = {}
    for name in file.keys():  # noqa: SIM118 (the file is no dict)
        stored = file.get_slice(name)
        dtype = DTYPES.get(stored.get_dtype())
        if dtype is None:
            raise ValueError(f"{WEIGHTS} has a type that is not read: {name} {stored.get_dtype()}")
        tensors[name] = torch.empty(stored.get_shape(), dtype=dtype, device="meta")
    return tensors


def _read(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a PEFT folder."""
    file = _open(folder)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _open(folder: Path) -> Any:
    """Open the file with the tensors; ValueError if it is missing or damaged."""
    if not (folder / WEIGHTS).exists():
        content = "none"
        if (folder / PICKLE).exists():
            content = f"only {PICKLE}, a pickle, which is not read: save it as safetensors"
        raise ValueError(f"{WEIGHTS} is needed, the folder has {content}")
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
    """Refuse an adapter of another rank, or one that the file's configuration leaves out.

    Args:
        config: adapter_config.json.
        layer: that is adapted.
        part: of the layer.
        factors: of the adapter: A [.., rank, in] and B [.., out, rank].
        lora: of the run.
    """
    name = f"{layer.theirs}.{part}"
    rank, rank_of_b = factors[0].shape[-2], factors[1].shape[-1]
    if rank != lora.rank or rank_of_b != lora.rank:
        raise ValueError(
            f"{name} is of rank {rank}, but r in {CONFIG} and lora.rank are {lora.rank}"
        )
    if not targets(config, name, bool(layer.experts)):
        fields = "target_modules, exclude_modules and layers_to_transform"
        if layer.experts:  # stacks of experts are no modules
            fields = "target_parameters"
        raise ValueError(f"{WEIGHTS} adapts {name}, which {fields} in {CONFIG} leave out")
