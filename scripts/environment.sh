# Functions to find a Python, make an environment with it, and install the package there at the versions of
# constraints.txt. The other scripts source this file in the project's folder.

# find_python NAME... prints the first NAME that runs and is Python 3.11 or later. NAME is a command or a version such as
# 3.13. A version is searched on PATH and then in pyenv's folder, because a shim of pyenv may be on PATH and not run. If
# $PYTHON is set, only $PYTHON is tried.
find_python() {
    local name command
    [ -z "${PYTHON:-}" ] || set -- "$PYTHON"
    for name in "$@"; do
        while read -r command; do
            case $(version_of "$command") in
            3.1[1-9] | 3.[2-9][0-9])
                echo "$command"
                return
                ;;
            esac
        done < <(list_commands "$name")
    done
    echo "No Python 3.11 or later runs as $(sed 's/ /, /g' <<<"$*"):" \
        "install one, or give its path: PYTHON=/path/to/python bash $0" >&2
    return 1
}

# list_commands NAME prints the commands to try for NAME, one per line.
list_commands() {
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

# version_of PYTHON prints its version, such as 3.11. It prints nothing if PYTHON does not run.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# environment PYTHON EXTRA... sets `venv` to the folder of an environment with this Python, the package and these extras.
# The folder is .venv, or .venv-X.Y if .venv has another version of Python. The function makes the environment if it does
# not exist. It installs the package unless the same extras and versions are installed already.
environment() {
    local python=$1 version extra extras= stamp checksum
    version=$(version_of "$python")
    venv=.venv
    if [ -e .venv ] && [ "$(version_of .venv/bin/python)" != "$version" ]; then
        venv=.venv-$version
    fi
    echo "Environment: $venv, Python $version"
    for extra in "${@:2}"; do
        # constraints.txt pins torch only for Python 3.11. On other versions the tests that need torch are skipped. This
        # saves gigabytes, because the newest torch requires CUDA packages.
        if [ "$extra" != torch ] || [ "$version" = 3.11 ]; then
            extras+=,$extra
        fi
    done
    extras=${extras#,}
    stamp="$venv/installed-${extras:-base}"
    checksum=$(cat pyproject.toml constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$checksum" ]; then
        return
    fi
    if [ ! -x "$venv/bin/pip" ]; then
        "$python" -m venv "$venv"
    fi
    echo "Installing ra_jax${extras:+[$extras]} (the first time takes some minutes)"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
    echo "$checksum" >"$stamp"
}
