# Sourced by the other scripts: makes .venv with MaxTrain and the extras in $EXTRAS installed, and puts it on PATH.
# An environment that already has them for this pyproject.toml is used as it is. The versions are those that the tests passed with
# (constraints/); CONSTRAINTS= installs the newest instead.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  for python in python3.13 python3.12 python3.11 python3; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    python=
  done
  [ -n "$python" ] || { echo "Python 3.11 or newer is needed and was not found on PATH" >&2; exit 1; }
  "$python" -m venv .venv
fi
tested="constraints/python$(.venv/bin/python -c 'import sys; print(*sys.version_info[:2], sep=".")').txt"
CONSTRAINTS="${CONSTRAINTS-$([ -f "$tested" ] && echo "$tested" || true)}"
wanted="$(cat pyproject.toml ${CONSTRAINTS:+"$CONSTRAINTS"} | cksum) ${EXTRAS:-}"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "Installing MaxTrain into .venv${CONSTRAINTS:+ (versions of $CONSTRAINTS)} ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check ${CONSTRAINTS:+-c "$CONSTRAINTS"} -e ".${EXTRAS:+[$EXTRAS]}"
  echo "$wanted" > .venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
