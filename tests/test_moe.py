"""train_gpt_moe.py: routing, the products of the experts, their load, and the experts of several ranks.

Against: train_gpt_simple.py for one expert, a plain loop over the experts for many, forward for decode, one rank for
several, and the tools that read a run. Run: python -m pytest tests/test_moe.py
"""
import json
import math
import re
import shlex
import signal
import sys
import xml.dom.minidom
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BOS, ROOT, VOCAB, as_flags, assert_close, join, only_folder, rank_starter, stream
from safetensors.torch import load_file, save_file

import sample
import train_gpt_moe as moe
import train_gpt_simple as simple

SMALL = {"preset": "tiny", "depth": 2, "model_dim": 32, "head_dim": 8, "windows": (8, 24), "pack_tokens": 128,
         "val_tokens": 1500, "val_stream_tokens": 512, "batch_tokens": 512, "num_iterations": 6, "val_every": 0,
         "width_rule": "none", "device": "cpu", "expert_layers": 1, "num_experts": 4, "top_k": 1}
LEARNED = {"router": "learned"}
KINDS = [{}, {"top_k": 3, "mlp": "swiglu"}, LEARNED, LEARNED | {"top_k": 2, "shared_dim": 32},
         {"router": "hash", "top_k": 2}]


def flags(data, **changes):
    return as_flags(SMALL | {"train_files": f"{data}/train_*.bin", "val_files": f"{data}/val_*.bin"} | changes)


def config(script=moe, **changes):
    """The small configuration with everything filled in, without the fields that the script lacks."""
    fields = SMALL | {"vocab_size": VOCAB, "bos_id": BOS, "compile": False, "attention": "plain"} | changes
    default = script.PRESETS["tiny"]
    return replace(default, **{name: value for name, value in fields.items() if hasattr(default, name)})


def moved(cfg, script=moe):
    """A model with every parameter, and the centers of the routers, away from their initial values."""
    model, generator = script.GPT(cfg), torch.Generator().manual_seed(1)
    centers = [buffer for name, buffer in model.named_buffers() if name.endswith("center")]
    with torch.no_grad():
        for param in [*model.parameters(), *centers]:
            param += 0.1 * torch.randn(param.shape, generator=generator)
    return model


@pytest.fixture
def script():
    return moe


