"""The derived network: a genotype's cells stacked, to be trained from scratch.

From top to bottom: the operations, the cell, stems and auxiliary head, the network. Operations are modules for their
parameters and buffers, which checkpoints know by these names; what a cell computes is ``kernels.derived_cell``.
"""

import torch
from torch import Tensor, nn

from fpdarts import kernels as kernel_backends
from fpdarts.genotype import Genotype
from fpdarts.kernels import Statistics
from fpdarts.kernels.spec import OPERATIONS, DerivedCellSpec
from fpdarts.space import reduction_cells, validate_stem


class ReLUConvBN(nn.Sequential):
    """ReLU, 1x1 convolution, batch normalization: brings an input state to the cell's channels."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(nn.ReLU(), nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out))


class SeparableConv(nn.Sequential):
    """ReLU, depthwise and pointwise convolution, batch normalization; once or twice. Only the first one strides."""

    def __init__(self, channels: int, kernel_size: int, dilation: int, stages: int, stride: int):
        layers = []
        for stage in range(stages):
            layers += [
                nn.ReLU(),
                nn.Conv2d(
                    channels,
                    channels,
                    kernel_size,
                    stride=stride if stage == 0 else 1,
                    padding=dilation * (kernel_size - 1) // 2,
                    dilation=dilation,
                    groups=channels,
                    bias=False,
                ),
                nn.Conv2d(channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
            ]
        super().__init__(*layers)


class FactorizedReduction(nn.Module):
    """Halve the resolution without losing three pixels of four: one half of the channels reads the even pixels, the
    other half the odd ones."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        half = channels_out // 2
        self.even = nn.Conv2d(channels_in, half, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(channels_in, channels_out - half, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))


def make_operation(name: str, channels: int, stride: int) -> nn.Module:
    """(N, C, H, W) -> (N, C, H / stride, W / stride). Poolings are not normalized here, unlike in the search."""
    operation = OPERATIONS[name]
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride=stride, padding=1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduction(channels, channels)
    return SeparableConv(channels, operation.kernel_size, operation.dilation, operation.stages, stride)


class Cell(nn.Module):
    """One cell: two input states, nodes that each add two operations, and the concatenation of the nodes as output.

    channels_before, channels_previous: of states 0 and 1, the outputs of the two cells before.
    reduction: edges from the two input states have stride 2.
    previous_reduces: state 0 is twice as large as state 1, and is brought down by a factorized reduction.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels_before: int,
        channels_previous: int,
        channels: int,
        reduction: bool,
        previous_reduces: bool,
    ):
        super().__init__()
        self.spec = DerivedCellSpec(
            channels,
            (channels_before, channels_previous),
            genotype.reduce if reduction else genotype.normal,
            genotype.reduce_concat if reduction else genotype.normal_concat,
            reduction,
            previous_reduces,
        )
        self.channels_out = channels * len(self.spec.concat)

        shrink = FactorizedReduction if previous_reduces else ReLUConvBN
        self.preprocess0 = shrink(channels_before, channels)
        self.preprocess1 = ReLUConvBN(channels_previous, channels)
        self.operations = nn.ModuleList(
            make_operation(name, channels, self.spec.stride(edge)) for edge, (name, _) in enumerate(self.spec.edges)
        )

    def normalizations(self) -> list[nn.BatchNorm2d]:
        """In the order of the table of statistics."""
        return [self.get_submodule(name) for name in self.spec.normalizations]

    def forward(
        self, before: Tensor, previous: Tensor, path_scales: Tensor | None = None, kernels: str = "auto"
    ) -> tuple[Tensor, Statistics | None]:
        """Returns (output, Statistics of the batch or None in evaluation).

        path_scales: (edges, N, 1, 1, 1), what drop-path multiplies each edge's samples by; None drops nothing.
        """
        statistics = None
        if not self.training:
            norms = self.normalizations()
            statistics = tuple(
                torch.stack([getattr(n, name) for n in norms]) for name in ("running_mean", "running_var")
            )
        weights = dict(self.named_parameters())
        return kernel_backends.derived_cell(
            self.spec, (before, previous), weights, path_scales, statistics, kernels=kernels
        )


@torch.no_grad()
def _track(norms: list[nn.BatchNorm2d], means: list[Tensor], variances: list[Tensor]):
    """A batch's statistics into those of its normalizations, as these would do it."""
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    new = [value.to(table.dtype) for value, table in zip(means + variances, running)]
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    first = norms[0].momentum
    if first is not None and all(norm.momentum == first for norm in norms):
        torch._foreach_lerp_(running, new, first)
        return
    for table, value, norm in zip(running, new, 2 * norms):  # None: the mean of all batches so far
        table.lerp_(value, 1 / norm.num_batches_tracked.to(table.dtype) if norm.momentum is None else norm.momentum)


