"""The prefix cache: which page holds which block, and in what order blocks are forgotten.

Pure bookkeeping over page ids and block hashes; the page pool owns the pages and their references.
A block is *held* while a request refers to its page, otherwise *idle*: it may be evicted.

Eviction order: least recently used first, but never a block whose child is still here, as long as
another can go. A chain is thus forgotten from its end, and what remains of it can be matched.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Block(NamedTuple):
    """A block's name and the name of the block before it (or the root hash)."""

    hash: bytes
    parent: bytes


class PrefixCache:
    """The blocks of one pool: hash → page, and the idle ones in order of use."""

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._block_of: dict[int, Block] = {}
        self._children: dict[bytes, int] = {}
        """How many blocks here name this hash as their parent."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pages of idle blocks, least recently used first; a child always before its parent."""
        self._stored: dict[bytes, None] = {}
        self._evicted: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._page_of)

    @property
    def idle(self) -> int:
        """Blocks that can be evicted."""
        return len(self._idle)

    def holds(self, page: int) -> bool:
        """Tell whether this page holds a block."""
        return page in self._block_of

    def is_idle(self, page: int) -> bool:
        """Tell whether this page holds a block that nobody refers to."""
        return page in self._idle

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest run of known blocks from the start of `hashes`."""
        pages: list[int] = []
        for block_hash in hashes:
            page = self._page_of.get(block_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def store(self, page: int, block: Block) -> int:
        """Enter a held page's block and return the page that holds it: the first one stays."""
        known = self._page_of.get(block.hash)
        if known is not None:
            return known
        self._page_of[block.hash] = page
        self._block_of[page] = block
        self._children[block.parent] = self._children.get(block.parent, 0) + 1
        if block.hash in self._evicted:
            del self._evicted[block.hash]
        else:
            self._stored[block.hash] = None
        return page

    def hold(self, page: int) -> None:
        """A request refers to this idle block again."""
        del self._idle[page]

    def let_go(self, page: int) -> None:
        """Nobody refers to this block any more: it becomes the most recently used idle one.

        Its idle ancestors were used as recently, and must not go before it.
        """
        self._idle[page] = None
        parent = self._page_of.get(self._block_of[page].parent)
        while parent is not None and parent in self._idle:
            self._idle.move_to_end(parent)
            parent = self._page_of.get(self._block_of[parent].parent)

    def evict(self) -> int:
        """Forget one idle block and return its page. Raises LookupError if there is none.

        An idle block whose descendants are all held (requests computed the same prefix at the same
        time, so they hold other pages for it) goes last: it breaks a chain.
        """
        if not self._idle:
            raise LookupError("no idle block to evict")
        page = next((p for p in self._idle if self._is_leaf(p)), next(iter(self._idle)))
        del self._idle[page]
        self._forget(page)
        return page

    def hashes(self) -> list[bytes]:
        """Return the hashes of all blocks."""
        return list(self._page_of)

    def drain_events(self) -> tuple[list[bytes], list[bytes]]:
        """Return the hashes (stored, evicted) since the last call; no hash is in both."""
        events = (list(self._stored), list(self._evicted))
        self._stored.clear()
        self._evicted.clear()
        return events

    def check(self) -> None:
        """Raise AssertionError if the tables contradict each other."""
        assert {b.hash: p for p, b in self._block_of.items()} == self._page_of
        children: dict[bytes, int] = {}
        for block in self._block_of.values():
            children[block.parent] = children.get(block.parent, 0) + 1
        assert children == self._children
        order = {page: position for position, page in enumerate(self._idle)}
        assert order.keys() <= self._block_of.keys()
        for page, position in order.items():
            parent = self._page_of.get(self._block_of[page].parent)
            assert parent is None or position < order.get(parent, len(order))

    def _is_leaf(self, page: int) -> bool:
        return self._block_of[page].hash not in self._children

    def _forget(self, page: int) -> None:
        block = self._block_of.pop(page)
        del self._page_of[block.hash]
        self._children[block.parent] -= 1
        if not self._children[block.parent]:
            del self._children[block.parent]
        if block.hash in self._stored:
            del self._stored[block.hash]
        else:
            self._evicted[block.hash] = None
