"""Numbers with their support: withheld ones print as `—`, doubtful ones with a trailing `!`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from eigencache.records.base import Interval
from eigencache.records.probe import ProbeRecord, Spectrum

ABSENT = "—"
DOUBT = "!"
LEGEND = (
    "—: withheld, the sample cannot support it. !: fewer than 10 independent vectors per dimension (50 for rank .99). "
    "(30/32): mean over 30 of 32 layers; the number is withheld in the others",
    "energy@k: share of the sum of all eigenvalues in the leading k. Held-out: the basis is from one half of the "
    "sequences, the energy from the other half",
)
ROOMY = 10.0  # independent vectors per dimension that ranks need (THEORY 3.1)
ROOMY_TAIL = 50.0  # that the smallest eigenvalues need: rank at 99 % energy, condition number


@dataclass(frozen=True)
class Measured:
    """A number with its support; `value` None: withheld."""

    value: float | None
    doubtful: bool = False
    interval: Interval | None = None  # 95 %
    used: int = 1  # spectra that the mean is of
    of: int = 1  # spectra in all

    def text(self, write: Callable[[float], str]) -> str:
        """Return `0.83`, `0.83!`, `12.4 [11.9, 13.0]`, `0.83! (30/32)` if 2 of 32 layers have no number, or `—`."""
        if self.value is None:
            return ABSENT
        mark = DOUBT if self.doubtful else ""
        interval = f" [{write(self.interval[0])}, {write(self.interval[1])}]" if self.interval else ""
        partly = f" ({self.used}/{self.of})" if self.used < self.of else ""
        return f"{write(self.value)}{mark}{interval}{partly}"


NOTHING = Measured(None)


def of_spectrum(spectrum: Spectrum, value: float | None, interval: str | None = None, enough: float = ROOMY) -> Measured:
    """Return one statistic of one spectrum.

    Args:
        spectrum: The spectrum.
        value: The statistic; None if withheld.
        interval: Name of the statistic in `spectrum.intervals`, to add its interval.
        enough: Independent vectors per dimension below which the statistic is doubtful.
    """
    return Measured(value, spectrum.support < enough, spectrum.intervals.get(interval) if interval else None)


def over_layers(measured: Iterable[Measured], geometric: bool = False) -> Measured:
    """Return the mean over the layers that have a number; doubtful if one of them is.

    Args:
        measured: One number per layer.
        geometric: Return the geometric mean.
    """
    layers = list(measured)
    present = [m for m in layers if m.value is not None]
    if not present:
        return NOTHING
    values = [float(m.value) for m in present if m.value is not None]
    if geometric:
        mean = math.exp(math.fsum(math.log(v) for v in values) / len(values)) if math.inf not in values else math.inf
    else:
        mean = math.fsum(values) / len(values) if math.inf not in values else math.inf
    return Measured(mean, any(m.doubtful for m in present), None, len(present), len(layers))


def share(value: float) -> str:
    """Write a share: `0.831`; one just below 1 is not rounded up: `>0.999`."""
    return ">0.999" if 0.9995 <= value < 1 else f"{value:.3f}"


def count(value: float) -> str:
    """Write a count: `12` for a whole number, `12.4` for a mean, `1,024` for a large one."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:.1f}"


def factor(value: float) -> str:
    """Write a factor: `×5.30`, `×53.0`, `×530`, `×1.2e+08`, `∞`."""
    if not math.isfinite(value):
        return "∞"
    if value >= 1e6:
        return f"×{value:.1e}"
    return f"×{value:,.0f}" if value >= 100 else f"×{value:#.3g}"


def short_names(records: list[ProbeRecord]) -> list[str]:
    """Return one unique name per record: the last part of its path, or the whole name or a number if that is ambiguous."""
    names = [PurePosixPath(record.model.name.replace("\\", "/")).name or record.model.name for record in records]
    whole = [record.model.name for record in records]
    names = [whole[i] if names.count(name) > 1 and whole.count(whole[i]) == 1 else name for i, name in enumerate(names)]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
