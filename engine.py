"""
Generation: prompts in, tokens out, with the calculator. One path for the rollouts of RL, the
evaluations, samples, the chat and the server.

    engine.generate(model, tokenizer, prompts, 64)  # -> [(tokens, forced), ...]

Continuous batching (Orca, OSDI 2022): the answers of a Batch grow at once, each in a slot of its
own; where one is finished the next prompt takes its place. A prompt runs through the model itself.
From there on each pass is one token a row, and what it costs is reading the weights and the
overhead of each operation; Decoder writes the model's formula out for that case. What is drawn is a
function of the arguments alone, never of time.
"""
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from gpt import GATE_CHANNELS, SHARPNESS, SOFTCAP, bigram_ids, key_channels
from packed import Packed

# --------------------------------------------------------------------------------------------------
# prompts: through the model's own forward, which takes several tokens a row

class KVCache:
    """Keys and values of `rows` sequences, each with its own length. kv: for each layer a tensor
    [2, rows, n_kv_head, max_len + 1, head_dim], where a key's channels that are offset stand at the
    next token, which sees them. A pass calls extend once and update in each layer."""

    def __init__(self, config, rows, max_len, device, dtype):
        shape = (2, rows, config.n_kv_head, max_len + 1, config.head_dim)
        self.offset = int(config.key_offset)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.last = None  # [rows, 1]: the last token of each row

    def extend(self, idx, counts):
        """Prepares, once for all layers, a pass over more tokens in each row, idx [rows, T], of
        which counts [rows] are real, or all: their positions [rows, T] and the mask of the keys
        they see. -> the token before the first of each, [rows, 1], None if the cache is empty"""
        T = idx.size(1)
        longest = int(self.lengths.max())  # waits for the device
        device = self.lengths.device
        self.end = longest + T
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]
        self.positions = self.lengths[:, None] + torch.arange(T, device=device)
        self.mask = None  # of an empty cache: plain causal attention, as padding comes last
        if longest > 0:
            keys = torch.arange(self.end, device=device)
            self.mask = keys <= self.positions[:, None, :, None]  # [rows, 1, T, end]
        if counts is None:
            counts = torch.full_like(self.lengths, T)
        self.lengths = self.lengths + counts
        before, self.last = self.last, last_real(idx, counts)[:, None]
        return before

    def update(self, layer, k, v):
        """Stores k, v [rows, n_kv_head, T, head_dim] of the new tokens.
        -> those of all tokens, [2, rows, n_kv_head, end, head_dim]"""
        kv = self.kv[layer]
        kv[1, self.rows, :, self.positions] = v.transpose(1, 2)
        own, before = key_channels(kv[0])
        new_own, new_before = key_channels(k.transpose(1, 2))
        own[self.rows, :, self.positions] = new_own
        before[self.rows, :, self.positions + self.offset] = new_before
        return kv[..., :self.end, :]

    def select(self, rows):
        """Keeps (or repeats) the rows of these numbers, a list; forgets the others."""
        rows = torch.tensor(rows, device=self.lengths.device)
        self.kv = [kv.index_select(1, rows) for kv in self.kv]
        self.lengths = self.lengths[rows]
        self.last = self.last[rows]

def pad_right(rows, fill=0):
    """lists of token ids -> [B, longest] int64.  example: [[1], [2, 3]] -> [[1, 0], [2, 3]]"""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill)

def last_real(x, counts):
    """x [B, T, ...] -> x[b, counts[b] - 1] of each row b, [B, ...]"""
    return x[torch.arange(len(x), device=x.device), counts - 1]

def prefill(model, prompts, max_len):
    """Runs all prompts in one pass, equal ones once.
    -> (KVCache with room for max_len tokens a row, logits [B, V] after each prompt)"""
    device = model.lm_head.weight.device
    numbers = {}  # prompt -> its row in the pass
    rows = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    counts = torch.tensor([len(prompt) for prompt in numbers], device=device)
    cache = KVCache(model.config, len(numbers), max_len, device, model.dtype)
    h = model.hidden(pad_right(numbers).to(device), cache, counts)
    logits = model.logits(last_real(h, counts))
    if len(numbers) < len(prompts):
        cache.select(rows)
        logits = logits[rows]
    return cache, logits

# --------------------------------------------------------------------------------------------------
# one more token in each row

