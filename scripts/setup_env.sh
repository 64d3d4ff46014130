#!/usr/bin/env bash
# Make the Python environment of dual_loop, once. Run it, or source it: it exports PYTHON, the interpreter to use.
#
#   source scripts/setup_env.sh && "$PYTHON" -m dual_loop.cli --help
#
# The active environment (venv, or conda other than base) is used where there is one, else .venv in the repository.
# A stamp in the environment remembers what was installed, so the second call prints one line and does nothing.
#
#   DUAL_LOOP_EXTRAS       extras to install, separated by commas (dev, parquet, caption-eval); none unless set
#   DUAL_LOOP_CONSTRAINTS  a constraints file, or "none"; scripts/constraints.txt (the tested versions) unless set
#   TORCH_INDEX_URL        package index for torch alone, for example one that holds CPU wheels; pip's own unless set

_dl_say() { printf 'setup_env: %s\n' "$*"; }

_dl_fail() {
  printf 'setup_env: error: %s\n' "$*" >&2
  return 1
}

# Print the environment's folder; an active one wins over .venv.
_dl_env_dir() {
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    printf '%s\n' "$VIRTUAL_ENV"
  elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    printf '%s\n' "$CONDA_PREFIX"
  else
    printf '%s\n' "$1/.venv"
  fi
}

_dl_recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# Make .venv with the first Python on the PATH that is new enough.
_dl_make_venv() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
    if command -v "$candidate" >/dev/null 2>&1 && _dl_recent_enough "$candidate"; then
      _dl_say "making $1 with $candidate ($("$candidate" --version 2>&1))"
      "$candidate" -m venv "$1" && return 0
      _dl_fail "'$candidate -m venv' failed (on Debian and Ubuntu it needs the package python3-venv)"
      return 1
    fi
  done
  _dl_fail "no Python to make .venv with; seen: $(python3 --version 2>&1 || true); expected: Python 3.10 or newer" \
    "as python3 on the PATH; to do: install one, or activate an environment that has it"
}

# Exit 0 when the stamp in the environment ($2) fits this checkout ($1), the constraints file ($3) and the extras ($4).
# With "write" as $5, write the stamp instead. Extras that were installed before are kept in it.
_dl_stamp() {
  "$PYTHON" - "$@" <<'PY'
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import sys

root, env, constraints, extras, *mode = sys.argv[1:]
digest = hashlib.sha256(root.encode())
for name in (f"{root}/pyproject.toml", constraints):
    digest.update(b"none" if name == "none" else pathlib.Path(name).read_bytes())
wanted = set(extras.split(",")) - {""}
stamp = pathlib.Path(env, ".dual_loop_stamp")
key, _, stored = stamp.read_text(encoding="utf-8").partition(" ") if stamp.is_file() else ("", "", "")
present = set(stored.strip().split(",")) - {""}
if mode == ["write"]:
    stamp.write_text(f"{digest.hexdigest()} {','.join(sorted(wanted))}\n", encoding="utf-8")
elif mode == ["extras"]:
    print(",".join(sorted(wanted | present)))
else:
    if key != digest.hexdigest() or not wanted <= present or importlib.util.find_spec("torch") is None:
        sys.exit(1)
    try:
        importlib.metadata.version("dual-loop")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(1)
PY
}

# Print torch's version when it can be imported and pyproject.toml ($1) admits it; print nothing otherwise.
_dl_usable_torch() {
  "$PYTHON" - "$1" <<'PY'
import pathlib
import re
import sys


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split(".")]


lowest = re.search(r'"torch>=([0-9.]+)"', pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))[1]
try:
    import torch
except Exception:  # missing, or broken in any of the ways that a compiled package can break
    sys.exit(0)
if numbers(torch.__version__) >= numbers(lowest):
    print(torch.__version__)
PY
}

# Run pip install with $3...; everything it prints goes to a log in the environment ($1), the end of it to the user when
# it fails. $2 says in the error what was to be installed.
_dl_pip_install() {
  local log=$1/.dual_loop_pip.log what=$2
  shift 2
  if ! "$PYTHON" -m pip install "$@" >"$log" 2>&1; then
    tail -n 25 "$log" >&2
    _dl_fail "pip could not install $what; the end of its output is above, all of it in $log"
  fi
}

