"""OmniCorpus: parquet as in OBELICS, with the document's facts in `general_metadata` and a list of objects for pictures."""

from typing import Any

from visionloom.data.convert.interleaved import keep_facts
from visionloom.data.convert.obelics import Obelics
from visionloom.data.convert.source import Draft, Options
from visionloom.data.convert.tables import decoded


class OmniCorpus(Obelics):
    """One row a document; its id and URL are kept."""

    facts_column = "general_metadata"

    def convert(self, value: Any, draft: Draft, options: Options) -> None:
        """A document."""
        facts = decoded(value.get("general_metadata"))
        if isinstance(facts, dict) and isinstance(facts.get("id"), str):
            draft.id = facts["id"]
        keep_facts(draft, facts, {"fluency_prob": "fluency"})
        super().convert(value, draft, options)
