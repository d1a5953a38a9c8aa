"""The architecture half of the bilevel search: a step of alpha and beta on held-out images."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.func import functional_call

from fpdarts.supernet import ARCHITECTURE, SuperNet

Batch = tuple[Tensor, Tensor]  # images (N, 3, H, W), labels (N,)


@contextmanager
def frozen(parameters: Iterable[Tensor]):
    """Parameters whose gradient nobody asks for meanwhile, so that no back end computes it."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]  # the others stay as they are
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Architect:
    """Updates alpha and beta of a supernet.

    model: the supernet. optimizer: over ``model.architecture_parameters()``.
    loss: of (logits, labels), a scalar.
    clip: largest norm of the architecture gradient; None for no clipping.
    weight_optimizer: the SGD of the weights, whose learning rate, momentum and weight decay a virtual step uses; with
        it the gradient is of second order (unrolled), without it of first order. Raises ValueError for another
        optimizer, and for nesterov, dampening or maximize.
    step_size: r of the finite difference R = r / ||v||. 0.01 is the published choice; on a network with ReLU and
        max-pooling its gradient is several times off, and a smaller one is closer to the truth in float64.
    autocast: wraps every forward; makes the context of mixed precision. None leaves the caller's.
    """

    def __init__(
        self,
        model: SuperNet,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor, Tensor], Tensor],
        clip: float | None = None,
        weight_optimizer: torch.optim.SGD | None = None,
        step_size: float = 0.01,
        autocast: Callable | None = None,
    ):
        if weight_optimizer is not None:
            _require_plain_sgd(weight_optimizer)
            model = getattr(model, "_orig_mod", model)  # of a compiled one, whose weights have other names
        self.model, self.optimizer, self.loss, self.clip = model, optimizer, loss, clip
        self.weight_optimizer, self.step_size = weight_optimizer, step_size
        self.autocast = autocast or nullcontext

    def step(self, validation: Batch, gates: Tensor, train: Batch | None = None) -> tuple[Tensor, Tensor]:
        """One update from a batch of the architecture half; unrolled, also from one of the weight half.

        One gate sample serves all passes of a step, and running statistics move once, with the validation pass.
        Returns (loss, logits) on the validation batch, detached.
        """
        gradients, loss, logits = self._gradients(validation, gates, train)
        parameters = self._trained()
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        return loss, logits

    def gradient(self, validation: Batch, gates: Tensor, train: Batch | None = None) -> list[Tensor]:
        """The gradient of a step for alpha_normal, alpha_reduce, beta_normal, beta_reduce, those that are not frozen,
        without the update.

        As in a step, running statistics move once.
        """
        return self._gradients(validation, gates, train)[0]

    def _gradients(self, validation, gates, train):
        """(gradients, loss, logits): first order if there is no weight_optimizer."""
        if self.weight_optimizer is None:
            return self._first_order(validation, gates)
        if train is None:
            raise ValueError("an unrolled architecture step needs a batch of the weight half as well")
        return self._second_order(validation, train, gates)

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.architecture_parameters() if parameter.requires_grad]

    def _first_order(self, validation, gates):
        with frozen(self.model.weight_parameters()):
            with self.autocast():
                logits = self.model(validation[0], gates)
                loss = self.loss(logits, validation[1])
            gradients = torch.autograd.grad(loss, self._trained(), materialize_grads=True)
        return list(gradients), loss.detach(), logits.detach()

    def _second_order(self, validation, train, gates):
        """d/d alpha of L_val(w - eta * dL_train/dw, alpha); the mixed derivative by a central difference."""
        architecture = self._trained()
        weights = {n: p for n, p in self.model.named_parameters() if n not in ARCHITECTURE and p.requires_grad}
        names, current = list(weights), list(weights.values())
        (group,) = self.weight_optimizer.param_groups
        eta, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]

        gradients = torch.autograd.grad(self._loss_at(weights, train, gates)[0], current, materialize_grads=True)
        virtual = {}
        for name, weight, gradient in zip(names, current, gradients):
            update = gradient + decay * weight.detach()
            # none before the first weight step
            buffer = self.weight_optimizer.state.get(weight, {}).get("momentum_buffer")
            if buffer is not None:
                update = update + momentum * buffer
            virtual[name] = (weight.detach() - eta * update).requires_grad_()

        loss, logits = self._loss_at(virtual, validation, gates, track_statistics=True)
        direct = torch.autograd.grad(loss, [*architecture, *virtual.values()], materialize_grads=True)
        direct, v = direct[: len(architecture)], direct[len(architecture) :]

        norm = torch.stack(torch._foreach_norm(v)).norm()
        if norm > 0:  # at v = 0 the loss does not depend on the virtual step, and so not on alpha through it
            r, shifted = self.step_size / norm, []
            for sign in (1, -1):
                moved = {n: w.detach() + sign * r * d for n, w, d in zip(names, current, v)}
                shifted.append(
                    torch.autograd.grad(self._loss_at(moved, train, gates)[0], architecture, materialize_grads=True)
                )
            direct = [d - eta * (plus - minus) / (2 * r) for d, plus, minus in zip(direct, *shifted)]
        return list(direct), loss.detach(), logits.detach()

    def _loss_at(self, weights, batch, gates, track_statistics=False):
        """Loss and logits with these weights; on clones of the running statistics unless they are to move."""
        buffers = {} if track_statistics else {name: b.clone() for name, b in self.model.named_buffers()}
        with self.autocast():
            logits = functional_call(self.model, {**weights, **buffers}, (batch[0], gates))
            return self.loss(logits, batch[1]), logits


def _require_plain_sgd(optimizer: torch.optim.Optimizer):
    """Raises ValueError for an optimizer whose step is another than what a virtual step computes."""
    if not isinstance(optimizer, torch.optim.SGD) or len(optimizer.param_groups) != 1:
        raise ValueError("weight_optimizer must be torch.optim.SGD with one group of parameters")
    for name in ("dampening", "nesterov", "maximize"):
        if optimizer.param_groups[0][name]:
            raise ValueError(f"weight_optimizer has {name}, which a virtual step does not know; leave it out")
