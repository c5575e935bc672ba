#!/usr/bin/env bash
# Installs what the browser's tests need, once: Chromium comes with it, pinned.
set -euo pipefail
cd "$(dirname "$0")"
stamp="node_modules/.$(sha256sum package-lock.json | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    npm ci --ignore-scripts --no-audit --no-fund --silent
    touch "$stamp"
fi
