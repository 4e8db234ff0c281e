#!/bin/sh
# The one run on a GPU: tests/gpu/once.sh [--out FILE] [--small] [--only SECTION,...]; once.py says what it finds.
# It needs the project's files and what is installed: PYTHON, or .venv, or python3 with torch and triton.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH= cd -- "$here/../.." && pwd)
python=${PYTHON:-}
[ -n "$python" ] || { [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python || python=python3; }
if ! (cd "$here" && "$python" -c "import longreach") 2>/dev/null; then
    # A link gives the package its name, whatever the folder is called.
    links=$(mktemp -d)
    trap 'rm -rf "$links"' EXIT
    ln -s "$root" "$links/longreach"
    PYTHONPATH=$links${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
fi
"$python" "$here/once.py" "$@"
