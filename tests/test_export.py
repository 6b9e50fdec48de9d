"""Runs as folders for `transformers` and adapters for `peft`: `pytest tests/test_export.py`."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from support import Table, begin, write_world
from test_families import batch, make
from vocabularies import write_bert

from lamina import adapter, card, checkpoint, cli, model
from lamina.data.text import ALPHABET
from lamina.errors import UserError
from lamina.export import export
from lamina.layout import Params
from lamina.spec import LINEARS, Lora, Spec, layout
from lamina.turn import generator

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # peft 0.21 asks for it
    pytest.mark.filterwarnings(
        "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"
    ),  # untied here
]


def drawn(spec: Spec, params: Params) -> Params:
    """The same with random additions, B included."""
    rng = torch.Generator().manual_seed(7)
    shape = layout(spec)
    added = {
        n: 0.3 * torch.randn(shape.shape(n), generator=rng) for n, row in shape.params.items() if row.part == "lora"
    }
    return {name: added[name] if name in added else params[name] for name in shape.params}


def logits(theirs: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(theirs(**given).logits)


@pytest.mark.parametrize("targets", [LINEARS, ("attn.q", "attn.v")], ids=["all", "qv"])
@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "gpt2 labels", "bert labels", "roberta labels", "distilbert labels", "vit", "deit", "dinov2"),
        *(
            "dinov2 registers",
            "llama",
            "llama tied, all heads, theta, biases",
            "llama labels",
            "qwen2",
            "qwen3",
            "mistral",
        ),
    ],
)
def test_an_adapter_computes_what_ours_does(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    theirs = make(tmp_path / "base", name)
    plain_spec, params = checkpoint.load(tmp_path / "base")
    spec = replace(plain_spec, lora=Lora(3, 5.0, targets))
    params = drawn(spec, params)
    if name in ("bert labels", "gpt2", "roberta labels"):  # a head that was trained too
        params |= {n: p + 0.1 for n, p in params.items() if n.startswith("head.")}
    adapter.write(tmp_path / "adapter", tmp_path / "base", spec, params, "base")
    inputs, given = batch(spec)
    expected = model.forward(spec, params, model.batch(spec, inputs))
    before = logits(theirs, given)
    both = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    got = logits(both, given)
    assert not torch.allclose(before, got, atol=1e-2)
    torch.testing.assert_close(got, expected.reshape(got.shape), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_few_blocks(tmp_path: Path) -> None:
    """What is not there, and what is zero, changes nothing."""
    make(tmp_path / "base", "llama")
    plain_spec, params = checkpoint.load(tmp_path / "base")
    spec = replace(plain_spec, lora=Lora(2, 2.0, ("attn.q",)))
    params = {n: p for n, p in drawn(spec, params).items() if "h.0.attn.q.lora" not in n}
    adapter.write(tmp_path / "adapter", tmp_path / "base", spec, params, "base")
    about = json.loads((tmp_path / "adapter" / adapter.CONFIG).read_text())
    assert about["target_modules"] == ["model.layers.1.self_attn.q_proj"] and about["modules_to_save"] is None
    assert (about["task_type"], about["r"], about["lora_alpha"]) == ("CAUSAL_LM", 2, 2.0)
    tensors = load_file(tmp_path / "adapter" / adapter.WEIGHTS)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        f"base_model.model.model.layers.1.self_attn.q_proj.lora_{end}.weight": shape
        for end, shape in {"A": (2, 12), "B": (12, 2)}.items()
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda spec, params: (spec, params | {"norm.weight": params["norm.weight"] + 1}),
            "norm.weight is not as in the",
        ),
        (lambda spec, params: (replace(spec, adapter=3), params), "it has bottlenecks or exits besides"),
        (
            lambda spec, params: (spec, params | {"h.0.attn.q.sparse": torch.ones(1)}),
            "its linears have changed besides, not by low-rank additions alone",
        ),
        (lambda spec, params: (replace(spec, blocks=1), params), ""),
    ],
)
def test_what_is_no_adapter(change: Any, says: str, tmp_path: Path) -> None:
    make(tmp_path / "base", "llama")
    plain_spec, params = checkpoint.load(tmp_path / "base")
    spec = replace(plain_spec, lora=Lora(2, 2.0, ("attn.q",)))
    network, changed = change(spec, drawn(spec, params))
    if not says:
        adapter.write(tmp_path / "adapter", tmp_path / "base", network, changed, "base")
        return
    with pytest.raises(UserError, match=f"^{says}"):
        adapter.write(tmp_path / "adapter", tmp_path / "base", network, changed, "base")
    assert not (tmp_path / "adapter").exists()


# Runs


def finished(folder: Path, **changes: Any) -> Path:
    """A run of one round on the characters of Shakespeare."""
    table: Table = write_world(folder, rounds=1, fleet=[{"name": "all"}], **changes)
    run = begin(table | {"networks": [str(folder / "tiny-2")]}, folder / "runs")
    run.play()
    return run.folder


def test_a_run_as_a_folder(tmp_path: Path) -> None:
    run = finished(tmp_path, method={"name": "fedavg"})
    (tmp_path / "tiny-2" / "LICENSE").write_text("free")
    done = export(run, tmp_path / "out")
    assert (done.architecture, done.beside, done.adapter, done.labels) == ("GPT2LMHeadModel", (), "", ())
    spec, params = checkpoint.load(run / "model")
    ids = torch.arange(20).reshape(2, 10)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        logits(theirs, {"input_ids": ids}), model.forward(spec, params, ids), rtol=1e-5, atol=1e-5
    )
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("LICENSE", "README.md", "config.json", "model.safetensors")
    ]
    said = (tmp_path / "out" / "README.md").read_text()
    for part in ("base_model: tiny-2", "1 round of `fedavg`", "## Device classes", "| all, mean over devices |", "up"):
        assert part in said
    again = checkpoint.load(tmp_path / "out")[1]
    assert all(torch.equal(again[name], params[name]) for name in params)
    with pytest.raises(UserError, match="exists already"):
        export(run, tmp_path / "out")
    short = export(run, tmp_path / "out", "bfloat16", force=True)
    assert {t.dtype for t in load_file(short.folder / "model.safetensors").values()} == {torch.bfloat16}


def test_the_lines_of_the_card_run(tmp_path: Path, capsys: Any) -> None:
    run = finished(tmp_path, method={"name": "fedavg"})
    done = export(run, tmp_path / "out")
    code = (done.folder / "README.md").read_text().split("```python\n")[1].split("\n```")[0]
    exec(code.replace("max_new_tokens=40", "max_new_tokens=4, do_sample=False"), {"folder": str(done.folder)})
    said = capsys.readouterr().out
    assert said.startswith("Once upon a time") and len(said) == len("Once upon a time") + 5


@pytest.mark.parametrize("targets", ["all", "qv"])
def test_a_lora_run_has_an_adapter_too(targets: str, tmp_path: Path) -> None:
    method = {"name": "lora", "rank": 2, "targets": targets}
    done = export(finished(tmp_path, method=method, local={"steps": 4, "batch_size": 4, "lr": 0.05}), tmp_path / "out")
    assert done.adapter is True and "`adapter/`" in (done.folder / "README.md").read_text()
    ids = {"input_ids": torch.arange(20).reshape(2, 10)}
    whole = logits(transformers.AutoModelForCausalLM.from_pretrained(done.folder), ids)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-2")
    before = logits(base, ids)
    after = logits(PeftModel.from_pretrained(base, done.folder / "adapter").eval(), ids)
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(after, whole, rtol=1e-5, atol=1e-5)


def test_weights_that_changed_besides_are_no_adapter(tmp_path: Path) -> None:
    done = export(finished(tmp_path, method={"name": "fedex-lora", "rank": 2}), tmp_path / "out")
    assert isinstance(done.adapter, str) and done.adapter.endswith("is not as in the network that it began as")
    assert not (done.folder / "adapter").exists()
    assert done.to_json()["adapter"] is False and done.to_json()["no_adapter"] == done.adapter
    assert "There is no adapter for peft: h." in (done.folder / "README.md").read_text()


def test_what_stands_beside_is_said(tmp_path: Path) -> None:
    done = export(finished(tmp_path, method={"name": "adapters", "width": 2}), tmp_path / "out")
    assert done.beside == ("adapters",) and (done.folder / "lamina.safetensors").is_file()
    assert (
        "The adapters are in `lamina.safetensors`, and run in lamina alone." in (done.folder / "README.md").read_text()
    )


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    run = finished(tmp_path, method={"name": "lora", "rank": 1})
    capsys.readouterr()
    cli.export(run)
    said = capsys.readouterr().out
    assert "GPT2LMHeadModel in float32" in said and "adapter" in said
    cli.export(run, tmp_path / "again", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["class"], told["adapter"]) == ("lamina.export/1", "GPT2LMHeadModel", True)


def test_runs_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run: it has no config\.toml"):
        export(tmp_path, tmp_path / "out")
    run = finished(tmp_path, method={"name": "fedavg"})
    with pytest.raises(UserError, match="no dtype 'float17'; did you mean 'float16'"):
        export(run, tmp_path / "out", "float17")
    spec, params = checkpoint.load(run / "model")
    large = params | {"norm.weight": params["norm.weight"] + 1e5}
    checkpoint.write(run / "model", spec, large, torch.float32, {"alphabet": ALPHABET})
    with pytest.raises(UserError, match=r"ln_f.weight has values up to 1e\+05, beyond float16; take another type"):
        export(run, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
    (run / "summary.json").unlink()
    run = run.rename(tmp_path / "my run")
    with pytest.raises(UserError, match=f"is not finished; go on with: lamina run --resume '{run}'$"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("name", ["bert labels", "distilbert labels", "gpt2 labels", "vit", "llama labels"])
@pytest.mark.parametrize(("pool", "pooler"), [("mean", ""), ("first", "relu"), ("mean", "tanh"), ("first_mean", "")])
def test_a_head_that_no_class_has_in_the_lines_of_the_card(
    name: str, pool: Any, pooler: Any, tmp_path: Path, capsys: Any
) -> None:
    make(tmp_path / "base", name)
    found, params = checkpoint.load(tmp_path / "base")
    spec = replace(found, pool=pool, pooler=pooler, head_bias=True, labels=3)
    rng = torch.Generator().manual_seed(1)
    shape = layout(spec)
    params = {n: params[n] if "head." not in n else torch.randn(shape.shape(n), generator=rng) for n in shape.params}
    if name == "distilbert labels" and (pool, pooler) == ("first", "relu"):
        return  # which is what DistilBERT has
    checkpoint.write(tmp_path / "out", spec, params, torch.float32, {}, tmp_path / "base")
    done = card.Exported(tmp_path / "out", "", "float32", (), ("head",), "")
    inputs, given = batch(spec)
    lines = [
        line for line in card._head_code(done, spec) if "reader" not in line and not line.startswith("from transf")
    ]
    lines.insert(0, "from transformers import AutoModel")
    space: dict[str, Any] = {"folder": str(done.folder), "given": given}
    with torch.no_grad():
        exec("\n".join(lines), space)
    expected = model.forward(spec, params, model.batch(spec, inputs))[:, 0]
    torch.testing.assert_close(space["logits"], expected, rtol=1e-5, atol=1e-5)


def test_the_lines_of_the_worked_example_count_what_the_run_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """An encoder with a head on the mean of its tokens, in `transformers`, over all test texts; some are cut."""
    page = Path(__file__).parents[1] / "docs" / "examples" / "banking77.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    make(tmp_path / "bert", "bert", vocab_size=150, max_position_embeddings=64)
    shutil.copyfile(write_bert(tmp_path / "words") / "vocab.txt", tmp_path / "bert" / "vocab.txt")
    (tmp_path / "data").mkdir()
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    for part, texts in {"train": 90, "test": 300}.items():
        drawn = ((i, generator(part, i)) for i in range(texts))
        lines = [f"{' '.join(rng.choice(words[i % 3 :], rng.integers(1, 90)))},{words[i % 3]}" for i, rng in drawn]
        (tmp_path / "data" / f"banking77_{part}.csv").write_text("\n".join(["text,category", *lines]), encoding="utf-8")
    task = {"name": "text-classification", "path": "data/banking77_train.csv", "test_path": "data/banking77_test.csv"}
    table = write_world(tmp_path, rounds=2, networks=["bert"], method={"name": "fedavg"}, fleet=[{"name": "all"}])
    changes = {"task": task | {"devices": 4, "pool": "mean"}, "local": {"lr": 0.005, "epochs": 4, "batch_size": 4}}
    run = begin(table | changes, tmp_path / "runs")
    summary = run.play()
    export(run.folder, tmp_path / "banking77-minilm")
    capsys.readouterr()
    exec(code, {})
    right = int(capsys.readouterr().out.removesuffix(" of 300\n"))
    assert run.task.notes
    assert right == round(300 * summary["accuracy"]["after"]["weighted"]) and 110 < right < 290, right
