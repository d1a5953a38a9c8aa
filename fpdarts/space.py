"""The search space as a configuration: which operations compete on which path, and where cells reduce."""

from collections.abc import Sequence

from fpdarts.kernels.spec import OPERATIONS

STEMS = ("cifar", "imagenet")
# One pooling, one separable and one dilated convolution each, small kernels against large.
DEFAULT_SUBSETS = (
    ("none", "max_pool_3x3", "sep_conv_3x3", "dil_conv_3x3"),
    ("skip_connect", "avg_pool_3x3", "sep_conv_5x5", "dil_conv_5x5"),
)


def validate_stem(stem: str):
    """Raises ValueError, with the valid names, for an unknown one."""
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; choose one of: {', '.join(STEMS)}")


def validate_subsets(subsets: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The subsets as tuples. Raises ValueError for an empty, unknown, repeated or only-``none`` entry."""
    subsets = tuple(tuple(subset) for subset in subsets)
    known = f"the operations are: {', '.join(OPERATIONS)}"
    if not subsets:
        raise ValueError(f"subsets: at least one path is needed; {known}")
    seen = set()
    for path, subset in enumerate(subsets):
        for name in subset:
            if name not in OPERATIONS:
                raise ValueError(f"subsets: path {path} has an unknown operation {name!r}; {known}")
            if name in seen:
                raise ValueError(f"subsets: {name!r} stands twice; subsets must be disjoint; {known}")
            seen.add(name)
        if not set(subset) - {"none"}:
            raise ValueError(f"subsets: path {path} has no operation to choose besides none; {known}")
    return subsets


def reduction_cells(cells: int) -> frozenset[int]:
    """Indices of the cells that halve the resolution and double the channels: at one and at two thirds of the depth."""
    return frozenset({cells // 3, 2 * cells // 3})
