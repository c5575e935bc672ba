#!/usr/bin/env bash
# The page, and the graphs of each architecture, in headless Chromium, on WASM and WebGPU. The browser comes with npm, pinned.
# ANNEAL_DEMO names another folder than artifacts/demo; it holds site/ and eval/eval.json.
# ORT_DYLIB_PATH names ONNX Runtime's library, which answers beside the browser.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/browser
bash "$here/npm.sh"
node --test --test-reporter=dot "$here/crontab.test.mjs"
node "$here/check.mjs"
exec node "$here/graphs.mjs"
