# Sourced by the other scripts, from the project's folder. `environment EXTRA...` makes .venv and installs the package
# with these extras at the versions of constraints.txt; it does nothing where that was already done.

environment() {
    local extras stamp wanted python
    extras=$(IFS=,; echo "$*")
    stamp=".venv/installed-${extras:-base}"
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -x .venv/bin/pip ]; then
        python=$(suitable_python) || return
        echo "Making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    echo "Installing ra_jax${extras:+[$extras]} into .venv (the first time takes some minutes)"
    .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
}

# The interpreter that .venv is made with: $PYTHON, else 3.11, for which the pins are tested, else a later one.
suitable_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or later was found (looked for ${PYTHON:-python3.11 python3.12 python3.13 python3}):" \
        "install one, or name it: PYTHON=/path/to/python bash $0" >&2
    return 1
}
