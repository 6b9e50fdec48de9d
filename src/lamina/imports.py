"""Hugging Face folders into folders of ours: every tensor checked, one safetensors file, nothing that is not needed.

What is written is still a Hugging Face folder, with the tensors bit for bit as they were. Importing is not needed to
use a folder, which can be named under `networks` as it is; it says beforehand whether that will work.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from re import sub
from typing import Any

from lamina import files, hf, tokens, weights
from lamina.errors import UserError
from lamina.spec import Spec, layout

BESIDE = (
    *tokens.FILES,
    *("added_tokens.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
    *("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt"),
)
"""Files that go along with a network where they are there, beside its config.json and its weights."""


@dataclass(frozen=True)
class Imported:
    """What a folder turned out to hold.

    Attributes:
        folder: Where it went.
        family: Its `model_type`.
        architecture: The class whose head it has.
        spec: Sizes and switches.
        parameters: Numbers in the network, those of a tied head counted once.
        bytes: Of the weights.
        dtypes: Kinds of numbers they are stored as.
        tokenizer: Kind of the tokenizer, and why there is none; "" where images go in.
        labels: Names of the classes.
        unused: Tensors that are in none of ours.
        copied: Files that went along.
    """

    folder: Path
    family: str
    architecture: str
    spec: Spec
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    tokenizer: str
    labels: tuple[str, ...]
    unused: tuple[str, ...]
    copied: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; documented in docs/json.md."""
        return {"schema": "lamina.import/1"} | asdict(self) | {"folder": str(self.folder)}

    def rows(self) -> list[tuple[str, str]]:
        """What a person wants to know."""
        spec = self.spec
        shape = f"{spec.blocks} blocks, width {spec.embed}, {spec.heads} heads"
        if spec.kv_heads:
            shape += f" ({spec.kv_heads} of keys and values)"
        enters = f"{spec.vocab} tokens, at most {spec.positions - spec.first_position} at a time"
        if spec.patch:
            enters = f"images of {spec.image} x {spec.image} x {spec.channels}, patches of {spec.patch} x {spec.patch}"
        patterns = Counter(sub(r"\.\d+\.", ".*.", name) for name in self.unused)
        many = (f"{name} ({count})" if count > 1 else name for name, count in patterns.items())
        named = f": {', '.join(self.labels[:5])}{', ...' if len(self.labels) > 5 else ''}"
        return [
            ("family", f"{self.family}, {self.architecture}"),
            ("sizes", f"{shape}, feed-forward {spec.ffn}"),
            ("takes", enters),
            ("parameters", f"{self.parameters:,} in {', '.join(self.dtypes)}, {self.bytes:,} bytes"),
            *([("tokenizer", self.tokenizer)] if self.tokenizer else []),
            ("classes", f"{len(self.labels)}{named}" if self.labels else "none"),
            ("not used", ", ".join(many) or "nothing"),
            ("files", ", ".join(self.copied)),
        ]


def bring(source: Path, target: Path, force: bool = False) -> Imported:
    """Check the network in `source` and write it to the new folder `target`.

    Args:
        source: A Hugging Face folder.
        target: The folder to make; it appears whole or not at all.
        force: Whether another network there is replaced.

    Raises:
        UserError: The network cannot be used, or the target cannot be made.
    """
    if target.exists() and source.resolve() == target.resolve():
        raise UserError(f"{source} is where the network is to go; it can be used as it is")
    spec, used = hf.check(source)
    config, found = hf.read_config(source), weights.entries(source)
    tied = spec.causal and not spec.labels and "lm_head.weight" not in used
    held = layout(spec)
    parameters = sum(held.numel(name) for name in held.params if name != "head.weight" or not tied)
    copied = [hf.CONFIG, hf.WEIGHTS, *(name for name in (*BESIDE, hf.OURS) if (source / name).is_file())]
    with files.new_folder(target, hf.CONFIG if force else None) as made:
        if (source / hf.WEIGHTS).is_file():
            shutil.copyfile(source / hf.WEIGHTS, made / hf.WEIGHTS)
        else:
            weights.merge(found, made / hf.WEIGHTS)
        copy_beside(source, made)
        for name in (hf.CONFIG, hf.OURS):
            if name in copied:
                shutil.copyfile(source / name, made / name)
        size = (made / hf.WEIGHTS).stat().st_size
    return Imported(
        folder=target,
        family=config["model_type"],
        architecture=hf.architecture(source),
        spec=spec,
        parameters=parameters,
        bytes=size,
        dtypes=tuple(sorted({weights.DTYPES[entry.dtype] for entry in used.values()})),
        tokenizer=_tokenizer(spec, target),
        labels=hf.read_labels(source),
        unused=tuple(sorted(found.keys() - used.keys())),
        copied=tuple(copied),
    )


def copy_beside(source: Path, target: Path) -> None:
    """Copy what goes along with the network in a folder: tokenizer, statistics of pixels, licence."""
    for name in BESIDE:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _tokenizer(spec: Spec, folder: Path) -> str:
    if spec.patch:
        return ""
    try:
        found = tokens.read_tokenizer(folder)
    except UserError as error:
        return f"none ({error})"
    kind = type(found.inner.model).__name__ if isinstance(found, tokens.Pieces) else "characters"
    return f"{kind}, {found.vocab} tokens"
