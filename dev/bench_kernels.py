"""How fast the kernels are: a Markdown table, each against the plain PyTorch version compiled with torch.compile.

    python dev/bench_kernels.py

Needs a CUDA GPU with 60 GB and Triton; takes a few minutes, most of it compilation. Rows in float8 appear from compute
capability 8.9 on. Times are medians of triton.testing.do_bench. The ceilings come first: GB/s of a copy on the device,
TFLOP/s of a bf16 product of 8192 x 8192 matrices. Bytes and operations are the least that the task needs (of attention:
the keys that documents and window let a token see), so what a kernel reads, computes or skips beyond that lowers its
share; float8 rows can pass 100 % of the bf16 ceiling.
"""
import sys
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # noqa: E402

kernels = train_gpt.triton_kernels
T, C, HIDDEN, V, H = 131_072, 768, 3072, 50_304, 6


def milliseconds(function) -> float:
    """Median time of a call."""
    from triton.testing import do_bench
    return do_bench(function, warmup=50, rep=200, return_mode="median")


def randn(*shape, std=1.0) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * std


class Table:
    """Prints rows as they are measured; the constructor measures the ceilings."""

    def __init__(self):
        buffer, a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda"), randn(8192, 8192)
        copy, product = milliseconds(buffer.clone), milliseconds(lambda: a @ a)
        self.ceilings = {"GB/s": 2 * buffer.numel() / copy / 1e6, "TFLOP/s": 2 * 8192 ** 3 / product / 1e9}
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {self.ceilings['GB/s']:.0f} GB/s, "
              f"bf16 product {self.ceilings['TFLOP/s']:.0f} TFLOP/s\n")
        print("| operation | size | ms | rate | share of ceiling | plain, compiled: ms | times faster |")
        print("| --- | --- | --: | --: | --: | --: | --: |", flush=True)

    def row(self, operation: str, size: str, ms: float, work: float, unit: str, plain: float | None = None):
        """One row: `work` is bytes for GB/s, operations for TFLOP/s; plain the time of the PyTorch version, if any."""
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


def attention(table: Table):
    """FlexAttention with documents of web-like length; the block mask is built in the forward."""
    lengths = torch.empty(T // 16, device="cuda").log_normal_(6.09, 0.8).clamp(32, 2048).long()  # median 440
    borders, index = lengths.cumsum(0), torch.arange(T, device="cuda", dtype=torch.int32)
    starts, borders = torch.zeros_like(index), borders[borders < T]
    starts[borders] = borders.int()
    starts = starts.cummax(0).values.int()
    q, k, v, dy = randn(T, H, C // H, std=0.1), *(randn(T, H, C // H) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend(q, k, v, starts, window):
        return train_gpt.ATTENTION["flex"](starts, window, 1408)(q, k, v)
    flex = torch.compile(attend, dynamic=False, fullgraph=True)
    for window in (128, 384, 896, 1408):
        first = torch.maximum(starts, index - window)
        operations = 4 * C * (index - first + 1).sum().item()       # q k and p v, each of 2 C a visible key
        plain = torch.compile(train_gpt.plain_attention, dynamic=False)
        seen = starts, torch.tensor(window, device="cuda", dtype=torch.int32)
        pairs = [(flex(*leaves, *seen), lambda: flex(*leaves, *seen)),
                 (plain(*leaves, first, window), lambda: plain(*leaves, first, window))]
        forward = [milliseconds(call) for _, call in pairs]
        backward = [milliseconds(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)) for y, _ in pairs]
        for name, (ours, other), factor in (("forward", forward, 1), ("backward", backward, 2.5)):
            size = f"{T} x {H} x {C // H}"
            table.row(f"flex {name}, window {window}", size, ours, factor * operations, "TFLOP/s", other)


def main() -> int:
    """Prints the table; returns the exit code."""
    if not torch.cuda.is_available() or kernels is None:
        print("bench_kernels.py: needs a CUDA GPU and Triton, and one is missing here; run it on such a machine",
              file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False       # the backward alone is timed many times on one forward
    table = Table()
    head(table, [False, True] if torch.cuda.get_device_capability() >= (8, 9) else [False])
    if torch.cuda.get_device_capability() >= (8, 9):
        products(table)
    attention(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
