"""Length tables of mixtures like those of a training run: captions, questions, documents, text, videos; shared with the tests.

Lengths are lognormal. At 8K the mean is about 1,650 tokens and two samples in a hundred, with a fifth of all tokens, are longer
than a pack; at 256K one sample in twenty has more than 65,535 tokens. Half to two thirds of all tokens are visual.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visionloom.data.plan.lengths import LENGTHS

FRAME_TOKENS: Final = 256
"""Visual tokens of a temporal patch of a video."""


@dataclass(frozen=True)
class Kind:
    """One kind of sample: medians and spreads (of the logarithm) of its text and its visual tokens."""

    share: float
    text: float
    text_spread: float
    visual: float = 0.0
    visual_spread: float = 0.0
    is_video: bool = False


@dataclass(frozen=True)
class LengthMixture:
    """Kinds of samples, and the sequence length that they are packed into."""

    tokens: int
    kinds: tuple[Kind, ...]

    def table(self, count: int, seed: int = 0) -> NDArray[Any]:
        """Rows of dtype LENGTHS of `count` samples, those longer than a pack included."""
        rng = np.random.default_rng(seed)
        shares = np.array([kind.share for kind in self.kinds])
        kinds = rng.choice(len(shares), count, p=shares / shares.sum())
        text, visual, spread = (
            np.array([getattr(kind, f) for kind in self.kinds])[kinds]
            for f in ("text", "visual", "visual_spread")
        )
        written = (
            np.exp(
                rng.normal(np.log(text), np.array([kind.text_spread for kind in self.kinds])[kinds])
            ).astype(int)
            + 8
        )
        shown = np.where(
            visual > 0, np.exp(rng.normal(np.log(np.maximum(visual, 1)), spread)), 0
        ).astype(int)
        table = np.zeros(count, LENGTHS)
        table["tokens"] = written + shown
        table["patches"] = 4 * shown
        table["supervised"] = written // 2
        is_video = np.array([kind.is_video for kind in self.kinds])[kinds]
        table["patch_pairs"] = np.where(is_video, 4 * shown * 4 * FRAME_TOKENS, _images(shown))
        return table

    def samples(self, count: int, seed: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokens and patches of the samples, of `count`, that a pack can hold."""
        table = self.table(count, seed)
        table = table[
            (table["tokens"] <= self.tokens) & (table["patches"] <= int(3.2 * self.tokens))
        ]
        return table["tokens"], table["patches"]


def _images(shown: NDArray[np.int64]) -> NDArray[np.int64]:
    """Squares of the patches of images of at most 1,024 visual tokens each."""
    whole, rest = np.divmod(shown.astype(np.int64), 1024)
    return np.asarray(whole * 4096**2 + (4 * rest) ** 2, np.int64)


_CAPTION, _QUESTION = (80, 0.6, 300, 0.6), (200, 0.9, 700, 0.7)
_DOCUMENT, _TEXT = (1100, 0.9, 900, 0.8), (1100, 1.2)
MIXTURES: Final = {
    "8k": LengthMixture(
        8192,
        (
            Kind(0.42, *_CAPTION),
            Kind(0.25, *_QUESTION),
            Kind(0.13, *_DOCUMENT),
            Kind(0.14, *_TEXT),
            Kind(0.06, 300, 0.8, 5500, 0.8, True),
        ),
    ),
    "32k": LengthMixture(
        32_768,
        (
            Kind(0.38, *_CAPTION),
            Kind(0.25, *_QUESTION),
            Kind(0.14, *_DOCUMENT),
            Kind(0.14, *_TEXT),
            Kind(0.09, 300, 0.8, 7500, 0.7, True),
        ),
    ),
    "256k": LengthMixture(
        262_144,
        (
            Kind(0.30, *_CAPTION),
            Kind(0.20, *_QUESTION),
            Kind(0.14, *_DOCUMENT),
            Kind(0.14, *_TEXT),
            Kind(0.11, 300, 0.8, 9000, 0.7, True),
            Kind(0.06, 48_000, 0.8),
            Kind(0.05, 600, 0.8, 62_000, 0.5, True),
        ),
    ),
}
