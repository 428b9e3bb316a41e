"""Where the arithmetic happens and in which precision."""

import gc
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from peftbench.errors import PeftbenchError
from peftbench.phases import PRECISIONS


class DeviceError(PeftbenchError, ValueError):
    """A device or a precision that cannot be had here."""


class DoesNotFit(PeftbenchError, RuntimeError):  # noqa: N818 - a state, not a mistake
    """Weights, or one example at a time, need more memory than the device has."""


def auto_scale(device: str) -> str:
    """The scale that suits a device, as asked for: ``thesis`` with CUDA, else ``mini``."""
    return "thesis" if not device.startswith("cpu") and torch.cuda.is_available() else "mini"


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether a device ran out of memory: torch's own error, numpy's, or one of cuBLAS, the driver or the CPU's allocator."""
    texts = ("ALLOC_FAILED", "CUDA error: out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """
    A device with a precision policy; parameters and optimizer state stay in fp32 in any of them.

    Attributes:
        name: As torch writes it, such as ``cpu`` or ``cuda:0``.
        precision: ``fp32``, ``bf16`` (autocast) or ``fp16`` (autocast with loss scaling).
        why: The reason for both, for the header line.
    """

    name: str
    precision: str
    why: str

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto") -> "Device":
        """
        Resolve the two options on this machine.

        Raises:
            DeviceError: If the device is unknown or absent, or the precision is unknown or cannot run on it.
        """
        if device == "auto":
            name, why = ("cuda", "CUDA is available") if torch.cuda.is_available() else ("cpu", "no CUDA here")
        else:
            name, why = device, "as asked"
        try:
            kind = torch.device(name).type
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            raise DeviceError(f"device must be one that torch can use here, such as cpu, got {device!r}: {reason}") from error
        if kind not in ("cpu", "cuda"):  # on others nothing was tried; fused AdamW does not clip gradients on all of them
            raise DeviceError(f"device must be cpu, cuda or one of several such as cuda:1, got {device!r}")
        if precision not in PRECISIONS:
            raise DeviceError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if precision == "fp16" and kind != "cuda":
            raise DeviceError(f"precision fp16 needs a CUDA device, got {name}; use bf16 or fp32")
        if precision != "auto":
            return cls(name=name, precision=precision, why=f"{why}; precision as asked")
        chosen, reason = _native_precision(name)
        return cls(name=name, precision=chosen, why=f"{why}; {reason}")

    @property
    def kind(self) -> str:
        """The device without its index: ``cpu``, ``cuda``."""
        return torch.device(self.name).type

    @property
    def dtype(self) -> torch.dtype:
        """The type of number that products are computed in."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    @property
    def casts_frozen(self) -> bool:
        """Whether layers that do not train are kept in the type of the products; CPU's layers convert theirs themselves."""
        return self.kind != "cpu" and self.precision != "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a forward pass runs."""
        reduced = self.dtype != torch.float32
        return torch.autocast(self.kind, self.dtype if reduced else torch.bfloat16, enabled=reduced)

    def set_up(self) -> None:
        """
        Choose how a GPU computes.

        fp32 products that a 16-bit precision leaves use TF32, where the chip has it; fp32 on request stays exact. Attention is left
        to kernels that take any shape at once.
        """
        if self.kind == "cuda":
            torch.set_float32_matmul_precision("highest" if self.precision == "fp32" else "high")
            torch.backends.cuda.enable_cudnn_sdp(False)  # which plans each shape of rows anew

    def free_memory(self) -> int | None:
        """Bytes that a model could still take, or None where the operating system is left to decide."""
        if self.kind != "cuda":
            return None
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.name)[0]

    def release_memory(self) -> None:
        """Hand back what nothing uses any more."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait until everything that was launched has run."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.name)


def _native_precision(name: str) -> tuple[str, str]:
    if torch.device(name).type == "cuda":
        if torch.cuda.get_device_capability(name)[0] >= 8:
            return "bf16", "the GPU has bf16 units"
        return "fp16", "the GPU has no bf16 units"
    features = torch.cpu.get_capabilities()
    if features.get("avx512_bf16") or features.get("amx_bf16"):
        return "bf16", "the processor has bf16 instructions"
    return "fp32", "no bf16 instructions here"
