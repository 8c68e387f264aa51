"""The rollouts of a phase in its run's folder: WebDataset shards of groups, a folder for each rollout, a shard for each round.

`rollouts/<phase>/00000012/00003.tar` holds the groups of the fourth round of rollout 12, each as `<draw>.json` with its CRC-32 as
`<draw>.crc32`. A shard is there whole or not at all, so a run that was killed goes on after the last one. `pass_rates.jsonl` beside them is the table of pass rates.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

POLICY_STEP: Final = "policy_step"

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
        self.put_aside(rollout)
        return []

    def put_aside(self, rollout: int) -> None:
        """Give a rollout's folder another name: nothing that was written is lost, as somebody may want to look at it."""
        folder = self._folder(rollout)
        aside = self.folder.glob(f"{folder.name}.aside-*")
        number = 1 + max((_number(place) for place in aside), default=-1)
        with _as_user_errors(folder):
            folder.rename(folder.with_name(f"{folder.name}.aside-{number}"))

    def _is_of(self, folder: Path, policy_step: int) -> bool:
        """Return whether a rollout is of these settings and this policy."""
        return _settings(folder) == self.settings | {POLICY_STEP: policy_step}

    def first_draw(self, rollout: int) -> int:
        """Return the first draw that no earlier rollout of these settings has had, as far as the one before `rollout` tells.

        After that one was passed over, its prompts are not asked again.
        """
        before = self._folder(rollout - 1)
        settings = _settings(before) or {}
        if {**settings, POLICY_STEP: None} != {**self.settings, POLICY_STEP: None}:
            return 0
        draws = [0]
        for shard in before.glob("*.tar"):
            try:
                with tarfile.open(shard) as tar:
                    draws += [int(name.partition(".")[0]) + 1 for name in tar.getnames()]
            except (OSError, ValueError, tarfile.TarError) as error:
                raise _damaged(shard, error) from error
        return max(draws)

    def groups(self, rollout: int) -> list[Group]:
        """Return the groups of a rollout, whoever wrote them; raises UserError as `read`."""
        groups = []
        for shard in sorted(self._folder(rollout).glob("*.tar")):
            groups += read_shard(shard)
        return sorted(groups, key=lambda group: group.draw)

    def add(self, rollout: int, policy_step: int, groups: Sequence[Group]) -> None:
        """Write the groups of a round as the next shard of a rollout; raises UserError if that is not possible."""
        folder = self._folder(rollout)
        with _as_user_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            settings = self.settings | {POLICY_STEP: policy_step}
            # First: a round without them could not be taken for this policy's.
            if not (folder / SETTINGS).exists():
                _write(folder / SETTINGS, json.dumps(settings).encode())
            number = len(list(folder.glob("*.tar")))
            with replacing(folder / f"{number:05d}.tar") as file, tar_writer(file) as tar:
                for group in groups:
                    content = json.dumps(group.to_json(), ensure_ascii=False).encode()
                    checksum = f"{zlib.crc32(content):08x}".encode()
                    tar.write({"__key__": f"{group.draw:09d}", "crc32": checksum, "json": content})

    def pass_rates(self, before: int) -> list[PassRate]:
        """Read the table of pass rates, as far as it is of rollouts before `before`; a line that was cut short is none."""
        place, rates = self.folder / TABLE, list[PassRate]()
        with _as_user_errors(place):
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
        with _as_user_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / TABLE, "".join(lines).encode())

    def _folder(self, rollout: int) -> Path:
        return self.folder / f"{rollout:08d}"


@contextmanager
def _as_user_errors(place: Path) -> Iterator[None]:
    """Turn what the system refuses into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{place}: a rollout cannot be kept: {error.strerror}: make room, or mend the folder, and start the same command again"
        ) from error


def _number(aside: Path) -> int:
    """Return the number of a folder that was put aside; -1 of one that somebody has named."""
    text = aside.name.rpartition("-")[2]
    return int(text) if text.isdecimal() else -1


def _settings(folder: Path) -> Any:
    """Return what the answers of a rollout depend on; None if it does not say."""
    try:
        return json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError):
        return None


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
        raise _damaged(shard, error) from error
    return groups


def _damaged(shard: Path, error: Exception) -> UserError:
    return UserError(
        f"{shard} is damaged ({error}): remove its folder {shard.parent}, and that rollout is answered again"
    )
