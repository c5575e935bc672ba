#!/usr/bin/env bash
# The page in headless Chromium, on WASM and WebGPU. The browser comes with npm, pinned.
# ANNEAL_DEMO names another folder than artifacts/demo; it holds site/ and eval/eval.json.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/browser
stamp="$here/node_modules/.$(sha256sum "$here/package-lock.json" | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    (cd "$here" && npm ci --ignore-scripts --no-audit --no-fund --silent)
    touch "$stamp"
fi
node --test --test-reporter=dot "$here/crontab.test.mjs"
exec node "$here/check.mjs" "$@"
