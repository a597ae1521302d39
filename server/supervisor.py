"""Telling the service manager that started this process how it is, if one did and asked.

Source: sd_notify(3): a datagram to the Unix socket that NOTIFY_SOCKET names; an @ stands for an abstract address.
"""

import logging
import os
import socket

log = logging.getLogger("lydian.supervisor")


def tell_ready() -> None:
    """Say that the coordinator serves. Without a manager that waits for it, nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(address)
            manager.sendall(b"READY=1")
    except OSError as error:
        log.warning("the service manager at %r could not be told that this is ready: %s", address, error)
