"""A plan counts what the loop then does: arithmetic against torch's counter on real steps, memory by hand."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peftbench import plan as planning
from peftbench.data import Split
from peftbench.device import Device
from peftbench.layers import make_packable
from peftbench.memory import USABLE, examples_at_once
from peftbench.models import ModelError, Weights, load_classifier, locate, prepare
from peftbench.packing import BF16_ROW_STEP, ROW_STEP, Encoded, Row, make_batch, shuffled_rows
from peftbench.phases import LORA, Phase, Untrained
from peftbench.plan import estimate_seconds, measure_matrix_rate, plan_phase
from peftbench.records import Plan

CPU = Device(name="cpu", precision="fp32", why="test")
BF16 = Device(name="cpu", precision="bf16", why="test")
PHASES = {
    "full": {},
    "lora": {"peft": LORA},
    "hybrid": {"peft": LORA, "unfreeze_top_layers": 1},
    "ia3": {
        "peft": {"peft_type": "IA3", "target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
    },
    "prompt": {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}},
}


def located(architecture="bert") -> Weights:
    return locate(Untrained(architecture=architecture, layers=3, hidden_size=32, attention_heads=4), fetch=None)


def encoded_of(n, name="train", seed=0):
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (n,), generator=draws).tolist()
    split = Split(name=name, ids=tuple(range(n)), sentences=("x",) * n, labels=tuple(i % 2 for i in range(n)))
    return Encoded(
        split=split,
        tokens=[torch.randint(4, 20, (length,), generator=draws) for length in lengths],
        labels=torch.tensor(split.labels),
    )


def counted(phase, weights, encoded, row_step=ROW_STEP, *, captured=False):
    """FLOPs of an epoch of real steps, by torch, which does not count its fused attention on CPU."""
    model, _ = prepare(load_classifier(weights), phase)
    packed = make_packable(model.train())
    generator = torch.Generator().manual_seed(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for rows in shuffled_rows(len(encoded), phase.batch_size, generator):
            row = Row(encoded, rows)
            batch = row.batch(row.numbers) if captured else make_batch(encoded, rows, "cpu", packed=packed, row_step=row_step)
            F.cross_entropy(model(**batch.inputs).logits, batch.labels).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", PHASES)
def test_arithmetic_is_what_torch_counts_on_real_steps(method):
    """Planned from 2 sampled steps, or 8 where padding is left, counted over all 10: within 5%, for whatever trains."""
    phase = Phase(id="X-test", role="backbone", epochs=2, **PHASES[method])
    weights, encoded = located(), encoded_of(160)
    planned = plan_phase(phase, weights, encoded, [], CPU)
    assert planned.training_flops == pytest.approx(2 * counted(phase, weights, encoded), rel=0.05)
    assert (20, 160, 2 * sum(map(len, encoded.tokens))) == (planned.steps, planned.examples, planned.tokens)


def test_arithmetic_counts_what_fills_rows_in_bf16():
    """Steps of two short texts, a third of which or so is filling: within 10% of what torch counts over all 80, from 2 of them."""
    phase = Phase(id="X-test", role="backbone", epochs=1, batch_size=2)
    weights, encoded = located(), encoded_of(160)
    planned = plan_phase(phase, weights, encoded, [], BF16)
    assert planned.training_flops == pytest.approx(counted(phase, weights, encoded, BF16_ROW_STEP), rel=0.1)


def test_arithmetic_on_a_gpu_is_of_the_rows_that_its_graphs_take():
    """Rows of a multiple of 64 tokens, over which attention goes as they are; other adapters are not captured."""
    phase = Phase(id="X-test", role="backbone", epochs=1, batch_size=2, peft=PHASES["lora"]["peft"])
    weights, encoded, gpu = located(), encoded_of(160), Device(name="cuda", precision="fp32", why="test")
    planned = plan_phase(phase, weights, encoded, [], gpu)
    assert planned.training_flops == pytest.approx(counted(phase, weights, encoded, captured=True), rel=0.05)
    assert planned.training_flops > 1.3 * plan_phase(phase, weights, encoded, [], CPU).training_flops
    in_portions = plan_phase(phase, weights, encoded, [], gpu, memory_bytes=1)
    assert in_portions.training_flops == plan_phase(phase, weights, encoded, [], CPU).training_flops
    launched = dataclasses.replace(phase, peft={"peft_type": "LOHA", "r": 2, "target_modules": ["query"]})
    assert (
        plan_phase(launched, weights, encoded, [], gpu).training_flops
        == plan_phase(launched, weights, encoded, [], CPU).training_flops
    )


def test_arithmetic_of_distilbert():
    """The other architecture."""
    phase = Phase(id="X-test", role="student", epochs=1)
    weights, encoded = located("distilbert"), encoded_of(160)
    planned = plan_phase(phase, weights, encoded, [], CPU)
    assert planned.training_flops == pytest.approx(counted(phase, weights, encoded), rel=0.05)


def test_what_is_evaluated_and_what_the_teacher_sees_is_counted():
    """Forward passes over dev and test, once, and the teacher's over train, once, whatever the epochs."""
    weights, train = located(), encoded_of(64)
    held_out = [encoded_of(32, "dev", 1), encoded_of(32, "test", 2)]
    phase = Phase(id="X-test", role="backbone", epochs=3)
    alone = plan_phase(phase, weights, train, [], CPU)
    assert 0 == alone.other_flops
    evaluated = plan_phase(phase, weights, train, held_out, CPU).other_flops
    taught = plan_phase(phase, weights, train, held_out, CPU, teacher=weights, taught=train.tokens).other_flops - evaluated
    forward = alone.training_flops / 3 / 3  # forward and twice as much backward, three epochs
    assert evaluated == pytest.approx(
        forward * sum(len(t) for e in held_out for t in e.tokens) / sum(map(len, train.tokens)), rel=0.1
    )
    assert taught == pytest.approx(forward, rel=0.1)


