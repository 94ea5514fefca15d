"""What is read from the text of a compiled program."""

from epigone.planning.hlo import Group, exchanges

PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %constant.1), direction=LT
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g = bf16[8,4]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups=mesh['m'=4,'n'=2] {'m'}, {op_name="a"}
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %y)
}

%all-reduce-scatter.3 (input: f32[16,4]) -> f32[2,4] {
  %all-reduce.9 = f32[16,4]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, {op_name="b"}
  ROOT %cut = f32[2,4]{1,0} dynamic-slice(%all-reduce.9)
}

%piece.1 (x: f32[4]) -> f32[8] {
  %all-gather.5 = f32[8]{0} all-gather(%x), channel_id=5, replica_groups=[4,2]<=[8], {op_name="c"}
}

%piece.2 (x: f32[4]) -> f32[8] {
  %all-gather.6 = f32[8]{0} all-gather(%x), channel_id=5, replica_groups=[4,2]<=[8], {op_name="c"}
}

ENTRY %main (p: f32[2,4]) -> f32[2,4] {
  %loop = (s32[], f32[8,4]) while(%start), condition=%condition, body=%body
  %known = (s32[], f32[8,4]) while(%start), condition=%add, body=%other, backend_config={"known_trip_count":{"n":"3"}}
  %both = (f32[4]{0}, f32[2]{0}) all-reduce(%u, %v), channel_id=3, replica_groups=[4,2]<=[8], {op_name="d"}
  %scattered = f32[2,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %start.1 = f32[8] fusion(%x), kind=kCustom, calls=%piece.1
  %done.1 = f32[8] fusion(%x), kind=kCustom, calls=%piece.2
  %moved = f32[4]{0} all-to-all(%w), channel_id=4, replica_groups={{0},{1}}, {op_name="e"}
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%h), channel_id=6, replica_groups=[2,4]<=[8], {op_name="f"}
}

%other (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %permuted = f32[8]{0} collective-permute(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}, {op_name="g"}
}
"""


def test_each_kind_with_its_devices_bytes_and_turns():
    size, times = exchanges(PROGRAM)
    assert size == {
        Group("all-gather", 4): 7 * 8 * 4 * 2,
        Group("all-gather", 2): 8 * 4,  # one exchange, written into two fusions
        Group("all-reduce", 2): (4 + 2) * 4,
        Group("reduce-scatter", 8): 16 * 4 * 4,
        Group("reduce-scatter", 4): 2 * 4 * 4 * 4,
        Group("collective-permute", 2): 3 * 8 * 4,
    }
    assert times[Group("all-gather", 4)] == 7
    assert times[Group("collective-permute", 2)] == 3
    assert times[Group("all-gather", 2)] == 1
