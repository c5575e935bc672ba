"""Small tokenizers of the two kinds that llama.cpp has, trained on the texts that they are tried with.

    python3 make_tokenizers.py        (tokenizers 0.23)

`texts.json` is written by hand. `bytes.json` is byte-level BPE as GPT-2 has it; `pieces.json` is
SentencePiece's kind, with every pair of pieces that makes a piece as a merge, as transformers lists
them. The tests put the splits, prefixes and added tokens of real models around them.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
TEXTS = json.loads((HERE / "texts.json").read_text())
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+")


def trained(size, normalizer, pre_tokenizer, first, alphabet):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return json.loads(tokenizer.to_str())["model"]


def write(name, model):
    text = json.dumps(model, ensure_ascii=False, separators=(",", ":"))
    (HERE / name).write_text(text + "\n")
    print(name, len(model["vocab"]), "tokens", len(model["merges"]), "merges", len(text), "characters")


split = pre_tokenizers.Sequence([
    pre_tokenizers.Split(WORDS, "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
])
special = ["<|bos|>", "<|end|>", "<|pad|>"]
write("bytes.json", trained(900, None, split, special, pre_tokenizers.ByteLevel.alphabet()))

bytes_ = [f"<0x{b:02X}>" for b in range(256)]
spaces = normalizers.Replace(" ", "▁")
first = ["<unk>", "<s>", "</s>", *bytes_]
model = trained(1600, spaces, pre_tokenizers.Split(Regex("▁*[^▁]*"), "isolated"), first, [])
vocab = model["vocab"]
rank = {piece: id for piece, id in vocab.items() if piece not in first}
pairs = [
    (piece[:at], piece[at:]) for piece in rank for at in range(1, len(piece))
    if piece[:at] in rank and piece[at:] in rank
]
pairs.sort(key=lambda pair: (rank["".join(pair)], rank[pair[0]], rank[pair[1]]))
model |= {"merges": pairs, "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
write("pieces.json", model)
