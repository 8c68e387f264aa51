"""Boxes, points and names that `<bbox>` and `<ref-object>` in a text stand for: ms-swift's `objects`, taken in order."""

from collections.abc import Mapping
from typing import Any, Final

from visionloom.data.convert.keys import Keys, RecordFields, decoded
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft
from visionloom.data.shards.sample import Box, Point, Space, Text

OBJECTS: Final = Keys(
    "objects",
    {
        "ref": "names for `<ref-object>`",
        "bbox": "boxes (four numbers) and points (two) for `<bbox>`",
        "bbox_type": "real (pixels), norm1 or norm1000",
        "image_id": "picture of each box, from 0",
    },
)
_SPACES: Final = {"real": 1.0, "norm1": 1000.0, "norm1000": 1.0}
"""ms-swift's names of coordinate systems, and the factor to pixels (real) or thousandths."""


class Objects:
    """The objects of one record. Where no placeholder asks for any, they are not read; some but not all is a fault."""

    def __init__(self, record: RecordFields, draft: SampleDraft) -> None:
        value = decoded(record.value.get("objects"))
        if isinstance(value, Mapping):
            record.take("objects")
        self.fields = draft.open(OBJECTS, value if isinstance(value, Mapping) else {})
        self.names, self.places = self._list("ref"), self._list("bbox")
        self.images = self._list("image_id")
        self.system = self.fields.value.get("bbox_type") or "real"
        self.named = self.placed = 0

    def _list(self, name: str) -> list[Any]:
        value = self.fields.value.get(name)
        return value if isinstance(value, list) else []

    def name(self) -> Text:
        """Return the next name; raises Skip if there is none."""
        if self.named >= len(self.names):
            counts = f"{self.named + 1} <ref-object>, {len(self.names)} given"
            raise Skip("more placeholders than objects", counts)
        self.fields.take("ref")
        self.named += 1
        return Text(str(self.names[self.named - 1]))

    def place(self) -> Box | Point:
        """Return the next box (four numbers) or point (two); raises Skip if there is none."""
        number = self.placed
        if number >= len(self.places):
            counts = f"{number + 1} <bbox>, {len(self.places)} given"
            raise Skip("more placeholders than objects", counts)
        for name in ("bbox", "bbox_type", "image_id"):
            self.fields.take(name)

        # Without image_id all are on the first picture.
        image = int(self.images[number]) if number < len(self.images) else 0
        values, factor = self.places[number], _SPACES.get(self.system)
        if factor is None or not isinstance(values, list) or len(values) not in (2, 4):
            raise Skip("broken box", f"{self.system}: {str(values)[:80]}")
        # Pixels stay as they are; norm1 becomes thousandths.
        numbers = [float(value) * factor for value in values]
        space: Space = "px" if self.system == "real" else "relative1000"

        self.placed += 1
        if len(numbers) == 2:
            return Point(image, (numbers[0], numbers[1]), space)
        return Box(image, (numbers[0], numbers[1], numbers[2], numbers[3]), space)

    def check(self) -> None:
        """Raise Skip if placeholders took some of the objects but not all."""
        names = ("<ref-object>", self.named, len(self.names))
        places = ("<bbox>", self.placed, len(self.places))
        for kind, used, given in (names, places):
            if used and used < given:
                raise Skip("fewer placeholders than objects", f"{used} {kind}, {given} given")
