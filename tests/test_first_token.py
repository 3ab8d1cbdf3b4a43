"""Reading a prompt by graphs (sample.PromptGraphs) gives the text that reading it in one go gives, for every model."""
import importlib
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt2  # noqa: E402
import sample  # noqa: E402

BOS, VOCAB, MOST = 256, 257, 120
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = {"model_dim": 48, "head_dim": 12, "vocab_size": VOCAB, "bos_id": BOS, "attention": "plain", "compile": False,
          "precision": "fp32"}
TABLES = {"qk_dim": 8, "mlp_dim": 96, "gate_dim": 8, "bigram_rows": 509, "bigram_signs": 32, "final_windows": (8, 24)}
PLAIN = {"depth": 4, "windows": (8, 24), "width_rule": "none"}
MODELS = {
    "train_gpt": TABLES,
    "train_gpt_medium": TABLES,
    "train_gpt_simple": PLAIN,
    "train_gpt_moe": PLAIN | {"num_experts": 3, "top_k": 2},
    "train_gpt_long": PLAIN | {"far_layers": (1, 2), "far_period": 2},
    "gpt2": {},
}


def random_model(name):
    torch.manual_seed(0)
    if name == "gpt2":
        model = gpt2.GPT2(gpt2.Config(vocab_size=VOCAB, bos_id=BOS, context_tokens=MOST, num_layers=2, num_heads=4,
                                     model_dim=48, norm_eps=1e-5))
        model.wte.weight.data *= 0.1                # or it repeats what it reads
    else:
        module = importlib.import_module(name)
        cfg = replace(module.PRESETS["tiny" if "tiny" in module.PRESETS else "speedrun"], **NARROW | MODELS[name])
        model = module.GPT(cfg)
        if name in ("train_gpt", "train_gpt_medium"):
            model.set_stage(len(cfg.stages) - 1, final=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.2 * torch.randn(param.shape, generator=generator)
    return model.requires_grad_(False).to(DEVICE)


def like_a_graph(engine, run):
    """Engine.capture for a CPU: it tries `run` as often, and like a CUDA graph it keeps no tensor alive."""
    for _ in range(3):
        run()
    method = weakref.WeakMethod(run)
    return lambda: method()()


def prompt(length):
    ids = torch.randint(0, BOS, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return [BOS, *ids[1:]]


@pytest.mark.parametrize("name", MODELS)
def test_every_length_of_a_prompt(monkeypatch, name):
    """Of one row and of three; after a longer prompt a shorter one, of which nothing may remain."""
    model = random_model(name)
    if DEVICE == "cpu":
        monkeypatch.setattr(sample.Engine, "capture", like_a_graph)
    monkeypatch.setattr(sample.PromptGraphs, "PART", 16)
    monkeypatch.setattr(sample.PromptGraphs, "MOST", 64)
    prompts = [prompt(length) for length in (64, 1, 15, 50, 16, 17, 33, 65, 2)]
    draw = sample.Draw(1.0, top_k=20, repetition_penalty=1.1)
    for batch in (1, 3):
        plain, ours = (sample.Engine(model, VOCAB, draw, batch, MOST) for _ in range(2))
        ours.reading = sample.PromptGraphs(ours, MOST)
        read, seen = [], set()
        replay = ours.reading.replay
        monkeypatch.setattr(ours.reading, "replay", lambda ids: (read.append(len(ids)), replay(ids)))
        for number in range(len(prompts)):
            rows = [(number, seed) for seed in range(batch)]
            wanted, found = (list(engine.steps(prompts, rows, 12)) for engine in (plain, ours))
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted], (batch, len(prompts[number]))
            torch.testing.assert_close(torch.tensor([logprobs for _, logprobs in found]),
                                       torch.tensor([logprobs for _, logprobs in wanted]), atol=1e-3, rtol=1e-3)
            seen |= {token for tokens, _ in found for token in tokens}
        assert read == [64, 1, 15, 50, 16, 17, 33, 2]               # a longer one is read in one go, as before
        assert len(seen) > 20, seen


def test_two_prompts_at_once_are_read_in_one_go(monkeypatch):
    model = random_model("train_gpt_simple")
    if DEVICE == "cpu":
        monkeypatch.setattr(sample.Engine, "capture", like_a_graph)
    plain, ours = (sample.Engine(model, VOCAB, sample.Draw(0.0), 2, MOST) for _ in range(2))
    ours.reading = sample.PromptGraphs(ours, MOST)
    monkeypatch.setattr(ours.reading, "replay", None)
    prompts = [prompt(9), prompt(30)]
    wanted, found = (list(engine.steps(prompts, [(0, 0), (1, 0)], 9)) for engine in (plain, ours))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
