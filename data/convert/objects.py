"""Boxes, points and names that `<bbox>` and `<ref-object>` in a text stand for: ms-swift's `objects`, taken in order."""

from collections.abc import Mapping
from typing import Any, Final

from visionloom.data.convert.keys import Keys, RecordFields, decoded
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft
from visionloom.data.shards.sample import Box, Point, Text

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
        """The next name."""
        if self.named >= len(self.names):
            raise Skip(
                "more placeholders than objects",
                f"{self.named + 1} <ref-object>, {len(self.names)} given",
            )
        self.fields.take("ref")
        self.named += 1
        return Text(str(self.names[self.named - 1]))

    def place(self) -> Box | Point:
        """The next box (four numbers) or point (two)."""
        if self.placed >= len(self.places):
            raise Skip(
                "more placeholders than objects",
                f"{self.placed + 1} <bbox>, {len(self.places)} given",
            )
        for name in ("bbox", "bbox_type", "image_id"):
            self.fields.take(name)
        image = int(self.images[self.placed]) if self.placed < len(self.images) else 0
        factor, values = _SPACES.get(self.system), self.places[self.placed]
        if factor is None or not isinstance(values, list) or len(values) not in (2, 4):
            raise Skip("broken box", f"{self.system}: {str(values)[:80]}")
        numbers = tuple(float(value) * factor for value in values)
        space: Any = "px" if self.system == "real" else "relative1000"
        self.placed += 1
        if len(numbers) == 4:
            return Box(image, numbers, space)
        return Point(image, (numbers[0], numbers[1]), space)

    def check(self) -> None:
        """Raise Skip if placeholders took some of the objects but not all."""
        for kind, used, given in (
            ("<ref-object>", self.named, self.names),
            ("<bbox>", self.placed, self.places),
        ):
            if used and used < len(given):
                raise Skip("fewer placeholders than objects", f"{used} {kind}, {len(given)} given")
