"""Reading checkpoints that somebody else may have made: nothing in their files can run code.

torch's distributed checkpoints keep an index, `.metadata`, as a pickle, and read other entries with torch.load and
weights_only=False. Here both are read by unpicklers that know only the classes that an index or plain data is made of.
"""

import pickle
import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Final
from unittest.mock import patch

import torch
from torch.distributed.checkpoint import filesystem

from visionloom.common.errors import UserError

INDEX_CLASSES: Final = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath"},  # where Python 3.13 has it
    "collections": {"OrderedDict"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
}
"""What the index of a checkpoint may name; torch's data types are allowed beside them."""

REFUSED: Final = re.compile(r"it names [\w.]+, which no checkpoint needs|Weights only load failed")


class IndexUnpickler(pickle.Unpickler):
    """Reads an index of a checkpoint and refuses every other class or function by name."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, if an index may hold it; raises UnpicklingError otherwise."""
        if name in INDEX_CLASSES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def read_index(file: IO[bytes]) -> Any:
    """The Metadata in a checkpoint's `.metadata`."""
    return IndexUnpickler(file).load()


@contextmanager
def harmless_reading(folder: object) -> Iterator[None]:
    """Inside, torch's reader of distributed checkpoints takes indices and plain data only.

    Raises:
        UserError: if a file of the checkpoint in `folder` holds anything else; nothing of it has run.
    """
    shim = types.SimpleNamespace(load=read_index, dump=pickle.dump)
    plain = torch.load

    def load_plain_data(*args: Any, **options: Any) -> Any:
        return plain(*args, **{**options, "weights_only": True})

    try:
        with patch.object(filesystem, "pickle", shim), patch.object(torch, "load", load_plain_data):
            yield
    except BaseException as error:  # torch's own CheckpointException is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if refused := _refusal(error):
            raise UserError(f"{folder} is not read: {refused}: take a checkpoint from a source that you trust") from error
        if isinstance(error, Exception):
            raise
        raise RuntimeError(f"{folder} cannot be read: {error}") from error


def _refusal(error: BaseException | None) -> str:
    """What was refused, if that is why reading failed, here or on another rank, whose errors come as text."""
    while error is not None:
        if found := REFUSED.search(f"{error} {getattr(error, 'failures', '')}"):
            return found[0]
        error = error.__cause__ or error.__context__
    return ""
