#!/usr/bin/env bash
# Sets up in $1, once, what `bench export` measures beside ours: PEFT and ONNX Runtime GenAI's model
# builder in $1/venv (with torch and transformers out of the readers' environment), and llama.cpp's
# converter and llama-quantize in $1/llama.cpp.
set -euo pipefail
cd "$(dirname "$0")/../../.."
mkdir -p "$1"
to=$(realpath "$1")
readers=$(bash tests/venv.sh interop)
if [ ! -e "$to/venv/ready" ]; then
    rm -rf "$to/venv"
    python3 -m venv "$to/venv"
    site=$("$to/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$readers" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/readers.pth"
    "$to/venv/bin/pip" install --quiet --no-deps \
        onnxruntime-genai==0.18.0 onnxruntime==1.30.0 onnx==1.23.2 onnx-ir==1.1.0 ml_dtypes==0.6.0 \
        flatbuffers==25.12.19 sentencepiece==0.2.3 protobuf==7.36.2
    touch "$to/venv/ready"
fi
if [ ! -e "$to/llama.cpp/ready" ]; then
    rm -rf "$to/llama.cpp" "$to/sdist"
    "$to/venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$to/sdist" \
        llama-cpp-python==0.3.36
    tar -xzf "$to"/sdist/llama_cpp_python-*.tar.gz -C "$to/sdist"
    mv "$to"/sdist/llama_cpp_python-*/vendor/llama.cpp "$to/llama.cpp"
    cmake -S "$to/llama.cpp" -B "$to/llama.cpp/build" -DCMAKE_BUILD_TYPE=Release \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF > /dev/null
    # It warns by the thousand.
    cmake --build "$to/llama.cpp/build" --target llama-quantize --parallel 2 > "$to/build.log" 2>&1 ||
        { tail -20 "$to/build.log" >&2; exit 1; }
    touch "$to/llama.cpp/ready"
fi
