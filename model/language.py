"""The language model on Megatron-core's TransformerBlock, with a place for DeepStack features.

Neither GPTModel (deprecated in Megatron-core 0.19) nor HybridModel (no MRoPE, no DeepStack) fits; what they add to
TransformerBlock is an embedding and an output layer. Parameter names are GPTModel's, so its tools keep working.
A pipeline stage (or a virtual part of one) is a chunk of the same class with the layers that its place in the layout gives it.
Shapes: t tokens of this rank, m visual tokens among them, H hidden size, K DeepStack levels that layers from here on still need.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from visionloom.model.attention import PackedAttention
from visionloom.model.config import ModelConfig, TextConfig
from visionloom.model.experts import GroupedExperts, MixtureLayer, Router
from visionloom.model.kernels.activation import swiglu
from visionloom.model.kernels.attention import AttentionResults
from visionloom.model.kernels.norm import branch_rms_norm, rms_norm
from visionloom.model.kernels.rotary import rotate_heads
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.parts import LANGUAGE, in_part
from visionloom.parallel.pipeline import layers_per_chunk, layout_of


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype
) -> TransformerConfig:
    """Return Megatron-core's configuration of the language model in this layout; weights are drawn elsewhere, by name."""
    text = model.text
    config = TransformerConfig(
        num_layers=text.layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.ffn_hidden_size,
        num_attention_heads=text.heads,
        num_query_groups=text.kv_heads,
        kv_channels=text.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=text.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        mrope_section=list(text.mrope_section),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are drawn by name in sharding.py, the same in every layout.
        use_cpu_initialization=True,
        perform_initialization=False,
        # One sum over all tokens of the global batch, divided once: the only form that packing cannot change.
        calculate_per_token_loss=True,
        # Megatron-core's default refuses packs of varying length, also in dense models.
        moe_token_dispatcher_type="alltoall",
        # These fusions need Apex, TransformerEngine or torch.compile; model/kernels/ has our own.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **_layout_settings(model, parallel),
        **_expert_settings(text),
        **_recompute_settings(parallel, text.experts),
    )
    config.balance_coefficient = text.balance_coefficient
    config.expert_parts = parallel.expert_parts
    config.keep_attention = parallel.recompute == "all_but_attention"
    return config


def _layout_settings(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Return the degrees of the axes in Megatron-core's words."""
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor or 1,
        "sequence_parallel": parallel.sequence_parallel,
    }
    if parallel.pipeline == 1:
        return settings
    layers = layers_per_chunk(parallel, model.text.layers)
    levels = len(model.vision.deepstack_layers)
    return settings | {
        "pipeline_model_parallel_layout": layout_of(parallel, model.text.layers),
        # DeepStack levels that the first chunk has no layer for travel after the hidden states: lengths differ by pack.
        "variable_seq_lengths": layers[0] < levels,
        # Interleaved stages send and receive one by one: with two stages, batched messages of gloo would not match.
        "batch_p2p_comm": False,
        "overlap_p2p_comm": parallel.chunks > 1,
        "deallocate_pipeline_outputs": True,
    }


def _expert_settings(text: TextConfig) -> dict[str, Any]:
    """Return a mixture of experts in Megatron-core's words; routing and balance are experts.py's own."""
    if not text.experts:
        return {}
    return {
        "num_moe_experts": text.experts,
        "moe_router_topk": text.experts_per_token,
        # Megatron-core refuses one expert a token otherwise; the softmax is experts.py's own, whose only weight is then 1.
        "moe_router_pre_softmax": text.experts_per_token == 1,
        "moe_ffn_hidden_size": text.expert_ffn_hidden_size,
        "moe_router_dtype": "fp32",
        # The balance loss too is experts.py's own.
        "moe_router_load_balancing_type": "none",
    }


def _recompute_settings(parallel: ParallelConfig, experts: int) -> dict[str, Any]:
    """Return parallel.recompute in Megatron-core's words; norms and activations are kept.py's business."""
    if parallel.recompute_layers:
        return {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": parallel.recompute_layers,
        }
    if parallel.recompute in ("all_but_attention", "full"):
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if parallel.recompute == "mlp":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": ["moe" if experts else "mlp"],
        }
    return {}


