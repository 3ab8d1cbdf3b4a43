"""The model of every training script: what a token may see, the attention and loss kernels, and the initial state.

Against: the model run on each document alone, a dense softmax and plain cross-entropies in float64 with autograd, the
figures of the NanoGPT speedrun. Run: python -m pytest tests/test_model.py
"""
import importlib
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import BOS, SCRIPTS, VOCAB

import train_gpt
from train_gpt import BLOCK, block_mask, head_loss, norm, plain_attention, sample_vocab

MODELS = [("train_gpt", "tiny"), *((script, "speedrun") for script in SCRIPTS)]      # all tiny ones are of one kind
STATIC_GATES = {"x0": 0, "bigram": 0.05, "xsa": 0, "out": 0.25, "skip": 0.5}  # at initialisation, by the recipe
STATIC_MIXES = {"value": 0, "stream": 0, "value_gate": 2, "attn_x": math.sqrt(1.1), "attn": 1, "attn_x0": 0,
                "attn_bigram": 0.05, "mlp_x": math.sqrt(1.1), "mlp": 1,
                "x0": 0, "late": -0.5, "last": 0, "embed": 0, "skip": 0}
GATED_LAYERS = {  # those with xsa, those with an output gate, and the one without attention
    ("train_gpt", "tiny"): ((3,), (1, 4), 2), ("train_gpt", "speedrun"): ((1, 3, 4, 7), (3, 10), 6),
    ("train_gpt_medium", "speedrun"): ((1, 4, 6, 8, 10), (0, 4, 11, 15), 9)}


def disturb(model, scale=0.2, seed=1):
    """Moves every parameter, so that no path through the model is silent because it starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param += scale * torch.randn(param.shape, generator=generator) * (0.1 if param.dim() > 2 else 1)
    return model


@pytest.fixture(params=MODELS, ids=" ".join)
def preset(request):
    return request.param


@pytest.fixture
def script(preset):
    return importlib.import_module(preset[0])


@pytest.fixture
def cfg(small_config, script, preset):
    """The small configuration with the layer table of a preset, 48 channels wide."""
    return small_config(layers=list(script.PRESETS[preset[1]].layers))


@pytest.fixture
def model(cfg, script):
    """A model of each layer table, away from its initial state."""
    return disturb(script.GPT(cfg))


def random_documents(lengths, seed=0):
    """Documents of random tokens; the first token of each is BOS."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.cat([torch.tensor([BOS]), torch.randint(0, BOS, (length - 1,), generator=generator)])
            for length in lengths]


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens)


# -----------------------------------------------------------------------------
# What a token may see

@pytest.mark.parametrize("changed", [0, 1, 31, 77, 119])
def test_a_token_changes_nothing_before_it(model, changed):
    tokens = torch.cat(random_documents([50, 70]))
    other = tokens.clone()
    other[changed] = (other[changed] + 1) % BOS
    before, after = logits_of(model, tokens), logits_of(model, other)
    assert torch.equal(before[:changed], after[:changed])
    assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("lengths", [[60, 60], [1, 1, 130, 2, 40, 1], [17] * 9])
def test_a_document_in_a_packed_stream_is_as_alone(model, lengths):
    documents = random_documents(lengths)
    packed = logits_of(model, torch.cat(documents)).split(lengths)
    for document, logits in zip(documents, packed):
        torch.testing.assert_close(logits, logits_of(model, document), atol=2e-5, rtol=1e-5)


def test_isolation_reaches_the_gradients(model):
    first, second = random_documents([40, 50])
    for tokens, extra in ((torch.cat([first, second]), 40), (second, 0)):
        targets = tokens.roll(-1).clone()
        targets[:extra] = -1
        model.zero_grad()
        model(tokens, targets, torch.tensor([1, 0.5, 0.25, 0.25])).backward()
        gradients = {name: param.grad.clone() for name, param in model.named_parameters()}
        if extra:
            packed = gradients
    for name, gradient in gradients.items():
        small = 1e-4 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(packed[name], gradient, atol=small, rtol=1e-3, msg=name)