def test_a_phase_that_only_evaluates():
    """No steps, no training, no gradients to hold."""
    planned = plan_phase(Phase(id="A-teacher", role="teacher"), located(), encoded_of(32), [encoded_of(16, "dev")], CPU)
    assert (0, 0, 0, 0, 0) == (planned.steps, planned.examples, planned.tokens, planned.training_flops, planned.trainable)
    assert 4 * planned.parameters == planned.memory_bytes
    assert planned.other_flops > 0


def test_memory_of_weights_by_hand():
    """fp32 weights; under 16 bits a copy of each; gradient and two moments of what trains."""
    phase = Phase(id="X-test", role="backbone", epochs=1, peft=LORA)
    full, half = (plan_phase(phase, located(), encoded_of(32), [], device) for device in (CPU, BF16))
    assert 4 * full.parameters + 12 * full.trainable == full.weight_bytes
    assert full.weight_bytes + 2 * full.parameters == half.weight_bytes
    assert full.activation_bytes == 2 * half.activation_bytes


def test_memory_of_weights_on_a_gpu_by_hand():
    """In 16 bits frozen layers are kept in them; what else there is has fp32 and a copy."""
    phase = Phase(id="X-test", role="backbone", epochs=1, peft=LORA)
    gpu = Device(name="cuda", precision="fp16", why="test")
    planned = plan_phase(phase, located(), encoded_of(32), [], gpu, memory_bytes=2**40)
    frozen = 3 * (4 * (32 * 32 + 32) + 2 * 32 * 128 + 32 + 128) + 32 * 32 + 32  # three layers, and the pooler
    assert 2 * frozen + 6 * (planned.parameters - frozen) + 12 * planned.trainable == planned.weight_bytes


@pytest.mark.parametrize(
    ("peft", "planned"),
    [({"peft_type": "HRA", "r": 2}, True), ({"peft_type": "UNILORA"}, True), ({"peft_type": "VBLORA", "vector_length": 32}, False)],
)
def test_adapters_that_look_at_numbers_are_planned_or_refused(peft, planned):
    """Of those whose weights cannot be made of shapes alone some can run on shapes; of the others one message tells."""
    phase = Phase(id="X-test", role="backbone", epochs=1, peft={**peft, "target_modules": ["query"]})
    if planned:
        assert plan_phase(phase, located(), encoded_of(32), [], CPU).training_flops > 0
    else:
        with pytest.raises(ModelError, match="X-test cannot be planned: its model reads the values of tensors"):
            plan_phase(phase, located(), encoded_of(32), [], CPU)