class RMSNorm(nn.Module):
    """RMSNorm that tells Megatron-core when its gradient is partial under sequence parallelism.

    Megatron-core's own torch norm refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size] over its last dim, in the input's dtype."""
        return rms_norm(x, self.weight, self.eps)


class BranchRMSNorm(RMSNorm):
    """RMSNorm that also hands back its input, Megatron-core's form for a norm that adds up both gradients of the residual."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the normalised [..., hidden_size], and the input, with which the residual goes on."""
        return branch_rms_norm(x, self.weight, self.eps)


class HeadRMSNorm(RMSNorm):
    """The weight of a norm that `RotaryAttention` computes together with the rotation."""

    def forward(self) -> Tensor:  # type: ignore[override]
        """Return the weight [D]; a call of this module is what parameter gathering waits for."""
        return self.weight


class RotaryAttention(SelfAttention):  # type: ignore[misc]
    """Megatron-core's self-attention with one kernel between its first linear layer and attention.

    Megatron-core's own way copies the queries out of the joined tensor, normalises queries and keys, and turns both by some ten
    small kernels; the rest of its forward pass serves inference.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.results = AttentionResults()

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Map [t, 1, H] to [t, 1, H]; `rotary_pos_emb` is the rotation of rope.py, fp32 [t, D]."""
        joined, _ = self.linear_qkv(hidden)
        # A tensor degree that does not divide the key/value heads is refused before (model/config.py).
        shape = (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
        parts = rotate_heads(
            joined.squeeze(1).unflatten(-1, shape),
            arguments["rotary_pos_emb"],
            keys=1,
            weights=(self.q_layernorm(), self.k_layernorm()),
            epsilon=self.config.layernorm_epsilon,
        )
        query, key, value = (part.unsqueeze(1) for part in parts)

        attend = self.core_attention
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        with self._pass():
            attended = attend(
                query, key, value, attention_mask, packed_seq_params=arguments["packed_seq_params"]
            )
        output: tuple[Tensor, Tensor | None] = self.linear_proj(attended)
        return output

    def _pass(self) -> AbstractContextManager[None]:
        """Return the context of this pass: of a recomputed layer the first is without gradient."""
        if not (self.config.keep_attention and is_checkpointing()):
            return nullcontext()
        if torch.is_grad_enabled():
            return self.results.second_pass()
        return self.results.first_pass()


class SwiGLU(MLP):  # type: ignore[misc]
    """Megatron-core's dense MLP with its activation in one kernel."""

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """Map [t, 1, H] to [t, 1, H], and no bias."""
        gate_up, _ = self.linear_fc1(hidden)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(swiglu(gate_up))
        return output


class DeepstackLayer(TransformerLayer):  # type: ignore[misc]
    """A decoder layer that adds its level of the visual features to the rows of the visual tokens.

    The features travel as `context` [m, K * H], this layer's level first, and the rows as `context_mask` int64 [m]:
    TransformerBlock already hands both through recomputation with exact gradients, which a captured tensor would not survive.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return hidden states [t, 1, H] after this layer, and the levels that later layers still need.

        Arguments are Megatron-core's; it passes `context` of one layer's result on to the next.
        """
        features = kwargs.get("context")
        hidden, _ = super().forward(*args, **kwargs)
        if features is None:
            return hidden, None
        own, rest = features.tensor_split([hidden.shape[-1]], dim=1)
        added = own.unsqueeze(1).to(hidden.dtype)
        hidden = hidden.index_add(0, kwargs["context_mask"], added)
        return hidden, rest if rest.shape[1] else None


def layer_spec(experts: int) -> Any:
    """Return Megatron-core's spec of one decoder layer with our kernels; `experts` 0: a dense one."""
    spec = get_gpt_layer_local_spec(
        num_experts=experts or None, qk_layernorm=True, normalization="RMSNorm"
    )
    spec.module = DeepstackLayer
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = BranchRMSNorm
    layer.self_attention.module = RotaryAttention
    attention = layer.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = HeadRMSNorm
    attention.core_attention = PackedAttention
    if experts:
        submodules = MoESubmodules(experts=GroupedExperts, router=Router)
        layer.mlp = partial(MixtureLayer, submodules=submodules)
    else:
        layer.mlp = partial(SwiGLU.as_mlp_submodule, **layer.mlp.keywords)
    return spec


class OutputMatrix(ColumnParallelLinear):  # type: ignore[misc]
    """The output layer as its matrix, with which the loss makes logits in blocks of rows."""

    def forward(self, shared: Tensor | None) -> Tensor:
        """Return this rank's rows [V / tensor, H], `shared` or its own; a call of this module is what parameter gathering waits for."""
        return self.weight if shared is None else shared


class LanguageModel(LanguageModule):  # type: ignore[misc]
    """Embedding, decoder layers and output layer, or the part of them that a pipeline chunk holds."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        groups: Any,
        first: bool,
        last: bool,
        chunk: int | None,
    ) -> None:
        """Build one chunk; weights are not drawn.

        Args:
            config: of `transformer_config`.
            model: the whole model.
            groups: Megatron-core's ProcessGroupCollection.
            first: the chunk begins the model and has the embedding.
            last: the chunk ends the model and has the output layer.
            chunk: its number on this stage; None where a stage has one.
        """
        super().__init__(config, groups)
        text = model.text
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = first, last, chunk
        self.share_embeddings_and_output_weights = text.tie_embeddings
        if first:
            self.embedding = LanguageModelEmbedding(
                config,
                text.vocab_size,
                text.max_positions,
                position_embedding_type="none",
                scatter_to_sequence_parallel=True,
                tp_group=groups.tp,
            )
        layers = get_num_layers_to_build(config, chunk, groups.pp.rank())
        block = TransformerBlockSubmodules(
            layer_specs=[layer_spec(text.experts)] * layers, layer_norm=RMSNorm
        )
        self.decoder = TransformerBlock(
            config,
            block,
            pre_process=first,
            post_process=last,
            pg_collection=groups,
            vp_stage=chunk,
        )
        if last:
            self.output_layer = OutputMatrix(
                text.hidden_size,
                text.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                # The embedding's own matrix if it is here; else a copy, which the setup below keeps equal.
                skip_weight_param_allocation=first and text.tie_embeddings,
                tp_group=groups.tp,
            )
        if first or last:
            self.setup_embeddings_and_output_layer()

    def output_matrix(self) -> Tensor:
        """Return this rank's rows of the output matrix [V / tensor, H]: its own, or the embedding's where that is here too."""
        shares = self.share_embeddings_and_output_weights and self.pre_process
        shared = self.embedding.word_embeddings.weight if shares else None
        matrix: Tensor = self.output_layer(shared)
        return matrix

    @property
    def layers(self) -> int:
        """Return the number of decoder layers of this chunk."""
        return len(self.decoder.layers)

    @in_part(LANGUAGE)
    def forward(
        self,
        hidden: Tensor,
        rotation: Tensor,
        packed: Any,
        features: Tensor | None,
        rows: Tensor | None,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """Return hidden states [t, 1, H] after this chunk's layers, final ones in the last chunk.

        Args:
            hidden: token and visual embeddings, or the hidden states of the chunk before, [t, 1, H].
            rotation: of this context rank's tokens, fp32 [T / C, D].
            packed: PackedSeqParams with `context`.
            features: DeepStack levels of this rank's visual tokens [m, K * H], the first layer's first.
            rows: their rows among the t tokens, int64 [m].
            padding_mask: bool [1, t], True in padding; only a mixture of experts needs it.
        """
        # After the first chunk TransformerBlock ignores its argument and takes this one.
        if not self.pre_process:
            self.decoder.set_input_tensor(hidden)
        output: Tensor = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=rotation,
            packed_seq_params=packed,
            context=features,
            context_mask=rows,
            padding_mask=padding_mask,
        )
        return output
