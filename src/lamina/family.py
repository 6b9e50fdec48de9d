"""What a family of networks is on disk: a `Family` is a row of data, from which both directions follow.

It says which keys of config.json give which fields of `Spec`, and what `transformers` takes where a key is missing;
which keys must not be set otherwise; what the tensors are called; and which class puts which head on top. The rows are
in `lamina.families`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from lamina.errors import UserError
from lamina.spec import LINEARS, Spec, as_matrix

if TYPE_CHECKING:
    from torch import Tensor

Config = Mapping[str, Any]
HEADLESS: dict[str, Any] = {"labels": 0, "pool": "", "pooler": "", "head_bias": False}
"""Fields of a network without a classification head."""
MOST = {"blocks": 1024}
MOST_UNITS = 1 << 24
"""Accepted at most: blocks, and units of any other size. What asks for more is damaged, or malicious."""
NEVER: dict[str, tuple[Any, Any]] = {
    "quantization_config": (None, None),
    "add_cross_attention": (False, False),
    "pruned_heads": ({}, {}),
}
"""What no family may have set: key -> (default, value)."""


@dataclass(frozen=True)
class Key:
    """A key of config.json that gives a field of `Spec`.

    Attributes:
        name: The key.
        field: The field.
        default: What `transformers` takes where the key is missing: a value, or a function of the fields read so far,
            which stands in for null too; `...`: the key must be there.
        into: Their value and the fields read so far -> ours.
        back: Our value and the network -> theirs.
        values: Their value -> ours instead, where only some are accepted; of two that mean the same, the first is
            written.
        find: Takes their value out of a config where it is not simply under its name.
        optional: Whether the key is left out where it says what its absence says.
    """

    name: str
    field: str
    default: Any = ...
    into: Callable[[Any, Mapping[str, Any]], Any] = lambda value, known: int(value)
    back: Callable[[Any, Spec], Any] = lambda value, spec: value
    values: Mapping[str, Any] | None = None
    find: Callable[[Config], Any] | None = None
    optional: bool = False

    def read(self, config: Config, known: Mapping[str, Any]) -> Any:
        """The field's value.

        Raises:
            UserError: It is not among the accepted.
            KeyError: It must be there and is not.
            ValueError: It makes no sense; TypeError and OverflowError likewise.
        """
        given: Any | EllipsisType = self.find(config) if self.find else config.get(self.name, ...)
        if given is None and callable(self.default):
            given = ...
        if given is ...:
            if self.default is ...:
                raise KeyError(self.name)
            given = self.default(known) if callable(self.default) else self.default
        if self.values is None:
            return self.into(given, known)
        if not isinstance(given, str) or given not in self.values:
            raise UserError(f"{self.name} is {given!r}; accepted: {', '.join(self.values)}")
        return self.values[given]

    def write(self, spec: Spec) -> Any:
        """The key's value."""
        value = getattr(spec, self.field)
        if self.values is None:
            return self.back(value, spec)
        return next(theirs for theirs, ours in self.values.items() if ours == value)

    def says(self, config: Config, spec: Spec) -> bool:
        """Whether a config has this value of the network already."""
        try:
            return bool(self.read(config, asdict(spec)) == getattr(spec, self.field))
        except (KeyError, UserError, ValueError, TypeError, ArithmeticError):
            return False


