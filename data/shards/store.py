"""Where the bytes of shards come from: a local folder, or a remote one by HTTP range requests or through fsspec (S3).

A local shard that vanished or shrank costs its samples (MissingBytes). A remote store that does not answer is no sample's
fault: after retries StoreError stops the run.
"""

import io
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from visionloom.common.errors import UserError
from visionloom.common.places import PlaceError, locate, read_located
from visionloom.data.config import StoreConfig
from visionloom.data.shards.range_cache import RangeCache

OPEN_FILES: Final = 128
"""Shards kept open at once by a process: far below the usual limit of 1,024 file descriptors."""
FIRST_WAIT: Final = 0.25
"""Seconds before the first retry; each further one waits twice as long, times a random factor of 0.5 to 1."""
LONGEST_WAIT: Final = 30.0
SLOWEST: Final = 1 << 20
"""Bytes per second below which an attempt is given up, once data.store.timeout_seconds have passed."""
CONNECTIONS: Final = 64
"""Connections kept open to one host."""
ADVICE: Final = hasattr(os, "posix_fadvise")
"""Whether this system takes advice on reads; macOS does not."""
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(::|:)")
SCHEMES: Final = (
    *(
        "http",
        "https",
        "s3",
        "s3a",
        "gs",
        "gcs",
        "az",
        "abfs",
        "abfss",
        "adl",
        "wasb",
        "oci",
        "oss",
        "hf",
        "hdfs",
        "webhdfs",
    ),
    *("ftp", "sftp", "memory"),
)
"""What may be at the end of a URL: object stores and servers, each by a package of fsspec; nothing of this machine but its memory."""
CACHES: Final = ("simplecache", "filecache", "blockcache")
"""What may stand before it, with :: behind."""
LARGEST_WHOLE: Final = 1 << 30
"""Bytes of a file that is read whole: 1 GiB, a dataset.json of two million shards."""
LARGEST_ANSWER: Final = 1 << 28
"""And by HTTP, where two attempts may be under way at once: 256 MiB, half a million shards."""

_PIECE: Final = 1 << 20
"""Bytes of an answer taken at once."""
_LONGEST_CAUSE: Final = 500
"""Characters of an error's own words; a server may have chosen them."""
MEND: Final = "put the file itself there, or give the folder that it leads to"
"""What to do about a shard that is a link out of its folder, or no file."""


class StoreError(OSError):
    """A store cannot be read: the message names the store, the file and what was tried. It stops the run."""


class MissingBytes(Exception):
    """A local shard vanished, shrank or has an unreadable spot since it was opened: its samples are lost, no others."""