def test_a_token_sees_as_far_back_as_all_windows_reach_together(cfg, script):
    """Every attention layer reaches its window back, a layer with a long window one more for the shifted keys."""
    model = disturb(script.GPT(replace(cfg, stages=(replace(cfg.stages[0], short=4, long=9),))))
    tokens = random_documents([120])[0]
    reach = sum(4 if layer.window == "short" else 10 for layer in cfg.layers if layer.attention) + 2  # smear, bigram
    base = logits_of(model, tokens)
    changed = tokens.clone()
    changed[30] = (changed[30] + 1) % BOS
    differs = (logits_of(model, changed) != base).any(dim=1).nonzero()[:, 0]
    assert differs.min() == 30
    assert 30 + 9 < differs.max() <= 30 + reach


def test_windows_grow_with_the_stages_and_for_the_final_validation(model):
    stages, (short, long) = model.cfg.stages, model.cfg.final_windows
    seen = []
    for index, final in ((0, False), (1, False), (1, True)):
        model.set_stage(index, final=final)
        seen.append((model.window_lengths["short"], model.window_lengths["long"]))
        assert model.windows.tolist() == list(seen[-1])
    assert seen == [(stages[0].short, stages[0].long), (stages[1].short, stages[1].long), (short, long)]


# -----------------------------------------------------------------------------
# Attention

def heads(length, count=2, width=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(length, count, width, generator=generator, dtype=dtype) for _ in range(3))


def first_visible(length, borders, window):
    """(T,) the first key each query sees, from the starts of documents and a window: a loop that cannot be wrong."""
    return torch.tensor([max(max(start for start in [0, *borders] if start <= t), t - window) for t in range(length)],
                        dtype=torch.int32)


def dense_mask(first):
    """(T, T) bool: query t sees keys first[t]..t."""
    index = torch.arange(len(first))
    return (index <= index[:, None]) & (index >= first[:, None])


