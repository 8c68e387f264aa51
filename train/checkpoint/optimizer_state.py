"""What each rank alone holds in checkpoints, above all master weights and moments: it writes and reads these slices and nothing else.

Engines flatten the parameters into buffers and give each data-parallel rank a stretch of them, which ends anywhere in a
parameter. Here what a rank has of a parameter is a few rectangles of the full tensor, so that files have no layout, no rank
needs another's numbers, and its memory falls with the number of ranks.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch import Tensor

from visionloom.train.checkpoint.rectangles import Rectangle, rectangles
from visionloom.train.checkpoint.weights_state import ParameterPiece, Weights, pieces_by_parameter
from visionloom.train.engines.engine import WEIGHT, Engine, Owned


def own_tensors(owned: Iterable[Owned], weights: Weights) -> dict[str, ShardedTensor]:
    """Return what this rank alone holds as rectangles of full tensors, by names that no layout changes.

    Their data are views of what is owned: a save copies from them, a load writes into them.
    """
    tensors: dict[str, ShardedTensor] = {}
    for each in owned:
        pieces = weights.pieces[each.parameter]
        for kind, values in each.values.items():
            for part in _slices(pieces, kind, values, each.begin):
                tensors[f"{part.key} at {part.global_offset}"] = part
    return tensors


def written_parts(engine: Engine) -> Iterator[ShardedTensor]:
    """Yield the parts of tensors that this rank could write to a checkpoint: others may have the same weights."""
    weights = engine.weights()
    own = own_tensors(engine.owned(), weights).values()
    shared = pieces_by_parameter(weights.shared).values()
    for part in (*own, *(piece.sharded for pieces in shared for piece in pieces)):
        if is_main_replica((*part.replica_id[:2], 0)):
            yield part


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
        key=sharded.key if kind == WEIGHT else f"optimizer.state.{kind}.{sharded.key}",
        data=values.view(sizes),
        dtype=values.dtype,
        local_shape=sizes,
        global_offset=tuple(of_piece + inside for of_piece, inside in places),
        axis_fragmentations=None,  # the parts of a tensor form no grid
        # Data-parallel ranks have different numbers: none is a replica of another's.
        replica_id=(*sharded.replica_id[:2], 0),
        prepend_axis_num=0,
    )
