# Sourced by the launch scripts and .ci/run: finds a Python, and makes or updates a virtual environment.
#
#   PYTHON           the interpreter to use, instead of looking for one
#   NANOTRAIN_VENV   where the environment lies (default: .venv in the checkout)
#   NANOTRAIN_TORCH  another build of PyTorch, as arguments of pip, for example
#                    NANOTRAIN_TORCH="torch==2.11.0 --index-url <index of CPU-only builds>"
#
# Versions are pinned by constraints.txt; where packages come from is the user's pip configuration.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${NANOTRAIN_VENV:-$ROOT/.venv}

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

# Print 311 for Python 3.11; 0 for what does not start (a pyenv shim without its version) or lacks the venv module.
usable_version() {
  "$1" -c 'import ensurepip, sys, venv; print(sys.version_info[0] * 100 + sys.version_info[1])' 2>/dev/null || echo 0
}

find_python() {
  local candidate version
  if [[ -n ${PYTHON:-} ]]; then
    version=$(usable_version "$PYTHON")
    ((version >= 311)) || die "PYTHON ($PYTHON) must be Python 3.11 or later with the venv module."
    echo "$PYTHON"
    return
  fi
  local candidates=(python3.12 python3.13 python3.14 python3 python)
  candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3)
  if command -v uv >/dev/null; then
    candidates+=("$(uv python find --no-project 3.12 2>/dev/null || true)")
  fi
  for candidate in "${candidates[@]}"; do
    [[ -n $candidate ]] && (($(usable_version "$candidate") >= 312)) && echo "$candidate" && return
  done
  if command -v uv >/dev/null && uv python install 3.12 >&2; then
    uv python find --no-project 3.12 && return
  fi
  for candidate in python3.11 python3 python; do
    if (($(usable_version "$candidate") == 311)); then
      say "Python 3.11: everything runs, except what needs megatron-core (Python 3.12): its test is skipped."
      echo "$candidate"
      return
    fi
  done
  if command -v python3 >/dev/null && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    die "python3 has no venv module, which Debian packs apart: run \`apt-get install python3-venv\` as root, or set PYTHON."
  fi
  die "Python 3.11 or later is needed: run \`apt-get install python3 python3-venv\` as root, or set PYTHON."
}

# Print the arguments for pip that pin everything; another PyTorch keeps its own companions.
pins() {
  if [[ -z ${NANOTRAIN_TORCH:-} ]]; then
    echo "$ROOT/constraints.txt"
    return
  fi
  grep -Ev '^(torch|triton|nvidia-.*|cuda-.*)==' "$ROOT/constraints.txt" >"$VENV/constraints.txt"
  "$VENV/bin/python" -m pip freeze | grep -E '^(torch|triton)==' >>"$VENV/constraints.txt" || true
  echo "$VENV/constraints.txt"
}

# make_environment [dev]: the environment in $VENV holds the package, and with `dev` what the tests need.
make_environment() {
  local what=${1:-core} wanted
  wanted=$({
    cat "$ROOT/constraints.txt" "$ROOT/pyproject.toml"
    echo "${NANOTRAIN_TORCH:-} $ROOT"
  } | sha256sum | cut -d' ' -f1)
  if [[ -x $VENV/bin/python ]] && grep -qsx "$wanted" "$VENV/.nanotrain-dev" "$VENV/.nanotrain-$what"; then
    return
  fi
  mkdir -p "$(dirname "$VENV")"
  if command -v flock >/dev/null; then # two scripts at once wait for each other
    exec 9>"$VENV.lock"
    flock 9
  fi
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    local python
    python=$(find_python)
    say "Making $VENV with $("$python" --version)."
    "$python" -m venv --clear "$VENV"
  fi
  local extra=""
  [[ $what == dev ]] && extra="[dev]"
  say "Installing the pinned dependencies into $VENV (the first time this takes minutes and about 6 GB)."
  rm -f "$VENV"/.nanotrain-*
  if [[ -n ${NANOTRAIN_TORCH:-} ]]; then
    # shellcheck disable=SC2086 # several arguments on purpose
    "$VENV/bin/python" -m pip install --quiet $NANOTRAIN_TORCH
  fi
  "$VENV/bin/python" -m pip install --quiet --constraint "$(pins)" --editable "$ROOT$extra"
  echo "$wanted" >"$VENV/.nanotrain-$what"
  if command -v flock >/dev/null; then
    exec 9>&-
  fi
}

# enter_environment KIND: go to the checkout, with PYTHON the interpreter of an environment that is there already, as the caller
# set it, or of one that is made.
enter_environment() {
  if [[ -z ${PYTHON:-} ]]; then
    make_environment "$1"
    PYTHON=$VENV/bin/python
  fi
  cd "$ROOT"
}
