"""Names and layouts of PEFT's LoRA adapters on transformers' Qwen3-VL, both ways, on full (uncut) tensors.

A part (q_proj, gate_proj, ...) is a module there. Experts are PEFT's `target_parameters`: all experts' factors in one matrix
each, A as [experts x r, in] and B as [out, r x experts] with the expert running fastest. Reference: peft's ParamWrapper.
Nothing of peft is imported.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from visionloom.model.config import ModelConfig
from visionloom.model.lora_config import LinearLayer, LoraConfig, adapted_layers, linear_layers
from visionloom.model.trainable import ADAPTER

PREFIX = "base_model.model."
NAMED = 4
"""Tensors named for a fault; the others are counted."""


def adapter_names(layer: LinearLayer) -> dict[str, tuple[str, str]]:
    """Canonical names of a layer's A and B, by part."""
    return {
        part: (f"{layer.name}{ADAPTER}lora_A.{part}", f"{layer.name}{ADAPTER}lora_B.{part}")
        for part in layer.parts
    }


def peft_names(layer: LinearLayer, part: str, both: bool) -> tuple[str, str]:
    """PEFT's names of a part's A and B; `both`: whether both matrices of the experts have adapters, one wrapped in the other."""
    inner = (
        f"{'.base_layer' if both and part == 'gate_up_proj' else ''}"
        if layer.experts
        else f".{part}"
    )
    return (
        f"{PREFIX}{layer.theirs}{inner}.lora_A.weight",
        f"{PREFIX}{layer.theirs}{inner}.lora_B.weight",
    )


def to_peft(ours: Mapping[str, Tensor], model: ModelConfig, lora: LoraConfig) -> dict[str, Tensor]:
    """PEFT's state dict of an adapter from full tensors by canonical names."""
    state: dict[str, Tensor] = {}
    layers = adapted_layers(model, lora)
    for layer in layers:
        for part, names in adapter_names(layer).items():
            a, b = (ours[name] for name in names)
            if layer.experts:
                a, b = a.flatten(0, 1), b.flatten(1, -2).permute(1, 2, 0).flatten(1)
            there = peft_names(layer, part, _is_wrapped(layer, layers))
            state |= {there[0]: a.contiguous(), there[1]: b.contiguous()}
    return state


def from_peft(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Full tensors by canonical names from PEFT's state dict; the inverse of `to_peft`.

    Raises:
        ValueError: naming tensors that belong to no layer of the model, or have the wrong shape.
    """
    ours: dict[str, Tensor] = {}
    left = dict(state)
    for layer in linear_layers(model):
        wrapped = any(
            ".base_layer." in name and name.startswith(PREFIX + layer.theirs + ".")
            for name in state
        )
        for part, names in adapter_names(layer).items():
            there = peft_names(layer, part, wrapped)
            if (
                layer.experts
                and not wrapped
                and not _fits(layer, *(state.get(name) for name in there))
            ):
                continue  # the other matrix of the experts, whose adapter has this name too
            if there[0] in left and there[1] in left:
                a, b = left.pop(there[0]), left.pop(there[1])
                ours |= dict(zip(names, _ours(layer, part, a, b), strict=True))
    if left:
        named = ", ".join(sorted(left)[:NAMED]) + (
            f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        )
        raise ValueError(
            f"tensors that belong to no adapter of a linear layer of this model: {named}"
        )
    return ours


def _ours(layer: LinearLayer, part: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    width, many = layer.parts[part], layer.experts or 1
    if (
        a.dim() != 2
        or b.dim() != 2
        or a.shape[0] % many
        or tuple(b.shape) != (width, len(a))
        or a.shape[1] != layer.inputs
    ):
        raise ValueError(
            f"{layer.theirs}.{part} has factors {list(a.shape)} and {list(b.shape)} for {layer.inputs} -> {width}"
        )
    if not layer.experts:
        return a, b
    b = b.unflatten(1, (-1, layer.experts)).permute(2, 0, 1).contiguous()
    return a.unflatten(0, (layer.experts, -1)), b.unflatten(
        1, (2, -1)
    ) if part == "gate_up_proj" else b


def _fits(layer: LinearLayer, a: Tensor | None, b: Tensor | None) -> bool:
    return (
        a is not None and b is not None and (a.shape[-1], len(b)) == (layer.inputs, layer.outputs)
    )


def _is_wrapped(layer: LinearLayer, layers: list[LinearLayer]) -> bool:
    return sum(other.theirs == layer.theirs for other in layers if other.experts) > 1


def peft_config(model: ModelConfig, lora: LoraConfig, base: str) -> dict[str, Any]:
    """The content of adapter_config.json; modules and parameters by their whole names, so that no other is meant."""
    layers = adapted_layers(model, lora)
    names = {
        bool(e): [f"{x.theirs}.{p}" for x in layers for p in x.parts if bool(x.experts) == bool(e)]
        for e in (0, 1)
    }
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(names[False]),
        "target_parameters": names[True] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
