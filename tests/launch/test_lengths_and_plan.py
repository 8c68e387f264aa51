"""data.py lengths and plan: tables and plans from lengths alone, refusals in one line."""

from pathlib import Path

import pytest

from visionloom.data.demo.make import make_demo
from visionloom.data.plan.deal import deal
from visionloom.launch.configure import compose
from visionloom.launch.data import main
from visionloom.launch.data_commands.plan import plan_phase
from visionloom.train.cost import cost_model


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_demo(folder, 0, 0.02, lambda *_: None)
    return folder


def rows(text: str) -> list[list[str]]:
    """Cells of the printed tables."""
    return [
        [cell.strip() for cell in line.strip("│\n").split("│")]
        for line in text.splitlines()
        if line.startswith("│")
    ]


def test_lengths_are_counted_once(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "lengths",
        str(demo / "train"),
        "--tokenizer",
        str(demo / "tokenizer"),
        "--cache",
        str(tmp_path),
        "--processes",
        "1",
    ]
    assert main(words) == 0
    first = capsys.readouterr().out
    found = {row[0]: row for row in rows(first)}
    assert {"captions", "video", "documents"} <= set(found)
    assert found["text"][6] == "0%"
    assert int(found["captions"][2].replace(",", "")) > 0
    assert len(list(tmp_path.glob("lengths-*.npy"))) == len(found)
    assert "captions: 160 samples" in first
    assert main([*words, "--media", "image_min_pixels=1024"]) == 0
    assert len(list(tmp_path.glob("lengths-*.npy"))) == 2 * len(found), "other rules, other tables"
    capsys.readouterr()
    assert main(words) == 0
    again = capsys.readouterr().out
    assert "captions: 160 samples" not in again, "counted although tables are there"
    assert [row[:9] for row in rows(again)] == [row[:9] for row in rows(first)]


def test_wrong_words_are_one_line(
    demo: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tokenizer = ["--tokenizer", str(demo / "tokenizer")]
    for words, part in (
        (["lengths", str(tmp_path), *tokenizer], "no dataset.json in or below"),
        (["lengths", str(demo), *tokenizer, "--media", "pixels=3"], "--media pixels=3: unknown"),
        (["lengths", str(demo), *tokenizer, "--media", "video_max_frames=x"], "a number expected"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert part in capsys.readouterr().err


def test_a_plan_is_what_training_would_see(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VISIONLOOM_DEMO_DATA", str(demo))
    assert (
        main(["plan", "+recipe=demo", "--steps", "12", "--data-parallel", "2", "--processes", "1"])
        == 0
    )
    found = rows(capsys.readouterr().out)
    config = compose(["+recipe=demo"], 1)
    assert config is not None
    phases = [row for row in found if len(row) == 10]
    # Answers that a phase writes itself are in no plan.
    assert [row[0] for row in phases] == [each for each in config.phases if each != "rl"]
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "+recipe=demo", "--phase", "rl"])
    assert "so nothing is planned" in capsys.readouterr().err
    plan = plan_phase(config, "long")
    packs = [pack for step in range(12) for pack in plan.step(step)]
    parts = [
        [plan.entries[number].parts.part(sample, part) for number, sample, part in pack.places]
        for pack in packs
    ]
    (shown,) = [row for row in phases if row[0] == "long"]
    assert shown[3] == str(len(packs))
    assert (
        shown[4] == f"{sum(part.tokens for pack in parts for part in pack) / len(packs) / 1024:.2%}"
    )
    loads = [
        [sum(p.cost for micro in rank for p in micro) for rank in deal(plan.step(step), 2, 1)]
        for step in range(12)
    ]
    assert shown[8] == f"{sum(map(sum, loads)) / 2 / sum(map(max, loads)):.1%}"
    datasets = {row[1]: row for row in found if len(row) == 9 and row[0] == "long"}
    assert set(datasets) == set(config.phases["long"].mixture)
    assert sum(int(row[4].replace(",", "")) for row in datasets.values()) == sum(
        part.tokens for pack in parts for part in pack
    )


def test_one_phase_and_unknown_ones(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VISIONLOOM_DEMO_DATA", str(demo))
    words = [
        "plan",
        "+recipe=demo",
        "data.datasets.documents.over_length=split",
        "phases.sft.sequence_length=512",
    ]
    assert main([*words, "--phase", "sft", "--steps", "3", "--processes", "1"]) == 0
    found = rows(capsys.readouterr().out)
    assert {row[0] for row in found} == {"sft"}
    with pytest.raises(SystemExit):
        main([*words, "--phase", "stf"])
    assert "--phase stf is not in the recipe" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["first", "last"])
def test_plan_takes_the_options_of_a_run(order: str, tmp_path: Path, demo_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("VISIONLOOM_DEMO_DATA", str(demo_data))
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [/recipe/demo, _self_]\nrun: {name: mine}\n"
    )
    options, words = (
        ["--config-dir", str(tmp_path)],
        ["+recipe=mine", "~phases.align", "--steps", "2", "--processes", "1"],
    )
    assert (
        main(["plan", *(options + words if order == "first" else words + options), "run.seed=3"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "towers" in shown and "align" not in shown


def test_other_commands_refuse_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["lengths", "x", "--tokenizer", "y", "--config-dir", "z"])
    assert "unrecognized arguments: --config-dir z" in capsys.readouterr().err


def test_a_plan_of_adapters_is_balanced_for_adapters(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that adapters stand beside have no gradients, so a token costs less in proportion to a pair of tokens."""
    monkeypatch.setenv("VISIONLOOM_DEMO_DATA", str(demo))
    config = compose(
        ["+recipe=lora/demo", f"data.datasets.words.path={demo / 'train' / 'captions'}"], 1
    )
    assert config is not None
    for name, phase in config.phases.items():
        shown, trainable = plan_phase(config, name).cost, set(phase.trainable)
        assert shown == cost_model(config.model, trainable, config.lora)
        assert shown.token_pair > cost_model(config.model, trainable).token_pair
