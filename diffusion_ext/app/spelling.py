"""The words of a command line: old spellings, and the names that are to be chosen from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from ..checks import check_choice

OF_A_RUN = ("sample", "export")
OLD = "--checkpoint"  # before these commands' run, which is their first argument now
# Words of `train` that were flags, and what they are now that the option has a third choice.
FLAGS = {"--flip": ("--flip", "True"), "--no-flip": ("--flip", "False")}
TRUTHS = ("True", "False", "None")


def as_today(args: Sequence[str]) -> list[str]:
    """The words with `--checkpoint RUN` as the first argument RUN, and flags with their value."""
    words = list(args)
    if words[:1] == ["train"]:
        pairs = zip(words, [*words[1:], ""], strict=True)
        flags = (FLAGS.get(a, (a,)) if b not in TRUTHS else (a,) for a, b in pairs)
        words = [word for flag in flags for word in flag]
    if words[:1] and words[0] in OF_A_RUN:
        words = [part for word in words for part in _parted(word, OLD)]
        if OLD in words:
            place = words.index(OLD)
            run, words[place : place + 2] = words[place + 1 : place + 2], []
            words[1:1] = run
    return words


def check_names(commands: Mapping[str, type], args: Sequence[str]) -> None:
    """The command, and what it takes one of some names for, are known ones: tyro would list those
    in no order, and suggest none.

    Args: commands: dataclasses of options by the commands' names. Raises: ValueError.
    """
    if not args or args[0].startswith("-"):
        return
    check_choice("command", args[0], tuple(commands))
    choices = _choices_of(commands[args[0]])
    words = [part for word in args[1:] for part in _parted(word)]
    for option, value in itertools.pairwise(words):
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in choices and value not in choices[name]:
            check_choice(name, value, tuple(c for c in choices[name] if c != "None"))


def _parted(word: str, option: str = "--") -> list[str]:
    """--option=value as two words."""
    return word.split("=", 1) if word.startswith(option) else [word]


def _choices_of(options: type) -> dict[str, tuple[str, ...]]:
    """The names that an option may have, of those whose type is a Literal; "None" where there may
    be none."""
    found: dict[str, tuple[str, ...]] = {}
    for name, kind in get_type_hints(options).items():
        if is_dataclass(kind):  # its options stand among the others
            found |= _choices_of(kind)
        for one in (kind, *get_args(kind)):
            if get_origin(one) is Literal:
                found[name] = (*get_args(one), *(["None"] if one is not kind else []))
    return found
