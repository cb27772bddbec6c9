# Sourced by the other scripts, from the project's folder: finds a Python, makes an environment with it, and installs the
# package there at the versions of constraints.txt.

# find_python NAME... prints the first that runs and is Python 3.11 or later. NAME is a command, or a version such as
# 3.13, which is looked for on PATH and in pyenv's folder; a shim of pyenv may be there and not run. With $PYTHON set that
# is the only NAME.
find_python() {
    local name candidate
    [ -z "${PYTHON:-}" ] || set -- "$PYTHON"
    for name in "$@"; do
        while read -r candidate; do
            case $(version_of "$candidate") in
            3.1[1-9] | 3.[2-9][0-9])
                echo "$candidate"
                return
                ;;
            esac
        done < <(candidates "$name")
    done
    echo "No Python 3.11 or later runs as $(sed 's/ /, /g' <<<"$*"):" \
        "install one, or name it: PYTHON=/path/to/python bash $0" >&2
    return 1
}

candidates() {
    local root
    if [[ ! $1 =~ ^[0-9]+\.[0-9]+$ ]]; then
        echo "$1"
        return
    fi
    echo "python$1"
    if root=$(pyenv root 2>/dev/null); then
        printf '%s\n' "$root/versions/$1".*/bin/python | grep -E "/$1\.[0-9]+/bin/python$" | sort -rV
    fi
}

# version_of PYTHON prints 3.11, say, or nothing where it does not run.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# environment PYTHON EXTRA... sets `venv` to the folder of an environment of this Python with the package and these
# extras: .venv, or where .venv has another Python, .venv-X.Y. It is made where it is absent, and installed into where
# that was not yet done.
environment() {
    local python=$1 version extra extras= stamp wanted
    version=$(version_of "$python")
    venv=.venv
    if [ -e .venv ] && [ "$(version_of .venv/bin/python)" != "$version" ]; then
        venv=.venv-$version
    fi
    echo "Environment: $venv, Python $version"
    for extra in "${@:2}"; do
        # constraints.txt pins torch for Python 3.11 alone. Tests leave out what needs it elsewhere, which spares the
        # gigabytes of CUDA packages that the newest torch brings.
        if [ "$extra" != torch ] || [ "$version" = 3.11 ]; then
            extras+=,$extra
        fi
    done
    extras=${extras#,}
    stamp="$venv/installed-${extras:-base}"
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -x "$venv/bin/pip" ]; then
        "$python" -m venv "$venv"
    fi
    echo "Installing ra_jax${extras:+[$extras]} (the first time takes some minutes)"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
}
