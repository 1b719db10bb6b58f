#!/bin/sh
# Serves a model for `sampler.backend: vllm`. In an environment of its own: `pip install vllm`.
#
#   sh examples/vllm_server.sh runs/sft/model
#   fastalign generate --model.path runs/sft/model --prompts prompts.jsonl \
#       --sampler.backend vllm --sampler.url http://localhost:8000/v1
#
# or what a run trains on (the same `--sampler` settings): before every step the server then reads the run's weights
# anew, which its development mode lets everybody ask for who can reach the port: it listens on this machine alone.
#
# Log-probs after temperature and truncation are those that training compares with; vLLM's default is before them.
# Shared prompts are computed once by its prefix cache.
set -e
export VLLM_SERVER_DEV_MODE=1
exec vllm serve "${1:?the directory or hub name of a model}" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" --logprobs-mode processed_logprobs --max-logprobs 1 --enable-prefix-caching
