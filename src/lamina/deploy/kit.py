"""The kit: the folder of a server and of its devices.

    kit.json        address and number of devices
    ca.crt          what devices trust                 ca.key       private: signs server certificates; keep it offline
    server.crt      shown to devices                   server.key   private
    lamina-server.service, README.md
    state/          made by `serve`: database, log, Flower's settings
    devices/K/      all that device K needs, to be copied to it:
        device.json, ca.crt, device.key (private), device.pub, lamina-device.service

The server lets those devices join whose device.pub is in the kit.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from lamina import files
from lamina.errors import UserError

KIT, DEVICE, CACHE, PORT = "kit.json", "device.json", "cache", 8443
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_SCHEMA, _MOST_DEVICES = "lamina.kit/1", 1000

T = TypeVar("T", "Kit", "Device")


@dataclass(frozen=True)
class Kit:
    """What kit.json says.

    Attributes:
        folder: Of the kit, absolute.
        host: Name or address of the server, as devices reach it.
        port: TCP port of the server.
        devices: How many the kit was made for.
    """

    folder: Path
    host: str
    port: int
    devices: int

    @property
    def state(self) -> Path:
        """What the server keeps."""
        return self.folder / "state"

    @property
    def loopback(self) -> bool:
        """Whether the server is for this machine only."""
        return self.host == "localhost" or (_is_ip(self.host) and ipaddress.ip_address(self.host).is_loopback)

    def public_keys(self) -> dict[str, Path]:
        """The keys of devices that may join, by device."""
        return {path.parent.name: path for path in sorted(self.folder.glob("devices/*/device.pub"))}


@dataclass(frozen=True)
class Device:
    """What device.json says.

    Attributes:
        folder: Of the device, absolute.
        host: Name or address of the server.
        port: TCP port of the server.
        device: Index of the device, from 0.
    """

    folder: Path
    host: str
    port: int
    device: int

    @property
    def address(self) -> str:
        """Host and port in one."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def make(folder: Path, host: str, port: int, devices: int, force: bool) -> Kit:
    """Make a new kit, whole or not at all.

    Args:
        folder: Where it goes.
        host: Name or address of the server, as devices reach it.
        port: TCP port of the server.
        devices: Number of devices.
        force: Replace a kit that is there, keys and all.

    Raises:
        UserError: A value is not accepted, or there is something already.
    """
    from lamina.deploy import keys

    _demand(host, port, devices)
    folder = folder.absolute()
    ca, ca_key = keys.authority()
    certificate, server_key = keys.server(host, ca, ca_key)
    known = {"schema": _SCHEMA, "host": host, "port": port}
    with files.new_folder(folder, KIT if force else None) as made:
        files.write(made / "ca.key", keys.private_pem(ca_key), 0o600)
        files.write(made / "ca.crt", keys.pem(ca))
        files.write(made / "server.key", server_key, 0o600)
        files.write(made / "server.crt", certificate)
        files.write(made / "lamina-server.service", _text("server.service"))
        files.write(made / "README.md", _text("README.md").replace("HOST", host).replace("PORT", str(port)))
        files.write_json(made / KIT, known | {"devices": devices})
        for index in range(devices):
            _fill(made / "devices" / str(index), Device(folder, host, port, index), keys.pem(ca))
    return Kit(folder, host, port, devices)


def _fill(place: Path, device: Device, ca: bytes) -> None:
    """Write what a device needs, with a new pair of keys."""
    from lamina.deploy import keys

    private, public = keys.device()
    files.write(place / "device.key", private, 0o600)
    files.write(place / "device.pub", public)
    files.write(place / "ca.crt", ca)
    files.write(place / "lamina-device.service", _text("device.service"))
    table = {"schema": _SCHEMA, "host": device.host, "port": device.port, "device": device.device}
    files.write_json(place / DEVICE, table)


