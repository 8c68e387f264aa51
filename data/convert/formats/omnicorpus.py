"""OmniCorpus: parquet as in OBELICS, with the document's facts in `general_metadata` and a list of objects for pictures."""

from typing import Any, ClassVar

from visionloom.data.convert.formats import obelics
from visionloom.data.convert.formats.interleaved import keep_facts
from visionloom.data.convert.keys import Keys, decoded
from visionloom.data.convert.source import SampleDraft, SourceOptions


class OmniCorpus(obelics.Obelics):
    """One row a document; its id and URL are kept."""

    keys: ClassVar[tuple[Keys, ...]] = (
        Keys(
            "record",
            {
                "images": obelics.ROW.read["images"],
                "texts": obelics.ROW.read["texts"],
                "general_metadata": "id of the sample, meta.url, meta.fluency",
            },
        ),
    )
    facts: ClassVar[tuple[str, ...]] = ("general_metadata",)

    def convert(self, value: Any, draft: SampleDraft, options: SourceOptions) -> None:
        """Fill the draft with a document; raises Skip."""
        facts = obelics.first_object(decoded(value.get("general_metadata")))
        # Taken before the rest, which reads the same column.
        if isinstance(facts.get("id"), str):
            draft.id = facts["id"]
        keep_facts(draft, facts, {"fluency_prob": "fluency"})
        super().convert(value, draft, options)
