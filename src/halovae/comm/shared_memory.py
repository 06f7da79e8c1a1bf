"""Small messages between ranks of one host, through memory that both have: no thread has to wake up for them.

The sender copies a message into a segment (`segment.py`) and says over a socket which one it is; the receiver copies it
out. Sockets have no name in any file system, so nothing is left behind by processes that are killed.
"""

from __future__ import annotations

import array
import errno
import platform
import secrets
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from halovae.base.errors import InputError
from halovae.base.forks import owned_here
from halovae.comm.control import ABSENCE, Link
from halovae.comm.handshake import CONNECT_SECONDS, accept, greet, limit_waiting
from halovae.comm.protocol import Message
from halovae.comm.segment import Segment

SMALL = 4 << 20
"""Bytes of the largest message that goes this way: beyond, time is spent on moving it, and not on waking up for it."""
_SAID = struct.Struct("=III")
"""Number of a segment, bytes that it can hold, bytes of the message."""
_TOKEN_BYTES = 16
_PAUSE = 5e-4
"""Seconds between two tries to send what the kernel has no room for."""


def can_share() -> bool:
    """Whether this system has what it takes: tried, since a sandbox may forbid any of it.

    Other processors may show a rank the word that a segment is free before its message has been read.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        Segment.new(0, 1).forget_file()
        with _socket() as listener:
            listener.bind(_name())
    except (OSError, RuntimeError, AttributeError):
        return False
    return True


class SharedLane:
    """Moves small messages between ranks of one host. Made by all of these together.

    Args:
        link: by which they find each other.
        rank: of this process.
        peers: the other ranks of this host.

    Raises:
        RankFailedError: a rank has failed in the meantime.
        RuntimeError: one did not connect.
    """

    def __init__(self, link: Link, rank: int, peers: Sequence[int]) -> None:
        self._channels = {peer: _Channel(end) for peer, end in _connected(link, rank, peers).items()}

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[Arrival]:
        """Send, and promise what is to come.

        Raises:
            RuntimeError: a connection has ended.
        """
        arrivals = [self._channels[peer].expect(buffer) for peer, buffer in receives]
        for peer, tensor in sends:
            self._send(peer, tensor)
        return arrivals

    def _send(self, peer: int, tensor: Tensor) -> None:
        """Where the kernel keeps its most, some hundred messages, others may wait for this rank to take in theirs."""
        deadline = time.monotonic() + ABSENCE
        while not self._channels[peer].send(tensor):
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {peer} has taken nothing for {ABSENCE:.0f} s")
            for channel in self._channels.values():
                channel.catch_up()
            time.sleep(_PAUSE)

    def abort(self) -> None:
        """End every connection: who waits for it, here or there, is woken by an error."""
        for channel in self._channels.values():
            channel.abort()


class Arrival:
    """A message to come, and the buffer that it fills."""

    def __init__(self, buffer: Tensor, take: Callable[[], bool]) -> None:
        self.buffer, self.come, self._take = buffer, False, take

    def wait(self) -> None:
        """Return when the buffer is filled.

        Raises:
            RuntimeError: the connection has ended, or nothing has come for too long.
        """
        while not self.come:
            self._take()


class _Channel:
    """One end of the connection of two ranks."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._ours: list[Segment] = []
        self._theirs: dict[int, Segment] = {}
        self._early: deque[tuple[Segment, int]] = deque()
        self._expected: deque[Arrival] = deque()
        limit_waiting(end, ABSENCE)
        weakref.finalize(self, end.close)
        owned_here(self, _Channel._disown)

    def send(self, tensor: Tensor) -> bool:
        """False where the kernel keeps too many messages already."""
        segment = next((s for s in self._ours if s.is_free and s.room >= tensor.nbytes), None)
        if segment is None:
            segment = Segment.new(len(self._ours), tensor.nbytes)
            self._ours.append(segment)
        segment.fill(tensor)
        said = self._say(_SAID.pack(segment.number, segment.room, tensor.nbytes), segment.file)
        if said:
            segment.forget_file()
        else:
            segment.free()
        return said

    def expect(self, buffer: Tensor) -> Arrival:
        arrival = Arrival(buffer, self._take)
        self._expected.append(arrival)
        self._match()
        return arrival

    def abort(self) -> None:
        with suppress(OSError):  # It has ended by itself.
            self._end.shutdown(socket.SHUT_RDWR)

    def _disown(self) -> None:
        self._end.close()

    def _say(self, words: bytes, file: int) -> bool:
        """With the descriptor of a segment that the other side has not seen."""
        rights = [] if file < 0 else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
        try:
            self._end.sendmsg([words], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ETOOMANYREFS):
                return False
            raise RuntimeError(f"a connection to another rank has ended: {error}") from error
        return True

    def catch_up(self) -> None:
        """Take in what has come."""
        while self._take(socket.MSG_DONTWAIT):
            pass

    def _take(self, flags: int = 0) -> bool:
        """Take in one message; False where there is none and the flags say not to wait."""
        try:
            words, rights, _, _ = self._end.recvmsg(_SAID.size, socket.CMSG_SPACE(array.array("i").itemsize), flags)
        except BlockingIOError:
            if flags:
                return False
            raise RuntimeError(f"another rank has sent nothing for {ABSENCE:.0f} s") from None
        except OSError as error:
            raise RuntimeError(f"a connection to another rank has ended: {error}") from error
        if not words:
            raise RuntimeError("a connection to another rank has ended")
        number, room, size = _SAID.unpack(words)
        if rights:
            self._theirs[number] = Segment(number, room, array.array("i", rights[0][2])[0])
            self._theirs[number].forget_file()
        elif number not in self._theirs:
            raise RuntimeError("another rank's memory can't be opened: this process has too many files open")
        self._early.append((self._theirs[number], size))
        self._match()
        return True

    def _match(self) -> None:
        """Messages are in the order in which they were sent, and so are those that are expected."""
        while self._early and self._expected:
            segment, size = self._early.popleft()
            arrival = self._expected.popleft()
            if size != arrival.buffer.nbytes:
                raise RuntimeError(f"a message of {size} bytes came where {arrival.buffer.nbytes} were expected")
            segment.empty_into(arrival.buffer)
            arrival.come = True


