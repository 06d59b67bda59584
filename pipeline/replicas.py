"""Which servers answer under a name, and what each of them samples, read by a thread of its own.

Knows who comes and goes, not what becomes of the rows: `pipeline.shadow` has them answered by the
original, and reports to the server that sent them.
"""

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

from service.client import Client, SampledRows
from service.errors import ServerError

log = logging.getLogger(__name__)
LOOK_UP_S = 3.0  # between two look-ups of the name
IDLE_S = 30.0  # without a row, after which a server is asked whether it is still there
ANSWER_S = 5.0  # longest wait for an answer to that, and to a report
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # before a server that was lost is asked again
REFUSED_S = 60.0  # before one that lets nobody read rows is
ROOM_S = 0.2  # longest wait for room before the end is noticed
# What passes by itself: the server restarts, or was never there, or others shadow it.
AGAIN = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED"})


class Replica:
    """One server, and a thread that reads what it samples."""

    def __init__(self, client: Client, address: str = "") -> None:
        """Store who it is; `read` begins.

        Args:
            client: of this server and no other.
            address: HOST:PORT; empty where there is only one server, and no need to say which.
        """
        self.client, self.address = client, address
        self.lost = False  # whether the connection was, since rows last came
        self.silent = False  # whether it stays open, and nobody answers
        self._heard_s = time.monotonic()
        self._over = threading.Event()

    @property
    def prefix(self) -> str:
        """What a line that is about this server begins with."""
        return f"{self.address} " if self.address else ""

    def read(self, model: str, waiting: "queue.Queue[Found]") -> None:
        """Begin to put what the server samples into a queue, and why it lets nobody read.

        A full queue is waited for; the server then drops rows, and counts them.

        Args:
            model: whose rows; empty: of all models.
            waiting: what is to be filled.
        """
        read = threading.Thread(target=self._read, args=(model, waiting), daemon=True)
        read.start()

    def end(self) -> None:
        """Put nothing more into the queue; the client may still be asked."""
        self._over.set()

    def close(self) -> None:
        """End, and close the client."""
        self.end()
        self.client.close()

    def check(self) -> None:
        """See whether a server that has sent nothing for a while answers; for up to `ANSWER_S`.

        One that has left without closing its connection, as a host that lost its power does, would
        be listened to for ever.
        """
        if self.lost or time.monotonic() < self._heard_s + IDLE_S:
            return
        try:
            self.client.models(timeout_s=ANSWER_S)
        except ServerError as error:
            self.silent = error.code == "DEADLINE_EXCEEDED"
        except ValueError:  # closed meanwhile
            return
        self._heard_s = time.monotonic()

    def _read(self, model: str, waiting: "queue.Queue[Found]") -> None:
        pause_s, said = FIRST_PAUSE_S, ""
        while not self._over.is_set():
            end = self._read_once(model, waiting)
            if not self.lost:
                self.lost, pause_s, said = True, FIRST_PAUSE_S, ""
            if end.code not in AGAIN:
                self._put(end, waiting)
                pause_s = REFUSED_S
            elif str(end) != said and not self._over.is_set():
                log.warning("%sno rows: %s; trying again", self.prefix, end)
                said = str(end)
            self._over.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _read_once(self, model: str, waiting: "queue.Queue[Found]") -> ServerError:
        """Read until nothing more comes, and return why."""
        try:
            with closing(self.client.sample(model)) as sampled:
                for rows in sampled:
                    self.lost, self._heard_s = False, time.monotonic()
                    self._put(rows, waiting)
                    if self._over.is_set():
                        break
        except ServerError as error:
            return error
        except ValueError:  # gRPC's word for a client that is closed
            if not self._over.is_set():
                raise
        return ServerError("the server ended the stream", code="UNAVAILABLE")

    def _put(self, found: SampledRows | ServerError, waiting: "queue.Queue[Found]") -> None:
        """Wait for room, unless nobody will read it."""
        while not self._over.is_set():
            try:
                waiting.put((self, found), timeout=ROOM_S)
            except queue.Full:
                continue
            return


Found: TypeAlias = tuple[Replica, SampledRows | ServerError]


@dataclass(frozen=True, slots=True)
class Name:
    """A host's name and a port."""

    host: str
    port: int

    @classmethod
    def of(cls, endpoint: str) -> Self:
        """Split HOST:PORT; raises ValueError where it is none."""
        host, _, port = endpoint.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal()):
            raise ValueError(f"the server is {endpoint!r}, expected HOST:PORT, such as server:8001")
        return cls(host.strip("[]"), int(port))

    def addresses(self) -> set[str]:
        """Look up every address that the name has now, as HOST:PORT; blocks.

        Only those of IPv4 where there are any: a server that has both kinds is one server.

        Raises:
            OSError: it has none, or nobody can be asked.
        """
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        hosts = {kind: {str(one[4][0]) for one in found if one[0] == kind} for kind, *_ in found}
        if four := hosts.get(socket.AF_INET):
            return {f"{host}:{self.port}" for host in four}
        return {f"[{host}]:{self.port}" for host in hosts.get(socket.AF_INET6, ())}


class Replicas:
    """The servers at all addresses of a name, while these change.

    A thread looks the name up; `follow` is called by one other thread.
    """

    def __init__(
        self, look_up: Callable[[], Collection[str]], connect: Callable[[str], Client]
    ) -> None:
        """Store how; `watch` starts.

        Args:
            look_up: gives the addresses that there are; may block, and raise OSError.
            connect: makes the client of an address.
        """
        self._look_up, self._connect = look_up, connect
        self._named: Collection[str] = ()
        self._known: dict[str, Replica] = {}
        self._over = threading.Event()

    def watch(self) -> None:
        """Begin to look the name up every few seconds, until `close`."""
        threading.Thread(target=self._watch, name="addresses", daemon=True).start()

    def follow(self) -> tuple[list[Replica], list[Replica]]:
        """Return the servers that came, and those that went, since it was last called.

        One has gone when its connection was lost and the name no longer has its address; its
        client is closed. One that went silent has gone too, and comes again while it is named.
        """
        named = frozenset(self._named)
        gone = [
            one
            for one in self._known.values()
            if one.silent or (one.lost and one.address not in named)
        ]
        for one in gone:
            del self._known[one.address]
            one.close()
        new = [Replica(self._connect(one), one) for one in sorted(named - self._known.keys())]
        self._known.update({one.address: one for one in new})
        return new, gone

    def close(self) -> None:
        """Look no longer, and close every client."""
        self._over.set()
        for one in self._known.values():
            one.close()

    def __enter__(self) -> Self:
        """Return the servers themselves."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close them."""
        self.close()

    def _watch(self) -> None:
        said = ""
        while not self._over.is_set():
            try:
                self._named, said = self._look_up(), ""
            except OSError as error:  # which says nothing of the servers: they stay
                if str(error) != said:
                    log.warning("the servers' addresses are not known: %s; trying again", error)
                    said = str(error)
            for one in tuple(self._known.values()):
                one.check()
            self._over.wait(LOOK_UP_S)
