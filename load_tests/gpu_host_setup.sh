# Sourced from the checkout's root on a GPU host that has neither network nor .venv, only python3 with PyTorch:
#     source load_tests/gpu_host_setup.sh && python3 load_tests/bench_server.py ...
# Unpacks the server and wheels from .gpu (a folder for each piece, with its unpack.sh), and shows the checkout's
# packages to every python3: the one inside the server reads no PYTHONPATH, but it does read .pth files.

trident_gpu_host() {
    local piece
    if [[ ! -f .gpu/server/unpack.sh ]]; then
        echo "gpu_host_setup.sh: no .gpu/server/unpack.sh in $PWD: pack the server, and go to the checkout's root" >&2
        return 1
    fi
    for piece in .gpu/*/unpack.sh; do
        bash "$piece" "$(dirname "$piece")" || return 1
    done
    source /tmp/trident-gpu/env.sh || return 1
    printf '%s\n' "$PWD/backend_src" "$PWD/client" \
        >"$(python3 -c 'import site; print(site.getsitepackages()[0])')/_trident_checkout.pth" || return 1
    # The launcher adds its folder to the server's library path; here it only has to exist.
    if ! python3 -I backend_src/trident_llm/launch/libpython.py; then
        echo "gpu_host_setup.sh: $(command -v python3) has no libpython, which the server's Python backend links" >&2
        return 1
    fi
    TRIDENT_PYTHON=$(command -v python3)
    export TRIDENT_PYTHON
}

trident_gpu_host
