"""The metric guard: is what a training script reports the loss of an honest predictor on the whole validation text?

    python records/guard.py train_gpt.py                       # with the tables of its default preset
    python records/guard.py SCRIPT --run=FOLDER/run.json       # with the tables of a run; did SCRIPT make that run?
    python records/guard.py SCRIPT --run=A/run.json --run=B/run.json       # of several; equal tables are examined once
    python records/guard.py SCRIPT --device=cuda               # with the GPU's attention instead of the plain one

It imports the script, so it runs its code, trains a model of a few channels on made-up text, and looks at it from
outside, through main(), GPT and the files of the run. Exit code 0 if all holds, 1 with a line that says what does not.

    normalised   over all tokens that may follow, the probabilities that the loss implies sum to 1
    causal       no loss up to a token changes with the tokens and targets after it, across documents and windows
    complete     the reported loss is the mean over exactly the first val_tokens tokens, computed again in float64 with
                 a plain softmax from the checkpoint that the run wrote
    harmless     a run that validates at every step trains bit for bit like one that validates at its end only

What it cannot see: code that behaves differently in a large run, or in kernels that do not run on this device.
"""
import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import re
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from runs import COMPANIONS, UserError, read_run

BOS, STREAM, VAL_TOKENS, STEPS = 8, 256, 500, 4         # 8 tokens of one byte and a begin-of-document id
# what a run fills in itself
FROM_MACHINE = {"vocab_size", "bos_id", "attention", "compile", "kernels", "float8", "host_state"}
SMALL = {"val_tokens": VAL_TOKENS, "val_stream_tokens": STREAM, "slot_tokens": 128, "micro_batch_tokens": 0,
         "num_iterations": STEPS, "stop_after": 0, "final_windows": [24, 64], "head_dim": 16, "mlp_dim": 64,
         "gate_dim": 8, "vocab_size": 0, "vocab_multiple": 1, "bos_id": -1, "bigram_rows": 61, "bigram_signs": 8,
         "precision": "fp32", "attention": "auto", "kernels": False, "float8": False, "compile": False, "seed": 0,
         "resume": "", "save_every": 0, "compile_cache": ""}


class Dishonest(Exception):
    """What the guard found, in one line."""


def need(good: bool, sentence: str):
    """Raises Dishonest with the sentence unless `good`."""
    if not good:
        raise Dishonest(sentence)


def load_script(path: Path):
    """The module of a training script; what it imports from its folder is not what another script has imported."""
    path = path.resolve()
    others = {name: module for name in (Path(name).stem for name in COMPANIONS)
              if (module := sys.modules.get(name)) and Path(module.__file__).parent != path.parent}
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"guarded_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module             # before it runs: dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        sys.modules.update(others)
    missing = [name for name in ("PRESETS", "GPT", "parse_config", "config_from_dict", "main")
               if not hasattr(module, name)]
    need(not missing, f"the script has no {', '.join(missing)}, so it cannot be examined")
    return module


def as_flag(name: str, value) -> str:
    """`--name=value` as a user would type it: tables as JSON, pairs with commas."""
    if isinstance(value, (list, tuple)):
        table = value and isinstance(value[0], (list, dict))
        return f"--{name}={json.dumps(value) if table else ','.join(map(str, value))}"
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


def small_flags(config: dict, folder: Path, device: str, **changes) -> list[str]:
    """Command line of a run on the shards in `folder` with the tables of `config`, everything else a few numbers."""
    heads = config["model_dim"] // config["head_dim"]
    small = SMALL | {"model_dim": 16 * heads, "qk_dim": 8 * bool(config.get("qk_dim")), "device": device,
                     "out_dir": str(folder / "logs"), "train_files": f"{folder}/train_*.bin",
                     "val_files": f"{folder}/val_*.bin"}
    if device == "cuda":
        small |= {"precision": "bf16", "attention": "flex", "compile": True}
    small["stages"] = [row | {"batch_tokens": 256, "max_doc_tokens": 90, "short": 8 + 4 * i, "long": 24 + 12 * i}
                       for i, row in enumerate(config["stages"])]
    return [as_flag(name, value) for name, value in (config | small | changes).items() if name in config]


