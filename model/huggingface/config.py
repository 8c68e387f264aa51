"""Convert between the config.json of a Hugging Face folder and our ModelConfig; nothing here imports torch.

Source: the published config.json of the Qwen3-VL models (arXiv 2511.21631), transformers' Qwen3VLConfig and Qwen3VLMoeConfig.
Keys of transformers 4 (rope_scaling, rope_theta, torch_dtype) and 5 (rope_parameters, dtype) are both read.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, checked, load_json
from visionloom.common.places import PlaceError, read_located
from visionloom.common.settings import check
from visionloom.common.text import one_line
from visionloom.model.config import ModelConfig, TextConfig, VisionConfig
from visionloom.model.huggingface.config_keys import (
    ARCHITECTURES,
    DENSE,
    EXPERT_KEYS,
    MIXTURE,
    OTHER_NAMES,
    PARTS,
    TEXT_KEYS,
    VISION_KEYS,
    YARN,
    YARN_KEYS,
    ConfigKeys,
)
from visionloom.model.huggingface.understood import shown

CONFIG: Final = "config.json"
LARGEST: Final = 1 << 22
"""Bytes of a JSON file of a folder: 4 MiB. Usual ones have a few KiB; in memory, lists take twenty times as much."""
LARGEST_TABLE: Final = 24 << 20
"""Bytes of the two long files: the index of the largest model, with experts apart, has 10 MB, Qwen's tokenizer.json 11."""
EXPORT_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Types that an exported model's tensors may have: our short name, and the name in torch and config.json."""
NOT_THE_MODEL: Final = (
    "balance_coefficient",
    "initializer_range",
    "max_positions",
    "rope_scaling",
)
"""Fields that a recipe may set as it likes: they change training, not what the weights mean."""
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
"""Tokens that these keys must name where a config.json has them."""
QWEN_TOKENS: Final = {
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}


def read_json(
    path: Path,
    option: str,
    largest: int = LARGEST,
) -> dict[str, Any]:
    """Return the object in a JSON file of at most `largest` bytes; UserError naming `option` and the file if there is none."""
    return parse_object(read_file(path, option, largest), path, option)


def read_file(path: Path, option: str, largest: int = LARGEST) -> bytes:
    """Return the content of a file of a folder.

    Raises:
        UserError: naming `option`, if it is not there, leads out of the folder, or has more than `largest` bytes.
    """
    try:
        return read_located(path.parent, path.name, largest)
    except FileNotFoundError:
        problem = f"no {path.name} there: give the folder that has it"
        raise UserError(f"{option}={path.parent}: {problem}") from None
    except (PlaceError, OSError) as error:
        problem = f"{path.name} cannot be read: {error}"
        raise UserError(f"{option}={path.parent}: {problem}") from None


def parse_object(content: bytes, path: Path, option: str) -> dict[str, Any]:
    """Return the object that a JSON file holds; `path` and `option` name it in a UserError."""
    value = load_object(content, path, option)
    # The check walks through the whole value: of an object that is one already it would take a copy.
    return value if isinstance(value, dict) else as_type(value, dict[str, Any], path, option)


def load_object(content: bytes, path: Path, option: str) -> Any:
    """Return the value that a JSON file holds; UserError if that is no JSON."""
    try:
        return load_json(content, path.name)
    except JsonError as error:
        raise UserError(f"{option}={path.parent}: {error}") from None


def as_type[T](
    value: Any,
    schema: type[T],
    path: Path,
    option: str,
    part: str = "",
) -> T:
    """Check a value of a JSON file and return it; UserError naming `option`, the file, the field and its type."""
    try:
        return checked(value, schema, path.name, part)
    except JsonError as error:
        problem = one_line(str(error))
        raise UserError(f"{option}={path.parent}: {problem}: correct the file") from None


