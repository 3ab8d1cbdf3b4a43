"""Triton kernels of the training scripts, and the operators built on them.

This is a module, not a program. The training scripts import it if it is beside them and Triton is installed, and use it
on CUDA. Their flag --kernels=false turns it off. Each operator has a plain PyTorch twin, which computes the same up to
rounding:

    head_loss           head_loss of the training script
    float8_linear       torch.nn.functional.linear
    float8_mlp          mlp of the training script
    decode_attention    the attention of GPT.decode in the training script, without kernels

tests/test_kernels.py compares them with float64, and dev/bench_kernels.py measures their speed.
Shapes: T tokens, C residual channels, V vocabulary, K targets.
"""
if __name__ == "__main__":               # before the imports, so that the text comes at once and on every machine
    print(__doc__.strip())
    raise SystemExit

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# float8 scales are fixed: rows of x are RMS-normalised, so no entry exceeds sqrt(C), and 28 fits; head weights to 1.75
# (the public record allows 1.6), larger ones saturate; with target weights up to 2 in sum a logit gradient is at most
# 2 x 11.5/15 = 1.54 in size, and e5m2 reaches 57344
X_SCALE, WEIGHT_SCALE, GRAD_SCALE = 16.0, 256.0, 16384.0
HEAD_CHUNK = 32_768                      # tokens whose logits exist at one time

# -----------------------------------------------------------------------------
# Cross-entropy of logits 23 sigmoid((z + 5) / 7.5) = 11.5 + 11.5 tanh((z + 5) / 15)

LOG2_E = tl.constexpr(1.4426950408889634)

@triton.jit
def tanh_of_logit(z):
    """tanh((z + 5) / 15) in one instruction of the special function unit, relative error 2^-11."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [(z + 5.0) * (1.0 / 15.0)], dtype=tl.float32,
                                     is_pure=True, pack=1)

@triton.jit
def cross_entropy_kernel(z_TV, targets_TK, weights_K, counts_V, loss_T, lse_T, weight_T, z_target_TK, V,
                         K: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program: log-sum-exp, sum of active target weights, and weighted loss."""
    row = tl.program_id(0).to(tl.int64)
    z_TV += row * V
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_TV + column, mask=column < V, other=0.0).to(tl.float32)
        # logits are at most 23, so the sum of exponentials is safe without a maximum
        exp = tl.exp2((11.5 * LOG2_E) * (1.0 + tanh_of_logit(z)))
        if COUNTED:
            exp *= tl.load(counts_V + column, mask=column < V, other=0.0)
        total += tl.where(column < V, exp, 0.0)
    lse = tl.log(tl.sum(total))
    loss, weight = 0.0, 0.0
    for k in tl.static_range(K):
        target = tl.load(targets_TK + row * K + k)
        w = tl.where(target >= 0, tl.load(weights_K + k), 0.0)
        z = tl.load(z_TV + tl.maximum(target, 0)).to(tl.float32)
        tl.store(z_target_TK + row * K + k, z)
        loss += w * (lse - 11.5 * (1.0 + tanh_of_logit(z)))
        weight += w
    tl.store(loss_T + row, loss)
    tl.store(lse_T + row, lse)
    tl.store(weight_T + row, weight)

@triton.jit
def grad_of_logit(z, lse, weight, targets_weight, scale):
    """Derivative of the row's loss by z, times scale; `targets_weight`: the weight of targets at this column."""
    tanh = tanh_of_logit(z)
    grad = weight * tl.exp2((11.5 * LOG2_E) * tanh + (11.5 - lse) * LOG2_E) - targets_weight
    return grad * (1.0 - tanh * tanh) * ((11.5 / 15.0) * scale)

