"""Statistics of a few numbers, without SciPy: Student's intervals and tests, their power, and the n they need.

This is a module of records.py, not a command: python records/records.py --help lists the commands.
tests/test_records.py compares every function with SciPy's.
"""
import functools
import math

import numpy as np


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    value, c, d = 1.0, 1.0, 0.0
    for i in range(1000):
        m = i // 2
        term = (1.0 if i == 0 else m * (b - m) * x / ((a + i - 1) * (a + i)) if i % 2 == 0
                else -(a + m) * (a + b + m) * x / ((a + i - 1) * (a + i)))
        d = 1 / (1 + term * d)
        c = 1 + term / c
        value *= c * d
        if i and abs(c * d - 1) < 1e-15:
            break
    return front * (value - 1)


def t_cdf(t: float, df: float) -> float:
    """Probability that Student's t with df degrees of freedom is at most t."""
    far = t * t > df                     # each form is exact where the other one cancels
    tail = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2 if far else (
        0.5 - incomplete_beta(0.5, df / 2, t * t / (df + t * t)) / 2)
    return 1 - tail if t > 0 else tail


@functools.lru_cache(1000)
def t_quantile(p: float, df: float) -> float:
    """The t that Student's t with df degrees of freedom stays below with probability p."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p and high < 1e12:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


def describe(values) -> tuple[int, float, float]:
    """Number, mean and standard deviation (of a sample; 0 for a single value)."""
    values = list(values)
    mean = math.fsum(values) / len(values)
    return len(values), mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def interval(values, level: float, new: bool = False, floor: float = 0.0) -> tuple[float, float]:
    """Confidence interval of the mean; `new`: prediction interval for one further value. Infinite for one value.

    floor: the least standard deviation that is assumed, as in `t_test`.
    """
    n, mean, sd = describe(values)
    if n < 2:
        return -math.inf, math.inf
    sd = max(sd, floor)
    width = t_quantile((1 + level) / 2, n - 1) * sd * math.sqrt(1 / n + new)
    return mean - width, mean + width


def t_test(values, center: float = 0.0, sides: int = 1, floor: float = 0.0) -> float:
    """p of a t-test; one side: that the mean is below `center`, two: that it differs. 1 for a single value.

    On differences of pairs this is the paired t-test. floor: the least standard deviation that is assumed. Rounded
    numbers may be equal by chance, and a spread of nearly 0 would make any difference look certain.
    """
    n, mean, sd = describe(values)
    if n < 2:
        return 1.0
    sd = max(sd, floor)
    if sd == 0:
        return float(mean >= center if sides == 1 else mean == center)
    t = (mean - center) / (sd / math.sqrt(n))
    return t_cdf(t, n - 1) if sides == 1 else 2 * t_cdf(-abs(t), n - 1)


def t_power(effect: float, n: int, p: float, sides: int = 2) -> float:
    """Probability that a t-test at level p shows an effect of so many standard deviations with n values.

    The noncentral t by integration: normal over chi, of which the chi is integrated numerically.
    """
    df, shift, limit = n - 1, effect * math.sqrt(n), t_quantile(1 - p / sides, n - 1)
    s = (np.arange(1000) + 0.5) * (1 + 9 / math.sqrt(df)) / 1000
    log_density = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2) + (df - 1) * np.log(s) - df * s * s / 2
    above = np.array([math.erfc((limit * x - shift) / math.sqrt(2)) / 2 for x in s])
    return float(np.sum(np.exp(log_density) * above) * (s[1] - s[0]))


def needed_n(effect: float, p: float, sides: int = 2, power: float = 0.8, most: int = 1000) -> int | None:
    """The smallest n with that power for an effect in standard deviations; None if it is above `most`."""
    if effect <= 0 or t_power(effect, most, p, sides) < power:
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if t_power(effect, middle, p, sides) >= power else (middle, high)
    return high


def detectable(n: int, p: float, power: float = 0.8) -> float:
    """The smallest effect, in standard deviations, that a two-sided t-test with n values shows with that power."""
    low, high = 0.0, 1.0
    while t_power(high, n, p) < power and high < 1e6:
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if t_power(middle, n, p) >= power else (middle, high)
    return high


if __name__ == "__main__":
    print(__doc__.strip())
