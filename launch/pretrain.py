"""Train through the phases of a recipe; the same command again resumes it.

    torchrun --standalone --nproc-per-node 2 launch/pretrain.py +recipe=demo [key=value ...]

One process, on a GPU or a CPU: python launch/pretrain.py +recipe=demo
What a run is made of: python launch/pretrain.py +recipe=demo --cfg job --resolve
"""

import sys
from pathlib import Path

if not __package__:
    # Started as a file: Python put launch/ first on the path, where data.py would hide any package data.
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root / ".link")

from visionloom.launch import environment
from visionloom.launch.configure import start
from visionloom.train.config import RunConfig


def main() -> None:
    """Compose the run that the command line names and train it."""
    start(train)


def train(config: RunConfig) -> None:
    """Train a composed run; torch and megatron-core are imported only now, when the configuration is known to be good."""
    from visionloom.launch.preflight.before_run import measure_ranks
    from visionloom.train.build import open_topology
    from visionloom.train.run import pretrain

    topology = open_topology(config)
    if config.watch.measures_ranks(environment.machines()):
        measure_ranks(config, topology)
    pretrain(config, topology)


if __name__ == "__main__":
    main()
