#!/usr/bin/env bash
# From nothing to a learning curve on two CPU cores, offline but for the installation: a 133k-parameter model is taught
# to sort digits by a careless teacher (sft.py) and then by reward (grpo.py). Writes runs/sft, runs/grpo and demo.png.
set -euo pipefail
cd "$(dirname "$0")"
bash setup.sh
python=${VENV:-.venv}/bin/python
export HF_HUB_OFFLINE=1
for script in sft grpo; do
  [ ! -e runs/$script ] || { echo "demo.sh: runs/$script is there already; move it away first" >&2; exit 1; }
done
"$python" sft.py --eval_steps 50
"$python" grpo.py --eval_steps 20
"$python" benchmark/report.py runs/sft runs/grpo --png demo.png
