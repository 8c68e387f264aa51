"""The architecture of a Qwen3-VL model as numbers; sizes are in recipes/model/*.yaml.

Source: Qwen3-VL technical report (arXiv 2511.21631) section 2 and the published config.json of each model.
Nothing here imports torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from visionloom.common.settings import option
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.pipeline import pipeline_problems

GROUPS = ("vision", "merger", "language")
"""Parameter groups that a phase may train: vision tower, mergers (main and DeepStack), language model."""
PICTURES: Final = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "channels": 3,
}
"""The cutting of pictures in data/, the same for all Qwen3-VL models: data does not fit a model with other numbers."""
ATTENTIONS: Final = ("auto", "torch", "flash2", "flash3", "flash4")
"""Kernels of attention on a GPU."""
ROW_BYTES: Final = 16
"""Rows of experts' matrices are multiples of this, or torch's grouped_mm refuses them."""


@dataclass
class RopeScaling:
    """YaRN: positions beyond those of training, with slow rotations slower by a factor and fast ones as they were.

    Source: YaRN (arXiv 2309.00071); the published models' model card for positions above 262,144.
    """

    factor: float = option(1.0, "run", least=1, most=64)
    """By how much slow rotations are slower; 1: off. The model card has 3 for about a million positions."""
    original_positions: int = option(262144, "run", least=1, most=16_777_216)
    """Positions that the weights were trained with."""
    beta_fast: float = option(32.0, "run", above=0, most=1e6)
    """Turns in original_positions from which a rotation is fast: it stays as it was."""
    beta_slow: float = option(1.0, "run", above=0, most=1e6)
    """Turns in original_positions up to which a rotation is slow."""
    attention_factor: float = option(0.0, "run", least=0, most=100)
    """Factor of cosines and sines; 0: 0.1 ln(factor) + 1."""

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line if no rotation could be between slow and fast."""
        if self.beta_fast <= self.beta_slow:
            yield f"{here}.beta_fast={self.beta_fast:g} must be above beta_slow={self.beta_slow:g}"

    @property
    def magnitude(self) -> float:
        """Return the factor of cosines and sines."""
        return self.attention_factor or 0.1 * math.log(self.factor) + 1


