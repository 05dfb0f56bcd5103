"""
Takes a model to llama.cpp and what builds on it (Ollama, LM Studio): one GGUF file, which they run
as an Apertus, since they know no nanochat.

    python export_gguf.py --data=toy --source=sft                     # 8 bits a weight
    python export_gguf.py --data=toy --source=sft --quant=bf16
    python export_gguf.py --data=toy --source=sft --check=True        # compares it with its model

Needs the plain model of November 2025 (--arch=nanochat_2025) and a tokenizer of single digits
(tok_train.py --digits=1): nothing else is known there. The file is, whole or not at all,
export/<stage>_<tag>-q8_0.gguf in the state folder.
"""
import struct

import common
import configurator
import models
import tokenizer as tok

data = "fineweb_edu"         # the data set of the model
source = "sft"               # the model's stage of training: base, mid, sft or rl
tag = ""                     # which model, d20 for instance; empty: the newest
quant = "q8_0"               # of the matrices: q8_0 (8 bits, a scale for 32), bf16 or f32
out = ""                     # the file to write; empty: one in export/ in the state folder
check = False                # compare the file that is there with its model; writes nothing
settings = configurator.configure(globals()) if __name__ == "__main__" else None

import numpy as np
import torch  # only here: it takes seconds, and --help needs none of it

from export import CHAT_TEMPLATE, plain_model, target_of, vocabulary

# -------------------------------------------------------------------------------------------------
# the format: github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3

KINDS = {"f32": 0, "q8_0": 8, "bf16": 30}  # ggml's numbers of types of tensors
U32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # and of values

def packed(value):
    """A Python value -> (number of its type, bytes)"""
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return U32, struct.pack("<I", value)
    if isinstance(value, float):
        return FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        text = value.encode()
        return STRING, struct.pack("<Q", len(text)) + text
    parts = [packed(item) for item in value]
    kind = INT32 if parts[0][0] == U32 else parts[0][0]  # of token types
    return ARRAY, struct.pack("<IQ", kind, len(parts)) + b"".join(part for _, part in parts)

def q8_0(tensor):
    """float32 [..., n], n a multiple of 32 -> bytes: of each 32 numbers a float16 scale and 32
    int8"""
    blocks = tensor.numpy().reshape(-1, 32)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    rounded = np.rint(blocks * inverse).astype(np.int8)
    return np.concatenate([scales.astype("<f2").view(np.int8), rounded], axis=1).tobytes()

def content(tensor, kind):
    if kind == "q8_0":
        return q8_0(tensor)
    if kind == "bf16":
        return tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    return tensor.numpy().tobytes()

def gguf(fields, tensors):
    """fields: {key: value}; tensors: {name: (float32 tensor, kind)}, in their order -> bytes"""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))
    for key, value in fields.items():
        kind, text = packed(value)
        head += packed(key)[1] + struct.pack("<I", kind) + text
    parts, at = [], 0
    for name, (tensor, kind) in tensors.items():
        part = content(tensor.contiguous(), kind)
        head += packed(name)[1] + struct.pack("<I", tensor.ndim)
        head += struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape))
        head += struct.pack("<IQ", KINDS[kind], at)
        parts += [part, b"\0" * (-len(part) % 32)]
        at += len(part) + len(parts[-1])
    return b"".join([head, b"\0" * (-len(head) % 32), *parts])

# -------------------------------------------------------------------------------------------------
# the model, as an Apertus

EPS = float(torch.finfo(torch.float32).eps)  # of our norms

