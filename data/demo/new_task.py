"""A task that the demo does not teach, to fine-tune its model on: the name of the digit at a place, as a word.

Command: python launch/data.py demo-task DIR
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from visionloom.common.errors import UserError
from visionloom.common.progress import PartProgress
from visionloom.data.demo.drawing import GRIDS, NAMES, PLACES, DemoDraft, Drawer, grid_of
from visionloom.data.demo.make import load_pictures
from visionloom.data.shards.sample import Message, Sample, Text
from visionloom.data.shards.write import write_shards

NAME: Final = "words"
SAMPLES: Final = {"train": 4000, "test": 256}


def make_task(
    folder: Path, seed: int = 0, scale: float = 1.0, progress: PartProgress | None = None
) -> bool:
    """Make DIR/train/words and DIR/test/words in the demo's splits of the handwriting; return False if already made.

    `scale` multiplies the numbers of samples; the same seed and scale give the same bytes. The tokenizer is the demo's.
    Raises UserError if scikit-learn is not installed or the folder holds something else.
    """
    if all((folder / split / NAME).is_dir() for split in SAMPLES):
        return False
    if folder.exists():
        raise UserError(f"{folder} holds something else: choose a new folder for the task")
    cells, digits, splits = load_pictures(seed)
    # whole or not at all: it is renamed when all of it is there
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    for split, samples in SAMPLES.items():
        drawer = Drawer(cells, digits, splits[split], f"{seed}/{split}/{NAME}")
        count = max(8, round(samples * scale))
        write_shards(making / split / NAME, NAME, _drafts(drawer, split, count, progress))
    making.rename(folder)
    return True


def _drafts(
    drawer: Drawer, split: str, count: int, progress: PartProgress | None
) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    for number in range(count):
        draft = words(drawer)
        yield draft.sample(f"{NAME}:{split}:{number}"), draft.media
        if progress and (number + 1 == count or number % 100 == 99):
            progress(f"{split}/{NAME}", number + 1, count)


def words(drawer: Drawer) -> DemoDraft:
    """Draw a picture of 1, 1 x 2 or 2 x 2 digits, and ask for the name of the one at a place."""
    ((rows, columns),) = drawer.random.choices(GRIDS, weights=(3, 3, 4))
    pictures = drawer.pictures(rows * columns)
    asked = drawer.random.randrange(len(pictures))
    place = "this digit"
    if len(pictures) > 1:
        place = f"the digit at the {PLACES[rows, columns][asked]}"
    draft = DemoDraft(task=NAME, meta={"pictures": pictures, "columns": columns, "asked": asked})
    image = drawer.image(draft, grid_of(pictures, columns))
    answer = NAMES[int(drawer.digit(pictures[asked]))]
    draft.messages = [
        Message("user", (image, Text(f"Write {place} as a word."))),
        Message("assistant", (Text(answer),)),
    ]
    return draft
