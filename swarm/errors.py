"""Errors of a client, below the three branches of `routing.errors`.

    CallerError:  UnsupportedOutput · UnsupportedMask · UnsupportedCache · UnsupportedGradient · UnsupportedAdapter ·
                  ContextTooLong · SessionClosed · WeightsAreRemote · UnusableFile

Save for SessionClosed they are raised before anything is sent, so a corrected call can follow at once.
"""

from __future__ import annotations

from routing.errors import CallerError


class UnsupportedOutput(CallerError):
    """Something only the inside of a remote layer could give: attentions, per-layer hidden states, router logits."""

    default_hint = "ask for logits or last_hidden_state; for what lies inside the layers, load the model locally"


class UnsupportedMask(CallerError):
    """An attention mask or position ids that sequences without padding cannot express; the message says why."""

    default_hint = "pass a 2-D mask of the whole sequence and position ids that count its kept tokens one by one"


class UnsupportedCache(CallerError):
    """A `past_key_values` that holds keys and values here, or belongs to another model or batch."""

    default_hint = "leave past_key_values out, or pass back the cache that this model returned"


class UnsupportedGradient(CallerError):
    """A gradient was asked for where none can be had: through what a cache holds, or where nobody computes any."""

    default_hint = "run under torch.no_grad(), or model.requires_grad_(False)"


class UnsupportedAdapter(CallerError):
    """Weights of the client's own were put inside the remote layers, whose peers would not compute with them."""

    default_hint = "tune what stands outside the layers: a prompt, or a head"


class ContextTooLong(CallerError):
    """The sequence has more positions than the model was made for."""

    default_hint = "shorten the prompt or lower max_new_tokens"


class SessionClosed(CallerError):
    """The model, session or cache was closed; what it held at the peers is gone."""

    default_hint = "open a new one"


class UnusableFile(CallerError):
    """A file or folder that a command needs cannot be read or written: the disk is full, or it is not ours."""

    default_hint = "free some space, see to its permissions, or name another; HIVESWARM_CACHE=FOLDER moves the cache"


class WeightsAreRemote(CallerError):
    """The layers' weights stand at peers, so this object can be neither saved nor turned into a state dict."""

    default_hint = "read the checkpoint itself, or save only your adapter"
