"""LoRA that begins where sparse training got to."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch

from lamina import model
from lamina.job import Turn
from lamina.layout import Params, Part
from lamina.methods.base import share, suffix_label
from lamina.methods.exact import svd
from lamina.methods.lora import FedLora, linears
from lamina.plan import Plan, Vote
from lamina.spec import Sparse, Spec


@dataclass(frozen=True)
class SLora(FedLora):
    """First a few random elements of the weights train; what they learnt is approximated by B A, and LoRA goes on.

    Stage 1 is federated averaging of the weights W_0 + S, S being zero but for a share `density` of its elements, drawn
    once for all devices. After it, with S = U D V', B = U_r sqrt(D_r / s) and A = sqrt(D_r / s) V_r' for s = alpha / r,
    so that s B A is the best approximation of S of rank r; the weights are W_0 again. Stage 2 is `lora` from there.
    The head trains in both stages and goes from the first to the second as it is.

    **Source:** Babakniya, Elkordy, Ezzeldin, Liu, Song, El-Khamy and Avestimehr, 2023 (SLoRA), sections 4 and 5.
    **Departs:** the elements are uniform within each linear layer, of the same linears and blocks as A and B; biases,
    norms and embeddings stay frozen. How long stage 1 is, the sources at hand do not say. Plans are shown, and the
    network is chosen, for stage 1; where stage 2 takes more (all linears, many tokens), devices without room for it
    sit out from there on.

    Attributes:
        density: Share of the elements of a weight that train in stage 1; 0: as many as A and B have.
        mask_seed: Of their draw.
        first_stage: Share of the rounds that are stage 1, rounded up.
    """

    density: float = 0.0
    mask_seed: int = 0
    first_stage: float = 0.2

    source: ClassVar[str] = "Babakniya et al. 2023"
    cuts: ClassVar[str] = "training of most elements of the weights, then of the weights themselves"
    note: ClassVar[str] = (
        "Stage 1 keeps the activations of full training, and makes a whole weight or gradient at a time: no help."
    )
    lossy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if not 0 <= self.density <= 1:
            raise ValueError(f"density must be from 0 to 1, got {self.density}")
        if not 0 < self.first_stage < 1:
            raise ValueError(f"first_stage must be above 0 and below 1, got {self.first_stage}")

    def adapt(self, spec: Spec) -> Spec:
        """Add A and B, and the sparse elements."""
        adapted = super().adapt(spec)
        assert adapted.lora
        layout = model.layout(adapted)
        names = [name for name, row in layout.params.items() if row.part == "lora"]
        whole = sum(layout.numel(f"{linear}.weight") for linear in linears(names))
        density = self.density or min(1.0, sum(map(layout.numel, names)) / whole)
        return replace(adapted, sparse=Sparse(density, self.mask_seed, adapted.lora.targets))

    def peak_rounds(self, rounds: int) -> tuple[int, ...]:
        """One of each stage."""
        return 0, rounds - 1

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """What is added to the last t blocks in this stage, and the head."""
        layout = model.layout(spec)
        part: Part = "sparse" if turn.round < self._first_rounds(turn) else "lora"
        for trained in self.depths(layout):
            names = self.added(layout, trained, part) | self.head(layout)
            label = f"{'sparse' if part == 'sparse' else 'low rank'}, {suffix_label(trained, layout.blocks)}"
            yield Plan(self.held(layout, part), names, label=label)

    def encode(self, params: Params, spec: Spec, plan: Plan, turn: Turn, memory: Params) -> Params:
        """The server's tensors; A and B as they should be, if nobody took part in the last round of stage 1."""
        return super().encode(self._stage(params, spec, turn.round, turn), spec, plan, turn, memory)

    def merge(
        self, params: Params, spec: Spec, votes: Iterable[Vote], turn: Turn, memory: Params
    ) -> tuple[Params, Params]:
        """The mean; after the last round of stage 1 its approximation."""
        after, memory = super().merge(self._stage(params, spec, turn.round, turn), spec, votes, turn, memory)
        return self._stage(after, spec, turn.round + 1, turn), memory

    def _first_rounds(self, turn: Turn) -> int:
        return share(turn.rounds, self.first_stage)

    def _stage(self, params: Params, spec: Spec, round_: int, turn: Turn) -> Params:
        """The tensors with which a round begins: in stage 2, those of stage 1 with A and B for what is sparse."""
        if round_ < self._first_rounds(turn):
            return params
        learnt = [each for each in linears(params) if params[f"{each}.sparse"].any()]
        return reduce(operator.or_, (self._approximated(spec, params, linear) for linear in learnt), params)

    def _approximated(self, spec: Spec, params: Params, linear: str) -> Params:
        """A and B in place of sparse elements; ranks for which there is nothing to learn from begin as LoRA's do."""
        assert spec.sparse
        a, b, values = (params[f"{linear}.{end}"] for end in ("lora_a", "lora_b", "sparse"))
        columns = a.flatten(1).shape[1]
        numel = params[f"{linear}.weight"].numel()
        indices = torch.from_numpy(model.sparse_indices(spec.sparse, linear, numel, values.numel()))
        delta = torch.zeros(numel, dtype=torch.float64).index_add(0, indices, values.double()).reshape(-1, columns)
        u, d, v = svd(delta, self.rank, float(delta.norm()) * 2**-23)
        root = (d / self.scale).sqrt()
        rows = torch.where(root[:, None] > 0, root[:, None] * v, a.flatten(1).double())
        return {
            f"{linear}.lora_a": rows.float().reshape(a.shape),
            f"{linear}.lora_b": (u * root).float().reshape(b.shape),
            f"{linear}.sparse": torch.zeros_like(values),
        }
