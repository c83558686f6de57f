#!/usr/bin/env bash
# The toy, three seeds: sft.py, then grpo.py from it. A minute and a half of one core; no network. SEEDS="0 1 2"
set -euo pipefail
cd "$(dirname "$0")/.."
bash setup.sh
python=${VENV:-.venv}/bin/python
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
sft=() grpo=()
for seed in ${SEEDS:-0 1 2}; do
  "$python" sft.py --seed "$seed" --eval_steps 50 --output_dir "runs/toy_sft_seed$seed"
  "$python" grpo.py --seed "$seed" --eval_steps 20 --model_name_or_path "runs/toy_sft_seed$seed/final" \
    --output_dir "runs/toy_grpo_seed$seed"
  sft+=("runs/toy_sft_seed$seed") grpo+=("runs/toy_grpo_seed$seed")
done
"$python" benchmark/report.py "${sft[@]}" "${grpo[@]}" --png runs/toy.png
