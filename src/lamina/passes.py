"""Forward, backward and update of one device's network, in as many pieces as its levers and its method ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from lamina import model
from lamina.job import Job
from lamina.kernels import Mix
from lamina.layout import Axis, Layout, Params
from lamina.methods.base import Objective
from lamina.model import Batch, Output
from lamina.ops import Ops
from lamina.spec import Spec

_INPUT, _TOP, _FORK = -1, -2, -3
"""Stages of a step besides the blocks: the embedding, the final norm with the head, and where groups begin."""


class Group:
    """Trained tensors that are updated together."""

    def __init__(self, spec: Spec, params: Mapping[str, Tensor], job: Job, aside: Params, ops: Ops) -> None:
        """With an optimizer of their own."""
        local = job.local
        self.params, self._job, self._aside, self._ops = params, job, aside, ops
        kind = job.plan.levers.optimizer if local.kind == "adamw" else ""
        rated = local.rated(job.turn, model.layout(spec), params)
        self._optimizer = ops.optimizer(rated, local, kind or local.kind)

    def complete(self) -> None:
        """Add to the gradient of the loss that of the method's penalties."""
        self._ops.moment("update")
        self._job.method.pull(self._job, self.params, self._aside, self._ops)

    def norm(self) -> Tensor:
        """Of the gradient."""
        return self._ops.norm_of([p.grad for p in self.params.values() if p.grad is not None])

    def update(self, norm: Tensor | None = None) -> None:
        """Move along the gradient, clipped as if the whole one had this norm, by default its own, and drop it."""
        if self._job.local.clip:
            params = list(self.params.values())
            self._ops.clip(params, self._job.local.clip, self.norm() if norm is None else norm)
        self._optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradient."""
        self._optimizer.zero_grad()


class _Cut(Mapping[str, Tensor]):
    """The leading units of some axes of a network's tensors, as views."""

    def __init__(self, params: Mapping[str, Tensor], layout: Layout, units: Mapping[Axis, int], ops: Ops) -> None:
        self._params, self._layout, self._units, self._ops = params, layout, units, ops

    def __getitem__(self, name: str) -> Tensor:
        """A view on which gradients reach the whole."""
        whole, axes = self._params[name], self._layout.params[name].axes
        return self._ops.leading(
            whole, [self._units.get(axis, size) for axis, size in zip(axes, whole.shape, strict=True)]
        )

    def __contains__(self, name: object) -> bool:
        return name in self._params

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def groups_of(spec: Spec, job: Job, params: Params, aside: Params, ops: Ops) -> dict[int, Group]:
    """What is updated together: all of it, or, with fused updates, what a stage trains."""
    layout, plan = model.layout(spec), job.plan
    names: dict[int, list[str]] = {}
    for name in (name for name in layout.params if name in plan.trains):
        row = layout.params[name]
        outside = row.block is None or row.part == "exit"
        stage = _INPUT if row.part == "embed" else _TOP if outside else cast(int, row.block)
        names.setdefault(stage if plan.levers.fused_update else _TOP, []).append(name)
    return {
        stage: Group(spec, {name: params[name] for name in found}, job, aside, ops) for stage, found in names.items()
    }


class _Stage(NamedTuple):
    """A part of a step that backward goes through in one go: from `out`, or by running `block` again from `leaf`."""

    block: int
    leaf: Tensor | None
    out: Tensor | None


class _Pass(NamedTuple):
    """One of the forward passes that make up a step.

    Attributes:
        params: Of the network that passes.
        stages: Lowest first; whoever goes through them empties them.
        hides: What attention adds to its scores; see `model.Batch`.
        loss: Mean loss, without a graph.
        share: Of the pass in the gradient.
        counted: Whether its loss is what is reported.
        last: Whether no other follows.
    """

    params: Mapping[str, Tensor]
    stages: list[_Stage]
    hides: Tensor | None
    loss: Tensor
    share: float
    counted: bool
    last: bool


