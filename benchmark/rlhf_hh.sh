#!/usr/bin/env bash
# RLHF whole, on real data: SmolLM2-135M-Instruct and people's choices between two helpful replies (HH-RLHF). sft.py on
# chosen replies; a reward model, `proxy`, from every other pair, and one from the pairs between them, `gold`, which no
# policy sees. From one start PPO at three betas, RLOO and GRPO against proxy, and DPO on proxy's pairs; then judge.py
# on held-out prompts. Each online method gets 640 replies in 20 rollouts, cut at 32 tokens, where hardly one has ended:
# so PPO's penalty for a missing stop token is off. All three have the KL of the whole reply, by k1, in the reward.
# What has a final model is not run again.
# One core: 75 minutes. DATA is the folder of hh_helpful_{train,test_a}.jsonl.gz.
set -euo pipefail
cd "$(dirname "$0")/.."
bash setup.sh
bash benchmark/smollm2.sh
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 DATA=${DATA:-data} RUNS=runs/rlhf_hh
python=${VENV:-.venv}/bin/python runs=$RUNS held_out=$DATA/hh_helpful_test_a.jsonl.gz
mkdir -p $runs
"$python" - <<'PYTHON'
import json, os
from common.data import load_rows
def write(name, rows):
    with open(f"{os.environ['RUNS']}/{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
rows = list(load_rows(f"{os.environ['DATA']}/hh_helpful_train.jsonl.gz"))
write("proxy", rows[0::2])
write("gold", rows[1::2])
write("sft", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows[0::2]])
PYTHON

train() { [ -d "$runs/$2/final" ] || "$python" "$1.py" "${common[@]}" "${@:3}" --output_dir "$runs/$2"; }
common=(--dtype bfloat16 --max_tokens_per_micro_batch 2048 --logging_steps 1 --seed "${SEED:-0}" --on_overlong drop)
offline=(--train_batch_size 32 --max_length 192 --learning_rate 2e-5)
online=(
  --model_name_or_path $runs/sft/final --dataset_name $runs/proxy.jsonl --reward_funcs $runs/proxy/final
  --max_prompt_length 96 --max_completion_length 32 --generation_batch_size 32 --learning_rate 1e-4
)

train sft sft "${offline[@]}" --model_name_or_path models/SmolLM2-135M-Instruct.Q4_1.gguf \
  --dataset_name $runs/sft.jsonl --dataset_split 'train[:960]'
for judge in proxy gold; do
  train reward $judge "${offline[@]}" --model_name_or_path $runs/sft/final --dataset_name $runs/$judge.jsonl \
    --eval_dataset_name "$held_out" --max_eval_samples 256
done
for beta in 0.02 0.1 0.5; do
  train ppo ppo_beta$beta "${online[@]}" --beta $beta --missing_eos none \
    --num_iterations 1 --max_steps 40
done
train rloo rloo "${online[@]}" --num_generations 4 --beta 0.1 --max_steps 20
train grpo grpo "${online[@]}" --num_generations 4 --beta 0.1 --kl_in reward --kl_estimator k1 --max_steps 20
train dpo dpo "${offline[@]}" --model_name_or_path $runs/sft/final --dataset_name $runs/proxy.jsonl
"$python" benchmark/judge.py $runs/sft/final $runs/{ppo_beta0.02,ppo_beta0.1,ppo_beta0.5,rloo,grpo,dpo}/final \
  --gold $runs/gold/final --proxy $runs/proxy/final --dataset_name "$held_out" --num 128 --dtype bfloat16 \
  --max_prompt_length 96 --on_overlong drop --max_completion_length 32 \
  --max_tokens_per_micro_batch 2048 --out $runs/judged
