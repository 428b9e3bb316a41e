"""``python -m peftbench``: the same command."""

from peftbench.cli import main

raise SystemExit(main())
