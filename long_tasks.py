"""The tasks of evaluate.py for long texts: a needle that is to be found, and the loss by the position in a document.

    python evaluate.py --tasks=needle,position --shards='data/long/val_*.bin' --heat_map=needle.svg

needle     a sentence with a number of five digits is hidden in text, and the text ends with a question for the number
           (data/needles.py). An answer is right if all its tokens are. Guessing is right once in 90,000 answers
position   the loss at places in long documents: with all of the document before it, and with the last 2,048 to 4,096
           tokens only. The difference is what a model gains from text that is further away

A needle is tested at several lengths of the text and depths in it, alone and as one of four. Each question is answered
twice: token by token through the cache, as sample.py writes, and by the logits of forward. Both should agree.
"""
if __name__ == "__main__":               # before the imports, so that the text comes at once
    print(__doc__.strip())
    raise SystemExit

import math
from dataclasses import dataclass

import numpy as np

import sample
from sample import HERE, UserError

SCORES = ("needle", "position")
SHORTEST = 2048                          # tokens of the shortest text with a needle; each longer one has twice as many
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)     # of the needle that is asked for
# A needle lies this far from its depth at most. At exactly a quarter of a power of two, all needles would lie in the
# same few of the blocks that a far layer tells apart, and one head that has learned nothing would cost a whole column.
JITTER = 1 / 16
NEEDLES = (1, 4)                         # hidden in one text
ITEMS = 20                               # questions for each length, depth and number of needles
DOCUMENTS = 64                           # that position reads, at most
CUT = 2048                               # tokens of context that position leaves at least, and half of the most
BATCH, BATCH_TOKENS = 8, 1 << 16         # texts that are read together: their number, and their tokens
METHODS = ("decode", "forward")

# -----------------------------------------------------------------------------
# Needles

@dataclass(frozen=True)
class Item:
    """A question: the tokens of its text, which ends with the question, and those of the answer."""
    needles: int
    length: int                  # of text and answer, in tokens
    depth: float
    number: int                  # among those with the same needles, length and depth
    tokens: np.ndarray
    answer: np.ndarray

def load_needles():
    """The module data/needles.py; raises UserError."""
    return sample.import_script(HERE / "data" / "needles.py", ("haystack", "key_pool"),
                                "use the data/needles.py that belongs to evaluate.py")

def text_lengths(longest: int) -> list[int]:
    """The lengths of texts with needles: SHORTEST, twice as many tokens, and so on up to `longest`."""
    return [SHORTEST << n for n in range(32) if SHORTEST << n <= longest] or [longest]

def read_filler(shards: list, most: int) -> np.ndarray:
    """Up to `most` tokens of the shards, (N,), without those that begin documents."""
    parts, left = [], most
    for shard in shards:
        ids = shard.read()[:2 * left]
        parts.append(ids[ids != shard.bos_id][:left])
        left -= len(parts[-1])
        if left <= 0:
            break
    return np.concatenate(parts).astype(np.int32)

def make_items(tokenizer: sample.Tokenizer, shards: list, longest: int, count: int) -> list[Item]:
    """`count` items for each number of needles, length and depth; raises UserError if the shards hold too little text.

    They depend on the tokenizer, the shards and `longest` only.
    """
    module, lengths = load_needles(), text_lengths(longest)
    filler = read_filler(shards, 4 * longest)
    if len(filler) < longest:
        raise UserError(f"{shards[0].path} and those beside it hold {len(filler)} tokens of text, but a needle is "
                        f"hidden in up to {longest}; lower --longest or name more text with --shards=")
    keys = module.key_pool(training=False)
    items = []
    for needles in NEEDLES:
        for length in lengths:
            for depth in DEPTHS:
                for number in range(count):
                    rng = np.random.default_rng((needles, length, round(100 * depth), number))
                    chosen = rng.choice(keys, needles, replace=False)
                    answers = [module.answer(rng) for _ in chosen]
                    place = float(np.clip(depth + rng.uniform(-JITTER, JITTER), 0, 1))
                    depths = [place, *rng.random(needles - 1)]
                    sentences = [tokenizer.encode(module.question(key) + answer + ".\n")
                                 for key, answer in zip(chosen, answers)]
                    asked = tokenizer.encode(module.question(chosen[0]))
                    answer = tokenizer.encode(answers[0])
                    room = length - 1 - len(answer)
                    if room < sum(map(len, sentences)) + len(asked):
                        raise UserError(f"--longest={longest} is too short for {needles} needles; raise it")
                    text = module.haystack(filler, [*zip(depths, sentences), (1.0, asked)], room, rng)
                    tokens = np.concatenate([[tokenizer.bos_id], text]).astype(np.int32)
                    items.append(Item(needles, length, depth, number, tokens, np.array(answer, np.int32)))
    return items

