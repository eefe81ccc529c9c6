"""Python reads this file at its start from PYTHONPATH: writes down every connection and name look-up of the process."""

import os
import socket
import sys

_LOCAL = ("localhost", "127.0.0.1", "::1", "", None)
_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")


def _watch(event: str, arguments: tuple) -> None:
    if event not in _EVENTS:
        return
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        sender, address = arguments
        if getattr(sender, "family", None) not in (socket.AF_INET, socket.AF_INET6) or not address:
            return
        host = address[0]
    host = host.decode() if isinstance(host, bytes) else host
    if host not in _LOCAL:
        with open(os.environ["WATCH_FILE"], "a", encoding="utf-8") as file:
            file.write(f"{event} {host} by {sys.argv[:1]}\n")


sys.addaudithook(_watch)
