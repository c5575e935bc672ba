#!/usr/bin/env bash
# Our files in other people's readers.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(bash tests/interop/venv.sh)
exec "$python" tests/interop/check.py "$@"
