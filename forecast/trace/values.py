"""State the values that an imagined rank asks for: which experts tokens choose, and whatever follows from that.

A tensor on the meta device has no content. The choice of experts is stated where the router takes the largest scores; what is
computed from it, and from tensors of zeros, ones and counts, is computed for real beside the meta tensors. So split sizes and
lengths that depend on the routing have the right values without a branch in the model. Equal layers compute equal values:
each is computed once.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from visionloom.forecast.trace.operations import Call, tensors_in

CHOICE = "visionloom::choose_experts"
"""The operation by which a router chooses."""
LARGEST = 1 << 26
"""Elements of the largest tensor with a value; the choice of 262,144 tokens among 128 experts is half of it."""
SWAPS = 4
"""Times that a token gives each of its experts to another one, on average: sets of experts are then as drawn."""
CONSTANTS = {
    "aten::zeros": 0.0,
    "aten::zeros_like": 0.0,
    "aten::new_zeros": 0.0,
    "aten::ones": 1.0,
    "aten::ones_like": 1.0,
    "aten::new_ones": 1.0,
}


@dataclass(frozen=True)
class Routing:
    """How many tokens the experts of a mixture get."""

    imbalance: float = 1.0
    """Tokens of the busiest expert-parallel rank over the mean of all; 1: all have the same."""
    expert_ranks: int = 1
    """Ranks that share the experts: of one rank alone none is busier than another."""
    busiest: int = 0
    """Which of them that is."""

    def choose(self, tokens: int, experts: int, each: int) -> Tensor:
        """Return the experts of each token, int64 [tokens, each].

        Args:
            tokens: of this rank.
            experts: in all.
            each: experts that a token takes.
        """
        total = tokens * each
        uneven = self.expert_ranks > 1 and self.imbalance > 1
        busy = experts // self.expert_ranks if uneven else 0
        wanted = round(total / experts * self.imbalance)
        # No token takes an expert twice, and there are no more than all.
        most = min(wanted, tokens, total // max(1, busy))
        evenly, more = divmod(total - busy * most, experts - busy)
        counts = torch.full((experts - busy,), evenly)
        counts[:more] += 1

        first = self.busiest * busy
        own = torch.full((busy,), most)
        counts = torch.cat([counts[:first], own, counts[first:]])
        # Column by column: an expert's tokens are neighbours, so that none has it twice.
        chosen = torch.repeat_interleave(torch.arange(experts), counts)
        return _mixed(chosen.view(each, tokens).t().contiguous())


def _mixed(chosen: Tensor) -> Tensor:
    """Return experts [tokens, each] with as many tokens for each of them as before, of which a token has any together.

    In each round half of the tokens give an expert to one of the other half for one of its own, where neither has it already.
    """
    tokens, each = chosen.shape
    generator = torch.Generator().manual_seed(0)
    for _ in range(SWAPS * each):
        givers, takers = torch.randperm(tokens, generator=generator)[: tokens // 2 * 2].view(2, -1)
        slots, others = torch.randint(each, (2, len(givers)), generator=generator)
        given, taken = chosen[givers, slots], chosen[takers, others]
        new_to_giver = (chosen[givers] != taken.unsqueeze(1)).all(1)
        new_to_taker = (chosen[takers] != given.unsqueeze(1)).all(1)
        free = new_to_giver & new_to_taker
        chosen[givers[free], slots[free]] = taken[free]
        chosen[takers[free], others[free]] = given[free]
    return chosen


class StatedValues:
    """The values of meta tensors that have one."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._computed: dict[Any, Any] = {}
        self._stated: dict[int, dict[Any, Tensor]] = {}
        """By storage, then by the place of the tensor in it."""
        self._guards: dict[int, Any] = {}

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor's value on the CPU, or None."""
        values = self._stated.get(tensor.untyped_storage()._cdata)
        return None if values is None else values.get(_view(tensor))

    def state(self, tensor: Tensor, value: Tensor) -> None:
        """Give a tensor a value."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._guards:
            self._guards[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._stated.setdefault(key, {})[_view(tensor)] = value

    def _forget(self, key: int) -> None:
        self._guards.pop(key, None)
        self._stated.pop(key, None)

    def forget(self, tensor: Tensor) -> None:
        """Forget the value of a tensor that has been changed, and those of all views of it."""
        self._stated.pop(tensor.untyped_storage()._cdata, None)

    def choose(self, scores: Tensor, each: int) -> Tensor:
        """Return the stated choice of the `each` largest of scores [tokens, experts], int32 [tokens, each]."""
        tokens, experts = scores.shape
        key = ("choice", tokens, experts, each)
        if key not in self._computed:
            self._computed[key] = self.routing.choose(tokens, experts, each).int()
        choice: Tensor = self._computed[key]
        return choice

    def follow(self, call: Call, outputs: Sequence[Tensor]) -> None:
        """Give the outputs of an operation their values, if those of its inputs are known."""
        for tensor in outputs if call.kind.writes else ():
            self.forget(tensor)
        if call.name in CONSTANTS:
            for tensor in outputs:
                self.state(tensor, self._constant(CONSTANTS[call.name], tensor))
        # Nobody asks for numbers with a fraction, but for the constants that a choice is put into.
        elif not all(tensor.is_floating_point() for tensor in outputs):
            for tensor, value in zip(outputs, self._values(call, outputs), strict=False):
                self.state(tensor, value)

    def _values(self, call: Call, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the values of an operation's outputs; nothing if they are not known."""
        inputs = tensors_in((call.args, *call.kwargs.values()))
        if call.name == "aten::_to_copy" and _is_host(inputs[0]):
            # What the host sends to the device is known.
            return [inputs[0].to(outputs[0].dtype)]
        if not inputs and call.name != "aten::arange":
            return []
        small = all(tensor.numel() <= LARGEST for tensor in outputs)
        if not small or not all(map(self._knows, inputs)):
            return []
        # Each is known: a tensor of the host is its own value.
        args, kwargs = tree_map_only(Tensor, self._valued, (call.args, call.kwargs))
        return self._compute(call.func, args, kwargs)

    def _constant(self, number: float, like: Tensor) -> Tensor:
        """Return a tensor of one number, the same object each time: what follows from it is then computed once."""
        key = ("constant", number, like.shape, like.dtype)
        if key not in self._computed:
            self._computed[key] = torch.tensor(number).to(like.dtype).expand(like.shape)
        constant: Tensor = self._computed[key]
        return constant

    def _knows(self, tensor: Tensor) -> bool:
        return self._valued(tensor) is not None

    def _valued(self, tensor: Tensor) -> Tensor | None:
        return tensor if _is_host(tensor) else self.of(tensor)

    def _compute(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        named = tuple(sorted(kwargs.items()))
        key = (func, _key(args), _key(named))
        if key not in self._computed:
            # In place it would change a value that others have.
            own = tuple(map(_cloned, args)) if func._schema.is_mutable else args
            result = func(*own, **{name: _host(value) for name, value in named})
            # The arguments are kept too, since their addresses are in the key.
            self._computed[key] = tensors_in((result,)), args, kwargs
        values: list[Tensor] = self._computed[key][0]
        return values


def _is_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _view(tensor: Tensor) -> Any:
    """Return the place of a tensor in its storage."""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _host(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value)
    if isinstance(value, list | tuple):
        return tuple(_key(item) for item in value)
    return (type(value).__name__, str(value))
