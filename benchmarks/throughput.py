"""
The contenders of test_throughput.py, each in a process of its own: ``python benchmarks/throughput.py SPEC``, SPEC as JSON.

Every line on standard input is a command, ``round`` or ``matrices``, answered by one line of JSON.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from peftbench.data import draw
from peftbench.distill import kd_loss
from peftbench.kernels import ONEDNN_LINEAR
from peftbench.measure import PeakMemory, Stopwatch
from peftbench.models import load_classifier, load_tokenizer, prepare
from peftbench.packing import predict
from peftbench.phases import LORA, SCALES, Distillation, Phase
from peftbench.workbench import Settings, Workbench, seed_everything

SEED = 42
PHASES = {
    "full": Phase(id="P-full", role="backbone", epochs=1, learning_rate=2e-4),
    "lora": Phase(id="P-lora", role="backbone", epochs=1, learning_rate=2e-3, peft=LORA),
    "kd": Phase(id="P-kd", role="student", epochs=1, learning_rate=3e-4, distillation=Distillation()),
}
MATRIX_PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.addmm_,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    ONEDNN_LINEAR,
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """
    What one process measures.

    Attributes:
        contender: ``peftbench``; ``notebook``: transformers' Trainer as the study's notebooks set it up, every sentence padded to
            the longest allowed, 8 examples at a time, two times to an update, checkpointing under LoRA; ``tuned``: Trainer with
            padding to the longest of a batch, sentences of like length together, 16 at a time; ``live-teacher``: the tuned one with
            the teacher run in every step. The tuned one reads its teacher's logits from memory, as peftbench does.
        data: A folder of GLUE-style files, or empty for the scale's own data.
    """

    contender: str
    method: str
    precision: str
    scale: str
    data: str
    device: str
    outputs: str
    examples: int


class Contest:
    """Model, examples and teacher, the same for all contenders; the teacher's head is new, which its speed does not depend on."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        settings = Settings(
            outputs=Path(spec.outputs),
            run_id="throughput",
            data=Path(spec.data) if spec.data else None,
            device=spec.device,
            precision=spec.precision,
        )
        self.bench = Workbench(SCALES[spec.scale], settings)
        self.device, self.phase = self.bench.device, PHASES[spec.method]
        scale = self.bench.scale
        self.weights = self.bench.weights(scale.source_of(self.phase.role))
        self.examples = draw(self.bench.splits.train, spec.examples)
        self.encoded = self.bench.encoded(self.examples, self.weights, self.phase.max_length)
        self.teacher_logits = None
        if self.phase.distillation is not None:
            teacher = self.load_teacher()
            self.teacher_logits = predict(teacher, self.encoded, self.device, packed=False)

    def load_teacher(self) -> nn.Module:
        seed_everything(SEED)
        return load_classifier(self.bench.weights(self.bench.scale.backbone)).to(self.device.name).eval()

    def run(self) -> dict[str, float]:
        """Train once: seconds of the loop, optimizer updates, peak memory."""
        self.device.release_memory()
        memory = PeakMemory(self.device)
        memory.restart()
        seconds, updates = (self._run_peftbench if self.spec.contender == "peftbench" else self._run_trainer)()
        return {"seconds": seconds, "updates": updates, "peak_memory_bytes": memory.read_bytes()}

    def _run_peftbench(self) -> tuple[float, int]:
        seed_everything(SEED)
        trainee = self.bench.ready(self.weights, self.phase)
        run = self.bench.train(self.phase, trainee, self.encoded, teacher=self.teacher_logits, seed=SEED, what="round")
        return run.runtime_seconds, run.steps

    def _run_trainer(self) -> tuple[float, int]:
        notebook = self.spec.contender == "notebook"
        phase, length = self.phase, self.phase.max_length
        tokenizer = load_tokenizer(self.weights)
        padding = "max_length" if notebook else False
        rows = [
            dict(tokenizer(sentence, truncation=True, max_length=length, padding=padding), label=label)
            for sentence, label in zip(self.examples.sentences, self.examples.labels, strict=True)
        ]
        trainer, options = Trainer, {}
        if phase.distillation is not None:
            live = None
            if self.spec.contender == "tuned":
                assert self.teacher_logits is not None
                for row, logits in zip(rows, self.teacher_logits.tolist(), strict=True):
                    row["teacher_logits"] = logits
            else:
                live = self.load_teacher()
            trainer, options = _DistillingTrainer, {"distillation": phase.distillation, "teacher": live}
        seed_everything(SEED)
        model, _ = prepare(load_classifier(self.weights), self.phase)
        clock = _LoopClock(self.device)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                output_dir=scratch,
                num_train_epochs=phase.epochs,
                learning_rate=phase.learning_rate,
                per_device_train_batch_size=phase.batch_size // (2 if notebook else 1),
                gradient_accumulation_steps=2 if notebook else 1,
                gradient_checkpointing=notebook and phase.peft is not None,
                train_sampling_strategy="random" if notebook else "group_by_length",
                optim="adamw_torch_fused",
                max_grad_norm=phase.clip_norm,
                bf16=self.device.precision == "bf16",
                fp16=self.device.precision == "fp16",
                use_cpu=self.device.kind == "cpu",
                dataloader_pin_memory=self.device.kind != "cpu",
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=SEED,
            )
            done = trainer(
                model=model,
                args=arguments,
                train_dataset=rows,
                data_collator=DataCollatorWithPadding(tokenizer),
                callbacks=[clock],
                **options,
            ).train()
        return clock.seconds, done.global_step

    def matrices(self) -> dict[str, float | None]:
        """
        Run the matrix products of a round alone, in their order and on memory that they share as there: seconds.

        None on a GPU, where launching so many short operations from Python takes longer than they do.
        """
        if self.device.kind != "cpu":
            return {"matrix_seconds": None}
        replay = _Replay(self.products, self.device.name)
        with self.bench.own_threads():
            replay()  # the first touch of new memory is not the product's
            with Stopwatch(self.device) as watch:
                replay()
        return {"matrix_seconds": watch.seconds}

    @functools.cached_property
    def products(self) -> "list[Product]":
        """The matrix products of a round, which is run once more to note them."""
        with _MatrixProducts() as noted:
            self.run()
        return noted.products


