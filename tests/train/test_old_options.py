"""Options under their old names, and options that are gone: one line that says what to write now; old checkpoints are read.

Reference: the schema, which has every new name and no old one.
"""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.launch.composing.explain import schema_paths
from visionloom.launch.configure import compose
from visionloom.train.changes import changes, settings_of
from visionloom.train.checkpoint.state_file import STATE, RunState, model_of, read_run_state
from visionloom.train.config import RunConfig
from visionloom.train.old_options import GONE, RENAMED, old_option, todays_settings

OLD = sorted(RENAMED | GONE)


def refusal(*words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        compose(["+recipe=demo", *words], 1)
    return caught.value.lines


def composed() -> RunConfig:
    config = compose(["+recipe=demo", "optim=adamw"], 1)
    assert config is not None
    return config


@pytest.mark.parametrize("option", OLD)
@pytest.mark.parametrize("word", ["{}=1", "+{}=1", "++{}=1", "~{}"])
def test_a_word_with_an_old_name(option: str, word: str) -> None:
    (line,) = refusal(word.format(option))
    assert line == old_option(option) and line.startswith(option)


@pytest.mark.parametrize("option", OLD)
def test_a_recipe_with_an_old_name(option: str, tmp_path: Path) -> None:
    """In a file of a whole run, and as a section on the command line."""
    section, name = option.split(".")
    file = tmp_path / "recipe" / "old.yaml"
    file.parent.mkdir()
    file.write_text(
        f"# @package _global_\ndefaults: [/recipe/demo, _self_]\n{section}: {{{name}: 1}}\n"
    )
    with pytest.raises(UserError) as caught:
        compose(["+recipe=old", "--config-dir", str(tmp_path)], 1)
    for line in (str(caught.value), *refusal(f"{section}={{{name}: 1}}")):
        assert line.endswith(str(old_option(option))) and "\n" not in line


def test_old_names_are_refused_together() -> None:
    assert refusal("data.window=8", "model.backend=flash", "data.workers=1") == [
        "data.window has a new name: write data.packing_window_samples",
        "model.backend is gone: leave it out, attention is chosen by what is installed",
    ]


def test_old_names_are_none_of_the_schema() -> None:
    paths = set(schema_paths())
    assert paths >= set(RENAMED.values())
    assert paths.isdisjoint(OLD)
    assert [path for path in paths if old_option(path)] == []


def test_settings_under_old_names() -> None:
    """By dotted path, as checkpoints keep them, and in sections, as config.yaml does."""
    flat = {
        "data.window": 5,
        "model.backend": "auto",
        "phases.p.lr": 1.0,
    }
    assert todays_settings(flat) == {"data.packing_window_samples": 5, "phases.p.lr": 1.0}
    nested = {
        "data": {"window": 5, "media": {"rule": "hf"}},
        "parallel": {"tensor": 2},
        "phases": 3,
    }
    today = {
        "data": {"packing_window_samples": 5, "media": {"rule": "hf"}},
        "parallel": {"tensor": 2},
        "phases": 3,
    }
    assert todays_settings(nested) == today
    assert todays_settings({"backend": "auto", "name": "x"}, "model") == {"name": "x"}


def test_a_checkpoint_with_old_names_goes_on(tmp_path: Path) -> None:
    """Its state.json has what programs before 2026-11-26 wrote: gone fields of the model and among the settings."""
    config = composed()
    settings = settings_of(config, "align") | {"optim.name": "adamw"}
    model = asdict(config.model) | {"backend": "auto"}
    steps = config.phases["align"].total_steps
    old = RunState("align", 10, 260, steps, {}, model, 10, settings=settings)
    (tmp_path / STATE).write_text(json.dumps(asdict(old)))
    kept = read_run_state(tmp_path)
    assert model_of(kept) == config.model
    assert changes(config, kept, "D") == []
    # Some versions did not name the optimizer: it was AdamW.
    del kept.settings["optim.name"]
    assert changes(config, kept, "D") == []
    config.optim.name = "muon"
    with pytest.raises(UserError, match=r"optim\.name was adamw, now muon: set it back"):
        changes(config, kept, "D")

    (tmp_path / STATE).write_text(
        json.dumps(asdict(old) | {"model": asdict(config.model) | {"backnd": "auto"}})
    )
    with pytest.raises(UserError, match=r"model\.backnd is unknown"):
        read_run_state(tmp_path)
