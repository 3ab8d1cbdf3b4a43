"""GPT.decode of every training script: what it gives for the next tokens is what forward gives on the whole document.

The layer table of each preset, made narrow, with random values in every parameter; against forward in fp32 and, on a
GPU, in bf16. Run: python -m pytest tests/test_decode.py
"""
import importlib
import operator
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS, SMALL_LAYERS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample  # noqa: E402
import train_gpt  # noqa: E402

BOS, VOCAB = 256, 257
MODELS = [("train_gpt", "tiny"), *((script, "speedrun") for script in SCRIPTS)]     # script, preset
NARROW = {"model_dim": 48, "head_dim": 12, "qk_dim": 8, "mlp_dim": 96, "gate_dim": 8, "bigram_rows": 509,
          "bigram_signs": 32, "final_windows": (8, 24), "vocab_size": VOCAB, "bos_id": BOS, "attention": "plain",
          "compile": False, "precision": "fp32"}
THREE_LAYERS = tuple(train_gpt.Layer(**row) for row in SMALL_LAYERS)                # each kind of layer once
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def random_model(script, preset, device="cpu", head=1.0, **changes):
    """The model of a preset with every parameter away from its initial value, in its final windows."""
    module = importlib.import_module(script)
    cfg = replace(module.PRESETS[preset], **NARROW | changes)
    with torch.device(device):
        model = module.GPT(cfg).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(1)
    for param in model.parameters():
        param += (0.2 if param.dim() < 3 else 0.02) * torch.randn(param.shape, generator=generator, device=device)
    model.lm_head.copy_(head * torch.randn(model.lm_head.shape, generator=generator, device=device))
    model.set_stage(len(cfg.stages) - 1, final=True)
    model.attn_scale.mul_(3)                                           # sharper, so that each visible key counts
    return model


@pytest.fixture(scope="module", params=MODELS, ids=" ".join)
def model(request):
    return random_model(*request.param)


def random_tokens(*shape, seed=0, high=BOS):
    """Tokens whose rows begin with BOS."""
    tokens = torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    tokens[..., 0] = BOS
    return tokens


def decode_in_calls(model, cache, tokens, sizes):
    """Logits (B, T, V) of tokens (B, T), which are fed in calls of the given sizes, and one by one after those."""
    sizes = [*sizes, *[1] * (tokens.size(1) - sum(sizes))]
    return torch.cat([model.decode(part, cache) for part in tokens.split(sizes, 1)], 1)


def assert_close(logits, expected):
    assert logits.dtype == torch.float32 and logits.shape == expected.shape
    assert expected.std() > 1                                          # logits that say something
    assert (logits - expected).abs().max() <= 1e-4


def test_every_parameter_matters_in_what_is_compared(model):
    tokens = random_tokens(100)
    before = model(tokens)
    for name, param in model.named_parameters():
        kept = param.clone()
        param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(2)))
        assert (model(tokens) - before).abs().max() > 1e-3, name
        param.copy_(kept)


@pytest.mark.parametrize("prefill, chunk, length", [(1, 1, 45), (7, 32, 64), (300, 256, 330), (300, 37, 304)])
def test_logits_equal_those_of_forward_on_the_whole_sequence(model, prefill, chunk, length):
    tokens = random_tokens(length)                                     # both windows are passed, and the rings' ends
    cache = model.new_cache(1, length, chunk)
    assert_close(decode_in_calls(model, cache, tokens[None], [prefill])[0], model(tokens))


def test_several_tokens_a_call_and_rows_of_several_documents(model):
    tokens = random_tokens(3, 90, seed=1)
    tokens[0, [30, 31, 70]] = BOS
    tokens[1, 2] = BOS
    tokens[2, 0] = 5                                                   # a stream need not begin with one
    cache = model.new_cache(3, 90, 16)
    logits = decode_in_calls(model, cache, tokens, [1, 2, 5, 40, 1, 16, 17, 3])
    for row, logits in zip(tokens, logits):
        assert_close(logits, model(row))


@pytest.mark.parametrize("chunk", [5, 24])
def test_rows_of_different_lengths_are_as_alone(model, chunk):
    """Calls with padding, rows that rest, then single tokens of which some are not real."""
    rows = [random_tokens(length, seed=length) for length in (84, 35, 38, 79)]
    fed, found = [0] * 4, [[] for _ in rows]
    cache = model.new_cache(4, 84, chunk)
    for lengths in [(5, 1, 34, 17), (32, 0, 1, 2), (0, 3, 0, 0), (12, 12, 0, 12), *[(1, 1, 1, 1)] * 3,
                    *[(1, 0, 0, 1)] * 8, (24, 16, 0, 37)]:
        tokens = torch.full((4, max(lengths)), 7, dtype=torch.int32)
        for b, n in enumerate(lengths):
            tokens[b, :n] = rows[b][fed[b]:fed[b] + n]
            fed[b] += n
        logits = model.decode(tokens, cache, torch.tensor(lengths))
        for b, n in enumerate(lengths):
            found[b].append(logits[b, :n])
    assert fed == [len(row) for row in rows]
    for row, logits in zip(rows, found):
        assert_close(torch.cat(logits), model(row))


