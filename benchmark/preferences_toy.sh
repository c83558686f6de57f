#!/usr/bin/env bash
# Preferences on the toy, three seeds: 4,096 pairs of the careless demonstrator's answers, judged with noise. Every method
# starts from the same sft.py; `sft_on_chosen` is the control to beat. `displaced` is DPO at ten times its learning rate;
# `dpo_and_sft` is that with the likelihood of what was chosen; `flipped` is DPO on swapped labels. Ten minutes of one
# core, no network. SEEDS="0 1 2"
set -euo pipefail
cd "$(dirname "$0")/.."
bash setup.sh
python=${VENV:-.venv}/bin/python
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
mkdir -p runs
"$python" - > runs/flipped.jsonl <<'PYTHON'
import json
from common.toy import toy_pairs
for row in toy_pairs():
    print(json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}))
PYTHON
for seed in ${SEEDS:-0 1 2}; do
  start=runs/toy_sft_seed$seed/final
  [ -d "$start" ] || "$python" sft.py --seed "$seed" --eval_steps 50 --output_dir "runs/toy_sft_seed$seed"
  train() {
    "$python" "$1.py" --seed "$seed" --model_name_or_path "$start" "${@:3}" --eval_steps 8 \
      --output_dir "runs/toy_$2_seed$seed"
  }
  train reward reward
  train dpo dpo --beta 0.5 --learning_rate 5e-5
  train dpo dpo_and_sft --loss_type sigmoid sft --learning_rate 2e-4
  train dpo ipo --loss_type ipo --beta 1 --learning_rate 5e-5
  train dpo simpo --loss_type simpo --beta 2
  train dpo cpo --loss_type cpo sft --learning_rate 1e-4
  train orpo orpo --beta 1
  train kto kto
  train dpo sft_on_chosen --loss_type sft --learning_rate 2e-4
  train dpo displaced --learning_rate 2e-4
  train dpo flipped --beta 0.5 --learning_rate 5e-5 --dataset_name runs/flipped.jsonl \
    --eval_dataset_name toy:sort_pairs --eval_reward_funcs common.toy:exact_match
done
columns=(eval/exact_match eval/exact_match_greedy eval/rewards/accuracies eval/logps/chosen eval/logps/rejected)
methods=()
for method in dpo dpo_and_sft ipo simpo cpo orpo kto sft_on_chosen; do methods+=(runs/toy_"$method"_seed*); done
"$python" benchmark/report.py "${methods[@]}" --compare "${columns[@]}" --png runs/preferences.png
"$python" benchmark/report.py runs/toy_flipped_seed* --compare "${columns[@]}"
"$python" benchmark/report.py runs/toy_{displaced,dpo_and_sft}_seed* --png runs/displacement.png \
  --compare eval/rewards/accuracies eval/logps/chosen eval/exact_match
