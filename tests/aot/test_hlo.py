"""Bytes that the collectives of a program send, compared with sums computed by hand."""

import pytest

from ra_jax.aot.hlo import Program, group_size

PROGRAM = """HloModule step

%inner_body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]) parameter(0)
  %x = f32[16]{0} get-tuple-element(%p), index=1
  %permuted = f32[16]{0} collective-permute(%x), channel_id=5, source_target_pairs={{0,1},{1,0}}
}

%inner_condition (p: (s32[], f32[16])) -> pred[] {
  %p = (s32[], f32[16]) parameter(0)
  %bound = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%fused_gather (p: bf16[1,8]) -> bf16[1,64] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %gathered = bf16[1,64]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=[2,8]<=[16], dimensions={1}
}

%fused_done (p: bf16[1,8]) -> bf16[1,64] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %gathered.2 = bf16[1,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,8]<=[16], dimensions={1}
}

%outer_body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]) parameter(0)
  %start = bf16[1,64]{1,0} fusion(%p), kind=kCustom, calls=%fused_gather
  %done = bf16[1,64]{1,0} fusion(%start), kind=kCustom, calls=%fused_done
  ROOT %again = (s32[], f32[16]) while(%p), condition=%inner_condition, body=%inner_body
}

%outer_condition (p: (s32[], f32[16])) -> pred[] {
  ROOT %yes = pred[] parameter(0)
}

%rare (p: f32[16]) -> f32[16] {
  ROOT %sum.2 = f32[1024]{0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
}

%usual (p: f32[16]) -> f32[16] {
  ROOT %p = f32[16] parameter(0)
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: (s32[], f32[16])) -> f32[16] {
  %p = (s32[], f32[16]) parameter(0)
  %loop = (s32[], f32[16]) while(%p), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %either = f32[16] conditional(%which, %p, %p), branch_computations={%rare, %usual}
  %pair = (f32[100]{0}, f32[20]{0}) all-reduce(%a, %b), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  %parts = f32[10]{0} reduce-scatter(%c), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  %begun = (f32[8]{0}, f32[32]{0}) all-gather-start(%d), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %ended = f32[32]{0} all-gather-done(%begun)
}
"""  # noqa: E501


def test_loops_count_once_per_iteration_and_an_asynchronous_gather_once():
    sent = Program(PROGRAM).collective_bytes
    assert sent["all-gather"] == pytest.approx(5 * 128 * 7 / 8 + 128 * 3 / 4)
    assert sent["collective-permute"] == pytest.approx(5 * 3 * 64)
    assert sent["reduce-scatter"] == pytest.approx(40 * 3)
    assert sent["all-reduce"] == pytest.approx(2 * 480 * 3 / 4 + 2 * 4096 * 3 / 4)  # the branch that sends the most


def test_a_loop_without_a_known_trip_count_is_an_error():
    program = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    with pytest.raises(ValueError, match="loop loop: the trip count is not known"):
        _ = Program(program).collective_bytes


def test_a_collective_without_groups_is_an_error():
    with pytest.raises(ValueError, match="collective: expected replica_groups in a known form"):
        group_size("f32[8] all-reduce(%p), to_apply=%add")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,2},{1,3}}", 2),
        ("replica_groups=[4,8]<=[8,4]T(1,0)", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", 16),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_0'}", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1':(2)4}", 8),
    ],
)
def test_group_sizes_are_read_from_every_form(text, size):
    assert group_size(text) == size
