"""Remote stores: what goes wrong on the way is repaired, what cannot be is one clear error, and nothing hangs."""

import gzip
import math
import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from visionloom.common.errors import UserError
from visionloom.data.config import StoreConfig
from visionloom.data.shards import remote_store
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.open_store import open_store
from visionloom.data.shards.range_cache import RangeCache
from visionloom.data.shards.remote_store import RemoteStore, wait_before
from visionloom.data.shards.sample import SampleError
from visionloom.data.shards.store import LocalStore, MissingBytes, StoreError
from visionloom.data.shards.transports import shown
from visionloom.data.shards.write import write_shards
from visionloom.data.stream.read_ahead import AheadReader, ByteBudget, Wanted
from visionloom.tests.data.faulty_server import FaultyServer, serving
from visionloom.tests.data.samples import film, picture_question
from visionloom.train.config import RunConfig

QUICK = StoreConfig(timeout_seconds=30.0, retries=3, hedge_seconds=0.0)
"""No time limit is met unless a test is about it: these machines may be busy."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    write_shards(
        path,
        "set",
        [*map(picture_question, range(6)), *(film(number, 5) for number in range(4))],
        5,
    )
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with serving(folder) as running:
        yield running


def everything(dataset: Dataset) -> list[tuple[object, dict[str, bytes]]]:
    found = []
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        found.append((sample, {ref: dataset.member(index, ref) for ref in sample.refs}))
    return found


def test_every_kind_of_store_reads_the_same(server: FaultyServer, folder: Path) -> None:
    """The folder is the reference; fsspec's memory file system stands in for an object store."""
    fsspec = pytest.importorskip("fsspec")
    for path in folder.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    expected = everything(Dataset.open(folder, "set"))
    for url in (server.url, "memory://bucket/set"):
        dataset = Dataset.open(url, "set", config=QUICK)
        assert dataset.fingerprint == Dataset.open(folder, "set").fingerprint
        assert everything(dataset) == expected
        assert everything(pickle.loads(pickle.dumps(dataset))) == expected


def test_connections_are_kept(server: FaultyServer) -> None:
    everything(Dataset.open(server.url, "set", config=QUICK))
    assert len(server.ranges) == 6 + 6 + 4 + 20
    assert server.connections == 1


@pytest.mark.parametrize("fault", ["503", "stall", "reset", "truncated", "wrong range", "garbage"])
def test_a_fault_of_the_way_is_repaired(server: FaultyServer, folder: Path, fault: str) -> None:
    dataset = Dataset.open(
        server.url, "set", config=replace(QUICK, timeout_seconds=1.0 if fault == "stall" else 30.0)
    )
    expected = everything(Dataset.open(folder, "set"))[7][1]["vid0.002.png"]
    server.faults = [fault] if fault == "garbage" else [fault, fault]
    assert dataset.member(7, "vid0.002.png") == expected
    assert server.ranges == [server.ranges[0]] * (2 if fault == "garbage" else 3)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("503", "HTTP 503"),
        ("stall", "no answer within|timed out"),
        ("reset", "[Cc]onnection"),
        ("truncated", "bytes"),
    ],
)
def test_a_store_that_stays_away_stops_the_run(
    server: FaultyServer, fault: str, named: str
) -> None:
    dataset = Dataset.open(
        server.url,
        "set",
        config=replace(QUICK, timeout_seconds=0.3 if fault == "stall" else 30.0, retries=2),
    )
    dataset.location(0)
    server.faults = [fault] * 9
    with pytest.raises(
        StoreError,
        match=rf"{server.url}/set-000000\.tar cannot be read: 3 attempts in .* ({named}).*data\.store",
    ):
        dataset.sample(0)
    assert len(server.ranges) == 3


def test_damage_that_stays_is_one_samples_fault(server: FaultyServer) -> None:
    dataset = Dataset.open(server.url, "set", config=QUICK)
    server.faults = ["garbage", "garbage"]
    with pytest.raises(
        SampleError,
        match=r"sample set-000000\.tar:000000001: a\.png: .*CRC-32 \w{8}, \w{8} was indexed",
    ):
        dataset.member(1, "a.png")
    assert dataset.member(1, "a.png")


def test_a_missing_shard_is_named_at_once(tmp_path: Path, folder: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "set-000001.tar").unlink()
    with serving(tmp_path) as server:
        dataset = Dataset.open(server.url, "set", config=QUICK)
        dataset.sample(4)
        with pytest.raises(
            StoreError, match=r"shard http://.*/set-000001\.tar is missing: restore it"
        ):
            dataset.sample(5)