def add_device(kit: Kit, device: int, force: bool) -> Path:
    """Make the folder of a device, with a new pair of keys; returns it.

    Args:
        kit: Where.
        device: Index of the device.
        force: Replace one that is there; its key is not accepted any more.

    Raises:
        UserError: The index is not accepted, or there is one already.
    """
    if not 0 <= device < _MOST_DEVICES:
        raise UserError(f"a device is counted from 0 and below {_MOST_DEVICES}, got {device}")
    place = kit.folder / "devices" / str(device)
    with files.new_folder(place, DEVICE if force else None) as made:
        _fill(made, Device(place, kit.host, kit.port, device), (kit.folder / "ca.crt").read_bytes())
    return place


def renew(kit: Kit) -> None:
    """Give the server a new certificate and key; what devices have stays good.

    Raises:
        UserError: The CA's key is not here, or not the CA's.
    """
    from lamina.deploy import keys

    _demand_files(kit.folder, (), ("ca.key",))
    certificate, key = keys.server(kit.host, *keys.load_authority(kit.folder))
    files.write(kit.folder / "server.key", key, 0o600)
    files.write(kit.folder / "server.crt", certificate)


def load(folder: Path) -> Kit:
    """The kit in a folder.

    Raises:
        UserError: There is none, or it lacks a file that the server needs.
    """
    kit = _read(Kit, folder, KIT, "a kit", "make one with: lamina deploy init")
    _demand_files(kit.folder, ("ca.crt", "server.crt"), ("server.key",))
    return kit


def load_device(folder: Path, device: int | None = None) -> Device:
    """A device's part of a kit.

    Args:
        folder: Of the device, or, with `device`, of the kit.
        device: Index of the device.

    Raises:
        UserError: There is none, or it lacks a file, or its private key can be read by others.
    """
    place = folder if device is None else folder / "devices" / str(device)
    if device is not None and not place.is_dir():
        found = sorted((path.name for path in folder.glob("devices/*")), key=lambda name: (len(name), name))
        raise UserError(f"{folder} has no device {device}; it has: {', '.join(found) or 'none'}")
    found_device = _read(
        Device, place, DEVICE, "the folder of a device", "copy devices/K of the kit, or name --device K"
    )
    _demand_files(found_device.folder, ("ca.crt",), ("device.key",))
    return found_device


def _read(kind: type[T], folder: Path, name: str, what: str, do: str) -> T:
    try:
        found: Any = json.loads((folder / name).read_text(encoding="utf-8"))
        schema = found.pop("schema")
        made = kind(folder.absolute(), **found)
    except OSError:
        raise UserError(f"{folder} is not {what}: it has no {name}; {do}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{folder / name} is damaged; take it from the kit again, or {do}") from None
    if schema != _SCHEMA:
        raise UserError(f"{folder / name} has schema {schema!r}; this version reads {_SCHEMA!r}")
    return made


def _demand_files(folder: Path, public: tuple[str, ...], private: tuple[str, ...]) -> None:
    for name in (*public, *private):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; copy it from the kit it was made with")
    for name in private:
        if os.name == "posix" and (mode := (folder / name).stat().st_mode & 0o077):
            raise UserError(f"{folder / name} can be used by others (mode bits {mode:03o}): chmod 600 {folder / name}")


def _demand(host: str, port: int, devices: int) -> None:
    if not (_is_ip(host) or _HOST.fullmatch(host)) or host in ("0.0.0.0", "::"):
        raise UserError(f"--server takes the name or address by which devices reach the server, got {host!r}")
    if not 1 <= port <= 65535:
        raise UserError(f"--port must be in 1..65535, got {port}")
    if not 1 <= devices <= _MOST_DEVICES:
        raise UserError(f"--devices must be in 1..{_MOST_DEVICES}, got {devices}")


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return False


def _text(name: str) -> str:
    return (resources.files("lamina") / "deploy" / "texts" / name).read_text(encoding="utf-8")
