"""The store by which ranks have met, cut off."""

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from .fault import Fault, FaultError, Where


class DeadStore(Fault):
    """Cuts all of this process's connections to the TCPStore that ranks meet by, and the store's own socket where this
    process holds it: what asks the store from then on fails. Linux alone tells which connections those are.

    Args:
        port: of the store; None takes MASTER_PORT.
        **where: see Fault.

    Example:
        ``DeadStore(rank=None, update=6)``: no rank has a store any more.
    """

    def __init__(self, port: int | None = None, **where: Unpack[Where]) -> None:
        super().__init__(**where)
        self.port = port

    def strike(self, fit: Any) -> None:
        """Cut the connections.

        Raises:
            FaultError: there are none.
        """
        port = int(os.environ.get("MASTER_PORT", "0")) if self.port is None else self.port
        if not cut_connections(port):
            raise FaultError(f"Rank {fit.strategy.rank} has no connection to a store at port {port}.")


def cut_connections(port: int) -> int:
    """Shut down this process's sockets from or to a port.

    Returns:
        How many there were.
    """
    cut = 0
    for inode in inodes_of(port):
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # closed meanwhile, or not connected
                if os.readlink(descriptor) == f"socket:[{inode}]":
                    with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                        connection.shutdown(socket.SHUT_RDWR)
                    cut += 1
    return cut


def inodes_of(port: int) -> set[str]:
    """Return the numbers of the machine's TCP sockets from or to a port, as the kernel lists them."""
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if any(int(address.rpartition(":")[2], 16) == port for address in fields[1:3]):
                    found.add(fields[9])
    return found
