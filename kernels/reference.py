"""The reference back end: plain PyTorch, the definition of what every other back end computes.

Contracts of the functions are in ``fpdarts.kernels``. Written to be read first; but nothing is evaluated twice, and
edges that leave one state are computed together.
"""

from functools import reduce

import torch
import torch.nn.functional as F

from . import Statistics
from .spec import EPSILON, OPERATIONS

GRAPHS = ("derived_cell",)  # a search's cell reads its gates on the CPU


def unavailable(device):
    return None  # runs wherever PyTorch does


def _pointwise(x, weight, groups=1):
    """1x1 convolution by weights of shape (..., c_in, c_out)."""
    weight = weight.transpose(-1, -2).reshape(-1, weight.shape[-2], 1, 1)
    return F.conv2d(x, weight, groups=groups)


def stage(x, depthwise, pointwise, *, stride=1, dilation=1):
    edges, k, _, c = depthwise.shape
    x = F.relu(x)
    if x.shape[1] == c:
        x = torch.cat([x] * edges, 1)  # unlike repeat, keeps channels_last
    depthwise = depthwise.permute(0, 3, 1, 2).reshape(edges * c, 1, k, k)
    x = F.conv2d(x, depthwise, stride=stride, padding=dilation * (k - 1) // 2, dilation=dilation, groups=edges * c)
    return _pointwise(x, pointwise, groups=edges)


def pooling(x, operation, *, stride=1):
    if operation == "max_pool_3x3":
        return F.max_pool2d(x, 3, stride, 1)
    return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)


def _even_and_odd(x):
    """Pixels of even and of odd coordinates. Taken out before a 1x1 convolution, which then has no stride: on CPUs with
    AVX2 but no AVX-512, PyTorch's gradient of a strided one's weights is wrong below 8 channels, and writes past its
    memory (github.com/uxlfoundation/oneDNN/issues/6035)."""
    return x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]


def factorized_reduction(x, even, odd):
    pixels = _even_and_odd(F.relu(x))
    halves = [_pointwise(part, weight) for part, weight in zip(pixels, (even, odd))]
    by_edge = zip(halves[0].split(even.shape[-1], 1), halves[1].split(odd.shape[-1], 1))
    return torch.cat([half for edge in by_edge for half in edge], 1)


def normalize(raw, weight=None, statistics=None):
    if statistics is None:
        dtype = torch.promote_types(raw.dtype, torch.float32)
        mean, variance = (torch.zeros(raw.shape[1], dtype=dtype, device=raw.device) for _ in range(2))
        # with momentum 1 the running statistics become the batch's own
        return F.batch_norm(raw, mean, variance, weight, None, True, 1.0, EPSILON), mean, variance
    mean, variance = statistics
    return F.batch_norm(raw, mean, variance, weight, None, False, 0.0, EPSILON), mean, variance


def node(slices):
    def weighted_sum(terms):
        total = None
        for term, coefficient in terms:
            if total is None:
                total = term if coefficient is None else term * coefficient
            else:
                total = total + term if coefficient is None else torch.addcmul(total, term, coefficient)
        return total

    # channels last: then the shuffle is a plain interleaving, and the result stays in the format that is fastest
    sums = [weighted_sum(terms).permute(0, 2, 3, 1) for terms in slices]
    return torch.stack(sums, 4).flatten(3).permute(0, 3, 1, 2)


class _Normalizer:
    """Normalizes rows of a cell's table of statistics, and gathers the batch's own for the caller."""

    def __init__(self, spec, dtype, statistics):
        self.spec, self.dtype, self.statistics = spec, dtype, statistics
        self.rows, self.means, self.variances = [], [], []

    def __call__(self, raw, key, which, weight=None):
        """raw: (N, len(which)*c, H, W); which: rows of spec.statistics[key]; weight: one for each of them."""
        rows = [self.spec.statistics[key][i] for i in which]
        if weight is not None:
            dtype = torch.promote_types(raw.dtype, torch.float32)  # of the statistics, which are in one with it
            weight = weight.repeat_interleave(self.spec.slice_channels).to(dtype)
        if self.statistics is not None:
            return normalize(raw, weight, tuple(table[rows].flatten() for table in self.statistics))[0]
        out, mean, variance = normalize(raw, weight)
        self.rows += rows
        self.means.append(mean)
        self.variances.append(variance)
        return out

    def batch_statistics(self):
        if self.statistics is not None:
            return None
        device = self.means[0].device
        rows = torch.tensor(self.rows, device=device)
        empty = torch.zeros(self.spec.statistics_rows, self.spec.slice_channels, dtype=self.dtype, device=device)
        mean, variance = (
            empty.index_copy(0, rows, torch.cat(parts).to(self.dtype).view(len(rows), -1))
            for parts in (self.means, self.variances)
        )
        return Statistics(mean, variance, updated=empty.index_fill(0, rows, 1.0))


