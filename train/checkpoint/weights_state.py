"""The weights of a model as Megatron-core's checkpoints take them."""

import math
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.divided import is_divided, with_shapes
from visionloom.parallel.topology import Topology


@dataclass(frozen=True)
class ParameterPiece:
    """A part of a parameter on this rank that is one rectangle of the full tensor."""

    sharded: ShardedTensor
    begin: int
    """Its first number, in the flattened parameter."""

    @property
    def end(self) -> int:
        """Return the place after its last number in the flattened parameter."""
        return self.begin + math.prod(self.sharded.local_shape)


@dataclass(frozen=True)
class Weights:
    """The weights of a model on this rank, for a checkpoint."""

    shared: dict[str, Any]
    """What other ranks may have too, as Megatron-core's checkpoints take it: all but parameters that are divided among ranks."""
    pieces: dict[Any, list[ParameterPiece]]
    """Rectangles of full tensors that each parameter is made of, in the parameter's order."""

    @classmethod
    def of(cls, parts: list[Qwen3VL], topology: Topology) -> "Weights":
        """Return those of a model: what is divided is not shared, and named all the same."""
        with with_shapes(each for part in parts for each in part.parameters()):
            state = weights_state(parts, topology)
            whole = cls(state, pieces_by_parameter(state))
        shared = {
            part: {name: each for name, each in state.items() if not is_divided(each.data)}
            for part, state in whole.shared.items()
        }
        return cls(shared, {each: _places(each, whole.pieces[each]) for each in whole.pieces})


def named_parts(parts: list[Qwen3VL]) -> dict[str, Qwen3VL]:
    """Return the parts by the key of their weights in this rank's state; names on disk lack it."""
    if len(parts) == 1:
        return {"model": parts[0]}
    return {f"model{number}": part for number, part in enumerate(parts)}


def weights_state(parts: list[Qwen3VL], topology: Topology) -> dict[str, Any]:
    """Return the model's weights for Megatron-core's checkpoints; of a model with adapters, what can train alone.

    Adapters may be in some layers only, so theirs are not stacked over the layers as those of weights are.
    """
    lora = parts[0].lora
    metadata = layout_metadata(topology) | {"non_homogeneous_layers": lora is not None}
    states = {}
    for key, part in named_parts(parts).items():
        state = part.sharded_state_dict(metadata=metadata)
        if lora is not None:
            # Routers are frozen, but still count their loads.
            kept = [name for name in state if lora.trains(name) or name.endswith(".router.load")]
            state = {name: state[name] for name in kept}
        states[key] = state
    return states


def layout_metadata(topology: Topology | None) -> dict[str, Any]:
    """Return Megatron-core's description of an optimizer's layout: one full tensor a parameter, which any layout can read.

    Args:
        topology: whose ranks read or write; None: for the file, which names no ranks.
    """
    metadata: dict[str, Any] = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
    }
    if topology is not None:
        metadata["dp_cp_group"] = topology.groups.dp_cp
    return metadata


def pieces_by_parameter(weights: dict[str, Any]) -> dict[Any, list[ParameterPiece]]:
    """Return the rectangles of full tensors that each parameter is made of, in the parameter's order."""
    pieces: dict[Any, list[ParameterPiece]] = {}
    for each in nested_values(weights):
        if isinstance(each, ShardedTensor | ShardedTensorFactory):
            pieces[each.data] = _pieces_of(each)
    return pieces


def _places(parameter: Any, pieces: list[ParameterPiece]) -> list[ParameterPiece]:
    """Return where the pieces of a parameter are; of a divided one without numbers, which it had for its shape only."""
    if not is_divided(parameter):
        return pieces
    return [replace(piece, sharded=replace(piece.sharded, data=None)) for piece in pieces]


def _pieces_of(sharded: ShardedTensor | ShardedTensorFactory) -> list[ParameterPiece]:
    """Return the pieces of one parameter: one, or two where gate and up are in one matrix."""
    parameter = sharded.data
    boxes = [sharded]
    if isinstance(sharded, ShardedTensorFactory):
        boxes = list(nested_values({"boxes": sharded.build()}))
    pieces = []
    end = 0
    for box in boxes:
        # Pieces are views in the parameter's order: a flat range of one is a flat range of the other.
        begin = box.data.storage_offset() - parameter.storage_offset()
        assert begin == end and box.data.is_contiguous(), box.key
        pieces.append(ParameterPiece(box, begin))
        end = pieces[-1].end
    assert end == parameter.numel(), sharded.key
    return pieces
