"""A training step as a CUDA graph: captured once for each batch size, then replayed by a single launch."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor


class GraphedStep:
    """Calls ``step``, a function of tensors that returns tensors; after some eager calls it replays a graph instead.

    step: reads, besides its arguments, only what stays at its place in memory: parameters, optimizer state, a learning
        rate that is a tensor. It waits for nothing on the device. Its eager calls are real ones: nothing is repeated or
        undone, so that training is the same with and without graphs.
    sharing: another step that never runs at the same time: both use the same memory, and so are captured on one stream.

    Arguments are copied to where the graph reads them, and results from where it leaves them.
    """

    WARM_UP = 2  # calls of each batch size: kernels are compiled and chosen, optimizers make their state

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], sharing: "GraphedStep | None" = None):
        self._step, self._calls, self._captured = step, Counter(), {}
        # capture needs a stream that is not the default
        self._stream = torch.cuda.Stream() if sharing is None else sharing._stream
        self._pool = torch.cuda.graph_pool_handle() if sharing is None else sharing._pool

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(argument.shape for argument in arguments)
        if shapes not in self._captured:
            self._calls[shapes] += 1
            if self._calls[shapes] <= self.WARM_UP:
                return self._eagerly(arguments)
            self._captured[shapes] = self._capture(arguments)
        graph, inputs, results = self._captured[shapes]
        for place, argument in zip(inputs, arguments):
            place.copy_(argument, non_blocking=True)
        graph.replay()
        return tuple(result.clone() for result in results)

    def _eagerly(self, arguments):
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = self._step(*arguments)
        torch.cuda.current_stream().wait_stream(self._stream)
        return results

    def _capture(self, arguments):
        inputs = [argument.clone() for argument in arguments]
        graph = torch.cuda.CUDAGraph()
        # "thread_local": a loader's threads may take pinned memory meanwhile, which otherwise would end the capture
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = self._step(*inputs)
        return graph, inputs, results


def prepare_optimizer(optimizer: torch.optim.Optimizer, device: torch.device):
    """Fused where that is to be had, and on CUDA one that a graph can hold, its learning rate a tensor there.

    To be called again when a state was loaded, which may come from another device.
    """
    cuda = device.type == "cuda"
    fused = device.type in ("cpu", "cuda")
    for group in optimizer.param_groups:
        group["fused"] = fused or None
        group["lr"] = torch.as_tensor(float(group["lr"]), device=device) if cuda else float(group["lr"])
        if "capturable" in group:
            group["capturable"] = cuda
        if fused and group.get("momentum"):
            # the fused step fails where some weights have their first gradient later than others, as those of paths do
            # that were closed; a momentum of 0 is what the first step starts from anyway
            for weight in group["params"]:
                if optimizer.state[weight].get("momentum_buffer") is None:
                    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float):
    """In its place, where a graph may read it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
