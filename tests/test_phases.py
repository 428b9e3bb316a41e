"""Phases: what is refused with which words, and how a phase changes with its scale."""

import dataclasses
import pickle
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftbench.phases import LORA, SCALES, Distillation, Phase, Pretrained, Untrained

COUNTS = st.integers(min_value=1, max_value=10**6)
RATES = st.floats(min_value=1e-9, max_value=10.0)


def phase(**changes):
    return Phase(**{"id": "E-ia3", "role": "student", **changes})


@pytest.mark.parametrize(
    ("changes", "what", "got", "allowed"),
    [
        pytest.param({"id": "ia3"}, "phase id", "'ia3'", "like 'E-ia3'", id="id-without-hyphen"),
        pytest.param({"id": "E-a-b"}, "phase id", "'E-a-b'", "like 'E-ia3'", id="id-with-two-hyphens"),
        pytest.param({"id": "../E-x"}, "phase id", "'../E-x'", "like 'E-ia3'", id="id-with-a-path"),
        pytest.param({"id": "E-x\n"}, "phase id", "'E-x\\n'", "like 'E-ia3'", id="id-with-a-line-break"),
        pytest.param({"role": "pupil"}, "role", "'pupil'", "teacher, backbone, student", id="role"),
        pytest.param({"epochs": -1}, "epochs", "-1", "at least 0", id="epochs-negative"),
        pytest.param({"epochs": 1.5}, "epochs", "1.5", "a whole number", id="epochs-fraction"),
        pytest.param({"epochs": True}, "epochs", "True", "a whole number", id="epochs-bool"),
        pytest.param({"batch_size": 0}, "batch_size", "0", "at least 1", id="batch_size"),
        pytest.param({"max_length": 2}, "max_length", "2", "at least 3", id="max_length"),
        pytest.param({"unfreeze_top_layers": -1}, "unfreeze_top_layers", "-1", "at least 0", id="unfreeze_top_layers"),
        pytest.param({"subset": 0}, "subset", "0", "at least 1", id="subset"),
        pytest.param({"kd_subsets": (500, 0)}, "subset", "0", "at least 1", id="kd_subsets"),
        pytest.param({"kd_subsets": 1000}, "kd_subsets", "1000", "a tuple", id="kd_subsets-number"),
        pytest.param({"at_scale": {"mini": 3}}, "at_scale", "3", "a mapping", id="at_scale-number"),
        pytest.param({"kd_subsets": ("500",)}, "subset", "'500'", "a whole number", id="kd_subsets-text"),
        pytest.param({"learning_rate": 0.0}, "learning_rate", "0.0", "above 0", id="learning_rate-zero"),
        pytest.param({"learning_rate": float("nan")}, "learning_rate", "nan", "a finite number", id="learning_rate-nan"),
        pytest.param({"learning_rate": float("inf")}, "learning_rate", "inf", "a finite number", id="learning_rate-inf"),
        pytest.param({"learning_rate": "3e-5"}, "learning_rate", "'3e-5'", "a finite number", id="learning_rate-text"),
        pytest.param({"unfrozen_learning_rate": 0.0}, "unfrozen_learning_rate", "0.0", "above 0", id="unfrozen_learning_rate"),
        pytest.param({"dropout": 1.5}, "dropout", "1.5", "at most 1", id="dropout-above"),
        pytest.param({"warmup_fraction": 1.1}, "warmup_fraction", "1.1", "at most 1", id="warmup-above"),
        pytest.param({"warmup_fraction": -0.1}, "warmup_fraction", "-0.1", "at least 0", id="warmup-below"),
        pytest.param({"clip_norm": 0}, "clip_norm", "0", "above 0", id="clip_norm"),
        pytest.param({"weight_decay": -0.01}, "weight_decay", "-0.01", "at least 0", id="weight_decay"),
        pytest.param({"peft": {"r": 8}}, "peft", "{'r': 8}", "'LORA'", id="peft-without-type"),
        pytest.param({"peft": {"peft_type": 3}}, "peft", "{'peft_type': 3}", "'LORA'", id="peft-type-number"),
        pytest.param({"peft": "LORA"}, "peft", "'LORA'", "peft_type", id="peft-text"),
        pytest.param({"unfreeze_top_layers": 2}, "unfreeze_top_layers", "", "needs peft", id="unfreeze-without-peft"),
        pytest.param({"at_scale": {"mini": {"epoch": 3}}}, "at_scale['mini']", "epoch", "epochs", id="at_scale-typo"),
        pytest.param({"at_scale": {"mini": {"role": "teacher"}}}, "at_scale['mini']", "role", "epochs", id="at_scale-role"),
        pytest.param({"at_scale": {"mini": {"id": "E-y"}}}, "at_scale['mini']", "id", "epochs", id="at_scale-id"),
        pytest.param({"at_scale": {"mini": {"at_scale": {}}}}, "at_scale['mini']", "at_scale", "epochs", id="at_scale-nested"),
    ],
)
def test_a_wrong_field_is_refused_with_its_name_value_and_range(changes, what, got, allowed):
    """The message says which field, what it got and what is allowed."""
    with pytest.raises(ValueError) as caught:
        phase(**changes)
    message = str(caught.value)
    assert [] == [part for part in (what, got, allowed) if part not in message], message


