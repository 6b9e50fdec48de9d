"""Methods with low-rank matrices that average products instead of factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lamina import model
from lamina.job import Job, Turn, Update
from lamina.layout import Params
from lamina.methods.base import suffix_label
from lamina.methods.lora import FedLora, Ranked, linears
from lamina.plan import Overlap, Plan, Vote, narrow
from lamina.spec import Spec

if TYPE_CHECKING:
    from lamina.planner import Fleet


@dataclass(frozen=True)
class FedExLora(FedLora):
    """LoRA whose averaging is made exact: what mean(B) mean(A) lacks of mean(B A) goes into the frozen weights.

    With s = alpha / r: W <- W + s (mean(B_c A_c) - mean(B_c) mean(A_c)), so that what a linear layer amounts to after a
    round is W + s mean(B_c A_c). Uploads are those of LoRA; besides A and B the weights, which change in every round in
    which several devices take part, have to be downloaded.

    **Source:** Singhal, Ponkshe and Vepakomma, ACL 2025 (FedEx-LoRA), section 4; devices count the same.
    **Departs:** the paper can send the correction as factors, whose rank is that of all participants together; here the
    changed weights are sent, and counted. The head trains too by default.
    """

    weighting: Literal["examples", "uniform"] = "uniform"

    source: ClassVar[str] = "Singhal et al. 2025"

    def merge(
        self, params: Params, spec: Spec, votes: Iterable[Vote], turn: Turn, memory: Params
    ) -> tuple[Params, Params]:
        """The means of the factors, and the correction of the weights."""
        layout = model.layout(spec)
        before = additions(spec, params)
        factors, products = Overlap(params, layout, self.absent), Overlap(before, layout, self.absent)
        for vote in votes:
            factors.add(vote)
            products.add(_of_products(vote, additions(spec, vote.arrays)))
        after, wanted = factors.mean(), products.mean()
        found = additions(spec, after)
        for name in before:
            if wanted[name] is not before[name]:
                correction = (wanted[name] - found[name]).reshape(layout.shape(name))
                after[name] = (params[name].double() + correction).to(params[name].dtype)
        return after, memory


@dataclass(frozen=True)
class _Whole(Ranked):
    """What methods share whose server has plain weights, and whose devices add low-rank matrices of their own rank."""

    def adapt(self, spec: Spec) -> Spec:
        """Nothing is added to the server's network."""
        return spec

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """The whole network, and A and B in the last t blocks, which train, in fewer and fewer ranks."""
        for trained in self.depths(model.layout(spec)):
            for rank in self.offered(self.rank):
                network = replace(spec, lora=self.lora(rank))
                layout = model.layout(network)
                names = self.added(layout, trained, "lora") | self.head(layout)
                label = f"rank {rank}, {suffix_label(trained, spec.blocks)}"
                yield Plan(names | frozenset(model.layout(spec).params), names, label=label, network=network)

    def decode(self, update: Update, job: Job, spec: Spec) -> Vote:
        """A vote on weights: W + (alpha / r) B A, in double precision."""
        arrays = {**job.arrays, **update.arrays}
        made = {
            name: arrays[name].double() + product.reshape(arrays[name].shape)
            for name, product in additions(job.plan.runs(spec), update.arrays).items()
        }
        made |= {name: array for name, array in update.arrays.items() if name in model.layout(spec).params}
        return _of_products(Vote(job.turn.device, job.plan, {}, self.weight(update)), made)


@dataclass(frozen=True)
class Flora(_Whole):
    """Every round begins with new A and zero B on top of the merged weights; products are averaged exactly.

    A device starts from B = 0 and its own random A, of its own rank, and the server takes
    W <- W + sum_c p_c s B_c A_c / sum_c p_c: the product of the stacked matrices [B_1 ... B_n] and
    [p_1 A_1; ...; p_n A_n], which it multiplies out at once.

    **Source:** Wang, Shen, He, Sun, Wang, Lyu and Li, NeurIPS 2024 (FLoRA), section 3.
    **Departs:** the paper sends the stacked matrices, sum_c r_c (d_in + d_out) numbers per linear layer, and each
    device adds their product to its weights; here the changed weights are sent, d_in d_out numbers, which is less
    exactly when the cohort's ranks add up to more than d_in d_out / (d_in + d_out). The new A and B are counted as
    downloads, though a seed would do for them. The scale s = alpha / rank is the same for all ranks. Published code of
    the averaging that FLoRA is compared with keeps the first device alone; see `lora` for it as it is meant.
    """

    source: ClassVar[str] = "Wang et al. 2024"
    own_start: ClassVar[bool] = True
    cuts: ClassVar[str] = "training of the weights themselves, and the rank of what is added"
    note: ClassVar[str] = "As lora; ranks hardly change the peak. A download is the whole of the changed weights."

    def encode(self, params: Params, spec: Spec, plan: Plan, turn: Turn, memory: Params) -> Params:
        """The weights as they are, new A, and zero B."""
        layout = model.layout(plan.runs(spec))
        fresh = {name: torch.zeros(layout.shape(name)) for name in plan.trains if name.endswith(".lora_b")}
        for linear in linears(plan.trains):
            fresh[f"{linear}.lora_a"] = _draw(turn, linear, layout.shape(f"{linear}.lora_a"))
        return narrow(params | fresh, layout, plan)


