"""Equality bit for bit."""

import torch


def assert_same(name: str, a, b):
    """Of tensors, and of dicts, lists and tuples of them; fails with the name of what differs."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{name} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(f"{name}.{key}", a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(f"{name}.{i}", *pair)
    else:
        assert a == b, f"{name} differs"
