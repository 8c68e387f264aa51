"""Recipes are made of ingredients: each composes, each model tunes both ways, no text stands twice.

References: tests/model/test_sizes.py for the models that exist; the models themselves, built
without memory, for the memory that the headers state.
"""

import re
from collections import Counter
from itertools import chain, combinations, product
from pathlib import Path
from typing import Final

import pytest

from visionloom.common.errors import UserError
from visionloom.launch.composing.explain import available
from visionloom.launch.configure import compose
from visionloom.model.lora_config import LoraConfig
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.model.test_sizes import COUNTS, published
from visionloom.tests.ranks import RankPool
from visionloom.train.config import RunConfig

RECIPES: Final = Path(__file__).resolve().parents[2] / "recipes"
KINDS: Final = ("full", "lora")
A_FEW: Final = 10
"""Lines that two files may share: naming the ingredients takes 7, copies shared 22 (counted)."""
IN_EVERY_FILE: Final = ("", "#", "# @package _global_", "defaults:", "- _self_")
NAME: Final = re.compile(r"qwen3[-_]?vl[-_]\w+?b([-_]a\d+b)?\b", re.IGNORECASE)
"""A model in any spelling: qwen3vl_30b_a3b, qwen3vl-8b, Qwen3-VL-235B-A22B."""


def text_of(recipe: str) -> str:
    return (RECIPES / "recipe" / f"{recipe}.yaml").read_text()


def header(recipe: str, pattern: str) -> int | None:
    """Return the number that the header of a recipe gives in this place."""
    stated = re.search(pattern, text_of(recipe), re.MULTILINE)
    return int(stated[1]) if stated else None


def composed(*words: str, ranks: int = 1) -> RunConfig:
    config = compose(words, ranks)
    assert config is not None
    return config


@pytest.mark.parametrize("recipe", available("recipe"))
def test_every_recipe_composes(recipe: str) -> None:
    """On one rank, or on those that its header asks for."""
    composed(f"+recipe={recipe}", ranks=header(recipe, r"^# Ranks: (\d+)") or 1)


@pytest.mark.parametrize("model", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_can_be_tuned(model: str, kind: str) -> None:
    recipe = f"{kind}/{model}"
    ranks = header(recipe, r"^# Ranks: (\d+) or more\.")
    assert ranks is not None
    config = composed(f"+recipe={recipe}", ranks=ranks)
    assert config.model == published(model)
    assert config.init.huggingface == config.data.tokenizer == f"models/{model}"
    assert config.run.name == recipe.replace("/", "-").replace("_", "-")
    assert (config.lora == LoraConfig()) is (kind == "full")
    assert list(config.phases) == ["finetune"]


@pytest.mark.parametrize("model", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_command_starts_the_ranks_that_are_needed(model: str, kind: str) -> None:
    recipe = f"{kind}/{model}"
    per_machine = header(recipe, r"^# Command: torchrun --nproc-per-node (\d+) ")
    assert per_machine is not None
    machines = header(recipe, r"^# Command: .* --nnodes (\d+) \.\.\. ") or 1
    assert per_machine * machines == header(recipe, r"^# Ranks: (\d+)")
    assert f" launch/finetune.py +recipe={recipe} WORDS\n" in text_of(recipe)


def test_the_words_of_a_command_are_those_that_every_model_needs() -> None:
    """WORDS of a header stands for a line of training/full.yaml."""
    lines = (RECIPES / "training" / "full.yaml").read_text().splitlines()
    (words,) = [line.removeprefix("#   ").split() for line in lines if line.startswith("#   init.")]
    values = [word.replace("MODEL", "/m").replace("SHARDS", "/s") for word in words]
    config = composed("+recipe=lora/qwen3vl_2b", *values)
    assert config.init.huggingface == config.data.tokenizer == "/m"
    assert config.data.datasets["mine"].path == "/s"


def test_ingredients_can_be_chosen_by_words() -> None:
    """Without a recipe, as for a model of one's own; words replace a recipe's ingredients."""
    words = ["model=qwen3vl_8b", "training=lora", "parallel=qwen3vl_8b/lora"]
    chosen = composed(*words, "run.name=lora-qwen3vl-8b", ranks=2)
    assert chosen == composed("+recipe=lora/qwen3vl_8b", ranks=2)

    config = composed("+recipe=full/qwen3vl_8b", "parallel=qwen3vl_32b/full", "data=demo", ranks=8)
    layout = ParallelConfig(tensor=4, recompute="all_but_attention", recompute_layers=48)
    assert config.parallel == layout
    assert "captions" in config.data.datasets and "mine" not in config.data.datasets


def test_a_layout_may_set_what_its_ranks_ask_for(tmp_path: Path) -> None:
    """A phase's own layout and batch too, without a change of the phases' order."""
    files = {
        "training/two": "phases: {short: {steps: 1, global_batch: 4}, long: {steps: 2}}\n",
        "parallel/tiny/ranks4": "phases: {long: {global_batch: 8, parallel: {tensor: 4}}}\n",
    }
    for name, text in files.items():
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(f"# @package _global_\n{text}")
    words = ["model=tiny", "training=two", "parallel=tiny/ranks4", "run.name=x"]
    config = composed(*words, f"--config-dir={tmp_path}", "model.text.kv_heads=4", ranks=4)
    assert list(config.phases) == ["short", "long"]
    long = config.phases["long"]
    assert (long.steps, long.global_batch) == (2, 8)
    assert long.parallel == ParallelConfig(tensor=4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["training=lora"],
            r"no model is chosen: pass model=NAME, NAME one of demo, demo_student, qwen3vl_",
        ),
        (["training=lora", "model=tiny"], r"run\.name is required"),
        (["+training=lora", "model=tiny"], r"training is chosen, not added: write training=lora$"),
        (["training=loar", "model=tiny"], r"training=loar is unknown \(did you mean lora\?\)"),
        (["parallel=qwen3vl_8b/ful"], r"parallel=.* is unknown \(did you mean qw.*/full\?\)"),
    ],
)
def test_a_wrong_choice_is_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=rf"^{expected}") as caught:
        compose(words, 1)
    assert "\n" not in str(caught.value)


