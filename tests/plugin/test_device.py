"""--peft-device and --peft-precision."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peft-precision", "fp8"], "*--peft-precision must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        (["--peft-device", "abacus"], "*device must be one that torch can use here, such as cpu, got 'abacus'*"),
        (["--peft-device", "cpu", "--peft-precision", "fp16"], "*precision fp16 needs a CUDA device, got cpu*"),
    ],
)
def test_what_the_machine_cannot_do_is_a_usage_error(study, arguments, message):
    """An unknown or absent device or precision ends the session before any case."""
    result = study(*arguments)
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([message])
