"""Pretraining: one character-level network per depth from plain text, resumable at any checkpoint.

With `grow`, a deeper network starts from the finished shallower one: new blocks are spread evenly between the old
ones, each a copy of the block before it with its two output projections at zero, so the function is unchanged at
first. (Stacking trained layers to start deeper networks: Gong et al., ICML 2019; starting new blocks as the identity:
Chen et al., Net2Net, ICLR 2016. We combine the two.) What a shallow network learned is not paid for again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lamina import checkpoint, files, model
from lamina.data.text import ALPHABET, encode, normalise, read_text
from lamina.errors import UserError
from lamina.layout import Params
from lamina.ops import TORCH
from lamina.spec import Spec
from lamina.turn import generator

REPORT = "pretraining.json"
_SLICES, _HELD_OUT_EVERY = 1000, 100


@dataclass(frozen=True)
class Pretrain:
    """What to pretrain: the fields are the keys of the TOML file of `lamina pretrain`.

    Attributes:
        text: Plain text, .txt or .txt.xz. One slice of a thousandth in every hundred is held out for validation.
        out: Folder that gets one network folder per depth, named `<name>-<depth>`.
        name: Name of the family.
        depths: Numbers of blocks, ascending.
        steps: Optimizer steps for each depth.
        embed: Width.
        heads: Attention heads.
        positions: Characters per sequence.
        batch_size: Sequences per step.
        lr: Peak learning rate of AdamW, for each depth; linear warm-up, then linear decay to zero.
        warmup: Warm-up steps.
        weight_decay: Decoupled decay of matrices; vectors are not decayed.
        clip: Largest norm of the whole gradient; none if 0.
        grow: Start each depth from the one before it.
        precision: "bf16" runs matrix products in bfloat16 (autocast); weights and optimizer stay fp32.
        device: "cpu", "cuda", or "auto".
        threads: Of the CPU; more than one changes the last bits.
        checkpoint_every: Steps between resumable states and validation points.
        seed: Of the initial weights and of the order of the text.
    """

    text: str
    out: str
    name: str
    steps: tuple[int, ...]
    lr: tuple[float, ...]
    depths: tuple[int, ...] = (3, 6, 9, 12)
    embed: int = 96
    heads: int = 3
    positions: int = 128
    batch_size: int = 32
    warmup: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    grow: bool = True
    precision: Literal["fp32", "bf16"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    checkpoint_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what types alone cannot.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 1:
            raise ValueError(f"depths must be ascending positive integers, got {list(self.depths)}")
        for key in ("steps", "lr"):
            values = getattr(self, key)
            if len(values) != len(self.depths) or min(values) <= 0:
                raise ValueError(f"{key} needs one positive number per depth ({len(self.depths)}), got {list(values)}")
        for key in ("embed", "heads", "positions", "batch_size", "threads", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("warmup", "weight_decay", "clip", "seed"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if self.embed % self.heads:
            raise ValueError(f"embed ({self.embed}) must be a multiple of heads ({self.heads})")

    def recipe(self, index: int) -> dict[str, object]:
        """All that the network of the depth at `index` depends on; of the shallower ones where it grew from them."""
        recipe = asdict(self)
        for key in ("depths", "steps", "lr"):
            recipe[key] = recipe[key][0 if self.grow else index : index + 1]
        return {key: value for key, value in recipe.items() if key not in ("out", "device", "threads")}

    def spec(self, depth: int) -> Spec:
        """Sizes of the network of one depth."""
        return Spec(
            blocks=depth,
            embed=self.embed,
            heads=self.heads,
            head_dim=self.embed // self.heads,
            ffn=4 * self.embed,
            vocab=len(ALPHABET),
            positions=self.positions,
        )


@dataclass(frozen=True)
class Progress:
    """One validation point. Losses in nats per character."""

    depth: int
    step: int
    steps: int
    train_loss: float
    val_loss: float
    characters_per_second: float


def pretrain(job: Pretrain) -> Iterator[Progress]:
    """Train what is missing, depth by depth, reporting at every checkpoint; call again to go on after a stop.

    Raises:
        UserError: The text is missing or too short, the device is not there, or a checkpoint is of another recipe.
    """
    ids, digest = _text(job)
    train_ids, val_ids = held_out(ids)
    if len(val_ids) <= job.positions:
        raise UserError(f"{job.text}: {len(ids)} characters are too few; a hundredth must exceed {job.positions}")
    text = {"text": Path(job.text).name, "text_sha256": digest, "characters": len(ids)}
    torch.set_num_threads(job.threads)
    for index, depth in enumerate(job.depths):
        folder = Path(job.out) / f"{job.name}-{depth}"
        recipe = job.recipe(index) | text
        if (folder / checkpoint.CONFIG).exists():  # what is written last
            made_by = json.loads((folder / REPORT).read_text()) if (folder / REPORT).exists() else {}
            _demand_recipe(folder, made_by.get("recipe"), recipe)
        else:
            yield from _train_depth(job, index, folder, train_ids, val_ids, recipe)


def held_out(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split text into training and validation: of 1000 equal slices, every hundredth is held out."""
    slices = np.array_split(ids, _SLICES)
    val = [piece for i, piece in enumerate(slices) if i % _HELD_OUT_EVERY == _HELD_OUT_EVERY // 2]
    train = [piece for i, piece in enumerate(slices) if i % _HELD_OUT_EVERY != _HELD_OUT_EVERY // 2]
    return np.concatenate(train), np.concatenate(val)


def grow(params: Params, blocks: int, target: int) -> Params:
    """The same function with `target` blocks: copies that start as the identity, spread evenly after the old ones."""
    at_old = np.linspace(0, blocks, target, endpoint=False).astype(int)
    deeper: Params = {name: tensor for name, tensor in params.items() if not name.startswith("h.")}
    for new, old in enumerate(at_old):
        is_copy = new > 0 and at_old[new - 1] == old
        for name, tensor in params.items():
            if name.startswith(f"h.{old}."):
                silent = is_copy and (".attn.o." in name or ".ffn.down." in name)
                target_name = f"h.{new}." + name.split(".", 2)[2]
                deeper[target_name] = torch.zeros_like(tensor) if silent else tensor.clone()
    return deeper


def learning_rate(job: Pretrain, index: int, step: int) -> float:
    """Linear warm-up to the peak, then linear decay to zero at the last step."""
    steps = job.steps[index]
    return job.lr[index] * min((step + 1) / max(1, job.warmup), (steps - step) / max(1, steps - job.warmup))


def _text(job: Pretrain) -> tuple[np.ndarray, str]:
    ids = encode(normalise(read_text(Path(job.text))))
    return ids, hashlib.sha256(ids.tobytes()).hexdigest()


def _train_depth(
    job: Pretrain,
    index: int,
    folder: Path,
    train_ids: np.ndarray,
    val_ids: np.ndarray,
    recipe: dict[str, object],
) -> Iterator[Progress]:
    depth, steps = job.depths[index], job.steps[index]
    device = _device(job.device)
    spec = job.spec(depth)
    params = {name: tensor.to(device).requires_grad_() for name, tensor in _start(job, index, folder).items()}
    optimizer = _optimizer(spec, params, job.weight_decay)
    first, curve = _resume(folder, params, optimizer, recipe)
    sums, tick = [0.0, 0], time.perf_counter()
    for step in range(first, steps):
        rng = generator(job.seed, "pretrain", depth, step)
        starts = rng.integers(0, len(train_ids) - job.positions, job.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job, index, step)
        loss = _loss(spec, params, _windows(train_ids, starts, job.positions, device), job.precision)
        loss.backward()  # type: ignore[no-untyped-call]
        if job.clip:
            torch.nn.utils.clip_grad_norm_(params.values(), job.clip)
        optimizer.step()
        optimizer.zero_grad()
        sums = [sums[0] + loss.item(), sums[1] + 1]
        if (step + 1) % job.checkpoint_every == 0 or step + 1 == steps:
            seconds, tick = time.perf_counter() - tick, time.perf_counter()
            val = validate(spec, params, val_ids, job.positions, windows=1024 if step + 1 < steps else None)
            speed = sums[1] * job.batch_size * job.positions / seconds
            point = Progress(depth, step + 1, steps, sums[0] / sums[1], val, speed)
            curve, sums = [*curve, asdict(point)], [0.0, 0]
            _save_state(folder, params, optimizer, step + 1, curve, recipe)
            yield point
            tick = time.perf_counter()
    _finish(job, folder, spec, params, val_ids, curve, recipe)


@torch.no_grad()
def validate(
    spec: Spec, params: Params, ids: np.ndarray, positions: int, windows: int | None = None, batch: int = 64
) -> float:
    """Mean loss in nats per character over evenly spaced windows of held-out text (None: all, one after another)."""
    count = (len(ids) - 1) // positions
    starts = np.arange(count) * positions
    if windows is not None and windows < count:
        starts = starts[np.linspace(0, count - 1, windows).astype(int)]
    device = params["head.weight"].device
    total = 0.0
    for chunk in np.array_split(starts, math.ceil(len(starts) / batch)):
        total += _loss(spec, params, _windows(ids, chunk, positions, device), "fp32").item() * len(chunk)
    return total / len(starts)


def _windows(ids: np.ndarray, starts: np.ndarray, length: int, device: torch.device) -> Tensor:
    """Windows of length + 1 characters, [len(starts), length + 1], as int64."""
    return torch.from_numpy(ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)).to(device)


def _loss(spec: Spec, params: Params, windows: Tensor, precision: str) -> Tensor:
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model.forward(spec, params, windows[:, :-1])
    return TORCH.cross_entropy(logits.float(), windows[:, 1:])


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError('device is "cuda", but torch sees no CUDA device; use "cpu" or "auto"')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _start(job: Pretrain, index: int, folder: Path) -> Params:
    if job.grow and index:
        before = job.depths[index - 1]
        _, params = checkpoint.load(folder.with_name(f"{job.name}-{before}"))
        return grow(params, before, job.depths[index])
    seed = int(generator(job.seed, "init", job.depths[index]).integers(2**62))
    return model.init(job.spec(job.depths[index]), torch.Generator().manual_seed(seed))


def _optimizer(spec: Spec, params: Params, weight_decay: float) -> torch.optim.AdamW:
    rows = model.layout(spec).params
    vectors = {name for name in params if rows[name].part == "norm" or name.endswith("bias")}
    groups = [
        {"params": [p for name, p in params.items() if name not in vectors], "weight_decay": weight_decay},
        {"params": [p for name, p in params.items() if name in vectors], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def _save_state(
    folder: Path,
    params: Params,
    optimizer: torch.optim.AdamW,
    step: int,
    curve: list[dict[str, object]],
    recipe: object,
) -> None:
    tensors = {name: p.detach() for name, p in params.items()}
    for name, p in params.items():
        tensors |= {f"{key}/{name}": optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq")}
    manifest = {"step": step, "curve": curve, "recipe": recipe}
    files.write(folder / "state.safetensors", save(tensors, metadata={"manifest": json.dumps(manifest)}))


def _resume(
    folder: Path, params: Params, optimizer: torch.optim.AdamW, recipe: dict[str, object]
) -> tuple[int, list[dict[str, object]]]:
    path = folder / "state.safetensors"
    if not path.exists():
        return 0, []
    manifest = checkpoint.read_manifest(path)
    _demand_recipe(folder, manifest["recipe"], recipe)
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tensors[name])
            optimizer.state[p] = {
                key: tensors[f"{key}/{name}"].to(p.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return int(manifest["step"]), manifest["curve"]


def _demand_recipe(folder: Path, made_by: object, recipe: dict[str, object]) -> None:
    if made_by != json.loads(json.dumps(recipe)):
        raise UserError(f"{folder} was made by another recipe; move the folder away or restore the recipe")


def _finish(
    job: Pretrain,
    folder: Path,
    spec: Spec,
    params: Params,
    val_ids: np.ndarray,
    curve: list[dict[str, object]],
    recipe: dict[str, object],
) -> None:
    half = {name: p.detach().cpu().half().float() for name, p in params.items()}
    loss = validate(spec, half, val_ids, job.positions)
    report = {
        "recipe": recipe,
        "depth": spec.blocks,
        "val_loss_nats": curve[-1]["val_loss"],
        "val_loss_nats_fp16_weights": loss,
        "val_characters": len(val_ids),
        "torch": torch.__version__,
        "curve": curve,
    }
    files.write_json(folder / REPORT, report)
    checkpoint.write(folder, spec, half, torch.float16, {"alphabet": ALPHABET})
    (folder / "state.safetensors").unlink(missing_ok=True)
