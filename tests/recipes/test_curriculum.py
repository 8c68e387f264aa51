"""The recipes of the report's curriculum: its phases on its tokens and lengths, alone or all, on declared kinds of data.

References: Qwen3-VL technical report (arXiv 2511.21631), table 1 and section 4; tests/model/test_sizes.py for the models.
"""

import re
from pathlib import Path
from typing import Final

import pytest

from visionloom.common.errors import UserError
from visionloom.launch.configure import compose
from visionloom.tests.model.test_sizes import COUNTS, published
from visionloom.tests.recipes.test_recipes import RECIPES, composed, header
from visionloom.train.config import RunConfig

ALL: Final = ["vision", "merger", "language"]
TABLE_1: Final = {
    "align": (8192, 67e9, ["merger"]),
    "multimodal": (8192, 1e12, ALL),
    "long": (32768, 1e12, ALL),
    "ultra_long": (262144, 100e9, ALL),
}
"""Length, tokens and what trains."""
SECTION_4: Final = {"sft": 32768, "sft_long": 262144, "reasoning": 32768, "rl": 32768}
LEARNING_RATES: Final = ("lr:", "lr_vision:", "lr_min_ratio:", "warmup_steps:")


def shipped(kind: str, model: str, *words: str) -> RunConfig:
    """Return a recipe on the ranks that its header states."""
    ranks = header(f"{kind}/{model}", r"^# Ranks: (\d+) H100")
    assert ranks is not None
    return composed(f"+recipe={kind}/{model}", *words, ranks=ranks)


@pytest.mark.parametrize("model", COUNTS)
def test_pretraining_is_table_1(model: str) -> None:
    config = shipped("pretrain", model)
    assert config.model == published(model)
    phases = {
        name: (each.sequence_length, each.tokens, each.trainable)
        for name, each in config.phases.items()
    }
    assert phases == TABLE_1
    # Mergers are drawn, since neither folder has any; none is asked for by name.
    assert config.init.vision and config.init.language
    assert not any(phase.fresh for phase in config.phases.values())


@pytest.mark.parametrize("model", COUNTS)
def test_posttraining_is_section_4(model: str) -> None:
    config = shipped("posttrain", model)
    assert config.model == published(model)
    lengths = {name: each.sequence_length for name, each in config.phases.items()}
    assert lengths.items() >= SECTION_4.items()
    steps = sum(each.total_steps for each in shipped("pretrain", model).phases.values())
    assert config.init.checkpoint.endswith(f"/ultra_long/step-{steps:08}")

    for name in ("sft", "sft_long"):
        weights = config.phases[name].mixture
        assert weights["sft_text"] / sum(weights.values()) == pytest.approx(1 / 3)
    cold_start = config.phases["reasoning"].mixture
    assert cold_start["thoughts_text"] == cold_start["thoughts_vision"]
    if "distillation" in config.phases:
        assert config.phases["distillation"].trainable == ["language"]


def test_data_follow_the_words_of_the_report() -> None:
    """Section 3.1: little video at first, then more text, much more video and agents, then long video and documents."""
    phases = shipped("pretrain", "qwen3vl_2b").phases
    first, second, third = (phases[name].mixture for name in ("multimodal", "long", "ultra_long"))
    for weights in (first, second, third, phases["align"].mixture):
        assert sum(weights.values()) == pytest.approx(1)
    assert second["text"] > first["text"]
    assert second["video"] > 3 * first["video"] and second["agent"] > 3 * first["agent"]
    assert third["video"] > second["video"] and third["documents"] > second["documents"]


def test_a_clip_of_any_length_fits_into_a_pack() -> None:
    """A visual token is 32 x 32 pixels of two frames (report, section 2), a timestamp some twelve tokens of two frames."""
    for phase in shipped("pretrain", "qwen3vl_2b").phases.values():
        if "video" not in phase.mixture:
            continue
        video = phase.video
        assert video.max_pixels is not None and video.max_frames is not None
        visual = video.max_pixels / (32 * 32 * 2)
        assert visual + 12 * video.max_frames / 2 < phase.sequence_length
        # Packs hold 3.2 patches a token at most, and a visual token has four.
        assert 4 * visual <= 3.2 * phase.sequence_length


@pytest.mark.parametrize("name", TABLE_1)
def test_a_phase_alone_is_that_of_the_recipe(name: str) -> None:
    whole, alone = (
        shipped("pretrain", "qwen3vl_8b", *words) for words in ([], [f"run.phases=[{name}]"])
    )
    assert list(alone.phases) == [name]
    assert alone.phases[name] == whole.phases[name]
    assert alone.datasets_read == set(whole.phases[name].mixture)


def test_phases_are_chosen_in_the_order_of_the_recipe() -> None:
    config = shipped("pretrain", "qwen3vl_8b", "run.phases=[long,align]")
    assert list(config.phases) == ["align", "long"]
    with pytest.raises(UserError, match=r"^run\.phases=lnog is unknown \(did you mean long\?\)"):
        compose(["+recipe=pretrain/qwen3vl_8b", "run.phases=[lnog]"], 256)


@pytest.mark.parametrize("world_size", [8, 64, 1024])
def test_smaller_and_larger_worlds(world_size: int) -> None:
    """Composing needs a multiple of a copy's ranks that divides the packs of a step; more ranks, more packs."""
    packs = f"phases.ultra_long.global_batch={max(32, world_size // 2)}"
    config = composed(
        "+recipe=pretrain/qwen3vl_2b", packs, "phases.long.global_batch=512", ranks=world_size
    )
    assert list(config.phases) == list(TABLE_1)


@pytest.mark.parametrize(
    "file", sorted((RECIPES / "training").glob("p*train*.yaml")), ids=lambda file: file.stem
)
def test_what_is_not_published_is_marked(file: Path) -> None:
    text = file.read_text()
    marked = re.findall(r"^#   (.+?) \(our choice", text, re.MULTILINE)
    if file.stem == "posttrain_distilled":
        assert "our choice" in text
        return
    assert {"Batch", "Learning rates", "Mixtures", "Videos"} <= set(marked)
    assert all(word in text for word in LEARNING_RATES)
