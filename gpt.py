"""
The model: a decoder-only transformer whose dial is depth; the width follows from it.

In arch="modern": value embeddings with gates (after ResFormer, arXiv 2410.17897), per-layer scalars
on the residual stream and on the embedding, smear, offset keys, on request embeddings of token
pairs (all four modded-nanogpt), sharper attention. All of it is off in arch="nanochat_2025", the
plain model of November 2025 whose checkpoints load as they are. In both: rotary positions
(2104.09864), QK norm (2010.04245), RMSNorm without parameters, squared ReLU (2109.08668), untied
embeddings, norm after the embedding, logit softcap (Gemma 2, 2408.00118), grouped-query attention
(2305.13245), no biases.

Weights are kept in float32; every matrix is cast to the compute dtype where it is used.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

HEAD_DIM = 128
SOFTCAP = 15.0        # logits are held within +-15
GATE_CHANNELS = 12    # gates look at the first channels of the residual stream
SHARPNESS = 1.44      # normed queries and keys of 128 channels are too blunt (nanochat: 1.2 * 1.2)

@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    arch: str = "modern"  # or "nanochat_2025"
    key_offset: bool = False  # whether half the channels of a key are of the token before
    bigram_vocab_size: int = 0  # rows of the table of embeddings of token pairs; 0: none

    @property
    def modern(self):
        return self.arch == "modern"

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

def config_from_depth(depth, vocab_size, sequence_len, arch="modern", aspect_ratio=64,
                      key_offset=True, bigram_vocab_size=0):
    """depth -> GPTConfig: width depth * aspect_ratio, rounded up to whole heads of 128.
    example: 20 -> 1280 wide, 10 heads"""
    n_head = -(-depth * aspect_ratio // HEAD_DIM)
    n_embd = n_head * HEAD_DIM
    if arch != "modern":
        key_offset, bigram_vocab_size = False, 0
    return GPTConfig(sequence_len, vocab_size, depth, n_head, n_head, n_embd, arch, key_offset,
                     bigram_vocab_size)

def norm(x):
    return F.rms_norm(x, (x.size(-1),))

class Linear(nn.Linear):
    """nn.Linear without bias that casts its float32 weight to the dtype of its input."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

