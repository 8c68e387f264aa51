"""YAML that a run wrote and somebody else may have changed: plain values, within bounds."""

import json
from pathlib import Path
from typing import Any, Final

import yaml

from visionloom.common.jsonfile import JsonError, load_json
from visionloom.common.places import PlaceError, read_located
from visionloom.common.text import first_line

LARGEST: Final = 1 << 18
"""Bytes: 256 KiB; the demo's config.yaml has 5,600. PyYAML reads some 100 KiB a second where it has no C library."""
LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(folder: Path, name: str) -> dict[str, Any]:
    """Read a file of a folder that holds a mapping, with nothing in it that JSON has not.

    Raises:
        JsonError: if it is none, too large, has aliases (a few of them stand for endless text), or is no regular file there.
        FileNotFoundError: if it is not there.
        OSError: if it cannot be read.
    """
    where = str(folder / name)
    try:
        content = read_located(folder, name, LARGEST)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, LOADER)):
            raise JsonError(f"{where}: has aliases (*name), which no run writes")
        # By way of JSON: dates, sets and other objects of YAML cannot be written in it.
        document = json.dumps(yaml.load(content, LOADER))
    except PlaceError as error:
        raise JsonError(f"{where} {error}") from None
    except JsonError:
        raise
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise JsonError(f"{where}: not YAML of plain values: {first_line(error)}") from None

    value = load_json(document, where)
    if not isinstance(value, dict):
        raise JsonError(f"{where}: the document should be a mapping")
    return value
