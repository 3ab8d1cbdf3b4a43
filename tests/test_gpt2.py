"""gpt2.py: original GPT-2 weights read from a folder give the numbers that the transformers library gives.

Against: transformers' own GPT-2 with random weights, saved by it in the published layout, one document at a time (the
test dependency; without it those tests skip). Choices on HellaSwag need the development data. What bad input gets is
tested without either, and so are the ways to save weights and the help texts. Run: python -m pytest tests/test_gpt2.py
"""
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import gpt2  # noqa: E402
import text  # noqa: E402

read_tokenizer = gpt2.read_tokenizer

BOS, CONTEXT = 1024, 256                  # a small vocabulary, for what it costs on a CPU
LENGTHS = (200, 1, 7, CONTEXT, 120, 23)   # of the documents of a stream: across chunk borders, alone, as long as can be


@pytest.fixture(scope="module")
def theirs():
    """A small GPT-2 of transformers with random weights, sure of itself, so that choices are no near ties."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=BOS + 1, bos_token_id=BOS, eos_token_id=BOS, n_embd=48, n_layer=3,
                                     n_head=4, n_positions=CONTEXT, initializer_range=0.2)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """The folder that transformers saves, with the tensors of the causal mask that the published file has."""
    path = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT)
    save_file(weights, path / "model.safetensors")
    return path


@pytest.fixture(scope="module", autouse=True)
def tokenizer():
    """A stand-in for the vocabulary, which not every machine has."""
    patch = pytest.MonkeyPatch()
    patch.setattr(gpt2, "read_tokenizer", lambda folder: json.dumps({"bos_id": BOS}).encode())
    yield
    patch.undo()


@pytest.fixture(scope="module")
def ours(folder):
    return gpt2.load(folder, "cpu", "fp32")[0]


def documents(lengths=LENGTHS):
    """Random documents of these lengths, each beginning with BOS."""
    generator = torch.Generator().manual_seed(1)
    return [torch.cat([torch.tensor([BOS]), torch.randint(0, BOS, (length - 1,), generator=generator)])
            for length in lengths]


def logits_of(theirs, docs):
    with torch.no_grad():
        return torch.cat([theirs(doc[None]).logits[0] for doc in docs])


def test_logits_of_a_packed_stream_are_those_of_each_document_alone(theirs, ours):
    docs = documents()
    difference = (ours(torch.cat(docs)) - logits_of(theirs, docs)).abs().max()
    assert difference < 1e-4, difference


def test_score_is_the_cross_entropy_and_the_argmax(theirs, ours, monkeypatch):
    monkeypatch.setattr(gpt2, "HEAD_CHUNK", 100)                    # so that there are several
    docs = documents()
    tokens, logits = torch.cat(docs), logits_of(theirs, docs)
    targets = torch.where(torch.arange(len(tokens)) % 3 > 0, tokens.roll(-1), -1)
    losses, likeliest = ours.score(tokens.int(), targets)
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    assert torch.equal(likeliest, logits.argmax(1)) and (losses - expected).abs().max() < 1e-4
    assert (losses[targets < 0] == 0).all()
    assert abs(ours(tokens, targets) - expected.sum()) < 1e-2


def test_bf16_is_close(folder, ours):
    model, tokens = gpt2.load(folder, "cpu", "bf16")[0], torch.cat(documents())
    assert model.wte.weight.dtype == torch.bfloat16 and model(tokens).dtype == torch.float32
    difference = (model(tokens) - ours(tokens)).abs().max() / ours(tokens).abs().max()
    assert 0 < difference < 0.05, difference


@pytest.mark.parametrize("steps", [(CONTEXT,), (1, 30, 1, 1, 20), (7, 1, 40)], ids=str)
def test_decode_continues_what_forward_reads_whole(ours, steps):
    rows = torch.stack(documents([CONTEXT] * 3))[:, :sum(steps)]
    rows[1, 5] = rows[2, 40 % sum(steps)] = BOS                     # a document may end within a row
    cache, parts = ours.new_cache(3, CONTEXT), rows.split(steps, 1)
    logits = torch.cat([ours.decode(part, cache) for part in parts], 1)
    for row, found in zip(rows, logits):
        assert (found - ours(row)).abs().max() < 1e-4
    assert cache.position.tolist() == [sum(steps)] * 3


def test_ragged_rows_and_copied_rows_decode_like_single_ones(ours):
    docs = documents([9, 30, 1])
    rows = torch.stack([torch.nn.functional.pad(doc, (0, 30 - len(doc)), value=5) for doc in docs])
    lengths = torch.tensor([9, 30, 1])
    cache = ours.new_cache(3, 40)
    first = ours.decode(rows, cache, lengths, last=True)
    many, order = ours.new_cache(4, 50), torch.tensor([2, 0, 0, 1])
    many.fill(cache, order)
    more = documents([6])[0][1:].expand(4, 5)
    second = ours.decode(more, many)
    for found, row in zip(first, docs):
        assert (found[0] - ours(row)[-1]).abs().max() < 1e-4
    for found, row in zip(second, order):
        assert (found - ours(torch.cat([docs[row], more[0]]))[-5:]).abs().max() < 1e-4
    assert many.position.tolist() == [6, 14, 14, 35]


def test_a_cache_that_is_full_is_refused(ours):
    cache = ours.new_cache(1, 10)
    with pytest.raises(ValueError, match="a row of 11 tokens is longer than the cache, which was made for 10"):
        ours.decode(torch.ones(1, 11, dtype=torch.int64), cache)


def test_a_cache_beyond_the_context_is_refused(ours):
    with pytest.raises(ValueError, match=f"GPT-2 reads {CONTEXT} tokens, not {CONTEXT + 1}"):
        ours.new_cache(1, CONTEXT + 1)


def test_a_document_beyond_the_context_is_refused(ours):
    with pytest.raises(gpt2.UserError, match=f"a document has {CONTEXT + 1} tokens, but GPT-2 reads {CONTEXT}"):
        ours(torch.cat(documents([20, CONTEXT + 1])))


def test_loading_leaves_the_random_state_alone(folder):
    before = torch.get_rng_state()
    gpt2.load(folder, "cpu", "fp32")
    assert torch.equal(before, torch.get_rng_state())


# -----------------------------------------------------------------------------
# The vocabulary and HellaSwag, with the development data

needs_data = pytest.mark.skipif(not SHARED.exists(), reason="no development data beside the project")


@needs_data
def test_the_vocabulary_comes_from_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    text.gpt2_tokenizer_json.cache_clear()
    with pytest.raises(gpt2.UserError, match="has no vocabulary of GPT-2.*put vocab.json and merges.txt there"):
        read_tokenizer(tmp_path)
    shutil.copy(SHARED / "gpt2_bpe" / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(SHARED / "gpt2_bpe" / "vocab.bpe", tmp_path / "merges.txt")
    expected = text.gpt2_tokenizer_json(SHARED / "gpt2_bpe")
    assert read_tokenizer(tmp_path) == expected
    assert read_tokenizer(SHARED / "gpt2_bpe") == expected          # the names that OpenAI gave the files


@needs_data
def test_the_same_hellaswag_choices_as_transformers(theirs, ours, monkeypatch):
    import evaluate
    import sample
    monkeypatch.setattr(evaluate, "read_rows", lambda path, kind, max_items: first_rows(path)[:max_items])
    args = evaluate.parse_args(["--tasks=hellaswag", f"--evals={SHARED / 'eval'}", "--max_items=50"])
    items = evaluate.read_items(args, [evaluate.HELLASWAG], True)
    spec = json.loads(text.gpt2_tokenizer_json(SHARED / "gpt2_bpe"))
    tokenizer = sample.Tokenizer(spec | {"ranks": spec["ranks"][:BOS], "special_tokens": {"<|endoftext|>": BOS},
                                         "bos_id": BOS})
    encoded = evaluate.encode_all(tokenizer, sorted({part for item in items for p in item.prompts for part in p}), 1)
    bos = torch.tensor([BOS]).numpy()
    scored = [evaluate.cut(document, CONTEXT) for item in items
              for document in evaluate.item_documents(item, encoded, bos)]
    tokens, targets, spans = evaluate.fill(list(enumerate(scored)), sum(len(doc[0]) for doc in scored), BOS)
    losses = ours.score(torch.from_numpy(tokens), torch.from_numpy(targets))[0].double()
    results = torch.tensor([[losses[a:b].sum(), b - a, 0] for _, a, b in spans.tolist()]).numpy()
    found = [record["choice"] for record in evaluate.judge(items, results)]

    expected, scored = [], iter(scored)
    for _, row in first_rows(SHARED / "eval" / "hellaswag_val.jsonl.xz")[:50]:
        means = []
        for ending in row["endings"]:
            ids = [BOS, *tokenizer.encode(row["ctx"]), *(answer := tokenizer.encode(" " + ending))][-CONTEXT:]
            ids[0] = BOS
            with torch.no_grad():
                logits = theirs(torch.tensor([ids])).logits[0, -len(answer) - 1:-1]
            means.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
        expected.append(means.index(min(means)))
    assert found == expected and len(set(found)) == 4


def first_rows(path):
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [(line, json.loads(next(file))) for line in range(50)]


# -----------------------------------------------------------------------------
# Bad input

CONFIG = {"model_type": "gpt2", "vocab_size": BOS + 1, "bos_token_id": BOS, "n_positions": 8, "n_layer": 1, "n_head": 1,
          "n_embd": 2, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}


def small_state():
    """Random weights of the model that CONFIG describes, as they are published: (in, out)."""
    torch.manual_seed(0)
    state = gpt2.GPT2(gpt2.Config(BOS + 1, 8, 1, 1, 2, 1e-5, BOS)).state_dict()
    return {name: tensor.T.contiguous() if "c_" in name and tensor.dim() == 2 else tensor
            for name, tensor in state.items()}


def write_sharded(folder, state, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """The weights in two files with an index, as large models are published."""
    files = {name: names[i % 2] for i, name in enumerate(sorted(state))}
    for file in names:
        save_file({name: tensor for name, tensor in state.items() if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def head_only(state):
    return {"lm_head.weight" if name == "wte.weight" else name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("write", [lambda folder, state: save_file(state, folder / "model.safetensors"), write_sharded],
                         ids=["one file", "sharded"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("change", [dict, head_only, lambda state: {**state, **head_only(state)}],
                         ids=["wte", "lm_head", "both"])
def test_every_way_to_save_the_weights_gives_the_same_model(tmp_path, monkeypatch, write, prefix, change):
    state = small_state()
    named = {name if name.startswith("lm_head") else prefix + name: tensor for name, tensor in change(state).items()}
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a [b] c"
    folder.mkdir()
    write(folder, named)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in (folder, "~/a [b] c"):
        model = gpt2.load(name, "cpu", "fp32")[0]
        assert torch.equal(model.wte.weight, state["wte.weight"])
        assert torch.equal(model.h[0].attn["c_attn"].weight, state["h.0.attn.c_attn.weight"].T)


@pytest.mark.parametrize("names, words", [
    (("a.safetensors", "../b.safetensors"), "'../b.safetensors' is not the name of a safetensors file"),
    (("a.safetensors", "b.bin"), "'b.bin' is not the name of a safetensors file"),
    (("a.safetensors", "gone.safetensors"), "gone.safetensors cannot be read (no such file); --model= takes a folder"),
])
def test_an_index_with_odd_names_is_refused(tmp_path, names, words):
    folder = tmp_path / "model"
    folder.mkdir()
    write_sharded(folder, small_state(), names)
    (folder / "gone.safetensors").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(gpt2.UserError) as refused:
        gpt2.load(folder, "cpu", "fp32")
    assert words in str(refused.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_a_damaged_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(gpt2.UserError, match="model.safetensors.index.json cannot be read"):
        gpt2.load(tmp_path, "cpu", "fp32")


@pytest.mark.parametrize("more, words", [
    ({"lm_head.weight": torch.ones(BOS + 1, 2)}, "has an lm_head.weight that is not wte.weight"),
    ({"transformer.wte.weight": torch.ones(BOS + 1, 2)}, "holds wte.weight, which is in the files of"),
    ({"ln_f.weight": torch.ones(2, dtype=torch.int32)}, "do not fit its config.json: ln_f.weight; "),
    ({"extra": torch.ones(2)}, "do not fit its config.json: extra; "),
])
def test_weights_that_are_not_all_used_are_refused(tmp_path, more, words):
    save_file(small_state() | more, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(gpt2.UserError) as refused:
        gpt2.load(tmp_path, "cpu", "fp32")
    assert words in str(refused.value)


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "llama"}, "config.json is not that of a GPT-2 (model_type=llama)"),
    ({"activation_function": "relu"}, "(activation_function=relu)"),
    ({"n_layer": None}, "do not fit its config.json: ln_f.weight; "),
    ({"vocab_size": 100}, "vocab_size=100, "),
    ({"bos_token_id": 0}, "has vocab_size=1025 and bos_token_id=0, but GPT-2 begins documents with 1024"),
    ({"n_layer": 2}, "do not fit its config.json: h.1.attn.c_attn.bias, "),
], ids=str)
def test_weights_of_another_kind_are_refused(tmp_path, changes, words):
    layers = changes.pop("n_layer", 1)
    state = small_state()
    if layers is None:
        del state["ln_f.weight"]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes | {"n_layer": layers or 1}))
    with pytest.raises(gpt2.UserError) as refused:
        gpt2.load(tmp_path, "cpu", "fp32")
    assert words in str(refused.value)


def test_a_folder_or_name_that_is_no_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(gpt2.UserError, match="config.json cannot be read .FileNotFoundError"):
        gpt2.load(tmp_path, "cpu", "fp32")
    for name in ("gpt3", "", "~/nothing"):
        with pytest.raises(gpt2.UserError, match=f"--model={name} is neither a folder nor one of gpt2, gpt2-medium"):
            gpt2.load(name, "cpu", "fp32")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(gpt2.UserError, match="model.safetensors cannot be read"):
        gpt2.load(tmp_path, "cpu", "fp32")


def test_no_network_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gpt2.UserError) as refused:
        gpt2.load("gpt2", "cpu", "fp32")
    assert "--model=gpt2 cannot be downloaded (" in str(refused.value) and "\n" not in str(refused.value)


def test_a_socks_proxy_without_its_package_is_named(monkeypatch):
    import huggingface_hub

    def without_the_package(*args, **kwargs):
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", without_the_package)
    with pytest.raises(gpt2.UserError, match="a SOCKS proxy is set and its Python package is missing: pip install"):
        gpt2.load("gpt2", "cpu", "fp32")


# -----------------------------------------------------------------------------
# Help of the programs and modules around the training scripts

@pytest.mark.parametrize("flags", [(), ("--help",)], ids=["no flags", "--help"])
@pytest.mark.parametrize("script", ["gpt2.py", "triton_kernels.py"])
def test_a_module_that_is_run_says_what_it_is_for(script, flags, tmp_path):
    out = helped([ROOT / script, *flags], tmp_path)
    assert "This is a module, not a program." in out and len(out.splitlines()) > 8


@pytest.mark.parametrize("script", ["data/fineweb.py", "data/evals.py", "dev/bench_kernels.py", "dev/profile_step.py",
                                    "dev/profile_plain.py", "dev/cap_memory.py"])
def test_help_of_a_program_shows_how_to_use_it(script, tmp_path):
    out = helped([ROOT / script, "--help"], tmp_path)
    assert out.startswith("usage: ") and f"python {script}" in out


@pytest.mark.parametrize("script, flags, words", [
    ("cap_memory.py", ["much", "train_gpt.py"], "invalid float value: 'much'"),
    ("cap_memory.py", ["-1", "train_gpt.py"], "GIB=-1.0 must be more than 0"),
    ("cap_memory.py", ["nan", "train_gpt.py"], "GIB=nan must be more than 0"),
    ("cap_memory.py", ["20"], "the following arguments are required: SCRIPT"),
    ("cap_memory.py", ["20", "gone.py"], "SCRIPT=gone.py is not a file; name a training script"),
    ("profile_step.py", ["--stage=first"], "invalid int value: 'first'"),
    ("profile_plain.py", ["--preset=tiny"], "the following arguments are required: SCRIPT"),
    ("profile_plain.py", ["gone.py"], "SCRIPT=gone.py is not a file; name a training script"),
    ("bench_kernels.py", ["--fast"], "unrecognized arguments: --fast"),
])
def test_a_bad_command_line_of_a_dev_script_is_one_line(script, flags, words, tmp_path):
    done = without_torch([ROOT / "dev" / script, *flags], tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"{script}: ") and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script, flags", [("bench_kernels", []), ("profile_step", [])])
def test_a_dev_script_without_a_gpu_is_one_line(script, flags, fast_run):
    done = fast_run([sys.executable, ROOT / "dev" / f"{script}.py", *flags], text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"{script}.py: ") and done.stderr.count("\n") == 1
    assert "CUDA GPU" in done.stderr and "run it on such a machine" in done.stderr


def helped(words, tmp_path):
    """What a program prints, and nothing went wrong."""
    done = without_torch(words, tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def without_torch(words, tmp_path):
    """A program where PyTorch and Triton cannot be imported, since that takes seconds."""
    for name in ("torch", "triton"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported for a help text')")
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
