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
from visionloom.data.config import DataConfig, MediaConfig
from visionloom.data.encode.encode import EncodedSample, encode
from visionloom.data.encode.geometry import chosen_frames
from visionloom.data.encode.patches import Unit, decode_into, decode_patches
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.corpus import Corpus
from visionloom.data.plan.deal import deal_units
from visionloom.data.plan.parts import Part, Parts, encode_parts
from visionloom.data.shards.dataset import REQUESTS
from visionloom.data.shards.sample import Image, Sample, SampleError, Video
from visionloom.data.stream.batch import Decode, PackedBatch, pack
from visionloom.data.stream.quarantine import Quarantine, stand_in
from visionloom.data.stream.read_ahead import AheadReader, ByteBudget, Wanted

CACHED_TOKENS: Final = 1 << 20
"""Tokens of encoded samples that a process keeps (20 bytes each): a small dataset is tokenised once."""

Place = tuple[int, int, int]
"""Number of the dataset, index of the sample, number of its part."""


class Reader:
    """Reads samples of several datasets; an unreadable one is quarantined and keeps its place without a loss."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        parts: Sequence[Parts],
        data: DataConfig,
        tokenizer: Tokenizer,
        quarantine: Quarantine,
    ) -> None:
        """`parts`: what is trained on of the samples of each corpus."""
        self.corpora, self.parts = corpora, parts
        self.rules, self.tokenizer, self.quarantine = data.media, tokenizer, quarantine
        self.budget = ByteBudget(data.store.bytes_in_flight)
        self._threads = ThreadPoolExecutor(
            REQUESTS, "visionloom-media"
        )  # starts none before a remote dataset is read
        self._encoded: dict[Place, EncodedSample] = {}
        self._cached_tokens = 0
        self._lock = threading.Lock()
        self.note: Callable[[str], None] = lambda place: None
        """Told of each sample before it is read, and before its media are decoded."""

    def read(self, places: Sequence[Place], step: int | None = None) -> list[EncodedSample]:
        """The samples at these places, without their patches; `step` is for the quarantine."""
        self.quarantine.passed(len(places))
        with self._lock:
            encoded = self._encode(places, step)
        return [encoded[place] for place in places]

    def _encode(self, places: Sequence[Place], step: int | None) -> dict[Place, EncodedSample]:
        encoded = {place: self._encoded[place] for place in places if place in self._encoded}
        samples: dict[Place, Sample] = {}
        parts: list[Part] = []
        missing = list(dict.fromkeys(place for place in places if place not in encoded))
        for place, answer in zip(missing, self._samples(missing), strict=True):
            number, index, part_number = place
            part = self.parts[number].part(index, part_number)
            if isinstance(answer, Sample):
                samples[place] = answer
                parts.append(part)
            else:
                self._report(place, answer, step)
                name = self.corpora[number].name
                encoded[place] = stand_in(
                    answer.sample_id, name, part.tokens, self.tokenizer.pad_id
                )
        sources = [self.corpora[place[0]].name for place in samples]
        made = encode_parts(list(samples.values()), parts, self.tokenizer, self.rules, sources)
        for sample, part in zip(made, parts, strict=True):
            _check_length(sample, part)
        found = dict(zip(samples, made, strict=True))
        self._keep(found)
        return encoded | found

    def _samples(self, places: Sequence[Place]) -> list[Sample | SampleError]:
        """Read the samples at these places."""
        found: dict[Place, Sample | SampleError] = {}
        for place in places[:1]:
            self.note(f"{self._named(place)} and {len(places) - 1} more")
        for number in {place[0] for place in places}:
            mine = [place for place in places if place[0] == number]
            found.update(
                zip(
                    mine,
                    self.corpora[number].dataset.samples([index for _, index, _ in mine]),
                    strict=True,
                )
            )
        return [found[place] for place in places]

    def report_unreadable(self) -> None:
        """Write down the samples that could not be counted and so are never drawn, with their reasons."""
        for number, corpus in enumerate(self.corpora):
            for index in corpus.unreadable.tolist():
                try:
                    encode(corpus.dataset.sample(index), self.tokenizer, self.rules)
                except SampleError as error:
                    self._report((number, index, 0), error)

    def _keep(self, found: Mapping[Place, EncodedSample]) -> None:
        self._encoded.update(found)
        self._cached_tokens += sum(len(sample.input_ids) for sample in found.values())
        while self._cached_tokens > CACHED_TOKENS:
            oldest = self._encoded.pop(next(iter(self._encoded)))
            self._cached_tokens -= len(oldest.input_ids)

    def batch(
        self,
        packs: Sequence[Sequence[Place]],
        sequence_length: int,
        loss: str,
        encoder_rank: int = 0,
        encoder_ranks: int = 1,
        segment_multiple: int = 1,
        step: int | None = None,
    ) -> PackedBatch:
        """The samples at these places laid into packs, with the pictures that this encoder rank encodes; see `pack`.

        `step` is written beside unreadable samples. Raises StoreError if a remote dataset cannot be reached.
        """
        places = [place for one in packs for place in one]
        if encoder_ranks == 1:  # of pictures that ranks share, each wants only some
            for number, index, _ in places:
                self.corpora[number].dataset.will_read(index)
        samples = self.read(places, step)
        ready = iter(samples)
        laid_out = [[next(ready) for _ in one] for one in packs]
        names = [corpus.name for corpus in self.corpora]
        wanted = self._wanted(places, samples, encoder_rank, encoder_ranks)
        with AheadReader(wanted, self.budget, self._threads) as ahead:
            decode, pad_id = self._decoder(places, samples, ahead, step), self.tokenizer.pad_id
            return pack(
                laid_out,
                sequence_length,
                loss,
                names,
                pad_id,
                decode,
                encoder_rank,
                encoder_ranks,
                segment_multiple,
            )

    def _decoder(
        self,
        places: Sequence[Place],
        samples: Sequence[EncodedSample],
        ahead: AheadReader,
        step: int | None,
    ) -> Decode:
        """What writes the patches of these samples, read at these places, into a batch; an unreadable one is reported."""

        def decode(number: int, units: Sequence[Unit], out: NDArray[np.uint8]) -> bool:
            corpus, index, _ = places[number]
            self.note(self._named(places[number]))
            read = ahead.media_of(number, self.corpora[corpus].dataset, index)
            try:
                decode_into(out, samples[number], units, read, self.rules)
            except SampleError as error:
                known = SampleError(samples[number].sample_id, error.where, error.problem)
                self._report(places[number], known, step)
                return False
            return True

        return decode

    def _wanted(
        self, places: Sequence[Place], samples: Sequence[EncodedSample], rank: int, ranks: int
    ) -> Iterator[Wanted]:
        """The reads of remote media that this rank will decode, in order."""
        if not any(self.corpora[number].dataset.remote for number, _, _ in places):
            return
        owned = _owned_media(samples, rank, ranks)
        for number, (corpus, index, _) in enumerate(places):
            dataset = self.corpora[corpus].dataset
            if dataset.remote and samples[number].media:
                refs = [
                    ref
                    for medium in owned[number]
                    for ref in _refs(samples[number].media[medium], self.rules)
                ]
                yield from (Wanted(number, dataset, run) for run in dataset.runs(index, refs))

    def decoded(self, place: Place, sample: EncodedSample) -> EncodedSample:
        """The sample with its patches; raises SampleError."""
        return replace(sample, patches=decode_patches(sample, self._member(place), self.rules))

    def _named(self, place: Place) -> str:
        """Where a sample lies, for messages."""
        corpus = self.corpora[place[0]]
        found = corpus.dataset.location(place[1])
        return f"dataset {corpus.name}, shard {found.shard}, sample {found.key}"

    def _member(self, place: Place) -> Callable[[str], bytes]:
        return partial(self.corpora[place[0]].dataset.member, place[1])

    def _report(self, place: Place, error: SampleError, step: int | None = None) -> None:
        corpus = self.corpora[place[0]]
        found = corpus.dataset.location(place[1], error.where)
        where = {
            "shard": found.shard,
            "key": found.key,
            "offset": found.offset,
            "crc32": f"{found.crc32:08x}",
        }
        self.quarantine.report(corpus.name, where, error, step)


def _owned_media(samples: Sequence[EncodedSample], rank: int, ranks: int) -> list[list[int]]:
    """Of each sample, the numbers of its pictures and videos of which this rank encodes a part, as `pack` deals them."""
    counts = [len(sample.grids) for sample in samples]
    grids = np.concatenate([np.empty((0, 3), np.int32), *(sample.grids for sample in samples)])
    _, media, _, owners = deal_units(grids, ranks)
    mine = set(media[owners == rank].tolist())
    starts = np.cumsum([0, *counts]).tolist()
    return [
        [n for n in range(count) if start + n in mine]
        for start, count in zip(starts, counts, strict=False)
    ]


def _refs(media: Image | Video, rules: MediaConfig) -> list[str]:
    """The members that are read for a picture or a video."""
    if media.ref is not None:
        return [media.ref]
    assert isinstance(media, Video)
    return [media.frames[frame] for frame in chosen_frames(media, rules).tolist()]


def _check_length(sample: EncodedSample, part: Part) -> None:
    if (len(sample.input_ids), sample.patch_count) != (part.tokens, part.patches):
        raise UserError(
            f"sample {sample.sample_id} of dataset {sample.source} has {len(sample.input_ids)} tokens and"
            f" {sample.patch_count} patches, its length table says {part.tokens} and {part.patches}: the tables were made by"
            f" another version of a library; remove them (cache/ in the dataset's folder, or data.cache)"
        )
