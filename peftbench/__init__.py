"""Fine-tuning, PEFT, distillation and their hybrid, compared as pytest cases."""

from pathlib import Path
from typing import Any


def load_records(outputs: str | Path = "outputs") -> list[dict[str, Any]]:
    """
    All records under an outputs folder, a flat row each, as ``pandas.DataFrame`` takes them.

    Raises:
        ValueError: If there are none, or none can be read.
    """
    from peftbench.history import History

    return [record.to_row() for record in History.from_outputs(Path(outputs)).everything().records]