@triton.jit
def cross_entropy_grad_kernel(z_TV, lse_T, weight_T, counts_V, grad_TV, grad_VT, scale, T, V, COUNTED: tl.constexpr,
                              TRANSPOSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile a program: the gradient as if no column were a target, as it is and, for float8, transposed too."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < T)[:, None] & (column < V)[None, :]
    place = row.to(tl.int64)[:, None] * V + column[None, :]
    lse = tl.load(lse_T + row, mask=row < T, other=0.0)[:, None]
    weight = tl.load(weight_T + row, mask=row < T, other=0.0)[:, None]
    if COUNTED:
        weight = weight * tl.load(counts_V + column, mask=column < V, other=0.0)[None, :]
    z = tl.load(z_TV + place, mask=inside, other=0.0).to(tl.float32)
    grad = grad_of_logit(z, lse, weight, 0.0, scale).to(tl.bfloat16)            # two bytes are cheaper to transpose
    tl.store(grad_TV + place, grad.to(grad_TV.dtype.element_ty), mask=inside)
    if TRANSPOSE:
        place = column.to(tl.int64)[:, None] * T + row[None, :]
        tl.store(grad_VT + place, tl.trans(grad).to(grad_VT.dtype.element_ty), mask=tl.trans(inside))

@triton.jit
def target_grad_kernel(z_target_TK, targets_TK, weights_K, lse_T, weight_T, grad_TV, grad_VT, scale, T, V,
                       K: tl.constexpr, TRANSPOSE: tl.constexpr):
    """One row a program: the gradient again in the few columns that are targets, from their logits."""
    row = tl.program_id(0).to(tl.int64)
    lse, weight = tl.load(lse_T + row), tl.load(weight_T + row)
    for k in tl.static_range(K):
        target, targets_weight = tl.load(targets_TK + row * K + k), 0.0
        for other in tl.static_range(K):
            targets_weight += tl.where(tl.load(targets_TK + row * K + other) == target, tl.load(weights_K + other), 0.0)
        z = tl.load(z_target_TK + row * K + k)
        grad = grad_of_logit(z, lse, weight, targets_weight, scale).to(grad_TV.dtype.element_ty)
        tl.store(grad_TV + row * V + target, grad, mask=target >= 0)
        if TRANSPOSE:
            tl.store(grad_VT + target.to(tl.int64) * T + row, grad, mask=target >= 0)

def cross_entropy(z_TV: Tensor, targets_TK: Tensor, weights_K: Tensor, counts_V: Tensor | None,
                  float8: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss summed, gradient by z (T, V), its transpose (V, T) or None).

    z bf16, targets int64 (-1: none), weights fp32, counts fp32 (1 for targets) or None for ones. With float8 the
    gradient is e5m2, multiplied by GRAD_SCALE, and comes both ways round, as float8 products want it; otherwise it is
    bf16 and overwrites z.
    """
    (T, V), K = z_TV.shape, targets_TK.size(1)
    loss, lse, weight = (z_TV.new_empty(T, dtype=torch.float32) for _ in range(3))
    z_target = z_TV.new_empty(T, K, dtype=torch.float32)
    counted, counts = counts_V is not None, weights_K if counts_V is None else counts_V
    cross_entropy_kernel[(T,)](z_TV, targets_TK, weights_K, counts, loss, lse, weight, z_target, V, K=K,
                               COUNTED=counted, BLOCK=4096, num_warps=8)
    grad = torch.empty_like(z_TV, dtype=torch.float8_e5m2) if float8 else z_TV
    transposed, scale = (grad.new_empty(V, T), GRAD_SCALE) if float8 else (grad, 1.0)
    rows, columns = (64, 64) if float8 else (32, 128)
    grid = triton.cdiv(V, columns), triton.cdiv(T, rows)
    cross_entropy_grad_kernel[grid](z_TV, lse, weight, counts, grad, transposed, scale, T, V, COUNTED=counted,
                                    TRANSPOSE=float8, ROWS=rows, COLUMNS=columns, num_warps=4)
    target_grad_kernel[(T,)](z_target, targets_TK, weights_K, lse, weight, grad, transposed, scale, T, V, K=K,
                             TRANSPOSE=float8, num_warps=1)
    return loss.sum(), grad, transposed if float8 else None

# -----------------------------------------------------------------------------
# Head: product with the vocabulary, loss, and both gradients

def to_float8(x: Tensor, scale: float) -> Tensor:
    """x * scale in e4m3, saturating."""
    return (x.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn)

def scaled_product(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, fast: bool) -> Tensor:
    """a @ b / scale for float8 a (row-major) and b (column-major)."""
    one = torch.ones((), device=a.device)        # scales need storage of their own: cuBLAS wants them 16-byte aligned
    return torch._scaled_mm(a, b, scale_a=one, scale_b=one / scale, out_dtype=dtype, use_fast_accum=fast)

@torch.library.custom_op("minutegpt::head_loss", mutates_args=())
def head_loss_op(x_TC: Tensor, weight_VC: Tensor, targets_TK: Tensor, weights_K: Tensor, counts_V: Tensor | None,
                 float8: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (fp32 scalar) and its gradients by x (T, C) and by the head weight (V, C), chunk by chunk."""
    loss, dx = torch.zeros((), device=x_TC.device), torch.empty_like(x_TC)
    dweight = torch.zeros_like(weight_VC, dtype=torch.float32)
    if float8:
        weight8, x8 = to_float8(weight_VC, WEIGHT_SCALE), to_float8(x_TC, X_SCALE)
        weight8_CV = weight8.T.contiguous()
    for start in range(0, x_TC.size(0), HEAD_CHUNK):
        rows = slice(start, start + HEAD_CHUNK)
        if float8:
            z = scaled_product(x8[rows], weight8.T, X_SCALE * WEIGHT_SCALE, torch.bfloat16, fast=True)
            part, grad, grad_VT = cross_entropy(z, targets_TK[rows], weights_K, counts_V, True)
            del z
            dx[rows] = scaled_product(grad, weight8_CV.T, GRAD_SCALE * WEIGHT_SCALE, torch.bfloat16, fast=False)
            dweight += scaled_product(grad_VT, x8[rows].T.contiguous().T, GRAD_SCALE * X_SCALE, torch.float32,
                                      fast=False)
        else:
            part, grad, _ = cross_entropy(x_TC[rows] @ weight_VC.T, targets_TK[rows], weights_K, counts_V, False)
            torch.mm(grad, weight_VC, out=dx[rows])
            dweight += torch.mm(grad.T, x_TC[rows], out_dtype=torch.float32)
        loss += part
    return loss, dx, dweight.to(weight_VC.dtype)

@head_loss_op.register_fake
def _(x_TC, weight_VC, targets_TK, weights_K, counts_V, float8):
    return weights_K.new_empty(()), torch.empty_like(x_TC), torch.empty_like(weight_VC)

def head_loss_backward(ctx, grad, *_):
    dx, dweight = ctx.saved_tensors
    return dx * grad.to(dx.dtype), dweight * grad.to(dweight.dtype), None, None, None, None

head_loss_op.register_autograd(
    head_loss_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output[1:]))