def test_a_server_without_ranges_is_refused(server: FaultyServer) -> None:
    dataset = Dataset.open(server.url, "set", config=QUICK)
    server.faults = ["ignores ranges"]
    with pytest.raises(StoreError, match="ignores range requests"):
        dataset.sample(0)


def test_a_slow_request_gets_a_second_one_beside_it(server: FaultyServer) -> None:
    dataset = Dataset.open(server.url, "set", config=replace(QUICK, hedge_seconds=0.2, retries=0))
    dataset.location(0)
    server.faults = ["stall"]
    dataset.sample(0)  # the first answer never comes, and there are no retries
    assert server.ranges == [server.ranges[0]] * 2


def test_the_proxy_of_the_environment_is_used(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stands in for a proxy: it is asked for the whole address."""
    monkeypatch.setenv("no_proxy", "elsewhere")
    monkeypatch.setenv("NO_PROXY", "elsewhere")
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/set"))
    assert len(Dataset.open("http://storage.invalid/set", "set", config=QUICK)) == 10


def test_waits_grow_are_random_and_heed_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.25)
    for retry in range(1, 12):
        waits = {wait_before(retry) for _ in range(50)}
        assert len(waits) > 1 or retry > 8
        longest = 0.25 * 2 ** (retry - 1)
        assert all(min(30, longest / 2) <= wait <= min(30, longest) for wait in waits)
    assert wait_before(1, asked=7) == 7
    assert wait_before(1, asked=3600) == 30


@pytest.mark.parametrize("url", ["pipe:cat x", "file:///tmp/x", "PIPE:curl x", "local:///x"])
def test_commands_and_file_urls_are_refused(url: str) -> None:
    with pytest.raises(
        UserError, match=r"^data\.datasets\.x\.path=.* is refused: give a folder, or an http"
    ):
        Dataset.open(url, "x")


def test_what_is_not_there_is_named(server: FaultyServer, tmp_path: Path) -> None:
    with (
        serving(tmp_path) as empty,
        pytest.raises(
            UserError, match=rf"data\.datasets\.x\.path: {empty.url} has no dataset.json"
        ),
    ):
        Dataset.open(empty.url, "x", config=QUICK)
    with pytest.raises(
        UserError, match=r"data\.datasets\.x\.path=nosuch://a/b: nosuch: is refused"
    ):
        Dataset.open("nosuch://a/b", "x")
    with pytest.raises(StoreError, match="cannot be read: 4 attempts"):
        Dataset.open("http://127.0.0.1:9/set", "x", config=QUICK)


@pytest.mark.parametrize(
    "url",
    [
        "http://[x",
        "https://",
        "http:///a",
        "http://x:99999/",
        "http://x:y/",
        "http://user:secret@[x/",
    ],
)
def test_addresses_without_a_host_are_refused(url: str) -> None:
    with pytest.raises(
        UserError, match=r"^data\.datasets\.x\.path: http.* is no URL of a folder: "
    ) as error:
        Dataset.open(url, "x", config=QUICK)
    assert "secret" not in str(error.value)


def test_a_file_system_that_cannot_connect_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^data\.datasets\.x\.path: ftp://127\.0\.0\.1:9 cannot be reached"
    ):
        Dataset.open("ftp://127.0.0.1:9", "x", config=QUICK)


def test_answers_without_an_end_and_packed_ones_take_no_memory(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of a stranger's server, which unpacks to a thousand times its size, or goes on for ever."""
    monkeypatch.setattr("visionloom.data.shards.transports.LARGEST_ANSWER", 1 << 20)
    packed = gzip.compress(bytes(1 << 24))
    body = {"packed": packed, "chunks": (b"%x\r\n" % (1 << 16) + bytes(1 << 16) + b"\r\n") * 64}

    def answer(handler: Any) -> None:
        name = handler.path.rsplit("/", 1)[1]
        handler.send_response(200)
        ends = (
            ("Content-Length", str(len(packed)))
            if name == "packed"
            else ("Transfer-Encoding", "chunked")
        )
        for header, value in (
            ("Content-Encoding", "gzip" if name == "packed" else "identity"),
            ends,
        ):
            handler.send_header(header, value)
        handler.end_headers()
        handler.wfile.write(body[name])
        handler.close_connection = True

    monkeypatch.setattr("visionloom.tests.data.faulty_server._Handler.do_GET", answer)
    store = open_store(server.url, "data.datasets.x.path", QUICK)
    assert store.whole("packed") == packed
    with pytest.raises(StoreError, match="more than 1048576 bytes came"):
        store.whole("chunks")


def test_s3_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(UserError, match=r"pip install visionloom\[s3\]"):
        open_store("s3://bucket/set", "data.datasets.x.path", QUICK)


def test_secrets_of_a_url_are_not_shown() -> None:
    assert shown("https://user:secret@host/a/b/?signature=secret") == "https://host/a/b"


# ---- a folder of this machine


def test_a_local_shard_that_vanishes_or_shrinks_costs_its_samples_only(
    tmp_path: Path, folder: Path
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    dataset = Dataset.open(tmp_path, "set")
    with open(tmp_path / "set-000000.tar", "r+b") as file:
        file.truncate(dataset.location(1).offset + 10)
    (tmp_path / "set-000001.tar").unlink()
    assert dataset.sample(0)
    with pytest.raises(SampleError, match=r"set-000000\.tar was cut short: 10 of \d+ bytes"):
        dataset.sample(1)
    with pytest.raises(SampleError, match=r"set-000001\.tar is gone"):
        dataset.sample(5)
    for path in tmp_path.iterdir():
        path.unlink()
    tmp_path.rmdir()
    with pytest.raises(StoreError, match="is gone: the file system was unmounted"):
        Dataset.sample(dataset, 6)


def test_an_unreadable_spot_is_read_once_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, read, calls = LocalStore(folder), os.pread, list[int]()

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        calls.append(offset)
        if offset == 512 or len(calls) == 1:
            raise OSError(5, "Input/output error")
        return read(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert len(local.read("set-000000.tar", 0, 512)) == 512
    with pytest.raises(MissingBytes, match="cannot be read: Input/output error"):
        local.read("set-000000.tar", 512, 10)
    assert calls == [0, 0, 512, 512]


# ---- the cache


def test_the_cache_saves_requests_and_survives_damage(
    server: FaultyServer, folder: Path, tmp_path: Path
) -> None:
    config = replace(QUICK, cache=str(tmp_path / "cache"), cache_bytes=10**7)
    expected = everything(Dataset.open(folder, "set"))
    assert everything(Dataset.open(server.url, "set", config=config)) == expected
    asked = len(server.ranges)
    assert everything(Dataset.open(server.url, "set", config=config)) == expected
    assert len(server.ranges) == asked
    for path in (tmp_path / "cache").rglob("??/*"):
        path.write_bytes(bytes(path.stat().st_size))  # same size, other bytes: the CRC-32 tells
    assert everything(Dataset.open(server.url, "set", config=config)) == expected
    assert len(server.ranges) == 2 * asked


def test_the_cache_drops_what_was_not_used_for_longest(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "cache", 1000)
    for number in range(8):
        cache.put(f"part {number}", bytes([number]) * 100)
        os.utime(cache._path(f"part {number}"), (number, number))
    assert cache.get("part 0", 100) == bytes(100)  # used now, so the youngest
    assert cache.get("part 1", 99) is None
    for number in range(8, 12):
        cache.put(f"part {number}", bytes([number]) * 100)
    left = [number for number in range(12) if cache.get(f"part {number}", 100) is not None]
    assert {0, 11} <= set(left)
    assert 2 not in left
    assert stored(tmp_path / "cache") <= 1000
    left_over = cache._path("part 0").with_name("x.tmp")
    left_over.write_bytes(bytes(500))
    os.utime(left_over, (0, 0))
    cache._make_room(0)
    assert not left_over.exists(), "what a dead process left is removed"
    cache.put("large", bytes(2000))
    assert cache.get("large", 2000) is None


def test_indexes_come_from_the_cache_unless_the_dataset_changed(
    tmp_path: Path, server: FaultyServer
) -> None:
    write_shards(tmp_path / "set", "set", map(picture_question, range(6)), 5)
    config = replace(QUICK, cache=str(tmp_path / "cache"))
    with serving(tmp_path / "set") as changing:
        assert Dataset.open(changing.url, "set", config=config).sample(5).id == "picture:5"
        (tmp_path / "set" / "set-000001.tar.qidx").rename(tmp_path / "kept")
        assert Dataset.open(changing.url, "set", config=config).keys[5] == "000000005"
        for path in (tmp_path / "set").iterdir():
            path.unlink()
        write_shards(
            tmp_path / "set", "set", [picture_question(number, words=9) for number in range(7)], 5
        )
        dataset = Dataset.open(changing.url, "set", config=config)
        assert len(dataset) == 7
        assert dataset.sample(6).id == "picture:6"


def test_indexes_of_a_remote_dataset_are_bounded_and_read_once(
    server: FaultyServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folder / "set-000000.tar.qidx").stat().st_size
    read, asked = RemoteStore.whole, list[str]()
    monkeypatch.setattr(
        RemoteStore,
        "whole",
        lambda self, file, fresh=True: asked.append(file) or read(self, file, fresh),
    )
    dataset = Dataset.open(server.url, "set", config=QUICK)
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(dataset.location, [0] * 40))) == 1
    assert asked == ["dataset.json", "set-000000.tar.qidx"]
    monkeypatch.setattr("visionloom.data.shards.dataset.REMOTE_INDEX_BYTES", size + 10)
    for index in (9, 0, 9):
        dataset.location(index)
    assert asked[2:] == [f"set-00000{number}.tar.qidx" for number in (1, 0, 1)]


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("??/*"))


