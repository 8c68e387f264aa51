"""adapter_config.json of a PEFT folder: what of it is understood. Nothing here imports torch or peft.

Source: peft's LoraConfig (0.21), of which every field is in the table, and its check_target_module_exists.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from visionloom.common.errors import UserError
from visionloom.common.text import one_line
from visionloom.model.huggingface.config import read_json
from visionloom.model.huggingface.understood import UnderstoodFields, shown
from visionloom.model.lora_config import LoraConfig

CONFIG: Final = "adapter_config.json"
LONGEST: Final = 10_000
"""Characters of a pattern; unsloth writes some 300."""


def _is_pattern(value: Any) -> bool:
    """Names of modules, or one regular expression that is matched in linear time: no look-around, no references back."""
    if isinstance(value, str):
        return len(value) <= LONGEST and _expression(value) is not None
    return value is None or _is_list(value, str)


@functools.cache
def _expression(pattern: str) -> TypeAdapter[str] | None:
    """Takes the texts that match a pattern as a whole; None if it cannot be used.

    Python's `re` may take for ever with a stranger's pattern; pydantic has the engine of Rust.
    """
    try:
        TypeAdapter(Annotated[str, Field(pattern=pattern)])
        return TypeAdapter(Annotated[str, Field(pattern=rf"\A(?:{pattern})\z")])
    except SchemaError:
        return None


def _is_part(value: Any) -> bool:
    """Names of lists of layers: peft puts them into an expression of its own."""
    names = [value] if isinstance(value, str) else value
    return value is None or (
        _is_list(names, str) and all(re.fullmatch(r"[\w.]*", name) for name in names)
    )


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


FIELDS: Final = UnderstoodFields(
    read=frozenset({
        "r", "lora_alpha",
    }),
    without_effect=frozenset({
        "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config",
        "lora_dropout",  # of the training before; lora.dropout says that of this one
        "megatron_core", "qalora_group_size",  # count with megatron_config and use_qalora only
    }),
    only={
        # Which modules have adapters: `targets` compares them with the tensors.
        "target_modules": _is_pattern,
        "exclude_modules": _is_pattern,
        "target_parameters": lambda value: value is None or _is_list(value, str),
        "layers_to_transform": lambda value: value is None or type(value) is int or _is_list(value, int),
        "layers_pattern": _is_part,
        "peft_type": ("LORA",),
        "task_type": (None, "CAUSAL_LM"),
        "bias": ("none",),
        "fan_in_fan_out": (False,),
        "use_rslora": (False,),  # scales by alpha / sqrt(r)
        "use_dora": (False,),  # has magnitudes
        "modules_to_save": (None, []),  # whole modules beside the adapters
        # All else (pissa, olora, corda, loftq, lora_ga, ...) may stand for factors that belong to changed base weights. peft
        # writes true where it has converted such an adapter for the weights as they were.
        "init_lora_weights": (True, False, "gaussian"),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "megatron_config": (None,),
        "trainable_token_indices": (None, [], {}),
        "loftq_config": ({}, None),
        "eva_config": (None,),
        "corda_config": (None,),
        "lora_ga_config": (None,),
        "velora_config": (None,),
        "alora_invocation_tokens": (None,),  # an adapter that works behind certain tokens only
        "use_qalora": (False,),
        "monteclora_config": (None,),
        "layer_replication": (None, []),
        "lora_bias": (False,),
        "use_bdlora": (None,),
        "arrow_config": (None,),
        "kasa_config": (None,),
        "ensure_weight_tying": (False,),
    },
)  # fmt: skip
"""Every field of peft's LoraConfig; fields of other versions are refused by name unless they are off."""


def read_adapter_config(folder: Path, lora: LoraConfig) -> dict[str, Any]:
    """The adapter_config.json of a plain LoRA adapter of `lora`'s rank and alpha.

    Raises:
        UserError: naming lora.adapter and every field that is not understood or differs.
    """
    config = read_json(folder / CONFIG, "lora.adapter")
    found = FIELDS.refusals({"peft_type": None} | config)
    for option, key in (("rank", "r"), ("alpha", "lora_alpha")):
        if config.get(key) != getattr(lora, option):
            found.append(
                f"{key} is {shown(config.get(key))}, but lora.{option}={getattr(lora, option):g}: set it alike"
            )
    if found:
        raise UserError(
            f"lora.adapter={folder}: {CONFIG} is not of a plain LoRA adapter as lora says: {one_line('; '.join(found))}"
        )
    return config


def targets(config: Mapping[str, Any], name: str, is_parameter: bool) -> bool:
    """Whether peft, loading this configuration, gives a module (or, of experts, a parameter) of the base model an adapter.

    A tensor for any other one is dropped there with a warning.
    """
    if is_parameter:
        return _is_named(config.get("target_parameters"), name)
    target = config.get("target_modules")
    if _is_named(config.get("exclude_modules"), name):
        return False
    if target in ("all-linear", ["all-linear"]):
        return True
    if isinstance(target, str) or name in (target or []):
        return _is_named(target, name)
    return _is_named(target, name) and _is_in_chosen_layers(config, name)


def _is_named(pattern: str | list[str] | None, name: str) -> bool:
    if isinstance(pattern, str):
        expression = _expression(pattern)
        return bool(pattern) and expression is not None and _takes(expression, name)
    return any(name == end or name.endswith(f".{end}") for end in pattern or [])


def _takes(expression: TypeAdapter[str], name: str) -> bool:
    try:
        return expression.validate_python(name) == name
    except ValidationError:
        return False


def _is_in_chosen_layers(config: Mapping[str, Any], module: str) -> bool:
    chosen, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if chosen in (None, []):
        return True
    lists = [patterns] if isinstance(patterns, str) else patterns
    before = [rf"(?:^|.*?\.){each}\." for each in lists] or [r".*?\.[^.]*\."]
    found = [match for each in before if (match := re.match(rf"{each}(\d+)\.", module))]
    return bool(found) and int(found[0][1]) in (chosen if isinstance(chosen, list) else [chosen])
