"""The networks as DARTS-style code is written: edge by edge, module by module, in PyTorch's default format.

A second, independent statement of the method that the packed implementation is tested against, and what users have
today, which benchmarks compare with. It shares nothing with ``fpdarts.kernels`` but the description of the packing, by
which weights are copied in and gradients and statistics read out.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from fpdarts.supernet import SuperNet


def normalization(channels):
    return nn.BatchNorm2d(channels, affine=False)


def separable(c, kernel_size, stride, dilation):
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(c, c, kernel_size, stride, dilation * (kernel_size // 2), dilation, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        normalization(c),
    )


class FactorizedReduction(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        # strides are taken before: see _even_and_odd in kernels/reference.py
        self.even = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.odd = nn.Conv2d(c_in, c_out - c_out // 2, 1, bias=False)
        self.norm = normalization(c_out)

    def forward(self, x):
        x = F.relu(x)
        return self.norm(torch.cat([self.even(x[:, :, ::2, ::2]), self.odd(x[:, :, 1::2, 1::2])], 1))


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return x[:, :, :: self.stride, :: self.stride] * 0


MODULES = {
    "none": lambda c, s: Zero(s),
    "max_pool_3x3": lambda c, s: nn.Sequential(nn.MaxPool2d(3, s, 1), normalization(c)),
    "avg_pool_3x3": lambda c, s: nn.Sequential(nn.AvgPool2d(3, s, 1, count_include_pad=False), normalization(c)),
    "skip_connect": lambda c, s: nn.Identity() if s == 1 else FactorizedReduction(c, c),
    "sep_conv_3x3": lambda c, s: nn.Sequential(separable(c, 3, s, 1), separable(c, 3, 1, 1)),
    "sep_conv_5x5": lambda c, s: nn.Sequential(separable(c, 5, s, 1), separable(c, 5, 1, 1)),
    "dil_conv_3x3": lambda c, s: nn.Sequential(separable(c, 3, s, 2)),
    "dil_conv_5x5": lambda c, s: nn.Sequential(separable(c, 5, s, 2)),
}


class MixedEdge(nn.Module):
    def __init__(self, channels, partial, subsets, stride):
        super().__init__()
        self.partial, self.stride = partial, stride
        c = channels // partial
        self.paths = nn.ModuleList(nn.ModuleDict({name: MODULES[name](c, stride) for name in s}) for s in subsets)

    def forward(self, x, alpha_weights, gates):
        """alpha_weights: a sequence of weights a path; gates: a number a path, of which a float of 0 is skipped."""
        slices = x.chunk(self.partial, 1)
        bypass = slices if self.stride == 1 else [F.max_pool2d(s, 2, 2) for s in slices]
        total = 0
        for p, operations in enumerate(self.paths):
            if isinstance(gates[p], float) and gates[p] == 0:
                continue
            mixed = sum(
                weight * operation(slices[p]) for weight, operation in zip(alpha_weights[p], operations.values())
            )
            full = torch.cat([mixed if s == p else bypass[s] for s in range(self.partial)], 1)
            n, channels, h, w = full.shape
            shuffled = full.view(n, self.partial, channels // self.partial, h, w).transpose(1, 2).reshape(full.shape)
            if not isinstance(gates[p], float) or gates[p] != 1:
                shuffled = gates[p] * shuffled
            total = total + shuffled
        return total


class NaiveCell(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.spec = spec

        def preprocess(i):
            wide = spec.input_channels[i]
            if i == 0 and spec.factorized_input:
                return FactorizedReduction(wide, spec.channels)
            return nn.Sequential(nn.ReLU(), nn.Conv2d(wide, spec.channels, 1, bias=False), normalization(spec.channels))

        self.preprocess = nn.ModuleList([preprocess(0), preprocess(1)])
        self.edges = nn.ModuleList(
            MixedEdge(spec.channels, spec.partial, spec.subsets, spec.stride(edge.source)) for edge in spec.edges
        )

    def forward(self, inputs, alpha, beta, gates):
        states = [module(x) for module, x in zip(self.preprocess, inputs)]
        sizes = [len(subset) for subset in self.spec.subsets]
        for node in range(self.spec.nodes):
            total = 0
            for e, edge in enumerate(self.spec.edges):
                if edge.node == node:
                    total = total + beta[e] * self.edges[e](states[edge.source], alpha[e].split(sizes), gates[e])
            states.append(total)
        return torch.cat(states[2:], 1)

    def correspondence(self):
        """(name and row of a packed weight, the module's weight, its packed view); row None means the whole."""

        def pointwise(name, row, convolution):
            return name, row, convolution.weight, lambda w: w.flatten(1).t()

        for i, module in enumerate(self.preprocess):
            if isinstance(module, FactorizedReduction):
                yield pointwise(f"preprocess{i}_even", None, module.even)
                yield pointwise(f"preprocess{i}_odd", None, module.odd)
            else:
                yield pointwise(f"preprocess{i}", None, module[1])
        for row, e in enumerate(self.spec.source_order):
            for operations in self.edges[e].paths:
                for name, module in operations.items():
                    if isinstance(module, FactorizedReduction):
                        yield pointwise(f"{name}_even", row, module.even)
                        yield pointwise(f"{name}_odd", row, module.odd)
                    elif "conv" in name:
                        for i, stage in enumerate(module):
                            yield f"{name}_depthwise_{i}", row, stage[1].weight, lambda w: w.squeeze(1).permute(1, 2, 0)
                            yield pointwise(f"{name}_pointwise_{i}", row, stage[2])

    def load_packed(self, packed):
        """packed: name -> packed weight."""
        with torch.no_grad():
            for name, row, weight, view in self.correspondence():
                view(weight).copy_(packed[name] if row is None else packed[name][row])

    def packed_gradients(self):
        """Gradients under the names of the packed weights, in their shapes; zero where there is none."""
        gradients = {}
        for name, row, weight, view in self.correspondence():
            gradient = view(torch.zeros_like(weight) if weight.grad is None else weight.grad)
            gradients.setdefault(name, []).append(gradient)
            if row is None:
                gradients[name] = gradient
        return {name: torch.stack(g) if isinstance(g, list) else g for name, g in gradients.items()}

    def statistics(self):
        """(row of the packed table, normalization, open by which (edge, path); None: always)."""
        rows, spec = self.spec.statistics, self.spec
        for row, e in enumerate(spec.source_order):
            for p, operations in enumerate(self.edges[e].paths):
                for name, module in operations.items():
                    if isinstance(module, FactorizedReduction):
                        yield rows[name][row], module.norm, (e, p)
                    elif "conv" in name:
                        for i, stage in enumerate(module):
                            yield rows[f"{name}_{i}"][row], stage[3], (e, p)
                    elif "pool" in name:
                        yield rows[name][spec.edges[e].source], module[1], (e, p)


class NaiveSuperNet(nn.Module):
    """Same numbers as a given SuperNet, whose weights it copies.

    branches: skip closed paths, as Python code would. Without, gates are tensors that everything is multiplied by, so
    that the forward is the same whatever is open: what torch.compile and CUDA graphs need.
    """

    architecture_parameters = SuperNet.architecture_parameters
    weight_parameters = SuperNet.weight_parameters

    def __init__(self, supernet, branches=True):
        super().__init__()
        self.branches = branches
        self.stem, self.classifier = deepcopy(supernet.stem), deepcopy(supernet.classifier)
        self.stem[0] = nn.Sequential(*self.stem[0])  # CIFAR's asks a back end otherwise
        self.cells = nn.ModuleList(NaiveCell(cell.spec) for cell in supernet.cells)
        for name in ("alpha_normal", "alpha_reduce", "beta_normal", "beta_reduce"):
            self.register_parameter(name, nn.Parameter(getattr(supernet, name).detach().clone()))
        self.to(supernet.alpha_normal)
        for cell, packed in zip(self.cells, supernet.cells):
            cell.load_packed(dict(packed.named_parameters()))

    def forward(self, images, gates):
        first = self.stem[0](images)
        states = first, self.stem[1](first)
        for cell, cell_gates in zip(self.cells, gates.tolist() if self.branches else gates):
            kind = "reduce" if cell.spec.reduction else "normal"
            alpha, beta = getattr(self, f"alpha_{kind}").sigmoid(), getattr(self, f"beta_{kind}").sigmoid()
            states = states[1], cell(states, alpha, beta, cell_gates)
        return self.classifier(F.adaptive_avg_pool2d(states[1], 1).flatten(1))

    def packed_gradients(self):
        """Gradients under the SuperNet's parameter names, in its shapes; zero where there is none."""
        gradients = {name: p.grad for name, p in self.named_parameters() if not name.startswith("cells.")}
        for i, cell in enumerate(self.cells):
            gradients |= {f"cells.{i}.{name}": gradient for name, gradient in cell.packed_gradients().items()}
        return gradients


def derived_cell(cell, before, previous, path_scales=None):
    """What a derived network's cell computes, by calling its modules; running statistics move in training."""

    states = [cell.preprocess0(before), cell.preprocess1(previous)]
    for node in range(len(cell.operations) // 2):
        total = 0
        for edge in (2 * node, 2 * node + 1):
            module = cell.operations[edge]
            out = module(states[cell.spec.edges[edge][1]])
            if path_scales is not None and not isinstance(module, nn.Identity):
                out = out * path_scales[edge].to(out.dtype)
            total = total + out
        states.append(total)
    return torch.cat([states[i] for i in cell.spec.concat], 1)


def by_modules(derived):
    """A copy of a DerivedNetwork that computes its cells by calling their modules."""
    copy = deepcopy(derived)
    for cell in copy.cells:
        cell.forward = lambda *arguments, cell=cell: (derived_cell(cell, *arguments[:3]), None)
    return copy