def fill(folder: Path, worker: int) -> None:
    cache = RangeCache(folder, 20_000)
    for number in range(60):
        cache.put(f"{worker} {number}", bytes([worker]) * 500)
        assert cache.get(f"{worker} {number}", 500) in (None, bytes([worker]) * 500)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children touch no thread
def test_processes_share_the_cache_and_its_limit(tmp_path: Path) -> None:
    with get_context("fork").Pool(3) as workers:
        workers.starmap(fill, [(tmp_path / "cache", worker) for worker in range(3)])
    assert 10_000 < stored(tmp_path / "cache") <= 20_000
    assert int((tmp_path / "cache" / "used").read_bytes()) == stored(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_costs_speed_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.store\.cache: .*file cannot be used"):
        RangeCache(tmp_path / "file", 1000)
    cache = RangeCache(tmp_path / "cache", 1000)
    path = cache._path("a")
    path.parent.touch()  # a file where a folder is to be
    cache.put("a", b"x")
    cache.put("a", b"x")
    assert len(caplog.records) == 1


# ---- reading ahead


def test_neighbouring_members_are_one_read(server: FaultyServer) -> None:
    dataset = Dataset.open(server.url, "set", config=QUICK)
    names = [f"vid0.{number:03d}.png" for number in range(5)]
    (run,) = dataset.runs(7, names)
    found = dataset.read_run(run)
    assert found == {name: dataset.member(7, name) for name in names}
    assert len(server.ranges) == 6
    assert [len(run.members) for run in dataset.runs(7, [names[3], names[1], names[2]])] == [1, 2]


def test_bytes_in_flight_stay_below_the_budget(server: FaultyServer, folder: Path) -> None:
    """The server counts requests that it has at once; the reference bytes are those of the folder."""
    local, dataset = Dataset.open(folder, "set"), Dataset.open(server.url, "set", config=QUICK)
    server.delay = 0.01
    order = [7, 1, 8, 2, 7, 9, 3, 0, 6, 4, 5] * 2
    refs = {index: list(local.sample(index).refs) for index in set(order)}
    wanted = [
        Wanted(n, dataset, run)
        for n, index in enumerate(order)
        for run in dataset.runs(index, refs[index])
    ]
    sizes = [read.run.length for read in wanted]
    budget = ByteBudget(3 * max(sizes))
    with ThreadPoolExecutor(16) as threads, AheadReader(wanted, budget, threads) as ahead:
        for number, index in enumerate(order):
            read = ahead.media_of(number, dataset, index)
            taken = refs[index][: 3 if number % 3 else None]  # now and then not all is wanted
            assert [read(ref) for ref in taken] == [local.member(index, ref) for ref in taken]
            if number == 0:
                assert read(refs[index][0]) == local.member(index, refs[index][0]), "a second time"
    assert max(sizes) < budget.peak <= budget.limit
    assert budget.used == 0
    assert server.most_at_once >= 3


def test_a_read_larger_than_the_budget_goes_alone() -> None:
    budget, log = ByteBudget(100), list[str]()
    budget.acquire(500)
    assert not budget.try_acquire(1)
    thread = threading.Thread(target=lambda: (budget.acquire(10), log.append("in")))
    thread.start()
    time.sleep(0.02)
    assert not log
    budget.release(500)
    thread.join(5)
    assert log == ["in"]
    assert budget.peak == 500


def test_an_attempt_that_hangs_is_given_up() -> None:
    """A file system of fsspec may have no time limit of its own."""

    class Hanging:
        def range(self, file: str, offset: int, length: int) -> bytes:
            threading.Event().wait(30)
            return b""

        whole = None

    with pytest.raises(StoreError, match=r"2 attempts .* no answer within 0\.1 s"):
        RemoteStore(Hanging(), "x://y", replace(QUICK, timeout_seconds=0.1, retries=1)).read(
            "a", 0, 1
        )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("timeout_seconds", 0.0),
        ("timeout_seconds", math.nan),
        ("retries", -1),
        ("hedge_seconds", -1.0),
        ("bytes_in_flight", 0),
        ("cache_bytes", 0),
    ],
)
def test_values_that_no_store_can_have_are_named(option: str, value: float) -> None:
    config = RunConfig()
    setattr(config.data.store, option, value)
    assert [line for line in config.all_problems(1) if line.startswith(f"data.store.{option}=")]
