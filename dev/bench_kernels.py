"""Prints how fast the kernels are: a Markdown table, each beside plain PyTorch compiled with torch.compile.

    python dev/bench_kernels.py

Needs Triton and a CUDA GPU with 60 GB. Takes a few minutes, mostly for compilation. Rows in float8 need compute
capability 8.9 or more.

Times are medians of triton.testing.do_bench. The first line has the ceilings: GB/s of a copy on the device, and TFLOP/s
of a bf16 product of 8192 x 8192 matrices. Bytes and operations are the fewest that the task needs; for attention they
count only the keys that a token sees. So whatever a kernel reads or computes beyond that lowers its share. Float8 rows
can exceed 100 % of the bf16 ceiling.
"""
import argparse
import sys
from pathlib import Path


def parse_args(argv: list[str] | None = None):
    """Ends with the help or with one line for a bad flag; there are no others."""
    parser = argparse.ArgumentParser(prog="bench_kernels.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.parse_args(argv)


def fail(message: str):
    print(f"bench_kernels.py: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    parse_args()                         # before PyTorch is imported, so that --help answers at once

import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
import torch.nn.functional as F  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # noqa: E402

kernels = train_gpt.triton_kernels
T, C, HIDDEN, V, H = 131_072, 768, 3072, 50_304, 6       # tokens, channels, MLP channels, vocabulary, heads
WINDOWS = (128, 384, 896, 1408)


def milliseconds(function) -> float:
    """Median time of a call."""
    from triton.testing import do_bench
    return do_bench(function, warmup=50, rep=200, return_mode="median")


def randn(*shape, std=1.0) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * std


class Table:
    """Prints each row when it is measured. The constructor measures the ceilings."""

    def __init__(self):
        buffer = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        a = randn(8192, 8192)
        copy = milliseconds(buffer.clone)
        product = milliseconds(lambda: a @ a)
        self.ceilings = {"GB/s": 2 * buffer.numel() / copy / 1e6, "TFLOP/s": 2 * 8192 ** 3 / product / 1e9}
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {self.ceilings['GB/s']:.0f} GB/s, "
              f"bf16 product {self.ceilings['TFLOP/s']:.0f} TFLOP/s\n")
        print("| operation | size | ms | rate | share of ceiling | plain, compiled: ms | times faster |")
        print("| --- | --- | --: | --: | --: | --: | --: |", flush=True)

    def row(self, operation: str, size: str, ms: float, work: float, unit: str, plain: float | None = None):
        """Prints a row. work: bytes for GB/s, operations for TFLOP/s; plain: milliseconds of the plain version."""
        rate = work / ms / (1e6 if unit == "GB/s" else 1e9)
        versus = f"{plain:.3f} | {plain / ms:.2f}" if plain else "- | -"
        share = f"{100 * rate / self.ceilings[unit]:.0f} %"
        print(f"| {operation} | {size} | {ms:.3f} | {rate:.0f} {unit} | {share} | {versus} |", flush=True)


def head(table: Table, formats: list[bool], chunk: int = 32_768):
    """Cross-entropy alone, and the whole head: product, loss and both gradients."""
    x, weight = train_gpt.norm(randn(T, C)), randn(V, C, std=0.05)
    targets, weights = torch.randint(-1, V, (T, 4), device="cuda"), torch.tensor((1, .5, .25, .25), device="cuda")
    for float8 in formats:
        # logits read twice at 2 bytes; gradient written once in bf16 (over the logits: later calls take the same time)
        # or twice in float8
        z = x[:chunk] @ weight.T
        ms = milliseconds(lambda: kernels.cross_entropy(z, targets[:chunk], weights, None, float8))
        table.row(f"cross_entropy {name_of(float8)}", f"{chunk} x {V}", ms, 6 * z.numel(), "GB/s")
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    forward = torch.compile(lambda x, weight: train_gpt.head_loss(x, weight, targets, weights), dynamic=False)
    plain = milliseconds(lambda: torch.autograd.grad(forward(*leaves), leaves))
    with torch.no_grad():
        for float8 in formats:
            ms = milliseconds(lambda: kernels.head_loss_op(x, weight, targets, weights, None, float8))
            name = f"head forward + backward {name_of(float8)}"
            table.row(name, f"{T} x {C} x {V}", ms, 6 * T * C * V, "TFLOP/s", plain)


def name_of(float8: bool) -> str:
    return "float8" if float8 else "bf16"


def products(table: Table):
    """The float8 projections and the MLP, compiled as in the model."""
    u, qkv = train_gpt.norm(randn(T, C)), randn(3 * C, C, std=0.02)
    up, down = randn(HIDDEN, C, std=0.02), randn(HIDDEN, C, std=0.02)
    for name, plain, ours, weights, size in (
            ("float8_linear", F.linear, kernels.float8_linear, (qkv,), f"{T} x {C} -> {3 * C}"),
            ("float8_mlp", train_gpt.mlp, kernels.float8_mlp, (up, down), f"{T} x {C} -> {HIDDEN} -> {C}")):
        leaves = [tensor.detach().requires_grad_() for tensor in (u, *weights)]
        dy = randn(T, weights[-1].size(1 if name == "float8_mlp" else 0))
        functions = [torch.compile(function, dynamic=False) for function in (plain, ours)]
        with torch.no_grad():
            forward = [milliseconds(lambda: function(u, *weights)) for function in functions]
        both = [milliseconds(lambda: torch.autograd.grad(function(*leaves), leaves, dy)) for function in functions]
        operations = 2 * T * sum(weight.numel() for weight in weights)
        table.row(f"{name} forward", size, forward[1], operations, "TFLOP/s", forward[0])
        table.row(f"{name} forward + backward", size, both[1], 3 * operations, "TFLOP/s", both[0])


def document_starts() -> torch.Tensor:
    """Where the document of each of T tokens starts, (T,) int32, for documents of the lengths of web pages."""
    lengths = torch.empty(T // 16, device="cuda").log_normal_(6.09, 0.8).clamp(32, 2048).long()  # median 440
    borders = lengths.cumsum(0)
    borders = borders[borders < T]
    starts = torch.zeros(T, device="cuda", dtype=torch.int32)
    starts[borders] = borders.int()
    return starts.cummax(0).values.int()


def attention(table: Table):
    """FlexAttention with documents of web-like length; the block mask is built in the forward."""
    starts = document_starts()
    index = torch.arange(T, device="cuda", dtype=torch.int32)
    q, k, v, dy = randn(T, H, C // H, std=0.1), *(randn(T, H, C // H) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend_with(name):               # the mask is part of what is compiled, as in the model
        def attend(q, k, v, starts, window):
            return train_gpt.ATTENTION[name](starts, window, WINDOWS[-1])(q, k, v)
        return attend
    flex = torch.compile(attend_with("flex"), dynamic=False, fullgraph=True)
    for window in WINDOWS:
        first = torch.maximum(starts, index - window)
        operations = 4 * C * (index - first + 1).sum().item()       # q k and p v, each of 2 C a visible key
        plain = torch.compile(attend_with("plain"), dynamic=False)
        size = torch.tensor(window, device="cuda")                  # a number would be compiled anew for each window
        calls = [lambda: flex(*leaves, starts, size), lambda: plain(*leaves, starts, window)]
        forward = [milliseconds(call) for call in calls]
        outputs = [call() for call in calls]
        backward = [milliseconds(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)) for y in outputs]
        for name, (ours, other), factor in (("forward", forward, 1), ("backward", backward, 2.5)):
            shape = f"{T} x {H} x {C // H}"
            table.row(f"flex {name}, window {window}", shape, ours, factor * operations, "TFLOP/s", other)


def main():
    if not torch.cuda.is_available() or kernels is None:
        fail("this needs a CUDA GPU and Triton, and one of them is missing here; run it on such a machine")
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False       # the backward is timed many times after one forward
    has_float8 = torch.cuda.get_device_capability() >= (8, 9)
    table = Table()
    head(table, [False, True] if has_float8 else [False])
    if has_float8:
        products(table)
    attention(table)


if __name__ == "__main__":
    main()
