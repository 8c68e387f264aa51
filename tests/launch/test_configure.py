"""Every wrong command line ends in one clear line for each fault; every right one in a typed configuration.

Reference: the dataclasses of train/config.py, and the published config.json of each model.
"""

from pathlib import Path
from typing import cast

import pytest
from omegaconf import OmegaConf

from visionloom.common.errors import UserError
from visionloom.launch.composing.explain import schema_paths, suggestions
from visionloom.launch.configure import check_paths, compose, split_options
from visionloom.model.config import ModelConfig
from visionloom.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
DEMO = "+recipe=demo"


@pytest.fixture
def own_recipes(tmp_path: Path) -> Path:
    """A user's own folder of recipes: a good one, and one for each mistake that a file can hold."""
    recipes = {
        "mine": "defaults: [/recipe/demo, {override /model: tiny_moe}, _self_]\nrun: {name: mine}\n",
        "deep/nested": "defaults: [/recipe/demo, _self_]\nrun: {name: nested}\n",
        "typo": "defaults: [/recipe/demo, _self_]\nphases: {align: {stpes: 3}}\n",
        "wrong_type": "defaults: [/recipe/demo, _self_]\nphases: {align: {steps: many}}\n",
        "wrong_group": "defaults: [/recipe/demo, {override /modle: tiny}, _self_]\n",
        "layout": "defaults: [/recipe/demo, _self_]\nphases: {long: {parallel: {tensor: 2}}}\n",
        "nameless": "defaults: [{override /model: tiny}, _self_]\nphases: {only: {steps: 1}}\ndata: {datasets: {a: {weight: 1}}}\n",
        "broken": "phases: {align: {steps: 3}\n",
    }
    for name, text in recipes.items():
        file = tmp_path / "recipe" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("# @package _global_\n" + text)
    return tmp_path


def faults(*words: str, world_size: int = 1) -> list[str]:
    with pytest.raises(UserError) as caught:
        compose(words, world_size)
    return str(caught.value).splitlines()


def composed(*words: str, world_size: int = 1) -> RunConfig:
    config = compose(words, world_size)
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["no recipe", "+recipe=NAME", "demo"]),
        (["+recipe=nonsense"], ["recipe=nonsense is unknown", "use one of", "demo"]),
        (["+recipe=demmo"], ["did you mean demo?"]),
        (["+recipe=[demo,nonsense]"], ["recipe=nonsense is unknown"]),
        (["recipe=demo"], ["write +recipe=demo"]),
        (
            [DEMO, "model=qwen3vl_8"],
            ["model=qwen3vl_8 is unknown", "did you mean qwen3vl_8b?", "tiny_moe"],
        ),
        ([DEMO, "modle=tiny"], ["no such key: modle", "did you mean model?"]),
        ([DEMO, "run.sed=3"], ["no such key: run.sed", "did you mean run.seed?"]),
        ([DEMO, "seed=3"], ["no such key: seed", "did you mean run.seed or generation.seed?"]),
        ([DEMO, "+run.sed=3"], ["no such key: run.sed", "did you mean run.seed?"]),
        ([DEMO, "++run.sed=3"], ["no such key: run.sed", "did you mean run.seed?"]),
        ([DEMO, "+sequence_lenght=8"], ["did you mean phases.<name>.sequence_length?"]),
        (
            [DEMO, "phases.align.stpes=3"],
            ["no such key: phases.align.stpes", "did you mean phases.align.steps?"],
        ),
        ([DEMO, "++phases.align.stpes=3"], ["did you mean phases.align.steps?"]),
        (
            [DEMO, "phases.algin.steps=3"],
            ["no such name: phases.algin", "did you mean align?", "towers"],
        ),
        ([DEMO, "+phases.algin.steps=3"], ["no such name: phases.algin", "did you mean align?"]),
        ([DEMO, "phases.align.parallel.tensr=2"], ["did you mean phases.align.parallel.tensor?"]),
        (
            [DEMO, "phases.align.parallel.tensor=two"],
            ["phases.align.parallel.tensor", "two", "Integer"],
        ),
        (
            [DEMO, "phases.align.mixture.text=1"],
            ["no such name: phases.align.mixture.text", "+phases.align.mixture.text=VALUE"],
        ),
        ([DEMO, "phases.align.steps=abc"], ["phases.align.steps", "abc", "Integer"]),
        ([DEMO, "phases.align.trainable=merger"], ["phases.align.trainable", "list"]),
        (
            [DEMO, "phases.align.trainable=[mergers]"],
            ["phases.align.trainable=mergers is unknown", "did you mean merger?"],
        ),
        (
            [DEMO, "+phases.align.mixture.caption=1"],
            ["phases.align.mixture=caption is unknown", "did you mean captions?"],
        ),
        ([DEMO, "run.name=???"], ["run.name is required"]),
        ([DEMO, "+data.datasets.extra.weight=2"], ["data.datasets.extra.path is required"]),
        ([DEMO, "run.name=${oc.env:VISIONLOOM_UNSET}"], ["run.name", "VISIONLOOM_UNSET"]),
        ([DEMO, "run.seed"], ["cannot read 'run.seed'", "key=value"]),
        ([DEMO, "+run.seed=3"], ["run.seed", "without the plus"]),
        ([DEMO, "--nonsense"], ["unrecognized arguments: --nonsense"]),
        ([DEMO, "--multirun"], ["--multirun is refused"]),
        ([DEMO, "-m"], ["--multirun is refused"]),
        ([DEMO, "--config-dir", "nowhere"], ["nowhere", "not found"]),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], expected: list[str]) -> None:
    lines = faults(*words)
    assert len(lines) == 1
    assert [part for part in expected if part not in lines[0]] == []


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            "typo",
            "recipe/typo.yaml: no such key: phases.align.stpes (did you mean phases.align.steps?)",
        ),
        (
            "wrong_type",
            "recipe/wrong_type.yaml: phases.align.steps: Value 'many' of type 'str' could not be converted to Integer",
        ),
        ("wrong_group", "recipe/wrong_group.yaml: no such group: modle (did you mean model?)"),
        (
            "mien",
            "recipe=mien is unknown (did you mean mine?): use one of broken, deep/nested, demo, distillation/demo, full/",
        ),
    ],
)
def test_a_wrong_file_is_named(own_recipes: Path, recipe: str, expected: str) -> None:
    (line,) = faults(f"+recipe={recipe}", "--config-dir", str(own_recipes))
    assert line.startswith(expected)


