"""Errors that the command line and the scripts tell apart by their exit status."""

import difflib
from collections.abc import Iterable


class ArgumentError(ValueError):
    """Arguments that cannot be parsed: an unknown field, a wrong type, an unknown recipe.

    The command line prints the message as one line and exits with status 2; every other exception exits with status 1.
    The message names the thing, what is wrong with it, and the remedy.
    """


def did_you_mean(name: object, known: Iterable[str], otherwise: str | None = None) -> str:
    """The remedy for a name that does not exist.

    Args:
        name: what was given.
        known: the names that exist.
        otherwise: what to say when none of them is close; by default all of them are listed.
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return otherwise or f"use one of {', '.join(names)}."