def test_a_file_of_ones_own_names_a_model(tmp_path: Path) -> None:
    file = tmp_path / "recipe" / "mine.yaml"
    file.parent.mkdir()
    text = "# @package _global_\ndefaults: [override /training: full, _self_]\nrun: {name: mine}\n"
    file.write_text(text)
    words = ["+recipe=mine", f"--config-dir={tmp_path}"]
    with pytest.raises(UserError, match=r"^no model is chosen"):
        compose(words, 1)
    assert composed(*words, "model=tiny").init.huggingface == "models/tiny"


def own_lines(text: str) -> Counter[str]:
    """Count the lines of a file, all models called alike, without those that every file has."""
    lines = [NAME.sub("MODEL", line).strip() for line in text.splitlines()]
    return Counter(line for line in lines if line not in IN_EVERY_FILE)


def shared(text: str, other: str) -> int:
    """Count the lines that stand in both texts."""
    return (own_lines(text) & own_lines(other)).total()


def test_no_text_stands_twice() -> None:
    """Files of model/ and gpu/ are left out: models with the same vision tower, and GPUs with the same chip, have the same numbers."""
    files = [file for file in RECIPES.rglob("*.yaml") if file.parent.name not in ("model", "gpu")]
    texts = {str(file.relative_to(RECIPES)): file.read_text() for file in files}
    assert len(texts) > 2 * len(COUNTS)
    alike = {(a, b): shared(texts[a], texts[b]) for a, b in combinations(texts, 2)}
    assert {pair: lines for pair, lines in alike.items() if lines > A_FEW} == {}


def test_a_copy_with_another_model_is_seen() -> None:
    text = (RECIPES / "training" / "full.yaml").read_text() + "run: {name: full-qwen3vl-8b}\n"
    copy = text.replace("8b", "30b-a3b").replace("1.0e-5", "2.0e-5")
    assert shared(text, copy) == own_lines(text).total() - 1 > A_FEW
    names = ("qwen3vl_30b_a3b", "qwen3vl-8b", "Qwen3-VL-235B-A22B", "qwen3vl_2b/lora")
    assert [NAME.sub("MODEL", name) for name in names] == ["MODEL", "MODEL", "MODEL", "MODEL/lora"]


def gigabytes(cases: list[tuple[str, int, ParallelConfig, bool]]) -> list[float]:
    """Return what the fullest rank of each case holds besides activations, in 10^9 bytes.

    Runs on a rank of the pool, which leaves its world. A parameter takes 2 bytes (bf16), its gradient
    4, and its optimizer state 12, shared by the ranks that hold the same part.
    """
    import torch.distributed as dist

    dist.destroy_process_group()
    held = []
    for model, ranks, layout, trains in cases:
        stages = range(layout.pipeline)
        bytes_of_stages = [stage_bytes(model, ranks, layout, trains, stage) for stage in stages]
        held.append(max(bytes_of_stages) / 1e9)
    return held


def stage_bytes(model: str, ranks: int, layout: ParallelConfig, trains: bool, stage: int) -> float:
    """Return the bytes of weights, gradients and optimizer state on a rank of a pipeline stage."""
    import torch

    from visionloom.model.qwen3vl import Qwen3VL
    from visionloom.parallel import topology as topologies

    topology = topologies.imagine(layout, ranks, stage * ranks // layout.pipeline)
    try:
        with torch.device("meta"):
            chunks = [
                Qwen3VL(published(model), topology, torch.bfloat16, number)
                for number in layout.chunk_numbers
            ]
        bytes_held = 0.0
        for name, parameter in chain.from_iterable(each.named_parameters() for each in chunks):
            cut = layout.expert if ".experts." in name else layout.tensor
            holders = ranks // layout.pipeline // cut
            bytes_held += parameter.numel() * (2 + 4 + 12 / holders if trains else 2)
        return bytes_held
    finally:
        topologies.stop()


@pytest.mark.long
def test_headers_state_the_memory_of_the_fullest_rank(pool: RankPool) -> None:
    recipes = [f"{kind}/{model}" for kind, model in product(KINDS, COUNTS)]
    cases = []
    for recipe in recipes:
        ranks = header(recipe, r"^# Ranks: (\d+)") or 1
        layout = composed(f"+recipe={recipe}", ranks=ranks).parallel
        cases.append((recipe.partition("/")[2], ranks, layout, recipe.startswith("full")))
    stated = {recipe: header(recipe, r"take (\d+) GB of each one's memory") for recipe in recipes}
    (held,) = pool.run(1, gigabytes, cases)
    assert stated == {recipe: round(number) for recipe, number in zip(recipes, held, strict=True)}
