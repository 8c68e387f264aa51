"""Convert names and layouts of PEFT's LoRA adapters on transformers' Qwen3-VL, both ways, on full (uncut) tensors.

A part (q_proj, gate_proj, ...) is a module there. Experts are PEFT's `target_parameters`: all experts' factors in one matrix
each, A as [experts x r, in] and B as [out, r x experts] with the expert running fastest. Reference: peft's ParamWrapper.
Nothing of peft is imported.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.names import convert_parameter
from visionloom.model.huggingface.shapes import parameter_shapes
from visionloom.model.lora_config import LinearLayer, LoraConfig, adapted_layers, linear_layers
from visionloom.model.trainable import ADAPTER, group_of

PREFIX = "base_model.model."
NAMED = 4
"""Tensors named for a fault; the others are counted."""


def adapter_names(layer: LinearLayer) -> dict[str, tuple[str, str]]:
    """Return the canonical names of a layer's A and B, by part."""
    adapter = layer.name + ADAPTER
    names = {}
    for part in layer.parts:
        names[part] = (f"{adapter}lora_A.{part}", f"{adapter}lora_B.{part}")
    return names


def peft_names(layer: LinearLayer, part: str, both: bool) -> tuple[str, str]:
    """Return PEFT's names of a part's A and B.

    Args:
        layer: the layer.
        part: one of its parts.
        both: whether both matrices of the experts have adapters; the first is then wrapped in the second's.
    """
    module = f"{PREFIX}{layer.theirs}"
    if not layer.experts:
        module += f".{part}"
    elif both and part == "gate_up_proj":
        module += ".base_layer"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def whole_parameters(model: ModelConfig, lora: LoraConfig) -> list[str]:
    """Return the canonical names of the parameters that train themselves beside the adapters, of lora.full."""
    return [name for name in parameter_shapes(model) if group_of(name) in lora.full]


def whole_modules(model: ModelConfig, lora: LoraConfig) -> list[str]:
    """Return peft's `modules_to_save` of lora.full: names of modules that are called as a whole, by their ends."""
    vision = model.vision
    by_group = {
        "vision": ["patch_embed", "pos_embed", *(f"blocks.{n}" for n in range(vision.depth))],
        "merger": [
            "merger",
            *(f"deepstack_merger_list.{n}" for n in range(len(vision.deepstack_layers))),
        ],
    }
    return [f"visual.{module}" for group in lora.full for module in by_group[group]]


def to_peft(
    ours: Mapping[str, Tensor],
    model: ModelConfig,
    lora: LoraConfig,
) -> dict[str, Tensor]:
    """Return PEFT's state dict of an adapter from full tensors by canonical names."""
    state: dict[str, Tensor] = {}
    for name in whole_parameters(model, lora):
        for theirs, tensor in convert_parameter(name, ours[name], model).items():
            state[PREFIX + theirs] = tensor.contiguous()
    layers = adapted_layers(model, lora)
    expert_modules = [layer.theirs for layer in layers if layer.experts]
    for layer in layers:
        wrapped = expert_modules.count(layer.theirs) > 1
        for part, names in adapter_names(layer).items():
            a, b = (ours[name] for name in names)
            if layer.experts:
                a = a.flatten(0, 1)
                # [experts, out, r] -> [out, r x experts], the expert running fastest.
                b = b.flatten(1, -2).permute(1, 2, 0).flatten(1)
            name_a, name_b = peft_names(layer, part, wrapped)
            state[name_a] = a.contiguous()
            state[name_b] = b.contiguous()
    return state


def from_peft(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Return full tensors by canonical names from PEFT's state dict, adapters and whole weights; the inverse of `to_peft`.

    Raises:
        ValueError: naming tensors that belong to no layer of the model, or have the wrong shape.
    """
    ours: dict[str, Tensor] = {}
    left = dict(state)
    for layer in linear_layers(model):
        module = f"{PREFIX}{layer.theirs}."
        wrapped = any(name.startswith(module) and ".base_layer." in name for name in state)
        for part, names in adapter_names(layer).items():
            theirs = peft_names(layer, part, wrapped)
            # Where one matrix of the experts has an adapter, only sizes say which of the two it is.
            if layer.experts and not wrapped and not _has_sizes(state, theirs, layer):
                continue
            if theirs[0] in left and theirs[1] in left:
                pair = _checked_factors(layer, part, left.pop(theirs[0]), left.pop(theirs[1]))
                ours |= dict(zip(names, pair, strict=True))
    ours |= _take_whole(left, model)
    _refuse_others(left)
    return ours


def _take_whole(left: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Take the weights of tower and mergers out of PEFT's state, which `modules_to_save` puts there; see `from_peft`."""
    ours: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(model).items():
        theirs = f"{PREFIX}model.{name}"
        if group_of(name) == "language" or theirs not in left:
            continue
        tensor = left.pop(theirs)
        # The patch embedding is a convolution there: as many numbers, in the same order.
        if tensor.numel() != math.prod(shape):
            raise ValueError(f"{theirs} has shape {list(tensor.shape)} for {list(shape)}")
        ours[name] = tensor.reshape(shape)
    return ours


def _has_sizes(state: Mapping[str, Tensor], names: tuple[str, str], layer: LinearLayer) -> bool:
    """Return whether two factors are there and have the widths of a layer."""
    a, b = (state.get(name) for name in names)
    if a is None or b is None:
        return False
    return (a.shape[-1], len(b)) == (layer.inputs, layer.outputs)


def _refuse_others(left: Mapping[str, Tensor]) -> None:
    """Refuse tensors that no layer has taken, naming some."""
    if not left:
        return
    named = ", ".join(sorted(left)[:NAMED])
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    raise ValueError(
        f"tensors that belong to no adapter of a linear layer of this model: {named}{more}"
    )


def _checked_factors(
    layer: LinearLayer,
    part: str,
    a: Tensor,
    b: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return PEFT's factors as model/lora.py has them, of experts A [experts, r, in] and B [experts, out, r].

    Raises ValueError unless A is [r, in] and B [out, r], or r times the experts in both.
    """
    width, experts = layer.parts[part], layer.experts
    fit = (
        a.dim() == b.dim() == 2
        and len(a) % (experts or 1) == 0
        and tuple(b.shape) == (width, len(a))
        and a.shape[1] == layer.inputs
    )
    if not fit:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        module = f"{layer.theirs}.{part}"
        raise ValueError(f"{module} has factors {shapes} for {layer.inputs} -> {width}")
    if not experts:
        return a, b

    a = a.unflatten(0, (experts, -1))
    b = b.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()
    # Gate and up have a dim of their own.
    return a, b.unflatten(1, (2, -1)) if part == "gate_up_proj" else b


def peft_config(model: ModelConfig, lora: LoraConfig, base: str) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Modules and parameters are named by their whole names, so that no other is meant.
    """
    modules: list[str] = []
    parameters: list[str] = []
    for layer in adapted_layers(model, lora):
        names = parameters if layer.experts else modules
        names += [f"{layer.theirs}.{part}" for part in layer.parts]
    # An int in peft's LoraConfig, though any number works there.
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        "target_parameters": parameters or None,
        "modules_to_save": whole_modules(model, lora) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
