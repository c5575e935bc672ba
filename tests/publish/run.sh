#!/usr/bin/env bash
# The demo's site published to a stand-in for AWS, and opened in Chromium as CloudFront would serve it;
# then behind servers of other kinds.
# ANNEAL_DEMO names another folder than artifacts/demo; it holds site/ and eval/eval.json.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=$(bash tests/venv.sh publish)
export PYTHON
bash tests/browser/npm.sh
node tests/publish/live.mjs
exec bash tests/publish/hosts.sh
