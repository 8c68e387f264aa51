"""YaRN's rotation; reference: transformers' Qwen3VLTextRotaryEmbedding."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from visionloom.common.settings import check
from visionloom.model.config import RopeScaling, TextConfig
from visionloom.model.huggingface.config import differences, read_config, rotation_keys
from visionloom.model.rope import mrope_rotation, text_frequencies
from visionloom.tests.model.huggingface.test_folder import model, save

REAL = TextConfig()
SCALINGS = {
    "off": (REAL, RopeScaling()),
    "a million positions": (REAL, RopeScaling(factor=3.0)),
    "1,048,576 positions": (REAL, RopeScaling(factor=4.0)),
    "other turns": (
        REAL,
        RopeScaling(2.0, 4096, beta_fast=20.0, beta_slow=2.0, attention_factor=1.3),
    ),
    "tiny": (model().text, RopeScaling(factor=8.0, original_positions=64)),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_angles_are_transformers(case: str) -> None:
    text, scaling = SCALINGS[case]
    text = replace(text, rope_scaling=scaling)
    config = Qwen3VLTextConfig(
        hidden_size=text.hidden_size,
        num_attention_heads=text.heads,
        head_dim=text.head_dim,
        max_position_embeddings=1_048_576,
        rope_parameters=rotation_keys(text)["rope_parameters"],
    )
    theirs = Qwen3VLTextRotaryEmbedding(config)
    positions = torch.randint(0, 1_048_576, (3, 1, 50), generator=torch.Generator().manual_seed(1))
    positions[:, 0, :3] = torch.tensor([0, 1, 1_048_575])
    cosines, sines = theirs(torch.zeros(1), positions)

    frequencies = text_frequencies(text)
    assert torch.equal(frequencies, theirs.inv_freq)
    section, magnitude = text.mrope_section, scaling.magnitude
    ours = mrope_rotation(positions[:, 0], frequencies, section, magnitude)
    half = text.head_dim // 2
    # Theirs repeat each angle for the other half of a head.
    wanted = torch.cat([cosines[0, :, :half], sines[0, :, :half]], dim=1)
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)


def test_a_folder_with_yarn_is_read_and_written(tmp_path: Path) -> None:
    scaling = RopeScaling(factor=3.0, original_positions=4096)
    config = model()
    config = replace(config, text=replace(config.text, rope_scaling=scaling))
    save(tmp_path, config)
    theirs = read_config(tmp_path, "hf")
    assert theirs.text.rope_scaling == replace(scaling, attention_factor=scaling.magnitude)
    assert differences(theirs, theirs, tmp_path) == []
    (line,) = differences(model(), theirs, tmp_path)
    assert "has YaRN: set 'model.text.rope_scaling={factor: 3.0, original_positions: 4096" in line
    # Turned on for weights without.
    save(tmp_path, model())
    assert differences(config, read_config(tmp_path, "hf"), tmp_path) == []


def test_values_without_meaning_are_named() -> None:
    here = "model.text.rope_scaling"
    (line,) = check(RopeScaling(factor=0.5), here).lines
    assert line.startswith(f"{here}.factor=0.5 must be at least 1")
    (line,) = check(RopeScaling(factor=2, beta_fast=1), here).lines
    assert line == f"{here}.beta_fast=1 must be above beta_slow=1"
