"""An ablation is a cell: whatever the tables say trains, decodes and resumes, and what is off does not exist.

Against: the forward pass (decoding), an uninterrupted run (resuming, bit for bit), the names of the parameters, and
copies of the script with the mistakes that people make when they add a parameter.
Run: python -m pytest tests/test_tables.py
"""
import json
import types

import numpy as np
import pytest
import torch
from conftest import BOS, assert_close, only_folder, small_flags

# Windows change, embedding and head part after step 1, every loss has a weight.
STAGES = [[0.5, 256, 60, 16, 32, 1.0, [[1, 0.5, 0.25], [1, 0.5, 0]], [0.25, 0.25]],
          [1.0, 512, 120, 16, 48, 1.4, [[1, 0.5, 0], [1, 0, 0]], [0.25, 0]]]
CHANGES = {"stages": STAGES, "final_windows": (24, 64), "num_iterations": 4, "split_embed": 0.25, "val_tokens": 500,
           "val_stream_tokens": 256, "model_dim": 24, "mlp_dim": 48, "gate_dim": 4, "bigram_rows": 101,
           "bigram_signs": 16}
ROWS = [{"ve": 0, "xsa": True}, {"window": "long", "ve": 1, "gate": True}, {"attention": False, "skip": 1},
        {"xsa": True}, {"window": "long", "ve": 2, "attn_input": 3, "gate": True, "mudd": True}]
GATES, MUDD = {"gate_fc", "gate_proj", "gate_bias", "gate_scale"}, {"mix_fc", "mix_proj", "mix_bias"}
BIGRAM, VE, SKIP = {"bigram_embed", "bigram_signs"}, {"value_embeds", "value_gates"}, {"skip_lambda"}


def rows(without="", **changes):
    """ROWS without these cells, and with other rows where row<n> says so."""
    kept = [{key: value for key, value in row.items() if key not in without.split()} for row in ROWS]
    return [changes.get(f"row{i}", row) for i, row in enumerate(kept)]


LAST = ROWS[-1]
# name -> (flags that change, parameters and buffers of the whole table that then do not exist)
TABLES = {
    "everything": ({}, set()),
    "no mudd": ({"layers": rows("mudd")}, MUDD),
    "no skip, mudd without it": ({"layers": rows(row2={})}, SKIP),
    "no attn_input": ({"layers": rows("attn_input")}, set()),
    "no value tables": ({"layers": rows("ve")}, VE),
    "no gates": ({"gate_dim": 0}, GATES | MUDD),
    "no gated heads": ({"layers": rows("gate")}, set()),
    "no xsa": ({"layers": rows("xsa")}, set()),
    "no bigram": ({"bigram_rows": 0}, BIGRAM),
    "bigram without signs": ({"bigram_signs": 0}, {"bigram_signs"}),
    "one layer": ({"layers": [{"ve": 0, "xsa": True, "gate": True}]}, MUDD | SKIP),
    "two layers": ({"layers": [{}, {"window": "long", "ve": 0, "mudd": True}]}, SKIP | {"value_gates"}),
    "seven layers": ({"layers": [*rows(row4={}), {"attn_input": 2}, LAST]}, set()),
    "windows all long": ({"layers": [row | {"window": "long"} for row in rows()]}, set()),
    "windows all short": ({"layers": rows("window")}, set()),
    "vanilla": ({"layers": [{}] * 4, "bigram_rows": 0, "gate_dim": 0}, GATES | MUDD | BIGRAM | VE | SKIP),
    "all layers alike": ({"layers": [{"window": "long", "ve": 0, "xsa": True, "gate": True}] * 3}, MUDD | SKIP),
    "a layer of nothing but its mlp": ({"layers": rows(row2={"attention": False})}, SKIP),
    "skip on a layer with attention": ({"layers": rows(row2={"skip": 1})}, set()),
    "two skips": ({"layers": rows(row3={"skip": 0})}, set()),
    "two attn_inputs": ({"layers": rows(row3={"attn_input": 1})}, set()),
    "attn_input without mudd": ({"layers": rows("mudd", row3={"attn_input": 0, "xsa": True})}, MUDD),
    "two layers share a table": ({"layers": rows(row1={"ve": 0}, row4=LAST | {"ve": 1})}, set()),
    "mudd without ve": ({"layers": rows(row4={"attn_input": 3, "mudd": True})}, set()),
    "mudd without late input": ({"layers": rows(row4={"ve": 2, "mudd": True})}, set()),
    "mudd alone": ({"layers": [{}, {"mudd": True}], "bigram_rows": 0}, BIGRAM | VE | SKIP),
    "sampled vocabulary": ({"sampled_vocab": 200}, set()),
    "never tied": ({"split_embed": 0}, set()),
    "always tied": ({"split_embed": 1}, set()),
    "small queries and keys": ({"qk_dim": 8}, set()),
}


