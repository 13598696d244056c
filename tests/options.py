"""Every combination of the objective's options that means something, shared by the tests of each implementation."""

import itertools

from mask_the_target import TMKL

ALL_OPTIONS = [
    TMKL(
        weight=0.7,
        divergence=divergence,
        mask_target=mask_target,
        renormalize=renormalize,
        position_weight=position_weight,
        temperature=temperature,
        exclude_base_above=exclude,
    )
    for divergence, (mask_target, renormalize), position_weight, temperature, exclude in itertools.product(
        ("forward", "reverse", "jsd"),
        ((True, True), (True, False), (False, True)),
        ("uniform", "non_target_mass"),
        (1.0, 2.5),
        (None, 0.15),
    )
]


def name(options: TMKL) -> str:
    """Short id of one combination for a test's name."""
    parts = [options.divergence]
    parts += ["full"] if not options.mask_target else [] if options.renormalize else ["unnormalised"]
    parts += ["mass"] if options.position_weight != "uniform" else []
    parts += [f"T{options.temperature}"] if options.temperature != 1 else []
    parts += ["excluding"] if options.exclude_base_above else []
    return "-".join(parts)
