"""Methods that add small networks and train those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from lamina import model
from lamina.job import Turn
from lamina.layout import Params
from lamina.methods.base import suffix_label
from lamina.methods.lora import Added
from lamina.model import ADAPTER_STD
from lamina.plan import Plan
from lamina.spec import Spec


@dataclass(frozen=True)
class Adapters(Added):
    """x + W_up gelu(W_down x + b_down) + b_up after attention and after the feed-forward part, before they are added.

    Trained are the adapters and norms of the last t blocks, the final norm, and the head. At the end of a run the
    adapters are in model/lamina.safetensors, since the Hugging Face layout has no place for them.

    **Source:** Houlsby et al., ICML 2019, section 2; averaged as weights are (McMahan et al. 2017).
    **Departs:** the paper's blocks have norms after the sums, as BERT; in those that have them before (GPT-2 and most
    others) the place is the same. A final norm trains in any case. The first weights have the deviation 0.01 of the
    paper's section 3.6; its code has 0.001.

    Attributes:
        width: Of the bottleneck.
        std: Deviation of the first weights, of a normal distribution cut at two deviations; biases are zero.
    """

    width: int = 64
    std: float = 1e-2

    source: ClassVar[str] = "Houlsby et al. 2019"
    cuts: ClassVar[str] = "training of the weights themselves"
    note: ClassVar[str] = (
        "Saves gradients and optimizer states, but hardly any activations; adapters stay in the network for good."
    )

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        if not self.std > 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def adapt(self, spec: Spec) -> Spec:
        """Add two adapters to every block."""
        return replace(spec, adapter=self.width)

    def equip(self, spec: Spec, params: Params, pretrained: Params) -> Params:
        """Adapters of the deviation asked for."""
        rows = model.layout(spec).params
        factor = self.std / ADAPTER_STD
        return {name: factor * p if rows[name].part == "adapter" else p for name, p in params.items()}

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """Adapters and norms of the last t blocks, and head; all adapters are held, since fresh ones do something."""
        layout = model.layout(spec)
        for trained in self.depths(layout):
            names = self.added(layout, trained, "adapter", "norm") | self.head(layout)
            yield Plan(frozenset(layout.params), names, label="adapters, " + suffix_label(trained, layout.blocks))
