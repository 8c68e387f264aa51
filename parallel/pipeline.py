"""Divide decoder layers over pipeline stages: the layout string, its checks, and a layout where none is given.

A layout names the parts of each stage, in order: `E` the vision tower and the embedding, `t` a decoder layer, `L` the final norm
and the loss; `|` begins the next stage, `t*3` is `ttt` and `(tt|)*3` is `tt|tt|tt|`, as Megatron-core writes it. With virtual
stages (interleaved 1F1B) it names pipeline x virtual_pipeline chunks, the first `pipeline` of them on the stages in turn, then
the second, and so on. Nothing here imports torch.
"""

import functools
import re
from collections.abc import Sequence

from visionloom.parallel.config import ParallelConfig

REPEATED = (
    re.compile(r"\(([EtL|*\d]+)\)\*(\d{1,3})(?!\d)"),
    re.compile(r"([EtL])\*(\d{1,3})(?!\d)"),
)
"""A group of parts, which is written out first, or a part, and how often it stands there."""


def layers_per_chunk(parallel: ParallelConfig, layers: int) -> list[int]:
    """Return the number of decoder layers of each chunk, in the order that a token passes them.

    `pipeline_problems` must be empty.
    """
    return [chunk.count("t") for chunk in layout_of(parallel, layers).split("|")]


def layout_of(parallel: ParallelConfig, layers: int) -> str:
    """Return the layout as it is used: the given one without abbreviations, or an even one."""
    if parallel.pipeline_layout is not None:
        return _spelled_out(parallel.pipeline_layout)
    # Only whole layers can be dealt; pipeline_problems has refused what does not divide.
    chunks = parallel.pipeline * parallel.chunks
    each = "t" * (layers // chunks)
    return f"E{'|'.join([each] * chunks)}L"


@functools.cache  # a search asks thousands of times for the same few
def _spelled_out(layout: str) -> str:
    """Return a given layout without spaces, commas and abbreviations."""
    short = layout.replace(" ", "").replace(",", "")
    for pattern in REPEATED:
        short = pattern.sub(lambda match: match[1] * int(match[2]), short)
    return short


def pipeline_problems(parallel: ParallelConfig, layers: int, here: str = "parallel") -> list[str]:
    """Return what makes the pipeline impossible for a model of `layers` decoder layers: a line a fault, empty if none.

    Args:
        parallel: a layout whose values are within their bounds.
        layers: decoder layers of the model.
        here: dotted path of the layout.
    """
    chunks = parallel.pipeline * parallel.chunks
    product = f"pipeline {parallel.pipeline}"
    if parallel.chunks > 1:
        product += f" x virtual_pipeline {parallel.chunks}"
    even = suggestion(layers, chunks)
    if parallel.pipeline_layout is not None:
        return _layout_problems(parallel, layers, product, here)
    if layers % chunks == 0:
        return []
    return [
        f"{layers} layers cannot be cut evenly into {product} = {chunks} chunks:"
        f" give {here}.pipeline_layout='{even}' or change {here}.pipeline"
    ]


def _layout_problems(
    parallel: ParallelConfig,
    layers: int,
    product: str,
    here: str,
) -> list[str]:
    """Return what is wrong with a layout that the user gave; `product` names the degrees it must fit."""
    chunks = parallel.pipeline * parallel.chunks
    even = suggestion(layers, chunks)
    layout = layout_of(parallel, layers)
    given = f"{here}.pipeline_layout={parallel.pipeline_layout}"
    if not re.fullmatch(r"[EtL|]+", layout):
        return [f"{given} may hold E, t, L, |, t*3 and (t*3|)*2 only, for example '{even}'"]

    lines = []
    # All faults at once, so that one correction is enough.
    named = layout.count("|") + 1
    if named != chunks:
        lines.append(f"{given} names {named} chunks, {product} needs {chunks}")
    held = layout.count("t")
    if held != layers:
        lines.append(f"{given} holds {held} layers, the model has {layers}")
    ends = layout.replace("t", "").replace("|", "")
    if ends != "EL" or not layout.startswith("E") or not layout.endswith("L"):
        lines.append(f"{given} must begin with its only E and end with its only L")
    return lines


@functools.cache
def suggestion(layers: int, chunks: int) -> str:
    """Return a layout that gives the first chunk (vision tower) and the last (loss) the fewest layers."""
    each, more = divmod(layers, chunks)
    # Layers left over go to the middle first, then to the last chunk, then to the first.
    order = [*range(1, chunks - 1), chunks - 1, 0] if chunks > 1 else [0]
    counts = [each] * chunks
    for chunk in order[:more]:
        counts[chunk] += 1
    return named(counts)


def named(counts: Sequence[int]) -> str:
    """Return the layout whose chunks hold these numbers of decoder layers."""
    chunks = "|".join(f"t*{count}" if count else "" for count in counts)
    return f"E{chunks}L"