def test_broken_yaml_is_named_with_its_line(own_recipes: Path) -> None:
    (line,) = faults("+recipe=broken", f"--config-dir={own_recipes}")
    assert "broken.yaml, line 3: not valid YAML" in line


def test_every_missing_value_gets_a_line(own_recipes: Path) -> None:
    lines = faults("+recipe=nameless", "--config-dir", str(own_recipes))
    assert [line.split()[0] for line in lines] == ["data.datasets.a.path", "run.name"]


def test_every_value_that_cannot_work_gets_a_line() -> None:
    lines = faults(DEMO, "run.device=gpu", "phases.align.loss=root", "phases.sft.steps=0")
    assert [line.partition("=")[0].split(" ")[0] for line in lines] == [
        "run.device",
        "phases.align.loss",
        "phases.sft.steps",
    ]


def test_the_world_size_comes_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        UserError,
        match=r"phases.language.global_batch=4 .* 3 data-parallel ranks .* \(likewise towers, align",
    ):
        compose([DEMO])


def test_the_demo_keeps_the_order_of_its_phases() -> None:
    config = composed(DEMO, world_size=2)
    assert list(config.phases) == [
        "language",
        "towers",
        "align",
        "multimodal",
        "long",
        "ultra",
        "sft",
        "reasoning",
        "rl",
    ]
    assert config.run.folder == "runs/demo"
    assert config.phases["align"].peak_learning_rates().keys() == {"merger"}


def test_words_of_the_command_line_win() -> None:
    config = composed(
        DEMO,
        "phases.align.steps=10",
        "run.name=other",
        "+phases.align.mixture.text=0.5",
        "+data.datasets.extra.path=here",
    )
    assert config.phases["align"].steps == 10
    assert config.run.folder == "runs/other"
    assert config.phases["align"].mixture == {"captions": 1.0, "text": 0.5}
    assert (config.data.datasets["extra"].path, config.data.datasets["extra"].weight) == (
        "here",
        1.0,
    )


@pytest.mark.parametrize(
    "word",
    ["phases.long.parallel.tensor=2", "phases.long.parallel={tensor: 2}", "+recipe=[demo,layout]"],
)
def test_a_phase_may_have_a_layout_of_its_own(own_recipes: Path, word: str) -> None:
    config = composed(
        *dict.fromkeys([word if word.startswith("+") else DEMO, word]),
        "--config-dir",
        str(own_recipes),
        world_size=2,
    )
    layout = config.phases["long"].parallel
    assert layout is not None and (layout.tensor, layout.pipeline) == (2, 1)
    assert config.phases["align"].parallel is None


def test_own_recipes_inherit_ours(own_recipes: Path) -> None:
    assert composed("+recipe=deep/nested", "--config-dir", str(own_recipes)).run.name == "nested"
    mine = composed("+recipe=mine", "--config-dir", str(own_recipes))
    assert (mine.run.name, mine.model.name) == ("mine", "tiny_moe")


