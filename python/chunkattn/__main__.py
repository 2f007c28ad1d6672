"""``python -m chunkattn``: see chunkattn.cli."""

from chunkattn.cli import main

raise SystemExit(main())
