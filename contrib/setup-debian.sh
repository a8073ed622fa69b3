#!/bin/sh
# setup-debian.sh [demo|wheel|deb|test|fuzz]: installs the Debian packages that this purpose needs
# and that are missing, or names them if that is not allowed. A purpose includes those before it.
set -eu

purpose=${1:-test}
python=${PYTHON:-python3}
missing=
need() { # need PACKAGE CHECK...: the package, unless the check holds
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}
links_statically() {
    folder=$(mktemp -d) && echo 'int main(void) { return 0; }' |
        cc -static -x c -o "$folder/a.out" - && rm -r "$folder"
}
has_libfuzzer() {
    folder=$(mktemp -d) && echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' |
        clang -fsanitize=fuzzer,address -x c -o "$folder/a.out" - && rm -r "$folder"
}
has_library() {
    "$python" -c 'import ctypes.util, sys; sys.exit(not ctypes.util.find_library(sys.argv[1]))' "$1"
}

case $purpose in demo | wheel | deb | test | fuzz) ;; *)
    echo "ninepd: $0 demo, wheel, deb, test or fuzz, not $purpose" >&2
    exit 2
    ;;
esac

# The C parts, a virtual environment, and the program that boots the demo's guest.
need gcc command -v gcc
need libc6-dev links_statically
need python3-dev "$python" -c \
    'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))'
need python3-venv "$python" -c 'import ensurepip, venv'
need ca-certificates test -d /etc/ssl/certs
need util-linux command -v setpriv
need debian-archive-keyring test -e /usr/share/keyrings/debian-archive-keyring.gpg

if [ "$purpose" != demo ] && [ "$purpose" != wheel ]; then
    # dpkg itself looks whether these are there: contrib/debian/control.
    for package in build-essential debhelper dh-python python3-cffi python3-click python3-dev \
        python3-mypy-extensions python3-packaging python3-prometheus-client python3-pyroute2 \
        python3-uvloop python3-venv; do
        need "$package" dpkg --status "$package"
    done
fi

if [ "$purpose" = test ] || [ "$purpose" = fuzz ]; then
    # User-Mode Linux, built from its source.
    need bc command -v bc
    need binutils command -v ld
    need bison command -v bison
    need flex command -v flex
    need perl perl -e 'use strict'
    need tar command -v tar
    need xz-utils command -v xz
    # File systems and the traces of tests. The library's own package has another name in each
    # release; this one depends on it.
    need e2fsprogs sh -c 'PATH=$PATH:/usr/sbin:/sbin command -v mkfs.ext4'
    need fuse3 has_library fuse3
    need strace command -v strace
    # Process 1 of a test's own; nothing of it is started here.
    need systemd test -x /usr/lib/systemd/systemd
    # Root file systems of tests.
    need mmdebstrap command -v mmdebstrap
fi

if [ "$purpose" = fuzz ]; then
    # libFuzzer, the sanitizers, and names in their reports.
    need clang command -v clang
    need libclang-rt-dev has_libfuzzer
    need llvm command -v llvm-symbolizer
fi

[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "ninepd: install what Debian calls$missing, then run this again" >&2
    exit 2
fi
if [ "$(id -u)" != 0 ]; then
    echo "ninepd: packages are missing; as root, run: apt-get install$missing" >&2
    exit 2
fi
echo "ninepd: installing Debian's packages$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get --quiet update
# The packages' names hold no spaces.
# shellcheck disable=SC2086
apt-get --quiet install --yes --no-install-recommends $missing
