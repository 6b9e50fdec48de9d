"""Real machines: the kit, what the network sees of its server, what a device is told, a run followed by its folder."""

import http.client
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.proto.fleet_pb2 import ActivateNodeResponse, DeactivateNodeRequest
from support import begin, write_world

from lamina import cli, config, files, saved, toml
from lamina.deploy import join, keep, keys, kit, processes, serve, submit, way
from lamina.deploy.front import MOST_BYTES, Front, _Passing, serving
from lamina.deploy.kit import Device, Kit
from lamina.deployed import AppTable, real
from lamina.errors import UserError
from lamina.run import RoundRow, start
from lamina.server import DeviceRow
from lamina.view import View

PRIVATE = {"ca.key", "server.key", "device.key"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return kit.make(tmp_path_factory.mktemp("kits") / "kit", "server.example", 8443, 2, force=False)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return kit.make(tmp_path_factory.mktemp("kits") / "other", "127.0.0.1", 8443, 1, force=False)


def shaken(server: Kit, ca: Path, name: str) -> None:
    """A TLS handshake with a kit's server by a device that trusts `ca` and asks for `name`."""
    tls, _ = serve.contexts(server)
    trust = ssl.create_default_context(cafile=str(ca))
    to_server, to_device = ssl.MemoryBIO(), ssl.MemoryBIO()
    device = trust.wrap_bio(to_device, to_server, server_hostname=name)
    listening = tls.wrap_bio(to_server, to_device, server_side=True)
    waiting = [device, listening, device, listening]
    for side in waiting:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert device.getpeercert()


def test_only_private_files_are_private_and_every_device_has_its_own_key(made: Kit) -> None:
    modes = {path: path.stat().st_mode & 0o777 for path in made.folder.rglob("*") if path.is_file()}
    assert {path.name for path, mode in modes.items() if mode == 0o600} == PRIVATE
    assert {mode for path, mode in modes.items() if path.name not in PRIVATE} == {0o644}
    pairs = []
    for name, public in made.public_keys().items():
        device = kit.load_device(made.folder, int(name))
        key = load_ssh_private_key((device.folder / "device.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1)
        assert load_ssh_public_key(public.read_bytes()) == key.public_key()
        assert (device.device, device.address) == (int(name), "server.example:8443")
        pairs.append(key.private_numbers().private_value)
    assert len(set(pairs)) == 2
    assert kit.load(made.folder) == made


@pytest.mark.parametrize("name", ["server.example", "localhost", "127.0.0.1", "::1"])
def test_the_certificate_is_for_the_server_and_for_loopback(name: str, made: Kit) -> None:
    shaken(made, made.folder / "devices" / "1" / "ca.crt", name)


def test_no_other_name_and_no_other_authority_will_do(made: Kit, other: Kit) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shaken(made, made.folder / "ca.crt", "another.example")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        shaken(made, other.folder / "ca.crt", "localhost")


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    place = tmp_path / "kit"
    kit.make(place, "localhost", 8443, 1, force=False)
    before = (place / "ca.key").read_bytes()
    with pytest.raises(UserError, match="exists already; take another name, or --force"):
        kit.make(place, "localhost", 8443, 1, force=False)
    assert (place / "ca.key").read_bytes() == before
    kit.make(place, "localhost", 8443, 1, force=True)
    assert (place / "ca.key").read_bytes() != before
    (tmp_path / "thesis").mkdir()
    with pytest.raises(UserError, match=r"it is no folder with a kit\.json"):
        kit.make(tmp_path / "thesis", "localhost", 8443, 1, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kit", "thesis"]


@pytest.mark.parametrize(
    ("host", "port", "devices", "message"),
    [
        ("http://host", 8443, 1, "--server takes the name or address by which devices reach the server, got 'http://"),
        ("host:8443", 8443, 1, "got 'host:8443'"),
        ("0.0.0.0", 8443, 1, "got '0.0.0.0'"),
        ("host", 0, 1, "--port must be in 1..65535, got 0"),
        ("host", 8443, 0, "--devices must be in 1..1000, got 0"),
    ],
)
def test_values_that_are_not_accepted(host: str, port: int, devices: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        kit.make(tmp_path / "kit", host, port, devices, force=False)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def spoilt(folder: Path, name: str, text: str | None = None, mode: int | None = None) -> None:
    path = folder / name
    if text is not None:
        path.write_text(text)
    elif mode is not None:
        path.chmod(mode)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "kit.json"}, "is not a kit: it has no kit.json; make one with: lamina deploy init"),
        ({"name": "kit.json", "text": "{"}, "kit.json is damaged"),
        ({"name": "kit.json", "text": '{"schema": "x", "host": "h", "port": 1, "devices": 1}'}, "has schema 'x'"),
        ({"name": "server.key"}, "server.key is missing; copy it from the kit"),
        ({"name": "server.key", "mode": 0o640}, "server.key can be used by others (mode bits 040): chmod 600"),
    ],
)
def test_a_kit_that_is_not_whole_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    place = kit.make(tmp_path / "kit", "localhost", 8443, 1, force=False).folder
    spoilt(place, **change)
    with pytest.raises(UserError) as error:
        kit.load(place)
    assert message in str(error.value)


def test_a_server_whose_files_do_not_belong_together_is_refused(other: Kit, tmp_path: Path) -> None:
    mixed = kit.make(tmp_path / "kit", "localhost", 8443, 1, force=False)
    files.write(mixed.folder / "server.key", (other.folder / "server.key").read_bytes(), 0o600)
    with pytest.raises(UserError, match="cannot be used: KEY_VALUES_MISMATCH"):
        serve.contexts(mixed)


def test_a_certificate_that_has_expired_is_named_on_both_sides_and_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What devices have stays good."""
    with monkeypatch.context() as patch:
        patch.setattr(keys, "SERVER_DAYS", 0.5)  # of which the last was yesterday
        place = kit.make(tmp_path / "kit", "localhost", 8443, 1, force=False)
    with pytest.raises(UserError, match=r"server\.crt is valid from .* make another with: lamina deploy renew"):
        serve.contexts(place)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(place.folder / "server.crt", place.folder / "server.key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Link)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    device = replace(kit.load_device(place.folder, 0), host="127.0.0.1", port=server.server_address[1])
    with pytest.raises(UserError, match=r"is not valid now \(certificate has expired\): check the clock here, or make"):
        join.check(device)
    server.shutdown()
    server.server_close()
    kit.renew(place)
    shaken(place, device.folder / "ca.crt", "localhost")
    assert (place.folder / "server.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("key", "message"),
    [(None, "ca.key is missing"), ("nothing", "ca.crt or ca.key in"), ("server.key", "is not the key of ca.crt")],
)
def test_only_who_has_the_key_of_the_authority_renews(key: str | None, message: str, tmp_path: Path) -> None:
    place = kit.make(tmp_path / "kit", "localhost", 8443, 1, force=False)
    before = (place.folder / "server.crt").read_bytes()
    (place.folder / "ca.key").unlink()
    if key:
        other = place.folder / key
        files.write(place.folder / "ca.key", other.read_bytes() if other.exists() else key, 0o600)
    with pytest.raises(UserError, match=message):
        kit.renew(place)
    assert (place.folder / "server.crt").read_bytes() == before


def test_a_device_can_be_added_and_its_key_replaced(tmp_path: Path) -> None:
    place = kit.make(tmp_path / "kit", "localhost", 8443, 1, force=False)
    before = (place.folder / "devices" / "0" / "device.pub").read_bytes()
    with pytest.raises(UserError, match="exists already; take another name, or --force"):
        kit.add_device(place, 0, force=False)
    for device, force in ((0, True), (5, False)):
        kit.add_device(place, device, force)
        assert kit.load_device(place.folder, device) == Device(
            place.folder / "devices" / str(device), "localhost", 8443, device
        )
    assert {path.read_bytes() for path in place.public_keys().values()}.isdisjoint({before})
    assert sorted(place.public_keys()) == ["0", "5"]
    with pytest.raises(UserError, match="counted from 0 and below 1000, got -1"):
        kit.add_device(place, -1, force=False)


def test_the_server_lets_in_whose_keys_are_in_the_kit_and_shuts_out_the_others(tmp_path: Path) -> None:
    """Flower's own SuperLink, of which a key that was shut out is never accepted again."""
    place = kit.make(tmp_path / "kit", "127.0.0.1", processes.free_port(), 2, force=False)
    told: list[str] = []
    with serve.running(place) as (_, port, front), serving(front):
        seen = serve.admit(place, port, {}, told.append)
        assert serve.admit(place, port, seen, told.append) == seen
        for device in (0, 1):
            join.enter(kit.load_device(place.folder, device))
        public = place.folder / "devices" / "1" / "device.pub"
        content = public.read_bytes()
        public.unlink()
        serve.admit(place, port, seen, told.append)
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"does not let device 1 in: its device\.pub is not in the kit there"):
            join.enter(kit.load_device(place.folder, 1))
        assert time.monotonic() - begun < 15
        join.enter(kit.load_device(place.folder, 0))
        public.write_bytes(content)
        (place.folder / "devices" / "0" / "device.pub").write_bytes(b"ssh-rsa")
        serve.admit(place, port, {}, told.append)  # as a server that is started again
        with pytest.raises(UserError, match="does not let device 1 in"):
            join.enter(kit.load_device(place.folder, 1))
        kit.add_device(place, 1, force=True)
        kit.add_device(place, 2, force=False)
        serve.admit(place, port, {}, told.append)
        for device in (1, 2):
            join.enter(kit.load_device(place.folder, device))
    with pytest.raises(UserError, match=r"does not take the keys of the devices .*; see .*superlink\.log"):
        serve.admit(place, port, {}, told.append)
    bad = "note: device.pub of device 0 is not the public key of a device: it may not join"
    assert told == [
        "devices that may join: 0, 1",
        "devices that may join: 0",
        bad,
        f"note: the key of device 1 was shut out, for good; make another with: {serve._KEY} {place.folder} 1",
        "devices that may join: none",
        bad,
        "devices that may join: 1, 2",
        bad,
    ]


