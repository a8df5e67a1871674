from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from penstock_router.discovery import (
    Endpoint,
    FileDiscovery,
    InvalidEndpoints,
    parse_endpoints,
)
from tests.unit.router.harness import eventually

if TYPE_CHECKING:
    from pathlib import Path

DECODE = {"name": "d0", "role": "decode", "address": "127.0.0.1:7000"}


def write(path: Path, *endpoints: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"endpoints": endpoints}))
    temporary.replace(path)


def test_endpoints_are_read_with_their_defaults() -> None:
    stage = DECODE | {"name": "p", "role": "prefill", "group": "g", "stage": 1, "new": "field"}
    found = parse_endpoints(json.dumps({"endpoints": [DECODE, stage]}).encode())
    assert found == (
        Endpoint(name="d0", role="decode", address="127.0.0.1:7000"),
        Endpoint(name="p", role="prefill", address="127.0.0.1:7000", group="g", stage=1),
    )


@pytest.mark.parametrize(
    ("endpoints", "text"),
    [
        ([DECODE, DECODE], "twice"),
        ([DECODE | {"role": "router"}], "role"),
        ([DECODE | {"role": "prefill"}], "no group"),
        ([DECODE | {"address": "nowhere"}], "host:port"),
        ([DECODE | {"stage": -1}], "stage"),
        ([DECODE | {"name": ""}], "name"),
        ([{"name": "x"}], "role|address"),
        ("x", "array"),
    ],
)
def test_unusable_lists_are_refused_whole(endpoints: object, text: str) -> None:
    with pytest.raises(InvalidEndpoints, match=text):
        parse_endpoints(json.dumps({"endpoints": endpoints}).encode())


async def test_the_file_is_followed_and_garbage_keeps_the_last_list(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.json"
    discovery = FileDiscovery(path, interval=0.001)
    watch = discovery.watch()
    async with asyncio.timeout(10):
        assert await anext(watch) == ()
        write(path, DECODE)
        first = await anext(watch)
        assert [each.name for each in first] == ["d0"]
        following = asyncio.ensure_future(anext(watch))
        for disturb in (
            lambda: path.write_text("{"),
            lambda: path.write_text("[1]"),
            path.unlink,
            lambda: write(path, DECODE),
        ):
            disturb()
            await asyncio.sleep(0.01)
            assert not following.done()
        write(path, DECODE, DECODE | {"name": "d1"})
        assert [each.name for each in await following] == ["d0", "d1"]
        write(path)
        assert await anext(watch) == ()
        assert discovery.problem == ""
        following = asyncio.ensure_future(anext(watch))
        path.unlink()
        await eventually(lambda: bool(discovery.problem))
        assert "is not there" in discovery.problem
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
