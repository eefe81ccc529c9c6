"""The one exception that means "the user can fix this": the command line prints it as a sentence, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a recipe, an override, a file or a folder.

    The message is one sentence: the key or file, the value, the rule, and a way out.
    """


class MissingInputError(UserError, FileNotFoundError):
    """An input file or folder is not there; the message names the command that makes it."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean X?` for the closest candidate, or the list of candidates when none is close."""
    names = sorted(candidates)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid names: {', '.join(names)}."
