"""The command teacher.py: words that cannot be are refused before torch is imported, in one line that names them."""

import pytest

from visionloom.common.errors import UserError
from visionloom.launch.configure import compose
from visionloom.train.config import RunConfig
from visionloom.train.distillation.options import StoreOptions


@pytest.fixture(scope="module")
def config() -> RunConfig:
    """The demo's recipe, which has several phases and no first weights."""
    config = compose(["+recipe=demo"], 1)
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "out=DIR is missing"),
        ({"out": "d"}, "phase=NAME is missing: choose one of language, towers, align"),
        ({"out": "d", "phase": "stf"}, "phase=stf is not in the recipe"),
        (
            {"out": "d", "phase": "sft", "kept": "513"},
            "kept=513 must be at least 1 and at most 512",
        ),
        ({"out": "d", "phase": "sft", "kept": "many"}, "kept=many is not a number"),
        ({"out": "d", "phase": "sft", "kept": "1.5"}, "must be a whole number"),
        ({"out": "d", "phase": "sft", "temperature": "0"}, "temperature=0 must be at least"),
        ({"out": "d", "phase": "sft", "dtype": "bf16"}, "dtype=bf16 must be one of fp16, fp32"),
        ({"out": "d", "phase": "sft"}, "no teacher: name its weights by checkpoint="),
        (
            {"out": "d", "phase": "sft", "checkpoint": "/no/such"},
            "checkpoint=/no/such is not a folder",
        ),
    ],
)
def test_words_that_cannot_be(words: dict[str, str], message: str, config: RunConfig) -> None:
    with pytest.raises(UserError, match=message):
        StoreOptions.of(words, config)


def test_words_have_defaults(config: RunConfig) -> None:
    options = StoreOptions.of({"out": "d", "phase": "sft", "checkpoint": "."}, config)
    assert options == StoreOptions("d", "sft", ".", 64, 1.0, "fp16")
