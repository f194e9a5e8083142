"""The Hugging Face hub: asked once whether it can be reached, before libraries ask it for file after file.

Each of their requests is tried six times with growing pauses, which takes close to a minute for the first of a model's
files alone.
"""

from __future__ import annotations

import os
import sys

from fourfold.base.log import get_logger

log = get_logger(__name__)

WAYS_OUT = (
    "Give a local path; or name a mirror that can be reached in HF_ENDPOINT; or fetch it into the cache where there is "
    "a network."
)
"""What to do about something of the hub that cannot be had."""

_OFFLINE, _TIMEOUT = "HF_HUB_OFFLINE", "HF_HUB_ETAG_TIMEOUT"
_TIMEOUT_S = 5.0
_TRUE = {"1", "ON", "YES", "TRUE"}


def endpoint() -> str:
    """The hub's address: `$HF_ENDPOINT`, or Hugging Face's own."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def is_offline() -> bool:
    """Whether the libraries keep from asking the hub and take what is in the cache (`HF_HUB_OFFLINE`)."""
    names = (_OFFLINE, "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def settle_hub() -> None:
    """Set `HF_HUB_OFFLINE` in this process and its workers if the hub cannot be reached, and say so.

    To be called by a command that needs something of the hub, before `huggingface_hub` is imported: it reads the
    variable only then, and where it is imported already the choice is left to it.
    """
    if is_offline() or "huggingface_hub" in sys.modules:
        return
    if fault := why_unreachable():
        os.environ[_OFFLINE] = "1"
        log.warning("%s cannot be reached (%s); only what is in the cache is used.", endpoint(), fault)


def why_unreachable() -> str | None:
    """Why the hub cannot be reached; None if it answers, be it with an error.

    Waits `$HF_HUB_ETAG_TIMEOUT` seconds at most, five by default.
    """
    import ssl
    import urllib.request
    from urllib.error import HTTPError, URLError

    try:
        timeout = float(os.environ.get(_TIMEOUT, "")) or _TIMEOUT_S
    except ValueError:
        timeout = _TIMEOUT_S
    try:
        # Proxies are those of the environment, as for the libraries.
        with urllib.request.urlopen(urllib.request.Request(endpoint(), method="HEAD"), timeout=timeout):
            return None
    except HTTPError:
        return None
    except URLError as error:
        reason = error.reason
        # Certificates are the libraries' own business: they may know others.
        return None if isinstance(reason, ssl.SSLError) else getattr(reason, "strerror", None) or str(reason)
    except OSError as error:
        return str(error)
    except ValueError as error:
        return f"HF_ENDPOINT: {error}"
