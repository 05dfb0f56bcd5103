"""
Takes a model to the programs that people already use: a folder that Hugging Face's transformers
loads as it is (NanoChatForCausalLM), and so does what builds on it, such as vLLM and lm_eval.

    python export.py --data=toy --source=sft
    python export.py --data=toy --source=sft --check=True    # compares an export with its model

transformers knows the plain model of November 2025. Train one with --arch=nanochat_2025: what a
modern model has besides has no place there. The folder is export/<stage>_<tag> in the state folder;
it is there whole or not at all, and one of before is put aside.
"""
import filecmp
import json
import os
import re
import shutil
import struct
from itertools import pairwise
from pathlib import Path

import checkpoint
import common
import configurator
import models
import pipeline
from records import load_record

data = "fineweb_edu"         # the data set of the model
source = "sft"               # the model's stage of training: base, mid, sft or rl
tag = ""                     # which model, d20 for instance; empty: the newest
precision = "float32"        # of the weights: float32, or bfloat16, half the size
out = ""                     # the folder to write; empty: export/<stage>_<tag> in the state folder
check = False                # compare the folder that is there with its model; writes nothing
settings = configurator.configure(globals()) if __name__ == "__main__" else None

import torch  # only here: it takes seconds, and --help needs none of it

import engine
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
    expressions there. What stands behind them in ours never matches what they have taken.
    example: r"\\p{N}{1,2}+| ?+x" -> r"\\p{N}{1,2}| ?x" """
    return re.sub(r"([?*+]|\{[\d,]+\})\+", r"\1", pattern)

def tokenizer_json(tokenizer):
    """A tokenizer.Tokenizer -> the content of its tokenizer.json, which begins a text with bos."""
    character = printable_bytes()

    def shown(token):
        return "".join(character[byte] for byte in token)
    ranks = tokenizer.ranks
    ordered = sorted(ranks, key=ranks.get)
    pairs = [merge_of(token, ranks) for token in ordered if len(token) > 1]
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
        "model": {"type": "BPE", "vocab": {shown(token): ranks[token] for token in ordered},
                  "merges": [[shown(a), shown(b)] for a, b in pairs]},
    }

# tokenizer.render_conversation for messages of plain text, in Jinja
CHAT_TEMPLATE = """\
{{- '<|bos|>' -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set ns.system = message.content + '\\n\\n' -%}
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

NAMES = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
         "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
         "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}

def name_there(name):
    """example: "transformer.h.3.attn.c_q.weight" -> "model.layers.3.self_attn.q_proj.weight" """
    if name == "transformer.wte.weight":
        return "model.embed_tokens.weight"
    if name.startswith("transformer.h."):
        _, _, layer, *part, _ = name.split(".")
        return f"model.layers.{layer}.{NAMES['.'.join(part)]}.weight"
    return name

def write_safetensors(path, tensors):
    """Writes {name: tensor} in the format of huggingface.co/docs/safetensors: the length of a
    header, the header, the numbers."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            f.write(tensor.contiguous().view(torch.uint8).numpy())
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
    if report.is_file():
        lines = report.read_text(encoding="utf-8", errors="replace").splitlines()
    scores = []
    if "## Scores" in lines and lines[0].endswith(f", {folder.name}"):  # of this run
        rows = lines[lines.index("## Scores"):]
        scores = ["Scores over the stages of its training:", "",
                  *(line for line in rows if line.startswith("|")), ""]
    commit = record.get("commit", "unknown")
    what = (f"A nanochat of {parameters:,} parameters, stage {source}, step {step:,}, trained by "
            f"commit {commit}.")
    return "\n".join(["---", "pipeline_tag: text-generation", "library_name: transformers", "---",
                      f"# {name}", "", what, "", *scores])

def files_of(model, tokenizer):
    """-> {file: content} of the folder's JSON files."""
    config = model.config
    stops = [tokenizer.special("<|assistant_end|>"), tokenizer.bos]
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
            "model_max_length": config.sequence_len, "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE},
    }

def write_folder(there, model, tokenizer, readme):
    """Writes everything into the new folder `there`."""
    there.mkdir(parents=True)
    for file, content in files_of(model, tokenizer).items():
        common.atomic_write(there / file, json.dumps(content, indent=1) + "\n")
    common.atomic_write(there / "README.md", readme)
    dtype = getattr(torch, precision)
    write_safetensors(there / "model.safetensors",
                      {name_there(name): p.detach().to(dtype)
                       for name, p in model.named_parameters()})
    common.fsync_dir(there)

def parity(model, tokenizer):
    """Prints how far the model is from itself with its weights as they are written."""
    prompt = [tokenizer.bos, *tokenizer.encode("The capital of France is")]
    answers, logits = [], []
    for dtype in ("float32", precision):
        for p in model.parameters():
            p.data = p.data.to(getattr(torch, dtype)).float()
        answers.append(engine.generate(model, tokenizer, [prompt], 64)[0][0])
        with torch.inference_mode():
            logits.append(model(torch.tensor([prompt + answers[0]])))
    furthest = (logits[1] - logits[0]).abs().max()
    same = sum(a == b for a, b in zip(*answers))
    print(f"parity: with weights in {precision} logits differ by at most {furthest:.4f} (the "
          f"largest is {logits[0].abs().max():.1f}), {same} of {len(answers[0])} likeliest tokens "
          "are the same")

def main():
    folder, step = models.find_model(source, data, tag)
    tokenizer = models.load_tokenizer_of(folder, step, data)
    arch = checkpoint.load_meta(folder, step)["model"]["arch"]
    common.check(arch == "nanochat_2025", f"{folder} holds a model of arch={arch}: its value "
                 "embeddings, smear and scalars have no place in transformers, which knows the "
                 "plain model; train one with --arch=nanochat_2025 to export it")
    name = f"{source}_{folder.name}"
    target = Path(out).expanduser().absolute() if out else \
        pipeline.data_root(data) / "export" / name
    of_ours = common.read_json(target / "config.json").get("model_type") == "nanochat"
    common.check(of_ours or not os.path.lexists(target), f"{target} is there and holds no export: "
                 "name a new folder with --out")
    part = target.with_name(f".{target.name}.part")  # of an export that has died, too
    model, _ = models.load_model(folder, step, "cpu", torch.float32)
    readme = card(folder, step, name, sum(p.numel() for p in model.parameters()))
    with common.writing(target):
        shutil.rmtree(part, ignore_errors=True)
        write_folder(part, model, tokenizer, readme)
        if check:
            files = [path.name for path in part.iterdir() if path.name != "README.md"]
            _, other, missing = filecmp.cmpfiles(part, target, files, shallow=False)
            shutil.rmtree(part)
            if other + missing:
                common.fail(f"{target} is not what this model is exported to: missing or different "
                            f"are {', '.join(sorted(other + missing))}", code=1)
        else:
            if os.path.lexists(target):
                kept = common.aside_name(target)
                target.rename(kept)
                print(f"what was there is kept in {kept}")
            part.rename(target)
            common.fsync_dir(target.parent)
    parity(model, tokenizer)
    print(f"{'the same as' if check else 'exported to'} {target}")

if __name__ == "__main__":
    main()
