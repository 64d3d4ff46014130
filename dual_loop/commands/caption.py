"""``dual-loop caption``; see ``commands.predict``."""

from __future__ import annotations

from collections.abc import Sequence

from dual_loop.commands import predict


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for a problem that the user can mend."""
    return predict.main("caption", argv)
