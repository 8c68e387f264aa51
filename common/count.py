"""A number of things in a document that somebody else wrote."""

from typing import Annotated

# A file of its own: pydantic.types takes 30 ms to import, which commands need not wait for.
from pydantic import Field

Count = Annotated[int, Field(ge=0, le=2**62)]
"""Sums of two stay within 64 bits."""
