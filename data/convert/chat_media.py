"""Pictures and videos of a conversation, and the places that they take in its messages."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from visionloom.data.convert.chat_keys import PICTURE, REFERENCES
from visionloom.data.convert.files import MediaFiles, named, reference
from visionloom.data.convert.keys import RecordFields, listed
from visionloom.data.convert.marks import with_placeholders
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft
from visionloom.data.convert.videos import SOURCES, add_video
from visionloom.data.shards.sample import Image, Message, Text, Video, media_refs

_LIKE_PLACEHOLDER: Final = re.compile(
    r"<\|?(?:[Ii]mage|[Vv]ideo)[ _-]?\d+\|?>|<\|(?:image|video)\|>|<(?:IMAGE|Image|VIDEO|Video)(?:Here)?>"
    r"|<(?:image|video)_(?:placeholder|soft_token)>"
)
"""Placeholders as other formats write them: `<image 1>` (MMMU), `<|image_1|>` (Phi), `<IMAGE>`, `<ImageHere>`."""


class MediaQueue:
    """Pictures or videos that placeholders stand for, taken in order."""

    def __init__(self, placeholder: str, refs: list[Any]) -> None:
        self.placeholder, self.refs, self.used = placeholder, refs, 0

    def put_next(self, refs: list[Any]) -> int:
        """Put a turn's own media before those that are still to come; return the number taken so far."""
        self.refs[self.used : self.used] = refs
        return self.used

    def next(self) -> Any:
        """Return the reference of the next one; raises Skip if there is none."""
        if self.used >= len(self.refs):
            counts = f"{self.used + 1} {self.placeholder}, {len(self.refs)} given"
            raise Skip("more placeholders than media", counts)
        self.used += 1
        return self.refs[self.used - 1]


class ChatMedia:
    """The media of one record: those that wait for a placeholder, and those that typed parts name themselves."""

    def __init__(
        self,
        record: RecordFields,
        draft: SampleDraft,
        files: MediaFiles,
        images: Sequence[str],
        videos: Sequence[str],
    ) -> None:
        """`images`, `videos`: keys of the record's media."""
        self.record, self.draft, self.files = record, draft, files
        self.images = MediaQueue("<image>", media_of(record, *images))
        self.videos = MediaQueue("<video>", media_of(record, *videos))
        self.in_parts: list[tuple[object, Image | Video]] = []
        """Media that typed parts name, by their references."""

    @property
    def queues(self) -> tuple[MediaQueue, MediaQueue]:
        """Return the pictures and the videos that wait."""
        return self.images, self.videos

    def with_placeholders(self, text: str) -> str:
        """Replace the vision blocks of a rendered prompt by placeholders, where the record has such media."""
        return with_placeholders(text, bool(self.images.refs), bool(self.videos.refs))

    def next(self, queue: MediaQueue) -> Image | Video:
        """Add the next one of a queue to the draft; raises Skip."""
        ref = queue.next()
        if queue is self.videos:
            return add_video(self.draft, self.files, ref, self.record)
        return picture(self.draft, self.files, ref)

    def image_part(self, fields: RecordFields) -> Image:
        """Add the picture of a typed part: the one that it names, else the next of the record."""
        fields.take("type")
        ref = named(fields, *REFERENCES)
        if ref is None:
            return _bounded(picture(self.draft, self.files, self.images.next()), fields)
        image = _bounded(picture(self.draft, self.files, ref), fields)
        self.in_parts.append((reference(ref), image))
        return image

    def video_part(self, fields: RecordFields) -> Video:
        """Add the video of a typed part: the one that it names, else the next of the record."""
        fields.take("type")
        ref = named(fields, *SOURCES)
        if ref is None:
            return add_video(self.draft, self.files, self.videos.next(), fields, self.record)
        video = add_video(self.draft, self.files, ref, fields, self.record)
        self.in_parts.append((reference(ref), video))
        return video

    def placed(self, messages: list[Message]) -> list[Message]:
        """Put media that no placeholder asks for first in the first user turn; some but not all is a fault.

        Media that typed parts name too are there already.
        """
        refs = [*self.images.refs, *self.videos.refs]
        used = self.images.used + self.videos.used
        if used == len(refs) or (not used and self._are_in_parts(refs)):
            return messages
        if used:
            counts = f"{used} placeholders, {len(refs)} given"
            raise Skip("fewer placeholders than media", counts)

        media = [self.next(queue) for queue in self.queues for _ in queue.refs]
        if self.in_parts:
            self._refuse_others(media)
            return messages
        return self._before_first_question(messages, media)

    def _before_first_question(
        self, messages: list[Message], media: list[Image | Video]
    ) -> list[Message]:
        """Put media before the content of the first user turn; raises Skip where a text may ask for them elsewhere."""
        places = [place for place, message in enumerate(messages) if message.role == "user"]
        if not places:
            raise Skip("media without a user turn", f"{len(media)} given")
        for message in messages:
            self._refuse_strange(message)

        first = places[0]
        question = messages[first]
        question = replace(question, content=(*media, *question.content))
        return [*messages[:first], question, *messages[first + 1 :]]

    @staticmethod
    def _refuse_strange(message: Message) -> None:
        """Raise Skip for a text that may ask for media in the words of another format."""
        # An assistant may speak of placeholders.
        if message.role == "assistant":
            return
        for element in message.content:
            strange = _LIKE_PLACEHOLDER.search(element.text) if isinstance(element, Text) else None
            if strange:
                raise Skip("unknown placeholder", f"{strange[0]}: <image> or <video> expected")

    def _refuse_others(self, media: list[Image | Video]) -> None:
        """Raise Skip for media besides those that typed parts name; the same files under other names are none."""
        there = {media_refs(part) for _, part in self.in_parts}
        if any(media_refs(one) not in there for one in media):
            raise Skip("media beside typed parts", f"{len(media)} given that no part names")

    def _are_in_parts(self, refs: list[Any]) -> bool:
        """Return whether typed parts name all of these too."""
        there = [ref for ref, _ in self.in_parts]
        return all(reference(ref) in there for ref in refs)


def picture(draft: SampleDraft, files: MediaFiles, ref: Any) -> Image:
    """Add a picture by its reference, or by an object with it and its own limits. Raises Skip."""
    if not isinstance(ref, Mapping):
        return draft.image(files.read(ref))
    fields = draft.open(PICTURE, ref)
    # The bytes decide what it is.
    fields.take_all("type", "media_type")
    inner = named(fields, "bytes", *REFERENCES)
    # As in {"image_url": {"url": ...}}.
    if isinstance(inner, Mapping):
        return _bounded(picture(draft, files, inner), fields)
    return _bounded(draft.image(files.read(inner)), fields)


def _bounded(image: Image, fields: RecordFields) -> Image:
    """Return the picture with the limits that the object gives."""
    least, most = fields.whole("min_pixels"), fields.whole("max_pixels")
    return replace(image, min_pixels=least or image.min_pixels, max_pixels=most or image.max_pixels)


def media_of(fields: RecordFields, *names: str) -> list[Any]:
    """Return the media under these keys; raises Skip where two of them name different ones."""
    if not fields.has(*names):
        return []
    lists = [listed(fields.take(name)) for name in names]
    given = [refs for refs in lists if refs]
    if not given:
        return []

    first = [reference(ref) for ref in given[0]]
    # `image` and `images` may both be there, and mean the same.
    for refs in given[1:]:
        if [reference(ref) for ref in refs] != first:
            keys = f"{fields.keys.kind} keys {' and '.join(names)}"
            raise Skip("keys that say different things", keys)
    return list(given[0])
