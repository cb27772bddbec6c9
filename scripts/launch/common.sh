# Sourced by the launch scripts: usage from their heading, --dry_run, and running or printing a command.

# The comment at a script's head, without its first line.
usage() {
    sed -n '2,/^set /{/^set /d;/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"
}

# Takes --dry_run and --help out of the arguments, wherever they stand; what remains is in "$@" of the caller by
# `set -- "${rest[@]}"`.
read_options() {
    dry_run=
    rest=()
    for argument in "$@"; do
        case $argument in
            --dry_run) dry_run=yes ;;
            -h | --help) usage && exit 0 ;;
            *) rest+=("$argument") ;;
        esac
    done
}

# Runs a command, or with --dry_run prints it as one could type it.
run() {
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@" && printf '\n'
    else
        "$@"
    fi
}

# Puts the variables of an environment file (NAME=value lines, # comments) into the environment; flags of the user's own
# XLA_FLAGS come after the file's, and win.
use_environment() {
    local own=${XLA_FLAGS:-}
    unset XLA_FLAGS
    set -a
    # shellcheck disable=SC1090
    source "$1"
    set +a
    [ -z "$own" ] || export XLA_FLAGS="${XLA_FLAGS:-} $own"
    [ -z "$dry_run" ] || sed -n 's/^\([A-Z_]*\)=.*/\1/p' "$1" | while read -r name; do
        printf 'export %s=%q\n' "$name" "${!name}"
    done
}

# Dies with the usage where a variable that the script needs is not set.
need() {
    for name in "$@"; do
        [ -n "${!name:-}" ] || { printf '%s is not set\n\n' "$name" >&2 && usage >&2 && exit 2; }
    done
}