def test_activations_by_hand():
    """Three layers, 32 wide, 4 heads: 34 bytes a token and width and 5 a cell of attention, for the two longest together."""
    encoded = encoded_of(40)
    phase = Phase(id="X-test", role="backbone", epochs=1, batch_size=2)
    planned = plan_phase(phase, located(), encoded, [], BF16)
    longest = sorted(map(len, encoded.tokens))[-2:]
    assert 3 * (34 * sum(longest) * 32 + 5 * 4 * 2 * max(longest) ** 2) == planned.activation_bytes


@pytest.mark.parametrize(("share", "expected"), [(1.2, 16), (0.6, 8), (0.0, 1)])
def test_less_memory_means_fewer_at_once(share, expected):
    """The number is halved until its longest examples fit nine tenths of what the weights leave."""
    phase, weights, encoded = Phase(id="X-test", role="backbone", epochs=1), located(), encoded_of(64)
    whole = plan_phase(phase, weights, encoded, [], CPU)
    assert 16 == whole.examples_at_once
    memory = whole.weight_bytes + int(share * whole.activation_bytes / USABLE)
    planned = plan_phase(phase, weights, encoded, [], CPU, memory_bytes=memory)
    assert expected == planned.examples_at_once
    assert planned.activation_bytes <= max(share, 0.2) * whole.activation_bytes


def test_loaded_model_asks_its_device(monkeypatch):
    """Before training: what is free now, the weights being there already. A device without memory of its own takes the batch."""
    model, _ = prepare(load_classifier(located()), Phase(id="X-test", role="backbone"))
    encoded = encoded_of(64)
    assert 16 == examples_at_once(model, encoded, 16, CPU)
    planned = plan_phase(Phase(id="X-test", role="backbone", epochs=1), located(), encoded, [], CPU)
    free = planned.weight_bytes - 4 * planned.parameters + int(0.6 * planned.activation_bytes / USABLE)
    monkeypatch.setattr(Device, "free_memory", lambda _: free)
    assert 8 == examples_at_once(model, encoded, 16, CPU)


def test_seconds_by_hand():
    """Arithmetic over rate, matrix products being only a share of a step, and what the steps take besides."""
    numbers = dict.fromkeys(("parameters", "trainable", "examples", "steps", "tokens", "weight_bytes", "activation_bytes"), 1)
    planned = Plan(phase="X", training_flops=3e12, other_flops=1e12, examples_at_once=1, fixed_seconds=0.5, **numbers)
    assert estimate_seconds(planned, 1e12) == pytest.approx(4 / planning.MATRIX_SHARE + 0.5)


def test_a_gpu_s_steps_cost_by_the_layer():
    """Two epochs of three steps of three layers; what is not known to be the same each time is launched by the host."""
    gpu = Device(name="cuda", precision="bf16", why="test")

    def planned(method, device, **options):
        peft = {"peft_type": method, "r": 2, "target_modules": ["query"]}
        phase = Phase(id="X-test", role="backbone", epochs=2, peft=peft)
        return plan_phase(phase, located(), encoded_of(40), [], device, **options).fixed_seconds

    steps = 6 * planning.STEP_SECONDS["cuda"]
    replayed = 3 * (6 * planning.REPLAYED_LAYER_SECONDS + planning.CAPTURE_SECONDS)
    assert planned("LORA", gpu) == pytest.approx(steps + replayed)
    assert planned("LOHA", gpu) == pytest.approx(steps + 3 * 6 * planning.LAUNCHED_LAYER_SECONDS)
    assert planned("LORA", CPU) == pytest.approx(6 * planning.STEP_SECONDS["cpu"])
    one_at_once = planned("LORA", gpu, memory_bytes=1)
    assert one_at_once == pytest.approx(steps + 3 * 6 * 16 * planning.LAUNCHED_LAYER_SECONDS)


def test_matrix_rate_counts_the_products_arithmetic(monkeypatch):
    """By a clock that goes by torch's count of operations, a second for 10⁹, the rate is 10⁹ a second, whatever the shapes."""
    counter = FlopCounterMode(display=False)

    class Clock:
        def __init__(self, _):
            self.began = counter.get_total_flops()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.seconds = (counter.get_total_flops() - self.began) / 1e9

    monkeypatch.setattr(planning, "Stopwatch", Clock)
    with counter:
        assert measure_matrix_rate(CPU, tokens=64, width=128) == pytest.approx(1e9)
    assert counter.get_total_flops() >= 1e9 * planning.LEAST_SECONDS
