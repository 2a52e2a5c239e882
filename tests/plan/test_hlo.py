"""Collectives and arrays, read out of programs whose traffic is known by hand."""

from __future__ import annotations

import os
import subprocess
import sys

from processes import with_devices

from pe_rlhf_jax.plan import hlo
from pe_rlhf_jax.plan.compiled import unsharded

TEXT = """HloModule jit_f, is_scheduled=true

%fused.1 (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
}

%fused.2 (p.2: bf16[4,8]) -> bf16[16,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%p.2), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[100])) -> (s32[], f32[100]) {
  %state = (s32[], f32[100]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %x = f32[100]{0} get-tuple-element(%state), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%counter, %two)
  %reduced = f32[100]{0} all-reduce(%x), channel_id=1, replica_groups=mesh['a'=2,'b'=8] {'b'}, to_apply=%add
  ROOT %tuple = (s32[], f32[100]{0}) tuple(%next, %reduced)
}

%condition (state.2: (s32[], f32[100])) -> pred[] {
  %state.2 = (s32[], f32[100]{0}) parameter(0)
  %counter.2 = s32[] get-tuple-element(%state.2), index=0
  %limit = s32[] constant(%LIMIT%)
  ROOT %less = pred[] compare(%counter.2, %limit), direction=LT
}

ENTRY %main (x0: f32[100], y0: bf16[4,8]) -> f32[100] {
  %x0 = f32[100]{0} parameter(0)
  %y0 = bf16[4,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %first = (s32[], f32[100]{0}) tuple(%zero, %x0)
  %loop = (s32[], f32[100]{0}) while(%first), condition=%condition, body=%body
  %begun = bf16[16,8]{1,0} fusion(%y0), kind=kCustom, calls=%fused.1
  %ended = bf16[16,8]{1,0} fusion(%y0), kind=kCustom, calls=%fused.2, metadata={op_name="jit(f)/layers/q_proj/dot"}
  %sent = (f32[50]{0}, f32[50]{0}, u32[], u32[]) collective-permute-start(%x0), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %done = f32[50]{0} collective-permute-done(%sent)
  ROOT %result = f32[100]{0} get-tuple-element(%loop), index=1
}
"""


def by_kind(found: hlo.Communication) -> dict[str, tuple[int, float]]:
    return {one.kind: (one.count, one.bytes) for one in found.collectives}


def test_counts_and_bytes_are_those_worked_out_by_hand():
    found = hlo.communication(TEXT.replace("%LIMIT%", "11"), devices=16)
    assert by_kind(found) == {
        "all-reduce": (6, 6 * 2 * 400 * 7 / 8),  # 0, 2, .., 10; groups of 8; a reduction and a gather of 400 bytes
        "all-gather": (1, 16 * 8 * 2 * 3 / 4),  # two halves of one operation, groups of 4
        "collective-permute": (1, 200),
    }
    assert found.unknown_loops == 0
    # An axis of a mesh whose devices are in another order than their numbers.
    ordered = TEXT.replace("%LIMIT%", "11").replace("'b'=8] {'b'}", "'b'=8], device_ids=([8,2]T(1,0)) {'b'}")
    assert hlo.communication(ordered, devices=16) == found


def test_a_loop_without_a_known_end_is_counted_as_told_and_reported():
    text = TEXT.replace("%LIMIT%", "11").replace("direction=LT", "direction=NE")
    found = hlo.communication(text, devices=16, unknown=(5,))
    assert found.unknown_loops == 1 and by_kind(found)["all-reduce"][0] == 5


def test_loops_without_a_known_end_in_each_other_are_counted_by_depth():
    """The loop stands in the body of another one; a collective behind it is in the outer loop only."""
    text = TEXT.replace("%LIMIT%", "11").replace("direction=LT", "direction=NE")
    head, main = text.split("ENTRY %main (x0: f32[100], y0: bf16[4,8]) -> f32[100] {")
    outer = """%around (state.3: (s32[], f32[100])) -> (s32[], f32[100]) {
  %state.3 = (s32[], f32[100]{0}) parameter(0)
  %inner = (s32[], f32[100]{0}) while(%state.3), condition=%condition, body=%body
  %x.3 = f32[100]{0} get-tuple-element(%inner), index=1
  %sent.3 = f32[100]{0} collective-permute(%x.3), channel_id=12, source_target_pairs={{0,1},{1,0}}
  %counter.3 = s32[] get-tuple-element(%inner), index=0
  ROOT %tuple.3 = (s32[], f32[100]{0}) tuple(%counter.3, %sent.3)
}

"""
    text = head + outer + "ENTRY %main (x0: f32[100], y0: bf16[4,8]) -> f32[100] {" + main.replace("body=%body", "body=%around")
    found = hlo.communication(text, devices=16, unknown=(3, 5))
    assert found.unknown_loops == 2
    assert by_kind(found)["all-reduce"][0] == 15 and by_kind(found)["collective-permute"][0] == 3 + 1


