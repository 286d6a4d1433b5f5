#!/usr/bin/env bash
# Makes the virtual environment .venv in the repository and installs vLLM, this package (editable) and
# the development tools into it. Does no harm when run again; an interrupted run is taken up.
#
# PYTHON: the interpreter to use (default: the first that runs and is new enough).
# DEVICE: cpu or cuda (default: cuda where nvidia-smi lists a GPU).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Runs the candidate, since a pyenv shim on PATH may stand for a version that is not active.
usable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "No usable Python among: ${PYTHON:-python3 python3.12 python3.11 python3.13}." >&2
    echo "Python 3.11, 3.12 or 3.13 with the venv module is needed (on Debian: python3-venv);" >&2
    echo "PYTHON=/path/to/python names one." >&2
    return 1
}

if ! .venv/bin/python -c 'import pip' >/dev/null 2>&1; then
    python=$(find_python)
    echo "Creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

exec .venv/bin/python install/install_packages.py