@dataclass(frozen=True)
class Head:
    """What a class of `transformers` puts on the network.

    Attributes:
        fields: Of `Spec`.
        names: Our tensors -> theirs, as in `Family.body`, of what is not in the base model.
        classifies: Whether there is one output per label.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    classifies: bool = False


@dataclass(frozen=True)
class Place:
    """Where one of our tensors, or some rows of it, is among theirs.

    Attributes:
        name: Their tensor, without prefix.
        in_base: Whether the base model has it, so that other classes put the prefix before its name.
        part: Which of the equal `parts` of their tensor.
        parts: Of their tensor.
    """

    name: str
    in_base: bool
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Family:
    """A `model_type` of `transformers`.

    Attributes:
        name: The `model_type`.
        prefix: What other classes than the base model's put before its tensors' names.
        keys: Of config.json, in the order in which they are read and written.
        fields: Of `Spec`, where the whole family has the same.
        body: Our tensors -> theirs, without prefix. `{i}` is the block; names without end stand for weight and bias.
            `a[1]` is the second of the equal parts of their tensor a; `a + b` are rows of one after rows of the other.
        heads: Class -> head; the first is the base model, and stands in for classes that are not listed.
        only: Keys that must have one value: key -> (default, value).
        transposed: Whether matrices in blocks are stored [inputs, outputs].
        batched: Tensors of theirs with a first axis of 1.
        modules: Our linears -> their modules in memory, where `transformers` calls them otherwise than on disk.
    """

    name: str
    prefix: str
    keys: tuple[Key, ...]
    fields: Mapping[str, Any]
    body: dict[str, str]
    heads: dict[str, Head]
    only: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    transposed: bool = False
    batched: frozenset[str] = frozenset()
    modules: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The class of the base model."""
        return next(iter(self.heads))

    def architecture(self, config: Config) -> str:
        """The class whose head we read."""
        given = config.get("architectures") or ()
        return next((name for name in given if name in self.heads), self.base)

    def spec(self, config: Config) -> Spec:
        """The network that a config describes.

        Raises:
            UserError: A key has a value that we cannot run; names the key, the value and what is accepted.
            KeyError: A key is missing.
            ValueError: A value makes no sense. So do TypeError, OverflowError and ZeroDivisionError.
        """
        for name, (default, value) in (self.only | NEVER).items():
            if (given := config.get(name, default)) != value:
                raise UserError(f"{name} is {given!r}; this version runs {value!r} only")
        known: dict[str, Any] = dict(self.fields)
        for key in self.keys:
            known[key.field] = key.read(config, known)
            most = MOST.get(key.field, MOST_UNITS)
            if isinstance(known[key.field], int) and known[key.field] > most:
                raise UserError(f"{key.name} is {config.get(key.name)}; accepted: at most {most}")
        if "patch" in known:
            known["positions"] = known["leads"] + (known["image"] // known["patch"]) ** 2
        head = self.heads[self.architecture(config)]
        spec = Spec(**known | head.fields | ({"labels": len(labels(config))} if head.classifies else {}))
        self._check(spec)
        return spec

    def _check(self, spec: Spec) -> None:
        names = {key.field: key.name for key in self.keys}
        unused = {"kv_heads", "first_position", "registers"}  # those that may be 0
        sizes = [getattr(spec, name) for name in names if name not in unused]
        if not all(math.isfinite(size) and size > 0 for size in sizes if isinstance(size, (int, float))):
            raise ValueError(f"sizes must be positive; got {shown(spec)}")
        if spec.kv_heads < 0 or (spec.kv_heads and spec.heads % spec.kv_heads):
            raise ValueError(f"{names['heads']} must be a multiple of {names['kv_heads']}; got {shown(spec)}")
        if spec.image and spec.image < spec.patch:
            raise ValueError(f"{names['image']} must be at least {names['patch']}; got {shown(spec)}")

    def config(self, spec: Spec, architecture: str, base: Config) -> dict[str, Any] | None:
        """The config of a network, or None where the family has no such network.

        Args:
            spec: The network.
            architecture: Its class.
            base: Its other keys are kept, and its wording where it says the same.
        """
        made: dict[str, Any] = {"architectures": [architecture], "model_type": self.name}
        try:
            for key in self.keys:
                if not ((base or key.optional) and key.says(base, spec)):
                    made[key.name] = key.write(spec)
            whole = dict(base) | made
            expressed = replace(self.spec(whole), **HEADLESS) == replace(spec, **HEADLESS)
        except (KeyError, UserError, ValueError, TypeError, ArithmeticError, StopIteration):
            return None
        return whole if expressed else None

    def class_for(self, spec: Spec) -> str | None:
        """The class with the network's head, or None where there is none; the base model where it has no head."""
        for name, head in reversed(self.heads.items()):
            wanted = HEADLESS | head.fields
            if head.classifies == bool(spec.labels) and (
                not spec.labels or all(getattr(spec, key) == wanted[key] for key in HEADLESS if key != "labels")
            ):
                return name
        return None

    def places(self, name: str, architecture: str) -> list[Place]:
        """Where one of our tensors is among theirs; nowhere: an empty list."""
        block = re.match(r"h\.(\d+)\.", name)
        pattern = f"h.{{i}}.{name[block.end() :]}" if block else name
        stem, _, end = pattern.rpartition(".")
        for table in (self.heads[architecture].names, self.body):
            theirs, suffix = (table[pattern], "") if pattern in table else (table.get(stem), f".{end}")
            if theirs is not None:
                return [self._place(each, suffix, block, table is self.body) for each in theirs.split(" + ")]
        return []

    def _place(self, theirs: str, suffix: str, block: re.Match[str] | None, in_base: bool) -> Place:
        stem, bracket, part = theirs.rstrip("]").partition("[")
        parts = sum(each.startswith(f"{stem}[") for each in self.body.values()) if bracket else 1
        name = stem.replace("{i}", block[1] if block else "")
        return Place(name + suffix, in_base, int(part or 0), parts)

    def module(self, block: int, short: str, architecture: str) -> tuple[str, Place]:
        """The module in memory that a linear layer is in, and its place there."""
        (place,) = self.places(f"h.{block}.{short}.weight", architecture)
        known = self.modules.get(f"h.{{i}}.{short}")
        renamed = replace(place, name=known.replace("{i}", str(block))) if known else place
        return self.full(renamed, architecture).removesuffix(".weight"), place

    def full(self, place: Place, architecture: str) -> str:
        """The name of a tensor in a class."""
        return (self.prefix if place.in_base and architecture != self.base else "") + place.name

    def canonical(self, name: str) -> str:
        """Their name of a tensor without prefix, and with today's end where it has one of old."""
        short = name.removeprefix(self.prefix)
        return short.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

    def to_stored(self, name: str, tensor: Tensor, place: Place) -> Tensor:
        """One of our tensors, or its rows, as they store it, but for the other parts."""
        stem, _, end = name.rpartition(".")
        if end == "bias":
            tensor = tensor.reshape(-1)
        elif _is_linear(name):
            matrix: Tensor = as_matrix(stem, tensor)
            tensor = matrix.T if self._turned(name) else matrix
        return tensor[None] if place.name in self.batched else tensor

    def fused_dim(self, name: str) -> int:
        """The axis along which tensors are fused: that of the outputs."""
        return 1 if _is_linear(name) and self._turned(name) else 0

    def stored_shape(self, name: str, shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
        """Shape of their tensor that one of ours of a shape, or rows of it, is in."""
        stem, _, end = name.rpartition(".")
        if end == "bias":
            shape = (math.prod(shape),)
        elif _is_linear(name):
            inputs = shape[-1] if stem.endswith((".q", ".k", ".v")) else math.prod(shape[1:])
            shape = (math.prod(shape) // inputs, inputs)
            shape = shape[::-1] if self._turned(name) else shape
        dim = self.fused_dim(name)
        fused = tuple(size * place.parts if i == dim else size for i, size in enumerate(shape))
        return (1, *fused) if place.name in self.batched else fused

    def _turned(self, name: str) -> bool:
        """Whether they store a matrix as [inputs, outputs]."""
        return self.transposed and name.startswith("h.")

    def from_stored(self, name: str, stored: Tensor, place: Place) -> Tensor:
        """The other way round: numbers in the order of our tensor, or of its rows."""
        part = stored.chunk(place.parts, self.fused_dim(name))[place.part] if place.parts > 1 else stored
        return part.T if _is_linear(name) and self._turned(name) else part


def _is_linear(name: str) -> bool:
    """Whether one of our tensors is the matrix of a linear layer."""
    stem, _, end = name.rpartition(".")
    return end == "weight" and (stem.startswith("head") or re.sub(r"^h\.\d+\.", "", stem) in LINEARS)


def shown(spec: Spec) -> str:
    """Fields of a network that are not at their default, for people."""
    default = asdict(Spec(0, 0, 0, 0, 0, 0, 0))
    return ", ".join(f"{key} = {value}" for key, value in asdict(spec).items() if value != default[key])


def labels(config: Config) -> tuple[str, ...]:
    """Class names in the order of the outputs; `transformers` gives names to those that have none, and to two if none.

    Raises:
        ValueError: The numbers are not 0, 1, 2, ...
    """
    given = config.get("id2label")
    if not given:
        return tuple(f"LABEL_{i}" for i in range(int(config.get("num_labels", 2))))
    names = {int(number): str(name) for number, name in dict(given).items()}
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"id2label must number the labels 0, 1, 2, ...; got {', '.join(map(str, sorted(names)))}")
    return tuple(names[i] for i in range(len(names)))
