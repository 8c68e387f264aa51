"""Evaluate a checkpoint of a run on its held-out data: losses, greedy answers, a report.

    torchrun --standalone --nproc-per-node 2 launch/evaluate.py +recipe=demo [checkpoint=FOLDER] [key=value ...]

Without checkpoint=FOLDER it takes the newest whole checkpoint of the run's folder; the layout may differ from training's.
With evaluation.command="PROGRAM ... {model} ... {out}" a program of yours evaluates an export of the checkpoint too.
One process, on a GPU or a CPU: python launch/evaluate.py +recipe=demo
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Started as a file: Python put launch/ first on the path, where data.py would hide any package data.
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root / ".link")

from visionloom.common.errors import UserError
from visionloom.launch.configure import split_options, start
from visionloom.launch.environment import check_home
from visionloom.train.config import RunConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Compose the run that the command line names and evaluate it."""
    own, words = split_options(sys.argv[1:] if arguments is None else arguments, ["checkpoint"])

    def evaluate_checkpoint(config: RunConfig) -> None:
        check(config, own.get("checkpoint"))
        from visionloom.train.run import evaluate

        evaluate(config, own.get("checkpoint", ""))

    start(evaluate_checkpoint, words, own.get("checkpoint", ""), trains=False)


def check(config: RunConfig, checkpoint: str | None) -> None:
    """Refuse what cannot be evaluated, before torch is imported.

    Args:
        config: of the run.
        checkpoint: the value of checkpoint=; None: the word was not given.

    Raises:
        UserError: one line that names the option.
    """
    if not config.data.validation and not config.evaluation.command:
        raise UserError(
            "data.validation is empty: name held-out datasets, +data.validation.NAME.path=DIR"
        )
    if checkpoint is not None:
        check_home("checkpoint", checkpoint)
        if not checkpoint or not Path(checkpoint).is_dir():
            raise UserError(
                f"checkpoint={checkpoint} is not a folder: correct the option, or leave it out for the run's newest checkpoint"
            )


if __name__ == "__main__":
    main()
