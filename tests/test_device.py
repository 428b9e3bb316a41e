"""Which device and precision a run gets, and which ones are refused."""

import pickle

import pytest
import torch

from peftbench.device import Device, auto_scale, is_out_of_memory
from peftbench.phases import PRECISIONS

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where CUDA is absent")
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("name", ["abacus", "", "cpu:x", "cpu:-2", "mtia:9"])
def test_unknown_device_is_refused_by_name(name):
    """A device that torch does not have here is refused, naming it and one that would do."""
    with pytest.raises(ValueError, match=r"device must be one that torch can use here, such as cpu, got ") as refused:
        Device.choose(name, "fp32")
    assert repr(name) in str(refused.value)


@without_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_absent_cuda_is_refused(name):
    """Asking for CUDA where there is none fails at once and on one line instead of falling back to the CPU."""
    with pytest.raises(ValueError, match=rf"got '{name}': \S") as refused:
        Device.choose(name)
    assert 1 == len(str(refused.value).splitlines())


@pytest.mark.parametrize(
    ("there", "device", "scale"),
    [(True, "auto", "thesis"), (True, "cuda:1", "thesis"), (True, "cpu", "mini"), (False, "auto", "mini")],
)
def test_the_scale_goes_by_the_device(monkeypatch, there, device, scale):
    """The full size with CUDA, where the CPU is not asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert scale == auto_scale(device)


def test_device_that_does_not_compute_is_refused():
    """torch's meta device has shapes but no numbers."""
    with pytest.raises(ValueError, match="device must be cpu, cuda or one of several such as cuda:1, got 'meta'"):
        Device.choose("meta", "fp32")


@pytest.mark.parametrize("precision", ["fp8", "FP32", "", "float32"])
def test_unknown_precision_is_refused_with_the_choices(precision):
    """The message lists what is allowed and says what was got."""
    with pytest.raises(ValueError, match=r"precision must be one of auto, fp32, bf16, fp16, got ") as refused:
        Device.choose("cpu", precision)
    assert repr(precision) in str(refused.value)


def test_fp16_needs_cuda():
    """The CPU has no loss scaling, so fp16 there is refused with what to take instead."""
    with pytest.raises(ValueError, match="precision fp16 needs a CUDA device, got cpu; use bf16 or fp32"):
        Device.choose("cpu", "fp16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_asked_for_is_taken(precision):
    """An explicit device and precision are used as they are, and the reason says so."""
    assert Device(name="cpu", precision=precision, why="as asked; precision as asked") == Device.choose("cpu", precision)


@without_cuda
def test_auto_device_without_cuda_is_the_cpu():
    """Auto says why the CPU was taken."""
    chosen = Device.choose("auto", "fp32")
    assert ("cpu", "no CUDA here; precision as asked") == (chosen.name, chosen.why)


@with_cuda
def test_auto_device_with_cuda_is_cuda():
    """Auto takes CUDA where it is available and says so."""
    chosen = Device.choose("auto", "fp32")
    assert ("cuda", "CUDA is available; precision as asked") == (chosen.name, chosen.why)


def test_auto_precision_is_what_the_processor_does_natively():
    """On the CPU bf16 is chosen exactly where the processor has instructions for it; the reason says which."""
    features = torch.cpu.get_capabilities()
    native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    expected = (
        ("bf16", "as asked; the processor has bf16 instructions") if native else ("fp32", "as asked; no bf16 instructions here")
    )
    chosen = Device.choose("cpu", "auto")
    assert expected == (chosen.precision, chosen.why)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_auto_never_stays_auto(device):
    """The chosen precision is a concrete one that the device accepts again."""
    chosen = Device.choose(device)
    assert chosen.precision in set(PRECISIONS) - {"auto"}
    assert chosen.precision == Device.choose(chosen.name, chosen.precision).precision


@pytest.mark.parametrize(("name", "kind"), [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda")])
def test_kind_is_the_device_without_its_index(name, kind):
    """Cache keys and machine comparisons go by the kind."""
    assert kind == Device(name=name, precision="fp32", why="").kind


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_runs_matrix_products_in_the_precision(precision, dtype):
    """Products are computed in the precision; the parameters that go in stay fp32."""
    weight = torch.ones(2, 2, requires_grad=True)
    with Device(name="cpu", precision=precision, why="").autocast():
        product = weight @ torch.ones(2, 2)
    product.float().sum().backward()
    assert (dtype, torch.float32) == (product.dtype, weight.grad.dtype)


def test_device_survives_pickling():
    """A device travels to a worker process as it is."""
    device = Device.choose("cpu", "bf16")
    device.synchronize()
    assert device == pickle.loads(pickle.dumps(device))


def test_running_out_of_memory_is_told_by_its_errors():
    """torch's own, cuBLAS's, the driver's and that of the CPU's allocator, which is a RuntimeError like any other."""
    cpu = "DefaultCPUAllocator: can't allocate memory: you tried", "DefaultCPUAllocator: not enough memory: you tried"  # Windows'
    texts = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", *cpu)
    assert all(is_out_of_memory(error) for error in (torch.OutOfMemoryError("x"), MemoryError(), *map(RuntimeError, texts)))
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
