"""The language model on Megatron-core's TransformerBlock, with a place for DeepStack features.

Neither GPTModel (deprecated in Megatron-core 0.19) nor HybridModel (no MRoPE, no DeepStack) fits; what they add to
TransformerBlock is an embedding and an output layer. Parameter names are GPTModel's, so its tools keep working.
Shapes: T tokens (t of them on this rank under sequence parallelism), H hidden size, K DeepStack levels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from visionloom.model.attention import PackedAttention
from visionloom.model.config import ModelConfig
from visionloom.parallel.config import ParallelConfig


def transformer_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron-core's configuration of the language model in this layout; weights are drawn elsewhere, by name."""
    text = model.text
    return TransformerConfig(
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
        # Weights are drawn by name in initialize.py, the same in every layout.
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor or 1,
        sequence_parallel=parallel.sequence_parallel,
        # One sum over all tokens of the global batch, divided once: the only form that packing cannot change.
        calculate_per_token_loss=True,
        # These fusions need Apex, TransformerEngine or torch.compile.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )


class RMSNorm(nn.Module):
    """RMSNorm that tells Megatron-core when its gradient is partial under sequence parallelism.

    Megatron-core's own torch norm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DeepstackLayer(TransformerLayer):  # type: ignore[misc]
    """A decoder layer that adds its level of the visual features to the rows of the visual tokens.

    The features travel as `context` [m, K * H] and the rows as `context_mask` int64 [m]: TransformerBlock already hands
    both through recomputation and pipelines with exact gradients, which a captured tensor would not survive.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Hidden states [t, 1, H] after this layer, and the features if a later layer still needs them."""
        features = kwargs.get("context")
        hidden, _ = super().forward(*args, **kwargs)
        if features is None:
            return hidden, None
        size = hidden.shape[-1]
        level = self.layer_number - 1
        own = features[:, level * size : (level + 1) * size].unsqueeze(1).to(hidden.dtype)
        hidden = hidden.index_add(0, kwargs["context_mask"], own)
        return hidden, features if (level + 1) * size < features.shape[1] else None


def layer_spec() -> Any:
    """The spec of one decoder layer with torch kernels."""
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    spec.module = DeepstackLayer
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    return spec


class LanguageModel(LanguageModule):  # type: ignore[misc]
    """Embedding, decoder layers and output layer."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: Any) -> None:
        super().__init__(config, groups)
        text = model.text
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = self.post_process = True
        self.vp_stage = None
        self.share_embeddings_and_output_weights = text.tie_embeddings
        self.embedding = LanguageModelEmbedding(
            config,
            text.vocab_size,
            text.max_positions,
            position_embedding_type="none",
            scatter_to_sequence_parallel=True,
            tp_group=groups.tp,
        )
        block = TransformerBlockSubmodules(layer_specs=[layer_spec()] * text.layers, layer_norm=RMSNorm)
        self.decoder = TransformerBlock(config, block, pre_process=True, post_process=True, pg_collection=groups)
        self.output_layer = ColumnParallelLinear(
            text.hidden_size,
            text.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=text.tie_embeddings,
            tp_group=groups.tp,
        )
        self.setup_embeddings_and_output_layer()

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the output matrix [V / tensor, H]: its own or the embedding's."""
        weight: Tensor = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        )
        return weight

    def set_input_tensor(self, tensor: Any) -> None:
        """Receive the hidden states of an earlier pipeline stage."""
        self.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, hidden: Tensor, angles: Tensor, packed: Any, features: Tensor | None, rows: Tensor | None) -> Tensor:
        """Embeddings [t, 1, H] to final hidden states [t, 1, H].

        Args:
            hidden: token and visual embeddings.
            angles: rotary angles of all T tokens, fp32 [T, 1, 1, D].
            packed: PackedSeqParams with `segments`.
            features: DeepStack features of this rank's visual tokens [m, K * H].
            rows: their rows among the t tokens, int64 [m].
        """
        output: Tensor = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=angles,
            packed_seq_params=packed,
            context=features,
            context_mask=rows,
        )
        return output
