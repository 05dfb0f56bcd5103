"""
Takes a model to the programs that people already use: a folder that Hugging Face's transformers
loads as it is (NanoChatForCausalLM).

    python export.py --data=toy --source=sft
    python export.py --data=toy --source=sft --check=True    # compares an export with its model

transformers knows the plain model of November 2025. Train one with --arch=nanochat_2025: what a
modern model has besides has no place there. The folder is export/<stage>_<tag> in the state folder;
it is there whole or not at all, and another one of before is put aside.
"""
import contextlib
import json
import os
import re
import shutil
import struct
from itertools import pairwise, takewhile
from pathlib import Path

import checkpoint
import common
import configurator
import models
import pipeline
import tokenizer as tok
from lock import put_aside
from records import load_record

data = "fineweb_edu"         # the data set of the model
source = "sft"               # the model's stage of training: base, mid, sft or rl
tag = ""                     # which model, d20 for instance; empty: the newest
precision = "float32"        # of the weights: float32, or bfloat16, half the size
out = ""                     # the folder to write; empty: export/<stage>_<tag> in the state folder
check = False                # compare the folder that is there with its model; writes nothing
settings = configurator.configure(globals()) if __name__ == "__main__" else None

import torch  # only here: it takes seconds, and --help needs none of it

import gpt

# -------------------------------------------------------------------------------------------------
# the tokenizer, as the tokenizers package reads it: bytes as printable characters, and merges

def printable_bytes():
    """{byte: the character that stands for it}, as in GPT-2: what can be printed stands for itself,
    the rest from U+0100 on.  examples: 97 -> "a";  32 -> "\u0120" """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {**{byte: chr(byte) for byte in printed},
            **{byte: chr(256 + i) for i, byte in enumerate(others)}}

