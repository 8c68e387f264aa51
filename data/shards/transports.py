"""Single attempts to read from a remote folder: HTTP range requests, and fsspec (S3 and others)."""

import io
import re
import time
from typing import Any, Final, Protocol
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from visionloom.common.errors import UserError
from visionloom.data.config import StoreConfig
from visionloom.data.shards.store import StoreError

SLOWEST: Final = 1 << 20
"""Bytes per second below which an attempt is given up, once data.store.timeout_seconds have passed."""
CONNECTIONS: Final = 64
"""Connections kept open to one host."""
REDIRECTS: Final = 5
"""Redirects that one request follows."""
LARGEST_ANSWER: Final = 1 << 28
"""Bytes of a whole file by HTTP, where two attempts may be under way at once: 256 MiB, half a million shards."""
_PIECE: Final = 1 << 20
"""Bytes of an answer taken at once."""
_LONGEST_CAUSE: Final = 500
"""Characters of an error's own words; a server may have chosen them."""


class Transient(Exception):
    """An attempt failed in a way that another may not; `seconds` is the wait that the server asks for."""

    def __init__(self, problem: str, seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.seconds = seconds


class Transport(Protocol):
    """One way to reach a remote folder: single attempts, which raise Transient, FileNotFoundError or StoreError."""

    def range(self, file: str, offset: int, length: int) -> bytes:
        """Return exactly these bytes."""
        ...

    def whole(self, file: str) -> bytes:
        """Return all bytes of a file."""
        ...


def shown(url: str) -> str:
    """Return a URL without user, password and query, which may be secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        # Brackets that close nothing, or hold no address: nobody knows where its parts end.
        return f"{url.partition('://')[0]}://..."
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", "")).rstrip("/")


class HttpTransport:
    """HTTP(S) range requests over connections that are kept open, through the proxy that the environment names.

    The URL's query, if any, goes with every request.
    """

    def __init__(self, url: str, config: StoreConfig) -> None:
        self._parts = urlsplit(url)
        # `port` raises ValueError for what is none.
        if not self._parts.hostname or self._parts.port == 0:
            raise ValueError("a host is missing, as in http://HOST/FOLDER")
        self._seconds = config.timeout_seconds
        self._pool = _connection_pool(self._parts, config.timeout_seconds)

    def range(self, file: str, offset: int, length: int) -> bytes:
        """See Transport."""
        # HTTP has no range of no bytes.
        if not length:
            return b""
        data = self._get(file, offset, length)
        if len(data) != length:
            raise Transient(f"{len(data)} bytes came instead of {length}")
        return data

    def whole(self, file: str) -> bytes:
        """See Transport."""
        return self._get(file, 0, None)

    def _get(self, file: str, offset: int, length: int | None) -> bytes:
        """Return the bytes of a range, or of the whole file without a length."""
        import urllib3

        url = self._url(file)
        # Offsets count bytes of the file, not of a packed form of it.
        headers = {"Accept-Encoding": "identity"}
        if length is not None:
            headers["Range"] = f"bytes={offset}-{offset + length - 1}"
        # A server may send more than it was asked for, without an end.
        most = LARGEST_ANSWER if length is None else length
        try:
            response = self._pool.request("GET", url, headers=headers, preload_content=False)
            try:
                _check_answer(response, shown(url), offset, length)
                return self._body(response, most)
            finally:
                # A connection whose answer was read to its end is back in the pool by now.
                response.close()
        except urllib3.exceptions.HTTPError as error:
            raise Transient(_sentence(error)) from None

    def _body(self, response: Any, most: int) -> bytes:
        """Read an answer's bytes as they came, not unpacked; raises Transient where there are more than `most`.

        It ends after the timeout and a second for each SLOWEST bytes: an answer without an end would keep its thread forever.
        """
        end = time.monotonic() + self._seconds + most / SLOWEST
        body = io.BytesIO()
        for piece in response.stream(_PIECE, decode_content=False):
            body.write(piece)
            if body.tell() > most:
                raise Transient(f"more than {most} bytes came")
            if time.monotonic() > end:
                raise Transient("the answer has no end")
        return body.getvalue()

    def _url(self, file: str) -> str:
        parts = self._parts
        # A name is quoted: a ? or % in it is no part of the address.
        path = f"{parts.path.rstrip('/')}/{quote(file)}"
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _connection_pool(url: SplitResult, seconds: float) -> Any:
    """Make a pool of urllib3's, through the environment's proxy if it names one for the host."""
    import urllib3

    options: dict[str, Any] = {
        "maxsize": CONNECTIONS,
        "timeout": urllib3.Timeout(connect=seconds, read=seconds),
        # Redirects only: RemoteStore repeats failed attempts, with waits of its own.
        "retries": urllib3.Retry(
            total=None, connect=0, read=0, status=0, other=0, redirect=REDIRECTS
        ),
    }
    if proxy_bypass(url.hostname or ""):
        return urllib3.PoolManager(**options)
    proxy = getproxies().get(url.scheme)
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)


def _check_answer(response: Any, url: str, offset: int, length: int | None) -> None:
    """Refuse an answer by its status and headers, before its body is read."""
    _check_status(response, url)

    status, headers = response.status, response.headers
    if length is None and status == 200:
        return
    coming = headers.get("Content-Length", str(length))
    # A server without ranges sends the whole file: a shard of a gigabyte for each sample.
    if status == 200 and headers.get("Content-Length") != str(length):
        problem = "the server ignores range requests (HTTP 200 instead of 206)"
        raise StoreError(f"{url}: {problem}: use one that serves ranges")
    if status not in (200, 206):
        raise StoreError(f"{url}: HTTP {status}")

    wanted = f"bytes {offset}-{offset + (length or 0) - 1}/"
    sent = headers.get("Content-Range")
    if status == 206 and not (sent or "").startswith(wanted):
        raise Transient(f"another range came: {sent!r} instead of {wanted}*")
    if coming != str(length):
        raise Transient(f"{coming} bytes are coming instead of {length}")


def _check_status(response: Any, url: str) -> None:
    """Raise what the status of an error means."""
    status = response.status
    if status in (404, 410):
        raise FileNotFoundError(url)
    if status in (401, 403):
        fix = "check the credentials or the URL's signature"
        raise StoreError(f"{url}: access denied (HTTP {status}): {fix}")
    if status == 416:
        raise StoreError(f"{url} is shorter than when it was indexed: restore it or index it again")
    # 408 timeout, 425 too early, 429 too many requests: the same request may succeed later.
    if status in (408, 425, 429) or status >= 500:
        asked = response.headers.get("Retry-After", "")
        raise Transient(f"HTTP {status}", float(asked) if asked.isdecimal() else 0.0)


def _sentence(error: Exception) -> str:
    """Return the cause at the bottom of urllib3's nested errors, without the address of a connection object."""
    while isinstance(reason := getattr(error, "reason", None), Exception):
        error = reason
    words = str(error)[:_LONGEST_CAUSE]
    return re.sub(r"<[^>]*>: |\w+\([^)]*\): ", "", words) or type(error).__name__


class FsspecTransport:
    """Any file system of fsspec: s3://, gs://, memory:// and so on, each with a package of its own."""

    def __init__(self, url: str, option: str) -> None:
        try:
            from fsspec.core import url_to_fs

            self._system, self._root = url_to_fs(url)
        except ImportError as error:
            fix = "install the package of fsspec that it names"
            if url.startswith("s3"):
                fix = "pip install visionloom[s3]"
            problem = f"{shown(url)} cannot be opened: {error}"
            raise UserError(f"{option}: {problem}: {fix}") from None

    def range(self, file: str, offset: int, length: int) -> bytes:
        """See Transport."""
        # No bytes need no request; some stores answer an empty range with an error.
        data = self._attempt(file, start=offset, end=offset + length) if length else b""
        if len(data) != length:
            raise Transient(f"{len(data)} bytes came instead of {length}")
        return data

    def whole(self, file: str) -> bytes:
        """See Transport."""
        return self._attempt(file)

    def _attempt(self, file: str, **part: int) -> bytes:
        path = f"{self._root.rstrip('/')}/{file}"
        try:
            return bytes(self._system.cat_file(path, **part))
        # It is an OSError too, but no other attempt will help.
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise StoreError(f"{path}: access denied: {error}: check the credentials") from None
        except Exception as error:
            # Every file system has errors of its own.
            raise Transient(f"{type(error).__name__}: {error}") from None
