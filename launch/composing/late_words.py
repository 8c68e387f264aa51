"""Words of the command line that Hydra cannot apply: they are applied to what it has composed.

OmegaConf refuses to override inside an optional section that is None (a phase's layout, teacher, rewards or optimizer), and to add an entry to a mapping of
dataclasses; of entries to remove it does not say which there are.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from visionloom.common.errors import UserError
from visionloom.data.config import DatasetConfig, ValidationConfig
from visionloom.launch.composing.explain import nothing_to_remove
from visionloom.model.distillation_config import DistillationConfig
from visionloom.parallel.config import ParallelConfig
from visionloom.train.optim.config import OptimConfig
from visionloom.train.phase.config import PhaseConfig
from visionloom.train.reinforcement.config import ReinforcementConfig

_ENTRIES: Final[dict[str, type]] = {
    "phases": PhaseConfig,
    "data.datasets": DatasetConfig,
    "data.validation": ValidationConfig,
}
"""Mappings, and what their entries are."""
_MAPPINGS: Final = f"(?:{'|'.join(map(re.escape, _ENTRIES))})"
_REMOVED: Final = rf"~{_MAPPINGS}\.[^.=]+$"
_ADDED: Final = rf"\+{{1,2}}{_MAPPINGS}\.[^.=]+[.=]"
_OPTIONAL: Final[dict[str, type]] = {
    "parallel": ParallelConfig,
    "distillation": DistillationConfig,
    "distillation.teacher.parallel": ParallelConfig,
    "rl": ReinforcementConfig,
    "optim": OptimConfig,
}
"""Sections of a phase that are None unless something in them is set; outer ones first."""
_IN_OPTIONAL: Final = rf"\+{{0,2}}phases\.[^.=]+\.(?:{'|'.join(map(re.escape, _OPTIONAL))})[.=]"
LATE: Final = re.compile(f"{_REMOVED}|{_IN_OPTIONAL}|{_ADDED}")
"""Beginnings of such words."""


def apply_late(config: DictConfig, words: Sequence[str]) -> None:
    """Apply words that match LATE, in their order, to a composed configuration.

    Raises:
        UserError: for an entry that cannot be removed, since there is none of that name.
    """
    for override in OverridesParser.create().parse_overrides(list(words)):
        EntryOverride(config, override).apply()


class EntryOverride:
    """A word about an entry of a mapping: `phases.<name>...` or `data.datasets.<name>...`."""

    def __init__(self, config: DictConfig, override: Override) -> None:
        """Find the mapping and the name of the entry."""
        self.config = config
        self.override = override
        self.path: str = override.key_or_group
        parts = self.path.split(".")
        self.is_phase = parts[0] == "phases"
        depth = 1 if self.is_phase else 2
        self.of = ".".join(parts[:depth])
        self.mapping: DictConfig = OmegaConf.select(config, self.of)
        self.name = parts[depth]
        self.fields = parts[depth + 1 :]

    def apply(self) -> None:
        """Remove the entry, or set the value in it."""
        if self.override.is_delete():
            self.remove()
            return

        self.add_missing()
        entry: Any = self.mapping[self.name]
        if self.is_phase:
            self.add_sections(entry)
        # The datasets of a mixture and the names of rewards are free, and OmegaConf adds them only when forced.
        is_new = not {"mixture", "reward", "functions", "judged_by"}.isdisjoint(self.fields)
        OmegaConf.update(self.config, self.path, self.override.value(), force_add=is_new)

    def add_sections(self, phase: DictConfig) -> None:
        """Add the optional sections of a phase that the word is in, the outer ones first."""
        for path, kind in _OPTIONAL.items():
            names = path.split(".")
            is_in = self.fields[: len(names)] == names
            if is_in and OmegaConf.select(phase, path) is None:
                OmegaConf.update(phase, path, kind())

    def add_missing(self) -> None:
        """Add the entry with its defaults, where a word with a plus may do so."""
        adds = self.override.is_add() or self.override.is_force_add()
        # A new phase must be given whole, so that a mistyped name is not taken for one.
        may_be_new = not self.fields or not self.is_phase
        if self.name not in self.mapping and adds and may_be_new:
            with open_dict(self.mapping):
                self.mapping[self.name] = _ENTRIES[self.of]()

    def remove(self) -> None:
        """Take the entry out of the mapping; UserError if there is none of that name."""
        if self.name not in self.mapping:
            raise UserError(nothing_to_remove(self.path, list(map(str, self.mapping))))
        with open_dict(self.mapping):
            del self.mapping[self.name]
