"""Our GGUF files beside llama.cpp's own, tensor by tensor, type and bytes: `gguf/export` in every type
beside convert_hf_to_gguf.py and llama-quantize, `gguf/adapter` beside convert_lora_to_gguf.py.

    cargo build --release --package gguf --features gguf/worker
    python3 tests/interop/gguf.py LLAMA_CPP LLAMA_QUANTIZE

LLAMA_CPP is the folder of llama.cpp's source, LLAMA_QUANTIZE its tool of that name. Python needs torch,
transformers and sentencepiece. No part of `cargo xtask test`: the tool takes minutes to compile.
"""

import io
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
WORKER = TARGET / "release/gguf-worker"
GOLDEN = ROOT / "crates/gguf/src/worker/golden"
if len(sys.argv) != 3:
    sys.exit(__doc__)
LLAMA_CPP, QUANTIZE = (Path(path).resolve() for path in sys.argv[1:])
# In place of this folder, whose own gguf is this file.
sys.path[:1] = [str(LLAMA_CPP), str(LLAMA_CPP / "gguf-py")]

import gguf
import numpy as np
import torch
import transformers
from conversion.base import TextModel
from sentencepiece import sentencepiece_model_pb2

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
CONVERTED = ["F32", "F16", "BF16", "Q8_0"]
QUANTISED = ["Q8_0", "Q4_0", "Q5_0", "Q4_K_M", "Q5_K_M", "Q6_K"]
failures = []


def check(what, same):
    print(("ok      " if same else "FAILED  ") + what, flush=True)
    if not same:
        failures.append(what)


# Models. Rows of 256 are whole blocks of every type; of 320, of those of 32; of 72, of none.

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1 + i / 20 for i in range(32)],
        "long_factor": [1 + i / 2 for i in range(32)], "original_max_position_embeddings": 512}
BASE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, dtype="bfloat16")
BYTES = dict(vocab_size=900, bos_token_id=0, eos_token_id=1, pad_token_id=2)
PIECES = dict(vocab_size=1600, bos_token_id=1, eos_token_id=2, pad_token_id=None)
# Name → class of the config, its keys, the tokenizer.
MODELS = {
    "llama": ("Llama", BASE | PIECES | dict(tie_word_embeddings=False), "spm"),
    "llama-3": ("Llama", BASE | BYTES | dict(attention_bias=True, rope_parameters=LLAMA3), "llama-bpe"),
    "llama-short-rows": ("Llama", BASE | BYTES | dict(hidden_size=32, intermediate_size=72), "llama-bpe"),
    "mistral": ("Mistral", BASE | PIECES | dict(sliding_window=None, num_hidden_layers=5), "spm"),
    "qwen2": ("Qwen2", BASE | BYTES | dict(tie_word_embeddings=True), "qwen2"),
    "qwen2-fallbacks": ("Qwen2", BASE | BYTES | dict(hidden_size=320, intermediate_size=544), "qwen2"),
    "qwen3": ("Qwen3", BASE | BYTES | dict(head_dim=128, num_hidden_layers=4), "qwen2"),
    "gemma3": ("Gemma3Text", BASE | PIECES | dict(head_dim=64, query_pre_attn_scalar=64, num_hidden_layers=7,
               sliding_window=512, num_key_value_heads=1), "gemma"),
    "phi3": ("Phi3", BASE | PIECES | dict(rope_parameters=LONG, sliding_window=None), "spm"),
}


def model(folder, kind, keys):
    torch.manual_seed(1)
    config = getattr(transformers, kind + "Config")(**keys)
    made = getattr(transformers, kind.removesuffix("Text") + "ForCausalLM")(config)
    with torch.no_grad():
        for name, values in made.named_parameters():
            mean = 1.0 if "norm" in name and kind != "Gemma3Text" else 0.0
            values.normal_(mean, 0.05)
    made.to(torch.bfloat16).save_pretrained(folder)