# Say so when the plain torch wheel may bring CUDA libraries that this machine cannot use.
_dl_hint_cpu_wheel() {
  [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] && [ -z "${TORCH_INDEX_URL:-}" ] || return 0
  [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null 2>&1 || _dl_say \
    "no NVIDIA GPU seen; if pip takes the CUDA build of torch (several GB), stop it and set TORCH_INDEX_URL to" \
    "an index of CPU wheels (see PyTorch's own installation page)"
}

# Install torch; $1 pyproject.toml, $2 environment, $3 constraints file or none.
_dl_install_torch() {
  local requirement index=()
  requirement=$("$PYTHON" -c 'import re, sys; print(re.search(r"\"(torch>=[0-9.]+)\"", open(sys.argv[1]).read())[1])' "$1") ||
    return 1
  if [ "$3" != none ] && grep -q '^torch==' "$3"; then
    requirement=$(grep '^torch==' "$3" | head -n 1)
  fi
  _dl_hint_cpu_wheel
  _dl_say "installing $requirement"
  # Only torch is looked for there: the other packages come from pip's own index in the next step.
  if [ -n "${TORCH_INDEX_URL:-}" ]; then
    index=(--index-url "$TORCH_INDEX_URL")
  elif [ "$3" != none ]; then
    index=(--constraint "$3")
  fi
  _dl_pip_install "$2" "$requirement" ${index[@]+"${index[@]}"} "$requirement"
}

# Install torch and the package (editable); $1 checkout, $2 environment, $3 constraints, $4 extras.
_dl_install() {
  local torch_version extras constraint=() kept=""
  "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
    { _dl_fail "$2 has no pip and 'python -m ensurepip' failed; to do: install pip there"; return 1; }
  torch_version=$(_dl_usable_torch "$1/pyproject.toml") || return 1
  if [ -n "$torch_version" ]; then
    _dl_say "keeping torch $torch_version"
  else
    _dl_install_torch "$1/pyproject.toml" "$2" "$3" || return 1
  fi
  if [ "$3" != none ]; then
    constraint=(--constraint "$3")
    if [ -n "$torch_version" ] && ! grep -qx "torch==${torch_version%%+*}" "$3"; then
      # Another torch than the tested one is kept as it is; sympy is free then, because torch pins its own.
      kept=$(mktemp) || return 1
      { grep -vE '^(torch|sympy)==' "$3"; printf 'torch==%s\n' "$torch_version"; } >"$kept"
      constraint=(--constraint "$kept")
    fi
  fi
  extras=$(_dl_stamp "$1" "$2" "$3" "$4" extras) || return 1
  _dl_say "installing dual-loop${extras:+[$extras]} from $1 (constraints: $3)"
  _dl_pip_install "$2" "the package" ${constraint[@]+"${constraint[@]}"} --editable "$1${extras:+[$extras]}" ||
    { rm -f ${kept:+"$kept"}; return 1; }
  rm -f ${kept:+"$kept"}
  _dl_stamp "$1" "$2" "$3" "$extras" write
}

_dl_setup() {
  local root env constraints extras
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || return 1
  env=$(_dl_env_dir "$root")
  constraints=${DUAL_LOOP_CONSTRAINTS:-$root/scripts/constraints.txt}
  extras=$(printf '%s' "${DUAL_LOOP_EXTRAS:-}" | tr -d '[:space:]')
  [ "$constraints" = none ] || [ -f "$constraints" ] ||
    { _dl_fail "DUAL_LOOP_CONSTRAINTS: no such file: $constraints; expected: a file, or none"; return 1; }
  PYTHON=$env/bin/python
  if [ ! -x "$PYTHON" ] && [ "$env" != "$root/.venv" ]; then
    _dl_fail "the active environment has no $PYTHON; to do: deactivate it, or make it again"
    return 1
  fi
  if [ ! -x "$PYTHON" ] || ! _dl_stamp "$root" "$env" "$constraints" "$extras"; then
    mkdir -p "$env" || return 1
    # The lock keeps a second set-up of the same environment waiting; it then finds the work done.
    (
      if command -v flock >/dev/null 2>&1; then flock 9; fi
      [ -x "$PYTHON" ] || _dl_make_venv "$env" || exit 1
      _dl_recent_enough "$PYTHON" ||
        { _dl_fail "$env has $("$PYTHON" --version 2>&1); expected: Python 3.10 or newer; to do: use another environment"
          exit 1; }
      _dl_stamp "$root" "$env" "$constraints" "$extras" || _dl_install "$root" "$env" "$constraints" "$extras" || exit 1
    ) 9>"$env/.dual_loop_lock" || return 1
  fi
  export PYTHON
  _dl_say "ready: $PYTHON"
}

_dl_setup || { return 1 2>/dev/null || exit 1; }