@pytest.fixture
def build(script, data):
    """Function of flags: the resolved config, the shards, and a model with its optimizer in their initial state."""
    machine = script.Machine(torch.device("cpu"), 0, 1, "cpu")

    def make(**changes):
        cfg = script.parse_config(small_flags(data, **{"layers": ROWS} | CHANGES | changes))
        shards, _ = script.open_shards(cfg.train_files, cfg.val_files)
        cfg = script.resolve_config(cfg, machine, shards[0])
        backward, optimizer = script.build(cfg, machine)
        prefixes = script.prefix_tokens(json.loads(script.read_tokenizer(shards[0])), cfg.vocab_size)
        optimizer.model.prefix_of.copy_(torch.from_numpy(prefixes))
        return types.SimpleNamespace(cfg=cfg, shards=shards, machine=machine, backward=backward, optimizer=optimizer,
                                     model=optimizer.model)
    return make


def train(script, run, first, last, position):
    """Trains steps first to last - 1 from a position of the loader on; the position after them."""
    batches = script.training_batches(run.cfg, run.shards, 0, 1, 2, first, position)
    for step in range(first, last):
        batch, position = next(batches)
        run.model.set_stage(script.stage_index(run.cfg, step))
        script.training_step(run.backward, run.optimizer, batch, step, script.schedule(run.cfg, step), run.machine)
    return position


def state(script, run):
    return {name: tensor.clone() for name, tensor in script.run_state(run.model, run.optimizer, run.machine).items()}


