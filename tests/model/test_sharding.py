"""Weights do not depend on the layout: the parts that two tensor-parallel ranks draw are one process's, cut.

Reference: one process; Megatron-core's own names and orders of the parts.
"""

import pytest
import torch
from torch import Tensor

from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import canonical_parameters, draw_weights
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.model.reference import tiny_config
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Case

SEED = 3
CUT_OVER_ROWS = (
    "word_embeddings.weight",
    "linear_qkv.weight",
    "mlp.linear_fc1.weight",
    "output_layer.weight",
)
CUT_OVER_COLUMNS = ("linear_proj.weight", "mlp.linear_fc2.weight")


def drawn(tensor: int, groups: set[str] | None = None) -> dict[str, Tensor]:
    """This rank's weights in a layout of `tensor` tensor-parallel ranks; runs on every rank of the pool."""
    topology = topologies.start(ParallelConfig(tensor=tensor), torch.device("cpu"))
    model = Qwen3VL(tiny_config(tied=False), topology)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    draw_weights(model, tiny_config(tied=False), SEED, topology, groups)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def whole(pool: RankPool) -> dict[str, Tensor]:
    (weights,) = pool.run(1, drawn, 1)
    return weights


@pytest.fixture(scope="module")
def halves(pool: RankPool) -> list[dict[str, Tensor]]:
    return pool.run(2, drawn, 2)


def dim_of(name: str) -> int | None:
    """The dim that Megatron-core cuts a parameter along."""
    if not name.startswith("language_model."):
        return None
    return 0 if name.endswith(CUT_OVER_ROWS) else 1 if name.endswith(CUT_OVER_COLUMNS) else None


def test_two_ranks_draw_the_parts_of_one(
    whole: dict[str, Tensor], halves: list[dict[str, Tensor]]
) -> None:
    for name, full in whole.items():
        dim, first, second = dim_of(name), halves[0][name], halves[1][name]
        if dim is None:
            assert torch.equal(first, full) and torch.equal(second, full), name
        elif name.endswith("mlp.linear_fc1.weight"):
            (gate, up), half = full.chunk(2), full.shape[0] // 4
            assert torch.equal(first, torch.cat([gate[:half], up[:half]])), name
            assert torch.equal(second, torch.cat([gate[half:], up[half:]])), name
        else:
            assert torch.equal(torch.cat([first, second], dim), full), name


def test_query_groups_stay_whole(whole: dict[str, Tensor], halves: list[dict[str, Tensor]]) -> None:
    """Each rank holds one of the two key/value heads with its two query heads: [query, query, key, value] of 32 rows."""
    name = "language_model.decoder.layers.0.self_attention.linear_qkv.weight"
    assert whole[name].shape == (2 * 4 * 32, 64)
    assert all(
        torch.equal(halves[rank][name], whole[name][rank * 128 : (rank + 1) * 128])
        for rank in range(2)
    )


def pieces(layout: dict[str, int]) -> dict[str, Tensor]:
    """This rank's weights of a mixture in a layout, by canonical name; runs on every rank of the pool."""
    topology = topologies.start(ParallelConfig(**layout), torch.device("cpu"))
    numbers = topology.config.chunk_numbers
    config = Case(experts=4, tied=True).model
    found = {}
    for number in numbers:
        chunk = Qwen3VL(config, topology, chunk=number)
        draw_weights(chunk, config, SEED, topology)
        found |= {name: parameter.detach() for name, parameter in canonical_parameters(chunk)}
    return found


@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"expert": 2},
        {"tensor": 2, "expert_tensor": 2},
        {"tensor": 2, "expert": 2},
    ],
    ids=str,
)
def test_the_ranks_parts_make_up_the_model(layout: dict[str, int], pool: RankPool) -> None:
    """Each rank's part of a parameter is cut from what one process draws, and together they are all of it."""
    (whole,) = pool.run(1, pieces, {})
    parts = pool.run(2, pieces, layout)
    assert set(parts[0]) | set(parts[1]) == set(whole)
    for name, full in whole.items():
        mine = [part[name] for part in parts if name in part]
        values = torch.cat([part.flatten() for part in mine]).unique()
        assert torch.equal(values, full.unique()), name


def test_weights_are_as_the_configuration_says(whole: dict[str, Tensor]) -> None:
    """Norms one, biases zero, matrices normal with deviation 0.02, each from a generator of its own."""
    for name, full in whole.items():
        if full.dim() < 2:
            assert full.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
        else:
            assert abs(float(full.std()) / 0.02 - 1) < 0.1 and abs(float(full.mean())) < 2e-3, name
    layers = [
        whole[f"language_model.decoder.layers.{layer}.mlp.linear_fc1.weight"] for layer in range(2)
    ]
    assert not torch.equal(*layers)


def test_only_the_chosen_groups_are_drawn(pool: RankPool, whole: dict[str, Tensor]) -> None:
    (weights,) = pool.run(1, drawn, 1, {"merger"})
    for name, full in weights.items():
        chosen = name.startswith(("visual.merger.", "visual.deepstack_merger_list."))
        assert torch.equal(full, whole[name] if chosen else torch.full_like(full, 7.0)), name
