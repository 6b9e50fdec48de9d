"""Methods that cut the width: every device trains a narrower network, all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lamina import model
from lamina.coding import Coding
from lamina.job import Job, Turn, Update
from lamina.layout import Axis, Params
from lamina.methods.base import Method, Objective, grouped, share
from lamina.ops import Ops
from lamina.plan import Keep, Plan, Vote, narrow
from lamina.spec import Spec

if TYPE_CHECKING:
    from lamina.planner import Fleet

_EMBED, _HEAD_DIM, _POOLED = Axis("embed"), Axis("head_dim"), Axis("pooled")
_LABELS = "labels"


@dataclass(frozen=True)
class Width(Method):
    """Of each cut axis of n units a device of ratio r holds and trains ceil(r n); the merge is over its holders.

    Attributes:
        ratios: The widths there are, falling; a device gets the largest that fits its budget.
        scope: What is cut: the feed-forward units and the heads of every block ("inner"), or the residual stream, and
            the pooler of a classifier, as well ("full"). Heads of queries that share one of keys go with it.
    """

    ratios: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    scope: Literal["inner", "full"] = "inner"

    group: ClassVar[str] = "width"
    cuts: ClassVar[str] = "feed-forward units and heads, or the residual stream too"
    inside_heads: ClassVar[bool] = False
    """Whether cutting in full takes dimensions from every head instead of taking whole heads, where these do not belong
    together."""

    def __post_init__(self) -> None:
        """Refuse widths that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        within = self.ratios and all(0 < ratio <= 1 for ratio in self.ratios)
        if not within or any(wider <= narrower for wider, narrower in pairwise(self.ratios)):
            raise ValueError(f"ratios must fall, each above 0 and at most 1, got {list(self.ratios)}")

    def widths(self, spec: Spec) -> dict[float, dict[Axis, int]]:
        """Ratio -> units held of each axis that can be cut; a ratio that comes to no fewer units is left out."""
        sizes, full = model.layout(spec).sizes, self.scope == "full"
        inside = full and self.inside_heads and not (spec.rotary or spec.qk_norm)
        heads = [] if inside else [Axis(f"h.{i}.heads") for i in range(spec.blocks)]
        axes = [*heads, *(Axis(f"h.{i}.ffn") for i in range(spec.blocks))]
        axes += [_EMBED, *[_POOLED] * (_POOLED in sizes)] * full + [_HEAD_DIM] * inside
        found: dict[float, dict[Axis, int]] = {}
        for ratio in self.ratios:
            units = {axis: share(sizes[axis], ratio) for axis in axes}
            if units not in found.values():
                found[ratio] = units
        return found

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """All tensors at each width."""
        layout = model.layout(spec)
        names, whole = frozenset(layout.params), self.whole(spec, memory)
        for ratio, units in self.widths(spec).items():
            cut = {axis: count for axis, count in units.items() if count < layout.sizes[axis]}
            keep = {axis: self.keeps(axis, count, layout.sizes[axis], turn) for axis, count in cut.items()}
            label = f"width {Fraction(ratio).limit_denominator(1000)}"
            yield Plan(names, names, keep, label, network=self.runs(spec, ratio / whole))

    def whole(self, spec: Spec, memory: Params) -> float:
        """The width of the network that is evaluated."""
        return 1.0

    def keeps(self, axis: Axis, count: int, size: int, turn: Turn) -> Keep:
        """Which units of an axis a device holds; by default the first."""
        return Keep(count)

    def runs(self, spec: Spec, ratio: float) -> Spec | None:
        """The device's network, if it is not simply the server's, cut; `ratio` is of what is evaluated."""
        return None


