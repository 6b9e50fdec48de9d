"""Products by whichever library, and which one that is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import spec, weights
from test_stacked import SHARDS, assert_alike, caff_jobs, serial, together

from lamina import products, stack
from lamina.metrics import evaluate
from lamina.stack import Stacked

LIBRARIES = pytest.mark.parametrize("library", ["torch", "onednn"])


@pytest.fixture(autouse=True)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "library" in request.fixturenames:
        library = request.getfixturevalue("library")
        monkeypatch.setattr(products, "prefers_onednn", lambda: library == "onednn")


@LIBRARIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_whatever_lies_in_memory(library: str, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    x, bias, tolerance = drawn(4, 10, 6), drawn(5), 1e-5 if dtype == torch.float32 else 0.1
    inputs = (x, x[:, -3:], x.transpose(0, 1), x[:1].expand(4, 10, 6), drawn(4, 10, 12)[..., :6], x[:1, :3])
    matrices = (drawn(5, 6), drawn(6, 5).T, drawn(5, 12)[:, 3:9], drawn(10, 6)[::2])
    for given in inputs:
        for weight in matrices:
            for added in (bias, None):
                wanted = F.linear(given.float(), weight.float(), None if added is None else added.float())
                found = products.linear(given, weight, added).float()
                torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for left, right in (
        (drawn(40, 5), drawn(40, 6)),
        (drawn(40, 6), drawn(40, 5)),
        (drawn(1, 5).expand(40, 5), drawn(40, 6)),
    ):
        found = products.outer(left, right)
        torch.testing.assert_close(found.float(), left.float().T @ right.float(), rtol=tolerance, atol=4 * tolerance)
        assert found.is_contiguous()


@LIBRARIES
@pytest.mark.parametrize("alone", [0, 10**12], ids=["one by one", "as a batch"])
def test_devices_together_by_either_library(library: str, alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "_ALONE", alone)
    jobs = caff_jobs(spec(3), [2] * 4)
    assert_alike(together(jobs, SHARDS, spec(3)), serial(jobs, SHARDS, spec(3)), jobs)


@LIBRARIES
def test_evaluation_by_either_library(library: str) -> None:
    params = weights(spec(3))
    params["head.weight"] = params["head.weight"] * 50
    plain, fast = (evaluate(spec(3), params, SHARDS, 3, 2, ops=ops) for ops in (Stacked(), Stacked(torch.bfloat16)))
    wanted = evaluate(spec(3), params, SHARDS, 3)
    assert plain.correct.tolist() == wanted.correct.tolist() and wanted.correct.sum() > 0
    assert abs(int(fast.correct.sum()) - int(wanted.correct.sum())) <= 3


@pytest.mark.parametrize(
    ("capability", "cpuinfo", "onednn"),
    [
        ("AVX512", "vendor_id\t: AuthenticAMD\n", hasattr(torch.ops.mkldnn, "_linear_pointwise")),
        ("AVX2", "vendor_id\t: AuthenticAMD\n", False),
        ("AVX512", "vendor_id\t: GenuineIntel\n", False),
        ("AVX512", None, False),
    ],
)
def test_the_machine_decides(
    capability: str, cpuinfo: str | None, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **given: Any) -> str:
        assert path == Path("/proc/cpuinfo")
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "read_text", read)
    assert products.prefers_onednn.__wrapped__() == onednn
