"""Our merged model in transformers and our adapter in PEFT, held to the answers of our own runtime.

Reads artifacts/demo, or the folder in ANNEAL_DEMO: `eval/eval.json` holds twenty prompts and what
each model answered greedily.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(os.environ.get("ANNEAL_DEMO", "artifacts/demo"))
failures = []


def check(what, same):
    print(("ok      " if same else "FAILED  ") + what)
    if not same:
        failures.append(what)


def answer(model, tokenizer, prompt):
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=64, do_sample=False)
    new = out[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


examples = json.loads((DEMO / "eval/eval.json").read_text())["examples"][:20]
check("eval.json holds twenty prompts", len(examples) == 20)

tokenizer = AutoTokenizer.from_pretrained(DEMO / "merged")
merged = load(DEMO / "merged")
theirs = [answer(merged, tokenizer, e["prompt"]) for e in examples]
ours = [e["answers"]["merged"].strip() for e in examples]
check("transformers answers as our runtime does: merged", theirs == ours)

adapted = PeftModel.from_pretrained(load(DEMO / "base"), DEMO / "adapter").eval()
with_adapter = [answer(adapted, tokenizer, e["prompt"]) for e in examples]
check("PEFT's base + adapter answers as our merged model does", with_adapter == ours)

# The merge, element for element: PEFT's own on the base in its own type, BF16.
base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
peft = PeftModel.from_pretrained(base, DEMO / "adapter").merge_and_unload().state_dict()
bf16 = AutoModelForCausalLM.from_pretrained(DEMO / "merged", dtype=torch.bfloat16).state_dict()
total = differing = 0
for name, tensor in bf16.items():
    total += tensor.numel()
    differing += int((peft[name].to(torch.bfloat16) != tensor).sum())
print(f"        merge: {differing} of {total} elements differ from PEFT's")
check("the merge is PEFT's, but for ties in rounding", differing <= total * 1e-5)

# Other runtimes on the same weights, as our evaluation saw them.
for label in ("onnx-fp32", "gguf"):
    check(f"{label} answers as merged does", [e["answers"][label].strip() for e in examples] == ours)

print(f"\n{'FAILED: ' + ', '.join(failures) if failures else 'interop: all as it should be'}")
sys.exit(bool(failures))