class _LoopClock(TrainerCallback):
    """Times what lies between the first and the last update of a Trainer: no model preparation, no report."""

    def __init__(self, device: Any) -> None:
        self.watch, self.seconds = Stopwatch(device), 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.__enter__()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.watch.__exit__()
        self.seconds = self.watch.seconds


class _DistillingTrainer(Trainer):
    def __init__(self, *, distillation: Distillation, teacher: nn.Module | None, **options: Any) -> None:
        super().__init__(**options)
        self.distillation, self.teacher = distillation, teacher
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        logits = inputs.pop("teacher_logits", None)
        inputs.pop("token_type_ids", None)  # all zero, as without
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                logits = self.teacher(**inputs).logits.float()
        outputs = model(**inputs)
        loss = kd_loss(outputs.logits.float(), logits, labels, self.distillation)
        return (loss, outputs) if return_outputs else loss


@dataclass(frozen=True, slots=True)
class _Operand:
    """A tensor that a matrix product read or wrote: where it lay, and how."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Operand":
        return cls(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @property
    def extent(self) -> int:
        """Numbers from the first to the last."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


Product = tuple[Callable[..., Any], list[Any], dict[str, Any]]
"""An operation, its arguments and its options."""


class _MatrixProducts(TorchDispatchMode):
    """Notes the matrix products that run, in their order: the operation and its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.overloadpacket in MATRIX_PRODUCTS:
            operands = [_Operand.of(x) if isinstance(x, torch.Tensor) else x for x in args]
            self.products.append((operation, operands, dict(kwargs or {})))
        return operation(*args, **(kwargs or {}))


class _Replay:
    """
    Matrix products and nothing between them.

    Operands that lay in the same place do so here, too, so that a weight is as likely in the processor's cache as in the step; the
    same products repeated one by one would find all of theirs there.
    """

    def __init__(self, products: "list[Product]", device: str) -> None:
        extents: dict[tuple[int, torch.dtype], int] = {}
        for operand in (x for _, args, _ in products for x in args if isinstance(x, _Operand)):
            place = operand.address, operand.dtype
            extents[place] = max(extents.get(place, 0), operand.extent)
        memory = {place: torch.rand(extent, device=device).to(place[1]) for place, extent in extents.items()}
        self.products = [
            (
                operation,
                [memory[x.address, x.dtype].as_strided(x.shape, x.stride) if isinstance(x, _Operand) else x for x in args],
                options,
            )
            for operation, args, options in products
        ]

    def __call__(self) -> None:
        with torch.no_grad():
            for operation, args, options in self.products:
                operation(*args, **options)


@contextlib.contextmanager
def _answers_only() -> Iterator[Any]:
    """Keep standard output for answers; what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        yield answers


def main() -> None:
    """Serve commands until standard input ends."""
    with _answers_only() as answers:
        contest = Contest(Spec(**json.loads(sys.argv[1])))
        commands = {"round": contest.run, "matrices": contest.matrices}
        for line in sys.stdin:
            answers.write(json.dumps(commands[line.strip()]()) + "\n")
            answers.flush()
            contest.device.release_memory()  # a GPU has no room for what three contenders keep


if __name__ == "__main__":
    main()