@dataclass
class TextConfig:
    """The language model; widths are numbers of values of a token's vector."""

    layers: int = option(28, "never", least=1, most=1024)
    """Decoder layers."""
    hidden_size: int = option(2048, "never", least=1, most=262_144)
    """Width of a token between the layers."""
    ffn_hidden_size: int = option(6144, "never", least=1, most=262_144)
    """Width inside the MLP of a layer; not used by a mixture of experts."""
    heads: int = option(16, "never", least=1, most=1024)
    """Query heads of a layer's attention."""
    kv_heads: int = option(8, "never", least=1, most=1024)
    """Key and value heads of a layer's attention, each shared by heads / kv_heads query heads."""
    head_dim: int = option(128, "never", least=1, most=1024)
    """Width of a head. Never hidden_size / heads: the query width of 4B, 32B and the mixtures differs from their hidden size."""
    vocab_size: int = option(151936, "never", least=1, most=4_194_304)
    """Rows of the embedding: token ids are below it."""
    rope_theta: float = option(5_000_000.0, "never", above=0, most=1e12)
    """Base of the rotary frequencies: the slowest turns once in about 2 pi x this many positions."""
    mrope_section: list[int] = option([24, 20, 20], "never", most=1024)
    """Rotary frequency slots for time, height and width; they sum to head_dim / 2."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """YaRN, for positions beyond those of training."""
    tie_embeddings: bool = option(True, "never")
    """Use the embedding as the output layer too."""
    norm_epsilon: float = option(1e-6, "never", above=0, most=1)
    """Added to the mean square in RMSNorm."""
    initializer_range: float = option(0.02, "run", least=0, most=10)
    """Standard deviation of weights that are drawn."""
    max_positions: int = option(262144, "run", least=1, most=16_777_216)
    """Longest sequence in tokens that exports name (max_position_embeddings); training does not read it."""
    experts: int = option(0, "never", least=0, most=4096)
    """Experts of each layer; 0 means a dense model."""
    experts_per_token: int = option(0, "never", least=0, most=4096)
    """Experts that a token is routed to in each layer; 0 in a dense model."""
    expert_ffn_hidden_size: int = option(0, "never", least=0, most=262_144)
    """Width inside one expert; 0 in a dense model."""
    balance_coefficient: float = option(0.001, "run", least=0, most=1000)
    """Weight of the load-balancing loss of each mixture-of-experts layer; 0 turns it off. The value is transformers' default
    for Qwen3-VL's mixtures, divided over the layers there and added up here (docs/decisions.md)."""

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line for each fault of the heads, the rotary slots and the experts."""
        if self.heads % self.kv_heads:
            yield f"{here}.heads={self.heads} must be a multiple of kv_heads={self.kv_heads}"
        yield from self._rotary_problems(here)
        yield from self._expert_problems(here)

    def _rotary_problems(self, here: str) -> Iterator[str]:
        section = f"{here}.mrope_section={self.mrope_section}"
        slots = self.head_dim // 2
        if len(self.mrope_section) != 3 or min(self.mrope_section) < 0:
            yield f"{section} must be three numbers of at least 0: for time, height and width"
        elif sum(self.mrope_section) * 2 != self.head_dim:
            yield f"{section} must sum to head_dim / 2 = {self.head_dim / 2:g}"
        elif 3 * max(self.mrope_section[1:]) > slots:
            # Their slots are every third one, beginning with the second and the third.
            yield f"{section}: height and width need 3 x section <= head_dim / 2"

    def _expert_problems(self, here: str) -> Iterator[str]:
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            yield f"{here}.experts_per_token={self.experts_per_token} must lie in 1..{self.experts} (experts)"
        if self.experts and self.expert_ffn_hidden_size < 1:
            yield f"{here}.expert_ffn_hidden_size={self.expert_ffn_hidden_size} must be at least 1"


@dataclass
class VisionConfig:
    """The vision tower and its mergers; widths are numbers of values of a patch's vector."""

    depth: int = option(24, "never", least=1, most=1024)
    """Blocks of the tower."""
    hidden_size: int = option(1024, "never", least=1, most=262_144)
    """Width of a patch between the blocks."""
    heads: int = option(16, "never", least=1, most=1024)
    """Attention heads of a block."""
    ffn_hidden_size: int = option(4096, "never", least=1, most=262_144)
    """Width inside the MLP of a block."""
    deepstack_layers: list[int] = option([5, 11, 17], "never", least=0, most=1024)
    """Blocks (0-based), in increasing order, whose output feeds a DeepStack merger and language layer each, the first the first."""
    position_table: int = option(48, "never", least=1, most=4096)
    """Side, in positions, of the square table of learned positions: 48 stands for 48 x 48."""
    patch_size: int = option(16, "never", least=1, most=1024)
    """Side of a patch in pixels."""
    temporal_patch_size: int = option(2, "never", least=1, most=1024)
    """Frames of a patch; an image is repeated to fill them."""
    spatial_merge_size: int = option(2, "never", least=1, most=1024)
    """Side, in patches, of the square that a merger makes one visual token of."""
    channels: int = option(3, "never", least=1, most=1024)
    """Colour values of a pixel."""
    norm_epsilon: float = option(1e-6, "never", above=0, most=1)
    """Added to the variance in LayerNorm."""
    initializer_range: float = option(0.02, "run", least=0, most=10)
    """Standard deviation of weights that are drawn."""

    @property
    def patch_width(self) -> int:
        """Return the number of values of one patch: channels x frames x height x width."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line for each fault of the heads, the cutting of pictures and the DeepStack levels."""
        # Half of a head's width turns by rows and half by columns, each value with a partner.
        if self.hidden_size % (4 * self.heads):
            yield (
                f"{here}.hidden_size={self.hidden_size} must be a multiple of 4 x heads={4 * self.heads}:"
                " each head turns by rows and columns"
            )
        for name, value in PICTURES.items():
            if getattr(self, name) != value:
                yield f"{here}.{name}={getattr(self, name)} must be {value}, as the data has it"
        yield from self._level_problems(here)

    def _level_problems(self, here: str) -> Iterator[str]:
        levels = self.deepstack_layers
        if any(not 0 <= layer < self.depth for layer in levels):
            yield f"{here}.deepstack_layers={levels} must lie in 0..{self.depth - 1}"
        if levels != sorted(set(levels)):
            yield (
                f"{here}.deepstack_layers={levels} must increase: language layers receive the levels in the order of the blocks"
            )


