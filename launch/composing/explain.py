"""Turn what Hydra, OmegaConf and YAML say about a wrong configuration into one line that names the option and the fix."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from visionloom.common.errors import did_you_mean, unknown
from visionloom.common.settings import ANY
from visionloom.common.text import first_line, one_line
from visionloom.forecast.machine import FOLDER as GPUS
from visionloom.train.config import RunConfig
from visionloom.train.old_options import old_option

LONGEST = 2000
"""Characters of a line, which may quote a value or list the names that there are."""


def explain(error: Exception, config_dir: str = "") -> str:
    """Return one line for an error of composing: what is wrong, where, and the nearest right spelling.

    Args:
        error: a HydraException, an OmegaConfBaseException, or what Hydra fails with on odd input.
        config_dir: the user's own recipes, for the list of what exists.
    """
    line = one_line(ComposingError(error, config_dir).line())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


@dataclasses.dataclass(frozen=True)
class ComposingError:
    """What Hydra or OmegaConf raised, in the user's terms."""

    error: Exception
    config_dir: str

    def line(self) -> str:
        """Return what is wrong, with the file in which it is."""
        text = str(self.error)
        if isinstance(self.error, MissingConfigException):
            return self.missing_file(self.error)
        if isinstance(self.error, RecursionError):
            return "the recipe is nested too deeply, or its values refer to each other in a circle"
        if isinstance(self.error, OverrideParseException):
            word = self.error.override
            return f"command line: cannot read '{word}': write key=value, and quote a value that has special characters"
        # The defaults of a file have `override /model: ???`.
        if unchosen := re.match(r"You must specify '(\w+)'", text):
            names = ", ".join(available(unchosen[1], self.config_dir))
            return f"no {unchosen[1]} is chosen: pass {unchosen[1]}=NAME, NAME one of {names}"
        file = re.match(r"In '([^']+)'", text)
        return (f"{file[1]}.yaml: " if file else "") + self.fault()

    def missing_file(self, error: MissingConfigException) -> str:
        """Return the line for a recipe or an option of a group that does not exist."""
        match = re.search(r"Could not (?:find|load) '([^']*)'", str(error))
        missing = match[1] if match else error.missing_cfg_file or ""
        group, _, name = missing.partition("/")
        names = available(group, self.config_dir)
        if not names:
            return f"no such group: {group}{did_you_mean(group, groups())}"
        return unknown(group, name or "(nothing)", names)

    def fault(self) -> str:
        """Return what is wrong by the first cause that knows its key, or else by Hydra's own text."""
        cause = self.cause_with_key()
        if isinstance(cause, InterpolationResolutionError):
            # OmegaConf writes the type of the exception before what it says.
            _, _, reason = first_line(cause).rpartition("resolving interpolation: ")
            return f"{cause.full_key}: {reason}"
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            return _missing_key(cause)
        if cause is None:
            return self.fault_of_hydra()
        if "is not a ListConfig" in str(cause):
            return f"{cause.full_key}: the value must be a list: [a, b]"
        return f"{cause.full_key}: {first_line(cause)}"

    def cause_with_key(self) -> OmegaConfBaseException | None:
        """Return the first error on the way to the cause that knows its key: Hydra's own know none."""
        error: BaseException | None = self.error
        while error is not None:
            if isinstance(error, OmegaConfBaseException) and error.full_key:
                return error
            error = error.__cause__ or error.__context__
        return None

    def fault_of_hydra(self) -> str:
        """Return what is wrong, from the text of an error that knows no key."""
        text = str(self.error)
        if group := re.match(r"(?:In '[^']+': )?Could not override '([^']+)'", text):
            return f"no such group: {group[1]}{did_you_mean(group[1], groups())}"
        if removed := re.match(r"Could not delete from config\. '([^']+)' does not exist", text):
            names = [path.rpartition(".")[2] for path in suggestions(removed[1])]
            return nothing_to_remove(removed[1], names)
        twice = r"Multiple values for (\w+)\. To override a value use 'override \1: (.*)'"
        if again := re.match(twice, text):
            return f"{again[1]} is chosen, not added: write {again[1]}={again[2]}"
        if "An item is already at" in text:
            return f"{first_line(self.error)} Write it without the plus"
        return first_line(self.error)


