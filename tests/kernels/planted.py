"""Plants a bug in a kernel and runs the check that should notice: `python -m tests.kernels.planted NAME`.

Exits with 0 if nothing was noticed, and with 2 if the text to replace is not there. A process of its own, since a
kernel that waits forever cannot be stopped.
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
QUERY_ROWS, KEY_ROWS = "pallas_kernels.parts.query_rows", "pallas_kernels.parts.key_rows"
SOFTMAX, DROPPING = "pallas_kernels.parts.softmax", "pallas_kernels.parts.dropping"
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
    "forward_q_not_awaited": Bug(FORWARD, "plgpu.barrier_wait(refs.q_full.at[q_slot])", "pass", LONG, {}),
    "forward_k_not_awaited": Bug(FORWARD, "plgpu.barrier_wait(refs.k_full.at[k_slot])", "pass", LONG, {}),
    "forward_v_released_early": Bug(
        FORWARD,
        "plgpu.barrier_wait(refs.v_full.at[v_slot])\n        running",
        "plgpu.barrier_wait(refs.v_full.at[v_slot]); plgpu.barrier_arrive(refs.v_empty.at[v_slot])\n        running",
        LONG,
        {},
    ),
    "forward_slot_refilled_early": Bug(
        FORWARD, "pl.when(done.blocks + step >= t.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))", "pass", LONG, {}
    ),
    "forward_output_not_fenced": Bug(
        FORWARD, "refs.lse_smem[rows.wg] = lse\n    plgpu.commit_smem()", "refs.lse_smem[rows.wg] = lse", LONG, {}
    ),
    "forward_q_refilled_early": Bug(
        FORWARD,
        "pl.when(done.tiles >= t.q_stages)(lambda: plgpu.barrier_wait(refs.q_empty.at[q_slot]))",
        "pass",
        dict(Sq=256, H=2, D=128),
        {},
        sms=1,
    ),
    "forward_mask_off_by_one": Bug(QUERY_ROWS, "here + p.right", "here + 1", SQUARE, dict(causal=True), numbers=True),
    "forward_old_sum_not_faded": Bug(SOFTMAX, "acc * over_columns(fade, acc.shape)", "acc", LONG, {}, numbers=True),
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
    "backward_mask_off_by_one": Bug(KEY_ROWS, "here - p.right", "here - 1", SQUARE, dict(causal=True), numbers=True),
    "backward_delta_dropped": Bug(
        DROPPING, "weights * (dp - delta)", "weights * dp", dict(Sq=128, H=1, D=128), {}, numbers=True
    ),
    "delta_without_the_cotangent_of_lse": Bug(
        DELTA, "delta = -d_lse", "delta = 0.0 * d_lse", dict(Sq=128, H=1, D=128), {}, numbers=True
    ),
}


def plant(module: str, old: str, new: str) -> None:
    """Loads a module with one piece of its text replaced."""
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module)
    if source.count(old) != 1:
        print(f"{module} holds this {source.count(old)} times, not once: {old}", file=sys.stderr)
        sys.exit(2)
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