def write_shards(folder: Path) -> np.ndarray:
    """Shards of documents that are easy to learn, and their tokenizer; returns the validation tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, tokenizer = np.random.default_rng(0), {"name": "bytes", "pattern": "", "bos_id": BOS, "special_tokens": {
        "<|bos|>": BOS}, "ranks": [f"{letter}A==" for letter in "ABCDEFGH"]}    # base64 of one byte each
    text = json.dumps(tokenizer, sort_keys=True, separators=(",", ":")).encode()
    (folder / "tokenizer.json").write_bytes(text)
    for name, size in (("train", 8000), ("val", VAL_TOKENS + 200)):
        tokens = []
        while len(tokens) < size:
            tokens += [BOS, *np.cumsum(rng.integers(1, 4, rng.integers(20, 150))) % BOS]
        header = np.zeros(256, "<i4")
        header[:6] = 20240520, 1, len(tokens), BOS + 1, BOS, 2
        header[8:16] = np.frombuffer(hashlib.sha256(text).digest(), "<i4")
        (folder / f"{name}_000000.bin").write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())
    return np.array(tokens, np.int64)


def train(module, flags: list[str], folder: Path) -> SimpleNamespace:
    """Runs main() with the flags; its run.json, its log, its checkpoint folder and the bytes of the weights."""
    argv, sys.argv = sys.argv, [module.__name__, *flags]
    known, output, hidden = set(folder.glob("logs/*")), io.StringIO(), "matplotlib" not in sys.modules
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    if hidden:
        sys.modules["matplotlib"] = None            # a second less: without it a run draws no curve
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = module.main()
    finally:
        sys.argv = argv
        if hidden:
            del sys.modules["matplotlib"]
        for name, handler in handlers.items():
            signal.signal(name, handler)
    need(code == 0, f"a small run ends with exit code {code}: {' '.join(output.getvalue().split())[-200:]}")
    run = (set(folder.glob("logs/*")) - known).pop()
    checkpoint = run / "checkpoint" / (run / "checkpoint" / "latest").read_text()
    return SimpleNamespace(info=json.loads((run / "run.json").read_text()), log=(run / "log.txt").read_text(),
                           checkpoint=checkpoint, weights=(checkpoint / "model.safetensors").read_bytes())


def load_model(module, checkpoint: Path, device: str):
    """The model of a checkpoint, in its last stage."""
    from safetensors.torch import load_file
    meta = json.loads((checkpoint / "meta.json").read_text())
    with torch.device(device):
        model = module.GPT(module.config_from_dict(meta["config"]))
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    model.set_stage(meta["stage"], final=True)
    return model


def check_harmless(often, seldom):
    """The two runs differ in when they validated, and in nothing else."""
    losses = [re.findall(r"step:(\d+)/\d+ train_loss:(\S+)", run.log) for run in (often, seldom)]
    for (step, one), (_, other) in zip(*losses):
        need(one == other, f"validating changes training: the loss of step {step} is {one} with and {other} without")
    need(often.weights == seldom.weights, "validating changes training: the weights differ with and without")


@torch.no_grad()
def check_complete(forward, tokens: np.ndarray, reported: float, device: str, tolerance: float):
    """The reported loss is the mean over the first VAL_TOKENS tokens, document by document, in float64."""
    starts = [*np.flatnonzero(tokens == BOS), len(tokens)]
    total = 0.0
    for start, end in zip(starts, starts[1:]):
        targets = torch.from_numpy(tokens[start + 1:min(end, VAL_TOKENS) + 1])
        if start >= VAL_TOKENS:
            break
        document = np.full(STREAM, BOS)             # one shape for all; what follows a document cannot change it
        document[:end - start] = tokens[start:end]
        logits = forward(torch.from_numpy(document).to(device))[:len(targets)].double().cpu()
        total += F.cross_entropy(logits, targets, reduction="sum").item()
    mean = total / VAL_TOKENS
    need(abs(mean - reported) < tolerance, f"a small run reports a validation loss of {reported:.6f}, a softmax over "
         f"the logits of its checkpoint gives {mean:.6f} on the same {VAL_TOKENS} tokens")


@torch.no_grad()
def check_normalised(forward, tokens: torch.Tensor, positions, tolerance: float):
    """The probabilities exp(-loss) of all tokens that may follow each position sum to 1."""
    for position in positions:
        targets = torch.full_like(tokens, -1)
        total = 0.0
        for token in range(BOS + 1):
            targets[position] = token
            total += torch.exp(-forward(tokens, targets).double()).item()
        need(abs(total - 1) < tolerance, f"the probabilities of the {BOS + 1} tokens that may follow position "
             f"{position} sum to {total:.4f}: the loss is not that of a normalised distribution")


@torch.no_grad()
def check_causal(forward, tokens: torch.Tensor, targets: torch.Tensor, positions, tolerance: float):
    """Losses and logits up to each position stay as they are when tokens and targets after it change."""
    generator, index = torch.Generator().manual_seed(1), torch.arange(tokens.numel(), device=tokens.device)
    logits, total = forward(tokens), forward(tokens, targets)
    for last in positions:
        later = torch.randint(0, BOS + 1, tokens.shape, generator=generator).to(tokens.device)
        changed, before = torch.where(index > last, later, tokens), torch.where(index > last, -1, targets)
        moved = (forward(changed) - logits)[:last + 1].abs().amax(1).cpu()
        seen, loss = int(torch.argmax((moved > tolerance).int())), forward(tokens, before)
        need(moved.max() <= tolerance, f"the prediction at position {seen} changes with tokens after position {last}: "
             "the script looks at future tokens")
        need(abs(loss - forward(changed, before)) <= tolerance * (last + 1), f"the loss up to position {last} changes "
             "with tokens after it: the script looks at future tokens")
        rest = forward(tokens, torch.where(index > last, targets, -1))
        need(abs(loss + rest - total) <= tolerance * tokens.numel(), f"the loss up to position {last} changes with the "
             "targets after it: the script looks at future tokens")


def disturb(model):
    """Moves every parameter, so that no path through the model is silent because it starts at zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator).to(param)


