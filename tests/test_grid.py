"""Flower itself: a SuperLink and three SuperNodes as processes of their own, TLS, keys, and one that is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from proxy import Proxy, proxied
from support import lines, write_world

import lamina
from lamina import checkpoint, config, run, toml
from lamina.deployed import in_real_time
from lamina.engines.local import LocalEngine

ROOT, BIN = Path(lamina.__file__).parent, Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def certificate(key: Any, subject: str, signer: Any, issuer: str, authority: bool) -> bytes:
    now = datetime.now(UTC)
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in (subject, issuer)]
    made = x509.CertificateBuilder().subject_name(names[0]).issuer_name(names[1]).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(1))
    made = made.not_valid_after(now + timedelta(1))
    made = made.add_extension(x509.BasicConstraints(authority, None), critical=True)
    places = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    made = made.add_extension(x509.SubjectAlternativeName(places), critical=False)
    return made.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)


class Grid:
    """Processes that know one another by a FLWR_HOME of their own, and files of theirs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir()
        path = os.pathsep.join([str(ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        programs = os.pathsep.join([str(BIN), os.environ["PATH"]])  # Flower's start one another by name
        self.env = os.environ | QUIET | {"FLWR_HOME": str(self.home), "PYTHONPATH": path, "PATH": programs}
        self.ports = free_ports(4)
        self.started: list[subprocess.Popen[bytes]] = []
        self._secrets()

    def _secrets(self) -> None:
        authority, server, *devices = (ec.generate_private_key(ec.SECP384R1()) for _ in range(5))
        files = {
            "ca.crt": certificate(authority, "authority", authority, "authority", True),
            "server.pem": certificate(server, "localhost", authority, "authority", False),
            "server.key": server.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()),
        }
        for i, key in enumerate(devices):
            files[f"device-{i}"] = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            files[f"device-{i}.pub"] = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        link = f'address = "127.0.0.1:{self.ports[0]}"\nroot-certificates = "{self.folder / "ca.crt"}"\n'
        (self.home / "config.toml").write_text(f'[superlink]\ndefault = "link"\n[superlink.link]\n{link}')

    def start(self, program: str, *arguments: object) -> subprocess.Popen[bytes]:
        log = open(self.folder / f"{program}-{len(self.started)}.log", "wb")  # noqa: SIM115
        with log:
            found = subprocess.Popen(
                [str(BIN / program), *map(str, arguments)],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(found)
        return found

    def flwr(self, *arguments: object) -> None:
        """A command to the SuperLink."""
        command = [str(BIN / "flwr"), *map(str, arguments)]
        done = subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{arguments}: {done.stdout} {done.stderr} {self.logs()}"

    def logs(self) -> str:
        texts = (f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))
        return "".join(texts)

    def alive(self) -> dict[int, str]:
        """Processes of this grid, by what was started here: they have its FLWR_HOME."""
        mark, found = f"FLWR_HOME={self.home}".encode(), {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "environ").read_bytes().split(b"\0") and (path / "cmdline").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return found

    def until(self, true: Callable[[], Any], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"{what} took more than {seconds} s {self.alive()} {self.logs()}"
            time.sleep(0.2)

    def link(self) -> None:
        """The SuperLink, which knows three keys."""
        paths = [self.folder / name for name in ("ca.crt", "server.pem", "server.key")]
        secrets = zip(("--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile"), paths, strict=True)
        where = ("--port", self.ports[0], "--database", self.folder / "state.db")
        safe = ("--enable-supernode-auth", "--disable-runtime-dependency-installation")
        self.start("flower-superlink", *(each for pair in secrets for each in pair), *safe, *where)
        self.until(self._listens, 60, "the start of the SuperLink")
        for i in range(3):
            self.flwr("supernode", "register", self.folder / f"device-{i}.pub", "link")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.ports[0])) == 0

    def join(self, device: int, experiment: Path, port: int) -> subprocess.Popen[bytes]:
        """The SuperNode of a device, which reaches the SuperLink on that port."""
        settings = self.folder / f"node-{device}.toml"
        table = {"device": device, "experiment": str(experiment), "cache": str(self.folder / f"cache-{device}")}
        settings.write_text(toml.dump(table), encoding="utf-8")
        secrets = ("--root-certificates", self.folder / "ca.crt", "--auth-supernode-private-key")
        where = ("--superlink", f"127.0.0.1:{port}", "--port", self.ports[1 + device])
        key = self.folder / f"device-{device}"
        return self.start("flower-supernode", *secrets, key, *where, "--node-config", settings)

    def stop(self) -> None:
        """As a user would; and whoever is still there after that, at once."""
        for each in self.started:
            each.terminate()
        for each in self.started:
            each.wait(30)


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[Grid]:
    found = Grid(tmp_path)
    try:
        yield found
    finally:
        for pid in found.alive():
            os.kill(pid, signal.SIGKILL)
        for each in found.started:
            each.wait()


def test_a_device_that_is_killed_costs_its_update_and_no_process_stays(grid: Grid) -> None:
    """While another has a bad network: its answers, which are cut off halfway, count whole or not at all."""
    fleet = [{"name": "strong", "speed": "1 TFLOP/s"}, {"name": "weak", "memory": 243224, "speed": "1 TFLOP/s"}]
    changes: dict[str, Any] = {"clock": {"deadline": 35.0}, "fleet": fleet}
    table = write_world(grid.folder, engine="serial", rounds=2, cohort=3, **changes)
    table["task"] |= {"devices": 3}
    file, out = grid.folder / "x.toml", grid.folder / "runs"
    file.write_text(toml.dump(table), encoding="utf-8")
    grid.link()
    with proxied(grid.ports[0], cut_at=6000, cuts=4, delay_seconds=0.01) as proxy:
        play(grid, file, out, proxy)
    assert proxy.cuts == 0
    grid.stop()
    grid.until(lambda: not grid.alive(), 20, "ending the processes")

    here = run.start(config.load_experiment(file), grid.folder, "here")  # the same, simulated
    here.experiment = in_real_time(here.experiment)
    engine = LocalEngine(here.outlook.chosen.spec, here.task.train, 1)

    class Lossy:
        def run(self, jobs: Any) -> Any:
            return (each for each in engine.run(jobs) if (each.turn.round, each.turn.device) != (1, 1))

    here.play(engine=Lossy())
    models = [(folder / "model" / checkpoint.WEIGHTS).read_bytes() for folder in (out / "tiny", here.folder)]
    assert models[0] == models[1]


def play(grid: Grid, file: Path, out: Path, proxy: Proxy) -> None:
    """Two rounds, in the second of which device 1 is killed; device 2 is behind the proxy."""
    nodes = [grid.join(device, file, proxy.port if device == 2 else grid.ports[0]) for device in range(3)]
    settings = f'experiment="{file}" out="{out}" name="tiny" wait=120'
    grid.flwr("run", ROOT / "app", "link", "-c", settings)
    rounds, done = out / "tiny" / "rounds.jsonl", out / "tiny" / "summary.json"
    grid.until(lambda: rounds.exists() and len(lines(rounds)) == 1, 150, "the first round")
    os.killpg(nodes[1].pid, signal.SIGKILL)
    grid.until(done.exists, 120, "the second round")
    rows = lines(rounds)
    assert [row["updates"] for row in rows] == [3, 2], grid.logs()
    ways = ("late", "its node is gone", "its answer did not arrive whole")  # Flower tells by when it was killed
    assert rows[1]["rejected"] in [[f"device 1: {way}"] for way in ways]
