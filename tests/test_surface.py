"""What is promised to people and programs: settings, options, examples, and how soon an answer comes.

A change of a list here is a change of the surface: it goes into the change log.
"""

import dataclasses
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support import spec, write_world

from lamina import checkpoint, config, toml
from lamina.cli import app
from lamina.clock import Clock
from lamina.data import TASKS
from lamina.data.shakespeare import Shakespeare
from lamina.data.text import ALPHABET
from lamina.experiment import look_ahead
from lamina.fleet import DeviceClass
from lamina.job import Local
from lamina.methods import METHODS
from lamina.model import init
from lamina.pretrain import PretrainImages, PretrainText
from lamina.traces import Traces

ROOT = Path(__file__).parents[1]
COMMON = "absent on_infeasible weighting fallback directions zeroth_lr"
DEALING = "split devices alpha classes_per_device min_examples"
LORA = "depth train_head rank alpha targets"
PRETRAIN = (
    "out name steps lr depths embed heads batch_size warmup weight_decay clip grow precision device threads "
    "checkpoint_every seed"
)
KEYS = {
    "": (
        config.Experiment,
        "name rounds cohort networks seed eval_every eval_devices validation clip_updates workers levers enforce "
        "engine device precision prefix_ram prefix_disk track prefer task method local fleet clock",
    ),
    "task shakespeare": (
        TASKS["shakespeare"],
        "path split devices alpha window stride scored train_fraction min_windows test_windows",
    ),
    "task text": (
        TASKS["text"],
        f"{DEALING} path test_path text user window stride scored train_fraction test_windows",
    ),
    "task text-classification": (
        TASKS["text-classification"],
        f"{DEALING} path test_path test_fraction text label user window pool",
    ),
    "task images": (TASKS["images"], f"{DEALING} augment path test_path test_fraction size fine label"),
    "task digits": (TASKS["digits"], f"{DEALING} augment size"),
    "task noise": (TASKS["noise"], "devices examples tests window"),
    "method fedavg": (METHODS["fedavg"], COMMON),
    "method caff": (METHODS["caff"], f"{COMMON} train_head train_embeddings"),
    "method cocofl": (METHODS["cocofl"], f"{COMMON} frozen_bits"),
    "method alf": (METHODS["alf"], f"{COMMON} threshold patience min_rounds decay window depth"),
    "method perfedmask": (METHODS["perfedmask"], f"{COMMON} starts train_head personal_epochs personal_lr"),
    "method fedra": (METHODS["fedra"], f"{COMMON} rank alpha targets train_head"),
    "method federated-dropout": (METHODS["federated-dropout"], f"{COMMON} ratios scope rotate subsample bits"),
    "method heterofl": (METHODS["heterofl"], f"{COMMON} ratios scope scaler own_labels"),
    "method fedrolex": (METHODS["fedrolex"], f"{COMMON} ratios scope scaler own_labels stride"),
    "method fjord": (METHODS["fjord"], f"{COMMON} ratios scope distill"),
    **{
        f"method {name}": (METHODS[name], f"{COMMON} {LORA}")
        for name in ("lora", "lora-last-t", "ffa-lora", "fedex-lora")
    },
    "method hetlora": (METHODS["hetlora"], f"{COMMON} {LORA} ranks gamma lambda_"),
    "method slora": (METHODS["slora"], f"{COMMON} {LORA} density mask_seed first_stage"),
    "method flora": (METHODS["flora"], f"{COMMON} {LORA} ranks"),
    "method flexlora": (METHODS["flexlora"], f"{COMMON} {LORA} ranks"),
    "method adapters": (METHODS["adapters"], f"{COMMON} depth train_head width std"),
    "method flanc": (METHODS["flanc"], f"{COMMON} widths basis_fraction n_basis orthogonality"),
    "method fed2": (METHODS["fed2"], f"{COMMON} groups shared"),
    "method fedhm": (METHODS["fedhm"], f"{COMMON} ratios first_block decay dynamic temperature history"),
    "method depthfl": (METHODS["depthfl"], f"{COMMON} every alpha ramp"),
    "method progfed": (METHODS["progfed"], f"{COMMON} stages growth warmup"),
    "method slt": (METHODS["slt"], f"{COMMON} training_depth widths first"),
    "method spry": (METHODS["spry"], f"{COMMON} rank alpha targets blocks train_head"),
    "method mezo": (METHODS["mezo"], f"{COMMON} rank alpha targets trains"),
    "local": (Local, "lr head_lr optimizer schedule momentum weight_decay batch_size steps epochs clip"),
    "fleet": (DeviceClass, "name share memory uplink downlink flops speed up_rate down_rate devices drift"),
    "fleet traces": (Traces, "memory_share classes speed since drift"),
    "clock": (Clock, "deadline over_selection min_updates availability available_hours failures"),
    "pretrain text": (PretrainText, f"{PRETRAIN} text positions"),
    "pretrain images": (PretrainImages, f"{PRETRAIN} images patch augment"),
}
OPTIONS = {
    "run": "FILE --set --resume --out --json",
    "plan": "FILE --set --measure --data --why --json",
    "compare": "FILE --set --out --json",
    "methods": "NAMES --json",
    "pretrain": "FILE --set --json",
    "import": "FOLDER --out --name --force --json",
    "report": "FOLDER --out --figures --open --json",
    "bench": (
        "WORKLOAD --against --set --rounds --warmup --settle --repeats --workers --device --tolerance --record --json"
    ),
    "export": "RUN --out --dtype --force --json",
    "profile": "--name --reserve --server --json",
    "deploy init": "DIR --server --port --devices --force",
    "deploy key": "DIR K --force",
    "deploy renew": "DIR",
    "deploy serve": "DIR",
    "deploy join": "DIR --device",
    "deploy run": "DIR FILE --set --resume --out --json",
}


