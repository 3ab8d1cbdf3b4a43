"""Where one model predicts better than another: the difference in loss per token, in groups of tokens.

    python evaluate.py --checkpoint=logs/<run A> --tasks=bpb --losses_out=a.npz
    python evaluate.py --checkpoint=logs/<run B> --tasks=bpb --losses_out=b.npz
    python dev/loss_diff.py a.npz b.npz --picture=diff.svg
    python dev/loss_diff.py a.npz b.npz --sources=val.jsonl.xz      # also by the field `source` of the original text

Groups: the position of a token in its document, how often it occurs in this text, and the source of its document. A
difference is B - A in nats per token, so a negative one means that B is better. Its standard error takes documents as
the units, because losses within a document go together. Both models must have read the same tokens.
"""
import argparse
import hashlib
import json
import lzma
import math
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "records")]
import sample  # noqa: E402
from runs import UserError  # noqa: E402

ARRAYS = {"format": "i", "model": "U", "text_sha256": "S", "lengths": "i", "tokens": "i", "losses": "f"}
RANKS = (10, 100, 1000, 10_000)          # borders of groups of tokens, the most frequent first


@dataclass(frozen=True)
class Losses:
    """A file of evaluate.py --losses_out."""
    model: str
    documents: list[bytes]       # sha256 of each document's text
    lengths: np.ndarray          # (documents,) tokens of each
    tokens: np.ndarray           # (tokens,) ids
    losses: np.ndarray           # (tokens,) in nats


@dataclass(frozen=True)
class Group:
    """The tokens of a group, and how the models differ on them."""
    kind: str
    name: str
    count: int
    a: float                     # mean loss of A, in nats per token
    b: float
    error: float                 # standard error of b - a, over documents; nan for a single one
    share: float                 # part of the difference over all tokens that this group makes


def read_losses(path: Path) -> Losses:
    """Raises UserError for a file that is not of evaluate.py --losses_out."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
        kinds = {name: array.dtype.kind for name, array in arrays.items()}
        if kinds != ARRAYS or int(arrays["format"]) != 1:
            raise ValueError("its arrays have other types")
        lengths, size = arrays["lengths"], len(arrays["tokens"])
        sizes = len(arrays["text_sha256"]), int(lengths.sum()), len(arrays["losses"])
        if sizes != (len(lengths), size, size) or lengths.min() < 1:
            raise ValueError("its arrays have other lengths")
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a file of losses ({error}); make it with evaluate.py --losses_out") from None
    return Losses(str(arrays["model"]), arrays["text_sha256"].tolist(), arrays["lengths"], arrays["tokens"],
                  arrays["losses"].astype(np.float64))


def read_sources(path: Path, documents: list[bytes]) -> list[str]:
    """The source of each document, by the sha256 of its text; "not found" if no line has the text. Raises UserError."""
    wanted, found = set(documents), {}
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            for line in file:
                row = json.loads(line)
                digest = hashlib.sha256(row["text"].encode()).hexdigest().encode()
                if digest in wanted:
                    found[digest] = str(row["source"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"--sources={path} cannot be read ({type(error).__name__}: {error}); name a .jsonl or "
                        ".jsonl.xz file whose lines have text and source") from None
    if not found:
        raise UserError(f"--sources={path} has none of the documents; name the text that the shards were made from")
    return [found.get(digest, "not found") for digest in documents]


def position_groups(lengths: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(group of each token, names): positions 1, 2-3, 4-7 and so on; the first token after the begin token has 1."""
    position = np.concatenate([np.arange(1, length + 1) for length in lengths])
    group = np.floor(np.log2(position)).astype(int)
    return group, [f"{2 ** i} to {2 ** (i + 1) - 1}" if i else "1" for i in range(group.max() + 1)]


