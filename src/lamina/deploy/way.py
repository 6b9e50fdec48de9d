"""How fast bytes go between a device and its server: what the front of the server takes and gives for that alone."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Callable

from lamina.deploy.front import MOST_BYTES, PROBE
from lamina.deploy.join import check
from lamina.deploy.kit import Device
from lamina.errors import UserError

FIRST_BYTES, ENOUGH_SECONDS, TIMEOUT_SECONDS = 64 * 1024, 1.0, 120


def rates(device: Device, clock: Callable[[], float] = time.monotonic) -> tuple[float, float]:
    """Bytes per second to the server and from it, over one connection, with TLS.

    What is sent gets larger until it takes `ENOUGH_SECONDS`, or as much as the server takes at once.

    Raises:
        UserError: As `join.check`; or the server breaks off, or does not do this.
    """
    check(device)
    trust = ssl.create_default_context(cafile=str(device.folder / "ca.crt"))
    connection = http.client.HTTPSConnection(device.host, device.port, context=trust, timeout=TIMEOUT_SECONDS)

    def sent(size: int) -> None:
        connection.request("POST", PROBE, bytes(size))

    def received(size: int) -> None:
        connection.request("GET", f"{PROBE}/{size}")

    try:
        return _rate(connection, sent, clock), _rate(connection, received, clock)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{device.address} broke off while the way to it was measured: {error}") from error
    finally:
        connection.close()


def _rate(connection: http.client.HTTPSConnection, ask: Callable[[int], None], clock: Callable[[], float]) -> float:
    size = FIRST_BYTES
    while True:
        begun = clock()
        ask(size)
        answer = connection.getresponse()
        answer.read()
        taken = clock() - begun
        if answer.status != 200:
            raise UserError(f"the server does not measure the way to it (status {answer.status}): is it this version?")
        if taken >= ENOUGH_SECONDS or size >= MOST_BYTES:
            return size / max(taken, 1e-9)
        size = min(4 * size, MOST_BYTES)
