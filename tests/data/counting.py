"""A rank that counts lengths, for the tests of counting at once; here, where other processes find it."""

import time
from pathlib import Path

import numpy as np

from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.lengths import Counting
from visionloom.data.plan.resumable import in_blocks
from visionloom.data.shards.dataset import Dataset
from visionloom.tests.data.samples import RULES


def count_elsewhere(folder: Path, dataset: Dataset, tokenizer: Tokenizer) -> tuple[int, np.ndarray]:
    """What a rank of its own process does: blocks counted here, and the table."""
    counted = list[int]()

    def count(start: int, stop: int) -> np.ndarray:
        counted.append(start)
        time.sleep(0.05)
        return Counting(dataset, tokenizer, RULES)(start, stop)

    table = np.array(in_blocks(folder / "table.npy", len(dataset), 2, count))
    return len(counted), table