def test_a_wrong_field_is_refused_with_the_phase_that_has_it():
    """Among several phases the message says which one to mend."""
    with pytest.raises(ValueError, match=r"^E-ia3: epochs "):
        phase(epochs=-1)


def test_an_id_that_no_file_could_have_is_refused():
    """Before anything is trained; the record's file is named by it."""
    assert Phase(id="E-" + "x" * 98, role="backbone")
    with pytest.raises(ValueError, match="must have at most 100 characters, got 101"):
        Phase(id="E-" + "x" * 99, role="backbone")


def test_all_unknown_fields_of_a_scale_are_named():
    """Two typos need one run, not two."""
    with pytest.raises(ValueError, match=r"no field epoch, lr; allowed: .*learning_rate"):
        phase(at_scale={"mini": {"lr": 1e-3, "epoch": 3, "subset": 5}})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("alpha", -0.01, "at least 0.0 and at most 1.0"),
        ("alpha", 1.01, "at least 0.0 and at most 1.0"),
        ("alpha", True, "a finite number"),
        ("alpha", float("nan"), "a finite number"),
        ("alpha", None, "a finite number"),
        ("temperature", 0, "above 0.0"),
        ("temperature", -2.0, "above 0.0"),
        ("temperature", float("inf"), "a finite number"),
        ("temperature", "2", "a finite number"),
    ],
)
def test_a_wrong_distillation_is_refused_with_its_name_value_and_range(field, value, allowed):
    """Alpha is a share and the temperature positive; the message says which of them, got and allowed."""
    with pytest.raises(ValueError) as caught:
        Distillation(**{field: value})
    message = str(caught.value)
    assert [] == [part for part in (field, allowed, f"got {value!r}") if part not in message], message


@given(alpha=st.floats(0.0, 1.0), temperature=RATES)
@settings(deadline=None, max_examples=25)
def test_a_distillation_within_its_range_is_kept_as_given(alpha, temperature):
    """Both ends of alpha belong to it: labels alone and teacher alone."""
    kd = Distillation(alpha=alpha, temperature=temperature)
    assert (alpha, temperature) == (kd.alpha, kd.temperature)


def test_distillation_defaults_are_the_studys():
    """Alpha 0.7 and temperature 2."""
    assert Distillation(alpha=0.7, temperature=2.0) == Distillation()


def test_the_bounds_themselves_are_allowed():
    """Nothing to train, one token between the special ones, warm-up over all or none of the steps."""
    lowest = phase(epochs=0, batch_size=1, max_length=3, subset=1, kd_subsets=(1,), warmup_fraction=0, weight_decay=0)
    assert (0, 1, 3, 1) == (lowest.epochs, lowest.batch_size, lowest.max_length, lowest.subset)
    assert 1 == phase(warmup_fraction=1).warmup_fraction


def test_defaults_are_what_the_phases_have_in_common():
    """16 examples a step, 96 tokens, no weight decay, norm clipped at 1, no subset, all parameters, labels alone."""
    plain = phase()
    assert (16, 96, 0.0, 1.0) == (plain.batch_size, plain.max_length, plain.weight_decay, plain.clip_norm)
    assert (None, None, None, 0) == (plain.subset, plain.peft, plain.distillation, plain.epochs)


def test_letter_and_name_are_the_halves_of_the_id():
    """`C1-full` is phase C1, named full."""
    assert ("C1", "full") == (phase(id="C1-full").letter, phase(id="C1-full").name)


def test_a_phase_changes_with_its_scale():
    """The named fields change, the others stay, and nothing is left to change."""
    changing = phase(epochs=3, learning_rate=1e-4, at_scale={"tiny": {"epochs": 9}, "mini": {"learning_rate": 1e-3}})
    assert phase(epochs=9, learning_rate=1e-4) == changing.at("tiny")
    assert phase(epochs=3, learning_rate=1e-3) == changing.at("mini")


def test_a_phase_without_changes_for_a_scale_stays_the_same():
    """`thesis` is what the fields say."""
    assert phase(epochs=3) == phase(epochs=3, at_scale={"tiny": {"epochs": 9}}).at("thesis")


def test_changes_for_a_scale_are_checked_like_the_fields():
    """A value out of range is refused where the scale is chosen."""
    with pytest.raises(ValueError, match=r"E-ia3: epochs must be a whole number of at least 0, got -9"):
        phase(at_scale={"tiny": {"epochs": -9}}).at("tiny")