@dataclass(frozen=True)
class FlexLora(_Whole):
    """Products are averaged in full, and each device gets the best approximation of its own rank (by SVD).

    The server has W = W_0 + dW with dW = U S V'. A device of rank r gets W_0, B = U_r S_r / s and A = V_r', with
    s = alpha / rank, and the server takes W <- W_0 + sum_c p_c s B_c A_c / sum_c p_c. Where dW has fewer than r
    singular values, as in the first round, B is zero and A random, as LoRA begins.

    **Source:** Bai, Chen, Qian, Yao and Li, NeurIPS 2024 (FlexLoRA), section 3.
    **Departs:** the scale is the same for all ranks. S goes to B, so that singular values that are zero leave an A that
    can train. Blocks that a device does not train come to it as W, uncut.
    """

    source: ClassVar[str] = "Bai et al. 2024"
    cuts: ClassVar[str] = "training of the weights themselves, and the rank of what was learnt"
    note: ClassVar[str] = "As lora: the rank hardly changes the peak, so a device short of memory is not helped."
    lossy: ClassVar[bool] = True

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """W_0, and no singular values yet."""
        layout = model.layout(self._network(spec))
        factors = {name: torch.zeros(layout.shape(name)) for name, row in layout.params.items() if row.part == "lora"}
        return factors | {f"{linear}.weight": params[f"{linear}.weight"] for linear in linears(factors)}

    def encode(self, params: Params, spec: Spec, plan: Plan, turn: Turn, memory: Params) -> Params:
        """W_0 and the first r singular values where A and B train, and the server's W elsewhere."""
        layout = model.layout(plan.runs(spec))
        made: Params = {}
        for linear in linears(plan.trains):
            a, b = f"{linear}.lora_a", f"{linear}.lora_b"
            rank = layout.shape(a)[0]
            made |= {f"{linear}.weight": memory[f"{linear}.weight"], a: memory[a], b: memory[b]}
            if rank < self.rank:
                made |= {a: memory[a][:rank], b: memory[b][..., :rank].contiguous()}
            unused = ~made[a].flatten(1).any(1)
            if unused.any():
                made[a] = made[a].clone()
                made[a][unused] = _draw(replace(turn, device=-1), linear, layout.shape(a))[unused]
        return narrow(params | made, layout, plan)

    def merge(
        self, params: Params, spec: Spec, votes: Iterable[Vote], turn: Turn, memory: Params
    ) -> tuple[Params, Params]:
        """The mean of the products, and its singular values."""
        layout = model.layout(self._network(spec))
        after, memory = super().merge(params, spec, votes, turn, memory)
        kept = dict(memory)
        for linear in linears(memory):
            weight, a, b = f"{linear}.weight", f"{linear}.lora_a", f"{linear}.lora_b"
            if after[weight] is not params[weight]:
                delta = (after[weight].double() - memory[weight].double()).reshape(-1, layout.numel(a) // self.rank)
                u, s, v = svd(delta, self.rank, float(memory[weight].double().norm()) * 2**-23)
                kept[a] = v.reshape(layout.shape(a)).float()
                kept[b] = (u * s / self.scale).reshape(layout.shape(b)).float()
        return after, kept

    def _network(self, spec: Spec) -> Spec:
        return replace(spec, lora=self.lora(self.rank))


def additions(spec: Spec, arrays: Mapping[str, Tensor]) -> Params:
    """(alpha / r) B A of every linear layer that has A and B here, by the name of its weight, as matrices, float64."""
    assert spec.lora
    found: Params = {}
    for linear in linears(arrays):
        a, b = (arrays[f"{linear}.{end}"].double() for end in ("lora_a", "lora_b"))
        found[f"{linear}.weight"] = spec.lora.alpha / spec.lora.rank * (b.flatten(0, -2) @ a.flatten(1))
    return found


def svd(matrix: Tensor, rank: int, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """U [rows, rank], S [rank] and V' [rank, columns] of the best approximation, with zeros where S is not > least."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    count = min(rank, len(s))
    alive = s[:count] > least
    left, values, right = matrix.new_zeros(len(u), rank), matrix.new_zeros(rank), matrix.new_zeros(rank, v.shape[1])
    left[:, :count], values[:count], right[:count] = u[:, :count] * alive, s[:count] * alive, v[:count] * alive[:, None]
    return left, values, right


def _of_products(vote: Vote, made: Params) -> Vote:
    """A vote on these tensors, uncut."""
    return replace(vote, plan=Plan(frozenset(made), frozenset(made), label=vote.plan.label), arrays=made)


def _draw(turn: Turn, linear: str, shape: tuple[int, ...]) -> Tensor:
    """Uniform within 1 / sqrt(inputs), as LoRA begins (see `lamina.model.init`)."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(turn.rng(f"lora/{linear}").uniform(-bound, bound, shape)).float()
