"""Every number of a run has bounds, so that no recipe or word costs memory or time before the first step.

Reference: the schema itself, walked; and the published sizes in recipes/model, which all lie within.
"""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest

from visionloom.common.errors import UserError
from visionloom.common.settings import options, without_rules
from visionloom.data.config import DatasetConfig, ValidationConfig
from visionloom.launch.configure import check_memory, compose
from visionloom.parallel.config import ParallelConfig
from visionloom.train.config import RunConfig
from visionloom.train.phase.config import PhaseConfig


def full() -> RunConfig:
    """A configuration with every section that there can be."""
    config = RunConfig(
        phases={"p": PhaseConfig(parallel=ParallelConfig(), mixture={"d": 1.0}, steps=1)}
    )
    config.run.name, config.data.datasets = "x", {"d": DatasetConfig()}
    config.data.validation = {"v": ValidationConfig()}
    return config


NUMBERS = [
    each.name
    for each in options(full())
    if not isinstance(each.value, str | bool | list)
    and each.name != "parallel.sequence"
    and "layout" not in each.name
]


def test_every_option_has_rules() -> None:
    """A new option without bounds and without a class of change stops here."""
    assert list(without_rules(RunConfig)) == []


def test_weights_that_the_machine_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the published size of the model, 235 billion parameters and its vision tower."""
    config = compose(["+recipe=demo", "model=qwen3vl_235b_a22b", "run.device=cpu"], 1)
    assert config is not None
    monkeypatch.setattr("visionloom.launch.environment.memory_bytes", lambda: 900 * 2**30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_memory(replace(config, parallel=ParallelConfig(tensor=4)))
    with pytest.raises(
        UserError, match=r"has 235,[0-9,]+ parameters: their weights take 1,75\d GiB .* has 900 GiB"
    ):
        check_memory(config)
    config.run.device = "cuda"
    check_memory(config)


def holder(config: RunConfig, option: str) -> tuple[Any, str]:
    """What holds an option, and its name there."""
    *path, name = option.split(".")
    found: Any = config
    for part in path:
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found, name


@pytest.mark.parametrize(
    "option", [each for each in NUMBERS if not each.endswith("parallel.sequence")]
)
def test_every_number_is_bounded(option: str) -> None:
    """1e308 for what may be fractional, ten to the thirtieth for what is counted, and the negatives of both."""
    for value in (10**30, -(10**30), 1e308, -1e308):
        config = full()
        section, name = holder(config, option)
        if isinstance(section, dict):
            section[name] = {"d": value}
        else:
            setattr(section, name, {"d": value} if name == "mixture" else value)
        found = config.all_problems(1)
        assert len(found) == 1 and found[0].startswith(option), found


def test_the_numbers_are_those_of_the_schema() -> None:
    """That the list above is not empty or shortened: each int and float of each dataclass is in it."""
    names = {name.rpartition(".")[2] for name in NUMBERS}
    missing = {
        field.name
        for section in (RunConfig().run, RunConfig().optim, RunConfig().data, RunConfig().data.media, RunConfig().data.store,
            RunConfig().model.text, RunConfig().model.vision, RunConfig().lora, RunConfig().evaluation, PhaseConfig())
        for field in dataclasses.fields(section)
        if field.type in (int, float, int | None, float | None) and field.name not in names
    }  # fmt: skip
    assert missing == set() and len(NUMBERS) > 70


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.text.layers=10000000"], "model.text.layers=10000000 must be at least 1 and at most 1,024"),
        (["model=tiny_moe", "model.text.experts=99999999"], "model.text.experts=99999999 must be at least 0 and at most 4,096"),
        (["model.text.vocab_size=2000000000"], "model.text.vocab_size=2000000000"),
        (["data.workers=1000000"], "data.workers=1000000 must be at least 0 and at most 1,024"),
        (["run.threads=1000000"], "run.threads=1000000"),
        (["run.seed=99999999999999999999"], "run.seed=99999999999999999999"),
        (["phases.align.steps=99999999999"], "phases.align.steps=99999999999"),
        (["phases.align.steps=null", "phases.align.tokens=999999999999999"], "phases.align.tokens=999999999999999 makes"),
        (["phases.align.sequence_length=999999999"], "phases.align.sequence_length=999999999"),
        (["phases.align.lr=1e308"], "phases.align.lr=1e+308 must be at least 0 and at most 100"),
        (["phases.align.lr=inf"], "phases.align.lr=inf must be a finite number"),
        (["phases.align.lr=nan"], "phases.align.lr=nan must be a finite number"),
        (["optim.beta1=1e308"], "optim.beta1=1e+308 must be at least 0 and below 1"),
        (["data.datasets.text.weight=1e308"], "data.datasets.text.weight=1e+308"),
        (["+phases.align.mixture.text=1e308"], "phases.align.mixture.text=1e+308"),
        ([f"phases.align.steps={'9' * 5000}"], "phases.align.steps takes a whole number, not 5000 characters"),
        ([f"phases.align.lr={'9' * 400}"], "phases.align.lr takes a number, not 400 characters"),
        ([f"lora.targets=[{','.join('a' * 99)}]"], "lora.targets has 99 entries, at most 64 are possible"),
        ([f"run.name={'a' * 9000}"], "has 9009 characters: at most 8192"),
        (["+phases.x={steps: 1, lr: " + "9" * 400 + "}"], "int too large to convert to float"),
        (["+phases.a/b={steps: 1}"], "cannot read the name 'phases.a/b'"),
        (["run.name=a/../../b"], "run.name=a/../../b: names have letters"),
        (["+data.datasets.-x.path=/d"], "cannot read the name 'data.datasets.-x.path'"),
    ],
)  # fmt: skip
def test_a_word_that_costs_is_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(["+recipe=demo", *words], 1)
    line = str(caught.value)
    assert expected in line and "\n" not in line and len(line) < 400
