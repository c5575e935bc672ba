#!/usr/bin/env bash
# Makes the Python environment of tests/$1 in target/, once, and prints its interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=target/$1-venv
requirements=tests/$1/requirements.txt
stamp="$venv/$(sha256sum "$requirements" | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --requirement "$requirements" >&2
    touch "$stamp"
fi
echo "$venv/bin/python"
