"""The table of methods. Being in it is being tested, priced and listed."""

from lamina.methods.base import Method
from lamina.methods.blocks import Caff
from lamina.methods.full import FedAvg
from lamina.methods.lora import FedLora

METHODS: dict[str, type[Method]] = {
    "fedavg": FedAvg,
    "caff": Caff,
    "lora": FedLora,
}

__all__ = ["METHODS", "Method"]
