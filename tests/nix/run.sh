#!/usr/bin/env bash
# The demo through Nix: the same bytes as `cargo xtask build` gave here, and the same again.
#
# nixpkgs is played by this machine's own programs (nix/host-pkgs), the shared cache by a folder, and its
# results are those of this checkout. All of it happens in a copy below target/nix.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
work=$root/target/nix
copy=$work/workspace
cache=$work/cache
xtask() { cargo run --quiet --locked --package xtask -- "$@"; }
say() { printf '%4ds  %s\n' $SECONDS "$*"; }
fail() { printf 'error: %s\n' "$1" >&2; [ -z "${2:-}" ] || printf '  = hint: %s\n' "$2" >&2; exit 1; }

as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo --preserve-env=NIX_CONFIG,PATH)
if ! command -v nix >/dev/null; then
    command -v apt-get >/dev/null || fail "there is no nix" "install Nix 2.8 or newer, and run this stage again"
    { "${as_root[@]}" apt-get update && "${as_root[@]}" apt-get install --yes --no-install-recommends nix-bin; } \
        >"$root/target/nix-apt.log" 2>&1 || fail "apt-get cannot install nix-bin: see target/nix-apt.log"
fi

# What the sandbox shows of the host: the stand-in's programs, the compiler, and the shared cache.
rust=$(rustc --print sysroot)
paths="/rust=$rust $cache"
for path in /bin /usr /lib /lib64 /etc/alternatives /etc/ssl; do [ ! -e $path ] || paths+=" $path"; done
export NIX_CONFIG="experimental-features = nix-command flakes
build-users-group =
substituters =
flake-registry =
sandbox = true
sandbox-fallback = false
sandbox-paths = $paths"
nix() { "${as_root[@]}" env nix "$@"; }

xtask build demo
mkdir -p "$work/results" "$cache"
rm -rf "$copy" "$cache/nar" "$work/host-pkgs"
mkdir -p "$copy/artifacts"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    # Deleted, but still in the index.
    [ ! -e "$file" ] || printf '%s\0' "$file"
done | tar --create --null --files-from - | tar --extract --directory "$copy"

# Results that others would fetch are pinned, and lie in the shared cache.
ln -s "$root/artifacts/v1" "$copy/artifacts/v1"
xtask --workspace "$copy" lock demo
xtask --workspace "$copy" nix export "$cache/nar" demo
rm "$copy/artifacts/v1"
sed -i "s|^\[workspace.metadata.anneal\]|&\nremote = \"file://$cache\"|" "$copy/Cargo.toml"
cat >"$copy/recipes/matrix.toml" <<'TOML'
[words]
step     = "dataset/tokenizer"
examples = "./demo/pretrain.jsonl"
template = "./demo/chat_template.jinja"
matrix   = { vocab_size = [512, 768], max_rows = [4000] }

[tuned]
step    = "train/lora"
base    = "demo/base"
dataset = "demo/dataset"
matrix  = { learning_rate = [1.0, 0.5, 1.5e-5, 2e-6, 0.0002], target_modules = ["all-linear", ["q_proj", "v_proj"]] }

[evaluated]
step    = "eval/perplexity"
models  = ["demo/base"]
dataset = "demo/held-out"
TOML

# The stand-in, and the tools that this checkout has fetched: by their hashes they are Nix's own.
cargo fetch --locked --quiet
cp -r nix/host-pkgs "$work/host-pkgs"
crates=$(dirname "$(ls "${CARGO_HOME:-$HOME/.cargo}"/registry/cache/*/serde-*.crate | head -1)")
fingerprint=$({ rustc -vV; cc --version; ld --version; } | sha256sum | cut -c-16)
printf '{"path": "/rust/bin:/usr/bin:/bin", "crates": "%s", "fingerprint": "%s"}\n' \
    "$crates" "$fingerprint" >"$work/host-pkgs/host.json"
for tool in onnxruntime transformers-js; do
    "${as_root[@]}" nix-store --add-fixed --recursive sha256 "$(xtask nix tool $tool)" >/dev/null
done

# Nix says each time that it takes the stand-in for what is locked.
flake() { nix $1 "path:$copy${2:+#$2}" --override-input nixpkgs "path:$work/host-pkgs" --no-write-lock-file "${@:3}"; }
evaluate() { flake eval "$@" 2>"$work/eval.log" || { cat "$work/eval.log" >&2; fail "nix eval .#$1 failed"; }; }
build() { flake build "$1" --out-link "$work/results/$1" --print-build-logs "${@:2}" >"$work/$1.log" 2>&1; }
must_build() { build "$@" || { tail -40 "$work/$1.log" >&2; fail "nix build .#$1 failed"; }; }

