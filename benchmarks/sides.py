"""The sides of a comparison: back ends, and what users have today.

NAME[+bf16][+graph]: ``reference``, ``native``, ``triton`` are the supernet on that back end. ``eager`` is the supernet
edge by edge, module by module, as DARTS-style code is written, in PyTorch's default format (NCHW); ``channels_last`` is
the same in that format; ``compile`` is channels_last with each cell through torch.compile, where closed paths are
multiplied by zero instead of skipped, since branches would recompile. ``+bf16``: under autocast. ``+graph``: the whole
step replayed as a CUDA graph.
"""

from typing import NamedTuple

import torch

from fpdarts import kernels

TODAY = ("eager", "channels_last", "compile")


class Side(NamedTuple):
    name: str
    bf16: bool = False
    graph: bool = False

    @classmethod
    def parse(cls, text: str, device: str = "cpu") -> "Side":
        """Raises ValueError for an unknown side and BackendUnavailable for a back end that cannot run on the device."""
        name, *modifiers = text.split("+")
        unknown = set(modifiers) - {"bf16", "graph"}
        if name not in (*TODAY, *kernels.BACKENDS) or unknown:
            names = ", ".join((*TODAY, *kernels.BACKENDS))
            raise ValueError(f"unknown side {text!r}; a side is one of {names}, with +bf16 or +graph behind it")
        kind = torch.device(device).type
        if name not in TODAY:
            kernels.backend(name, kind)
        if "graph" in modifiers and kind != "cuda":
            raise ValueError(f"{text!r}: CUDA graphs need --device cuda")
        return cls(name, "bf16" in modifiers, "graph" in modifiers)

    def __str__(self):
        return self.name + "+bf16" * self.bf16 + "+graph" * self.graph

    @property
    def today(self) -> bool:
        """Whether it is PyTorch as users write it, rather than a back end."""
        return self.name in TODAY

    @property
    def kernels(self) -> str:
        """The back end that its model is built with."""
        return "reference" if self.today else self.name

    @property
    def branches(self) -> bool:
        """Whether closed paths are skipped by Python."""
        return self.name != "compile" and not self.graph

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.contiguous_format if self.name == "eager" else torch.channels_last


def here(device: str = "cpu", compiled: bool = False) -> list[str]:
    """All sides that can run on the device; torch.compile only if asked for, since it takes minutes."""
    kind = torch.device(device).type
    names = [name for name in TODAY if name != "compile" or compiled]
    names += [name for name, reason in kernels.available(kind).items() if reason is None]
    if kind == "cuda":
        names += ["eager+bf16", "eager+graph", "eager+bf16+graph", "triton+bf16"]
    return [name for name in names if not name.startswith("triton") or kernels.available(kind)["triton"] is None]
