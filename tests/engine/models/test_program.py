"""Programs as data: slots of the arena, and what the decoder emits."""

from vivace.engine.models.builder import Builder
from vivace.engine.models.decoder import emit
from vivace.engine.models.program import Kind, Symbol, assign_slots, values_of
from vivace.engine.models.spec import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)
from vivace.engine.runner import arena_bytes

NORM = NormSpec(1e-6)


def spec_of(*ropes, tied=False):
    layers = tuple(
        LayerSpec(AttentionSpec(4, 2, 16, rope, 0.25, NORM), MlpSpec(96)) for rope in ropes
    )
    return ModelSpec("LlamaForCausalLM", 260, 64, layers, NORM, tied, 512)


MOST = dict.fromkeys(Symbol, 7)
PLAIN, WIDE = RopeSpec(1e4, 16), RopeSpec(1e6, 16)


def test_no_two_live_values_share_a_slot():
    program = emit(spec_of(PLAIN, PLAIN, WIDE))
    slots = assign_slots(program, MOST)
    written_by, last_use = {}, {}
    for i, call in enumerate(program.calls):
        for value in call.outs:
            written_by.setdefault(value.owner, i)
        last_use.update({value.owner: i for value in (*call.outs, *call.ins)})
    last_use[program.hidden.owner] = last_use[program.logits.owner] = len(program.calls)
    for a in slots:
        for b in slots:
            if a is not b and slots[a] == slots[b]:
                assert last_use[a] < written_by[b] or last_use[b] < written_by[a]
    assert set(slots) == {v.owner for v in values_of(program) if v.kind is Kind.ACTIVATION}


def test_the_results_keep_their_slots_to_the_end():
    b = Builder()
    weight = b.weight("w", 8, 8)
    first = b.linear(b.input("x", Symbol.T, 8), weight)
    second = b.linear(first, weight)
    b.linear(b.linear(second, weight), weight)
    slots = assign_slots(b.finish(hidden=first, logits=second), MOST)
    for result in (first, second):
        assert [value for value, slot in slots.items() if slot == slots[result]] == [result]


def test_the_arena_does_not_grow_with_the_number_of_layers():
    few, many = (arena_bytes(emit(spec_of(*[PLAIN] * n)), MOST) for n in (3, 20))
    assert few == many


def test_the_arena_holds_what_is_large_once():
    most = MOST | {Symbol.T: 1000, Symbol.P: 1000}
    gate_up, product, rows, table = 2 * 96, 96, 3 * 64, 16  # floats of a token
    selected, counts, masses = 7 * 2 * 7, 7 * 2, 2 * 7 * 2  # of requests; scores lie elsewhere
    assert arena_bytes(emit(spec_of(*[PLAIN] * 4)), most) == 4000 * (
        gate_up + product + rows + table
    ) + 4 * (selected + counts + masses)


def test_layers_with_the_same_rotation_share_its_table():
    program = emit(spec_of(PLAIN, WIDE, PLAIN, WIDE))
    tables = [call for call in program.calls if call.op == "rope_table"]
    assert len(tables) == 2
    used = [call.ins[1] for call in program.calls if call.op == "rope_kv_write"]
    assert used == [tables[0].outs[0], tables[1].outs[0]] * 2


def test_only_the_rows_that_are_asked_for_pass_the_last_layer():
    program = emit(spec_of(PLAIN, PLAIN))
    sizes = [call.outs[0].shape[0] for call in program.calls if call.op == "gated"]
    assert sizes == [Symbol.T, Symbol.P]
    assert program.hidden.shape == (Symbol.P, 64)


def test_the_output_layer_reads_the_leading_rows_where_they_lie():
    """No op copies them: the hidden state costs a decode step nothing."""
    program = emit(spec_of(PLAIN, PLAIN))
    last = program.calls[-1]
    assert last.op == "linear" and last.outs == (program.logits,)
    assert last.ins[0].shape == (Symbol.R, 64) and last.ins[0].of is program.hidden
    assert program.logits.shape == (Symbol.R, 260)
    assert program.calls[-2].outs[-1] is program.hidden


def test_a_tied_model_has_no_head_of_its_own():
    def weights(tied):
        program = emit(spec_of(PLAIN, tied=tied))
        return {v.name for v in values_of(program) if v.kind is Kind.WEIGHT}

    assert weights(tied=False) - weights(tied=True) == {"lm_head"}


def test_every_value_is_written_before_it_is_read():
    program = emit(spec_of(PLAIN, PLAIN))
    written = set()
    for call in program.calls:
        for value in call.ins:
            if value.kind is Kind.ACTIVATION:
                assert value.owner in written
        written.update(value.owner for value in call.outs)
    assert program.logits in written