def assert_decodes_as_forward(model, seed=0):
    """Logits of several short and two long documents, given in parts of several sizes."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, 256, 230))
    tokens[[0, 1, 9, 70, 72, 200]] = BOS
    cache = model.new_cache(1, 230, chunk=32)
    with torch.no_grad():
        decoded = torch.cat([model.decode(part[None], cache)[0] for part in tokens.split([1, 100, 1, 1, 1, 126])])
        assert_close(decoded, model(tokens))


@pytest.mark.parametrize("name", TABLES)
def test_every_table_trains_decodes_and_resumes(script, build, tmp_path, name):
    changes, gone = TABLES[name]
    run = build(**changes)
    _, val_shards = script.open_shards(run.cfg.train_files, run.cfg.val_files)
    streams = script.validation_streams(run.cfg, val_shards)
    initial = {key: param.detach().clone() for key, param in run.model.named_parameters()}
    before = script.validate(run.model, run.cfg, streams, run.machine)

    position = train(script, run, 0, 2, script.LoaderPosition())
    tensors = script.gather_state(run.model, run.optimizer, run.machine, True)
    files = {script.FILES[0]: {key: tensors.pop(key) for key in run.model.state_dict()}, script.FILES[1]: tensors}
    folder = script.write_checkpoint(tmp_path / "checkpoint", {"step": 2}, files, b"", 1)
    train(script, run, 2, 4, position)

    # trains: every parameter has moved, and the loss has fallen
    still = [key for key, param in run.model.named_parameters() if torch.equal(param, initial[key])]
    assert still == []
    assert script.validate(run.model, run.cfg, streams, run.machine) < before - 0.05

    # decodes, with the windows of training and with longer ones
    assert_decodes_as_forward(run.model)
    run.model.set_stage(1, final=True)
    assert_decodes_as_forward(run.model)
    run.model.set_stage(1)

    # resumes
    other = build(**changes)
    script.restore_state(folder, json.loads((folder / "meta.json").read_text()), other.model, other.optimizer,
                         other.machine)
    train(script, other, 2, 4, position)
    one, two = state(script, run), state(script, other)
    assert one.keys() == two.keys() and [key for key in one if not torch.equal(one[key], two[key])] == []

    # what is off does not exist
    assert everything(script) - run.model.state_dict().keys() == gone
    assert run.model.state_dict().keys() <= everything(script)


def everything(script):
    """Names in the state dict of a model that has all parts."""
    buffers = {"bigram_signs", "inv_freq", "attn_scale", "windows"}
    return script.PARAMETERS.keys() | buffers


def test_there_are_twenty_tables():
    assert len(TABLES) >= 20


def random_rows(rng):
    """Rows of one to six layers that break no rule."""
    table, tables = [], 0
    number = int(rng.integers(1, 7))
    for i in range(number):
        row = {"attention": i == 0 or rng.random() < 0.8}
        if i and rng.random() < 0.4:
            row["skip"] = int(rng.integers(i))
        if row["attention"]:
            row |= {"window": str(rng.choice(["short", "long"])), "xsa": bool(rng.random() < 0.5),
                    "gate": bool(rng.random() < 0.5), "mudd": 0 < i == number - 1 and bool(rng.random() < 0.7)}
            if i and rng.random() < 0.4:
                row["attn_input"] = int(rng.integers(i))
            if rng.random() < 0.5:
                row["ve"] = int(rng.integers(tables + 1))
                tables = max(tables, row["ve"] + 1)
        table.append(row)
    return table


@pytest.mark.parametrize("seed", range(12))
def test_random_tables_give_gradients_and_decode(script, build, seed):
    rng = np.random.default_rng(seed)
    run = build(layers=random_rows(rng), gate_dim=int(rng.choice([0, 4])), bigram_rows=int(rng.choice([0, 101])))
    train(script, run, 0, 2, script.LoaderPosition())
    assert all(torch.isfinite(param).all() for param in run.model.parameters())
    assert_decodes_as_forward(run.model, seed)


def test_a_vanilla_table_from_the_command_line(run_main, data, tmp_path):
    """Four steps at once, and two that another two follow: the same weights."""
    weights = []
    for stop in (0, 2):
        logs = tmp_path / f"logs_{stop}"
        flags = small_flags(data, **CHANGES | TABLES["vanilla"][0], out_dir=logs)
        assert run_main(*flags, f"--stop_after={stop}", "--save_every=2").code == 0
        if stop:
            done = run_main(*flags, f"--resume={only_folder(logs)}")
            assert done.code == 0 and "goes on from" in done.out
        weights.append((only_folder(logs) / "checkpoint" / "step_000004" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


# -----------------------------------------------------------------------------
# Mistakes

# What someone does who adds the parameter `extra`, a gain of the model's output.
ROW = ('    "attn_qk":       ParamConfig(', '    "extra": ParamConfig("adam", 0.01, (0.9, 0.99), 0, "replicated"),\n')
DECLARED = ("        self.smear_gate = parameter(12)\n", "        self.extra = parameter(3)\n")
INITIAL = ("        self.post_lambdas.fill_(1)\n", "        self.extra.fill_(1)\n")
USED = ("        return norm(x), ctx.doc_start\n", "        x = x * self.extra.mean()\n")


def added(*places):
    """Edits that put each text before the line that begins with its anchor."""
    return [(anchor, text + anchor) for anchor, text in places]


def test_a_new_parameter_with_all_that_it_needs_trains(edited, run_main, data, tmp_path):
    module = edited(*added(ROW, DECLARED, INITIAL, USED))
    done = run_main(*small_flags(data, stop_after=2, out_dir=tmp_path / "logs"), module=module)
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("places, words", [
    ((DECLARED, INITIAL, USED), ["row in PARAMETERS"]),
    ((ROW, DECLARED, USED), ["no initial value", "GPT.init_parameters"]),
    ((ROW, DECLARED, INITIAL), ["no gradient", "use it in GPT.trunk"]),
], ids=["no row", "no initial value", "not used"])
def test_a_forgotten_part_of_a_new_parameter_is_named_in_one_line(edited, run_main, data, tmp_path, places, words):
    module = edited(*added(*places))
    done = run_main(*small_flags(data, stop_after=2, out_dir=tmp_path / "logs"), module=module)
    assert done.code == 2
    line, = done.err.splitlines()
    assert line.startswith("my_idea.py: ") and all(word in line for word in ["parameter extra", *words])