def as_compiled(monkeypatch):
    """Experts in fp32 are computed as in a compiled model: by a loop."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


# -----------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("kind", [{"num_experts": 1}, {"num_experts": 1, "mlp": "swiglu"}, {"expert_layers": 0}],
                         ids=str)
def test_one_expert_is_the_dense_model(kind):
    tokens = stream(90, 60)
    dense, one = (script.GPT(config(script, **kind)) for script in (simple, moe))
    optimizers = [script.make_optimizers(model) for script, model in ((simple, dense), (moe, one))]
    machine = simple.Machine(torch.device("cpu"), 0, 1, "cpu")
    for step in range(3):
        pack = tokens, tokens.roll(-1)
        losses = [script.training_step(model, both, [pack], step, model.cfg, machine, False)[0].item()
                  for script, model, both in zip((simple, moe), (dense, one), optimizers)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert one.matmul_parameters == dense.matmul_parameters


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_grouped_products_equal_a_loop_forward_and_gradients(kind, monkeypatch):
    tokens, models = stream(100, 47), [moved(config(**kind)) for _ in range(2)]
    losses = [models[0](tokens, tokens.roll(-1))]
    as_compiled(monkeypatch)
    monkeypatch.setattr(moe.F, "grouped_mm", None)
    losses.append(models[1](tokens, tokens.roll(-1)))
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for grouped, loop in zip(*(model.parameters() for model in models)):
        assert_close(grouped.grad, loop.grad, 1e-5)


def test_an_expert_without_tokens_has_no_gradient():
    model, tokens = moved(config(num_experts=8, router="hash", expert_layers=1)), torch.full((20,), 7)
    model(tokens, tokens).backward()
    used = [grad.any().item() for grad in model.experts[0].fc.grad]
    assert sum(used) == 1 and model.experts[0].load.tolist().count(0) == 8


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_learned_router_chooses_the_best_by_score_and_bias(top_k):
    bank = moved(config(top_k=top_k, **LEARNED)).experts[0]
    bank.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    u = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    context = type("Context", (), {"training": False})
    chosen, weights, logits = bank.choose(u, context)
    assert (chosen[:, 0] == 1).all()                # the bias decides who works, not how much it counts
    others = logits.detach().index_fill(1, torch.tensor([1]), -math.inf)
    assert chosen[:, 1:].equal(others.topk(top_k - 1, 1).indices)
    scores = logits.sigmoid().gather(1, chosen)
    assert_close(weights, 2 * scores if top_k == 1 else top_k * scores / scores.sum(1, keepdim=True), 1e-6)
    assert_close(logits.mean(1), torch.zeros(50), 1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_centroids_choose_the_nearest_by_angle_and_bias(top_k):
    bank = moved(config(top_k=top_k)).experts[0]
    u = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    context = type("Context", (), {"training": False})
    cosines = torch.cosine_similarity((u - bank.center)[:, None], bank.centroids[None], dim=2)
    chosen, weights, _ = bank.choose(u, context)
    assert chosen.equal(cosines.topk(top_k, 1).indices) and chosen.unique().tolist() == [0, 1, 2, 3]
    bank.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    chosen, weights, _ = bank.choose(u, context)
    assert (chosen[:, 0] == 1).all() and (weights == 1).all() and not bank.sums.any()


def test_centroids_follow_the_tokens_that_chose_them():
    """Over all packs of a step. The center is the mean of the first step's inputs, then it moves by a tenth."""
    model, center = moved(config(depth=1, pack_tokens=64)), None
    bank, optimizers = model.experts[0], moe.make_optimizers(model)
    machine, inputs = moe.Machine(torch.device("cpu"), 0, 1, "cpu"), []
    bank.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    for step in range(3):
        text = (stream(512) + step) % VOCAB
        old_center, old_centroids, old_bias = (value.clone() for value in (bank.center, bank.centroids, bank.bias))
        inputs.clear()
        packs = [(part, part.roll(-1)) for part in text.split(64)]
        moe.training_step(model, optimizers, packs, step, model.cfg, machine, False)
        u = torch.cat(inputs)
        center = u.mean(0) if step == 0 else 0.9 * center + 0.1 * u.mean(0)
        direction = torch.nn.functional.normalize(u - old_center, dim=1)
        owner = (direction @ old_centroids.mT + old_bias).argmax(1)
        for i in range(4):
            wanted = old_centroids[i] + 0.1 * torch.nn.functional.normalize(direction[owner == i].sum(0), dim=0)
            assert (owner == i).any()
            assert_close(bank.centroids[i], wanted / wanted.norm(), 1e-4)
        assert_close(bank.center, center, 1e-4)


@pytest.mark.parametrize("kind", [*KINDS, {"capacity": 0.5, "jitter": 0.1}], ids=str)
def test_nothing_looks_at_later_tokens_or_other_documents(kind):
    """In training, too, where the first tokens of a pack have a place in a full expert."""
    model, tokens = moved(config(**kind)), stream(70, 1, 60)
    together, later = model(tokens), tokens.clone()
    later[100:] = 5
    assert_close(model(later)[:100], together[:100], 1e-3)
    with torch.no_grad():
        alone = torch.cat([model(document) for document in tokens.split([70, 1, 60])])
        assert_close(model(tokens), alone, 1e-3)


@pytest.mark.parametrize("kind", [*KINDS, {"capacity": 0.5}], ids=str)
def test_decoding_equals_forward(kind):
    model = moved(config(**kind)).requires_grad_(False).eval()
    tokens = torch.stack([stream(40), stream(40).flip(0).roll(1)])
    cache = model.new_cache(2, 40)
    found = torch.cat([model.decode(part, cache) for part in tokens.split([5, 1, 30, 4], 1)], 1)
    assert_close(found, torch.stack([model(row) for row in tokens]), 1e-3)


def test_a_full_expert_drops_the_last_choices_and_counts_them():
    model, tokens = moved(config(capacity=0.5, top_k=2, expert_layers=2)), stream(96)
    bank, seen = model.experts[0], {}
    bank.register_forward_hook(lambda module, inputs, output: seen.update(u=inputs[0], context=inputs[1], y=output))
    model(tokens)
    counts, dropped = bank.load[:-1], bank.load[-1].item()
    assert counts.sum() == 192 and dropped == (counts - 24).clamp(min=0).sum() > 0
    chosen, weights, _ = bank.choose(seen["u"], seen["context"])
    for i in range(4):                              # 24 places of an expert are half of the mean load
        position = (chosen == i).flatten().nonzero().flatten()[24:]
        weights.view(-1)[position] = 0
    assert_close(seen["y"], bank.loop(seen["u"], chosen, weights), 1e-5)