def tokenizer(folder, kind):
    """The golden vocabularies, with the split that llama.cpp knows by the name `kind`."""
    pieces = kind in ("spm", "gemma")
    golden = json.loads((GOLDEN / ("pieces.json" if pieces else "bytes.json")).read_text())
    first = ["<unk>", "<s>", "</s>"] if pieces else ["<|bos|>", "<|end|>", "<|pad|>"]
    added = [dict(id=i, content=text, special=True, single_word=False, lstrip=False, rstrip=False,
                  normalized=False) for i, text in enumerate(first)]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if kind == "gemma":
        normalizer, split = space, {"type": "Split", "pattern": {"String": " "},
                                    "behavior": "MergedWithPrevious", "invert": False}
    elif kind == "spm":
        prefix = {"type": "Prepend", "prepend": "▁"}
        normalizer, split = {"type": "Sequence", "normalizers": [prefix, space]}, None
    else:
        digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}[kind]
        words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
                 + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        normalizer = {"type": "NFC"} if kind == "qwen2" else None
        split = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]}
    golden["ignore_merges"] = kind == "llama-bpe"
    whole = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=normalizer,
                 pre_tokenizer=split, post_processor=None, decoder=None, model=golden)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    bos, eos = (first[1], first[2]) if pieces else (first[0], first[1])
    # Unless all are named, transformers adds those that Qwen has.
    other = first[0] if pieces else first[2]
    config = dict(bos_token=bos, eos_token=eos, pad_token=other, unk_token=other,
                  tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if pieces:
        sentencepiece(folder / "tokenizer.model", golden["vocab"], kind == "spm")


def sentencepiece(path, vocab, prefix):
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = proto.SentencePiece
    for piece, id in sorted(vocab.items(), key=lambda entry: entry[1]):
        kind = kinds.BYTE if 3 <= id < 259 else kinds.NORMAL
        kind = {0: kinds.UNKNOWN, 1: kinds.CONTROL, 2: kinds.CONTROL}.get(id, kind)
        proto.pieces.add(piece=piece, score=-float(id), type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = prefix
    path.write_bytes(proto.SerializeToString())


# Files.


def script(name, *args):
    """One of llama.cpp's scripts, in this process: each would load torch anew."""
    logging.disable(logging.WARNING)
    argv, sys.argv = sys.argv, [name, *map(str, args)]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            runpy.run_path(str(LLAMA_CPP / name), run_name="__main__")
    finally:
        sys.argv = argv


def converted(folder, pre, quant, path):
    # It knows splits by what a tokenizer makes of a text, and so none that was made here.
    TextModel.get_vocab_base_pre = lambda *_: pre
    script("convert_hf_to_gguf.py", folder, "--outtype", quant.lower(), "--outfile", path)
    return path


def quantised(source, quant, path):
    run = subprocess.run([QUANTIZE, source, path, quant, "2"], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"llama-quantize {quant}: {run.stderr[-2000:]}")
    return path


def worker(step, params, scratch, **inputs):
    """What a step of the worker writes."""
    shutil.rmtree(scratch, ignore_errors=True)
    for part in ("out", "report"):
        (scratch / part).mkdir(parents=True)
    inputs = {name: [dict(label=name, kind="adapter" if name == "adapter" else "model",
                          path=str(path), origin=name)] for name, path in inputs.items()}
    request = dict(format=1, step=step, mode="build", params=params, inputs=inputs, tools={}, threads=2,
                   out=str(scratch / "out"), report=str(scratch / "report"), scratch=str(scratch / "kept"))
    (scratch / "request.json").write_text(json.dumps(request))
    run = subprocess.run([WORKER, scratch / "request.json"], stdin=subprocess.DEVNULL,
                         capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{step} {params}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return next((scratch / "out").glob("*.gguf"))


def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def same_tensor(ours, theirs):
    if ours.tensor_type != theirs.tensor_type or list(ours.shape) != list(theirs.shape):
        return False
    # A power of theirs and of ours may differ in its last bit.
    if ours.name == "rope_freqs.weight":
        return np.allclose(ours.data, theirs.data, rtol=1e-6, atol=0)
    return ours.data.tobytes() == theirs.data.tobytes()


total = 0


def compare(what, ours, theirs):
    global total
    ours, theirs = tensors(ours), tensors(theirs)
    other = [n for n in theirs if n not in ours or not same_tensor(ours[n], theirs[n])]
    other += [n for n in ours if n not in theirs]
    total += len(theirs)
    kinds = sorted({t.tensor_type.name for t in theirs.values()})
    said = f", not {', '.join(other[:5])}" if other else ""
    check(f"{what}: {len(theirs)} tensors, {' '.join(kinds)}{said}", not other)


with tempfile.TemporaryDirectory() as scratch:
    scratch = Path(scratch)
    for name, (kind, keys, pre) in MODELS.items():
        folder = scratch / name
        model(folder, kind, keys)
        tokenizer(folder, pre)
        ours = {}
        for quant in dict.fromkeys(CONVERTED + QUANTISED):
            ours[quant] = worker("gguf/export", {"quant": quant}, scratch / quant, model=folder)
        for quant in CONVERTED:
            theirs = converted(folder, pre, quant, scratch / f"{quant}.gguf")
            compare(f"{name} {quant} by the converter", ours[quant], theirs)
        for source in ("F32", "BF16"):
            for quant in QUANTISED:
                theirs = quantised(scratch / f"{source}.gguf", quant, scratch / "quantised.gguf")
                compare(f"{name} {quant} by llama-quantize from {source}", ours[quant], theirs)
        shutil.rmtree(folder)
    for adapter in sorted((ROOT / "crates/merge/tests/golden").glob("*/first")):
        name = adapter.parent.name
        base = scratch / name
        base.mkdir()
        config = json.loads((ROOT / f"crates/train/src/worker/golden/{name}/config.json").read_text())
        if name == "gemma3":
            # Of a base whose scale llama.cpp has no key for there would be nothing to add it to.
            config["query_pre_attn_scalar"] = config["head_dim"]
        (base / "config.json").write_text(json.dumps(config))
        for dtype, kind in (("float32", "f32"), ("float16", "f16")):
            ours = worker("gguf/adapter", {"dtype": dtype}, scratch / "lora", adapter=adapter, base=base)
            theirs = scratch / "lora.gguf"
            script("convert_lora_to_gguf.py", adapter, "--base", base, "--outtype", kind, "--outfile", theirs)
            compare(f"{name}'s adapter {kind} by the converter", ours, theirs)

print(f"\n{'FAILED: ' + ', '.join(failures) if failures else f'gguf: {total} tensors, all the same'}")
sys.exit(bool(failures))
