"""
The model: a decoder-only transformer whose one dial is depth, its key/value cache, and generation with the calculator.

What it has (each of it off in arch="nanochat_2025", the plain model of November 2025 whose checkpoints load as they are):
value embeddings with gates (after ResFormer, arXiv 2410.17897), per-layer scalars on the residual stream and on the
embedding (modded-nanogpt), sharper attention. In both: rotary positions (2104.09864), QK norm (2010.04245), RMSNorm without
parameters, squared ReLU (2109.08668), untied embeddings, norm after the embedding, logit softcap (Gemma 2, 2408.00118),
grouped-query attention (2305.13245), no biases.

Weights are kept in float32; every matrix is cast to the compute dtype where it is used.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

HEAD_DIM = 128
SOFTCAP = 15.0        # logits are held within +-15
GATE_CHANNELS = 12    # the value-embedding gate looks at the first channels of the residual stream

@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    arch: str = "modern"  # or "nanochat_2025"

def config_from_depth(depth, vocab_size, sequence_len, arch="modern"):
    """depth -> GPTConfig: width 64 * depth rounded up to whole heads of 128.  example: 20 -> 1280 wide, 10 heads"""
    n_head = max(1, -(-64 * depth // HEAD_DIM))
    return GPTConfig(sequence_len, vocab_size, depth, n_head, n_head, n_head * HEAD_DIM, arch)

def norm(x):
    return F.rms_norm(x, (x.size(-1),))

class Linear(nn.Linear):
    """nn.Linear without bias that casts its float32 weight to the dtype of its input."""
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

def rotate(x, cos, sin):
    """Rotary embedding. x [B, T, H, D]; cos, sin [1 or B, T, 1, D/2]. Rotates by minus theta, as nanochat's weights expect."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)

def has_value_embedding(config, layer):
    """Every second layer, the last one included."""
    return config.arch == "modern" and layer % 2 == (config.n_layer - 1) % 2

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.modern = layer, config.arch == "modern"
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if has_value_embedding(config, layer):
            self.ve_gate = Linear(GATE_CHANNELS, self.n_kv_head)

    def forward(self, x, ve, cos, sin, cache):
        q, k, v = (matrix(x).unflatten(-1, (-1, self.head_dim)) for matrix in (self.c_q, self.c_k, self.c_v))  # [B, T, H, D]
        if ve is not None:
            gate = 3.0 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * ve.view(v.shape)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        if self.modern:
            q = q * 1.44  # normed queries and keys of 128 channels are too blunt otherwise (nanochat found 1.2 * 1.2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = self.n_kv_head != self.n_head
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            y = cache.attend(self.layer, q, k, v, grouped)
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

