"""Check the adapter_config.json of a PEFT folder. Nothing here imports torch or peft.

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
    """Return whether a value is a list of names of modules, or one regular expression that is matched in linear time.

    Such an expression has no look-around and no references back.
    """
    if isinstance(value, str):
        return len(value) <= LONGEST and _expression(value) is not None
    return value is None or _is_list(value, str)


@functools.cache
def _expression(pattern: str) -> TypeAdapter[str] | None:
    """Return a check for texts that match a pattern as a whole; None if it cannot be used.

    Python's `re` may take for ever with a stranger's pattern; pydantic has the engine of Rust.
    """
    try:
        # First alone: a pattern such as `a)|(b` is valid only inside the brackets.
        TypeAdapter(Annotated[str, Field(pattern=pattern)])
        return TypeAdapter(Annotated[str, Field(pattern=rf"\A(?:{pattern})\z")])
    except SchemaError:
        return None


def _is_part(value: Any) -> bool:
    """Return whether a value is names of lists of layers; plain ones, as peft puts them into an expression of its own."""
    if value is None:
        return True
    names = [value] if isinstance(value, str) else value
    return _is_list(names, str) and all(re.fullmatch(r"[\w.]*", name) for name in names)


def _is_list(value: Any, kind: type) -> bool:
    """Return whether a value is a list whose entries are of one type; true and false are no whole numbers."""
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
        "modules_to_save": lambda value: value is None or _is_list(value, str),
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
    """Return the adapter_config.json of a plain LoRA adapter of `lora`'s rank and alpha.

    Raises:
        UserError: naming lora.adapter and every field that is not understood or differs.
    """
    config = read_json(folder / CONFIG, "lora.adapter")
    # A file without peft_type may be of any method: it is refused like one of another.
    problems = FIELDS.refusals({"peft_type": None} | config)
    for option, key in (("rank", "r"), ("alpha", "lora_alpha")):
        wanted = getattr(lora, option)
        if config.get(key) != wanted:
            given = f"{key} is {shown(config.get(key))}"
            problems.append(f"{given}, but lora.{option}={wanted:g}: set it alike")
    if config.get("modules_to_save") and not lora.full:
        saved = shown(config["modules_to_save"])
        problems.append(f"modules_to_save is {saved}: name their groups in lora.full")
    if problems:
        here = f"lora.adapter={folder}: {CONFIG}"
        clauses = one_line("; ".join(problems))
        raise UserError(f"{here} is not of a plain LoRA adapter as lora says: {clauses}")
    return config


def targets(config: Mapping[str, Any], name: str, is_parameter: bool) -> bool:
    """Return whether peft, loading this configuration, gives a module of the base model an adapter.

    `is_parameter`: the name is of a parameter, as experts have. A tensor for any other one is dropped there with a warning.
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
    """Return whether an expression matches a name as a whole, or one of a list of names is its end."""
    if not isinstance(pattern, str):
        return any(name == end or name.endswith(f".{end}") for end in pattern or [])
    expression = _expression(pattern)
    if not pattern or expression is None:
        return False
    try:
        return expression.validate_python(name) == name
    except ValidationError:
        return False


def _is_in_chosen_layers(config: Mapping[str, Any], module: str) -> bool:
    """Return whether a module is in one of `layers_to_transform`, which peft counts in the lists of `layers_pattern`."""
    chosen = config.get("layers_to_transform")
    if chosen in (None, []):
        return True
    numbers = chosen if isinstance(chosen, list) else [chosen]

    patterns = config.get("layers_pattern") or []
    lists = [patterns] if isinstance(patterns, str) else patterns
    # The expressions of peft's check_target_module_exists; without a pattern any list counts.
    before = [rf"(?:^|.*?\.){each}\." for each in lists] or [r".*?\.[^.]*\."]
    for each in before:
        if match := re.match(rf"{each}(\d+)\.", module):
            return int(match[1]) in numbers
    return False