def item_document(item: Item) -> tuple[np.ndarray, int, int]:
    """(tokens, start, end) of text and answer, of which the answer is scored."""
    tokens = np.concatenate([item.tokens, item.answer])
    return tokens, len(item.tokens), len(tokens)

def write_answers(model, vocab_size: int, items: list[Item], rank: int = 0, world_size: int = 1) -> dict[int, list]:
    """Number of the item -> the tokens that greedy decoding answers with, for this rank's share of the items."""
    answers = {}
    for length in sorted({item.length for item in items}):
        mine = [i for i in range(rank, len(items), world_size) if items[i].length == length]
        longest = max(map(len, (item.answer for item in items)))
        batch = min(BATCH, max(1, BATCH_TOKENS // length), max(1, len(mine)))
        engine = sample.Engine(model, vocab_size, sample.Draw(temperature=0.0), batch, length + longest)
        for low in range(0, len(mine), batch):
            group = mine[low:low + batch]
            rows = [(row, 0) for row in range(len(group))]
            count = max(len(items[i].answer) for i in group)
            found = [tokens for tokens, _ in engine.steps([items[i].tokens.tolist() for i in group], rows, count)]
            for row, i in enumerate(group):
                answers[i] = [tokens[row] for tokens in found][:len(items[i].answer)]
    return answers

def judge(items: list[Item], answers: dict[int, list], results: np.ndarray, tokenizer: sample.Tokenizer) -> list[dict]:
    """A record for each item. results: what evaluate.score_documents returns for the documents of the items."""
    records = []
    for i, (item, (_, _, wrong)) in enumerate(zip(items, results)):
        text = b"".join(tokenizer.token_bytes(token) for token in answers[i]).decode(errors="replace")
        records.append({"task": "needle", "needles": item.needles, "length": item.length, "depth": item.depth,
                        "item": item.number, "decode": answers[i] == item.answer.tolist(), "forward": bool(wrong == 0),
                        "answer": text})
    return records

def share(flags: list[bool]) -> dict:
    """The share of the true ones, its standard error (None for a single one) and their number."""
    n, mean = len(flags), sum(flags) / len(flags)
    se = round(math.sqrt(mean * (1 - mean) / (n - 1)), 6) if n > 1 else None
    return {"accuracy": round(mean, 6), "se": se, "n": n}

def needle_score(records: list[dict]) -> dict:
    """Method -> number of needles -> length -> share of right answers over all depths; and "cells", with the depths."""
    scores = {}
    for method in METHODS:
        scores[method] = {}
        for needles in sorted({record["needles"] for record in records}):
            mine = [record for record in records if record["needles"] == needles]
            scores[method][str(needles)] = {
                str(length): share([record[method] for record in mine if record["length"] == length])
                for length in sorted({record["length"] for record in mine})}
    keys = sorted({(record["needles"], record["length"], record["depth"]) for record in records})
    scores["cells"] = []
    for key in keys:
        mine = [record for record in records if (record["needles"], record["length"], record["depth"]) == key]
        cell = dict(zip(("needles", "length", "depth"), key))
        scores["cells"].append(cell | {method: share([record[method] for record in mine])["accuracy"]
                                       for method in METHODS} | {"n": len(mine)})
    scores["agree"] = share([record["decode"] == record["forward"] for record in records])["accuracy"]
    return scores

def heat_map(score: dict) -> str:
    """An SVG picture of needle_score: one panel for each method and number of needles, lengths across, depths down."""
    cells, step = score["cells"], 56
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    counts = sorted({cell["needles"] for cell in cells})
    width, height = 90 + step * len(lengths), 70 + 28 * len(depths)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(METHODS)}" height="{height * len(counts)}" '
             'font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>']
    for panel, (needles, method) in enumerate((needles, method) for needles in counts for method in METHODS):
        left, top = width * (panel % len(METHODS)) + 70, height * (panel // len(METHODS)) + 40
        how = "greedy decoding" if method == "decode" else "logits of forward"
        parts.append(f'<text x="{left}" y="{top - 20}">{needles} needle{"s" * (needles > 1)}, {how}: right answers in '
                     '%</text>')
        for i, length in enumerate(lengths):
            x = left + step * i + step // 2
            parts.append(f'<text x="{x}" y="{top - 5}" text-anchor="middle">{length:,}</text>')
        for j, depth in enumerate(depths):
            parts.append(f'<text x="{left - 6}" y="{top + 28 * j + 18}" text-anchor="end">depth {depth:.0%}</text>')
        for cell in cells:
            if cell["needles"] != needles:
                continue
            x, y = left + step * lengths.index(cell["length"]), top + 28 * depths.index(cell["depth"])
            hue = round(120 * cell[method])                         # from red to green
            parts.append(f'<rect x="{x}" y="{y}" width="{step - 2}" height="26" fill="hsl({hue},60%,70%)"/>'
                         f'<text x="{x + step // 2}" y="{y + 17}" text-anchor="middle">{100 * cell[method]:.0f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"

# -----------------------------------------------------------------------------
# Loss by position

def long_documents(shards: list, longest: int, count: int) -> list[np.ndarray]:
    """The first `count` documents of more than half of `longest` tokens, of which the first `longest` are kept.

    Raises UserError if there are none.
    """
    found = []
    for shard in shards:
        ids = shard.read()
        borders = [*np.flatnonzero(ids == shard.bos_id), len(ids)]
        for start, end in zip(borders, borders[1:]):
            if end - start > longest // 2 and len(found) < count:
                found.append(np.asarray(ids[start:min(end, start + longest)], np.int32))
    if not found:
        raise UserError(f"{shards[0].path} and those beside it hold no document of more than {longest // 2} tokens, "
                        "which position needs; lower --longest or name longer ones with --shards=")
    return found

def edges(longest: int) -> list[int]:
    """The borders of the buckets of positions: 0, 1024, 2048, 4096, ..., longest."""
    return [0, *(1024 << n for n in range(32) if 1024 << n < longest), longest]

def cut_documents(documents: list[np.ndarray], longest: int) -> tuple[list[tuple], list[tuple[int, int]]]:
    """Pieces (tokens, start, end) in which every place past 2 x CUT is scored with CUT to 2 x CUT tokens before it.

    Also (number of the document, bucket) of each piece. Earlier places need no piece: nothing is cut there.
    """
    pieces, owners, borders = [], [], edges(longest)
    for number, ids in enumerate(documents):
        low = 2 * CUT
        while low < len(ids):
            bucket = next(i for i, border in enumerate(borders[1:]) if low < border)
            high = min(low + CUT, borders[bucket + 1], len(ids))
            piece = np.concatenate([ids[:1], ids[low - CUT:high]])
            pieces.append((piece, CUT + 1, len(piece)))
            owners.append((number, bucket))
            low = high
    return pieces, owners

def full_losses(subject, score, documents: list[np.ndarray], longest: int, fill) -> dict[int, np.ndarray]:
    """Number of the document -> (buckets, 2): summed loss in nats and scored tokens, for this rank's documents.

    score: the model's function of that name; fill: evaluate.fill.
    """
    import torch
    machine, device, found = subject.machine, subject.machine.device, {}
    for number in range(machine.rank, len(documents), machine.world_size):
        ids = documents[number]
        length = subject.stream_tokens if device.type == "cuda" else -(-len(ids) // 128) * 128
        tokens, targets, _ = fill([(number, (ids, 1, len(ids)))], length, subject.model.cfg.bos_id)
        with torch.no_grad():
            losses, _ = score(*subject.module.to_device((tokens, targets), device))
        losses = losses[:len(ids) - 1].cpu().double().numpy()
        borders = np.clip(np.array(edges(longest)) - 1, 0, len(losses))         # the loss of place p is at p - 1
        sums = np.append(0.0, losses.cumsum())
        found[number] = np.column_stack([np.diff(sums[borders]), np.diff(borders)])
    return found

def position_score(full: np.ndarray, pieces: np.ndarray, owners: list[tuple[int, int]], longest: int, ratio) -> dict:
    """A row for each bucket: the loss with full and with cut context and their difference, with standard errors.

    full: (documents, buckets, 2), see full_losses; pieces: (pieces, 3) of evaluate.score_documents; ratio:
    evaluate.ratio. Standard errors are over documents.
    """
    cut = np.zeros_like(full)
    for (number, bucket), (loss, count, _) in zip(owners, pieces):
        cut[number, bucket] += loss, count
    rows, borders = [], edges(longest)
    for bucket, (low, high) in enumerate(zip(borders, borders[1:])):
        there = full[:, bucket, 1] > 0
        if not there.any():
            continue
        sums, counts = full[there, bucket].T
        row = {"from": low, "to": high, "documents": int(there.sum()), "tokens": int(counts.sum())}
        losses = {"full": sums}
        if low >= 2 * CUT:
            losses |= {"cut": cut[there, bucket, 0], "gain": cut[there, bucket, 0] - sums}
        for name, values in losses.items():
            mean, se = ratio(values, counts)
            row |= {name: round(mean, 6), f"{name}_se": None if se is None else round(se, 6)}
        rows.append(row)
    return {"buckets": rows, "documents": len(full)}

# -----------------------------------------------------------------------------
# The table

def table(scores: dict) -> list[str]:
    """The lines of the console's table for "needle" and "position"."""
    lines = []
    if "needle" in scores:
        lengths = [*next(iter(scores["needle"]["decode"].values()))]
        lines.append(f"{'right answers':34}" + "".join(f"{int(length):>9,}" for length in lengths))
        for method, how in zip(METHODS, ("decoded", "forward")):
            for needles, row in scores["needle"][method].items():
                name = f"{needles} needle{'s' * (needles != '1')}, {how}"
                lines.append(f"{name:34}" + "".join(f"{row[length]['accuracy']:9.3f}" for length in lengths))
        lines.append(f"{next(iter(row.values()))['n']} questions for each number, over depths from 0 to 100 %")
    if "position" in scores:
        lines.append(f"{'loss at positions':24}{'full':>10}{'+-':>9}{'cut':>10}{'+-':>9}{'gain':>10}{'+-':>9}"
                     f"{'documents':>11}{'tokens':>12}")
        for row in scores["position"]["buckets"]:
            numbers = "".join(f"{row[name]:>10.4f}{row[f'{name}_se'] or 0:>9.4f}" if name in row else f"{'-':>10}{'':9}"
                              for name in ("full", "cut", "gain"))
            place = f"{row['from']:,} to {row['to']:,}"
            lines.append(f"{place:24}{numbers}{row['documents']:>11,}{row['tokens']:>12,}")
    return lines
