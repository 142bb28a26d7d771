"""A figure never loses its doubt: what is missing prints as `—`, what rests on little data with a trailing `!`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from eigencache.records.base import Interval
from eigencache.records.probe import ProbeRecord, Spectrum

ABSENT = "—"
DOUBT = "!"
LEGEND = (
    "— the data cannot support this number; "
    "! fewer than 10 independent vectors per dimension stand behind it (50 for rank .99); "
    "(30/32) a mean over 30 of 32 layers, the others have no such number",
    "energy@k: share of the sum of all eigenvalues in the leading k; held-out: basis from one half of the sequences, "
    "energy on the other half, so it does not flatter",
)
ROOMY = 10.0  # independent vectors per dimension from which ranks are believed (THEORY 3.1)
ROOMY_TAIL = 50.0  # the same for what the smallest eigenvalues decide: rank at 99 %, condition number


@dataclass(frozen=True)
class Measured:
    """A number, or None; whether it is doubtful; its interval; and over how many of how many spectra it was averaged."""

    value: float | None
    doubtful: bool = False
    interval: Interval | None = None
    used: int = 1
    of: int = 1

    def text(self, write: Callable[[float], str]) -> str:
        """`0.83`, `0.83!`, `12.4 [11.9, 13.0]`, `0.83! (30/32)` where 2 of 32 layers have no number, or `—`."""
        if self.value is None:
            return ABSENT
        mark = DOUBT if self.doubtful else ""
        interval = f" [{write(self.interval[0])}, {write(self.interval[1])}]" if self.interval else ""
        partly = f" ({self.used}/{self.of})" if self.used < self.of else ""
        return f"{write(self.value)}{mark}{interval}{partly}"


NOTHING = Measured(None)


def of_spectrum(spectrum: Spectrum, value: float | None, interval: str | None = None, enough: float = ROOMY) -> Measured:
    """One statistic of one spectrum: doubtful with fewer than `enough` independent vectors per dimension."""
    return Measured(value, spectrum.support < enough, spectrum.intervals.get(interval) if interval else None)


def over_layers(measured: Iterable[Measured], geometric: bool = False) -> Measured:
    """The mean over layers of the numbers that exist: doubtful as soon as one is, and counting those that are missing."""
    found = list(measured)
    present = [m for m in found if m.value is not None]
    if not present:
        return NOTHING
    values = [float(m.value) for m in present if m.value is not None]
    if geometric:
        mean = math.exp(math.fsum(math.log(v) for v in values) / len(values)) if math.inf not in values else math.inf
    else:
        mean = math.fsum(values) / len(values) if math.inf not in values else math.inf
    return Measured(mean, any(m.doubtful for m in present), None, len(present), len(found))


def share(value: float) -> str:
    """`0.831`; a share just below 1 is never rounded up to it: `>0.999`."""
    return ">0.999" if 0.9995 <= value < 1 else f"{value:.3f}"


def count(value: float) -> str:
    """`12` for a whole number, `12.4` for a mean, `1,024` for a large one."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:.1f}"


def factor(value: float) -> str:
    """`×5.30`, `×53.0`, `×530`, `×1.2e+08`; infinite is said: `∞`."""
    if not math.isfinite(value):
        return "∞"
    if value >= 1e6:
        return f"×{value:.1e}"
    return f"×{value:,.0f}" if value >= 100 else f"×{value:#.3g}"


def short_names(records: list[ProbeRecord]) -> list[str]:
    """One name per record, unique: the last part of its path, the whole name or a number where that is ambiguous."""
    names = [PurePosixPath(record.model.name.replace("\\", "/")).name or record.model.name for record in records]
    whole = [record.model.name for record in records]
    names = [whole[i] if names.count(name) > 1 and whole.count(whole[i]) == 1 else name for i, name in enumerate(names)]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
