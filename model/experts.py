"""Mixture of experts: the router's choice of experts, their grouped matrices, and the load-balancing loss.

Source: Qwen3 technical report (arXiv 2505.09388) section 2, global-batch load balancing (arXiv 2501.11873); reference
implementation: transformers' Qwen3VLMoeTextSparseMoeBlock. How rows get to the experts and back is dispatch.py's.
Shapes: n tokens of this rank, E experts (e of them on this rank), k experts a token, H hidden size, F expert width (f here).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from visionloom.model.dispatch import Dispatch, ExpertGroups, Leaving, Travelling
from visionloom.model.kernels.activation import swiglu
from visionloom.model.kernels.linear import wide_linear
from visionloom.model.kernels.product import add_grouped_product_
from visionloom.model.kernels.routing import ENTROPY_UNIT, choose_experts, weigh_experts
from visionloom.parallel.topology import Topology


class Router(TopKRouter):  # type: ignore[misc]
    """Softmax over all experts in fp32, the k largest, renormalised; padding counts nowhere.

    The load-balancing loss of a layer is E * sum_i f_i P_i, 1 where the load is even. P_i is the mean probability of expert i
    over all real tokens of the global batch. f_i, its share of the assignments, has no gradient; it is that of the global batch
    before, so it is the same for every token, micro-batch and rank, whatever the layout (docs/decisions.md). In the first step
    of all it is zero.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: Any = None, is_mtp_layer: bool = False
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer)
        self.coefficient: float = config.balance_coefficient
        self.load: Tensor
        """fp32 [E]: share of each expert in the assignments of the last global batch."""
        self.tally: Tensor
        """int64 [E + 2]: assignments of each expert so far in this step, entropies of the router in ENTROPY_UNIT, tokens."""
        self.register_buffer("load", torch.zeros(config.num_moe_experts))
        self.register_buffer(
            "tally", torch.zeros(config.num_moe_experts + 2, dtype=torch.int64), persistent=False
        )

    def forward(
        self,
        hidden: Tensor,
        padding_mask: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return weights fp32 [n, k] and experts int32 [n, k] of each token.

        Args:
            hidden: [t, 1, H].
            padding_mask: bool [t, 1], True in padding; None: all tokens are real.
            experts: those of an earlier pass with the same tokens, which are then chosen again.
        """
        return self.routing(self.gating(hidden), padding_mask, experts)

    def gating(self, hidden: Tensor) -> Tensor:
        """Return the logits fp32 [t, 1, E] of hidden states [t, 1, H]."""
        return wide_linear(hidden, self.weight)

    def routing(
        self,
        logits: Tensor,
        padding_mask: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, from logits fp32 [t, 1, E]."""
        logits = logits.view(-1, self.config.num_moe_experts)
        if experts is None:
            experts = choose_experts(logits.detach(), self.topk)
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        # Recomputation runs the forward pass twice, the first time without gradient; evaluation has none at all.
        if not (self.training and torch.is_grad_enabled()):
            return weigh_experts(logits, experts, padding), experts
        balance = None
        if self.coefficient:
            balance = self.load, self.coefficient * self.config.num_moe_experts
        return weigh_experts(logits, experts, padding, self.tally, balance), experts


@dataclass(frozen=True)
class TokenPlan:
    """Where the tokens of one pass of a layer go; recomputation uses it again."""

    experts: Tensor
    """int32 [n, k]."""
    dispatches: tuple[Dispatch, ...]
    """Of each part of the tokens, in their order."""

    @classmethod
    def of(cls, experts: Tensor, groups: ExpertGroups, parts: int) -> "TokenPlan":
        """Plan the way of tokens in parts of about one size."""
        return cls(experts, tuple(Dispatch(part, groups) for part in experts.tensor_split(parts)))

    def cut(self, rows: Tensor) -> Sequence[Tensor]:
        """Cut rows [n, ...] into those of each part."""
        if len(self.dispatches) == 1:
            return [rows]
        return rows.split([len(dispatch.experts) for dispatch in self.dispatches])


class MixtureLayer(MoELayer):  # type: ignore[misc]
    """Router, dispatch and experts in place of a dense layer's feed-forward part.

    Where Megatron-core recomputes it (all recomputation but of norms and activations), the second pass takes the experts and the plan of the
    first: it chooses, sorts, counts and waits for nothing.
    """

    def __init__(self, config: TransformerConfig, **others: Any) -> None:
        super().__init__(config, **others)
        groups = others["pg_collection"]
        self.groups = ExpertGroups(config.num_moe_experts, groups.ep, groups.expt_tp, groups.tp_ep)
        # Megatron-core's own keeps each layer's graph until its next pass.
        self.token_dispatcher = None
        self._kept: deque[TokenPlan] = deque()
        """Those of micro-batches whose backward pass is to come, which has the same order."""
        # Nothing travels where all experts are here.
        self.parts: int = config.expert_parts if groups.ep.size() > 1 else 1

    def forward(
        self, hidden_states: Tensor, _: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Map hidden states [t, 1, H] to what is added to them; `padding_mask` bool [1, t] is True in padding."""
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1)
        if self.moe_layer_recompute and self.training:
            return checkpoint(self._mix, False, hidden_states, padding_mask), None
        return self._mix(hidden_states, padding_mask), None

    def _mix(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        again = is_checkpointing() and torch.is_grad_enabled()
        plan = self._kept.popleft() if again else None
        weights, experts = self.router(hidden, padding, experts=plan.experts if plan else None)
        if plan is None:
            plan = TokenPlan.of(experts, self.groups, self.parts)
            if is_checkpointing():
                self._kept.append(plan)

        tokens = zip(plan.cut(hidden.flatten(0, 1)), plan.cut(weights), strict=True)
        leaving = [way.leave(*part) for way, part in zip(plan.dispatches, tokens, strict=True)]
        # Taken between leaving and arriving, their gradients are made while those of rows travel back.
        matrices = self.experts.matrices() if self.groups.ranks.size() > 1 else (None, None)
        # While the experts work on a part, the next one's rows are on the way, and the results of the one before.
        coming = [
            self._by_experts(way, leaving.pop(0), matrices, read=not again)
            for way in plan.dispatches
        ]
        sums = [
            way.come_back(part, read=not again)
            for way, part in zip(plan.dispatches, coming, strict=True)
        ]
        mixed = torch.cat(sums) if len(sums) > 1 else sums[0]
        return mixed.view_as(hidden)

    def _by_experts(
        self,
        way: Dispatch,
        leaving: Leaving,
        matrices: tuple["Matrix | None", "Matrix | None"],
        read: bool,
    ) -> Travelling:
        """Let the experts work on a part of the tokens, and begin to send its results back."""
        rows, weights, ends = way.arrive(leaving)
        # Nothing in a layer after its experts needs their result to pass gradients back.
        results = self.experts(rows, weights, ends, matrices, read=read)
        return way.send_back(results, read)


def routers_of(chunks: Iterable[nn.Module]) -> list[Router]:
    """Return the routers of a model's chunks on this rank, in order of layers."""
    routers = []
    for chunk in chunks:
        routers += [module for module in chunk.modules() if isinstance(module, Router)]
    return routers


def update_router_loads(chunks: Iterable[nn.Module], topology: Topology) -> Tensor:
    """Make the loads of the finished step those of the next; all ranks of a mixture call it, and none waits for the device.

    Returns:
        health of this pipeline stage's routers, fp64 [4] on the device: the sum over its layers of the largest share of one
        expert (as a multiple of an even share), the sum of the mean entropies of the router's probabilities in nats, the
        layers, and the largest of these shares. Zeros on a stage without routers.
    """
    routers = routers_of(chunks)
    if not routers:
        return torch.zeros(4, dtype=torch.float64, device=topology.device)
    tallies = torch.stack([router.tally for router in routers])
    dist.all_reduce(tallies, group=topology.groups.tp_dp_cp)
    # The last two columns are not counts of an expert.
    assigned = tallies[:, :-2].double()
    shares = assigned / assigned.sum(1, keepdim=True).clamp_min(1.0)
    for router, share in zip(routers, shares, strict=True):
        router.load.copy_(share)
        router.tally.zero_()
    return router_health(shares, tallies)


def router_health(shares: Tensor, tallies: Tensor) -> Tensor:
    """Return what `update_router_loads` does, from the shares [layers, E] and the tallies [layers, E + 2]."""
    tallies = tallies.double()
    entropy, tokens = tallies[:, -2] * ENTROPY_UNIT, tallies[:, -1]
    largest = shares.amax(1) * shares.shape[1]
    entropies = (entropy / tokens.clamp_min(1.0)).sum()
    layers = torch.full_like(entropies, len(shares))
    return torch.stack([largest.sum(), entropies, layers, largest.amax()])


class Stack(nn.Module):
    """One matrix of all experts of this rank, cut over the expert-tensor ranks along dim 2."""

    def __init__(self, shape: tuple[int, ...], config: TransformerConfig) -> None:
        super().__init__()
        parameter: Any = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
        self.weight = parameter
        parameter.partition_dim = 2
        parameter.partition_stride = 1
        # Every rank's experts count in the gradient norm.
        parameter.tensor_model_parallel = True
        # False: reduced over the expert-data-parallel ranks, not over all that hold the dense parameters.
        parameter.allreduce = (
            config.expert_model_parallel_size == 1
            and config.expert_tensor_parallel_size == config.tensor_model_parallel_size
        )

    def matrix(self) -> "Matrix":
        """Return the matrices, of which the gradient is made when autograd comes to this place.

        They are read by `forward` alone: gathered weights are there only when it is called.
        """
        return Matrix.taken(self.weight)

    def forward(
        self, tokens: Tensor, ends: Tensor, matrix: "Matrix | None" = None, read: bool = True
    ) -> Tensor:
        """Map tokens [m, in] sorted by expert to [m, out].

        Args:
            tokens: of all experts.
            ends: int32 [e], where those of each end.
            matrix: of `matrix`; None: the gradient is made at once.
            read: the result has content; else only gradients pass.
        """
        return grouped_linear(tokens, matrix or Matrix.of(self.weight), ends, read)


class GroupedExperts(MegatronModule):  # type: ignore[misc]
    """All experts of this rank as two stacked matrices, multiplied group by group.

    Each expert is down(silu(gate x) * up x). Expert tensor parallelism cuts F; the way back to the tokens sums the parts.
    """

    def __init__(
        self,
        experts: int,
        config: TransformerConfig,
        *,
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.groups = pg_collection
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        # Gate and up in a dim of their own, so that a cut of F is one contiguous part of both.
        self.linear_fc1 = Stack((experts, 2, width, config.hidden_size), config)
        self.linear_fc2 = Stack((experts, config.hidden_size, width), config)

    def matrices(self) -> tuple["Matrix", "Matrix"]:
        """Return both stacks, of which the gradients are made when autograd comes to this place."""
        return self.linear_fc1.matrix(), self.linear_fc2.matrix()

    def forward(
        self,
        rows: Tensor,
        weights: Tensor,
        ends: Tensor,
        matrices: tuple["Matrix | None", "Matrix | None"] = (None, None),
        read: bool = True,
    ) -> Tensor:
        """Map rows [m, H] sorted by expert to [m, H].

        Args:
            rows: of the tokens of each expert.
            weights: the router's, fp32 [m].
            ends: where each expert's rows end, int32 [e].
            matrices: of `matrices`; None: their gradients are made at once.
            read: the result has content; else only gradients pass.
        """
        first, second = matrices
        # The weights go in before the second product: the sum over a token's experts is then plain.
        inner = swiglu(self.linear_fc1(rows, ends, first), weights)
        output: Tensor = self.linear_fc2(inner, ends, second, read)
        return output

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the experts as one tensor [E, ...] a matrix, cut over expert and expert-tensor ranks."""
        state = {}
        for key, weight in self.state_dict(keep_vars=True).items():
            state[prefix + key] = self._sharded(prefix + key, weight, sharded_offsets)
        return state

    def _sharded(self, name: str, weight: Any, outer: tuple[Any, ...]) -> ShardedTensor:
        """Return this rank's part of a stacked matrix; `outer` are the offsets of the layers around it."""
        experts, tensor = self.groups.ep, self.groups.expt_tp
        before = len(outer)
        offsets = [*outer, (before, experts.rank(), experts.size())]
        replica = tensor.rank()
        # One factor of an adapter has no such dim (-1): every expert-tensor rank holds a replica.
        if weight.partition_dim >= 0:
            offsets.append((before + weight.partition_dim, tensor.rank(), tensor.size()))
            replica = 0
        return ShardedTensor.from_rank_offsets(
            name,
            weight,
            *offsets,
            replica_id=(0, replica, self.groups.expt_dp.rank()),
            prepend_axis_num=before,
        )


@dataclass
class WeightGradient:
    """The gradient of a stack's matrices in one pass of a layer: a sum of products that are still to be made."""

    parameter: Any = None
    """Of which the matrices are; None: of one that has no `main_grad`."""
    late: bool = False
    """It is made when autograd comes to where the matrices were taken, and not at once."""
    products: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Gradients of the results, tokens, and ends of the groups, by the backward passes of the products."""

    def make(self) -> Tensor:
        """Return the sum [e, out, in]; without content where it is in `main_grad` of Megatron-core's DDP already."""
        total = getattr(self.parameter, "main_grad", None)
        if total is None:
            return self._sum()
        add_grouped_product_(total.flatten(1, -2), self.products)
        self.products.clear()
        # DDP's hook reads this, and runs only for a gradient that is there.
        self.parameter.grad_added_to_main_grad = True
        return torch.empty_like(self.parameter).flatten(1, -2)

    def _sum(self) -> Tensor:
        summed = None
        while self.products:
            rows, columns, ends = self.products.pop(0)
            product = F.grouped_mm(rows.t(), columns, offs=ends)
            summed = product if summed is None else summed.add_(product)
        assert summed is not None
        return summed


class _Taken(torch.autograd.Function):
    """The matrix itself. Autograd visits what was done later first: what was done after this is under way when the gradient is made."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, gradient: WeightGradient) -> Tensor:
        ctx.gradient = gradient
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient.make(), None


@dataclass(frozen=True)
class Matrix:
    """The matrices of a stack in one pass of a layer."""

    weights: Tensor
    """[e, out, in]."""
    gradient: WeightGradient = field(default_factory=WeightGradient)

    @classmethod
    def of(cls, parameter: Tensor) -> "Matrix":
        """Return the matrices of a parameter [e, ..., in], of which the gradient is made at once."""
        return cls(parameter.flatten(1, -2), WeightGradient(parameter))

    @classmethod
    def taken(cls, parameter: Tensor) -> "Matrix":
        """Return matrices of which the gradient is made when autograd comes to this place."""
        if not (parameter.requires_grad and torch.is_grad_enabled()):
            return cls.of(parameter)
        gradient = WeightGradient(parameter, late=True)
        return cls(_Taken.apply(parameter.flatten(1, -2), gradient), gradient)


def grouped_linear(tokens: Tensor, matrix: Matrix, ends: Tensor, read: bool = True) -> Tensor:
    """Multiply each group of rows with its own matrix: [m, in] by [e, out, in] -> [m, out].

    Args:
        tokens: rows sorted by group.
        matrix: a matrix a group.
        ends: int32 [e], where each group ends.
        read: the result has content; else only gradients pass.
    """
    product: Tensor = _GroupedLinear.apply(tokens, matrix.weights, ends, matrix.gradient, read)
    return product


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, ends: Tensor, *options: Any) -> Tensor:
        ctx.gradient, read = options
        # Matrices that do not train take part in the gradient of rows alone.
        ctx.save_for_backward(tokens if ctx.needs_input_grad[1] else None, weights, ends)
        if not read:
            return tokens.new_empty((len(tokens), weights.shape[1]))
        return F.grouped_mm(tokens, weights.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (tokens, weights, ends) = gradients, ctx.saved_tensors
        by_tokens = by_weights = None
        if ctx.needs_input_grad[0]:
            by_tokens = F.grouped_mm(gradient, weights, offs=ends)
        if ctx.needs_input_grad[1]:
            is_first = not ctx.gradient.products
            ctx.gradient.products.append((gradient, tokens, ends))
            if not ctx.gradient.late:
                by_weights = ctx.gradient.make()
            elif is_first:
                # Autograd wants a tensor of this shape to go on, which takes no memory; the sum of two would.
                by_weights = gradient.new_empty(()).expand_as(weights)
        return by_tokens, by_weights, None, None, None
