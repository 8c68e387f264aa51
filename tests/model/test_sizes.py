"""The published sizes, built without memory: exact numbers of parameters, in all and by part.

Reference: transformers' Qwen3VLForConditionalGeneration and Qwen3VLMoeForConditionalGeneration built from each published config.json on the meta device, tied
matrices counted once.
"""

from collections import Counter
from pathlib import Path
from typing import cast

import pytest
import torch
from omegaconf import OmegaConf

from visionloom.model.config import ModelConfig
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.topology import Topology

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "model"
PARTS = (
    "visual.merger",
    "visual.deepstack_merger_list",
    "visual",
    "language_model.embedding",
    "language_model.output_layer",
)
# total | main merger, DeepStack mergers, rest of the vision tower, embedding, output layer (0: tied), decoder
COUNTS = {
    "qwen3vl_2b": (
        2_127_532_032,
        [25_174_016, 75_540_480, 306_242_560, 311_164_928, 0, 1_409_410_048],
    ),
    "qwen3vl_4b": (
        4_437_815_808,
        [27_271_680, 81_833_472, 306_242_560, 388_956_160, 0, 3_633_511_936],
    ),
    "qwen3vl_8b": (
        8_767_123_696,
        [40_119_040, 120_377_856, 415_891_440, 622_329_856, 622_329_856, 6_946_075_648],
    ),
    "qwen3vl_30b_a3b": (
        31_070_754_032,
        [30_679_808, 92_060_160, 415_891_440, 311_164_928, 311_164_928, 29_909_792_768],
    ),
    "qwen3vl_235b_a22b": (
        235_670_022_896,
        [40_119_040, 120_377_856, 415_891_440, 622_329_856, 622_329_856, 233_848_974_848],
    ),
    "qwen3vl_32b": (
        33_357_390_064,
        [44_838_656, 134_536_704, 415_891_440, 777_912_320, 777_912_320, 31_206_298_624],
    ),
}


def part_of(name: str) -> str:
    return next((part for part in PARTS if name.startswith(f"{part}.")), "decoder")


def published(size: str) -> ModelConfig:
    """The model of a recipe."""
    merged = OmegaConf.merge(
        OmegaConf.structured(ModelConfig), OmegaConf.load(RECIPES / f"{size}.yaml")
    )
    return cast(ModelConfig, OmegaConf.to_object(merged))


@pytest.mark.parametrize("size", COUNTS)
def test_parameters(size: str, topology: Topology) -> None:
    with torch.device("meta"):
        model = Qwen3VL(published(size), topology)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        assert parameter.is_meta, name
        counts[part_of(name)] += parameter.numel()
    total, by_part = COUNTS[size]
    assert [counts[part] for part in (*PARTS, "decoder")] == by_part
    assert sum(by_part) == total