def turned(weight, heads):
    """The rows of queries or keys [heads * D, C] with the halves of each head swapped: llama.cpp
    turns the pairs by theta, gpt.rotate by minus theta."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).flip(1).reshape(weight.shape)

def tensors_of(model, kind):
    """{name there: (tensor, kind)}. Its activation xIELU is squared ReLU where alpha_p is 1 and the
    rest 0; its norms have weights, here ones; our norm behind the embedding stands in the table."""
    config = model.config
    ones, ones_of_head = torch.ones(config.n_embd), torch.ones(config.head_dim)
    table = model.transformer.wte.weight
    table = table * torch.rsqrt(table.square().mean(1, keepdim=True) + EPS)
    found = {"token_embd": (table, kind), "output": (model.lm_head.weight, kind),
             "output_norm": (ones, "f32")}
    for layer, block in enumerate(model.transformer.h):
        attn, mlp = block.attn, block.mlp
        matrices = {"attn_q": turned(attn.c_q.weight, config.n_head),
                    "attn_k": turned(attn.c_k.weight, config.n_kv_head),
                    "attn_v": attn.c_v.weight, "attn_output": attn.c_proj.weight,
                    "ffn_up": mlp.c_fc.weight, "ffn_down": mlp.c_proj.weight}
        norms = {"attn_norm": ones, "ffn_norm": ones, "attn_q_norm": ones_of_head,
                 "attn_k_norm": ones_of_head}
        found |= {f"blk.{layer}.{name}": (matrix, kind) for name, matrix in matrices.items()}
        found |= {f"blk.{layer}.{name}": (norm, "f32") for name, norm in norms.items()}
    return {f"{name}.weight": (tensor.detach(), own_kind)
            for name, (tensor, own_kind) in found.items()}

def fields_of(model, tokenizer, name):
    """What the file says besides. The softcap is left out: it changes no order of the logits, so at
    temperature 0 the tokens are the same."""
    config = model.config
    tokens, merges = vocabulary(tokenizer)
    special = sorted(tokenizer.special_tokens, key=tokenizer.special)
    return {
        "general.architecture": "apertus", "general.name": f"nanochat {name}",
        "apertus.block_count": config.n_layer, "apertus.context_length": config.sequence_len,
        "apertus.embedding_length": config.n_embd, "apertus.vocab_size": config.vocab_size,
        "apertus.feed_forward_length": 4 * config.n_embd,
        "apertus.attention.head_count": config.n_head,
        "apertus.attention.head_count_kv": config.n_kv_head,
        "apertus.attention.layer_norm_rms_epsilon": EPS,
        "apertus.rope.freq_base": 10_000.0, "apertus.rope.dimension_count": config.head_dim,
        # before softplus, which is taken of both alphas
        "xielu.alpha_p": 0.5413248546, "xielu.alpha_n": -100.0, "xielu.beta": 0.0,
        "xielu.eps": -1e-6,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3] * len(special),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.special("<|assistant_end|>"),
        "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": CHAT_TEMPLATE,
    }

def main():
    folder, step, tokenizer = plain_model(source, data, tag)
    common.check(tokenizer.pattern == tok.pattern_of(1), "llama.cpp knows no tokenizer with two "
                 "digits in a token: train one with tok_train.py --digits=1 (speedrun.sh ... -- "
                 "--tok.digits=1), and a model on it")
    name = f"{source}_{folder.name}"
    target = target_of(out, data, f"{name}-{quant}.gguf")
    model = models.load_model(folder, step, "cpu", torch.float32)
    made = gguf(fields_of(model, tokenizer, name), tensors_of(model, quant))
    there = target.is_file() and target.read_bytes() == made
    if check:
        common.check(target.is_file(), f"there is no {target}: export it first, without --check")
        if not there:
            common.fail(f"{target} is not what this model is exported to", code=1)
    elif not there:
        common.check(target.suffix == ".gguf" or not target.exists(),
                     f"{target} is there and no .gguf: name a new file with --out")
        with common.writing(target):
            part = target.with_name(f".{target.name}.part")
            common.atomic_write(part, made)
            if target.exists():
                aside = target.rename(common.aside_name(target))
                print(f"the file that was there is kept in {aside}")
            part.rename(target)
    print(f"{target} holds {name}, {len(made) / 1e6:,.1f} MB, weights in {quant}; "
          "llama-cli -m FILE talks to it")

if __name__ == "__main__":
    main()
