#!/usr/bin/env bash
# Makes the Python environment of the stand-in for AWS in target/, once, and prints its interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=target/publish-venv
stamp="$venv/$(sha256sum tests/publish/requirements.txt | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --requirement tests/publish/requirements.txt >&2
    touch "$stamp"
fi
echo "$venv/bin/python"
