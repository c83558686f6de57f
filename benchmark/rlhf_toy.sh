#!/usr/bin/env bash
# Reinforcement on the toy, three seeds, all from the same sft.py. First with the right answer for a reward: grpo.py,
# rloo.py, ppo.py. Then with a reward model of 4,096 noisy judgements in its place and PPO at seven betas, from none to
# far too much: benchmark/judge.py holds what that model thinks of each policy against how often it is right.
# Twenty minutes of one core, no network. SEEDS="0 1 2"
set -euo pipefail
cd "$(dirname "$0")/.."
bash setup.sh
python=${VENV:-.venv}/bin/python runs=runs/rlhf_toy
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
judged=()
for seed in ${SEEDS:-0 1 2}; do
  start=$runs/sft_seed$seed/final proxy=$runs/reward_seed$seed/final
  train() {
    "$python" "$1.py" --seed "$seed" --model_name_or_path "$start" "${@:3}" --output_dir "$runs/$2_seed$seed"
  }
  "$python" sft.py --seed "$seed" --output_dir "$runs/sft_seed$seed"
  train reward reward
  train grpo grpo --eval_steps 25
  train rloo rloo --eval_steps 25
  train ppo ppo --eval_steps 100
  policies=()
  for beta in 0 0.05 0.1 0.2 0.5 1 2; do
    train ppo ppo_beta$beta --reward_funcs "$proxy" --value_model "$proxy" --beta $beta --missing_eos_penalty 3 \
      --learning_rate 3e-4 --max_steps 240
    policies+=("$runs/ppo_beta${beta}_seed$seed/final")
  done
  "$python" benchmark/judge.py "$start" "${policies[@]}" --gold common.toy:exact_match --proxy "$proxy" \
    --out "$runs/judged_seed$seed" --beside "${judged[@]}"
  judged+=("$runs/judged_seed$seed/judged.json")
done
"$python" benchmark/report.py $runs/{grpo,rloo,ppo}_seed* --png $runs/curve.png \
  --compare eval/exact_match eval/exact_match_greedy
