"""Directories downloaded as a whole, from a remote that is a dictionary and fails as told."""

from __future__ import annotations

import fcntl
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_wire.snapshot import (
    Interrupted,
    RemoteFile,
    SnapshotError,
    SnapshotSettings,
    download,
    newest,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS = SnapshotSettings(part_bytes=10, parallel=3, attempts=3, first_wait_seconds=0.0)


class Remote:
    """Files; every read is noted, and those in `faults` fail, each number of times."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents
        self.reads: list[tuple[str, int]] = []
        self.faults: dict[tuple[str, int], list[Exception | int]] = {}
        self._lock = threading.Lock()

    @property
    def files(self) -> list[RemoteFile]:
        return [
            RemoteFile(name, len(data), f"v{hash(data)}") for name, data in self.contents.items()
        ]

    def read(self, file: RemoteFile, first: int, count: int, /) -> Iterator[bytes]:
        with self._lock:
            self.reads.append((file.name, first))
            fault = next(iter(self.faults.get((file.name, first), [])), None)
            if fault is not None:
                self.faults[file.name, first].pop(0)
        data = self.contents[file.name][first : first + count]
        if isinstance(fault, int):
            data = (data + b"x" * fault)[: max(0, len(data) + fault)]
        for start in range(0, len(data), 4):
            yield data[start : start + 4]
            if isinstance(fault, Exception):
                raise fault


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_all_files_come_whole_and_only_once(tmp_path: Path) -> None:
    remote = Remote({"config.json": b"{}", "empty": b"", "weights": bytes(range(95))})
    told: list[tuple[int, int]] = []
    root = tmp_path / "cache"
    found = download(
        root, remote.files, remote.read, settings=SETTINGS,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert contents(found) == remote.contents
    assert told[-1] == (97, 97)
    assert sorted(told) == told
    assert len(remote.reads) == 11
    assert download(root, remote.files, remote.read, settings=SETTINGS) == found
    assert len(remote.reads) == 11
    assert newest(root) == found


def test_an_interrupted_part_is_tried_again(tmp_path: Path) -> None:
    remote = Remote({"a": bytes(25)})
    remote.faults = {("a", 10): [Interrupted("cut"), -3], ("a", 20): [1]}
    found = download(tmp_path, remote.files, remote.read, settings=SETTINGS)
    assert contents(found) == remote.contents
    assert sorted(remote.reads) == [("a", 0), *[("a", 10)] * 3, *[("a", 20)] * 2]


def test_what_does_not_come_is_told_and_nothing_is_taken_for_whole(tmp_path: Path) -> None:
    remote = Remote({"a": bytes(25)})
    remote.faults = {("a", 10): [Interrupted("cut")] * 3}
    with pytest.raises(SnapshotError, match="a did not come in 3 tries: cut"):
        download(tmp_path, remote.files, remote.read, settings=SETTINGS)
    assert newest(tmp_path) is None


class Killed(Exception):  # noqa: N818 - it names what happened
    """Stands for the end of the process."""


def test_a_crash_costs_only_the_parts_under_way(tmp_path: Path) -> None:
    remote = Remote({"a": bytes(range(100)), "b": bytes(range(30))})
    remote.faults = {("a", 50): [Killed()]}
    one_by_one = SnapshotSettings(part_bytes=10, parallel=1)
    with pytest.raises(Killed):
        download(tmp_path, remote.files, remote.read, settings=one_by_one)
    assert newest(tmp_path) is None
    before = set(remote.reads) - {("a", 50)}
    remote.reads.clear()
    told: list[int] = []
    found = download(
        tmp_path, remote.files, remote.read, settings=one_by_one,
        progress=lambda done, _: told.append(done),
    )  # fmt: skip
    assert contents(found) == remote.contents
    assert not before & set(remote.reads)
    assert told[0] == 10 * len(before)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    crashes=st.lists(st.integers(0, 12), max_size=3),
    parts=st.lists(st.integers(3, 20), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_after_any_crashes_the_directory_is_right(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    crashes: list[int],
    parts: list[int],
    seed: int,
) -> None:
    """Also with another size of parts in each run."""
    root = tmp_path_factory.mktemp("root")
    chance = random.Random(seed)
    remote = Remote({f"f{i}": chance.randbytes(size) for i, size in enumerate(sizes)})
    for left, part_bytes in zip([*crashes, None], parts, strict=False):
        count = left

        def read(file: RemoteFile, first: int, wanted: int, /) -> Iterator[bytes]:
            nonlocal count
            if count is not None:
                count -= 1
                if count < 0:
                    raise Killed
            return remote.read(file, first, wanted)

        own = SnapshotSettings(part_bytes=part_bytes, parallel=2)
        try:
            download(root, remote.files, read, settings=own)
        except Killed:
            assert newest(root) is None
    assert contents(newest(root) or Path("none")) == remote.contents


def test_a_changed_directory_is_another_one_and_leftovers_go(tmp_path: Path) -> None:
    remote = Remote({"a": bytes(25)})
    remote.faults = {("a", 10): [Killed()]}
    with pytest.raises(Killed):
        download(tmp_path, remote.files, remote.read, settings=SETTINGS)
    remote.contents["a"] = bytes(reversed(range(25)))
    found = download(tmp_path, remote.files, remote.read, settings=SETTINGS)
    assert contents(found) == remote.contents
    assert sorted(tmp_path.iterdir()) == sorted([found, tmp_path / "lock"])


def test_two_at_once_download_once(tmp_path: Path) -> None:
    remote = Remote({"a": bytes(100)})
    found: list[Path] = []

    def run() -> None:
        found.append(download(tmp_path, remote.files, remote.read, settings=SETTINGS))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(remote.reads) == 10


def test_a_lock_that_is_never_given_back_is_told(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SnapshotError, match="another process has been downloading"):
            download(
                tmp_path, Remote({"a": b"1"}).files, Remote({}).read,
                settings=SnapshotSettings(lock_seconds=0.0),
            )  # fmt: skip


def test_a_full_disk_is_told_before_it_is_full(tmp_path: Path) -> None:
    huge = RemoteFile("a", 1 << 43, "v")
    with pytest.raises(SnapshotError, match="give the cache volume more space"):
        download(tmp_path, [huge], Remote({}).read, settings=SnapshotSettings(part_bytes=1 << 40))
