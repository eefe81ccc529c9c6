# Makes or updates the virtual environment; sourced by the other scripts with the extras as argument ("" or "dev").
#
# Sets VENV. Variables a user may set:
#   PYTHON           the interpreter to use; default: python3.12 or newer on PATH, then pyenv's, then uv's, then python3.11
#   NANOTRAIN_VENV   where the environment goes; default .venv in the checkout
#   NANOTRAIN_TORCH  another torch build: what follows `pip install`, for example "torch==2.11.0 --index-url URL"

VENV=${NANOTRAIN_VENV:-$PWD/.venv}

python_is() { # python_is INTERPRETER MINOR: is it Python 3.MINOR or newer?
  "$1" -c "import sys; sys.exit(sys.version_info < (3, $2))" >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in python3.12 python3.13 python3.14 python3 python; do
    if command -v "$candidate" >/dev/null && python_is "$candidate" 12; then command -v "$candidate"; return; fi
  done
  if command -v pyenv >/dev/null; then
    for candidate in "$(pyenv root)"/versions/3.1[2-9].*/bin/python; do
      if [ -x "$candidate" ] && python_is "$candidate" 12; then echo "$candidate"; return; fi
    done
  fi
  if command -v uv >/dev/null && candidate=$(uv python find '>=3.12' 2>/dev/null); then echo "$candidate"; return; fi
  for candidate in python3.11 python3 python; do
    if command -v "$candidate" >/dev/null && python_is "$candidate" 11; then
      echo "Python 3.12 was not found; with $("$candidate" --version) all of the quickstart works, but megatron-core cannot be installed." >&2
      command -v "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer was not found; install it (Debian: apt-get install python3 python3-venv) or name it with PYTHON=/path/to/python." >&2
  return 2
}

make_venv() { # make_venv EXTRAS
  local python stamp extras=${1:+[$1]}
  python=${PYTHON:-$(find_python)} || return 2
  if ! python_is "$python" 11; then echo "PYTHON ($python) must be Python 3.11 or newer." >&2; return 2; fi
  stamp=$({ cat constraints.txt pyproject.toml; "$python" --version; echo "${NANOTRAIN_TORCH:-}"; pwd; } | sha256sum | cut -c1-16)
  # What was installed with more extras serves those who need fewer.
  if [ -f "$VENV/.installed-$stamp-dev" ] || [ -f "$VENV/.installed-$stamp-${1:-core}" ]; then return 0; fi
  if [ ! -x "$VENV/bin/python" ] && ! "$python" -m venv "$VENV"; then
    echo "$python could not make a virtual environment in $VENV; on Debian: apt-get install python3-venv." >&2
    return 2
  fi
  echo "Installing into $VENV (the first time this downloads a few GB)." >&2
  local constraints=constraints.txt
  if [ -n "${NANOTRAIN_TORCH:-}" ]; then
    # The user's torch decides over its own libraries.
    constraints=$VENV/constraints.txt
    grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==' constraints.txt >"$constraints"
    # shellcheck disable=SC2086 # several words on purpose
    "$VENV/bin/python" -m pip install -q $NANOTRAIN_TORCH || return 2
  fi
  "$VENV/bin/python" -m pip install -q -c "$constraints" -e ".$extras" || {
    echo "The installation failed; the message above is pip's. Run the same command again to continue." >&2
    return 2
  }
  rm -f "$VENV"/.installed-*
  touch "$VENV/.installed-$stamp-${1:-core}"
}
