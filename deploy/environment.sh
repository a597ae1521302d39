#!/bin/sh
# Makes the virtual environment that the Makefile works in. Run from the repository's root:
#
#     sh deploy/environment.sh FOLDER new|legacy
#
# FOLDER is made, or kept if its Python will do; the stamp FOLDER/installed-new or -legacy is written last, so that an
# interrupted run is simply run again. PYTHON in the environment names the interpreter. Needs no root and no more than
# POSIX sh: this is what runs on a fresh machine.
set -eu

venv=$1
torch=$2

fail() {
    echo "$*" >&2
    exit 1
}

# Prints what speaks for or against an interpreter, and its version: "fit 3.12", "bare 3.11" (no venv), "late 3.14"
# (no build of the legacy torch), "old 3.9", "absent ?". Old Pythons must be able to parse the question.
judge() {
    "$1" -c '
import sys
version = "%d.%d" % sys.version_info[:2]
verdict = "fit"
if sys.version_info < (3, 11):
    verdict = "old"
elif sys.argv[1] == "legacy" and sys.version_info >= (3, 14):
    verdict = "late"
else:
    try:
        import venv
        from ensurepip import version as _
    except ImportError:
        verdict = "bare"
print(verdict + " " + version)
' "$torch" 2>/dev/null || echo "absent ?"
}

# One sentence on why `$1` with the verdict `$2` will not do, and what to install.
complain() {
    version=${2#* }
    case $2 in
        bare*) fail "$1 is Python $version without its venv module: install it (sudo apt install python$version-venv)." ;;
        late*) fail "$1 is Python $version, and the legacy torch has builds up to 3.13: name an older one (make TORCH=legacy PYTHON=python3.13)." ;;
        old*) fail "$1 is Python $version, and 3.11 or newer is needed: install one (Debian 12 and Ubuntu 24.04 have it: sudo apt install python3 python3-venv) or name one (make PYTHON=/path/to/python3)." ;;
        *) fail "There is no working $1, and Python 3.11 or newer is needed: install it (sudo apt install python3 python3-venv) or name one (make PYTHON=/path/to/python3)." ;;
    esac
}

# Sets `python` to the first interpreter that will do; where none does, complains about the first that is there.
choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11
    fi
    first='' first_verdict=''
    for python in "$@"; do
        verdict=$(judge "$python")
        case $verdict in
            fit*) return ;;
            absent*) ;;
            *) if [ -z "$first" ]; then first=$python first_verdict=$verdict; fi ;;
        esac
    done
    complain "${first:-$1}" "${first_verdict:-absent ?}"
}

# Keeps an environment that will do (somebody may have put a smaller build of torch into it), else makes it anew.
make_venv() {
    present=$(judge "$venv/bin/python")
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || present="absent ?"
    if [ -n "${PYTHON:-}" ] || [ "${present% *}" != fit ]; then
        choose_python
        [ "$present" = "$verdict" ] || "$python" -m venv --clear "$venv"
    fi
}

case $torch in
    new | legacy) ;;
    *) fail "TORCH=$torch is not known: new (GPUs from 2018 on, or none) or legacy (Maxwell, Pascal, Volta)." ;;
esac
make_venv
rm -f "$venv"/installed-*
echo "Installing the coordinator, the worker with PyTorch ($torch) and the test tools into $venv with $("$venv/bin/python" -V): this downloads a few GB and can take minutes." >&2
"$venv/bin/python" -m pip install --disable-pip-version-check -q \
    -r requirements_server.txt -r "requirements_${torch}_gpu.txt" -e '.[dev,privacy,privacy-worker]' ||
    fail "pip could not install everything; its reason is above. Run make again to go on from there."
touch "$venv/installed-$torch"
