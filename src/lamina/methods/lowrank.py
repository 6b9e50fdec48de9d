"""Methods whose devices hold each linear layer in two factors, W = C B, in the place of W."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lamina import model
from lamina.job import Job, Turn, Update
from lamina.layout import Axis, Params
from lamina.methods.base import Method, grouped, share, suffix_label
from lamina.ops import Ops
from lamina.plan import Overlap, Plan, Vote
from lamina.spec import LINEARS, Factored, Spec, as_matrix

if TYPE_CHECKING:
    from lamina.planner import Fleet


@dataclass(frozen=True)
class Ranked(Vote):
    """A vote of a device whose weights were of low rank.

    Attributes:
        ratio: By how much.
    """

    ratio: int


@dataclass(frozen=True)
class FedHM(Method):
    """Weak devices train truncated factors, W ~ C B with C = U sqrt(S), B = sqrt(S) V'; the server multiplies back.

    The server holds whole weights, U S V' each. A device of ratio s gets the r = D / s largest singular values (D: the
    width, the smaller side of a linear layer, but of keys and values that queries share, which then have at most their
    own rank; ratio 1 gets W itself), trains C and B, and returns them; the server
    takes the mean of the products C B and the whole weights. Where nobody of ratio 1 took part, the global network
    counts as one who did, so that what the factors cannot express is not lost at once (`history`). The loss gains
    (lambda / 2) |C B|^2 in the place of a decay of the factors; its gradient is lambda C (B B') and lambda (C' C) B.

    Factors save at all only if r < d_in d_out / (d_in + d_out): in attention, ratios above 2 (2 takes as much as W);
    in a feed-forward part of width 4 D, from 2 on (r < 0.8 D). What pretraining left in the small singular values is
    lost to a device: on novels-6, truncating every layer takes the loss on Shakespeare from 1.60 nats to 2.03, 3.29
    and 3.97 at ratios 2, 4 and 8, where a network that knows no more than how frequent each character is has 3.08.

    **Source:** Yao et al. 2021, arXiv 2111.14655; rules of the convolutional path of the authors' code.
    **Departs:** Transformers by the rule of their convolutions, every linear layer of a block; the released vision
    Transformer puts LoRA on attention, counts the update twice and drops what weak devices trained, and is not
    followed. Rank is D / s, not outputs / s, which in a feed-forward layer would save nothing. Whole weights get the
    same decay, so that all devices minimise the same; leave `local.weight_decay` at 0 beside it.

    Attributes:
        weighting: A device counts by its "examples", or all count the same ("uniform"), as in the authors' code.
        ratios: D / r, ascending; the first is 1, the whole weights.
        first_block: The blocks before it stay whole everywhere.
        decay: lambda.
        dynamic: Whether devices count in proportion to exp(-ratio / temperature) as well.
        temperature: Of that.
        history: Whether the global network joins the mean where no device had whole weights.
    """

    weighting: Literal["examples", "uniform"] = "uniform"
    ratios: tuple[int, ...] = (1, 2, 4, 8)
    first_block: int = 0
    decay: float = 1e-4
    dynamic: bool = False
    temperature: float = 1.0
    history: bool = True

    group: ClassVar[str] = "rank"
    source: ClassVar[str] = "Yao et al. 2021, arXiv 2111.14655"
    cuts: ClassVar[str] = "the rank of the linear layers"
    note: ClassVar[str] = (
        "Saves weights, gradients and optimizer states from ratio 4 on (2 in the feed-forward part); activations grow,"
        " by r numbers per token and linear layer."
    )
    lossy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if self.ratios[:1] != (1,) or sorted(set(self.ratios)) != list(self.ratios):
            raise ValueError(f"ratios must ascend from 1, got {list(self.ratios)}")
        for key in ("first_block", "decay"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """The whole network, then its factors of falling rank."""
        names = frozenset(model.layout(spec).params)
        yield Plan(names, names, label="full rank")
        for rank in self._ranks(spec):
            network = replace(spec, factored=Factored(rank, first_block=self.first_block))
            names = frozenset(model.layout(network).params)
            where = suffix_label(spec.blocks - self.first_block, spec.blocks)
            yield Plan(names, names, label=f"rank {rank}, {where}", network=network)

    def _ranks(self, spec: Spec) -> dict[int, int]:
        """Rank -> ratio, of those below the whole; none where no block is left to factor."""
        if self.first_block >= spec.blocks:
            return {}
        found: dict[int, int] = {}
        for ratio in self.ratios[1:]:
            found.setdefault(max(1, round(spec.embed / ratio)), ratio)
        return found

    def encode(self, params: Params, spec: Spec, plan: Plan, turn: Turn, memory: Params) -> Params:
        """The largest singular values of each weight and their vectors; all else as it is."""
        layout = model.layout(plan.runs(spec))
        device: Params = {}
        for name in layout.params:
            stem, _, end = name.rpartition(".")
            if end in ("coef", "basis"):
                coef, basis = _svd(params[f"{stem}.weight"], as_matrix(stem, params[f"{stem}.weight"]))
                rank = layout.sizes[Axis(f"{stem}.rank")]
                part = coef[:, :rank] if end == "coef" else basis[:rank]
                device[name] = part.clone(memory_format=torch.contiguous_format).reshape(layout.shape(name))
            else:
                device[name] = params[name]
        return device

    def decode(self, update: Update, job: Job, spec: Spec) -> Vote:
        """The factors multiplied out."""
        vote = super().decode(update, job, spec)
        if not (network := job.plan.network):
            return vote
        assert network.factored
        whole = next(self.plans(spec, job.turn, {}))
        arrays = model.merged(network, update.arrays)[1]
        return Ranked(vote.device, whole, arrays, vote.weight, self._ranks(spec)[network.factored.rank])

    def merge(
        self, params: Params, spec: Spec, votes: Iterable[Vote], turn: Turn, memory: Params
    ) -> tuple[Params, Params]:
        """The mean of whole weights, of the global network too where all votes are of low rank."""
        if self.history or self.dynamic:
            votes = self._weighed(list(votes), params)
        return super().merge(params, spec, votes, turn, memory)

    def _weighed(self, votes: list[Vote], params: Params) -> list[Vote]:
        """With that of the global network, if it has one; and with weights that fall with the rank, if they do."""
        ratios = [vote.ratio if isinstance(vote, Ranked) else 1 for vote in votes]
        if self.history and min(ratios) > 1:
            weight = fmean(vote.weight for vote in votes)
            votes, ratios = [Vote(-1, votes[0].plan, params, weight), *votes], [1, *ratios]
        if not self.dynamic:
            return votes
        shares = [math.exp((min(ratios) - ratio) / self.temperature) for ratio in ratios]
        return [replace(vote, weight=vote.weight * each) for vote, each in zip(votes, shares, strict=True)]

    def pull(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: Ops) -> None:
        """Frobenius decay of the product: lambda C (B B') and lambda (C' C) B; lambda W where it is whole."""
        if not self.decay:
            return
        for name, p in params.items():
            stem, _, end = name.rpartition(".")
            if end == "coef":
                basis = params[f"{stem}.basis"]
                coef_OR, basis_RI = p.reshape(-1, len(basis)), basis.flatten(1)
                ops.pull_product(p, coef_OR, ops.gram(basis_RI, rows=True), self.decay)
                ops.pull_product(basis, ops.gram(coef_OR, rows=False), basis_RI, self.decay)
            elif end == "weight" and self._linear(stem):
                ops.pull(p, (p, self.decay))

    def _linear(self, stem: str) -> bool:
        """Whether a module is a linear layer that is in factors on weaker devices."""
        home, *place = stem.split(".", 2)
        return home == "h" and place[1] in LINEARS and int(place[0]) >= self.first_block


_KNOWN = WeakTensorKeyDictionary()
"""Weight -> its factors, for as long as the weight is anywhere: global tensors are never changed in place."""


def _svd(weight: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """C = U sqrt(S) and B = sqrt(S) V' of a weight as a matrix; the largest values first."""
    if weight not in _KNOWN:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        _KNOWN[weight] = u * s.sqrt(), s.sqrt()[:, None] * v
    factors: tuple[Tensor, Tensor] = _KNOWN[weight]
    return factors