@pytest.mark.parametrize("changes", [
    {"layers": (train_gpt.Layer(window="long"),)}, {"bigram_rows": 0}, {"bigram_signs": 0}, {"gate_dim": 0},
    {"layers": (train_gpt.Layer(), train_gpt.Layer(attention=False), train_gpt.Layer(window="long", mudd=True))}],
    ids=["one layer", "no bigrams", "no signs", "no gate nets", "few parts"])
def test_a_model_without_some_parts_decodes_as_it_computes(changes):
    model = random_model("train_gpt", "tiny", **{"layers": THREE_LAYERS} | changes)
    tokens = random_tokens(2, 40)
    tokens[0, 20] = BOS
    logits = decode_in_calls(model, model.new_cache(2, 40, 8), tokens, [1, 11, 8])
    for row, logits in zip(tokens, logits):
        assert_close(logits, model(row))


def test_last_gives_the_logits_of_each_rows_last_token(model):
    tokens, lengths = random_tokens(3, 70), torch.tensor([70, 1, 40])
    last = model.decode(tokens, model.new_cache(3, 70, 32), lengths, last=True)
    for row, n, logits in zip(tokens, lengths, last):
        assert_close(logits, model(row[:n])[-1:])
    assert_close(model.decode(tokens, model.new_cache(3, 70, 32), last=True)[:, 0],
                 torch.stack([model(row)[-1] for row in tokens]))


def test_a_cache_is_filled_from_rows_of_another(model):
    tokens, lengths = random_tokens(3, 60), torch.tensor([60, 4, 20])
    prompts = model.new_cache(3, 60, 25)
    model.decode(tokens, prompts, lengths)
    cache, index = model.new_cache(4, 200, 1), torch.tensor([2, 0, 0, 1])
    model.decode(random_tokens(4, 33, seed=5), cache)                  # of which nothing may remain
    cache.fill(prompts, index)
    more = random_tokens(4, 13, seed=6)[:, 1:]
    logits = decode_in_calls(model, cache, more, [])
    for row, new, logits in zip(index, more, logits):
        whole = torch.cat([tokens[row, :lengths[row]], new])
        assert_close(logits, model(whole)[-12:])


def test_a_cache_takes_what_it_was_made_for_and_refuses_more(model):
    cache, tokens = model.new_cache(2, 40, 8), random_tokens(2, 40)
    model.decode(tokens[:, :39], cache, torch.tensor([39, 3]))
    with pytest.raises(ValueError, match="42 tokens .* made for 40"):
        model.decode(tokens[:, :3], cache)
    model.decode(tokens[:, :30], cache, torch.tensor([1, 30]))


def test_a_step_reads_no_more_than_windows_and_text(model):
    layers = [layer for layer in model.cfg.layers if layer.attention]
    short, long = model.cfg.final_windows
    cache = model.new_cache(3, 500, 1)
    token = 4 * model.cfg.num_heads * (model.cfg.key_dim + model.cfg.head_dim)      # keys and values in fp32
    assert cache.bytes_read(7) == 3 * len(layers) * 7 * token
    assert cache.bytes_read(500) == sum(3 * token * (1 + {"short": short, "long": long}[layer.window])
                                        for layer in layers)
    for cache, most in ((cache, long), (model.new_cache(3, 12, 1), 12)):  # nor does it hold much more
        assert max(keys.size(1) for keys in cache.keys.values()) <= most + 16


def test_in_bf16_decoding_is_as_exact_as_forward(model):
    tokens = random_tokens(140)
    exact = model(tokens)
    script = type(model).__module__
    low = importlib.import_module(script).GPT(replace(model.cfg, precision="bf16")).requires_grad_(False)
    low.set_stage(len(low.cfg.stages) - 1, final=True)
    low.load_state_dict(model.state_dict())
    errors = [(logits - exact).abs().mean() for logits in (low(tokens), decode_in_calls(
        low, low.new_cache(1, 140, 64), tokens[None], [110])[0])]
    assert errors[1] < 1.2 * errors[0]


def test_a_step_compiles_to_one_graph():
    """By torch.compile's front end alone; Model and Decoding are the same in every script."""
    model, tokens = random_model("train_gpt", "tiny", layers=THREE_LAYERS), random_tokens(2, 12)
    cache, calls = model.new_cache(2, 12, 1), []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph
    step = torch.compile(lambda token: model.decode(token, cache), backend=backend, fullgraph=True, dynamic=False)
    logits = torch.cat([step(token) for token in tokens.split(1, 1)], 1)
    assert len(calls) == 1
    for row, logits in zip(tokens, logits):
        assert_close(logits, model(row))


