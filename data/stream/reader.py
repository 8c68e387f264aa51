"""Datasets as the stream reads them: samples by place, encoded and decoded, with unreadable ones kept out of the loss."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig
from visionloom.data.encode.encode import EncodedSample, encode, extend, prompt_of
from visionloom.data.encode.geometry import chosen_frames
from visionloom.data.encode.patches import Unit, decode_into, decode_patches
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.dataset_with_lengths import DatasetWithLengths
from visionloom.data.plan.deal import deal_units
from visionloom.data.plan.parts import Part, Parts, encode_parts
from visionloom.data.shards.dataset import REQUESTS
from visionloom.data.shards.sample import Sample, SampleError, Video
from visionloom.data.stream.answers import Place, TrainedAnswer
from visionloom.data.stream.batch import (
    Decode,
    PackedBatch,
    PackLayout,
    all_grids,
    pack,
    with_answers,
    with_teacher,
)
from visionloom.data.stream.quarantine import Quarantine, stand_in
from visionloom.data.stream.read_ahead import AheadReader, ByteBudget, Wanted
from visionloom.data.stream.teacher_store import StoredRows, TeacherStore
from visionloom.parallel.share import ALONE, Share

CACHED_TOKENS: Final = 1 << 20
"""Tokens of encoded samples that a process keeps (20 bytes each): a small dataset is tokenised once."""


class Reader:
    """Reads samples of several datasets; an unreadable one is quarantined and keeps its place without a loss.

    Args:
        datasets: that places name by number.
        parts: of each dataset, what is trained on of its samples.
        data: the input of the run.
        tokenizer: of the run.
        quarantine: of unreadable samples.
        teacher: whose rows its batches have; None: none.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetWithLengths],
        parts: Sequence[Parts],
        data: DataConfig,
        tokenizer: Tokenizer,
        quarantine: Quarantine,
        teacher: TeacherStore | None = None,
    ) -> None:
        self.datasets, self.parts, self.teacher = datasets, parts, teacher
        self.rules, self.tokenizer, self.quarantine = data.media, tokenizer, quarantine
        self.budget = ByteBudget(data.store.bytes_in_flight)
        # starts no thread before a remote dataset is read
        self._threads = ThreadPoolExecutor(REQUESTS, "visionloom-media")
        self._encoded: dict[Place, EncodedSample] = {}
        self._cached_tokens = 0
        self._lock = threading.Lock()
        self.note: Callable[[str], None] = lambda place: None
        """Called with each sample before it is read, and before its media are decoded."""

    def read(
        self,
        places: Sequence[Place],
        step: int | None = None,
    ) -> list[EncodedSample]:
        """Read the samples at these places, without their patches; `step` is for the quarantine."""
        self.quarantine.passed(len(places))
        with self._lock:
            encoded = self._encode(places, step)
        return [encoded[place] for place in places]

    def _encode(
        self,
        places: Sequence[Place],
        step: int | None,
    ) -> dict[Place, EncodedSample]:
        """Encode the samples that are not kept from an earlier batch."""
        encoded = {place: self._encoded[place] for place in places if place in self._encoded}
        # once each: a batch may hold a sample twice, at the border of epochs
        missing = list(dict.fromkeys(place for place in places if place not in encoded))
        samples: dict[Place, Sample] = {}
        for place, answer in zip(missing, self._samples(missing), strict=True):
            if isinstance(answer, Sample):
                samples[place] = answer
            else:
                # its pack was planned, so something must take its place
                encoded[place] = self._stand_in(place, answer, step)
        fresh = self._encode_parts(samples)
        self._keep(fresh)
        return encoded | fresh

    def _encode_parts(self, samples: Mapping[Place, Sample]) -> dict[Place, EncodedSample]:
        """Encode what the plan uses of these samples; each must be as long as it was planned."""
        parts = [self._part(place) for place in samples]
        names = [self.datasets[number].name for number, _, _ in samples]
        made = encode_parts(list(samples.values()), parts, self.tokenizer, self.rules, names)
        for sample, part in zip(made, parts, strict=True):
            _check_length(sample, part)
        return dict(zip(samples, made, strict=True))

    def _part(self, place: Place) -> Part:
        number, index, part_number = place
        return self.parts[number].part(index, part_number)

    def _stand_in(self, place: Place, error: SampleError, step: int | None) -> EncodedSample:
        """Report an unreadable sample, and return padding of the length that the plan counts on."""
        self._report(place, error, step)
        name, tokens = self.datasets[place[0]].name, self._part(place).tokens
        return stand_in(error.sample_id, name, tokens, self.tokenizer.pad_id)

    def _samples(self, places: Sequence[Place]) -> list[Sample | SampleError]:
        """Read the samples at these places, those of one dataset together."""
        for place in places[:1]:
            self.note(f"{self._named(place)} and {len(places) - 1} more")
        # one call a dataset: a remote one then reads neighbours together
        answers: dict[Place, Sample | SampleError] = {}
        for number in {place[0] for place in places}:
            mine = [place for place in places if place[0] == number]
            read = self.datasets[number].shards.samples([index for _, index, _ in mine])
            answers.update(zip(mine, read, strict=True))
        return [answers[place] for place in places]

    def report_unreadable(self) -> None:
        """Write down the samples that could not be counted and so are never drawn, with their reasons."""
        for number, dataset in enumerate(self.datasets):
            for index in dataset.unreadable.tolist():
                try:
                    encode(dataset.shards.sample(index), self.tokenizer, self.rules)
                except SampleError as error:
                    self._report((number, index, 0), error)

    def _keep(self, fresh: Mapping[Place, EncodedSample]) -> None:
        """Keep encoded samples; the oldest go."""
        self._encoded.update(fresh)
        self._cached_tokens += sum(len(sample.input_ids) for sample in fresh.values())
        while self._cached_tokens > CACHED_TOKENS:
            # dicts keep the order of insertion
            oldest = self._encoded.pop(next(iter(self._encoded)))
            self._cached_tokens -= len(oldest.input_ids)

    def batch(
        self,
        packs: Sequence[Sequence[Place]],
        layout: PackLayout,
        share: Share = ALONE,
        step: int | None = None,
    ) -> PackedBatch:
        """Read the samples at these places and lay them into packs, with the pictures of this share; see `pack`.

        Args:
            packs: the places of each pack.
            layout: of the packs.
            share: whose encoder rank decodes its pictures.
            step: written with unreadable samples.

        Raises:
            StoreError: if a remote dataset cannot be reached.
        """
        places = [place for one in packs for place in one]
        # of pictures that ranks share, each wants only some: reading the whole stretch ahead would be waste
        if share.encoder_ranks == 1:
            self._will_read(places)
        samples = self.read(places, step)
        sizes = [len(one) for one in packs]
        batch = self._pack(places, samples, sizes, layout, share, step)
        # After the media: a sample that cannot be read keeps its place, and its rows.
        if self.teacher is None:
            return batch
        rows = self._teacher_rows(self.teacher, places, samples, share)
        return with_teacher(batch, samples, rows) if share.has_losses else batch

    def batch_of_answers(
        self,
        packs: Sequence[Sequence[TrainedAnswer]],
        layout: PackLayout,
        share: Share,
        step: int | None = None,
    ) -> PackedBatch:
        """Lay answers with their prompts, whose last turn they replace, into packs; only their tokens have a loss. See `batch`."""
        answers = [answer for one in packs for answer in one]
        places = [answer.prompt.place for answer in answers]
        read = self.read(places, step)
        samples = []
        for sample, answer in zip(read, answers, strict=True):
            # What cannot be read any more has been replaced by padding as long as with its reference.
            if sample.answer is None:
                name, pad_id = sample.dataset, self.tokenizer.pad_id
                samples.append(stand_in(sample.sample_id, name, answer.tokens, pad_id))
            else:
                samples.append(extend(prompt_of(sample), answer.token_ids.tolist(), 1.0))
        sizes = [len(one) for one in packs]
        batch = self._pack(places, samples, sizes, layout, share, step)
        return with_answers(batch, answers)

    def _pack(
        self,
        places: Sequence[Place],
        samples: Sequence[EncodedSample],
        sizes: Sequence[int],
        layout: PackLayout,
        share: Share,
        step: int | None,
    ) -> PackedBatch:
        """Lay samples into packs of so many each, with the pictures of this share."""
        ready = iter(samples)
        laid_out = [[next(ready) for _ in range(size)] for size in sizes]
        wanted = self._wanted(places, samples, share)
        with AheadReader(wanted, self.budget, self._threads) as ahead:
            decode = self._decoder(places, samples, ahead, step)
            return pack(laid_out, layout, decode, share)

    def _teacher_rows(
        self,
        store: TeacherStore,
        places: Sequence[Place],
        samples: Sequence[EncodedSample],
        share: Share,
    ) -> list[StoredRows | None]:
        """Return what a stored teacher says of each sample, nothing where this share has no losses."""
        rows: list[StoredRows | None] = []
        for (dataset, index, part_number), sample in zip(places, samples, strict=True):
            if not sample.supervised_tokens:
                rows.append(None)
                continue
            # On all ranks: a sample that is missing must end all of them.
            location = self.datasets[dataset].shards.location(index)
            entry = store.find(sample, location, part_number)
            rows.append(store.read(entry) if share.has_losses else None)
        return rows

    def _will_read(self, places: Sequence[Place]) -> None:
        for number, index, _ in places:
            self.datasets[number].shards.will_read(index)

    def _decoder(
        self,
        places: Sequence[Place],
        samples: Sequence[EncodedSample],
        ahead: AheadReader,
        step: int | None,
    ) -> Decode:
        """Return what writes the patches of these samples into a batch, and reports one that is unreadable.

        Pictures of a sample that comes again, as the prompt of several answers does, are decoded once.
        """
        decoded: dict[tuple[Place, tuple[Unit, ...]], NDArray[np.uint8] | None] = {}

        def decode(
            number: int,
            units: Sequence[Unit],
            out: NDArray[np.uint8],
        ) -> bool:
            dataset, index, _ = place = places[number]
            known = place, tuple(units)
            if known in decoded:
                before = decoded[known]
                if before is not None:
                    out[:] = before
                return before is not None

            self.note(self._named(place))
            read = ahead.media_of(number, self.datasets[dataset].shards, index)
            decoded[known] = out
            try:
                decode_into(out, samples[number], units, read, self.rules)
            except SampleError as error:
                self._report_media(place, samples[number], error, step)
                decoded[known] = None
            return decoded[known] is not None

        return decode

    def _wanted(
        self, places: Sequence[Place], samples: Sequence[EncodedSample], share: Share
    ) -> Iterator[Wanted]:
        """Yield the reads of remote media that this share will decode, in order."""
        if not any(self.datasets[number].shards.remote for number, _, _ in places):
            return
        owned = _owned_media(samples, share)
        known = set[tuple[Place, tuple[int, ...]]]()
        for number, place in enumerate(places):
            dataset, index, _ = place
            shards = self.datasets[dataset].shards
            if not shards.remote or not samples[number].media:
                continue
            # Decoded once, so read once.
            if (again := (place, tuple(owned[number]))) in known:
                continue
            known.add(again)
            refs = self._refs(samples[number], owned[number])
            for run in shards.runs(index, refs):
                yield Wanted(number, shards, run)

    def _refs(self, sample: EncodedSample, owned: list[int]) -> list[str]:
        """Return the members that are read for the pictures and videos of these numbers."""
        refs: list[str] = []
        for number in owned:
            media = sample.media[number]
            if isinstance(media, Video) and media.ref is None:
                shown = chosen_frames(media, self.rules).tolist()
                refs += [media.frames[frame] for frame in shown]
            else:
                assert media.ref is not None
                refs.append(media.ref)
        return refs

    def decoded(self, place: Place, sample: EncodedSample) -> EncodedSample:
        """Return the sample with its patches; raises SampleError."""
        member = partial(self.datasets[place[0]].shards.member, place[1])
        return replace(sample, patches=decode_patches(sample, member, self.rules))

    def _named(self, place: Place) -> str:
        """Return where a sample lies, for messages."""
        dataset = self.datasets[place[0]]
        location = dataset.shards.location(place[1])
        return f"dataset {dataset.name}, shard {location.shard}, sample {location.key}"

    def _report_media(
        self,
        place: Place,
        sample: EncodedSample,
        error: SampleError,
        step: int | None,
    ) -> None:
        """Report a picture or video: decoders do not know which sample it belongs to."""
        self._report(place, SampleError(sample.sample_id, error.where, error.problem), step)

    def _report(self, place: Place, error: SampleError, step: int | None = None) -> None:
        dataset = self.datasets[place[0]]
        location = dataset.shards.location(place[1], error.where)
        where = {
            "shard": location.shard,
            "key": location.key,
            "offset": location.offset,
            "crc32": f"{location.crc32:08x}",
        }
        self.quarantine.report(dataset.name, where, error, step)


def _owned_media(samples: Sequence[EncodedSample], share: Share) -> list[list[int]]:
    """Return, of each sample, the numbers of its pictures and videos that this share encodes a part of.

    They are dealt as `pack` deals them.
    """
    dealt = deal_units(all_grids(samples), share.encoder_ranks)
    mine = set(dealt.media[dealt.owners == share.encoder_rank].tolist())
    owned, start = [], 0
    for sample in samples:
        owned.append([number for number in range(len(sample.grids)) if start + number in mine])
        start += len(sample.grids)
    return owned


def _check_length(sample: EncodedSample, part: Part) -> None:
    """Refuse a sample that is not as long as it was planned: its pack could overflow."""
    tokens, patches = len(sample.input_ids), sample.patch_count
    if (tokens, patches) != (part.tokens, part.patches):
        raise UserError(
            f"sample {sample.sample_id} of dataset {sample.dataset} has {tokens} tokens and"
            f" {patches} patches, its length table says {part.tokens} and {part.patches}: the tables were made by"
            f" another version of a library; remove them (cache/ in the dataset's folder, or data.cache)"
        )
