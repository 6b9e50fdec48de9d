"""Time and memory of `lamina import`, of loading, and of reading sizes alone, on networks of about 100 MB and more.

    python benchmarks/import.py benchmarks/import.json [NAME=FOLDER ...]

Networks of each family are drawn at random, written and imported, each command in a fresh process whose peak resident
memory is that of the operating system's books (Linux). `empty` is a network of a few kilobytes: what the process itself
takes. Folders on the command line are imported too, and what they compute is compared with `transformers`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lamina import checkpoint, files, model
from lamina.machine import environment
from lamina.spec import Spec, layout

_RMS = {"norm": "rms", "gated": True, "act": "silu", "biases": (), "rotary": 10000.0}
_BERT = {"post_norm": True, "final_norm": False, "embed_norm": True, "causal": False, "types": 2, "act": "gelu"}
_VIT = {"causal": False, "act": "gelu", "patch": 16, "image": 224, "leads": 1, "norm_eps": 1e-12}
_VIT |= {"labels": 1000, "pool": "first", "head_bias": True}
NETWORKS: dict[str, tuple[Spec, torch.dtype]] = {
    "empty": (Spec(1, 8, 2, 4, 8, 16, 8), torch.float32),
    "gpt2, 100 MB": (Spec(7, 512, 8, 64, 2048, 5000, 512), torch.float32),
    "bert, 100 MB": (Spec(7, 384, 12, 32, 1536, 30522, 512, norm_eps=1e-12, **_BERT), torch.float32),
    "llama, 100 MB, bfloat16": (Spec(12, 512, 8, 64, 1536, 8192, 2048, kv_heads=4, **_RMS), torch.bfloat16),
    "vit, 100 MB": (Spec(13, 384, 6, 64, 1536, 0, 197, **_VIT), torch.float32),
    "llama, 500 MB": (Spec(16, 768, 12, 64, 2048, 16384, 2048, kv_heads=4, **_RMS), torch.float32),
}
_RUN = """
import json, sys, time
start = time.perf_counter()
{body}
seconds = time.perf_counter() - start
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({{"seconds": round(seconds, 3), "peak_rss_bytes": 1024 * peak, "torch": "torch" in sys.modules}}))
"""
_IMPORT = """
from pathlib import Path
from lamina import imports
imports.bring(Path({source!r}), Path({target!r}), force=True)
"""
_LOAD = """
from pathlib import Path
from lamina import checkpoint
checkpoint.load(Path({source!r}))
"""
_SPEC = """
from pathlib import Path
from lamina import hf
hf.read_spec(Path({source!r}))
"""


def measured(body: str) -> dict[str, Any]:
    """Wall time and peak resident memory of some Python in a fresh process."""
    done = subprocess.run([sys.executable, "-c", _RUN.format(body=body)], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(source: Path, target: Path) -> dict[str, Any]:
    """What is measured of a folder; the second run of each, with the files in the cache of the system."""
    made: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in source.glob("*.safetensors"))}
    paths = {"source": str(source), "target": str(target)}
    for name, body in (("read_spec", _SPEC), ("import", _IMPORT), ("load", _LOAD)):
        code = body.format(**paths)
        measured(code)
        made[name] = measured(code)
    return made


def compared(folder: Path) -> dict[str, Any]:
    """The largest difference between our logits, or hidden states, and those of `transformers`."""
    import transformers

    spec, params = checkpoint.load(folder)
    rng = torch.Generator().manual_seed(0)
    if spec.patch:
        inputs = torch.randn(2, spec.channels, spec.image, spec.image, generator=rng)
    else:
        inputs = torch.randint(0, spec.vocab, (2, 64), generator=rng)
    theirs = getattr(transformers, checkpoint.read_config(folder)["architectures"][0]).from_pretrained(folder).eval()
    with torch.no_grad():
        if spec.outputs:
            got, expected = model.forward(spec, params, inputs), theirs(inputs).logits
        else:
            x_BSD = model.run_blocks(spec, params, model.embed(spec, params, inputs), range(spec.blocks))
            got, expected = x_BSD, theirs(inputs).last_hidden_state
            if spec.final_norm:
                got = torch.nn.functional.layer_norm(
                    got, (spec.embed,), params["norm.weight"], params["norm.bias"], spec.norm_eps
                )
    return {
        "largest_difference": float((got.reshape(expected.shape) - expected).abs().max()),
        "largest_value": float(expected.abs().max()),
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", nargs="*", metavar="NAME=FOLDER")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, (spec, dtype) in NETWORKS.items():
            folder = Path(place) / "drawn"
            shape = layout(spec)
            params = {n: torch.randn(shape.shape(n)) for n in shape.params}
            checkpoint.write(folder, spec, params, dtype, {})
            del params
            rows[name] = row(folder, Path(place) / "imported")
            print(name, json.dumps(rows[name]), flush=True)
        for name, _, path in (each.partition("=") for each in given.folders):
            rows[name] = row(Path(path), Path(place) / "imported") | compared(Path(place) / "imported")
            print(name, json.dumps(rows[name]), flush=True)
    files.write_json(given.out, {"environment": environment(), "networks": rows})


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
