"""The network interface that ranks talk through: the one that reaches the rendezvous, no other."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def bind_libraries(address: str, port: int) -> None:
    """Have Gloo and NCCL listen there, unless the user has said where: by themselves they take the
    interface of the host's name, or all.
    """
    name = _interface_towards(address, port)
    if name is not None:
        for variable in _VARIABLES:
            os.environ.setdefault(variable, name)


def _interface_towards(address: str, port: int) -> str | None:
    """None where it cannot be told (IPv6)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
        names = [name for _, name in socket.if_nameindex()]
        if own.startswith("127."):
            return "lo" if "lo" in names else None
        for name in names:
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None
