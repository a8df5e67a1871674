"""What can go wrong with the cluster. Every message names the cause and the remedy."""


class ClusterError(Exception):
    """Base of all errors of this package."""


class NotOnThisMachineError(ClusterError):
    """The machine lacks something that the cluster needs."""


class ProgramFailedError(ClusterError):
    """A program ended that should not have, or ended with an error."""


class NotInTimeError(ClusterError):
    """Something did not happen within its deadline."""
