"""Pretrained networks by name (those of the package) or by folder."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from lamina import checkpoint
from lamina.errors import UserError, nearest


def embedded() -> dict[str, Path]:
    """The networks that come with the package: name -> folder."""
    assets = Path(str(resources.files("lamina"))) / "assets"
    return {path.parent.name: path.parent for path in sorted(assets.glob(f"*/{checkpoint.CONFIG}"))}


def find(name: str) -> Path:
    """The folder of a network.

    Raises:
        UserError: It is neither the name of an embedded network nor a folder with one.
    """
    known = embedded()
    if name in known:
        return known[name]
    if (Path(name) / checkpoint.CONFIG).is_file():
        return Path(name)
    raise UserError(
        f"no network {name!r}: it is neither a folder with a {checkpoint.CONFIG} nor one of the package's; "
        + (nearest(name, known) if known else "it has none")
    )


def digest(folder: Path) -> str:
    """SHA-256 in hex of what a network's folder says and weighs: its config and its safetensors."""
    found = hashlib.sha256()
    for path in sorted([folder / checkpoint.CONFIG, *folder.glob("*.safetensors")]):
        with open(path, "rb") as file:
            found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()
