"""config.json of a Hugging Face folder and our ModelConfig, both ways; nothing here imports torch.

Source: the published config.json of the Qwen3-VL models (arXiv 2511.21631), transformers' Qwen3VLConfig and Qwen3VLMoeConfig.
Keys of transformers 4 (rope_scaling, rope_theta, torch_dtype) and 5 (rope_parameters, dtype) are both read.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, checked, load_json
from visionloom.common.places import PlaceError, read_located
from visionloom.common.settings import check
from visionloom.common.text import one_line
from visionloom.model.config import ModelConfig, TextConfig, VisionConfig
from visionloom.model.huggingface.fields import (
    BASE,
    EVERYWHERE,
    OUTER,
    ROPE_ONLY,
    TEXT,
    TEXT_ONLY,
    VISION_ONLY,
)
from visionloom.model.huggingface.understood import UnderstoodFields, shown

CONFIG: Final = "config.json"
LARGEST: Final = 1 << 22
"""Bytes of a JSON file of a folder: 4 MiB; in memory a file of lists takes twenty times as much. Usual ones have a few KiB."""
LARGEST_TABLE: Final = 24 << 20
"""Bytes of the two files that list much: the index of the largest model, with experts apart, has 10 MB, Qwen's tokenizer.json 11."""
DENSE, MIXTURE = "qwen3_vl", "qwen3_vl_moe"
ARCHITECTURES: Final = {
    DENSE: "Qwen3VLForConditionalGeneration",
    MIXTURE: "Qwen3VLMoeForConditionalGeneration",
}
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
FIELDS: Final = {
    "": UnderstoodFields(
        frozenset({"model_type", "text_config", "vision_config", "tie_word_embeddings", "quantization_config"}),
        EVERYWHERE | OUTER, BASE,
    ),
    "text_config": UnderstoodFields(
        frozenset(TEXT_KEYS.values())
        | {"tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "mlp_only_layers", "decoder_sparse_step"},
        EVERYWHERE | TEXT, TEXT_ONLY | {"model_type": tuple(f"{kind}{end}" for kind in ARCHITECTURES for end in ("_text", ""))},
    ),
    "vision_config": UnderstoodFields(
        frozenset(VISION_KEYS.values()) | {"num_position_embeddings", "out_hidden_size"},
        EVERYWHERE | {"tie_word_embeddings"},
        VISION_ONLY | {"model_type": tuple(f"{kind}{end}" for kind in ARCHITECTURES for end in ("_vision", ""))},
    ),
}  # fmt: skip
"""All that is understood of a config.json, by part; of a mixture `EXPERT_FIELDS` too."""
EXPERT_FIELDS: Final = frozenset(EXPERT_KEYS.values()) | frozenset(OTHER_NAMES.values())
ROPE_FIELDS: Final = UnderstoodFields(
    frozenset({"rope_theta", "mrope_section"}), frozenset(), ROPE_ONLY
)
TOKENS: Final = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
TURN_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
TEXT_TOKENS: Final = {
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": TURN_END,
    "pad_token_id": END_OF_TEXT,
}
"""What these keys must name where a config.json has them."""
QWEN_TOKENS: Final = {
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}


def read_json(path: Path, option: str, largest: int = LARGEST) -> dict[str, Any]:
    """An object in a JSON file; UserError naming `option` and the file if there is none."""
    return parse_object(read_file(path, option, largest), path, option)


def read_file(path: Path, option: str, largest: int = LARGEST) -> bytes:
    """A file of a folder; UserError naming `option` if it is not there, leads out of the folder, or is no file of at most so many bytes."""
    try:
        return read_located(path.parent, path.name, largest)
    except FileNotFoundError:
        raise UserError(
            f"{option}={path.parent}: no {path.name} there: give the folder that has it"
        ) from None
    except (PlaceError, OSError) as error:
        raise UserError(f"{option}={path.parent}: {path.name} cannot be read: {error}") from None


def parse_object(content: bytes, path: Path, option: str) -> dict[str, Any]:
    """The object that a JSON file holds; `path` and `option` name it in a UserError."""
    found = load_object(content, path, option)
    return found if isinstance(found, dict) else as_type(found, dict[str, Any], path, option)


def load_object(content: bytes, path: Path, option: str) -> Any:
    """What a JSON file holds; UserError if that is no JSON."""
    try:
        return load_json(content, path.name)
    except JsonError as error:
        raise UserError(f"{option}={path.parent}: {error}") from None


def as_type[T](value: Any, schema: type[T], path: Path, option: str, part: str = "") -> T:
    """A value of a JSON file, checked; UserError naming `option`, the file, the field and what is expected there."""
    try:
        return checked(value, schema, path.name, part)
    except JsonError as error:
        raise UserError(
            f"{option}={path.parent}: {one_line(str(error))}: correct the file"
        ) from None


def read_config(folder: Path, option: str) -> ModelConfig:
    """The model that a folder's config.json describes.

    Raises:
        UserError: naming `option` (init.huggingface or hf) and every key that is missing or means a model of another kind.
    """
    return config_of(read_json(folder / CONFIG, option), folder, option)


def config_of(raw: Mapping[str, Any], folder: Path, option: str) -> ModelConfig:
    """The model that the content of a config.json describes; see `read_config`."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        said = one_line(kind)[:80] if isinstance(kind, str) else shown(kind)
        raise UserError(
            f"{option}={folder}: {CONFIG} has model_type {said}: only {DENSE} and {MIXTURE} are Qwen3-VL models"
        )
    keys = _Keys(raw)
    keys.check_understood(kind)
    text = {ours: keys.take("text_config", key, ours) for ours, key in TEXT_KEYS.items()}
    if kind == MIXTURE:
        text |= {ours: keys.take("text_config", key, ours) for ours, key in EXPERT_KEYS.items()}
    vision = {ours: keys.take("vision_config", key, ours) for ours, key in VISION_KEYS.items()}
    vision["position_table"] = keys.table_side()
    text |= keys.rope() | {"tie_embeddings": keys.is_tied(kind)}
    if keys.found:
        raise UserError(
            f"{option}={folder}: {CONFIG} is not of a Qwen3-VL model: {'; '.join(keys.found)}"
        )
    given = [
        {name: value for name, value in part.items() if value is not None}
        for part in (text, vision)
    ]
    config = ModelConfig(
        folder.resolve().name, text=TextConfig(**given[0]), vision=VisionConfig(**given[1])
    )
    if kind == MIXTURE and not config.text.experts:
        raise UserError(f"{option}={folder}: {CONFIG} has model_type {MIXTURE}, but no experts")
    if problems := check(config, "model").lines:
        raise UserError(
            f"{option}={folder}: {CONFIG} describes a model that cannot be built: {'; '.join(problems)}"
        )
    return config


KINDS: Final[dict[Any, str]] = {
    int: "a whole number",
    float: "a number",
    list[int]: "a list of whole numbers",
}


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value of JSON has the type of a field of ours, and a size that arithmetic takes."""
    if kind == list[int]:
        return isinstance(value, list) and all(_is_a(each, int) for each in value)
    if type(value) is int:
        return abs(value) < 1 << 62
    return kind is float and type(value) is float and math.isfinite(value)


@dataclass
class _Keys:
    """Takes values out of a config.json and collects what is wrong with it."""

    raw: Mapping[str, Any]
    found: list[str] = field(default_factory=list)

    def section(self, name: str) -> Mapping[str, Any]:
        part = self.raw.get(name) if name else self.raw
        return part if isinstance(part, dict) else {}

    def check_understood(self, kind: str) -> None:
        """Refuse what nobody here understands, and what says the same thing twice in two ways."""
        text = self.section("text_config")
        for name, known in FIELDS.items():
            part = self.section(name)
            if name == "text_config" and kind == MIXTURE:
                known = replace(known, read=known.read | EXPERT_FIELDS)
            if not name:  # some tools repeat values of the language model beside it, where transformers does not look
                part = {
                    key: value
                    for key, value in part.items()
                    if key in known.names or value != text.get(key, self)
                }
            self.found += known.refusals(part, f"{name}." if name else "")
        if self.raw.get("quantization_config"):
            self.found.append(
                "quantization_config: quantized weights (of types such as F8_E4M3 or U8) are not read"
            )
        dense, step = text.get("mlp_only_layers"), text.get("decoder_sparse_step", 1)
        if dense or step != 1:
            self.found.append(
                f"text_config.mlp_only_layers={shown(dense)} and decoder_sparse_step={shown(step)} make some layers dense and"
                " others mixtures of experts: here all layers of a model are of one kind"
            )
        for key, other in OTHER_NAMES.items():
            if text.get(key, text.get(other)) != text.get(other, text.get(key)):
                self.found.append(
                    f"text_config.{key} is {shown(text[key])}, but {other} is {shown(text[other])}"
                )
        wide, hidden = self.section("vision_config").get("out_hidden_size"), text.get("hidden_size")
        if wide is not None and wide != hidden:
            self.found.append(
                f"vision_config.out_hidden_size={shown(wide)} is not text_config.hidden_size={shown(hidden)}"
            )

    def take(self, section: str, key: str, ours: str) -> Any:
        part = self.section(section)
        value = part.get(key, part.get(OTHER_NAMES.get(key, key)))
        if value is None:
            if ours not in MAY_BE_ABSENT:
                self.found.append(f"{section}.{key} is missing")
            return None
        types = {
            each.name: each.type
            for each in fields(TextConfig if section == "text_config" else VisionConfig)
        }
        if not _is_a(value, types[ours]):
            self.found.append(f"{section}.{key} is {shown(value)}, not {KINDS[types[ours]]}")
        return value

    def table_side(self) -> int:
        count = self.take("vision_config", "num_position_embeddings", "position_table")
        side = math.isqrt(count) if _is_a(count, int) and count > 0 else 0
        if _is_a(count, int) and side * side != count:
            self.found.append(
                f"vision_config.num_position_embeddings={shown(count)} is not a square"
            )
        return side

    def rope(self) -> dict[str, Any]:
        """Of transformers 5's rope_parameters, or transformers 4's rope_scaling and rope_theta."""
        text = self.section("text_config")
        given = {name: text[name] for name in ("rope_parameters", "rope_scaling") if text.get(name)}
        if not all(isinstance(rope, dict) for rope in given.values()):
            self.found.append(f"text_config.{' and '.join(given)} must be objects")
            return {}
        for name, rope in given.items():
            self.found += ROPE_FIELDS.refusals(rope, f"text_config.{name}.")
        thetas = {
            f"{name}.rope_theta": rope["rope_theta"]
            for name, rope in given.items()
            if rope.get("rope_theta") is not None
        }
        thetas |= {"rope_theta": text["rope_theta"]} if text.get("rope_theta") is not None else {}
        sections = {
            f"{name}.mrope_section": rope["mrope_section"]
            for name, rope in given.items()
            if rope.get("mrope_section")
        }
        theta, section = next(iter(thetas.values()), None), next(iter(sections.values()), None)
        if (
            not _is_a(theta, float)
            or not _is_a(section, list[int])
            or section is None
            or len(section) != 3
        ):
            self.found.append("text_config lacks rope_theta or a mrope_section of three")
            return {}
        for values in (thetas, sections):  # exports say it in the words of both releases
            if any(value != next(iter(values.values())) for value in values.values()):
                told = ", ".join(f"{name}={shown(value)}" for name, value in values.items())
                self.found.append(f"text_config says different things: {told}")
        return {"rope_theta": float(theta or 0), "mrope_section": section}

    def is_tied(self, kind: str) -> bool:
        """Transformers 4 looked into text_config, transformers 5 looks beside it: where they would differ nobody can know.

        A mixture's text_config says true wherever nobody has set it, and counts for nothing.
        """
        outer, inner = (
            self.section(name).get("tie_word_embeddings") for name in ("", "text_config")
        )
        if not all(each is None or isinstance(each, bool) for each in (outer, inner)):
            self.found.append(
                f"tie_word_embeddings is {shown(outer)} and, in text_config, {shown(inner)}: not true or false"
            )
        meant_nothing = kind == MIXTURE and inner is True and outer is not None
        if inner is not None and inner != bool(outer) and not meant_nothing:
            self.found.append(
                f"tie_word_embeddings is {shown(outer)}, but in text_config {shown(inner)}: set them alike"
            )
        return bool(outer)


def differences(ours: ModelConfig, theirs: ModelConfig, folder: Path) -> list[str]:
    """Fields in which a recipe's model is another than the folder's: one line a field; empty if its weights fit.

    Our vocabulary may be larger: the rows that the folder lacks become zeros.
    """
    found = []
    for part in ("text", "vision"):
        here, there = asdict(getattr(ours, part)), asdict(getattr(theirs, part))
        for key, value in here.items():
            unused = (
                key == "ffn_hidden_size"
                and part == "text"
                and ours.text.experts
                and theirs.text.experts
            )
            wider = key == "vocab_size" and value >= there[key]
            if value != there[key] and key not in NOT_THE_MODEL and not unused and not wider:
                found.append(
                    f"model.{part}.{key}={value}, but {folder}/{CONFIG} says {there[key]}: set it alike"
                )
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
    rope = {
        "rope_type": "default",
        "mrope_section": list(text.mrope_section),
        "mrope_interleaved": True,
    }
    made: dict[str, Any] = copy.deepcopy(dict(source or {}))
    made.pop("auto_map", None)
    made.pop("torch_dtype", None)
    made |= {
        name: made[name] if isinstance(made.get(name), dict) else {}
        for name in ("text_config", "vision_config")
    }
    parts = [made[name] for name in ("text_config", "vision_config")]
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
    made.update(
        architectures=[ARCHITECTURES[kind]],
        model_type=kind,
        tie_word_embeddings=text.tie_embeddings,
        dtype=dtype,
    )
    for key, spelling in TOKENS.items():
        made[key] = tokens.get(spelling, made.get(key, QWEN_TOKENS[spelling]))
    for section in (made, parts[0]):
        section.update(
            {
                key: tokens[spelling]
                for key, spelling in TEXT_TOKENS.items()
                if key in section and spelling in tokens
            }
        )
    if TURN_END in tokens:
        parts[0]["eos_token_id"] = tokens[TURN_END]
    return made
