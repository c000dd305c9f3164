"""What takes the place of commands and options that this version doesn't have any more."""

REMOVED_COMMANDS = {
    "gpu-session": "make gpu, in a clone",
    "refit": "depthcut build, which builds an engine with the graph's weights",
}

_COMPARE = "score for each, and then score --compare a.json b.json c.json"
_TASKSET = "taskset -c 2,3 before the command, with --threads 2"
_SERVER = "the server that you deploy to: depthcut generates greedily"
_TRTEXEC = "trtexec for such an engine"
_LONG = "eval_sequence_length in a --config file, or --tasks with lm-eval's tasks, such as ruler"
_PROBES = "--tasks with --task-data; samples/07_ci/probes.py writes the four as such tasks"
_POWER = "--time-budget for a clear verdict, or more --rounds where two sessions are compared"
_ONE_PROCESS = "score --metric kl --ray, whose scores plan takes; searches run in one process"
_VISIBLE = "CUDA_VISIBLE_DEVICES, which names the GPU to all programs"
_AGAIN = "depthcut compare again, and check its report"
REMOVED = {
    "export --search-seconds": "--search greedy",
    "plan --search-seconds": "--search greedy",
    "export --rescore-every": "--search greedy",
    "plan --curve": "depthcut depths, which compares cuts of several sizes",
    "plan --rescore-every": "--search greedy",
    "depths --other-text": "depthcut export, which measures the healed cut on a second text",
    "depths --recommend": "nothing: depths always recommends",
    "compare --stride": "eval_sequence_length in a --config file: longer samples have more context",
    "compare --power": _POWER,
    "compare --smallest": _POWER,
    "export --power": _POWER,
    "export --smallest": _POWER,
    "export --stride": "eval_sequence_length in a --config file: longer samples have more context",
    "compare --pin": _TASKSET,
    "export --pin": _TASKSET,
    "score --checkpoints": _COMPARE,
    "score --revisions": f"{_COMPARE} (a --revision for each)",
    "score --vary-calibration": f"{_COMPARE} (a --calibration for each)",
    "score --vary-samples": f"{_COMPARE} (a number of --samples for each)",
    "build --refittable": "depthcut build again, with the graph that has the new weights",
    "build --strip-weights": "depthcut build again, with the graph that has the weights",
    "costs --rank": "full maps, which healing fits",
    "export --rank": "the key rank of a --config file, for adapters; maps are full",
    "export --states-weight": "nothing: models without next tokens learn from their states, too",
    "export --sequential": "--heal linear or best, which fit each branch on the whole model",
    "heal --rank": "the key rank of a --config file, for adapters; maps are full",
    "heal --states-weight": "nothing: models without next tokens learn from their states, too",
    "heal --sequential": "--heal linear or best, which fit each branch on the whole model",
    "plan --rank": "the key rank of a --config file, for adapters; maps are full",
    "plan --states-weight": "nothing: models without next tokens learn from their states, too",
    "plan --sequential": "--heal linear or best, which fit each branch on the whole model",
    "check --bencher": "--github-benchmark, or the whole check by --output",
    "check --gitlab-metrics": "--junit, which GitLab shows, or the whole check by --output",
    "check --max-cache-read-increase": "--max-memory-increase, which limits the KV cache",
    "check --max-mac-increase": "--max-node-increase and --max-slowdown",
    "check --max-layer-increase": "--max-slowdown",
    "check --max-scratch-increase": "--max-memory-increase",
    "check --max-weight-read-increase": "--max-size-increase",
    "check --max-probe-drop": "--max-task-drop, which limits the tasks of a comparison",
    "check --confirm": _AGAIN,
    "check --models": _AGAIN,
    "check --eval-text": _AGAIN,
    "check --page": "--comment, or --github's summary",
    "check --pytest-benchmark": "--github-benchmark, or report.json, which has all times",
    "build --device": _VISIBLE,
    "compare --device": _VISIBLE,
    "costs --device": _VISIBLE,
    "evaluate --device": _VISIBLE,
    "export --device": _VISIBLE,
    "generate --device": _VISIBLE,
    "build --hardware-compatibility": _TRTEXEC,
    "build --version-compatible": _TRTEXEC,
    "build --tf32": _TRTEXEC,
    "build --timing-cache": _TRTEXEC,
    "generate --seed": _SERVER,
    "generate --temperature": _SERVER,
    "generate --top-k": _SERVER,
    "generate --top-p": _SERVER,
    "package --beside": "tar",
    "package --tarball": "tar, with each engine's .json, tokenizer.json and config.json",
    "compare --long-context": _LONG,
    "export --long-context": _LONG,
    "compare --probes": _PROBES,
    "evaluate --probes": _PROBES,
    "export --probes": _PROBES,
    **{
        f"{command} --{key}": "--objective kl, and --tasks to evaluate the result"
        for command in ("plan", "export")
        for key in ("search-items", "judged-items", "search-seed")
    },
    "plan --ray": _ONE_PROCESS,
    "plan --ray-workers": _ONE_PROCESS,
    "report --format": "-o FILE.md, which is written as Markdown",
    "check-engine --report": "polygraphy inspect capability MODEL",
    "export --quantize mixed": "int4 with quantize_method: hqq in a --config file, without a text",
    "quantize --quantize mixed": "int4 with --quantize-method hqq, which needs no text",
    "quantize --quantize-method gptq": "--quantize-method hqq, which needs no text",
}
