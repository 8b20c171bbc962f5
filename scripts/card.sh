#!/usr/bin/env bash
# What an NVIDIA card is asked first, within 420 seconds: scripts/card.sh FOLDER [--suite] [--seconds N]
# PYTHON names the interpreter; PYTHONPATH the packages of an unpacked bundle (docs/gpu.md).
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/card.py" --output "${1:?give a folder for the results}" "${@:2}"