def frequency_groups(tokens: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(group of each token, names): by the rank of the token among all tokens of this text."""
    counts = np.bincount(tokens)
    rank = np.empty(len(counts), int)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    group = np.searchsorted(RANKS, rank[tokens], side="right")
    starts = [1, *(border + 1 for border in RANKS)]
    names = [f"rank {low:,} to {high:,}" for low, high in zip(starts, RANKS)] + [f"rank above {RANKS[-1]:,}"]
    return group, names[:group.max() + 1]


def make_groups(kind: str, group: np.ndarray, names: list[str], a: Losses, b: Losses) -> list[Group]:
    """The groups that have tokens, in the order of their names."""
    document = np.repeat(np.arange(len(a.lengths)), a.lengths)
    difference, found = b.losses - a.losses, []
    for number, name in enumerate(names):
        chosen = group == number
        count = int(chosen.sum())
        if not count:
            continue
        sums = np.bincount(document[chosen], difference[chosen], len(a.lengths))
        weights = np.bincount(document[chosen], minlength=len(a.lengths))
        sums, weights, mean = sums[weights > 0], weights[weights > 0], difference[chosen].mean()
        units = len(weights)
        spread = ((sums - mean * weights) ** 2).sum()
        error = math.sqrt(units / (units - 1) * spread) / count if units > 1 else math.nan
        total = difference.sum()
        found.append(Group(kind, name, count, a.losses[chosen].mean(), b.losses[chosen].mean(), error,
                           sums.sum() / total if total else math.nan))
    return found


def compare(a: Losses, b: Losses, sources: list[str]) -> list[Group]:
    """All groups: all tokens, by position, by frequency and, if there are sources, by source."""
    groups = make_groups("all", np.zeros(len(a.tokens), int), ["all tokens"], a, b)
    groups += make_groups("position in the document", *position_groups(a.lengths), a, b)
    groups += make_groups("frequency of the token", *frequency_groups(a.tokens), a, b)
    if sources:
        names = sorted(set(sources))
        by_document = np.array([names.index(source) for source in sources])
        groups += make_groups("source", np.repeat(by_document, a.lengths), names, a, b)
    return groups


def table(groups: list[Group]) -> str:
    lines = ["| group | tokens | loss of A | loss of B | B - A | share of the difference |",
             "| --- | --: | --: | --: | --: | --: |"]
    for group in groups:
        error = f" ± {group.error:.4f}" if math.isfinite(group.error) else ""
        share = f"{group.share:.1%}" if math.isfinite(group.share) else "-"
        lines.append(f"| {group.name if group.kind in ('all', 'source') else f'{group.kind.split()[0]}: {group.name}'} "
                     f"| {group.count:,} | {group.a:.4f} | {group.b:.4f} | {group.b - group.a:+.4f}{error} | {share} |")
    return "\n".join(lines)


def draw(groups: list[Group], path: Path):
    """A panel for each kind: B - A of each group, with 95 % intervals."""
    from pictures import new_figure, save
    kinds = [kind for kind in dict.fromkeys(group.kind for group in groups) if kind != "all"]
    figure = new_figure(4.6 * len(kinds), 4.2)
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        mine = [group for group in groups if group.kind == kind]
        errors = [1.96 * group.error if math.isfinite(group.error) else 0 for group in mine]
        axis.errorbar([group.b - group.a for group in mine], range(len(mine)), xerr=errors, fmt="o", color="black",
                      capsize=3, markersize=4)
        axis.set_yticks(range(len(mine)), [group.name for group in mine])
        axis.invert_yaxis()
        axis.axvline(0, color="0.6", linewidth=1)
        axis.axvline(groups[0].b - groups[0].a, color="0.6", linewidth=1, linestyle=":")
        axis.set(title=kind, xlabel="B - A, nats per token")
        axis.grid(axis="x", alpha=0.25)
    save(figure, path)


def run(argv: list[str] | None):
    parser = sample.make_parser("loss_diff.py", __doc__)
    parser.add_argument("a", type=sample.path_flag, metavar="A.npz", help="losses of model A")
    parser.add_argument("b", type=sample.path_flag, metavar="B.npz", help="losses of model B")
    parser.add_argument("--sources", type=sample.path_flag, metavar="FILE", help="the validation text as .jsonl or "
                        ".jsonl.xz, with the fields text and source; documents that data/text.py has cut are not found")
    parser.add_argument("--picture", type=sample.path_flag, metavar="FILE", help="draw the differences, .svg or .png")
    args = parser.parse_args(argv)
    if args.picture and args.picture.suffix not in (".svg", ".png"):
        raise UserError(f"--picture={args.picture} must end with .svg or .png")
    a, b = read_losses(args.a), read_losses(args.b)
    if not np.array_equal(a.tokens, b.tokens) or not np.array_equal(a.lengths, b.lengths):
        raise UserError(f"{args.a} and {args.b} hold losses of other tokens; use the same --shards and --bpb_tokens, "
                        "and models of the same tokenizer")
    groups = compare(a, b, read_sources(args.sources, a.documents) if args.sources else [])
    print(f"A: {sample.one_line(a.model)}\nB: {sample.one_line(b.model)}\n\n{table(groups)}")
    if args.picture:
        draw(groups, args.picture)
        print(f"\nwrote {args.picture}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 an error that the user can correct."""
    try:
        run(argv)
        return 0
    except (UserError, sample.UserError) as error:
        print(f"loss_diff.py: {error}", file=sys.stderr)
    except BrokenPipeError:                              # nobody reads on, as behind `| head`
        sample.close_stdout()
        return 0
    except OSError as error:
        print(f"loss_diff.py: {UserError(error)}; name another path", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
