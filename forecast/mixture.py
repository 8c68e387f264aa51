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
from visionloom.data.encode.geometry import FACTOR, MERGE_SIZE
from visionloom.data.plan.lengths import LENGTHS, Lengths
from visionloom.data.shards.sample import Image, Video

DATASET: Final = "mixture"
"""Name of the dataset that a mixture stands for."""
MERGED: Final = MERGE_SIZE**2
"""Patches of a visual token."""


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


@dataclass(frozen=True)
class DrawnSamples:
    """n samples of a mixture."""

    lengths: Lengths
    """[n] of dtype LENGTHS."""
    grids: NDArray[np.int64]
    """[n, 4] largest pictures, then temporal patches, rows and columns, in visual tokens, of one more picture or of a video."""
    is_video: NDArray[np.bool_]
    """[n]"""
    picture_side: int
    """Visual tokens of a largest picture's side."""

    def encoded(self, number: int) -> EncodedSample:
        """Return a sample as the stream would encode it, its ids and positions all 0.

        Visual tokens come first, supervised ones last.
        """
        tokens, patches, supervised, _ = self.lengths[number].item()
        pictures, time, rows, columns = self.grids[number].tolist()
        largest = self.picture_side * MERGE_SIZE
        grids = [(1, largest, largest)] * pictures
        if rows:
            grids.append((time, rows * MERGE_SIZE, columns * MERGE_SIZE))
        weights = np.zeros(tokens, np.float32)
        weights[tokens - supervised :] = 1.0

        # A batch asks a medium for its kind only: rows of videos are twice as wide.
        height, width = rows * FACTOR, columns * FACTOR
        medium = Video((), (), width, height) if self.is_video[number] else Image("", width, height)
        return EncodedSample(
            sample_id=f"{DATASET}/{number}",
            dataset=DATASET,
            task=None,
            input_ids=np.zeros(tokens, np.int32),
            target_weights=weights,
            position_ids=np.zeros((3, tokens), np.int32),
            visual_positions=np.arange(patches // MERGED, dtype=np.int64),
            grids=np.array(grids, np.int32).reshape(-1, 3),
            media=(medium,) * len(grids),
            answer=None,
            prompt_length=tokens - supervised,
        )


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
        kinds = [self.kinds[name] for name in self.shares]
        drawn = rng.choice(len(kinds), count, p=shares / shares.sum())
        text = self._lognormal(rng, [(kind.text, kind.text_spread) for kind in kinds], drawn)
        visual = [(kind.visual, kind.visual_spread) for kind in kinds]
        shown = self._lognormal(rng, visual, drawn)
        is_video = np.array([kind.is_video for kind in kinds])[drawn]
        return self._samples(text + self.shapes.fixed_tokens, shown, is_video)

    def _lognormal(
        self,
        rng: np.random.Generator,
        parameters: list[tuple[float, float]],
        drawn: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Return a length for each drawn kind, int64 [n], by the (median, spread) of the kinds; 0 where the median is."""
        medians, spreads = np.array(parameters)[drawn].T
        medians = medians * self.scale
        # The logarithm of a median of 0 is none; a spread of 0 gives 1, which is then left out.
        lengths = np.exp(rng.normal(np.log(np.maximum(medians, 1.0)), spreads))
        return np.where(medians > 0, lengths, 0.0).astype(np.int64)

    def _samples(
        self,
        text: NDArray[np.int64],
        shown: NDArray[np.int64],
        is_video: NDArray[np.bool_],
    ) -> DrawnSamples:
        """Give visual tokens the shapes of pictures, about square ones, and count tokens and patches by them."""
        side = self.shapes.picture_side
        pictures = np.where(is_video, 0, shown // side**2)
        frames = -(-shown // self.shapes.frame_tokens)
        time = np.where(is_video, np.maximum(1, frames), 1)
        # A grid is a rectangle: up to a side's tokens are lost, 2 % on average.
        each = (shown - pictures * side**2) // time
        rows = np.sqrt(each).astype(np.int64)
        columns = each // np.maximum(1, rows)

        area = MERGED * rows * columns
        largest = MERGED * side**2
        patches = pictures * largest + time * area
        lengths = np.zeros(len(text), LENGTHS)
        lengths["tokens"] = text + patches // MERGED
        lengths["patches"] = patches
        lengths["supervised"] = text // 2
        lengths["patch_pairs"] = pictures * largest**2 + time * area**2
        grids = np.stack([pictures, time, rows, columns], axis=1)
        return DrawnSamples(lengths, grids, is_video, side)


@functools.cache
def mixtures() -> dict[int, LengthMixture]:
    """Read mixtures.yaml: mixtures by the length of a pack, ascending."""
    text = files("visionloom.forecast").joinpath("mixtures.yaml").read_text()
    values: dict[str, Any] = yaml.safe_load(text)
    kinds = {name: SampleKind(**kind) for name, kind in values.pop("kinds").items()}
    by_length = values.pop("mixtures")
    shapes = MixtureShapes(**values)
    return {
        length: LengthMixture(length, shares, kinds, shapes) for length, shares in by_length.items()
    }


def mixture_for(sequence_length: int) -> LengthMixture:
    """Return the mixture for packs of a length: that of the longest packs which are not longer, or the first one scaled down."""
    known = mixtures()
    shortest = min(known)
    if sequence_length < shortest:
        first = known[shortest]
        scale = sequence_length / shortest
        return LengthMixture(sequence_length, first.shares, first.kinds, first.shapes, scale)
    return known[max(length for length in known if length <= sequence_length)]
