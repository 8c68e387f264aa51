"""The schema: what it says of itself to a reader, and what several sections cannot do together.

Reference: the source of every configuration, parsed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from visionloom.launch.configure import compose
from visionloom.parallel.config import ParallelConfig
from visionloom.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("common", "parallel", "model", "data", "train", "launch")


def schemas() -> Iterator[ast.ClassDef]:
    """Every class of the package that is a configuration or a section of one."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Section")):
                    yield node


def undocumented(schema: ast.ClassDef) -> Iterator[str]:
    """Fields without a string right below them."""
    for statement, after in zip(schema.body, [*schema.body[1:], None], strict=True):
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and not documented:
            yield f"{schema.name}.{ast.unparse(statement.target)}"


def test_every_field_has_its_line() -> None:
    names = {schema.name for schema in schemas()}
    assert names >= {
        "RunConfig",
        "RunSection",
        "PhaseConfig",
        "TextConfig",
        "DataConfig",
        "ParallelConfig",
        "LoraConfig",
    }
    assert [name for schema in schemas() for name in undocumented(schema)] == []


def config() -> RunConfig:
    made = compose(["+recipe=demo"], 2)
    assert made is not None
    return made


def test_a_section_and_several_together_are_told_at_once() -> None:
    made = config()
    made.data.media.image_min_pixels = 2**20
    made.phases["align"].warmup_steps = 50
    made.parallel.tensor = 4
    starts = ["data.media.image_min_pixels=1048576 is above data.media.image_max_pixels=65536",
        "phases.align.warmup_steps=50 must be below the phase's 40 steps", "parallel.tensor=4 does not divide"]  # fmt: skip
    lines = made.all_problems(4)
    assert len(lines) == 3
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_impossible_values_come_before_all_that_computes_with_them() -> None:
    made = config()
    made.parallel.tensor, made.data.media.image_min_pixels = 0, 2**20
    assert made.all_problems(3) == [
        "parallel.tensor=0 must be at least 1 and at most 65,536",
        "data.media.image_min_pixels=1048576 is above data.media.image_max_pixels=65536",
    ]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (ParallelConfig(tensor=0), "phases.long.parallel.tensor=0 must be at least 1"),
        (
            ParallelConfig(sequence=True),
            "phases.long.parallel.sequence=true needs phases.long.parallel.tensor of 2 or more",
        ),
        (
            ParallelConfig(tensor=4),
            "phases.long.parallel.tensor=4 does not divide model.text.kv_heads=2",
        ),
        (
            ParallelConfig(pipeline=8),
            "cannot be cut evenly into pipeline 8 = 8 chunks: give phases.long.parallel.pipeline_layout='E",
        ),
        (ParallelConfig(pipeline=3), "8 ranks cannot hold tensor 1 x pipeline 3 x context 1 = 3"),
    ],
)
def test_a_layout_of_a_phase_is_named_by_its_own_path(
    layout: ParallelConfig, expected: str
) -> None:
    made = config()
    made.phases = {"long": made.phases["long"]}
    made.phases["long"].parallel, made.phases["long"].global_batch = layout, 16
    assert any(expected in line for line in made.all_problems(8)), made.all_problems(8)
