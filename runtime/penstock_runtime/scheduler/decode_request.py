"""A request on the decode worker: its tokens, its pages and its state.

              ┌────────────── preempted, remote prefill failed ──────────────┐
              ▼                                                              │
    add ──► WAITING ──admitted──► RUNNING (prefills here, then decodes) ─────┤
              │                      ▲                                       │
              └──admitted──► REMOTE ─┴─ all KV delivered                     │
                               └─────────────────────────────────────────────┘
    any state ──stop token, length, cancelled, failed──► FINISHED

Only RUNNING and REMOTE requests hold pages, and FINISHED ones that a step is still computing. What
a request that goes back to WAITING has computed is left to the prefix cache, where its next
admission finds it, unless it was evicted meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from penstock_wire.blocks import block_hash, block_hashes
from penstock_wire.messages import pack_tokens

if TYPE_CHECKING:
    from array import array

    from penstock_wire.messages import Sampling


class State(Enum):
    """See the module's picture."""

    WAITING = "waiting"
    REMOTE = "remote"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True, kw_only=True)
class DecodeRequest:
    """One sequence. Only the scheduler changes it."""

    request_id: str
    tokens: array[int]
    """Prompt and output, as far as it is known: the end of it may be in a step that is out."""
    prompt_length: int
    sampling: Sampling
    root: bytes
    """Parent of the first block's hash."""
    group: str = ""
    """The prefill group that the router chose; empty: prefill here."""
    force_group: bool = False
    order: int = 0
    """Rises with arrival: the lower, the earlier served and the later preempted."""
    arrived: float = 0.0

    state: State = State.WAITING
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """KV of tokens [0, computed) lies in `pages`."""
    committed: int = 0
    """Blocks [0, committed) are in the prefix cache or stood there first."""
    underway: dict[int, bytes] = field(default_factory=dict)
    """Block number → hash, of those that others may wait for."""
    cached_tokens: int = 0
    """Prompt tokens that the first admission found cached, here or in the prefill group."""
    admissions: int = 0
    remote_failures: int = 0
    group_wait_until: float | None = None
    """Until when a prefill group is waited for, once none was ready."""
    steps_out: int = 0
    """Steps given out with a part of it. They use its pages, which it keeps until then even if it
    has finished."""
    tokens_out: int = 0
    """Tokens [computed, computed + tokens_out) get their KV from them."""
    samples_out: int = 0
    """Output tokens that they choose."""
    hashes: list[bytes] = field(default_factory=list)

    @property
    def output_length(self) -> int:
        """Output tokens so far, those of earlier attempts on other workers included."""
        return len(self.tokens) - self.prompt_length

    @property
    def length(self) -> int:
        """Tokens when all steps that are out have ended."""
        return len(self.tokens) + self.samples_out

    @property
    def issued(self) -> int:
        """KV of tokens [0, issued) is there when all steps that are out have ended."""
        return self.computed + self.tokens_out

    @property
    def unissued(self) -> int:
        """Tokens left to compute. 1 while decoding: the last one's KV comes with the next step."""
        return self.length - self.issued

    def finish(self, max_length: int) -> Literal["", "stop", "length"]:
        """Return why the output ends with its last known token, or "" if it goes on."""
        sampling = self.sampling
        stops = self.tokens[-1] in sampling.stop_token_ids
        if stops and self.output_length >= max(1, sampling.min_tokens):
            return "stop"
        return "length" if len(self.tokens) >= self._longest(max_length) else ""

    def ends_in_steps_out(self, max_length: int) -> bool:
        """Tell whether it will be as long as it may be when the steps that are out have ended."""
        return self.samples_out > 0 and self.length >= self._longest(max_length)

    def _longest(self, max_length: int) -> int:
        return min(max_length, self.prompt_length + self.sampling.max_tokens)

    def block_hashes(self, page_size: int, tokens: int) -> list[bytes]:
        """Return the hashes of the full blocks in the first `tokens` tokens."""
        wanted = tokens // page_size
        known = len(self.hashes)
        if known < wanted:
            parent = self.hashes[-1] if self.hashes else self.root
            new = pack_tokens(self.tokens[known * page_size : wanted * page_size])
            if wanted == known + 1:
                self.hashes.append(block_hash(parent, new))
            else:
                self.hashes += block_hashes(parent, new, page_size)
        return self.hashes[:wanted]
