"""Fine-tuning, PEFT, distillation and their hybrid, compared as pytest cases."""

import warnings
from pathlib import Path
from typing import Any


def load_records(outputs: str | Path = "outputs") -> list[dict[str, Any]]:
    """
    All records under an outputs folder, a flat row each, as ``pandas.DataFrame`` takes them.

    The columns are the record's keys by their dotted path, such as ``dev.accuracy``, after ``id`` (the phase's) and ``case``;
    predictions and curves are left out (`peftbench.records.read_record` has them). A file that cannot be read is warned of.

    Raises:
        ValueError: If there are none, or none can be read.
    """
    from peftbench.history import History

    side = History.from_outputs(Path(outputs)).everything()
    for problem in side.problems:
        warnings.warn(f"left out: {problem}", stacklevel=2)
    return [record.to_row() for record in side.records]
