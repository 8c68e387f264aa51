"""Samples of a stated mixture, where a phase's data is not there: lognormal lengths and the shapes of pictures. No torch.

The numbers are in mixtures.yaml.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import numpy as np
import yaml
from numpy.typing import NDArray

from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.geometry import MERGE_SIZE
from visionloom.data.plan.lengths import LENGTHS, Lengths
from visionloom.data.shards.sample import Image, Video

DATASET: Final = "mixture"
"""Name of the dataset that a mixture stands for."""
MERGED: Final = MERGE_SIZE**2
"""Patches of a visual token."""
IMAGE: Final = Image("", 0, 0)
VIDEO: Final = Video((), (), 0, 0)
"""A batch asks a medium for its kind only: rows of videos are twice as wide."""


@dataclass(frozen=True)
class SampleKind:
    """One kind of sample: medians in tokens, and spreads of their logarithms."""

    text: float
    text_spread: float
    visual: float = 0.0
    visual_spread: float = 0.0
    is_video: bool = False


@dataclass(frozen=True)
class MixtureShapes:
    """Numbers that all samples of a mixture have in common; see mixtures.yaml."""

    fixed_tokens: int
    picture_side: int
    frame_tokens: int

    @property
    def picture_tokens(self) -> int:
        """Return the visual tokens of the largest picture."""
        return self.picture_side**2

    def rectangles(
        self,
        shown: NDArray[np.int64],
        is_video: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """Give visual tokens (int64 [n]) the shapes of pictures, about square ones: int64 [n, 4], see DrawnSamples."""
        pictures = np.where(is_video, 0, shown // self.picture_tokens)
        frames = np.maximum(1, -(-shown // self.frame_tokens))
        time = np.where(is_video, frames, 1)
        # A rectangle has whole rows: what is left of the last one is lost, 2 % of all on average.
        each = (shown - pictures * self.picture_tokens) // time
        rows = np.sqrt(each).astype(np.int64)
        columns = each // np.maximum(1, rows)
        return np.stack([pictures, time, rows, columns], axis=1)

    def lengths(self, text: NDArray[np.int64], rectangles: NDArray[np.int64]) -> Lengths:
        """Return the table of samples with this text (int64 [n]) and these pictures: [n] of dtype LENGTHS."""
        pictures, time, rows, columns = rectangles.T
        largest = MERGED * self.picture_tokens
        area = MERGED * rows * columns
        patches = pictures * largest + time * area

        table = np.zeros(len(text), LENGTHS)
        table["tokens"] = text + patches // MERGED
        table["patches"] = patches
        table["supervised"] = text // 2
        table["patch_pairs"] = pictures * largest**2 + time * area**2
        return table


@dataclass(frozen=True)
class DrawnSamples:
    """n samples of a mixture."""

    lengths: Lengths
    """[n] of dtype LENGTHS."""
    rectangles: NDArray[np.int64]
    """[n, 4] largest pictures, then temporal patches, rows and columns, in visual tokens, of one more picture or of a video."""
    is_video: NDArray[np.bool_]
    """[n]"""
    shapes: MixtureShapes

    def encoded(self, number: int) -> EncodedSample:
        """Return a sample as the stream would encode it, its ids and positions all 0.

        Visual tokens come first, supervised ones last.
        """
        tokens, patches, supervised, _ = self.lengths[number].item()
        weights = np.zeros(tokens, np.float32)
        weights[tokens - supervised :] = 1.0
        grids = self._grids(number)
        return EncodedSample(
            sample_id=f"{DATASET}/{number}",
            dataset=DATASET,
            task=None,
            input_ids=np.zeros(tokens, np.int32),
            target_weights=weights,
            position_ids=np.zeros((3, tokens), np.int32),
            visual_positions=np.arange(patches // MERGED, dtype=np.int64),
            grids=grids,
            media=(VIDEO if self.is_video[number] else IMAGE,) * len(grids),
            answer=None,
            prompt_length=tokens - supervised,
        )

    def _grids(self, number: int) -> NDArray[np.int32]:
        """Return the patches in time, height and width of a sample's pictures or of its video, int32 [g, 3]."""
        pictures, time, rows, columns = self.rectangles[number].tolist()
        side = self.shapes.picture_side
        shown = [(1, side, side)] * pictures
        if rows:
            shown.append((time, rows, columns))
        merged = np.array(shown, np.int32).reshape(-1, 3)
        return merged * np.array([1, MERGE_SIZE, MERGE_SIZE], np.int32)


@dataclass(frozen=True)
class LengthMixture:
    """Kinds of samples with their shares, for packs of a length."""

    sequence_length: int
    shares: Mapping[str, float]
    kinds: Mapping[str, SampleKind]
    shapes: MixtureShapes
    scale: float = 1.0
    """Medians are multiplied by it: packs shorter than the shortest mixture's have shorter samples."""

    def draw(self, count: int, seed: int = 0) -> DrawnSamples:
        """Draw samples, those longer than a pack included."""
        rng = np.random.default_rng(seed)
        shares = np.array([*self.shares.values()])
        drawn = rng.choice(len(shares), count, p=shares / shares.sum())
        text = self._lognormal(rng, drawn, "text") + self.shapes.fixed_tokens
        shown = self._lognormal(rng, drawn, "visual")
        is_video = self._column("is_video")[drawn]

        rectangles = self.shapes.rectangles(shown, is_video)
        lengths = self.shapes.lengths(text, rectangles)
        return DrawnSamples(lengths, rectangles, is_video, self.shapes)

    def _column(self, name: str) -> NDArray[Any]:
        """Return a field of the kinds, in the order of the shares."""
        return np.array([getattr(self.kinds[kind], name) for kind in self.shares])

    def _lognormal(
        self,
        rng: np.random.Generator,
        drawn: NDArray[np.int64],
        name: str,
    ) -> NDArray[np.int64]:
        """Return a length for each drawn kind, int64 [n]; 0 where the median `name` of a kind is."""
        medians = self._column(name)[drawn] * self.scale
        spreads = self._column(f"{name}_spread")[drawn]
        # The logarithm of 0 is none: 1 takes its place, and is left out afterwards.
        lengths = np.exp(rng.normal(np.log(np.maximum(medians, 1.0)), spreads))
        return np.where(medians > 0, lengths, 0.0).astype(np.int64)


@functools.cache
def mixtures() -> dict[int, LengthMixture]:
    """Read mixtures.yaml: mixtures by the length of a pack, ascending."""
    text = files("visionloom.forecast").joinpath("mixtures.yaml").read_text()
    values: dict[str, Any] = yaml.safe_load(text)
    kinds = {name: SampleKind(**kind) for name, kind in values.pop("kinds").items()}
    by_length = values.pop("mixtures")
    shapes = MixtureShapes(**values)
    read = {}
    for length, shares in by_length.items():
        read[length] = LengthMixture(length, shares, kinds, shapes)
    return read


def mixture_for(sequence_length: int) -> LengthMixture:
    """Return the mixture for packs of a length: that of the longest packs which are not longer, or the first one scaled down."""
    known = mixtures()
    shortest = min(known)
    if sequence_length < shortest:
        first = known[shortest]
        scale = sequence_length / shortest
        return LengthMixture(sequence_length, first.shares, first.kinds, first.shapes, scale)
    return known[max(length for length in known if length <= sequence_length)]
