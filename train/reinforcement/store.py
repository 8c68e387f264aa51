"""The rollouts of a phase in its run's folder: WebDataset shards of groups, a folder for each rollout, a shard for each round.

`rollouts/<phase>/00000012/00003.tar` holds the groups of the fourth round of rollout 12, each as `<draw>.json` with its CRC-32 as
`<draw>.crc32`. A shard is there whole or not at all, so a run that was killed goes on after the last one. `pass_rates.jsonl` beside them is the table of pass rates.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, load_json
from visionloom.data.shards.write import tar_writer
from visionloom.train.reinforcement.groups import Group

ROLLOUTS: Final = "rollouts"
TABLE: Final = "pass_rates.jsonl"
SETTINGS: Final = "settings.json"
"""Beside the shards of a rollout: what its answers depend on."""

PromptName = tuple[str, str]
"""Dataset and key of a sample."""


@dataclass(frozen=True)
class PassRate:
    """How many answers to a prompt were right in a rollout."""

    rollout: int
    dataset: str
    key: str
    pass_rate: float


class RolloutStore:
    """Rollouts by their number in the phase. Only the main rank calls it."""

    def __init__(self, run_folder: Path, phase: str, settings: dict[str, Any]) -> None:
        """Keep rollouts of a phase.

        Args:
            run_folder: of the run.
            phase: its name.
            settings: what answers depend on beside the policy; rollouts of others are put aside.
        """
        self.folder = run_folder / ROLLOUTS / phase
        # As they come back from JSON.
        self.settings = json.loads(json.dumps(settings))

    def read(self, rollout: int, policy_step: int) -> list[Group]:
        """Return what is written of a rollout, in the order of the draws.

        What another policy has written, or the same with other settings, is put aside.

        Raises:
            UserError: for a shard that is damaged.
        """
        folder = self._folder(rollout)
        if not folder.exists() or self._is_of(folder, policy_step):
            return self.groups(rollout)
        # Nothing that was written is lost: somebody may want to look at it.
        number = len(list(self.folder.glob(f"{folder.name}.aside-*")))
        folder.rename(folder.with_name(f"{folder.name}.aside-{number}"))
        return []

    def _is_of(self, folder: Path, policy_step: int) -> bool:
        """Return whether a rollout is of these settings and this policy."""
        try:
            settings = json.loads((folder / SETTINGS).read_bytes())
        except (OSError, ValueError):
            return False
        return bool(settings == self.settings | {"policy_step": policy_step})

    def groups(self, rollout: int) -> list[Group]:
        """Return the groups of a rollout, whoever wrote them; raises UserError as `read`."""
        groups = []
        for shard in sorted(self._folder(rollout).glob("*.tar")):
            groups += read_shard(shard)
        return sorted(groups, key=lambda group: group.draw)

    def add(self, rollout: int, policy_step: int, groups: Sequence[Group]) -> None:
        """Write the groups of a round as the next shard of a rollout; raises UserError if that is not possible."""
        folder = self._folder(rollout)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            settings = self.settings | {"policy_step": policy_step}
            # First: a round without them could not be taken for this policy's.
            if not (folder / SETTINGS).exists():
                _write(folder / SETTINGS, json.dumps(settings).encode())
            number = len(list(folder.glob("*.tar")))
            with replacing(folder / f"{number:05d}.tar") as file, tar_writer(file) as tar:
                for group in groups:
                    content = json.dumps(group.to_json(), ensure_ascii=False).encode()
                    checksum = f"{zlib.crc32(content):08x}".encode()
                    tar.write({"__key__": f"{group.draw:09d}", "crc32": checksum, "json": content})
        except OSError as error:
            raise UserError(
                f"{folder}: a rollout cannot be written: {error.strerror}: make room, and start the same command again"
            ) from error

    def pass_rates(self, before: int) -> list[PassRate]:
        """Read the table of pass rates, as far as it is of rollouts before `before`; a line that was cut short is none."""
        place, rates = self.folder / TABLE, list[PassRate]()
        lines = place.read_text().splitlines() if place.exists() else []
        # A run that goes on from an older checkpoint has rows of rollouts that it will write again.
        for line in lines:
            try:
                row = PassRate(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if row.rollout < before:
                rates.append(row)
        return rates

    def write_pass_rates(self, rates: Sequence[PassRate]) -> None:
        """Write the table of pass rates anew."""
        lines = [json.dumps(vars(rate), ensure_ascii=False) + "\n" for rate in rates]
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / TABLE, "".join(lines).encode())

    def _folder(self, rollout: int) -> Path:
        return self.folder / f"{rollout:08d}"


def _write(place: Path, content: bytes) -> None:
    with replacing(place) as file:
        file.write(content)


def read_shard(shard: Path) -> list[Group]:
    """Return the groups of a shard; raises UserError if it is damaged."""
    groups, members = [], dict[str, bytes]()
    try:
        with tarfile.open(fileobj=io.BytesIO(shard.read_bytes())) as tar:
            for member in tar:
                if (file := tar.extractfile(member)) is not None:
                    members[member.name] = file.read()
        # A flipped bit may leave JSON that can be read, with another token in it.
        for name, content in members.items():
            key, _, kind = name.partition(".")
            if kind != "json":
                continue
            checksum = members.get(f"{key}.crc32", b"").decode()
            if checksum != f"{zlib.crc32(content):08x}":
                raise ValueError(f"{name} has other bytes than were written")
            where = f"{shard}: {name}"
            groups.append(Group.read(load_json(content, where), where))
    except (OSError, ValueError, tarfile.TarError, JsonError) as error:
        raise UserError(
            f"{shard} is damaged ({error}): remove it, and its prompts are answered again"
        ) from error
    return groups
