"""The config.json of a folder with a part of a model alone: a language model, or a vision tower. Nothing here imports torch.

Source: transformers' Qwen3Config, Qwen3MoeConfig, Qwen3VLVisionConfig, SiglipVisionConfig and Siglip2VisionConfig.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.common.settings import check
from visionloom.common.text import one_line
from visionloom.model.config import ModelConfig, TextConfig, VisionConfig
from visionloom.model.huggingface.config import (
    CONFIG,
    config_of,
    differences,
    read_json,
    text_fields,
    vision_fields,
)
from visionloom.model.huggingface.config_keys import (
    ARCHITECTURES,
    DENSE,
    MIXTURE,
    ConfigKeys,
    is_a,
)
from visionloom.model.huggingface.understood import shown

LANGUAGE_MODELS: Final = {"qwen3": DENSE, "qwen3_moe": MIXTURE}
"""Kinds of language models alone, and the kind of model whose part they are."""
TOWERS: Final = (DENSE, f"{DENSE}_vision", MIXTURE, f"{MIXTURE}_vision")
SIGLIP: Final = ("siglip_vision_model", "siglip2_vision_model")
WHOLE_SIGLIP: Final = ("siglip", "siglip2")
SIGLIP_KEYS: Final = {
    "depth": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "patch_size": "patch_size",
}
SIGLIP_ACTIVATION: Final = "gelu_pytorch_tanh"
PART_MAY_DIFFER: Final = (
    "text.rope_theta",
    "text.mrope_section",
    "vision.deepstack_layers",
    "vision.norm_epsilon",
)
"""The report's models turn positions slower than the language models that they began with, and by three positions. Which blocks
feed mergers is free, as these are new, and transformers' tower has an epsilon of 1e-6 whatever its folder says."""


def is_whole(raw: Mapping[str, Any]) -> bool:
    """Return whether the content of a config.json is of a whole Qwen3-VL model."""
    return raw.get("model_type") in ARCHITECTURES and "text_config" in raw


def is_siglip(raw: Mapping[str, Any]) -> bool:
    """Return whether the content of a config.json is of a SigLIP or SigLIP 2 model."""
    return raw.get("model_type") in (*SIGLIP, *WHOLE_SIGLIP)


def read_language_config(folder: Path, option: str, model: ModelConfig) -> ModelConfig:
    """Return `model` with the language model of a folder: of Qwen3ForCausalLM, Qwen3MoeForCausalLM or a whole model.

    Raises:
        UserError: naming `option` and every key that is missing or means a language model of another kind.
    """
    raw = read_json(folder / CONFIG, option)
    if is_whole(raw):
        return replace(model, text=config_of(raw, folder, option).text)
    kind = LANGUAGE_MODELS.get(str(raw.get("model_type")))
    if kind is None:
        raise _wrong_kind(raw, folder, option, "a language model of Qwen3 (qwen3, qwen3_moe)")

    section = {key: value for key, value in raw.items() if key != "model_type"}
    keys = ConfigKeys({"text_config": section})
    keys.check_understood(kind)
    # One position for each token is three equal ones, whichever slots they have.
    text = text_fields(keys, kind, model.text.mrope_section)
    text["tie_embeddings"] = bool(raw.get("tie_word_embeddings"))
    _refuse(keys.problems, folder, option, "a language model of Qwen3")
    return _checked(replace(model, text=TextConfig(**text)), folder, option)


