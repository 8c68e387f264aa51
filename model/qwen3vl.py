"""Qwen3-VL, read from top to bottom: images to features, features into the embeddings, decoder layers, loss.

A Qwen3VL is the whole model or, under pipeline parallelism, the chunk of it that a stage holds: the vision tower and the
embedding are in the first chunk, the loss in the last.
Source: Qwen3-VL technical report (arXiv 2511.21631) section 2; reference implementation: transformers'
Qwen3VLForConditionalGeneration.
Shapes: T tokens of a micro-batch, C context ranks, t tokens on this rank (T / C, or its share under sequence parallelism), m
visual tokens on this rank, R supervised tokens of this context rank, H hidden size, V vocabulary, K DeepStack levels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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

from visionloom.model.attention import build_context
from visionloom.model.config import ModelConfig
from visionloom.model.kept import kept
from visionloom.model.language import LanguageModel, transformer_config
from visionloom.model.lora_config import LoraConfig
from visionloom.model.loss import CrossEntropyLoss, RowLossMaker, linear_loss
from visionloom.model.rank_share import FeatureExchange, PackTensors, RankShare
from visionloom.model.rope import mrope_rotation, text_frequencies
from visionloom.model.vision import VisionInput, VisionTower
from visionloom.parallel.device import to_device
from visionloom.parallel.parts import INPUT, LANGUAGE, LOSS, in_part
from visionloom.parallel.topology import Topology


@dataclass(frozen=True)
class ModelInput:
    """A micro-batch on the device, with everything that can be computed on the host already computed."""

    input_ids: Tensor
    """int64 [1, T / C]."""
    rotation: Tensor
    """Of the tokens' queries and keys, fp32 [T / C, D]; see rope.py."""
    packed: Any
    """PackedSeqParams with `context`."""
    padding_mask: Tensor
    """bool [1, t], True in padding."""
    vision: VisionInput | None
    """Pictures that this rank encodes; None after the first chunk, and for a pack of text without gradients."""
    exchange: FeatureExchange | None
    """The way of features to their tokens; None where the pack has no pictures, or after the first chunk."""
    visual_rows: Tensor
    """int64 [m]: rows of this rank's t tokens that receive a feature."""
    loss_tokens: Tensor
    """int64 [R], on the host: rows of the T tokens with a supervised next token that are this context rank's."""
    loss_rows: Tensor
    """int64 [R]: the same, as rows of the context rank's tokens."""
    targets: Tensor
    """int64 [R]."""
    target_weights: Tensor
    """fp32 [R]."""
    row_loss: RowLossMaker = CrossEntropyLoss
    """Makes the losses of the R tokens, in the last chunk."""


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Make torch's layers with weights of a dtype inside: they may be divided before they could be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Qwen3VL(MegatronModule):  # type: ignore[misc]
    """The whole model, or one chunk of it."""

    def __init__(
        self,
        config: ModelConfig,
        topology: Topology,
        dtype: torch.dtype = torch.float32,
        chunk: int | None = None,
    ) -> None:
        """Build the chunk of this rank with weights that are not drawn.

        Args:
            config: the model.
            topology: the layout.
            dtype: of the weights and activations.
            chunk: its number among this stage's chunks; None where a stage has one.
        """
        super().__init__(transformer_config(config, topology.config, dtype))
        self.model_config = config
        self.topology = topology
        self.model_type = ModelType.encoder_or_decoder
        # Names that Megatron-core's schedules and optimizers look for.
        self.vp_stage = chunk
        self.pre_process = topology.pipeline_rank == 0 and not chunk
        is_last_chunk = (chunk or 0) == topology.config.chunks - 1
        self.post_process = topology.is_last_stage and is_last_chunk
        self.share_embeddings_and_output_weights = config.text.tie_embeddings
        if self.pre_process:
            self.visual = self._build_tower(dtype)
        self.language_model = LanguageModel(
            self.config, config, topology.groups, self.pre_process, self.post_process, chunk
        )
        self.received: Tensor | None = None
        self.lora: LoraConfig | None = None
        """Options of the adapters, which then train alone; None: there are none."""

    def _build_tower(self, dtype: torch.dtype) -> VisionTower:
        config, parallel = self.model_config, self.topology.config
        with default_type(dtype):
            tower = VisionTower(
                config.vision,
                config.text.hidden_size,
                parallel.recompute,
                in_pieces=not parallel.divides_weights,
            )
        for parameter in tower.parameters():
            # Each rank encodes its own pictures under sequence parallelism: gradients are partial.
            parameter.sequence_parallel = parallel.sequence_parallel  # type: ignore[attr-defined]
        return tower

    def set_input_tensor(self, tensor: Any) -> None:
        """Receive the hidden states of an earlier chunk; Megatron-core's schedules call it, some with a list of one."""
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return the tied matrix, for Megatron-core's reduction over pipeline stages."""
        weight: Tensor = self.language_model.shared_embedding_or_output_weight()
        return weight

    @in_part(INPUT)
    def prepare(self, pack: PackTensors) -> ModelInput:
        """Move this rank's part of a micro-batch to the device, with rows, segments and rotation computed first."""
        device, text = self.topology.device, self.model_config.text
        share = RankShare.of(pack, self.topology)
        tokens = torch.from_numpy(share.tokens)
        loss_rows = (pack.loss_weights[tokens] > 0).nonzero()[:, 0]
        loss_tokens = tokens[loss_rows]
        vision, exchange = self._pictures(pack, share) if self.pre_process else (None, None)

        def on_device(x: Tensor) -> Tensor:
            return to_device(x, device)

        frequencies = on_device(text_frequencies(text))
        positions = on_device(pack.position_ids[:, tokens])
        return ModelInput(
            input_ids=on_device(pack.input_ids[tokens]).unsqueeze(0),
            rotation=mrope_rotation(
                positions, frequencies, text.mrope_section, text.rope_scaling.magnitude
            ),
            packed=self._packed(pack, share),
            padding_mask=on_device(pack.padding_mask[tokens][share.hidden]).unsqueeze(0),
            vision=vision,
            exchange=exchange,
            visual_rows=on_device(torch.from_numpy(share.visual_rows)),
            loss_tokens=loss_tokens,
            loss_rows=on_device(loss_rows),
            targets=on_device(pack.labels[loss_tokens]),
            target_weights=on_device(pack.loss_weights[loss_tokens]),
        )

    def _packed(self, pack: PackTensors, share: RankShare) -> PackedSeqParams:
        """Return the segments of a pack as Megatron-core passes them to attention, with our context added."""
        packed = PackedSeqParams(
            # Not "thd": Megatron-core's rotary embedding for it waits for the device.
            qkv_format="sbhd",
            cu_seqlens_q=pack.cu_seqlens,
            cu_seqlens_kv=pack.cu_seqlens,
            max_seqlen_q=pack.max_seqlen,
            max_seqlen_kv=pack.max_seqlen,
        )
        topology = self.topology
        packed.context = build_context(
            pack.cu_seqlens,
            share.split,
            topology.groups.cp,
            topology.config.context_exchange,
            topology.device,
        )
        return packed

    def _pictures(
        self, pack: PackTensors, share: RankShare
    ) -> tuple[VisionInput | None, FeatureExchange | None]:
        """Return this rank's pictures, and the exchange of features with the other encoder ranks; none for a pack of text."""
        # The tower then has no gradients to make, not even zeros.
        if not (len(pack.grid_thw) or torch.is_grad_enabled()):
            return None, None
        config = self.model_config.vision
        mine = pack.grid_thw[pack.encoder_ranks == self.topology.encoder_rank]
        patches, grids = (pack.patches, mine) if len(mine) else no_images(self.model_config)
        vision = VisionInput.build(patches, grids, config, self.topology.device)
        if not len(pack.grid_thw):
            return vision, None
        return vision, FeatureExchange.build(pack, share, self.topology, config.spatial_merge_size)

    def forward(self, inputs: ModelInput) -> Tensor | tuple[Tensor, Tensor]:
        """Run this chunk on a micro-batch.

        Returns:
            in the last chunk the weighted sum of the losses, an fp32 scalar, and all kinds of loss of each supervised token, the
            cross-entropy alone unless `row_loss` makes others, fp32 [n, R]; in others the rows for the next chunk, [t or more, 1, H].
        """
        hidden = self._decode(inputs)
        if not self.post_process:
            return hidden
        with in_part(LOSS):
            rows = self._whole(hidden)[inputs.loss_rows, 0]
            group = self.topology.groups.tp
            row_loss = inputs.row_loss(inputs.targets, inputs.target_weights, group)
            return linear_loss(rows, self.language_model.output_matrix(), row_loss)

    def supervised_states(self, inputs: ModelInput) -> Tensor:
        """Return the hidden states of the supervised tokens [R, H] in the last chunk, in others the rows for the next chunk."""
        hidden = self._decode(inputs)
        return self._whole(hidden)[inputs.loss_rows, 0] if self.post_process else hidden

    def logits(self, inputs: ModelInput, rows: Tensor | None = None) -> Tensor:
        """Return logits of this context rank's tokens, in the last chunk.

        Args:
            inputs: of `prepare`.
            rows: the tokens among its T / C, int64 [R]; None: all.

        Returns:
            this rank's vocabulary columns [R, V / tensor].
        """
        hidden = self._whole(self._decode(inputs))[:, 0]
        chosen = hidden if rows is None else hidden[rows]
        return F.linear(chosen, self.language_model.output_matrix())

    def _decode(self, inputs: ModelInput) -> Tensor:
        """Return hidden states [t, 1, H]; in a chunk before the last, followed by the DeepStack levels that later layers need."""
        hidden, levels = self._embed(inputs) if self.pre_process else self._unpack(inputs)
        parallel = self.topology.config
        with kept(
            cheap_again=parallel.recompute != "none", in_host_memory=parallel.offload_activations
        ):
            output: Tensor = self.language_model(
                hidden,
                inputs.rotation,
                inputs.packed,
                levels,
                inputs.visual_rows,
                inputs.padding_mask,
            )
        return output if self.post_process else self._repack(output, levels)

    def _embed(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        """Return embeddings [t, 1, H] with the visual features in place, and the DeepStack levels [m, K * H]; None for text."""
        if inputs.vision is None:
            return self.language_model.embedding(inputs.input_ids, None), None
        # In the order of the parameters, which is that of the buckets in which data ranks gather and reduce them.
        with kept(cheap_again=self.topology.config.recompute != "none", in_host_memory=False):
            features: Tensor = self.visual(inputs.vision)
        with in_part(LANGUAGE):
            hidden: Tensor = self.language_model.embedding(inputs.input_ids, None)
        if inputs.exchange is None:
            # Keeps the tower in the graph: its gradients are zeros in a pack of text, not missing.
            hidden = hidden + features.sum() * 0.0
            features = features[:0]
        else:
            features = inputs.exchange(features)
        # Of a pack of text no rows: where ranks divide weights, they all go through the same operations.
        main, levels = features.to(hidden.dtype).tensor_split([hidden.shape[-1]], dim=1)
        hidden = hidden.index_copy(0, inputs.visual_rows, main.unsqueeze(1))
        return hidden, levels if levels.shape[1] else None

    def _unpack(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        """Return the rows from the chunk before as hidden states [t, 1, H] and DeepStack levels [m, K * H]."""
        assert self.received is not None
        hidden, rest = self.received.tensor_split([inputs.padding_mask.shape[1]])
        if not len(rest):
            return self.received, None
        return hidden.contiguous(), rest.reshape(len(inputs.visual_rows), -1)

    def _repack(self, hidden: Tensor, levels: Tensor | None) -> Tensor:
        """Return hidden states [t, 1, H] and after them, as extra rows, the levels that this chunk's layers have not used."""
        size = hidden.shape[-1]
        used = self.language_model.layers * size
        if levels is None or levels.shape[1] <= used:
            return hidden
        # One tensor, because Megatron-core's schedules send one to the next stage.
        extra = levels[:, used:].reshape(-1, 1, size).to(hidden.dtype)
        return torch.cat([hidden, extra])

    def _whole(self, hidden: Tensor) -> Tensor:
        """Return all T / C rows of the final hidden states, with the gradient summed over the vocabulary's parts."""
        group = self.topology.groups.tp
        if self.topology.config.sequence_parallel:
            gathered: Tensor = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
            return gathered
        copied: Tensor = copy_to_tensor_model_parallel_region(hidden, group=group)
        return copied


def no_images(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return patches and grid of one blank image, the smallest there is: every rank takes part in every collective."""
    merge = config.vision.spatial_merge_size
    patches = torch.zeros(merge * merge, config.vision.patch_width, dtype=torch.uint8)
    return patches, torch.tensor([[1, merge, merge]])