@pytest.mark.parametrize(("cls", "keys"), KEYS.values(), ids=list(KEYS))
def test_the_settings(cls: Any, keys: str) -> None:
    assert " ".join(field.name for field in dataclasses.fields(cls)) == keys


def test_every_task_and_method_is_in_the_list() -> None:
    assert {f"method {name}" for name in METHODS} | {f"task {name}" for name in TASKS} <= KEYS.keys()


def test_the_commands_and_their_options() -> None:
    command: Any = typer.main.get_command(app)
    groups = {name: sub.commands for name, sub in command.commands.items() if hasattr(sub, "commands")}
    commands = {name: sub for name, sub in command.commands.items() if name not in groups}
    commands |= {f"{group} {name}": sub for group, subs in groups.items() for name, sub in subs.items()}
    found = {
        name: " ".join(
            each.opts[0] if each.param_type_name == "option" else each.metavar or each.name.upper()
            for each in sub.params
        )
        for name, sub in commands.items()
    }
    assert found == OPTIONS


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_are_accepted(path: Path) -> None:
    if path.name.startswith("pretrain"):
        job = config.load_pretrain(path)
        assert len(job.steps) == len(job.depths)
    elif path.name.startswith("compare"):
        assert len(config.load_comparison(path).experiments) > 1
    else:
        made = config.load_experiment(path)
        assert config.experiment(tomllib.loads(toml.dump(made.to_table())), "again") == made


def test_there_are_examples() -> None:
    wanted = {"demo.toml", "pretrain.toml", "pretrain-images.toml"}
    assert wanted <= {path.name for path in (ROOT / "examples").iterdir()}


def printed(code: str) -> str:
    """What a program prints, in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_lamina_adds_little_to_torch() -> None:
    """Nor does the command line with all it needs to plan, but for the libraries it stands on."""
    code = (
        "import time\n"
        "begin = time.process_time()\n"
        "import torch, numpy, safetensors.torch, typer, pydantic, rich.table, rich.progress\n"
        "there = time.process_time()\n"
        "import lamina, lamina.cli, lamina.experiment, lamina.run, lamina.view\n"
        "print((time.process_time() - there) / (there - begin))"
    )
    assert any(float(printed(code)) < 0.25 for _ in range(3))  # a busy machine makes both slow


def test_importing_lamina_alone_imports_nothing_heavy() -> None:
    code = (
        "import sys, lamina; print(int(any(name in sys.modules for name in ('torch', 'numpy', 'pydantic', 'typer'))))"
    )
    assert printed(code) == "0\n"


def test_a_plan_for_four_networks_is_quick_and_reads_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor weights: networks of the depths of the package, with their config.json alone."""
    table = write_world(tmp_path, name="quick")
    table["networks"] = []
    for blocks in (3, 6, 9, 12):
        sizes = dataclasses.replace(spec(2), blocks=blocks)
        folder = tmp_path / f"net-{blocks}"
        checkpoint.write(folder, sizes, init(sizes, torch.Generator()), torch.float32, {"alphabet": ALPHABET})
        (folder / checkpoint.WEIGHTS).unlink()
        table["networks"].append(str(folder))
    table["fleet"] = [{"name": name, "memory": f"{size} KiB"} for name, size in (("a", 1500), ("b", 700), ("c", 400))]

    def load(*arguments: Any) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(Shakespeare, "load", load)
    monkeypatch.setattr(Shakespeare, "_roles", load)
    experiment = config.experiment(table, "test")
    tick = time.process_time()
    outlook = look_ahead(experiment)
    assert time.process_time() - tick < 2
    assert len(outlook.candidates) == 4
    assert outlook.chosen.mean_trained_blocks > 1
