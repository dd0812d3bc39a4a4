# Sourced by run_local.sh and run_tests.sh, which are run from this folder.
#
# use_environment REQUIREMENTS [EXTRA]: sets PYTHON to an interpreter that has what pyproject.toml asks for
# (and its optional dependencies EXTRA). The active one is taken if it does; otherwise .venv is made with the
# versions that REQUIREMENTS pins.

use_environment() {
    local requirements=$1 extra=${2:-} candidate
    for candidate in python3 .venv/bin/python; do
        if satisfies "$candidate" "$extra"; then
            PYTHON=$(command -v "$candidate")
            echo "environment: $PYTHON"
            return
        fi
    done
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or later is needed; python3 is $(python3 --version 2>&1)" >&2
        exit 1
    fi
    echo "environment: installing $requirements into .venv (a few minutes, once)"
    # An attempt without Debian's python3-venv leaves a .venv that has no pip.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1 && ! python3 -m venv --clear .venv; then
        echo "error: python3 cannot make a virtual environment; on Debian: apt install python3-venv" >&2
        exit 1
    fi
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"; then
        echo "error: installing $requirements failed, see above; run this again once that is mended" >&2
        exit 1
    fi
    PYTHON=.venv/bin/python
}

# build_kernels: compile the operator and the ABN, unless their binaries are of these sources and fit this
# PyTorch. If that fails, the slower PyTorch path is used.
build_kernels() {
    local log=build/kernels.log
    if are_built; then
        return
    fi
    mkdir -p build
    echo "kernels: compiling (under a minute, once; all output is in $log)"
    "$PYTHON" setup.py build_ext --inplace >"$log" 2>&1 || echo "kernels: not built, see $log" >&2
    sed -n 's/^ccnet: /kernels: /p' "$log"
}

are_built() {
    "$PYTHON" -c '
import sys
from pathlib import Path
sys.path.append("cc_attention")
from native import Kernels
sys.exit(any(Kernels(Path(package)).why_unusable() for package in ("cc_attention", "libs")))'
}

satisfies() {
    "$1" - "$2" 2>/dev/null <<'PYTHON'
import sys
import tomllib
from importlib.metadata import version

from packaging.requirements import Requirement  # tensorboard brings it along

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
needed = project["dependencies"] + (project["optional-dependencies"][sys.argv[1]] if sys.argv[1] else [])
for requirement in map(Requirement, needed):
    if not requirement.specifier.contains(version(requirement.name), prereleases=True):
        sys.exit(1)
PYTHON
}
