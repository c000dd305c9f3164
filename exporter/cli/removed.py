"""What takes the place of commands and options that this version doesn't have any more."""

REMOVED_COMMANDS = {
    "gpu-session": "make gpu, in a clone",
    "check-engine": "depthcut build, which parses first and says what is in the way",
    "refit": "depthcut build, which builds an engine with the graph's weights",
}
_COMPARE = "score for each, and then score --compare a.json b.json c.json"
_LONG = "eval_sequence_length in a --config file: longer samples have more context"
_MAPS = "the key rank of a --config file, for adapters; maps are full"
_MODELOPT = "--quantize int8-qdq, or ModelOpt by itself on the exported graph"
_HQQ = "int4 with quantize_method: hqq (a key of export), which needs no text"
_OPTIONS = (
    ("export plan", "--search-seconds, --rescore-every", "--search greedy"),
    ("plan", "--curve", "depthcut depths, which compares cuts of several sizes"),
    ("depths", "--other-text", "depthcut export, which measures the healed cut on a second text"),
    ("depths", "--recommend", "depths without it, which always recommends"),
    ("compare export", "--stride", _LONG),
    (
        "compare export",
        "--power, --smallest",
        "--time-budget for a verdict, or more --rounds",
    ),
    ("compare export", "--pin", "taskset -c 2,3 before the command, with --threads 2"),
    ("score", "--checkpoints", _COMPARE),
    ("score", "--revisions", f"{_COMPARE} (a --revision for each)"),
    ("score", "--vary-calibration", f"{_COMPARE} (a --calibration for each)"),
    ("score", "--vary-samples", f"{_COMPARE} (a number of --samples for each)"),
    ("build", "--refittable, --strip-weights", "depthcut build again, with the graph's weights"),
    ("build", "--dim", "trtexec for a graph with other free axes, or fix them in the graph"),
    ("costs", "--engine", "depthcut build, and costs of the engine"),
    ("costs", "--rank", "full maps, which healing fits"),
    ("costs", "--replacement", "nothing: the table has all replacements"),
    ("heal", "--save-checkpoint", "depthcut checkpoint, with the healed plan"),
    ("export heal plan", "--rank", _MAPS),
    ("export heal plan", "--states-weight", "no option: such models learn from their states, too"),
    ("export heal plan", "--sequential", "--heal linear or best, which fit on the whole model"),
    ("check", "--bencher", "--github-benchmark, or the whole check by --output"),
    ("check", "--gitlab-metrics", "--junit, which GitLab shows, or the whole check by --output"),
    ("check", "--max-cache-read-increase, --max-scratch-increase", "--max-memory-increase"),
    ("check", "--max-mac-increase, --max-layer-increase", "--max-slowdown"),
    ("check", "--max-weight-read-increase", "--max-size-increase"),
    ("check", "--max-probe-drop", "--max-task-drop, which limits the tasks of a comparison"),
    ("check", "--confirm, --models, --eval-text", "compare again, and check its report"),
    ("check", "--page", "--comment, or --github's summary"),
    ("check", "--pytest-benchmark", "--github-benchmark, or report.json, which has all times"),
    ("build compare costs evaluate export generate", "--device", "CUDA_VISIBLE_DEVICES"),
    ("build", "--hardware-compatibility, --version-compatible", "trtexec for such an engine"),
    ("verify-engine", "--tolerance", "no option: the tolerance follows from the precision"),
    ("build export", "--cache-reads", "--logits all for an engine that reads all of its caches"),
    ("build", "--tf32, --timing-cache", "trtexec for such an engine"),
    ("generate", "--seed, --temperature, --top-k, --top-p", "the server that you deploy to"),
    ("generate", "--runner", "the file's name, or a folder of engines alone"),
    ("package", "--beside", "tar"),
    ("package", "--tarball", "tar, with each engine's .json, tokenizer.json and config.json"),
    ("compare export", "--long-context", "--tasks with lm-eval's tasks, such as ruler"),
    (
        "compare evaluate export",
        "--probes",
        "--tasks and --task-data: samples/07_ci/probes.py",
    ),
    ("score", "--metric taylor", "--metric relative-l2, which ranks nearly as it did"),
    ("plan export", "--search iterative", "--search greedy"),
    ("plan export", "--objective tasks", "the objective kl"),
    ("plan export", "--search-items, --judged-items, --search-seed", "--objective kl"),
    ("plan", "--ray, --ray-workers", "score --metric kl --ray, whose scores plan takes"),
    ("prune", "--report", "prune.json next to the result, or NAME.prune.json beside another's"),
    ("gguf", "--map-type", "gguf without it: maps are written as Q8_0"),
    ("gguf", "--shard-size", "llama.cpp's llama-gguf-split on the result"),
    ("report", "--format", "-o FILE.md, which is written as Markdown"),
    ("export quantize", "--quantize mixed", _HQQ),
    (
        "export quantize",
        "--modelopt-python, --quantize fp8, --quantize int4-awq",
        _MODELOPT,
    ),
    ("export quantize", "--quantize-method gptq", "--quantize-method hqq, which needs no text"),
    ("report", "--importance", "depthcut score, which prints the scores"),
    ("checkpoint", "--importance", "export --checkpoint, whose card tells of the scores"),
    ("plan export", "--require-speedup", "compare, and check --min-speedup"),
)
REMOVED = {
    f"{command} {option}": instead
    for commands, options, instead in _OPTIONS
    for command in commands.split()
    for option in options.split(", ")
}


def replaced(command: str | None, option: str) -> str | None:
    """What takes the place of an option, or of one with its value; None: nothing was removed."""
    return REMOVED.get(f"{command} {option.partition(':')[0]}")
