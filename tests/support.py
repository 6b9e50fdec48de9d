"""A world small enough for tests: random networks of one to four blocks, some roles, an experiment, its devices."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lamina import checkpoint, client, config, model
from lamina.cost import Cost, cost
from lamina.data.task import Shard
from lamina.data.text import ALPHABET
from lamina.duals import Duals
from lamina.job import Job, Local, Turn, Update
from lamina.layout import Params
from lamina.ledger import Ledger
from lamina.methods import METHODS, Method
from lamina.methods.adapters import Adapters
from lamina.methods.blocks import Alf, Caff
from lamina.methods.depth import DepthFL
from lamina.methods.exact import FlexLora
from lamina.methods.forward import Mezo, Spry
from lamina.methods.groups import Fed2
from lamina.methods.growth import ProgFed, Slt
from lamina.methods.lora import FedLora
from lamina.methods.lowrank import FedHM, Flanc
from lamina.methods.masks import PerFedMask
from lamina.methods.slora import SLora
from lamina.methods.width import FederatedDropout, FedRolex, Fjord, HeteroFL
from lamina.ops import TORCH, Ops
from lamina.run import Run, start
from lamina.server import DeviceRow, play_round
from lamina.shapes import FLOAT_BYTES
from lamina.spec import Spec
from lamina.state import State
from lamina.turn import generator
from lamina.watch import Watch

Table = dict[str, Any]

WINDOW, STEPS, TURN = 16, 3, Turn(seed=0, round=0, rounds=1)
LOCAL = Local(lr=0.02, steps=STEPS, batch_size=4)  # AdamW: even gradients that vanish but for rounding move a tensor

CLASSES = ("birds", "fish", "insects", "plants", "stones")

VARIANTS: dict[str, Method] = {name: method() for name, method in METHODS.items()} | {
    "caff without head": Caff(train_head=False, train_embeddings=False),
    "lora qv": FedLora(targets="qv"),
    "lora budget": FedLora(depth="budget"),
    "lora depth 1": FedLora(depth=1),
    "fedhm dynamic": FedHM(ratios=(1, 4), first_block=1, decay=0.1, dynamic=True, weighting="examples"),
    "flanc coarse": Flanc(widths=(1.0, 0.5), basis_fraction=0.3, n_basis=0.75),
    "federated dropout in full, coded": FederatedDropout(scope="full", rotate=True, subsample=0.5, bits=4),
    "heterofl inside": HeteroFL(scope="inner", ratios=(0.7, 0.2)),
    "fedrolex with labels": FedRolex(own_labels=True, scaler=False, stride=3),
    "fjord in full, alone": Fjord(scope="full", distill=False),
    "depthfl every 2": DepthFL(every=2),
    "progfed without warm-up": ProgFed(stages=2, warmup=0.0),
    "slt deeper": Slt(training_depth=2, widths=3, first="share"),
    "alf budget": Alf(depth="budget", min_rounds=1, patience=1, threshold=1.0),
    "perfedmask with head": PerFedMask(train_head=True, starts=20),
    "slora qv budget": SLora(depth="budget", rank=2, targets="qv"),
    "flexlora qv budget": FlexLora(depth="budget", targets="qv", rank=3),
    "adapters budget": Adapters(depth="budget", width=4),
    "spry with head": Spry(rank=2, targets="all", blocks=2, train_head=True, directions=2),
    "mezo all": Mezo(trains="all", directions=2),
    "mezo head": Mezo(trains="head"),
    "fed2 everywhere": Fed2(groups=2, shared=0.0),
}


def spec(blocks: int) -> Spec:
    """Sizes of `tiny-<blocks>`: 2048 weights in the embeddings, 3280 per block, 1568 in the final norm and the head."""
    return Spec(blocks, embed=16, heads=2, head_dim=8, ffn=64, vocab=len(ALPHABET), positions=32)


def suited(method: Method, network: Spec) -> Spec:
    """The network as a task takes it that the method can do: with a head for classes where it can do no other."""
    return network if "language" in method.tasks else replace(network, labels=len(CLASSES), pool="last")


def suited_task(method: Method, table: Table) -> Table:
    """The task of an experiment, or, where the method cannot do it, one of texts with classes."""
    if "language" in method.tasks:
        return dict(table["task"])
    path = write_texts(Path(table["task"]["path"]).parent)
    settings = {"devices": 6, "window": WINDOW, "split": "dirichlet", "alpha": 2.0, "min_examples": 10}
    return {"name": "text-classification", "path": str(path)} | settings


def weights(spec: Spec, seed: int = 0) -> Params:
    """Random weights in which nothing is zero or one, LoRA's B and the norms included."""
    rng = torch.Generator().manual_seed(seed)
    return {name: p + 0.05 * torch.randn(p.shape, generator=rng) for name, p in model.init(spec, rng).items()}


