"""The runtime's exceptions.

    PenstockRuntimeError
    ├── ConfigurationError     a setting or the model cannot be served: fix it and start again
    ├── PipelineBroken         an epoch of a prefill group ended: a newer one will be formed
    ├── RankLost               the ranks of this worker are out of step: the worker ends, too
    ├── DeviceFailed           the device reported an error: the worker ends
    └── KernelsUnavailable     (kernels.library) the C++ kernels cannot be used: torch's can

Transfers raise `transfer.base.TransferError`, control links `penstock_wire.sockets.LinkDown`.
"""

from __future__ import annotations


class PenstockRuntimeError(Exception):
    """The base of the runtime's own errors."""


class ConfigurationError(PenstockRuntimeError):
    """A setting, or the model, cannot be served. The message names the cause and the remedy."""


class PipelineBroken(PenstockRuntimeError):  # noqa: N818 - it names the event
    """The epoch ended while something waited for a neighbour."""


class RankLost(PenstockRuntimeError):  # noqa: N818 - it names the event
    """A rank ended, or failed within a step: what they compute together cannot go on."""


class DeviceFailed(PenstockRuntimeError):  # noqa: N818 - it names the event
    """A device reported an error that is not for want of memory: it computes nothing any more."""