def same_to_the_guard(config: dict, device: str) -> str:
    """What is the same for two configurations if and only if they make the same small runs."""
    return json.dumps(small_flags(config, Path(), device, val_every=0))


def check_script(module, config: dict, device: str = "cpu"):
    """All that the guard knows, for the tables of one configuration; raises Dishonest."""
    torch.set_num_threads(1)
    tolerance = 1e-4 if device == "cpu" else 0.02
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_shards(folder)
        run = train(module, small_flags(config, folder, device, val_every=1), folder)
        if device == "cpu":                         # a GPU sums gradients in another order each time
            check_harmless(run, train(module, small_flags(config, folder, device, val_every=0), folder))
        honest, disturbed = (load_model(module, run.checkpoint, device) for _ in range(2))
    stream, targets = (torch.from_numpy(tokens[i:STREAM + i]).to(device) for i in (0, 1))
    border = int(np.flatnonzero(tokens == BOS)[1])
    disturb(disturbed)
    forward, compiled = (torch.compile(model, dynamic=False, fullgraph=True) if device == "cuda" else model
                         for model in (disturbed, honest))
    check_causal(forward, stream, targets, (border - 1, border, 127, 201), tolerance)
    check_normalised(forward, stream, (border - 1, 201), 10 * tolerance)
    check_complete(compiled, tokens, run.info["val_losses"][-1]["val_loss"], device, tolerance)


def check_run(module, info: dict):
    """The script makes the recorded configuration from the recorded flags, and its schedule ends where the run did."""
    try:
        cfg = module.parse_config(info["argv"])
    except Exception as error:                      # whatever a script raises for flags that it does not know
        raise Dishonest(f"the script refuses the flags of the log: {error}") from None
    made = json.loads(json.dumps(asdict(cfg)))
    for name in sorted(made.keys() | info["config"].keys() - FROM_MACHINE):
        if name not in FROM_MACHINE:
            one, other = (json.dumps(values.get(name))[:60] for values in (info["config"], made))
            need(one == other, f"the log has {name} {one}, the script makes {other} from its flags")
    steps, last = min(cfg.stop_after or cfg.total_steps, cfg.total_steps), info["val_losses"][-1]["step"]
    need(steps == last, f"the schedule of the script ends at step {steps}, the run at step {last}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="guard.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="a training script")
    parser.add_argument("--run", type=Path, metavar="RUN.JSON", action="append", default=[],
                        help="run.json of a run that the script made; may be given several times")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        for path in (args.script, *args.run):
            if not path or not path.is_file():                      # argparse reads --run=-- as a list
                print(f"guard.py: {path or '--'} is not a file; name a training script, and with --run a run.json",
                      file=sys.stderr)
                return 2
        module = load_script(args.script)
        configs = [] if args.run else [json.loads(json.dumps(asdict(next(iter(module.PRESETS.values())))))]
        for path in args.run:
            info = read_run(path.parent).info
            check_run(module, info)
            configs.append(info["config"])
        for config in {same_to_the_guard(config, args.device): config for config in configs}.values():
            check_script(module, config, args.device)
    except Dishonest as found:
        print(f"{args.script}: {found}", file=sys.stderr)
        return 1
    except (UserError, OSError) as error:
        print(f"guard.py: {UserError(error)}; name another path", file=sys.stderr)
        return 2
    print(f"{args.script}: the loss is normalised, causal, complete, and validating changes nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