def test_a_device_that_is_not_there_is_named(made: Kit) -> None:
    with pytest.raises(UserError, match="has no device 7; it has: 0, 1"):
        kit.load_device(made.folder, 7)
    with pytest.raises(UserError, match=r"is not the folder of a device: it has no device\.json"):
        kit.load_device(made.folder)


def test_flower_is_started_safely(made: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    command = processes.superlink_command(made, 5)
    assert Path(command[0]).name == "flower-superlink"
    given = dict(pairwise(command))
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "5")
    assert given["--ssl-keyfile"] == str(made.folder / "server.key")
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(command)
    assert "--insecure" not in command
    env = processes.environment(processes.home(made))
    assert (env["FLWR_TELEMETRY_ENABLED"], env["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    device = kit.load_device(made.folder, 1)
    command = processes.supernode_command(device)
    given = dict(zip(command[1::2], command[2::2], strict=True))
    assert 1024 <= int(given.pop("--port")) < 65536
    assert given == {
        "--superlink": "server.example:8443",
        "--root-certificates": str(device.folder / "ca.crt"),
        "--auth-supernode-private-key": str(device.folder / "device.key"),
        "--host": "127.0.0.1",
        "--node-config": str(device.folder / "node.toml"),
    }
    wanted = ["run", str(submit.APP), "lamina", "--stream", "-c", "/a b/c.toml"]
    assert submit.run_command(Path("/a b/c.toml"))[1:] == wanted
    assert (submit.APP / "pyproject.toml").is_file()
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    with pytest.raises(UserError, match=r"flwr is not installed: pip install 'lamina\[flower\]'"):
        processes.program("flwr")


def test_flower_is_told_where_the_server_is(tmp_path: Path) -> None:
    place = Kit(tmp_path / 'a "kit"', "localhost", 8443, 1)
    processes.write_link(place, 77)
    table = toml.read(processes.home(place) / "config.toml", [])["superlink"]
    assert table["default"] == processes.LINK
    assert table[processes.LINK] == {"address": "127.0.0.1:77", "root-certificates": str(place.folder / "ca.crt")}


def test_a_device_knows_its_experiment_and_its_profile(tmp_path: Path) -> None:
    device = Device(tmp_path, "localhost", 8443, 4)
    with pytest.raises(UserError, match=r"experiment\.toml is missing: copy the experiment there"):
        join.node_config(device)
    (tmp_path / "experiment.toml").write_text(toml.dump(write_world(tmp_path)))
    table = {"device": 4, "experiment": str(tmp_path / "experiment.toml"), "cache": str(tmp_path / "cache")}
    assert join.node_config(device) == table
    (tmp_path / "profile.toml").write_text("")
    assert join.node_config(device) == table | {"profile": str(tmp_path / "profile.toml")}
    (tmp_path / "experiment.toml").write_text("round = 3")
    with pytest.raises(UserError, match="unknown key 'round'"):
        join.node_config(device)


class Link(BaseHTTPRequestHandler):
    """In the place of a SuperLink: gives back what it gets; only nodes that are `away` are let in."""

    away: ClassVar[set[int]] = set()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        code = 201
        if self.path.endswith("/deactivate-node"):
            self.away.add(DeactivateNodeRequest.FromString(content).node_id)
        if self.path.endswith("/activate-node"):
            code = 201 if 7 in self.away else 412
            content = ActivateNodeResponse(node_id=7).SerializeToString()
            self.away.discard(7)
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Seen", f"{self.path} {self.headers['X-Sign']}")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def front(other: Kit) -> Iterator[tuple[Device, ThreadingHTTPServer]]:
    """A device of `other` that has the front's address, and what is behind the front."""
    tls, trust = serve.contexts(other)
    Link.away.clear()
    link = ThreadingHTTPServer(("127.0.0.1", 0), Link)
    link.socket = tls.wrap_socket(link.socket, server_side=True)
    thread = threading.Thread(target=link.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    shown = Front(("127.0.0.1", 0), tls, ("127.0.0.1", link.server_address[1]), trust)
    with serving(shown):
        yield replace(kit.load_device(other.folder, 0), port=shown.server_address[1]), link
    link.shutdown()
    link.server_close()


def asked(device: Device, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, Any]:
    trust = ssl.create_default_context(cafile=str(device.folder / "ca.crt"))
    connection = http.client.HTTPSConnection(device.host, device.port, context=trust, timeout=10)
    try:
        connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def test_the_front_passes_on_what_is_for_devices(front: tuple[Device, ThreadingHTTPServer]) -> None:
    body = os.urandom(300_000)
    status, content, headers = asked(front[0], "POST", "/v1/fleet/pull", body, X_Sign="me")
    assert (status, content, headers["X-Seen"]) == (201, body, "/v1/fleet/pull me")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/v1/control/start-run", {}, 403),
        ("POST", "/v1/runtime/acquire-task", {}, 403),
        ("POST", "/v1/fleet/../control/start-run", {}, 403),
        ("POST", "/v1/fleet/%2e%2e/control/start-run", {}, 403),
        ("GET", "/v1/fleet/pull", {}, 403),
        ("GET", f"/lamina/probe/{MOST_BYTES + 1}", {}, 403),
        ("GET", f"/lamina/probe/{'1' * 5000}", {}, 403),
        ("GET", "/lamina/probe/-1", {}, 403),
        ("POST", "/lamina/probe/1", {}, 403),
        ("POST", "/lamina/probe", {"Content_Length": str(MOST_BYTES + 1)}, 413),
        ("POST", "/v1/fleet/pull", {"Content_Length": str(MOST_BYTES + 1)}, 413),
        ("POST", "/v1/fleet/pull", {"Content_Length": "-1"}, 411),
        ("POST", "/v1/fleet/pull", {"Transfer_Encoding": "chunked"}, 411),
    ],
)
def test_the_front_passes_on_nothing_else(
    method: str, path: str, headers: dict[str, str], status: int, front: tuple[Device, ThreadingHTTPServer]
) -> None:
    found, _, told = asked(front[0], method, path, b"", **headers)
    assert (found, told["X-Seen"]) == (status, None)


def test_the_front_says_so_when_there_is_nothing_behind_it(front: tuple[Device, ThreadingHTTPServer]) -> None:
    device, link = front
    link.shutdown()
    link.server_close()
    assert asked(device, "POST", "/v1/fleet/pull")[:2] == (502, b"the SuperLink does not answer\n")


@pytest.mark.parametrize(("seconds", "size"), [(2.0, way.FIRST_BYTES), (0.5, MOST_BYTES)])
def test_the_way_is_measured_by_what_takes_long_enough(
    seconds: float, size: int, front: tuple[Device, ThreadingHTTPServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, given = list[int](), list[int]()
    blocks, answer = _Passing._blocks, _Passing._answer

    def take(passing: _Passing, left: int) -> Iterator[bytes]:
        taken.append(left)
        return blocks(passing, left)

    def give(passing: _Passing, content: bytes) -> None:
        given.append(len(content))
        answer(passing, content)

    monkeypatch.setattr(_Passing, "_blocks", take)
    monkeypatch.setattr(_Passing, "_answer", give)
    ticks = (seconds * step for step in itertools.count())
    assert way.rates(front[0], lambda: next(ticks)) == (size / seconds, size / seconds)
    assert max(taken) == max(given) == size
    assert all(1e5 < rate < 1e11 for rate in way.rates(front[0]))


def test_a_server_that_does_not_measure_is_named(front: tuple[Device, ThreadingHTTPServer]) -> None:
    link = replace(front[0], port=front[1].server_address[1])
    with pytest.raises(UserError, match=r"does not measure the way to it \(status 201\)"):
        way.rates(link)
    with pytest.raises(UserError, match="cannot be reached"):
        way.rates(replace(link, port=processes.free_port()))


def test_plain_http_is_told_that_this_is_tls(front: tuple[Device, ThreadingHTTPServer]) -> None:
    with socket.create_connection((front[0].host, front[0].port), 10) as plain:
        plain.sendall(b"POST /v1/fleet/pull HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert b"400 Bad Request" in (said := plain.recv(4096)) and b"this port speaks TLS" in said


def test_a_device_is_told_what_is_wrong(
    front: tuple[Device, ThreadingHTTPServer], made: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device, _ = front
    join.check(device)
    told: dict[str, tuple[Device, Callable[[Device], None]]] = {
        "is not of the CA in": (replace(device, folder=made.folder / "devices" / "0"), join.check),
        "is for another name": (replace(device, host="localhost.localdomain"), join.check),
        "does not let device 0 in: its device.pub is not in the kit": (device, join.enter),
        "device.key is not a device key": (replace(device, folder=tmp_path), join.enter),
        "ca.crt is not a certificate": (replace(device, folder=tmp_path), join.check),
        "cannot be reached: Connection refused; is `lamina deploy serve` running": (
            replace(device, port=processes.free_port()),
            join.check,
        ),
    }
    for name in ("ca.crt", "device.key"):
        (tmp_path / name).write_text("nothing")
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: resolve("127.0.0.1", *rest))
    for message, (who, step) in told.items():
        with pytest.raises(UserError) as error:
            step(who)
        assert message in str(error.value)
    plain = ThreadingHTTPServer(("127.0.0.1", 0), Link)
    threading.Thread(target=plain.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.raises(UserError, match="does not speak TLS, as a server of a kit does"):
        join.check(replace(device, port=plain.server_address[1]))
    plain.shutdown()
    plain.server_close()
    for seconds, shown in ((-600, "-(599|60.)"), (600, "(599|60.)")):
        here = time.time() + seconds
        monkeypatch.setattr("lamina.deploy.join.time", SimpleNamespace(time=lambda here=here: here))
        with pytest.raises(UserError, match=rf"the clock differs from that of 127\.0\.0\.1:\d+ by {shown} s: set it"):
            join.check(device)


def test_a_device_that_was_killed_takes_its_place_back(
    front: tuple[Device, ThreadingHTTPServer], tmp_path: Path
) -> None:
    """The server takes it to be there still, and is told that it is not; nobody who was not let in can say so."""
    device = replace(front[0], folder=tmp_path)
    for name in ("ca.crt", "device.key"):
        (tmp_path / name).write_bytes((front[0].folder / name).read_bytes())
    here = {"place": f"{socket.gethostname()} {tmp_path}"}
    copied = {"node": 7, "place": f"{socket.gethostname()} /elsewhere"}
    for before in (None, "{", json.dumps(here), *map(json.dumps, (here | {"node": True}, here | {"node": 8}, copied))):
        if before:
            (tmp_path / join.NODE).write_text(before)
        with pytest.raises(UserError, match="does not let device 0 in"):
            join.enter(device)
    (tmp_path / join.NODE).write_text(json.dumps(here | {"node": 7}))
    join.enter(device)
    assert Link.away == {7, 8}
    (tmp_path / join.NODE).unlink()
    join.enter(device)
    assert json.loads((tmp_path / join.NODE).read_text()) == here | {"node": 7}


def test_a_device_that_may_join_turns_into_what_keeps_it(
    front: tuple[Device, ThreadingHTTPServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything written that this needs."""
    told, begun = list[str](), list[list[str]]()
    monkeypatch.setattr(os, "execv", lambda program, command: begun.append(command))
    device = replace(front[0], folder=tmp_path)
    for name in ("ca.crt", "device.key"):
        (tmp_path / name).write_bytes((front[0].folder / name).read_bytes())
    (tmp_path / "experiment.toml").write_text(toml.dump(write_world(tmp_path)))
    with pytest.raises(UserError, match="does not let device 0 in"):
        join.join(device, told.append)
    assert not begun and not told
    Link.away.add(7)
    join.join(device, told.append)
    assert begun == [[sys.executable, "-m", "lamina.deploy.keep", str(tmp_path)]]
    assert told == [f"device 0 may join {device.address}; what follows is its SuperNode's; Ctrl-C stops"]
    assert toml.read(tmp_path / "node.toml", []) == join.node_config(device)
    assert not files.is_locked(tmp_path)


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch, made: Kit) -> None:
    monkeypatch.setattr(join, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        device = Device(made.folder / "devices" / "0", "127.0.0.1", silent.getsockname()[1], 0)
        with pytest.raises(UserError, match=r"does not answer within 0\.3 s"):
            join.check(device)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    until = time.monotonic() + 20
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def test_children_do_not_outlive_their_context(tmp_path: Path) -> None:
    """Nor do their children."""
    command = ["sh", "-c", "sleep 100 & echo $!; wait"]
    with processes.child(command, dict(os.environ), tmp_path, subprocess.PIPE) as process:
        assert process.stdout
        pids = [process.pid, int(process.stdout.readline())]
        assert all(map(alive, pids))
    assert all(map(gone, pids))


def test_children_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, time; from pathlib import Path; from lamina.deploy.processes import child\n"
        "with child(['sleep', '100'], dict(os.environ), Path.cwd(), -3) as process:\n"
        "    print(process.pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.communicate()
    assert gone(pid)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device with a SuperNode that runs node.py of its folder."""
    program = tmp_path / "flower-supernode"
    program.write_text(f"#!{sys.executable}\nexec(open({str(tmp_path / 'node.py')!r}).read())")
    program.chmod(0o755)
    monkeypatch.setattr(processes, "program", lambda name: str(tmp_path / name))
    monkeypatch.setattr(keep, "LOOK_SECONDS", 0.05)
    return Device(tmp_path, "localhost", 8443, 0)


WORK = """
import os, signal, sys, time; from pathlib import Path; from lamina import files
Path("node").write_text(str(os.getpid()))
if os.fork() or os.fork():
    time.sleep(100)
with files.at_work(Path("cache")):
    time.sleep(0.3)
with files.at_work(Path("cache")):
    Path("died").touch(); os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_supernode_is_ended_when_the_process_of_its_job_was_killed(kept: Device) -> None:
    """Which it would find out by itself after a minute; not when that has ended as it should."""
    (kept.folder / "node.py").write_text(WORK)
    (kept.folder / "cache").mkdir()
    (kept.folder / "cache" / files._MARK).touch()  # of a process that was killed before
    assert keep.keep(kept) == "the process of a job was killed"
    assert (kept.folder / "died").exists()
    assert gone(int((kept.folder / "node").read_text()))


def test_a_supernode_whose_superexec_was_killed_is_ended(kept: Device) -> None:
    (kept.folder / "node.py").write_text("import os, time\nif os.fork(): time.sleep(100)\ntime.sleep(0.3)")
    assert keep.keep(kept) == "the SuperExec was killed or ended"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed or ended (code -9)"),
        ("raise SystemExit(3)", "the SuperNode ended with code 3; what it said is above"),
    ],
)
def test_a_supernode_that_gives_up_at_once_is_not_started_again(code: str, message: str, kept: Device) -> None:
    (kept.folder / "node.py").write_text(code)
    try:
        why = keep.keep(kept)
    except UserError as error:
        why = f"{error}"
    assert message in why


def test_a_device_is_kept_once(kept: Device) -> None:
    with files.lock(kept.folder):
        with pytest.raises(UserError, match="another process is working in"):
            join.join(kept, print)
        with pytest.raises(UserError, match="another process is working in"):
            keep.keep(kept)


def test_what_keeps_a_device_joins_again(
    made: Kit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until it is stopped, or the device cannot join."""
    place, begun = str(made.folder / "devices" / "0"), list[list[str]]()
    monkeypatch.setattr(sys, "argv", ["keep", place])
    monkeypatch.setattr(keep, "keep", lambda device: f"device {device.device} died")
    monkeypatch.setattr(os, "execv", lambda program, command: begun.append(command))
    keep.main()
    assert begun[0][1:] == ["deploy", "join", place] and Path(begun[0][0]).name == "lamina"
    assert "note: device 0 died; joining again" in capsys.readouterr().out
    for error, code in ((UserError("no"), 2), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr(keep, "keep", Mock(side_effect=error))
        with pytest.raises(SystemExit) as stop:
            keep.main()
        assert stop.value.code == code and len(begun) == 1


def test_an_app_ends_with_what_started_it() -> None:
    app = (
        "import time; from lamina.deploy.processes import end_with_parent; end_with_parent(); print(); time.sleep(100)"
    )
    code = (
        "import subprocess, sys\n"
        f"app = subprocess.Popen([sys.executable, '-c', {app!r}], stdout=subprocess.PIPE)\n"
        "app.stdout.readline(); print(app.pid, flush=True); app.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.communicate()
    assert gone(pid)


def test_sigterm_leaves_in_order() -> None:
    with pytest.raises(KeyboardInterrupt), processes.stopped_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_rounds_are_told_as_they_are_committed(tmp_path: Path) -> None:
    """By another process: the same rows that the one that plays is told."""
    run = begin(write_world(tmp_path), tmp_path / "runs")
    committed = submit.Committed(run, saved.lengths(run.folder))
    played: list[tuple[RoundRow, list[DeviceRow]]] = []
    told: list[tuple[RoundRow, list[DeviceRow]]] = []

    def follow(row: RoundRow, devices: Any) -> None:
        played.append((row, list(devices)))
        if row.round < 3:  # the last two come together
            with open(run.folder / "rounds.jsonl", "a") as file:  # what is not committed yet does not count
                file.write('{"torn')
            committed.tell(lambda row, devices: told.append((row, list(devices))))
            os.truncate(run.folder / "rounds.jsonl", committed._read["rounds.jsonl"])

    run.play(follow)
    committed.tell(lambda row, devices: told.append((row, list(devices))))
    assert json.dumps([[vars(row), [*map(vars, found)]] for row, found in told]) == json.dumps(
        [[vars(row), [*map(vars, found)]] for row, found in played]
    )
    assert len(told) == 3


FLWR = """
import json, sys
from pathlib import Path
if sys.argv[1] == "run":
    print("Successfully started run 77", flush=True)
    print("\\x1b[92mINFO \\x1b[0m: error: too few devices are connected", flush=True)
elif sys.argv[1] == "list":
    asked = Path(__file__).parent / "state" / "asked"
    status = asked.exists() and "finished:failed" or "running"
    asked.touch()
    print(json.dumps({"success": True, "runs": [{"run-id": "77", "status": status}]}))
"""


def test_a_run_that_fails_on_the_server_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before the server says that it is over: the connection may have been lost."""
    (tmp_path / "flwr").write_text(f"#!{sys.executable}\n{FLWR}")
    (tmp_path / "flwr").chmod(0o755)
    monkeypatch.setattr(processes, "program", lambda name: str(tmp_path / name))
    monkeypatch.setattr(submit, "_ASK_SECONDS", 0.1)
    server, file = Kit(tmp_path, "localhost", 8443, 1), tmp_path / "tiny.toml"
    file.write_text(toml.dump(write_world(tmp_path)))
    settings, folder = submit.begun(file, ["rounds=2"], tmp_path / "runs")
    with pytest.raises(UserError, match=r"^the run did not begin: the server has ended"):
        submit.play(server, settings, folder, View(quiet=True))
    with files.lock(server.state), pytest.raises(UserError, match=r"did not begin: too few devices are connected$"):
        submit.play(server, settings, folder, View(quiet=True))
    asked = server.state / "asked"
    assert asked.exists()
    asked.unlink()
    run = start(real(config.load_experiment(file, ["rounds=2"])), tmp_path / "runs")
    assert run.folder == folder
    with files.lock(server.state), pytest.raises(UserError, match=r"did not finish: too few devices are connected$"):
        submit.play(server, {"resume": str(folder)}, folder, View(quiet=True))
    assert asked.exists()


def test_a_new_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    """The one that the app will make for the settings that it is given."""
    file = tmp_path / "tiny.toml"
    file.write_text(toml.dump(write_world(tmp_path)))
    for _ in range(2):
        settings, folder = submit.begun(file, ['name="a b"'], tmp_path / "runs")
        table = toml.build(AppTable, settings, "run config")
        assert json.loads(table.overrides) == ['name="a b"']
        made = start(real(config.load_experiment(Path(table.experiment))), Path(table.out), table.name)
        assert made.folder == folder
    simulated = {"clock": {"availability": "diurnal"}, "fleet": [{"name": "all", "speed": "1 GFLOP/s"}]}
    file.write_text(toml.dump(write_world(tmp_path) | simulated))
    with pytest.raises(UserError, match=r"clock\.availability is for simulated devices"):
        submit.begun(file, [], tmp_path / "runs")
    with pytest.raises(UserError, match=r"clock\.failures is for simulated devices"):
        submit.begun(file, ["clock.availability=always", "clock.failures=0.1"], tmp_path / "runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "{kit}", "x.toml"], "no server of {kit} runs here; start it with: lamina deploy serve {kit}"),
        (["run", "{kit}"], "lamina deploy run takes DIR and a TOML file, or DIR and --resume FOLDER alone"),
        (["join", "{kit}", "--device", "1"], "devices/1/experiment.toml is missing"),
        (["serve", "{kit}/devices"], "{kit}/devices is not a kit"),
        (["init", "{kit}", "--server", "localhost"], "{kit} exists already"),
    ],
)
def test_bad_input_gives_one_line(
    arguments: list[str],
    message: str,
    made: Kit,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = str(made.folder)
    monkeypatch.setattr(sys, "argv", ["lamina", "deploy", *(each.replace("{kit}", place) for each in arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert message.replace("{kit}", place) in err


def test_without_flower_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("lamina.deploy.cli.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["lamina", "deploy", "init", str(tmp_path / "kit"), "--server", "localhost"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "error: lamina deploy needs Flower: pip install 'lamina[flower]'\n"