def test_with_one_row_compiled_products_are_sums(monkeypatch):
    """By torch.compile's front end alone: the same tokens as step by step, and no product is left."""
    graphs, real, written = [], torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(
        function, backend=lambda graph, _: graphs.append(graph) or graph, **how))
    model = random_model("train_gpt", "tiny", layers=THREE_LAYERS)
    for compiled in (False, True):
        engine = sample.Engine(model, VOCAB, sample.Draw(), 1, 40, compiled)
        written.append(list(zip(*engine.steps([[BOS, 5, 6]], [(0, 1)], 30))))
    assert written[0][0] == written[1][0] and len(set(map(tuple, written[0][0]))) > 10 and len(graphs) == 1
    torch.testing.assert_close(torch.tensor(written[0][1]), torch.tensor(written[1][1]), rtol=1e-4, atol=1e-5)
    products = {F.linear, operator.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul}
    matrices = [node.args[1] for node in graphs[0].graph.nodes if node.target in products]
    assert not [matrix for matrix in matrices if matrix.meta["example_value"].dim() == 2]


@pytest.mark.parametrize("shape", [(7,), (1, 7), (1, 1, 7), (2, 7)])
def test_product_sums_are_products(shape):
    row, weight, bias = torch.randn(shape), torch.randn(5, 7), torch.randn(5)
    calls = (lambda: F.linear(row, weight), lambda: F.linear(row, weight, bias), lambda: row @ weight.T,
             lambda: F.linear(row, weight, bias=bias), lambda: row @ weight[0])
    for call in calls:
        with sample.product_sums()():
            found = call()
        torch.testing.assert_close(found, call())


# -----------------------------------------------------------------------------
# On a GPU, as wide as the model is

WIDE = {"bigram_rows": 10_007, "bigram_signs": 512, "final_windows": (48, 160), "vocab_size": 50_304, "bos_id": 50_256,
        "precision": "bf16"}
PROMPTS = [[50_256, *random_tokens(3 + 11 * n, seed=n, high=50_000).tolist()[1:]] for n in range(20)]


def wide_model(script, preset, precision):
    """The same numbers in either precision: those of bf16."""
    full = importlib.import_module(script).PRESETS["speedrun"]
    width = {name: getattr(full, name) for name in ("model_dim", "head_dim", "qk_dim", "mlp_dim", "gate_dim")}
    model = random_model(script, preset, "cuda", head=0.2, **WIDE, **width)
    if precision == "bf16":
        return model
    exact = type(model)(replace(model.cfg, precision=precision)).requires_grad_(False)
    exact.set_stage(len(exact.cfg.stages) - 1, final=True)
    exact.load_state_dict(model.state_dict())
    return exact.to("cuda")


@needs_gpu
@pytest.mark.parametrize("script, preset", MODELS)
def test_greedy_text_in_bf16_is_that_of_full_recomputation(script, preset, capsys):
    """Where it is not, the two best logits are closer than bf16's rounding error, which fp32 tells."""
    low, exact = (wide_model(script, preset, precision) for precision in ("bf16", "fp32"))
    engine = sample.Engine(low, 50_257, sample.Draw(temperature=0), batch=20, max_tokens=500)
    steps = engine.steps(PROMPTS, [(n, 0) for n in range(20)], 200)
    texts = torch.tensor([tokens for tokens, _ in steps]).T
    others, worst = 0, 0.0
    for prompt, text in zip(PROMPTS, texts):
        tokens = torch.cat([torch.tensor(prompt), text]).to("cuda", torch.int32)
        full, reference = (model(tokens)[len(prompt) - 1:-1, :50_257] for model in (low, exact))
        rounding = (full - reference).abs().max()
        gap = full.amax(1) - full.gather(1, text.to("cuda")[:, None])[:, 0]
        others, worst = others + int((gap > 0).sum()), max(worst, float(gap.max() / rounding))
        assert gap.max() <= 2 * rounding
    with capsys.disabled():
        print(f"\n{script} {preset}: {others} of {texts.numel()} tokens are another one of two near ties, at most "
              f"{worst:.2f} of the rounding error apart")
    assert others < 0.2 * texts.numel() and len(set(texts.flatten().tolist())) > 20


@needs_gpu
@pytest.mark.parametrize("batch, compile", [(3, False), (3, True), (1, True)])     # of one row products are sums
@pytest.mark.parametrize("script, preset", MODELS[:1])
def test_the_captured_step_is_the_step(monkeypatch, script, preset, batch, compile):
    """Tokens drawn from few, so that a graph that kept an old position, seed or key would show at once."""
    model, draw = wide_model(script, preset, "fp32"), sample.Draw(1.0, top_k=40, top_p=0.9, repetition_penalty=1.2)
    captured = sample.Engine(model, 50_257, draw, batch, 400, compile)
    monkeypatch.setattr(sample.Engine, "capture", lambda self, run: run)
    plain = sample.Engine(model, 50_257, draw, batch, 400)
    for rows in ([(0, 1), (5, 1), (9, 2)][:batch], [(7, 3), (7, 4)][:batch]):       # the second time it starts anew
        ours, theirs = (list(engine.steps(PROMPTS, rows, 100)) for engine in (captured, plain))
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        torch.testing.assert_close(*(torch.tensor([logprobs for _, logprobs in steps]) for steps in (ours, theirs)),
                                   atol=1e-3, rtol=1e-3)
        assert len({token for tokens, _ in ours for token in tokens}) > 20
