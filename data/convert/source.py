"""The interface of a source format, and what all of them share: records, options, and drafts of samples."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.keys import Keys, RecordFields
from visionloom.data.convert.media import Picture, prepare_image, prepare_video
from visionloom.data.convert.skip import Skip
from visionloom.data.shards.sample import Element, Image, Message, Sample, Video
from visionloom.data.shards.write_parts import SourcePart


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Options of a source besides its path."""

    files: MediaFiles
    """Finds pictures and videos."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Roles of a table's columns: {"image": "jpg", "text": "caption"}."""


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One record of a source: its place, for messages, and its value."""

    place: str
    value: Any


class SourceFormat(Protocol):
    """A format: cuts a source into parts, reads them, and makes a sample of a record. Picklable."""

    keys: ClassVar[tuple[Keys, ...]]
    """The keys that are read of its objects: the tables of docs/data.md."""

    def parts(self, path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
        """Yield parts of about `size` records in order, without reading media; `follow_links`: also out of the source's folder."""
        ...

    def records(self, where: Any) -> Iterator[SourceRecord]:
        """Yield the records of a part in order; a broken one has a Skip for its value."""
        ...

    def convert(self, value: Any, draft: "SampleDraft", options: SourceOptions) -> None:
        """Fill the draft with one record; raises Skip."""
        ...


@dataclass
class SampleDraft:
    """A sample in the making: its elements, its media, and notes of all that was changed or left out."""

    messages: list[Message] = field(default_factory=list)
    content: list[Element] = field(default_factory=list)
    media: dict[str, bytes] = field(default_factory=dict)
    id: str | None = None
    whole: Sample | None = None
    """A sample that is already of our schema; then only `media` counts besides it."""
    tools: list[Mapping[str, Any]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    task: str | None = None
    left_out: list[str] = field(default_factory=list)
    """A reason for each picture that the sample does without."""
    notes: list[str] = field(default_factory=list)
    """Further lines that the summary counts, as `marks kept as words: ...`."""
    _opened: list[RecordFields] = field(default_factory=list)
    _known: dict[bytes, Image] = field(default_factory=dict)
    _films: dict[bytes, Video] = field(default_factory=dict)

    def open(self, keys: Keys, value: Mapping[str, Any]) -> RecordFields:
        """Read an object of the record key by key; keys that nobody reads are counted. Raises Skip."""
        if not isinstance(value, Mapping):
            got = type(value).__name__
            raise Skip("not an object", f"{keys.kind}: an object expected, got {got}")
        fields = RecordFields(keys, value)
        self._opened.append(fields)
        return fields

    @property
    def unread(self) -> Iterator[str]:
        """Yield the keys that nobody took."""
        for fields in self._opened:
            yield from fields.unread

    def image(self, data: bytes) -> Image:
        """Add a picture: upright, opaque, else byte for byte; the same bytes again are one member. Raises Skip."""
        # Conversations repeat their pictures.
        digest = hashlib.sha256(data).digest()
        if digest not in self._known:
            number = len(self._known)
            picture = prepare_image(data)
            self._known[digest] = self._add_picture(f"img{number}", picture)
        return self._known[digest]

    def video(self, data: bytes, **part: Any) -> Video:
        """Add a video file as member `vid<number>`; `part` are the fields of Video that narrow it. Raises Skip.

        The same bytes again are one member.
        """
        digest = hashlib.sha256(data).digest()
        if digest not in self._films:
            film = prepare_video(data)
            ref = f"{self._next_video()}.{film.suffix}"
            self.media[ref] = data
            facts = film.facts
            self._films[digest] = Video(
                frames=(),
                times=film.times,
                width=facts.width,
                height=facts.height,
                ref=ref,
                file_frames=facts.frames,
                fps=facts.fps,
                duration=facts.duration,
            )
        return replace(self._films[digest], **part)

    def frames(self, files: Sequence[bytes], times: Sequence[float], **part: Any) -> Video:
        """Add extracted frames, all of one size, with the seconds at which each is shown. Raises Skip."""
        if len(files) != len(times) or not files:
            raise Skip("frames without times", f"{len(files)} frames, {len(times)} times")
        if any(later < earlier for earlier, later in pairwise(times)):
            raise Skip("times that go back", str(list(times))[:80])

        stem = self._next_video()
        images: list[Image] = []
        for index, data in enumerate(files):
            images.append(self._add_picture(f"{stem}.{index:03d}", prepare_image(data)))
        width, height = images[0].width, images[0].height
        if any((image.width, image.height) != (width, height) for image in images):
            raise Skip("frames of different sizes", images[0].ref)
        refs = tuple(image.ref for image in images)
        return Video(refs, tuple(map(float, times)), width, height, **part)

    def _next_video(self) -> str:
        # All frames of a video begin with its name.
        stems = {ref.partition(".")[0] for ref in self.media if ref.startswith("vid")}
        return f"vid{len(stems)}"

    def _add_picture(self, stem: str, picture: Picture) -> Image:
        ref = f"{stem}.{picture.suffix}"
        self.media[ref] = picture.data
        if picture.change:
            # A reader of the shards can tell that these are not the original bytes.
            self.meta.setdefault("changed", {})[ref] = picture.change
        return Image(ref, picture.width, picture.height)

    def sample(self, sample_id: str) -> Sample:
        """Return the finished sample; raises Skip if nothing is in it."""
        if self.whole is not None:
            return replace(self.whole, meta={**self.whole.meta, **self.meta})
        if not self.messages and not self.content:
            raise Skip("empty", "no text and no media")
        kind = "chat" if self.messages else "doc"
        return Sample(
            id=sample_id,
            kind=kind,
            messages=tuple(self.messages),
            content=tuple(self.content),
            tools=tuple(self.tools),
            weight=self.weight,
            task=self.task,
            meta=self.meta,
        )
