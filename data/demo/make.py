"""The demo's data: scikit-learn's 1,797 handwritten digits, composed into ten small datasets with a tokenizer.

Command: python launch/data.py demo DIR
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, load_json
from visionloom.common.places import PlaceError, read_located
from visionloom.common.progress import PartProgress
from visionloom.data.demo.drawing import CELL, SHIFTS, Drawer
from visionloom.data.demo.tasks import RECIPES
from visionloom.data.demo.tokenizer import train_tokenizer
from visionloom.data.encode.image import Pixels
from visionloom.data.inspect.contact_sheet import draw_contact_sheet
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Sample
from visionloom.data.shards.shard_index import INDEX_VERSION
from visionloom.data.shards.write import write_shards

HELD_OUT_PICTURES: Final = 200
"""Of 1,797, for the test split; as many others are for the tuning split, and the rest to train on."""
DONE: Final = "demo.json"
"""Written last: says with which settings the folder was made."""
_MAKING: Final = ".making"
_PARTS: Final = ("tokenizer", "train", "tuning", "test", "contact_sheet.png")
_GENERATOR_VERSION: Final = 7


def make_demo(
    folder: str | Path,
    seed: int = 0,
    scale: float = 1.0,
    progress: PartProgress | None = None,
) -> bool:
    """Make DIR/tokenizer, DIR/{train,tuning,test}/<dataset> and DIR/contact_sheet.png; return False if already made.

    `scale` multiplies the numbers of samples. The same seed and scale give the same bytes; the splits never share
    a handwriting picture. An unfinished folder is made again. Raises UserError if scikit-learn is not installed or the
    folder holds something else.
    """
    folder = Path(folder)
    versions = {"version": _GENERATOR_VERSION, "index": INDEX_VERSION}
    settings = {**versions, "seed": seed, "scale": scale}
    if _settings(folder) == settings and all((folder / part).exists() for part in _PARTS):
        return False
    _check_folder(folder)
    cells, digits, splits = load_pictures(seed)
    making = folder / _MAKING
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)

    for split, chosen in splits.items():
        for name in RECIPES:
            shifts = SHIFTS if split == "train" else SHIFTS[:1]
            drawer = Drawer(cells, digits, chosen, f"{seed}/{split}/{name}", shifts)
            drafts = _drafts(split, name, drawer, scale, progress)
            write_shards(making / split / name, name, drafts)
    train_tokenizer(making / "tokenizer", _train_samples(making))
    datasets = {name: Dataset.open(making / "train" / name, name) for name in RECIPES}
    draw_contact_sheet(datasets, making / _PARTS[-1])
    _move_into_place(folder, settings)
    return True


def _settings(folder: Path) -> object:
    """Return with which settings the folder was made; None if it is not finished."""
    try:
        return load_json(read_located(folder, DONE, 1 << 20), DONE)
    except (OSError, JsonError, PlaceError):
        return None


def _check_folder(folder: Path) -> None:
    """Refuse a folder with files that are not the demo's, since making it replaces the demo's parts."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: choose a folder for the demo")
    names = {path.name for path in folder.iterdir()}
    if names and not names & {DONE, _MAKING}:
        raise UserError(
            f"{folder} holds other files ({min(names)}): choose a new folder for the demo"
        )


def load_pictures(
    seed: int,
) -> tuple[list[Pixels], list[int], dict[str, list[int]]]:
    """Return all handwriting pictures, each uint8 [32, 32], their digits, and the numbers of those of each split.

    Raises UserError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the demo needs scikit-learn: pip install visionloom[demo]") from None
    data = load_digits()
    cells = [_enlarge(image) for image in data.images]
    digits = [int(digit) for digit in data.target]
    order = random.Random(f"{seed}/split").sample(range(len(digits)), len(digits))
    splits = {
        "train": order[2 * HELD_OUT_PICTURES :],
        "tuning": order[HELD_OUT_PICTURES : 2 * HELD_OUT_PICTURES],
        "test": order[:HELD_OUT_PICTURES],
    }
    return cells, digits, {split: sorted(numbers) for split, numbers in splits.items()}


def _enlarge(image: NDArray[np.float64]) -> Pixels:
    """Return a picture float64 [8, 8] of values 0 to 16 as a cell uint8 [32, 32], bicubic."""
    grey = PillowImage.fromarray((image * (255 / 16)).astype(np.float32))
    picture = grey.resize((CELL, CELL), PillowImage.Resampling.BICUBIC)
    # bicubic overshoots at edges
    return np.asarray(picture).clip(0, 255).round().astype(np.uint8)


def _drafts(
    split: str,
    name: str,
    drawer: Drawer,
    scale: float,
    progress: PartProgress | None,
) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    """Yield the samples of a dataset's split with their media."""
    recipe = RECIPES[name]
    count = max(8, round(recipe.samples(split) * scale))
    for number in range(1, count + 1):
        draft = recipe.make(drawer, split == "train")
        yield draft.sample(f"{name}:{split}:{number - 1}"), draft.media
        if progress and (number == count or number % 100 == 0):
            progress(f"{split}/{name}", number, count)


def _train_samples(making: Path) -> Iterator[Sample]:
    """Yield the first samples of each training dataset, at most 1000: the vocabulary has few merges to learn."""
    for name in RECIPES:
        dataset = Dataset.open(making / "train" / name, name)
        for index in range(min(len(dataset), 1000)):
            yield dataset.sample(index)


def _move_into_place(folder: Path, settings: object) -> None:
    """Replace the parts of the demo by those that were made."""
    # gone first and back last: a folder that is cut short here is not taken for finished
    (folder / DONE).unlink(missing_ok=True)
    for part in _PARTS:
        old = folder / part
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(folder / _MAKING / part, old)
    done = folder / _MAKING / DONE
    done.write_text(json.dumps(settings) + "\n")
    os.replace(done, folder / DONE)
    (folder / _MAKING).rmdir()
