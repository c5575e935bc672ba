#!/usr/bin/env bash
# Our files in other people's readers. Makes its own Python environment in target/, once.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=target/interop-venv
stamp="$venv/$(sha256sum tests/interop/requirements.txt | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --requirement tests/interop/requirements.txt
    touch "$stamp"
fi
"$venv/bin/python" tests/interop/adapters.py
exec "$venv/bin/python" tests/interop/check.py "$@"
