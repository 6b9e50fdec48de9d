"""What the network sees of the server: TLS, and of the SuperLink's interfaces only the one for devices.

Flower 1.41 has its interfaces for devices, for operators and for apps on one port, and asks for no proof but of
devices: who reaches the port can start programs on all of them. The SuperLink therefore listens on loopback, and this,
in front of it, passes on what is for devices, up to a size. It also takes and gives bytes that mean nothing, by which
devices measure the way (`lamina.deploy.way`).
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

DEVICES, PROBE = "/v1/fleet/", "/lamina/probe"
MOST_BYTES = 16 * 2**20
"""Of a request. Flower cuts arrays into pieces of 5 MiB."""
MOST_CONNECTIONS = 512
_BLOCK, _HELLO_SECONDS, _IDLE_SECONDS, _ANSWER_SECONDS = 64 * 1024, 10, 120, 120
_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "transfer-encoding", "te", "upgrade", "content-length", "host")
)
_PLAIN = b"this port speaks TLS: connect with https, and with the CA certificate of the kit\n"
_REFUSAL = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    % len(_PLAIN)
)


class Front(ThreadingHTTPServer):
    """Passes requests of devices on to a SuperLink on loopback."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], tls: ssl.SSLContext, upstream: tuple[str, int], trust: ssl.SSLContext
    ) -> None:
        """Listen.

        Args:
            address: To listen on: host and port.
            tls: With the server's certificate.
            upstream: Host and port of the SuperLink.
            trust: With the CA that the SuperLink's certificate is of.

        Raises:
            OSError: The address cannot be had.
        """
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.tls, self.upstream, self.trust = tls, upstream, trust
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(address, _Passing)

    def process_request_thread(self, request: object, client_address: object) -> None:
        """One connection, in a thread of its own; those above the limit are closed at once."""
        connection = cast(socket.socket, request)
        if not self._places.acquire(blocking=False):
            connection.close()
            return
        try:
            wrapped = self._greet(connection)
            if wrapped is not None:
                super().process_request_thread(wrapped, client_address)
        finally:
            self._places.release()

    def _greet(self, connection: socket.socket) -> ssl.SSLSocket | None:
        """TLS, or, to who does not speak it, one sentence and the end."""
        try:
            connection.settimeout(_HELLO_SECONDS)
            first = connection.recv(1, socket.MSG_PEEK)
            if first == b"\x16":  # a handshake
                return self.tls.wrap_socket(connection, server_side=True)
            if first:
                connection.recv(_BLOCK)
                connection.sendall(_REFUSAL + _PLAIN)
        except OSError:  # errors of TLS among them
            pass
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that broke is nobody's error."""


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    server: Front

    def do_POST(self) -> None:
        """Pass a request on, drop it if it measures the way, or refuse it."""
        if self.path != PROBE and (not self.path.startswith(DEVICES) or ".." in self.path or "%" in self.path):
            return self._refuse(403, "only devices are served here")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or "Transfer-Encoding" in self.headers:
            return self._refuse(411, "the length is missing")
        if int(length) > MOST_BYTES:
            return self._refuse(413, f"more than {MOST_BYTES} bytes")
        try:
            if self.path == PROBE:
                for _ in self._blocks(int(length)):
                    pass
                return self._answer(b"")
            self._pass(int(length))
        except (OSError, http.client.HTTPException):
            self._refuse(502, "the SuperLink does not answer")

    def do_GET(self) -> None:
        """Nothing is served that one could get, but bytes that measure the way."""
        way, _, size = self.path.rpartition("/")
        if way == PROBE and size.isascii() and size.isdecimal() and int(size[:9]) <= MOST_BYTES and len(size) < 9:
            return self._answer(bytes(int(size)))
        self._refuse(403, "only devices are served here")

    do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_GET

    def _answer(self, content: bytes) -> None:
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _pass(self, length: int) -> None:
        host, port = self.server.upstream
        upstream = http.client.HTTPSConnection(host, port, context=self.server.trust, timeout=_ANSWER_SECONDS)
        try:
            upstream.putrequest("POST", self.path, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(length))
            upstream.endheaders()
            for block in self._blocks(length):
                upstream.send(block)
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _blocks(self, left: int) -> Iterator[bytes]:
        while left:
            block = self.rfile.read(min(left, _BLOCK))
            if not block:
                raise ConnectionError("the request ended early")
            left -= len(block)
            yield block

    def _refuse(self, code: int, reason: str) -> None:
        """Answer and hang up: what is left of the request is not read."""
        self.close_connection = True
        content = f"{reason}\n".encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: who connects must not be able to fill a disk."""


@contextmanager
def serving(front: Front) -> Iterator[None]:
    """Serve meanwhile, in a thread."""
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        front.shutdown()
        front.server_close()
        thread.join()
