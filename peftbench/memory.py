"""How many examples fit a device's memory beside a model: weights, gradients, optimizer state, activations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftbench.device import Device
from peftbench.models import count_parameters, shipped
from peftbench.packing import Encoded

USABLE = 0.9
"""Share of the free memory that a plan may fill; the rest is left to fragments and to the libraries."""


def examples_at_once(model: nn.Module, encoded: Encoded, batch_size: int, device: Device) -> int:
    """How many examples of a step fit the free memory together, the longest ones at that; halved from the batch size."""
    free = device.free_memory()
    _, trainable = count_parameters(model)
    room = None if free is None else free - _added_bytes(model, trainable, device)  # the weights are there already
    return fitting(model, encoded, batch_size, device, room)


def fitting(model: nn.Module, encoded: Encoded, batch_size: int, device: Device, room: int | None) -> int:
    """As `examples_at_once`, in that many bytes; None is as many as it takes."""
    size = batch_size
    while room is not None and size > 1 and activation_bytes(model, longest_lengths(encoded, size), device) > USABLE * room:
        size //= 2
    return size


def longest_lengths(encoded: Encoded, n: int) -> list[int]:
    """Tokens of the n longest texts."""
    return sorted(map(len, encoded.tokens))[-n:]


def weight_bytes(model: nn.Module, trainable: int, device: Device) -> int:
    """Bytes of the weights and of what training adds to them."""
    held = sum(parameter.numel() * parameter.element_size() for _, parameter in shipped(model))
    return held + _added_bytes(model, trainable, device)


def _added_bytes(model: nn.Module, trainable: int, device: Device) -> int:
    """Bytes of the copies that autocast makes of weights in fp32, and of gradient and two moments of what trains."""
    in_fp32 = sum(parameter.numel() for _, parameter in shipped(model) if parameter.dtype == torch.float32)
    return (0 if device.precision == "fp32" else 2 * in_fp32) + 12 * trainable


def activation_bytes(model: nn.Module, lengths: Sequence[int], device: Device) -> int:
    """
    By Korthikanti et al. 2022, arXiv:2205.05198, equation 2, which counts 16-bit activations of every layer in full.

    What CUDA graphs keep beside them is left out, as they are given up where it does not fit.
    """
    config: Any = model.config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    layers, width, heads = (getattr(config, name, 0) for name in names)  # an architecture without them is not estimated
    tokens, cells = sum(lengths), len(lengths) * max(lengths) ** 2
    return int(layers * (34 * tokens * width + 5 * heads * cells) * (2 if device.precision == "fp32" else 1))
