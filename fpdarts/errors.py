"""Errors of a run. They import nothing, so that the command can name them before torch is loaded."""


class RunError(RuntimeError):
    """A run directory cannot be used as asked; the message names it and says what to do."""


class NonFiniteLoss(RuntimeError):
    """Training met a loss that is not a number; the message names step, learning rate and last good checkpoint."""


class DataError(ValueError):
    """The data cannot be used as it is. The message names the file, class or field, and says what to do."""


class KernelMismatch(RuntimeError):
    """Kernels computed something else than the reference; the message names what, and says what to do."""