def write_network(folder: Path, blocks: int) -> Path:
    """The network `tiny-<blocks>` in `folder`."""
    path = folder / f"tiny-{blocks}"
    checkpoint.write(path, spec(blocks), weights(spec(blocks), blocks), torch.float32, {"alphabet": ALPHABET})
    return path


def write_roles(folder: Path, roles: int = 7) -> Path:
    """Roles of 256, 304, 352 ... characters of made-up speech: 14, 16, 19 ... training windows."""
    path, words = folder / "roles.json", ["the", "king", "is", "dead", "long", "live", "a", "queen", "and"]
    texts = {}
    for i in range(roles):
        drawn = generator("roles", i).choice(words, 200)
        texts[f"PLAY|ROLE{i}"] = " ".join(drawn)[: 256 + 48 * i]
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path


def write_texts(folder: Path, texts: int = 150) -> Path:
    """Made-up texts longer than a window, all of words of their class."""
    lines = ["text,label"]
    for i in range(texts):
        label = CLASSES[i % len(CLASSES)]
        words = [f"{label[:3]}{letter}" for letter in "abcdef"]
        lines.append(f"{' '.join(generator('texts', i).choice(words, 6))},{label}")
    path = folder / "texts.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_world(folder: Path, **changes: Any) -> Table:
    """Networks `tiny-1` to `tiny-4` and the roles in `folder`, and the tables of an experiment on `tiny-2` and `-3`."""
    for blocks in range(1, 5):
        write_network(folder, blocks)
    table: Table = {
        "name": "tiny",
        "rounds": 3,
        "cohort": 4,
        "workers": 1,
        "networks": [str(folder / "tiny-2"), str(folder / "tiny-3")],
        "task": {
            "name": "shakespeare",
            "path": str(write_roles(folder)),
            "devices": 6,
            "window": WINDOW,
            "stride": WINDOW,
            "scored": 4,
            "min_windows": 8,
        },
        "method": {"name": "caff"},
        "local": {"lr": LOCAL.lr, "steps": STEPS, "batch_size": LOCAL.batch_size},
        "fleet": [{"name": "strong"}, {"name": "weak", "memory": memory(3, 1)}],
    }
    return table | changes


def prices(method: Method, blocks: int, local: Local = LOCAL) -> dict[int, Cost]:
    """What a method's plans for `tiny-<blocks>` cost, by the number of blocks they train."""
    adapted = method.adapt(spec(blocks))
    layout = model.layout(adapted)
    plans = {plan.trained_blocks(layout): plan for plan in method.plans(adapted, TURN, {})}
    return {trained: cost(adapted, plan, local, WINDOW, STEPS) for trained, plan in plans.items()}


def memory(blocks: int, trained: int, local: Local = LOCAL) -> int:
    """Bytes that CAFF needs to train the last blocks of `tiny-<blocks>`: a budget that fits just so."""
    return prices(Caff(), blocks, local)[trained].memory_bytes


def begin(table: Table, folder: Path) -> Run:
    """The run of an experiment's tables, in a new folder under `folder`."""
    return start(config.experiment(table, "test"), folder)


