#!/usr/bin/env bash
# Makes the virtual environment in which tests/clients/sglang_loaded.py runs: SGLang without its kernels, which need
# CUDA, and with a torch for CPUs instead of the one that it pins. About 2.7 GB. Usage: sglang_env.sh [FOLDER]
set -euo pipefail
folder="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/moequant/sglang}"
mkdir -p "$folder"
exec 9> "$folder.lock"
flock 9 # tests wait for this script, and so does another of it
if [ -f "$folder/complete" ]; then
    exit 0
fi
free=$(df -Pk "$(dirname "$(realpath "$folder")")" | awk 'NR == 2 { print $4 }')
if [ "$free" -lt 5000000 ]; then
    echo "sglang_env: 5 GB are needed for $folder, $((free / 1000000)) GB are free" >&2
    exit 3
fi
python3 -m venv --clear "$folder"
# What its loaders import, and no more; with "+cpu" nobody brings CUDA's libraries.
"$folder/bin/pip" install -q --no-cache-dir torch==2.13.0+cpu transformers==5.19.0 compressed-tensors==0.18.0 \
    numpy packaging psutil pydantic requests tqdm orjson pybase64 pyzmq setproctitle msgspec fastapi uvicorn aiohttp \
    einops gguf tiktoken interegular partial_json_parser pillow python-multipart prometheus-client xxhash zstandard \
    scipy IPython openai==2.8.0 triton dill sentencepiece
"$folder/bin/pip" install -q --no-cache-dir --no-deps sglang==0.5.23 apache-tvm-ffi==0.1.11 torchvision==0.28.0
touch "$folder/complete"