def merge_of(token, ranks):
    """The two tokens of which a token (bytes) was merged: what merges of lower rank make of it.
    example: b"the" -> (b"th", b"e"). Failure where it is no merge of two."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        ranked = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = ranked.index(min(ranked))
        common.check(ranked[at] < ranks[token], f"the token {token!r} is no merge of two others")
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)

def plain_pattern(pattern):
    """The pattern without possessive repeats, one of which means something else to the regular
    expressions there. What stands behind them in ours never matches what they have taken. Failure
    where the pattern is neither ours nor nanochat's.
    example: r"\\p{N}{1,2}+| ?+x" -> r"\\p{N}{1,2}| ?x" """
    def plain(text):
        greedy = re.sub(r"([?*+]|\{[\d,]+\})\+", r"\1", text)
        return re.sub(r"\[(\\p\{.\})\]", r"\1", greedy)  # [\p{L}] is \p{L}
    common.check(plain(pattern) == plain(tok.PATTERN), "the tokenizer cuts texts by a pattern that "
                 f"is not ours, which was not tried elsewhere: {pattern}")
    return plain(pattern)

def vocabulary(tokenizer):
    """A tokenizer.Tokenizer -> (its tokens but for the special ones, in the order of their ids, and
    its merges in theirs, pairs), as printable characters."""
    character, ranks = printable_bytes(), tokenizer.ranks

    def shown(token):
        return "".join(character[byte] for byte in token)
    ordered = sorted(ranks, key=ranks.get)
    pairs = [merge_of(token, ranks) for token in ordered if len(token) > 1]
    return [*map(shown, ordered)], [(shown(a), shown(b)) for a, b in pairs]

def tokenizer_json(tokenizer):
    """A tokenizer.Tokenizer -> the content of its tokenizer.json, which begins a text with bos."""
    tokens, merges = vocabulary(tokenizer)
    special = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    split = {"type": "Split", "pattern": {"Regex": plain_pattern(tokenizer.pattern)},
             "behavior": "Isolated", "invert": False}
    to_characters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                     "use_regex": False}
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": name, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for name, number in special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_characters]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, second],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [tokenizer.bos],
                                           "tokens": ["<|bos|>"]}}},
        "decoder": to_characters,
        "model": {"type": "BPE", "vocab": dict(zip(tokens, sorted(tokenizer.ranks.values()))),
                  "merges": [list(pair) for pair in merges]},
    }

# tokenizer.render_conversation for messages of plain text, in Jinja
CHAT_TEMPLATE = """\
{{- '<|bos|>' -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' and loop.first -%}
{%- set ns.system = message.content + '\\n\\n' -%}
{%- elif message.role not in ['user', 'assistant'] -%}
{{- raise_exception('a system message comes first, then user and assistant take turns') -}}
{%- else -%}
{{- '<|' + message.role + '_start|>' + ns.system + message.content -}}
{{- '<|' + message.role + '_end|>' -}}
{%- set ns.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""

# -------------------------------------------------------------------------------------------------
# weights

NAMES = {"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers",
         "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
         "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
         "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}

def name_there(name):
    """example: "transformer.h.3.attn.c_q.weight" -> "model.layers.3.self_attn.q_proj.weight" """
    for own, other in NAMES.items():
        name = name.replace(own, other)
    return name

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

def safetensors(tensors):
    """{name: tensor} -> the pieces (bytes) of a file in the format of
    huggingface.co/docs/safetensors: the length of a header, the header, the numbers."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        yield tensor.contiguous().view(torch.uint8).numpy().tobytes()

def write_safetensors(path, tensors):
    with open(path, "wb") as f:
        f.writelines(safetensors(tensors))
        f.flush()
        os.fsync(f.fileno())

# -------------------------------------------------------------------------------------------------
# the folder

def card(folder, step, name, parameters):
    """README.md: what it is, where it comes from, and its run's table of scores, if report.py has
    written one."""
    record = load_record(folder) or {}
    report = pipeline.report_dir(data) / "report.md"
    lines = [""]
    with contextlib.suppress(OSError):
        lines += report.read_text(encoding="utf-8", errors="replace").splitlines()
    scores = []
    if "## Scores" in lines and lines[1].endswith(f", {folder.name}"):  # of this run
        rows = lines[lines.index("## Scores") + 2:]
        table = takewhile(lambda line: line.startswith("|"), rows)
        scores = ["Scores over the stages of its training:", "", *table, ""]
    commit = record.get("commit", "unknown")
    if record.get("difference"):
        commit += " with changes"
    what = (f"A nanochat of {parameters:,} parameters, stage {source}, step {step:,}, trained by "
            f"commit {commit}.")
    return "\n".join(["---", "pipeline_tag: text-generation", "library_name: transformers", "---",
                      f"# {name}", "", what, "", *scores])

def files_of(model, tokenizer):
    """-> {file: content} of the folder's JSON files."""
    config = model.config
    stops = [tokenizer.special("<|assistant_end|>"), tokenizer.bos]
    # pad is one of eos: of another, bos for instance, generate() takes any in a prompt for padding
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": stops, "pad_token_id": stops[0]}
    return {
        "config.json": {
            "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", **ids,
            "vocab_size": config.vocab_size, "hidden_size": config.n_embd,
            "intermediate_size": 4 * config.n_embd, "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head,
            "max_position_embeddings": config.sequence_len, "hidden_act": "relu2",
            "rms_norm_eps": torch.finfo(torch.float32).eps, "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "final_logit_softcapping": gpt.SOFTCAP, "tie_word_embeddings": False,
            "dtype": precision},
        "generation_config.json": ids,
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>",
            "eos_token": "<|assistant_end|>", "pad_token": "<|assistant_end|>",
            "padding_side": "left",
            "model_max_length": config.sequence_len, "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE},
    }

def write_folder(there, files, tensors, readme):
    """Writes everything into the new folder `there`; nothing of it stays where that fails."""
    try:
        there.mkdir(parents=True)
        for file, content in files.items():
            common.atomic_write(there / file, json.dumps(content, indent=1) + "\n")
        common.atomic_write(there / "README.md", readme)
        write_safetensors(there / "model.safetensors", tensors)
        common.fsync_dir(there)
    except BaseException:
        shutil.rmtree(there, ignore_errors=True)
        raise

def wrong_in(there, files, tensors):
    """-> the names of the files in the folder `there` that are missing or not what was written."""
    wrong = [file for file, content in files.items() if common.read_json(there / file) != content]
    same = False
    with contextlib.suppress(OSError), open(there / "model.safetensors", "rb") as f:
        same = all(f.read(len(piece)) == piece for piece in safetensors(tensors)) and not f.read(1)
    return wrong if same else [*wrong, "model.safetensors"]

TEXT = ("The capital of France is Paris, and the capital of Italy is Rome. If 5 apples cost 10 "
        "dollars, then one apple costs 2 dollars. She said that it was late, and went home.\n")

def parity(model, tokenizer, tensors):
    """Says what the model loses with its weights as they are written; they then stay so."""
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(TEXT)][:model.config.sequence_len]])
    with torch.inference_mode():
        before = model(ids)
        for name, p in model.named_parameters():
            p.copy_(tensors[name_there(name)])
        after = model(ids)
    furthest, largest = (after - before).abs().max(), before.abs().max()
    same = (before.argmax(-1) == after.argmax(-1)).sum()
    return (f"with weights in {precision} logits differ by at most {furthest:.4f} (the largest is "
            f"{largest:.1f}); the likeliest token is the same at {same} of {ids.numel()} places")

def plain_model(source, data, tag):
    """-> (folder, step, Tokenizer) of a model that other programs know. Failure (code 2) where it
    is none."""
    folder, step = models.find_model(source, data, tag)
    tokenizer = models.load_tokenizer_of(folder, step, data)
    arch = checkpoint.load_meta(folder, step)["model"]["arch"]
    common.check(arch == "nanochat_2025", f"{folder} holds a model of arch={arch}: its value "
                 "embeddings, smear and scalars have no place in transformers or llama.cpp, which "
                 "know the plain model; train one with --arch=nanochat_2025 to export it")
    return folder, step, tokenizer

def target_of(out, data, name):
    """The path to write: `out` where that is given, else export/<name> in the state folder."""
    if not out:
        return pipeline.data_root(data) / "export" / name
    with pipeline.naming(f"--out={out}"):
        return Path(out).expanduser().resolve()

def main():
    folder, step, tokenizer = plain_model(source, data, tag)
    name = f"{source}_{folder.name}"
    target = target_of(out, data, name)
    there = os.path.lexists(target)
    if check:
        common.check(there, f"there is no {target}: export it first, without --check")
    elif out:
        ours = common.read_json(target / "config.json").get("model_type") == "nanochat"
        common.check(ours or not there, f"{target} is there and holds no export: name a new folder "
                     "with --out")

    model = models.load_model(folder, step, "cpu", torch.float32)
    files = files_of(model, tokenizer)
    readme = card(folder, step, name, sum(p.numel() for p in model.parameters()))
    tensors = {name_there(name): p.detach().to(getattr(torch, precision))
               for name, p in model.named_parameters()}
    wrong = wrong_in(target, files, tensors)
    if check and wrong:
        common.fail(f"{target} is not what this model is exported to: missing or different are "
                    f"{', '.join(wrong)}", code=1)
    if wrong:
        part = target.with_name(f".{target.name}.part")  # of an export that has died, too
        with common.writing(target):
            shutil.rmtree(part, ignore_errors=True)
            write_folder(part, files, tensors, readme)
            wrong = wrong_in(part, files, tensors)
            if wrong:
                common.fail(f"read back from {part}, {', '.join(wrong)} are damaged", code=1)
            if there:
                put_aside(target, "another export was there; it")
            part.rename(target)
            common.fsync_dir(target.parent)
    print(f"{target} holds {name}, read back: {parity(model, tokenizer, tensors)}")

if __name__ == "__main__":
    main()