@dataclass(frozen=True)
class Flanc(Method):
    """Each linear layer is a basis that all widths share times coefficients that each width has for itself.

    W = [C_1 B, ..., C_G B] with B [n, g] for groups of g inputs. A device of width w has the first w H heads and w F
    feed-forward units per block, rounded up, and the whole residual stream; heads are those of keys, with the queries
    that share them. The server takes the mean of B over all
    participants, and that of everything else (coefficients, biases, norms, embeddings, head) over those of one width.
    The loss gains lambda MSE(B B', I) per basis, summed; with f = (lambda / n^2) sum_ab (B B' - I)_ab^2 and B B'
    symmetric, its gradient is (4 lambda / n^2) (B B' - I) B.

    A pretrained W has to be fitted first: B gets the n leading right-singular vectors of all groups of the layer's
    weights in all widths, stacked, and C = W B'. That loses what lies outside: on novels-6 with groups of a head (g =
    32), n / g of 15/16, 7/8, 3/4, 1/2 and 1/4 leave mean relative errors of 0.15, 0.22, 0.34, 0.54 and 0.74 per
    layer, and take the loss on Shakespeare from 1.60 nats to 1.68, 1.82, 2.24, 3.16 and 3.82. Smaller groups lose
    more (g = 8: 2.17, 2.95, 3.60 and 3.50 at 7/8 to 1/4). With n = g nothing is lost, and the basis is a rotation.

    **Source:** Mei, Guo, Zhou and Patel, NeurIPS 2022 (FLANC); constants and server of the authors' code.
    **Departs:** pretrained weights in the place of a random orthogonal basis, and so n = g, one group a head. The
    authors' 0.25 C vectors of 9 * 0.125 C elements are n / g = 0.22, which loses nearly all of a pretrained network.
    Budgets decide the width; the authors draw it and redraw until every width occurs in every round, which fixed
    devices cannot promise: where no device has the full width, its coefficients stay while the bases move, and it is
    the full width that is evaluated. Each width's own tensors learn from its own devices alone.

    Attributes:
        weighting: A device counts by its "examples", or all count the same ("uniform"), as in the authors' code.
        widths: Shares of heads and feed-forward units, falling from 1.
        basis_fraction: Most that a group may have of the width D; g is the largest common divisor of D, the size of a
            head and F up to it.
        n_basis: n / g, rounded up to a whole n.
        orthogonality: lambda.
    """

    weighting: Literal["examples", "uniform"] = "uniform"
    widths: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    basis_fraction: float = 1.0
    n_basis: float = 1.0
    orthogonality: float = 10.0

    group: ClassVar[str] = "width"
    source: ClassVar[str] = "Mei et al. 2022"
    cuts: ClassVar[str] = "heads and feed-forward units"
    note: ClassVar[str] = (
        "Narrow devices save weights and activations alike, but the residual stream; what comes out of the bases is"
        " kept too, so the full width takes more than plain training of everything."
    )

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        falling = sorted(set(self.widths), reverse=True) == list(self.widths)
        if self.widths[:1] != (1.0,) or not falling or self.widths[-1] <= 0:
            raise ValueError(f"widths must fall from 1 and stay above 0, got {list(self.widths)}")
        for key in ("basis_fraction", "n_basis"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"{key} must be in (0, 1], got {getattr(self, key)}")
        if self.orthogonality < 0:
            raise ValueError(f"orthogonality must not be negative, got {self.orthogonality}")

    def adapt(self, spec: Spec) -> Spec:
        """Put the linear layers in factors."""
        common = math.gcd(spec.embed, spec.head_dim, spec.ffn)
        most = max(1.0, self.basis_fraction * spec.embed)
        group = max(size for size in range(1, common + 1) if common % size == 0 and size <= most)
        return replace(spec, factored=Factored(share(group, self.n_basis), group))

    def networks(self, spec: Spec) -> dict[float, Spec]:
        """The network of each width, widest first; of widths that come to the same, the widest."""
        assert spec.factored
        group = spec.factored.inputs
        found: dict[Spec, float] = {}
        for width in self.widths:
            heads, ffn = share(spec.kv_heads or spec.heads, width), group * share(spec.ffn // group, width)
            found.setdefault(replace(grouped(spec, heads), ffn=ffn), width)
        return {width: network for network, width in found.items()}

    def equip(self, spec: Spec, params: Params, pretrained: Params) -> Params:
        """Fit bases and coefficients to the pretrained weights."""
        assert spec.factored
        layout, group, rank = model.layout(spec), spec.factored.inputs, spec.factored.rank
        plain = [model.layout(replace(network, factored=None)) for network in self.networks(spec).values()]
        made = dict(params)
        for stem in (f"h.{i}.{short}" for i in range(spec.blocks) for short in spec.linears):
            weight = pretrained[f"{stem}.weight"].double()
            parts = (weight[_leading(each.shape(f"{stem}.weight"))].reshape(-1, group) for each in plain)
            gram = sum((part.T @ part for part in parts), start=weight.new_zeros(group, group))
            basis = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank].T.contiguous()
            made[f"{stem}.basis"] = basis.float()
            made[f"{stem}.coef"] = (weight.reshape(-1, group) @ basis.T).reshape(layout.shape(f"{stem}.coef")).float()
        return made

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """What each narrower width has for itself, at first cut out of the full width's."""
        return {
            f"{width:g}/{name}": params[name][_leading(model.layout(network).shape(name))].clone()
            for width, network in self.networks(spec).items()
            if network != spec
            for name in _own(network)
        }

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """The widths."""
        for width, network in self.networks(spec).items():
            names = frozenset(model.layout(network).params)
            yield Plan(names, names, label=f"width {width:g}", network=None if network == spec else network)

    def encode(self, params: Params, spec: Spec, plan: Plan, turn: Turn, memory: Params) -> Params:
        """The bases, and what is the width's own."""
        network = plan.runs(spec)
        own = self._held(params, spec, network, memory)
        return {name: own.get(name, params[name]) for name in model.layout(network).params}

    def _held(self, params: Params, spec: Spec, network: Spec, memory: Params) -> Params:
        """A width's own tensors."""
        if network == spec:
            return {name: params[name] for name in _own(network)}
        width = next(width for width, each in self.networks(spec).items() if each == network)
        return {name: memory[f"{width:g}/{name}"] for name in _own(network)}

    def merge(
        self, params: Params, spec: Spec, votes: Iterable[Vote], turn: Turn, memory: Params
    ) -> tuple[Params, Params]:
        """The mean of the bases over all votes, of the rest over those of each width."""
        bases = frozenset(model.layout(spec).params) - _own(spec)
        shared = Overlap(params, model.layout(spec), self.absent)
        of_width = {
            network: Overlap(self._held(params, spec, network, memory), model.layout(network), self.absent)
            for network in self.networks(spec).values()
        }
        for vote in votes:
            shared.add(_only(vote, bases))
            network = vote.plan.runs(spec)
            of_width[network].add(_only(vote, _own(network)))
        after, kept = shared.mean(), dict(memory)
        for width, network in self.networks(spec).items():
            own = of_width[network].mean()
            if network == spec:
                after |= own
            else:
                kept |= {f"{width:g}/{name}": tensor for name, tensor in own.items()}
        return after, kept

    def pull(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: Ops) -> None:
        """Towards orthonormal bases: (4 lambda / n^2) (B B' - I) B."""
        if not self.orthogonality:
            return
        for name, p in params.items():
            if name.endswith(".basis"):
                factor = 4 * self.orthogonality / len(p) ** 2
                ops.pull_product(p, ops.gram(p, rows=True), p, factor)
                ops.pull(p, (p, -factor))


def _leading(shape: Sequence[int]) -> tuple[slice, ...]:
    """The first so many indices of every dimension."""
    return tuple(map(slice, shape))


def _own(network: Spec) -> frozenset[str]:
    """Names of all but the bases."""
    return frozenset(name for name in model.layout(network).params if not name.endswith(".basis"))


def _only(vote: Vote, names: frozenset[str]) -> Vote:
    """What a vote says about some tensors."""
    return replace(vote, plan=replace(vote.plan, holds=names, trains=names))
