#!/bin/sh
# Makes .venv in the project's root and installs the project into it, editable, with its test tools.
#
#   sh scripts/setup.sh                      from any directory; a second run starts at once, offline too
#   PYTHON=python3.13 sh scripts/setup.sh    with that interpreter (another one than .venv's remakes .venv)
#
# First it looks for everything the system must bring, and names all that is missing before any work.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
root=$(pwd -P)

say() { printf 'setup: %s\n' "$*"; }

# --- Already done? The stamp holds what the install depends on, and is written last ---------------------

stamp=.venv/setup-stamp
want=$(printf '%s\n' "$root" && cksum pyproject.toml scripts/setup.sh)

same_python() { # no PYTHON given, or it is the interpreter that .venv stands on
    base='import sys; print(sys.base_prefix, sys.version)'
    [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" -c "$base" 2>/dev/null)" = "$(.venv/bin/python -c "$base")" ]
}

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] &&
    .venv/bin/python -c 'import uv' 2>/dev/null && same_python; then
    say ".venv is up to date"
    exit 0
fi

# --- What the system must bring -------------------------------------------------------------------------

missing='' debian='' fedora='' macos=''

lack() { # what, and the packages of Debian and Ubuntu, of Fedora, and the step on macOS
    missing="$missing
  - $1
      Debian, Ubuntu: $2; Fedora: $3; macOS: $4"
    debian="$debian $2" fedora="$fedora $3"
    case "$macos" in *"$4"*) ;; *) macos="$macos${macos:+ && }$4" ;; esac
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=''
if [ -n "${PYTHON:-}" ]; then
    ! new_enough "$PYTHON" || python=$PYTHON
else
    for name in python3 python3.13 python3.12 python3.11; do
        if new_enough "$name"; then python=$name && break; fi
    done
fi

if [ -z "$python" ]; then
    asked=${PYTHON:-python3}
    found=$("$asked" --version 2>&1) || found='none that runs'
    case $found in Python*) name=python3.11 ;; *) name=python3 ;; esac # its python3 is too old, or not there
    lack "Python 3.11 or newer (found: $found, as $asked; PYTHON=... names another)" \
        "$name $name-venv $name-dev" "$name $name-devel" 'brew install python'
else
    case "${python##*/}" in python3.[0-9]*) name=${python##*/} ;; *) name=python3 ;; esac
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        lack "Python's venv and ensurepip modules (asked: $python)" "$name-venv" "$name" 'brew install python'
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null ||
        lack "Python's headers, Python.h (asked: $python)" "$name-dev" "$name-devel" 'brew install python'
fi

compiles() { printf '#include <string>\n' | "$1" -x c++ -fsyntax-only - 2>/dev/null; }
compiles g++ || compiles c++ ||
    lack 'a C++ compiler, g++ or c++ (youtokentome is compiled here)' g++ gcc-c++ 'xcode-select --install'

if [ -n "$missing" ]; then
    cat >&2 <<END
setup: this system lacks what the install needs; nothing was changed.
$missing

Install it with one of
  Debian, Ubuntu:  sudo apt-get install$debian
  Fedora:          sudo dnf install$fedora
  macOS:           $macos
and run the same command again.
END
    exit 1
fi

# --- The install ----------------------------------------------------------------------------------------

sound() { # .venv's own pip answers, from this very place: neither broken, nor moved, nor copied
    case "$(.venv/bin/pip --version 2>/dev/null)" in *" from $root/.venv/"*) same_python ;; *) false ;; esac
}

rm -f "$stamp"
if ! sound; then
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

say 'getting uv'
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
say 'installing the project and its tools (the first time takes minutes: PyTorch is large)'
.venv/bin/uv pip install --python .venv/bin/python -e . --group dev

printf '%s\n' "$want" >"$stamp"
say 'done'
