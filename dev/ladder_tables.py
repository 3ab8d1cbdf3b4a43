"""Reads the results of ladder.py sweep: scaling laws, verdicts on techniques, and the page dev/LADDER.md.

This is a module of ladder.py, not a command: python dev/ladder.py --help explains it.
"""
if __name__ == "__main__":               # before the imports, so that the text comes at once
    print(__doc__.strip())
    raise SystemExit

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from runs import UserError, write_text
from student import describe, detectable, t_test

P = 0.05                                 # two-sided level of every verdict, and 1 - P of every interval
BOOTSTRAPS, LAW_BOOTSTRAPS = 1000, 100
NEEDED = {"arm": str, "group": str, "depth": int, "seed": int, "status": str}
FINISHED = {"loss": float, "tokens": int, "flops": float, "parameters": int, "seconds": float}


def read_results(paths: list[Path]) -> list[dict]:
    """The runs in these files; of lines with the same key the last counts. Raises UserError."""
    rows = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); name the results.jsonl of a sweep") from None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                needed = NEEDED | (FINISHED if row["status"] == "finished" else {})
                sound = all(type(row[name]) is kind or kind is float and type(row[name]) is int
                            for name, kind in needed.items())
            except (ValueError, KeyError, TypeError, RecursionError):
                sound = False
            if not sound:
                raise UserError(f"{path}, line {number} is not a run of ladder.py sweep; remove the line")
            rows[row.get("key", f"{path}:{number}")] = row
    return list(rows.values())


def finished(rows: list[dict], *groups: str) -> list[dict]:
    return [row for row in rows if row["status"] == "finished" and row["group"] in groups]


# -----------------------------------------------------------------------------
# Scaling laws

@dataclass(frozen=True)
class Parabola:
    """loss = a + b u + c u^2 over u = ln(N / center), fitted to the runs of one budget."""
    budget: float
    sizes: np.ndarray            # parameters N of each run
    tokens: np.ndarray           # and its training tokens D
    losses: np.ndarray
    center: float
    c: float
    b: float
    a: float

    def __call__(self, size) -> np.ndarray:
        u = np.log(size / self.center)
        return self.a + self.b * u + self.c * u * u

    @property
    def best(self) -> float:
        """The size with the lowest loss; nan if the parabola has no minimum."""
        return self.center * math.exp(max(-50.0, min(50.0, -self.b / (2 * self.c)))) if self.c > 0 else math.nan

    @property
    def interior(self) -> bool:
        """Whether the minimum lies between the smallest and the largest size."""
        return bool(self.sizes.min() < self.best < self.sizes.max())

    @property
    def best_tokens(self) -> float:
        """Training tokens at the best size, by a line through ln D over ln N."""
        slope, height = np.polyfit(np.log(self.sizes), np.log(self.tokens), 1)
        return math.exp(height + slope * math.log(self.best))

    def with_losses(self, losses: np.ndarray) -> "Parabola":
        u = np.log(self.sizes / self.center)
        return Parabola(self.budget, self.sizes, self.tokens, losses, self.center, *np.polyfit(u, losses, 2))

    def resampled(self, rng) -> "Parabola":
        """The fit to losses that are the fitted ones plus residuals drawn with replacement."""
        residuals = self.losses - self(self.sizes)
        scale = math.sqrt(len(residuals) / max(1, len(residuals) - 3))      # three coefficients were fitted
        return self.with_losses(self(self.sizes) + scale * rng.choice(residuals - residuals.mean(), len(residuals)))


def fit_parabola(rows: list[dict]) -> Parabola:
    sizes, tokens, losses = (np.array([row[name] for row in rows], float) for name in ("parameters", "tokens", "loss"))
    empty = Parabola(rows[0]["budget"], sizes, tokens, losses, float(np.exp(np.log(sizes).mean())), 0, 0, 0)
    return empty.with_losses(losses)


def fit_parabolas(rows: list[dict]) -> list[Parabola]:
    """One for each budget, the smallest first; raises UserError if a budget has fewer than three sizes."""
    budgets = sorted({row["budget"] for row in rows})
    fits = []
    for budget in budgets:
        mine = [row for row in rows if row["budget"] == budget]
        if len({row["parameters"] for row in mine}) < 3:
            raise UserError(f"the budget of {budget:.3g} FLOPs has {len({row['parameters'] for row in mine})} sizes; "
                            "a parabola needs 3, so run more depths")
        fits.append(fit_parabola(mine))
    if len(fits) < 2:
        raise UserError(f"the results have {len(fits)} FLOP budgets (group isoflop); a power law needs 2")
    return fits


