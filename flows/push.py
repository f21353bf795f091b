"""`bivlm push`: a packed checkpoint to the hub, or only its card."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path


def push_checkpoint(
    folder: Path, repository: str, *, private: bool, branch: str | None, dry_run: bool
) -> dict[str, object] | None:
    """Push `folder` and say what came of it; with `dry_run` print the card, ask nobody and return None.

    What it returns is `bivlm.pushing.Pushed` as JSON. Raises as `bivlm.pushing.package` and `push` do.
    """
    from bivlm.pushing import package, push

    prepared = package(folder, repository)
    if dry_run:
        print(prepared.card, end="")
        return None
    print(f"{folder} is what its records say; looking what {repository} has", file=sys.stderr)
    return asdict(push(prepared, repository, private=private, branch=branch))


def print_pushed(pushed: dict[str, object]) -> None:
    """What `push_checkpoint` returns, for people."""
    if not pushed["written"] and not pushed["deleted"]:
        print(f"nothing new: {pushed['url']} has it all at commit {pushed['commit']}")
        return
    for what in ("written", "deleted"):
        for name in pushed[what]:
            print(f"{what}: {name}")
    print(f"{pushed['url']}, branch {pushed['branch']}, commit {pushed['commit']}")
