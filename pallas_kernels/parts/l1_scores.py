"""The scores of distances, but for the masks."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from pallas_kernels.problem import L1Problem


class L1Scores(NamedTuple):
    s: jax.Array
    problem: L1Problem  # the same with the scale that s still wants
    slope: jax.Array | None  # -ds/d(scale d), None where that is 1


def of_distances(p: L1Problem, negative: jax.Array) -> L1Scores:
    """-d, to be scaled, or 1 / (eps + scale d), from -d."""
    if p.kind == "neg":
        return L1Scores(negative, p, None)
    s = 1.0 / (p.eps - p.scale * negative)
    return L1Scores(s, dataclasses.replace(p, scale=1.0), s * s)
