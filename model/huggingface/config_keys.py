"""Keys of a config.json by our fields, and a reader that collects all that is wrong with them; nothing here imports torch.

Source: transformers' Qwen3VLConfig and Qwen3VLMoeConfig, of the releases 4 and 5.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from visionloom.model.config import RopeScaling, TextConfig, VisionConfig
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
YARN: Final = "yarn"
YARN_KEYS: Final = {
    "factor": "factor",
    "original_positions": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
PARTS: Final = ("text_config", "vision_config")
"""Objects inside a config.json."""
OTHER_NAMES: Final = {"num_experts": "num_local_experts"}
"""Keys that transformers 5 writes under another name."""
MAY_BE_ABSENT: Final = ("initializer_range", "balance_coefficient", "channels", "max_positions")
"""Fields that no tensor's shape and no output depends on or that all models share: our default stands in."""
FIELDS: Final = {
    "": UnderstoodFields(
        frozenset({"model_type", "text_config", "vision_config", "tie_word_embeddings", "quantization_config"}),
        EVERYWHERE | OUTER, BASE,
    ),
    "text_config": UnderstoodFields(
        frozenset(TEXT_KEYS.values())
        | {"tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta"}
        | {"mlp_only_layers", "decoder_sparse_step"},
        EVERYWHERE | TEXT,
        TEXT_ONLY | {"model_type": (f"{DENSE}_text", DENSE, f"{MIXTURE}_text", MIXTURE)},
    ),
    "vision_config": UnderstoodFields(
        frozenset(VISION_KEYS.values()) | {"num_position_embeddings", "out_hidden_size"},
        EVERYWHERE | {"tie_word_embeddings"},
        VISION_ONLY | {"model_type": (f"{DENSE}_vision", DENSE, f"{MIXTURE}_vision", MIXTURE)},
    ),
}  # fmt: skip
"""All that is understood of a config.json, by part; of a mixture `EXPERT_FIELDS` too."""
EXPERT_FIELDS: Final = frozenset(EXPERT_KEYS.values()) | frozenset(OTHER_NAMES.values())
ROPE_FIELDS: Final = UnderstoodFields(
    frozenset({"rope_theta", "mrope_section"}), frozenset(), ROPE_ONLY
)
YARN_FIELDS: Final = UnderstoodFields(
    ROPE_FIELDS.read | frozenset(YARN_KEYS.values()),
    frozenset(),
    ROPE_ONLY | {"rope_type": (YARN,), "type": (YARN,), "truncate": (True,)},
)
FIELD_TYPES: Final[dict[str, dict[str, Any]]] = {
    "text_config": {each.name: each.type for each in fields(TextConfig)},
    "vision_config": {each.name: each.type for each in fields(VisionConfig)},
}
KINDS: Final[dict[Any, str]] = {
    int: "a whole number",
    float: "a number",
    list[int]: "a list of whole numbers",
}
LARGEST_NUMBER: Final = 1 << 62
"""Above any size of a tensor: torch holds sizes in 64 bits."""


def is_a(value: Any, kind: Any) -> bool:
    """Return whether a value of JSON has the type of a field of ours, and a size that arithmetic takes."""
    if kind == list[int]:
        return isinstance(value, list) and all(is_a(each, int) for each in value)
    # Not isinstance: true and false are whole numbers to Python.
    if type(value) is int:
        return abs(value) < LARGEST_NUMBER
    return kind is float and type(value) is float and math.isfinite(value)


