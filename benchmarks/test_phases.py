"""The study: five ways to a sentiment classifier. Add a phase by adding an entry to PHASES."""

import pytest

from peftbench.phases import LORA, Distillation, Phase

# MiniLM's pooler was not pre-trained and the tiny one is random: there it is part of the head and trains with it.
POOLER = {"modules_to_save": ["pooler", "classifier"]}
MINI_LORA = {**LORA, **POOLER}
# With all of its linear layers adapted, the small encoder learns in one epoch what attention alone takes two for.
LINEAR = ["query", "key", "value", "output.dense", "intermediate.dense"]
TINY_LORA = {**LORA, **POOLER, "lora_alpha": 32, "lora_dropout": 0.0}

pytestmark = pytest.mark.filterwarnings("default")  # hours of training do not end at what a library deprecates

PHASES = [
    Phase(id="A-teacher", role="teacher", kd_subsets=(1000, 500)),
    Phase(
        id="B-lora",
        role="backbone",
        peft=LORA,
        epochs=1,
        learning_rate=5e-4,
        at_scale={
            "mini": {
                "peft": {**MINI_LORA, "target_modules": LINEAR},
                "learning_rate": 7e-4,
                "layer_decay": 0.9,
                "dropout": 0.0,
                "warmup_fraction": 0.1,
            },
            "tiny": {"peft": TINY_LORA, "epochs": 3, "learning_rate": 2e-3, "warmup_fraction": 0.1},
        },
    ),
    Phase(
        id="C1-full",
        role="student",
        epochs=2,
        learning_rate=3e-5,
        at_scale={
            "mini": {"learning_rate": 3e-4, "layer_decay": 0.7, "dropout": 0.0, "warmup_fraction": 0.1},
            "tiny": {"epochs": 2, "learning_rate": 1e-3, "warmup_fraction": 0.1},
        },
    ),
    Phase(
        id="C2-kd",
        role="student",
        subset=1000,
        distillation=Distillation(),
        epochs=3,
        learning_rate=3e-5,
        at_scale={
            "mini": {"epochs": 6, "learning_rate": 5e-4, "layer_decay": 0.7, "warmup_fraction": 0.1},
            "tiny": {"epochs": 4, "learning_rate": 1e-3, "warmup_fraction": 0.1},
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
        unfrozen_learning_rate=5e-5,
        at_scale={
            "mini": {
                "peft": MINI_LORA,
                "epochs": 5,
                "learning_rate": 1.5e-3,
                "unfrozen_learning_rate": 3e-4,
                "warmup_fraction": 0.1,
            },
            "tiny": {
                "peft": TINY_LORA,
                "epochs": 12,
                "learning_rate": 1e-3,
                "unfrozen_learning_rate": 1e-3,
                "warmup_fraction": 0.1,
            },
        },
    ),
]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.id)
def test_phase(phase, run_phase):
    """The phase learns: it beats the majority class, and on the generated sentences comes near the truth."""
    record = run_phase(phase)
    accuracy, majority = record.dev.accuracy, record.majority_accuracy
    assert accuracy > majority, f"dev accuracy {accuracy:.3f} is not above the majority class's {majority:.3f}"
    assert accuracy > 0.8 or record.data["source"] != "generated sentences", f"dev accuracy {accuracy:.3f} is not above 0.8"
