"""What the user asks of a session, on the command line or in an ini file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peftbench.phases import PRECISIONS, SCALES, check_data_folder
from peftbench.report import seen_from

if TYPE_CHECKING:
    from peftbench.gates import Gate

OPTIONS = {
    "scale": ("auto", f"Scale of the cases: auto (thesis with CUDA, unless the device is cpu; else mini), {', '.join(SCALES)}."),
    "seeds": ("42", "Seeds, separated by commas; each case runs once per seed."),
    "outputs": ("outputs", "Folder for records, reports, KD subsets and caches."),
    "data": ("", "Folder with train.tsv, dev.tsv and, if labelled, test.tsv in GLUE's format, to replace the scale's data."),
    "device": ("auto", "Device: auto (CUDA where it is available), cpu, cuda, or a certain GPU, such as cuda:1."),
    "precision": ("auto", f"One of {', '.join(PRECISIONS)}; auto is the device's native precision."),
    "evaluations": ("0", "Number of evaluations on dev while each phase trains; not counted as training time."),
    "compare": (
        "",
        "At the end, compare this run with a commit, a run's id, latest, a folder or a file, as peftbench compare does.",
    ),
}
"""Those with a value: its default and its help text."""

INI_FILES = {
    **dict.fromkeys(("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini"), ""),
    "pyproject.toml": "[tool.pytest",
    "tox.ini": "[pytest]",
    "setup.cfg": "[tool:pytest]",
}
"""Where pytest looks for its ini keys, and what such a file has in it."""


def add_options(parser: pytest.Parser) -> None:
    """Each as ``--peft-NAME`` and as the ini key ``peft_NAME``."""
    group = parser.getgroup("peftbench", "peftbench: fine-tuning, PEFT and distillation compared")
    for name, (default, text) in OPTIONS.items():
        group.addoption(f"--peft-{name}", dest=f"peft_{name}", metavar=name.upper(), help=f"{text} Default: {default or 'none'}.")
        parser.addini(f"peft_{name}", text, default=default)
    text = (
        "With --peft-compare, exit with 1 if METRIC is worse by more than LIMIT, such as accuracy:0.5pt or "
        "train_runtime_seconds:20%."
    )
    in_help = f"{text} Can be repeated.".replace("%", "%%")
    group.addoption("--peft-fail", dest="peft_fail", action="append", metavar="METRIC:LIMIT", help=in_help)
    parser.addini("peft_fail", text, type="args", default=[])
    text = "Skip cases that have passed with the same settings, data and weights at this commit."
    group.addoption("--peft-resume", dest="peft_resume", action="store_true", help=text)
    parser.addini("peft_resume", text, type="bool", default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options as given, checked as far as that goes without torch and without the data."""

    scale: str
    seeds: tuple[int, ...]
    outputs: Path
    data: Path | None
    device: str
    precision: str
    evaluations: int
    compare: str
    gates: tuple[Gate, ...]
    resume: bool

    @classmethod
    def from_config(cls, config: pytest.Config) -> Options:
        """
        Read and check what the user gave.

        Raises:
            pytest.UsageError: Naming the option or the ini key, what was got and what is allowed.
        """
        typed = {name: config.getoption(f"peft_{name}") for name in OPTIONS}
        given = {
            name: str((config.getini(f"peft_{name}") if value is None else value) or OPTIONS[name][0])  # empty: the default
            for name, value in typed.items()
        }
        spelled = {name: f"the ini key peft_{name}" if value is None else f"--peft-{name}" for name, value in typed.items()}

        def folder(name: str) -> Path:
            """Seen from the ini file or a --rootdir; on the command line, and without these, from where pytest was started."""
            said = config.inipath.parent if config.inipath else config.rootpath if config.getoption("rootdir") else None
            return (said if said and not typed[name] else Path.cwd()) / os.path.expanduser(given[name])  # noqa: PTH111 - Path raises where no home is known

        if given["compare"] not in ("", "latest") and (base := folder("compare")).exists():
            given["compare"] = str(seen_from(Path(), base))
        for name, allowed in (("scale", ("auto", *SCALES)), ("precision", PRECISIONS)):
            if given[name] not in allowed:
                raise pytest.UsageError(f"{spelled[name]} must be one of {', '.join(allowed)}, got {given[name]!r}")
        seeds = [text.strip() for text in given["seeds"].split(",")]
        well_formed = all(text.isascii() and text.isdigit() and int(text) < 2**32 for text in seeds)
        if not well_formed or len({int(text) for text in seeds}) < len(seeds):
            raise pytest.UsageError(
                f"{spelled['seeds']} must be different whole numbers from 0 to {2**32 - 1}, separated by commas, "
                f"got {given['seeds']!r}"
            )
        evaluations = given["evaluations"]
        if not (evaluations.isascii() and evaluations.isdigit() and int(evaluations) <= 1000):
            raise pytest.UsageError(f"{spelled['evaluations']} must be a whole number from 0 to 1000, got {evaluations!r}")
        limits = config.getoption("peft_fail")
        option = "the ini key peft_fail" if limits is None else "--peft-fail"
        if limits is None:  # an ini file's base that the command line has switched off takes its limits with it
            limits = [] if typed["compare"] == "" else config.getini("peft_fail")
        if limits and not given["compare"]:
            raise pytest.UsageError(f"{option} {limits[0]} needs a comparison; name what to compare with by --peft-compare BASE")
        _check_ini_file(config, typed)
        options = cls(
            scale=given["scale"],
            seeds=tuple(map(int, seeds)),
            outputs=folder("outputs"),
            data=folder("data") if given["data"] else None,
            device=given["device"],
            precision=given["precision"],
            evaluations=int(evaluations),
            compare=given["compare"],
            gates=_parse_gates(limits, option),
            resume=bool(config.getoption("peft_resume") or config.getini("peft_resume")),
        )
        if typed["data"]:
            options.check_data(spelled["data"])
        return options

    def check_data(self, spelled: str = "the ini key peft_data") -> None:
        """
        See that the data's folder has the files that it needs; one of an ini file matters only where there are cases.

        Raises:
            pytest.UsageError: Naming what gave it and what it lacks.
        """
        if self.data:
            try:
                check_data_folder(self.data, spelled)
            except ValueError as error:
                raise pytest.UsageError(str(error)) from None


def _check_ini_file(config: pytest.Config, typed: Mapping[str, str | None]) -> None:
    """
    Refuse to run without the ini file that the user means.

    Before pytest knows our options, it takes an existing folder that is a word of its own for one of tests, and where there is no
    other it looks for its ini file there.
    """
    words, start = config.invocation_params.args, config.invocation_params.dir
    apart = [(name, value) for name, value in typed.items() if value and value in words and (start / value).exists()]
    if not apart or config.getoption("inifilename") or config.args_source is config.ArgsSource.ARGS:
        return
    searched = config.inipath.parent if config.inipath else None if config.getoption("rootdir") else config.rootpath
    option, given = apart[0]
    for folder in (start, *start.parents):
        if folder == searched:
            return
        for name, section in INI_FILES.items():
            if (folder / name).is_file() and section in (folder / name).read_text("utf-8", "replace"):
                raise pytest.UsageError(
                    f"pytest has taken {given} for a folder of tests and passed over {folder / name}; "
                    f"write --peft-{option}={given} in one word"
                )


def _parse_gates(limits: list[str], option: str) -> tuple[Gate, ...]:
    if not limits:
        return ()
    from peftbench.gates import Gate

    try:
        return tuple(Gate.from_text(text, option) for text in limits)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
