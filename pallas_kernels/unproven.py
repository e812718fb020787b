"""What the CPU can tell to be right but no GPU has run: nothing is dispatched to it.

Tests marked proves(feature) in tests/gpu run with everything here allowed and end with a count for each feature.
One whose tests passed leaves the set.
"""

FEATURES = {
    *("dropout", "mask", "bias", "segment skipping", "row ends", "deterministic beyond D128"),
    "alibi_slopes with packed sequences",
    *("linear mask", "linear normalize", "linear causal=False", "linear cu_seqlens"),
    *("linear segments of time", "linear products in the kernel"),
    *("L1 crossed rows", "L1 paired lanes", "L1 packed backward"),
    *("ALiBi on a cache", "softcap by reciprocals", "cudnn", "direct launches around integers"),
}


def reasons(asked: dict[str, bool], where: str = "the kernels") -> list[tuple[bool, str]]:
    """For each feature that a call may ask for: whether that stops it, and what to say then."""
    return [(asked[x] and x in FEATURES, f"{x} is in {where}, but not yet proven on a GPU") for x in asked]