class Transient(Exception):
    """An attempt failed in a way that another may not; `seconds` is the wait that the server asks for."""

    def __init__(self, problem: str, seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.seconds = seconds


class Store(Protocol):
    """A folder of shards. Safe in threads; made anew after fork and in other processes."""

    remote: bool
    """Whether reads take a network round trip, and so should be many at a time."""

    def read(self, file: str, offset: int, length: int, fresh: bool = False) -> bytes:
        """Bytes of a file, exactly `length`; `fresh` ones do not come from a cache. Raises StoreError, MissingBytes."""
        ...

    def whole(self, file: str, fresh: bool = True) -> bytes:
        """A small file, `fresh` or perhaps from a cache. Raises FileNotFoundError, StoreError."""
        ...

    def will_read(self, file: str, offset: int, length: int) -> None:
        """Say that bytes are about to be read; costs next to nothing and may do nothing."""
        ...


def is_url(path: str) -> bool:
    """Whether a path is a URL and no local folder."""
    return _URL.match(path) is not None


def open_store(path: str, option: str, config: StoreConfig) -> Store:
    """The store behind a folder or URL. Raises UserError, naming the option, for what cannot be one."""
    match = _URL.match(path)
    if match is None:
        return LocalStore(Path(path))
    if refused := _refused(path):
        raise UserError(
            f"{option}={shown(path)}: {refused}: is refused: give a folder, or an http(s)://, s3://, gs:// or other URL of"
            f" {', '.join(SCHEMES)}; before it, with ::, only {', '.join(CACHES)}"
        )
    cache = RangeCache(Path(config.cache), config.cache_bytes) if config.cache else None
    try:
        source: Transport = (
            HttpSource(path, config)
            if match[1].lower() in ("http", "https")
            else FsspecSource(path, option)
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{option}: {shown(path)} is no URL of a folder: {error}") from None
    except OSError as error:  # file systems that connect when they are made
        raise UserError(
            f"{option}: {shown(path)} cannot be reached: {error}: check the host, and that its client is there"
        ) from None
    return RemoteStore(source, shown(path), config, cache)


def _refused(url: str) -> str:
    """The first scheme of a URL, chained with :: or not, that is not allowed; empty if all are."""
    *before, last = url.split("::")
    names = [one.partition("://")[0].lower() for one in before]
    match = _URL.match(last)
    end = match[1].lower() if match and last[match.end() :].startswith("//") else last[:20]
    refused = [name for name in names if name not in CACHES] + [
        name for name in (end,) if name not in SCHEMES
    ]
    return (
        (refused[0] or "a link of the chain without a scheme") if refused else ""
    )  # fsspec takes none for a local folder


def shown(url: str) -> str:
    """A URL without user, password and query, which may be secrets."""
    try:
        parts = urlsplit(url)
    except (
        ValueError
    ):  # brackets that close nothing, or hold no address: where its parts end nobody knows
        return f"{url.partition('://')[0]}://..."
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")).rstrip(
        "/"
    )


# ---- local


class _File:
    """An open file descriptor, closed with its last reference: a reader keeps it alive while another evicts it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if ADVICE:  # the kernel would read ahead of every random read
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class LocalStore:
    """A folder of this machine or of a network file system, read by position; files stay open."""

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: str, offset: int, length: int, fresh: bool = False) -> bytes:
        """See Store; raises MissingBytes if the file is gone or too short, StoreError if its folder is."""
        try:
            data = os.pread(self._open(file).descriptor, length, offset)
        except FileNotFoundError:
            if not self.folder.is_dir():
                raise StoreError(
                    f"{self.folder} is gone: the file system was unmounted, or the folder was removed"
                ) from None
            raise MissingBytes(f"{file} is gone") from None
        except (
            OSError
        ) as error:  # a bad spot of the disk, or a handle of a network file system that went stale
            with self._lock:
                self._files.pop(file, None)
            if fresh:
                raise MissingBytes(f"{file} cannot be read: {error.strerror}") from error
            return self.read(file, offset, length, fresh=True)
        if len(data) != length:
            raise MissingBytes(
                f"{file} was cut short: {len(data)} of {length} bytes at byte {offset}"
            )
        return data

    def whole(self, file: str, fresh: bool = True) -> bytes:
        """See Store."""
        try:
            return read_located(self.folder, file, LARGEST_WHOLE)
        except PlaceError as error:
            raise StoreError(f"{self.folder / file} {error}: {MEND}") from None

    def place(self, file: str) -> Path:
        """Where a file of the folder lies. Raises FileNotFoundError, and StoreError for what is no file of the folder."""
        try:
            return locate(self.folder, file)
        except PlaceError as error:
            raise StoreError(f"{self.folder / file} {error}: {MEND}") from None

    def will_read(self, file: str, offset: int, length: int) -> None:
        """See Store: the kernel begins to read."""
        if not ADVICE:
            return
        with suppress(OSError):  # the read itself will tell
            os.posix_fadvise(self._open(file).descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def _open(self, name: str) -> _File:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = _File(self.place(name))
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(name)
        return file


# ---- remote


class Transport(Protocol):
    """One way to reach a remote folder: single attempts, which raise Transient, FileNotFoundError or StoreError."""

    def range(self, file: str, offset: int, length: int) -> bytes:
        """Exactly these bytes."""
        ...

    def whole(self, file: str) -> bytes:
        """All bytes of a file."""
        ...


class RemoteStore:
    """Attempts made reliable: retries with growing, random waits; a second request if the first is slow; a cache."""

    remote = True

    def __init__(
        self, source: Transport, where: str, config: StoreConfig, cache: RangeCache | None = None
    ) -> None:
        self.source, self.where, self.config, self.cache = source, where, config, cache

    def read(self, file: str, offset: int, length: int, fresh: bool = False) -> bytes:
        """See Store; raises StoreError naming the file if it is missing or after the last retry."""
        name = f"{self.where}/{file} {offset}+{length}"
        if (
            self.cache is not None
            and not fresh
            and (data := self.cache.get(name, length)) is not None
        ):
            return data
        try:
            data = self._retry(file, lambda: self.source.range(file, offset, length), length)
        except FileNotFoundError:
            raise StoreError(
                f"shard {self.where}/{file} is missing: restore it or index what is left"
            ) from None
        if self.cache is not None:
            self.cache.put(name, data)
        return data

    def whole(self, file: str, fresh: bool = True) -> bytes:
        """See Store."""
        name = f"{self.where}/{file}"
        if self.cache is not None and not fresh and (data := self.cache.get(name)) is not None:
            return data
        data = self._retry(file, lambda: self.source.whole(file), 0)
        if self.cache is not None:
            self.cache.put(name, data)
        return data

    def will_read(self, file: str, offset: int, length: int) -> None:
        """Nothing: `AheadReader` reads early."""

    def _retry(self, file: str, attempt: Callable[[], bytes], length: int) -> bytes:
        started, last = time.monotonic(), Transient("")
        for number in range(self.config.retries + 1):
            if number:
                time.sleep(wait_before(number, last.seconds))
            try:
                return self._hedge(attempt, self.config.timeout_seconds + length / SLOWEST)
            except Transient as error:
                last = error
        seconds = time.monotonic() - started
        raise StoreError(
            f"{self.where}/{file} cannot be read: {self.config.retries + 1} attempts in {seconds:.0f} s, the last: {last}:"
            " check the store, or raise data.store.retries or data.store.timeout_seconds"
        )

    def _hedge(self, attempt: Callable[[], bytes], limit: float) -> bytes:
        """The first of one attempt, or of two if it takes longer than data.store.hedge_seconds."""
        end = time.monotonic() + limit
        running = {_in_thread(attempt)}
        if (
            0 < self.config.hedge_seconds < limit
            and not wait(running, self.config.hedge_seconds).done
        ):
            running.add(_in_thread(attempt))
        problem: Transient | None = None
        while running:
            done, running = wait(running, max(0.0, end - time.monotonic()), FIRST_COMPLETED)
            if not done:
                raise Transient(f"no answer within {limit:.3g} s")
            for future in done:
                try:
                    return future.result()
                except Transient as error:
                    problem = error
        assert problem is not None
        raise problem


def wait_before(retry: int, asked: float = 0.0) -> float:
    """Seconds before the retry-th retry (from 1): what the server asks for, at most LONGEST_WAIT, and at least our own."""
    own = FIRST_WAIT * 2 ** min(retry - 1, 16) * random.uniform(0.5, 1.0)
    return min(LONGEST_WAIT, max(own, asked))


def _in_thread(call: Callable[[], bytes]) -> "Future[bytes]":
    """Run in a thread of its own, which nobody waits for at the end: a hanging request must not hang the process."""
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # handed over to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="visionloom-store", daemon=True).start()
    return future


class HttpSource:
    """HTTP(S) range requests over connections that are kept open, through the proxy that the environment names.

    The URL's query, if any, goes with every request.
    """

    def __init__(self, url: str, config: StoreConfig) -> None:
        import urllib3

        self._parts = urlsplit(url)
        if (
            not self._parts.hostname or self._parts.port == 0
        ):  # `port` raises ValueError for what is none
            raise ValueError("a host is missing, as in http://HOST/FOLDER")
        self._seconds = config.timeout_seconds
        limits = urllib3.Timeout(connect=config.timeout_seconds, read=config.timeout_seconds)
        only_redirects = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5)
        options: dict[str, Any] = {
            "maxsize": CONNECTIONS,
            "timeout": limits,
            "retries": only_redirects,
        }
        proxy = (
            None
            if proxy_bypass(self._parts.hostname or "")
            else getproxies().get(self._parts.scheme)
        )
        self._pool = (
            urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
        )

    def range(self, file: str, offset: int, length: int) -> bytes:
        """See Source."""
        if not length:
            return b""
        return self._get(file, {"Range": f"bytes={offset}-{offset + length - 1}"}, offset, length)

    def whole(self, file: str) -> bytes:
        """See Source."""
        return self._get(file, {}, 0, None)

    def _get(self, file: str, headers: dict[str, str], offset: int, length: int | None) -> bytes:
        import urllib3

        path = f"{self._parts.path.rstrip('/')}/{quote(file)}"
        url = urlunsplit((self._parts.scheme, self._parts.netloc, path, self._parts.query, ""))
        fields = {**headers, "Accept-Encoding": "identity"}
        try:
            response = self._pool.request("GET", url, headers=fields, preload_content=False)
            try:
                _check_answer(response, shown(url), offset, length)
                data = _body(response, LARGEST_ANSWER if length is None else length, self._seconds)
            finally:
                response.close()  # a connection whose answer was read to its end is back in the pool by now
        except urllib3.exceptions.HTTPError as error:
            raise Transient(_sentence(error)) from None
        if length is not None and len(data) != length:
            raise Transient(f"{len(data)} bytes came instead of {length}")
        return data


def _body(response: Any, most: int, seconds: float) -> bytes:
    """The bytes of an answer as they came, not unpacked; raises Transient where there are more than `most`.

    Nobody waits for it after `seconds`, and a second for each SLOWEST bytes: an answer without an end would go on in its thread.
    """
    end, found = time.monotonic() + seconds + most / SLOWEST, io.BytesIO()
    for piece in response.stream(_PIECE, decode_content=False):
        found.write(piece)
        if found.tell() > most:
            raise Transient(f"more than {most} bytes came")
        if time.monotonic() > end:
            raise Transient("the answer has no end")
    return found.getvalue()


def _check_answer(response: Any, url: str, offset: int, length: int | None) -> None:
    """Refuse an answer by its status and headers, before its body is read."""
    status, sent = response.status, response.headers
    if status in (404, 410):
        raise FileNotFoundError(url)
    if status in (401, 403):
        raise StoreError(
            f"{url}: access denied (HTTP {status}): check the credentials or the URL's signature"
        )
    if status == 416:
        raise StoreError(f"{url} is shorter than when it was indexed: restore it or index it again")
    if status in (408, 425, 429) or status >= 500:
        asked = sent.get("Retry-After", "")
        raise Transient(f"HTTP {status}", float(asked) if asked.isdecimal() else 0.0)
    if length is None and status == 200:
        return
    if status == 200 and sent.get("Content-Length") != str(length):
        raise StoreError(
            f"{url}: the server ignores range requests (HTTP 200 instead of 206): use one that serves ranges"
        )
    if status not in (200, 206):
        raise StoreError(f"{url}: HTTP {status}")
    wanted = f"bytes {offset}-{offset + (length or 0) - 1}/"
    if status == 206 and not sent.get("Content-Range", "").startswith(wanted):
        raise Transient(f"another range came: {sent.get('Content-Range')!r} instead of {wanted}*")
    if sent.get("Content-Length", str(length)) != str(length):
        raise Transient(f"{sent['Content-Length']} bytes are coming instead of {length}")


def _sentence(error: Exception) -> str:
    """The cause at the bottom of urllib3's nested errors, without the address of a connection object."""
    while (inner := getattr(error, "reason", None)) is not None and isinstance(inner, Exception):
        error = inner
    return (
        re.sub(r"<[^>]*>: |\w+\([^)]*\): ", "", str(error)[:_LONGEST_CAUSE]) or type(error).__name__
    )


class FsspecSource:
    """Any file system of fsspec: s3://, gs://, memory:// and so on, each with a package of its own."""

    def __init__(self, url: str, option: str) -> None:
        try:
            from fsspec.core import url_to_fs

            self._system, self._root = url_to_fs(url)
        except ImportError as error:
            fix = (
                "pip install visionloom[s3]"
                if url.startswith("s3")
                else "install the package of fsspec that it names"
            )
            raise UserError(f"{option}: {shown(url)} cannot be opened: {error}: {fix}") from None

    def range(self, file: str, offset: int, length: int) -> bytes:
        """See Source."""
        data = self._attempt(file, start=offset, end=offset + length) if length else b""
        if len(data) != length:
            raise Transient(f"{len(data)} bytes came instead of {length}")
        return data

    def whole(self, file: str) -> bytes:
        """See Source."""
        return self._attempt(file)

    def _attempt(self, file: str, **part: int) -> bytes:
        path = f"{self._root.rstrip('/')}/{file}"
        try:
            return bytes(self._system.cat_file(path, **part))
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise StoreError(f"{path}: access denied: {error}: check the credentials") from None
        except Exception as error:  # every file system has errors of its own
            raise Transient(f"{type(error).__name__}: {error}") from None
