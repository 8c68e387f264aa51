"""Qwen3-VL, read from top to bottom: images to features, features into the embeddings, decoder layers, loss.

Source: Qwen3-VL technical report (arXiv 2511.21631) section 2; reference implementation: transformers'
Qwen3VLForConditionalGeneration.
Shapes: T tokens of a micro-batch (t of them on this rank under sequence parallelism), M visual tokens (m on this rank),
R supervised tokens, H hidden size, V vocabulary, K DeepStack levels.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from visionloom.model.attention import Segments
from visionloom.model.config import ModelConfig
from visionloom.model.language import LanguageModel, transformer_config
from visionloom.model.loss import linear_cross_entropy
from visionloom.model.rope import inverse_frequencies, mrope_angles
from visionloom.model.vision import VisionInput, VisionTower
from visionloom.parallel.topology import Topology


class Pack(Protocol):
    """What the model reads of a packed micro-batch; all tensors on the host (see data/pack.py PackedBatch)."""

    @property
    def input_ids(self) -> Tensor:
        """int64 [T]."""

    @property
    def labels(self) -> Tensor:
        """int64 [T]."""

    @property
    def loss_weights(self) -> Tensor:
        """fp32 [T]."""

    @property
    def position_ids(self) -> Tensor:
        """int32 [3, T]."""

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [S + 1], from 0 to T."""

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment."""

    @property
    def patches(self) -> Tensor:
        """uint8 [N, 768 or 1536]."""

    @property
    def grid_thw(self) -> Tensor:
        """int32 [n, 3]."""

    @property
    def visual_rows(self) -> Tensor:
        """int64 [M]."""


@dataclass(frozen=True)
class ModelInput:
    """A micro-batch on the device, with everything that can be worked out on the host already worked out."""

    input_ids: Tensor
    """int64 [1, T]."""
    angles: Tensor
    """Rotary angles fp32 [T, 1, 1, D]."""
    packed: Any
    """PackedSeqParams with `segments`."""
    vision: VisionInput
    has_images: bool
    visual_rows: Tensor
    """int64 [m]: rows of this rank's t tokens that receive a feature."""
    visual_features: Tensor
    """int64 [m]: which of the M features they receive."""
    loss_rows: Tensor
    """int64 [R]: rows of the T tokens with a supervised next token."""
    targets: Tensor
    """int64 [R]."""
    target_weights: Tensor
    """fp32 [R]."""


class Qwen3VL(MegatronModule):  # type: ignore[misc]
    """The whole model on one pipeline stage."""

    def __init__(self, config: ModelConfig, topology: Topology, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(transformer_config(config, topology.config, dtype))
        self.model_config = config
        self.topology = topology
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = config.text.tie_embeddings
        self.visual = VisionTower(config.vision, config.text.hidden_size).to(dtype)
        for parameter in self.visual.parameters():
            # Under sequence parallelism each rank uses only its own rows of the features: gradients are partial.
            parameter.sequence_parallel = topology.config.sequence_parallel  # type: ignore[attr-defined]
        self.language_model = LanguageModel(self.config, config, topology.groups)

    def set_input_tensor(self, tensor: Any) -> None:
        """Receive the hidden states of an earlier pipeline stage."""
        self.language_model.set_input_tensor(tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied matrix, for Megatron-core's reduction over pipeline stages."""
        weight: Tensor = self.language_model.shared_embedding_or_output_weight()
        return weight

    def prepare(self, pack: Pack) -> ModelInput:
        """Move a micro-batch to the device, with rows, segments and angles worked out first."""
        device, parallel = self.topology.device, self.topology.config
        text, vision = self.model_config.text, self.model_config.vision
        tokens = pack.input_ids.numel()
        packed = PackedSeqParams(
            qkv_format="sbhd",
            cu_seqlens_q=pack.cu_seqlens,
            cu_seqlens_kv=pack.cu_seqlens,
            max_seqlen_q=pack.max_seqlen,
            max_seqlen_kv=pack.max_seqlen,
        )
        packed.segments = Segments.build(pack.cu_seqlens, device)
        share = tokens // parallel.tensor if parallel.sequence_parallel else tokens
        first = share * self.topology.tensor_rank if parallel.sequence_parallel else 0
        mine = ((pack.visual_rows >= first) & (pack.visual_rows < first + share)).nonzero()[:, 0]
        loss_rows = (pack.loss_weights > 0).nonzero()[:, 0]
        has_images = len(pack.grid_thw) > 0
        patches, grids = (pack.patches, pack.grid_thw) if has_images else no_images(self.model_config)
        frequencies = inverse_frequencies(text.head_dim, text.rope_theta).to(device)
        positions = pack.position_ids.to(device, non_blocking=True)
        return ModelInput(
            input_ids=pack.input_ids.to(device, non_blocking=True).unsqueeze(0),
            angles=mrope_angles(positions, frequencies, text.mrope_section),
            packed=packed,
            vision=VisionInput.build(patches, grids, vision, device),
            has_images=has_images,
            visual_rows=(pack.visual_rows[mine] - first).to(device, non_blocking=True),
            visual_features=mine.to(device, non_blocking=True),
            loss_rows=loss_rows.to(device, non_blocking=True),
            targets=pack.labels[loss_rows].to(device, non_blocking=True),
            target_weights=pack.loss_weights[loss_rows].to(device, non_blocking=True),
        )

    def forward(self, inputs: ModelInput) -> tuple[Tensor, Tensor]:
        """Weighted sum of the losses of the supervised tokens, and the loss of each, fp32 [R] in row order."""
        hidden = self._whole(self._decode(inputs))[inputs.loss_rows, 0]
        return linear_cross_entropy(
            hidden, self.language_model.output_weight, inputs.targets, inputs.target_weights, self.topology.groups.tp
        )

    def logits(self, inputs: ModelInput, rows: Tensor | None = None) -> Tensor:
        """Logits of the tokens in `rows` (int64 [R]; None: all T), this rank's vocabulary columns [R, V / tensor]."""
        hidden = self._whole(self._decode(inputs))[:, 0]
        return F.linear(hidden if rows is None else hidden[rows], self.language_model.output_weight)

    def _decode(self, inputs: ModelInput) -> Tensor:
        """Final hidden states [t, 1, H]."""
        hidden: Tensor = self.language_model.embedding(inputs.input_ids, None)
        features: Tensor = self.visual(inputs.vision)
        if not inputs.has_images:
            # Keeps the tower in the graph: its gradients are zeros on a rank without images, not missing.
            return self.language_model(hidden + features.sum() * 0.0, inputs.angles, inputs.packed, None, None)
        features = features[inputs.visual_features].to(hidden.dtype)
        main, deepstack = features.tensor_split([hidden.shape[-1]], dim=1)
        hidden = hidden.index_copy(0, inputs.visual_rows, main.unsqueeze(1))
        return self.language_model(hidden, inputs.angles, inputs.packed, deepstack, inputs.visual_rows)

    def _whole(self, hidden: Tensor) -> Tensor:
        """All T rows of the final hidden states, with the gradient summed over the vocabulary's parts."""
        group = self.topology.groups.tp
        if self.topology.config.sequence_parallel:
            gathered: Tensor = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
            return gathered
        copied: Tensor = copy_to_tensor_model_parallel_region(hidden, group=group)
        return copied


def no_images(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Patches and grid of one blank image, the smallest there is: every rank takes part in every collective."""
    merge = config.vision.spatial_merge_size
    patches = torch.zeros(merge * merge, config.vision.patch_width, dtype=torch.uint8)
    return patches, torch.tensor([[1, merge, merge]])