def rotate(x, cos, sin):
    """Rotary embedding. x [B, T, H, D]; cos, sin [1 or B, T, 1, D/2]. Rotates by minus theta, as
    nanochat's weights expect."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)

def key_channels(k):
    """keys [..., D] -> views [..., 2, D/4]: the channels that stay, and those that are offset. Both
    of a rotary pair, D/2 apart, are of one kind."""
    return k.unflatten(-1, (2, 2, -1)).unbind(-2)

def offset_keys(k):
    """k [B, H, T, D] -> the same, where half the channels are those of the token before: who looks
    for a token finds what came behind it, in one layer and not in two (induction, arXiv 2209.11895;
    modded-nanogpt). 0.08 bits per byte less after three minutes on a core (LOG.md)."""
    own, before = key_channels(k)
    before = F.pad(before[:, :, :-1], (0, 0, 0, 0, 1, 0))  # zeros before the first token
    return torch.stack([own, before], dim=-2).flatten(-3)

def bigram_ids(before, idx, size):
    """token ids and those before them -> the row of each pair in a table of `size` rows, which
    pairs share as chance has it. For small models: 0.05 bits per byte less after three minutes on a
    core (LOG.md), while nanochat found nothing left of the gain at d25."""
    return (idx * 36313 ^ before * 27191) % size

def has_value_embedding(config, layer):
    """Every second layer, the last one included."""
    return config.modern and layer % 2 == (config.n_layer - 1) % 2

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer
        kv_dim = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if has_value_embedding(config, layer):
            self.ve_gate = Linear(GATE_CHANNELS, config.n_kv_head)

    def forward(self, x, ve, cos, sin, cache):
        """x [B, T, C]; ve [B, T, kv_dim] or None; cos, sin as in rotate; cache: None or an
        engine.KVCache"""
        heads = (-1, self.config.head_dim)  # [B, T, C] -> [B, T, H, D]
        q, k, v = (c(x).unflatten(-1, heads) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            gate = 3.0 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * ve.view(v.shape)
        q = norm(rotate(q, cos, sin))
        k = norm(rotate(k, cos, sin))
        if self.config.modern:
            q = q * SHARPNESS
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, D]
        mask = None  # plain causal attention
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            mask = cache.mask
        elif self.config.key_offset:
            k = offset_keys(k)
        grouped = self.config.n_kv_head != self.config.n_head
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                           enable_gqa=grouped)
        return self.c_proj(y.transpose(1, 2).flatten(2))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, ve, cos, sin, cache):
        x = x + self.attn(norm(x), ve, cos, sin, cache)
        return x + self.mlp(norm(x))

CHUNK = 2048  # tokens whose logits exist at once

def chunk_of(tokens):
    """How many of so many tokens: all in at most 16 chunks, since the compiler writes each out."""
    return max(CHUNK, -(-tokens // 16))

class SummedLoss(torch.autograd.Function):
    """The weighted sum of cross-entropies behind lm_head and the softcap. The logits of all tokens
    never exist at once: of a chunk of them loss and gradients are made in one turn (as in the Liger
    kernels, arXiv 2410.10989). A sixth faster than the plain form, too (LOG.md)."""

    @staticmethod
    def forward(ctx, h, weight, targets, weights):
        """h [N, C]; weight [V, C] of lm_head, float32; targets [N], those below 0 of weight 0;
        weights [N] -> scalar, float32"""
        cast = weight.to(h.dtype)
        vocabulary = torch.arange(len(weight), device=h.device)
        loss = torch.zeros((), device=h.device)
        grad_weight = torch.zeros_like(weight)
        grads_h = []
        chunk = chunk_of(len(h))
        for part, wanted, scale in zip(*(t.split(chunk) for t in (h, targets, weights))):
            bent = torch.tanh(F.linear(part, cast).float() / SOFTCAP)
            logits = SOFTCAP * bent
            right = vocabulary == wanted[:, None]
            nats = logits.logsumexp(dim=-1) - (logits * right).sum(dim=-1)
            loss = loss + (scale * nats).sum()
            grad = (logits.softmax(dim=-1) - right.float()) * scale[:, None]
            grad = (grad * (1 - bent.square())).to(h.dtype)  # through the softcap
            grads_h.append(grad @ cast)
            grad_weight = grad_weight + grad.T @ part
        ctx.save_for_backward(torch.cat(grads_h), grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_weight = ctx.saved_tensors
        return grad_h * grad, grad_weight * grad, None, None

class GPT(nn.Module):
    def __init__(self, config, dtype=torch.float32):
        """config: GPTConfig; dtype: what is computed in (weights stay float32)."""
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        if config.modern:
            kv_dim = config.n_kv_head * config.head_dim
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
            self.smear_lambda = nn.Parameter(torch.zeros(1))
            self.smear_gate = Linear(GATE_CHANNELS, 1)
            self.value_embeds = nn.ModuleDict({
                str(layer): nn.Embedding(config.vocab_size, kv_dim)
                for layer in range(config.n_layer) if has_value_embedding(config, layer)
            })
        if config.bigram_vocab_size:
            self.bigram_embeds = nn.Embedding(config.bigram_vocab_size, config.n_embd)
        table = self.rotary_table(config.sequence_len)
        self.register_buffer("rotary", table, persistent=False)

    def rotary_table(self, length):
        """Cosines and sines for positions below `length`, float32 [2, length, 1, D/2]. A table,
        since torch.compile would leave out the rounding to bfloat16."""
        head_dim = self.config.head_dim
        device = self.lm_head.weight.device
        base = 100_000.0 if self.config.modern else 10_000.0
        frequencies = base ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
        angles = torch.arange(length, device=device)[:, None, None] * frequencies
        table = torch.stack([angles.cos(), angles.sin()])
        if not self.config.modern:  # nanochat's was bfloat16, and its weights trained with it
            table = table.bfloat16().float()
        return table

    @torch.no_grad()
    def init_weights(self, seed):
        """Fills every parameter from `seed`, the same on every device: called before the model
        moves to one."""
        generator = torch.Generator().manual_seed(seed)
        bound = 3 ** 0.5 * self.config.n_embd ** -0.5  # a standard deviation of n_embd^-0.5

        def uniform(layer, low, high):
            layer.weight.uniform_(low, high, generator=generator)

        self.transformer.wte.weight.normal_(0.0, 0.8, generator=generator)
        self.lm_head.weight.normal_(0.0, 0.001, generator=generator)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform(linear, -bound, bound)
            uniform(block.mlp.c_fc, -0.4 * bound, 0.4 * bound)
            block.attn.c_proj.weight.zero_()  # every block starts as the identity
            block.mlp.c_proj.weight.zero_()
            if hasattr(block.attn, "ve_gate"):
                uniform(block.attn.ve_gate, 0.0, 0.02)
        if self.config.modern:
            slope = torch.arange(self.config.n_layer) / max(self.config.n_layer - 1, 1)
            self.resid_lambdas.copy_(1.15 - 0.10 * slope)
            self.x0_lambdas.copy_(0.20 - 0.15 * slope)
            self.smear_lambda.fill_(0.5)
            uniform(self.smear_gate, 0.0, 0.02)
            for embedding in self.value_embeds.values():
                uniform(embedding, -bound, bound)
        if self.config.bigram_vocab_size:
            self.bigram_embeds.weight.zero_()

    def embed(self, idx, before):
        """What the layers begin with, and see again as x0. idx [B, T]; before [B, 1], the token
        before the first of each row, or None where nothing stands before it but itself
        -> [B, T, C]"""
        wte = self.transformer.wte
        x = norm(wte(idx).to(self.dtype))
        if self.config.modern:
            first = x[:, :1] if before is None else norm(wte(before).to(self.dtype))
            # Smear: a gated share of the embedding before is added, so that a single attention
            # finds what stood behind a word. Four layers look back so after half the steps (LOG.md)
            gate = torch.sigmoid(self.smear_gate(x[..., :GATE_CHANNELS]))
            gate = gate * self.smear_lambda.to(x.dtype)
            x = x + gate * torch.cat([first, x[:, :-1]], dim=1)
        if self.config.bigram_vocab_size:
            first = idx[:, :1] if before is None else before
            pairs = bigram_ids(torch.cat([first, idx[:, :-1]], dim=1), idx,
                               self.config.bigram_vocab_size)
            x = x + self.bigram_embeds(pairs).to(self.dtype)
        return x

    def hidden(self, idx, cache=None, counts=None):
        """idx [B, T] int64 -> the normed last hidden states [B, T, C] in the compute dtype.
        cache: an engine.KVCache of B rows; the tokens continue each row at its own length.
        counts [B]: how many of the T tokens of each row are real (the rest, at the right, is
        padding); all of them by default."""
        dtype = self.dtype
        T = idx.size(1)
        if cache is None:
            positions = torch.arange(T, device=idx.device)[None]
            end = T
            before = None
        else:
            before = cache.extend(idx, counts)
            positions = cache.positions
            end = cache.end
        table = self.rotary
        if end > table.size(1):
            table = self.rotary_table(end)
        cos, sin = table[:, positions].to(dtype)  # each [1 or B, T, 1, D/2]
        x = x0 = self.embed(idx, before)
        for i, block in enumerate(self.transformer.h):
            if self.config.modern:
                x = self.resid_lambdas[i].to(dtype) * x + self.x0_lambdas[i].to(dtype) * x0
            ve = None
            if has_value_embedding(self.config, i):
                ve = self.value_embeds[str(i)](idx).to(dtype)
            x = block(x, ve, cos, sin, cache)
        return norm(x)

    def logits(self, h):
        """hidden states [..., C] -> logits [..., vocab_size] float32"""
        return SOFTCAP * torch.tanh(self.lm_head(h).float() / SOFTCAP)

    def forward(self, idx, targets=None, weights=None):
        """idx [B, T] -> logits [B, T, V] float32; with targets [B, T] (-1: not counted) the sum of
        their cross-entropies in nats, float32, each multiplied by its weight [B, T] if there are
        weights."""
        h = self.hidden(idx)
        if targets is None:
            return self.logits(h)
        counted = (targets != -1).float()
        if weights is not None:
            counted = counted * weights
        return SummedLoss.apply(h.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                counted.flatten())

    @torch.no_grad()
    def nats(self, idx, targets):
        """idx [B, T], targets [B, T] (-1: not counted) -> the cross-entropy of each in nats,
        [B, T] float32, 0 where not counted; without a gradient."""
        h = self.hidden(idx).flatten(0, 1)
        losses = [F.cross_entropy(self.logits(part), wanted, ignore_index=-1, reduction="none")
                  for part, wanted in zip(h.split(CHUNK), targets.flatten().split(CHUNK))]
        return torch.cat(losses).view(targets.shape)

    def flops_per_token(self):
        """Floating point operations per trained token, forward and backward: 6 per matrix weight
        (embeddings are looked up, not multiplied) and 12 * width * sequence_len per layer for
        attention (PaLM, arXiv 2204.02311)."""
        config = self.config
        multiplied = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        return 6 * multiplied + 12 * config.n_layer * config.n_embd * config.sequence_len
