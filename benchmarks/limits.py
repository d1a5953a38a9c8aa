"""What this machine can do at most: the arithmetic peak and the copy bandwidth, measured."""

import time
from dataclasses import asdict, dataclass

import torch

from benchmarks.work import Work


@dataclass(frozen=True)
class Limits:
    """flops_per_second: of a large matrix product in the dtype. bytes_per_second: read plus written by a large copy.

    scaling: product speed of all threads over that of one. Far from the number of threads, the machine was busy with
    something else, or has fewer cores than it says, and no share of a limit means much.
    """

    device: str
    threads: int
    flops_per_second: float
    bytes_per_second: float
    scaling: float | None

    def seconds(self, work: Work, element_size: int = 4) -> float:
        """The least time for the work: what the nearer limit allows."""
        return max(work.flops / self.flops_per_second, work.bytes(element_size) / self.bytes_per_second)

    def nearer(self, work: Work, element_size: int = 4) -> str:
        arithmetic = work.flops / self.flops_per_second > work.bytes(element_size) / self.bytes_per_second
        return "arithmetic peak" if arithmetic else "copy bandwidth"

    @property
    def disturbed(self) -> bool:
        return self.scaling is not None and self.scaling < 0.75 * self.threads

    def as_dict(self) -> dict:
        return asdict(self) | {"disturbed": self.disturbed}


def synchronize(device: str):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device: str) -> float:
    """Seconds of one call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def measure(device: str = "cpu", dtype: torch.dtype = torch.float32, rounds: int = 8) -> Limits:
    """The best of some rounds: other work on the machine can only take away.

    A matrix product stands for the peak: the best that a tuned library gets out of FMA units or tensor cores. On a CPU
    a 1x1 convolution, which is a product by another library, is tried as well, and the better one counts: on an AMD
    EPYC with AVX-512 torch.mm had half the speed, and every share looked twice as good.
    """
    cpu = torch.device(device).type == "cpu"
    side = 1536 if cpu else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    threads = torch.get_num_threads()
    products = [(2 * side**3, lambda: torch.mm(a, b, out=out))]
    if cpu:  # of 16 images: PyTorch gives fewer to oneDNN only where there are several threads
        image = torch.randn(16, 24, 24, 512).to(dtype).permute(0, 3, 1, 2)
        weight = torch.randn(512, 512, 1, 1).to(dtype)
        products.append((2 * 16 * 24**2 * 512**2, lambda: torch.nn.functional.conv2d(image, weight)))

    def peak():
        return max(count / min(timed(product, device) for _ in range(rounds)) for count, product in products)

    flops, scaling = peak(), None
    if cpu and threads > 1:
        torch.set_num_threads(1)
        try:
            scaling = flops / peak()
        finally:
            torch.set_num_threads(threads)

    source = torch.ones(2**27 if cpu else 2**28, device=device)  # 0.5 or 1 GB: more than any cache
    target = torch.empty_like(source)
    target.copy_(source)
    copied = 2 * source.numel() * source.element_size()
    bandwidth = copied / min(timed(lambda: target.copy_(source), device) for _ in range(rounds))
    return Limits(str(device), threads, flops, bandwidth, scaling)