@dataclass(frozen=True)
class PowerLaw:
    """best = factor x C^exponent, with an interval of the exponent."""
    exponent: float
    factor: float
    low: float
    high: float


def power_law(fits: list[Parabola], name: str) -> tuple[PowerLaw, int] | None:
    """The law of `best` or `best_tokens`, and how many bootstrap samples had no minimum and were left out.

    Budgets whose minimum is not interior do not count; None if that leaves fewer than two.
    """
    fits = [fit for fit in fits if fit.interior]
    if len(fits) < 2:
        return None

    def line(parabolas):
        budgets, values = [fit.budget for fit in parabolas], [getattr(fit, name) for fit in parabolas]
        return np.polyfit(np.log(budgets), np.log(values), 1)
    rng, slopes = np.random.default_rng(0), []
    for _ in range(BOOTSTRAPS):
        samples = [fit.resampled(rng) for fit in fits]
        if all(sample.c > 0 for sample in samples):
            slopes.append(line(samples)[0])
    slope, height = line(fits)
    low, high = np.quantile(slopes, (P / 2, 1 - P / 2)) if slopes else (math.nan, math.nan)
    return PowerLaw(slope, math.exp(height), low, high), BOOTSTRAPS - len(slopes)


@dataclass(frozen=True)
class LossLaw:
    """loss = E + A (N / n0)^-alpha + B (D / d0)^-beta."""
    alpha: float
    beta: float
    E: float
    A: float
    B: float
    n0: float
    d0: float

    def __call__(self, size, tokens):
        return self.E + self.A * (size / self.n0) ** -self.alpha + self.B * (tokens / self.d0) ** -self.beta


