"""Generate answers to a dataset of prompts and write them as a dataset: part by part, over all data ranks, resumably."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from visionloom.common.errors import UserError
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import SampleError
from visionloom.data.shards.write import SampleMembers, ShardLimits
from visionloom.data.shards.write_parts import (
    PartLog,
    SourcePart,
    Tally,
    Target,
    begin,
    finish,
    is_written,
    write_part,
)
from visionloom.parallel import topology as topologies
from visionloom.train.build import newest_weights, open_topology
from visionloom.train.config import RunConfig
from visionloom.train.generation.answered import Prompt, Prompts
from visionloom.train.generation.config import GenerationConfig
from visionloom.train.generation.generator import Answer, Generator
from visionloom.train.generation.sampling import Sampling
from visionloom.train.observe.screen import Screen
from visionloom.train.phase.validation import held_out
from visionloom.train.run import trained_checkpoint


@dataclass(frozen=True)
class AnsweredPart:
    """The answers to the prompts of a part, as samples."""

    prompts: Prompts
    rows: list[tuple[Prompt, list[Answer]]]
    left_out: list[tuple[str, SampleError]]
    """Keys of samples that are no prompts, and why."""

    def parts(self) -> Iterator[SourcePart]:
        """Yield nothing: parts are dealt to ranks elsewhere."""
        return iter(())

    def samples(self, part: SourcePart, log: PartLog) -> Iterator[SampleMembers]:
        """Yield the members of each answer's sample."""
        log.tally.counts["prompts"] = part.records
        for key, error in self.left_out:
            log.tally.note("left out", key)
            log.skipped.append({"record": key, "reason": error.problem, "detail": error.where})
        # Read again for their media, which were not kept while answers were drawn.
        for prompt, answers in self.rows:
            for number, answer in enumerate(answers):
                log.tally.note("answers", prompt.key)
                yield self.prompts.members(prompt, number, answer)


def generate(config: RunConfig, checkpoint: str, prompts: str, out: str) -> None:
    """Answer every prompt of a dataset by a checkpoint; the same command again goes on.

    Args:
        config: of the run, in any layout.
        checkpoint: its folder; empty: the newest whole one of the run.
        prompts: folder of the dataset.
        out: folder of the dataset that is written.

    Raises:
        UserError: for a checkpoint that does not fit, a folder that holds another dataset, or prompts that cannot be read.
    """
    topology = open_topology(config)
    screen = Screen(topology.is_main, 1)
    dataset = Dataset.open(prompts, "prompts", "generate", config.data.store)
    # As held-out data: videos are sampled as in the last phase.
    media = held_out(config).data.media
    source = Prompts(dataset, Tokenizer.of(config.data), media)
    sampling = sampling_of(config.generation, source.tokenizer)
    trained = trained_checkpoint(config, checkpoint, topology, screen)
    generator = Generator(
        newest_weights(config, topology, trained),
        topology,
        source.tokenizer.pad_id,
        config.generation.budget,
    )
    target = Target(Path(out), "answers", ShardLimits(), workers=1)
    parts = parts_of(len(dataset), config.generation.part_prompts)
    job = Job(generator, sampling, source, target, parts)
    job.write(settings_of(config, source, str(trained.folder)), screen)
    topology.barrier()
    topologies.stop()


def parts_of(prompts: int, size: int) -> list[SourcePart]:
    """Cut prompts into parts of at most `size`; `where` is the first one and the end."""
    parts = []
    for first in range(0, prompts, size):
        end = min(first + size, prompts)
        parts.append(SourcePart(end - first, (first, end)))
    return parts


def sampling_of(options: GenerationConfig, tokenizer: Tokenizer) -> Sampling:
    """Return the sampling of the options; raises UserError for a stop token that the tokenizer does not have."""
    stop_ids = []
    for token in options.stop:
        number = tokenizer.id_of(token)
        if number is None:
            raise UserError(
                f"generation.stop: {token!r} is no token of data.tokenizer={tokenizer.folder}: name tokens of its"
            )
        stop_ids.append(number)
    return Sampling(
        max_new_tokens=options.max_new_tokens,
        stop_ids=tuple(stop_ids),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        answers=options.answers,
        seed=options.seed,
    )


def settings_of(config: RunConfig, source: Prompts, checkpoint: str) -> dict[str, Any]:
    """Return what the answers depend on: neither layout nor memory."""
    options = asdict(config.generation)
    del options["pack_tokens"], options["cache_tokens"]
    return {
        "checkpoint": str(Path(checkpoint).resolve()),
        "prompts": source.dataset.fingerprint,
        "tokenizer": source.tokenizer.fingerprint,
        "media": asdict(source.rules),
        "chat_format": source.tokenizer.chat_format,
        "generation": options,
    }


@dataclass(frozen=True)
class Job:
    """Prompts, and the dataset that their answers become."""

    generator: Generator
    sampling: Sampling
    prompts: Prompts
    target: Target
    parts: list[SourcePart]

    def write(self, settings: dict[str, Any], screen: Screen) -> None:
        """Write all parts that are not there yet, and put them together; raises UserError, on all ranks."""
        topology = self.generator.topology
        # Its lock is held to the end.
        with ExitStack() as stack:
            opened = stack.enter_context
            complete = topology.on_main(lambda: opened(begin(self.target, settings)))
            left = self._left(complete)
            for first in range(0, len(left), topology.data_size):
                self._round(left[first : first + topology.data_size])
                done = min(first + topology.data_size, len(left))
                screen.say(f"{done} of {len(left)} parts answered")
            # All parts must be there before they are put together.
            topology.barrier()
            if complete is None:
                whole = partial(finish, self.target, len(self.parts), settings)
                complete = topology.on_main(whole)
        counts = [f"{count:,} {name}" for name, count in complete.counts.items()]
        screen.say(f"{self.target.folder}: {', '.join(counts)}")

    def _left(self, complete: Tally | None) -> list[int]:
        """Return the numbers of the parts that are to be written, as the main rank sees the folder."""
        numbers = range(len(self.parts)) if complete is None else []
        here = [number for number in numbers if not is_written(self.target, number)]
        # Another machine may see files later.
        shared = [here]
        dist.broadcast_object_list(shared)
        return shared[0]

    def _round(self, numbers: list[int]) -> None:
        """Answer a part on each data rank; one without a part takes part in the passes."""
        topology = self.generator.topology
        mine = numbers[topology.data_rank : topology.data_rank + 1]
        rows: list[Prompt] = []
        left_out: list[tuple[str, SampleError]] = []

        def encoded() -> Iterator[EncodedSample]:
            for number in mine:
                for index in range(*self.parts[number].where):
                    try:
                        prompt = self.prompts.read(index)
                    except SampleError as error:
                        left_out.append((self.prompts.key(index), error))
                        continue
                    yield prompt.encoded
                    # Answers come last: until then pictures would fill the host's memory.
                    rows.append(prompt.without_patches())

        answers = self.generator.generate(encoded(), self.sampling)
        if topology.is_data_leader:
            answered = AnsweredPart(self.prompts, list(zip(rows, answers, strict=True)), left_out)
            for number in mine:
                write_part(answered, self.target, (number, self.parts[number]))
