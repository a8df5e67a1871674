"""What becomes of a waiting request on the decode worker, and where its prompt is prefilled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from array import array
    from collections.abc import Collection

    from penstock_runtime.scheduler.decode_request import DecodeRequest

RefusalCode: TypeAlias = Literal["overloaded", "too_long", "prefill_lost", "invalid"]


class Refused(Exception):  # noqa: N818 - it names the event
    """A request that is not taken. `code` and `retriable` are those of the Failed message."""

    def __init__(self, code: RefusalCode, message: str, *, retriable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.retriable = retriable


@dataclass(frozen=True, slots=True)
class Local:
    """Admitted; its uncached tokens are computed here, by the next batches."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Remote:
    """Admitted; a prefill group is to compute KV of `tokens`, the sequence but its last token.

    `pages` has one page for each page of `tokens`. The group may read the first
    `cached` / page size of them; the others are to be granted to it for writing.
    """

    request_id: str
    group: str
    tokens: array[int]
    cached: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A waiting request that is given up; the fields of the Failed message."""

    request_id: str
    code: RefusalCode
    message: str
    retriable: bool


Admission: TypeAlias = Local | Remote | Rejected


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteSettings:
    """When a prefill group computes a prompt."""

    least_tokens: int = 512
    """Prompts with fewer uncached tokens are prefilled here: the hand-over would cost more."""
    attempts: int = 3
    """After as many failures a prompt is prefilled here, or fails if its group is forced."""
    group_wait_seconds: float = 10.0
    """How long a prompt waits for a group that is being re-formed before it is prefilled here:
    about as long as a stage's restart."""


@dataclass(frozen=True, slots=True)
class Prefiller:
    """Who computes a prompt: a prefill group, or this worker if `group` is empty."""

    group: str


HERE = Prefiller("")


def choose_prefiller(
    request: DecodeRequest,
    uncached: int,
    now: float,
    groups: Collection[str],
    settings: RemoteSettings,
) -> Prefiller | Rejected | None:
    """Return who prefills a request, or None if it is to wait for a group.

    The first None starts the wait, in `request.group_wait_until`.

    Args:
        request: waiting.
        uncached: its tokens without KV here, the last one left out.
        now: monotonic seconds.
        groups: the prefill groups that can be used.
        settings: limits.
    """
    short = uncached < settings.least_tokens and not request.force_group
    if not request.group or uncached == 0 or short:
        return HERE
    if request.remote_failures < settings.attempts:
        if request.group in groups:
            return Prefiller(request.group)
        if groups and not request.force_group:
            return Prefiller(min(groups))
        if request.group_wait_until is None:
            request.group_wait_until = now + settings.group_wait_seconds
        if now < request.group_wait_until:
            return None
        reason = f"was not ready for {settings.group_wait_seconds} s"
    else:
        reason = f"failed {request.remote_failures} times"
    if not request.force_group:
        return HERE
    message = f"prefill group {request.group} {reason}"
    return Rejected(request.request_id, "prefill_lost", message, retriable=True)