def _operation(spec, name, x, source, opened, weights, coefficients, normalizer):
    """A candidate operation on the open edges that leave a source state, normalized and weighted.

    x: (N, c, H, W), the path's slice. opened: which of the edges that leave the source. weights: its packed ones.
    coefficients: (opened,). Returns for each open edge (term (N, c, H', W'), coefficient still to be applied or None).
    """
    operation, stride, c = OPERATIONS[name], spec.stride(source), spec.slice_channels
    if operation.kind == "pooling":
        pooled = normalizer(pooling(x, name, stride=stride), name, [source])
        return [(pooled, coefficient) for coefficient in coefficients]
    rows = [spec.rows_by_source[source][i] for i in opened]
    packed = {key: weight if len(opened) == len(weight) else weight[opened] for key, weight in weights.items()}
    if operation.kind == "skip":
        raw = factorized_reduction(x, packed[f"{name}_even"], packed[f"{name}_odd"])
        return [(term, None) for term in normalizer(raw, name, rows, coefficients).split(c, 1)]
    for i in range(operation.stages):
        depthwise, pointwise = packed[f"{name}_depthwise_{i}"], packed[f"{name}_pointwise_{i}"]
        x = stage(x, depthwise, pointwise, stride=stride if i == 0 else 1, dilation=operation.dilation)
        last = i == operation.stages - 1
        # all after the last normalization is linear, so the coefficient is its weight: no pass of its own, and the
        # gradient of alpha and beta falls out of the normalization's backward
        x = normalizer(x, f"{name}_{i}", rows, coefficients if last else None)
    return [(term, None) for term in x.split(c, 1)]


def _by_source(spec, weights):
    """[source][operation][name]: the rows of each packed weight that belong to the edges which leave a source."""
    parts = [{name: {} for name in spec.operations} for _ in spec.rows_by_source]
    for key, weight in weights.items():
        for operation in spec.operations:
            if key.startswith(operation):
                sizes = [len(rows) for rows in spec.rows_by_source if rows.start < len(weight)]
                for part, rows in zip(parts, weight.split(sizes)):
                    part[operation][key] = rows
    return parts


def _preprocess(spec, i, x, weights, normalizer):
    if i == 0 and spec.factorized_input:
        raw = factorized_reduction(x, weights["preprocess0_even"][None], weights["preprocess0_odd"][None])
    else:
        raw = _pointwise(F.relu(x), weights[f"preprocess{i}"])
    return normalizer(raw, f"preprocess{i}", range(spec.partial))


def _coefficients(spec, operation_weights, edge_weights, gates):
    """What multiplies each term, rows in source order.

    Returns (scales (edges, operations) of the normalized operations, through: [row][slice] 0-dim tensors of what passes
    from a state to a node as it is: the bypass, which every other path lets through, and the identity).
    """
    order = list(spec.source_order)
    edge_weights, gates = edge_weights[order, None], gates[order]
    scales = edge_weights * gates[:, list(spec.path_of_operation)] * operation_weights[order]
    others = 1 - torch.eye(spec.paths, spec.partial, dtype=gates.dtype, device=gates.device)
    through = edge_weights * (gates @ others)
    if "skip_connect" in spec.operations:
        column = spec.operations.index("skip_connect")
        first = spec.strided_rows  # on strided edges skip_connect is a factorized reduction
        through[first:, spec.path_of_operation[column]] += scales[first:, column]
    return scales, [row.unbind() for row in through.unbind()]


def _used(spec, name, is_open):
    """Whether a forward with these open edges, is_open[path][row], reads a packed weight."""
    if name.startswith("preprocess"):
        return any(path[row] for path in is_open for row in spec.rows_by_source[int(name[len("preprocess")])])
    operation = next(o for o in spec.operations if name.startswith(o))
    path = is_open[spec.path_of_operation[spec.operations.index(operation)]]
    return any(path[: spec.strided_rows] if OPERATIONS[operation].kind == "skip" else path)


