"""What is read from a compiled program: a text with known counts, a scanned product, and LoRA on 8 devices."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks._collectives import collectives, product_flops, totals
from benchmarks.compile_7b import Config

from ..eight_devices import eight_devices

PROGRAM = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %w = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %gathered = bf16[8,16]{1,0} all-gather(%w), dimensions={1}, replica_groups=[2,4]<=[8]
  %product = f32[8,8]{1,0} dot(%gathered, %gathered), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %both = (f32[8,8]{1,0}, f32[3]{0}) all-reduce(%product, %p), to_apply=%add
  ROOT %out = (s32[], bf16[8,4]{1,0}) tuple(%p, %w)
}

%condition (p.1: (s32[], bf16[8,4])) -> pred[] {
  %p.1 = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%outer_body (q: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %q = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %loop.1 = (s32[], bf16[8,4]{1,0}) while(%q), condition=%condition, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %begun = (bf16[8,4]{1,0}, bf16[8,16]{1,0}) all-gather-start(%a), dimensions={1}
  %done = bf16[8,16]{1,0} all-gather-done(%begun)
  %loop = (s32[], bf16[8,4]{1,0}) while(%a), condition=%condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %result = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run():
    found = totals(collectives(PROGRAM))
    gathered = 8 * 16 * 2
    assert found["all-gather"] == {"count": 1 + 15, "bytes": 16 * gathered}
    assert found["all-reduce"] == {"count": 2 * 15, "bytes": 15 * 4 * (64 + 3)}
    assert found["reduce-scatter"]["count"] == found["all-to-all"]["count"] == 0
    assert product_flops(PROGRAM) == 15 * 2 * 8 * 8 * 16


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="loop: the program does not say how often"):
        collectives(PROGRAM.replace('"n":"5"', '"m":"5"'))


@pytest.mark.optimized
def test_products_of_a_scanned_model_are_counted():
    weights, x = jnp.ones((7, 16, 16)), jnp.ones((4, 16))

    def fn(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    text = jax.jit(jax.grad(fn)).lower(weights, x).compile().as_text()
    # Forward, and the two gradients of every layer but the input's of the first, which a scan computes as well.
    assert product_flops(text) == 7 * 3 * 2 * 4 * 16 * 16


def compiled(config, *variants):
    """What each variant's program holds and sends on 8 devices."""
    settings = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, "-m", "benchmarks._compile_program", settings, ",".join(variants)]
    environment, root = os.environ | eight_devices(), Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(variants, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
def test_adapters_send_no_frozen_matrix_more_than_a_backward_pass_needs():
    config = Config(
        vocabulary=96,
        width=64,
        heads=4,
        mlp_width=160,
        layers=3,
        sequences=8,
        length=24,
        rank=4,
        directions=8,
        mesh=(4, 2),
    )
    found = compiled(config, "forward", "norms", "lora", "lift", "lift_blocks", "osf", "galore", "bank", "pissa start")
    forward, bank, start, galore = (found.pop(name) for name in ("forward", "bank", "pissa start", "galore"))
    assert bank["of_weights"] == forward["of_weights"]
    assert all(v["count"] == 0 for v in start["of_weights"].values())
    # Moments of 8 directions out of 64, and the directions, both split over all devices as the matrices are.
    assert galore["optimizer_bytes"] < 1.2 * (2 * 8 + 8) / 64 * galore["trainable_bytes"]
    bare = found.pop("norms")
    norms = bare["of_weights"]
    assert sum(v["count"] for v in norms.values()) >= 7 * 3  # the measure sees them
    for variant, values in found.items():
        kinds = values["of_weights"]
        # Gradients of matrices are summed over devices where a method picks or multiplies them.
        summed = ("all-reduce", "reduce-scatter") if variant != "lora" else ()
        assert all(kinds[k]["count"] <= norms[k]["count"] for k in kinds if k not in summed), (variant, kinds, norms)
        parts = sum(values[f"{key}_bytes"] for key in ("frozen", "trainable", "optimizer"))
        if variant != "osf":  # whose step reads the frozen factors from the optimizer's state
            assert 0 <= values["argument_bytes"] - parts <= 8 * 24 * 4 // 4 + 64  # beside them: tokens, step and key
    whole = 4 * found["lift"]["trainable_values"]
    assert found["lift"]["trainable_bytes"] * 8 == found["lift_blocks"]["trainable_bytes"] * 8 == whole
    assert found["lift_blocks"]["collectives"]["all-gather"] == bare["collectives"]["all-gather"]
    factors = found["osf"]["trainable_values"]
    assert found["osf"]["trainable_bytes"] < 1.1 * 4 * factors / 8
    assert found["osf"]["optimizer_bytes"] < 1.1 * (2 + 1) * 4 * factors / 8  # two moments, and the frozen factors
