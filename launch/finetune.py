"""Fine-tune a model on your own data, with adapters (recipes lora/*) or all weights (recipes full/*); again: resume.

    torchrun --standalone --nproc-per-node 2 launch/finetune.py +recipe=lora/demo [key=value ...]
    torchrun --nproc-per-node 8 launch/finetune.py +recipe=lora/qwen3vl_8b init.huggingface=MODEL \\
        data.datasets.mine.path=SHARDS [data.validation.mine.path=SHARDS] [lora.rank=16 ...]

Shards are made of chat files by launch/data.py convert. Adapters are exported by launch/convert.py adapter.
"""

import sys
from pathlib import Path

if not __package__:
    # Started as a file: Python put launch/ first on the path, where data.py would hide any package data.
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root / ".link")

from visionloom.common.errors import UserError
from visionloom.launch.configure import start
from visionloom.launch.pretrain import train
from visionloom.train.config import RunConfig


def main() -> None:
    """Compose the run that the command line names and train it."""
    start(finetune)


def finetune(config: RunConfig) -> None:
    """Train a composed run from the weights that it names; UserError if it names none."""
    if not (config.init.huggingface or config.init.checkpoint):
        raise UserError(
            "fine-tuning needs weights: set init.huggingface or init.checkpoint, or train from nothing with launch/pretrain.py"
        )
    train(config)


if __name__ == "__main__":
    main()
