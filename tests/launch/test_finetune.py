"""Fine-tuning refuses what cannot work in one line each, before torch is imported."""

from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.launch.configure import compose
from visionloom.launch.convert import main as convert
from visionloom.launch.finetune import finetune

DEMO = "+recipe=lora/demo"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["init.checkpoint="],
            "lora.rank=16 needs weights to adapt: set init.huggingface or init.checkpoint",
        ),
        (["phases.words.fresh=[merger]"], "phases.words.fresh=['merger'] would stay as drawn"),
        (
            ["phases.words.trainable=[vision]"],
            "phases.words.trainable=['vision'] has no adapters: lora.groups=",
        ),
        (["lora.targets=[router]"], "lora.targets=router matches no linear layer"),
        (["lora.rnak=4"], "no such key: lora.rnak (did you mean lora.rank?)"),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([DEMO, *words], 2)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(expected)


def test_it_needs_weights() -> None:
    config = compose(["+recipe=demo"], 2)
    assert config is not None
    with pytest.raises(UserError, match=r"init\.huggingface or init\.checkpoint"):
        finetune(config)


@pytest.mark.parametrize(
    ("words", "part"),
    [(["checkpoint=nowhere"], "nowhere is not a folder"), ([], "adapter needs checkpoint")],
)
def test_export_names_its_option(
    words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        convert(["adapter", *words, f"out={tmp_path / 'out'}"])
    assert ended.value.code == 2 and part in capsys.readouterr().err
