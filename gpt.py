"""
The model: a decoder-only transformer whose one dial is depth; its key/value cache; generation with
the calculator.

In arch="modern": value embeddings with gates (after ResFormer, arXiv 2410.17897), per-layer scalars
on the residual stream and on the embedding, smear (both modded-nanogpt), sharper attention. All of
it is off in arch="nanochat_2025", the plain model of November 2025 whose checkpoints load as they
are. In both: rotary positions (2104.09864), QK norm (2010.04245), RMSNorm without parameters,
squared ReLU (2109.08668), untied embeddings, norm after the embedding, logit softcap (Gemma 2,
2408.00118), grouped-query attention (2305.13245), no biases.

Weights are kept in float32; every matrix is cast to the compute dtype where it is used.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

HEAD_DIM = 128
SOFTCAP = 15.0        # logits are held within +-15
GATE_CHANNELS = 12    # gates look at the first channels of the residual stream

@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    arch: str = "modern"  # or "nanochat_2025"

    @property
    def modern(self):
        return self.arch == "modern"

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

def config_from_depth(depth, vocab_size, sequence_len, arch="modern"):
    """depth -> GPTConfig: width 64 * depth rounded up to whole heads of 128.
    example: 20 -> 1280 wide, 10 heads"""
    n_head = (depth + 1) // 2
    n_embd = n_head * HEAD_DIM
    return GPTConfig(sequence_len, vocab_size, depth, n_head, n_head, n_embd, arch)

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

BLOCK = 128  # queries at once

def in_blocks_is_faster(q):
    """On a CPU in bfloat16 forward and backward take 0.54 of the time of torch's kernel at 512
    tokens and 0.63 at 256 (LOG.md); in float32 they take as long."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) % BLOCK == 0

def attend_in_blocks(q, k, v):
    """Plain causal attention, q, k, v [B, H, T, D] -> [B, H, T, D]. Each block of queries looks
    only at the keys up to its end: most of what the mask would throw away is not computed."""
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
    parts = []
    for start in range(0, q.size(2), BLOCK):
        end = start + BLOCK
        scores = (q[:, :, start:end] @ k[:, :, :end].transpose(2, 3)).float() * q.size(3) ** -0.5
        seen = F.pad(future, (start, 0))
        weights = scores.masked_fill(seen, -torch.inf).softmax(dim=-1)
        parts.append(weights.to(q.dtype) @ v[:, :, :end])
    return torch.cat(parts, dim=2)

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
        """x [B, T, C]; ve [B, T, kv_dim] or None; cos, sin as in rotate; cache: KVCache or None"""
        heads = (-1, self.config.head_dim)  # [B, T, C] -> [B, T, H, D]
        q, k, v = (c(x).unflatten(-1, heads) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            gate = 3.0 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * ve.view(v.shape)
        q = norm(rotate(q, cos, sin))
        k = norm(rotate(k, cos, sin))
        if self.config.modern:
            # normed queries and keys of 128 channels are too blunt (nanochat found 1.2 * 1.2)
            q = q * 1.44
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, D]
        mask = None  # plain causal attention
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            mask = cache.mask
        grouped = self.config.n_kv_head != self.config.n_head
        if cache is None and in_blocks_is_faster(q) and not grouped:
            y = attend_in_blocks(q, k, v)
        else:
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

CHUNK = 1024  # tokens whose logits exist at once

