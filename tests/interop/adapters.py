"""Adapters that PEFT saved, taken in by `adapter/peft` and merged by `merge/lora`, in PEFT again; and
merged to 8 bits, in compressed-tensors.

Builds a recipe of its own in a workspace below target/, over the tiny models and adapters of
crates/train/src/worker/golden and crates/merge/tests/golden.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
WORKSPACE = TARGET / "interop-adapters"
MODELS = ROOT / "crates/train/src/worker/golden"
ADAPTERS = ROOT / "crates/merge/tests/golden"
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]
WEIGHTS = {"first": 0.7, "second": -0.4}
RECIPE = """
[{a}-base]
step    = "command/run"
program = "cp"
args    = ["{{config.json}}", "{{model.safetensors}}", "{{out}}"]
inputs  = ["./own/{a}/base/config.json", "./own/{a}/base/model.safetensors"]
kind    = "model"

[{a}-first]
step  = "adapter/peft"
files = "./own/{a}/first"
base  = "{a}-base"

[{a}-second]
step  = "adapter/peft"
files = "./own/{a}/second"

[{a}-both]
step     = "merge/lora"
base     = "{a}-base"
adapters = ["{a}-first", "{a}-second"]
weights  = {{ {a}-first = 0.7, {a}-second = -0.4 }}
dtype    = "float32"

[{a}-int8]
step     = "merge/lora"
base     = "{a}-base"
adapters = ["{a}-first", "{a}-second"]
weights  = {{ {a}-first = 0.7, {a}-second = -0.4 }}
dtype    = "int8"
"""
INT8 = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True, dynamic=False)
failures = []


def check(what, same):
    print(("ok      " if same else "FAILED  ") + what)
    if not same:
        failures.append(what)


def workspace():
    """The code of the real workspace with a recipe of its own; what was built before is kept."""
    recipes = WORKSPACE / "recipes"
    shutil.rmtree(recipes, ignore_errors=True)
    (recipes / "own").mkdir(parents=True)
    links = ["Cargo.toml", "Cargo.lock", "rust-toolchain.toml", "crates", "xtask", "recipes/demo"]
    for name in links:
        (WORKSPACE / name).unlink(missing_ok=True)
        (WORKSPACE / name).symlink_to(ROOT / name)
    for a in ARCHITECTURES:
        shutil.copytree(ADAPTERS / a, recipes / "own" / a)
        shutil.copytree(MODELS / a, recipes / "own" / a / "base")
    (recipes / "own.toml").write_text("".join(RECIPE.format(a=a) for a in ARCHITECTURES))


def build():
    command = ["cargo", "xtask", "--workspace", WORKSPACE, "build", "own"]
    env = os.environ | {"CARGO_TARGET_DIR": str(TARGET)}
    subprocess.run(command, cwd=ROOT, env=env, check=True)


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def same_levels(whole, packed):
    """Whether the matrices in 8 bits are those that compressed-tensors makes of the whole ones."""
    names = [name.removesuffix("_packed") for name in packed if name.endswith("_packed")]
    for name in names:
        weight, found = whole[name], packed[name + "_packed"]
        scale, zero = calculate_qparams(weight.amin(1, True), weight.amax(1, True), INT8)
        scale = scale.to(torch.bfloat16)
        levels = quantize(weight, scale.float(), zero, INT8, dtype=torch.int8).int()
        found = found.view(torch.uint8).int()[:, : weight.shape[1]] - 128
        if not (torch.equal(scale, packed[name + "_scale"]) and torch.equal(levels, found)):
            return False
    return len(names) > 0


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def adapted(a, paths):
    """The base with adapters by name: both, combined by their weights, where there are two."""
    (name, path), *others = paths.items()
    model = PeftModel.from_pretrained(load(MODELS / a), path, adapter_name=name)
    for other, path in others:
        model.load_adapter(path, adapter_name=other)
    if others:
        weights = [WEIGHTS[name] for name in paths]
        model.add_weighted_adapter(list(paths), weights, "both", combination_type="cat")
        model.set_adapter("both")
    return logits(model.eval())


workspace()
build()
built = WORKSPACE / "artifacts/own"
for a in ARCHITECTURES:
    for name in WEIGHTS:
        theirs, ours = [adapted(a, {name: p}) for p in (ADAPTERS / a / name, built / f"{a}-{name}")]
        check(f"{a}: PEFT computes the same with `{name}` as it was and as taken in", torch.equal(theirs, ours))
    theirs = adapted(a, {name: ADAPTERS / a / name for name in WEIGHTS})
    off = ((logits(load(built / f"{a}-both")) - theirs).abs().max() / theirs.abs().max()).item()
    check(f"{a}: both merged by weight are PEFT's combination, within {off:.1e}", off < 1e-5)
    whole, packed = [load_file(built / f"{a}-{kind}" / "model.safetensors") for kind in ("both", "int8")]
    check(f"{a}: merged to 8 bits as compressed-tensors rounds it", same_levels(whole, packed))
    int8 = logits(load(built / f"{a}-int8", torch.bfloat16)).float()
    off = ((int8 - theirs).norm() / theirs.norm()).item()
    check(f"{a}: transformers reads the 8 bits, off by {off:.3f}", off < 0.1)

print(f"\n{'FAILED: ' + ', '.join(failures) if failures else 'adapters: all as they should be'}")
sys.exit(bool(failures))
