"""Measure all ranks before step 1, each by itself and then their links; a rank that does not answer is named and ends the start."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from visionloom.common.errors import MachineError
from visionloom.common.jsonfile import parse_json
from visionloom.common.text import one_line
from visionloom.forecast.machine import Machine
from visionloom.launch.check_parts.results import MeasuredSpeed
from visionloom.launch.check_parts.speeds import Speeds
from visionloom.launch.environment import log_of_nccl
from visionloom.launch.preflight.board import Board
from visionloom.launch.preflight.facts import RankFacts, facts_of
from visionloom.launch.preflight.links import measure_links
from visionloom.launch.preflight.storage import measure_storage
from visionloom.launch.preflight.transports import transports_of
from visionloom.parallel.topology import Topology

SECONDS: Final = 30.0
"""Longest wait for the answers of each of the two stages: a minute in all."""
MORE_SECONDS: Final = 10.0
"""How much longer the others wait for rank 0."""
SPEAKING_SECONDS: Final = 5.0
"""For rank 0 to say what is at fault: torchrun ends the others as soon as it is gone, and the line stands there once."""
OWN, LINKS = "own", "links"
"""The stages."""


@dataclass(frozen=True)
class Decision:
    """What rank 0 says at the end of a stage."""

    fault: str
    """Why the start ends; empty if it goes on."""
    hosts: list[str]
    """Of each rank."""
    time: float
    """Of rank 0's clock, seconds since 1970."""


class Preflight:
    """Measures the ranks of a world; all ranks call `run`."""

    def __init__(self, topology: Topology, folder: Path, machine: Machine | None) -> None:
        """`folder`: of the run; `machine`: what plans assume of the card, if it is known."""
        store = dist.distributed_c10d._get_default_store()
        self.topology, self.folder = topology, folder
        self.board = Board(store, topology.rank, topology.world_size)
        self.speeds = Speeds(topology, machine)

    def run(self, dtype: torch.dtype) -> list[RankFacts]:
        """Return what every rank is and how fast, on rank 0; nothing on the others. `dtype`: of training.

        Raises:
            MachineError: on all ranks, if one does not answer in time or cannot be measured; it names that rank.
        """
        facts = facts_of(self.topology.rank, self.topology.device, dtype)
        self.measure(facts, self.own_speeds)
        _, decision = self.agree(OWN, facts)
        facts.clock_seconds = time.time() - decision.time
        self.measure(facts, lambda: self.link_speeds(decision.hosts))
        facts.transports = self.transports()
        answers, _ = self.agree(LINKS, facts)
        return answers

    def measure(self, facts: RankFacts, speeds: Callable[[], Iterator[MeasuredSpeed]]) -> None:
        """Add speeds to the facts, or why they could not be measured."""
        try:
            facts.speeds += speeds()
        # Whatever it is, rank 0 must hear of it: the other ranks wait.
        except Exception as error:
            facts.fault = one_line(f"{type(error).__name__}: {error}")

    def own_speeds(self) -> Iterator[MeasuredSpeed]:
        """Yield what this rank can do by itself."""
        self.board.begin("a matrix product")
        yield replace(next(self.speeds.products()), name="product")
        self.board.begin("a copy in memory")
        yield replace(self.speeds.copy(), name="copy")
        if self.topology.device.type == "cuda":
            self.board.begin("copies between host and GPU")
            for measured, name in zip(self.speeds.pinned(), ("to GPU", "to host"), strict=True):
                yield replace(measured, name=name)
        self.board.begin(f"writing to {self.folder}")
        yield from measure_storage(self.folder, self.topology.rank)
        self.board.begin("the end of its own measurements")

    def link_speeds(self, hosts: list[str]) -> Iterator[MeasuredSpeed]:
        """Yield what this rank can do together with others."""
        if self.topology.world_size > 1:
            self.board.begin("an all-reduce")
            yield from measure_links(self.speeds, hosts)

    def transports(self) -> list[str]:
        """Return the ways of this rank's collectives."""
        if self.topology.device.type == "cpu":
            return ["gloo"]
        path = log_of_nccl()
        if path is None or not path.is_file():
            return []
        return transports_of(path.read_text(errors="replace"))

    def agree(self, stage: str, facts: RankFacts) -> tuple[list[RankFacts], Decision]:
        """Send a rank's facts to rank 0; returns those of all ranks there, and its decision. Raises MachineError."""
        self.board.answer(stage, json.dumps(asdict(facts)))
        answers = self.decide(stage) if self.topology.is_main else []
        text = self.board.decision(stage, SECONDS + MORE_SECONDS)
        if text is None:
            raise MachineError(self.silent(0, SECONDS + MORE_SECONDS))
        decision = parse_json(text, Decision, "the decision of rank 0")
        if decision.fault:
            if not self.topology.is_main:
                time.sleep(SPEAKING_SECONDS)
            raise MachineError(decision.fault)
        return answers, decision

    def decide(self, stage: str) -> list[RankFacts]:
        """Return the answers of a stage, once all ranks know of rank 0's decision."""
        texts = self.board.answers(stage, SECONDS)
        answers = [parse_json(text, RankFacts, f"rank {rank}") for rank, text in texts.items()]
        fault = self.fault_of(answers)
        decision = Decision(fault, [each.host for each in answers], time.time())
        self.board.decide(stage, json.dumps(asdict(decision)))
        return answers

    def fault_of(self, answers: list[RankFacts]) -> str:
        """Return which rank is at fault; empty if none is."""
        absent = set(range(self.board.ranks)) - {facts.rank for facts in answers}
        if absent:
            return "; ".join(self.silent(rank, SECONDS) for rank in sorted(absent))
        # In a collective one that is at fault leaves all others waiting: who failed otherwise comes first.
        faulty = [facts for facts in answers if facts.fault]
        faulty.sort(key=lambda facts: facts.fault.startswith(TimeoutError.__name__))
        return "; ".join(
            f"preflight: rank {facts.rank} on {facts.host} failed: {facts.fault}"
            for facts in faulty[:1]
        )

    def silent(self, rank: int, seconds: float) -> str:
        """Return the line about a rank that does not answer."""
        place = self.board.place(rank)
        return f"preflight: rank {rank} has not answered within {seconds:.0f} s, {place}"
