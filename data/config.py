"""What is read, and by which rules samples become tokens and patches. Nothing here imports torch."""

from dataclasses import dataclass, field


@dataclass
class DatasetConfig:
    """One dataset: a folder of indexed WebDataset shards."""

    path: str = "???"
    """Folder with dataset.json, *.tar and their indexes."""
    weight: float = 1.0
    """Share of the samples drawn, before normalisation; a phase's `mixture` overrides it."""
    over_length: str = "error"
    """A sample longer than the phase's sequence: `error` stops and names it, `drop` counts and logs it."""


@dataclass
class MediaConfig:
    """Pixel and frame limits; the defaults are the published preprocessor settings of Qwen3-VL (areas in pixels)."""

    image_min_pixels: int = 65_536
    image_max_pixels: int = 16_777_216
    video_min_pixels: int = 4_096
    """Lower bound of frames x height x width of a video, in pixels."""
    video_max_pixels: int = 25_165_824
    """Upper bound of frames x height x width of a video, in pixels."""
    video_fps: float = 2.0
    """Frames sampled per second."""
    video_min_frames: int = 4
    video_max_frames: int = 768


@dataclass
class DataConfig:
    """The input of a run."""

    tokenizer: str = ""
    """Folder of a Hugging Face tokenizer with Qwen3-VL's special tokens."""
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    """Training datasets by name."""
    validation: dict[str, DatasetConfig] = field(default_factory=dict)
    """Held-out datasets by name, for evaluation."""
    media: MediaConfig = field(default_factory=MediaConfig)
    workers: int = 0
    """Processes that decode ahead on each rank; their number never changes what is read."""
    patch_budget: float = 3.2
    """Most patches of a pack, per token of the sequence length (0.8 x the 4 patches behind a visual token)."""
    window: int = 1024
    """Packs are filled best-fit from this many waiting samples."""
    cache: str = ""
    """Folder for length tables; empty: `cache/` inside each dataset's folder."""
