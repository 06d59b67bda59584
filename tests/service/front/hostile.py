"""A client of HTTP/2 that does what gRPC's own would not."""

import socket
import struct
import threading
from contextlib import suppress

from service.rpc import INFERENCE

LIVE = f"/{INFERENCE}/ServerLive"
WAIT_S = 60
HEADERS, RESET, SETTINGS, GO_AWAY, WINDOW_UPDATE = 1, 3, 4, 7, 8
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4


class Hostile:
    """An HTTP/2 client that begins calls and need not end them, nor have room for answers.

    Args:
        address: of the server.
        window: bytes of each answer that it has room for until it says more.
        reads: whether it reads from its socket at once; else from when `reads` is called.
    """

    def __init__(self, address: str, *, window: int = 65_535, reads: bool = True) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), WAIT_S)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.changed = threading.Condition()
        self.settings: dict[int, int] = {}
        self.room = {0: 65_535}  # bytes that may be sent, by stream; 0: on all of them together
        self.frames: list[tuple[int, int, bytes]] = []
        self.closed = False
        self.send(SETTINGS, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window))
        if reads:
            self.reads()
            self.wait(lambda: INITIAL_WINDOW_SIZE in self.settings)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def reads(self):
        """Read from now on."""
        threading.Thread(target=self.read, daemon=True).start()

    def make_room(self, stream, size):
        """Have room for more bytes of an answer; 0: of all of them together."""
        self.send(WINDOW_UPDATE, stream, size.to_bytes(4, "big"))

    def wait(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_S)

    def send(self, kind, stream, payload, flags=0):
        head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        self.socket.sendall(head + payload)

    def read(self):
        file = self.socket.makefile("rb")
        try:
            while head := file.read(9):
                payload = file.read(int.from_bytes(head[:3], "big"))
                self.take(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        except OSError:
            pass
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def take(self, kind, flags, stream, payload):
        with self.changed:
            if kind == SETTINGS and not flags & 1:
                for at in range(0, len(payload), 6):
                    key, value = struct.unpack_from(">HI", payload, at)
                    self.settings[key] = value
                self.send(SETTINGS, 0, b"", 1)
            elif kind == WINDOW_UPDATE:
                room = self.room.setdefault(stream, self.settings[INITIAL_WINDOW_SIZE])
                self.room[stream] = room + int.from_bytes(payload, "big")
            else:
                self.frames.append((kind, stream, payload))
            self.changed.notify_all()

    def begin(self, stream, *, encoding="identity"):
        """Open a call of ServerLive, unless the server has closed meanwhile."""
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": LIVE,
            ":authority": "x",
            "te": "trailers",
            "content-type": "application/grpc",
            "grpc-encoding": encoding,
        }
        block = b"".join(
            b"\0" + bytes([len(key)]) + key.encode() + bytes([len(value)]) + value.encode()
            for key, value in headers.items()
        )
        self.room.setdefault(stream, self.settings.get(INITIAL_WINDOW_SIZE, 65_535))
        with suppress(ConnectionError):  # `closed` tells, once all that came before has been read
            self.send(HEADERS, stream, block, 4)

    def give(self, stream, content, *, end=False):
        """Send a part of a call's message, as fast as the server lets; false if it is closed."""
        at = 0
        while at < len(content):
            with self.changed:
                self.changed.wait_for(
                    lambda: self.closed or min(self.room[0], self.room[stream]) > 0, WAIT_S
                )
                if self.closed:
                    return False
                size = min(16_384, len(content) - at, self.room[0], self.room[stream])
                self.room[0] -= size
                self.room[stream] -= size
            last = end and at + size == len(content)
            try:
                self.send(0, stream, content[at : at + size], int(last))
            except OSError:
                return False
            at += size
        return True
