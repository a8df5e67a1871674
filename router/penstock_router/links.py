"""Links to workers as the fleet sees them, so that tests can put in-process workers in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

from penstock_wire.messages import Control, Hello, Message
from penstock_wire.sockets import ControlClient, LinkSettings, LinkState

if TYPE_CHECKING:
    from penstock_wire.keys import Keys
    from penstock_wire.names import Resolver

OnMessage: TypeAlias = Callable[[Control], None]
OnState: TypeAlias = Callable[[LinkState, Hello | None], None]


class WorkerLink(Protocol):
    """A control link to one worker that connects again for as long as it is open."""

    @property
    def state(self) -> LinkState:
        """What is known of the worker now."""
        ...

    @property
    def hello(self) -> Hello | None:
        """The worker's last Hello; None before the first."""
        ...

    def start(self) -> None:
        """Begin to connect; returns at once."""
        ...

    def send(self, message: Message) -> None:
        """Queue a message. Raises LinkDown unless the worker is there."""
        ...

    async def close(self) -> None:
        """Stop; no more callbacks come."""
        ...


LinkFactory: TypeAlias = Callable[[str, OnMessage, OnState], WorkerLink]
"""(address, on_message, on_state) to a link that is not started yet."""


def control_links(
    hello: Hello, keys: Keys, *, settings: LinkSettings, resolver: Resolver
) -> LinkFactory:
    """Return the factory of real links."""

    def connect(address: str, on_message: OnMessage, on_state: OnState) -> WorkerLink:
        return ControlClient(
            address,
            hello,
            keys,
            on_message=on_message,
            on_state=on_state,
            settings=settings,
            resolver=resolver,
        )

    return connect