class Passes:
    """Forward passes of one device's network."""

    def __init__(
        self,
        spec: Spec,
        job: Job,
        params: Mapping[str, Tensor],
        aside: Params,
        objective: Objective,
        cached: bool,
        ops: Ops,
    ) -> None:
        """Of a job's network, of which `cached` says whether the frozen prefix has run already."""
        layout, plan = model.layout(spec), job.plan
        self._spec, self._params, self._ops, self._levers = spec, params, ops, plan.levers
        if plan.gradient != "backward":  # nothing is kept for backward, and nothing is to be run again
            self._levers = replace(plan.levers, fused_update=False, recompute=False)
        self._cached, self._objective, self._labels = cached, objective, aside.get("labels")
        first, blocks = plan.first_trained(layout), model.found_blocks(spec, params)
        self._first, self._exits = first, [i for i in model.found_exits(spec, params) if i >= first - 1]
        self._frozen = [i for i in blocks if i < first]
        self._upper = [i for i in blocks if first <= i <= self._exits[-1]]
        self._drawable = [_Cut(params, layout, units, ops) for units in objective.widths]
        self._turn = job.turn
        self._trained = {row.block for name, row in layout.params.items() if name in plan.trains and row.part != "exit"}

    def networks(self, number: int) -> Iterator[list[Mapping[str, Tensor]]]:
        """Networks of the same tensors that pass in a step, the first of which teaches; a price is of all."""
        if not self._drawable:
            yield [self._params]
            return
        index = int(self._turn.rng(f"width/{number}").integers(len(self._drawable)))
        for drawn in self._ops.drawn(self._drawable, index):
            yield [*[self._params] * self._objective.distill, drawn]

    def losses(self, number: int, inputs: Batch, targets_BS: Tensor) -> Iterator[tuple[Tensor, float, bool]]:
        """Mean loss of each pass of a step, its share, and whether it is the one that is reported."""
        for networks in self.networks(number):
            for each in self.passes(networks, inputs, targets_BS):
                loss = each.stages.pop().out
                assert loss is not None
                yield loss, each.share, each.counted

    def passes(self, networks: Sequence[Mapping[str, Tensor]], inputs: Batch, targets_BS: Tensor) -> Iterator[_Pass]:
        """Forward, in as many passes as a step takes."""
        count = len(targets_BS)
        for rows in self._ops.slices(count, self._levers.micro_batch or count):
            share = (rows.stop - rows.start) / count
            teacher: Output | None = None
            given = inputs[rows]
            for place, params in enumerate(networks, 1):
                stages, hides, loss, output = self._forward(params, given, targets_BS[rows], teacher)
                teacher = output if place < len(networks) else None
                del output
                yield _Pass(params, stages, hides, loss, share, place == 1, rows.stop == count and not teacher)
                del stages, hides, loss

    def _forward(
        self, params: Mapping[str, Tensor], inputs: Batch, targets_BS: Tensor, teacher: Output | None
    ) -> tuple[list[_Stage], Tensor | None, Tensor, Output | None]:
        """The stages of a pass, what hides, its mean loss, and the output that is to teach, both without a graph."""
        hides = inputs.hides(self._spec, self._spec.length(inputs.x.shape[1]), self._ops)
        x_BSD, levers, lengths_B = self._bottom(params, inputs.x, hides), self._levers, inputs.lengths_B
        self._ops.moment("forward")
        stages: list[_Stage] = []
        staged = levers.recompute or levers.fused_update
        outputs: list[Output] = []
        if staged and x_BSD.requires_grad:
            stages.append(_Stage(_INPUT, None, x_BSD))

        def cut() -> Tensor:
            """Where one stage ends and those above it begin: blocks and exits share the leaf, and so its gradient."""
            return x_BSD.detach().requires_grad_(bool(stages)) if staged else x_BSD

        x_BSD = cut()
        if self._first - 1 in self._exits:
            outputs.append(Output(x_BSD, self._first - 1, params, False, lengths_B))
        for block in self._upper:
            leaf, x_BSD = x_BSD, model.forked(self._spec, x_BSD, block, self._ops)
            if staged and x_BSD is not leaf:
                stages += [_Stage(_FORK, leaf, x_BSD)] * bool(stages)
                x_BSD = cut()
            leaf = x_BSD
            run = self._run_slices if levers.recompute else self._run
            x_BSD = run(params, leaf, block, hides)
            if staged and (stages or block in self._trained):
                stages.append(_Stage(block, leaf, None if levers.recompute else x_BSD))
            x_BSD = cut()
            if block in self._exits:
                outputs.append(Output(x_BSD, block, params, False, lengths_B))
        if self._spec.blocks in self._exits:
            outputs.append(Output(x_BSD, self._spec.blocks, params, False, lengths_B))
        self._ops.moment("loss")
        loss = self._loss(outputs, targets_BS, teacher)
        stages.append(_Stage(_TOP, x_BSD if staged else None, loss))
        if not self._objective.distill:
            return stages, hides, loss.detach(), None  # nothing may live longer than backward needs it
        return stages, hides, loss.detach(), replace(outputs[-1], x_BSD=outputs[-1].x_BSD.detach(), fixed=True)

    def _loss(self, outputs: list[Output], targets_BS: Tensor, teacher: Output | None) -> Tensor:
        count, mutual, mix = len(outputs), self._objective.mutual, None
        if teacher:
            outputs, mix = [outputs[-1], teacher], Mix((0.0, 0.0), ((0.0, 1.0), (0.0, 0.0)))
        elif count > 1:
            others = mutual / (count - 1)
            mix = Mix((1.0,) * count, tuple(tuple(others * (i != j) for j in range(count)) for i in range(count)))
        return model.loss(self._spec, outputs, targets_BS, mix, self._labels, self._levers.chunked_loss, self._ops)

    def _bottom(self, params: Mapping[str, Tensor], x: Tensor, hides: Tensor | None) -> Tensor:
        """What the lowest trained block sees, BSD; with a graph only if the embedding trains."""
        if self._cached:
            return x
        self._ops.moment("prefix" if self._frozen else "forward")
        x_BSD = model.embed(self._spec, params, x, self._ops)
        with torch.no_grad():
            for block in self._frozen:
                x_BSD = model.forked(self._spec, x_BSD, block, self._ops)
                run = self._run_slices if self._levers.recompute else self._run
                x_BSD = run(params, x_BSD, block, hides)
        return x_BSD

    def _run(self, params: Mapping[str, Tensor], x_BSD: Tensor, block: int, hides: Tensor | None) -> Tensor:
        return model.run_blocks(self._spec, params, x_BSD, [block], self._ops, hides)

    @torch.no_grad()
    def _run_slices(self, params: Mapping[str, Tensor], x_BSD: Tensor, block: int, hides: Tensor | None) -> Tensor:
        """A block on a few sequences at a time, without a graph."""
        out_BSD = self._ops.empty_like(x_BSD)
        for rows in self._few(x_BSD):
            out_BSD[rows] = self._run(params, x_BSD[rows], block, _rows_of(hides, rows))
        return out_BSD

    def _few(self, x_BSD: Tensor) -> Iterator[slice]:
        return self._ops.slices(x_BSD.shape[0], self._ops.few(x_BSD.shape[1]))