class SummedLoss(torch.autograd.Function):
    """The weighted sum of cross-entropies behind lm_head and the softcap. The logits of all tokens
    never exist at once: of a chunk of them loss and gradients are made in one turn (as in the Liger
    kernels, arXiv 2410.10989). A fifth faster than the plain form, too (LOG.md)."""

    @staticmethod
    def forward(ctx, h, weight, targets, weights):
        """h [N, C]; weight [V, C] of lm_head, float32; targets [N], those below 0 of weight 0;
        weights [N] -> scalar, float32"""
        cast = weight.to(h.dtype)
        vocabulary = torch.arange(len(weight), device=h.device)
        loss = torch.zeros((), device=h.device)
        grad_weight = torch.zeros_like(weight)
        grads_h = []
        for part, wanted, scale in zip(*(t.split(CHUNK) for t in (h, targets, weights))):
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
        self.grow_rotary(config.sequence_len)

    def grow_rotary(self, length):
        """A table of cosines and sines for positions below `length`, float32 [2, length, 1, D/2].
        A table, since torch.compile would leave out the rounding to bfloat16."""
        head_dim = self.config.head_dim
        device = self.lm_head.weight.device
        base = 100_000.0 if self.config.modern else 10_000.0
        frequencies = base ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
        angles = torch.arange(length, device=device)[:, None, None] * frequencies
        table = torch.stack([angles.cos(), angles.sin()])
        if not self.config.modern:  # nanochat's was bfloat16, and its weights trained with it
            table = table.bfloat16().float()
        self.register_buffer("rotary", table, persistent=False)

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

    def smear(self, x, cache, counts):
        """Adds to each token's embedding a gated share of the one before it, so that a single
        attention finds what stood behind a word. A model of four layers looks back so after half
        the steps (LOG.md). x [B, T, C]; cache and counts as in hidden."""
        before = x[:, :1]  # nothing stands before the first token but itself
        if cache is not None:
            if cache.last is not None:
                before = cache.last
            cache.last = last_real(x, counts)[:, None]
        gate = torch.sigmoid(self.smear_gate(x[..., :GATE_CHANNELS]))
        gate = gate * self.smear_lambda.to(x.dtype)
        return x + gate * torch.cat([before, x[:, :-1]], dim=1)

    def hidden(self, idx, cache=None, counts=None):
        """idx [B, T] int64 -> the normed last hidden states [B, T, C] in the compute dtype.
        cache: a KVCache of B rows; the tokens continue each row at its own length.
        counts [B]: how many of the T tokens of each row are real (the rest, at the right, is
        padding); all of them by default."""
        dtype = self.dtype
        T = idx.size(1)
        if cache is None:
            positions = torch.arange(T, device=idx.device)[None]
            end = T
        else:
            cache.extend(T, counts)
            positions = cache.positions
            end = cache.end
        if end > self.rotary.size(1):
            self.grow_rotary(2 * end)
        cos, sin = self.rotary[:, positions].to(dtype)  # each [1 or B, T, 1, D/2]
        x = norm(self.transformer.wte(idx).to(dtype))
        if self.config.modern:
            x = self.smear(x, cache, counts)
        x0 = x
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

# --------------------------------------------------------------------------------------------------
# generation

class KVCache:
    """Keys and values of `rows` sequences, each with its own length. kv: for each layer a tensor
    [2, rows, n_kv_head, max_len, head_dim]. A pass calls extend once and update in each layer."""

    def __init__(self, config, rows, max_len, device, dtype):
        shape = (2, rows, config.n_kv_head, max_len, config.head_dim)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.last = None  # [rows, 1, n_embd]: the embedding of each row's last token, for smear

    def extend(self, T, counts):
        """Prepares, once for all layers, a pass over T more tokens in each row, of which counts
        [rows] are real, or all: their positions [rows, T] and the mask of the keys they see."""
        longest = int(self.lengths.max())  # waits for the device
        device = self.lengths.device
        self.end = longest + T
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]
        self.positions = self.lengths[:, None] + torch.arange(T, device=device)
        self.mask = None  # of an empty cache: plain causal attention, as padding comes last
        if longest > 0:
            keys = torch.arange(self.end, device=device)
            self.mask = keys <= self.positions[:, None, :, None]  # [rows, 1, T, end]
        self.advance(T if counts is None else counts)

    def update(self, layer, k, v):
        """Stores k, v [rows, n_kv_head, T, head_dim] of the new tokens.
        -> those of all tokens, [2, rows, n_kv_head, end, head_dim]"""
        kv = self.kv[layer]
        for i, new in enumerate((k, v)):
            kv[i, self.rows, :, self.positions] = new.transpose(1, 2)
        return kv[..., :self.end, :]

    def advance(self, counts):
        """The rows have grown by counts, an int or a tensor [rows]."""
        self.lengths = self.lengths + counts

    def select(self, rows):
        """Keeps (or repeats) the rows of these numbers, a list or tensor; forgets the others."""
        rows = torch.as_tensor(rows, device=self.lengths.device)
        self.kv = [kv.index_select(1, rows) for kv in self.kv]
        self.lengths = self.lengths[rows]
        if self.last is not None:
            self.last = self.last[rows]

def pad_right(rows):
    """lists of token ids -> (tensor [B, longest] int64, tensor [B] of lengths).
    example: [[1], [2, 3]] -> [[1, 0], [2, 3]], [1, 2]"""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return padded, torch.tensor([len(row) for row in rows])

def last_real(x, counts):
    """x [B, T, C] -> x[b, counts[b] - 1] of each row b, [B, C]; the last of all without counts"""
    if counts is None:
        return x[:, -1]
    return x[torch.arange(len(x), device=x.device), counts - 1]

