"""A program with fewer, larger ops in place of its own, for backends that have them.

The experts' first projection and the activation of what it makes become one op, and an assignment of slots to experts is made
once for both projections. Calls are matched by what they read and write; what does not match stays as it is.
"""

from collections import Counter
from dataclasses import replace

from vivace.engine.models.program import Call, Kind, Program, Value
from vivace.kernels.buffer import DType


def fuse(program: Program) -> Program:
    """The program with experts' ops joined. Its results have the names and shapes that they had."""
    firsts = _read_once(program)
    assigned: dict[Value, tuple[Value, Value]] = {}
    calls: list[Call] = []
    for call in program.calls:
        if call.outs[0] in firsts:
            continue
        if call.op == "gated" and call.ins[0] in firsts:
            x, experts, weight, *bias = firsts[call.ins[0]].ins
            if experts not in assigned:
                assign = _assign(experts, weight)
                calls.append(assign)
                order, tiles = assign.outs
                assigned[experts] = order, tiles
            ins = (x, experts, *assigned[experts], weight, *bias)
            calls.append(Call("expert_gated", call.outs, ins, call.attrs))
        elif call.op == "expert_linear" and call.ins[1] in assigned and len(call.ins[0].shape) == 3:
            x, experts, *rest = call.ins
            calls.append(Call("expert_down", call.outs, (x, experts, *assigned[experts], *rest)))
        else:
            calls.append(call)
    return replace(program, calls=tuple(calls))


def _read_once(program: Program) -> dict[Value, Call]:
    """Projections of shared rows by experts whose result an activation reads, and nothing else; by that result."""
    readers = Counter(value.owner for call in program.calls for value in call.ins)
    kept = {program.hidden.owner, program.logits.owner}
    activated = {call.ins[0] for call in program.calls if call.op == "gated"}
    return {
        call.outs[0]: call
        for call in program.calls
        if call.op == "expert_linear"
        and len(call.ins[0].shape) == 2
        and call.outs[0] in activated
        and readers[call.outs[0]] == 1
        and call.outs[0] not in kept
    }


def _assign(experts: Value, weight: Value) -> Call:
    order = Value(f"{experts.name}.order", Kind.ACTIVATION, experts.shape, DType.INT32)
    tiles = Value(f"{experts.name}.tiles", Kind.ACTIVATION, (*experts.shape, 3), DType.INT32)
    num_experts = weight.shape[0]
    assert isinstance(num_experts, int)
    return Call("moe_assign", (order, tiles), (experts,), (("num_experts", num_experts),))