def head_loss(x_TC: Tensor, weight_VC: Tensor, targets_TK: Tensor, weights_K: Tensor, counts_V: Tensor | None,
              float8: bool) -> Tensor:
    """Sum over tokens of the weighted cross-entropies of K targets (int64, -1: none), a fp32 scalar with gradients.

    x (T, C) RMS-normalised rows and weight (V, C), bf16; counts (V,) fp32, 1 for targets: for how many tokens each row
    of the weight stands in the sum of exponentials, None: for one. With float8 all three products run in float8. T
    must be a multiple of 16.
    """
    return head_loss_op(x_TC, weight_VC, targets_TK, weights_K, counts_V, float8)[0]

# -----------------------------------------------------------------------------
# Float8 projections of normalised rows, and the MLP

def weight_to_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in e4m3 scaled so that its largest entry becomes 448, row-major; and the scale."""
    scale = 448 / weight.abs().amax().float().clamp(min=1e-12)
    return to_float8(weight, scale).contiguous(), scale

class Float8Linear(torch.autograd.Function):
    """The product of float8_linear; its gradients are bf16 products."""

    @staticmethod
    def forward(ctx, u, weight):
        ctx.save_for_backward(u, weight)
        weight8, scale = weight_to_float8(weight)
        return scaled_product(to_float8(u, X_SCALE), weight8.T, X_SCALE * scale, u.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):
        u, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ u

@triton.jit
def relu2_kernel(a_TC, b_FC, square_TF, out_TF, out8_TF, inverse, scale, C, BACKWARD: tl.constexpr, TILE: tl.constexpr):
    """One tile a program: a product of float8 matrices, made relu^2 or its gradient in registers (#59)."""
    row, column = tl.program_id(1) * TILE, tl.program_id(0) * TILE
    product = tl.zeros([TILE, TILE], tl.float32)
    for k in range(0, C, TILE):          # what lies outside reads as zero
        product = tl.dot(a_TC.load([row, k]), b_FC.load([column, k]).T, product)
    product *= tl.load(inverse)
    if BACKWARD:
        out, largest = 2.0 * tl.sqrt(square_TF.load([row, column]).to(tl.float32)) * product, 57344.0
    else:
        root = tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL)
        out, largest = root * root, 448.0
    out_TF.store([row, column], out.to(tl.bfloat16))
    out = tl.clamp(out * tl.load(scale), -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    out8_TF.store([row, column], out.to(out8_TF.dtype))

@torch.library.custom_op("minutegpt::relu2_product", mutates_args=())
def relu2_product(a8_TC: Tensor, b8_FC: Tensor, inverse: Tensor, scale: Tensor,
                  square_TF: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out bf16 (T, F), out * scale in float8, saturating): out = relu(p)^2 for p = a8 @ b8.T * inverse.

    With the square of a forward, out is the gradient by its p: 2 sqrt(square) p, and its float8 e5m2 instead of e4m3.
    inverse and scale are fp32 scalars on the device; C and F multiples of 16.
    """
    (T, C), F, tile, backward = a8_TC.shape, b8_FC.size(0), 128, square_TF is not None
    out, out8 = relu2_product_shapes(a8_TC, b8_FC, inverse, scale, square_TF)
    blocks = [TensorDescriptor.from_tensor(x, [tile, tile])
              for x in (a8_TC, b8_FC, square_TF if backward else out, out, out8)]
    relu2_kernel[triton.cdiv(F, tile), triton.cdiv(T, tile)](
        *blocks, inverse, scale, C, BACKWARD=backward, TILE=tile, num_warps=4, num_stages=3)
    return out, out8

@relu2_product.register_fake
def relu2_product_shapes(a8_TC, b8_FC, inverse, scale, square_TF):
    out = a8_TC.new_empty(a8_TC.size(0), b8_FC.size(0), dtype=torch.bfloat16)
    return out, torch.empty_like(out, dtype=torch.float8_e4m3fn if square_TF is None else torch.float8_e5m2)

class Float8MLP(torch.autograd.Function):
    """The products of float8_mlp; the gradient of its input comes from float8 products too, those of the weights not.

    Of the hidden layer only relu^2 is kept; the backward takes its root (#87).
    """

    @staticmethod
    def forward(ctx, u, up, down):
        (up8, up_scale), (down8, down_scale) = weight_to_float8(up), weight_to_float8(down.T)
        # for normalised u a pre-activation has about the norm of its row of `up`: units 20 times that still fit
        hidden_scale = 1 / up.float().square().sum(dim=1).mean().clamp(min=1e-6)
        square, hidden8 = relu2_product(to_float8(u, X_SCALE), up8, 1 / (X_SCALE * up_scale), hidden_scale, None)
        ctx.save_for_backward(u, square, up, down)
        return scaled_product(hidden8, down8.T, hidden_scale * down_scale, u.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):
        u, square, up, down = ctx.saved_tensors
        (up8, up_scale), (down8, down_scale) = weight_to_float8(up.T), weight_to_float8(down)
        grad_scale = 16384 / grad.abs().amax().float().clamp(min=1e-20)
        grad8 = (grad.float() * grad_scale).to(torch.float8_e5m2)
        dpre_scale = grad_scale / 16     # these may be larger than grad; e5m2 has room below
        dpre, dpre8 = relu2_product(grad8, down8, 1 / (grad_scale * down_scale), dpre_scale, square)
        du = scaled_product(dpre8, up8.T, dpre_scale * up_scale, u.dtype, fast=True)
        return du, dpre.T @ u, square.T @ grad

def float8_linear(u_TC: Tensor, weight_FC: Tensor) -> Tensor:
    """u @ weight.T (T, F), the product in float8; u bf16 with RMS-normalised rows, weight bf16."""
    return Float8Linear.apply(u_TC, weight_FC)

def float8_mlp(u_TC: Tensor, up_FC: Tensor, down_FC: Tensor) -> Tensor:
    """relu(u @ up.T)^2 @ down (T, C), both products in float8; u bf16 with RMS-normalised rows, up and down bf16."""
    return Float8MLP.apply(u_TC, up_FC, down_FC)

# -----------------------------------------------------------------------------
# Decoding: attention of one query a row over a ring of keys and values

@triton.jit
def decode_attention_kernel(q_BHD, k_BHD, v_BHD, keys_BRHD, values_BRHD, position_B, start_B, y_BHD, sum_BHSD,
                            total_BHS, max_BHS, done_BH, R, window, H: tl.constexpr, E: tl.constexpr,
                            D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """One part of what a query sees a program: maximum and sum of its exponentials, and the values weighted with them.

    Queries and keys have E channels, values D. The program that is done last puts the parts of its row and head
    together.
    """
    row, head, part, parts = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    position, start = tl.load(position_B + row).to(tl.int32), tl.load(start_B + row).to(tl.int32)
    newest, before = position % R, tl.minimum(position - start, window)         # so many tokens before it are seen
    lane, channel, key_channel = tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, E)
    own, own_key = (row * H + head) * D + channel, (row * H + head) * E + key_channel
    q = tl.load(q_BHD + own_key).to(tl.float32)
    k, v = tl.load(k_BHD + own_key), tl.load(v_BHD + own)
    ring = row.to(tl.int64) * R * H             # of this row, in tokens and heads
    keys_BRHD += ring * E + head * E + key_channel
    values_BRHD += ring * D + head * D + channel
    # the first part begins with the new token and puts it into the ring; nobody reads it from there
    first = (lane == 0) & (part == 0)
    if part == 0:
        tl.store(keys_BRHD + newest * H * E, k)
        tl.store(values_BRHD + newest * H * D, v)
    # a softmax in each lane; nothing goes from thread to thread before the end but the sum of a score
    most_S = tl.where(first, tl.sum(q * k.to(tl.float32)), float("-inf"))
    total_S = tl.where(first, 1.0, 0.0)
    sum_SD = tl.where(first[:, None], v.to(tl.float32)[None, :], 0.0)
    for low in range(part * BLOCK, before, parts * BLOCK):
        age = low + 1 + lane
        seen, slot = age <= before, newest - age
        place = tl.where(slot < 0, slot + R, slot)[:, None] * H
        key = tl.load(keys_BRHD[None, :] + place * E, mask=seen[:, None], other=0.0)
        # on its way before the key is used
        value = tl.load(values_BRHD[None, :] + place * D, mask=seen[:, None], other=0.0)
        score_S = tl.where(seen, tl.sum(key.to(tl.float32) * q[None, :], 1), float("-inf"))
        newmost_S = tl.maximum(most_S, score_S)
        base_S = tl.where(newmost_S == float("-inf"), 0.0, newmost_S)           # nothing seen so far
        weight_S, fade_S = tl.exp(score_S - base_S), tl.exp(most_S - base_S)
        sum_SD = sum_SD * fade_S[:, None] + weight_S[:, None] * value.to(tl.float32)
        total_S, most_S = total_S * fade_S + weight_S, newmost_S
    most = tl.max(most_S)
    scale_S = tl.exp(most_S - tl.where(most == float("-inf"), 0.0, most))
    total, sums = tl.sum(total_S * scale_S), tl.sum(sum_SD * scale_S[:, None], 0)
    out = (row * H + head) * parts
    tl.store(sum_BHSD + (out + part) * D + channel, sums)
    tl.store(total_BHS + out + part, total)
    tl.store(max_BHS + out + part, most)
    tl.debug_barrier()                   # what this program wrote comes before its mark
    if tl.atomic_add(done_BH + row * H + head, 1, sem="acq_rel") == parts - 1:
        index = tl.arange(0, PARTS)
        there = index < parts
        # past the cache of this multiprocessor, where others' results are not
        mosts = tl.load(max_BHS + out + index, mask=there, other=float("-inf"), cache_modifier=".cg")
        scales = tl.exp(mosts - tl.max(mosts))
        totals = tl.load(total_BHS + out + index, mask=there, other=0.0, cache_modifier=".cg") * scales
        values = tl.load(sum_BHSD + (out + index[:, None]) * D + channel[None, :], mask=there[:, None], other=0.0,
                         cache_modifier=".cg")
        tl.store(y_BHD + own, tl.sum(values * scales[:, None], 0) / tl.sum(totals))
        tl.store(done_BH + row * H + head, 0)                       # for the next call

def decode_attention(q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor, keys_BRHD: Tensor, values_BRHD: Tensor,
                     position_B: Tensor, start_B: Tensor, window: int, done_BH: Tensor) -> Tensor:
    """Attention output (B, H, D) of the token at position_B of each row, which enters the rings at slot position % R.

    A query sees itself and what the ring, longer than the window, holds from position max(start, position - window) on;
    the softmax scale is already in q. Numbers of channels are powers of two; values may have others than keys. done
    (B, H) int32 is zero, and is so again after the call.
    As GPT.decode does it without kernels.
    """
    (B, R, H, D), block = values_BRHD.shape, 32
    parts = min(triton.cdiv(R, block), triton.cdiv(768, B * H))     # several programs for a multiprocessor
    sums, (total, most) = q_BHD.new_empty(B, H, parts, D, dtype=torch.float32), (
        q_BHD.new_empty(B, H, parts, dtype=torch.float32) for _ in range(2))
    y_BHD = torch.empty(B, H, D, dtype=q_BHD.dtype, device=q_BHD.device)
    decode_attention_kernel[(B, H, parts)](
        q_BHD.contiguous(), k_BHD.contiguous(), v_BHD.contiguous(), keys_BRHD, values_BRHD, position_B, start_B, y_BHD,
        sums, total, most, done_BH, R, window, H=H, E=keys_BRHD.size(3), D=D, BLOCK=block,
        PARTS=triton.next_power_of_2(parts), num_warps=2)
    return y_BHD

# -----------------------------------------------------------------------------
# Each kernel beside the plain PyTorch that it stands for

# how much the loss and each gradient may differ: float8 keeps two or three bits, but its rounding averages out
LARGEST_ERROR = 0.25                     # norm of the difference, relative to the norm of the plain one
LARGEST_SCALE_ERROR = 0.05               # length along the plain one, less one

def compare_with_plain(model, names: list[str], tokens: Tensor, targets: Tensor,
                       loss_weights: Tensor) -> tuple[dict, list[str]]:
    """What is wrong with the kernels of a training script's model, one at a time, beside none of them.

    model.kernels: name of a plain function -> the kernel in its place; left empty. names: the parameters whose gradients
    are compared, which should be large: small gradients are sums that mostly cancel, so that rounding rules them.
    Returns ({name: why the kernel does not run on this device}, [a sentence for each one that gives another training
    loss or other gradients]).
    """
    kernels, faults, differences = model.kernels, {}, []
    model.kernels = {}
    plain = loss_and_gradients(model, names, tokens, targets, loss_weights)
    for name, kernel in kernels.items():
        model.kernels = {name: kernel}
        try:
            found = loss_and_gradients(model, names, tokens, targets, loss_weights)
        except Exception as error:       # whatever a kernel comes up with on a device that it was not made for
            faults[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            continue
        finally:
            model.kernels = {}
        for part, wanted in plain.items():
            wanted, have = wanted.float(), found[part].float()
            square = wanted.square().sum().clamp(min=1e-20)
            error = ((have - wanted).square().sum() / square).sqrt().item()
            scale = ((have * wanted).sum() / square).item()
            if not (error <= LARGEST_ERROR and abs(scale - 1) <= LARGEST_SCALE_ERROR):
                differences.append(f"the kernel of {name} (triton_kernels.py) does not compute what the plain {name} "
                                   f"does: the {part} differs by {error:.2g} of its norm, its size is {scale:.3g} of "
                                   "what it should be")
                break
    return faults, differences

def loss_and_gradients(model, names: list[str], tokens: Tensor, targets: Tensor,
                       loss_weights: Tensor) -> dict[str, Tensor]:
    """The training loss and the gradients of these parameters, by name; the model keeps none."""
    loss = model(tokens, targets, loss_weights)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, param in model.named_parameters():
        if name in names and param.grad is not None:
            found[f"gradient of {name}"] = param.grad
        param.grad = None
    return found