def fit_law(sizes: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> LossLaw:
    """Least squares: a grid over the two exponents, refined four times; E, A and B follow and may not be negative."""
    n0, d0 = np.exp(np.log(sizes).mean()), np.exp(np.log(tokens).mean())
    u, v = np.log(sizes / n0), np.log(tokens / d0)
    best, width = np.array([0.5, 0.5]), 0.49
    for _ in range(5):
        grid = [np.clip(np.linspace(middle - width, middle + width, 21), 0.01, 2) for middle in best]
        alpha, beta = (axis.ravel() for axis in np.meshgrid(*grid, indexing="ij"))
        columns = np.stack([np.ones((len(alpha), len(u))), np.exp(-alpha[:, None] * u), np.exp(-beta[:, None] * v)], 2)
        gram = columns.mT @ columns + 1e-9 * np.eye(3)
        solved = np.linalg.solve(gram, (columns.mT @ losses)[..., None])[..., 0]
        errors = ((columns @ solved[..., None])[..., 0] - losses) ** 2
        total = errors.sum(1) + 1e9 * (solved < 0).any(1)
        chosen = int(total.argmin())
        best, width = np.array([alpha[chosen], beta[chosen]]), width / 5
    return LossLaw(*map(float, best), *map(float, solved[chosen]), float(n0), float(d0))


def columns_of(rows: list[dict]) -> list[np.ndarray]:
    return [np.array([row[name] for row in rows], float) for name in ("parameters", "tokens", "loss")]


def law_intervals(law: LossLaw, rows: list[dict]) -> dict[str, tuple[float, float]]:
    """Intervals of alpha, beta and E by a bootstrap over residuals."""
    sizes, tokens, losses = columns_of(rows)
    fitted, rng = law(sizes, tokens), np.random.default_rng(0)
    residuals = (losses - fitted) * math.sqrt(len(rows) / max(1, len(rows) - 5))        # five numbers were fitted
    samples = [fit_law(sizes, tokens, fitted + rng.choice(residuals, len(rows))) for _ in range(LAW_BOOTSTRAPS)]
    return {name: tuple(np.quantile([getattr(sample, name) for sample in samples], (P / 2, 1 - P / 2)))
            for name in ("alpha", "beta", "E")}


def held_out(rows: list[dict], depth: int) -> list[tuple]:
    """(budget, parameters, measured loss, by the law, by the parabola) of a depth that the fits did not see."""
    seen = [row for row in rows if row["depth"] != depth]
    hidden = [row for row in rows if row["depth"] == depth]
    if not hidden or len({row["parameters"] for row in seen}) < 3:
        raise UserError(f"--hold_out={depth}: the results have the depths {sorted({row['depth'] for row in rows})}; "
                        "choose one of them that leaves at least 3 sizes")
    law, fits, lines = fit_law(*columns_of(seen)), {}, []
    for budget in sorted({row["budget"] for row in hidden}):
        mine = [row for row in hidden if row["budget"] == budget]
        rest = [row for row in seen if row["budget"] == budget]
        size, tokens, loss = (values.mean() for values in columns_of(mine))
        parabola = math.nan
        if len({row["parameters"] for row in rest}) >= 3:
            parabola = float(fit_parabola(rest)(size))
        lines.append((budget, size, loss, float(law(size, tokens)), parabola))
    return lines


def picture(fits: list[Parabola], path: Path):
    """Loss over size for each budget with its parabola, and the best size and tokens over the budget."""
    from pictures import STYLES, label_ends, new_figure, save
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    ends = []
    for fit, style in zip(fits, STYLES * len(fits)):
        grid = np.geomspace(fit.sizes.min(), fit.sizes.max(), 60)
        left.plot(grid, fit(grid), linestyle=style["linestyle"], color=style["color"], linewidth=style["linewidth"])
        left.plot(fit.sizes, fit.losses, style["marker"], color=style["color"], mfc="white", markersize=5)
        if fit.interior:
            left.plot(fit.best, fit(fit.best), "*", color=style["color"], markersize=11)
        ends.append((float(fit(grid[-1])), grid[-1], f"{fit.budget:.3g}", style["color"]))
    left.set(xscale="log", xlabel="parameters in products", ylabel="validation loss, nats per token",
             title="runs of equal FLOPs; star: the minimum")
    left.set_xlim(left.get_xlim()[0], 2 * max(end[1] for end in ends))
    label_ends(left, ends, gap=0.03 * (left.get_ylim()[1] - left.get_ylim()[0]))
    for name, label, style in (("best", "parameters", STYLES[0]), ("best_tokens", "tokens", STYLES[1])):
        if found := power_law(fits, name):
            law, budgets = found[0], np.array([fit.budget for fit in fits if fit.interior])
            right.plot(budgets, [getattr(fit, name) for fit in fits if fit.interior], style["marker"],
                       color=style["color"])
            right.plot(budgets, law.factor * budgets ** law.exponent, linestyle=style["linestyle"],
                       color=style["color"], label=f"{label}: C^{law.exponent:.2f}")
            right.set(xscale="log", yscale="log")
            right.legend(frameon=False)
    right.set(xlabel="training FLOPs C", title="the best size and number of tokens")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    save(figure, path)


def millions(number: float) -> str:
    """A number in millions, with three digits that count: 0.0143, 2.05, 718."""
    return f"{number / 1e6:#.3g}".rstrip(".")


def interval_text(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}"


def fit_tables(rows: list[dict], hold_out: int) -> str:
    """The scaling laws of the runs of the group isoflop, as markdown."""
    runs = finished(rows, "isoflop")
    fits, law = fit_parabolas(runs), fit_law(*columns_of(runs))
    lines = ["| FLOPs | runs | sizes, M parameters | best size, M | tokens there, M | tokens per parameter | "
             "loss there | minimum inside |", "| --: | --: | --- | --: | --: | --: | --: | --- |"]
    for fit in fits:
        sizes = ", ".join(millions(size) for size in sorted(set(fit.sizes)))
        if fit.c <= 0:
            lines.append(f"| {fit.budget:.3g} | {len(fit.sizes)} | {sizes} | - | - | - | - | no: no minimum at all |")
            continue
        where = "yes" if fit.interior else "**no**: the size is extrapolated"
        best, tokens = fit.best, fit.best_tokens
        lines.append(f"| {fit.budget:.3g} | {len(fit.sizes)} | {sizes} | {millions(best)} | {millions(tokens)} | "
                     f"{tokens / best:.1f} | {fit(best):.4f} | {where} |")
    lines.append("")
    for name, symbol in (("best", "N"), ("best_tokens", "D")):
        found = power_law(fits, name)
        if not found:
            lines.append(f"* Best {symbol}: fewer than two budgets have their minimum inside, so there is no power "
                         "law.")
            continue
        power, lost = found
        lines.append(f"* Best {symbol} ~ C^{power.exponent:.2f} (95 % interval {interval_text(power.low, power.high)}"
                     + (f"; {lost} of {BOOTSTRAPS} samples had no minimum and were left out" if lost else "") + ").")
    between = law_intervals(law, runs)
    spread = float(np.sqrt(np.mean((law(*columns_of(runs)[:2]) - columns_of(runs)[2]) ** 2)))
    lines.append(f"* Loss = {law.E:.2f} + {law.A:.2f} (N / {millions(law.n0)} M)^-{law.alpha:.2f} + {law.B:.2f} "
                 f"(D / {millions(law.d0)} M)^-{law.beta:.2f}. The runs lie {spread:.4f} (root mean square) from it. "
                 f"Intervals: exponent of N {interval_text(*between['alpha'])}, "
                 f"of D {interval_text(*between['beta'])}, constant {interval_text(*between['E'])}.")
    return "\n".join(lines + (held_out_lines(runs, hold_out) if hold_out else []))


def held_out_lines(runs: list[dict], depth: int) -> list[str]:
    found = held_out(runs, depth)
    lines = ["", f"Depth {depth} left out of the fits, and its loss predicted:", "",
             "| FLOPs | M parameters | measured | by the loss law | error | by the parabola | error |",
             "| --: | --: | --: | --: | --: | --: | --: |"]
    for budget, size, loss, by_law, parabola in found:
        second = f"{parabola:.4f} | {parabola - loss:+.4f}" if math.isfinite(parabola) else "too few sizes | -"
        first = f"{budget:.3g} | {millions(size)} | {loss:.4f} | {by_law:.4f} | {by_law - loss:+.4f}"
        lines.append(f"| {first} | {second} |")
    errors = [(abs(by_law - loss), abs(parabola - loss)) for _, _, loss, by_law, parabola in found]
    by_law, by_parabola = (max(column) for column in zip(*errors))
    text = f", {by_parabola:.4f} by the parabola" if math.isfinite(by_parabola) else ""
    return [*lines, "", f"The largest error is {by_law:.4f} by the loss law{text}."]


def size_table(runs: list[dict]) -> str:
    """Each size with its loss and tokens at each budget, as the mean over seeds."""
    budgets, cells = sorted({row["budget"] for row in runs}), {}
    for row in runs:
        cells.setdefault((row["depth"], row.get("width", 0), row["parameters"]), []).append(row)
    lines = ["| depth | width | M parameters | " + " | ".join(f"{budget:.3g} FLOPs" for budget in budgets) + " |",
             "| --: | --: | --: |" + " --: |" * len(budgets)]
    for depth, width, size in sorted(cells, key=lambda cell: cell[2]):
        texts = []
        for budget in budgets:
            mine = [row for row in cells[depth, width, size] if row["budget"] == budget]
            if not mine:
                texts.append("-")
                continue
            n, loss, sd = describe(row["loss"] for row in mine)
            spread = f" (sd {sd:.4f}, n = {n})" if n > 1 else ""
            texts.append(f"{loss:.4f}{spread}, {millions(mine[0]['tokens'])} M tokens")
        lines.append(f"| {depth} | {width} | {millions(size)} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Techniques

class Techniques:
    """The arms of the group technique beside the arm base."""

    def __init__(self, rows: list[dict]):
        self.rows, self.runs = rows, {}
        for row in finished(rows, "technique"):
            place = self.runs.setdefault((row["arm"], row["depth"]), {})
            if row["seed"] in place:
                raise UserError(f"arm {row['arm']!r}, depth {row['depth']}, seed {row['seed']} ran twice, with other "
                                "flags or another version of the script; keep one of them in the results")
            place[row["seed"]] = row
        self.arms = [arm for arm in dict.fromkeys(arm for arm, _ in self.runs) if arm != "base"]
        self.depths = sorted({depth for arm, depth in self.runs if arm == "base"})
        if not self.depths:
            raise UserError("the results have no finished run of the arm base in the group technique; run it")
        self.lengths = {}                # depth -> tokens -> loss of shorter or longer base runs minus that of base
        for row in finished(rows, "length"):
            if base := self.runs.get(("base", row["depth"]), {}).get(row["seed"]):
                found = self.lengths.setdefault(row["depth"], {base["tokens"]: [0.0]})
                found.setdefault(row["tokens"], []).append(row["loss"] - base["loss"])

    def base_loss(self, base: dict, tokens: float) -> float | None:
        """Loss of the base after a whole run of so many tokens: by lines between base runs of several lengths.

        What another length changes is the mean over the seeds that ran it. Beyond the lengths that were run the last
        line goes on. None if base has one length only and it is another.
        """
        if abs(math.log(tokens / base["tokens"])) < 1e-3:
            return base["loss"]
        found = self.lengths.get(base["depth"])
        if not found:
            return None
        x, y = np.log(sorted(found)), np.array([np.mean(found[size]) for size in sorted(found)])
        at = min(max(int(np.searchsorted(x, math.log(tokens))), 1), len(x) - 1)
        slope = (y[at] - y[at - 1]) / (x[at] - x[at - 1])
        return float(base["loss"] + y[at] + slope * (math.log(tokens) - x[at]))

    def difference(self, run: dict, base: dict, ratio: float) -> float | None:
        """Loss of a run minus that of the base when both have spent the same; a token of `run` costs ratio x base's."""
        loss = self.base_loss(base, run["tokens"] * ratio)
        if loss is not None:
            return run["loss"] - loss
        if ratio > 1:                    # without base runs of other lengths: where the dearer one stood by then
            return at_fraction(run, 1 / ratio) - base["loss"]
        return run["loss"] - at_fraction(base, ratio)

    def seconds_per_token(self, arm: str, depth: int) -> float | None:
        """The median over runs that had the machine for themselves; None if there is none."""
        found = [row["seconds"] / row["tokens"] for row in finished(self.rows, "technique", "timing")
                 if row.get("alone") and (row["arm"], row["depth"]) == (arm, depth)]
        return float(np.median(found)) if found else None

    @property
    def timed(self) -> bool:
        """Whether any speed was measured."""
        return any(self.seconds_per_token("base", depth) for depth in self.depths)

    def pairs(self, arm: str, depth: int) -> list[tuple[dict, dict]]:
        mine, base = self.runs.get((arm, depth), {}), self.runs[("base", depth)]
        return [(mine[seed], base[seed]) for seed in sorted(mine.keys() & base.keys())]

    def cost(self, arm: str, depth: int, measure: str) -> float | None:
        """What a token costs, as a multiple of the base's."""
        pairs = self.pairs(arm, depth)
        if measure == "tokens" or not pairs:
            return 1.0
        if measure == "FLOPs":
            return pairs[0][0]["flops"] / pairs[0][0]["tokens"] / (pairs[0][1]["flops"] / pairs[0][1]["tokens"])
        mine, base = self.seconds_per_token(arm, depth), self.seconds_per_token("base", depth)
        return mine / base if mine and base else None

    def differences(self, arm: str, depth: int, measure: str) -> list[float]:
        """A difference for each pair, at equal tokens, FLOPs or seconds; empty if the speed was not measured."""
        ratio = self.cost(arm, depth, measure)
        return [] if ratio is None else [self.difference(run, base, ratio) for run, base in self.pairs(arm, depth)]


def at_fraction(run: dict, fraction: float) -> float:
    """The validation loss on the way, after this fraction of the run, by lines between validations."""
    steps, losses = np.array(run["curve"]).T
    return float(np.interp(fraction * steps[-1], steps, losses))


def verdict(values: list[float]) -> str:
    """helps, hurts, no difference seen, or too few pairs: a paired t-test of differences in loss."""
    if len(values) < 3:
        return "too few pairs"
    if t_test(values, sides=2) >= P:
        return "no difference seen"
    return "helps" if describe(values)[1] < 0 else "hurts"


def cell(values: list[float], judged: bool = True) -> str:
    """Mean difference, its standard error and, if `judged`, the verdict."""
    if not values:
        return "-"
    n, mean, sd = describe(values)
    error = f" ± {sd / math.sqrt(n):.4f}" if n > 1 else ""
    return f"{mean:+.4f}{error}" + f", {verdict(values)}" * judged


def summary_table(techniques: Techniques) -> str:
    """The pairs of all depths together, the best technique first."""
    def pooled(arm, measure):
        return [value for depth in techniques.depths for value in techniques.differences(arm, depth, measure)]
    arms = [arm for arm in techniques.arms if pooled(arm, "tokens")]
    lines = ["| technique | pairs | at equal tokens | at equal FLOPs |", "| --- | --: | --- | --- |"]
    for arm in sorted(arms, key=lambda arm: describe(pooled(arm, "tokens"))[1]):
        tokens, flops = pooled(arm, "tokens"), pooled(arm, "FLOPs")
        lines.append(f"| {arm} | {len(tokens)} | {cell(tokens)} | {cell(flops)} |")
    return "\n".join(lines)


def technique_tables(techniques: Techniques) -> str:
    """A table for each depth, the best technique first."""
    parts = []
    for depth in techniques.depths:
        base = list(techniques.runs[("base", depth)].values())
        loss = describe(row["loss"] for row in base)
        parts.append(f"### Depth {depth}: width {base[0].get('width', '?')}, {base[0]['parameters'] / 1e6:.2f} M "
                     f"parameters, {base[0]['tokens'] / 1e6:.2f} M tokens\n\nThe base has a loss of {loss[1]:.4f} "
                     f"(n = {loss[0]}).")
        lines = ["| technique | pairs | at equal tokens | FLOPs per token | at equal FLOPs |" +
                 " time per token | at equal seconds |" * techniques.timed,
                 "| --- | --: | --- | --: | --- |" + " --: | --- |" * techniques.timed]
        arms = [arm for arm in techniques.arms if techniques.pairs(arm, depth)]
        for arm in sorted(arms, key=lambda arm: describe(techniques.differences(arm, depth, "tokens"))[1]):
            tokens, flops, seconds = (techniques.differences(arm, depth, measure)
                                      for measure in ("tokens", "FLOPs", "seconds"))
            line = (f"| {arm} | {len(tokens)} | {cell(tokens)} | x {techniques.cost(arm, depth, 'FLOPs'):.3f} | "
                    f"{cell(flops)} |")
            if techniques.timed:
                cost = techniques.cost(arm, depth, "seconds")
                line += f" {f'x {cost:.3f}' if cost else '-'} | {cell(seconds, judged=False)} |"
            lines.append(line)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def noise_table(techniques: Techniques) -> str:
    """How much the loss moves when only the seed or the order of documents changes."""
    lines = ["| depth | runs | standard deviation over seeds | median standard deviation of a pair's difference | "
             "difference that 3 pairs show with power 0.8 |", "| --: | --: | --: | --: | --: |"]
    for depth in techniques.depths:
        n, _, sd = describe(row["loss"] for row in techniques.runs[("base", depth)].values())
        spreads = [describe(values)[2] for arm in techniques.arms
                   if len(values := techniques.differences(arm, depth, "tokens")) > 1]
        pair = float(np.median(spreads)) if spreads else math.nan
        lines.append(f"| {depth} | {n} | {sd:.4f} | {pair:.4f} | {detectable(3, P) * pair:.4f} |")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Rates over widths, failures, the page

def transfer_tables(rows: list[dict]) -> str:
    """Loss over width and rate for each arm of the group transfer, the best rate of each width in bold.

    The rate is adamw_lr if a run sets it, else muon_lr.
    """
    parts, runs = [], finished(rows, "transfer")
    for arm in dict.fromkeys(row["arm"] for row in runs):
        cells = {}
        for row in runs:
            if row["arm"] == arm:
                rate = float(row["flags"].get("adamw_lr", row["flags"]["muon_lr"]))
                cells.setdefault((row["width"], rate), []).append(row["loss"])
        widths, rates = sorted({width for width, _ in cells}), sorted({rate for _, rate in cells})
        lines = ["| width | " + " | ".join(f"{rate:.4g}" for rate in rates) + " |", "| --: |" + " --: |" * len(rates)]
        chosen = []
        for width in widths:
            means = {rate: float(np.mean(cells[width, rate])) for rate in rates if (width, rate) in cells}
            best = min(means, key=means.get)
            chosen.append(rates.index(best))
            texts = [f"{means[rate]:.4f}" if rate in means else "-" for rate in rates]
            texts[chosen[-1]] = f"**{texts[chosen[-1]]}**"
            lines.append(f"| {width} | " + " | ".join(texts) + " |")
        n = sorted({len(losses) for losses in cells.values()})
        edge = " A best rate at the edge of the grid may lie beyond it." if {0, len(rates) - 1} & {*chosen} else ""
        moved = max(chosen) - min(chosen)
        found = (f"moves by {moved} column{'s' * (moved != 1)} over the widths" if len(widths) > 1 else
                 f"is {rates[chosen[0]]:.4g}")
        parts.append(f"`{arm}` (n = {' to '.join(map(str, n))} in a cell): the best rate {found}.{edge}\n\n" +
                     "\n".join(lines))
    return "\n\n".join(parts)


def failure_lines(rows: list[dict]) -> str:
    """All runs that did not finish, counted by reason."""
    failed = Counter((row["status"], row["group"], row["arm"], row["depth"], row.get("why", "")) for row in rows
                     if row["status"] != "finished")
    if not failed:
        return "None."
    return "\n".join(f"* {count} x {status}: {group}, {arm}, depth {depth}: {why}"
                     for (status, group, arm, depth, why), count in failed.items())


def setup_line(rows: list[dict]) -> str:
    """The machine, the versions and the common flags of the runs."""
    runs = [row for row in rows if row["status"] == "finished"]
    parts = []
    for name, title in (("device", "device"), ("torch", "torch"), ("script_sha256", "script")):
        values = {str(row.get(name, "?"))[:40] for row in runs if name != "script_sha256" or not row.get("edits")}
        parts.append(f"{title} {', '.join(sorted(values))}")
    flags = [set(row.get("flags", {}).items()) for row in runs]
    common = sorted(set.intersection(*flags)) if flags else []
    groups = Counter(row["group"] for row in runs)
    return (f"{len(rows)} runs ({', '.join(f'{count} {group}' for group, count in groups.items())}; "
            f"{len(rows) - len(runs)} failed); {'; '.join(parts)}. Flags of all runs: "
            f"`{' '.join(f'--{name}={value}' for name, value in common)}`.")


PAGE = """# What each technique is worth, with error bars

This page is generated. Do not edit it; run the command again:

    {command}

{setup}

Loss is validation loss in nats per token. A difference is technique minus base, so a negative one is good. A pair has
the same seed and depth. ± is the standard error over pairs. "helps" and "hurts" mean p < {p:g} in a two-sided paired
t-test of at least three pairs. By chance alone about {chance:.0f} of the {tests} tests by depth would say so. "no
difference seen" is not "no difference": the table of noise says how small a difference could have been seen.

Equal tokens: both runs as they are. Equal FLOPs and equal seconds: a technique that makes a token dearer is compared
with a base that trains on more tokens for the same cost. That base's loss is interpolated between base runs of several
lengths, each with its whole schedule; beyond these lengths the line is extended.

{speeds}

What this shows: what a technique does to the loss of models of {sizes} M parameters within their first {tokens} M
tokens, and how sure that is. What it does not show: what it is worth in a model of 100 M parameters after billions of
tokens. Gains often shrink with size. Weight decay, a second epoch, z-loss, norm scaling and value residual are meant
for longer runs and deeper models than these. All arms have the learning rates of the base unless their name says
otherwise, and a rate that suits a technique better could change its verdict. Take a row as a reason to try it, not as
a law.

## Noise: the seed of the initial weights alone

{noise}

## Techniques, all depths together

{summary}

## Techniques by depth

{techniques}
"""


TIMED = """Speeds come from runs that had the machine for themselves. How uncertain a speed is, ± does not say, so there is no
verdict at equal seconds. "-": not timed."""
NOT_TIMED = "The runs did not have the machine for themselves, so there are no speeds and nothing at equal seconds."


def make_page(rows: list[dict], command: str, hold_out: int, image: str = "") -> str:
    """The page with all tables; sections without runs are left out."""
    techniques = Techniques(rows)
    tests = 2 * sum(bool(techniques.pairs(arm, depth)) for arm in techniques.arms for depth in techniques.depths)
    runs = finished(rows, "technique")
    sizes, tokens = ([row[name] / 1e6 for row in runs] for name in ("parameters", "tokens"))
    text = PAGE.format(command=command, setup=setup_line(rows), p=P, tokens=f"{max(tokens):.2g}",
                       speeds=TIMED if techniques.timed else NOT_TIMED,
                       sizes=f"{min(sizes):.2g} to {max(sizes):.2g}", tests=tests, chance=tests * P,
                       noise=noise_table(techniques), summary=summary_table(techniques),
                       techniques=technique_tables(techniques))
    if finished(rows, "isoflop"):
        text += f"\n## Scaling laws\n\n{fit_tables(rows, hold_out)}{image_link(image)}\n"
    return text + last_sections(rows)


def image_link(image: str) -> str:
    return f"\n\n![Loss over size for each budget, and the best sizes]({image})" if image else ""


def last_sections(rows: list[dict]) -> str:
    """The sections that both pages end with."""
    text = ""
    if finished(rows, "transfer"):
        text += f"\n## The best rate over widths\n\n{transfer_tables(rows)}\n"
    return text + f"\n## Runs that did not finish\n\n{failure_lines(rows)}\n"


def seed_noise(runs: list[dict]) -> str:
    """A sentence on how far the seed alone moves a loss, pooled over sizes and budgets; empty with one seed."""
    cells = {}
    for row in runs:
        cells.setdefault((row["budget"], row["parameters"]), []).append(row["loss"])
    several = [losses for losses in cells.values() if len(losses) > 1]
    if not several:
        return ""
    squares = sum((len(losses) - 1) * np.var(losses, ddof=1) for losses in several)
    sd = math.sqrt(squares / sum(len(losses) - 1 for losses in several))
    return (f"\n\nRuns that differ only in the seed have a standard deviation of {sd:.4f}, pooled over {len(several)} "
            "cells with several seeds.")


FIT_PAGE = """# Scaling laws

This page is generated. Do not edit it; run the command again:

    {command}

{setup}

A budget is a number of training FLOPs. Each budget was spent on models of several sizes, so a larger model read fewer
tokens. N is the number of parameters that a token is multiplied with: matrices and head, without the embedding. D is
the number of training tokens. Loss is validation loss in nats per token.

What this shows: which size is best for a budget among models of {sizes} M parameters that read
{tokens} M tokens. What it does not show: which size is best for larger budgets, or with another text or
tokenizer. The exponents are those of these models. The intervals say how far noise and the misfit of the curve move an
exponent. They do not say how far another learning rate or batch would.

## Losses

{losses}{noise}

## Laws

{laws}
"""


def make_fit_page(rows: list[dict], command: str, hold_out: int, image: str = "") -> str:
    """The page of the command fit."""
    runs = finished(rows, "isoflop")
    laws = fit_tables(rows, hold_out) + image_link(image)       # refuses runs that are too few
    sizes, tokens = (sorted(row[name] for row in runs) for name in ("parameters", "tokens"))
    text = FIT_PAGE.format(command=command, setup=setup_line(rows), losses=size_table(runs), laws=laws,
                           noise=seed_noise(runs),
                           sizes=f"{millions(sizes[0])} to {millions(sizes[-1])}",
                           tokens=f"{millions(tokens[0])} to {millions(tokens[-1])}")
    return text + last_sections(rows)


def run(args) -> int:
    """The commands fit and technique."""
    if args.picture and args.picture.suffix not in (".svg", ".png"):
        raise UserError(f"--picture={args.picture} must end with .svg or .png")
    rows = read_results(args.results)
    words = [f"--hold_out={args.hold_out}"] * bool(args.hold_out) + [
        f"--{name}={getattr(args, name)}" for name in ("picture", "page") if getattr(args, name)]
    command = " ".join([f"python dev/ladder.py {args.command}", *map(str, args.results), *words])
    image = args.picture.name if args.picture else ""
    if args.command == "technique":
        text = make_page(rows, command, args.hold_out, image)
    elif args.page:
        text = make_fit_page(rows, command, args.hold_out, image)
    else:
        text = fit_tables(rows, args.hold_out)
    if args.picture:
        picture(fit_parabolas(finished(rows, "isoflop")), args.picture)
    if args.page:
        write_text(args.page, text)
        print(f"wrote {args.page}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    print(__doc__.strip())
