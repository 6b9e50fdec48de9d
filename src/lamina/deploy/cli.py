"""`lamina deploy`: the commands for real machines."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

deploy = typer.Typer(no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The kit.", show_default=False)]
NOTHING: list[str] = []


@deploy.callback(help="Run experiments on real machines, over Flower.")
def demand_flower() -> None:
    """Refuse to go on without Flower.

    Raises:
        UserError: It is not installed.
    """
    from lamina.errors import UserError

    if find_spec("flwr") is None:
        raise UserError("lamina deploy needs Flower: pip install 'lamina[flower]'")


@deploy.command()
def init(
    folder: Folder,
    server: Annotated[str, typer.Option(metavar="HOST", help="Name or address by which devices reach the server.")],
    port: Annotated[int, typer.Option(help="Port of the server.")] = 8443,
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 3,
    force: Annotated[bool, typer.Option("--force", help="Replace a kit that is there, keys and all.")] = False,
) -> None:
    """Make a kit: certificates, a key pair per device, systemd units, and a page that says what to do with them."""
    from lamina.deploy import kit

    made = kit.make(folder, server, port, devices, force)
    typer.echo(f"kit {made.folder}: server {host_port(made.host, made.port)}, {devices} devices; see README.md there")


@deploy.command()
def key(
    folder: Folder,
    device: Annotated[int, typer.Argument(metavar="K", help="Which device, from 0.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace its key by another.")] = False,
) -> None:
    """Make the folder of one device, with a new key: for a device more, or in place of a key that was lost."""
    from lamina.deploy import kit

    place = kit.add_device(kit.load(folder), device, force)
    typer.echo(f"device {device}: new key in {place}; copy that folder to the device")


@deploy.command()
def renew(folder: Folder) -> None:
    """Make a new certificate for the server of a kit, valid from now; devices need nothing new."""
    from lamina.deploy import keys, kit

    found = kit.load(folder)
    kit.renew(found)
    typer.echo(f"new server.crt, valid for {keys.SERVER_DAYS} days: start the server of {found.folder} again")


@deploy.command()
def serve(folder: Folder) -> None:
    """Be the server of a kit, until stopped."""
    from lamina.deploy import kit
    from lamina.deploy.serve import serve as run_server

    try:
        run_server(kit.load(folder), typer.echo)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@deploy.command()
def join(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The device's folder, or the kit.", show_default=False)],
    device: Annotated[int | None, typer.Option(metavar="K", help="Which device of the kit in DIR.")] = None,
) -> None:
    """Be a device of a kit, until stopped."""
    from lamina.deploy import kit
    from lamina.deploy.join import join as run_device

    run_device(kit.load_device(folder, device), typer.echo)


@deploy.command()
def run(
    folder: Folder,
    file: Annotated[Path | None, typer.Argument(help="TOML file of the experiment.", show_default=False)] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: local.lr=0.001.")
    ] = NOTHING,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    out: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")] = False,
) -> None:
    """Run an experiment on the devices that have joined; to be called where the server runs."""
    from lamina.deploy import kit, submit
    from lamina.errors import UserError
    from lamina.run import demand_unfinished
    from lamina.view import View

    if (file is None) == (resume is None) or (resume and overrides):
        raise UserError("lamina deploy run takes DIR and a TOML file, or DIR and --resume FOLDER alone")
    found = kit.load(folder)
    submit.demand_server(found)
    if resume:
        demand_unfinished(resume)
        place = resume.absolute()
        settings = {"resume": str(place)}
    else:
        assert file is not None
        settings, place = submit.begun(file, overrides, out)
    view = View(quiet=as_json)
    try:
        current, summary = submit.play(found, settings, place, view)
    except KeyboardInterrupt:
        command = shlex.join(["lamina", "deploy", "run", str(folder), "--resume", str(place)])
        view.say(f"stopped; go on with: {command}")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        view.outcome(current, summary)


def host_port(host: str, port: int) -> str:
    """Both in one, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