class GPT(nn.Module):
    def __init__(self, config, dtype=torch.float32):
        """config: GPTConfig; dtype: what is computed in (weights stay float32)."""
        super().__init__()
        self.config, self.dtype = config, dtype
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])})
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        if config.arch == "modern":
            kv_dim = config.n_kv_head * (config.n_embd // config.n_head)
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
            self.smear_lambda = nn.Parameter(torch.zeros(1))
            self.smear_gate = Linear(GATE_CHANNELS, 1)
            self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.vocab_size, kv_dim)
                                               for i in range(config.n_layer) if has_value_embedding(config, i)})
        self.grow_rotary(config.sequence_len)

    def grow_rotary(self, length):
        """Tables of cosines and sines for positions below `length`, [length, 1, head_dim / 2], float32."""
        modern, device = self.config.arch == "modern", self.lm_head.weight.device
        head_dim, base = self.config.n_embd // self.config.n_head, 100_000.0 if modern else 10_000.0
        frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)[:, None, :]
        cos, sin = angles.cos(), angles.sin()
        if not modern:  # the tables of that version were bfloat16, and its weights were trained with them
            cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed):
        """Fills every parameter from `seed`, the same on every device: called before the model moves to one."""
        generator = torch.Generator().manual_seed(seed)
        bound = 3 ** 0.5 * self.config.n_embd ** -0.5  # uniform with a standard deviation of n_embd^-0.5
        uniform = lambda p, b: p.uniform_(-b, b, generator=generator)
        self.transformer.wte.weight.normal_(0.0, 0.8, generator=generator)
        self.lm_head.weight.normal_(0.0, 0.001, generator=generator)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform(linear.weight, bound)
            uniform(block.mlp.c_fc.weight, 0.4 * bound)
            block.attn.c_proj.weight.zero_()  # every block starts as the identity
            block.mlp.c_proj.weight.zero_()
            if hasattr(block.attn, "ve_gate"):
                block.attn.ve_gate.weight.uniform_(0.0, 0.02, generator=generator)
        if self.config.arch == "modern":
            slope = torch.arange(self.config.n_layer) / max(self.config.n_layer - 1, 1)
            self.resid_lambdas.copy_(1.15 - 0.10 * slope)
            self.x0_lambdas.copy_(0.20 - 0.15 * slope)
            self.smear_lambda.fill_(0.5)
            self.smear_gate.weight.uniform_(0.0, 0.02, generator=generator)
            for embedding in self.value_embeds.values():
                uniform(embedding.weight, bound)

    def smear(self, x, cache, counts):
        """Adds to each token's embedding a gated share of the one before it (modded-nanogpt's smear), so that a single attention finds
        what stood behind a word. A model of four layers looks back so after half the steps (LOG.md). x [B, T, C]."""
        if self.config.arch != "modern":
            return x
        first = x[:, :1] if cache is None or cache.last is None else cache.last
        if cache is not None:
            cache.last = x[:, -1:] if counts is None else x[torch.arange(len(x), device=x.device), counts - 1][:, None]
        gate = torch.sigmoid(self.smear_gate(x[..., :GATE_CHANNELS])) * self.smear_lambda.to(self.dtype)
        return x + gate * torch.cat([first, x[:, :-1]], dim=1)

    def hidden(self, idx, cache=None, counts=None):
        """idx [B, T] int64 -> the normed last hidden states [B, T, C] in the compute dtype.
        cache: a KVCache of B rows; the tokens continue each row at its own length. counts [B]: how many of the T tokens
        of each row are real (the rest, at the right, is padding); all of them by default."""
        B, T = idx.shape
        if cache is None:
            needed, positions = T, torch.arange(T, device=idx.device)[None]
        else:
            needed, positions = cache.longest + T, cache.lengths[:, None] + torch.arange(T, device=idx.device)
        if needed > len(self.cos):
            self.grow_rotary(2 * needed)
        cos, sin = self.cos[positions].to(self.dtype), self.sin[positions].to(self.dtype)  # [1 or B, T, 1, D/2]
        x = x0 = self.smear(norm(F.embedding(idx, self.transformer.wte.weight).to(self.dtype)), cache, counts)
        for i, block in enumerate(self.transformer.h):
            ve = None
            if self.config.arch == "modern":
                x = self.resid_lambdas[i].to(self.dtype) * x + self.x0_lambdas[i].to(self.dtype) * x0
                if str(i) in self.value_embeds:
                    ve = self.value_embeds[str(i)](idx).to(self.dtype)
            x = block(x, ve, cos, sin, cache)
        if cache is not None:
            cache.advance(T if counts is None else counts)
        return norm(x)

    def logits(self, h):
        """hidden states [..., C] -> logits [..., vocab_size] float32"""
        return SOFTCAP * torch.tanh(self.lm_head(h).float() / SOFTCAP)

    def forward(self, idx, targets=None, reduction="mean", cache=None):
        """idx [B, T] -> logits [B, T, V] float32; with targets [B, T] (-1: not counted) the cross-entropy in nats:
        "mean" over counted targets (0 where there are none), "sum", or "none" -> [B, T] float32 with 0 where not counted."""
        logits = self.logits(self.hidden(idx, cache))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                               reduction="none" if reduction == "none" else "sum")
        if reduction == "none":
            return loss.view(targets.shape)
        return loss / (targets != -1).sum().clamp(min=1) if reduction == "mean" else loss

    def flops_per_token(self):
        """Floating point operations per trained token, forward and backward: 6 per matrix weight (embeddings are
        looked up, not multiplied) and 12 * width * sequence_len per layer for attention (PaLM, arXiv 2204.02311)."""
        looked_up = sum(p.numel() for n, p in self.named_parameters() if "wte" in n or "value_embeds" in n or "lambdas" in n)
        matrices = sum(p.numel() for p in self.parameters()) - looked_up
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * self.config.sequence_len

# ---------------------------------------------------------------------------------------------------------------------
# generation