def test_jitter_acts_in_training_alone_and_is_the_same_each_time():
    tokens, plain, noisy = stream(100), moved(config()), moved(config(jitter=0.2))
    assert not torch.equal(plain(tokens), noisy(tokens)) and torch.equal(noisy(tokens), noisy(tokens))
    with torch.no_grad():
        assert torch.equal(plain(tokens), noisy(tokens))


def test_losses_of_the_router_against_their_definitions():
    cfg = config(balance="loss", balance_rate=0.3, router_z=0.2, expert_layers=2, **LEARNED)
    model, tokens = moved(cfg), stream(80)
    seen = {}
    model.experts[0].register_forward_hook(lambda module, inputs, output: seen.update(u=inputs[0], context=inputs[1]))
    targets = tokens.roll(-1)
    total = model(tokens, targets).item()
    chosen, _, logits = model.experts[0].choose(seen["u"], seen["context"])
    fractions = torch.bincount(chosen.flatten(), minlength=4) / 80
    wanted = (logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)).mean(0)
    extra = 80 * 0.3 * 4 * (fractions * wanted).sum() + 0.2 * logits.logsumexp(1).square().sum()
    with torch.no_grad():
        assert total - model(tokens, targets).item() == pytest.approx(extra.item(), rel=1e-4)


def test_muon_orthogonalises_each_expert_alone():
    """However different their gradients are: all singular values of each update are about 1. Routers have AdamW."""
    model = moe.GPT(config(num_experts=3, **LEARNED))
    muon, adamw = moe.make_optimizers(model)
    bank, generator = model.experts[0], torch.Generator().manual_seed(0)
    before = bank.fc.detach().clone()
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    bank.fc.grad *= torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    for group in muon.param_groups:
        group |= {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    muon.step()
    moves = torch.linalg.svdvals(before - bank.fc.detach())
    assert moves.shape == (3, 32) and ((moves / 2 - 1).abs() < 0.25).all()      # 128 x 32: with a factor of 2
    routers = {id(bank.router.weight) for bank in model.experts}
    assert routers == {id(param) for param in adamw.param_groups[-1]["params"]}
    assert routers.isdisjoint(id(param) for group in muon.param_groups for param in group["params"])


# -----------------------------------------------------------------------------
# Compiled

@pytest.mark.parametrize("kind", [{"precision": "bf16", "top_k": 2},
                                  LEARNED | {"capacity": 1.25, "jitter": 0.1, "balance": "loss", "router_z": 1e-3}],
                         ids=str)
def test_forward_and_backward_compile_to_one_graph_for_all_choices(kind):
    cfg, graphs = config(depth=1, num_experts=3, **kind), []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = moved(cfg)
    compiled = torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
    for lengths in ((60, 36), (96,)):
        tokens = stream(*lengths)
        loss = compiled(tokens, tokens.roll(-1))
        loss.backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1] and model.experts[0].load[:-1].sum() == 192 * cfg.top_k
    assert loss.item() == pytest.approx(model(tokens, tokens.roll(-1)).item(), rel=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [{}, LEARNED | {"top_k": 2, "capacity": 1.25, "jitter": 0.1}], ids=str)