def _connected(link: Link, rank: int, peers: Sequence[int]) -> dict[int, socket.socket]:
    """A socket to each peer; of two ranks the higher one comes to the lower one."""
    token, found = secrets.token_bytes(_TOKEN_BYTES), dict[int, socket.socket]()
    if not peers:
        return found
    with _socket() as listener:
        listener.bind(_name())
        listener.listen(len(peers))
        link.note(_place(rank), token + listener.getsockname())
        try:
            for peer in [peer for peer in peers if peer < rank]:
                found[peer] = _visit(link, rank, peer)
            return found | accept(listener, {peer for peer in peers if peer > rank}, token, ABSENCE, link.check)
        except BaseException as error:
            for end in found.values():
                end.close()
            if isinstance(error, (OSError, InputError)):
                raise RuntimeError(str(error)) from error
            raise


def _visit(link: Link, rank: int, peer: int) -> socket.socket:
    link.wait_for(lambda: link.noted(_place(peer)) is not None)
    said, end = link.noted(_place(peer)) or b"", _socket()
    try:
        end.settimeout(CONNECT_SECONDS)
        end.connect(said[_TOKEN_BYTES:])
        greet(end, rank, said[:_TOKEN_BYTES])
    except OSError as error:
        end.close()
        raise RuntimeError(f"rank {rank} can't reach rank {peer}: {error}") from error
    return end


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _name() -> bytes:
    """A name for a socket that no file system has."""
    return b"\0halovae-" + secrets.token_hex(_TOKEN_BYTES).encode()


def _place(rank: int) -> str:
    """Where a rank says how it is reached."""
    return f"shared/{rank}"
