"""The native back end: against the reference, as PyTorch operators, and inputs that could break C++."""

import multiprocessing
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from fpdarts.kernels.spec import OPERATIONS, CellSpec, DerivedCellSpec

from fpdarts import DerivedNetwork, GateSampler, SuperNet, kernels
from fpdarts.genotype import find
from fpdarts.space import DEFAULT_SUBSETS

if reason := kernels.available()["native"]:
    pytest.skip(f"no native kernels: {reason}", allow_module_level=True)

from fpdarts.kernels.native import derived, library, operators, parts, stems  # noqa: E402  loads the library

ALL = (tuple(name for subset in DEFAULT_SUBSETS for name in subset),)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_against_the_reference(isa):
    if isa == "avx512" and library.library().fpdarts_isa() != b"avx512":
        pytest.skip("this processor has no AVX-512")
    environment = {**os.environ, "FPDARTS_TESTED": "native", "FPDARTS_NATIVE_ISA": isa}
    inner = Path(__file__).parent / "agreement.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(inner)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def arguments(spec, n=2, size=(8, 8), dtype=torch.float32, seed=0):
    """Of kernels.cell, all leaves that may have a gradient."""
    torch.manual_seed(seed)
    sizes = (tuple(2 * side for side in size) if spec.factorized_input else size), size
    inputs = [torch.randn(n, c, *s, dtype=dtype) for c, s in zip(spec.input_channels, sizes)]
    weights = {name: (torch.rand(p.shape, dtype=dtype) * 2 - 1) * p.bound for name, p in spec.parameters.items()}
    edges, count = len(spec.edges), len(spec.operations)
    mixing = [torch.rand(edges, count, dtype=dtype), torch.rand(edges, dtype=dtype)]
    for tensor in (*inputs, *weights.values(), *mixing):
        tensor.requires_grad_()
    return tuple(inputs), weights, *mixing, torch.ones(edges, spec.paths)


def results(name, spec, given, dtype):
    inputs, weights, alpha, beta, gates = given
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (*inputs, *weights.values(), alpha, beta)]
    named = dict(zip(weights, leaves[2:]))
    out, batch = kernels.cell(spec, tuple(leaves[:2]), named, *leaves[-2:], gates, kernels=name)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves, direction.to(dtype))
    keys = ["input 0", "input 1", *weights, "alpha", "beta"]
    return {"out": out, "mean": batch.mean, "variance": batch.variance, **dict(zip(keys, gradients))}