class Devices:
    """An engine whose devices train as they should; `answer` may then send something else, or nothing.

    Attributes:
        jobs: All that it was asked.
    """

    def __init__(
        self, run: Run, answer: Callable[[Update], Iterable[Update]] = lambda update: [update], shuffle: int = 0
    ) -> None:
        """Simulate the devices of a run, answering in another order for each `shuffle`."""
        self.spec, self.shards, self.answer, self.shuffle = run.outlook.chosen.spec, run.task.train, answer, shuffle
        self.jobs: list[Job] = []

    def run(self, jobs: Iterable[Job]) -> Iterator[Update]:
        """Train all, then answer."""
        asked = list(jobs)
        self.jobs += asked
        updates = [each for job in asked for each in self.answer(self.train(job))]
        order = generator("order", self.shuffle).permutation(len(updates)) if self.shuffle else range(len(updates))
        yield from (updates[i] for i in order)

    def train(self, job: Job) -> Update:
        """What an honest device answers."""
        shard: Shard = self.shards[job.turn.device]
        return client.train(job.owned(), shard, self.spec)


def play(run: Run, devices: Devices | None = None, state: State | None = None) -> tuple[State, list[DeviceRow]]:
    """One round from the first state, or from the given one."""
    examples = [len(shard) for shard in run.task.train]
    return play_round(run.experiment, run.outlook, examples, devices or Devices(run), state or run.state)


def taken(kernel: Callable[[Ops, Callable[..., Any]], Any]) -> tuple[int, int]:
    """Bytes that a kernel on dual numbers takes at its peak, as predicted and as measured, without what goes in.

    Args:
        kernel: Calls it, given kernels and what makes tensors of a shape.
    """
    books, given = Ledger(1), list[Any]()

    def made(make: Callable[..., Any], *shape: int) -> Any:
        given.append(make(shape))
        return given[-1]

    with torch.no_grad():
        kernel(Duals(books), partial(made, books.blank))
        inputs = FLOAT_BYTES * sum(each.numel() for each in given)
        with Watch() as watched:
            kernel(Duals(TORCH), partial(made, torch.randn))
    predicted, measured = (sum(each.timeline.peak()[0].values()) for each in (books, watched))
    return predicted - inputs, measured - inputs


def bits(params: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Tensors as bytes, so that equal means bit for bit, the sign of zero included."""
    return {name: p.detach().contiguous().numpy().tobytes() for name, p in params.items()}


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that are not the same bit for bit."""
    old, new = bits(before), bits(after)
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def lines(path: Path) -> list[Table]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outcome(folder: Path) -> Table:
    """All that a finished run leaves behind, without what depends on the clock and the place."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    del summary["folder"], summary["totals"]["seconds"]
    manifest = checkpoint.read_manifest(folder / "state.safetensors")
    return {
        "summary": summary,
        "rounds": [line | {"seconds": None, "prefix_reused": None} for line in lines(folder / "rounds.jsonl")],
        "devices": lines(folder / "devices.jsonl"),
        "state": bits(load_file(folder / "state.safetensors")),
        "manifest": {key: value for key, value in manifest.items() if key not in ("seconds", "lengths", "settings")},
        "model": (folder / "model" / checkpoint.WEIGHTS).read_bytes(),
    }


def finished(out: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Weights and configs of all depths to the byte, and their reports without what the clock says."""
    paths = {str(path.relative_to(out)): path for path in Path(out).glob("*/*")}
    exact = {name: path.read_bytes() for name, path in paths.items() if not name.endswith("pretraining.json")}
    reports = {name: json.loads(path.read_text()) for name, path in paths.items() if name not in exact}
    for report in reports.values():
        for point in report["curve"]:
            del point[next(key for key in point if key.endswith("_per_second"))]
    return exact, reports


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Torch's count of operations, with attention as the plain formula."""
    aten: Any = torch.ops.aten  # those that add to something, which the counter does not know
    adding = {aten.addmm_: lambda out, x, y, **_: 2 * x[0] * x[1] * y[1]}
    adding[aten.baddbmm_] = lambda out, x, y, **_: 2 * x[0] * x[1] * x[2] * y[2]
    adding[aten.mm.out] = lambda x, y, **_: 2 * x[0] * x[1] * y[1]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=adding) as counter:
        yield counter
