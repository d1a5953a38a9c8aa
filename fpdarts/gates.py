"""Which paths of which edges are open: the training-level part of FP-DARTS, drawn outside the forward."""

import torch

MODES = ("step", "fixed", "both")


class GateSampler:
    """Draws gates, (cells, edges, paths) float32 on the CPU: 1 where a path is open, 0 where it is closed.

    Each edge of each cell gets one of the non-empty sets of its paths, all equally likely (with two paths: the first,
    the second, or both).

    mode: ``step`` draws anew at every call, ``fixed`` draws once, at the start, ``both`` keeps every path open.
    seed: of a generator of its own, so that gates do not depend on what else draws random numbers.
    Raises ValueError for an unknown mode.
    """

    def __init__(self, cells: int, edges: int, paths: int = 2, mode: str = "step", seed: int = 0):
        if mode not in MODES:
            raise ValueError(f"unknown gate mode {mode!r}; choose one of: {', '.join(MODES)}")
        self.shape, self.mode = (cells, edges, paths), mode
        self._generator = torch.Generator("cpu").manual_seed(seed)  # whatever PyTorch's default device is
        self._fixed = self._draw() if mode == "fixed" else None

    def _draw(self) -> torch.Tensor:
        cells, edges, paths = self.shape
        drawn = torch.randint(1, 2**paths, (cells, edges, 1), generator=self._generator, device="cpu")
        return ((drawn >> torch.arange(paths, device="cpu")) & 1).to(torch.float32)  # bit p: path p is open

    def sample(self) -> torch.Tensor:
        """Gates for the next step."""
        if self.mode == "both":
            return torch.ones(self.shape, dtype=torch.float32, device="cpu")
        return self._draw() if self.mode == "step" else self._fixed.clone()

    def expected(self) -> torch.Tensor:
        """Gates for evaluation: each path weighed by its chance of being open, as dropout's expectation does."""
        if self.mode != "step":
            return self.sample()
        paths = self.shape[-1]
        return torch.full(self.shape, 2 ** (paths - 1) / (2**paths - 1), dtype=torch.float32, device="cpu")

    def state_dict(self) -> dict:
        fixed = None if self._fixed is None else self._fixed.clone()
        return {"mode": self.mode, "generator": self._generator.get_state(), "fixed": fixed}

    def load_state_dict(self, state: dict):
        if state["mode"] != self.mode:
            raise ValueError(f"these gates were saved in mode {state['mode']!r}, this sampler has mode {self.mode!r}")
        fixed = state["fixed"]
        if fixed is not None and tuple(fixed.shape) != self.shape:
            raise ValueError(f"these gates were saved for {tuple(fixed.shape)}, this sampler is for {self.shape}")
        self._generator.set_state(state["generator"])
        self._fixed = None if fixed is None else fixed.clone()
