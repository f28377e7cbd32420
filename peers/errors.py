"""Errors of a node, below the three branches of `routing.errors`.

CallerError:  UnknownModel · UnsupportedModel · CorruptCheckpoint · NotEnoughDisk · GatedModel · PeerTooSmall ·
              InsecureIdentity · AddressInUse · MissingExtra · UnsupportedPlatform
PeerError:    ProtocolError · VersionMismatch · PeerUnreachable · StreamClosed · Refused
Unavailable:  Busy · Preempted · HubUnreachable
"""

from __future__ import annotations

from routing.errors import CallerError, PeerError, Unavailable


class UnknownModel(CallerError):
    """MODEL is neither a folder with a checkpoint, nor a built-in name, nor a known hub id."""


class UnsupportedModel(CallerError):
    """The architecture cannot be cut into spans; the message names what stands in the way."""


class CorruptCheckpoint(CallerError):
    """A weight file is damaged, or does not match its pinned hash."""


class NotEnoughDisk(CallerError):
    """The download or conversion would not fit."""


class GatedModel(CallerError):
    """The hub wants an access token for this repository."""


class PeerTooSmall(CallerError):
    """This machine's memory (or `--max-memory`) does not hold one block and its cache."""


class InsecureIdentity(CallerError):
    """The identity file is readable by others, or is not an Ed25519 key."""


class AddressInUse(CallerError):
    """The address to listen on is taken or does not exist here."""


class MissingExtra(CallerError):
    """A feature needs an optional dependency; the message is the line that installs it."""


class UnsupportedPlatform(CallerError):
    """This system cannot run a node."""

    default_hint = "use Linux or macOS; under Windows, Linux in WSL 2"


class ProtocolError(PeerError):
    """A remote peer sent bytes that the protocol forbids; the frame was dropped before it touched any state."""


class VersionMismatch(PeerError):
    """The remote peer speaks another protocol version; the message names both."""


class PeerUnreachable(PeerError):
    """No connection could be made to a peer within the deadline."""


class StreamClosed(PeerError):
    """The stream ended: the remote process closed it, died, or the connection broke."""


class Refused(PeerError):
    """A peer declined a request for a reason that waiting does not cure (`code` is from `peers.wire.messages`)."""

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class Busy(Unavailable):
    """A healthy peer has no room now; try again after `retry_after_s` seconds. Not a failure of that peer."""

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class Preempted(Busy):
    """The session's pages were given to another; replay it from position 0 after `retry_after_s` seconds."""


class HubUnreachable(Unavailable):
    """The model hub did not answer in time."""
