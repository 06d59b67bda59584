"""What is claimed of the figures, and whether they say so."""

from dataclasses import dataclass

import numpy as np

from benchmarks.contenders import GRPCIO_2, NAIVE_AIO, NAIVE_SYNC, NATIVE, NATIVE_2
from benchmarks.rounds import Case, Measured

CONFIDENT = 1.96  # standard errors, for 95 %
RATE, CPU, P50 = "requests_per_second", "server_cpu_ms", "p50_ms"
NATIVES = NATIVE, NATIVE_2


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that is said of these figures, and whether they say so."""

    what: str
    values: list[float]
    limit: float
    at_least: bool  # or at most
    upper: float | None = None  # of a confidence interval, where that is what is held

    @property
    def median(self) -> float:
        """Of all rounds."""
        return float(np.median(self.values))

    @property
    def holds(self) -> bool:
        """Whether the median, or the upper bound, is on the right side."""
        if self.at_least:
            return self.median >= self.limit
        return (self.median if self.upper is None else self.upper) <= self.limit

    @property
    def shown(self) -> str:
        """The figures in words."""
        spread = f"{self.median:.3g} ({min(self.values):.3g} to {max(self.values):.3g})"
        return spread if self.upper is None else f"{spread}, below {self.upper:.3g} at 95 %"

    @property
    def bound(self) -> str:
        """The limit in words."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


def ratio(  # noqa: PLR0913  the two, how they were asked, and what is expected
    found: Measured, own: str, other: str, case: Case, figure: str, limit: float, *, at_least: bool
) -> Claim:
    """Return the claim that one server's figure is so many times another's."""
    named = {RATE: "requests/s", CPU: "server CPU a request", P50: "p50"}[figure]
    values = found.ratios(own, other, case, figure)
    return Claim(f"{case.name}: {named}, {own} / {other}", values, limit, at_least)


def of_serving(found: Measured, *, one: Case, many: Case, shared: Case, batch: Case) -> list[Claim]:
    """Return what is claimed of our server beside the naive ones and the model itself."""
    claims = [
        *of_many(found, many),
        *(ratio(found, own, NAIVE_SYNC, one, P50, 0.6, at_least=False) for own in NATIVES),
        *(ratio(found, own, NAIVE_AIO, batch, RATE, 1.6, at_least=True) for own in NATIVES),
        ratio(found, GRPCIO_2, NAIVE_AIO, shared, RATE, 1.5, at_least=True),
    ]
    model = [row["cpu_ms_128"] for row in found.limits["onnxruntime"]]
    served = found.of(NATIVE, batch, CPU)
    values = [own / limit for own, limit in zip(served, model, strict=True)]
    claims.append(
        Claim(f"{batch.name}: server CPU a request, {NATIVE} / the model's own", values, 1.5, False)
    )
    for what, figures in (("first answer", found.starts_s), ("idle PSS", found.pss_mib)):
        pairs = zip(figures[NATIVE], figures[NAIVE_AIO], strict=True)
        values = [own / other for own, other in pairs]
        claims.append(Claim(f"{what}, {NATIVE} / {NAIVE_AIO}", values, 1.5, False))
    return claims


def of_batching(found: Measured, case: Case, batching: str, without: str, *, a_start: int) -> Claim:
    """Return the claim that batching costs nothing where there is nothing to join.

    Rounds between one start of the processes and the next, `a_start` of them, share their luck: the
    interval is that of the starts' means.
    """
    values = found.ratios(batching, without, case, CPU)
    means = [np.mean(values[at : at + a_start]) for at in range(0, len(values), a_start)]
    upper = float(np.mean(means) + CONFIDENT * np.std(means, ddof=1) / len(means) ** 0.5)
    named = f"{case.name}: server CPU a request, batching / without"
    return Claim(named, values, 1.05, False, upper)


def of_many(found: Measured, case: Case) -> list[Claim]:
    """Return what is claimed of many requests in flight, with each number of I/O threads."""
    return [
        claim
        for own in NATIVES
        for claim in (
            ratio(found, own, NAIVE_AIO, case, RATE, 10, at_least=True),
            ratio(found, own, NAIVE_AIO, case, CPU, 0.14, at_least=False),
        )
    ]


def of_peer(found: Measured, case: Case, peer: str) -> list[Claim]:
    """Return the claim that ours serves more than another system."""
    least = 1.4 if peer == "mosec" else 1.0
    return [ratio(found, own, peer, case, RATE, least, at_least=True) for own in NATIVES]
