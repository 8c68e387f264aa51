"""Imported once for all processes that trace ranks: libraries are made quiet before they are imported."""

from visionloom.common.quiet import quiet_libraries

quiet_libraries()

from visionloom.forecast import imagine as imagine  # noqa: E402
