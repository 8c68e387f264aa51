"""What a source format has to say, and what all of them share: skipping a record with its reason, and drafts of samples."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.media import Picture, prepare_image, prepare_video
from visionloom.data.convert.skip import Skip
from visionloom.data.sample import Element, Image, Message, Sample, Text, Video
from visionloom.data.write_parts import Part


@dataclass(frozen=True, slots=True)
class Options:
    """What a source may need to know beside its path."""

    files: MediaFiles
    """Where pictures and videos lie."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Roles of a table's columns: {"image": "jpg", "text": "caption"}."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source: where it stands, for messages, and its value."""

    place: str
    value: Any


class Source(Protocol):
    """A format: how a source is cut into parts, read, and how a record becomes a sample. Picklable."""

    def parts(self, path: Path, size: int) -> Iterator[Part]:
        """Parts of about `size` records in order, found without reading media."""
        ...

    def records(self, where: Any) -> Iterator[Record]:
        """The records of a part in order; a broken one has a Skip for its value."""
        ...

    def convert(self, value: Any, draft: "Draft", options: Options) -> None:
        """Fill the draft with one record; raises Skip."""
        ...


@dataclass
class Draft:
    """A sample in the making: its elements, its media, and what had to be changed or left out."""

    messages: list[Message] = field(default_factory=list)
    content: list[Element] = field(default_factory=list)
    media: dict[str, bytes] = field(default_factory=dict)
    id: str | None = None
    whole: Sample | None = None
    """A sample that is already of our schema; then only `media` counts beside it."""
    tools: list[Mapping[str, Any]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """A reason for each picture that the sample does without."""
    _known: dict[bytes, Image] = field(default_factory=dict)

    def image(self, data: bytes) -> Image:
        """Add a picture: upright, opaque, else byte for byte; the same bytes again are one member. Raises Skip."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._known:
            number = len(self._known)
            picture = prepare_image(data)
            self._known[digest] = self._add_picture(f"img{number}", picture)
        return self._known[digest]

    def video(self, data: bytes, number: int, **part: Any) -> Video:
        """Add a video file as member `vid<number>`; `part` are the fields of Video that narrow it. Raises Skip."""
        film = prepare_video(data)
        ref = f"vid{number}.{film.suffix}"
        self.media[ref] = data
        facts = film.facts
        return Video((), film.times, facts.width, facts.height, ref, facts.frames, facts.fps, facts.duration, **part)

    def frames(self, files: Sequence[bytes], times: Sequence[float], number: int, **part: Any) -> Video:
        """Add extracted frames, all of one size, with the seconds at which each is shown. Raises Skip."""
        if len(files) != len(times) or not files:
            raise Skip("frames without times", f"{len(files)} frames, {len(times)} times")
        if any(later < earlier for earlier, later in pairwise(times)):
            raise Skip("times that go back", str(list(times))[:80])
        shown = [self._add_picture(f"vid{number}.{index:03d}", prepare_image(data)) for index, data in enumerate(files)]
        if len({(image.width, image.height) for image in shown}) > 1:
            raise Skip("frames of different sizes", shown[0].ref)
        refs = tuple(image.ref for image in shown)
        return Video(refs, tuple(map(float, times)), shown[0].width, shown[0].height, **part)

    def _add_picture(self, stem: str, picture: Picture) -> Image:
        ref = f"{stem}.{picture.suffix}"
        self.media[ref] = picture.data
        if picture.change:
            self.meta.setdefault("changed", {})[ref] = picture.change
        return Image(ref, picture.width, picture.height)

    def caption(self, media: Image | Video, text: str) -> None:
        """Make it a document of a picture or a video, and what is said of it."""
        if not text.strip():
            raise Skip("no caption", "")
        self.content = [media, Text(text.strip())]

    def sample(self, sample_id: str) -> Sample:
        """The finished sample; raises Skip if nothing is in it."""
        if self.whole is not None:
            return replace(self.whole, meta={**self.whole.meta, **self.meta})
        if not self.messages and not self.content:
            raise Skip("empty", "no text and no media")
        kind = "chat" if self.messages else "doc"
        return Sample(sample_id, kind, tuple(self.messages), tuple(self.content), tuple(self.tools), meta=self.meta)
