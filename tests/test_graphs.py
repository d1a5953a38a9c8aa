"""CUDA graphs: the calls that are eager, the copies around a replay, and what optimizers need. Graphs themselves need a
GPU; here their place is taken by something that, like them, reads and writes at fixed places only."""

from contextlib import contextmanager

import pytest
import torch

from fpdarts import graphs


class Recorded:
    """Stands for torch.cuda.CUDAGraph: a replay runs the step again, from captured inputs into captured results."""

    captures = replays = 0

    def replay(self):
        Recorded.replays += 1
        for place, result in zip(self.results, self.step(*self.inputs)):
            place.copy_(result)


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def pretended(monkeypatch):
    """GraphedStep on the CPU."""

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        Recorded.captures += 1
        yield

    @contextmanager
    def on(stream):
        yield

    Recorded.captures = Recorded.replays = 0
    for name, value in {
        "CUDAGraph": Recorded, "Stream": Stream, "current_stream": Stream, "stream": on, "graph": capture,
        "graph_pool_handle": object,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    original = graphs.GraphedStep._capture

    def remembering(self, arguments):
        graph, inputs, results = original(self, arguments)
        graph.step, graph.inputs, graph.results = self._step, inputs, results
        return graph, inputs, results

    monkeypatch.setattr(graphs.GraphedStep, "_capture", remembering)


def test_calls_of_a_shape_are_eager_then_captured_once(pretended):
    step = graphs.GraphedStep(lambda x, y: (x.sum() * y, x * 2))
    outs = []
    for i in range(6):
        outs.append(step(torch.full((3,), float(i)), torch.tensor(1.0 + i)))
    assert Recorded.captures == 1 and Recorded.replays == 6 - graphs.GraphedStep.WARM_UP
    # results of earlier calls are not overwritten by later ones
    assert [total.item() for total, _ in outs] == [3.0 * i * (1 + i) for i in range(6)]
    assert [doubled.tolist() for _, doubled in outs] == [[2.0 * i] * 3 for i in range(6)]


def test_the_last_batch_of_an_epoch_has_a_graph_of_its_own(pretended):
    step = graphs.GraphedStep(lambda x: (x.sum(),))
    for _ in range(4):
        assert step(torch.ones(8))[0] == 8
        assert step(torch.ones(5))[0] == 5
    assert Recorded.captures == 2


def test_steps_that_share_memory_share_a_stream(pretended):
    """PyTorch's allocator keeps memory of different streams apart."""
    first = graphs.GraphedStep(lambda x: (x.sum(),))
    second = graphs.GraphedStep(lambda x: (x.sum(),), first)
    assert (second._stream, second._pool) == (first._stream, first._pool)


def test_learning_rate_stays_at_its_place():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], torch.tensor(0.1))
    place = optimizer.param_groups[0]["lr"]
    graphs.set_learning_rate(optimizer, 0.05)
    assert optimizer.param_groups[0]["lr"] is place and place == pytest.approx(0.05)
    graphs.prepare_optimizer(optimizer, torch.device("cpu"))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    graphs.set_learning_rate(optimizer, 0.01)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_state_from_a_gpu_goes_on_on_the_cpu():
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([weight], 0.1)
    adam.param_groups[0].update(fused=True, capturable=True, lr=torch.tensor(0.1))
    graphs.prepare_optimizer(adam, torch.device("cpu"))
    weight.grad = torch.ones(2)
    adam.step()
    assert weight.max() < 1


def test_a_prepared_sgd_takes_the_plain_steps():
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    plain, prepared = (torch.optim.SGD([weight], 0.1, 0.9, weight_decay=0.01) for weight in weights)
    graphs.prepare_optimizer(prepared, torch.device("cpu"))
    for step in range(3):
        for weight, optimizer in zip(weights, (plain, prepared)):
            weight.grad = torch.arange(5.0) - step
            optimizer.step()
    torch.testing.assert_close(*weights)
