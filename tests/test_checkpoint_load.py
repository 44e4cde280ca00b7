"""What load_model puts on the device: dtypes, shardings, and how much memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from quota_jax.checkpoint import open_checkpoint
from quota_jax.errors import QuotaError
from tests.checkpoint_samples import (
    BF16,
    NONE,
    W4,
    assert_same,
    is_quantization_scale,
    random_blocks,
    stack,
    stacked_params,
    tiny_config,
    write,
)

F32 = np.dtype(np.float32)
ROOT = Path(__file__).resolve().parent.parent


def test_names_of_one_layer_and_of_many_stack_alike(tmp_path):
    config = tiny_config(layers=1)
    arrays = random_blocks(config)
    write(tmp_path / "ckpt", config, arrays)
    params = stacked_params(open_checkpoint(tmp_path / "ckpt").load_model())
    assert params["decoder.layers.norm1.scale"].shape == (1, config.text.hidden_size)
    assert_same(params, stack(arrays))


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, np.float16])
def test_load_dtype_casts_floats_and_leaves_codes_and_their_scales(tmp_path, dtype):
    config = tiny_config()
    arrays = random_blocks(config, W4, BF16)
    write(tmp_path / "ckpt", config, arrays, W4)
    params = stacked_params(open_checkpoint(tmp_path / "ckpt").load_model(dtype=dtype))
    expected = stack(arrays)
    fixed = 0
    for name, array in expected.items():
        if name.endswith(".packed") or is_quantization_scale(name, expected):
            assert params[name].tobytes() == array.tobytes()
            fixed += 1
        else:
            assert params[name].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(params[name], array.astype(np.dtype(dtype)))
    assert fixed == 2 * (4 + 2 + 4)  # vision qkv o up down, projector, decoder qkv o gate_up down


def test_mixed_dtypes_load_as_documented(tmp_path):
    config = tiny_config()
    arrays = random_blocks(config, NONE, BF16)
    norm, bias = "decoder.layers.norm1.scale", "vision.layers.attn.o.bias"
    for layer in range(config.text.num_layers):
        block = arrays[f"decoder_layer_{layer:03d}"]
        block[norm] = block[norm].astype(F32)  # vectors, alike in all layers: kept
    block = arrays["vision_layer_001"]
    block[bias] = block[bias].astype(F32)  # a vector that differs between layers: dominant dtype
    head = arrays["head"]
    head["decoder.head.weight"] = head["decoder.head.weight"].astype(F32)  # a matrix: dominant
    write(tmp_path / "ckpt", config, arrays)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    assert checkpoint.dtype == BF16
    assert_same(checkpoint.read_block("head"), head)
    params = stacked_params(checkpoint.load_model())
    assert {name for name, array in params.items() if array.dtype == F32} == {norm}
    np.testing.assert_array_equal(
        params["decoder.head.weight"], head["decoder.head.weight"].astype(BF16)
    )


def test_load_refuses_other_dtypes(tmp_path):
    config = tiny_config()
    write(tmp_path / "ckpt", config, random_blocks(config))
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    for dtype in ("int8", "float64", "nonsense"):
        with pytest.raises(QuotaError, match=dtype):
            checkpoint.load_model(dtype=dtype)


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_sharded_load_places_every_parameter(tmp_path, kind):
    config = tiny_config()
    arrays = random_blocks(config, W4, F32)
    path = write(tmp_path / "ckpt", config, arrays, W4)
    expected: dict[str, Any] = stack(arrays)
    np.savez(tmp_path / "expected.npz", **expected)
    program = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from quota_jax.checkpoint import open_checkpoint
from quota_jax.models.params import flatten_params
kind = AxisType.Explicit if sys.argv[3] == "explicit" else AxisType.Auto
mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
specs = {"decoder.layers.mlp.gate_up.packed": P(None, "x"), "decoder.embed.weight": P("x"),
         "vision.layers.attn.o.bias": P(None, "x")}
def place(name):
    return NamedSharding(mesh, specs.get(name, P()))
params = flatten_params(open_checkpoint(sys.argv[1]).load_model(sharding=place))
expected = np.load(sys.argv[2])
assert set(params) == set(expected.files)
for name, array in params.items():
    assert array.sharding.is_equivalent_to(place(name), array.ndim), (name, array.sharding)
    assert array.addressable_shards[0].data.size == array.size // (2 if name in specs else 1), name
    np.testing.assert_array_equal(np.asarray(array), expected[name])
print("placed", len(params))
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    arguments = [path, tmp_path / "expected.npz", kind]
    done = run_python(program, *arguments, env=environment)
    assert done == f"placed {len(expected)}\n"


def test_load_and_write_hold_one_block_at_a_time(tmp_path):
    """182 MiB in blocks of 9 MiB; on the CPU the device's copy counts as host memory too."""
    program = """
import re, sys
from pathlib import Path
import numpy as np, jax
sys.path.insert(0, ".")
from quota_jax.checkpoint import open_checkpoint
from quota_jax.models.params import blocks
from tests.checkpoint_samples import NONE, random_blocks, tiny_config, write, writer

def reset():
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")

def status(key):
    text = Path("/proc/self/status").read_text()
    return int(re.search(key + r":\\s+(\\d+) kB", text)[1]) / 1024

small = tiny_config()
write(Path(sys.argv[1], "warm"), small, random_blocks(small))
open_checkpoint(Path(sys.argv[1], "warm")).load_model()

config = tiny_config(layers=20, hidden=512)
start = reset()
with writer(Path(sys.argv[1], "big"), config) as out:
    for name, params in blocks(config).items():
        out.write_block(name, {k: np.ones(s.shape, np.float32) for k, s in params.items()})
    out.finish()
write_peak = status("VmHWM") - start
checkpoint = open_checkpoint(Path(sys.argv[1], "big"))
start = reset()
model = checkpoint.load_model()
load_peak = status("VmHWM") - start
sizes = checkpoint.sizes()
print(write_peak, load_peak, max(sizes["blocks"].values()) / 2**20, sizes["logical"] / 2**20)
"""
    # Makes the C allocator return freed arrays, so that the peak is of what is held; serialized
    # programs are none of it.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "262144",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    output = run_python(program, tmp_path, env=environment)
    write_peak, load_peak, block, model = map(float, output.split())
    assert model > 19 * block > 170
    # TensorStore holds further copies of the block in its hands; 16 MiB is slack.
    assert write_peak < 3 * block + 16
    assert load_peak < model + 4 * block + 16


def run_python(program, *arguments, env=None):
    """Standard output of a program run from the top folder; fails with its error output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
