"""The architecture of a Qwen3-VL model as numbers; sizes are in recipes/model/*.yaml.

Source: Qwen3-VL technical report (arXiv 2511.21631) section 2 and the published config.json of each model.
Nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import Final

from visionloom.common.settings import option, option_faults
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.pipeline import pipeline_problems

BACKENDS = ("auto", "torch", "flash", "te")
GROUPS = ("vision", "merger", "language")
"""Parameter groups that a phase may train: vision tower, mergers (main and DeepStack), language model."""
PICTURES: Final = {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "channels": 3}
"""How data/ cuts pictures, which all Qwen3-VL models share: a model with other numbers would find nothing to read."""
ROW_BYTES: Final = 16
"""torch's grouped_mm takes matrices of experts only if their rows are a multiple of so many bytes."""


@dataclass
class TextConfig:
    """The language model."""

    layers: int = option(28, "never", least=1, most=1024)
    hidden_size: int = option(2048, "never", least=1, most=262_144)
    ffn_hidden_size: int = option(6144, "never", least=1, most=262_144)
    heads: int = option(16, "never", least=1, most=1024)
    kv_heads: int = option(8, "never", least=1, most=1024)
    head_dim: int = option(128, "never", least=1, most=1024)
    """Never hidden_size / heads: the query width of 4B, 32B and the mixtures differs from their hidden size."""
    vocab_size: int = option(151936, "never", least=1, most=4_194_304)
    rope_theta: float = option(5_000_000.0, "never", above=0, most=1e12)
    mrope_section: list[int] = option([24, 20, 20], "never", most=1024)
    """Rotary frequency slots for time, height and width; they sum to head_dim / 2."""
    tie_embeddings: bool = option(True, "never")
    norm_epsilon: float = option(1e-6, "never", above=0, most=1)
    initializer_range: float = option(0.02, "run", least=0, most=10)
    max_positions: int = option(262144, "run", least=1, most=16_777_216)
    experts: int = option(0, "never", least=0, most=4096)
    """Experts of each layer; 0 means a dense model."""
    experts_per_token: int = option(0, "never", least=0, most=4096)
    expert_ffn_hidden_size: int = option(0, "never", least=0, most=262_144)
    balance_coefficient: float = option(0.001, "run", least=0, most=1000)
    """Weight of the load-balancing loss of each mixture-of-experts layer; 0 turns it off. The value is transformers' default
    for Qwen3-VL's mixtures, divided over the layers there and added up here (docs/decisions.md)."""


@dataclass
class VisionConfig:
    """The vision tower and its mergers."""

    depth: int = option(24, "never", least=1, most=1024)
    hidden_size: int = option(1024, "never", least=1, most=262_144)
    heads: int = option(16, "never", least=1, most=1024)
    ffn_hidden_size: int = option(4096, "never", least=1, most=262_144)
    deepstack_layers: list[int] = option([5, 11, 17], "never", least=0, most=1024)
    """Blocks (0-based), in increasing order, whose output feeds a DeepStack merger and language layer each, the first the first."""
    position_table: int = option(48, "never", least=1, most=4096)
    """Side of the square table of learned positions."""
    patch_size: int = option(16, "never", least=1, most=1024)
    temporal_patch_size: int = option(2, "never", least=1, most=1024)
    spatial_merge_size: int = option(2, "never", least=1, most=1024)
    channels: int = option(3, "never", least=1, most=1024)
    norm_epsilon: float = option(1e-6, "never", above=0, most=1)
    initializer_range: float = option(0.02, "run", least=0, most=10)

    @property
    def patch_width(self) -> int:
        """Values of one patch: channels x frames x height x width."""
        return self.channels * self.temporal_patch_size * self.patch_size**2


