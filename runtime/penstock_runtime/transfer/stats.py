"""Counters of one agent, for metrics and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class AgentStats:
    """What one agent did. Written by its owner only; readers may see a moment's old values."""

    in_flight: int = 0
    """Operations posted and neither done nor failed, those given up by a deadline included."""
    done: int = 0
    failed: int = 0
    """Operations that ended with a lost peer or a fence."""
    timed_out: int = 0
    """Operations whose deadline passed; they stay in flight until the fence."""
    bytes_written: int = 0
    """Of writes that are done."""
    bytes_read: int = 0
    notifications_sent: int = 0
    """Those that went alone."""
    notifications_received: int = 0