@dataclass
class ModelConfig:
    """One Qwen3-VL model."""

    name: str = option("qwen3vl", "free")
    """Name of the size, for messages and exports."""
    attention: str = option("auto", "free", choices=ATTENTIONS)
    """Kernels of attention on a GPU: `torch` (FlashAttention-2, in torch itself), `flash2`, `flash3` or `flash4` (packages), or
    `auto`: flash3 where it is installed and the GPU is a Hopper, else torch. A CPU has one of its own. A plan cannot know what is
    installed, and takes `auto` for torch."""
    text: TextConfig = field(default_factory=TextConfig)
    """The language model."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The vision tower and its mergers."""

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line where the language model has fewer layers than there are DeepStack levels."""
        levels, layers = self.vision.deepstack_layers, self.text.layers
        if len(levels) > layers:
            yield (
                f"{here}.vision.deepstack_layers={levels}: {len(levels)} levels need as many language layers, have {layers}"
            )

    def kernel_problems(
        self, element_bytes: int, parallel: ParallelConfig, here: str = "parallel"
    ) -> list[str]:
        """Return what the kernels of a possible model cannot multiply in a layout, a line a fault.

        Args:
            element_bytes: bytes of a number: 2 for bf16, 4 for fp32.
            parallel: a possible layout.
            here: its dotted path.
        """
        text, share = self.text, parallel.expert_tensor or 1
        if not text.experts:
            return []

        multiple = ROW_BYTES // element_bytes
        lines = []
        # Each of the two sizes is the row of one of an expert's matrices.
        if text.hidden_size % multiple:
            lines.append(
                f"model.text.hidden_size={text.hidden_size} must be a multiple of {multiple} in a mixture"
            )
        if text.expert_ffn_hidden_size % (multiple * share):
            parts = f" x {here}.expert_tensor {share}" if share > 1 else ""
            width = f"model.text.expert_ffn_hidden_size={text.expert_ffn_hidden_size}"
            lines.append(f"{width} must be a multiple of {multiple}{parts}")
        return [
            f"{line}: rows of experts' matrices are multiples of {ROW_BYTES} bytes"
            for line in lines
        ]

    def layout_problems(self, parallel: ParallelConfig, here: str = "parallel") -> list[str]:
        """Return what a layout does not divide: heads, key/value heads, vocabulary, widths, experts, layers; a line a fault.

        Args:
            parallel: a layout whose values are within their bounds.
            here: its dotted path.
        """
        lines = [*self._tensor_problems(parallel, here)]
        lines += self._expert_layout_problems(parallel, here)
        return lines + pipeline_problems(parallel, self.text.layers, here)

    def _tensor_problems(self, parallel: ParallelConfig, here: str) -> Iterator[str]:
        text, tensor = self.text, parallel.tensor
        names = ["heads", "kv_heads", "vocab_size"]
        # The tensor ranks share a dense MLP; experts are cut by expert_tensor.
        if not text.experts:
            names.append("ffn_hidden_size")
        uneven = [
            f"model.text.{name}={getattr(text, name)}"
            for name in names
            if getattr(text, name) % tensor
        ]
        if uneven:
            yield f"{here}.tensor={tensor} does not divide {', '.join(uneven)}: choose a divisor"
        elif parallel.context_exchange == "ulysses" and text.kv_heads % (tensor * parallel.context):
            yield (
                f"{here}.context_exchange=ulysses needs tensor {tensor} x context {parallel.context} ="
                f" {tensor * parallel.context} to divide model.text.kv_heads={text.kv_heads}: use gather"
            )

    def _expert_layout_problems(self, parallel: ParallelConfig, here: str) -> Iterator[str]:
        text, expert, expert_tensor = self.text, parallel.expert, parallel.expert_tensor or 1
        if not text.experts:
            for axis, degree in (("expert", expert), ("expert_tensor", expert_tensor)):
                if degree > 1:
                    yield f"{here}.{axis}={degree}, but model={self.name} has no experts: set it to 1"
            return

        if text.experts % expert:
            yield f"{here}.expert={expert} does not divide model.text.experts={text.experts}: choose a divisor"
        if text.expert_ffn_hidden_size % expert_tensor:
            width = f"model.text.expert_ffn_hidden_size={text.expert_ffn_hidden_size}"
            yield f"{here}.expert_tensor={expert_tensor} does not divide {width}: choose a divisor"
        # Megatron-core refuses to train such a mixture.
        if parallel.tensor > 1 and not parallel.sequence_parallel:
            yield f"a mixture of experts with {here}.tensor above 1 needs {here}.sequence=true: leave it out"