def read_config(folder: Path, option: str) -> ModelConfig:
    """Return the model that a folder's config.json describes.

    Raises:
        UserError: naming `option` (init.huggingface or hf) and every key that is missing or means a model of another kind.
    """
    return config_of(read_json(folder / CONFIG, option), folder, option)


def config_of(raw: Mapping[str, Any], folder: Path, option: str) -> ModelConfig:
    """Return the model that the content of a config.json describes; see `read_config`."""
    here = f"{option}={folder}: {CONFIG}"
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        given = one_line(kind)[:80] if isinstance(kind, str) else shown(kind)
        raise UserError(
            f"{here} has model_type {given}: only {DENSE} and {MIXTURE} are Qwen3-VL models"
        )

    keys = ConfigKeys(raw)
    text, vision = _fields_of(keys, kind)
    if keys.problems:
        raise UserError(f"{here} is not of a Qwen3-VL model: {'; '.join(keys.problems)}")

    name = folder.resolve().name
    config = ModelConfig(name, text=TextConfig(**text), vision=VisionConfig(**vision))
    if kind == MIXTURE and not config.text.experts:
        raise UserError(f"{here} has model_type {MIXTURE}, but no experts")
    if problems := check(config, "model").lines:
        raise UserError(f"{here} describes a model that cannot be built: {'; '.join(problems)}")
    return config


