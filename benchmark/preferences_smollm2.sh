#!/usr/bin/env bash
# Preferences on real data: SmolLM2-135M-Instruct and people's choices between two helpful replies (HH-RLHF, pairs of at
# most 192 tokens a side). A reward model first; then DPO, KTO, ORPO and SimPO on the same pairs, the first 1,280 rows.
# All are evaluated alike: implicit accuracy on held-out pairs, and what the reward model thinks of their own replies.
# Two CPU cores: an hour. DATA is the folder of hh_helpful_{train,test_a}.jsonl.gz.
set -euo pipefail
cd "$(dirname "$0")/.."
bash setup.sh
bash benchmark/smollm2.sh
data=${DATA:-data} runs=runs/preferences_smollm2 python=${VENV:-.venv}/bin/python
export HF_HUB_OFFLINE=1
common=(
  --model_name_or_path models/SmolLM2-135M-Instruct.Q4_1.gguf --dtype bfloat16 --max_tokens_per_micro_batch 2048
  --dataset_name "$data/hh_helpful_train.jsonl.gz" --eval_dataset_name "$data/hh_helpful_test_a.jsonl.gz"
  --max_length 192 --on_overlong drop --train_batch_size 32 --logging_steps 1 --seed "${SEED:-0}"
)
policy=(
  --dataset_split 'train[:1280]' --learning_rate 2e-5
  --eval_reward_funcs $runs/reward/final --max_completion_length 32 --max_eval_samples 128
)
train() { "$python" "$1.py" "${common[@]}" "${@:3}" --output_dir "$runs/$2"; }

train reward reward --learning_rate 2e-5 --normalize_split 'train[:600]'
train dpo dpo "${policy[@]}"
train kto kto "${policy[@]}" --train_batch_size 64
train orpo orpo "${policy[@]}"
train dpo simpo "${policy[@]}" --loss_type simpo --beta 2
"$python" benchmark/report.py $runs/{dpo,kto,orpo,simpo} --png $runs/curve.png --compare \
  eval/rewards/accuracies eval/reward eval/reward_greedy eval/mean_length eval/mean_length_greedy eval/terminated
