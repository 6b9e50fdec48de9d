"""A device: check the way to the server, naming what is wrong, then start Flower's SuperNode and keep it."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamina import config, files, toml
from lamina.deploy import processes
from lamina.deploy.kit import CACHE, Device
from lamina.errors import UserError

CONNECT_SECONDS = 5
MOST_SKEW_SECONDS = 240
"""Flower accepts signatures that are 300 s old."""
EXPERIMENT, PROFILE, NODE = "experiment.toml", "profile.toml", "node.json"


def join(device: Device, say: Callable[[str], None]) -> None:
    """Check everything, then turn this process into the one that keeps a SuperNode until it is stopped.

    Raises:
        UserError: Something is wrong, and what.
    """
    with files.lock(device.folder):
        processes.supernode_command(device)
        table = node_config(device)
        check(device)
        enter(device)
        files.write(device.folder / "node.toml", toml.dump(table))
    say(f"device {device.device} may join {device.address}; what follows is its SuperNode's; Ctrl-C stops")
    os.execv(sys.executable, [sys.executable, "-m", "lamina.deploy.keep", str(device.folder)])


def node_config(device: Device) -> dict[str, Any]:
    """What the device knows of itself.

    Raises:
        UserError: It has no experiment, or one that cannot be read.
    """
    experiment, profile = device.folder / EXPERIMENT, device.folder / PROFILE
    if not experiment.is_file():
        raise UserError(
            f"{experiment} is missing: copy the experiment there; it says which data and networks there are"
        )
    config.load_experiment(experiment)
    table = {"device": device.device, "experiment": str(experiment), "cache": str(device.folder / CACHE)}
    return table | ({"profile": str(profile)} if profile.is_file() else {})


def check(device: Device) -> None:
    """Reach the server, check its certificate and the clock.

    Raises:
        UserError: What is wrong, within `CONNECT_SECONDS` of silence.
    """
    where, path = device.address, device.folder / "ca.crt"
    try:
        trust = ssl.create_default_context(cafile=str(path))
    except ssl.SSLError as error:
        raise UserError(f"{path} is not a certificate; copy it from the kit") from error
    connection = http.client.HTTPSConnection(device.host, device.port, context=trust, timeout=CONNECT_SECONDS)
    try:
        connection.request("GET", "/")
        told = connection.getresponse().headers.get("Date")
    except ssl.SSLCertVerificationError as error:
        raise UserError(_distrusted(device, path, error.verify_message)) from error
    except ssl.SSLError as error:
        raise UserError(f"{where} does not speak TLS, as a server of a kit does: another program is there") from error
    except socket.gaierror as error:
        raise UserError(f"the name {device.host!r} is not known here: {error.strerror}") from error
    except TimeoutError:
        raise UserError(f"{where} does not answer within {CONNECT_SECONDS} s: is there a firewall, is it on?") from None
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(f"{where} cannot be reached: {reason}; is `lamina deploy serve` running there?") from error
    except http.client.HTTPException as error:
        raise UserError(f"{where} does not speak HTTP: another program is there") from error
    finally:
        connection.close()
    skew = time.time() - email.utils.parsedate_to_datetime(told).timestamp() if told else 0.0
    if abs(skew) > MOST_SKEW_SECONDS:
        raise UserError(f"the clock differs from that of {where} by {skew:.0f} s: set it, as signatures carry the time")


def _distrusted(device: Device, path: Path, reason: str) -> str:
    """Why a certificate was not accepted."""
    where = device.address
    if "expired" in reason or "not yet valid" in reason:
        return (
            f"the certificate of {where} is not valid now ({reason}): check the clock here, or make a new one on the "
            "server with: lamina deploy renew KIT"
        )
    if "mismatch" in reason or "not valid for" in reason:
        return f"the certificate of {where} is for another name ({reason}): connect by the name the kit was made for"
    return f"the certificate of {where} is not of the CA in {path} ({reason}): this is another server, or another kit"


def enter(device: Device) -> None:
    """See that the server lets this device in: announce it with its key, and take that back.

    What the server may still take for this device, since it was killed, ends with that.

    Raises:
        UserError: The key is no key, or the server does not know it.
    """
    import httpx
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    path = device.folder / "device.key"
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise UserError(f"{path} is not a device key: copy it from the kit, or make a new kit")
    client = FleetHttpClient.from_server_address(
        device.address,
        False,
        (device.folder / "ca.crt").read_bytes(),
        [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())],
    )
    try:
        if (before := _node(device)) is not None:
            with contextlib.suppress(httpx.HTTPStatusError):
                client.DeactivateNode(DeactivateNodeRequest(node_id=before))
        announced = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30)
        node = client.ActivateNode(announced).node_id
        files.write_json(device.folder / NODE, {"node": node, "place": _place(device)})
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    except httpx.HTTPStatusError as error:
        raise UserError(_refused(device, error.response.status_code)) from error
    except httpx.HTTPError as error:
        raise UserError(f"{device.address} broke off: {error}") from error
    finally:
        client.close()


def _node(device: Device) -> int | None:
    """Flower's number of this device, if it was let in before from here: a copy elsewhere must not take its place."""
    try:
        said = json.loads((device.folder / NODE).read_text(encoding="utf-8"))
        node, place = said["node"], said["place"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return node if type(node) is int and place == _place(device) else None


def _place(device: Device) -> str:
    return f"{socket.gethostname()} {device.folder}"


def _refused(device: Device, status: int) -> str:
    """Why a device was not let in."""
    if status == 412:
        return (
            f"{device.address} does not let device {device.device} in: its device.pub is not in the kit there, or "
            "was taken out once, or another machine runs as this device (one that was killed counts for a minute)"
        )
    return f"{device.address} refused device {device.device} (status {status}): do both have the same versions?"