class KVCache:
    """Keys and values of `rows` sequences, each with its own length. k, v: [layer] of [rows, n_kv_head, max_len, head_dim]"""

    def __init__(self, config, rows, max_len, device, dtype):
        shape = (rows, config.n_kv_head, max_len, config.n_embd // config.n_head)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0  # max of lengths, kept on the host
        self.last = None  # [rows, 1, n_embd]: the embedding of each row's last token, for smear

    def attend(self, layer, q, k, v, grouped):
        """Stores k, v [B, Hkv, T, D] behind what each row holds and attends with q [B, H, T, D] to all of it, causally."""
        B, _, T, _ = q.shape
        if self.longest == 0:  # prefill: padding at the right is never looked at by what stands before it
            self.k[layer][:, :, :T], self.v[layer][:, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        places = self.lengths[:, None] + torch.arange(T, device=q.device)  # [B, T]
        rows = torch.arange(B, device=q.device)[:, None]
        self.k[layer][rows, :, places] = k.transpose(1, 2)
        self.v[layer][rows, :, places] = v.transpose(1, 2)
        end = self.longest + T
        seen = torch.arange(end, device=q.device) <= places[:, :, None]  # [B, T, end]
        return F.scaled_dot_product_attention(q, self.k[layer][:, :, :end], self.v[layer][:, :, :end],
                                              attn_mask=seen[:, None], enable_gqa=grouped)

    def advance(self, counts):
        self.lengths = self.lengths + counts
        self.longest = int(self.lengths.max())

    def select(self, rows):
        """Keeps (or repeats) the given rows, a list or tensor of row numbers, and forgets the others."""
        rows = torch.as_tensor(rows, device=self.lengths.device)
        self.k = [k.index_select(0, rows) for k in self.k]
        self.v = [v.index_select(0, rows) for v in self.v]
        self.lengths = self.lengths[rows]
        self.advance(0)
        self.last = None if self.last is None else self.last[rows]

def pad_right(rows, value=0):
    """lists of token ids -> (tensor [B, longest] int64, tensor [B] of lengths).  example: [[1], [2, 3]] -> [[1, 0], [2, 3]], [1, 2]"""
    longest = max(len(r) for r in rows)
    return torch.tensor([r + [value] * (longest - len(r)) for r in rows]), torch.tensor([len(r) for r in rows])

def prefill(model, prompts, max_len):
    """Runs all prompts in one pass, equal ones once. -> (KVCache with room for max_len tokens a row, logits [B, V] after each prompt)"""
    device = model.lm_head.weight.device
    different = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
    idx, lengths = pad_right([list(p) for p in different])
    cache = KVCache(model.config, len(different), max_len, device, model.dtype)
    h = model.hidden(idx.to(device), cache, lengths.to(device))
    logits = model.logits(h[torch.arange(len(different), device=device), lengths.to(device) - 1])
    if len(different) < len(prompts):
        rows = [different[tuple(p)] for p in prompts]
        cache.select(rows)
        logits = logits[rows]
    return cache, logits

def sample(logits, temperature, top_k, uniforms):
    """Next token of each row. logits [B, V]; temperature 0 is greedy; else the inverse of the cumulative distribution at
    uniforms [B] (float64 in [0, 1)), so that a draw depends on its own number alone and not on who else is in the batch."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.double() / temperature
    if 0 < top_k < logits.size(-1):
        logits[logits < logits.topk(top_k, dim=-1).values[:, -1:]] = -torch.inf
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=-1).clamp(max=logits.size(-1) - 1)

class Row:
    """One sequence being generated: what came, which of it the calculator forced, and what it is forced to say next."""
    def __init__(self, number):
        self.number, self.tokens, self.forced, self.pending, self.call = number, [], [], [], None

    def take(self, token, forced, tokenizer, calculate):
        """Appends a token; where it closes a calculator call, its result is put into `pending`."""
        self.tokens.append(token)
        self.forced.append(forced)
        if token == tokenizer.special("<|python_start|>"):
            self.call = []
        elif token == tokenizer.special("<|python_end|>") and self.call is not None:
            result = calculate(tokenizer.decode(self.call)) if calculate else None
            if result is not None:
                self.pending = [tokenizer.special("<|output_start|>"), *tokenizer.encode(result), tokenizer.special("<|output_end|>")]
            self.call = None
        elif self.call is not None:
            self.call.append(token)

@torch.inference_mode()
def generate(model, tokenizer, prompts, max_new_tokens, temperature=0.0, top_k=0, uniforms=None, calculate=None,
             max_rows=64, on_token=None, keep_going=lambda: True):
    """Continues each prompt (a list of token ids) until <|assistant_end|>, <|bos|> or max_new_tokens.
    uniforms: float64 [len(prompts), max_new_tokens], needed when temperature > 0. calculate: text -> text or None, the tool.
    on_token(row, token): called for each token as it comes. keep_going(): looked at before each token; False ends early.
    -> list of (tokens, forced) per prompt, the closing token left out; forced[i] is True where the tool spoke.
    Rows that are finished leave the batch, so they cost nothing."""
    stops = {tokenizer.special("<|assistant_end|>"), tokenizer.bos}
    everyone = [Row(i) for i in range(len(prompts))]
    for start in range(0, len(prompts), max_rows):
        rows = everyone[start:start + max_rows]
        cache, logits = prefill(model, [prompts[r.number] for r in rows], max(len(prompts[r.number]) for r in rows) + max_new_tokens)
        for position in range(max_new_tokens):
            if not keep_going():
                break
            u = None if uniforms is None else torch.as_tensor(uniforms[[r.number for r in rows], position], device=logits.device)
            chosen = sample(logits, temperature, top_k, u).tolist()
            alive = []
            for i, row in enumerate(rows):
                forced = bool(row.pending)
                token = row.pending.pop(0) if forced else chosen[i]
                if token in stops and not forced:
                    continue
                row.take(token, forced, tokenizer, calculate)
                alive.append(i)
                if on_token:
                    on_token(row.number, token)
            if not alive:
                break
            if len(alive) < len(rows):
                rows = [rows[i] for i in alive]
                cache.select(alive)
            if position + 1 < max_new_tokens:
                last = torch.tensor([[row.tokens[-1]] for row in rows], device=logits.device)
                logits = model.logits(model.hidden(last, cache)[:, -1])
    return [(row.tokens, row.forced) for row in everyone]
