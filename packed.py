"""
A model's weights as the products of one token a row read them (engine.py): in the order in which a
CPU reads them fastest, or rounded to 8 bits.
"""
import warnings
from functools import partial

import torch
import torch.nn.functional as F

from gpt import GATE_CHANNELS

def int8_product(weight):
    """weight [out, in] -> a function x [n, in] -> x @ weight.T [n, out], both float32. Each row of
    the weight is rounded to 8 bits with a scale of its own, x at each call with one scale."""
    scales = weight.abs().amax(1).clamp(min=1e-12).double() / 127
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a later torch will be without it; ours is pinned
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(rounded, None)
    # without VNNI the sum of two products overflows 16 bits unless x keeps to 7 of its 8
    narrow = not torch.cpu._is_vnni_supported()
    return partial(torch.ops.quantized.linear_dynamic.default, W_prepack=packed,
                   reduce_range=narrow)

def float_product(weight, dtype, rows):
    """weight [out, in] -> a function x [n, in] -> x @ weight.T [n, out], both float32, computed in
    dtype. rows: n at most."""
    weight = weight.to(dtype)
    if is_one_row_on_amx(weight, dtype, rows):
        return lambda x: torch.mv(weight, x[0].to(dtype)).float()[None]
    if not is_reordered(weight, dtype, rows):
        return lambda x: F.linear(x.to(dtype), weight).float()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x.to(dtype), packed, None, "none", [], "").float()

def is_one_row_on_amx(weight, dtype, rows):
    """Whether oneDNN would multiply a single row in the AMX tiles of a CPU. They are made for many:
    it then reads a d12 at 8 GB/s, and torch.mv at 12. Without AMX torch.mv takes twice as long as
    oneDNN (LOG.md)."""
    on_cpu = weight.device.type == "cpu" and dtype == torch.bfloat16
    return rows == 1 and on_cpu and torch.cpu._is_amx_tile_supported()

def is_reordered(weight, dtype, rows):
    """Whether a weight is kept in oneDNN's own order, which torch.compile's freezing uses too: on a
    CPU, where torch has its products for this dtype. 8192 x 8192, 16 rows, float32: 7 -> 21 GB/s
    (LOG.md). Its calls take 10 us longer: not for small matrices in float32."""
    ops = torch.ops.mkldnn
    has_ops = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    if weight.device.type != "cpu" or not has_ops or is_one_row_on_amx(weight, dtype, rows):
        return False
    if dtype == torch.bfloat16:
        return ops._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and weight.numel() >= (2 ** 20 if rows == 1 else 2 ** 17)

class Packed:
    """A model's matrices as products. Some are copies: of use while the weights do not change."""

    @torch.inference_mode()
    def __init__(self, model, rows, weights="auto"):
        """rows: how many run at once, at most. weights: "auto", in the model's compute dtype, or
        "int8", on a CPU alone: a quarter of float32's bytes to read for each token."""
        def product(*parts):
            weight = torch.cat(parts) if len(parts) > 1 else parts[0].detach()
            if weights == "int8":
                return int8_product(weight.float())
            return float_product(weight, model.dtype, rows)

        self.layers = []
        for block in model.transformer.h:
            attn = block.attn
            qkv = [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight]
            if hasattr(attn, "ve_gate"):  # it looks at the first channels only
                qkv.append(F.pad(attn.ve_gate.weight, (0, model.config.n_embd - GATE_CHANNELS)))
            self.layers.append((product(*qkv), product(attn.c_proj.weight),
                                product(block.mlp.c_fc.weight), product(block.mlp.c_proj.weight)))
        self.head = product(model.lm_head.weight)