def test_changes_for_a_scale_are_checked_together():
    """Taking the adapter away from unfrozen layers is refused."""
    with pytest.raises(ValueError, match="unfreeze_top_layers needs peft"):
        phase(peft=LORA, unfreeze_top_layers=2, at_scale={"tiny": {"peft": None}}).at("tiny")


@given(epochs=COUNTS, rate=RATES, subset=st.none() | COUNTS, scale=st.sampled_from(["tiny", "mini", "thesis"]))
@settings(deadline=None, max_examples=25)
def test_choosing_a_scale_twice_is_choosing_it_once(epochs, rate, subset, scale):
    """A phase that was fitted to a scale does not change again."""
    changing = phase(at_scale={scale: {"epochs": epochs, "learning_rate": rate, "subset": subset}})
    once = changing.at(scale)
    assert once == once.at(scale)
    assert (epochs, rate, subset) == (once.epochs, once.learning_rate, once.subset)


def test_a_phase_cannot_be_changed():
    """It may be shared between cases."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        phase().epochs = 3


def test_a_phase_can_be_sent_to_another_process():
    """It survives pickling, changes by scale included."""
    sent = phase(peft=LORA, distillation=Distillation(alpha=0.5), at_scale={"tiny": {"epochs": 9}})
    assert sent == pickle.loads(pickle.dumps(sent))


def test_the_three_scales_are_those_of_the_study():
    """Each is filed under its own name, and only `thesis` has a published teacher."""
    assert ["tiny", "mini", "thesis"] == list(SCALES) == [scale.name for scale in SCALES.values()]
    assert ["thesis"] == [name for name, scale in SCALES.items() if isinstance(scale.teacher, Pretrained)]


def test_the_mini_student_is_every_second_layer_of_the_encoder():
    """Layers 2, 4 and 6, as DistilBERT was initialised."""
    assert Pretrained(source="asset:encoder", layers=(2, 4, 6)) == SCALES["mini"].student


def test_facts_do_not_load_torch():
    """Loading what every pytest start loads costs nobody the tensor libraries."""
    code = (
        "import sys, peftbench.phases, peftbench.records, peftbench.summary, peftbench.report, peftbench.plugin, peftbench.cli\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]\n" == done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "a scale's name must be of letters, digits and underscores, got 'a/b'"),
        ({"threads": 0}, "scale tiny: threads must be a whole number of at least 1, got 0"),
        (
            {"data_revisions": {"nyu-mll/glue": "main"}},
            "scale tiny: data_revisions are of the Hub's data, and this scale has grammar",
        ),
        ({"student": "my-student"}, "scale tiny: student must be Pretrained or Untrained, got 'my-student'"),
        ({"teacher": Phase(id="T-x", role="student", epochs=1)}, "the teacher is the backbone with all parameters tuned"),
        ({"teacher": Phase(id="T-x", role="backbone", epochs=1, subset=9)}, "can have no subset"),
        ({"teacher": Phase(id="T-x", role="backbone", epochs=1, peft={"peft_type": "IA3"})}, "can have no subset, peft"),
        ({"teacher": Phase(id="T-x", role="backbone")}, "for one epoch or more"),
    ],
)
def test_a_scale_that_cannot_be_is_refused(changes, message):
    """Whatever its recipe says would be done otherwise, in silence."""
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(SCALES["tiny"], **changes)


def test_sources_are_checked():
    """Where they are written, not where they are loaded."""
    for layers in ([2, 4], (0, 2), ("2",), (1, 2, 2)):
        with pytest.raises(ValueError, match="layer"):
            Pretrained(source="x", layers=layers)
    with pytest.raises(ValueError, match="source must name"):
        Pretrained(source="")
    with pytest.raises(ValueError, match="hidden_size must be a whole number of at least 1, got 0"):
        Untrained(architecture="bert", layers=1, hidden_size=0, attention_heads=1)
    with pytest.raises(ValueError, match="hidden_size must be a multiple of attention_heads, got 30 and 4"):
        Untrained(architecture="bert", layers=1, hidden_size=30, attention_heads=4)


def test_a_rate_for_layers_that_are_not_unfrozen_is_refused():
    """It would be ignored."""
    with pytest.raises(ValueError, match="unfrozen_learning_rate needs unfreeze_top_layers, which is 0"):
        Phase(id="X-x", role="backbone", peft={"peft_type": "IA3"}, unfrozen_learning_rate=1e-4)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_has_not_are_refused(number):
    """As a record could not hold them."""
    with pytest.raises(ValueError, match="peft must be plain data that JSON can hold"):
        Phase(id="X-x", role="backbone", peft={"peft_type": "LORA", "lora_alpha": number})