# Every target has its package, by the same name.
names() { sort >"$work/$1.names"; }
evaluate packages.x86_64-linux --json --apply builtins.attrNames | tr -d '[]"' | tr , '\n' | grep -vx -e anneal -e default | names nix
recipes=$(basename -s .toml "$copy"/recipes/*.toml)
# Recipes that are not locked are blocked, which is no matter here.
{ xtask --workspace "$copy" --json plan $recipes || true; } | sed -n 's|.*"target":"\([^"]*\)".*|\1|p' | tr / - | names anneal
diff "$work/anneal.names" "$work/nix.names" || fail "the flake's packages are not the recipes' targets"
rm -rf "$copy/artifacts"
# A shared cache that is no folder is found where builds find it.
cp "$copy/Cargo.toml" "$work/Cargo.toml"
sed -i 's|^remote = .*|remote = "s3://bucket/prefix/"\nremote-endpoint = "http://127.0.0.1:9000"\nremote-region = "eu-west-1"|' "$copy/Cargo.toml"
url=$(evaluate packages.x86_64-linux.demo-adapter.url --raw)
[[ $url == s3://bucket/prefix/nar/*".nar?region=eu-west-1&scheme=http&endpoint=127.0.0.1:9000" ]] || fail "a result would be fetched from $url"
mv "$work/Cargo.toml" "$copy/Cargo.toml"
# What is not built here evaluates, and a source that nobody pinned says so.
flake "flake check" "" --no-build >"$work/check.log" 2>&1 || { tail -5 "$work/check.log" >&2; fail "nix flake check fails"; }
build gemma3-270m-browser-base && fail "an unpinned source was built"
grep -q "gemma3-270m-browser/base comes from the network" "$work/gemma3-270m-browser-base.log" || fail "an unpinned source is not named"
say "$(wc -l <"$work/nix.names") targets have their packages"

must_build anneal
flake run anneal -- --version >/dev/null 2>"$work/run.log" || fail "nix run does not run: see $work/run.log"
say "compiled the command line and the workers"
targets=$(sed -n 's/^demo-//p' "$work/nix.names")
for target in $targets; do
    must_build "demo-$target"
    diff -r "$work/results/demo-$target/" "artifacts/demo/$target/" || fail "demo-$target is not demo/$target"
    ours=$(xtask --json show "demo/$target" | sed 's/.*"output":"\([0-9a-f]*\)".*/\1/')
    theirs=$(xtask nix digest "$work/results/demo-$target/" | sed -n 's/^blake3  //p')
    [ "$ours" = "$theirs" ] || fail "demo-$target has digest $theirs, demo/$target $ours"
done
say "$(wc -w <<<"$targets") targets of the demo are the same bytes as here"

for target in gguf site; do
    must_build "demo-$target"
    must_build "demo-$target" --rebuild
done
for target in tokenizer dataset merged onnx-int4; do must_build "demo-$target" --rebuild; done
say "rebuilt: identical"

# Pinned results are what they are pinned as, or nothing.
must_build checks.x86_64-linux.pins
sha256=$(sed -n '/^\[results.adapter\]/,/^sha256/s/^sha256 = "\(.*\)"/\1/p' "$copy/recipes/demo.lock")
chmod u+w "$cache/nar/$sha256.nar"
printf x | dd of="$cache/nar/$sha256.nar" bs=1 seek=5000 conv=notrunc status=none
build demo-adapter --rebuild && fail "a result of other bytes than the pinned ones was taken"
grep -q "hash mismatch" "$work/demo-adapter.log" || fail "it is not said that a result is not the pinned one"
sed -i '1s/.*/{"messages":[{"role":"user","content":"noon"},{"role":"assistant","content":"0 12 * * *"}]}/' "$copy/recipes/demo/schedules.jsonl"
build checks.x86_64-linux.pins && fail "a row was changed, and the pinned results are said to be current"
grep -q "demo/adapter: of another recipe or other files" "$work/checks.x86_64-linux.pins.log" || fail "a stale pin is not named"
say "other bytes than the pinned ones, and pins of other rows, are refused"
