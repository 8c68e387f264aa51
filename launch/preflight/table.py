"""Show what the ranks are in one table, and name those that are slow, different, or have another time. Imports no torch."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Final

from rich.table import Table

from visionloom.launch.check_parts.report import number
from visionloom.launch.check_parts.results import MeasuredSpeed
from visionloom.launch.preflight.facts import RankFacts
from visionloom.launch.preflight.transports import transport_hints

LEAST: Final = {"TFLOP/s": 0.8, "GB/s": 0.8, "MB/s": 0.5}
"""Share of the other ranks' median, by unit, below which a rank is slow: cards of one kind differ by some 5 %, disks by more."""
MOST_ROWS: Final = 16
"""Ranks that are shown; of more those that are slow come first."""
MOST_SECONDS: Final = 2.0
"""Largest difference of clocks. torchrun takes a machine for dead whose heartbeat is 15 s old by its own clock."""


def slow_speeds(ranks: Sequence[RankFacts]) -> dict[int, list[str]]:
    """Return for each slow rank the names of its slow speeds."""
    slow: dict[int, list[str]] = {}
    for name in units_of(ranks):
        values = {facts.rank: speed for facts in ranks if (speed := speed_of(facts, name))}
        for rank, own in values.items():
            others = [each.value for other, each in values.items() if other != rank]
            if others and own.value < LEAST[own.unit] * statistics.median(others):
                slow.setdefault(rank, []).append(name)
    return slow


def units_of(ranks: Sequence[RankFacts]) -> dict[str, str]:
    """Return the names of all that was measured, in order, with their units."""
    return {speed.name: speed.unit for facts in ranks for speed in facts.speeds}


def speed_of(facts: RankFacts, name: str) -> MeasuredSpeed | None:
    """Return a speed of a rank; None if it was not measured there."""
    return next((speed for speed in facts.speeds if speed.name == name), None)


def rank_table(ranks: Sequence[RankFacts]) -> Table:
    """Return the table: a row a rank, a column for each speed, slow ones marked."""
    slow, units = slow_speeds(ranks), units_of(ranks)
    # A unit is the same on all ranks.
    headings = [f"{name}\n{unit}" for name, unit in units.items()]
    table = Table("rank", "host", "device", "GiB", *headings, "by", "slow", title=title(ranks))
    # Sorting keeps the order of ranks among the slow ones, and among the others.
    shown = sorted(ranks, key=lambda facts: facts.rank not in slow)[:MOST_ROWS]
    for facts in sorted(shown, key=lambda facts: facts.rank):
        table.add_row(*row_of(facts, list(units), slow.get(facts.rank, [])))
    return table


def row_of(facts: RankFacts, names: Sequence[str], slow: Sequence[str]) -> Iterator[str]:
    """Yield the cells of a rank; `names`: of all that was measured, `slow`: of what is slow on this rank."""
    yield from (str(facts.rank), facts.host, facts.device, f"{facts.memory_gib:.0f}")
    for name in names:
        yield speed_cell(facts, name, name in slow)
    yield ", ".join(facts.transports)
    yield ", ".join(slow)


def title(ranks: Sequence[RankFacts]) -> str:
    """Return what is the same on all ranks, as rank 0 has it."""
    first = ranks[0]
    kernels = ", ".join(f"{what}: {kernel}" for what, kernel in first.kernels.items())
    driver = f", driver {first.driver}" if first.driver else ""
    more = f" (of {len(ranks)}, slow ones first)" if len(ranks) > MOST_ROWS else ""
    return f"ranks before step 1{more}; {first.software}{driver}\n{kernels}"


def speed_cell(facts: RankFacts, name: str, is_slow: bool) -> str:
    """Return a speed, with its ratio to what plans assume in brackets; a slow one has a mark."""
    speed = speed_of(facts, name)
    if speed is None:
        return ""
    # On a CPU nothing is assumed.
    ratio = f" ({speed.ratio:.2f})" if speed.ratio else ""
    mark = " <" if is_slow else ""
    return f"{number(speed.value)}{ratio}{mark}"


def warnings(ranks: Sequence[RankFacts]) -> Iterator[str]:
    """Yield a line for each rank that is slow, for what differs between ranks, for clocks, and for slow ways of collectives."""
    for rank, names in slow_speeds(ranks).items():
        facts = next(each for each in ranks if each.rank == rank)
        said = ", ".join(beside(ranks, facts, name) for name in names)
        yield f"rank {rank} on {facts.host} is slow: {said}"
    yield from differences(ranks)
    yield from clock_warnings(ranks)
    yield from transport_hints({kind for facts in ranks for kind in facts.transports})


def beside(ranks: Sequence[RankFacts], facts: RankFacts, name: str) -> str:
    """Return a speed of a rank beside the median of the others."""
    own = speed_of(facts, name)
    assert own is not None
    others = [speed_of(each, name) for each in ranks if each is not facts]
    usual = statistics.median(speed.value for speed in others if speed is not None)
    return f"{name} {own.value:.3g} {own.unit}, where others have {usual:.3g}"


def differences(ranks: Sequence[RankFacts]) -> Iterator[str]:
    """Yield a line for each fact in which ranks differ from most others: a run is as slow as its slowest card."""
    for what in ("device", "driver", "software", "kernels"):
        values = {facts.rank: str(getattr(facts, what)) for facts in ranks}
        usual = statistics.mode(values.values())
        for rank, value in values.items():
            if value != usual:
                yield f"rank {rank} on {ranks[rank].host} has another {what}: {value}, where others have {usual}"


def clock_warnings(ranks: Sequence[RankFacts]) -> Iterator[str]:
    """Yield a line for each machine whose clock is not that of the others."""
    usual = statistics.median(facts.clock_seconds for facts in ranks)
    hosts = {facts.host: facts.clock_seconds - usual for facts in ranks}
    for host, seconds in hosts.items():
        if abs(seconds) > MOST_SECONDS:
            way = "ahead of" if seconds > 0 else "behind"
            yield (
                f"the clock of {host} is {abs(seconds):.1f} s {way} that of the other machines: torchrun drops machines by their"
                " heartbeats at 15 s, and times in locks and logs mislead: let chrony or ntpd set it"
            )
