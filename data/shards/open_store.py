"""Opening the store of a folder or URL: which schemes are accepted, and what is refused."""

import re
from pathlib import Path
from typing import Final

from visionloom.common.errors import UserError
from visionloom.data.config import StoreConfig
from visionloom.data.shards.range_cache import RangeCache
from visionloom.data.shards.remote_store import RemoteStore
from visionloom.data.shards.store import LocalStore, Store
from visionloom.data.shards.transports import FsspecTransport, HttpTransport, Transport, shown

HTTP: Final = ("http", "https")
_AZURE: Final = ("az", "abfs", "abfss", "adl", "wasb")
_OBJECT_STORES: Final = ("s3", "s3a", "gs", "gcs", *_AZURE, "oci", "oss", "hf")
_FILE_SYSTEMS: Final = ("hdfs", "webhdfs", "ftp", "sftp", "memory")
SCHEMES: Final = (*HTTP, *_OBJECT_STORES, *_FILE_SYSTEMS)
"""Schemes at the end of a URL, each by a package of fsspec; of this machine nothing but its memory is among them."""
CACHES: Final = ("simplecache", "filecache", "blockcache")
"""Schemes that may precede it, each followed by ::."""
_ACCEPTED: Final = (
    f"give a folder, or an http(s)://, s3://, gs:// or other URL of {', '.join(SCHEMES)};"
    f" before it, with ::, only {', '.join(CACHES)}"
)
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(::|:)")


def is_url(path: str) -> bool:
    """Return whether a path is a URL and no local folder."""
    return _URL.match(path) is not None


def open_store(path: str, option: str, config: StoreConfig) -> Store:
    """Return the store of a folder or URL. Raises UserError, naming the option, for what cannot be one."""
    match = _URL.match(path)
    if match is None:
        return LocalStore(Path(path))

    refused = _refused_scheme(path)
    if refused is not None:
        raise UserError(f"{option}={shown(path)}: {refused}: is refused: {_ACCEPTED}")
    # Before the transport: a cache that cannot be used is said first.
    cache = RangeCache(Path(config.cache), config.cache_bytes) if config.cache else None
    transport = _open_transport(path, match[1].lower(), option, config)
    return RemoteStore(transport, shown(path), config, cache)


def _open_transport(url: str, scheme: str, option: str, config: StoreConfig) -> Transport:
    """Make the transport of a URL; raises UserError for one that is none, or cannot be reached."""
    try:
        return HttpTransport(url, config) if scheme in HTTP else FsspecTransport(url, option)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{option}: {shown(url)} is no URL of a folder: {error}") from None
    except OSError as error:
        # Some file systems connect when they are made.
        fix = "check the host, and that its client is there"
        raise UserError(f"{option}: {shown(url)} cannot be reached: {error}: {fix}") from None


def _refused_scheme(url: str) -> str | None:
    """Return the first scheme of a URL, chained with :: or not, that is not allowed; None if all are."""
    *before, last = url.split("::")
    for link in before:
        name = link.partition("://")[0].lower()
        if name not in CACHES:
            # fsspec takes a link without a scheme for a local folder.
            return name or "a link of the chain without a scheme"

    # Only what comes last is read from; `file:` there would open this machine.
    match = _URL.match(last)
    scheme = last[:20]
    if match and last[match.end() :].startswith("//"):
        scheme = match[1].lower()
    if scheme in SCHEMES:
        return None
    return scheme or "a link of the chain without a scheme"
