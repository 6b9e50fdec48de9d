"""The server: a SuperLink on loopback, the keys of the kit's devices, and the front that the network sees."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from lamina import files
from lamina.deploy import processes
from lamina.deploy.front import Front, serving
from lamina.deploy.kit import Kit
from lamina.errors import UserError

_START_SECONDS, _LOOK_SECONDS = 90, 1.0
_KEY = "lamina deploy key --force"


def serve(kit: Kit, say: Callable[[str], None]) -> None:
    """Serve until the process is stopped.

    Raises:
        UserError: The port is taken, a certificate does not fit its key, another process serves this kit, or the
            SuperLink did not start or has ended.
        KeyboardInterrupt: It was stopped, and has ended what it started.
    """
    with processes.stopped_by_signals(), running(kit) as (link, port, front):
        keys = admit(kit, port, {}, say)
        with serving(front):
            say(f"serving on {kit.host}, port {kit.port}; Ctrl-C stops")
            while (code := link.poll()) is None:
                time.sleep(_LOOK_SECONDS)
                keys = admit(kit, port, keys, say)
        raise UserError(f"the SuperLink ended with code {code}; see {log(kit)}")


@contextmanager
def running(kit: Kit) -> Iterator[tuple[subprocess.Popen[str], int, Front]]:
    """A SuperLink meanwhile, its port on loopback, and its front, which does not serve yet.

    Raises:
        UserError: As `serve`.
    """
    tls, trust = contexts(kit)
    kit.state.mkdir(mode=0o700, exist_ok=True)
    with files.lock(kit.state):
        port = processes.free_port()
        front = _front(kit, tls, trust, port)
        try:
            processes.write_link(kit, port)
            env, command = processes.environment(processes.home(kit)), processes.superlink_command(kit, port)
            with (
                open(log(kit), "a", encoding="utf-8") as out,
                processes.child(command, env, kit.folder, out) as link,
            ):
                _wait(link, port, trust, log(kit))
                yield link, port, front
        finally:
            front.server_close()


def log(kit: Kit) -> Path:
    """What the SuperLink and the apps in it write."""
    return kit.state / "superlink.log"


def contexts(kit: Kit) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS as the server speaks it, and trust in the kit's CA alone.

    Raises:
        UserError: The files are no certificates and keys, do not belong together, or are not valid now.
    """
    from cryptography import x509

    try:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.minimum_version = ssl.TLSVersion.TLSv1_2
        tls.load_cert_chain(kit.folder / "server.crt", kit.folder / "server.key")
        trust = ssl.create_default_context(cafile=str(kit.folder / "ca.crt"))
    except ssl.SSLError as error:
        raise UserError(f"the certificates of {kit.folder} cannot be used: {error.reason or error}") from error
    shown = x509.load_pem_x509_certificate((kit.folder / "server.crt").read_bytes())
    begin, end = shown.not_valid_before_utc, shown.not_valid_after_utc
    if not begin <= datetime.now(UTC) < end:
        raise UserError(
            f"server.crt is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}, which is not now: check the clock, or make "
            f"another with: lamina deploy renew {kit.folder}"
        )
    return tls, trust


def _front(kit: Kit, tls: ssl.SSLContext, trust: ssl.SSLContext, port: int) -> Front:
    """Listening on loopback if the kit is for this machine alone, else on every address."""
    any_address = "::" if ":" in kit.host else "0.0.0.0"
    host = "127.0.0.1" if kit.host == "localhost" else kit.host if kit.loopback else any_address
    try:
        return Front((host, kit.port), tls, ("127.0.0.1", port), trust)
    except OSError as error:
        raise UserError(f"port {kit.port} on {host} cannot be had: {error.strerror}") from error


def _wait(link: subprocess.Popen[str], port: int, trust: ssl.SSLContext, path: Path) -> None:
    """Until the SuperLink answers."""
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if link.poll() is not None:
            raise UserError(f"the SuperLink did not start (code {link.returncode}); see {path}")
        try:
            with (
                socket.create_connection(("127.0.0.1", port), 5) as found,
                trust.wrap_socket(found, server_hostname="127.0.0.1"),
            ):
                return
        except ssl.SSLCertVerificationError as error:
            raise UserError(f"server.crt is not of the CA in ca.crt: {error.verify_message}") from error
        except OSError:
            time.sleep(0.2)
    raise UserError(f"the SuperLink did not answer within {_START_SECONDS} s; see {path}")


def admit(kit: Kit, port: int, before: Mapping[str, bytes], say: Callable[[str], None]) -> dict[str, bytes]:
    """Let the devices in whose public keys are in the kit, and no others; who is shut out also loses its job.

    Args:
        kit: Its folder is read again.
        port: Of the SuperLink on loopback.
        before: What this returned the last time; if it is the same, there is nothing to do.
        say: Told who may join.

    Returns:
        The keys by device, as they are written there.

    Raises:
        UserError: The SuperLink refuses, or is gone.
    """
    found = {name: path.read_bytes() for name, path in kit.public_keys().items()}
    if found != before:
        wanted = {}
        for name, content in found.items():
            if (key := _public_key(content)) is None:
                say(f"note: device.pub of device {name} is not the public key of a device: it may not join")
            else:
                wanted[key] = name
        for name in sorted(_register(kit, port, wanted)):
            say(f"note: the key of device {name} was shut out, for good; make another with: {_KEY} {kit.folder} {name}")
            wanted = {key: each for key, each in wanted.items() if each != name}
        say(f"devices that may join: {', '.join(wanted.values()) or 'none'}")
    return found


def _public_key(content: bytes) -> bytes | None:
    """A device.pub as Flower writes it; None if it is none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return public_key_to_bytes(key) if isinstance(key, EllipticCurvePublicKey) else None


def _register(kit: Kit, port: int, wanted: Mapping[bytes, str]) -> set[str]:
    """Make `wanted` what the SuperLink lets in; returns whose keys of them were shut out once, which is for ever."""
    import httpx
    from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
    from flwr.supercore.constant import NodeStatus
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

    client = ControlHttpClient.from_server_address(
        f"127.0.0.1:{port}", False, (kit.folder / "ca.crt").read_bytes(), [RuntimeVersionHttpInterceptor("CLI")]
    )
    try:
        nodes = {node.public_key: node for node in client.ListNodes(ListNodesRequest()).nodes_info}
        shut = {key for key, node in nodes.items() if node.status == NodeStatus.UNREGISTERED}
        for gone in nodes.keys() - shut - wanted.keys():
            client.UnregisterNode(UnregisterNodeRequest(node_id=nodes[gone].node_id))
        for new in wanted.keys() - nodes.keys():
            client.RegisterNode(RegisterNodeRequest(public_key=new, name=f"device {wanted[new]}"))
    except httpx.HTTPError as error:
        raise UserError(f"the SuperLink does not take the keys of the devices ({error}); see {log(kit)}") from error
    finally:
        client.close()
    return {wanted[key] for key in wanted.keys() & shut}
