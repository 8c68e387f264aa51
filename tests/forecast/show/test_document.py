"""plan.json: every number of a forecast, with its unit. Reference: the dataclasses of forecast/results.py."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from visionloom.forecast.show.document import document
from visionloom.tests.forecast.made import good_forecast, run_forecast

DOCS = Path(__file__).resolve().parents[3] / "docs"


def leaves(value: Any) -> Iterator[Any]:
    """The plain values inside mappings and lists, in their order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def keys(value: Any) -> Iterator[str]:
    """The keys of all mappings but those whose keys are names."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            if not key.endswith(("_by_part", "_by_category")):
                yield from keys(each)
    elif isinstance(value, list):
        for each in value:
            yield from keys(each)


def test_nothing_of_a_forecast_is_left_out() -> None:
    """A field that is added to the dataclasses and not to the file turns this red."""
    forecast = run_forecast()
    written = json.loads(json.dumps(document(forecast)))
    (phase,) = written["phases"]
    (source,) = asdict(forecast)["phases"]
    # The days follow from steps and their time.
    phase.pop("days")
    assert sorted(map(str, leaves(phase))) == sorted(map(str, leaves(source)))


def test_the_verdict_and_the_sums_are_of_all_phases() -> None:
    written = document(good_forecast())
    assert written["can_run"]
    assert written["days"] == 2 * 1000 * 4.0 / 86_400
    assert written["gpu_hours"] == 16 * 2 * 1000 * 4.0 / 3600
    assert not document(run_forecast())["can_run"]


def test_the_documentation_names_every_key() -> None:
    page = (DOCS / "planning.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    assert set(keys(document(run_forecast()))) <= named