def dense_attention(q, k, v, mask):
    scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(~mask, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("length, window", [
    (1, 5), (40, 1), (40, 7), (41, 40), (39, 40), (64, 16), (130, 33), (30, 1000)])
def test_plain_attention_against_a_dense_softmax(length, window):
    borders = sorted({length // 3, length // 3 + 1, 2 * length // 3})
    first = first_visible(length, borders, window)
    mine, theirs = ([x.requires_grad_() for x in heads(length)] for _ in range(2))
    y = plain_attention(*mine, first, window)
    reference = dense_attention(*theirs, dense_mask(first))
    torch.testing.assert_close(y, reference, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (reference * weights).sum().backward()
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("window", [16, 128])
def test_a_query_in_a_long_document_sees_exactly_window_and_one_keys(window):
    length, query = 300, 250
    q, k, v = heads(length, count=1)
    first = first_visible(length, [], window)
    v = v.requires_grad_()
    plain_attention(q, k, v, first, window)[query].sum().backward()
    assert (v.grad.abs().sum(dim=(1, 2)) > 0).nonzero()[:, 0].tolist() == list(range(query - window, query + 1))


def random_borders(length, count, generator):
    return sorted(torch.randperm(length - 1, generator=generator)[:count].add(1).tolist())


def listed(count, index):
    """Set of (row, column) that one pair of BlockMask tables names; no column may be named twice in a row."""
    count, index = count[0, 0], index[0, 0]
    for i in range(len(count)):
        assert len(set(index[i, :count[i]].tolist())) == int(count[i])
    return {(i, int(index[i, j])) for i in range(len(count)) for j in range(int(count[i]))}


@pytest.mark.parametrize("seed", range(12))
def test_block_mask_tables_against_the_dense_mask(seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = int(torch.randint(1, 14, (), generator=generator))
    length, window = blocks * BLOCK, [1, 64, 127, 128, 129, 300, 640, 5000][seed % 8]
    first = first_visible(length, random_borders(length, [0, 3, 20][seed % 3], generator), window)
    mask = dense_mask(first)
    tiles = mask.view(blocks, BLOCK, blocks, BLOCK)
    some, every = tiles.any(3).any(1), tiles.all(3).all(1)
    made = block_mask(first, min(blocks, -(-window // BLOCK)) + 2)
    partial = {tuple(pair) for pair in (some & ~every).nonzero().tolist()}
    full = {tuple(pair) for pair in every.nonzero().tolist()}
    assert listed(made.kv_num_blocks, made.kv_indices) == partial
    assert listed(made.full_kv_num_blocks, made.full_kv_indices) == full
    assert {(q, k) for k, q in listed(made.q_num_blocks, made.q_indices)} == partial
    assert {(q, k) for k, q in listed(made.full_q_num_blocks, made.full_q_indices)} == full
    for table in (made.kv_indices, made.full_kv_indices, made.q_indices, made.full_q_indices):
        assert int(table.min()) >= 0 and int(table.max()) < blocks
    q, k = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(made.mask_mod(0, 0, q, k), mask)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [1, 128, 200, 1000])
def test_flex_attention_against_plain_attention(window):
    """As the model calls both: from the starts of the documents, the window, and the longest window of the run."""
    length, borders = 4 * BLOCK, [50, 51, 300]
    q, k, v = heads(length, width=16, dtype=torch.float32)
    doc_start = first_visible(length, borders, length)
    flex = train_gpt.ATTENTION["flex"](doc_start, torch.tensor(window), 1000)
    plain = train_gpt.ATTENTION["plain"](doc_start, window, 1000)
    torch.testing.assert_close(flex(q, k, v), plain(q, k, v), atol=1e-5, rtol=1e-5)
    direct = plain_attention(q, k, v, first_visible(length, borders, window), window)
    torch.testing.assert_close(plain(q, k, v), direct, atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", [("train_gpt", "speedrun")], ids=" ".join, indirect=True)  # slow uncompiled
def test_the_model_gives_the_same_logits_with_flex_attention(model):
    tokens = torch.cat(random_documents([200, 56]))
    plain = logits_of(model, tokens)
    model.cfg = replace(model.cfg, attention="flex")
    torch.testing.assert_close(logits_of(model, tokens), plain, atol=2e-5, rtol=1e-5)


# -----------------------------------------------------------------------------
# Positions

def rotated(x, positions, inv_freq):
    return train_gpt.rotary(x, *train_gpt.rotary_tables(positions, inv_freq, x.dtype))


def test_rotated_products_depend_on_the_distance_alone():
    q, k, _ = heads(60, width=32, dtype=torch.float32)
    q, k = q[:1].expand(60, -1, -1), k[:1].expand(60, -1, -1)
    inv_freq = 1024 ** -torch.linspace(0, 1, 8)
    index = torch.arange(60)
    q, k = rotated(q, index, inv_freq), rotated(k, index, inv_freq)
    scores = torch.einsum("qhd,khd->hqk", q, k)
    for distance in (0, 1, 7, 30):
        diagonal = scores.diagonal(-distance, 1, 2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert (scores[:, 30, 30] - scores[:, 30, 23]).abs().min() > 1e-3  # and it does depend on it


def test_half_of_the_channels_have_no_position_and_lengths_are_kept():
    x = heads(20, width=32)[0].float()
    y = rotated(x, torch.arange(20), 1024 ** -torch.linspace(0, 1, 8))
    assert torch.equal(y[..., 16:], x[..., 16:]) and torch.equal(y[0], x[0])
    assert not torch.equal(y[1:, :, :16], x[1:, :, :16])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("name, windows, scales, final", [
    ("train_gpt", [384, 896, 1408, 1664], [0.1, 0.116946, 0.127518, 0.131778], [768, 2560]),
    ("train_gpt_medium", [384, 896, 1408, 1664, 1920, 2176, 2432, 2688, 2944], [
        0.1, 0.116946, 0.127518, 0.131778, 0.135549, 0.138943, 0.142033, 0.144876, 0.147512], [1408, 3456])])
def test_frequencies_and_softmax_scale_of_the_speedrun(name, windows, scales, final):
    script = importlib.import_module(name)
    model = script.GPT(replace(script.PRESETS["speedrun"], vocab_size=16, bos_id=0, model_dim=256, mlp_dim=8,
                               bigram_rows=3, bigram_signs=2, gate_dim=2, qk_dim=0))
    frequencies = [1024 ** (-j / 31) for j in range(32)]
    assert model.inv_freq.tolist() == pytest.approx(frequencies)
    found = []
    for index, (old, new) in enumerate(zip([384, *windows], windows, strict=False)):
        for j, frequency in enumerate(frequencies):
            turns = old * frequency / (2 * math.pi)
            keep = min(1, max(0, (turns - 1) / 31))
            frequencies[j] = frequency * (old / new + keep * (1 - old / new))
        model.set_stage(index)
        assert model.inv_freq.tolist() == pytest.approx(frequencies, rel=1e-5)
        found.append(float(model.attn_scale))
    assert found == pytest.approx(scales, abs=1e-6)
    model.set_stage(index, final=True)
    assert model.windows.tolist() == final
    assert model.inv_freq.tolist() == pytest.approx(frequencies, rel=1e-5)
    assert float(model.attn_scale) == pytest.approx(found[-1])
    model.set_stage(0)  # and back, as after the warm-up
    assert float(model.attn_scale) == pytest.approx(0.1)


# -----------------------------------------------------------------------------
# Loss

def plain_loss(x, weight, targets, target_weights):
    """Weighted cross-entropies over 23 sigmoid((z + 5) / 7.5), target by target."""
    logits = 23 * torch.sigmoid((x @ weight.T + 5) / 7.5)
    total = 0.0
    for t in range(len(x)):
        for k, target in enumerate(targets[t].tolist()):
            if target >= 0:
                total = total + target_weights[k] * F.cross_entropy(logits[t][None], torch.tensor([target]))
    return total


def loss_case():
    """x, weight, targets (two equal ones; a prefix equal to a target; some missing; all missing) and weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 11, (9, 4), generator=generator)
    targets[0] = torch.tensor([3, 3, 5, -1])
    targets[1] = torch.tensor([4, 2, 4, 4])
    targets[2] = torch.tensor([7, 1, 0, 7])
    targets[3] = -1
    targets[4] = torch.tensor([-1, 0, -1, 10])
    return x, weight, targets, torch.tensor([1, 0.5, 0.25, 0.125])


@pytest.mark.parametrize("chunk", [4, 9, 100])
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_the_head_loss_and_its_gradients(monkeypatch, chunk, scale):
    monkeypatch.setattr(train_gpt, "HEAD_CHUNK", chunk)
    x, weight, targets, target_weights = loss_case()
    mine = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = head_loss(*mine, targets, target_weights)
    reference = plain_loss(*theirs, targets, target_weights.double())
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    (scale * loss).backward()
    (scale * reference).backward()
    for a, b in zip(mine, theirs):
        assert b.grad.norm() > 0.1
        torch.testing.assert_close(a.grad, b.grad, atol=2e-6, rtol=2e-5)


def test_sampled_vocab_are_all_targets_and_a_sample_that_stands_for_the_rest():
    vocab, generator = 5000, torch.Generator().manual_seed(1)
    targets = torch.randint(0, 300, (1000, 4), generator=generator)
    targets[::7, 1] = -1
    ids, counts, places = sample_vocab(targets, vocab, 1200)
    wanted = targets[targets >= 0].unique()
    assert len(ids) == len(ids.unique()) == 1200 and set(wanted.tolist()) <= set(ids.tolist())
    assert torch.equal(ids[places[targets >= 0]], targets[targets >= 0]) and (places[targets < 0] == -1).all()
    assert counts.sum().item() == pytest.approx(vocab, rel=1e-5)
    is_target = torch.isin(ids, wanted)
    assert (counts[is_target] == 1).all() and (counts[~is_target] > 4).all()
    others, chosen = ids[~is_target], torch.zeros(vocab)
    for _ in range(200):                 # over many packs each other token is chosen equally often
        targets[:, 0] = torch.randint(0, 300, (1000,), generator=generator)
        chosen[sample_vocab(targets, vocab, 1200)[0]] += 1
    rate = chosen[300:] / 200
    assert rate.mean().item() == pytest.approx(900 / 4700, rel=0.01) and rate.std() < 0.05 and len(others) == 900


def test_the_sampled_loss_and_its_gradient_are_about_the_exact_ones():
    """Mean over 60 samples, drawn by shuffling which ids the 4 targets have."""
    generator = torch.Generator().manual_seed(0)
    x, weight = norm(torch.randn(64, 32, generator=generator)), torch.randn(4000, 32, generator=generator)
    weights, errors, losses, sums = torch.tensor([1.0]), [], [], torch.zeros(64, 32)
    targets = torch.randint(0, 4000, (64, 1), generator=generator)
    exact = x.clone().requires_grad_()
    loss = head_loss(exact, weight, targets, weights)
    loss.backward()
    for shift in range(60):              # the same problem with other ids, so another sample
        order = torch.roll(torch.arange(4000), shift * 61)
        leaf = x.clone().requires_grad_()
        ids, counts, places = sample_vocab(order.argsort()[targets], 4000, 1000)
        sampled = head_loss(leaf, weight[order][ids], places, weights, counts)
        sampled.backward()
        losses.append(sampled.item() / loss.item())
        sums += leaf.grad
        errors.append(((leaf.grad - exact.grad).norm() / exact.grad.norm()).item())
    assert sum(losses) / 60 == pytest.approx(1, abs=0.003)
    assert (sums / 60 - exact.grad).norm() / exact.grad.norm() < 0.3 * sum(errors) / 60


def test_the_training_loss_is_made_of_the_next_three_tokens_and_the_prefix(model):
    """Weights one at a time, against cross-entropies taken from the logits, target by target within the document."""
    documents = random_documents([30, 2, 1, 60])
    tokens = torch.cat(documents)
    targets = torch.cat([tokens[1:], torch.tensor([-1])])
    prefix_of = torch.where(torch.arange(VOCAB) % 3 == 0, -1, torch.arange(VOCAB) // 2)
    model.prefix_of.copy_(prefix_of)
    log_p = logits_of(model, tokens).log_softmax(-1)
    starts = torch.cat([torch.full((len(document),), i) for i, document in enumerate(documents)])
    expected = [0.0] * 4
    for t in range(len(tokens)):
        for k in range(3):
            same = k == 0 or (t + k < len(tokens) and starts[t + k] == starts[t])
            if same and t + k < len(tokens) and targets[t + k] >= 0:
                expected[k] -= float(log_p[t, targets[t + k]])
        if targets[t] >= 0 and prefix_of[targets[t]] >= 0:
            expected[3] -= float(log_p[t, prefix_of[targets[t]]])
    for k in range(4):
        assert model(tokens, targets, torch.eye(4)[k]).item() == pytest.approx(expected[k], rel=1e-5)
    assert model(tokens, targets).item() == pytest.approx(expected[0], rel=1e-5)
    mixed = [1, 0.5, 0.25, 0.25]
    weighted = sum(weight * loss for weight, loss in zip(mixed, expected))
    assert model(tokens, targets, torch.tensor(mixed)).item() == pytest.approx(weighted, rel=1e-5)


def test_padding_adds_nothing(model):
    tokens = random_documents([40])[0]
    targets = torch.cat([tokens[1:], torch.tensor([BOS])])
    weights = torch.tensor([1, 0.5, 0.25, 0.25])
    padded = torch.cat([tokens, torch.full((20,), BOS)]), torch.cat([targets, torch.full((20,), -1)])
    assert model(*padded).item() == pytest.approx(model(tokens, targets).item(), rel=1e-6)
    assert model(*padded, weights).item() == pytest.approx(model(tokens, targets, weights).item(), rel=1e-6)


def test_logits_are_between_0_and_23(model):
    logits = logits_of(model, random_documents([100])[0])
    assert logits.dtype == torch.float32 and logits.shape == (100, VOCAB)
    assert logits.min() >= 0 and logits.max() <= 23
    raw = torch.tensor([-1e4, -5.0, 0.0, 1e4])
    assert train_gpt.map_logits(raw).tolist() == pytest.approx([0, 11.5, 23 / (1 + math.exp(-5 / 7.5)), 23])


# -----------------------------------------------------------------------------
# Initial state

def test_initial_loss_is_that_of_a_uniform_guess(cfg, script):
    model = script.GPT(replace(cfg, vocab_size=8192))
    tokens = torch.randint(0, 8192, (300,), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, tokens.roll(-1)).item() / 300
    assert loss == pytest.approx(math.log(8192), abs=0.02)


def test_gates_and_mixes_begin_at_their_static_values(monkeypatch, cfg, script, preset):
    seen = {"gate": {}, "mix": {}}
    original = script.GPT.gates

    def gates(self, net, x):
        found = original(self, net, x)
        seen[net.bank].update(found)
        return found
    monkeypatch.setattr(script.GPT, "gates", gates)
    logits_of(script.GPT(cfg), random_documents([50])[0])
    gates, mixes = seen["gate"], seen["mix"]
    xsa, out, skip = GATED_LAYERS[preset]
    attention = [i for i in range(len(cfg.layers) - 1) if i != skip]
    assert gates.keys() == ({("xsa", i) for i in xsa} | {("out", i) for i in out} | {("skip", skip)}
                            | {(kind, i) for kind in ("x0", "bigram") for i in attention})
    sizes = 2 * len(attention) + (len(xsa) + len(out)) * cfg.num_heads + 1
    assert sum(value.size(1) for value in gates.values()) == sizes
    for (kind, _), value in gates.items():
        torch.testing.assert_close(value, torch.full_like(value, STATIC_GATES[kind]), atol=1e-6, rtol=1e-6)
    assert mixes.keys() == STATIC_MIXES.keys()
    for name, value in mixes.items():
        torch.testing.assert_close(value, torch.full_like(value, STATIC_MIXES[name]), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_initial_parameters_of_the_recipe(cfg, script):
    model = script.GPT(cfg)
    bound = math.sqrt(3) * 0.5 * 48 ** -0.5
    assert torch.equal(model.embed, model.lm_head)
    assert float(model.lm_head.std()) == pytest.approx(0.005, rel=0.02)
    assert float(model.value_embeds.std()) == pytest.approx(0.01, rel=0.02)
    for bank in (model.attn_qk, model.attn_vo, model.mlp[0::2]):
        assert float(bank.abs().max()) <= bound and float(bank.std()) == pytest.approx(0.5 * 48 ** -0.5, rel=0.02)
    assert not model.mlp[1::2].any() and not model.bigram_embed.any()
    assert set(model.bigram_signs.flatten().tolist()) == {-1, 1}
    assert torch.allclose(model.resid_lambdas, torch.tensor(math.sqrt(1.1))) and torch.all(model.post_lambdas == 1)
    assert torch.equal(model.attn_scales, torch.tensor([0.5, 1.0]).expand_as(model.attn_scales))


def test_initial_parameters_follow_the_seed(cfg, script):
    first, again, other = (script.GPT(replace(cfg, seed=seed)).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    for name in ("lm_head", "value_embeds", "attn_qk", "attn_vo", "mlp", "gate_fc", "mix_fc", "bigram_signs"):
        assert not torch.equal(first[name], other[name]), name


def test_every_parameter_gets_a_gradient(model):
    tokens = torch.cat(random_documents([100, 150]))
    model.prefix_of.copy_(torch.arange(VOCAB) // 2)
    model(tokens, tokens.roll(-1), torch.tensor([1, 0.5, 0.25, 0.25])).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and torch.isfinite(param.grad).all() and param.grad.abs().max() > 0, name


# -----------------------------------------------------------------------------
# Layer tables of any kind

def random_table(seed):
    """A layer table that breaks no rule, and other fields of a configuration, drawn at random."""
    rng = random.Random(seed)
    tables, layers = rng.randrange(3), []
    for i in range(rng.randrange(1, 6)):
        earlier, attention = range(-1, i), i == 0 or rng.random() < 0.7
        row = {"attention": attention, "skip": rng.choice(earlier) if rng.random() < 0.4 else -1}
        if attention:
            row |= {"window": rng.choice(("short", "long")), "ve": rng.randrange(-1, tables),
                    "attn_input": rng.choice(earlier) if rng.random() < 0.4 else -1,
                    "xsa": rng.random() < 0.5, "gate": rng.random() < 0.5}
        layers.append(row)
    numbers = sorted({row.get("ve", -1) for row in layers} - {-1})              # without gaps
    for row in layers:
        if row.get("ve", -1) >= 0:
            row["ve"] = numbers.index(row["ve"])
    if len(layers) > 1 and layers[-1]["attention"]:
        layers[-1]["mudd"] = rng.random() < 0.7
    return {"layers": layers, "gate_dim": rng.choice((0, 8)), "bigram_rows": rng.choice((0, 101)),
            "bigram_signs": rng.choice((0, 16)), "qk_dim": rng.choice((0, 8))}


@pytest.mark.parametrize("preset", [("train_gpt", "tiny")], ids=" ".join, indirect=True)
@pytest.mark.parametrize("seed", range(16))
def test_a_table_of_any_kind_makes_a_model(small_config, script, seed):
    """No parameter is there for nothing, no document sees another, and the optimizer knows every parameter."""
    cfg = small_config(**random_table(seed))
    model, lengths = disturb(script.GPT(cfg)), [40, 1, 60]
    optimizer = script.Optimizer(model)
    documents = random_documents(lengths, seed)
    for document, logits in zip(documents, logits_of(model, torch.cat(documents)).split(lengths)):
        torch.testing.assert_close(logits, logits_of(model, document), atol=2e-5, rtol=1e-5)
    tokens = torch.cat(documents)
    model.prefix_of.copy_(torch.arange(VOCAB) // 2)
    model(tokens, tokens.roll(-1), torch.tensor([1, 0.5, 0.25, 0.25])).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and torch.isfinite(param.grad).all() and param.grad.abs().max() > 0, name
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.step(1, script.schedule(cfg, 1))
    for name, param in model.named_parameters():
        assert torch.isfinite(param).all() and not torch.equal(param, before[name]), name


def test_tables_of_any_kind_have_each_kind_of_row():
    """Else the test above would say little."""
    tables = [random_table(seed) for seed in range(16)]
    rows = [row for table in tables for row in table["layers"]]
    assert {len(table["layers"]) for table in tables} == {1, 2, 3, 4, 5}
    for name in ("xsa", "gate", "mudd"):
        assert {row.get(name, False) for row in rows} == {False, True}, name
    assert all(any(row.get(name, -1) >= 0 for row in rows) for name in ("ve", "attn_input", "skip"))
    assert not all(row["attention"] for row in rows)
    assert {table["gate_dim"] for table in tables} == {0, 8} and {table["bigram_rows"] for table in tables} == {0, 101}
    assert any(row.get("mudd") and row.get("ve", -1) < 0 for row in rows)
    assert any(not any(row.get("ve", -1) >= 0 for row in table["layers"]) for table in tables)


# -----------------------------------------------------------------------------
# Parts

def attention_outputs(monkeypatch, script, model, alpha):
    """layer -> (core attention y, values v, what enters the output matrix), with all XSA gates at alpha."""
    cores, outputs = [], {}
    original, attention, gate_net = script.plain_attention, script.GPT.attention, script.GPT.gates

    def core(q, k, v, *rest):
        cores.append((original(q, k, v, *rest), v))
        return cores[-1][0]

    def recorded(self, i, *rest, **named):
        outputs[i] = attention(self, i, *rest, **named)
        return outputs[i]

    def gates(self, *args):
        found = gate_net(self, *args)
        return {name: torch.full_like(value, alpha) if name[0] == "xsa" else value for name, value in found.items()}
    monkeypatch.setattr(script, "plain_attention", core)
    monkeypatch.setattr(script.GPT, "attention", recorded)
    monkeypatch.setattr(script.GPT, "gates", gates)
    with torch.no_grad():
        model.attn_vo[1::2] = torch.eye(model.cfg.model_dim)
        model.attn_scales[:, 1] = 1
    logits_of(model, random_documents([80])[0])
    monkeypatch.undo()
    return {i: (y, v, outputs[i].view_as(y)) for (i, _), (y, v) in zip(outputs.items(), cores, strict=True)}


def test_xsa_removes_what_lies_along_the_value(monkeypatch, script, model):
    layers = [i for i, layer in enumerate(model.cfg.layers) if layer.xsa and not layer.gate]
    for i, (y, v, out) in attention_outputs(monkeypatch, script, model, alpha=50.0).items():
        if i in layers:
            cosine = F.cosine_similarity(out, v, dim=-1)
            assert cosine[1:].abs().max() < 1e-4 < F.cosine_similarity(y, v, dim=-1)[1:].abs().max()
            assert out[0].norm() < 1e-3 * y[0].norm()  # the first token sees its own value alone
    for i, (y, _, out) in attention_outputs(monkeypatch, script, model, alpha=0.0).items():
        if i in layers:
            torch.testing.assert_close(out, y, atol=1e-6, rtol=1e-6)
    assert layers


def test_no_token_of_a_bigram_comes_from_another_document(model):
    """Two streams that differ in the last token of the first document alone."""
    first, second = random_documents([20, 30])
    other = first.clone()
    other[-1] = (other[-1] + 1) % BOS
    a, b = (logits_of(model, torch.cat([document, second]))[20:] for document in (first, other))
    assert torch.equal(a, b)


def test_in_bf16_the_loss_stays_close(cfg, script):
    tokens = torch.cat(random_documents([100, 60]))
    losses = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = script.GPT(replace(cfg, precision=precision))
        if precision == "fp32":
            full = disturb(model, scale=0.05)
        else:
            model.load_state_dict(full.state_dict())
        losses.append(model(tokens, tokens.roll(-1)).item() / 160)
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]
