"""What ranks tell each other besides tensors: small values, signs of life, and that one of them has failed.

The first rank is the hub: the others send to it, and it sends to all. A thread on each rank reads what comes, so news
of a failure arrives whatever the rank is doing. A process that dies closes its sockets, which the hub sees at once; one
that stops gives no sign of life any more.

A failure belongs to an **era**: the time between two failures. All ranks leave a failed call, and with it the era; what
is said in the next one can't be taken for something old.
"""

from __future__ import annotations

import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from halovae.base.errors import InputError, RankFailedError, failed_elsewhere
from halovae.base.forks import owned_here
from halovae.comm.handshake import Share, give_up_sending, limit_sending, star
from halovae.comm.protocol import Forgone, Start

PATIENCE = 60.0
"""Seconds without a sign of life, by default, after which a rank counts as stopped."""
ABSENCE = 1800.0
"""Seconds after which a rank that is alive, but does not come to what the others wait for, counts as failed."""

_FORWARDED = ("fail", "note", "die", "leave")
Place = tuple[int, int]
"""Era, and number of the agreement in it."""


class Link:
    """One rank's end of it. Every rank of the group makes one.

    Args:
        share: gives every rank's small value; used to connect.
        on_failure: called, on any thread, when a failure of the era gets known.

    Attributes:
        era: how many calls have failed so far.
        troubled: whether `check` would raise.
        busy: whether this rank is in a call or waits; only then it matters that another one is silent.
    """

    def __init__(self, rank: int, size: int, share: Share, on_failure: Callable[[], object]) -> None:
        self.era, self.troubled = 0, False
        self._rank, self._size, self._on_failure = rank, size, on_failure
        self._peers = star(rank, size, share)
        self._heard = dict.fromkeys(self._peers, time.monotonic())
        self._awake, self._end = connection.Pipe(duplex=False)
        self.set_patience(PATIENCE)
        self._news = threading.Condition(threading.RLock())
        self._sending = {peer: threading.Lock() for peer in self._peers}
        self._agreements = 0
        self._said: dict[Place, dict[int, tuple[bytes, Start | None]]] = {}
        self._complete: dict[Place, list[bytes] | Forgone] = {}
        self._forgone: dict[Start, tuple[Forgone, set[int]]] = {}
        """On the hub: the first that was told, and the ranks that know of one."""
        self._forgoing: SimpleQueue[tuple[Start, Forgone]] = SimpleQueue()
        self._telling = threading.Lock()
        self._failures: dict[int, RankFailedError] = {}
        self._dead: RankFailedError | None = None
        self._left: set[int] = set()
        self._stuck: set[int] = set()
        self._notes: dict[str, bytes] = {}
        self._latest = math.inf
        self.busy = self._closed = self._disowned = False
        self._thread = threading.Thread(target=self._serve, name="halovae-link", daemon=True)
        self._thread.start()
        owned_here(self, Link._disown)

    def set_patience(self, seconds: float) -> None:
        """After how long without a sign of life a rank counts as stopped."""
        self._patience = seconds
        for peer in self._peers.values():
            # A large message to a stopped rank must not silence this one for so long that it counts as stopped itself.
            limit_sending(peer, seconds / 2)
        # More patient ranks have given signs of life less often: it counts from now on, and the thread learns of it.
        self._heard = dict.fromkeys(self._peers, time.monotonic())
        with suppress(OSError):
            self._end.send_bytes(b"")

    # ---- for the ranks' own work -------------------------------------------------------------------------------------

    def gather(self, value: Any, start: Start | None = None) -> list[Any]:
        """Every rank's value, in rank order.

        Args:
            start: what begins with it, if a rank may forgo that.

        Raises:
            RankFailedError: a rank has failed, died, stopped, left or never come.
            Forgone: a rank has forgone it: this one leaves its place to whatever comes next.
        """
        self.check()  # Who comes after the others have given up must not find their answers.
        self._tell_forgone()  # Before what comes after it.
        data = pickle.dumps(value)
        with self._news:
            place = self.era, self._agreements
            self._agreements += 1
        self._tell("say", place, self._rank, data, start)
        self.wait_for(lambda: place in self._complete, lambda: self._tell("missing", place))
        with self._news:
            found = self._complete.pop(place)
            if isinstance(found, Forgone):
                self._agreements -= 1
                self.busy = False
                raise Forgone(found.rank, found.why)
            return [pickle.loads(each) for each in found]

    def forgo(self, start: Start, why: Any) -> None:
        """Tell all ranks that this one will not begin something."""
        self._forgoing.put((start, Forgone(self._rank, why)))
        with suppress(OSError):
            self._end.send_bytes(b"")

    def _tell_forgone(self) -> None:
        """Not by `forgo` itself: a finalizer may have interrupted whatever this thread was telling."""
        with self._telling:
            while not self._forgoing.empty():
                self._tell("forgo", self._rank, *self._forgoing.get())

    def note(self, name: str, value: bytes) -> None:
        """Put a value where every rank can read it, in this era."""
        self._tell("note", f"{self.era}/{name}", value)

    def noted(self, name: str) -> bytes | None:
        """What a rank has put there, if it has."""
        with self._news:
            return self._notes.get(f"{self.era}/{name}")

    def wait_for(self, ready: Callable[[], bool], complain: Callable[[], None] | None = None) -> None:
        """Until `ready`, which is asked again whenever there is news.

        Args:
            complain: called when that has taken too long; has to end in news of who is to blame.

        Raises:
            RankFailedError: a rank has failed, left or never come, so that it never will be.
            TimeoutError: it has taken too long, and nobody knows who is to blame.
        """
        deadline = time.monotonic() + ABSENCE
        with self._news:
            outer, self.busy = self.busy, True
            try:
                while not ready():
                    self.check()
                    if self._left or self._closed:
                        gone = min(self._left, default=self._rank)
                        raise RankFailedError(gone, "it has left the group: its handle was restored, or it has ended")
                    if time.monotonic() > deadline:
                        if complain is None:
                            raise TimeoutError(f"waited {ABSENCE:.0f} s for the other ranks")
                        complain()
                    self._news.wait(1.0)
            finally:
                self.busy = outer

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Around a wait for the device, which may wait for messages: when it takes too long, this rank fails."""
        self._latest = time.monotonic() + ABSENCE
        try:
            yield
        finally:
            self._latest = math.inf

    def check(self) -> None:
        """Raise what is known of a failure in this era."""
        if self._disowned:
            raise InputError(
                f"this process was forked from rank {self._rank} and has no part in its group: call the VAE on the rank"
                " itself, or restore() the handle here and use the VAE alone"
            )
        if self.troubled:
            with self._news:
                known = self._dead or self._failures[self.era]
            raise failed_elsewhere(known.rank, known.message, known.details, known.kind)

    def fail(self, message: str, details: str = "", kind: str = "") -> None:
        """Tell all ranks that this one has failed, unless they know of another failure already."""
        if not self.troubled:
            self._tell("fail", self.era, self._rank, message, details, kind)

    def next_era(self) -> None:
        """Leave a failed call."""
        with self._news:
            self.era, self._agreements = self.era + 1, 0
            for old in [place for place in (*self._said, *self._complete) if place[0] < self.era]:
                self._said.pop(old, None)
                self._complete.pop(old, None)
            self._notes = {name: value for name, value in self._notes.items() if int(name.split("/")[0]) >= self.era}
            self._failures = {era: failure for era, failure in self._failures.items() if era >= self.era}
            self._judge()

    def close(self) -> None:
        """Tell the others, end the thread, close the sockets."""
        with suppress(OSError):
            self._tell_forgone()  # Why a stream was left says more than that its rank is gone.
        for rank in self._peers:
            self._send(rank, ("leave", self._rank))
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._end.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _disown(self) -> None:
        """In a forked child, which has the sockets but not the thread: the others see when the rank itself ends."""
        self._disowned = self.troubled = True
        self._news = threading.Condition(threading.RLock())  # a thread of the parent may have held the other one
        for end in (*self._peers.values(), self._awake, self._end):
            with suppress(OSError):
                end.close()

    # ---- news ----------------------------------------------------------------------------------------------------

    def _tell(self, kind: str, *content: Any) -> None:
        """Give news to the hub, which gives them to all."""
        if self._rank == 0:
            self._take(kind, *content)
        else:
            if kind == "fail":  # The hub may be the one that is silent.
                self._take_fail(*content)
            self._send(0, (kind, *content))

    def _take(self, kind: str, *content: Any) -> None:
        with self._news:
            getattr(self, f"_take_{kind}")(*content)
            self._news.notify_all()
        if self._rank == 0 and kind in _FORWARDED:
            for rank in self._peers:
                self._send(rank, (kind, *content))

    def _take_beat(self) -> None:
        return

    def _take_say(self, place: Place, rank: int, data: bytes, start: Start | None) -> None:
        if start is not None and start in self._forgone:
            self._excuse(start, [(rank, place)])
            return
        said = self._said.setdefault(place, {})
        said[rank] = data, start
        if len(said) == self._size:
            everything = [said[each][0] for each in range(self._size)]
            del self._said[place]
            for each in range(self._size):
                self._answer(each, place, everything)

    def _take_all(self, place: Place, everything: list[bytes] | Forgone) -> None:
        self._complete[place] = everything

    def _answer(self, rank: int, place: Place, everything: list[bytes] | Forgone) -> None:
        if rank == self._rank:
            self._complete[place] = everything
        else:
            self._send(rank, ("all", place, everything))

    def _take_forgo(self, rank: int, start: Start, forgone: Forgone) -> None:
        """On the hub, where it comes before or after what others say, and not both."""
        self._forgone.setdefault(start, (forgone, set()))[1].add(rank)
        said = self._said.items()
        waiting = [(who, place) for place, by in said for who, (_, begun) in by.items() if begun == start]
        for who, place in waiting:
            del self._said[place][who]
        self._excuse(start, waiting)

    def _excuse(self, start: Start, waiting: list[tuple[int, Place]]) -> None:
        forgone, knowing = self._forgone[start]
        for rank, place in waiting:
            knowing.add(rank)
            self._answer(rank, place, forgone)
        if len(knowing) == self._size:
            del self._forgone[start]

    def _take_note(self, name: str, value: bytes) -> None:
        self._notes[name] = value

    def _take_fail(self, era: int, rank: int, message: str, details: str = "", kind: str = "") -> None:
        with self._news:
            if era >= self.era:
                self._failures.setdefault(era, failed_elsewhere(rank, message, details, kind))
                self._judge()

    def _take_die(self, rank: int, message: str) -> None:
        self._dead = self._dead or RankFailedError(rank, message)
        self._judge()

    def _take_leave(self, rank: int) -> None:
        self._left.add(rank)

    def _judge(self) -> None:
        before = self.troubled
        self.troubled = self._disowned or self._dead is not None or self.era in self._failures
        if self.troubled:
            self._news.notify_all()
            if not before:
                self._on_failure()

    def _take_missing(self, place: Place) -> None:
        """On the hub, which alone knows who has not come; it may be the hub's own rank."""
        said = self._said.get(place)
        if said is not None:  # Else the last one has come in the meantime.
            rank = next(each for each in range(self._size) if each not in said)
            message = f"it has not come to what the others have waited for {ABSENCE:.0f} s"
            self._tell("fail", place[0], rank, message)

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        alive = dict(self._peers)
        seen = time.monotonic()
        while not self._closed:
            beat = min(5.0, self._patience / 4)
            ready = connection.wait([*alive.values(), self._awake], beat)
            if self._awake in ready:
                with suppress(EOFError, OSError):
                    self._awake.recv_bytes()
                self._tell_forgone()
            for rank, peer in [(r, p) for r, p in alive.items() if p in ready]:
                if not self._read(rank, peer):
                    del alive[rank]
            now = time.monotonic()
            if now - seen >= beat / 2 or not ready:
                if now - seen > 2 * beat + 1:  # This process itself was stopped: what others sent waits to be read.
                    self._heard = dict.fromkeys(self._heard, now)
                seen = now
                self._beat(alive, now)
        for end in (*self._peers.values(), self._awake):
            end.close()

    def _read(self, rank: int, peer: Connection) -> bool:
        """Take in one message; False when there will be no more."""
        try:
            kind, *content = pickle.loads(peer.recv_bytes())
        except (EOFError, OSError):
            if rank not in self._left:
                stuck = "it takes no messages: it is stopped, or its machine is"
                self._take("die", rank, stuck if rank in self._stuck else "its process has ended")
            return False
        self._heard[rank] = time.monotonic()
        self._take(kind, *content)
        return True

    def _beat(self, alive: dict[int, Connection], now: float) -> None:
        if now > self._latest:
            self.fail(f"its device has waited {ABSENCE:.0f} s for messages of other ranks")
        for rank in alive:
            if now - self._heard[rank] <= self._patience:
                self._send(rank, ("beat",))
            elif self.busy and not self.troubled:
                silence = f"no sign of life for {self._patience:g} s: it is stopped, or its machine is"
                self._tell("fail", self.era, rank, silence)

    def _send(self, rank: int, message: tuple[Any, ...]) -> None:
        if self._disowned:
            return
        # A peer that has gone is noticed where it is read from.
        with self._sending[rank], suppress(OSError):
            try:
                self._peers[rank].send_bytes(pickle.dumps(message))
            except BlockingIOError:  # It has a half of it, so nothing can follow.
                self._stuck.add(rank)
                give_up_sending(self._peers[rank])
