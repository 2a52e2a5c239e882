"""Google's notice that a TPU VM is about to be taken away, which the VM's metadata server gives and no signal does.

https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import urllib.request
from collections.abc import Callable, Iterator

from pe_rlhf_jax import hosts

NOTICES = {
    ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"): "Google's notice of maintenance of a TPU VM",
    ("preempted", "TRUE"): "Google's notice that a spot TPU VM is taken away",
}
"""What is announced, by the value of a field of the VM."""

_TIMEOUT = 2.0  # seconds that an answer may take


@contextlib.contextmanager
def watched(tell: Callable[[str], None], every_s: float = 5.0) -> Iterator[None]:
    """Within it, on a TPU VM, `tell` is called with the first of `NOTICES`, in a thread of its own that asks every so many seconds.

    A notice that stands already is none: the run was started in spite of it, and goes on until SIGTERM or the end. A server that does
    not answer, as outside Google Cloud, announces nothing.
    """
    if not hosts.on_tpu():
        yield
        return
    over = threading.Event()
    threading.Thread(target=_watch, args=(tell, over, every_s), name="maintenance", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(tell: Callable[[str], None], over: threading.Event, every_s: float) -> None:
    standing = {field: _read(field) for field, _ in NOTICES}
    while not over.wait(every_s):
        for (field, value), notice in NOTICES.items():
            now = _read(field)
            if now == value != standing[field]:
                tell(notice)
                return
            standing[field] = now or standing[field]


def _read(field: str) -> str:
    """A field of this VM, or nothing where it cannot be had."""
    server = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not know this VM
    try:
        address = f"http://{server}/computeMetadata/v1/instance/{field}"
        with straight.open(urllib.request.Request(address, headers={"Metadata-Flavor": "Google"}), timeout=_TIMEOUT) as answer:
            return answer.read().decode().strip()
    except (OSError, http.client.HTTPException, ValueError):  # asked again later
        return ""