class CifarStem(nn.Sequential):
    """3x3 convolution and batch normalization at full resolution; both input states of the first cell."""

    def __init__(self, channels: int):
        super().__init__(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, images: Tensor, kernels: str = "auto") -> Tensor:
        """Where the back end has no such kernel, or the images want a gradient, PyTorch's modules compute it."""
        if images.requires_grad or not kernel_backends.offers("stem", kernels, images):
            return super().forward(images)
        convolution, norm = self
        statistics = None if norm.training else (norm.running_mean, norm.running_var)
        weights = convolution.weight, norm.weight, norm.bias
        out, *batch = kernel_backends.stem(images, *weights, statistics, kernels=kernels)
        if norm.training:
            _track([norm], *([table] for table in batch))
        return out


class ImageNetStem(nn.Module):
    """Three 3x3 convolutions of stride 2. (N, 3, H, W) -> state 0 at H/4 and state 1 at H/8, both of C channels."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.state0 = nn.Sequential(
            nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.state1 = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        state0 = self.state0(images)
        return state0, self.state1(state0)


class AuxiliaryHead(nn.Module):
    """A second classifier two thirds up, used in training only. (N, C, 8, 8) for CIFAR, (N, C, 7, 7) for ImageNet.

    Raises ValueError for a map whose pooling is not 2x2, the size that the convolution behind it expects.
    """

    def __init__(self, channels: int, num_classes: int, stem: str):
        super().__init__()
        self.stride = 3 if stem == "cifar" else 2
        self.needs = "8x8, that is 32x32 images" if stem == "cifar" else "7x7, that is 224x224 images"
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=self.stride),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            # The published ImageNet networks have none here, and parameter counts are compared with theirs.
            nn.BatchNorm2d(768) if stem == "cifar" else nn.Identity(),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if any((size - 5) // self.stride + 1 != 2 for size in (height, width)):
            raise ValueError(
                f"the auxiliary head meets a {height}x{width} map, but needs {self.needs}; "
                "use such images, or leave the head out (--auxiliary-weight 0, or auxiliary=False)"
            )
        return self.classifier(self.features(x).flatten(1))


class DerivedNetwork(nn.Module):
    """The network that a genotype describes.

    init_channels: C, channels of a node in the first cells; doubled at each of the two reduction cells.
    stem: "cifar" (3*C channels, full resolution) or "imagenet" (C channels, an eighth of the resolution).
    auxiliary: add the auxiliary head after cell 2 * cells // 3.
    kernels: the back end that computes cells, by name; whether it can run is known at the first forward, from the
        images' device.

    The memory format is the caller's: with images and network in torch.channels_last all maps stay in it. A cell
    computes with the parameters and buffers of its modules, which are not called: hooks on them are not either, and
    whether the batch's statistics or the running ones normalize depends on the cell's ``training``, not on theirs. Of
    a normalization its momentum is heeded, not its eps, nor that it may have become another (SyncBatchNorm). So it is
    with CIFAR's stem, where the back end has a kernel for it.
    Raises ValueError for an argument that makes no network.
    """

    def __init__(
        self,
        genotype: Genotype,
        num_classes: int,
        init_channels: int = 36,
        cells: int = 20,
        stem: str = "cifar",
        auxiliary: bool = True,
        kernels: str = "auto",
    ):
        super().__init__()
        kernel_backends.validate(kernels)
        self.kernels = kernels
        validate_stem(stem)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if cells < 3:
            raise ValueError(f"at least 3 cells are needed, a normal one and two reductions; got {cells}")
        if init_channels < 1 or (stem == "imagenet" and init_channels % 2):
            raise ValueError(
                "init_channels must be positive, and even for the imagenet stem, which starts with half; "
                f"got {init_channels}"
            )

        if stem == "cifar":
            width = 3 * init_channels
            self.stem = CifarStem(width)
        else:
            width = init_channels
            self.stem = ImageNetStem(width)

        reductions = reduction_cells(cells)
        self.cells = nn.ModuleList()
        before, previous, channels = width, width, init_channels
        previous_reduces = stem == "imagenet"  # its state 0 is twice as large as state 1
        for index in range(cells):
            reduction = index in reductions
            channels = channels * 2 if reduction else channels
            cell = Cell(genotype, before, previous, channels, reduction, previous_reduces)
            self.cells.append(cell)
            before, previous, previous_reduces = previous, cell.channels_out, reduction
        self.classifier = nn.Linear(previous, num_classes)

        self.auxiliary_cell = 2 * cells // 3
        self.auxiliary_head = None
        if auxiliary:
            self.auxiliary_head = AuxiliaryHead(self.cells[self.auxiliary_cell].channels_out, num_classes, stem)

    def forward(self, images: Tensor, drop_path: float | Tensor = 0.0) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of a batch.

        images: (N, 3, H, W) float. drop_path: the chance, in [0, 1), that an edge is dropped for a sample; used in
        training only, on all edges but identities. As a tensor of no dimension it is read on its device, also by CUDA
        graphs. Returns logits (N, num_classes), float32 also under autocast (float64 for a float64 network); in
        training with an auxiliary head the pair (logits, auxiliary logits).

        Raises ValueError for a drop_path out of range, an image size that does not halve evenly, or, in training, one
        that the auxiliary head does not fit.
        """
        on_device = isinstance(drop_path, Tensor)
        if not on_device and not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        path_scales = None
        if self.training and (on_device or drop_path > 0):
            path_scales = self._draw_path_scales(images, 1 - drop_path)

        auxiliary_logits, statistics = None, []
        if isinstance(self.stem, ImageNetStem):
            before, previous = self.stem(images)
        else:
            before = previous = self.stem(images, self.kernels)
        for index, cell in enumerate(self.cells):
            scales = None if path_scales is None else path_scales[index]
            out, batch = cell(before, previous, scales, self.kernels)
            before, previous = previous, out
            statistics.append(batch)
            if index == self.auxiliary_cell and self.auxiliary_head is not None and self.training:
                auxiliary_logits = _at_least_float32(self.auxiliary_head(previous))
        if any(batch is not None for batch in statistics):  # torch.export keeps the region of no_grad, though empty
            self._update_statistics(statistics)
        logits = _at_least_float32(self.classifier(mean_over_pixels(previous)))
        return logits if auxiliary_logits is None else (logits, auxiliary_logits)

    @torch.no_grad()
    def _update_statistics(self, batches: list[Statistics | None]):
        """Of all cells in training, at once: on a GPU, a launch or two rather than two a normalization."""
        norms, means, variances = [], [], []
        for cell, batch in zip(self.cells, batches):
            if batch is not None:
                norms += cell.normalizations()
                means += batch.mean.unbind()
                variances += batch.variance.unbind()
        _track(norms, means, variances)

    def _draw_path_scales(self, images: Tensor, keep: float | Tensor) -> Tensor:
        """0 or 1 / keep for every cell, edge and sample. One draw for all: 160 small ones cost as many launches."""
        edges = len(self.cells[0].spec.edges)
        shape = (len(self.cells), edges, images.shape[0], 1, 1, 1)
        kept = torch.rand(shape, device=images.device) < keep
        return kept / keep


def mean_over_pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C). Of maps in torch.channels_last the gradient is too: that of their mean over (H, W) would
    be in PyTorch's default format, and be copied for what comes before."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).mean((1, 2))
    return x.mean((2, 3))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
