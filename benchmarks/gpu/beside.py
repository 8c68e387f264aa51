"""Time train steps of ours beside transformers' on one GPU, on the same packs, as one table of Markdown.

    python benchmarks/gpu/beside.py [--only NAME ...] [--steps 5] [--seconds 300] [--out FILE]

Each row is a recipe at a length, run by step.py and then by peer.py, each in a process of its own, since neither shall have the
other's memory. What ends with an error or takes longer than `--seconds` has its last line in the table, and the others go on.
Batches are there before the clock starts: what a real run waits for its data stands in its metrics.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from visionloom.common.text import one_line

HERE: Final = Path(__file__).parent
SCRIPTS: Final = {"ours": "step.py", "transformers": "peer.py"}
COLUMNS: Final = (
    "recipe",
    "tokens of a pack",
    "whose",
    "step, s",
    "worst, s",
    "real tokens/s",
    "MFU",
    "peak, GiB",
)


@dataclass(frozen=True)
class Row:
    """A recipe on one GPU."""

    recipe: str
    length: int
    words: tuple[str, ...] = ()
    peer: bool = True
    """transformers has no adapters without another package."""

    @property
    def command_line(self) -> list[str]:
        """Return the words of both scripts: four packs a step, so that the optimizer is not most of it."""
        sizes = f"phases.finetune.sequence_length={self.length}", "phases.finetune.global_batch=4"
        return [f"+recipe={self.recipe}", "parallel=single", *sizes, *self.words]


ROWS: Final = (
    Row("full/qwen3vl_2b", 8192),
    Row("full/qwen3vl_2b", 8192, ("parallel.recompute=norms_and_activations",)),
    Row("full/qwen3vl_2b", 32768, ("parallel.recompute=all_but_attention",)),
    Row(
        "full/qwen3vl_8b", 8192, ("model.text.layers=4", "parallel.recompute=norms_and_activations")
    ),
    Row("lora/qwen3vl_2b", 8192, peer=False),
    Row("lora/qwen3vl_8b", 8192, ("parallel.recompute=norms_and_activations",), peer=False),
)


def run(script: str, row: Row, steps: int, seconds: float) -> dict[str, Any] | str:
    """Return what a script measures, or the last line that it says if it does not end well."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "numbers.json"
        options = ["--steps", str(steps), "--out", str(out)]
        command = [sys.executable, str(HERE / script), *options, *row.command_line]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
            said = done.stderr
        except subprocess.TimeoutExpired as error:
            # Bytes even where text was asked for.
            said = (error.stderr or b"").decode(errors="replace") + f"\nmore than {seconds:.0f} s"
        if out.exists():
            numbers: dict[str, Any] = json.loads(out.read_text())
            return numbers
    lines = (said.strip() or "no word").splitlines()
    # torch adds to some errors what it has registered where.
    errors = [line for line in lines if "Error" in line]
    return one_line((errors or lines)[-1])


def cells(row: Row, whose: str, result: dict[str, Any] | str) -> list[str]:
    """Return the cells of COLUMNS."""
    name = ", ".join([row.recipe, *row.words])
    first = [name, f"{row.length:,}", whose]
    if isinstance(result, str):
        return [*first, result, *[""] * (len(COLUMNS) - len(first) - 1)]
    numbers = [
        f"{result['step_seconds']:.3f}",
        f"{result['worst_seconds']:.3f}",
        f"{result['real_tokens_per_second']:,.0f}",
    ]
    for key, form in (("mfu", "{:.1%}"), ("peak_gib", "{:.1f}")):
        numbers.append("" if result[key] is None else form.format(result[key]))
    return [*first, *numbers]


def main(argv: Sequence[str]) -> None:
    """Run the rows and print their table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)

    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for row in ROWS:
        if options.only and not any(name in row.recipe for name in options.only):
            continue
        for whose, script in SCRIPTS.items():
            if whose == "ours" or row.peer:
                result = run(script, row, options.steps, options.seconds)
                lines.append(cells(row, whose, result))
                print("| " + " | ".join(lines[-1]) + " |", flush=True)
    if options.out:
        options.out.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1:])
