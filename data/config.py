"""What is read, and by which rules samples become tokens and patches. Nothing here imports torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final

from visionloom.common.settings import option

RULES: Final = ("hf", "hf_capped", "qwen_utils")
"""Rules by which pictures and videos get their sizes and frames."""
OVER_LENGTH: Final = ("error", "drop", "split", "shrink", "truncate_tail")
"""What becomes of a sample that no pack can hold; see over_length.py."""
INSTRUCT: Final = "instruct"
THINKING: Final = "thinking"
CHAT_FORMATS: Final = (INSTRUCT, THINKING)
SCORES: Final = ("default", "exact", "choice", "iou")
WEIGHTS_IN: Final = ("samples", "tokens")


@dataclass
class DatasetConfig:
    """One dataset: a folder of indexed WebDataset shards."""

    path: str = option("???", "data")
    """Folder with dataset.json, *.tar and their indexes, or the http(s)://, s3:// or other fsspec URL of one."""
    weight: float = option(1.0, "data", least=0, most=1e9)
    """Share of the samples drawn, before normalisation; a phase's `mixture` overrides it."""
    over_length: str = option("error", "data", choices=OVER_LENGTH)
    """A sample longer than the phase's sequence: `error` stops and names it; `split` cuts documents at sentence ends and
    chats between turns, `shrink` makes its pictures smaller, `truncate_tail` cuts its end off, `drop` leaves it out; what
    is lost is counted and logged."""


@dataclass
class ValidationConfig(DatasetConfig):
    """One held-out dataset, and how its answers are scored."""

    score: str = option("default", "free", choices=SCORES)
    """When an answer is right: `default` boxes by their overlap and anything else word for word; `exact` but for case, white
    space, quotes and a full stop; `choice` the letter of a multiple choice in free text; `iou` boxes by their overlap alone."""


