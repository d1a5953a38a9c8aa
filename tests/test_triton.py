"""The Triton back end without a GPU: in its interpreter, and what its launchers count."""

import os

import pytest
import torch

from benchmarks import profile
from fpdarts import kernels

pytest.importorskip("triton", reason="triton is not installed")


def test_in_the_interpreter(in_the_interpreter):
    status, output = in_the_interpreter()
    assert status == 0, output[-7000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why it cannot run where there is no GPU")
def test_it_says_why_it_cannot_run_here():
    if "TRITON_INTERPRET" not in os.environ:
        with pytest.raises(kernels.BackendUnavailable, match="'triton' cannot run here: they are for NVIDIA GPUs"):
            kernels.backend("triton", "cpu")


def counted(**options):
    return profile.main(profile.Options("triton", dtype="bfloat16", **options))


def test_launches_and_bytes_of_a_step():
    both, drawn = counted(), counted(gates="step")
    step = both["weight_step"]
    assert step["total"]["launches"] <= 600
    assert step["forward"]["bytes"] + step["backward"]["bytes"] <= 25e9
    # 4/3 of 2 paths are open on average; preprocessing and states cost the same
    assert 0.65 < drawn["weight_step"]["total"]["bytes"] / step["total"]["bytes"] < 0.85
    assert drawn["weight_step"]["total"]["launches"] == step["total"]["launches"]
    assert both["architecture_step"]["total"]["bytes"] < step["total"]["bytes"]


def test_an_architecture_step_computes_no_gradient_of_weights():
    from fpdarts.kernels.triton.launch import counting

    from fpdarts import SuperNet
    from fpdarts.architect import frozen

    with torch.device("meta"):
        model, images = SuperNet(5, 4, 3, nodes=1, kernels="triton"), torch.empty(2, 3, 8, 8)
    with counting() as launched, frozen(model.weight_parameters()):
        out = model(images, torch.ones(model.gate_shape))
        torch.autograd.grad(out.sum(), model.architecture_parameters())
    for name in ("convolve_wgrad_kernel", "rows_wgrad_kernel", "collect_kernel", "unpack_kernel"):
        assert launched.launches[name] == 0
    assert launched.launches["mix_bwd_kernel"] == 3


@pytest.mark.parametrize("stem, launches, gigabytes", [("cifar", 590, 20.5), ("imagenet", 500, 22)])
def test_launches_and_bytes_of_a_step_of_retraining(stem, launches, gigabytes):
    ours, theirs = (
        profile.main(profile.Options(side, what="retrain", stem=stem, dtype="bfloat16"))["retrain_step"]["total"]
        for side in ("triton", "reference")
    )
    assert ours["launches"] <= launches and ours["bytes"] <= gigabytes * 1e9
    assert ours["launches"] < theirs["launches"] / 4 and ours["bytes"] < theirs["bytes"] / 1.6


def test_kernels_compile_for_a_gpu_that_is_not_there():
    from benchmarks import aot

    kernels = "normalize_bwd", "node_reduce", "join_reduce", "depthwise_fwd"
    options = aot.Options(arch=(90,), dtypes=("bfloat16",), searches=("cifar",), partial=(2,), kernels=kernels, jobs=1)
    result = aot.main(options)
    assert {row["kernel"] for row in result["rows"]} == {f"{name}_kernel" for name in kernels}
    assert result["passed"], aot.show(result)
    assert all(row["widest_load"] == 128 for row in result["rows"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    from fpdarts.check import check_kernels

    assert check_kernels("triton", "cuda")["passed"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_search_is_the_same_with_and_without_graphs(tmp_path):
    import json

    from fpdarts.config import SearchConfig
    from fpdarts.search import search

    rows = []
    for graphs in (True, False):
        out = tmp_path / str(graphs)
        tiny = dict(init_channels=4, cells=3, epochs=3, limit=200, batch_size=32, architecture_from=1)
        search(SearchConfig(out=str(out), kernels="triton", device="cuda", cuda_graphs=graphs, **tiny))
        rows.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for with_graphs, without in zip(*rows):
        assert with_graphs["train_loss"] == without["train_loss"]
        assert with_graphs["alpha_normal"] == without["alpha_normal"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_retraining_is_the_same_with_and_without_graphs(tmp_path):
    import json

    from fpdarts.config import RetrainConfig
    from fpdarts.retrain import retrain

    losses = []
    for graphs in (True, False):
        out = tmp_path / str(graphs)
        tiny = dict(init_channels=8, cells=3, epochs=3, limit=200, batch_size=32)
        retrain(RetrainConfig(out=str(out), kernels="triton", device="cuda", cuda_graphs=graphs, **tiny))
        losses.append([json.loads(line)["train_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]