@pytest.mark.parametrize(
    "channels, partial, subsets, size, threads",
    [
        (6, 2, DEFAULT_SUBSETS, (8, 8), 1), (10, 2, DEFAULT_SUBSETS, (6, 10), 2), (24, 2, DEFAULT_SUBSETS, (4, 4), 2),
        (32, 2, DEFAULT_SUBSETS, (8, 8), 2), (64, 2, DEFAULT_SUBSETS, (4, 4), 7), (20, 4, DEFAULT_SUBSETS, (6, 4), 1),
        (64, 4, DEFAULT_SUBSETS, (14, 14), 2), (5, 1, ALL, (8, 8), 2), (16, 2, DEFAULT_SUBSETS, (34, 18), 2),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["normal", "reduction", "factorized"])
def test_four_nodes(channels, partial, subsets, size, threads, kind):
    wide = 3 * channels, 4 * channels + 1
    spec = CellSpec(
        channels, wide, partial, subsets, reduction=kind == "reduction", factorized_input=kind == "factorized"
    )
    before, errors = torch.get_num_threads(), []
    for seed in range(2):
        given = arguments(spec, 3, size, seed=seed)
        expected = results("reference", spec, given, torch.float64)
        torch.set_num_threads(threads)
        try:
            actual = results("native", spec, given, torch.float32)
        finally:
            torch.set_num_threads(before)
        each = {
            name: ((actual[name].double() - v).norm() / v.norm().clamp_min(1e-6)).item() for name, v in expected.items()
        }
        errors.append(max((error, name) for name, error in each.items()))
    # A sum that rounds to the other side of a ReLU turns a pixel, and by way of the statistics all of a small batch: a
    # tie, which another draw does not have. An error stays.
    assert min(errors)[0] <= 1e-5, errors


@pytest.mark.parametrize("n, channels, size", [(24, 16, (32, 32)), (260, 16, (7, 7)), (36, 36, (14, 14))], ids=str)
def test_a_workspace_larger_than_the_caches(n, channels, size):
    """Results are then written past them, which has rules of its own for where they begin."""
    spec = CellSpec(channels, (64, 3 * channels), 2, DEFAULT_SUBSETS)
    assert spec.statistics_rows * n * spec.slice_channels * size[0] * size[1] > 8 << 20  # CACHED in cell.h
    given = arguments(spec, n, size)
    expected, actual = (results(name, spec, given, torch.float32) for name in ("reference", "native"))
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm()
        assert error < 1e-3, f"{name} is off by {error:.1e}"  # a tie of a few pixels is allowed


@pytest.mark.parametrize(
    "c, edges, odd, size",
    [(5, 4, 1, 32), (8, 4, 1, 32), (8, 4, 0, 32), (8, 3, 0, 32), (8, 1, 0, 32), (16, 3, 1, 15), (24, 1, 1, 7)],
)
def test_a_stage_larger_than_the_caches(c, edges, odd, size):
    images = 2**20 // (edges * c * size**2) + 1  # KEPT in engine.h
    images += (images + odd) % 2  # two of 8 channels share vectors, where their number is even
    x = torch.randn(images, 2 * c, size, size).contiguous(memory_format=torch.channels_last)[:, c:]
    weights = torch.randn(edges, 3, 3, c), torch.randn(edges, c, c)
    expected, actual = (kernels.stage(x, *weights, kernels=name) for name in ("reference", "native"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [48, 44])
def test_a_stem_larger_than_the_caches(channels):
    """Its result is then written past them, where its channels fill vectors."""
    images = torch.randn(2**20 // (channels * 32**2) + 1, 3, 32, 32)  # KEPT in engine.h
    given = images, *stem_weights(channels)
    expected, actual = (kernels.stem(*given, kernels=name) for name in ("reference", "native"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_network_asks_for_its_stem_unless_images_want_a_gradient():
    torch.manual_seed(0)
    model, images = SuperNet(10, 4, 3, 2, kernels="native"), torch.randn(4, 3, 8, 8)
    twin, gates = deepcopy(model), torch.ones(model.gate_shape)
    wanted = images.clone().requires_grad_()
    out, expected = model(images, gates), twin(wanted, gates)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for (name, table), other in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(table, other, rtol=1e-4, atol=1e-5, msg=name)
    assert any("stem" in name for name in functions_behind(out))
    assert not any("stem" in name for name in functions_behind(expected))
    assert torch.autograd.grad(expected.sum(), wanted)[0].any()


def functions_behind(tensor) -> set[str]:
    """Of autograd, by name."""
    names, ahead = set(), [tensor.grad_fn]
    while ahead:
        function = ahead.pop()
        names.add(type(function).__name__)
        ahead += [before for before, _ in function.next_functions if before is not None]
    return names


@pytest.mark.parametrize("images", [23, 24])
def test_the_same_bits_whichever_thread_was_faster(images):
    """Threads take images as they are free; with more of them than cores that is another way each time."""
    spec, before = CellSpec(16, (32, 48), 2, DEFAULT_SUBSETS), torch.get_num_threads()
    given = arguments(spec, images, (16, 16))
    torch.set_num_threads(2 * os.cpu_count() + 1)
    try:
        runs = [results("native", spec, given, torch.float32) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(run[name], value), name


def test_operators_are_what_pytorch_asks_of_one():
    spec = CellSpec(8, (12, 16), 2, DEFAULT_SUBSETS, 2, factorized_input=True)
    inputs, weights, alpha, beta, gates = arguments(spec)
    geometry = operators._geometry(spec, 2, (8, 8))
    rows = [spec.statistics_rows, spec.slice_channels]
    cell = geometry, rows, *inputs, list(weights.values()), alpha, beta, gates, None, None
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    depthwise, pointwise = torch.randn(3, 5, 5, 4, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    terms = [torch.randn(2, 4, 6, 6, requires_grad=True) for _ in range(3)]
    for operator, given in (
        (operators._cell, cell),
        (derived._derived_cell, derived_arguments()),
        (parts._stage, (x, depthwise, pointwise, 2, 1)),
        (parts._pooling, (x, 1, 1)),
        (parts._node, (terms, torch.rand(3, requires_grad=True), [0, 1, 1], 2)),
        (stems._stem, (torch.randn(2, 3, 6, 6), *stem_weights(), None, None)),
        (stems._stem, (torch.randn(2, 3, 6, 6), *stem_weights(), torch.rand(5), torch.rand(5))),
    ):
        torch.library.opcheck(operator, given)


def stem_weights(c=5):
    return [torch.randn(shape, requires_grad=True) for shape in ((c, 3, 3, 3), (c,), (c,))]


@pytest.mark.parametrize("operator", ["cell", "derived_cell", "stage", "stem"])
def test_second_derivatives_are_refused(operator):
    if operator == "cell":
        spec = CellSpec(8, (12, 16), 2, DEFAULT_SUBSETS, 2)
        inputs, weights, *others = arguments(spec)
        leaf, out = inputs[0], kernels.cell(spec, inputs, weights, *others, kernels="native")[0]
    elif operator == "derived_cell":
        given = derived_arguments()
        leaf, out = given[3], derived._derived_cell(*given)[0]
    elif operator == "stem":
        leaf, *others = stem_weights()
        out = kernels.stem(torch.randn(2, 3, 6, 6), leaf, *others, kernels="native")[0]
    else:
        leaf = torch.randn(2, 4, 6, 6, requires_grad=True)
        out = kernels.stage(leaf, torch.randn(3, 5, 5, 4), torch.randn(3, 4, 4), kernels="native")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{operator}_backward.*no autograd formula"):
        torch.autograd.grad(gradient.square().sum(), leaf)


def derived_arguments(channels=8, n=2, **options):
    """Of the operator."""
    spec = DerivedCellSpec(channels, (12, 16), (("sep_conv_3x3", 1), ("max_pool_3x3", 0)), (2,), **options)
    inputs = [torch.randn(n, c, 6, 6, requires_grad=True) for c in spec.input_channels]
    weights = [torch.randn(shape, requires_grad=True) for shape in spec.parameters.values()]
    unread = [False] * (2 + len(weights))
    rows = [len(spec.normalizations), channels]
    return derived._geometry(spec, n, (6, 6)), rows, unread, *inputs, weights, torch.rand(2, n), None, None


@pytest.mark.parametrize("channels", [12, 16, 40])
def test_a_derived_cell_does_not_depend_on_the_number_of_threads_but_for_rounding(channels):
    given, before, runs = derived_arguments(channels, 5, reduction=True), torch.get_num_threads(), []
    leaves = [*given[3:5], *given[5]]
    try:
        for threads in (1, 2, 7):  # of which two have no image
            torch.set_num_threads(threads)
            out = derived._derived_cell(*given)[0]
            direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
            runs.append([out.detach(), *torch.autograd.grad(out, leaves, direction)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", ["supernet", "derived"])
def test_torch_compile_takes_a_network_whole(network):
    images = torch.randn(2, 3, 8, 8)
    if network == "supernet":
        model = SuperNet(3, 8, 3, nodes=2, kernels="native")
        more = (GateSampler(*model.gate_shape).sample(),)
    else:
        model = DerivedNetwork(find("PC_DARTS_cifar"), 3, 4, 3, auxiliary=False, kernels="native")
        more = ()
    plain = deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = compiled(images, *more), plain(images, *more)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m: f"d_{name}: {m}")
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", [name for name, o in OPERATIONS.items() if o.kind == "convolution"])
def test_a_stage_without_images_or_pixels_is_empty(name):
    k = OPERATIONS[name].kernel_size
    x, depthwise, pointwise = torch.randn(0, 4, 6, 6), torch.randn(2, k, k, 4), torch.randn(2, 4, 4)
    out = kernels.stage(x.requires_grad_(), depthwise.requires_grad_(), pointwise, kernels="native")
    assert out.shape == (0, 8, 6, 6)
    assert not torch.autograd.grad(out.sum(), depthwise)[0].any()


def test_a_map_of_no_width_is_empty():
    x, weights = torch.randn(1, 4, 4, 0, requires_grad=True), (torch.randn(2, 3, 3, 4), torch.randn(2, 4, 4))
    out = kernels.stage(x, *weights, kernels="native")
    out.sum().backward()
    assert out.shape == (1, 8, 4, 0) and x.grad.shape == x.shape
    spec = CellSpec(8, (8, 8), 2, DEFAULT_SUBSETS, 1)
    table = spec.statistics_rows, spec.slice_channels
    for size in ((4, 0), (0, 4)):
        given = *arguments(spec, size=size), (torch.zeros(table), torch.ones(table))
        kernels.cell(spec, *given, kernels="native")[0].sum().backward()
        assert not given[2].grad.any()


def test_a_batch_of_no_images_is_refused_but_in_evaluation():
    spec = CellSpec(8, (8, 8), 2, DEFAULT_SUBSETS, 1)
    inputs, *others = arguments(spec)
    empty = tuple(x.detach()[:0].requires_grad_() for x in inputs)
    with pytest.raises(ValueError, match="at least two values a channel"):
        kernels.cell(spec, empty, *others, kernels="native")
    table = spec.statistics_rows, spec.slice_channels
    out, _ = kernels.cell(spec, empty, *others, (torch.zeros(table), torch.ones(table)), kernels="native")
    out.sum().backward()
    assert empty[0].grad.shape == (0, 8, 8, 8) and not others[0]["preprocess0"].grad.any()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_pytorch_s_default_dtype_does_not_matter(default):
    spec = CellSpec(64, (16, 16), 2, DEFAULT_SUBSETS, 1)
    given = arguments(spec, 33, (16, 16))  # whose output is of memory that is kept
    expected = results("native", spec, given, torch.float32)
    torch.set_default_dtype(default)
    try:
        actual = results("native", spec, given, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_a_first_pixel_far_off_costs_no_digits():
    spec = CellSpec(8, (4, 4), 1, (("none", "max_pool_3x3"),), 1)
    inputs, *others = arguments(spec, size=(112, 112))
    x = inputs[0].detach().abs() * 0.01 + 5
    x[:, :, 0, 0] = 30.0
    given = (x, inputs[1]), *others
    expected, actual = (
        kernels.cell(
            spec, tuple(x.to(dtype) for x in given[0]), weights, *(t.to(dtype) for t in others[1:]), kernels=k
        )[1]
        for k, dtype, weights in (
            ("reference", torch.float64, {name: w.double() for name, w in others[0].items()}),
            ("native", torch.float32, others[0]),
        )
    )
    torch.testing.assert_close(actual.variance.double(), expected.variance, rtol=1e-5, atol=1e-12)


def test_minus_infinity_is_a_maximum_where_there_is_no_other():
    x = torch.full((1, 8, 4, 4), float("-inf"))
    assert torch.equal(kernels.pooling(x, "max_pool_3x3", kernels="native"), x)


def test_a_stage_that_is_in_no_operation_is_refused():
    x, pointwise = torch.ones(1, 4, 9, 9), torch.ones(1, 4, 4)
    for k, options in ((7, {}), (3, {"dilation": 3}), (3, {"stride": 3})):
        with pytest.raises(ValueError, match="is in no operation; use --kernels reference"):
            kernels.stage(x, torch.ones(1, k, k, 4), pointwise, **options, kernels="native")
    with pytest.raises(ValueError, match="pointwise must be float32"):
        kernels.stage(x, torch.ones(1, 3, 3, 4), pointwise.double(), kernels="native")


def test_too_little_memory_in_c_is_an_error_in_python():
    asked = library.PartArguments(part=2, backward=True, threads=2, images=1, channels=8, height=1, width=1)
    asked.stride, asked.partial, asked.count = 1, 1, 1 << 60
    with pytest.raises(MemoryError, match="use a smaller batch"):
        library.library().fpdarts_part(asked)


def test_torch_compile_takes_inputs_and_weights_of_any_layout():
    spec = CellSpec(8, (8, 8), 2, DEFAULT_SUBSETS, 1)
    (x0, x1), weights, *others = arguments(spec, size=(4, 4))
    flat = x0.detach().reshape(2, -1).requires_grad_()

    def run(flat):
        turned = weights | {"preprocess0": weights["preprocess0"].t()}
        return kernels.cell(spec, ((flat * 1).view(2, 8, 4, 4), x1), turned, *others, kernels="native")[0]

    leaves = flat, weights["preprocess0"]
    expected = torch.autograd.grad(run(flat).square().sum(), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(flat).square().sum(), leaves), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_other_dtypes_are_refused_by_name_and_left_to_the_reference_by_auto(dtype):
    x = torch.ones(1, 4, 4, 4, dtype=dtype)
    told = f"compute in float32, not in {str(dtype).removeprefix('torch.')}"
    with pytest.raises(kernels.BackendUnavailable, match=told):
        kernels.pooling(x, "max_pool_3x3", kernels="native")
    if dtype.is_floating_point:
        assert kernels.pooling(x, "max_pool_3x3").dtype == dtype


def test_weights_of_another_dtype_are_refused():
    spec = CellSpec(8, (8, 8), 2, DEFAULT_SUBSETS, 1)
    inputs, weights, *others = arguments(spec)
    weights["preprocess1"] = weights["preprocess1"].double()
    with pytest.raises(ValueError, match="preprocess1 must be float32 on the CPU, not torch.float64"):
        kernels.cell(spec, inputs, weights, *others, kernels="native")


def test_autocast_is_refused_by_name():
    x = torch.ones(1, 4, 4, 4)
    refused = pytest.raises(kernels.BackendUnavailable, match="use --amp off")
    with torch.autocast("cpu", torch.bfloat16), refused:
        kernels.pooling(x, "max_pool_3x3", kernels="native")


def test_layouts_do_not_matter():
    spec = CellSpec(16, (16, 32), 2, DEFAULT_SUBSETS, 2)
    inputs, weights, *others = arguments(spec)
    expected, _ = kernels.cell(spec, inputs, weights, *others, kernels="native")
    wider = torch.randn(2, 40, 8, 8)
    wider[:, 8:] = inputs[1].detach()
    turned = {name: w.detach().transpose(0, -1).contiguous().transpose(0, -1) for name, w in weights.items()}
    strided = inputs[0].detach().to(memory_format=torch.channels_last), wider[:, 8:]
    out, _ = kernels.cell(spec, strided, turned, *others, kernels="native")
    assert torch.equal(out, expected)


def _in_a_child(queue):
    x = torch.ones(2, 8, 8, 8)
    torch.set_num_threads(2)
    queue.put(kernels.pooling(x, "max_pool_3x3", kernels="native").sum().item())


def test_a_forked_process_computes_and_does_not_wait_for_threads_it_has_not():
    kernels.pooling(torch.ones(2, 8, 8, 8), "max_pool_3x3", kernels="native")  # the parent's threads exist
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=_in_a_child, args=(queue,))
    child.start()
    child.join(60)
    alive = child.is_alive()
    child.kill()
    assert not alive and queue.get(timeout=5) == 1024


def test_memory_is_used_again_once_no_tensor_has_it():
    first = library.memory(3 << 20)
    address, view = first.data_ptr(), first[5:]
    assert library.memory(3 << 20).data_ptr() != address
    del first
    assert library.memory(3 << 20).data_ptr() != address, "a view still has it"
    del view
    held = [library.memory(3 << 20) for _ in range(3)]  # of this size there are three by now, at most
    assert address in [tensor.data_ptr() for tensor in held]


def test_a_library_of_other_sources_says_so(monkeypatch):
    monkeypatch.setattr(library, "ABI", -1)
    with pytest.raises(library.LibraryError, match="another version.*install fpdarts again"):
        library.library.__wrapped__()


def test_an_instruction_set_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setenv("FPDARTS_NATIVE_ISA", "AVX1024")
    with pytest.raises(library.LibraryError, match="set it to avx2 or avx512"):
        library.library.__wrapped__()


def test_a_missing_library_says_so(monkeypatch):
    monkeypatch.setattr(library, "NAME", "no_such_library.so")
    with pytest.raises(library.LibraryError, match="not built when fpdarts was installed"):
        library.library.__wrapped__()


@pytest.mark.parametrize("frozen", [2, 3], ids=["alpha", "beta"])
def test_either_of_alpha_and_beta_may_be_frozen(frozen):
    spec = CellSpec(8, (8, 8), 2, DEFAULT_SUBSETS, 2)
    given = arguments(spec)
    given[frozen].requires_grad_(False)
    found = []
    for name in ("reference", "native"):
        out, _ = kernels.cell(spec, *given, kernels=name)
        found.append(torch.autograd.grad(out.square().sum(), given[5 - frozen])[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("derived", [False, True], ids=["search", "derived"])
def test_torch_compile_may_break_the_graph(derived):
    torch.compiler.reset()
    model = DerivedNetwork(find("DARTS_V2"), 5, 4, 3, auxiliary=False) if derived else SuperNet(5, 4, 3, 2)
    model.kernels, images = "native", torch.randn(3, 3, 8, 8)
    given = (images,) if derived else (images, torch.ones(model.gate_shape))
    expected = deepcopy(model)(*given)
    compiled = torch.compile(model, backend="aot_eager")(*given)
    torch.testing.assert_close(compiled, expected)
    compiled.sum().backward()
    assert all(p.grad is not None for p in model.cells[0].parameters())


def test_an_exported_network_takes_any_number_of_images(tmp_path):
    network = DerivedNetwork(find("DARTS_V2"), 5, 4, 3, auxiliary=False, kernels="native").eval()
    images = torch.randn(4, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for count in (4, 2):
        torch.testing.assert_close(loaded(images[:count]), network(images[:count]))
