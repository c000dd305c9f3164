"""Writes a folder's logits as mlx-lm computes them. Needs mlx-lm and ``mlx[cpu]`` alone."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import mlx_lm
import numpy as np

folder, ids, out = sys.argv[1:]
model, _ = mlx_lm.load(folder, tokenizer_config={"trust_remote_code": True})
logits = model(mx.array(np.load(ids)[None]))[0]
np.save(out, np.array(logits.astype(mx.float32)))
print(json.dumps({"version": mlx_lm.__version__}))