@pytest.mark.parametrize(
    "late", [["+data.datasets.mine.path=DIR", "phases.long.parallel.tensor=2"], []]
)
def test_what_is_shown_is_what_would_run(
    late: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the composed configuration, and OmegaConf reading back what was printed."""
    words = [DEMO, "phases.align.steps=17", *late]
    assert compose(["--cfg", "job", *words, "--resolve"]) is None
    shown = OmegaConf.merge(
        OmegaConf.structured(RunConfig), OmegaConf.create(capsys.readouterr().out)
    )
    expected = composed(*words, world_size=2)
    expected.run.folder = ""
    assert OmegaConf.to_object(shown) == expected
    assert ("mine" in expected.data.datasets) == bool(late)
    with pytest.raises(UserError, match=r"no such name: phases\.algin"):
        compose(["--cfg=job", DEMO, "phases.algin.parallel.tensor=2"])


def test_missing_folders_are_counted_with_those_added() -> None:
    words = [DEMO, "data.tokenizer=/nowhere", "+data.datasets.mine.path=/nowhere"]
    # A folder that no phase draws from need not be there.
    config = composed(*words, "+phases.sft.mixture.mine=1", world_size=2)
    for dataset in (*config.data.datasets.values(), *config.data.validation.values()):
        dataset.path = "/nowhere"
    count = 1 + len(config.data.datasets) + len(config.data.validation)
    with pytest.raises(UserError, match=rf"\n{count - 3} more input folders do not exist$"):
        check_paths(config)


def test_paths_are_checked_with_their_option(tmp_path: Path) -> None:
    config = composed(DEMO)
    for name, dataset in (*config.data.datasets.items(), *config.data.validation.items()):
        dataset.path = str(tmp_path / name)
        Path(dataset.path).mkdir(exist_ok=True)
    config.data.tokenizer = str(tmp_path)
    check_paths(config)
    config.data.validation["video"].path = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"^data\.validation\.video\.path=.*gone is not a folder"):
        check_paths(config)


def test_suggestions_prefer_the_same_place() -> None:
    assert suggestions("phases.align.lr_vison") == ["phases.align.lr_vision"]
    assert suggestions("model.layers") == ["model.text.layers"]
    assert suggestions("zzzz") == []
    assert "phases.<name>.parallel.tensor" in schema_paths()


def test_a_commands_own_options_are_taken_out() -> None:
    assert split_options([DEMO, "checkpoint=a=b"], ["checkpoint"]) == (
        {"checkpoint": "a=b"},
        [DEMO],
    )


# layers, hidden, ffn, heads, kv heads, tied | depth, hidden, ffn, deepstack | experts, per token, expert ffn
PUBLISHED = {
    "qwen3vl_2b": ((28, 2048, 6144, 16, 8, True), (24, 1024, 4096, [5, 11, 17]), (0, 0, 0)),
    "qwen3vl_4b": ((36, 2560, 9728, 32, 8, True), (24, 1024, 4096, [5, 11, 17]), (0, 0, 0)),
    "qwen3vl_8b": ((36, 4096, 12288, 32, 8, False), (27, 1152, 4304, [8, 16, 24]), (0, 0, 0)),
    "qwen3vl_32b": ((64, 5120, 25600, 64, 8, False), (27, 1152, 4304, [8, 16, 24]), (0, 0, 0)),
    "qwen3vl_30b_a3b": (
        (48, 2048, 6144, 32, 4, False),
        (27, 1152, 4304, [8, 16, 24]),
        (128, 8, 768),
    ),
    "qwen3vl_235b_a22b": (
        (94, 4096, 12288, 64, 4, False),
        (27, 1152, 4304, [8, 16, 24]),
        (128, 8, 1536),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_sizes_are_the_published_ones(name: str) -> None:
    """Reference: config.json of Qwen/Qwen3-VL-*; Qwen3-VL technical report, section 2."""
    model = composed_model(name)
    text, vision = model.text, model.vision
    language = (
        text.layers,
        text.hidden_size,
        text.ffn_hidden_size,
        text.heads,
        text.kv_heads,
        text.tie_embeddings,
    )
    tower = (vision.depth, vision.hidden_size, vision.ffn_hidden_size, vision.deepstack_layers)
    experts = (text.experts, text.experts_per_token, text.expert_ffn_hidden_size)
    assert (language, tower, experts) == PUBLISHED[name]
    assert (text.head_dim, text.vocab_size, text.rope_theta, text.mrope_section) == (
        128,
        151936,
        5e6,
        [24, 20, 20],
    )
    assert (text.norm_epsilon, text.max_positions, vision.heads, vision.position_table) == (
        1e-6,
        262144,
        16,
        48,
    )
    assert (vision.patch_width, vision.spatial_merge_size, model.name) == (3 * 2 * 16 * 16, 2, name)


def composed_model(name: str) -> ModelConfig:
    """A model as its recipe gives it: read by OmegaConf over the schema, so that sizes that cannot be built yet are seen too."""
    merged = OmegaConf.merge(
        OmegaConf.structured(ModelConfig),
        OmegaConf.load(ROOT / "recipes" / "model" / f"{name}.yaml"),
    )
    return cast(ModelConfig, OmegaConf.to_object(merged))