def test_a_step_does_not_wait_for_the_gpu(kind):
    machine = moe.Machine(torch.device("cuda"), 0, 1, "cuda")
    cfg = config(precision="bf16", attention="flex", compile=True, head_dim=32, model_dim=128, pack_tokens=1024, **kind)
    model = moe.GPT(cfg).cuda()
    forward, optimizers = torch.compile(model, dynamic=False, fullgraph=True), moe.make_optimizers(model)
    packs = [(stream(n, 1024 - n).cuda().int(), stream(n, 1024 - n).roll(-1).cuda()) for n in (300, 500)]
    moe.training_step(forward, optimizers, packs, 0, cfg, machine, False)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")         # whatever waits raises RuntimeError
    try:
        totals = [moe.training_step(forward, optimizers, packs, step, cfg, machine, False) for step in (1, 2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(totals).isfinite().all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


# -----------------------------------------------------------------------------
# The load

@pytest.mark.parametrize("router, top_k", [("centroids", 1), ("learned", 1), ("learned", 2)])
def test_the_bias_keeps_experts_busy_and_without_it_they_are_not(router, top_k):
    """On a router that prefers one expert at the start. Centroids find a balance of this text alone, but later."""
    tokens, busiest = [stream(256) + i for i in range(4)], {}
    for balance in ("bias", "none"):
        cfg = config(depth=1, router=router, top_k=top_k, balance=balance, balance_rate=0.03, num_iterations=400,
                     batch_tokens=256)
        model, machine = moe.GPT(cfg), moe.Machine(torch.device("cpu"), 0, 1, "cpu")
        preferred = model.embed.weight.detach().mean(0).sign()
        if router == "learned":
            model.experts[0].router.weight.data[0] += 0.8 * preferred
        else:
            model.experts[0].centroids[1:] = -preferred / preferred.norm()      # all equal: the first of them wins
        optimizers, loads = moe.make_optimizers(model), []
        for step in range(40):
            text = tokens[step % 4] % VOCAB
            pack = text, text.roll(-1)
            *load, dropped = moe.training_step(model, optimizers, [pack], step, cfg, machine, False)[2:].tolist()
            assert sum(load) == top_k * 256 and dropped == 0
            loads.append(load)
        late = loads[-20:] if router == "learned" else loads[5:16]
        busiest[balance] = max(np.mean(late, axis=0)) / (top_k * 64)
    assert busiest["bias"] < 1.15 < 1.2 < busiest["none"], busiest


# -----------------------------------------------------------------------------
# Runs

@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a finished run, whose layer 1 has experts."""
    logs, patch = tmp_path_factory.mktemp("logs"), pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["train_gpt_moe.py", *flags(data, out_dir=logs, expert_layers=2, top_k=2)])
    assert moe.main() == 0
    patch.undo()
    return only_folder(logs)


def test_what_a_run_leaves_behind(finished):
    info, log = json.loads((finished / "run.json").read_text()), (finished / "log.txt").read_text().split("=" * 100)[1]
    losses = [point["val_loss"] for point in info["val_losses"]]
    assert info["status"] == "finished" and losses[0] == pytest.approx(math.log(320), abs=0.02)
    assert losses[-1] < losses[0] - 0.1
    table = re.search(r"^load of the experts over the mean, last 6 steps: .*\n  layer 1: (.*)$", log, re.M)
    assert sum(json.loads(table[1])) == pytest.approx(4, abs=0.01) and "dropped 0.000000" in table[0]
    lines = xml.dom.minidom.parse(str(finished / "load.svg")).getElementsByTagName("polyline")
    assert len(lines) == 4 and all(len(line.getAttribute("points").split()) == 6 for line in lines)


def test_sample_reads_its_checkpoint(finished):
    model, _, meta = sample.load_checkpoint(finished / "checkpoint" / "step_000006", "cpu")
    assert meta["script"] == "train_gpt_moe" and model.experts[0].bias.any()
    prompt, engine = [BOS, *b"the old "], sample.Engine(model, VOCAB, sample.Draw(0.0), 2, 32)
    drawn = [tokens[0] for tokens, _ in engine.steps([prompt], [(0, 0), (0, 1)], 8)]
    wanted = list(prompt)
    for _ in drawn:
        wanted.append(int(model(torch.tensor(wanted))[-1, :VOCAB].argmax()))
    assert drawn == wanted[len(prompt):]


def test_the_metric_guard_passes():
    """With fields that the default configuration, which test_metric.py tries, leaves off."""
    sys.path.insert(0, str(ROOT / "records"))
    import guard
    guard.check_script(moe, json.loads(json.dumps(vars(config(top_k=2, capacity=1.0, jitter=0.1)))))


SHARED = {"capacity": 0.9, "jitter": 0.01, "balance_rate": 0.02}        # drops some choices
PLAN = {1: [0, 1], 2: [0, 2], 3: [0], 4: [2]}       # ranks -> how many share experts; 0: no expert has a capacity


def train_on_ranks(data, folder, sharing):
    """On one rank of several: what train() does in three steps, for each number of ranks that share experts.

    Rank 0 writes losses and load in FOLDER/<sharing>.json, and the whole weights in FOLDER/<sharing>.safetensors.
    """
    machine = moe.setup_machine(moe.PRESETS["tiny"])
    shards = moe.open_shards(f"{data}/train_*.bin", f"{data}/val_*.bin")
    for share in sharing:
        changes = SHARED | {"expert_ranks": share} if share else {}
        argv = flags(data, num_iterations=3, batch_tokens=1536, top_k=2, **changes)
        cfg = moe.resolve_config(moe.parse_config(argv), machine, shards[0])
        model = moe.GPT(cfg)
        model.share_experts()
        optimizers, steps = moe.make_optimizers(model), []
        packs = moe.streams(moe.training_documents(cfg, shards[0]), cfg.pack_tokens, BOS, whole=False)
        for step in range(3):
            batch = [moe.to_device(next(packs), machine.device) for _ in range(12)][machine.rank::machine.world_size]
            steps.append(moe.training_step(model, optimizers, batch, step, cfg, machine, False).tolist())
        val_streams = moe.validation_streams(cfg, shards[1])[:1] * 12       # as many for each rank
        val_loss = moe.validate(model, cfg, val_streams, machine)
        assert len(model.experts[0].fc) == 4 // max(share, 1)
        model.gather_experts()
        if machine.rank == 0:
            save_file(model.state_dict(), folder / f"{share}.safetensors")
            (folder / f"{share}.json").write_text(json.dumps([steps, val_loss]))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory, forkserver):
    """(ranks, ranks that share experts) -> what training_step returned in each step, validation loss, weights."""
    folders = {ranks: tmp_path_factory.mktemp("ranks") for ranks in PLAN}
    with rank_starter(forkserver, folders[1]) as start:
        processes = [process for ranks in (4, 3, 2) for process in start(ranks, train_on_ranks, data, folders[ranks],
                                                                         PLAN[ranks])]
        train_on_ranks(data, folders[1], PLAN[1])
        assert join(processes) == [0] * 9, [process.output.read_text()[-500:] for process in processes]
    return {(ranks, share): (*json.loads((folders[ranks] / f"{share}.json").read_text()),
                             load_file(folders[ranks] / f"{share}.safetensors"))
            for ranks, sharing in PLAN.items() for share in sharing}


@pytest.mark.parametrize("first, second", [((1, 0), (2, 0)), ((1, 0), (3, 0)), ((1, 1), (2, 2)), ((1, 1), (4, 2))],
                         ids=str)
def test_ranks_do_what_one_does(first, second, runs):
    """Losses, loads, what is dropped, and weights; with experts of other ranks, too."""
    (one, val_loss, weights), (more, also_val_loss, others) = runs[first], runs[second]
    assert also_val_loss == pytest.approx(val_loss, abs=2e-4)
    for step, other in zip(one, more):
        assert other[0] == pytest.approx(step[0], abs=2e-4) and sum(other[2:6]) == sum(step[2:6]) == 2 * 1536
        assert other[2:] == pytest.approx(step[2:], abs=4)          # rounding may change a choice
    assert (one[0][-1] > 15) == (first == (1, 1))
    assert weights.keys() == others.keys() and weights["blocks.1.experts.bias"].any()
    for name, weight in weights.items():
        assert_close(others[name], weight, 2e-3)


def moe_main(argv):
    before, sys.argv = sys.argv, ["train_gpt_moe.py", *argv]
    try:
        return moe.main()
    finally:
        sys.argv = before


def weights_of(logs):
    return load_file(max(only_folder(logs).glob("checkpoint/step_*/model.safetensors")))


@pytest.mark.parametrize("kind", [{"jitter": 0.05}, LEARNED | {"top_k": 2, "optimizer": "adamw", "schedule": "seesaw"}],
                         ids=str)
def test_a_resumed_run_ends_as_if_nothing_had_happened(kind, data, tmp_path):
    """Bit for bit: weights, buffers, losses, loads, picture. The clock goes on."""
    common = {"num_iterations": 7, "val_every": 2, "save_every": 4} | kind
    assert moe_main(flags(data, out_dir=tmp_path / "whole", **common)) == 0
    whole = only_folder(tmp_path / "whole")
    assert [path.parent.name for path in whole.glob("checkpoint/step_*/optimizer-0.safetensors")] == ["step_000004"]
    checkpoint = whole / "checkpoint" / "step_000004"
    assert moe_main(flags(data, out_dir=tmp_path / "again", resume=checkpoint, **common | {"save_every": 0})) == 0
    one, two = weights_of(tmp_path / "whole"), weights_of(tmp_path / "again")
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    lines, infos = [], []
    for logs in ("whole", "again"):
        folder = only_folder(tmp_path / logs)
        infos.append(json.loads((folder / "run.json").read_text()))
        log = (folder / "log.txt").read_text().split("=" * 100)[1]
        lines.append(re.findall(r"^step:[567]/[67] \w+:[\d.]+|^  layer .*|^load of .*", log, re.M))
    assert lines[0][-len(lines[1]):] == lines[1] and len(lines[1]) > 4
    losses = [[point["val_loss"] for point in info["val_losses"]] for info in infos]
    assert losses[0] == losses[1] and len(losses[0]) in (4, 5)
    assert infos[0]["tokens_seen"] == infos[1]["tokens_seen"] and infos[1]["resumed"] == str(checkpoint)
    assert infos[1]["val_losses"][-2]["train_time_ms"] <= infos[1]["train_time_ms"]
    assert (only_folder(tmp_path / "again") / "load.svg").read_text() == (whole / "load.svg").read_text()
    assert not list((only_folder(tmp_path / "again") / "checkpoint").glob("**/optimizer*"))


def test_an_interrupted_run_can_go_on_and_a_finished_one_cannot(data, tmp_path, monkeypatch, refused):
    step, common = moe.training_step, {"num_iterations": 6}
    def interrupting(*arguments):
        if arguments[3] == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)
    assert moe_main(flags(data, out_dir=tmp_path / "whole", **common)) == 0
    monkeypatch.setattr(moe, "training_step", interrupting)
    assert moe_main(flags(data, out_dir=tmp_path / "broken", **common)) == 130
    monkeypatch.setattr(moe, "training_step", step)
    broken = only_folder(tmp_path / "broken")
    assert f"--resume={broken}" in (broken / "log.txt").read_text()
    assert moe_main(flags(data, out_dir=tmp_path / "again", resume=broken, **common)) == 0
    one, two = weights_of(tmp_path / "whole"), weights_of(tmp_path / "again")
    assert all(one[name].equal(two[name]) for name in one)
    monkeypatch.undo()
    for changes, words in (({"resume": only_folder(tmp_path / "whole")}, ["all of its 6 steps"]),
                           ({"resume": broken / "log.txt"}, ["no checkpoint", "--save_every"]),
                           ({"resume": tmp_path / "nothing"}, ["nothing", "no checkpoint"]),
                           ({"resume": broken, "seed": 1, "top_k": 2}, ["--seed", "--top_k"])):
        refused(*flags(data, out_dir=tmp_path / "logs", **common | changes), words=words)
    refused(*flags(data, out_dir=tmp_path / "logs", resume=tmp_path, **common), words=["several runs"])
    assert not (tmp_path / "logs").exists()


def test_a_damaged_checkpoint_is_refused_in_one_line(data, tmp_path, refused):
    own = tmp_path / "own"
    own.mkdir()
    for file in data.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    common = flags(own, out_dir=tmp_path / "whole", num_iterations=6, save_every=4)
    assert moe_main(common) == 0
    whole = only_folder(tmp_path / "whole")
    refused(*common, f"--resume={whole}", f"--out_dir={tmp_path / 'logs'}", words=["all of its 6 steps"])
    folder = whole / "checkpoint" / "step_000004"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["val_loss"] is None             # the last one is of step 0
    again = [*common, f"--resume={folder}", f"--out_dir={tmp_path / 'logs'}"]
    bad = [b"", b"[1]", b"{}", *(json.dumps(meta | change).encode() for change in (
        {"config": []}, {"step": "4"}, {"step": -3}, {"val_losses": []}, {"val_losses": [5]}, {"tokens_seen": None}))]
    damages = [("meta.json", content) for content in bad]
    damages += [(name, content) for name in ("model.safetensors", "optimizer-0.safetensors")
                for content in (b"", (folder / name).read_bytes()[:1000])]
    damages += [("optimizer-0.safetensors", (folder / "model.safetensors").read_bytes())]
    for name, content in damages:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        moe.sha256_of.cache_clear()
        refused(*again, words=["cannot be used", "step_000004"])
        (folder / name).write_bytes(before)
    shard = next(own.glob("train_*.bin"))
    content = bytearray(shard.read_bytes())
    content[1100] ^= 1                          # another text of the same length
    shard.write_bytes(content)
    moe.sha256_of.cache_clear()
    refused(*again, words=["another text", "--train_files"])
    assert not (tmp_path / "logs").exists()


def test_ranks_that_share_experts_can_be_resumed(data, tmp_path, start_ranks):
    common = {"num_iterations": 6, "save_every": 4, "batch_tokens": 1024, "capacity": 1.5, "expert_ranks": 2}
    ran = start_ranks(2, moe_main, flags(data, out_dir=tmp_path / "whole", **common))
    assert join(ran) == [0, 0], ran[0].output.read_text()
    checkpoint = only_folder(tmp_path / "whole") / "checkpoint" / "step_000004"
    assert len(list(checkpoint.glob("optimizer-?.safetensors"))) == 2
    ran = start_ranks(2, moe_main, flags(data, out_dir=tmp_path / "again", resume=checkpoint, **common))
    assert join(ran) == [0, 0], ran[0].output.read_text()
    one, two = weights_of(tmp_path / "whole"), weights_of(tmp_path / "again")
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("bad, word", [
    ({"top_k": 5}, "--top_k=5"), ({"expert_dim": 24}, "--expert_dim=24"), ({"num_experts": 0}, "--num_experts=0"),
    ({"expert_ranks": 2}, "--capacity="), ({"expert_ranks": 2, "capacity": 1.5}, "the 1 ranks"),
    ({"expert_ranks": 3, "capacity": 1.5}, "--expert_ranks=3"),
    ({"expert_layers": 9}, "--expert_layers=9"), ({"balance": "luck"}, "bias"),
    ({"balance": "loss"}, "--router=learned"), ({"router_z": 0.1, "router": "hash"}, "--router=learned"),
    ({"jitter": 0.1, "router": "hash"}, "--jitter=0.1"), ({"jitter": 2.0}, "--jitter=2.0"),
    ({"balance_rate": 2.0}, "--balance_rate=2.0"), ({"shared_dim": 4000}, "--shared_dim=4000")], ids=str)
def test_a_bad_value_gets_one_line(bad, word, data, refused):
    refused(*flags(data, **bad), words=[word])


@pytest.mark.parametrize("world_size, packs", [(3, 12), (4, 6)])
def test_ranks_that_cannot_share_experts(world_size, packs, monkeypatch):
    """All ranks must have as many packs, or one would wait for the others for ever."""
    monkeypatch.setattr(moe.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(moe.dist, "get_world_size", lambda: world_size)
    model = moe.GPT(config(expert_ranks=2, capacity=1.5, batch_tokens=packs * 128))
    with pytest.raises(moe.UserError, match=f"--expert_ranks=2 .* {world_size} ranks, .* {packs} packs"):
        model.share_experts()


def test_a_capacity_that_no_expert_can_fill_costs_no_more_memory():
    """An expert can get each token once, so 1e9 times the mean is as 4 / top_k times, and drops nothing."""
    tokens, sizes = stream(96), []
    for capacity in (2.0, 1e9):
        model = moved(config(capacity=capacity, top_k=2, expert_layers=2)).train()
        model.experts[0].fixed = lambda x, fixed=model.experts[0].fixed: (sizes.append(len(x)), fixed(x))[1]
        model(tokens, tokens.roll(-1))
        assert model.experts[0].load[-1] == 0
    assert sizes == [4 * 96, 4 * 96]


def test_the_printed_commands_can_be_pasted(data, run_main, tmp_path):
    common = {"num_iterations": 2, "save_every": 1, "batch_tokens": 128, "depth": 2}
    done = run_main(*flags(data, out_dir=tmp_path / "my logs", **common), module=moe)
    assert done.code == 0, done.err
    checkpoints = only_folder(tmp_path / "my logs") / "checkpoint"
    words = shlex.split(done.out.splitlines()[-1])[1:]
    assert words == ["python", "sample.py", f"--checkpoint={checkpoints}/step_000002"]
