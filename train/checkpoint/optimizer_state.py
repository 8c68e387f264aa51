"""Master weights and moments in checkpoints: each rank writes and reads the slices that it updates, and nothing else.

Megatron-core's distributed optimizer flattens the parameters into buffers and gives each data-parallel rank a stretch of them,
which ends anywhere in a parameter. Here what a rank has of a parameter is a few rectangles of the full tensor, so that files
have no layout, no rank needs another's numbers, and its memory falls with the number of ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from torch import Tensor

from visionloom.train.checkpoint.rectangles import Rectangle, rectangles


@dataclass(frozen=True)
class ParameterPiece:
    """A part of a parameter on this rank that is one rectangle of the full tensor."""

    sharded: ShardedTensor
    begin: int
    """Its first number, in the flattened parameter."""

    @property
    def end(self) -> int:
        """Return the place after its last number in the flattened parameter."""
        return self.begin + int(self.sharded.data.numel())


def state_tensors(optimizer: Any, weights: dict[str, Any]) -> dict[str, ShardedTensor]:
    """Return this rank's master weights and moments as rectangles of full tensors, by names that no layout changes.

    Their data are views of the optimizer's own numbers: a save copies from them, a load writes into them.

    Megatron-core's own state of an optimizer also holds its parameter groups, which differ with the layout: without experts
    on ranks of their own there is one optimizer, with them there are two. All that a group knows is derived here: the
    learning rate from the schedule, and the number of updates from `updates`.

    Args:
        optimizer: of `build_optimizer`.
        weights: the model's sharded state, which names the parameters.
    """
    pieces = pieces_by_parameter(weights)
    tensors: dict[str, ShardedTensor] = {}
    for inner in _sharded_optimizers(optimizer):
        inner.optimizer.make_moments()  # a fresh one has none to read into or to save
        for parameter, begin in _owned(inner):
            # The master copy is `param`; the moments have torch's names.
            own = inner._get_main_param_and_optimizer_states(parameter)
            for kind, values in own.items():
                for part in _slices(pieces[parameter], kind, values.detach(), begin):
                    tensors[f"{part.key} at {part.global_offset}"] = part
    return tensors


def written_parts(optimizer: Any, weights: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Yield the parts of tensors that this rank could write to a checkpoint: others may have the same weights."""
    own = state_tensors(optimizer, weights).values()
    of_weights = [
        piece.sharded for pieces in pieces_by_parameter(weights).values() for piece in pieces
    ]
    for part in (*own, *of_weights):
        if is_main_replica((*part.replica_id[:2], 0)):
            yield part


def set_updates(optimizer: Any, done: int) -> None:
    """Set the count of updates, by which AdamW corrects its moments."""
    for inner in _sharded_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            group["step"] = done


def updates(optimizer: Any) -> int:
    """Count the updates that the optimizer has made: steps that were not skipped."""
    most = 0
    for inner in _sharded_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            most = max(most, int(group.get("step") or 0))
    return most


def pieces_by_parameter(weights: dict[str, Any]) -> dict[Any, list[ParameterPiece]]:
    """Return the rectangles of full tensors that each parameter is made of, in the parameter's order."""
    pieces: dict[Any, list[ParameterPiece]] = {}
    for each in nested_values(weights):
        if isinstance(each, ShardedTensor | ShardedTensorFactory):
            pieces[each.data] = _pieces_of(each)
    return pieces


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


def _sharded_optimizers(optimizer: Any) -> Iterator[Any]:
    """Yield Megatron's distributed optimizers that have parameters: a stage may train none."""
    for inner in optimizer.chained_optimizers:
        is_stub = getattr(inner, "is_stub_optimizer", False)
        if not is_stub and inner.optimizer.param_groups:
            yield inner


def _owned(inner: Any) -> Iterator[tuple[Any, int]]:
    """Yield the parameters that this rank updates a part of, and where the part begins in the flattened parameter."""
    for buffer in inner.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start


def _slices(
    pieces: list[ParameterPiece], kind: str, values: Tensor, begin: int
) -> Iterator[ShardedTensor]:
    """Yield a part of a flattened parameter as rectangles of full tensors.

    Args:
        pieces: of the parameter.
        kind: of the values, in the names of the full tensors.
        values: one number for each of the part, [n].
        begin: where the part begins in the flattened parameter.
    """
    end = begin + values.numel()
    for piece in pieces:
        first, last = max(begin, piece.begin), min(end, piece.end)
        shape = piece.sharded.local_shape
        for rectangle in rectangles(shape, first - piece.begin, last - piece.begin):
            # They come in the order of the numbers.
            count = math.prod(rectangle[1])
            yield _slice(piece.sharded, kind, rectangle, values[first - begin :][:count])
            first += count


def _slice(
    sharded: ShardedTensor, kind: str, rectangle: Rectangle, values: Tensor
) -> ShardedTensor:
    """Return a rectangle of a piece, and its `values` [n], with its place in the full tensor."""
    # The dims before the parameter's own: the layers.
    outer = sharded.prepend_axis_num
    offsets = (0,) * outer + rectangle[0]
    sizes = (1,) * outer + rectangle[1]
    places = zip(sharded.global_offset, offsets, strict=True)
    return replace(
        sharded,
        key=f"optimizer.state.{kind}.{sharded.key}",
        data=values.view(sizes),
        dtype=values.dtype,
        local_shape=sizes,
        global_offset=tuple(of_piece + inside for of_piece, inside in places),
        axis_fragmentations=None,  # the parts of a tensor form no grid
        # Data-parallel ranks have different numbers: none is a replica of another's.
        replica_id=(*sharded.replica_id[:2], 0),
        prepend_axis_num=0,
    )
