# Functions that the launch scripts share: usage, --dry_run, environment files, and running or printing a command.

# usage prints the comment at the start of the script, without the #! line.
usage() {
    sed -n '2,/^set /{/^set /d;/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"
}

# read_options ARGUMENT... sets `dry_run` if --dry_run is among the arguments, at any position, and sets `rest` to the
# other arguments. With --help it prints the usage and exits. The caller continues with `set -- "${rest[@]}"`.
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

# run COMMAND... runs a command. With --dry_run it prints the command instead, quoted for a shell.
run() {
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@" && printf '\n'
    else
        "$@"
    fi
}

# use_environment FILE exports the variables of a file of NAME=value lines and # comments. XLA_FLAGS of the user are
# appended to those of the file, so that they take precedence. With --dry_run it also prints the variables.
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

# require_variables NAME... exits with the usage if one of these environment variables is not set.
require_variables() {
    for name in "$@"; do
        [ -n "${!name:-}" ] || { printf '%s is not set: set this environment variable\n\n' "$name" >&2 && usage >&2 && exit 2; }
    done
}
