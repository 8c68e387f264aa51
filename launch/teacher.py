"""Store what a teacher says of the data of a phase: its most probable next tokens at every supervised token.

    torchrun --standalone --nproc-per-node 2 launch/teacher.py +recipe=demo out=DIR checkpoint=FOLDER [phase=NAME] \\
        [kept=64] [temperature=1.0] [dtype=fp16|fp32] [key=value ...]

The recipe's model is the teacher's. Without checkpoint=FOLDER its weights are those of init.checkpoint or init.huggingface. Any
layout; the same command again goes on where it ended. A student reads it by phases.NAME.distillation.stored=DIR.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Started as a file: Python put launch/ first on the path, where data.py would hide any package data.
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root / ".link")

from visionloom.launch.configure import split_options, start
from visionloom.launch.environment import check_home
from visionloom.train.config import RunConfig
from visionloom.train.distillation.options import WORDS, StoreOptions


def main(arguments: Sequence[str] | None = None) -> None:
    """Compose the run that the command line names and store its teacher."""
    own, words = split_options(sys.argv[1:] if arguments is None else arguments, WORDS)

    def store(config: RunConfig) -> None:
        for name in ("out", "checkpoint"):
            check_home(name, own.get(name, ""))
        options = StoreOptions.of(own, config)
        from visionloom.train.distillation.store_pass import store_teacher

        store_teacher(config, options)

    start(store, words, own.get("checkpoint", ""), trains=False)


if __name__ == "__main__":
    main()
