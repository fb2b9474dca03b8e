"""Where processes listen, as the kernel tells."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path


def listening(pids: Iterable[int]) -> list[tuple[str, int]]:
    """Address and port of each TCP socket of these processes that others may connect to."""
    sockets = {}
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                address, port = fields[1].split(":")
                words = bytes.fromhex(address)
                in_order = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                sockets[fields[9]] = socket.inet_ntop(family, in_order), int(port, 16)
    found = []
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            name = str(fd.readlink()) if fd.is_symlink() else ""
            inode = name.removeprefix("socket:[").removesuffix("]")
            if inode in sockets:
                found.append(sockets[inode])
    return found
