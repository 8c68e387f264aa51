"""Answer the prompts of a dataset by a checkpoint of a run: shards in, shards out, in any layout.

    torchrun --standalone --nproc-per-node 2 launch/generate.py +recipe=demo prompts=DIR out=DIR [checkpoint=FOLDER] [key=value ...]

The same command again goes on where it was cut off. Without checkpoint=FOLDER it takes the newest whole checkpoint of the run's
folder. Options are generation.* (temperature, top_k, top_p, answers, max_new_tokens, ...); the layout, parallel.*, changes no answer.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:
    # Started as a file: Python put launch/ first on the path, where data.py would hide any package data.
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root / ".link")

from visionloom.common.errors import UserError
from visionloom.data.shards.open_store import is_url
from visionloom.launch.configure import split_options, start
from visionloom.launch.environment import check_home
from visionloom.train.config import RunConfig

WORDS = ("prompts", "out", "checkpoint")
"""Words of the command itself; all others are the run's."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compose the run that the command line names, and answer by it."""
    own, words = split_options(sys.argv[1:] if arguments is None else arguments, WORDS)

    def answer(config: RunConfig) -> None:
        check(own)
        from visionloom.train.generation.run import generate

        generate(config, own.get("checkpoint", ""), own["prompts"], own["out"])

    start(answer, words, own.get("checkpoint", ""), trains=False)


def check(own: Mapping[str, str]) -> None:
    """Refuse folders that cannot be read or written, before torch is imported.

    Raises:
        UserError: one line that names the option.
    """
    for name in ("prompts", "out"):
        if not own.get(name):
            raise UserError(f"{name}= is missing: name a folder, {name}=DIR")
    for name, folder in own.items():
        check_home(name, folder)
    for name in ("prompts", "checkpoint"):
        folder = own.get(name, ".")
        if not is_url(folder) and not Path(folder).is_dir():
            raise UserError(f"{name}={folder} is not a folder: correct the option")
    out = Path(own["out"])
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is not a folder: name another one")


if __name__ == "__main__":
    main()
