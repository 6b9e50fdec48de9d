"""A finished run as a folder that `transformers` loads: tokenizer, class names, model card, adapter of `peft`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import torch

from lamina import adapter, card, checkpoint, config, files, hf, networks, saved
from lamina.card import Exported
from lamina.config import Experiment
from lamina.errors import UserError, nearest
from lamina.family import labels as class_names
from lamina.imports import copy_beside
from lamina.job import Turn
from lamina.spec import Spec, layout, plain

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def export(run: Path, out: Path, dtype: str = "float32", force: bool = False) -> Exported:
    """Write the network of a finished run as a Hugging Face folder.

    Args:
        run: The run's folder.
        out: The folder to make; it appears whole or not at all.
        dtype: Of the numbers; one of `DTYPES`.
        force: Whether another network there is replaced.

    Raises:
        UserError: The run is not finished or damaged, its network is gone, no class of `transformers` has what it made,
            or values do not fit the type.
    """
    if dtype not in DTYPES:
        raise UserError(f"no dtype {dtype!r}; {nearest(dtype, DTYPES)}")
    summary, experiment = _summary(run), config.load_experiment(run / "config.toml")
    source = _source(experiment, summary["network"]["chosen"])
    spec, params = checkpoint.load_whole(run / "model")
    if spec.groups:
        raise UserError(f"upper blocks in groups, as those of {run / 'model'}, are in no class of transformers")
    told = checkpoint.read_config(run / "model")
    names = class_names(told) if spec.labels else ()
    with files.new_folder(out, checkpoint.CONFIG if force else None) as made:
        keys = checkpoint.label_keys(names) if names else {}
        checkpoint.write(made, spec, params, DTYPES[dtype], keys, source)
        copy_beside(source, made)
        held = layout(checkpoint.read_spec(made)).params
        parts = {"head": "head.", "adapters": "h.", "exits": "exit."}
        beside = tuple(part for part, start in parts.items() if any(n.startswith(start) for n in params.keys() - held))
        done = Exported(
            folder=out,
            architecture=hf.architecture(made),
            dtype=dtype,
            labels=names,
            beside=beside,
            adapter=_adapter(made / "adapter", run, experiment, source, spec),
        )
        files.write(made / "README.md", card.page(done, spec, summary, characters=hf.read_alphabet(made) is not None))
    return done


def _summary(run: Path) -> dict[str, Any]:
    if not (run / "config.toml").is_file():
        raise UserError(f"{run} is not a run: it has no config.toml")
    path = run / "summary.json"
    if not path.is_file():
        raise UserError(f"the run in {run} is not finished; go on with: lamina run --resume {shlex.quote(str(run))}")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _source(experiment: Experiment, chosen: str) -> Path:
    """Folder of the network that the run began with."""
    for folder in map(networks.find, experiment.networks):
        if folder.name == chosen:
            return folder
    named = ", ".join(experiment.networks)
    raise UserError(f"the run began with network {chosen}, which its config.toml does not name: it names {named}")


def _adapter(folder: Path, run: Path, experiment: Experiment, source: Path, spec: Spec) -> bool | str:
    """Write the adapter, if the method made one."""
    adapted = experiment.method.adapt(plain(spec))
    if not adapted.lora:
        return ""
    state = saved.read(run).state
    done = Turn(experiment.seed, state.round - 1, experiment.rounds)
    try:
        deployed = experiment.method.deploy(adapted, state.params, done, state.memory)
        adapter.write(folder, source, *deployed, source.name)
    except UserError as error:
        return str(error)
    return True
