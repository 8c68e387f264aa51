"""config.json of a Hugging Face folder and our ModelConfig, both ways; nothing here imports torch.

Source: the published config.json of the Qwen3-VL models (arXiv 2511.21631), transformers' Qwen3VLConfig and Qwen3VLMoeConfig.
Keys of transformers 4 (rope_scaling, rope_theta, torch_dtype) and 5 (rope_parameters, dtype) are both read.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from visionloom.model.config import ModelConfig, TextConfig, VisionConfig
from visionloom.parallel.errors import UserError

CONFIG: Final = "config.json"
DENSE, MIXTURE = "qwen3_vl", "qwen3_vl_moe"
ARCHITECTURES: Final = {DENSE: "Qwen3VLForConditionalGeneration", MIXTURE: "Qwen3VLMoeForConditionalGeneration"}
TEXT_KEYS: Final = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "max_positions": "max_position_embeddings",
}
EXPERT_KEYS: Final = {
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_hidden_size": "moe_intermediate_size",
    "balance_coefficient": "router_aux_loss_coef",
}
VISION_KEYS: Final = {
    "depth": "depth",
    "hidden_size": "hidden_size",
    "heads": "num_heads",
    "ffn_hidden_size": "intermediate_size",
    "deepstack_layers": "deepstack_visual_indexes",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "channels": "in_channels",
    "initializer_range": "initializer_range",
}
OTHER_NAMES: Final = {"num_experts": "num_local_experts"}
"""Keys that transformers 5 writes under another name."""
MAY_BE_ABSENT: Final = ("initializer_range", "balance_coefficient", "channels", "max_positions")
"""Fields that no tensor's shape and no output depends on or that all models share: our default stands in."""
NOT_THE_MODEL: Final = ("balance_coefficient", "initializer_range", "max_positions")
"""Fields that a recipe may set as it likes: they change training, not what the weights mean."""
FIXED: Final[dict[str, dict[str, Any]]] = {
    "text_config": {
        "hidden_act": "silu", "attention_bias": False, "mlp_only_layers": [], "decoder_sparse_step": 1, "sliding_window": None,
    },
    "vision_config": {"hidden_act": "gelu_pytorch_tanh"},
}  # fmt: skip
"""What every Qwen3-VL model has and nothing here can change."""
TOKENS: Final = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
TURN_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
TEXT_TOKENS: Final = {"bos_token_id": END_OF_TEXT, "eos_token_id": TURN_END, "pad_token_id": END_OF_TEXT}
"""What these keys must name where a config.json has them."""
QWEN_TOKENS: Final = {"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656}


def read_json(path: Path, option: str) -> dict[str, Any]:
    """An object in a JSON file; UserError naming `option` and the file if there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{option}={path.parent}: no {path.name} there: give the folder of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{option}={path.parent}: {path.name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{option}={path.parent}: {path.name} does not hold an object")
    return found


def read_config(folder: Path, option: str) -> ModelConfig:
    """The model that a folder's config.json describes.

    Raises:
        UserError: naming `option` (init.huggingface or hf) and every key that is missing or means a model of another kind.
    """
    return config_of(read_json(folder / CONFIG, option), folder, option)


def config_of(raw: Mapping[str, Any], folder: Path, option: str) -> ModelConfig:
    """The model that the content of a config.json describes; see `read_config`."""
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{option}={folder}: {CONFIG} has model_type {kind}: only {DENSE} and {MIXTURE} are Qwen3-VL models")
    keys = _Keys(raw)
    text = {ours: keys.take("text_config", key, ours) for ours, key in TEXT_KEYS.items()}
    if kind == MIXTURE:
        text |= {ours: keys.take("text_config", key, ours) for ours, key in EXPERT_KEYS.items()}
    vision = {ours: keys.take("vision_config", key, ours) for ours, key in VISION_KEYS.items()}
    vision["position_table"] = keys.table_side()
    text |= keys.rope() | {"tie_embeddings": bool(raw.get("tie_word_embeddings", False))}
    keys.check_fixed()
    if keys.found:
        raise UserError(f"{option}={folder}: {CONFIG} is not of a Qwen3-VL model: {'; '.join(keys.found)}")
    given = [{name: value for name, value in part.items() if value is not None} for part in (text, vision)]
    config = ModelConfig(folder.resolve().name, text=TextConfig(**given[0]), vision=VisionConfig(**given[1]))
    if found := config.problems():
        raise UserError(f"{option}={folder}: {CONFIG} describes a model that cannot be built: {'; '.join(found)}")
    return config


@dataclass
class _Keys:
    """Takes values out of a config.json and collects what is wrong with it."""

    raw: Mapping[str, Any]
    found: list[str] = field(default_factory=list)

    def section(self, name: str) -> Mapping[str, Any]:
        part = self.raw.get(name)
        return part if isinstance(part, dict) else {}

    def take(self, section: str, key: str, ours: str) -> Any:
        part = self.section(section)
        value = part.get(key, part.get(OTHER_NAMES.get(key, key)))
        if value is None:
            if ours not in MAY_BE_ABSENT:
                self.found.append(f"{section}.{key} is missing")
            return None
        kind = list if ours == "deepstack_layers" else (int, float)
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or (isinstance(value, list) and not all(type(x) is int for x in value))
        ):
            self.found.append(f"{section}.{key} is {value!r}, not {'a list of numbers' if kind is list else 'a number'}")
        return value

    def table_side(self) -> int:
        count = self.take("vision_config", "num_position_embeddings", "position_table")
        side = math.isqrt(count) if isinstance(count, int) and count > 0 else 0
        if count is not None and side * side != count:
            self.found.append(f"vision_config.num_position_embeddings={count} is not a square")
        return side

    def rope(self) -> dict[str, Any]:
        text = self.section("text_config")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        theta, sections = rope.get("rope_theta", text.get("rope_theta")), rope.get("mrope_section")
        if not isinstance(theta, int | float) or not isinstance(sections, list) or len(sections) != 3:
            self.found.append("text_config lacks rope_theta or a mrope_section of three")
            return {}
        if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
            self.found.append(f"rope_type {rope.get('rope_type')} is not read, only default")
        if not rope.get("mrope_interleaved", True):
            self.found.append("mrope_interleaved is false")
        return {"rope_theta": float(theta), "mrope_section": sections}

    def check_fixed(self) -> None:
        for section, fixed in FIXED.items():
            part = self.section(section)
            self.found += [f"{section}.{k} is {part[k]!r}, not {v!r}" for k, v in fixed.items() if part.get(k, v) != v]
        wide, hidden = (
            self.section(s).get(k) for s, k in (("vision_config", "out_hidden_size"), ("text_config", "hidden_size"))
        )
        if wide is not None and wide != hidden:
            self.found.append(f"vision_config.out_hidden_size={wide} is not text_config.hidden_size={hidden}")


def differences(ours: ModelConfig, theirs: ModelConfig, folder: Path) -> list[str]:
    """Fields in which a recipe's model is another than the folder's: one line a field; empty if its weights fit.

    Our vocabulary may be larger: the rows that the folder lacks become zeros.
    """
    found = []
    for part in ("text", "vision"):
        here, there = asdict(getattr(ours, part)), asdict(getattr(theirs, part))
        for key, value in here.items():
            unused = key == "ffn_hidden_size" and part == "text" and ours.text.experts and theirs.text.experts
            wider = key == "vocab_size" and value >= there[key]
            if value != there[key] and key not in NOT_THE_MODEL and not unused and not wider:
                found.append(f"model.{part}.{key}={value}, but {folder}/{CONFIG} says {there[key]}")
    return found


def write_config(
    config: ModelConfig, dtype: str, tokens: Mapping[str, int], source: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of a config.json for transformers 4.57 and 5, which spell the rotation differently: both are there.

    Args:
        config: the model.
        dtype: of its tensors, `bfloat16` for one.
        tokens: ids of a tokenizer's special tokens by their spelling; Qwen's own stand in for those of vision.
        source: a config.json that the weights came with: what ours does not say is kept, but never a pointer to code.
    """
    text, vision, kind = config.text, config.vision, MIXTURE if config.text.experts else DENSE
    rope = {"rope_type": "default", "mrope_section": list(text.mrope_section), "mrope_interleaved": True}
    made: dict[str, Any] = copy.deepcopy(dict(source or {}))
    made.pop("auto_map", None)
    made.pop("torch_dtype", None)
    parts = [made.setdefault(name, {}) for name in ("text_config", "vision_config")]
    for stale in ("torch_dtype", "dtype", *OTHER_NAMES.values()):
        parts[0].pop(stale, None)
    parts[0].update({key: getattr(text, ours) for ours, key in TEXT_KEYS.items()})
    parts[0].update(
        model_type=f"{kind}_text", hidden_act="silu", attention_bias=False, tie_word_embeddings=text.tie_embeddings,
        rope_theta=text.rope_theta, rope_scaling=rope, rope_parameters=rope | {"rope_theta": text.rope_theta},
    )  # fmt: skip
    if text.experts:
        parts[0].update({key: getattr(text, ours) for ours, key in EXPERT_KEYS.items()})
        parts[0].update(decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True)
    parts[1].update({key: getattr(vision, ours) for ours, key in VISION_KEYS.items()})
    parts[1].update(
        model_type=f"{kind}_vision", hidden_act="gelu_pytorch_tanh", num_position_embeddings=vision.position_table**2,
        out_hidden_size=text.hidden_size,
    )  # fmt: skip
    made.update(architectures=[ARCHITECTURES[kind]], model_type=kind, tie_word_embeddings=text.tie_embeddings, dtype=dtype)
    for key, spelling in TOKENS.items():
        made[key] = tokens.get(spelling, made.get(key, QWEN_TOKENS[spelling]))
    for section in (made, parts[0]):
        section.update(
            {key: tokens[spelling] for key, spelling in TEXT_TOKENS.items() if key in section and spelling in tokens}
        )
    if TURN_END in tokens:
        parts[0]["eos_token_id"] = tokens[TURN_END]
    return made
