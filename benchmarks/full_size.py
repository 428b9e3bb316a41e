"""
BERT-large and DistilBERT at full size with random weights, on real sentence lengths: does each phase run, does the plan hold?

Not part of the study: `pytest benchmarks/full_size.py -k twenty --peft-data DIR` runs 20 optimizer steps of each phase on the CPU
through the code of a real run and counts their arithmetic. It needs the data, some 5 GiB of memory and ten minutes. On a GPU,
`-k study --peft-scale thesis --peft-data DIR` runs all of the study over what stand_ins.py has put into the Hub's cache.
"""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stand_ins import CONFIGS, write_checkpoint
from benchmarks.test_phases import PHASES as STUDY
from peftbench import workbench
from peftbench.assets import ENCODER, asset_path
from peftbench.data import draw, read_glue_folder
from peftbench.kernels import ONEDNN_LINEAR
from peftbench.models import load_tokenizer, locate
from peftbench.phases import LORA, SCALES, Distillation, Phase, Pretrained
from peftbench.plugin.session import SESSION
from peftbench.runner import plan_phases, run_phase
from peftbench.store import Store
from peftbench.workbench import Settings, Workbench

STEPS, BATCH = 20, 16
FLOPS = {
    ONEDNN_LINEAR: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0],
    torch.ops.aten.addmm_: lambda _, x, y, **__: 2 * math.prod(x) * y[1],
}
"""Of matrix products that torch's counter does not know, from the operands' shapes."""
PHASES = [
    Phase(id="A-teacher", role="teacher"),
    Phase(id="B-lora", role="backbone", peft=LORA, epochs=1, subset=STEPS * BATCH),
    Phase(id="C1-full", role="student", epochs=1, subset=STEPS * BATCH),
    Phase(id="C2-kd", role="student", epochs=1, subset=STEPS * BATCH, distillation=Distillation()),
    Phase(
        id="D-hybrid",
        role="backbone",
        peft=LORA,
        unfreeze_top_layers=2,
        epochs=1,
        subset=STEPS * BATCH,
        distillation=Distillation(),
    ),
]


@pytest.fixture(scope="session")
def bench(pytestconfig, tmp_path_factory):
    """The thesis scale over checkpoints made here, a thousand training sentences and a few to evaluate."""
    options = pytestconfig.stash[SESSION].options
    if not options.data:
        pytest.fail("benchmarks/full_size.py needs --peft-data DIR, real sentences in GLUE's format", pytrace=False)
    folder = tmp_path_factory.mktemp("full_size")
    splits = read_glue_folder(options.data)
    for split, rows in ((splits.train, 1000), (splits.dev, 32), (splits.test, 32)):
        some = draw(split, rows)
        lines = [f"{sentence}\t{label}\n" for sentence, label in zip(some.sentences, some.labels, strict=True)]
        (folder / f"{split.name}.tsv").write_text("sentence\tlabel\n" + "".join(lines), "utf-8")
    words = locate(Pretrained(source=str(asset_path(ENCODER, Store(options.outputs, "mini").assets))), fetch=None)
    for name, config in CONFIGS.items():
        write_checkpoint(config, load_tokenizer(words), folder / name)
    large, small = Pretrained(source=str(folder / "bert-large")), Pretrained(source=str(folder / "distilbert"))
    scale = dataclasses.replace(SCALES["thesis"], backbone=large, teacher=large, student=small)
    return Workbench(scale, Settings(outputs=folder / "outputs", run_id="full-size", data=folder, device="cpu"))


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.id)
def test_plan_holds_over_twenty_steps(phase, bench, monkeypatch, capsys, pytestconfig):
    """The phase takes its steps, and the arithmetic that torch counts in them is the plan's within 5%."""
    [planned] = plan_phases([phase], bench)
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)

    def fit(*arguments, **options):
        with counter:
            return original(*arguments, **options)

    original = workbench.fit
    monkeypatch.setattr(workbench, "fit", fit)
    record = run_phase(phase, bench.scale, 42, bench.settings, workbench=bench)
    assert (STEPS if phase.epochs else 0) == record.optimizer_steps
    counted = counter.get_total_flops() if phase.epochs else 0
    tera, gib, counts = 1e12, 2**30, record.parameter_counts
    with capsys.disabled():
        pytestconfig.pluginmanager.getplugin("terminalreporter").write_line(
            f"\n{phase.id}: {counts.trainable / 1e6:.1f}M of {counts.total / 1e6:.1f}M trained, "
            f"{record.optimizer_steps} steps in {record.train_runtime_seconds:.0f} s; "
            f"TFLOP planned {planned.training_flops / tera:.3f}, counted {counted / tera:.3f}; "
            f"GiB planned {planned.memory_bytes / gib:.1f}, peak {record.peak_memory_bytes / gib:.1f}"
        )
    assert planned.training_flops == pytest.approx(counted, rel=0.05)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("phase", STUDY, ids=lambda phase: phase.id)
def test_study_takes_every_step(phase, peft_scale, peft_workbench, request):
    """Its record tells time and memory; accuracy, which depends on the weights, is not looked at."""
    if peft_workbench.device.kind != "cuda":
        pytest.skip("takes days on a CPU")
    record, phase = request.getfixturevalue("run_phase")(phase), phase.at(peft_scale.name)
    examples = phase.subset or len(peft_workbench.splits.train)
    assert phase.epochs * math.ceil(examples / phase.batch_size) == record.optimizer_steps
