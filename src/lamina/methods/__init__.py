"""The table of methods. Being in it is being tested, priced and listed."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from lamina.methods.adapters import Adapters
from lamina.methods.base import Method
from lamina.methods.blocks import Alf, Caff, CocoFl, FedRa
from lamina.methods.depth import DepthFL
from lamina.methods.exact import FedExLora, FlexLora, Flora
from lamina.methods.forward import Mezo, Spry
from lamina.methods.full import FedAvg
from lamina.methods.groups import Fed2
from lamina.methods.growth import ProgFed, Slt
from lamina.methods.lora import FedLora, FfaLora, HetLora, LoraLastT
from lamina.methods.lowrank import FedHM, Flanc
from lamina.methods.masks import PerFedMask
from lamina.methods.slora import SLora
from lamina.methods.width import FederatedDropout, FedRolex, Fjord, HeteroFL

METHODS: dict[str, type[Method]] = {
    "fedavg": FedAvg,
    "caff": Caff,
    "cocofl": CocoFl,
    "perfedmask": PerFedMask,
    "alf": Alf,
    "fedra": FedRa,
    "federated-dropout": FederatedDropout,
    "heterofl": HeteroFL,
    "fedrolex": FedRolex,
    "fjord": Fjord,
    "flanc": Flanc,
    "fed2": Fed2,
    "depthfl": DepthFL,
    "progfed": ProgFed,
    "slt": Slt,
    "lora": FedLora,
    "lora-last-t": LoraLastT,
    "hetlora": HetLora,
    "slora": SLora,
    "adapters": Adapters,
    "ffa-lora": FfaLora,
    "flora": Flora,
    "flexlora": FlexLora,
    "fedex-lora": FedExLora,
    "fedhm": FedHM,
    "spry": Spry,
    "mezo": Mezo,
}

PLAIN = "plain"
"""Name in tables of the base class itself: training as it is, without a server."""


def to_table(method: Method) -> dict[str, Any]:
    """Name and fields of a method, as plain data."""
    names = {cls: name for name, cls in METHODS.items()} | {Method: PLAIN}
    return {"name": names[type(method)]} | asdict(method)


def from_table(table: Mapping[str, Any]) -> Method:
    """The method that `to_table` described, also after a detour through JSON."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "name"}
    named: dict[str, type[Any]] = METHODS | {PLAIN: Method}
    return cast(Method, named[table["name"]](**fields))


__all__ = ["METHODS", "Method", "from_table", "to_table"]
