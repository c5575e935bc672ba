#!/usr/bin/env bash
# Our files in other people's readers.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(bash tests/venv.sh interop)
cargo xtask release demo --out target/interop-release > /dev/null
"$python" tests/interop/release.py target/interop-release artifacts
"$python" tests/interop/adapters.py
exec "$python" tests/interop/check.py "$@"
