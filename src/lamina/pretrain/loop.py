"""The loop: depth by depth, resumable at any checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from lamina import checkpoint, files, model
from lamina.errors import UserError
from lamina.layout import Params
from lamina.ops import TORCH
from lamina.placement import place
from lamina.pretrain.job import Material, Pretrain, Progress, logits
from lamina.spec import Spec
from lamina.turn import generator

REPORT = "pretraining.json"
_STATE = "state.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def pretrain(job: Pretrain) -> Iterator[Progress]:
    """Train what is missing, depth by depth, reporting at every checkpoint; call again to go on after a stop.

    Raises:
        UserError: The data are missing or too few, the device is not there, or a checkpoint is of another recipe.
    """
    material = job.read(place(job.device))
    torch.set_num_threads(job.threads)
    for index, depth in enumerate(job.depths):
        folder = Path(job.out) / f"{job.name}-{depth}"
        recipe = job.recipe(index) | material.facts
        if (folder / checkpoint.CONFIG).exists():  # what is written last
            made_by = json.loads((folder / REPORT).read_text()) if (folder / REPORT).exists() else {}
            _demand_recipe(folder, made_by.get("recipe"), recipe)
        else:
            yield from _train_depth(job, index, folder, material, recipe)


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


def _train_depth(
    job: Pretrain, index: int, folder: Path, material: Material, recipe: dict[str, object]
) -> Iterator[Progress]:
    depth, steps = job.depths[index], job.steps[index]
    device, spec = place(job.device), material.spec(depth)
    start = _start(job, index, folder, spec, material)
    params = {name: tensor.to(device).requires_grad_() for name, tensor in start.items()}
    optimizer = _optimizer(spec, params, job.weight_decay)
    first, curve = _resume(folder, params, optimizer, recipe)
    losses: list[float] = []
    tick = time.perf_counter()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job, index, step)
        inputs, targets = material.batch(depth, step)
        loss = TORCH.cross_entropy(logits(spec, params, inputs, job.precision), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        if job.clip:
            torch.nn.utils.clip_grad_norm_(params.values(), job.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % job.checkpoint_every == 0 or step + 1 == steps:
            speed = len(losses) * material.batch_units / (time.perf_counter() - tick)
            scores = material.validate(spec, params, whole=step + 1 == steps)
            scores[f"{material.unit}_per_second"] = speed
            point = material.point(depth, step + 1, steps, sum(losses) / len(losses), **scores)
            curve, losses = [*curve, asdict(point)], []
            _save_state(folder, params, optimizer, step + 1, curve, recipe)
            yield point
            tick = time.perf_counter()
    _finish(folder, spec, params, material, curve, recipe)


def _start(job: Pretrain, index: int, folder: Path, spec: Spec, material: Material) -> Params:
    if job.grow and index:
        before = job.depths[index - 1]
        _, params = checkpoint.load(folder.with_name(f"{job.name}-{before}"))
        return grow(params, before, spec.blocks)
    seed = int(generator(job.seed, "init", spec.blocks).integers(2**62))
    return material.init(spec, torch.Generator().manual_seed(seed))


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
        tensors |= {f"{key}/{name}": optimizer.state[p][key] for key in _MOMENTS}
    manifest = {"step": step, "curve": curve, "recipe": recipe}
    files.write(folder / _STATE, save(tensors, metadata={"manifest": json.dumps(manifest)}))


def _resume(
    folder: Path, params: Params, optimizer: torch.optim.AdamW, recipe: dict[str, object]
) -> tuple[int, list[dict[str, object]]]:
    path = folder / _STATE
    if not path.exists():
        return 0, []
    manifest = checkpoint.read_manifest(path)
    _demand_recipe(folder, manifest["recipe"], recipe)
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tensors[name])
            optimizer.state[p] = {key: tensors[f"{key}/{name}"].to(p.device) for key in _MOMENTS}
    return int(manifest["step"]), manifest["curve"]


def _demand_recipe(folder: Path, made_by: object, recipe: dict[str, object]) -> None:
    if made_by != json.loads(json.dumps(recipe)):
        raise UserError(f"{folder} was made by another recipe; move the folder away or restore the recipe")


def _finish(
    folder: Path,
    spec: Spec,
    params: Params,
    material: Material,
    curve: list[dict[str, object]],
    recipe: dict[str, object],
) -> None:
    half = {name: p.detach().half().float() for name, p in params.items()}
    report: dict[str, object] = {"recipe": recipe, "depth": spec.blocks}
    for name, score in material.validate(spec, half, whole=True).items():
        key = "val_loss_nats" if name == "val_loss" else name
        report |= {key: curve[-1][name], f"{key}_fp16_weights": score}
    report |= {f"val_{material.unit}": material.val_units, "torch": torch.__version__, "curve": curve}
    files.write_json(folder / REPORT, report)
    material.write(folder, spec, {name: p.cpu() for name, p in half.items()})
    (folder / _STATE).unlink(missing_ok=True)