class Trainer(Passes):
    """Forward, backward and update of one device's network.

    Without levers a step is one graph. Recomputing and fused updates cut it at the blocks: each block then starts at a
    leaf of its own, and backward goes from stage to stage.
    """

    def __init__(
        self, spec: Spec, job: Job, params: Params, aside: Params, objective: Objective, cached: bool, ops: Ops
    ) -> None:
        """As for `Passes`."""
        super().__init__(spec, job, params, aside, objective, cached, ops)
        self._groups, self._clip = groups_of(spec, job, params, aside, ops), job.local.clip

    def step(self, number: int, inputs: Batch, targets_BS: Tensor) -> float:
        """One optimizer step on a batch; returns its mean loss."""
        loss = 0.0
        for networks in self.networks(number):
            loss = self._step(networks, inputs, targets_BS)
        return loss

    def _step(self, networks: Sequence[Mapping[str, Tensor]], inputs: Batch, targets_BS: Tensor) -> float:
        """A step along the sum of the gradients of some networks of the same tensors."""
        norm: Tensor | None = None
        if self._clip and self._levers.fused_update:
            # The norm of the whole gradient must be known before the first block is updated.
            norms: list[Tensor] = []

            def note(group: Group) -> None:
                norms.append(group.norm())
                group.forget()

            self._gradients(networks, inputs, targets_BS, note)
            norm = self._ops.norm_of(norms)
        return self._gradients(networks, inputs, targets_BS, lambda group: group.update(norm))

    def _gradients(
        self,
        networks: Sequence[Mapping[str, Tensor]],
        inputs: Batch,
        targets_BS: Tensor,
        finish: Callable[[Group], None],
    ) -> float:
        """Gradients of a batch, in as many passes as it takes; `finish` gets each group once it has its own."""
        total = 0.0
        for each in self.passes(networks, inputs, targets_BS):
            total += each.share * each.loss.item() if each.counted else 0.0
            fused = self._levers.fused_update and each.last
            self._backward(each, finish if fused else None)
        if not self._levers.fused_update:
            self._groups[_TOP].complete()
            finish(self._groups[_TOP])
        return total

    def _backward(self, each: _Pass, finish: Callable[[Group], None] | None) -> None:
        """Add the share of a pass in the gradient, stage by stage from the top."""
        stages, share = each.stages, each.share
        gradient = None if share == 1 else self._ops.tensor(np.array(share, dtype=np.float32))
        while stages:
            block, leaf, out = stages.pop()
            self._ops.moment("backward")
            if out is not None:
                out.backward(gradient)  # type: ignore[no-untyped-call]
                gradient = None if leaf is None else leaf.grad
            else:
                assert leaf is not None and gradient is not None
                self._rerun(each, leaf, block, gradient)
                if leaf.grad is not None:
                    gradient.add_(leaf.grad)
            del leaf, out
            if finish and block in self._groups:
                self._groups[block].complete()
                finish(self._groups[block])

    def _rerun(self, each: _Pass, x_BSD: Tensor, block: int, gradient_BSD: Tensor) -> None:
        """Backward of a block from its input; the gradient is turned from that of its output into that of its input."""
        for rows in self._few(x_BSD):
            leaf = x_BSD[rows].detach().requires_grad_(x_BSD.requires_grad)
            out = self._run(each.params, leaf, block, _rows_of(each.hides, rows))
            out.backward(gradient_BSD[rows])  # type: ignore[no-untyped-call]
            del out
            if leaf.grad is not None:
                gradient_BSD[rows] = leaf.grad


def _rows_of(hides: Tensor | None, rows: slice) -> Tensor | None:
    return None if hides is None else hides[rows]