def cell(spec, inputs, weights, operation_weights, edge_weights, gates, statistics=None):
    order = list(spec.source_order)
    gate_list = gates.tolist()
    is_open = [[gate_list[e][p] != 0 for e in order] for p in range(spec.paths)]  # [path][row]
    scales, through = _coefficients(spec, operation_weights, edge_weights, gates.detach().to(edge_weights))

    normalizer = _Normalizer(spec, edge_weights.dtype, statistics)
    states = [_preprocess(spec, i, x, weights, normalizer) for i, x in enumerate(inputs)]

    by_source = _by_source(spec, weights)
    terms = [[[] for _ in range(spec.partial)] for _ in range(spec.nodes)]  # [node][slice]
    for source, rows in enumerate(spec.rows_by_source):
        if source >= 2:
            states.append(node(terms[source - 2]))
        state, nodes = states[source], [spec.edges[order[row]].node for row in rows]
        passed = state
        if spec.stride(source) == 2:
            passed = F.max_pool2d(state, 2)
        passed = passed.split(spec.slice_channels, 1)
        for s, x in enumerate(state.split(spec.slice_channels, 1)):
            opened = [i for i, row in enumerate(rows) if s < spec.paths and is_open[s][row]]
            for i, (node_index, row) in enumerate(zip(nodes, rows)):
                identity = i in opened and spec.stride(source) == 1 and "skip_connect" in spec.subsets[s]
                bypassed = any(is_open[p][row] for p in range(spec.paths) if p != s)
                if identity or bypassed or (source == node_index + 1 and not terms[node_index][s]):
                    terms[node_index][s].append((passed[s], through[row][s]))
            for column, name in enumerate(spec.operations):
                merged = name == "none" or (name == "skip_connect" and spec.stride(source) == 1)
                if opened and spec.path_of_operation[column] == s and not merged:
                    coefficients = scales[[rows[i] for i in opened], column]
                    results = _operation(
                        spec, name, x, source, opened, by_source[source][name], coefficients, normalizer
                    )
                    for i, term in zip(opened, results):
                        terms[nodes[i]][s].append(term)
    out = torch.cat([*states[2:], node(terms[-1])], 1)

    # An empty sum ties what no open path reads into the graph: its gradient is zero, not missing, and so an optimizer
    # treats a packed weight alike whichever of its edges are open.
    idle = [weight for name, weight in weights.items() if not _used(spec, name, is_open)]
    idle += [x for i, x in enumerate(inputs) if not _used(spec, f"preprocess{i}", is_open)]
    if not any(any(is_open[p]) for p, name in zip(spec.path_of_operation, spec.operations) if name != "none"):
        idle.append(operation_weights)
    out = reduce(lambda total, tensor: total + tensor[:0].sum(), idle, out)
    return out, normalizer.batch_statistics()


def stem(images, weight, scale, shift, statistics=None):
    training = statistics is None
    tables = tuple(torch.zeros_like(scale) for _ in range(2)) if training else statistics
    return _normalize_affine(F.conv2d(images.detach(), weight, padding=1), tables, scale, shift, training), *tables


def _normalize_affine(raw, statistics, scale, shift, training):
    """In training the batch's own statistics are written into those given: of momentum 1 that is what they become."""
    return F.batch_norm(raw, *statistics, scale, shift, training, 1.0 if training else 0.0, EPSILON)


class _Affine:
    """The normalizations of a derived cell, by name, and the batch's own statistics."""

    def __init__(self, spec, weights, statistics):
        self.spec, self.weights, self.training = spec, weights, statistics is None
        if self.training:
            scale = next(weights[name] for name in spec.parameters if name.endswith(".bias"))
            statistics = tuple(scale.new_zeros(len(spec.normalizations), spec.channels) for _ in range(2))
        self.mean, self.variance = statistics
        self.rows = list(zip(self.mean.unbind(), self.variance.unbind()))

    def __call__(self, raw, name):
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return _normalize_affine(raw, self.rows[self.spec.normalizations[name]], scale, shift, self.training)


def derived_cell(spec, inputs, weights, path_scales=None, statistics=None):
    normalize = _Affine(spec, weights, statistics)
    path_scales = None if path_scales is None else path_scales.detach()

    def reduced(name, x):
        parts = zip(("even", "odd"), _even_and_odd(F.relu(x)))
        halves = [F.conv2d(part, weights[f"{name}.{which}.weight"]) for which, part in parts]
        return normalize(torch.cat(halves, 1), f"{name}.norm")

    def operation(edge):
        (name, source), stride = spec.edges[edge], spec.stride(edge)
        x = states[source]
        if spec.is_identity(edge):
            return x
        if OPERATIONS[name].kind == "pooling":
            return pooling(x, name, stride=stride)
        if OPERATIONS[name].kind == "skip":
            return reduced(f"operations.{edge}", x)
        k, dilation = OPERATIONS[name].kernel_size, OPERATIONS[name].dilation
        for i, stage in enumerate(spec.stages(edge)):
            x = F.conv2d(
                F.relu(x), weights[stage.depthwise], None, stride if i == 0 else 1, dilation * (k - 1) // 2, dilation,
                spec.channels,
            )  # fmt: skip
            x = normalize(F.conv2d(x, weights[stage.pointwise]), stage.normalization)
        return x

    def term(edge):
        out = operation(edge)
        if path_scales is None or spec.is_identity(edge):  # a dropped identity would cut the gradient's way
            return out
        return out * path_scales[edge].to(out.dtype)

    states = []
    for i, x in enumerate(inputs):
        if f"preprocess{i}" in spec.factorized:
            states.append(reduced(f"preprocess{i}", x))
        else:
            states.append(normalize(F.conv2d(F.relu(x), weights[f"preprocess{i}.1.weight"]), f"preprocess{i}.2"))
    for node in range(spec.nodes):
        states.append(term(2 * node) + term(2 * node + 1))
    out = torch.cat([states[state] for state in spec.concat], 1)
    return out, Statistics(normalize.mean, normalize.variance) if normalize.training else None