class Decoder:
    """The model's formula for one token a row, in float32 but for the products. Its rows are slots
    0 to n - 1 of buffers made once; a new row takes slot n, and where one is removed the last one
    moves into its place."""

    def __init__(self, model, rows, max_len, packed=None):
        """rows: how many slots; max_len: how many tokens each has room for, its prompt included;
        packed: the model's weights, if they are packed already."""
        config = model.config
        device = model.lm_head.weight.device
        # torch's attention to a single query is 5 to 7 times slower in bfloat16 on a CPU (LOG.md)
        self.dtype = torch.float32 if device.type == "cpu" else model.dtype
        max_len += 1  # as in KVCache, for offset keys
        shape = (config.n_layer, rows, max_len, 2 * config.n_kv_head, config.head_dim)
        self.model = model
        self.packed = packed or Packed(model, rows)
        # keys and values of a token stand side by side
        self.kv = torch.zeros(shape, device=device, dtype=self.dtype)
        keys, values = self.kv.flatten(1, 2).chunk(2, dim=2)
        self.kept = list(zip(*key_channels(keys), values))  # of each layer, for writing
        self.lengths = []  # tokens in each slot in use
        self.last = []  # and the last of them
        self.prefilled = {}  # prompt -> its keys and values of each layer, logits
        self.eps = torch.full((), torch.finfo(torch.float32).eps, device=device)  # as F.rms_norm
        cos, sin = model.rotary_table(max_len)
        # [max_len, 2, head_dim], for x * cos + roll(x) * sin
        self.rotary = torch.cat([cos, cos, sin, -sin], dim=-1).view(max_len, 2, -1)
        self.scale = config.head_dim ** -0.5
        self.value_embeds = {}
        if config.modern:
            self.value_embeds = {int(layer): embedding.weight
                                 for layer, embedding in model.value_embeds.items()}
            self.scale *= SHARPNESS
            self.own_share = model.resid_lambdas.tolist()
            self.first_share = model.x0_lambdas.float()[:, None, None]
            self.smear_share = model.smear_lambda.item()
            self.smear_gate = model.smear_gate.weight.float()

    def add(self, prompts):
        """Runs prompts, equal ones once, and puts each into the next slot.
        -> logits [B, V] after each"""
        keys = [tuple(prompt) for prompt in prompts]
        new = [key for key in dict.fromkeys(keys) if key not in self.prefilled]
        if new:
            cache, logits = prefill(self.model, new, max(map(len, new)))
            for i, key in enumerate(new):
                self.prefilled[key] = [kv[:, i] for kv in cache.kv], logits[i]
        for key in keys:
            slot, T = len(self.lengths), len(key)
            for kv, made in zip(self.kv, self.prefilled[key][0]):
                # [2, n_kv_head, T + 1, head_dim] -> [T + 1, 2 * n_kv_head, head_dim]
                kv[slot, :T + 1] = made[:, :, :T + 1].flatten(0, 1).transpose(0, 1)
            self.lengths.append(T)
            self.last.append(key[-1])
        logits = torch.stack([self.prefilled[key][1] for key in keys])
        # samples of one prompt come one after another, so the next to come may be of the last
        layers, after = self.prefilled[keys[-1]]
        self.prefilled = {keys[-1]: ([kv.clone() for kv in layers], after)}
        return logits

    def remove(self, slot):
        """The row of a slot is finished."""
        T, last = self.lengths.pop(), self.last.pop()
        end = len(self.lengths)
        if slot < end:
            self.kv[:, slot, :T + 1] = self.kv[:, end, :T + 1]
            self.lengths[slot] = T
            self.last[slot] = last

    def step(self, tokens):
        """tokens: the newest one of each slot in use, a list -> logits [n, V] after each"""
        modern = self.model.config.modern
        n, device, max_len = len(tokens), self.kv.device, self.kv.size(2)
        end = max(self.lengths) + 1
        ids = torch.tensor([tokens, self.last, self.lengths], device=device)
        self.idx, _, positions = ids
        self.last = list(tokens)
        place = positions + torch.arange(0, n * max_len, max_len, device=device)
        self.places = place, place + self.model.config.key_offset, place  # as in self.kept
        self.cos, self.sin = self.rotary.index_select(0, positions).split(1, dim=1)
        self.mask = None
        if min(self.lengths) + 1 < end:
            unseen = torch.arange(end, device=device) > positions[:, None]
            mask = torch.zeros(unseen.shape, device=device, dtype=self.dtype)
            self.mask = mask.masked_fill_(unseen, -torch.inf)[:, None, None]
        self.lengths = [length + 1 for length in self.lengths]
        keys, values = self.kv[:, :n, :end].transpose(2, 3).chunk(2, dim=2)
        self.seen = list(zip(keys.unbind(), values.unbind()))  # each [n, n_kv_head, end, head_dim]

        x = self.embed(ids[:2])
        if modern:
            first = (self.first_share * x).unbind()  # for each layer
        for i, (qkv, attn_proj, mlp_fc, mlp_proj) in enumerate(self.packed.layers):
            if modern:
                x = torch.add(first[i], x, alpha=self.own_share[i])
            x = x + attn_proj(self.attend(i, qkv(self.norm(x))))
            x += mlp_proj(mlp_fc(self.norm(x)).relu_().square_())
        # tanh(z / SOFTCAP) by a sigmoid, which torch computes 3 to 5 times as fast on a CPU
        half = self.packed.head(self.norm(x)).mul_(2 / SOFTCAP).sigmoid_()
        return half.mul_(2 * SOFTCAP).sub_(SOFTCAP)

    def norm(self, x, out=None):
        """F.rms_norm, in two thirds of its time for rows as short as these (LOG.md)"""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean_square = torch.addcmul(self.eps, size, size, value=1 / x.size(-1))
        return torch.mul(x, mean_square.rsqrt_(), out=out)

    def embed(self, ids):
        """GPT.embed for one token a row: ids [2, n], the tokens and those before -> [n, n_embd]"""
        config = self.model.config
        x, before = self.norm(self.model.transformer.wte(ids).float())
        if config.modern:
            gate = torch.sigmoid(F.linear(x[:, :GATE_CHANNELS], self.smear_gate))
            x = torch.addcmul(x, gate, before, value=self.smear_share)
        if config.bigram_vocab_size:
            x = x + self.model.bigram_embeds(bigram_ids(ids[1], ids[0], config.bigram_vocab_size))
        return x

    def attend(self, layer, qkv):
        """What gpt.Attention does between its products: qkv [n, ...], its queries, keys, values and
        gates -> [n, n_embd]"""
        config = self.model.config
        H, KV, D = config.n_head, config.n_kv_head, config.head_dim
        heads = qkv[:, :(H + 2 * KV) * D].view(len(qkv), -1, D)
        qk, v = heads.split([H + KV, KV], dim=1)
        # as gpt.rotate: the roll makes (x2, x1) of the halves (x1, x2)
        turned = torch.addcmul(qk * self.cos, qk.roll(D // 2, -1), self.sin)
        self.norm(turned, out=qk)
        if layer in self.value_embeds:
            gate = torch.sigmoid(qkv[:, -KV:]).unsqueeze(-1)
            ve = F.embedding(self.idx, self.value_embeds[layer]).view(v.shape)
            v.addcmul_(gate, ve.float(), value=3.0)
        q, k, v = heads.to(self.dtype).split([H, KV, KV], dim=1)
        for kept, place, new in zip(self.kept[layer], self.places, (*key_channels(k), v)):
            kept.index_copy_(0, place, new)
        # queries that share a key stand as if they followed one another
        y = F.scaled_dot_product_attention(q.unflatten(1, (KV, -1)), *self.seen[layer], self.mask,
                                           scale=self.scale)
        return y.flatten(1).float()

# --------------------------------------------------------------------------------------------------
# generation

def sample(logits, temperature, top_k, uniforms):
    """logits [B, V] -> the next token of each row, [B] int64. Temperature 0 (or so little that
    float32 would not know it from 0) is greedy; else the inverse of the cumulative distribution at
    uniforms [B] (float64 in [0, 1), array or tensor), so that a draw depends on its own number
    alone and not on who else is in the batch."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    # Apple's GPUs have no float64, and CUDA has no deterministic cumsum
    if logits.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
        logits = logits.cpu()
    uniforms = torch.as_tensor(uniforms, device=logits.device)
    top_k = top_k if 0 < top_k < logits.size(-1) else 0
    if top_k:
        kept = logits.topk(top_k).indices.sort(dim=-1).values  # in the order of the vocabulary
        logits = logits.gather(-1, kept)
    # float32's rounding is far below any draw, but a sum of 32,768 numbers would add it up
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # no overflow
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    passed = cumulative <= uniforms[:, None] * cumulative[:, -1:]
    drawn = passed.sum(dim=-1, keepdim=True).clamp(max=logits.size(-1) - 1)
    if top_k:
        drawn = kept.gather(-1, drawn)
    return drawn[:, 0]

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

@dataclass(eq=False)
class Answer:
    """A prompt and what has come behind it so far."""
    prompt: list              # one or more token ids
    most: int                 # tokens it may have at most, one or more
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0            # 0: all tokens
    uniforms: object = None   # float64 [most], the draws; needed when temperature > 0
    calculate: object = None  # text -> text or None, the tool
    tokens: list = field(default_factory=list)   # the closing token left out
    forced: list = field(default_factory=list)   # True where the tool spoke
    pending: list = field(default_factory=list)  # what the tool has still to say
    ended: str = ""           # "stop": by a closing token; "length": by most

def draw(logits, answers):
    """logits [n, V] of n answers, each with its own temperature and top_k -> the next token of
    each, a list"""
    alike = {}
    for row, answer in enumerate(answers):
        alike.setdefault((answer.temperature, answer.top_k), []).append(row)
    drawn = [0] * len(answers)
    for (temperature, top_k), rows in alike.items():
        uniforms = None
        if temperature > 0:
            numbers = [answers[row].uniforms[len(answers[row].tokens)] for row in rows]
            uniforms = torch.tensor(numbers, dtype=torch.float64)
        of_rows = logits if len(alike) == 1 else logits[rows]
        tokens = sample(of_rows, temperature, top_k, uniforms).tolist()
        for row, token in zip(rows, tokens):
            drawn[row] = token
    return drawn

class Batch:
    """Answers that grow together, a token each at every step; one may come or go at any step."""

    @torch.inference_mode()
    def __init__(self, model, tokenizer, rows, max_len, packed=None):
        """rows: how many at once; max_len: tokens of a prompt and its answer at most; packed: the
        model's Packed weights, if there are any already."""
        self.decoder = Decoder(model, rows, max_len, packed)
        self.tokenizer = tokenizer
        self.stops = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
        self.rows = rows
        self.answers = []  # in the slots of the decoder

    def free(self):
        return self.rows - len(self.answers)

    @torch.inference_mode()
    def step(self, new):
        """Takes in new answers, free() at most, and gives each answer its next token.
        -> [(answer, token)] of those that got one; answers that have ended leave"""
        logits = []
        if self.answers:
            logits.append(self.decoder.step([answer.tokens[-1] for answer in self.answers]))
        if new:
            logits.append(self.decoder.add([answer.prompt for answer in new]))
            self.answers += new
        got = []
        for answer, token in zip(self.answers, draw(torch.cat(logits), self.answers)):
            tool_speaks = len(answer.pending) > 0
            if tool_speaks:
                token = answer.pending.pop(0)
            if token in self.stops:
                answer.ended = "stop"
                continue
            answer.tokens.append(token)
            answer.forced.append(tool_speaks)
            if answer.calculate is not None:
                answer.pending += tool_reply(answer.tokens, self.tokenizer, answer.calculate)
            if len(answer.tokens) == answer.most:
                answer.ended = "length"
            got.append((answer, token))
        self.remove([answer for answer in self.answers if answer.ended])
        return got

    @torch.inference_mode()
    def remove(self, answers):
        """These answers grow no more."""
        slots = [slot for slot, answer in enumerate(self.answers) if answer in answers]
        for slot in reversed(slots):  # so that a slot before keeps its number
            self.decoder.remove(slot)
            self.answers[slot] = self.answers[-1]
            self.answers.pop()

def generate(model, tokenizer, prompts, max_new_tokens, temperature=0.0, top_k=0, uniforms=None,
             calculate=None, max_rows=64, on_token=lambda token: None, keep_going=lambda: True,
             packed=None):
    """Continues each prompt (a list of one or more token ids) until <|assistant_end|>, <|bos|> or
    max_new_tokens. -> list of (tokens, forced) per prompt, the closing token left out; forced[i]
    is True where the tool spoke. uniforms: float64 [len(prompts), max_new_tokens], needed when
    temperature > 0. calculate: text -> text or None, the tool. max_rows: answers that grow at once.
    on_token(token): called for each token as it comes. keep_going(): looked at before each token;
    False ends early. packed: Packed(model, max_rows), where more is to be generated with the same
    weights."""
    if not prompts or max_new_tokens < 1:
        return [([], []) for _ in prompts]
    if uniforms is None:
        uniforms = [None] * len(prompts)
    answers = [Answer(prompt, max_new_tokens, temperature, top_k, draws, calculate)
               for prompt, draws in zip(prompts, uniforms, strict=True)]
    longest = max(map(len, prompts)) + max_new_tokens
    batch = Batch(model, tokenizer, min(max_rows, len(prompts)), longest, packed)
    waiting = deque(answers)
    while (waiting or batch.answers) and keep_going():
        new = [waiting.popleft() for _ in range(min(batch.free(), len(waiting)))]
        for _, token in batch.step(new):
            on_token(token)
    return [(answer.tokens, answer.forced) for answer in answers]
