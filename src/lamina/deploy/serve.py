"""The server: a SuperLink on loopback, the keys of the kit's devices, and the front that the network sees."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina import files
from lamina.deploy import processes
from lamina.deploy.front import Front, serving
from lamina.deploy.kit import Kit
from lamina.errors import UserError

_START_SECONDS = 90


def serve(kit: Kit, say: Callable[[str], None]) -> None:
    """Serve until the process is stopped.

    Raises:
        UserError: The port is taken, a certificate does not fit its key, another process serves this kit, or the
            SuperLink did not start or has ended.
        KeyboardInterrupt: It was stopped, and has ended what it started.
    """
    with processes.stopped_by_signals(), running(kit) as link:
        say(f"serving on {kit.host}, port {kit.port}; devices that may join: {len(kit.public_keys())}; Ctrl-C stops")
        code = link.wait()
        raise UserError(f"the SuperLink ended with code {code}; see {log(kit)}")


@contextmanager
def running(kit: Kit) -> Iterator[subprocess.Popen[str]]:
    """A SuperLink with its front, meanwhile.

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
                register(kit, port)
                with serving(front):
                    yield link
        finally:
            front.server_close()


def log(kit: Kit) -> Path:
    """What the SuperLink and the apps in it write."""
    return kit.state / "superlink.log"


def contexts(kit: Kit) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS as the server speaks it, and trust in the kit's CA alone.

    Raises:
        UserError: The files are no certificates and keys, or do not belong together.
    """
    try:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.minimum_version = ssl.TLSVersion.TLSv1_2
        tls.load_cert_chain(kit.folder / "server.crt", kit.folder / "server.key")
        return tls, ssl.create_default_context(cafile=str(kit.folder / "ca.crt"))
    except ssl.SSLError as error:
        raise UserError(f"the certificates of {kit.folder} cannot be used: {error.reason or error}") from error


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


def register(kit: Kit, port: int) -> None:
    """Let the devices in whose public keys are in the kit, and no others."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    wanted = {}
    for name, path in kit.public_keys().items():
        try:
            key = load_ssh_public_key(path.read_bytes())
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, EllipticCurvePublicKey):
            raise UserError(f"{path} is not the public key of a device: copy it from the kit, or make a new kit")
        wanted[public_key_to_bytes(key)] = name
    client = ControlHttpClient.from_server_address(
        f"127.0.0.1:{port}", False, (kit.folder / "ca.crt").read_bytes(), [RuntimeVersionHttpInterceptor("CLI")]
    )
    try:
        known = {node.public_key: node.node_id for node in client.ListNodes(ListNodesRequest()).nodes_info}
        for gone in known.keys() - wanted.keys():
            client.UnregisterNode(UnregisterNodeRequest(node_id=known[gone]))
        for new in wanted.keys() - known.keys():
            client.RegisterNode(RegisterNodeRequest(public_key=new, name=f"device {wanted[new]}"))
    finally:
        client.close()
