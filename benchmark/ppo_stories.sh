#!/usr/bin/env bash
# Positive continuations, the first example of the field, with a real model of 260,032 parameters: stories260K goes on
# with the first sentence of a story, and VADER says how positive that sounds. ppo.py, rloo.py and grpo.py maximise it
# less 0.02 of the KL to where they started, in nats of a completion, with the same prompts and as many samples and
# updates. `unleashed` is grpo.py with a fortieth of that KL: what hacking this reward looks like.
# Four to five minutes of one core a seed. SEEDS="0 1 2"
# MODEL is stories260K as a Hugging Face folder, DATA the folder of prompts_stories.jsonl.gz.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${MODEL:-models/stories260K} prompts=${DATA:-data}/prompts_stories.jsonl.gz runs=runs/stories
missing() { echo "ppo_stories.sh: $*" >&2; exit 1; }
[ -f "$model/model.safetensors" ] || missing "there is no model in $model: put stories260K there, karpathy/tinyllamas" \
  "on the Hugging Face hub (MIT) converted to a Llama folder of transformers, or say where it is: MODEL=..."
[ -f "$prompts" ] || missing "there is no $prompts: 400 lines of {\"prompt\": \"Once upon a time, there was ...\"}," \
  "the first sentence of a story each; say in which folder it is: DATA=..."
bash setup.sh
python=${VENV:-.venv}/bin/python
"$python" -m pip install --quiet --disable-pip-version-check "$(grep -o '^vaderSentiment==[0-9.]*' requirements-dev.txt)"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
common=(
  --model_name_or_path "$model" --reward_funcs benchmark/vader.py:positive
  --dataset_name "$prompts" --dataset_split 'train[:336]' --eval_dataset_name "$prompts" --eval_split 'train[336:]'
  --max_completion_length 48  # where nearly all end: the model never learnt EOS, and BOS, which also stops it, is rare
  --generation_batch_size 256 --num_generations 8 --steps_per_generation 2 --num_iterations 2
  --learning_rate 3e-4 --beta 0.02 --max_steps 60 --eval_steps 20 --num_generations_eval 4 --log_completions_steps 0
)
in_reward=(--kl_in reward --kl_estimator k1)
for seed in ${SEEDS:-0}; do
  train() { "$python" "$1.py" "${common[@]}" "${@:3}" --seed "$seed" --output_dir "$runs/$2_seed$seed"; }
  # lam 1: at 0.95 a tenth of a score, which stands on the last of 48 tokens, would reach the first one
  train ppo ppo --missing_eos none --lam 1 --critic_learning_rate 1e-3
  train rloo rloo
  train grpo grpo "${in_reward[@]}"
  train grpo unleashed "${in_reward[@]}" --beta 0.0005
done
"$python" benchmark/report.py $runs/{ppo,rloo,grpo,unleashed}_seed* --png $runs/curve.png --samples 4 \
  --compare eval/positive reward completion_kl
