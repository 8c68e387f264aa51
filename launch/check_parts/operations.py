"""Check operations of our own: against their definition on any device, and each GPU kernel against its twin on the CPU.

Definitions are plain torch in fp64 on the CPU, gradients by autograd.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionloom.launch.check_parts.operation_calls import Draw, calls, error, tensors_of
from visionloom.launch.check_parts.results import CheckResult, attempt
from visionloom.model.kernels.activation import swiglu
from visionloom.model.kernels.attention import Segments, attend
from visionloom.model.kernels.cross_entropy import row_sums, to_gradient_
from visionloom.model.kernels.norm import branch_rms_norm, layer_norm, rms_norm
from visionloom.model.kernels.permute import combine_rows, count_rows, permute_rows, sort_rows
from visionloom.model.kernels.product import add_grouped_product_, add_product_
from visionloom.model.kernels.rotary import rotate_heads
from visionloom.model.kernels.routing import choose_experts, weigh_experts

HOST = torch.device("cpu")
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
"""Largest difference relative to the largest number of a result; bf16 has 8 bits, and there are several roundings."""
EPSILON = 1e-6
TOKENS = 37
WIDTH = 128
LENGTHS = (5, 64, 1, 30)
"""Segments of attention."""
HEADS, GROUPS, DIM = 4, 2, 64
EXPERTS, EACH = 128, 8


@dataclass(frozen=True)
class Comparison:
    """An operation on a device, and where its results are known from."""

    name: str
    own: Callable[[torch.device], Sequence[Tensor]]
    expected: Callable[[], Sequence[Tensor]]
    limit: float
    strict: bool = True
    """Dtypes and strides must be equal too, and not shapes alone."""

    def result(self, device: torch.device) -> CheckResult:
        """Return the difference on a device."""

        def difference() -> float:
            results = [each.cpu() for each in self.own(device)]
            expected = self.expected()
            # A definition is computed in fp64, and says nothing of strides.
            if not self.strict:
                results = [each.double().contiguous() for each in results]
                expected = [each.contiguous() for each in expected]
            return error(results, expected)

        return attempt(self.name, self.limit, difference)


def check_operations(device: torch.device) -> list[CheckResult]:
    """Return all comparisons; those with twins need a GPU."""
    comparisons = [*definitions()]
    # On a CPU the operation is its twin.
    if device.type == "cuda":
        comparisons += [summed(torch.bfloat16), summed_by_group(torch.bfloat16)]
        comparisons += [*twins(), *larger_twins()]
    return [comparison.result(device) for comparison in comparisons]


# ---- definitions


def with_gradients(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the results of a function and the gradients of its inputs, for random gradients of the results."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    results = tensors_of(function(*leaves))
    draw = Draw(torch.float32)
    # Random and not ones: with those a softmax has no gradient.
    above = [draw(*each.shape).to(each) for each in results]
    torch.autograd.backward(results, above)
    tensors = [each.detach() for each in results]
    for leaf in leaves:
        assert leaf.grad is not None
        tensors.append(leaf.grad)
    return tensors


TensorFunction = Callable[..., Any]
InputShape = tuple[int, ...]


def defined(
    name: str, own: TensorFunction, definition: TensorFunction, *shapes: InputShape
) -> Comparison:
    """Return the comparison of a differentiable operation with its definition, in fp32."""
    draw = Draw(torch.float32)
    inputs = [draw(*shape) for shape in shapes]
    return Comparison(
        f"{name} and its definition",
        lambda device: with_gradients(own, [each.to(device) for each in inputs]),
        lambda: with_gradients(definition, [each.double() for each in inputs]),
        TOLERANCES[torch.float32],
        strict=False,
    )


def definitions() -> Iterator[Comparison]:
    """Yield each operation with its definition."""
    rows, weight = (TOKENS, WIDTH), (WIDTH,)
    yield defined("rms_norm", lambda x, w: rms_norm(x, w, EPSILON), rms_definition, rows, weight)
    yield defined(
        "branch_rms_norm",
        lambda x, w: branch_rms_norm(x, w, EPSILON),
        lambda x, w: (rms_definition(x, w), x.clone()),
        rows,
        weight,
    )
    yield defined(
        "layer_norm",
        lambda x, w, b: layer_norm(x, w, b, EPSILON),
        lambda x, w, b: F.layer_norm(x, weight, w, b, EPSILON),
        rows,
        weight,
        weight,
    )
    yield defined("swiglu", swiglu, swiglu_definition, (TOKENS, 2 * WIDTH), (TOKENS,))

    joined = (TOKENS, GROUPS, HEADS + 2, DIM)
    yield defined("rotate_heads", Heads(), Heads().definition, joined, (DIM,), (DIM,))
    total = sum(LENGTHS)
    keys = (total, GROUPS, DIM)
    yield defined("attention", causal, causal_definition, (total, HEADS, DIM), keys, keys)

    yield Comparison("cross_entropy and its definition", *losses(), limit=2e-5, strict=False)
    yield summed(torch.float32)
    yield summed_by_group(torch.float32)
    tokens = MixtureCase.draw(TOKENS)
    pair = tokens.own, tokens.definition
    yield Comparison("a mixture and its definition", *pair, limit=2e-5, strict=False)


def rms_definition(x: Tensor, weight: Tensor) -> Tensor:
    """Return F.rms_norm."""
    return F.rms_norm(x, weight.shape, weight, EPSILON)


def swiglu_definition(gate_up: Tensor, weights: Tensor) -> Tensor:
    """Return silu(gate) * up, times a weight a row."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weights.unsqueeze(-1)