def read_tower_config(folder: Path, option: str, model: ModelConfig) -> ModelConfig:
    """Return `model` with the vision tower of a folder: of Qwen3VLVisionModel, SigLIP, SigLIP 2 or a whole model.

    Raises:
        UserError: naming `option` and every key that is missing or means a tower of another kind.
    """
    raw = read_json(folder / CONFIG, option)
    if is_whole(raw):
        return replace(model, vision=config_of(raw, folder, option).vision)
    if is_siglip(raw):
        vision = _siglip_fields(raw, folder, option, model.vision)
        return _checked(replace(model, vision=VisionConfig(**vision)), folder, option)
    if raw.get("model_type") not in TOWERS:
        raise _wrong_kind(raw, folder, option, "a vision tower of Qwen3-VL, SigLIP or SigLIP 2")

    # Its mergers, which are not read, may be for a language model of another width.
    keys = ConfigKeys({"vision_config": raw})
    keys.check_understood(DENSE, width=False)
    vision = vision_fields(keys)
    _refuse(keys.problems, folder, option, "a vision tower of Qwen3-VL")
    return _checked(replace(model, vision=VisionConfig(**vision)), folder, option)


def part_differences(ours: ModelConfig, theirs: ModelConfig, part: str, folder: Path) -> list[str]:
    """Return the fields in which a part of a recipe's model, `text` or `vision`, is another than the folder's; see `differences`."""
    free = set(PART_MAY_DIFFER)
    # A table of another side is resized.
    if part == "vision" and is_siglip(read_json(folder / CONFIG, "init.vision")):
        free.add("vision.position_table")
    return differences(ours, theirs, folder, (part,), free)


def _siglip_fields(
    raw: Mapping[str, Any], folder: Path, option: str, ours: VisionConfig
) -> dict[str, Any]:
    """Return the fields of VisionConfig of a SigLIP model; what it does not have is as in `ours`."""
    # A whole SigLIP has a text model too; published towers alone have their fields at the top.
    section = raw.get("vision_config") if raw["model_type"] in WHOLE_SIGLIP else raw
    section = section if isinstance(section, dict) else {}
    vision = asdict(ours)
    problems = []
    for field, key in SIGLIP_KEYS.items():
        vision[field] = section.get(key)
        if not is_a(vision[field], int):
            problems.append(f"{key} is {shown(vision[field])}, not a whole number")
    if section.get("hidden_act", SIGLIP_ACTIVATION) != SIGLIP_ACTIVATION:
        problems.append(f"hidden_act is {shown(section['hidden_act'])}, not {SIGLIP_ACTIVATION}")

    _refuse(problems, folder, option, "a SigLIP model")
    return vision | {"position_table": siglip_table_side(section, vision["patch_size"])}


def siglip_table_side(section: Mapping[str, Any], patch_size: int) -> int:
    """Return the side of a SigLIP tower's table of positions; 0 if its configuration does not say."""
    # SigLIP says pixels of a picture's side, SigLIP 2 the number of positions.
    side, patches = section.get("image_size", 0), section.get("num_patches", 0)
    if type(patches) is int and patches > 0:
        return math.isqrt(patches)
    return side // patch_size if type(side) is int and patch_size > 0 else 0


def _checked(model: ModelConfig, folder: Path, option: str) -> ModelConfig:
    """Return the model; UserError if it cannot be built."""
    if problems := check(model, "model").lines:
        raise UserError(
            f"{option}={folder}: {CONFIG} describes a part of a model that cannot be built: {'; '.join(problems)}"
        )
    return model


def _refuse(problems: list[str], folder: Path, option: str, kind: str) -> None:
    """Raise a UserError with all problems, if there are any; keys of a part stand at the top of its file."""
    # The reader of keys names the section that they would have in a whole model.
    listed = "; ".join(problems)
    for section in ("text_config.", "vision_config."):
        listed = listed.replace(section, "")
    if listed:
        raise UserError(f"{option}={folder}: {CONFIG} is not of {kind}: {listed}")


def _wrong_kind(raw: Mapping[str, Any], folder: Path, option: str, wanted: str) -> UserError:
    given = raw.get("model_type")
    named = one_line(given)[:80] if isinstance(given, str) else shown(given)
    return UserError(
        f"{option}={folder}: {CONFIG} has model_type {named}: give the folder of {wanted}"
    )
