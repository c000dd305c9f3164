#!/bin/sh
# Cuts a GGUF file without PyTorch, and answers a prompt with the result in llama.cpp.
# Needs: pip install depthcut; for the answer llama-cpp-python, whose build takes minutes.
# Usage: run.sh FILE.gguf [OUT] [what to drop, as depthcut gguf takes it]
set -eu
file=$1
out=${2:-out/llama_cpp}
drop=${3:-attention:25,26,28,7,9,6,29,12}

mkdir -p "$out"
echo "== $file without $drop"
depthcut gguf "$file" --drop "$drop" -o "$out/cut.gguf"

if python -c 'import llama_cpp' 2>/dev/null; then
    echo "== The whole and the cut model in llama.cpp"
    python "$(dirname "$0")/answer.py" "$file" "$out/cut.gguf"
else
    echo "llama-cpp-python is not installed; any llama.cpp loads $out/cut.gguf."
fi
