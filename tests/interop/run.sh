#!/usr/bin/env bash
# Our files in other people's readers.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(bash tests/interop/venv.sh)
"$python" tests/interop/adapters.py
exec "$python" tests/interop/check.py "$@"