@dataclass(frozen=True)
class FederatedDropout(Width):
    """Each device trains random units of every axis, drawn anew in every round, and may send its change coded.

    **Source:** Caldas, Konecny, McMahan and Talwalkar, arXiv 1812.07210, sections 3.1 and 3.2; `lamina.coding` has the
    coding.
    **Departs:** the paper drops units of dense and convolutional layers; here they are feed-forward units and whole
    heads, and by default the residual stream stays as it is ("full" drops its channels, alike in all tensors, and whole
    heads). The width follows the budget instead of being the same for all. A scalar becomes the mean over the devices
    that held it. Only what devices send is coded, not what they receive.

    Attributes:
        rotate: Whether the change of each tensor is rotated before it is coded further.
        subsample: Share of the elements of each change that are sent.
        bits: For each element that is sent: 1, 2, 4 or 8; 0 sends fp32.
    """

    rotate: bool = False
    subsample: float = 1.0
    bits: int = 0

    source: ClassVar[str] = "Caldas et al. 2018"
    note: ClassVar[str] = (
        'Weights and what blocks keep inside fall with the width, the residual stream only with scope = "full", the '
        "logits never. A pretrained network loses most of what it knows with half of its units, and all but the "
        "frequencies of tokens with half of its residual stream. Coded uploads need a copy of the trained weights."
    )

    def __post_init__(self) -> None:
        """Refuse codings that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if not 0 < self.subsample <= 1:
            raise ValueError(f"subsample must be above 0 and at most 1, got {self.subsample}")
        if self.bits not in (0, 1, 2, 4, 8):
            raise ValueError(f"bits must be 0, 1, 2, 4 or 8, got {self.bits}")

    @property
    def coding(self) -> Coding | None:
        """How changes are sent; None as new values."""
        coding = Coding(self.rotate, self.subsample, self.bits)
        return None if coding == Coding() else coding

    def keeps(self, axis: Axis, count: int, size: int, turn: Turn) -> Keep:
        """Random ones."""
        drawn = turn.rng(f"units/{axis}").choice(size, count, replace=False)
        return Keep(count, units=tuple(sorted(drawn.tolist())))

    def coded(self, plan: Plan) -> Coding | None:
        """How changes are sent; None where new values are, or slopes."""
        return None if plan.gradient == "zeroth" else self.coding

    def sends(self, spec: Spec, plan: Plan, steps: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """New values, or their changes as `lamina.coding` has them."""
        sends = super().sends(spec, plan, steps)
        if not (coding := self.coded(plan)):
            return sends
        parts = (coding.sends(name, torch.Size(shape).numel()) for name, (shape, _) in sends.items())
        return {name: part for each in parts for name, part in each.items()}

    def remember(self, job: Job, params: Mapping[str, Tensor], ops: Ops) -> Params:
        """What changes are changes of."""
        return (
            {name: ops.copy(params[name]) for name in params if name in job.plan.trains} if self.coded(job.plan) else {}
        )

    def finish(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: Ops) -> tuple[Params, Params]:
        """New values, or their changes, coded one after the other."""
        if not (coding := self.coded(job.plan)):
            return super().finish(job, params, aside, ops)
        sent: Params = {}
        for name in list(aside):
            sent |= ops.code(coding, name, params[name], aside.pop(name), job.turn)
        return sent, {}

    def decode(self, update: Update, job: Job, spec: Spec) -> Vote:
        """What was held and the change that arrived."""
        vote = super().decode(update, job, spec)
        if not (coding := self.coded(job.plan)):
            return vote
        new = {name: coding.decode(name, update.arrays, job.arrays[name], job.turn) for name in job.plan.trains}
        return replace(vote, arrays=new)


@dataclass(frozen=True)
class Scaled(Width):
    """What HeteroFL and what was built on it share: sliced heads, scaled outputs, and only the logits of own tokens.

    In training, the outputs of the embeddings and of all linear layers in the blocks are divided by r over the width of
    the network that is evaluated, so that they are about as large as there.

    Attributes:
        scaler: Whether outputs are divided in training by a device's width, as a part of what is evaluated.
        own_labels: Whether the logits of tokens that a device never has to predict are 0 in its loss, and its rows of
            these tokens, in embedding and head, do not count.
    """

    weighting: Literal["examples", "uniform"] = "uniform"
    scope: Literal["inner", "full"] = "full"
    scaler: bool = True
    own_labels: bool = False

    inside_heads: ClassVar[bool] = True
    note: ClassVar[str] = (
        "All falls with the width but the logits and what attention keeps per head. But layer norms see a cut residual "
        "stream: half of a pretrained network knows little more than the frequencies of tokens. "
        'scope = "inner" leaves the stream whole, which loses and saves less. Heads with rotary positions, whose '
        "dimensions turn in pairs, or with norms of their own are dropped whole."
    )

    def runs(self, spec: Spec, ratio: float) -> Spec | None:
        """With the scaler."""
        return replace(spec, scale=ratio) if self.scaler and ratio < 1 else None

    def objective(self, job: Job) -> Objective:
        """Cross-entropy, among the device's own tokens where asked."""
        return Objective(own_labels=self.own_labels)

    def sends(self, spec: Spec, plan: Plan, steps: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What it trains, and a byte per token: whether it is one of the device's own."""
        labels = {_LABELS: ((spec.outputs,), torch.bool)} if self.own_labels else {}
        return super().sends(spec, plan, steps) | labels

    def finish(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: Ops) -> tuple[Params, Params]:
        """The same."""
        sent, kept = super().finish(job, params, aside, ops)
        return sent | ({_LABELS: aside[_LABELS]} if self.own_labels else {}), kept

    def decode(self, update: Update, job: Job, spec: Spec) -> Vote:
        """What it holds; of the tokens that are not the device's own, nothing."""
        vote = super().decode(update, job, spec)
        if not self.own_labels:
            return vote
        own, layout, outputs = update.arrays[_LABELS].nonzero().flatten(), model.layout(spec), spec.output_axis
        arrays: Params = {}
        for name in job.plan.trains:
            axes = layout.params[name].axes
            array = update.arrays[name]
            arrays[name] = array.index_select(axes.index(outputs), own) if outputs in axes else array
        keep = {**job.plan.keep, outputs: Keep(len(own), units=tuple(own.tolist()))}
        return replace(vote, plan=replace(job.plan, keep=keep), arrays=arrays)


class Nested(Width):
    """Widths of which each is the beginning of the wider ones: what nobody can train is not evaluated either."""

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """Place of the width of the widest plan that some device has."""
        keeps = [plan.keep for plan in self.plans(spec, Turn(0, 0, 1), {})]
        taken = (plan for group in set(fleet.class_of) if (plan := fleet.plans[group]))
        return {"widest": torch.tensor(min(keeps.index(plan.keep) for plan in taken))}

    def whole(self, spec: Spec, memory: Params) -> float:
        """That width; 1 before it is known."""
        return list(self.widths(spec))[int(memory["widest"])] if memory else 1.0

    def deploy(self, spec: Spec, params: Params, turn: Turn, memory: Params) -> tuple[Spec, Params]:
        """That width of the network, without a scaler."""
        plan = list(self.plans(spec, turn, {}))[int(memory["widest"])]
        sizes = {axis: kept.count for axis, kept in plan.keep.items()}
        narrower = replace(
            grouped(spec, sizes.get(Axis("h.0.heads"), spec.kv_heads or spec.heads)),
            embed=sizes.get(_EMBED, spec.embed),
            head_dim=sizes.get(_HEAD_DIM, spec.head_dim),
            ffn=sizes.get(Axis("h.0.ffn"), spec.ffn),
        )
        return narrower, narrow(params, model.layout(spec), plan)


@dataclass(frozen=True)
class HeteroFL(Scaled, Nested):
    """Each device trains the first ceil(r n) channels of everything; every head keeps its first dimensions.

    The network that is evaluated and handed out is the widest that some device can train.

    **Source:** Diao, Ding and Tarokh, ICLR 2021, section 3; their code for what it does to Transformers: all heads
    stay, each sliced, the softmax has the temperature of the sliced head, and all devices count the same.
    **Departs:** networks are those at hand, without their hidden layer before the logits. Prices have the scaler for
    all but width 1, also where the widest of the fleet is narrower and does without. "inner" cuts whole heads and
    feed-forward units and leaves the residual stream as it is; so heads are cut with "full" too where they have rotary
    positions, since dimensions i and i + K / 2 of a head turn together, or norms of queries and keys. A device also
    sends which tokens or classes are its own, a byte each. Clip the gradient at 1 (`local.clip`) as they do.
    """

    own_labels: bool = True

    source: ClassVar[str] = "Diao et al. 2021"


@dataclass(frozen=True)
class FedRolex(Scaled):
    """HeteroFL whose window of channels rolls on by `stride` in every round, so that all of the network is trained.

    Of an axis of n units, a device of ratio r holds (t * stride + i) mod n for i < ceil(r n) in round t; the whole
    network is evaluated.

    **Source:** Alam, Liu, Yan and Zhang, NeurIPS 2022, section 3.2 and Algorithm 1.
    **Departs:** the window rolls inside each head, since one that rolled over all channels at once would mix
    neighbouring heads, and over whole heads where HeteroFL drops those. Their code for Transformers masks labels as
    HeteroFL does, of which the rule says nothing (`own_labels`). One step per round needs n rounds to sweep an axis,
    more than finetuning has; `stride` may be more.

    Attributes:
        stride: Units by which the window moves from round to round.
    """

    stride: int = 1

    source: ClassVar[str] = "Alam et al. 2022"

    def __post_init__(self) -> None:
        """Refuse a window that cannot roll.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")

    def keeps(self, axis: Axis, count: int, size: int, turn: Turn) -> Keep:
        """Those from where the round begins on, around the end."""
        return Keep(count, turn.round * self.stride % size)


@dataclass(frozen=True)
class Fjord(Nested):
    """Each step trains the first units of a width drawn at random among those that the device can train.

    With distillation a step has two passes: the device's whole network learns from the targets, then the width drawn
    learns from what the whole one predicts, KL(p_whole || p_width); one update along the sum of both gradients. The
    network that is evaluated and handed out is the widest that some device can train.

    **Source:** Horvath, Laskaridis, Almeida, Leontiadis, Venieris and Lane, NeurIPS 2021, sections 3.2 to 3.4, and
    their code in Flower's baselines. Their temperature and mixing weight are 1, as here. Their nested rule (for each
    width, widest first, overwrite its units with the mean over all devices that hold them) is the overlap mean.
    **Departs:** heads are dropped whole. Token and position embeddings and the head are never cut along the vocabulary,
    and with "inner" not at all. Layer norms have one set of weights for all widths. They evaluate every width.

    Attributes:
        distill: Whether the whole network teaches the width drawn, which otherwise learns from the targets.
    """

    distill: bool = True

    source: ClassVar[str] = "Horvath et al. 2021"
    note: ClassVar[str] = (
        "The widest network that a device trains sets its memory; distillation adds logits. A pretrained network loses "
        'most of what it knows with half of its units, and with scope = "full" all but the frequencies of tokens.'
    )

    def runs(self, spec: Spec, ratio: float) -> Spec | None:
        """The server's, by which the device knows how many units its narrower widths have."""
        return spec

    def objective(self, job: Job) -> Objective:
        """The device's widths; with distillation unless there is but one, which would teach itself."""
        plan = job.plan
        assert plan.network
        sizes = model.layout(plan.network).sizes
        own = {axis: plan.keep[axis].count if axis in plan.keep else size for axis, size in sizes.items()}
        widths = self.widths(plan.network).values()
        allowed = [units for units in widths if all(count <= own[axis] for axis, count in units.items())]
        return Objective(widths=tuple(allowed), distill=self.distill and len(allowed) > 1)
