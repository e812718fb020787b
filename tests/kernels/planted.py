"""Plants a bug in a kernel and runs the check that should notice: `python -m tests.kernels.planted NAME`.

Exits with 0 if nothing was noticed. A process of its own, since a kernel that waits forever cannot be stopped.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from unittest import mock

FORWARD = "pallas_kernels.hopper.attention_forward"
BACKWARD = "pallas_kernels.hopper.attention_backward"
DELTA = "pallas_kernels.hopper.attention_delta"
LONG = dict(Sq=128, Sk=512, H=1, D=128)
SQUARE = dict(Sq=256, H=1, D=128)


@dataclasses.dataclass(frozen=True)
class Bug:
    module: str
    old: str
    new: str
    shape: dict
    options: dict
    numbers: bool = False  # seen without a race detector
    sms: int = 132


BUGS = {
    "forward_q_not_awaited": Bug(FORWARD, "plgpu.barrier_wait(refs.q_full)", "pass", LONG, {}),
    "forward_k_not_awaited": Bug(FORWARD, "plgpu.barrier_wait(refs.k_full.at[k_slot])", "pass", LONG, {}),
    "forward_v_released_early": Bug(
        FORWARD,
        "plgpu.barrier_arrive(refs.k_empty.at[k_slot])\n        state",
        "plgpu.barrier_arrive(refs.k_empty.at[k_slot]); plgpu.barrier_arrive(refs.v_empty.at[v_slot])\n        state",
        LONG,
        {},
    ),
    "forward_slot_refilled_early": Bug(
        FORWARD, "pl.when(done + step >= t.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))", "pass", LONG, {}
    ),
    "forward_output_not_fenced": Bug(
        FORWARD, "refs.lse_smem[wg] = lse\n    plgpu.commit_smem()", "refs.lse_smem[wg] = lse", LONG, {}
    ),
    "forward_q_refilled_early": Bug(
        FORWARD, "pl.when(done > 0)(lambda: plgpu.barrier_wait(refs.q_empty))", "pass", SQUARE, {}, sms=1
    ),
    "forward_mask_off_by_one": Bug(FORWARD, "here + p.right", "here + 1", SQUARE, dict(causal=True), numbers=True),
    "forward_old_sum_not_faded": Bug(
        FORWARD, "acc * softmax.over_columns(fade, acc.shape)", "acc", LONG, {}, numbers=True
    ),
    "backward_consumers_do_not_meet": Bug(
        BACKWARD, "plan.meeting.meet(refs.meeting)\n\n    def finish", "\n    def finish", SQUARE, {}
    ),
    "backward_dq_overwritten_early": Bug(BACKWARD, "plan.dq_empty.wait(refs.dq_empty, wg)", "pass", SQUARE, {}),
    "backward_q_released_early": Bug(
        BACKWARD,
        "plgpu.wgmma_wait(0)\n    plgpu.barrier_arrive(refs.q_do_empty",
        "plgpu.barrier_arrive(refs.q_do_empty",
        dict(Sq=320, Sk=128, H=1, D=128),
        {},
    ),
    "backward_mask_off_by_one": Bug(BACKWARD, "here - p.right", "here - 1", SQUARE, dict(causal=True), numbers=True),
    "backward_delta_dropped": Bug(
        BACKWARD, "(dp - over_rows(delta, dp.shape))", "dp", dict(Sq=128, H=1, D=128), {}, numbers=True
    ),
    "delta_without_the_cotangent_of_lse": Bug(
        DELTA, "0.0, -d_lse)", "0.0, 0.0 * d_lse)", dict(Sq=128, H=1, D=128), {}, numbers=True
    ),
}


def plant(module: str, old: str, new: str) -> None:
    """Loads a module with one piece of its text replaced."""
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module)
    assert source.count(old) == 1, f"{module} holds this {source.count(old)} times, not once: {old}"
    planted = importlib.util.module_from_spec(spec)
    sys.modules[module] = planted
    package, _, name = module.rpartition(".")
    setattr(sys.modules[package], name, planted)
    exec(compile(source.replace(old, new), spec.origin, "exec"), planted.__dict__)


def main(name: str) -> None:
    bug = BUGS[name]
    plant(bug.module, bug.old, bug.new)
    import jax.numpy as jnp

    from pallas_kernels.parts import schedule
    from tests.kernels.interpreted import hopper_on_the_cpu
    from tests.oracle import assert_matches_oracle, inputs

    with mock.patch.object(schedule, "SMS", bug.sms), hopper_on_the_cpu():
        assert_matches_oracle(inputs(0, jnp.bfloat16, **bug.shape), bug.options, "hopper")


if __name__ == "__main__":
    main(sys.argv[1])
