"""Addresses and names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from penstock_wire.names import Resolver, UnresolvedName, new_boot_id, split_address

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.b:70", ("a.b", 70)), ("[::1]:7000", ("::1", 7000)), ("127.0.0.1:1", ("127.0.0.1", 1))],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize("text", ["a", "a:", ":7", "a:0", "a:65536", "a:b", ""])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="not host:port"):
        split_address(text)


async def test_hosts_file_is_read_anew(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    resolver = Resolver(hosts)
    with pytest.raises(UnresolvedName, match="cannot be read"):
        await resolver.resolve("stage-0")
    hosts.write_text(json.dumps({"stage-0": "127.0.0.9"}))
    assert await resolver.resolve("stage-0") == "127.0.0.9"
    with pytest.raises(UnresolvedName, match="no such name"):
        await resolver.resolve("stage-1")
    assert await resolver.resolve("127.0.0.1") == "127.0.0.1"


async def test_dns_failure_names_the_host() -> None:
    assert await Resolver().resolve("localhost") in {"127.0.0.1", "::1"}
    with pytest.raises(UnresolvedName, match="does-not-exist"):
        await Resolver().resolve("does-not-exist.invalid")


def test_boot_ids_differ() -> None:
    assert new_boot_id() != new_boot_id()