class Heads:
    """Queries, keys and values of one joined tensor, normalised and rotated by fixed angles."""

    def __init__(self) -> None:
        self.angles = Draw(torch.float32)(TOKENS, DIM // 2)

    def __call__(self, joined: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return them by the operation."""
        rotation = torch.cat((self.angles.cos(), self.angles.sin()), dim=-1)
        return rotate_heads(joined, rotation.to(joined.device), 1, weights, EPSILON)

    def definition(self, joined: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return them by RMSNorm of each head and rotation of its halves."""
        parts = joined.split((HEADS, 1, 1), dim=2)
        query, key, value = (part.flatten(1, 2) for part in parts)
        angles = self.angles.double().unsqueeze(1)
        rotated = []
        for heads, weight in zip((query, key), weights, strict=True):
            first, second = rms_definition(heads, weight).chunk(2, dim=-1)
            turned = first * angles.cos() - second * angles.sin()
            other = second * angles.cos() + first * angles.sin()
            rotated.append(torch.cat((turned, other), dim=-1))
        return *rotated, value


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend inside segments by the operation."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    return attend(query, key, value, Segments.build(bounds, query.device), causal=True)


def causal_definition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by softmax over the scores of each segment."""
    group = HEADS // GROUPS
    parts = []
    split = [each.split(LENGTHS) for each in (query, key, value)]
    for q, k, v in zip(*split, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * DIM**-0.5
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", shares, v.repeat_interleave(group, 1)))
    return torch.cat(parts)


DefinedOperation = tuple[Callable[[torch.device], list[Tensor]], Callable[[], list[Tensor]]]
"""An operation on a device and its definition, which are not differentiated by autograd."""


def losses() -> DefinedOperation:
    """Return losses and gradient of cross-entropy."""
    draw = Draw(torch.float32)
    logits, weights = draw(TOKENS, 1000) * 4, draw.wide(TOKENS).abs()
    targets = torch.randint(0, 1000, (TOKENS,), generator=draw.generator)

    def own(device: torch.device) -> list[Tensor]:
        moved, there = logits.to(device, copy=True), targets.to(device)
        largest, total, target = row_sums(moved, there)
        loss = total.log() + largest - target
        to_gradient_(moved, there, largest, total, weights.to(device))
        return [loss, moved]

    def definition() -> list[Tensor]:
        wide = logits.double().requires_grad_()
        loss = F.cross_entropy(wide, targets, reduction="none")
        (gradient,) = torch.autograd.grad(loss, wide, weights.double())
        return [loss.detach(), gradient]

    return own, definition


def summed(dtype: torch.dtype) -> Comparison:
    """Return the comparison of a product that is added to a sum in fp32; of bf16 only a GPU adds it unrounded."""
    draw = Draw(dtype)
    rows, columns, total = draw(640, 96), draw(640, 160), draw.wide(96, 160) * 100

    def own(device: torch.device) -> list[Tensor]:
        moved = total.to(device, copy=True)
        add_product_(moved, rows.to(device), columns.to(device))
        return [moved]

    def definition() -> list[Tensor]:
        return [total.double() + rows.double().t() @ columns.double()]

    name = f"add_product_ {str(dtype).removeprefix('torch.')} and its definition"
    return Comparison(name, own, definition, limit=2e-5, strict=False)


def summed_by_group(dtype: torch.dtype) -> Comparison:
    """Return the comparison of products of groups, one of them empty, that are added to sums in fp32: of one part and of three."""
    draw = Draw(dtype)
    # Ten tiles of the kernel, one below the other: two more than run together.
    rows, columns = draw(640, 1160), draw(640, 264)
    total = draw.wide(4, 1160, 264) * 100
    # Rows behind the last group count nowhere.
    ends = [64, 64, 401, 600]

    def own(device: torch.device) -> list[Tensor]:
        part = rows.to(device), columns.to(device), torch.tensor(ends, device=device).int()
        sums = []
        for parts in (1, 3):
            sums.append(total.to(device, copy=True))
            add_grouped_product_(sums[-1], [part] * parts)
        return sums

    def definition() -> list[Tensor]:
        products = torch.zeros_like(total, dtype=torch.float64)
        for group, (begin, end) in enumerate(pairwise([0, *ends])):
            products[group] = rows[begin:end].double().t() @ columns[begin:end].double()
        return [total.double() + products, total.double() + 3 * products]

    name = f"add_grouped_product_ {str(dtype).removeprefix('torch.')} and its definition"
    return Comparison(name, own, definition, limit=2e-5, strict=False)


@dataclass(frozen=True)
class MixtureCase:
    """Tokens that are each multiplied by a number of each of their experts, and added up."""

    logits: Tensor
    x: Tensor
    factors: Tensor

    @classmethod
    def draw(cls, tokens: int) -> "MixtureCase":
        """Draw random ones."""
        draw = Draw(torch.float32)
        return cls(draw(tokens, EXPERTS), draw(tokens, WIDTH), draw(EXPERTS))

    def own(self, device: torch.device) -> list[Tensor]:
        """Return weights and sums with their gradients, and the tokens of each expert, by the operations."""
        tally = torch.zeros(EXPERTS + 2, dtype=torch.int64, device=device)
        numbers = torch.arange(EXPERTS, device=device)

        def combined(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            chosen = choose_experts(logits.detach(), EACH)
            weights = weigh_experts(logits, chosen, None, tally)
            rows, places, totals, _ = sort_rows(chosen, count_rows(chosen, EXPERTS))
            factors = self.factors.to(device)[numbers.repeat_interleave(totals)]
            permuted = permute_rows(x, rows, places) * factors.unsqueeze(1)
            return weights, combine_rows(permuted, rows, places)

        results = with_gradients(combined, [self.logits.to(device), self.x.to(device)])
        return [*results, tally[:EXPERTS]]

    def definition(self) -> list[Tensor]:
        """Return the same without sorting anything."""

        def combined(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            values, chosen = logits.topk(EACH, dim=1)
            factor = self.factors.double()[chosen].sum(1, keepdim=True)
            return values.softmax(1), x * factor

        results = with_gradients(combined, [self.logits.double(), self.x.double()])
        chosen = self.logits.topk(EACH, dim=1).indices.flatten()
        return [*results, torch.bincount(chosen, minlength=EXPERTS).double()]


# ---- twins


def there(value: Any, device: torch.device) -> Any:
    """Return the same with tensors on the device, views with the gaps that they had."""
    if isinstance(value, list):
        return [there(each, device) for each in value]
    if not isinstance(value, Tensor):
        return value
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


def twins() -> Iterator[Comparison]:
    """Yield each kernel with its twin on tensors of awkward sizes, in fp32 and bf16."""
    for name, _module, operation, arguments in calls():
        # Defaults, or all would run the last one.
        def run(
            device: torch.device, operation: str = operation, arguments: list[Any] = arguments
        ) -> list[Tensor]:
            made = getattr(torch.ops.visionloom, operation)
            return [*tensors_of(made(*there(arguments, device)))]

        dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
        yield _twin(name, run, TOLERANCES[dtype])


def larger_twins() -> Iterator[Comparison]:
    """Yield kernels with their twins at the sizes of training."""
    for dtype, limit in TOLERANCES.items():
        kind = str(dtype).removeprefix("torch.")
        for columns in (50, 4096, 151_936):
            yield _twin(f"cross_entropy {columns} {kind}", parted_losses(columns, dtype), limit)
        yield _twin(f"attention {kind}", attention_run(dtype), limit)
    for tokens in (1, 7, 1000, 8192):
        yield _twin(f"a mixture of {tokens} tokens", MixtureCase.draw(tokens).own, 1e-4)


def _twin(name: str, run: Callable[[torch.device], list[Tensor]], limit: float) -> Comparison:
    return Comparison(f"{name} and its twin", run, lambda: run(HOST), limit)


def parted_losses(columns: int, dtype: torch.dtype) -> Callable[[torch.device], list[Tensor]]:
    """Return a run of cross-entropy of which some targets are other ranks'."""
    draw = Draw(dtype)
    logits, weights = draw(TOKENS, columns) * 4, draw.wide(TOKENS).abs()
    # Targets outside are columns of other tensor ranks.
    low, high = -columns // 4, columns + columns // 4
    targets = torch.randint(low, high, (TOKENS,), generator=draw.generator)

    def run(device: torch.device) -> list[Tensor]:
        moved, there = logits.to(device, copy=True), targets.to(device)
        sums = row_sums(moved, there)
        to_gradient_(moved, there, sums[0], sums[1], weights.to(device))
        return [*sums, moved]

    return run


def attention_run(dtype: torch.dtype) -> Callable[[torch.device], list[Tensor]]:
    """Return a run of causal attention, forward and backward."""
    draw, total = Draw(dtype), sum(LENGTHS)
    inputs = [draw(total, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return lambda device: with_gradients(causal, [each.to(device) for each in inputs])
