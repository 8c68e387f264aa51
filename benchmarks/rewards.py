"""What the demo's phase of rewards changes: accuracy on held-out tasks before and after it, for several seeds.

    python benchmarks/rewards.py FOLDER [SEED ...]

Runs the demo on two CPU processes for each seed, in FOLDER/SEED, and prints a table with the worst seed last. The recipe's numbers were
chosen on the handwriting of the tuning split (data=demo_tuning); this is of the test split.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
SEEDS: Final = ("1234", "1", "2")
ANSWERS: Final = 256
"""To questions of each held-out dataset."""
TASK: Final = "reasoning"
"""Of the sums."""


def run(folder: Path, seed: str) -> None:
    """Train the demo; what is there already is gone on with."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    words = [f"run.folder={folder}", f"run.seed={seed}", "run.evaluate_at_end=false"]
    words += [f"evaluation.phase_answers={ANSWERS}", "evaluation.phase_samples=0"]
    subprocess.run(
        [*command, "launch/pretrain.py", "+recipe=demo", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / ".link"), "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def accuracies(folder: Path) -> dict[str, dict[str, float]]:
    """Return the accuracy of each task at the end of each phase, in percent."""
    measured: dict[str, dict[str, float]] = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "validation":
            tasks = event["tasks"].items()
            measured[event["phase"]] = {name: 100 * task["accuracy"] for name, task in tasks}
    return measured


def seconds_of_rewards(folder: Path) -> float:
    """Return the seconds of the steps of the phase `rl`, answers included."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return sum(line["step_seconds"] for line in lines if line["phase"] == "rl")


def main() -> None:
    """Run all seeds and print what came of them."""
    folder, *seeds = sys.argv[1:]
    rows = []
    for seed in seeds or SEEDS:
        started = time.monotonic()
        run(Path(folder) / seed, seed)
        measured = accuracies(Path(folder) / seed)
        before, after = measured["reasoning"], measured["rl"]
        change = {task: after[task] - before[task] for task in before}
        lost, other = min((value, task) for task, value in change.items() if task != TASK)
        rows.append(
            f"{seed:>6} {before[TASK]:6.1f} {after[TASK]:6.1f} {change[TASK]:+6.1f} {lost:+6.1f} {other:<10}"
            f" {seconds_of_rewards(Path(folder) / seed):5.0f} s {time.monotonic() - started:5.0f} s"
        )
        print(rows[-1], flush=True)
    print(
        "\n  seed  sums before, after, change; largest fall of another task; seconds of rl, and of all"
    )
    for row in sorted(rows, key=lambda row: float(row.split()[3]), reverse=True):
        print(row)


if __name__ == "__main__":
    main()
