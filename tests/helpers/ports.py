"""A port for a server that has to be told which one to take."""

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """Return a free port below those that the system gives to clients and for port 0.

    So nothing else takes it before the server does.
    """
    while True:
        port = random.SystemRandom().randrange(10_100, 16_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