@dataclass
class ModelConfig:
    """One Qwen3-VL model."""

    name: str = option("qwen3vl", "free")
    backend: str = option("auto", "free")
    """Kernels: `torch` everywhere, `flash` and `te` on a GPU; `auto` takes the best that is there."""
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)

    def problems(self, parallel: ParallelConfig | None = None) -> list[str]:
        """What makes this model impossible to build in a layout: one line a fault, naming the option; empty if none."""
        if found := option_faults(self, "model"):
            return found
        text, vision = self.text, self.vision
        if self.backend not in BACKENDS:
            found.append(f"model.backend={self.backend} is unknown: use one of {', '.join(BACKENDS)}")
        elif self.backend not in ("auto", "torch"):
            found.append(f"model.backend={self.backend} is not available yet: use model.backend=torch")
        found += self._rotary_problems()
        if text.heads % text.kv_heads:
            found.append(f"model.text.heads={text.heads} must be a multiple of kv_heads={text.kv_heads}")
        for name, value in PICTURES.items():
            if getattr(vision, name) != value:
                found.append(f"model.vision.{name}={getattr(vision, name)} must be {value}, as the data has it")
        found += self._deepstack_problems() + self._expert_problems()
        return found + (self.layout_problems(parallel) if parallel else [])

    def _rotary_problems(self) -> list[str]:
        """What the rotary embeddings of both towers cannot be made of."""
        text, vision, found = self.text, self.vision, []
        section = f"model.text.mrope_section={text.mrope_section}"
        if len(text.mrope_section) != 3 or min(text.mrope_section) < 0:
            found.append(f"{section} must be three numbers of at least 0: for time, height and width")
        elif sum(text.mrope_section) * 2 != text.head_dim:
            found.append(f"{section} must sum to head_dim / 2 = {text.head_dim / 2:g}")
        elif 3 * max(text.mrope_section[1:]) > text.head_dim // 2:
            found.append(f"{section}: height and width need 3 x section <= head_dim / 2")
        if vision.hidden_size % (4 * vision.heads):
            found.append(
                f"model.vision.hidden_size={vision.hidden_size} must be a multiple of 4 x heads={4 * vision.heads}:"
                " each head turns by rows and columns"
            )
        return found

    def _deepstack_problems(self) -> list[str]:
        vision, layers = self.vision, self.text.layers
        where, found = f"model.vision.deepstack_layers={vision.deepstack_layers}", []
        if any(not 0 <= layer < vision.depth for layer in vision.deepstack_layers):
            found.append(f"{where} must lie in 0..{vision.depth - 1}")
        if vision.deepstack_layers != sorted(set(vision.deepstack_layers)):
            found.append(f"{where} must increase: language layers receive the levels in the order of the blocks")
        if len(vision.deepstack_layers) > layers:
            found.append(f"{where}: {len(vision.deepstack_layers)} levels need as many language layers, have {layers}")
        return found

    def _expert_problems(self) -> list[str]:
        text, found = self.text, []
        if text.experts and not 1 <= text.experts_per_token <= text.experts:
            found.append(f"model.text.experts_per_token={text.experts_per_token} must lie in 1..{text.experts} (experts)")
        if text.experts and text.expert_ffn_hidden_size < 1:
            found.append(f"model.text.expert_ffn_hidden_size={text.expert_ffn_hidden_size} must be at least 1")
        return found

    def kernel_problems(self, element_bytes: int, parallel: ParallelConfig) -> list[str]:
        """What the kernels of a possible model cannot multiply in a layout, with elements of so many bytes."""
        text, multiple, share = self.text, ROW_BYTES // element_bytes, parallel.expert_tensor or 1
        if not text.experts:
            return []
        found = []
        if text.hidden_size % multiple:
            found.append(f"model.text.hidden_size={text.hidden_size} must be a multiple of {multiple} in a mixture")
        if text.expert_ffn_hidden_size % (multiple * share):
            parts = f" x parallel.expert_tensor {share}" if share > 1 else ""
            found.append(
                f"model.text.expert_ffn_hidden_size={text.expert_ffn_hidden_size} must be a multiple of {multiple}{parts}"
            )
        return [f"{line}: rows of experts' matrices are multiples of {ROW_BYTES} bytes" for line in found]

    def layout_problems(self, parallel: ParallelConfig) -> list[str]:
        """What a layout does not divide: heads, key/value heads, vocabulary, widths, experts, layers; one line a fault."""
        if parallel.out_of_range():
            return []
        text, tensor = self.text, parallel.tensor
        names = ["heads", "kv_heads", "vocab_size"] + ([] if text.experts else ["ffn_hidden_size"])
        found = []
        if uneven := [f"model.text.{name}={getattr(text, name)}" for name in names if getattr(text, name) % tensor]:
            found.append(f"parallel.tensor={tensor} does not divide {', '.join(uneven)}: choose a divisor")
        elif parallel.context_exchange == "ulysses" and text.kv_heads % (tensor * parallel.context):
            found.append(
                f"parallel.context_exchange=ulysses needs tensor {tensor} x context {parallel.context} ="
                f" {tensor * parallel.context} to divide model.text.kv_heads={text.kv_heads}: use gather"
            )
        return found + self._expert_layout_problems(parallel) + pipeline_problems(parallel, text.layers)

    def _expert_layout_problems(self, parallel: ParallelConfig) -> list[str]:
        text, expert_tensor = self.text, parallel.expert_tensor or 1
        if not text.experts:
            axes = {"expert": parallel.expert, "expert_tensor": expert_tensor}
            return [
                f"parallel.{axis}={degree}, but model={self.name} has no experts: set it to 1"
                for axis, degree in axes.items()
                if degree > 1
            ]
        found = []
        if text.experts % parallel.expert:
            found.append(
                f"parallel.expert={parallel.expert} does not divide model.text.experts={text.experts}: choose a divisor"
            )
        if text.expert_ffn_hidden_size % expert_tensor:
            found.append(
                f"parallel.expert_tensor={expert_tensor} does not divide"
                f" model.text.expert_ffn_hidden_size={text.expert_ffn_hidden_size}: choose a divisor"
            )
        if parallel.tensor > 1 and not parallel.sequence_parallel:
            found.append("a mixture of experts with parallel.tensor above 1 needs parallel.sequence=true: leave it out")
        return found
