#!/usr/bin/env bash
# GRPO on a real model with real vLLM: SmolLM2-135M-Instruct learns chains of additions and subtractions from three-shot
# prompts (rg_chain_sum, made with reasoning-gym) and is evaluated on 100 held-out questions it never trains on.
# Two CPU cores: about a quarter of an hour. DATA is the folder of rg_chain_sum_{train,test_a}.jsonl.gz.
set -euo pipefail
cd "$(dirname "$0")/.."
bash setup.sh
bash benchmark/smollm2.sh
data=${DATA:-data} out=runs/grpo_smollm2_seed${SEED:-0}
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=2
"${VENV:-.venv}/bin/python" grpo.py \
  --model_name_or_path models/SmolLM2-135M-Instruct.Q4_1.gguf --dtype bfloat16 \
  --dataset_name "$data/rg_chain_sum_train.jsonl.gz" --eval_dataset_name "$data/rg_chain_sum_test_a.jsonl.gz" \
  --eval_split train --stop_strings $'\n' --use_vllm \
  --generation_batch_size 256 --num_generations 8 --max_completion_length 12 --learning_rate 1e-5 --max_steps 120 \
  --max_tokens_per_micro_batch 4096 --eval_steps 20 --num_generations_eval 8 --save_steps 40 \
  --seed "${SEED:-0}" --output_dir "$out" "$@"
"${VENV:-.venv}/bin/python" benchmark/report.py "$out" --png "$out/curve.png"
