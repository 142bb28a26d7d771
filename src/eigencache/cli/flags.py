"""Errors of the library name parameters, `max_nll`; the command line prints the flag of the command that ran, --max-nll."""

import inspect
import re
from collections.abc import Callable, Mapping

from typer.models import OptionInfo

_PARAMETER = re.compile(r"`([a-z][a-z_]*)`")


def flags_of(run: Callable[..., None]) -> dict[str, str]:
    """Return the flag of every option of a command, by the name of its parameter: `max_nll` → --max-nll.

    An option that switches has its first flag, the one that turns it on. Arguments have none and are left out.
    """
    flags = {}
    for name, parameter in inspect.signature(run).parameters.items():
        for about in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(about, OptionInfo):
                declarations = (about.default, *(about.param_decls or ()))
                declared = next(
                    (text for text in declarations if str(text).startswith("--")),
                    None,
                )
                flags[name] = (declared or f"--{name.replace('_', '-')}").split("/")[0]
    return flags


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Replace each parameter in backticks by its flag. A parameter that is no option of the command stays as it is."""
    return _PARAMETER.sub(lambda match: flags.get(match[1], match[0]), message)
