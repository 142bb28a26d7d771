"""Codecs of a recommendation whose numbers were written down, so that the right choice is known."""

import planted_sweeps as planted
from eigencache.records.advice import Budget, CodecAdvice, CodecCandidate, CodecFamily
from eigencache.records.quality import LedgerRow
from eigencache.studies.recommend.choose import nearest, within

NATS = 0.01


def candidate(family: CodecFamily, rate: float, ratio: float, delta: float, half: float | None) -> CodecCandidate:
    """One codec with a ratio as scored, twice that ratio at 2,048 tokens, and ΔNLL `delta` ± `half`."""
    name = f"{family} · {rate:g} bits"
    longer = LedgerRow(
        context=2048, sixteen_bit_nbytes=256 * 2048, payload_nbytes=round(128 * 2048 / ratio), basis_nbytes=9000
    )
    quality = planted.quality(name, ratio, delta, half, kl=0.02 / ratio, basis=9000)
    quality.kl_interval = None if half is None else (0.01 / ratio, 0.03 / ratio)
    return CodecCandidate(
        name=name,
        family=family,
        rate=rate,
        longer=longer,
        break_even_context=77,
        choosing=quality,
        command=f"eigencache fit planted-model --bits {rate:g} -o planted-model-{family}",
    )


def codecs(
    family: CodecFamily, *points: tuple[float, float, float, float | None], left_out: tuple[str, ...] = ()
) -> CodecAdvice:
    """`points`: rate, ratio, ΔNLL, half of the interval. Without points nothing was measured."""
    found = [candidate(family, *point) for point in points]
    chosen = next(iter(within(found, Budget(nats=NATS, given="planted"))), None)
    return CodecAdvice(
        family=family,
        candidates=found,
        chosen=chosen,
        nearest=None if chosen else nearest(found),
        calibration=planted.CORPUS if found else None,
        uncompressed_nll=2.0 if found else None,
        left_out=list(left_out),
    )
