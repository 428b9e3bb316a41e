"""The study: five ways to a sentiment classifier. Add a phase by adding an entry to PHASES."""

import pytest

from peftbench.phases import LORA, Distillation, Phase

MINI_LORA = {**LORA, "modules_to_save": ["pooler", "classifier"]}

PHASES = [
    Phase(id="A-teacher", role="teacher", kd_subsets=(1000, 500)),
    Phase(
        id="B-lora",
        role="backbone",
        peft=LORA,
        epochs=1,
        learning_rate=5e-4,
        at_scale={
            "mini": {"peft": MINI_LORA, "learning_rate": 1e-3, "epochs": 2, "warmup_fraction": 0.1},
            "tiny": {"learning_rate": 5e-3, "epochs": 4},
        },
    ),
    Phase(
        id="C1-full",
        role="student",
        epochs=2,
        learning_rate=3e-5,
        at_scale={"mini": {"learning_rate": 1e-4, "warmup_fraction": 0.1}, "tiny": {"learning_rate": 1e-3}},
    ),
    Phase(
        id="C2-kd",
        role="student",
        subset=1000,
        distillation=Distillation(),
        epochs=3,
        learning_rate=3e-5,
        at_scale={
            "mini": {"learning_rate": 2e-4, "epochs": 6, "warmup_fraction": 0.1},
            "tiny": {"learning_rate": 2e-3, "epochs": 6},
        },
    ),
    Phase(
        id="D-hybrid",
        role="backbone",
        subset=500,
        peft=LORA,
        unfreeze_top_layers=2,
        distillation=Distillation(),
        epochs=3,
        learning_rate=5e-4,
        at_scale={
            "mini": {"peft": MINI_LORA, "learning_rate": 1e-3, "unfrozen_learning_rate": 2e-4, "epochs": 8, "warmup_fraction": 0.1},
            "tiny": {"learning_rate": 2e-3, "epochs": 10},
        },
    ),
]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.id)
def test_phase(phase, run_phase):
    record = run_phase(phase)
    assert record.dev.accuracy > record.majority_accuracy
