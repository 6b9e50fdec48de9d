"""A bad network between two TCP peers: late, and now and then cut in the middle of what is sent."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, what is on its way is lost
BLOCK = 1024


@dataclass
class Proxy:
    """Passes connections on to a port of this machine.

    Attributes:
        upstream: The port.
        cut_at: A connection is reset when so many bytes have gone up since the last came down.
        cuts: How many times that is still done.
        delay_seconds: For all that comes down.
        away: Reset every connection at once, as a network that is gone.
    """

    upstream: int
    cut_at: int = 0
    cuts: int = 0
    delay_seconds: float = 0.0
    away: bool = False
    port: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, listening: socket.socket) -> None:
        """Until the socket is closed."""
        while True:
            try:
                down, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(down,), daemon=True).start()

    def _connect(self, down: socket.socket) -> None:
        try:
            up = socket.create_connection(("127.0.0.1", self.upstream), 10)
        except OSError:
            down.close()
            return
        sent = [0]
        threading.Thread(target=self._pump, args=(up, down, sent, False), daemon=True).start()
        self._pump(down, up, sent, True)

    def _pump(self, source: socket.socket, sink: socket.socket, sent: list[int], upward: bool) -> None:
        """Pass on one way; `sent` are the bytes that went up since the last came down."""
        with contextlib.suppress(OSError):
            while block := source.recv(BLOCK):
                if not upward:
                    time.sleep(self.delay_seconds)
                sent[0] = sent[0] + len(block) if upward else 0
                if self.away or (upward and self._cuts(sent[0])):
                    for each in (source, sink):
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    break
                sink.sendall(block)
        for each in (source, sink):
            each.close()

    def _cuts(self, sent: int) -> bool:
        with self._lock:
            cut = self.cuts > 0 and sent >= self.cut_at
            self.cuts -= cut
        return cut


@contextmanager
def proxied(upstream: int, **settings: float) -> Iterator[Proxy]:
    """A proxy meanwhile, on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        proxy = Proxy(upstream, port=listening.getsockname()[1], **settings)  # type: ignore[arg-type]
        threading.Thread(target=proxy.serve, args=(listening,), daemon=True).start()
        yield proxy