@dataclass
class MediaConfig:
    """Sizes, frames and limits of pictures and videos; areas in pixels, volumes in frames x pixels.

    What is null takes the value of the rule; `hf` has the published preprocessor settings of Qwen3-VL.
    """

    rule: str = option("hf", "data", choices=RULES)
    """Whose arithmetic: `hf` transformers' processors, `hf_capped` the same with `cap_pixels_per_frame`, `qwen_utils`
    qwen-vl-utils 0.0.14 with image_patch_size 16."""
    image_min_pixels: int | None = option(None, "data", least=1, most=2**24)
    """Smallest area of an image; null: 65,536 (64 visual tokens), with qwen_utils 4,096."""
    image_max_pixels: int | None = option(None, "data", least=1, most=2**28)
    """Largest area of an image; null: 16,777,216 (16,384 visual tokens)."""
    video_min_pixels: int | None = option(None, "data", least=1, most=2**28)
    """Lower bound of frames x height x width of a video; null: 4,096. Not used by qwen_utils."""
    video_max_pixels: int | None = option(None, "data", least=1, most=2**34)
    """Upper bound of frames x height x width of a video; null: 25,165,824, with qwen_utils 235,929,600 (twice its
    total_pixels, which counts pairs of frames)."""
    frame_min_pixels: int | None = option(None, "data", least=1, most=2**24)
    """Smallest area of a video's frame; null: 131,072. Used by qwen_utils only."""
    frame_max_pixels: int | None = option(None, "data", least=1, most=2**28)
    """Largest area of a video's frame; null: 786,432 (768 visual tokens). Not used by hf."""
    video_fps: float = option(2.0, "data", above=0, most=1000)
    """Frames sampled per second from a video file; extracted frames were sampled before."""
    video_min_frames: int = option(4, "data", least=1, most=100_000)
    """Fewest frames of a video file, as far as it has them."""
    video_max_frames: int = option(768, "data", least=1, most=100_000)
    """Most frames of a video."""

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line for each lower bound that is above its upper one."""
        for kind in ("image", "video", "frame"):
            low = getattr(self, f"{kind}_min_pixels")
            high = getattr(self, f"{kind}_max_pixels")
            # a null one takes the value of the rule
            if low is None or high is None:
                continue
            if low > high:
                yield f"{here}.{kind}_min_pixels={low} is above {here}.{kind}_max_pixels={high}"
        fewest, most = self.video_min_frames, self.video_max_frames
        if fewest > most:
            yield f"{here}.video_min_frames={fewest} is above {here}.video_max_frames={most}"


@dataclass
class VideoSampling:
    """How densely a phase samples videos: longer sequences have room for more frames; what is null is as data.media has it.

    Source: Qwen3-VL technical report (arXiv 2511.21631) section 3.2.7.
    """

    fps: float | None = option(None, "data", above=0, most=1000)
    """Frames sampled per second, in place of video_fps."""
    max_frames: int | None = option(None, "data", least=1, most=100_000)
    """Most frames of a video, in place of video_max_frames."""
    max_pixels: int | None = option(None, "data", least=1, most=2**34)
    """Largest frames x height x width of a video, in place of video_max_pixels."""

    def applied_to(self, media: MediaConfig) -> MediaConfig:
        """Return the rules of a run with these in place of theirs."""
        # Names are those of data.media without their beginning.
        own = {f"video_{each.name}": getattr(self, each.name) for each in fields(self)}
        return replace(media, **{name: value for name, value in own.items() if value is not None})


@dataclass
class StoreConfig:
    """How remote datasets (http, https, s3 and other URLs) are read; folders need none of it."""

    timeout_seconds: float = option(20.0, "free", above=0, most=3600)
    """Longest wait for an answer, and between two of its parts; an attempt may last this and 1 s for each MiB."""
    retries: int = option(5, "free", least=0, most=16)
    """Attempts after a failed one, each after twice the wait of the last (0.25 s at first), before the run stops."""
    hedge_seconds: float = option(2.0, "free", least=0, most=3600)
    """A request without an answer for so long gets a second one beside it, and the first answer counts; 0: never."""
    bytes_in_flight: int = option(256 * 2**20, "free", least=1, most=2**40)
    """Most bytes of media that a process has asked for and not decoded yet."""
    cache: str = option("", "free")
    """Folder of this machine for what was read; empty: none."""
    cache_bytes: int = option(100 * 2**30, "free", least=1, most=2**60)
    """Most bytes in that folder, over all processes; what was not used for longest goes first."""


@dataclass
class DataConfig:
    """The input of a run."""

    tokenizer: str = option("", "data")
    """Folder of a Hugging Face tokenizer with Qwen3-VL's special tokens."""
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    """Training datasets by name."""
    validation: dict[str, ValidationConfig] = field(default_factory=dict)
    """Held-out datasets by name, for evaluation."""
    media: MediaConfig = field(default_factory=MediaConfig)
    """Sizes, frames and limits of pictures and videos."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Reading of remote datasets."""
    chat_format: str = option(INSTRUCT, "data", choices=CHAT_FORMATS)
    """How chats are written, as the templates of the two kinds of Qwen3-VL models do: `instruct` with the thoughts that a sample
    has, `thinking` for a model that always thinks first: thoughts in answers to the last question alone, an empty one where the
    last answer has none, and no loss on what is left of earlier answers."""
    workers: int | None = option(None, "free", least=0, most=1024)
    """Processes that decode ahead on each rank; their number never changes what is read. 0: a thread of the training process
    does; null: by the cores that this rank has of its machine, see `chosen_workers` of data/stream/workers.py."""
    max_patches_per_token: float = option(3.2, "data", above=0, most=1000)
    """Most patches of a pack, for each token of the sequence length: 0.8 x the 4 patches of a visual token."""
    packing_window_samples: int = option(1024, "data", least=1, most=65_536)
    """Samples that wait while packs are filled: the oldest go first, then those that fit best, of each dataset from at most a
    40th of its epoch."""
    sample_token_multiple: int = option(1, "data", least=1, most=65_536)
    """Tokens that each sample takes up in a pack are rounded up to this multiple, for context parallelism."""
    max_samples_per_pack: int = option(0, "data", least=0, most=2**20)
    """Most samples of a pack; 0: any number."""
    weights_in: str = option("samples", "data", choices=WEIGHTS_IN)
    """What weights of datasets are shares of: `samples` drawn, or `tokens`."""
    shuffle_block_samples: int = option(64, "data", least=1, most=2**20)
    """Neighbouring samples that the shuffle keeps near each other, so that reading is not all seeks; 1: none."""
    continue_draws: bool = option(False, "run")
    """Whether a phase goes on in each dataset where the phase before stopped, instead of in an order of its own."""
    on_change: str = option("error", "free", choices=("error", "new_phase"))
    """If the data or its settings differ from a checkpoint's: `error` says what, `new_phase` goes on with the new ones
    behind what was drawn already."""
    cache: str = option("", "free")
    """Folder for length tables and plans; empty: `cache/` inside each dataset's folder, for a URL ~/.cache/visionloom."""
    max_bad_fraction: float = option(1e-3, "free", least=0, most=1)
    """Share of unreadable samples, of all that a process has read or of 10,000 at first, above which the run stops."""

    def drawn_weights(self, mixture: Mapping[str, float]) -> dict[str, float]:
        """Return the weights above 0: of a mixture, or where it is empty of the datasets."""
        # a mixture stands for all weights, it does not change some of them
        weights = dict(mixture) or {name: each.weight for name, each in self.datasets.items()}
        return {name: float(weight) for name, weight in weights.items() if weight > 0}
