"""The other side of `bench export`: models of random weights, and PEFT's own merge.

    export.py make NAME DIR     DIR/model with its tokenizer, DIR/adapter
    export.py merge DIR OUT     load, merge_and_unload, save
"""

import json
import random
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

COMMON = dict(bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5)
MODELS = {
    # Gemma 3 270M's shape: the peers do not take that model itself.
    "Llama 270M": LlamaConfig(
        **COMMON, vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "TinyLlama 1.1B": LlamaConfig(
        **COMMON, vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
}


def tokenizer(folder, count):
    """A vocabulary of random pieces, each of two that stand before it: for tools that want a
    SentencePiece model and for those that want a tokenizer.json."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    model, kind = pb.ModelProto(), pb.ModelProto.SentencePiece
    vocabulary, merges = {}, []

    def add(text, score, what=kind.NORMAL):
        vocabulary[text] = len(vocabulary)
        model.pieces.add(piece=text, score=score, type=what)

    add("<unk>", 0, kind.UNKNOWN)
    for text in ["<s>", "</s>"]:
        add(text, 0, kind.CONTROL)
    for byte in range(256):
        add(f"<0x{byte:02X}>", 0, kind.BYTE)
    letters = ["\u2581"] + [chr(c) for c in range(97, 123)]
    pool, chance = list(letters), random.Random(1)
    while len(vocabulary) < count - len(letters):
        first, second = (pool[int(len(pool) * chance.random() ** 2)] for _ in range(2))
        if len(first + second) <= 12 and "\u2581" not in second and first + second not in vocabulary:
            merges.append([first, second])
            add(first + second, -len(merges))
            pool.append(first + second)
    for letter in letters:
        add(letter, -len(vocabulary))

    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, count, True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix = "identity", True
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())

    added = dict(special=True, lstrip=False, rstrip=False, normalized=False, single_word=False)
    space = [{"type": "Prepend", "prepend": "\u2581"},
             {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    bpe = dict(type="BPE", unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=False)
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t} | added for i, t in enumerate(list(vocabulary)[:3])],
        "normalizer": {"type": "Sequence", "normalizers": space},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": bpe | {"vocab": vocabulary, "merges": merges},
    }))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False,
        "chat_template": "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    }))


def make(name, folder):
    torch.manual_seed(7)
    config = MODELS[name]
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for n, weight in model.named_parameters():
            if "norm" not in n:
                weight.normal_(0.0, 0.02)
    model.save_pretrained(folder / "model")
    tokenizer(folder / "model", config.vocab_size)
    torch.set_default_dtype(torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for n, weight in model.named_parameters():
            if "lora_B" in n:
                weight.normal_(0.0, 0.02)
    model.save_pretrained(folder / "adapter")


def merge(folder, out):
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(out)


what, first, second = sys.argv[1:]
if what == "make":
    make(first, Path(second))
else:
    merge(Path(first), Path(second))
