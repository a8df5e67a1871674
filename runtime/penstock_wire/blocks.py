"""Prefix blocks: the name of a page's worth of tokens together with all that came before it.

A block is one full page of tokens. Its hash is H(parent hash, token ids), and the first block's
parent is H(salt parts): model digest, adapter, tenant's cache salt. So equal hashes mean equal
tokens at equal positions under the same salt, on every worker and in the router's index.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HASH_BYTES = 16


def root_hash(model_digest: str, salt: bytes = b"", adapter: str = "") -> bytes:
    """Return the parent of the first block.

    Each part is hashed with its length in front, so no two different triples run together.
    """
    hasher = blake2b(digest_size=HASH_BYTES, person=b"penstock-root")
    for part in (model_digest.encode(), adapter.encode(), salt):
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


def block_hash(parent: bytes, tokens: bytes | memoryview) -> bytes:
    """Return the hash of one block: `tokens` is a full page of little-endian int32 token ids."""
    return blake2b(tokens, digest_size=HASH_BYTES, key=parent).digest()


def block_hashes(root: bytes, tokens: bytes, page_size: int) -> list[bytes]:
    """Return the chained hashes of every full page in `tokens` (little-endian int32)."""
    hashes: list[bytes] = []
    parent = root
    view = memoryview(tokens)
    page_bytes = 4 * page_size
    for start in range(0, len(tokens) - page_bytes + 1, page_bytes):
        parent = block_hash(parent, view[start : start + page_bytes])
        hashes.append(parent)
    return hashes


def split_hashes(joined: bytes) -> Iterator[bytes]:
    """Yield the hashes that a Snapshot or KvEvents message carries joined.

    Raises ValueError if `joined` is not a whole number of hashes.
    """
    if len(joined) % HASH_BYTES:
        raise ValueError(f"{len(joined)} bytes are not a whole number of block hashes")
    for start in range(0, len(joined), HASH_BYTES):
        yield joined[start : start + HASH_BYTES]
