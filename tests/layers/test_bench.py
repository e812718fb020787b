"""What `python -m bench layers` times side by side computes the same, outputs and gradients."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
from bench import layers, results

CASES = [*(layers.Case(name, 6, 16) for name in ("rms_norm", "rms_norm + residual", "layer_norm", "cross_entropy"))]
CASES += [layers.Case("dense", 6, 16, 8), layers.Case("mlp", 6, 16, 24)]


def flat(found) -> list[np.ndarray]:
    return [np.asarray(x.detach() if hasattr(x, "detach") else x) for x in jax.tree.leaves(found)]


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layer)
def test_implementations_agree(case, direction):
    peers = {peer.name: peer for peer in layers.PEERS if peer.why_not("cpu") is None}
    assert peers.keys() == {"jflash", "jflash:torch", "torch"}
    ours, *others = (flat(peer.prepare(case, "float32", direction).run()) for peer in peers.values())
    for other in others:
        for n, (x, y) in enumerate(zip(ours, other, strict=True)):
            y = y.T if case.hidden and direction == "both" and n and y.ndim == 2 else y  # weights, [out, in] there
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_label():
    assert results.label({"layer": "mlp", "rows": 6, "width": 16, "hidden": 24}) == "mlp 6 x 16 x 24"
    assert results.label({"layer": "rms_norm", "rows": 6, "width": 16, "hidden": None}) == "rms_norm 6 x 16"