def unknown_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield dotted paths in a composed configuration that its schema does not have.

    Hydra accepts any key behind `+` and `++`, and OmegaConf drops it in silence when it builds the dataclasses.
    """
    schema = OmegaConf.get_type(config)
    known = None  # a mapping may have any key
    if dataclasses.is_dataclass(schema):
        known = {field.name for field in dataclasses.fields(schema)}
    for key in map(str, config):
        if known is not None and key not in known:
            yield f"{prefix}{key}"
        # Neither may be read: the one has no value, the other may lead anywhere.
        elif OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        elif isinstance(config[key], DictConfig):
            yield from unknown_keys(config[key], f"{prefix}{key}.")


def no_such_key(path: str) -> str:
    """Return the line for a key that the schema does not have: its new name, or the nearest ones that there are."""
    if line := old_option(path):
        return line
    close = suggestions(path)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"no such key: {one_line(path)}{hint}"


def nothing_to_remove(path: str, names: list[str]) -> str:
    """Return the line for a `~word` whose section does not have the name; `names` are those that it has."""
    if line := old_option(path):
        return line
    close = did_you_mean(path.rpartition(".")[2], names)
    there_are = f", there are {', '.join(names)}" if names else ""
    return f"~{one_line(path)}: there is nothing of that name{close}{there_are}"


def suggestions(path: str) -> list[str]:
    """Return at most two dotted paths of the schema that the user may have meant, best first.

    A near name at the same place goes before the same name at another place, and that before a near name anywhere.
    """
    parts = path.split(".")
    *section, name = parts
    in_section, anywhere = dict[str, str](), dict[str, list[str]]()
    for candidate in _fill_names(schema_paths(), parts):
        *its_section, its_name = candidate.split(".")
        anywhere.setdefault(its_name, []).append(candidate)
        if its_section == section:
            in_section[its_name] = candidate

    if near := difflib.get_close_matches(name, in_section, n=1):
        return [in_section[near[0]]]
    # Farther away a name must be nearer: 0.75 instead of difflib's 0.6.
    names = difflib.get_close_matches(name, anywhere, n=1, cutoff=0.75)
    candidates = anywhere[names[0]] if names else []
    return sorted(candidates, key=lambda candidate: candidate.count("."))[:2]


def schema_paths(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Return every dotted path of the schema, sections included; the free keys of mappings are `<name>`."""
    paths = []
    for name, hint in typing.get_type_hints(schema).items():
        path = f"{prefix}{name}"
        paths.append(path)
        if typing.get_origin(hint) is dict:
            path, hint = f"{path}.{ANY}", typing.get_args(hint)[1]
        elif isinstance(hint, types.UnionType):
            hint = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(hint):
            paths += schema_paths(typing.cast(type, hint), f"{path}.")
    return paths


def available(group: str, config_dir: str = "") -> list[str]:
    """Return the names that can be chosen in a group of recipes/, nested ones included: `demo`, `lora/demo`."""
    roots: list[Traversable] = [files("visionloom.recipes").joinpath(group)]
    if config_dir:
        roots.append(Path(config_dir) / group)
    return sorted({name for root in roots if root.is_dir() for name in _yaml_names(root)})


def _yaml_names(folder: Traversable, prefix: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if isinstance(entry, Path) and entry.is_symlink() and entry.is_dir():
            continue  # it may lead back to where it lies
        if entry.is_dir():
            yield from _yaml_names(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml")


def _fill_names(paths: list[str], parts: list[str]) -> list[str]:
    """Return the paths with each `<name>` replaced by what the user wrote at that place, if they wrote as much."""
    filled = []
    for path in paths:
        names = path.split(".")
        for at, name in enumerate(names[: len(parts)]):
            if name == ANY:
                names[at] = parts[at]
        filled.append(".".join(names))
    return filled


def groups() -> list[str]:
    """Return the groups of recipes/, one of whose names a word chooses: `model=tiny`."""
    # The numbers of a GPU are no part of a run.
    return [
        entry.name
        for entry in files("visionloom.recipes").iterdir()
        if entry.is_dir() and not entry.name.startswith("_") and entry.name != GPUS
    ]


def _missing_key(cause: OmegaConfBaseException) -> str:
    """Return the line for a key that a section, or a name that a mapping, does not have."""
    path, parent = str(cause.full_key), cause.parent_node
    if path == "recipe":
        return (
            "its values are not those of a run: begin the file with the line `# @package _global_`"
        )
    if path in typing.get_type_hints(RunConfig):
        return f"{path} cannot be removed: name what is in it, as in ~{path}.{ANY}"
    if not isinstance(parent, DictConfig) or dataclasses.is_dataclass(OmegaConf.get_type(parent)):
        return no_such_key(path)
    # A mapping: its names are free, so a new one is not wrong as such.
    names = list(map(str, parent))
    there_are = f", there are {', '.join(names)}" if names else ""
    value = "{...}" if dataclasses.is_dataclass(parent._metadata.element_type) else "VALUE"
    close = did_you_mean(path.rpartition(".")[2], names)
    return f"no such name: {path}{close}{there_are}; to add it, write '+{path}={value}'"
