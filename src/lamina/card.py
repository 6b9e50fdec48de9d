"""The model card of an exported network: what was trained, on what budgets, how well, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina import hf, tables
from lamina.spec import Spec


@dataclass(frozen=True)
class Exported:
    """What a run became.

    Attributes:
        folder: Where it is.
        architecture: The class of `transformers` that loads it.
        dtype: Of its numbers.
        labels: Names of the classes.
        beside: What that class has no place for, which is in lamina.safetensors: "head", "adapters", "exits".
        adapter: Whether there is an adapter of `peft`; why not, if the method made low-rank additions; "" if not.
    """

    folder: Path
    architecture: str
    dtype: str
    labels: tuple[str, ...]
    beside: tuple[str, ...]
    adapter: bool | str

    def to_json(self) -> dict[str, Any]:
        """Plain data; documented in docs/json.md."""
        return {
            "schema": "lamina.export/1",
            "folder": str(self.folder),
            "class": self.architecture,
            "dtype": self.dtype,
            "labels": list(self.labels),
            "beside": list(self.beside),
            "adapter": self.adapter is True,
            "no_adapter": self.adapter if isinstance(self.adapter, str) else "",
        }


_FRONT = """---
library_name: transformers
base_model: {base}
tags:
- federated-learning
- lamina
---

"""
_AUTO = {"LMHeadModel": "ForCausalLM"} | {
    f"For{x}": f"For{x}" for x in ("CausalLM", "SequenceClassification", "ImageClassification")
}


def page(done: Exported, spec: Spec, summary: Mapping[str, Any], characters: bool = False) -> str:
    """The card as Markdown.

    Args:
        done: What was exported.
        spec: The whole network.
        summary: What summary.json of the run holds.
        characters: Whether the network reads characters by the `alphabet` in its config.
    """
    chosen, accuracy = summary["network"]["chosen"], summary["accuracy"]
    before, after = (accuracy[when]["mean_over_devices"] for when in ("before", "after"))
    devices = sum(each["devices"] for each in summary["classes"])
    rounds = summary["totals"]["rounds"]
    about = (
        f"{chosen}, finetuned by {devices} simulated devices in {rounds} round{'s' * (rounds != 1)} of "
        f"`{summary['method']}`. Accuracy, mean over devices: {before:.1%} before, {after:.1%} after."
    )
    code = _head_code(done, spec) if "head" in done.beside else _code(done, spec, characters)
    parts = [about, "## How to load it", "```python\n" + "\n".join(code) + "\n```", *_notes(done)]
    shown = [*tables.of_classes(summary["classes"]), tables.outcome(summary), tables.totals(summary)]
    title, _, rest = tables.page(summary["name"], shown).partition("\n\n")
    return _FRONT.format(base=chosen) + "\n\n".join([title, *parts, rest])


def _notes(done: Exported) -> list[str]:
    """What is there besides, or why it is not."""
    notes = []
    if rest := [part for part in done.beside if part != "head"]:
        notes.append(f"The {' and '.join(rest)} are in `{hf.OURS}`, and run in lamina alone.")
    if done.adapter is True:
        notes.append(
            "`adapter/` is the same as low-rank additions to the base network: "
            '`peft.PeftModel.from_pretrained(base, folder + "/adapter")`.'
        )
    elif done.adapter:
        notes.append(f"There is no adapter for peft: {done.adapter}.")
    return notes


def _opening(auto: str, reader: str) -> list[str]:
    return [
        f"from transformers import {auto}, {reader}",
        "",
        f"network = {auto}.from_pretrained(folder)",
        f"reader = {reader}.from_pretrained(folder)",
    ]


def _code(done: Exported, spec: Spec, characters: bool) -> list[str]:
    """Python that loads the network and runs it."""
    auto = "AutoModel" + next((kind for end, kind in _AUTO.items() if done.architecture.endswith(end)), "")
    if characters:
        return [
            "import torch",
            f"from transformers import {auto}",
            "",
            f"network = {auto}.from_pretrained(folder)",
            "alphabet = network.config.alphabet",
            'given = torch.tensor([[alphabet.index(letter) for letter in "Once upon a time"]])',
            'print("".join(alphabet[i] for i in network.generate(given, max_new_tokens=40)[0]))',
        ]
    if spec.patch:
        reading = 'given = reader(images, return_tensors="pt")'
        return [*_opening(auto, "AutoImageProcessor"), reading, "print(network(**given).logits.argmax(-1))"]
    if spec.labels:
        reading = 'given = reader(texts, padding=True, return_tensors="pt")'
        return [*_opening(auto, "AutoTokenizer"), reading, "print(network(**given).logits.argmax(-1))"]
    return [
        *_opening(auto, "AutoTokenizer"),
        'given = reader("Once upon a time", return_tensors="pt")',
        "print(reader.decode(network.generate(**given, max_new_tokens=40)[0]))",
    ]


def _head_code(done: Exported, spec: Spec) -> list[str]:
    """Python that runs the base model and then the head, which is beside it."""
    mean = f"seen[:, {spec.before_patches}:].mean(1)" if spec.patch else "(seen * mask).sum(1) / mask.sum(1)"
    pooled = {
        "first": "seen[:, 0]",
        "mean": mean,
        "last": "seen[torch.arange(len(seen)), mask.sum((1, 2)) - 1]",
        "first_mean": f"torch.cat([seen[:, 0], {mean}], -1)",
    }[spec.pool]
    lines = ["import torch", "from safetensors.torch import load_file"]
    lines += _opening("AutoModel", "AutoImageProcessor" if spec.patch else "AutoTokenizer")
    lines += [f'head = load_file(folder + "/{hf.OURS}")']
    lines += [f'given = reader({"images" if spec.patch else "texts, padding=True"}, return_tensors="pt")']
    lines += [] if spec.patch else ['mask = given["attention_mask"][..., None]']
    lines += ["seen = network(**given).last_hidden_state", f"seen = {pooled}"]
    if spec.pooler:
        lines += [f'seen = torch.{spec.pooler}(seen @ head["head.pool.weight"].T + head["head.pool.bias"])']
    bias = ' + head["head.bias"]' if spec.head_bias else ""
    return [*lines, f'logits = seen @ head["head.weight"].flatten(1).T{bias}', "print(logits.argmax(-1))"]