def test_arrays_inside_fusions_are_never_in_memory():
    found = hlo.arrays(TEXT.replace("%LIMIT%", "11"))
    assert {(one.type, one.shape) for one in found} >= {("bf16", (16, 8)), ("f32", (100,))}
    assert "jit(f)/layers/q_proj/dot" in {one.operation for one in found}
    assert found[0].bytes == 400
    assert not [one for one in found if one.operation == "all-gather"]


def test_results_of_a_fusion_belong_to_who_makes_them_inside():
    """The product of v_proj runs while a share of o_proj, as large as the whole v_proj, arrives, and a flag is handed on."""
    inside = """%fused.3 (p.3: bf16[4,8], p.4: u32[]) -> (bf16[2,8], bf16[16,8], u32[]) {
  %p.3 = bf16[4,8]{1,0} parameter(0)
  %p.4 = u32[]{:S(2)} parameter(1)
  %product = bf16[2,8]{1,0} slice(%p.3), slice={[0:2], [0:8]}, metadata={op_name="jit(f)/v_proj/dot"}
  %all-gather.3 = bf16[16,8]{1,0} all-gather(%p.3), channel_id=7, dimensions={0}, metadata={op_name="jit(f)/o_proj/dot"}
  %renamed = bf16[16,8]{1,0} bitcast(%all-gather.3)
  ROOT %both = (bf16[2,8]{1,0}, bf16[16,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) tuple(%product, %renamed, %p.4)
}

ENTRY"""
    of_v = 'fusion(%y0, %zero), kind=kOutput, calls=%fused.3, metadata={op_name="jit(f)/v_proj/dot"}'
    line = f"%both.1 = (bf16[2,8]{{1,0}}, /*index=1*/bf16[16,8]{{1,0}}, u32[]{{:S(2)}}) {of_v}"
    found = hlo.arrays(TEXT.replace("%LIMIT%", "11").replace("ENTRY", inside).replace("%done =", f"{line}\n  %done ="))
    assert [(one.operation, one.shape) for one in found if "_proj/dot" in one.operation and "layers" not in one.operation] == [
        ("jit(f)/o_proj/dot", (16, 8)),
        ("jit(f)/v_proj/dot", (2, 8)),
    ]


def test_whole_matrices_and_logits_are_told_from_shares_and_activations():
    matrices = {"embedding": (1000, 64), "q_proj": (64, 48), "all layers' q_proj": (3, 64, 48)}
    path = "jit(step)/while/body/layers/attention/q_proj/dot_general"
    arrays = [
        hlo.Array("bf16", (1, 64, 48), path),  # gathered
        hlo.Array("bf16", (64, 48), "jit(step)/while/body/layers/mlp/up_proj/dot_general"),  # an activation
        hlo.Array("bf16", (64, 24), path),  # a share
        hlo.Array("f32", (8, 3, 1000), "dot"),
        hlo.Array("f32", (1, 1000), "dot"),  # of one token
        hlo.Array("bf16", (1000, 16), "copy"),  # a share of the embedding over fsdp
    ]
    assert unsharded(arrays, matrices, 1000, fsdp=4) == ("q_proj [64, 48]", "logits [8, 3, 1000]")
    whole = [hlo.Array("bf16", (1000, 64), "gather"), hlo.Array("bf16", (48, 64, 3), path)]
    assert unsharded(whole, matrices, 1000, fsdp=4) == ("embedding [1000, 64]", "all layers' q_proj [3, 64, 48]")


SCRIPT = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from pe_rlhf_jax.plan import hlo

mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def f(w, x):
    def layer(x, w):
        w = jax.lax.with_sharding_constraint(w, P(None, None))
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P("x", None)), None
    return jax.lax.scan(layer, x, w)[0]
put = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
with jax.set_mesh(mesh):
    text = jax.jit(f).lower(put((7, 64, 64), P(None, "x", None)), put((8, 64), P("x", None))).compile().as_text()
found = hlo.communication(text, 4)
print(found.unknown_loops, *[(one.kind, one.count, one.bytes) for one in found.collectives])
"""


def test_a_scan_over_gathered_matrices_sends_each_of_them_once():
    """Seven matrices of 64 x 64 float32, of which a quarter is there already."""
    environment = {**os.environ, "XLA_FLAGS": with_devices(4), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"0 ('all-gather', 7, {7 * 64 * 64 * 4 * 3 / 4})"