@dataclass
class ConfigKeys:
    """A reader of a config.json's values that collects the problems on its way."""

    raw: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    def section(self, name: str) -> Mapping[str, Any]:
        """Return an object inside the file, the file's own for an empty name; empty if there is none."""
        part = self.raw.get(name) if name else self.raw
        return part if isinstance(part, dict) else {}

    def check_understood(self, kind: str, width: bool = True) -> None:
        """Refuse keys that nothing here understands, and values that contradict each other.

        Args:
            kind: the model_type of the whole model.
            width: the tower belongs to the language model, whose width it must have.
        """
        text = self.section("text_config")
        for name, known in FIELDS.items():
            part = self.section(name)
            if name == "text_config" and kind == MIXTURE:
                known = replace(known, read=known.read | EXPERT_FIELDS)

            # Some tools repeat values of the language model at the top, where transformers does not look.
            if not name:
                part = {
                    key: value
                    for key, value in part.items()
                    if key in known.names or key not in text or value != text[key]
                }
            self.problems += known.refusals(part, f"{name}." if name else "")

        self._check_form(text)
        self._check_renamed(text)
        if width:
            self._check_width(text)

    def _check_form(self, text: Mapping[str, Any]) -> None:
        """Refuse quantized weights, and dense layers among mixtures of experts."""
        if self.raw.get("quantization_config"):
            self.problems.append(
                "quantization_config: quantized weights (of types such as F8_E4M3 or U8) are not read"
            )
        dense, step = text.get("mlp_only_layers"), text.get("decoder_sparse_step", 1)
        if dense or step != 1:
            first = f"text_config.mlp_only_layers={shown(dense)}"
            second = f"decoder_sparse_step={shown(step)}"
            self.problems.append(
                f"{first} and {second} make some layers dense and others mixtures of experts:"
                " here all layers of a model are of one kind"
            )

    def _check_renamed(self, text: Mapping[str, Any]) -> None:
        """Refuse different values under both names of a key."""
        for key, other in OTHER_NAMES.items():
            if key in text and other in text and text[key] != text[other]:
                first, second = shown(text[key]), shown(text[other])
                self.problems.append(f"text_config.{key} is {first}, but {other} is {second}")

    def _check_width(self, text: Mapping[str, Any]) -> None:
        """Refuse a tower whose features are not as wide as the language model's tokens."""
        wide = self.section("vision_config").get("out_hidden_size")
        hidden = text.get("hidden_size")
        if wide is not None and wide != hidden:
            first = f"vision_config.out_hidden_size={shown(wide)}"
            second = f"text_config.hidden_size={shown(hidden)}"
            self.problems.append(f"{first} is not {second}")

    def take_all(
        self,
        section: str,
        keys: Mapping[str, str],
    ) -> dict[str, Any]:
        """Return the values of a section by our names of its keys, without those that are absent."""
        values = {ours: self.take(section, key, ours) for ours, key in keys.items()}
        return {ours: value for ours, value in values.items() if value is not None}

    def take(self, section: str, key: str, ours: str) -> Any:
        """Return the value of our field `ours`; None if it is absent, which is a problem unless our default stands in."""
        part = self.section(section)
        other = OTHER_NAMES.get(key, key)
        value = part.get(key, part.get(other))
        if value is None:
            if ours not in MAY_BE_ABSENT:
                self.problems.append(f"{section}.{key} is missing")
            return None

        kind = FIELD_TYPES[section][ours]
        if not is_a(value, kind):
            expected = KINDS[kind]
            self.problems.append(f"{section}.{key} is {shown(value)}, not {expected}")
        return value

    def table_side(self) -> int:
        """Return the side of the square table of learned positions; 0 if it has none."""
        count = self.take("vision_config", "num_position_embeddings", "position_table")
        if not is_a(count, int):
            return 0
        side = math.isqrt(count) if count > 0 else 0
        if side * side != count:
            self.problems.append(
                f"vision_config.num_position_embeddings={shown(count)} is not a square"
            )
        return side

    def rope(self, default: list[int] | None = None) -> dict[str, Any]:
        """Return the rotation's fields of TextConfig; empty if they are not usable.

        They are in transformers 5's rope_parameters, or in transformers 4's rope_scaling and rope_theta.

        Args:
            default: the mrope_section of a language model alone, which names none.
        """
        text = self.section("text_config")
        names = [name for name in ("rope_parameters", "rope_scaling") if text.get(name)]
        given = {name: text[name] for name in names}
        if not all(isinstance(rope, dict) for rope in given.values()):
            self.problems.append(f"text_config.{' and '.join(names)} must be objects")
            return {}

        # By their places: what stands twice must be alike.
        thetas: dict[str, Any] = {}
        sections: dict[str, Any] = {}
        for name, rope in given.items():
            if rope.get("rope_theta") is not None:
                thetas[f"{name}.rope_theta"] = rope["rope_theta"]
            if rope.get("mrope_section"):
                sections[f"{name}.mrope_section"] = rope["mrope_section"]
        if text.get("rope_theta") is not None:
            thetas["rope_theta"] = text["rope_theta"]

        theta: Any = next(iter(thetas.values()), None)
        section: Any = next(iter(sections.values()), default)
        is_section = is_a(section, list[int]) and len(section) == 3
        if not is_a(theta, float) or not is_section:
            self.problems.append("text_config lacks rope_theta or a mrope_section of three")
            return {}
        for values in (thetas, sections):
            self._check_alike(values)
        return {
            "rope_theta": float(theta),
            "mrope_section": section,
            "rope_scaling": self._scaling(given),
        }

    def _scaling(self, given: Mapping[str, Mapping[str, Any]]) -> RopeScaling:
        """Return YaRN of the rotation's objects by their names, or none; refuse all else that stands there."""
        scalings: dict[str, Any] = {}
        for name, rope in given.items():
            is_yarn = YARN in (rope.get("rope_type"), rope.get("type"))
            known = YARN_FIELDS if is_yarn else ROPE_FIELDS
            self.problems += known.refusals(rope, f"text_config.{name}.")
            scalings[name] = self._yarn(rope, f"text_config.{name}") if is_yarn else None
        self._check_alike(scalings)
        return next(iter(scalings.values()), None) or RopeScaling()

    def _yarn(self, rope: Mapping[str, Any], where: str) -> RopeScaling | None:
        """Return YaRN's values; None if they are not usable, which is a problem."""
        values: dict[str, Any] = {}
        for field_of_ours in fields(RopeScaling):
            name = field_of_ours.name
            key = YARN_KEYS[name]
            value = rope.get(key)
            # transformers has defaults for the others, which are ours too.
            if value is None and name not in ("factor", "original_positions"):
                continue
            if not is_a(value, field_of_ours.type):
                kind = KINDS[field_of_ours.type]
                self.problems.append(f"{where}.{key} is {shown(value)}, not {kind}")
                return None
            values[name] = value
        return RopeScaling(**values)

    def _check_alike(self, values: Mapping[str, Any]) -> None:
        """Refuse different values of one thing, by place: exports give it in the words of both releases."""
        first = next(iter(values.values()), None)
        if any(value != first for value in values.values()):
            pairs = [f"{name}={shown(value)}" for name, value in values.items()]
            self.problems.append(f"text_config says different things: {', '.join(pairs)}")

    def is_tied(self, kind: str) -> bool:
        """Return whether the output matrix is the embedding.

        Transformers 4 looks into text_config, transformers 5 at the top: where they would differ nobody can know. A
        mixture's text_config says true wherever nobody has set it, and counts for nothing.
        """
        outer = self.section("").get("tie_word_embeddings")
        inner = self.section("text_config").get("tie_word_embeddings")
        if not isinstance(outer, bool | None) or not isinstance(inner, bool | None):
            both = f"{shown(outer)} and, in text_config, {shown(inner)}"
            self.problems.append(f"tie_word_embeddings is {both}: not true or false")
        is_unset = kind == MIXTURE and inner is True and outer is not None
        if inner is not None and inner != bool(outer) and not is_unset:
            both = f"{shown(outer)}, but in text_config {shown(inner)}"
            self.problems.append(f"tie_word_embeddings is {both}: set them alike")
        return bool(outer)
