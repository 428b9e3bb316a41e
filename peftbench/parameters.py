"""What an optimizer changes: the trained parameters, in groups of one learning rate, and their gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_ALIGNMENT = 16  # numbers, a cache line of fp32
_ROW = 4096  # numbers; torch takes the norm of one long row on one thread, those of many on all


class SeparateParameters:
    """
    Parameters as the model has them. Gradients are dropped after a step.

    For a GPU, where adding to a gradient is one more kernel to launch.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.groups = list(groups)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm over all gradients, shape ()."""
        return nn.utils.get_total_norm([p.grad for group in self.groups for p in group["params"] if p.grad is not None])

    def clear_gradients(self) -> None:
        """Mark the gradients as outdated, so that the next backward pass starts anew."""
        for parameter in (p for group in self.groups for p in group["params"]):
            parameter.grad = None


class FlatParameters:
    """
    Parameters that for a while are, as their gradients, views of one long tensor a group.

    An optimizer passes over one long tensor in half the time that a hundred take.

    Gradients stay where they are. Clearing them only marks them, and the first of a step is written over what is there, by whoever
    asks `supersede`; under autograd's own additions they become 0 first. A parameter that nothing flows into has a gradient of 0,
    not None.

    Attributes:
        groups: With the long tensors in place of the parameters, one for each type of number.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.groups: list[dict[str, Any]] = []
        self._parts: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._hooks: list[RemovableHandle] = []
        try:
            for group in groups:
                by_type: dict[torch.dtype, list[nn.Parameter]] = {}
                for parameter in group["params"]:
                    by_type.setdefault(parameter.dtype, []).append(parameter)
                self.groups.append({**group, "params": [_flatten(same) for same in by_type.values()]})
            for part in self._parts:
                self._hooks.append(part.register_hook(lambda _, part=part: _clear_outdated(part)))  # type: ignore[no-untyped-call]
        except BaseException:
            self.release()
            raise

    def gradient_norm(self) -> Tensor:
        """Euclidean norm over all gradients, shape (); what no pass of the step has written is 0 from here on."""
        for parameter in self._parts:
            _clear_outdated(parameter)
        rows = [p.grad.view(-1, _ROW) for group in self.groups for p in group["params"]]
        norm: Tensor = torch.linalg.vector_norm(torch.cat([torch.linalg.vector_norm(r, dim=1).float() for r in rows]))
        return norm

    def clear_gradients(self) -> None:
        """Mark the gradients as outdated, so that the next backward pass starts anew."""
        for parameter in self._parts:
            parameter.gradient_is_outdated = True  # type: ignore[attr-defined]

    def release(self) -> None:
        """Give each parameter memory of its own again, without a gradient."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parts:
            parameter.data, parameter.grad = parameter.data.clone(), None
            parameter.__dict__.pop("gradient_is_outdated", None)


@contextmanager
def flattened(groups: Sequence[dict[str, Any]]) -> Iterator[FlatParameters]:
    """`FlatParameters` that are released in the end."""
    parameters = FlatParameters(groups)
    try:
        yield parameters
    finally:
        parameters.release()


def supersede(parameter: Tensor) -> bool:
    """Whether the gradient is of an earlier step, for the caller to write over: from here on it counts as this step's."""
    outdated: bool = getattr(parameter, "gradient_is_outdated", False)
    if outdated:
        parameter.gradient_is_outdated = False  # type: ignore[attr-defined]
    return outdated


def _clear_outdated(parameter: nn.Parameter) -> None:
    if supersede(parameter) and parameter.grad is not None:
        parameter.grad.zero_()


def _flatten(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    sizes = [p.numel() + -p.numel() % _ALIGNMENT for p in parameters]
    sizes[-1] += -sum(sizes) % _ROW
    flat = nn.Parameter(parameters[0].new_zeros(sum(sizes)))
    flat.grad = torch.zeros_like(flat)
    for parameter, *parts in zip(parameters, torch.split(flat.data, sizes), torch.split(flat.grad, sizes), strict=True):
        data, gradient = (part[: parameter.numel()].view(parameter.shape) for part in parts)
        parameter.data, parameter.grad = data.copy_(parameter.data), gradient
    return flat