def prefill(model, prompts, max_len):
    """Runs all prompts in one pass, equal ones once.
    -> (KVCache with room for max_len tokens a row, logits [B, V] after each prompt)"""
    device = model.lm_head.weight.device
    numbers = {}  # prompt -> its row in the pass
    rows = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    idx, counts = pad_right(numbers)
    counts = counts.to(device)
    cache = KVCache(model.config, len(numbers), max_len, device, model.dtype)
    h = model.hidden(idx.to(device), cache, counts)
    logits = model.logits(last_real(h, counts))
    if len(numbers) < len(prompts):
        cache.select(rows)
        logits = logits[rows]
    return cache, logits

def decode_one_token(model, cache, tokens):
    """tokens: the newest token of each row, a list -> logits [B, V] for the one after it"""
    idx = torch.tensor(tokens, device=cache.lengths.device)[:, None]
    return model.logits(model.hidden(idx, cache)[:, -1])

def sample(logits, temperature, top_k, uniforms):
    """logits [B, V] -> the next token of each row, [B] int64. Temperature 0 is greedy; else the
    inverse of the cumulative distribution at uniforms [B] (float64 in [0, 1), array or tensor), so
    that a draw depends on its own number alone and not on who else is in the batch."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    device = logits.device
    if device.type == "mps":  # Apple's GPUs have no float64
        device = torch.device("cpu")
    uniforms = torch.as_tensor(uniforms, device=device)
    logits = logits.to(device).double() / temperature
    vocab_size = logits.size(-1)
    if 0 < top_k < vocab_size:
        smallest = logits.topk(top_k).values[:, -1:]
        logits[logits < smallest] = -torch.inf
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    passed = cumulative <= uniforms[:, None] * cumulative[:, -1:]
    return passed.sum(dim=-1).clamp(max=vocab_size - 1)

def tool_reply(tokens, tokenizer, calculate):
    """A continuation so far -> how it has to go on: what the calculator answers where the last
    token ends a call of it, else []. calculate: text -> text, or None for no answer.
    example: ... <|python_start|> 2+3 <|python_end|> -> <|output_start|> 5 <|output_end|>"""
    start, end = tokenizer.special("<|python_start|>"), tokenizer.special("<|python_end|>")
    if tokens[-1] != end or start not in tokens:
        return []
    call = tokens[-tokens[::-1].index(start):-1]
    if end in call:  # this call was ended before
        return []
    result = calculate(tokenizer.decode(call))
    if result is None:
        return []
    return [tokenizer.special("<|output_start|>"), *tokenizer.encode(result),
            tokenizer.special("<|output_end|>")]

@torch.inference_mode()
def generate(model, tokenizer, prompts, max_new_tokens, temperature=0.0, top_k=0, uniforms=None,
             calculate=None, max_rows=64, on_token=None, keep_going=lambda: True):
    """Continues each prompt (a list of token ids) until <|assistant_end|>, <|bos|> or
    max_new_tokens. -> list of (tokens, forced) per prompt, the closing token left out; forced[i]
    is True where the tool spoke. uniforms: float64 [len(prompts), max_new_tokens], needed when
    temperature > 0. calculate: text -> text or None, the tool. on_token(row, token): called for
    each token as it comes. keep_going(): looked at before each token; False ends early."""
    stops = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
    tokens = [[] for _ in prompts]
    forced = [[] for _ in prompts]
    pending = [[] for _ in prompts]  # what the tool has still to say
    for start in range(0, len(prompts), max_rows):
        batch = prompts[start:start + max_rows]
        rows = list(range(start, start + len(batch)))  # those not finished, by number
        for position in range(max_new_tokens):
            if not keep_going():
                break
            if position == 0:
                cache, logits = prefill(model, batch, max(map(len, batch)) + max_new_tokens)
            else:
                logits = decode_one_token(model, cache, [tokens[row][-1] for row in rows])
            drawn = None if uniforms is None else uniforms[rows, position]
            sampled = sample(logits, temperature, top_k, drawn).tolist()
            alive = []
            for i, row in enumerate(rows):
                tool_speaks = len(pending[row]) > 0
                token = pending[row].pop(0) if tool_speaks else sampled[i]
                if token in stops:
                    continue
                alive.append(i)
                tokens[row].append(token)
                forced[row].append(tool_speaks)
                if calculate is not None:
                    pending[row] += tool_reply(tokens[row], tokenizer, calculate)
                if on_token is not None:
                    on_token(row, token)
            if not alive:
                break
            if len(alive) < len(rows):  # finished rows leave the batch, so they cost nothing
                rows = [rows[i] for i in alive]
                cache.select(alive)
    return list(zip(tokens, forced))
