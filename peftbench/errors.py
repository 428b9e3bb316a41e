"""What goes wrong and explains itself."""


class PeftbenchError(Exception):
    """Its message says what was got, what was wanted and what to do: it is shown alone, without a traceback."""
