#!/bin/sh
# Export a checkpoint, write a checked model repository, and serve it with Triton:
#     sh examples/triton_service/triton_service.sh CHECKPOINT REPOSITORY
set -eu
checkpoint=$1
repository=$2
image=nvcr.io/nvidia/tritonserver:26.07-py3

if [ ! -d "$repository" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    msn-export onnx "$checkpoint" --target onnxruntime --output "$work/model.onnx"
    msn-export triton "$work/model.onnx" --output "$repository" --ensemble --warmup
fi
msn-export triton --lint "$repository"
docker run --rm -p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 \
    -v "$(realpath "$repository")":/models:ro "$image" \
    tritonserver --model-repository=/models --disable-auto-complete-config
