"""Forecast train steps of all models, whole and with adapters, at three lengths, as a table of Markdown.

    python benchmarks/gpu/forecasts.py --only full/qwen3vl_8b --out forecasts.md

The steps and their layouts stand in forecasts.yaml; `--only NAME ...` takes those whose recipe has one of these names, `--out`
writes the table into a file, `--fullest` traces memory on the fullest packs too (three times as long). It needs no GPU: each
step is traced by the planner, and timed by recipes/gpu/h100.yaml.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from visionloom.common.progress import PartProgress
from visionloom.common.yamlfile import read_yaml
from visionloom.forecast.machine import GIB, machine
from visionloom.forecast.packs import PackChoice
from visionloom.forecast.request import PlanRequest
from visionloom.forecast.results import PhaseForecast
from visionloom.forecast.run import CHOICES, forecast_kernels
from visionloom.forecast.show.tables import gibibytes, peak_bytes
from visionloom.launch.configure import compose
from visionloom.launch.data_commands.progress import bars

STEPS: Final = Path(__file__).with_suffix(".yaml")
GPU: Final = "h100"
KERNELS: Final = ("flash2", "flash3")
"""Of attention: all columns are of the first, the last one is of the second."""
PHASE: Final = "finetune"
COLUMNS: Final = (
    "recipe",
    "tokens of a pack",
    "GPUs",
    "packs a step",
    "layout",
    "launches a step (traced)",
    "TB moved by a rank's kernels in a step (traced)",
    "peak, GiB (traced)",
    "host waits a step (traced)",
    "step, s (estimated)",
    "only communicates, s (estimated)",
    "MFU (estimated)",
    "MFU with FlashAttention-3 (estimated)",
)
HEAD: Final = """# Forecasts of train steps

Made by `python benchmarks/gpu/forecasts.py --out FILE` for {gpu} cards (recipes/gpu/{gpu}.yaml), of which tensors can have
{gib:.1f} GiB each. No step of this table has been run. "Traced" counts what the step of a real rank does without a device;
"estimated" is that times the card's file: steps on one H100 took 4 to 11 % longer. Packs are those of the stated mixture
(forecast/mixtures.yaml); memory is that of {packs}. Of several stages the numbers are those of the one with most.
Attention is FlashAttention-2's (model.attention=flash2, or torch), but for the last column: the same step with FlashAttention-3, a package.

"""


@dataclass(frozen=True)
class Step:
    """One row: a recipe at a length, on a number of ranks."""

    recipe: str
    length: int
    """Tokens of a pack."""
    ranks: int
    packs: int = 32
    """Of a step, on all ranks."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Of parallel.*; empty: the recipe's own."""
    words: tuple[str, ...] = ()
    """More options of the run."""

    @property
    def request(self) -> PlanRequest:
        """Return the question to the planner."""
        sizes = {"sequence_length": self.length, "global_batch": self.packs}
        words = [f"+recipe={self.recipe}", *self.words]
        words += [f"phases.{PHASE}.{name}={value}" for name, value in sizes.items()]
        if self.layout:
            words.append("parallel=single")
            words += [f"parallel.{name}={value}" for name, value in self.layout.items()]
        if (context := self.layout.get("context", 1)) > 1:
            words.append(f"data.sample_token_multiple={2 * context}")
        config = compose(words, self.ranks)
        assert config is not None
        return PlanRequest(config, self.ranks, GPU, machine(GPU), 1.0, (PHASE,))

    def cells(self, forecast: PhaseForecast, with_flash3: PhaseForecast) -> list[str]:
        """Return the cells of COLUMNS."""
        ranks, peak = forecast.ranks, peak_bytes(forecast)
        waits = max(sum(wait.count for wait in rank.waits) for rank in ranks)
        fits = "" if peak <= machine(GPU).usable_bytes else ", does not fit"
        return [
            self.recipe,
            f"{self.length:,}",
            f"{self.ranks:,}",
            f"{self.packs:,}",
            ", ".join([forecast.layout, *self.words]),
            f"{max(rank.launches for rank in ranks):,}",
            f"{max(rank.moved_bytes for rank in ranks) / 1e12:,.2f}",
            gibibytes(peak) + fits,
            f"{waits:,}",
            f"{forecast.step_seconds:,.3f}",
            f"{forecast.exposed_communication:,.3f}",
            f"{forecast.mfu:.1%}",
            f"{with_flash3.mfu:.1%}",
        ]


def steps_of(names: Sequence[str]) -> Iterator[Step]:
    """Yield the steps of forecasts.yaml whose recipe has one of the names in its own; without names all."""
    recipes = read_yaml(STEPS.parent, STEPS.name)
    for recipe, by_length in recipes.items():
        if names and not any(name in recipe for name in names):
            continue
        for length, step in by_length.items():
            words = tuple(step.pop("words", ()))
            yield Step(recipe, int(length), words=words, **step)


def table(steps: Sequence[Step], choices: Sequence[PackChoice], progress: PartProgress) -> str:
    """Forecast the steps on these packs and return their table."""
    done = 0

    def finished() -> None:
        nonlocal done
        done += 1
        progress("steps", done, len(steps))

    requests = [step.request for step in steps]
    forecasts = forecast_kernels(requests, KERNELS, finished, choices)
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [step.cells(*each) for step, each in zip(steps, forecasts, strict=True)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def main(argv: Sequence[str]) -> None:
    """Write the table, or print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fullest", action="store_true")
    options = parser.parse_args(argv)
    choices = CHOICES if options.fullest else CHOICES[:1]
    steps = list(steps_of(options.only))
    with bars("forecasts") as progress:
        rows = table(steps, choices, progress)

    packs = "the fullest packs" if options.fullest else "mean packs, to which the fullest ones add"
    head = HEAD.format(gpu=GPU, gib=machine(GPU).usable_bytes / GIB, packs=packs)
    page = head + rows
    if options.out:
        options.out.write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
