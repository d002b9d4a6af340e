"""drop_in: what makes a subclass of a diffusers scheduler stand in for it."""

from __future__ import annotations

import inspect

import diffusers
from diffusers.utils import DummyObject

__all__ = ["check_release", "drop_in"]

OLDEST = (0, 32)  # of diffusers' releases; tests/integrations/test_oldest_diffusers.py runs it
PUBLIC = "diffusion_ext.integrations.diffusers"  # where a saved pipeline looks for a class


def check_release(version: str) -> None:
    """Raises: ImportError for a release of diffusers older than OLDEST."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if release < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"diffusers {version} is older than {oldest}, the oldest that these schedulers are "
            f"tested with: pip install 'diffusers>={oldest}'"
        )


def drop_in(**switches):
    """Decorates a scheduler: its constructor takes diffusers' arguments, then our switches.

    A config knows the arguments of a class by this signature.

    Raises: ImportError where a method that we replace has other arguments in this diffusers.
    """

    def decorate(scheduler: type) -> type:
        theirs = getattr(diffusers, scheduler.__name__)
        if isinstance(theirs, DummyObject):  # which says, when it is used, what it is missing
            return theirs
        for name in vars(theirs).keys() & vars(scheduler).keys():
            if callable(vars(theirs)[name]) and not name.startswith("_"):
                _check_arguments(vars(theirs)[name], vars(scheduler)[name], theirs)
        scheduler.theirs, scheduler.__module__ = theirs, PUBLIC
        scheduler.prepare()
        if "__init__" not in vars(scheduler):
            scheduler.__init__ = _constructor(scheduler)
        scheduler.__init__.__signature__ = _with_switches(theirs, switches)
        return scheduler

    return decorate


def _with_switches(theirs: type, switches: dict) -> inspect.Signature:
    parameters = list(inspect.signature(theirs.__init__).parameters.values())
    rest = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in switches.items()
    ]
    return inspect.Signature([*parameters, *ours, *rest])


def _constructor(scheduler: type):
    def __init__(self, *args, **kwargs):
        super(scheduler, self).__init__(*args, **kwargs)

    return __init__


def _check_arguments(theirs, ours, parent: type) -> None:
    wanted, known = (list(inspect.signature(f).parameters) for f in (theirs, ours))
    if wanted != known:
        raise ImportError(
            f"this release of diffusers has {parent.__name__}.{theirs.__name__}{tuple(wanted)}, "
            f"diffusion_ext knows {tuple(known)}: install another release of one of them"
        )
