"""Adapters from PEFT's folders; a pickle (adapter_model.bin) is never opened. Export is in adapter_export.py."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visionloom.model.lora_config import LoraConfig, adapted_layers
from visionloom.model.peft import adapter_names, from_peft
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import canonical_parameters, cut
from visionloom.model.trainable import is_adapter
from visionloom.parallel.errors import UserError
from visionloom.parallel.topology import Topology

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
UNREAD = {
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "bias": "none",
}
"""Keys of adapter_config.json that change what an adapter is, and the only value of each that is read."""


def load_adapter(folder: Path, chunks: list[Qwen3VL], topology: Topology) -> None:
    """Give the adapters of this rank's chunks what a PEFT folder holds; parts that it lacks (say k_proj) begin new.

    Raises:
        UserError: if the folder is no LoRA adapter of this model, has layers that lora.targets leaves out, or another rank or
            alpha than `lora`.
    """
    config, lora = chunks[0].model_config, chunks[0].lora
    assert lora is not None
    try:
        ours = from_peft(_read(folder, lora), config)
    except ValueError as error:
        raise UserError(f"lora.adapter={folder}: {error}") from error
    known = {name for layer in adapted_layers(config, lora) for pair in adapter_names(layer).values() for name in pair}
    if left := sorted(set(ours) - known):
        raise UserError(f"lora.adapter={folder} adapts {left[0]}: widen lora.targets and lora.groups to have it")
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in canonical_parameters(chunk):
                if is_adapter(name) and name in ours:
                    parameter.copy_(cut(name, ours[name], parameter, topology))


def _read(folder: Path, lora: LoraConfig) -> dict[str, Tensor]:
    """The tensors of a PEFT folder whose configuration `lora` can take over."""
    if not (folder / WEIGHTS).is_file():
        found = f"only {PICKLE}, a pickle, which is not read: save it as safetensors" if (folder / PICKLE).exists() else "none"
        raise ValueError(f"{WEIGHTS} is needed, the folder has {found}")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')}, not LORA")
    odd = [key for key, value in UNREAD.items() if (config.get(key) or value) != value]
    if odd:
        raise ValueError(f"{odd[0]}={config[odd[0]]} is not supported")
    for option, key in (("rank", "r"), ("alpha", "lora_alpha")):
        if config.get(key) != getattr(lora, option):
            raise ValueError(f"{key} is {config.get(key)}, but lora.{option}={getattr(lora, option):g}: set it alike")
    return tensors
