# Sourced: `make_venv FOLDER EXTRA [REQUIREMENT]` makes a virtual environment with the library, one extra, and the
# embedded packages; the requirement is resolved together with them.
make_venv() {
    local folder=$1 extra=$2 python
    for python in python3 python3.13 python3.12 python3.11 python3.10 none; do
        [ "$python" != none ] || { echo "Python 3.10 or newer is needed; none was found." >&2; return 1; }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
    done
    # asked for pip, not for the file: without the venv module Debian leaves a folder that has Python and no pip
    if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv "$folder" || { echo "The venv module is needed (Debian: apt-get install python3-venv)." >&2; return 1; }
    fi
    # torch is held at one release in both steps, so that no other package can replace it
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r recipes/requirements.txt
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c recipes/requirements.txt -e ".[$extra]" ${3:+"$3"}
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r recipes/embedded.txt
}
