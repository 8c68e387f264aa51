"""A source in four parts for the tests of writing by parts; here, where other processes find it."""

from collections.abc import Iterator
from dataclasses import dataclass

from visionloom.data.shards.write import SampleMembers, members_of
from visionloom.data.shards.write_parts import PartLog, SourcePart
from visionloom.tests.data.samples import picture_question


@dataclass(frozen=True)
class Numbers:
    """Four parts of seven samples; every fifth record is left out; stops like Ctrl-C before sample `stop`."""

    stop: int = -1

    def parts(self) -> Iterator[SourcePart]:
        return (SourcePart(7, first) for first in range(0, 28, 7))

    def samples(self, part: SourcePart, log: PartLog) -> Iterator[SampleMembers]:
        for number in range(part.where, part.where + 7):
            if number == self.stop:
                raise KeyboardInterrupt
            log.tally.counts["records"] += 1
            if number % 5 == 4:
                log.skipped.append({"record": number})
            else:
                yield members_of(*picture_question(number, words=number))
