"""All layouts that are possible for a run on a number of ranks. Imports no torch.

What is possible the configuration's own checks say; here degrees are only proposed.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from visionloom.parallel.config import EXCHANGES, ParallelConfig
from visionloom.parallel.pipeline import suggestion
from visionloom.train.config import RunConfig


def with_layout(config: RunConfig, phase: str, layout: ParallelConfig) -> RunConfig:
    """Return a run of one of its phases in a layout, with samples in the multiples that its context ranks need."""
    multiple = math.lcm(config.data.sample_token_multiple, layout.sample_token_multiple)
    return replace(
        config,
        parallel=layout,
        data=replace(config.data, sample_token_multiple=multiple),
        phases={phase: replace(config.phases[phase], parallel=None)},
    )


def cut_evenly(layout: ParallelConfig, layers: int) -> ParallelConfig:
    """Return a layout with the stages named where its chunks do not divide the layers."""
    chunks = layout.pipeline * layout.chunks
    stages = suggestion(layers, chunks) if layers % chunks else None
    return replace(layout, pipeline_layout=stages)


def yaml_of(config: RunConfig) -> str:
    """Return the layout of a run as the text of a file parallel/MODEL/NAME.yaml, which also a recipe can hold."""
    lines = ["# @package _global_", "parallel:"]
    usual = asdict(ParallelConfig())
    for name, value in asdict(config.parallel).items():
        if value != usual[name]:
            # A layout of stages holds `|` and `*`, which mean something else in YAML.
            shown = f'"{value}"' if name == "pipeline_layout" else str(value).lower()
            lines.append(f"  {name}: {shown}")
    if len(lines) == 2:
        lines[1] += " {}"
    if config.data.sample_token_multiple > 1:
        lines.append(f"data: {{sample_token_multiple: {config.data.sample_token_multiple}}}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class LegalLayouts:
    """The layouts of a phase on a number of ranks, without recomputation: all degrees of all axes, in both exchanges."""

    config: RunConfig
    phase: str
    world_size: int
    most_tensor: int
    """Most tensor ranks: those of a node, since each layer waits for their messages four times."""

    def __iter__(self) -> Iterator[ParallelConfig]:
        """Yield them; axis after axis, as what is impossible with one stays so with another."""
        degrees = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
        layouts = self._without_experts(degrees)
        for axis, values in self._other_axes(degrees).items():
            layouts = self._with(axis, values, layouts)
        return layouts

    def _other_axes(
        self, degrees: list[int]
    ) -> dict[str, Callable[[ParallelConfig], Iterable[Any]]]:
        """Return the values of each axis that depends on tensor, pipeline and context ranks, by name."""
        experts = degrees if self.config.model.text.experts else [1]
        return {
            "context_exchange": self._exchanges,
            "expert": lambda _: experts,
            "expert_tensor": lambda _: [None, *experts[1:]],
            # One part's rows travel beside the other's products: more hide little more, and launch as many times more.
            "expert_parts": lambda layout: [2 if layout.expert > 1 else 1],
            "virtual_pipeline": self._chunks,
        }

    def is_legal(self, layout: ParallelConfig) -> bool:
        """Return whether the run's own checks let a layout pass."""
        if layout.all_problems(self.world_size):
            return False
        run = with_layout(self.config, self.phase, layout)
        return not run.layout_problems(self.world_size)

    def _without_experts(self, degrees: list[int]) -> Iterator[ParallelConfig]:
        layers = self.config.model.text.layers
        tensors = [n for n in degrees if n <= self.most_tensor]
        stages = [n for n in degrees if n <= layers]
        for tensor, pipeline, context in product(tensors, stages, degrees):
            layout = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context)
            layout = cut_evenly(layout, layers)
            if self.is_legal(layout):
                yield layout

    def _with(
        self,
        axis: str,
        values: Callable[[ParallelConfig], Iterable[Any]],
        layouts: Iterable[ParallelConfig],
    ) -> Iterator[ParallelConfig]:
        """Yield the legal ones among layouts with each of an axis's values."""
        layers = self.config.model.text.layers
        for layout in layouts:
            for value in values(layout):
                changed = cut_evenly(replace(layout, **{axis: value}), layers)
                if changed == layout or self.is_legal(changed):
                    yield changed

    def _exchanges(self, layout: ParallelConfig) -> Iterable[str]:
        return EXCHANGES if layout.context > 1 else EXCHANGES[:1]

    def _chunks(self, layout: ParallelConfig) -> Iterable[int | None]:
        most = self.config.model.text.layers // layout.pipeline
        return [None, *range(2, most + 1)] if layout.pipeline > 1 else [None]