def _fields_of(keys: ConfigKeys, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of TextConfig and VisionConfig; `keys` collects what is missing or wrong."""
    keys.check_understood(kind)
    text = text_fields(keys, kind)
    vision = vision_fields(keys)
    text["tie_embeddings"] = keys.is_tied(kind)
    return text, vision


def text_fields(keys: ConfigKeys, kind: str, section: list[int] | None = None) -> dict[str, Any]:
    """Return the fields of TextConfig but whether embeddings are tied; `section` stands in for an absent mrope_section."""
    text = keys.take_all("text_config", TEXT_KEYS)
    if kind == MIXTURE:
        text |= keys.take_all("text_config", EXPERT_KEYS)
    return text | keys.rope(section)


def vision_fields(keys: ConfigKeys) -> dict[str, Any]:
    """Return the fields of VisionConfig."""
    vision = keys.take_all("vision_config", VISION_KEYS)
    vision["position_table"] = keys.table_side()
    return vision


def differences(
    ours: ModelConfig,
    theirs: ModelConfig,
    folder: Path,
    parts: Sequence[str] = ("text", "vision"),
    free: Iterable[str] = (),
) -> list[str]:
    """Return the fields in which a recipe's model is another than the folder's; empty if its weights fit.

    Our vocabulary may be larger: the rows that the folder lacks become zeros.

    Args:
        ours: the recipe's model.
        theirs: the folder's.
        folder: for messages.
        parts: sections of the two that are compared.
        free: fields that may differ besides.

    Returns:
        one line a field, with the option to set.
    """
    may = may_differ(ours, theirs) | set(free)
    lines = []
    for part in parts:
        here, there = asdict(getattr(ours, part)), asdict(getattr(theirs, part))
        for key, value in here.items():
            name = f"{part}.{key}"
            if value != there[key] and name not in may:
                stored = f"{folder}/{CONFIG} says {there[key]}"
                lines.append(f"model.{name}={value}, but {stored}: set it alike")

    # A recipe may turn it on for weights without; the other way would lose what they were trained with.
    scaling = theirs.text.rope_scaling
    if "text" in parts and scaling.factor > 1 and scaling != ours.text.rope_scaling:
        values = ", ".join(f"{key}: {value}" for key, value in asdict(scaling).items())
        lines.append(f"{folder}/{CONFIG} has YaRN: set 'model.text.rope_scaling={{{values}}}'")
    return lines


def may_differ(ours: ModelConfig, theirs: ModelConfig) -> set[str]:
    """Return the fields in which two models may differ and have the same weights."""
    free = {f"{part}.{name}" for part in ("text", "vision") for name in NOT_THE_MODEL}
    if ours.text.vocab_size >= theirs.text.vocab_size:
        free.add("text.vocab_size")
    # Mixtures have no dense MLP, and their published files keep a width for it that nothing uses.
    if ours.text.experts and theirs.text.experts:
        free.add("text.ffn_hidden_size")
    return free


def write_config(
    config: ModelConfig,
    dtype: str,
    tokens: Mapping[str, int],
    source: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of a config.json for transformers 4.57 and 5.

    Args:
        config: the model.
        dtype: of its tensors, for example `bfloat16`.
        tokens: ids of a tokenizer's special tokens by their spelling; Qwen's own stand in for those of vision.
        source: a config.json that the weights came with: its other keys are kept, but never a pointer to code.
    """
    kind = MIXTURE if config.text.experts else DENSE
    made: dict[str, Any] = copy.deepcopy(dict(source or {}))
    # auto_map names Python files that transformers would run.
    for stale in ("auto_map", "torch_dtype"):
        made.pop(stale, None)
    for part in PARTS:
        if not isinstance(made.get(part), dict):
            made[part] = {}

    _write_text(made["text_config"], config.text, kind)
    _write_vision(made["vision_config"], config, kind)
    made["architectures"] = [ARCHITECTURES[kind]]
    made["model_type"] = kind
    made["tie_word_embeddings"] = config.text.tie_embeddings
    made["dtype"] = dtype
    _write_tokens(made, tokens)
    return made


def _write_text(section: dict[str, Any], text: TextConfig, kind: str) -> None:
    """Put the language model into a text_config."""
    for stale in ("torch_dtype", "dtype", *OTHER_NAMES.values()):
        section.pop(stale, None)
    for ours, key in TEXT_KEYS.items():
        section[key] = getattr(text, ours)

    section.update(
        model_type=f"{kind}_text",
        hidden_act="silu",
        attention_bias=False,
        tie_word_embeddings=text.tie_embeddings,
        **rotation_keys(text),
    )
    if text.experts:
        for ours, key in EXPERT_KEYS.items():
            section[key] = getattr(text, ours)
        section.update(decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True)


def rotation_keys(text: TextConfig) -> dict[str, Any]:
    """Return the keys of the rotation in the words of transformers 4 (rope_theta, rope_scaling) and 5."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "mrope_section": list(text.mrope_section),
        "mrope_interleaved": True,
    }
    scaling = text.rope_scaling
    if scaling.factor > 1:
        rope["rope_type"] = YARN
        rope |= {key: getattr(scaling, ours) for ours, key in YARN_KEYS.items()}
        # transformers takes the magnitude as it is, and 0 would end in zeros.
        rope["attention_factor"] = scaling.magnitude
    parameters = rope | {"rope_theta": text.rope_theta}
    return {"rope_theta": text.rope_theta, "rope_scaling": rope, "rope_parameters": parameters}


def _write_vision(section: dict[str, Any], config: ModelConfig, kind: str) -> None:
    """Put the vision tower into a vision_config."""
    for ours, key in VISION_KEYS.items():
        section[key] = getattr(config.vision, ours)
    section.update(
        model_type=f"{kind}_vision",
        hidden_act="gelu_pytorch_tanh",
        num_position_embeddings=config.vision.position_table**2,
        out_hidden_size=config.text.hidden_size,
    )


def _write_tokens(made: dict[str, Any], tokens: Mapping[str, int]) -> None:
    """Put the ids of special tokens into a config.json; ids of text only where they stood before."""
    for key, spelling in TOKENS.items():
        made[key] = tokens.get(spelling, made.get(key, QWEN_TOKENS[spelling]))

    text = made["text_config"]
    for section in (made, text):
        for key, spelling in TEXT_TOKENS.items():
            if key in section and spelling in tokens:
                section[key] = tokens[spelling]
    # Generation stops at it, so it is there even if the source did not have it.
    if TURN_END in tokens:
        text["eos_token_id"] = tokens[TURN_END]
