# Sourced by every script here. Brings the project's environment (.venv) up to what uv.lock says, with nothing
# but Python 3.11 or newer on the machine, and is quick when there is nothing to do. Several scripts may run at
# once, from any folder. It gives:
#
#   $root               the project's folder
#   prepare [OPTION...] makes .venv; the options are those of `uv sync`
#
# What uv does not find on the machine goes into .tools, which git ignores.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
tools="$root/.tools"
uv_version=0.13.9

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# The path of a Python that is new enough: python3.11 first, since that is what the lock file was tried with.
find_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13 python3.14 python; do
        if "$candidate" -c 'import sys; print(sys.executable); sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            return
        fi
    done
    fail "Python 3.11 or newer is needed and none was found. Install it (for example: apt-get install python3.11)."
}

# The path of a uv: the machine's, if it understands the lock file (read without network), else our own.
find_uv() {
    local own="$tools/uv-$uv_version/bin/uv"
    if uv export --project "$root" --python "$1" --frozen --offline --quiet >/dev/null 2>&1; then
        command -v uv
        return
    fi
    [ -x "$own" ] || install_uv "$1" >&2
    echo "$own"
}

# Puts uv into $tools. It is made aside and renamed into place, so that scripts which start together find it whole.
install_uv() {
    local draft
    draft=$(mktemp -d "$tools/draft.XXXXXX")
    if ! { "$1" -m venv "$draft" && "$draft/bin/python" -m pip install --quiet "uv==$uv_version"; }; then
        rm -rf "$draft"
        fail "uv could not be installed with $1, see above. Debian and Ubuntu need the package python3-venv for it."
    fi
    chmod 755 "$draft" # mktemp makes it private
    "$1" - "$draft" "$tools/uv-$uv_version" <<'PYTHON'
import os, shutil, sys
try:
    os.rename(*sys.argv[1:])
except OSError:  # another script was first
    shutil.rmtree(sys.argv[1])
PYTHON
}

prepare() {
    local python="$root/.venv/bin/python" uv
    if [ -x "$python" ] && [ ! -w "$root/.venv" ]; then
        return # another user's, who set it up: it is used as it is
    fi
    # An environment that works keeps its Python: another one would mean to remove it under whoever is using it.
    "$python" -c '' 2>/dev/null || python=$(find_python)

    mkdir -p "$tools"
    [ -e "$tools/.gitignore" ] || echo '*' >"$tools/.gitignore"
    export UV_PYTHON_DOWNLOADS=never UV_PROJECT_ENVIRONMENT="$root/.venv"
    if [ ! -w "${HOME:-/nowhere}" ]; then
        export UV_CACHE_DIR="$tools/cache"
    fi
    # Like pip, trust whom the machine trusts, where it has a list.
    if [ "$("$python" -c 'import ssl; print(len(ssl.create_default_context().get_ca_certs()))')" != 0 ]; then
        export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}"
    fi
    uv=$(find_uv "$python")
    "$uv" sync --project "$root" --python "$python" --frozen --quiet "$@"
}
