"""Sockets from every rank of a group to its first rank, each end sure of the other."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from halovae.base.errors import InputError

Share = Callable[[Any], list[Any]]
"""Gives every rank's small value, in rank order."""

CONNECT_SECONDS = 30.0
_TRY_SECONDS = 5.0
_LOOK_SECONDS = 0.5
_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"!{_TOKEN_BYTES}sI")


def star(rank: int, size: int, share: Share) -> dict[int, Connection]:
    """Connect the first rank with each other one. Called on every rank.

    Args:
        share: used twice, to tell the others where to connect.

    Returns:
        On the first rank a connection per other rank, on the others the one to rank 0.

    Raises:
        InputError: the first rank can't be reached; on that one: a rank has not come.
    """
    on_one_host = len(set(share(host()))) == 1
    if rank > 0:
        addresses, port, token = share(None)[0]
        return {0: _connect(rank, addresses, port, token)}
    token = secrets.token_bytes(_TOKEN_BYTES)
    with socket.create_server(("127.0.0.1" if on_one_host else "", 0), backlog=size) as listener:
        share((["127.0.0.1"] if on_one_host else _addresses(), listener.getsockname()[1], token))
        try:
            peers = _accept(listener, set(range(1, size)), token)
        except InputError as error:
            raise InputError(f"{error}: is a firewall between?") from None
        return {rank: _connection(peer) for rank, peer in peers.items()}


def limit_sending(peer: Connection, seconds: float) -> None:
    """Let `peer.send_bytes` raise BlockingIOError where the other end has taken nothing for so long."""
    with _socket(peer) as twin:
        timeval = struct.pack("@ll", *divmod(round(seconds * 1e6), 10**6))
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def give_up_sending(peer: Connection) -> None:
    """Both ends read no more than what has come already."""
    with _socket(peer) as twin:
        twin.shutdown(socket.SHUT_RDWR)


def _socket(peer: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(peer.fileno()))


def host() -> tuple[str, str, int]:
    """Equal where two ranks reach each other by the loopback address: same host, same network namespace."""
    boot, net = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    return (socket.gethostname(), boot.read_text() if boot.exists() else "", net.stat().st_ino if net.exists() else 0)


def _addresses() -> list[str]:
    """Where other hosts may reach this one: by the way to the group's master first, then by its name."""
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((os.environ.get("MASTER_ADDR", "192.0.2.1"), 9))  # Sends nothing; asks for the route.
        found.append(probe.getsockname()[0])
    with suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")]


def _accept(listener: socket.socket, ranks: set[int], token: bytes) -> dict[int, socket.socket]:
    """A socket to each of `ranks`, which `_connect` and know the token."""
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    listener.settimeout(_LOOK_SECONDS)
    while missing := ranks - set(found):
        try:
            if time.monotonic() > deadline:
                raise InputError(f"rank {', '.join(map(str, sorted(missing)))} did not connect in time")
            peer, _ = listener.accept()
        except TimeoutError:
            continue
        except BaseException:
            for peer in found.values():
                peer.close()
            raise
        peer.settimeout(_TRY_SECONDS)
        try:
            said, rank = _HELLO.unpack(_read(peer, _HELLO.size))
            if not hmac.compare_digest(said, token) or rank not in missing:
                raise OSError("a stranger")
            peer.sendall(token)
        except (OSError, struct.error):
            peer.close()
        else:
            peer.settimeout(None)
            found[rank] = peer
    return found


def _connect(rank: int, addresses: list[str], port: int, token: bytes) -> Connection:
    """Say who this is to the rank that accepts, and be sure of it."""
    reasons: list[str] = []
    for address in addresses:
        try:
            peer = socket.create_connection((address, port), timeout=_TRY_SECONDS)
            peer.sendall(_HELLO.pack(token, rank))
            if not hmac.compare_digest(_read(peer, _TOKEN_BYTES), token):
                raise OSError("a stranger answered")
            peer.settimeout(None)
        except OSError as error:
            reasons.append(f"{address}:{port}: {error}")
        else:
            return _connection(peer)
    raise InputError(f"rank {rank} can't reach rank 0 ({'; '.join(reasons) or 'it has no address'})")


def _read(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            raise OSError("connection closed")
        data += part
    return data


def _connection(peer: socket.socket) -> Connection:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(peer.detach())
