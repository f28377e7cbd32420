"""Errors of a node, below the three branches of `routing.errors`.

CallerError:  UnknownModel · UnsupportedModel · CorruptCheckpoint · NotEnoughDisk · GatedModel · PeerTooSmall ·
              InsecureIdentity · AddressInUse · MissingExtra · UnsupportedPlatform
PeerError:    ProtocolError · VersionMismatch · PeerUnreachable (PeerSilent) · StreamClosed · Refused
Unavailable:  Busy · Preempted · Paused · HubUnreachable
"""

from __future__ import annotations

from routing.errors import CallerError, PeerError, Unavailable


class UnknownModel(CallerError):
    """MODEL is neither a folder with a checkpoint, nor a built-in name, nor a known hub id."""

    default_hint = "give a folder with a checkpoint, a hub id (organisation/model) or a built-in name"


class UnsupportedModel(CallerError):
    """The architecture cannot be cut into spans; the message names what stands in the way."""

    default_hint = "choose a model of another architecture"


class CorruptCheckpoint(CallerError):
    """A weight file is damaged, or does not match its pinned hash."""

    default_hint = "delete the damaged file, or copy or download it again"


class NotEnoughDisk(CallerError):
    """The download or conversion would not fit."""

    default_hint = "free some space, or put the cache elsewhere with HIVESWARM_CACHE=FOLDER"


class GatedModel(CallerError):
    """The hub wants an access token for this repository."""

    default_hint = "give an access token that may read it: --token TOKEN, or HF_TOKEN in the environment"


class PeerTooSmall(CallerError):
    """This machine's memory (or `--max-memory`) does not hold one block and its cache."""

    default_hint = "host fewer blocks (--num-blocks), or allow more --max-memory"


class InsecureIdentity(CallerError):
    """The identity file is readable by others, or is not an Ed25519 key."""

    default_hint = "give another --identity FILE; a new one is made where there is none"


class AddressInUse(CallerError):
    """The address to listen on is taken or does not exist here."""

    default_hint = "choose another --listen address, or stop what uses this one"


class MissingExtra(CallerError):
    """A feature needs an optional dependency; the message is the line that installs it."""

    default_hint = "install it into this environment with pip"


class UnsupportedPlatform(CallerError):
    """This system cannot run a node."""

    default_hint = "use Linux or macOS; under Windows, Linux in WSL 2"


class ProtocolError(PeerError):
    """A remote peer sent bytes that the protocol forbids; the frame was dropped before it touched any state."""

    default_hint = "avoid that peer: it runs another or a damaged version"


class VersionMismatch(PeerError):
    """The remote peer speaks another protocol version; the message names both."""

    default_hint = "update the older of the two"


class PeerUnreachable(PeerError):
    """No connection could be made to a peer within the deadline."""

    default_hint = "is it running, and is its address right? otherwise check the network on both sides"


class PeerSilent(PeerUnreachable):
    """Nothing was heard of a peer within the deadline. It may be dead, or late: nobody said that it is gone."""


class StreamClosed(PeerError):
    """The stream ended: the remote process closed it, died, or the connection broke."""

    default_hint = "it may have left: try again, another peer may serve"


class Refused(PeerError):
    """A peer declined a request for a reason that waiting does not cure (`code` is from `peers.wire.messages`)."""

    default_hint = "try another peer; the message says why this one declined"

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class Busy(Unavailable):
    """A healthy peer has no room now; try again after `retry_after_s` seconds. Not a failure of that peer."""

    default_hint = "wait a little and try again, or add peers"

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class Preempted(Busy):
    """The session's pages were given to another; replay it from position 0 after `retry_after_s` seconds."""


class Paused(Busy):
    """The peer's owner needs the machine: sessions go on elsewhere. It may be back after `retry_after_s` seconds."""

    default_hint = "other peers may hold the same blocks; otherwise try again later"


class HubUnreachable(Unavailable):
    """The model hub did not answer in time."""

    default_hint = "check the network and try again; a folder or a built-in model needs no hub"
